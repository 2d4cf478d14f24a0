package dns

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// holder is the socket, and where it can be told the process, that keeps us from an address.
type holder struct {
	network string // "udp" or "tcp"
	addr    netip.AddrPort
	process string // empty: unknown
	pid     int
}

func (h holder) String() string {
	if h.pid == 0 {
		return fmt.Sprintf("something whose process is not seen from here (%s on %s)", h.network, h.addr)
	}
	return fmt.Sprintf("%s (pid %d, %s on %s)", h.process, h.pid, h.network, h.addr)
}

// HeldBy says which socket, of which process where that can be told, keeps us from an address; "" if none is seen.
func HeldBy(network string, addr netip.AddrPort) string {
	h, found := findHolder("/proc", network, addr)
	if !found {
		return ""
	}
	return h.String()
}

// findHolder looks through /proc/net for a socket that collides with addr and then through every process's
// descriptors for that socket. Only root sees all of them. An empty network means UDP and TCP.
func findHolder(proc, network string, addr netip.AddrPort) (holder, bool) {
	for _, table := range []struct{ file, network string }{{"udp", "udp"}, {"udp6", "udp"}, {"tcp", "tcp"}, {"tcp6", "tcp"}} {
		if network != "" && table.network != network {
			continue
		}
		f, err := os.Open(filepath.Join(proc, "net", table.file))
		if err != nil {
			continue
		}
		inode, at, found := findSocket(bufio.NewScanner(f), table.network, addr)
		f.Close()
		if !found {
			continue
		}
		h := holder{network: table.network, addr: at}
		h.process, h.pid = processOf(proc, inode)
		return h, true
	}
	return holder{}, false
}

// findSocket reads lines such as
//
//	sl  local_address rem_address   st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode …
//	 5: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000   0       0 18231 …
//
// (Documentation/networking/proc_net_tcp.rst). A TCP socket counts while it listens (state 0A).
func findSocket(lines *bufio.Scanner, network string, addr netip.AddrPort) (inode string, at netip.AddrPort, found bool) {
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 10 || network == "tcp" && f[3] != "0A" {
			continue
		}
		local, ok := parseProcAddr(f[1])
		if !ok || local.Port() != addr.Port() {
			continue
		}
		if local.Addr() == addr.Addr() || local.Addr().IsUnspecified() || addr.Addr().IsUnspecified() {
			return f[9], local, true
		}
	}
	return "", netip.AddrPort{}, false
}

// parseProcAddr reads "0100007F:0035": each 32 bits of the address in the host's byte order, here little
// endian as on every architecture that we build for.
func parseProcAddr(s string) (netip.AddrPort, bool) {
	host, portText, _ := strings.Cut(s, ":")
	raw, err := hex.DecodeString(host)
	if err != nil || len(raw)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for i := 0; i+4 <= len(raw); i += 4 {
		raw[i], raw[i+1], raw[i+2], raw[i+3] = raw[i+3], raw[i+2], raw[i+1], raw[i]
	}
	a, ok := netip.AddrFromSlice(raw)
	port, err := strconv.ParseUint(portText, 16, 16)
	return netip.AddrPortFrom(a.Unmap(), uint16(port)), ok && err == nil
}

func processOf(proc, inode string) (name string, pid int) {
	links, _ := filepath.Glob(filepath.Join(proc, "[0-9]*", "fd", "*"))
	for _, link := range links {
		if to, err := os.Readlink(link); err != nil || to != "socket:["+inode+"]" {
			continue
		}
		dir := filepath.Dir(filepath.Dir(link))
		comm, err := os.ReadFile(filepath.Join(dir, "comm"))
		if err != nil {
			continue
		}
		pid, _ = strconv.Atoi(filepath.Base(dir))
		return strings.TrimSpace(string(comm)), pid
	}
	return "", 0
}
