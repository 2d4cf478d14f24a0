package router

import (
	"bytes"
	"crypto/sha512"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"meshd/mesh"
)

var t0 = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func pn(i int) mesh.PeerName { return mesh.PeerName{2, 0, 0, 0, byte(i >> 8), byte(i)} }

func newPeer(i int) Peer {
	return Peer{Name: pn(i), Key: [32]byte{8: byte(i >> 8), 9: byte(i), 31: 1}, Run: mesh.RunID(1000 + i), NickName: fmt.Sprint("host", i), Port: 6783, MTU: 1400}
}

// testKeys sign with a hash that everybody could compute, under their own key. The name that follows from a key
// is its first six bytes.
type testKeys [32]byte

func (k testKeys) Sign(msg []byte) [64]byte { return sha512.Sum512(append(k[:], msg...)) }

func (testKeys) Verify(key [32]byte, msg []byte, sig [64]byte) bool {
	return testKeys(key).Sign(msg) == sig
}

func (testKeys) NameOf(key [32]byte) mesh.PeerName { return mesh.PeerName(key[:6]) }

func newTopology(p Peer) *Topology { return NewTopology(p, testKeys(p.Key)) }

func linkTo(i int, rtt time.Duration) PeerLink {
	return PeerLink{To: pn(i), RTT: RoundRTT(rtt), MTU: 1400, Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 6783)}
}

func merge(t testing.TB, to *Topology, deltas ...[]byte) (news []byte) {
	t.Helper()
	for _, d := range deltas {
		n, err := to.Merge(pn(999), d)
		if err != nil {
			t.Fatal(err)
		}
		news = append(news, n...)
	}
	return news
}

func all(t *Topology) []byte {
	var keys []uint64
	for _, it := range t.Items() {
		keys = append(keys, it.Key)
	}
	slices.Sort(keys)
	return bytes.Join(t.Encode(keys, mesh.MaxMessage-1), nil)
}

func items(t *Topology) []mesh.Item {
	out := slices.Clone(t.Items())
	slices.SortFunc(out, func(a, b mesh.Item) int {
		if a.Key < b.Key {
			return -1
		}
		return 1
	})
	return out
}

func TestLinksSpreadOverPages(t *testing.T) {
	a, b := newTopology(newPeer(1)), newTopology(newPeer(2))
	var links []PeerLink
	for i := 2; i < 102; i++ {
		links = append(links, linkTo(i, time.Millisecond))
	}
	deltas := a.SetLinks(links)
	for _, d := range deltas {
		if len(d) > mesh.MaxMessage-1 {
			t.Errorf("delta of %d bytes does not fit a message", len(d))
		}
	}
	merge(t, b, all(a))
	if got := len(b.Peers()[0].Links); got != 100 {
		t.Fatalf("got %d links, want 100", got)
	}
	if a.SetLinks(links) != nil {
		t.Error("setting the same links again is news")
	}
	deltas = a.SetLinks(slices.Delete(slices.Clone(links), 50, 51))
	if len(deltas) != 1 || len(deltas[0]) > linksPerPage*(linkBody4+1)+recordHeader {
		t.Errorf("removing one link touches %d deltas", len(deltas))
	}
	merge(t, b, deltas...)
	if got := len(b.Peers()[0].Links); got != 99 {
		t.Errorf("got %d links after one went, want 99", got)
	}
}

