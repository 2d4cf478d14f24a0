package fastdp

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// FASTDP_SLOW: the machine is emulated (kernels/run.sh), so that rates mean nothing.
var slowMachine = os.Getenv("FASTDP_SLOW") != ""

// probeEvery makes 10,000 probes per second.
var probeEvery = map[bool]time.Duration{false: 100 * time.Microsecond, true: 5 * time.Millisecond}[slowMachine]

// enough is how many frames show that frames pass.
var enough = map[bool]int{false: 1000, true: 100}[slowMachine]

func TestTwoHosts(t *testing.T) {
	for _, c := range []struct {
		name       string
		v6, clsact bool
	}{{"IPv4", false, false}, {"IPv6", true, false}, {"clsact", false, true}} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			l.v6, l.clsact = c.v6, c.clsact
			a, b := l.host().container("10.32.0.1/12", "fd00:1::1/64"), l.host().container("10.32.0.2/12", "fd00:1::2/64")
			a.knows(b)
			b.knows(a)
			l.startAll()
			there, back := l.stream(a, b, probeEvery), l.stream(b, a, probeEvery)
			l.carried(enough)
			for _, r := range []tally{there.stop(), back.stop()} {
				if r.Sent < enough || r.Got != r.Sent || r.Twice != 0 {
					t.Error(r)
				}
			}
			if !c.clsact && !c.v6 { // kernels/run.sh prints it
				_, err := os.Stat("/sys/kernel/btf/vmlinux")
				t.Logf("features: hooks by %s, short way in %v, BTF of the kernel %v", l.hosts[0].look().Status.Hooks,
					strings.Contains(l.tree(l.hosts[0]), "under_in"), err == nil)
			}
			const bytes = 64 << 20
			before := l.hosts[0].look().Counters["to_tunnel"]
			took := l.transfer(a, b, bytes)
			after := l.hosts[0].look().Counters["to_tunnel"]
			size := (after.Bytes - before.Bytes) / (after.Frames - before.Frames)
			t.Logf("TCP: %.1f Gbit/s, frames of %d bytes on average", bytes*8/took.Seconds()/1e9, size)
			if size < 10000 {
				t.Errorf("TCP frames of %d bytes on average: superframes were cut", size)
			}
			for _, h := range l.hosts {
				h.drops("drop_out_isolated", "drop_vx_source_id") // the bridges' own chatter; probes that came too early
				got := h.look().Status.Hooks
				if c.clsact && got != "clsact" {
					t.Errorf("hooks: got %s, want clsact", got)
				}
			}
		})
	}
}

// Restarts, and kills, of meshd lose nothing and double nothing. FAULTS P6.
func TestRestarts(t *testing.T) {
	l := newLab(t)
	a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
	a.knows(b)
	b.knows(a)
	l.startAll()
	restarts, kills := 20, 5
	if testing.Short() {
		restarts, kills = 3, 2
	}
	there, back := l.stream(a, b, probeEvery), l.stream(b, a, probeEvery)
	for i := range restarts + kills {
		h := l.hosts[i%2]
		if i < restarts {
			h.tell(order{Op: "close"})
			h.in.Encode(order{}) // the process ends with its input
		}
		h.kill()
		if err := h.start(); err != nil {
			t.Fatal(err)
		}
		if !h.look().Status.Adopted {
			t.Fatal("nothing was adopted")
		}
		h.brief(nil)
		l.allUp(5 * time.Second)
	}
	for _, r := range []tally{there.stop(), back.stop()} {
		t.Log(r)
		if r.Got != r.Sent || r.Twice != 0 {
			t.Errorf("%v, want none lost", r)
		}
	}
	for _, h := range l.hosts {
		if n := h.nonZero()["to_tap"]; n != 0 {
			t.Errorf("host %d: %d frames left the kernel path", h.n, n)
		}
		h.drops("drop_out_isolated", "drop_vx_source_id")
	}
}

