package fastdp

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// sendVXLAN sends frames in VXLAN datagrams from a namespace: by a plain socket, or with a forged source
// address from spoof.
func sendVXLAN(t *testing.T, ns string, spoof netip.Addr, to netip.Addr, flags byte, vni uint32, frames ...[]byte) {
	t.Helper()
	inNetns(t, ns, func() error {
		var datagrams [][]byte
		for _, f := range frames {
			h := []byte{flags, 0, 0, 0, byte(vni >> 16), byte(vni >> 8), byte(vni), 0}
			datagrams = append(datagrams, append(h, f...))
		}
		if !spoof.IsValid() {
			c, err := net.Dial("udp", netip.AddrPortFrom(to, 6784).String())
			if err != nil {
				return err
			}
			defer c.Close()
			for _, d := range datagrams {
				if _, err := c.Write(d); err != nil {
					return err
				}
			}
			return nil
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, d := range datagrams {
			p := ip4(spoof.String(), to.String(), 17, udp(40000, 6784, d...)...)
			if err := unix.Sendto(fd, p, 0, &unix.SockaddrInet4{Addr: to.As4()}); err != nil {
				return err
			}
		}
		return nil
	})
}

// sendFrames sends frames from inside a container as they are (NET_RAW).
func (c *labContainer) sendFrames(t *testing.T, frames ...[]byte) {
	t.Helper()
	inNetns(t, c.ns, func() error {
		i, err := net.InterfaceByName("ethmesh")
		if err != nil {
			return err
		}
		f, err := packetSocket(0, i.Index)
		if err != nil {
			return err
		}
		defer f.Close()
		for _, b := range frames {
			if _, err := f.Write(b); err != nil {
				return err
			}
		}
		return nil
	})
}

// quiet waits until the namespaces' own chatter (router solicitations and the like) is over.
func quiet(cs ...*labContainer) {
	last := make([]int, len(cs))
	since := time.Now()
	eventually(5*time.Second, func() bool {
		for i, c := range cs {
			if n := c.received(); n != last[i] {
				last[i], since = n, time.Now()
			}
		}
		return time.Since(since) > 500*time.Millisecond
	})
}

// FAULTS V1 to V4: nothing that is forged on the underlay reaches an endpoint, and each is counted.
func TestForgedVXLAN(t *testing.T) {
	l := newLab(t)
	victim, peer := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
	near := l.hosts[0].container("10.32.0.3/12")
	stranger := l.host() // runs no meshd and is told of by nobody
	l.hosts = l.hosts[:2]
	for _, c := range []*labContainer{victim, peer, near} {
		l.run("nsenter", "--net=/run/netns/"+c.ns, "sysctl", "-qw", "net.ipv6.conf.ethmesh.disable_ipv6=1")
	}
	l.startAll()
	target := l.hosts[0]
	to := target.addr()
	good := ether(victim.port.MAC, peer.port.MAC, 0x0800, ip4("10.32.0.2", "10.32.0.1", 17, udp(1, 2)...)...)
	inner := ether(victim.port.MAC, near.port.MAC, 0x0800, ip4("10.32.0.3", "10.32.0.1", 17, udp(1, 2)...)...)
	nobody := ether(victim.port.MAC, unknown, 0x0800, ip4("10.32.0.9", "10.32.0.1", 17, udp(1, 2)...)...)
	vlan := ether(victim.port.MAC, peer.port.MAC, 0x8100, append([]byte{0, 5, 8, 0}, ip4("10.32.0.2", "10.32.0.1", 17, udp(1, 2)...)...)...)
	group := ether(all, peer.port.MAC, 0x0806, arp(1, peer.port.MAC, "10.32.0.2", mesh.MAC{}, "10.32.0.1")...)
	elsewhere := ether(unknown, peer.port.MAC, 0x0800, ip4("10.32.0.2", "10.32.0.1", 17, udp(1, 2)...)...)
	nested := ether(unknown, peer.port.MAC, 0x0800, ip4("10.32.0.2", "10.32.0.1", 17, udp(9, 6784, append([]byte{8, 0, 0, 0, 1, 0, 0x11, 0}, good...)...)...)...)
	runt := good[:10]
	right := vni(l.hosts[1].id(), target.id())
	second, third := l.hosts[1].ns, stranger.ns
	spoofed := netip.MustParseAddr("192.0.2.77")
	quiet(victim, near)
	for _, c := range []struct {
		name   string
		ns     string
		spoof  netip.Addr
		flags  byte
		vni    uint32
		frame  []byte
		reason string // "": the vxlan driver itself refuses
	}{
		{"stranger with the right ids", third, netip.Addr{}, 8, right, good, "drop_vx_address"},
		{"stranger, forged address of nobody", third, spoofed, 8, right, good, "drop_vx_address"},
		{"wrong source id", second, netip.Addr{}, 8, vni(99, target.id()), good, "drop_vx_source_id"},
		{"the receiver's id as source", second, netip.Addr{}, 8, vni(target.id(), target.id()), inner, "drop_vx_source_id"},
		{"id 0", second, netip.Addr{}, 8, vni(0, target.id()), good, "drop_vx_source_id"},
		{"wrong destination id", second, netip.Addr{}, 8, vni(l.hosts[1].id(), 99), good, "drop_vx_dest_id"},
		{"inner source of a local container", second, netip.Addr{}, 8, right, inner, "drop_vx_mac"},
		{"inner source of nobody", second, netip.Addr{}, 8, right, nobody, "drop_vx_mac"},
		{"VLAN tag inside", second, netip.Addr{}, 8, right, vlan, "drop_vx_malformed"},
		{"broadcast", second, netip.Addr{}, 8, right, group, "drop_vx_group"},
		{"for nobody", second, netip.Addr{}, 8, right, elsewhere, "drop_vx_unknown"},
		{"nested", second, netip.Addr{}, 8, right, nested, "drop_vx_unknown"},
		{"reserved flags", second, netip.Addr{}, 0x48, right, good, ""},
		{"no VNI flag", second, netip.Addr{}, 0, right, good, ""},
		{"runt", second, netip.Addr{}, 8, right, runt, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := victim.received() + near.received()
			before := target.nonZero()
			const n = 100
			sendVXLAN(t, c.ns, c.spoof, to, c.flags, c.vni, slices.Repeat([][]byte{c.frame}, n)...)
			if c.reason != "" && !eventually(3*time.Second, func() bool { return target.nonZero()[c.reason] >= before[c.reason]+n }) {
				t.Errorf("%s: %d counted, want %d more", c.reason, target.nonZero()[c.reason]-before[c.reason], n)
			}
			if got = victim.received() + near.received() - got; got != 0 {
				t.Errorf("%d frames were delivered", got)
			}
		})
	}
	// And the same, right in everything, passes: so the tests above tested what they say.
	before := victim.received()
	sendVXLAN(t, second, netip.Addr{}, to, 8, right, good)
	if !eventually(3*time.Second, func() bool { return victim.received() == before+1 }) {
		t.Error("a right frame does not pass")
	}
}

