package hostnet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"time"
)

// site is a host with an exposed subnet, a container on it, and a machine outside.
type site struct {
	host               *Host
	fw                 *Firewall
	hostNS, inside, to *os.File
}

func newSite(t *testing.T) *site {
	t.Helper()
	h, hostNS := newHost(t)
	s := &site{host: h, hostNS: hostNS, inside: newNamespace(t), to: newNamespace(t)}
	join(t, s, "out", "192.168.77.1/24", s.to, "192.168.77.2/24", "")
	if err := h.AttachPort(s.inside, testPort(1, "10.2.1.1/24")); err != nil {
		t.Fatal(err)
	}
	if err := h.AddBridgeAddrs(prefixes("10.2.1.100/24")...); err != nil {
		t.Fatal(err)
	}
	s.fw = h.NewFirewall(FirewallConfig{})
	return s
}

// join connects a namespace with the host by a veth pair, the host's end perhaps on a bridge.
func join(t *testing.T, s *site, name, hostAddr string, far *os.File, farAddr, bridge string) {
	t.Helper()
	for _, c := range []string{
		fmt.Sprintf("ip link add %s type veth peer name %s-far", name, name),
		fmt.Sprintf("ip link set %s-far netns /proc/%d/fd/%d name eth0", name, os.Getpid(), far.Fd()),
		fmt.Sprintf("ip link set %s up", name),
	} {
		run(t, s.hostNS, c)
	}
	if bridge != "" {
		run(t, s.hostNS, fmt.Sprintf("ip link set %s master %s", name, bridge))
		run(t, s.hostNS, fmt.Sprintf("ip link set %s up", bridge))
		name = bridge
	}
	run(t, s.hostNS, fmt.Sprintf("ip addr replace %s dev %s", hostAddr, name))
	run(t, far, "ip link set eth0 up")
	run(t, far, "ip addr add "+farAddr+" dev eth0")
}

func pings(ns *os.File, to string) bool {
	_, err := try(ns, "ping -c 1 -W 1 "+to)
	return err == nil
}

// wantPing checks whether a ping passes; one that should is given a second chance, for paths come up slowly.
func wantPing(t *testing.T, what string, ns *os.File, to string, want bool) {
	t.Helper()
	if got := pings(ns, to) || want && pings(ns, to); got != want {
		t.Errorf("%s: ping passes: %v, want %v", what, got, want)
	}
}

func TestMasquerade(t *testing.T) {
	s := newSite(t)
	run(t, s.inside, "ip route add default via 10.2.1.100")
	run(t, s.hostNS, "sysctl -q -w net.ipv4.ip_forward=0")
	wantPing(t, "not exposed", s.inside, "192.168.77.2", false)
	for range 2 {
		if err := s.fw.Expose(prefixes("10.2.1.100/24")[0], true); err != nil {
			t.Fatal(err)
		}
	}
	wantPing(t, "to outside", s.inside, "192.168.77.2", true)
	// A machine outside goes through the host; the container has no way back but the host's own address.
	run(t, s.inside, "ip route del default")
	run(t, s.to, "ip route add 10.2.1.0/24 via 192.168.77.1")
	wantPing(t, "from outside", s.to, "10.2.1.1", true)
	// Without masquerade both need routes, and see each other's own addresses.
	if err := s.fw.Expose(prefixes("10.2.1.100/24")[0], false); err != nil {
		t.Fatal(err)
	}
	wantPing(t, "from outside without masquerade", s.to, "10.2.1.1", false)
	run(t, s.inside, "ip route add default via 10.2.1.100")
	wantPing(t, "from outside with routes", s.to, "10.2.1.1", true)
	for range 2 {
		if err := s.fw.Hide(prefixes("10.2.1.100/24")[0]); err != nil {
			t.Fatal(err)
		}
	}
	if got := run(t, s.hostNS, "nft list table inet mesh"); strings.Contains(got, "masquerade") {
		t.Errorf("hidden and still masqueraded:\n%s", got)
	}
}