// A meshd that restarts knows nothing at first, and the others lose their link to it or route around it:
// none of this is a reason to leave a path that works.
func TestLinkLost(t *testing.T) {
	l := newLab(t)
	a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
	a.knows(b)
	b.knows(a)
	l.host()
	l.startAll()
	there, back := l.stream(a, b, probeEvery), l.stream(b, a, probeEvery)
	h, o := l.hosts[0], l.hosts[1]
	none := Peer{Name: h.name, ID: h.id()}
	byThird := none
	byThird.Via = l.hosts[2].name
	third := Peer{Name: l.hosts[2].name, ID: l.hosts[2].id(), Addr: l.hosts[2].addr()}
	h.kill()
	o.tell(order{Op: "peers", Peers: []Peer{none, third}})
	if err := h.start(); err != nil {
		t.Fatal(err)
	}
	h.tell(order{Op: "self", Name: h.name}) // has not claimed its short id again
	h.tell(order{Op: "peers"})
	h.tell(order{Op: "endpoints"})
	for _, p := range []Peer{{}, {Via: third.Name}, {Addr: o.addr()}} {
		p.Name, p.ID = o.name, o.id()
		h.tell(order{Op: "peers", Peers: []Peer{p, third}})
		o.tell(order{Op: "peers", Peers: []Peer{byThird, third}})
		if eventually(300*time.Millisecond, func() bool {
			return !h.look().Paths[0].Up || !o.look().Paths[0].Up
		}) {
			t.Errorf("told %+v: path left", p)
		}
	}
	h.brief(nil)
	o.brief(nil)
	l.allUp(5 * time.Second)
	for _, r := range []tally{there.stop(), back.stop()} {
		if t.Log(r); r.Got != r.Sent || r.Twice != 0 {
			t.Errorf("%v, want none lost", r)
		}
	}
	// Refused, it goes at once.
	none.Addr, none.Refuse = h.addr(), "encrypted"
	o.tell(order{Op: "peers", Peers: []Peer{none, third}})
	if p := o.look().Paths[0]; p.Up || p.Reason != "encrypted" {
		t.Errorf("refused: %+v", p)
	}
	if n := o.look().Status.Peers; n != 1 {
		t.Errorf("%d peers known to the kernel, want 1", n)
	}
}

// Frames go on for as long as no meshd runs: the far one does not leave the path either, because the
// kernel answers its probes.
func TestNoMeshd(t *testing.T) {
	l := newLab(t)
	a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
	a.knows(b)
	b.knows(a)
	l.startAll()
	r := l.stream(a, b, probeEvery)
	l.hosts[1].kill()
	if eventually(4*time.Second, func() bool { return !l.hosts[0].look().Paths[0].Up }) {
		t.Errorf("path given up: %+v", l.hosts[0].look().Paths)
	}
	l.hosts[0].kill()
	<-time.After(300 * time.Millisecond)
	if got := r.stop(); got.Got != got.Sent || got.Twice != 0 {
		t.Error(got)
	}
}

// Another layout of the maps takes over without a gap.
func TestLayoutChange(t *testing.T) {
	t.Run("tcx", func(t *testing.T) { layoutChange(t, false) })
	t.Run("clsact", func(t *testing.T) { layoutChange(t, true) })
}

func layoutChange(t *testing.T, clsact bool) {
	l := newLab(t)
	l.clsact = clsact
	a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
	a.knows(b)
	b.knows(a)
	l.startAll()
	there, back := l.stream(a, b, probeEvery), l.stream(b, a, probeEvery)
	for i := range 4 {
		h := l.hosts[i%2]
		h.kill()
		h.cfg.Layout = 100 + i
		if err := h.start(); err != nil {
			t.Fatal(err)
		}
		if s := h.look().Status; !s.Adopted || s.Endpoints != 2 || s.Ports != 1 || s.PeersUp != 1 {
			t.Errorf("taken over: %+v", s)
		}
		h.brief(nil)
		l.allUp(5 * time.Second)
		if got := l.run("ls", h.cfg.PinDir); got != fmt.Sprintf("links\nv%d\n", 100+i) {
			t.Errorf("pins: %q", got)
		}
	}
	for _, r := range []tally{there.stop(), back.stop()} {
		if t.Log(r); r.Got != r.Sent || r.Twice != 0 {
			t.Errorf("%v, want none lost", r)
		}
	}
}

// Two hosts that do not reach each other, and one in the middle.
func TestRelay(t *testing.T) {
	l := newLab(t)
	a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
	l.host()
	a.knows(b)
	b.knows(a)
	l.startRelayed(3)
	there, back := l.stream(a, b, probeEvery), l.stream(b, a, probeEvery)
	l.carried(enough)
	for _, r := range []tally{there.stop(), back.stop()} {
		if t.Log(r); r.Sent < enough || r.Got != r.Sent || r.Twice != 0 {
			t.Error(r)
		}
	}
	const bytes = 64 << 20
	took := l.transfer(a, b, bytes)
	t.Logf("relayed TCP: %.1f Gbit/s; %v", bytes*8/took.Seconds()/1e9, l.hosts[2].nonZero())
	if l.hosts[2].look().Status.Hooks == "tcx" {
		all, long := l.hosts[2].nonZero()["relayed"], l.packets(l.hosts[2], "mesh-vx")
		if long > int(all)/10 {
			t.Errorf("%d frames relayed, %d packets by the relay's mesh-vx", all, long)
		}
	}
	if n := l.hosts[2].nonZero()["from_tunnel"]; n != 0 {
		t.Errorf("%d frames reached the relay's own endpoints", n)
	}
}