// FAULTS L1 to L3 between real containers: what the guard drops, no other port and not the host sees, and
// the status names the offender.
func TestGuardedPorts(t *testing.T) {
	l := newLab(t)
	attacker, victim := l.host().container("10.32.0.1/12", "fd00:1::1/64"), l.hosts[0].container("10.32.0.2/12", "fd00:1::2/64")
	far := l.host().container("10.32.0.3/12", "fd00:1::3/64")
	victim.knows(attacker)
	l.startAll()
	quiet(attacker, victim, far)
	neighbours := victim.ip("neigh show")
	me, other := attacker.port.MAC, victim.port.MAC
	router := mesh.MAC{0x33, 0x33, 0, 0, 0, 1}
	attacks := map[string][]byte{
		"drop_arp":          ether(all, me, 0x0806, arp(2, me, "10.32.0.3", mesh.MAC{}, "10.32.0.3")...),
		"drop_source_mac":   ether(other, far.port.MAC, 0x0800, ip4("10.32.0.3", "10.32.0.2", 17, udp(1, 2)...)...),
		"drop_source_ip4":   ether(other, me, 0x0800, ip4("10.32.0.3", "10.32.0.2", 17, udp(1, 2)...)...),
		"drop_source_ip6":   ether(other, me, 0x86dd, ip6("fd00:1::3", "fd00:1::2", 17, udp(1, 2)...)...),
		"drop_neighbour":    ether(router, me, 0x86dd, ip6("fd00:1::1", "ff02::1", 58, neighbour(136, "fd00:1::3", 2, me)...)...),
		"drop_router":       ether(router, me, 0x86dd, ip6(eui64(me), "ff02::1", 58, 134, 0, 0, 0, 64, 0, 7, 8)...),
		"drop_dhcp":         ether(all, me, 0x0800, ip4("10.32.0.1", "255.255.255.255", 17, udp(67, 68, make([]byte, 240)...)...)...),
		"drop_link_control": ether(mesh.MAC{1, 0x80, 0xc2, 0, 0, 0}, me, 0x0026, append([]byte{0x42, 0x42, 3, 0, 0}, make([]byte, 40)...)...),
	}
	for reason, frame := range attacks {
		got := victim.received() + far.received()
		before := l.hosts[0].nonZero()[reason]
		const n = 1000
		attacker.sendFrames(t, slices.Repeat([][]byte{frame}, n)...)
		if !eventually(3*time.Second, func() bool { return l.hosts[0].nonZero()[reason] >= before+n }) {
			t.Errorf("%s: %d counted, want %d", reason, l.hosts[0].nonZero()[reason]-before, n)
		}
		if got = victim.received() + far.received() - got; got > n/100 { // a few are the namespaces' own
			t.Errorf("%s: %d frames reached others", reason, got)
		}
		named := false
		for _, o := range l.hosts[0].look().Offences {
			named = named || o.MAC == me && o.Reason == reason && o.Frames >= n
		}
		if !named {
			t.Errorf("%s: the offender is not named: %+v", reason, l.hosts[0].look().Offences)
		}
	}
	if now := victim.ip("neigh show"); now != neighbours {
		t.Errorf("the victim's neighbours changed from\n%sto\n%s", neighbours, now)
	}
}

