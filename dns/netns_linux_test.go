package dns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	miekg "github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

const inHost = "MESHD_DNS_TEST_HOST"

// hostTest runs the rest of a test in a process whose network namespace is its own, as on a host with
// nothing but loopback; it returns false in the process that waits for that one.
func hostTest(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inHost) != "" {
		run(t, "ip", "link", "set", "lo", "up")
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inHost+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	return false
}

func run(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
}

const silence = -1

// box is another network namespace, joined to this one by a cable.
type box struct {
	t   testing.TB
	pid string
}

// newBox makes a box with address inside on eth0. The other end is put into bridge, or gets address
// outside if that is not empty.
func newBox(t testing.TB, n int, bridge, outside, inside string, routes ...string) *box {
	t.Helper()
	cmd := exec.Command("sleep", "300") // an end of its own, should ours be untimely
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	b := &box{t, fmt.Sprint(cmd.Process.Pid)}
	port := fmt.Sprintf("dns-%d", n)
	run(t, "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", b.pid)
	if bridge != "" {
		run(t, "ip", "link", "set", port, "master", bridge)
	} else {
		run(t, "ip", "addr", "add", outside, "dev", port)
	}
	run(t, "ip", "link", "set", port, "up")
	b.run("ip", "link", "set", "lo", "up")
	b.run("ip", "addr", "add", inside, "dev", "eth0")
	b.run("ip", "link", "set", "eth0", "up")
	for _, r := range routes {
		b.run(append([]string{"ip", "route", "add"}, strings.Fields(r)...)...)
	}
	return b
}

func (b *box) run(args ...string) {
	b.t.Helper()
	run(b.t, append([]string{"nsenter", "-t", b.pid, "-n"}, args...)...)
}

// dial opens a connection inside.
func (b *box) dial(network, local, remote string) (net.Conn, error) {
	type result struct {
		net.Conn
		error
	}
	out := make(chan result)
	go func() { // ends at once; its thread dies with it, for it is in another namespace
		runtime.LockOSThread()
		fd, err := unix.Open("/proc/"+b.pid+"/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if err != nil {
			out <- result{nil, err}
			return
		}
		d := net.Dialer{Timeout: time.Second}
		if local != "" {
			d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(local), 0))
		}
		c, err := d.Dial(network, remote)
		out <- result{c, err}
	}()
	r := <-out
	return r.Conn, r.error
}

// ask returns the code of the answer, or -1 for none within a time that is long where one is wanted.
func (b *box) ask(network, local string, server netip.AddrPort, name string, want int) int {
	b.t.Helper()
	c, err := b.dial(network, local, server.String())
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	conn := &miekg.Conn{Conn: c}
	m := new(miekg.Msg)
	m.SetQuestion(name, miekg.TypeA)
	if err := conn.WriteMsg(m); err != nil {
		return silence
	}
	wait := 5 * time.Second
	if want == silence {
		wait = 300 * time.Millisecond
	}
	if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
		b.t.Fatal(err)
	}
	r, err := conn.ReadMsg()
	if err != nil {
		return silence
	}
	return r.Rcode
}