// A member that turned can be as many peers as it makes keys, each with links without end. What is kept of them is bounded, and
// honest peers that come later find room.
func TestRecordsOfLiars(t *testing.T) {
	observer := newTopology(newPeer(1))
	body := appendLink(nil, &PeerLink{To: pn(1), Addr: netip.MustParseAddrPort("192.0.2.1:6783")})
	says := func(peer int, page uint8) []byte {
		p := newPeer(peer)
		r := &record{id: pageID{p.Name, page}, epoch: Epoch{1, 1}, version: 1, body: body}
		if page == 0 {
			r.body = appendPeer(nil, &p)
		}
		r.sig = testKeys(p.Key).Sign(r.signed())
		return appendRecord(nil, r)
	}
	for peer := 2; peer < 300; peer++ {
		for page := range maxPages + 1 {
			_, _ = observer.Merge(pn(2), says(peer, uint8(page)))
		}
	}
	if n := len(observer.Items()); n < maxRecords || n > maxRecords+(1+surePages)*300 {
		t.Errorf("%d records are kept, want little more than %d", n, maxRecords)
	}
	for page := range 1 + surePages {
		if news, err := observer.Merge(pn(400), says(400, uint8(page))); err != nil || news == nil {
			t.Errorf("page %d of an honest peer is not taken: %v", page, err)
		}
	}
}

func TestRestartSupersedes(t *testing.T) {
	old, other := newTopology(newPeer(1)), newTopology(newPeer(2))
	old.SetLinks([]PeerLink{linkTo(2, time.Millisecond), linkTo(3, time.Millisecond)})
	merge(t, other, all(old))

	p := newPeer(1)
	p.Run = 7 // lower than the old one: the order must not depend on it
	restarted := newTopology(p)
	restarted.SetLinks([]PeerLink{linkTo(2, time.Millisecond)})
	news := merge(t, restarted, all(other))
	merge(t, other, news)
	got, _ := other.Peer(pn(1))
	if got.Run != 7 || got.Incarnation != 2 {
		t.Errorf("got run %d incarnation %d, want the new run at 2", got.Run, got.Incarnation)
	}
	if links := other.Peers()[0].Links; len(links) != 1 {
		t.Errorf("links of the old run are left: %v", links)
	}
	if news := merge(t, other, all(old)); news != nil {
		t.Error("the old run's records are news")
	}
	if _, rival := restarted.Rival(); rival {
		t.Error("the remains of an old run count as a rival")
	}
}

// Two live peers with one name outbid each other; the one that came second must find out, and only that.
func TestSecondOfTwoClonesGivesWay(t *testing.T) {
	first, world := newTopology(newPeer(1)), newTopology(newPeer(2))
	merge(t, world, all(first))
	p := newPeer(1)
	p.Run = 5000
	second := newTopology(p)
	nobody := func(mesh.PeerName) bool { return false }
	first.Reach(t0, Patience{0, time.Hour}, nobody)
	first.Reach(t0.Add(time.Minute), Patience{0, time.Hour}, nobody)
	second.Reach(t0.Add(time.Minute), Patience{0, time.Hour}, nobody)
	merge(t, world, all(second))
	for range 10 {
		merge(t, world, merge(t, second, all(world)))
		merge(t, world, merge(t, first, all(world)))
	}
	if _, rival := second.Rival(); !rival {
		t.Error("the second clone has not noticed the first")
	}
	if _, rival := first.Rival(); rival {
		t.Error("the first clone gives way as well")
	}
	if got, _ := world.Peer(pn(1)); got.Run != first.Self().Run {
		t.Errorf("the name belongs to run %d, want the first", got.Run)
	}
}

func TestShortIDCollision(t *testing.T) {
	mk := func(i int) *Topology {
		p := newPeer(i)
		p.Flags, p.ShortID = FlagKernel, 77
		return newTopology(p)
	}
	low, high := mk(1), mk(2)
	a, b := all(low), all(high)
	merge(t, low, b)
	merge(t, high, a)
	if got := low.Self().ShortID; got != 77 {
		t.Errorf("the lower name has %d, want to keep 77", got)
	}
	if got := high.Self().ShortID; got == 77 || got == 0 {
		t.Errorf("the higher name has %d, want another", got)
	}
	again := mk(2)
	merge(t, again, a)
	if again.Self().ShortID != high.Self().ShortID {
		t.Error("drawing again gives another id")
	}
	off := mk(3)
	off.Update(func(p *Peer) { p.Flags = 0 })
	if off.Self().ShortID != 0 {
		t.Error("a peer without the kernel path keeps a short id")
	}
	off.Update(func(p *Peer) { p.Flags = FlagKernel })
	if got := off.Self().ShortID; got != 77 {
		t.Errorf("with the kernel path again it has %d, want the one from before", got)
	}
	// As many peers as there are ids: the last one goes without, and the draw ends.
	full := newTopology(newPeer(1))
	for i := 2; i < 2+int(mesh.MaxShortID); i++ {
		p := newPeer(i)
		p.Flags, p.ShortID = FlagKernel, mesh.ShortID(i-1)
		merge(t, full, all(newTopology(p)))
	}
	full.Update(func(p *Peer) { p.Flags = FlagKernel })
	if got := full.Self().ShortID; got != 0 {
		t.Errorf("got short id %d that another peer has", got)
	}
}