func eui64(m mesh.MAC) string {
	b := [16]byte{0xfe, 0x80}
	copy(b[8:], []byte{m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]})
	return netip.AddrFrom16(b).String()
}

// FAULTS L7: two networks on two hosts exchange nothing, whatever routes and addresses their containers
// give themselves.
func TestIsolation(t *testing.T) {
	l := newLab(t)
	h1, h2 := l.host(), l.host()
	red1, blue1 := h1.container("10.32.0.1/24"), h1.container("10.99.0.1/24")
	red2, blue2 := h2.container("10.32.0.2/24"), h2.container("10.99.0.2/24")
	red := []*labContainer{red1, red2}
	blue := []*labContainer{blue1, blue2}
	for _, r := range red {
		for _, b := range blue {
			r.knows(b)
			b.knows(r)
			r.ip("route replace 10.99.0.0/24 dev ethmesh")
			b.ip("route replace 10.32.0.0/24 dev ethmesh")
		}
	}
	l.startAll()
	quiet(red1, red2, blue1, blue2)
	for _, r := range red {
		for _, b := range blue {
			before := b.received()
			r.ip("addr replace 10.99.0.77/24 dev ethmesh") // not its own
			var frames [][]byte
			for _, src := range []string{"10.32.0.1", "10.32.0.2", "10.99.0.77", b.port.Addrs[0].Addr().String()} {
				for _, dst := range []mesh.MAC{b.port.MAC, all, {1, 0, 0x5e, 0, 0, 1}} {
					frames = append(frames, ether(dst, r.port.MAC, 0x0800, ip4(src, b.port.Addrs[0].Addr().String(), 17, udp(1, 2)...)...),
						ether(dst, r.port.MAC, 0x0806, arp(1, r.port.MAC, src, mesh.MAC{}, b.port.Addrs[0].Addr().String())...))
				}
			}
			r.sendFrames(t, frames...)
			dialled := make(chan error, 1)
			inNetns(t, r.ns, func() error {
				c, err := net.DialTimeout("udp", net.JoinHostPort(b.port.Addrs[0].Addr().String(), "9"), time.Second)
				if err == nil {
					c.Write([]byte("x"))
					c.Close()
				}
				dialled <- err
				return nil
			})
			<-dialled
			quiet(b)
			if n := b.received() - before; n != 0 {
				t.Errorf("%s to %s: %d frames crossed", r.ns, b.ns, n)
			}
			r.ip("addr del 10.99.0.77/24 dev ethmesh")
		}
	}
	if n := h1.nonZero()["drop_isolated"]; n == 0 {
		t.Error("nothing was counted as isolated")
	}
	// The networks themselves work.
	red1.knows(red2)
	red2.knows(red1)
	r := l.stream(red1, red2, time.Millisecond)
	before := h2.nonZero()["from_tunnel"]
	eventually(5*time.Second, func() bool { return h2.nonZero()["from_tunnel"] > before+20 })
	if got := r.stop(); got.Got == 0 || got.Got != got.Sent {
		t.Errorf("within a network: %v", got)
	}
}

