package gossip

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"meshd/mesh"
	"meshd/router"
)

var t0 = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

var errTest = errors.New("no answer")

func pn(i int) mesh.PeerName { return mesh.PeerName{2, 0, 0, 0, 0, byte(i)} }

func at(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 6783)
}

func testDialer(limit int) *dialer {
	return newDialer(pn(1), 6783, limit, true, rand.New(rand.NewPCG(1, 1)))
}

func upTo(i int, outbound bool) router.Link {
	return router.Link{Peer: router.Hello{Name: pn(i), Run: mesh.RunID(i), Port: 6783}, Addr: at(i), Outbound: outbound}
}

// drive steps a dialer every 100 ms, fails every dial at once, and returns when it dialled addr.
func drive(d *dialer, from time.Time, length time.Duration, addr netip.AddrPort) (times []time.Duration) {
	for now := from; now.Sub(from) < length; now = now.Add(100 * time.Millisecond) {
		dials, _ := d.step(now)
		for _, a := range dials {
			if a == addr {
				times = append(times, now.Sub(from))
			}
			d.failed(a, router.Hello{}, errTest, now)
		}
	}
	return times
}

func gaps(times []time.Duration) (most time.Duration) {
	for i := 1; i < len(times); i++ {
		most = max(most, times[i]-times[i-1])
	}
	return most
}

func TestParseTarget(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"10.0.0.1", "10.0.0.1 6783"}, {"10.0.0.1:7000", "10.0.0.1 7000"},
		{"2001:db8::1", "2001:db8::1 6783"}, {"[2001:db8::1]:7000", "2001:db8::1 7000"},
		{"host.example.com", "host.example.com 6783"}, {"host:1", "host 1"},
		{"", ""}, {":6783", ""}, {"host:0", ""}, {"host:70000", ""}, {"host:x", ""}, {"a b", ""}, {"a/b", ""}, {"[", ""}, {"[::1]", ""},
		{"::1::2", ""}, {"http://host", ""}, {"a\x00b", ""},
	} {
		host, port, err := parseTarget(c.in, 6783)
		got := fmt.Sprint(host, " ", port)
		if c.want == "" && err == nil || c.want != "" && (err != nil || got != c.want) {
			t.Errorf("%q: got %s, %v, want %q", c.in, got, err, c.want)
		}
	}
}

func TestTargetIsRetried(t *testing.T) {
	d := testDialer(0)
	if err := d.connect([]string{"10.0.0.2"}, false); err != nil {
		t.Fatal(err)
	}
	times := drive(d, t0, time.Hour, at(2))
	if times[0] != 0 {
		t.Errorf("first dialled after %v", times[0])
	}
	if g := gaps(times); g > 28*time.Second {
		t.Errorf("a target went undialled for %v", g)
	}
	if n := len(times); n > 400 {
		t.Errorf("dialled %d times in an hour", n)
	}
	c := d.attempts()
	if len(c) != 1 || c[0].State != StateFailed || c[0].Error != errTest.Error() || c[0].NextTry.IsZero() || c[0].Target != "10.0.0.2" {
		t.Errorf("got %+v", c)
	}

	d.up(upTo(2, true), t0.Add(time.Hour))
	if times := drive(d, t0.Add(time.Hour), time.Hour, at(2)); len(times) != 0 {
		t.Errorf("dialled %d times with a link", len(times))
	}
	if c := d.attempts(); len(c) != 0 {
		t.Errorf("got %+v with a link", c)
	}
	now := t0.Add(2 * time.Hour)
	d.down(pn(2), time.Hour, errTest, now)
	if times := drive(d, now, time.Minute, at(2)); len(times) == 0 || times[0] > time.Second {
		t.Errorf("after the link's end: dialled at %v", times)
	}
	d.forget([]string{"10.0.0.2:6783"})
	if len(d.targets) != 1 {
		t.Error("forgotten by other words than it was given with")
	}
	d.forget([]string{"10.0.0.2"})
	if len(d.targets) != 0 {
		t.Error("not forgotten")
	}
}