func TestUnreachablePeersAreSuspectedThenForgotten(t *testing.T) {
	a, b := newTopology(newPeer(1)), newTopology(newPeer(2))
	delta := all(b)
	merge(t, a, delta)
	up := true
	reach := func(now time.Time) []StateChange {
		return a.Reach(now, Patience{0, time.Hour}, func(mesh.PeerName) bool { return up })
	}
	check := func(got []StateChange, want ...PeerState) {
		t.Helper()
		var states []PeerState
		for _, c := range got {
			states = append(states, c.State)
		}
		if !slices.Equal(states, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	}
	check(reach(t0), Alive)
	check(reach(t0.Add(time.Minute)))
	up = false
	check(reach(t0.Add(2*time.Minute)), Suspect)
	check(reach(t0.Add(31 * time.Minute)))
	if len(a.Items()) != 2 {
		t.Error("a peer suspected for 29 minutes is not offered")
	}
	check(reach(t0.Add(33 * time.Minute)))
	if len(a.Items()) != 1 {
		t.Error("a peer suspected for 31 minutes is still offered")
	}
	if news := merge(t, a, delta); news != nil {
		t.Error("what is known but not offered is news")
	}
	up = true
	check(reach(t0.Add(40*time.Minute)), Alive)
	up = false
	check(reach(t0.Add(time.Hour)), Suspect)
	check(reach(t0.Add(2*time.Hour+time.Second)), Gone)
	if len(a.Peers()) != 1 {
		t.Error("a peer that is gone is still known")
	}
	merge(t, a, delta)
	up = true
	check(reach(t0.Add(3*time.Hour)), Alive)
}

// records draws a set of records of a few peers, with some that contradict each other.
func drawDelta(t *rapid.T) []byte {
	var out []byte
	for range rapid.IntRange(0, 6).Draw(t, "records") {
		r := &record{
			id:      pageID{pn(rapid.IntRange(2, 4).Draw(t, "peer")), uint8(rapid.IntRange(0, 2).Draw(t, "page"))},
			epoch:   Epoch{uint32(rapid.IntRange(1, 3).Draw(t, "incarnation")), mesh.RunID(rapid.IntRange(1, 2).Draw(t, "run"))},
			version: uint32(rapid.IntRange(1, 3).Draw(t, "version")),
		}
		if r.id.page == 0 {
			p := newPeer(int(r.id.peer[5]))
			p.NickName = rapid.StringMatching(`[ab]{0,2}`).Draw(t, "nick")
			r.body = appendPeer(nil, &p)
		} else {
			for range rapid.IntRange(0, 3).Draw(t, "links") {
				l := linkTo(rapid.IntRange(5, 8).Draw(t, "to"), time.Millisecond)
				r.body = appendLink(r.body, &l)
			}
		}
		r.sig = testKeys(newPeer(int(r.id.peer[5])).Key).Sign(r.signed())
		out = appendRecord(out, r)
	}
	return out
}

func TestMergeIsASemilattice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		deltas := [][]byte{drawDelta(t), drawDelta(t), drawDelta(t)}
		fresh := func() *Topology { // that knows who bears the names, so that pages may come first
			topo := newTopology(newPeer(1))
			for i := 2; i <= 4; i++ {
				topo.Linked(pn(i), newPeer(i).Key, true)
			}
			return topo
		}
		feed := func(order ...[]byte) *Topology {
			topo := fresh()
			for _, d := range order {
				if _, err := topo.Merge(pn(9), d); err != nil {
					t.Fatal(err)
				}
			}
			return topo
		}
		a, b, c := deltas[0], deltas[1], deltas[2]
		want := feed(a, b, c)
		for _, other := range []*Topology{
			feed(c, b, a), feed(b, a, c), feed(a, b, c, b, a),
			feed(a, all(feed(b, c))), feed(all(feed(a, b)), c),
		} {
			if !slices.Equal(items(other), items(want)) {
				t.Fatalf("order of merging matters")
			}
		}
		if news, _ := want.Merge(pn(9), all(want)); news != nil {
			t.Fatalf("feeding the table back is news: %x", news)
		}
		// News is what is needed to bring another table along.
		left, right := fresh(), fresh()
		for _, d := range deltas {
			news, _ := left.Merge(pn(9), d)
			right.Merge(pn(9), news)
		}
		if !slices.Equal(items(left), items(right)) {
			t.Fatalf("news leaves something out")
		}
	})
}