// Containers and the host are served, whichever of Docker's bridges they are on. A neighbour on the uplink
// is not, nor is one that borrows a container's address; isolated networks get names of the mesh only.
func TestWhoMayAsk(t *testing.T) {
	if !hostTest(t) {
		return
	}
	for name, addr := range map[string]string{"docker0": "172.17.0.1/16", "br-0123456789ab": "172.18.0.1/16", "br-00000000000f": "172.19.0.1/16", "br0": "172.20.0.1/16"} {
		run(t, "ip", "link", "add", name, "type", "bridge")
		run(t, "ip", "addr", "add", addr, "dev", name)
		run(t, "ip", "link", "set", name, "up")
	}
	server := netip.MustParseAddrPort("172.17.0.1:53")
	container := newBox(t, 1, "docker0", "", "172.17.0.2/16")
	other := newBox(t, 2, "br-0123456789ab", "", "172.18.0.2/16", "default via 172.18.0.1")
	isolated := newBox(t, 3, "br-00000000000f", "", "172.19.0.2/16", "default via 172.19.0.1")
	foreign := newBox(t, 4, "br0", "", "172.20.0.2/16", "default via 172.20.0.1")
	neighbour := newBox(t, 5, "", "192.0.2.1/24", "192.0.2.2/24", "172.17.0.0/16 via 192.0.2.1")
	neighbour.run("ip", "addr", "add", "172.17.0.2/32", "dev", "lo")

	table := newTable(t)
	addName(t, table, "web.mesh.internal", "10.32.0.1")
	local := NewInterfaces(nil, func(bridge string) bool { return bridge == "br-00000000000f" })
	startServer(t, table, func(c *Config) { c.Listen, c.Access = server, local.Access })
	host := &box{t, fmt.Sprint(os.Getpid())}
	for _, c := range []struct {
		what       string
		from       *box
		source     string
		udp, tcp   int // for a name of the mesh
		outside    int // for another, by UDP
		withoutTCP bool
	}{
		{what: "container", from: container, outside: miekg.RcodeServerFailure},
		{what: "container of another network", from: other, outside: miekg.RcodeServerFailure},
		{what: "isolated container", from: isolated, outside: miekg.RcodeRefused},
		{what: "host", from: host, outside: miekg.RcodeServerFailure},
		{what: "foreign bridge", from: foreign, udp: miekg.RcodeRefused, tcp: silence, outside: miekg.RcodeRefused},
		{what: "neighbour", from: neighbour, udp: miekg.RcodeRefused, tcp: silence, outside: miekg.RcodeRefused},
		{what: "spoofer", from: neighbour, source: "172.17.0.2", udp: silence, outside: silence, withoutTCP: true},
	} {
		if got := c.from.ask("udp", c.source, server, "web.mesh.internal.", c.udp); got != c.udp {
			t.Errorf("%s by UDP: got %d, want %d", c.what, got, c.udp)
		}
		if got := c.from.ask("udp", c.source, server, "example.org.", c.outside); got != c.outside {
			t.Errorf("%s for an outside name: got %d, want %d", c.what, got, c.outside)
		}
		if c.withoutTCP {
			continue
		}
		if got := c.from.ask("tcp", "", server, "web.mesh.internal.", c.tcp); got != c.tcp {
			t.Errorf("%s by TCP: got %d, want %d", c.what, got, c.tcp)
		}
	}
	// A network that Docker makes while we run is served at once, give or take the time between two looks
	// at the interfaces.
	run(t, "ip", "link", "add", "br-abcdefabcdef", "type", "bridge")
	run(t, "ip", "addr", "add", "172.21.0.1/16", "dev", "br-abcdefabcdef")
	run(t, "ip", "link", "set", "br-abcdefabcdef", "up")
	late := newBox(t, 6, "br-abcdefabcdef", "", "172.21.0.2/16", "default via 172.21.0.1")
	eventually(t, func() bool { return late.ask("udp", "", server, "web.mesh.internal.", 0) == 0 })
}

// The server waits for Docker's bridge without holding anybody up, and follows its address.
func TestWaitsForBridge(t *testing.T) {
	if !hostTest(t) {
		return
	}
	table := newTable(t)
	addName(t, table, "web.mesh.internal", "10.32.0.1")
	s := startServer(t, table, func(c *Config) { c.Listen, c.Bridge = netip.AddrPort{}, "docker0" })
	if p := s.Status().Problem; !strings.Contains(p, "docker0") || !strings.Contains(p, "--dns-listen-address") {
		t.Errorf("problem: got %q", p)
	}
	run(t, "ip", "link", "add", "docker0", "type", "bridge")
	run(t, "ip", "link", "set", "docker0", "up")
	for _, addr := range []string{"172.17.0.1", "172.30.0.1"} {
		run(t, "ip", "addr", "flush", "dev", "docker0")
		run(t, "ip", "addr", "add", addr+"/16", "dev", "docker0")
		want := netip.AddrPortFrom(netip.MustParseAddr(addr), 53)
		eventually(t, func() bool { return s.Status().Address == want && s.Status().Problem == "" })
		// The new subnet counts as soon as the interfaces are looked at again.
		eventually(t, func() bool { return len(ask(t, s, "udp", "web.mesh.internal.", miekg.TypeA).Answer) == 1 })
		if r := ask(t, s, "tcp", "web.mesh.internal.", miekg.TypeA); len(r.Answer) != 1 {
			t.Errorf("got %v", r)
		}
	}
}