func TestForwardPolicyDrop(t *testing.T) {
	for _, tool := range []string{"iptables-nft", "iptables-legacy"} {
		for _, docker := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s docker=%v", tool, docker), func(t *testing.T) {
				s := newSite(t)
				other := newNamespace(t)
				if err := s.host.AttachPort(other, testPort(2, "10.2.1.2/24")); err != nil {
					t.Fatal(err)
				}
				run(t, s.inside, "ip route add default via 10.2.1.100")
				run(t, s.hostNS, "sysctl -q -w net.bridge.bridge-nf-call-iptables=1")
				run(t, s.hostNS, tool+" -P FORWARD DROP")
				if docker {
					run(t, s.hostNS, tool+" -N DOCKER-USER")
					run(t, s.hostNS, tool+" -A DOCKER-USER -j RETURN")
					run(t, s.hostNS, tool+" -A FORWARD -j DOCKER-USER")
				}
				before := run(t, s.hostNS, tool+" -S")
				wantPing(t, "bridged through a dropping FORWARD", s.inside, "10.2.1.2", false)
				if err := s.fw.Apply(); err != nil {
					t.Fatal(err)
				}
				wantPing(t, "bridged", s.inside, "10.2.1.2", true)
				if err := s.fw.Expose(prefixes("10.2.1.100/24")[0], true); err != nil {
					t.Fatal(err)
				}
				wantPing(t, "to outside", s.inside, "192.168.77.2", true)
				run(t, s.to, "ip route add 10.2.1.0/24 via 192.168.77.1")
				wantPing(t, "from outside", s.to, "10.2.1.1", true)

				with := run(t, s.hostNS, tool+" -S")
				gens := &generations{host: s.host}
				defer gens.close()
				gen := gens.now()
				if err := s.fw.Apply(); err != nil {
					t.Fatal(err)
				}
				if again := run(t, s.hostNS, tool+" -S"); again != with {
					t.Errorf("the second time changed\n%s\nto\n%s", with, again)
				}
				if now := gens.now(); now != gen || gen == 0 {
					t.Error("applying again wrote something")
				}
				// The other backend has nothing of ours.
				if tool == "iptables-legacy" {
					if got := run(t, s.hostNS, "nft list tables"); strings.TrimSpace(got) != "table inet mesh" {
						t.Errorf("tables are %s", got)
					}
				} else if b := strings.TrimSpace(run(t, s.hostNS, "cat /proc/thread-self/net/ip_tables_names")); b != "" {
					t.Errorf("legacy tables are %s", b)
				}
				for range 2 {
					if err := s.fw.Remove(); err != nil {
						t.Fatal(err)
					}
				}
				if after := run(t, s.hostNS, tool+" -S"); after != before {
					t.Errorf("removed, and left\n%s\nwas\n%s", after, before)
				}
			})
		}
	}
}