func FuzzTopologyDelta(f *testing.F) {
	a := newTopology(newPeer(1))
	l := linkTo(3, time.Millisecond)
	l.Addr = netip.MustParseAddrPort("[2001:db8::1]:6783")
	a.SetLinks([]PeerLink{linkTo(2, time.Millisecond), l})
	f.Add(all(a))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, in []byte) {
		records, err := parseRecords(in)
		if err != nil {
			return
		}
		var out []byte
		for _, r := range records {
			out = appendRecord(out, r)
			if r.id.page == 0 {
				p, err := parsePeer(appendPeer(nil, &r.peer))
				p.Name, p.Run, p.Incarnation = r.peer.Name, r.peer.Run, r.peer.Incarnation
				if err != nil || p != r.peer {
					t.Errorf("peer: got %+v, %v, want %+v", p, err, r.peer)
				}
				continue
			}
			var b []byte
			var links []PeerLink
			for l, rest := cutLink(r.body); l != nil; l, rest = cutLink(rest) {
				links = append(links, l.parse())
				b = appendLink(b, &links[len(links)-1])
			}
			if err := checkLinks(b, r.id.peer); err != nil {
				t.Error(err)
			}
			for _, want := range links {
				var l wireLink
				if l, b = cutLink(b); l == nil || l.parse() != want {
					t.Errorf("links: got %x, want %+v", l, want)
				}
			}
		}
		if !bytes.Equal(out, in) {
			t.Errorf("got %x, want %x", out, in)
		}
		for _, r := range records { // as the fuzzer will not find signatures
			if r.id.page == 0 {
				r.sig = testKeys(r.peer.Key).Sign(r.signed())
			} else {
				r.sig = testKeys(newPeer(3).Key).Sign(r.signed())
			}
			in = appendRecord(in, r)
		}
		topo := newTopology(newPeer(1))
		topo.Linked(pn(3), newPeer(3).Key, true)
		topo.Merge(pn(2), in)
		topo.Routes()
	})
}

// cluster builds tables of n peers that all know the given undirected links.
func cluster(t testing.TB, n int, links map[[2]int]PeerLink) []*Topology {
	topos := make([]*Topology, n)
	var everything []byte
	for i := range topos {
		topos[i] = newTopology(newPeer(i))
		var own []PeerLink
		for ends, l := range links {
			for k, from := range ends {
				if from == i {
					l.To = pn(ends[1-k])
					own = append(own, l)
				}
			}
		}
		topos[i].SetLinks(own)
		everything = append(everything, all(topos[i])...)
	}
	for _, topo := range topos {
		merge(t, topo, everything)
	}
	return topos
}