func TestReplaceTargets(t *testing.T) {
	d := testDialer(0)
	for _, step := range []struct {
		add     []string
		replace bool
		want    string
	}{
		{[]string{"a", "b"}, false, "[a b]"}, {[]string{"b", "c"}, false, "[a b c]"},
		{[]string{"d", "b"}, true, "[b d]"}, {nil, true, "[]"},
	} {
		if err := d.connect(step.add, step.replace); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(d.targetTexts()); got != step.want {
			t.Errorf("%v: got %s, want %s", step.add, got, step.want)
		}
	}
	if err := d.connect([]string{"fine", "not fine"}, false); err == nil || len(d.targets) != 0 {
		t.Errorf("got %v and %v: an error must change nothing", err, d.targetTexts())
	}
	if err := d.connect(slices.Repeat([]string{"x"}, 5000), false); err != nil || len(d.targets) != 1 {
		t.Errorf("the same target many times: %v, %d targets", err, len(d.targets))
	}
}

func TestNamesAreLookedUpAgain(t *testing.T) {
	d := testDialer(0)
	d.connect([]string{"host:7000"}, false)
	dials, resolve := d.step(t0)
	if len(dials) != 0 || len(resolve) != 1 || resolve[0].host != "host" {
		t.Fatalf("got %v, %v", dials, resolve)
	}
	if _, again := d.step(t0.Add(time.Second)); len(again) != 0 {
		t.Error("looked up twice at once")
	}
	now := t0.Add(2 * time.Second)
	d.resolved("host:7000", nil, errTest, now)
	if _, resolve := d.step(now); len(resolve) != 1 {
		t.Errorf("after a failure %d look-ups", len(resolve))
	}
	d.resolved("host:7000", nil, errTest, now)
	if c := d.attempts(); len(c) != 1 || c[0].Address != "host:7000" || c[0].State != StateFailed || c[0].Error != errTest.Error() {
		t.Errorf("got %+v", c)
	}
	ip := netip.MustParseAddr("10.0.0.9")
	looked := 0
	for i := range 600 {
		now = t0.Add(2*time.Second + time.Duration(i)*100*time.Millisecond)
		dials, resolve := d.step(now)
		for range resolve {
			looked++
			d.resolved("host:7000", []netip.Addr{ip}, nil, now)
		}
		for _, a := range dials {
			if a != netip.AddrPortFrom(ip, 7000) {
				t.Errorf("dialled %v", a)
			}
			d.failed(a, router.Hello{}, errTest, now)
		}
	}
	if looked < 3 {
		t.Errorf("looked up %d times in a minute of failing", looked)
	}
	d.resolved("never given", []netip.Addr{ip}, nil, now)
}

func TestOwnAddressIsDialledOnce(t *testing.T) {
	d := testDialer(0)
	d.connect([]string{"10.0.0.1"}, false)
	d.step(t0)
	d.itself(at(1), errTest)
	if times := drive(d, t0, time.Hour, at(1)); len(times) != 0 {
		t.Errorf("dialled %d times more", len(times))
	}
	if c := d.attempts(); len(c) != 1 || c[0].State != StateFailed || !c[0].NextTry.IsZero() {
		t.Errorf("got %+v", c)
	}
	d.connect([]string{"10.0.0.1"}, false) // asked for again
	if times := drive(d, t0.Add(time.Hour), time.Second, at(1)); len(times) != 1 {
		t.Errorf("asked for again, dialled %d times", len(times))
	}
}

func TestPeersThatOthersTellOf(t *testing.T) {
	d := testDialer(0)
	told := []candidate{{name: pn(2), addrs: []netip.AddrPort{at(2)}, reachable: true}, {name: pn(1), addrs: []netip.AddrPort{at(1)}}}
	d.know(told, t0)
	times := drive(d, t0, capHopeful, at(2))
	if len(times) == 0 || gaps(times) > 6*time.Second+200*time.Millisecond {
		t.Errorf("a peer by relay went undialled for %v", gaps(times))
	}
	late := drive(d, t0.Add(2*capHopeful), time.Hour, at(2))
	if gaps(late) < 30*time.Second {
		t.Errorf("hopeless, dialled every %v at most", gaps(late))
	}
	told[0].reachable = false
	lost := t0.Add(4 * time.Hour)
	d.know(told, lost)
	times = drive(d, lost, time.Hour, at(2))
	if len(times) == 0 || times[0] > time.Second || gaps(times) > 15*time.Second+200*time.Millisecond {
		t.Errorf("an unreachable peer went undialled for %v", gaps(times))
	}
	if times := drive(d, lost, time.Minute, at(1)); len(times) != 0 {
		t.Error("dialled ourselves")
	}
	// Refused, with proof of who it is.
	now := t0.Add(6 * time.Hour)
	d.attempt(at(2)).dialing = true
	d.dialing[at(2)] = d.attempt(at(2))
	d.failed(at(2), router.Hello{Name: pn(2)}, errors.New("limit"), now)
	later := now.Add(time.Hour)
	drive(d, now, time.Hour, at(2))
	if g := gaps(drive(d, later, 2*time.Hour, at(2))); g < 2*time.Minute {
		t.Errorf("refused, dialled every %v at most", g)
	}
}