// startRelayed starts three hosts, of which two do not reach each other but by the third one, the relay.
func (l *lab) startRelayed(relay int) {
	l.t.Helper()
	via := map[int]int{}
	for _, h := range l.hosts {
		if h.n != relay {
			l.run("nsenter", "--net=/run/netns/"+l.prefix+"net", "bridge", "link", "set", "dev", fmt.Sprintf("p%d", h.n), "isolated", "on")
			via[h.n] = relay
		}
		if err := h.start(); err != nil {
			l.t.Fatal(err)
		}
	}
	for _, h := range l.hosts {
		if h.n == relay {
			h.brief(nil)
		} else {
			h.brief(via)
		}
	}
	l.allUp(10 * time.Second)
}

// A path that breaks is left within 3 s, says why, and is taken again within 30 s of working.
func TestPathBreaks(t *testing.T) {
	for _, c := range []struct {
		name          string
		breaks, mends func(l *lab)
		reason        string
	}{
		{"port blocked", func(l *lab) {
			nft := "add table inet x; add chain inet x in { type filter hook input priority 0; }; add rule inet x in udp dport 6784 drop"
			l.run("nsenter", "--net=/run/netns/"+l.hosts[1].ns, "nft", nft)
		}, func(l *lab) {
			l.run("nsenter", "--net=/run/netns/"+l.hosts[1].ns, "nft", "delete table inet x")
		}, "6784"},
		{"MTU", func(l *lab) { l.ip("h2", "link set eth0 mtu 1300") }, func(l *lab) { l.ip("h2", "link set eth0 mtu 1500") }, "MTU"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
			a.knows(b)
			b.knows(a)
			l.startAll()
			r := l.stream(a, b, time.Millisecond)
			c.breaks(l)
			broken := time.Now()
			for _, h := range l.hosts {
				if !eventually(5*time.Second, func() bool { return !h.look().Paths[0].Up }) {
					t.Fatalf("host %d: path not left", h.n)
				}
			}
			took := time.Since(broken)
			t.Logf("left after %v", took)
			if took > 3*time.Second+200*time.Millisecond && !slowMachine {
				t.Errorf("left after %v, want 3 s", took)
			}
			var reason string
			if !eventually(5*time.Second, func() bool {
				reason = l.hosts[0].look().Paths[0].Reason
				return strings.Contains(reason, c.reason)
			}) {
				t.Errorf("reason %q, want it to name %s", reason, c.reason)
			}
			c.mends(l)
			mended := time.Now()
			l.allUp(30 * time.Second)
			t.Logf("taken again after %v; %q", time.Since(mended), reason)
			r.stop()
			if n := l.hosts[0].nonZero()["to_tap"]; n == 0 {
				t.Error("no frame took the userspace path meanwhile")
			}
		})
	}
}

// A meshd that stops does not leave new endpoints behind on the userspace path.
func TestLeave(t *testing.T) {
	l := newLab(t)
	a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
	a.knows(b)
	b.knows(a)
	l.hosts[0].cfg.AnnounceDelay = time.Hour
	l.startAll()
	h := l.hosts[0]
	r := l.stream(a, b, time.Millisecond)
	if !eventually(3*time.Second, func() bool { return h.nonZero()["to_tap"] > 100 }) {
		t.Fatalf("%v", h.nonZero())
	}
	if n := h.nonZero()["to_tunnel"]; n > 0 {
		t.Errorf("%d frames of an endpoint that others do not know of", n)
	}
	h.tell(order{Op: "close"})
	if n := b.received(); !eventually(3*time.Second, func() bool { return b.received() > n+200 }) {
		t.Error("its frames are lost while no meshd runs")
	}
	r.stop()
}

// When the relay's routes change, what it relays follows.
func TestRelayRoutes(t *testing.T) {
	l := newLab(t)
	a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
	relay := l.host()
	a.knows(b)
	b.knows(a)
	// The relay has a second device on the same underlay.
	l.ip("h3", fmt.Sprintf("link add eth1 mtu 1500 type veth peer name q3 mtu 1500 netns %snet", l.prefix))
	l.ip("net", "link set q3 master sw up")
	l.run("nsenter", "--net=/run/netns/"+relay.ns, "sysctl", "-qw", "net.ipv4.conf.eth1.arp_ignore=1") // it has no address yet
	l.ip("h3", "link set eth1 up")
	l.startRelayed(3)
	there, back := l.stream(a, b, time.Millisecond), l.stream(b, a, time.Millisecond)
	l.carried(100)
	l.ip("h3", "addr add 192.0.2.3/32 dev eth1")
	l.ip("h3", "route replace 192.0.2.2/32 dev eth1 src 192.0.2.3")
	l.run("nsenter", "--net=/run/netns/"+l.prefix+"net", "nft",
		`add table bridge x; add chain bridge x f { type filter hook forward priority 0; }; add rule bridge x f iifname "p3" oifname "p2" drop`)
	if l.carried(100); relay.look().Status.Fault != "" {
		t.Error(relay.look().Status.Fault)
	}
	for _, r := range []tally{there.stop(), back.stop()} {
		if t.Log(r); r.Gap > 1500*time.Millisecond {
			t.Errorf("%v: want no gap of 1.5 s", r)
		}
	}
}
