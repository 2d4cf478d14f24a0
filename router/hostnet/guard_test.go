package hostnet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// rawSocket opens a socket for whole frames on ethmesh inside ns.
func rawSocket(t *testing.T, ns *os.File) (fd int, send func(frame []byte)) {
	t.Helper()
	var index int
	err := inNamespace(ns, func() (err error) {
		dev, err := net.InterfaceByName("ethmesh")
		if err != nil {
			return err
		}
		index = dev.Index
		const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK, all)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd, func(frame []byte) {
		t.Helper()
		if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: index}); err != nil {
			t.Fatal(err)
		}
	}
}

// received reads frames until one equals last, and returns them all.
func received(t *testing.T, fd int, last []byte) (frames [][]byte) {
	t.Helper()
	buf := make([]byte, 2000)
	eventually(t, "the last frame arrived", func() bool {
		for {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return false
			}
			if from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			frames = append(frames, bytes.Clone(buf[:n]))
			if bytes.Equal(buf[:n], last) {
				return true
			}
		}
	})
	return frames
}

// ether makes a frame to everybody.
func ether(src mesh.MAC, kind uint16, payload ...[]byte) []byte {
	b := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, src[:]...)
	b = binary.BigEndian.AppendUint16(b, kind)
	return append(b, bytes.Join(payload, nil)...)
}

// packet4 and packet6 make packets without checksums of their own, which no bridge looks at.
func packet4(proto byte, src string, payload ...byte) []byte {
	b := make([]byte, 20, 64)
	b[0], b[8], b[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
	copy(b[12:], netip.MustParseAddr(src).AsSlice())
	copy(b[16:], []byte{10, 2, 1, 255})
	binary.BigEndian.PutUint16(b[10:], sum16(0, b))
	return append(b, payload...)
}

func packet6(next byte, src string, payload ...byte) []byte {
	b := make([]byte, 40, 100)
	b[0], b[6], b[7] = 0x60, next, 255
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	copy(b[8:], netip.MustParseAddr(src).AsSlice())
	copy(b[24:], netip.MustParseAddr("ff02::1").AsSlice())
	return append(b, payload...)
}

func neighbour(kind byte, target string) []byte {
	return append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, netip.MustParseAddr(target).AsSlice()...)
}