func TestNoDiscovery(t *testing.T) {
	d := testDialer(0)
	d.discovery = false
	d.know([]candidate{{name: pn(2), addrs: []netip.AddrPort{at(2)}}}, t0)
	if times := drive(d, t0, time.Hour, at(2)); len(times) != 0 {
		t.Error("dialled a peer that is no target")
	}
}

func TestConnectionLimit(t *testing.T) {
	d := testDialer(5)
	var told []candidate
	for i := 2; i < 50; i++ {
		told = append(told, candidate{name: pn(i), addrs: []netip.AddrPort{at(i)}, reachable: true})
	}
	told[0].links = 5
	d.know(told, t0)
	now := t0.Add(time.Minute)
	dials, _ := d.step(now)
	if len(dials) > 5 || slices.Contains(dials, at(2)) {
		t.Errorf("dialled %v: a limit of 5, and the first has no room", dials)
	}
	for i := 10; i < 15; i++ {
		d.up(upTo(i, true), now)
	}
	d.connect([]string{"10.0.0.99"}, false)
	if dials, _ := d.step(now.Add(time.Minute)); !slices.Equal(dials, []netip.AddrPort{at(99)}) {
		t.Errorf("at the limit, dialled %v, want just the target", dials)
	}
}

// However many peers are out of reach, dials stay few, and every peer gets its turn.
func TestDialRate(t *testing.T) {
	d := testDialer(0)
	var told []candidate
	for i := range 600 {
		name := mesh.PeerName{3, 0, 0, 0, byte(i >> 8), byte(i)}
		told = append(told, candidate{name: name, addrs: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{11, 0, byte(i >> 8), byte(i)}), 1)}})
	}
	d.know(told, t0)
	count, seen := 0, map[netip.AddrPort]bool{}
	for now := t0; now.Sub(t0) < 2*time.Minute; now = now.Add(100 * time.Millisecond) {
		dials, _ := d.step(now)
		for _, a := range dials {
			count++
			seen[a] = true
			d.failed(a, router.Hello{}, errTest, now)
		}
	}
	if count > dialBurst+dialRate*121 {
		t.Errorf("%d dials in two minutes", count)
	}
	if len(seen) != 600 {
		t.Errorf("%d of 600 peers were dialled", len(seen))
	}
}

func TestKnownPeersAreBounded(t *testing.T) {
	d := testDialer(0)
	d.up(upTo(9, true), t0)
	for i := range 3 * maxKnown {
		name := mesh.PeerName{4, 0, 0, byte(i >> 16), byte(i >> 8), byte(i)}
		var addrs []netip.AddrPort
		for k := range 20 {
			addrs = append(addrs, netip.AddrPortFrom(netip.AddrFrom4([4]byte{12, byte(k), byte(i >> 8), byte(i)}), 1))
		}
		d.know([]candidate{{name: name, addrs: addrs}}, t0)
		if k := d.known[name]; k != nil && len(k.addrs) > maxAddrs {
			t.Fatalf("%d addresses of one peer", len(d.known[name].addrs))
		}
	}
	d.know([]candidate{{name: pn(8), addrs: []netip.AddrPort{at(8)}}}, t0.Add(time.Hour))
	if d.known[pn(8)] == nil {
		t.Error("old ones do not make room for a new one")
	}
	if len(d.known) > maxKnown || d.known[pn(9)] == nil {
		t.Errorf("%d peers known, the linked one among them: %v", len(d.known), d.known[pn(9)] != nil)
	}
}