// A host that drops what comes in still answers its containers' questions for names.
func TestNameServerIsReached(t *testing.T) {
	for _, tool := range []string{"iptables-nft", "iptables-legacy"} {
		s := newSite(t)
		addBridge(t, s.host, "docker0")
		d := newNamespace(t)
		join(t, s, "d0", "172.17.0.1/16", d, "172.17.0.2/16", "docker0")
		s.fw = s.host.NewFirewall(FirewallConfig{DNSPort: 53})
		run(t, s.hostNS, tool+" -P INPUT DROP")
		before := run(t, s.hostNS, tool+" -S")
		var l net.Listener
		err := inNamespace(s.hostNS, func() (err error) {
			l, err = net.Listen("tcp4", "172.17.0.1:53")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		asks := func() bool {
			return inNamespace(d, func() error {
				c, err := net.DialTimeout("tcp4", "172.17.0.1:53", 300*time.Millisecond)
				if err == nil {
					c.Close()
				}
				return err
			}) == nil
		}
		if asks() {
			t.Errorf("%s: INPUT drops nothing", tool)
		}
		for range 2 {
			if err := s.fw.Apply(); err != nil {
				t.Fatal(err)
			}
		}
		reached := false
		for end := time.Now().Add(5 * time.Second); !reached && time.Now().Before(end); { // a loaded machine takes its time
			reached = asks()
		}
		if !reached {
			t.Errorf("%s: the name server is not reached:\n%s", tool, run(t, s.hostNS, tool+" -S"))
		}
		if err := s.fw.Remove(); err != nil {
			t.Fatal(err)
		}
		if after := run(t, s.hostNS, tool+" -S"); after != before {
			t.Errorf("removed, and left\n%s\nwas\n%s", after, before)
		}
	}
}

func TestFlushIsUndone(t *testing.T) {
	s := newSite(t)
	run(t, s.inside, "ip route add default via 10.2.1.100")
	run(t, s.hostNS, "iptables-nft -P FORWARD DROP")
	run(t, s.hostNS, "iptables-nft -N DOCKER-USER")
	run(t, s.hostNS, "iptables-nft -A FORWARD -j DOCKER-USER")
	if err := s.fw.Expose(prefixes("10.2.1.100/24")[0], true); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.fw.Run(ctx) }()
	defer func() { cancel(); <-done }()
	want := run(t, s.hostNS, "nft list table inet mesh")
	for _, flush := range []string{
		"nft flush ruleset", "nft delete table inet mesh", "nft flush table inet mesh", "nft delete rule inet mesh postrouting handle %", "nft flush chain inet mesh forward",
	} {
		flush = strings.Replace(flush, "%", handle(run(t, s.hostNS, "nft -a list chain inet mesh postrouting")), 1)
		run(t, s.hostNS, flush)
		start := time.Now()
		eventually(t, "restored after "+flush, func() bool {
			got, err := try(s.hostNS, "nft list table inet mesh")
			return err == nil && got == want
		})
		if d := time.Since(start); d > time.Second {
			t.Errorf("%s: restored after %v, want 1s", flush, d)
		}
	}
	// Docker comes back with its own rules after all was flushed, and our jump is there again.
	run(t, s.hostNS, "iptables-nft -P FORWARD DROP")
	run(t, s.hostNS, "iptables-nft -N DOCKER-USER")
	run(t, s.hostNS, "iptables-nft -A FORWARD -j DOCKER-USER")
	eventually(t, "jump restored", func() bool {
		return strings.Contains(run(t, s.hostNS, "iptables-nft -S DOCKER-USER"), "-j MESH-FORWARD")
	})
	wantPing(t, "to outside", s.inside, "192.168.77.2", true)
}

// What firewalld, iptables-persistent and Docker do when they load their rules anew is undone within a second as
// far as it concerns the mesh, and nothing is there twice.
func TestReload(t *testing.T) {
	for _, tool := range []string{"iptables-nft", "iptables-legacy"} {
		t.Run(tool, func(t *testing.T) {
			s := newSite(t)
			sh := func(script string) {
				t.Helper()
				var out []byte
				err := inNamespace(s.hostNS, func() (err error) {
					out, err = exec.Command("/bin/sh", "-c", script).CombinedOutput()
					return err
				})
				if err != nil {
					t.Fatalf("%s: %v\n%s", script, err, out)
				}
			}
			run(t, s.inside, "ip route add default via 10.2.1.100")
			docker := fmt.Sprintf("%[1]s -P FORWARD DROP && %[1]s -N DOCKER-USER && %[1]s -A DOCKER-USER -j RETURN && %[1]s -I FORWARD -j DOCKER-USER", tool)
			sh(docker)
			sh("nft add table inet firewalld && nft add chain inet firewalld filter_FORWARD '{ type filter hook forward priority 10; policy accept; }'")
			if err := s.fw.Expose(prefixes("10.2.1.100/24")[0], true); err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			sh(fmt.Sprintf("nft list table inet firewalld >%[1]s/firewalld; (cat %[1]s/firewalld; nft list table inet mesh) >%[1]s/all; %[2]s-save >%[1]s/ipt", dir, tool))
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- s.fw.Run(ctx) }()
			defer func() { cancel(); <-done }()
			// ours is what iptables has of ours, counted rules included.
			ours := func() (lines []string) {
				out, err := try(s.hostNS, tool+" -S") // fails while the rules are being replaced
				for line := range strings.Lines(out) {
					if err == nil && strings.Contains(line, "MESH-") {
						lines = append(lines, line)
					}
				}
				return lines
			}
			wantTable, wantRules := run(t, s.hostNS, "nft list table inet mesh"), ours()
			for _, c := range []string{
				"nft flush ruleset; nft -f DIR/firewalld; " + tool + "-restore <DIR/ipt",
				"nft flush ruleset; nft -f DIR/all; " + tool + "-restore <DIR/ipt",
				"nft -f DIR/all", // our table's rules are there twice for a moment
				tool + " -F",
				tool + " -F; " + tool + "-restore <DIR/ipt",
				tool + "-restore --noflush <DIR/ipt",
				tool + "-restore --noflush <DIR/ipt; " + tool + " -A FORWARD -j MESH-FORWARD; " + tool + " -A MESH-FORWARD -j ACCEPT",
				tool + " -D FORWARD -j DOCKER-USER; " + tool + " -F DOCKER-USER; " + tool + " -X DOCKER-USER; " + tool + " -F; " + tool + " -X; " + docker,
			} {
				c = strings.ReplaceAll(c, "DIR", dir)
				sh(c)
				start := time.Now()
				settled := ""
				eventually(t, "restored after "+c, func() bool {
					table, err := try(s.hostNS, "nft list table inet mesh")
					rules := ours()
					settled = table + strings.Join(rules, "")
					jumps := 0
					for _, r := range rules {
						if strings.HasSuffix(r, "-j MESH-FORWARD\n") {
							jumps++
						}
					}
					return err == nil && table == wantTable && len(rules) == len(wantRules) && jumps == 1
				})
				if d := time.Since(start); d > time.Second {
					t.Errorf("%s: restored after %v, want 1s", c, d)
				}
				wantPing(t, "to outside after "+c, s.inside, "192.168.77.2", true)
				if t.Failed() {
					t.Fatalf("%s left\n%s\nwant\n%s%s", c, settled, wantTable, strings.Join(wantRules, ""))
				}
				sh(tool + " -F DOCKER-USER; " + tool + " -A DOCKER-USER -j RETURN; " + tool + " -C FORWARD -j DOCKER-USER 2>&1 || " + tool + " -I FORWARD -j DOCKER-USER")
				eventually(t, "as before "+c, func() bool { return strings.Join(ours(), "") == strings.Join(wantRules, "") })
			}
		})
	}
}

