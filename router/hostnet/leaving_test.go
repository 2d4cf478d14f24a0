package hostnet

import (
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// To the kernel paths of others goes, in this host's name, what the kernel path itself sends, and nothing else: no
// local user's datagrams, nor those that any program masquerades. What is routed as it is goes on.
func TestKernelPathIsOurs(t *testing.T) {
	s := newSite(t)
	virtual, routed := newNamespace(t), newNamespace(t)
	addBridge(t, s.host, "virbr0")
	join(t, s, "vnet", "192.168.122.1/24", virtual, "192.168.122.2/24", "virbr0")
	join(t, s, "lan", "192.168.123.1/24", routed, "192.168.123.2/24", "")
	for _, ns := range []*os.File{virtual, routed} {
		run(t, ns, "ip route add default via "+map[*os.File]string{virtual: "192.168.122.1", routed: "192.168.123.1"}[ns])
	}
	run(t, s.hostNS, "sysctl -q -w net.ipv4.ip_forward=1")
	run(t, s.hostNS, "nft table ip likelibvirt { chain post { type nat hook postrouting priority 100; ip saddr 192.168.122.0/24 masquerade; }; }")
	run(t, s.to, "ip route add default via 192.168.77.1")
	run(t, s.hostNS, "ip addr add fd77::1/64 dev out nodad")
	run(t, s.to, "ip addr add fd77::2/64 dev eth0 nodad")
	// The kernel path's frames leave by a device like this one.
	run(t, s.hostNS, "ip link add mesh-vx type vxlan id 5 remote 192.168.77.2 dstport 6784")
	run(t, s.hostNS, "ip addr add 192.168.99.1/24 dev mesh-vx")
	run(t, s.hostNS, "ip link set mesh-vx up")
	run(t, s.hostNS, "ip neigh replace 192.168.99.2 lladdr 02:00:00:00:00:99 dev mesh-vx")
	s.fw = s.host.NewFirewall(FirewallConfig{KernelPort: 6784, KernelDevice: "mesh-vx"})

	var far *net.UDPConn
	err := inNamespace(s.to, func() (err error) {
		far, err = net.ListenUDP("udp", &net.UDPAddr{Port: 6784})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	heard := func(text string, wait time.Duration) bool {
		far.SetReadDeadline(time.Now().Add(wait))
		buf := make([]byte, 2000)
		for {
			n, _, err := far.ReadFromUDP(buf)
			if err != nil {
				return false
			}
			if strings.Contains(string(buf[:n]), text) {
				return true
			}
		}
	}
	say := func(ns *os.File, to, text string) {
		t.Helper()
		err := inNamespace(ns, func() error {
			c, err := net.Dial("udp", to)
			if err != nil {
				return err
			}
			defer c.Close()
			_, _ = c.Write([]byte(text)) // what the firewall drops is an error here
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		what   string
		ns     *os.File
		to     string
		passes bool
	}{
		{"a local user", s.hostNS, "192.168.77.2:6784", false},
		{"a local user by IPv6", s.hostNS, "[fd77::2]:6784", false},
		{"masqueraded", virtual, "192.168.77.2:6784", false},
		{"routed", routed, "192.168.77.2:6784", true},
		{"the kernel path's device", s.hostNS, "192.168.99.2:9", true},
	} {
		for _, on := range []bool{false, true} {
			if on {
				if err := s.fw.Apply(); err != nil {
					t.Fatal(err)
				}
			} else if err := s.fw.Remove(); err != nil {
				t.Fatal(err)
			}
			text := c.what + map[bool]string{true: " with rules", false: " without"}[on]
			want := !on || c.passes
			wait := 300 * time.Millisecond
			if want {
				wait = 3 * time.Second
			}
			say(c.ns, c.to, text)
			if got := heard(text, wait); got != want {
				t.Errorf("%s: arrives: %v, want %v", text, got, want)
			}
		}
	}
}