func TestInboundLinkTeachesAnAddress(t *testing.T) {
	d := testDialer(0)
	l := upTo(2, false)
	l.Addr = netip.AddrPortFrom(l.Addr.Addr(), 40000)
	d.up(l, t0)
	d.down(pn(2), 0, errTest, t0)
	if times := drive(d, t0, 10*time.Second, at(2)); len(times) == 0 {
		t.Error("not dialled at its own port")
	}
}

func TestLinkBook(t *testing.T) {
	b := newLinkBook()
	l := upTo(2, true)
	l.RTT, l.MTU = 10*time.Millisecond, 1400
	damped := func(now time.Time) bool { return b.links(now)[0].Damped }
	now := t0
	b.up(l, now)
	if damped(now) {
		t.Error("a new link is damped")
	}
	// Short lives: each time back it is damped for longer.
	for i, want := range []time.Duration{1, 1, 1, 4, 8, 16, 32, 60, 60} {
		now = now.Add(10 * time.Second)
		b.down(pn(2), now)
		if len(b.links(now)) != 0 {
			t.Error("a dead link is published")
		}
		now = now.Add(time.Second)
		b.up(l, now)
		want *= time.Second
		if !damped(now.Add(want-time.Millisecond)) || damped(now.Add(want)) {
			t.Errorf("fall %d: not damped for %v", i+1, want)
		}
		if !b.settles(now, now.Add(want)) || b.settles(now.Add(want), now.Add(time.Hour)) {
			t.Errorf("fall %d: the end of damping goes unnoticed", i+1)
		}
	}
	now = now.Add(time.Hour)
	b.down(pn(2), now)
	b.up(l, now)
	if !damped(now) || damped(now.Add(dampFirst)) {
		t.Error("an hour of steady life counts for nothing")
	}
	now = now.Add(time.Second)
	b.down(pn(2), now)
	l.Peer.Run++
	b.up(l, now)
	if damped(now) {
		t.Error("a restarted peer is damped")
	}

	ms := time.Millisecond
	for _, c := range []struct {
		after          time.Duration
		measured, want time.Duration
	}{
		{0, 300 * ms, 10 * ms}, // it goes up only
		{29 * time.Second, 310 * ms, 10 * ms},
		{1 * time.Second, 300 * ms, 10 * ms}, // after a while, to the least in it
		{30 * time.Second, 305 * ms, 300 * ms},
		{time.Second, 250 * ms, 300 * ms}, // not by less than a third
		{time.Second, 30 * ms, 30 * ms},   // down at once
		{time.Second, 25 * ms, 30 * ms},
	} {
		now = now.Add(c.after)
		l.RTT = c.measured
		b.changed(l, now)
		if got := b.links(now)[0].RTT; got != router.RoundRTT(c.want) {
			t.Errorf("%v measured: %v published, want %v", c.measured, got, c.want)
		}
	}
	slow := upTo(4, true)
	slow.RTT = time.Second
	b.up(slow, now)
	if got := b.links(now)[1].RTT; got != router.RoundRTT(rttYoung) {
		t.Errorf("a new link is published with %v", got)
	}
	if b.settles(now, now.Add(29*time.Second)) || !b.settles(now, now.Add(rttPause)) {
		t.Error("that it is slow goes unnoticed later")
	}
	b.down(pn(4), now)
	b.changed(upTo(3, true), now)
	if len(b.links(now)) != 2 {
		t.Error("a change of a link that we missed the start of is lost")
	}
	if b.down(pn(9), now) != 0 {
		t.Error("a link that never was had a life")
	}
}

// What is taken is a host and a port, and stays so when it is written out.
func FuzzParseTarget(f *testing.F) {
	for _, s := range []string{"10.0.0.1", "[2001:db8::1]:7000", "host:1", "fe80::1%eth0", "[fe80::1%eth0]:1", "a:b:c", "[host]:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		host, port, err := parseTarget(text, 6783)
		if err != nil {
			return
		}
		if host == "" || port == 0 || strings.ContainsAny(host, " \t\r\n/") {
			t.Errorf("%q: got %q and %d", text, host, port)
		}
		again, p, err := parseTarget(net.JoinHostPort(host, strconv.Itoa(int(port))), 1)
		if err != nil || again != host || p != port {
			t.Errorf("%q: got %q and %d, then %q and %d, %v", text, host, port, again, p, err)
		}
	})
}