// handle finds the handle of some rule in a listing.
func handle(listing string) string {
	for line := range strings.Lines(listing) {
		if _, h, ok := strings.Cut(line, "masquerade comment"); ok {
			_, h, _ = strings.Cut(h, "# handle ")
			return strings.TrimSpace(h)
		}
	}
	return "?"
}

// Containers of two subnets have the host as their gateway, and do not reach each other through it.
func TestSubnetsAreApart(t *testing.T) {
	s := newSite(t)
	other := newNamespace(t)
	if err := s.host.AttachPort(other, testPort(2, "10.2.2.1/24")); err != nil {
		t.Fatal(err)
	}
	if err := s.host.AddBridgeAddrs(prefixes("10.2.2.100/24")...); err != nil {
		t.Fatal(err)
	}
	run(t, s.inside, "ip route add default via 10.2.1.100")
	run(t, other, "ip route add default via 10.2.2.100")
	run(t, s.hostNS, "sysctl -q -w net.ipv4.ip_forward=1")
	wantPing(t, "without us", s.inside, "10.2.2.1", true)
	for _, a := range prefixes("10.2.1.100/24", "10.2.2.100/24") {
		if err := s.fw.Expose(a, true); err != nil {
			t.Fatal(err)
		}
	}
	for _, nf := range []string{"0", "1"} {
		run(t, s.hostNS, "sysctl -q -w net.bridge.bridge-nf-call-iptables="+nf)
		wantPing(t, "across subnets", s.inside, "10.2.2.1", false)
		wantPing(t, "outside", s.inside, "192.168.77.2", true)
		wantPing(t, "host", s.inside, "10.2.2.100", true)
		third := newNamespace(t)
		if err := s.host.AttachPort(third, testPort(3, "10.2.1.3/24")); err != nil {
			t.Fatal(err)
		}
		wantPing(t, "within a subnet", s.inside, "10.2.1.3", true)
		if err := s.host.DetachPort(testPort(3).Owner); err != nil {
			t.Fatal(err)
		}
	}
}