func TestRoutes(t *testing.T) {
	ms := time.Millisecond
	topos := cluster(t, 5, map[[2]int]PeerLink{
		{0, 1}: linkTo(0, ms), {1, 2}: linkTo(0, ms), {0, 2}: linkTo(0, 100*ms), {2, 3}: linkTo(0, ms),
	})
	r := topos[0].Routes()
	for dst, want := range map[int]string{
		1: "1 1 ", 2: "1 2 relay takes 2ms, direct link 97ms", 3: "1 3 no direct link",
	} {
		got, ok := r.Route(pn(dst))
		if s := fmt.Sprintf("%d %d %s", got.Via[5], got.Hops, got.Why); !ok || s != want {
			t.Errorf("to %d: got %q, want %q", dst, s, want)
		}
	}
	if via, ok := r.NextHop(pn(4)); ok {
		t.Errorf("a peer without links is reached by %v", via)
	}
	if len(r.All()) != 3 || len(r.Reachable()) != 3 {
		t.Errorf("got routes %v", r.All())
	}
	var none *Routes
	if _, ok := none.NextHop(pn(1)); ok || none.All() != nil {
		t.Error("no routes lead somewhere")
	}
	var live LiveRoutes
	live.Store(r)
	if n := testing.AllocsPerRun(100, func() { live.NextHop(pn(3)) }); n != 0 {
		t.Errorf("NextHop allocates %v times", n)
	}
}

// Relays whose views differ in any way, as in a mesh that is falling apart: a datagram may come to one of them again,
// where it is dropped, and takes no more links than its sender counts and one. Relays whose routes change on its way
// pass it on again only by a shorter one, so that this is the limit as well.
func TestOnward(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 3))
	returned, again := 0, 0
	for range 100_000 {
		n := 3 + rng.IntN(8)
		via, links := make([]int, n), make([]int, n)
		draw := func(i int) { via[i], links[i] = (i+1+rng.IntN(n-1))%n, 1+rng.IntN(n) }
		for i := range n {
			draw(i)
		}
		moving := rng.IntN(2) == 0
		sent := links[0]
		at, left, taken := via[0], sent, 1 // from peer 0, for somebody whom nobody reaches
		passed := map[int]int{}            // by how many links a relay counted when it passed it on
		for {
			before, been := passed[at]
			next, ok := Onward(left, links[at])
			if been && !ok {
				returned++
			}
			if !ok {
				break
			}
			if been {
				again++
				if !moving || links[at] >= before {
					t.Fatalf("relay %d of %v passes on again what it has had, first by %d links, now by %d", at, via, before, links[at])
				}
			}
			passed[at] = links[at]
			at, left, taken = via[at], next, taken+1
			if taken > sent+1 {
				t.Fatalf("%d links taken, the sender counted %d", taken, sent)
			}
			if moving {
				draw(rng.IntN(n))
			}
		}
	}
	if returned == 0 || again == 0 {
		t.Errorf("%d came back and were dropped, %d were passed on again: nothing is shown", returned, again)
	}
}

func TestOneSidedLinksDoNotCount(t *testing.T) {
	a, b, c := newTopology(newPeer(1)), newTopology(newPeer(2)), newTopology(newPeer(3))
	a.SetLinks([]PeerLink{linkTo(2, time.Millisecond)})
	b.SetLinks([]PeerLink{linkTo(3, time.Millisecond)}) // 3 does not say so, nor does 2 of 1
	merge(t, a, all(b), all(c))
	merge(t, c, all(a), all(b))
	r := a.Routes()
	if via, ok := r.NextHop(pn(2)); !ok || via != pn(2) {
		t.Error("our own link does not count before the far end confirms it")
	}
	if _, ok := r.NextHop(pn(3)); ok {
		t.Error("a link counts that only one end reports")
	}
	fresh := newTopology(newPeer(4))
	fresh.SetLinks([]PeerLink{linkTo(1, time.Millisecond)})
	if via, ok := fresh.Routes().NextHop(pn(1)); !ok || via != pn(1) {
		t.Error("a neighbour that has not said anything yet is not reached")
	}
	if len(c.Routes().All()) != 0 {
		t.Error("a link counts that we do not have ourselves")
	}
}