// An address may be given that does not exist yet.
func TestAddressBeforeItExists(t *testing.T) {
	if !hostTest(t) {
		return
	}
	table := newTable(t)
	addName(t, table, "web.mesh.internal", "10.32.0.1")
	s := startServer(t, table, func(c *Config) { c.Listen = netip.MustParseAddrPort("172.17.0.1:53") })
	run(t, "ip", "addr", "add", "172.17.0.1/32", "dev", "lo")
	if r := ask(t, s, "udp", "web.mesh.internal.", miekg.TypeA); len(r.Answer) != 1 {
		t.Errorf("got %v", r)
	}
}

// On an unspecified address the answer comes from the address that was asked, or clients drop it; and no
// address of this host counts as an upstream server.
func TestUnspecifiedAddress(t *testing.T) {
	if !hostTest(t) {
		return
	}
	run(t, "ip", "addr", "add", "192.0.2.1/24", "dev", "lo")
	run(t, "ip", "addr", "add", "192.0.2.7/24", "dev", "lo")
	run(t, "ip", "addr", "add", "fd00::7/64", "dev", "lo", "nodad")
	host := &box{t, fmt.Sprint(os.Getpid())}
	for _, listen := range []string{"0.0.0.0:53", "[::]:53"} {
		t.Run(listen, func(t *testing.T) {
			table := newTable(t)
			addName(t, table, "web.mesh.internal", "10.32.0.1")
			file := t.TempDir() + "/resolv.conf"
			if err := os.WriteFile(file, []byte("nameserver 192.0.2.7\nnameserver 127.0.0.1\nnameserver 198.51.100.1\nnameserver fd00::7\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			local := NewInterfaces(nil, nil)
			s := startServer(t, table, func(c *Config) {
				c.Listen, c.Access, c.ResolvConf, c.Timeout = netip.MustParseAddrPort(listen), local.Access, file, 100*time.Millisecond
			})
			eventually(t, func() bool { return slices.Equal(s.Status().Upstream, []string{"198.51.100.1:53"}) })
			asked := []string{"192.0.2.7:53", "127.0.0.1:53"}
			if listen == "[::]:53" {
				asked = append(asked, "[fd00::7]:53", "[::1]:53")
			}
			for _, a := range asked {
				for _, name := range []string{"web.mesh.internal.", "example.org."} {
					want := 0
					if name == "example.org." {
						want = miekg.RcodeServerFailure
					}
					if got := host.ask("udp", "", netip.MustParseAddrPort(a), name, want); got != want {
						t.Errorf("%s of %s: got %d, want %d", name, a, got, want)
					}
				}
			}
		})
	}
}

// The error for a taken port names a process of another user, with a socket on all addresses, and by TCP.
func TestPortTakenByOther(t *testing.T) {
	if !hostTest(t) {
		return
	}
	for _, network := range []string{"udp4", "tcp4", "tcp"} {
		var closer interface{ Close() error }
		var err error
		if strings.HasPrefix(network, "tcp") {
			closer, err = net.Listen(network, ":53")
		} else {
			closer, err = net.ListenPacket(network, ":53")
		}
		if err != nil {
			t.Fatal(err)
		}
		s, err := New(Config{Domain: domain, Listen: netip.MustParseAddrPort("127.0.0.1:53")}, newTable(t))
		if err != nil {
			t.Fatal(err)
		}
		var taken *PortTakenError
		if err := s.Open(); !errors.As(err, &taken) || !strings.Contains(taken.Holder, fmt.Sprintf("pid %d", os.Getpid())) {
			t.Errorf("%s: got %v", network, err)
		}
		if err := closer.Close(); err != nil {
			t.Error(err)
		}
	}
}