func TestGuardedPorts(t *testing.T) {
	s := newSite(t)
	addBridge(t, s.host, "docker0")
	addBridge(t, s.host, "br-0123456789ab")
	d0, d1 := newNamespace(t), newNamespace(t)
	join(t, s, "d0", "172.17.0.1/16", d0, "172.17.0.2/16", "docker0")
	join(t, s, "d1", "172.18.0.1/16", d1, "172.18.0.2/16", "br-0123456789ab")
	run(t, d0, "ip route add default via 172.17.0.1")
	for _, port := range []int{6783, 6790} {
		err := inNamespace(s.hostNS, func() error {
			l, err := net.Listen("tcp4", fmt.Sprint(":", port))
			if err == nil {
				t.Cleanup(func() { l.Close() })
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	connects := func(ns *os.File, addr string) bool {
		return inNamespace(ns, func() error {
			c, err := net.DialTimeout("tcp4", addr, 300*time.Millisecond)
			if err == nil {
				c.Close()
			}
			return err
		}) == nil
	}
	if !connects(d0, "172.17.0.1:6783") {
		t.Fatal("without a firewall the port does not answer")
	}
	if err := s.fw.Expose(prefixes("10.2.1.100/24")[0], true); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what string
		ns   *os.File
		addr string
		want bool
	}{
		{"docker0", d0, "172.17.0.1:6783", false}, {"docker0", d0, "192.168.77.1:6783", false}, {"docker0", d0, "172.17.0.1:6790", true},
		{"docker network", d1, "172.18.0.1:6783", false}, {"mesh", s.inside, "10.2.1.100:6783", false}, {"mesh", s.inside, "10.2.1.100:6790", true},
		{"outside", s.to, "192.168.77.1:6783", true}, {"host itself", s.hostNS, "127.0.0.1:6783", true}, {"host itself", s.hostNS, "172.17.0.1:6783", true},
	} {
		if got := connects(c.ns, c.addr); got != c.want {
			t.Errorf("%s to %s connects: %v, want %v", c.what, c.addr, got, c.want)
		}
	}
	wantPing(t, "from docker0 to the mesh", d0, "10.2.1.1", false)
	run(t, s.inside, "ip route add default via 10.2.1.100")
	wantPing(t, "from the mesh to docker0", s.inside, "172.17.0.2", true)
	// A port that listens on loopback only, asked for from outside by way of route_localnet.
	run(t, s.hostNS, "sysctl -q -w net.ipv4.conf.all.route_localnet=1")
	err := inNamespace(s.hostNS, func() error {
		l, err := net.Listen("tcp4", "127.0.0.1:6782")
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, s.to, "ip route add 127.0.0.1/32 via 192.168.77.1 table 99")
	run(t, s.to, "sysctl -q -w net.ipv4.conf.all.route_localnet=1")
	run(t, s.to, "ip rule del from all lookup local")
	run(t, s.to, "ip rule add prio 1 to 127.0.0.1/32 ipproto tcp dport 6782 lookup 99")
	run(t, s.to, "ip rule add prio 2 lookup local")
	reach := func() bool {
		return inNamespace(s.to, func() error {
			d := net.Dialer{Timeout: 300 * time.Millisecond, LocalAddr: &net.TCPAddr{IP: net.IPv4(192, 168, 77, 2)}}
			c, err := d.Dial("tcp4", "127.0.0.1:6782")
			if err == nil {
				c.Close()
			}
			return err
		}) == nil
	}
	if reach() {
		t.Error("a loopback port answers outside")
	}
	if err := s.fw.Remove(); err != nil {
		t.Fatal(err)
	}
	if !reach() {
		t.Log("this kernel keeps loopback ports to itself even without the firewall")
	}
}

func TestNoMasqLocal(t *testing.T) {
	s := newSite(t)
	s.fw = s.host.NewFirewall(FirewallConfig{NoMasqLocal: true})
	if err := s.fw.Expose(prefixes("10.2.1.100/24")[0], true); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.fw.Run(ctx) }()
	defer func() { cancel(); <-done }()
	run(t, s.to, "ip route add 10.2.1.0/24 via 192.168.77.1")
	eventually(t, "kept", func() bool {
		return strings.Contains(run(t, s.hostNS, "nft list table inet mesh"), "10.2.1.1 return")
	})
	wantPing(t, "no way back for the outside's own address", s.to, "10.2.1.1", false)
	run(t, s.inside, "ip route add default via 10.2.1.100")
	wantPing(t, "with a route", s.to, "10.2.1.1", true)
	// A further address is known at once, and a container of another host is masqueraded.
	if err := s.host.AttachPort(s.inside, testPort(1, "10.2.1.7/24")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new address is kept", func() bool {
		return strings.Contains(run(t, s.hostNS, "nft list table inet mesh"), "10.2.1.7 return")
	})
	far := newNamespace(t)
	join(t, s, "far", "10.2.1.100/24", far, "10.2.1.9/24", "mesh")
	wantPing(t, "elsewhere", s.to, "10.2.1.9", true)
}

func TestIPv6Masquerade(t *testing.T) {
	s := newSite(t)
	if err := s.host.AttachPort(s.inside, testPort(1, "fd00:1::1/64")); err != nil {
		t.Fatal(err)
	}
	if err := s.host.AddBridgeAddrs(prefixes("fd00:1::100/64")...); err != nil {
		t.Fatal(err)
	}
	run(t, s.hostNS, "ip addr add fd00:77::1/64 dev out nodad")
	run(t, s.to, "ip addr add fd00:77::2/64 dev eth0 nodad")
	run(t, s.hostNS, "sysctl -q -w net.ipv6.conf.all.forwarding=1")
	run(t, s.inside, "ip route add default via fd00:1::100")
	wantPing(t, "not masqueraded", s.inside, "fd00:77::2", false)
	if err := s.fw.Expose(prefixes("fd00:1::100/64")[0], true); err != nil {
		t.Fatal(err)
	}
	wantPing(t, "masqueraded", s.inside, "fd00:77::2", true)
}

func TestParseFilter(t *testing.T) {
	got := parseFilter(`-P INPUT ACCEPT
-P FORWARD DROP
-N DOCKER-USER
-N MESH-FORWARD
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -j DOCKER
-A DOCKER-USER -j MESH-FORWARD
-A MESH-FORWARD -i mesh -o mesh -j ACCEPT

-A
garbage
`)
	want := filter{
		drops: map[string]bool{"INPUT": false, "FORWARD": true, "DOCKER-USER": false, "MESH-FORWARD": false},
		rules: map[string][]string{"DOCKER-USER": {"-A DOCKER-USER -j MESH-FORWARD"}, "MESH-FORWARD": {"-A MESH-FORWARD -i mesh -o mesh -j ACCEPT"}},
		jumps: map[string][]string{"MESH-FORWARD": {"DOCKER-USER"}, "DOCKER-USER": {"FORWARD"}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if f := parseFilter("-P FORWARD ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-host-prohibited\n"); !f.drops["FORWARD"] {
		t.Error("a FORWARD chain that rejects counts as harmless")
	}
}

func FuzzParseFilter(f *testing.F) {
	f.Add("-P FORWARD DROP\n-A FORWARD -j")
	f.Fuzz(func(t *testing.T, text string) { parseFilter(text) })
}

func TestRulesetText(t *testing.T) {
	w := wish{bridge: "mesh", mac: [6]byte{2}, docker: []string{"docker0"}, udp: []uint16{6783}, masq: prefixes("10.2.1.0/24"), exposed: prefixes("10.2.1.0/24", "fd00::/64"), within: netip.MustParsePrefix("10.32.0.0/12")}
	seen := map[string]bool{}
	for _, c := range w.ruleset() {
		for i, r := range c.rules {
			key := fmt.Sprint(c.name, i, r.text)
			if seen[key] || len(r.comment()) > 250 { // NFT_USERDATA_MAXLEN is 256
				t.Errorf("rule %s has no text of its own, or a long one", key)
			}
			seen[key] = true
		}
	}
	if got := forwardRules(w, true); len(got) != 6 || got[4] != "-A MESH-FORWARD -d fd00::/64 -o mesh -j ACCEPT" {
		t.Errorf("rules are %q", got)
	}
}