func TestDampedLinkIsTheLastChoice(t *testing.T) {
	ms := time.Millisecond
	damped := linkTo(0, ms)
	damped.Damped = true
	topos := cluster(t, 3, map[[2]int]PeerLink{{0, 1}: linkTo(0, ms), {1, 2}: linkTo(0, ms), {0, 2}: damped})
	if got, _ := topos[0].Routes().Route(pn(2)); got.Via != pn(1) || got.Why != "direct link is unsteady" {
		t.Errorf("got %+v, want the relay", got)
	}
	topos = cluster(t, 3, map[[2]int]PeerLink{{0, 1}: linkTo(0, ms), {0, 2}: damped})
	if got, _ := topos[0].Routes().Route(pn(2)); got.Via != pn(2) {
		t.Errorf("got %+v, want the only link there is", got)
	}
}

// Each peer decides for itself; following their decisions must arrive, in as many hops as the first peer
// said, on any graph.
func TestRoutesAreLoopFree(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(2, 14).Draw(rt, "peers")
		links := map[[2]int]PeerLink{}
		for a := range n {
			for b := range a {
				if rapid.IntRange(0, 3).Draw(rt, "linked") == 0 {
					l := linkTo(0, time.Duration(rapid.IntRange(0, 300).Draw(rt, "rtt"))*time.Millisecond)
					l.Damped = rapid.IntRange(0, 9).Draw(rt, "damped") == 0
					links[[2]int{a, b}] = l
				}
			}
		}
		topos := cluster(t, n, links)
		routes := make([]*Routes, n)
		for i := range routes {
			routes[i] = topos[i].Routes()
		}
		for from := range n {
			for _, route := range routes[from].All() {
				at, hops := from, 0
				for pn(at) != route.Dst {
					via, ok := routes[at].NextHop(route.Dst)
					if !ok || hops == n {
						rt.Fatalf("from %d to %v: lost at %d after %d hops", from, route.Dst, at, hops)
					}
					at = int(via[4])<<8 | int(via[5])
					hops++
				}
				if hops != route.Hops {
					rt.Fatalf("from %d to %v: %d hops, said %d", from, route.Dst, hops, route.Hops)
				}
			}
		}
	})
}

// Most records come several times: those that are known cost next to nothing.
func TestKnownRecordsAreNotReadAgain(t *testing.T) {
	from, to := newTopology(newPeer(1)), newTopology(newPeer(2))
	var links []PeerLink
	for i := range 100 {
		links = append(links, linkTo(10+i, time.Millisecond))
	}
	from.SetLinks(links)
	delta := all(from)
	merge(t, to, delta)
	if got := testing.AllocsPerRun(20, func() { merge(t, to, delta) }); got > 8 {
		t.Errorf("%v allocations for a delta of %d bytes that is known", got, len(delta))
	}
}

func BenchmarkRoutes(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 2))
	links := map[[2]int]PeerLink{}
	for a := range 1000 {
		for range 50 {
			c := rng.IntN(1000)
			if a != c {
				links[[2]int{min(a, c), max(a, c)}] = linkTo(0, time.Duration(1+rng.IntN(50))*time.Millisecond)
			}
		}
	}
	own := make([][]PeerLink, 1000)
	for ends, l := range links {
		for k, from := range ends {
			l.To = pn(ends[1-k])
			own[from] = append(own[from], l)
		}
	}
	topo := newTopology(newPeer(0))
	for i := range own {
		p := newTopology(newPeer(i))
		p.SetLinks(own[i])
		if i == 0 {
			topo.SetLinks(own[0])
			continue
		}
		merge(b, topo, all(p))
	}
	for b.Loop() {
		topo.Routes()
	}
}