// FAULTS L6: a storm of broadcasts from one port is limited, and no loop arises.
func TestStorm(t *testing.T) {
	if slowMachine {
		t.Skip("an emulated machine makes no storm")
	}
	l := newLab(t)
	storm, a := l.host().container("10.32.0.1/12"), l.hosts[0].container("10.32.0.2/12")
	b := l.host().container("10.32.0.3/12")
	a.knows(b)
	b.knows(a)
	l.startAll()
	quiet(storm, a, b)
	r := l.stream(a, b, time.Millisecond)
	before := a.received()
	frame := ether(all, storm.port.MAC, 0x0806, arp(1, storm.port.MAC, "10.32.0.1", mesh.MAC{}, "10.32.0.9")...)
	begun := time.Now()
	const n = 100000
	storm.sendFrames(t, slices.Repeat([][]byte{frame}, n)...)
	took := time.Since(begun)
	got := r.stop()
	passed := a.received() - before
	t.Logf("storm of %.0f frames/s: %d of %d passed; beside it %v", n/took.Seconds(), passed, n, got)
	if most := 4000 + int(took.Seconds()*2000) + 100; passed > most {
		t.Errorf("%d group frames passed, want at most %d", passed, most)
	}
	if got.Got < got.Sent*9/10 {
		t.Errorf("others kept %d of %d", got.Got, got.Sent)
	}
	if !strings.Contains(fmt.Sprint(l.hosts[0].look().Offences), "drop_rate") {
		t.Error("the storm is not on the port's account")
	}
}

// Two hosts connected twice, by the tunnel and by a link that somebody put on both bridges: nothing goes
// round, nothing arrives twice.
func TestSecondLink(t *testing.T) {
	l := newLab(t)
	a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
	a.knows(b)
	b.knows(a)
	l.ip("h1", fmt.Sprintf("link add link2 mtu 1410 type veth peer name link2 mtu 1410 netns %sh2", l.prefix))
	l.startAll()
	for _, h := range l.hosts {
		name := fmt.Sprintf("h%d", h.n)
		l.ip(name, "link set link2 master mesh up")
		h.tell(order{Op: "attach", Port: Port{Index: l.index(name, "link2"), Exempt: true}})
	}
	quiet(a, b)
	before := b.received()
	r := l.stream(a, b, time.Millisecond)
	const n = 500
	frame := ether(all, a.port.MAC, 0x0806, arp(1, a.port.MAC, "10.32.0.1", mesh.MAC{}, "10.32.0.9")...)
	a.sendFrames(t, slices.Repeat([][]byte{frame}, n)...)
	if !eventually(3*time.Second, func() bool { return l.hosts[1].nonZero()["drop_looped"] >= n }) {
		t.Errorf("%d frames came round and were dropped, want %d", l.hosts[1].nonZero()["drop_looped"], n)
	}
	if got := r.stop(); got.Got != got.Sent || got.Twice != 0 {
		t.Error(got)
	} else if extra := b.received() - before - got.Got; extra > 20 { // the namespaces' own
		t.Errorf("%d frames more than were sent", extra)
	}
	if dropped := l.hosts[0].nonZero()["drop_looped"]; dropped > 20 {
		t.Errorf("%d frames came back to where they were sent", dropped)
	}
}