func TestGuard(t *testing.T) {
	h, hostNS := newHost(t)
	a, b := newNamespace(t), newNamespace(t)
	pa, pb := testPort(1, "10.2.1.1/24", "fd00::1/64"), testPort(2, "10.2.1.2/24", "fd00::2/64")
	for ns, p := range map[*os.File]*mesh.Port{a: &pa, b: &pb} {
		if err := h.AttachPort(ns, *p); err != nil {
			t.Fatal(err)
		}
		p.HostEnd = h.HostEnd(p.Owner)
	}
	fw := h.NewFirewall(FirewallConfig{})
	for range 2 {
		if err := fw.Guard([]mesh.Port{pb, pa}); err != nil {
			t.Fatal(err)
		}
	}
	gens := &generations{host: h}
	defer gens.close()
	gen := gens.now()
	if err := fw.Guard([]mesh.Port{pa, pb}); err != nil {
		t.Fatal(err)
	}
	if now := gens.now(); now != gen || gen == 0 {
		t.Error("the same guard is written again")
	}
	wantPing(t, "IPv4", a, "10.2.1.2", true)
	wantPing(t, "IPv6", a, "fd00::2", true)

	fd, _ := rawSocket(t, b)
	_, send := rawSocket(t, a)
	mac, other := pa.MAC, mesh.MAC{2, 9, 9, 9, 9, 9}
	ll := linkLocal(mac).String()
	arp := func(sender mesh.MAC, op byte, from, to string) []byte {
		f := appendGratuitousARP(nil, mac, netip.MustParseAddr(from))
		copy(f[22:], sender[:])
		f[21] = op
		copy(f[38:], netip.MustParseAddr(to).AsSlice())
		return f
	}
	bpdu := ether(mac, 0x0026, make([]byte, 46))
	copy(bpdu, []byte{0x01, 0x80, 0xc2, 0, 0, 0})
	cisco := ether(mac, 0x0026, []byte{0xaa, 0xaa, 3, 0, 0, 0x0c, 1, 0x0b}, make([]byte, 40))
	copy(cisco, []byte{0x01, 0, 0x0c, 0xcc, 0xcc, 0xcd})
	udp := func(port uint16) []byte { return append(binary.BigEndian.AppendUint16(nil, port), 0, 53, 0, 8, 0, 0) }
	to := func(port uint16) []byte {
		return append(binary.BigEndian.AppendUint16([]byte{19, 136}, port), 0, 8, 0, 0)
	}
	good := map[string][]byte{
		"own ARP":            arp(mac, 1, "10.2.1.1", "10.2.1.9"),
		"own ARP probe":      arp(mac, 1, "0.0.0.0", "10.2.1.1"),
		"own IPv4":           ether(mac, unix.ETH_P_IP, packet4(17, "10.2.1.1", udp(5000)...)),
		"own IPv6":           ether(mac, unix.ETH_P_IPV6, packet6(17, "fd00::1", udp(5000)...)),
		"own link-local":     ether(mac, unix.ETH_P_IPV6, packet6(17, ll, udp(5000)...)),
		"solicitation":       ether(mac, unix.ETH_P_IPV6, packet6(58, "fd00::1", neighbour(135, "fd00::2")...)),
		"own advertisement":  ether(mac, unix.ETH_P_IPV6, packet6(58, "fd00::1", neighbour(136, "fd00::1")...)),
		"own IPv6 probe":     ether(mac, unix.ETH_P_IPV6, packet6(58, "::", neighbour(135, ll)...)),
		"multicast listener": ether(mac, unix.ETH_P_IPV6, packet6(58, "::", 143, 0, 0, 0, 0, 0, 0, 0)),
		"other Ethertype":    ether(mac, 0x88b5, []byte("experiment")),
	}
	bad := map[string][]byte{
		"another's MAC":              ether(other, 0x88b5, []byte("x")),
		"ARP of another's address":   arp(mac, 1, "10.2.1.9", "10.2.1.2"),
		"ARP reply for another":      arp(mac, 2, "10.2.1.2", "10.2.1.9"),
		"ARP with another's MAC":     arp(other, 1, "10.2.1.1", "10.2.1.9"),
		"ARP probe for another":      arp(mac, 1, "0.0.0.0", "10.2.1.2"),
		"another's IPv4":             ether(mac, unix.ETH_P_IP, packet4(17, "10.2.1.9", udp(5000)...)),
		"no IPv4":                    ether(mac, unix.ETH_P_IP, packet4(17, "0.0.0.0", udp(68)...)),
		"DHCP server":                ether(mac, unix.ETH_P_IP, packet4(17, "10.2.1.1", udp(67)...)),
		"ICMP redirect":              ether(mac, unix.ETH_P_IP, packet4(1, "10.2.1.1", 5, 0, 0, 0, 0, 0, 0, 0)),
		"another's IPv6":             ether(mac, unix.ETH_P_IPV6, packet6(17, "fd00::9", udp(5000)...)),
		"another's link-local":       ether(mac, unix.ETH_P_IPV6, packet6(17, "fe80::9", udp(5000)...)),
		"router advertisement":       ether(mac, unix.ETH_P_IPV6, packet6(58, ll, 134, 0, 0, 0, 0, 0, 0, 0)),
		"router behind an extension": ether(mac, unix.ETH_P_IPV6, packet6(0, ll, 58, 0, 1, 4, 0, 0, 0, 0, 134, 0, 0, 0, 0, 0, 0, 0)),
		"ICMPv6 redirect":            ether(mac, unix.ETH_P_IPV6, packet6(58, ll, 137, 0, 0, 0, 0, 0, 0, 0)),
		"DHCPv6 server":              ether(mac, unix.ETH_P_IPV6, packet6(17, ll, udp(547)...)),
		"another's advertisement":    ether(mac, unix.ETH_P_IPV6, packet6(58, "fd00::1", neighbour(136, "fd00::2")...)),
		"IPv6 probe for another":     ether(mac, unix.ETH_P_IPV6, packet6(58, "::", neighbour(135, "fd00::2")...)),
		"DHCP server at any port":    ether(mac, unix.ETH_P_IP, packet4(17, "10.2.1.1", to(68)...)),
		"DHCPv6 server at any port":  ether(mac, unix.ETH_P_IPV6, packet6(17, ll, to(546)...)),
		"BPDU":                       bpdu,
		"Cisco's BPDU":               cisco,
		"tagged":                     ether(mac, unix.ETH_P_8021Q, []byte{0, 5, 0x88, 0xb5}, make([]byte, 40)),
	}
	last := ether(mac, 0x88b5, []byte("the last one"))
	for _, frames := range []map[string][]byte{bad, good} {
		for _, f := range frames {
			send(f)
		}
	}
	send(last)
	got := received(t, fd, last)
	has := func(f []byte) bool {
		for _, g := range got {
			if bytes.Equal(f, g) {
				return true
			}
		}
		return false
	}
	for name, f := range good {
		if !has(f) {
			t.Errorf("%s is dropped", name)
		}
	}
	for name, f := range bad {
		if has(f) {
			t.Errorf("%s passes", name)
		}
	}

	// A flush does not last, and the end of the guard leaves nothing.
	run(t, hostNS, "nft flush ruleset")
	if err := fw.Apply(); err != nil {
		t.Fatal(err)
	}
	if got := run(t, hostNS, "nft list tables"); !strings.Contains(got, "table bridge mesh") {
		t.Errorf("tables are %s", got)
	}
	for range 2 {
		if err := fw.Unguard(); err != nil {
			t.Fatal(err)
		}
	}
	if got := run(t, hostNS, "nft list tables"); strings.TrimSpace(got) != "table inet mesh" {
		t.Errorf("tables are %s", got)
	}
	send(bad["another's IPv4"])
	send(last)
	if got = received(t, fd, last); !has(bad["another's IPv4"]) {
		t.Error("without a guard frames are dropped")
	}
}