// A host sleeps for eight hours, in which its clock stands still, while the others forget it and one that died
// meanwhile. When it wakes it holds nobody for dead who lives, is known again at once, and what it still tells of
// the dead one is forgotten for good within an hour by the clocks of all.
func TestSuspend(t *testing.T) {
	const sleeper, dead = 0, 3
	links := map[[2]int]PeerLink{}
	for i := range 4 {
		for j := range i {
			links[[2]int{i, j}] = linkTo(j, time.Millisecond)
		}
	}
	ts := cluster(t, 4, links)
	awake := []int{1, 2}
	clock := [4]time.Time{t0, t0, t0, t0}
	events := map[int][]StateChange{}
	look := func(up ...int) {
		for _, i := range up {
			events[i] = append(events[i], ts[i].Reach(clock[i], Patience{2 * time.Second, time.Hour}, func(p mesh.PeerName) bool {
				return slices.ContainsFunc(up, func(j int) bool { return pn(j) == p })
			})...)
		}
	}
	pass := func(d time.Duration, who ...int) {
		for end := clock[who[0]].Add(d); clock[who[0]].Before(end); look(who...) {
			for _, i := range who {
				clock[i] = clock[i].Add(time.Minute)
			}
			for _, i := range who { // compare tables
				for _, j := range who {
					if i != j {
						merge(t, ts[i], all(ts[j]))
					}
				}
			}
		}
	}
	look(0, 1, 2, 3)
	pass(8*time.Hour, awake...)
	for _, i := range awake {
		if got := len(ts[i].Peers()); got != 2 {
			t.Fatalf("peer %d knows %d peers after eight hours, want 2", i, got)
		}
	}
	clear(events)
	pass(time.Minute, sleeper, 1, 2)
	for _, i := range awake {
		if !slices.Contains(events[i], StateChange{pn(sleeper), Alive}) {
			t.Errorf("peer %d says %v of who is back", i, events[i])
		}
	}
	for _, ev := range events[sleeper] {
		if ev.Peer != pn(dead) {
			t.Errorf("who was asleep says that %v is %v", ev.Peer, ev.State)
		}
	}
	pass(2*time.Hour, sleeper, 1, 2)
	for i := range 3 {
		if got := len(ts[i].Peers()); got != 3 {
			t.Errorf("peer %d knows %d peers, want 3: the dead one is back", i, got)
		}
		if !slices.Equal(items(ts[i]), items(ts[0])) {
			t.Errorf("the tables of %d and 0 differ", i)
		}
	}
}

// The list of records that is kept up with every change is the one that a look at all records gives.
func TestItemsKeepUp(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	const n = 60
	us := newTopology(newPeer(0))
	others := make([]*Topology, n)
	now, gone := t0, Patience{Suspect: time.Second, Gone: time.Minute}
	away := map[mesh.PeerName]bool{}
	worked := 0 // how often the last list was carried on
	for step := range 5000 {
		switch i := 1 + rng.IntN(n-1); rng.IntN(10) {
		case 0: // another run
			p := newPeer(i)
			p.Run = mesh.RunID(10_000 + step)
			others[i] = newTopology(p)
			merge(t, us, all(others[i]))
		case 1:
			away[pn(i)] = !away[pn(i)]
		case 2:
			now = now.Add(time.Duration(rng.IntN(20)) * time.Second)
			us.Reach(now, gone, func(p mesh.PeerName) bool { return !away[p] })
		case 3:
			us.SetLinks([]PeerLink{linkTo(i, time.Millisecond)})
		default:
			if others[i] == nil {
				others[i] = newTopology(newPeer(i))
			}
			var links []PeerLink
			for range rng.IntN(50) {
				if to := rng.IntN(n); to != i {
					links = append(links, linkTo(to, time.Millisecond))
				}
			}
			others[i].SetLinks(links)
			merge(t, us, all(others[i]))
		}
		if rng.IntN(3) == 0 {
			continue // several changes at once
		}
		if us.digests != nil && len(us.dirty) > 0 && len(us.dirty) <= len(us.digests)/8 {
			worked++
		}
		got := us.Items()
		us.digests = nil
		if want := us.Items(); !slices.Equal(got, want) {
			t.Fatalf("step %d: %d items, want %d", step, len(got), len(want))
		}
	}
	t.Logf("%d of the lists were carried on", worked)
	if worked < 1000 {
		t.Errorf("only %d lists were carried on", worked)
	}
}