// A thousand ports are one transaction, too.
func TestGuardMany(t *testing.T) {
	h, hostNS := newHost(t)
	fw := h.NewFirewall(FirewallConfig{})
	var ports []mesh.Port
	for i := range 1000 {
		p := testPort(i, fmt.Sprintf("10.2.%d.%d/16", i/200, i%200+1), fmt.Sprintf("fd00::%x/64", i+1))
		p.HostEnd = h.HostEnd(p.Owner)
		ports = append(ports, p)
	}
	start := time.Now()
	if err := fw.Guard(ports); err != nil {
		t.Fatal(err)
	}
	t.Log("written in", time.Since(start))
	start = time.Now()
	if err := fw.Apply(); err != nil {
		t.Fatal(err)
	}
	t.Log("looked at in", time.Since(start))
	jumps := func() int { return strings.Count(run(t, hostNS, "nft list map bridge mesh ports"), "jump") }
	if n := jumps(); n != len(ports) {
		t.Errorf("%d ports are guarded, want %d", n, len(ports))
	}
	// One more, one less, one with another address: each is a small change, and the result as if written at once.
	more := testPort(1000, "10.3.1.1/16")
	more.HostEnd = h.HostEnd(more.Owner)
	changed := slices.Clone(ports)
	changed[7].Addrs = []netip.Prefix{netip.MustParsePrefix("10.3.1.2/16")}
	for what, list := range map[string][]mesh.Port{"one more": append(slices.Clone(ports), more), "one less": ports[1:], "another address": changed} {
		start = time.Now()
		if err := fw.Guard(list); err != nil {
			t.Fatal(err)
		}
		took := time.Since(start)
		t.Log(what, "in", took)
		if took > time.Second {
			t.Errorf("%s took %v", what, took)
		}
		table := &nftables.Table{Family: nftables.TableFamilyBridge, Name: "mesh"}
		if !fw.intact(table, guardRules(list)) || jumps() != len(list) {
			t.Errorf("%s: the table is not as it should be", what)
		}
		if n := strings.Count(run(t, hostNS, "nft list chains bridge"), "\tchain "); n != 5*len(list)+1 {
			t.Errorf("%s: %d chains, want %d", what, n, 5*len(list)+1)
		}
	}
	// What others take away comes back.
	for _, damage := range []string{"flush map bridge mesh ports", "flush chain bridge mesh guard", "delete table bridge mesh"} {
		run(t, hostNS, "nft "+damage)
		if err := fw.Apply(); err != nil {
			t.Fatal(err)
		}
		fw.apply.Lock()
		guarded := len(fw.guarded)
		fw.apply.Unlock()
		if n := jumps(); n != guarded {
			t.Errorf("after %s %d ports are guarded, want %d", damage, n, guarded)
		}
	}
}
