package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"meshd/ipam/ring"
	"meshd/mesh"
)

// cluster is a world without faults, with n nodes that found their ring by consensus.
func cluster(t *testing.T, seed int64, n int, rng string) *world {
	t.Helper()
	w := newWorld(seed, t.Logf)
	w.rangep = netip.MustParsePrefix(rng)
	w.subnets = []netip.Prefix{w.rangep}
	for range n {
		w.addNode(Init{Mode: Consensus, N: n})
	}
	w.run(2 * time.Second)
	return w
}

// get allocates and waits; the zero prefix and an error if it failed.
func (w *world) get(n *node, id string, subnet netip.Prefix, patience time.Duration) (netip.Prefix, error) {
	var got *result
	n.launch(&call{op: opAllocate, owner: id, addr: subnet, answer: func(r result) { got = &r }}, patience)
	for got == nil && w.err == nil && n.up {
		w.run(simTick)
	}
	if got == nil {
		return netip.Prefix{}, fmt.Errorf("not answered: %v", w.err)
	}
	if got.err == nil {
		w.acknowledged(n, id, got.prefix, subnet)
	}
	return got.prefix, got.err
}

func (w *world) take(n *node, id string, addr netip.Prefix, patience time.Duration) error {
	var got *result
	n.launch(&call{op: opClaim, owner: id, addr: addr, answer: func(r result) { got = &r }}, patience)
	for got == nil && w.err == nil && n.up {
		w.run(simTick)
	}
	if got.err == nil {
		w.acknowledged(n, id, got.prefix, addr.Masked())
	}
	return got.err
}

func (w *world) removePeer(at, n *node, patience time.Duration) (int, error) {
	w.voidHost(n, at)
	var got *result
	at.launch(&call{op: opRemove, peer: n.name, answer: func(r result) { got = &r }}, patience)
	for got == nil && w.err == nil {
		w.run(simTick)
	}
	return got.n, got.err
}

func (w *world) must(t *testing.T) {
	t.Helper()
	w.review()
	if w.err != nil {
		t.Fatal(w.err)
	}
}

func TestLowestFirstAndSameAgain(t *testing.T) {
	w := cluster(t, 1, 1, "10.32.0.0/24")
	n := w.nodes[0]
	for i, want := range []string{"10.32.0.1/24", "10.32.0.2/24", "10.32.0.3/24"} {
		if p, err := w.get(n, fmt.Sprint("c", i), w.rangep, time.Minute); err != nil || p.String() != want {
			t.Fatalf("got %v, %v, want %s", p, err, want)
		}
	}
	if p, _ := w.get(n, "c1", w.rangep, time.Minute); p.String() != "10.32.0.2/24" {
		t.Errorf("the same owner got %s, want 10.32.0.2", p)
	}
	half := netip.MustParsePrefix("10.32.0.128/25")
	var second *result
	n.launch(&call{op: opAllocate, owner: "c1", addr: half, answer: func(r result) { second = &r }}, time.Second)
	if second == nil || second.prefix.String() != "10.32.0.129/25" {
		t.Errorf("another subnet gave %+v, want 10.32.0.129/25", second)
	}
	w.free(n, n.conts["c0"])
	if p, _ := w.get(n, "c9", w.rangep, time.Minute); p.String() != "10.32.0.1/24" {
		t.Errorf("after a release: got %s, want 10.32.0.1", p)
	}
	tiny := netip.MustParsePrefix("10.32.0.64/30")
	for i, want := range []string{"10.32.0.65/30", "10.32.0.66/30", ""} {
		if p, err := w.get(n, fmt.Sprint("t", i), tiny, time.Minute); want == "" && !errors.Is(err, ErrFull) || want != "" && p.String() != want {
			t.Errorf("got %v, %v, want %q", p, err, want)
		}
	}
	w.must(t)
}

func TestBadInput(t *testing.T) {
	w := cluster(t, 1, 1, "10.32.0.0/24")
	n := w.nodes[0]
	for _, s := range []string{"10.32.0.0/31", "10.32.0.0/32", "10.32.0.5/30", "10.33.0.0/24", "10.0.0.0/8", "fd00::/64"} {
		if p, err := w.get(n, "c", netip.MustParsePrefix(s), time.Second); !errors.Is(err, ErrInvalid) {
			t.Errorf("allocate in %s: got %v, %v, want ErrInvalid", s, p, err)
		}
	}
	if _, err := w.get(n, "", w.rangep, time.Second); !errors.Is(err, ErrInvalid) {
		t.Errorf("no owner: got %v, want ErrInvalid", err)
	}
	for _, s := range []string{"10.32.0.0/24", "10.32.0.255/24", "10.32.0.4/31", "10.32.0.4/32", "1.2.3.0/24", "1.2.3.255/24", "0.0.0.0/0"} {
		if err := w.take(n, "c", netip.MustParsePrefix(s), time.Second); !errors.Is(err, ErrInvalid) {
			t.Errorf("claim %s: got %v, want ErrInvalid", s, err)
		}
	}
	var got *result
	n.launch(&call{op: opClaim, owner: "c", addr: netip.MustParsePrefix("1.2.3.4/32"), answer: func(r result) { got = &r }}, time.Second)
	if got == nil || got.err != nil {
		t.Errorf("an address outside the range: got %+v, want it at once", got)
	}
}

func TestClaims(t *testing.T) {
	w := cluster(t, 3, 3, "10.32.0.0/24")
	a, b := w.nodes[0], w.nodes[2]
	addr := netip.MustParsePrefix("10.32.0.200/24")
	if err := w.take(a, "one", addr, time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := w.take(a, "one", addr, time.Minute); err != nil {
		t.Errorf("claimed again by its owner: %v", err)
	}
	for _, n := range []*node{a, b} {
		if err := w.take(n, "two", addr, time.Minute); !errors.Is(err, ErrTaken) || !strings.Contains(err.Error(), "one") {
			t.Errorf("claimed by another on %s: got %v, want ErrTaken naming the holder", n, err)
		}
	}
	a.group, b.group = 1, 2 // the owner of the low half is cut off
	w.run(30 * time.Second)
	err := w.take(b, "three", netip.MustParsePrefix("10.32.0.7/24"), 5*time.Second)
	if err == nil || !strings.Contains(err.Error(), a.name.String()) {
		t.Errorf("the owner is away: got %v, want an error that names %s", err, a.name)
	}
	w.must(t)
}

// TestWaitsNameTheCulprit exhausts what is reachable.
func TestWaitsNameTheCulprit(t *testing.T) {
	w := cluster(t, 4, 2, "10.32.0.0/28")
	a, b := w.nodes[0], w.nodes[1]
	for i := 0; ; i++ {
		if _, err := w.get(a, fmt.Sprint("a", i), w.rangep, 30*time.Second); err != nil {
			if i != 14 || !errors.Is(err, ErrFull) {
				t.Fatalf("after %d of 14: %v, want ErrFull", i, err)
			}
			break
		}
	}
	for id, ct := range a.conts {
		if ct.addr.Addr().As4()[3] > 4 {
			w.free(a, a.conts[id])
		}
	}
	b.kill()
	w.run(30 * time.Second)
	for i := 0; i < 20; i++ {
		if _, err := w.get(a, fmt.Sprint("x", i), w.rangep, 3*time.Second); err != nil {
			if !strings.Contains(err.Error(), b.name.String()+" (unreachable") && !errors.Is(err, ErrFull) {
				t.Errorf("got %v, want the unreachable peer's name", err)
			}
			break
		}
	}
	w.must(t)
}

func TestRemovePeer(t *testing.T) {
	w := cluster(t, 5, 4, "10.32.0.0/24")
	a, b, c, d := w.nodes[0], w.nodes[1], w.nodes[2], w.nodes[3]
	for i, n := range w.nodes {
		for j := range 3 {
			if _, err := w.get(n, fmt.Sprintf("c%d.%d", i, j), w.rangep, time.Minute); err != nil {
				t.Fatal(err)
			}
		}
	}
	var res *result
	a.launch(&call{op: opRemove, peer: b.name, answer: func(r result) { res = &r }}, time.Second)
	if res == nil || !errors.Is(res.err, ErrAlive) {
		t.Errorf("removing a live peer: got %+v, want ErrAlive", res)
	}
	for _, name := range []mesh.PeerName{a.name, {9, 9}} {
		a.launch(&call{op: opRemove, peer: name, answer: func(r result) { res = &r }}, time.Second)
		if res.err != nil || res.n != 0 {
			t.Errorf("removing itself or a stranger: got %+v, want 0", res)
		}
	}
	c.kill()
	d.kill()
	w.run(30 * time.Second)
	owned := func(n *node) int {
		total := 0
		for id, count := range a.core.ring.Owners(0, 256) {
			if id.Peer == n.name {
				total += int(count)
			}
		}
		return total
	}
	ofC, all := owned(c), owned(a)+owned(c)+owned(d)
	if n, err := w.removePeer(a, d, time.Minute); !errors.Is(err, ErrPending) || !strings.Contains(err.Error(), c.name.String()) {
		t.Errorf("while another is away: got %d, %v, want ErrPending naming %s", n, err, c.name)
	}
	if n, err := w.removePeer(a, c, time.Minute); err != nil || n != ofC {
		t.Errorf("got %d, %v, want %d addresses", n, err, ofC)
	}
	w.run(2 * time.Second)
	if got := owned(a); got != all {
		t.Errorf("%s owns %d, want %d, with those of both removed", a, got, all)
	}
	// The ghost comes back, with three live containers.
	d.start()
	w.run(20 * time.Second)
	for id, ct := range d.conts {
		if h := d.core.holds.find(id, ct.addr.Addr()); h.state != held {
			t.Errorf("the ghost's %s of %s: state %v, want it back", ct.addr, id, h.state)
		}
	}
	w.must(t)
}

// TestRemoveOnTwoAtOnce removes a peer on both halves of a cut, and heals.
func TestRemoveOnTwoAtOnce(t *testing.T) {
	for seed := range int64(20) {
		w := cluster(t, seed, 5, "10.32.0.0/24")
		w.trace = func(string, ...any) {}
		dead := w.nodes[4]
		for i := range 4 {
			w.get(dead, fmt.Sprint("d", i), w.rangep, time.Minute)
		}
		dead.kill()
		for i, n := range w.nodes {
			n.group = i % 2
		}
		w.run(30 * time.Second)
		w.declareLost(w.nodes[0], dead)
		w.declareLost(w.nodes[1], dead)
		w.run(time.Duration(w.rng.IntN(5000)) * time.Millisecond)
		for i := range 40 { // both halves go on
			w.allocate(w.nodes[i%4], fmt.Sprint("x", i), w.rangep)
		}
		w.run(10 * time.Second)
		w.heal()
		dead.start()
		w.run(40 * time.Second)
		w.finish()
		if w.err != nil {
			t.Fatalf("seed %d: %v", seed, w.err)
		}
	}
}

// TestLostIsTold: who removes a peer is told at once that it is lost, the others soon after; nobody is told while it is
// there, or when it goes once more.
func TestLostIsTold(t *testing.T) {
	w := cluster(t, 7, 3, "10.32.0.0/24")
	a, b, dead := w.nodes[0], w.nodes[1], w.nodes[2]
	for _, n := range w.nodes {
		w.get(n, "c-"+n.String(), w.rangep, time.Minute)
	}
	want := func(when string, n *node, times int) {
		t.Helper()
		if len(n.lost) != times || times > 0 && n.lost[0] != dead.name {
			t.Errorf("%s, %s was told of %v, want it %d times", when, n, n.lost, times)
		}
		n.lost = nil
	}
	dead.kill()
	w.run(5 * time.Second)
	w.declareLost(a, dead)
	w.run(3 * time.Second)
	want("removed by it", a, 2) // by the call, and by the ring
	want("removed by another", b, 1)
	dead.start()
	w.run(30 * time.Second)
	a.kill()
	w.run(time.Second)
	a.start()
	w.run(30 * time.Second)
	dead.kill()
	w.run(5 * time.Second)
	want("restarted, and the other has gone again", a, 0)
	want("the other has gone again", b, 0)
	w.declareLost(b, dead)
	w.run(5 * time.Second)
	want("removed again by it", b, 2)
	want("removed again by another", a, 1)
	w.must(t)
}

// TestLostWithoutRing: one that has no part in the ring may have had addresses outside the range.
func TestLostWithoutRing(t *testing.T) {
	w := cluster(t, 8, 2, "10.32.0.0/24")
	w.run(5 * time.Second)
	w.nodes[1].kill()
	w.run(5 * time.Second)
	w.declareLost(w.nodes[0], w.nodes[1])
	w.run(time.Second)
	if got, want := w.nodes[0].lost, []mesh.PeerName{w.nodes[1].name}; !slices.Equal(got, want) {
		t.Errorf("told of %v, want %v", got, want)
	}
}

func TestReset(t *testing.T) {
	w := cluster(t, 6, 3, "10.32.0.0/24")
	a, b := w.nodes[0], w.nodes[1]
	for _, n := range w.nodes {
		w.get(n, "c-"+n.String(), w.rangep, time.Minute)
	}
	before := a.core.ring.Owners(0, 256)[a.core.me]
	var got *result
	a.launch(&call{op: opLeave, answer: func(r result) { got = &r }}, time.Minute)
	w.run(3 * time.Second)
	if got == nil || got.err != nil || got.n != int(before) {
		t.Fatalf("got %+v, want %d addresses given away", got, before)
	}
	clear(a.conts)
	if n := b.core.ring.Owners(0, 256)[ring.ID{Peer: a.name, Life: a.core.me.Life}]; n != 0 {
		t.Errorf("%d addresses still belong to who left", n)
	}
	if _, err := w.get(a, "late", w.rangep, time.Second); !errors.Is(err, ErrLeft) {
		t.Errorf("allocated after reset: %v, want ErrLeft", err)
	}
	a.kill()
	a.disk, a.known = make(map[string]map[string][]byte), nil
	a.start()
	w.run(3 * time.Second)
	if _, err := w.get(a, "new", w.rangep, time.Minute); err != nil {
		t.Errorf("after reset and launch: %v", err)
	}
	w.must(t)
}

// TestStateLost is I4: the state file is lost on one peer, on each in turn, on all at once.
func TestStateLost(t *testing.T) {
	w := cluster(t, 7, 5, "10.32.0.0/24")
	for i := range 25 {
		if _, err := w.get(w.nodes[i%5], fmt.Sprint("c", i), w.rangep, time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	lose := func(n *node) {
		n.kill()
		w.forgot++
		n.disk, n.known = make(map[string]map[string][]byte), nil
	}
	for _, n := range w.nodes {
		lose(n)
		n.start()
		w.run(15 * time.Second)
		w.must(t)
		for id, ct := range n.conts {
			if h := n.core.holds.find(id, ct.addr.Addr()); h == nil || h.state != held {
				t.Fatalf("%s did not get %s of %s back: %+v", n, ct.addr, id, h)
			}
		}
		if _, err := w.get(n, "after-"+n.String(), w.rangep, time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range w.nodes {
		lose(n)
	}
	for _, n := range w.nodes {
		n.start()
	}
	for i := range 25 {
		w.allocate(w.nodes[i%5], fmt.Sprint("x", i), w.rangep)
	}
	w.run(40 * time.Second)
	w.must(t)
	for _, n := range w.nodes {
		if bad := n.core.collisions(); len(bad) > 0 {
			t.Errorf("%s has to renumber %v", n, bad)
		}
		for id, ct := range n.conts {
			if h := n.core.holds.find(id, ct.addr.Addr()); h == nil || h.state != held {
				t.Errorf("%s did not get %s of %s back", n, ct.addr, id)
			}
		}
	}
}

// TestStateLostTwice: a host loses its state again before its second life has taken the first one's addresses
// over. The others carry that on, but what runs on the host has its addresses.
func TestStateLostTwice(t *testing.T) {
	for seed := range int64(10) {
		w := cluster(t, seed, 5, "10.32.0.0/24")
		for i := range 25 {
			if _, err := w.get(w.nodes[i%5], fmt.Sprint("c", i), w.rangep, time.Minute); err != nil {
				t.Fatal(err)
			}
		}
		n, away := w.nodes[2], w.nodes[4]
		away.group = 1 // so that no removal ends
		for range 2 {
			n.kill()
			w.forgot++
			n.disk, n.known = make(map[string]map[string][]byte), nil
			n.start()
			w.run(15 * time.Second)
			w.must(t)
		}
		w.heal()
		for i := range 30 {
			w.allocate(w.nodes[i%2], fmt.Sprint("x", i), w.rangep)
		}
		w.run(15 * time.Second)
		w.must(t)
		for id, ct := range n.conts {
			if h := n.core.holds.find(id, ct.addr.Addr()); h == nil || h.state != held {
				t.Fatalf("seed %d: %s did not get %s of %s back: %+v", seed, n, ct.addr, id, h)
			}
		}
	}
}

// TestGaps: a peer that knows a part of the ring only hands out nothing, says so, and a repair fills the gaps.
func TestGaps(t *testing.T) {
	w := newWorld(1, t.Logf)
	w.rangep = netip.MustParsePrefix("10.32.0.0/26")
	n := w.addNode(Init{Mode: Consensus, N: 3})
	gone := ring.ID{Peer: mesh.PeerName{9}, Life: 9}
	part := ring.Delta{Cluster: 5, Range: w.rangep, Members: []ring.Member{{ID: gone, Flags: ring.Joined | ring.Left}},
		Segments: []ring.Segment{{Start: 8, End: 16, Owner: n.core.me, Epoch: 1, Count: 2, By: gone}}}
	if _, err := n.table.Merge(gone.Peer, part.Append(nil)); err != nil {
		t.Fatal(err)
	}
	_, err := w.get(n, "c", w.rangep, 20*time.Second)
	if err == nil || !strings.Contains(err.Error(), "nobody in reach knows who owns 56 addresses") {
		t.Fatalf("with gaps: %v", err)
	}
	var got *result
	n.launch(&call{op: opRepair, answer: func(r result) { got = &r }}, 20*time.Second)
	w.run(20 * time.Second)
	if got == nil || got.err != nil || n.core.ring.Unowned() > 0 {
		t.Fatalf("repair: %+v, %d of nobody", got, n.core.ring.Unowned())
	}
	if want := (Repaired{Filled: true, Taken: 56}); !reflect.DeepEqual(got.repaired, want) {
		t.Errorf("repair: got %+v, want %+v", got.repaired, want)
	}
	n.launch(&call{op: opRepair, answer: func(r result) { got = &r }}, 20*time.Second)
	w.run(time.Second)
	if got.err != nil || !reflect.DeepEqual(got.repaired, Repaired{}) {
		t.Errorf("with nothing left to repair: %+v", got)
	}
	if p, err := w.get(n, "c", w.rangep, 20*time.Second); err != nil || p.Addr() != netip.MustParseAddr("10.32.0.1") {
		t.Errorf("repaired: %v, %v", p, err)
	}
	w.must(t)
}

// gaps is a world of n nodes that know a part of the ring only: each what it owns itself, eight addresses of 64.
func gaps(t *testing.T, seed int64, n int) *world {
	w := newWorld(seed, func(string, ...any) {})
	w.rangep = netip.MustParsePrefix("10.32.0.0/26")
	gone := ring.ID{Peer: mesh.PeerName{9}, Life: 9}
	part := ring.Delta{Cluster: 5, Range: w.rangep, Members: []ring.Member{{ID: gone, Flags: ring.Joined | ring.Left}}}
	for i := range n {
		n := w.addNode(Init{Mode: Observer})
		part.Segments = []ring.Segment{{Start: uint64(8 + 8*i), End: uint64(16 + 8*i), Owner: n.core.me, Epoch: 1, Count: 2, By: gone}}
		if _, err := n.table.Merge(gone.Peer, part.Append(nil)); err != nil {
			t.Fatal(err)
		}
	}
	w.clusters[5] = true
	return w
}

// TestRepairOnTwoAtOnce: two peers that are told to fill the same gaps at about the same time do not both take
// them, and each gets addresses.
func TestRepairOnTwoAtOnce(t *testing.T) {
	for seed := range int64(200) {
		w := gaps(t, seed, 3) // the third one only looks on
		w.loss = float64(seed%5) * 0.12
		var done []result
		for i, n := range w.nodes[:2] {
			n.launch(&call{op: opRepair, answer: func(r result) { done = append(done, r) }}, time.Minute)
			for j := range 5 {
				w.allocate(n, fmt.Sprintf("c%d.%d", i, j), w.rangep)
			}
			w.run(time.Duration(w.rng.IntN(8000)) * time.Millisecond * time.Duration(w.rng.IntN(2)))
		}
		w.run(30 * time.Second)
		// The second one may come when nothing is left to do.
		if w.err == nil && (len(done) != 2 || done[0].err != nil || done[1].err != nil || done[0].repaired.Taken+done[1].repaired.Taken != 40) {
			t.Errorf("seed %d: repairs: %+v", seed, done)
		}
		for _, n := range w.nodes {
			if got := n.core.ring.Conflicts(); len(got) > 0 || len(n.core.collisions()) > 0 {
				t.Errorf("seed %d: %s has conflicts %v, collisions %v", seed, n, got, n.core.collisions())
			}
		}
		w.finish()
		if w.err != nil {
			t.Fatalf("seed %d: %v", seed, w.err)
		}
	}
}

// TestRepairUnheard: a peer that is told to fill gaps which another one has filled, without having heard of it, finds
// that out by asking.
func TestRepairUnheard(t *testing.T) {
	w := gaps(t, 1, 2)
	w.muted = func(_, _ *node, table bool) bool { return table }
	for i, n := range w.nodes {
		var got *result
		n.launch(&call{op: opRepair, answer: func(r result) { got = &r }}, 10*time.Second)
		w.run(15 * time.Second)
		if got == nil || (got.err == nil) != (i == 0) {
			t.Errorf("repair on %s: %+v", n, got)
		}
	}
	w.muted = nil
	w.run(10 * time.Second)
	for _, n := range w.nodes {
		if _, err := w.get(n, "c-"+n.String(), w.rangep, 20*time.Second); err != nil {
			t.Errorf("%s: %v", n, err)
		}
		if got := n.core.ring.Conflicts(); len(got) > 0 {
			t.Errorf("%s: both have filled the gaps: %v", n, got)
		}
	}
	w.must(t)
}

// TestCrowd: many who join at once could agree among themselves before any of the few who have the ring was heard.
func TestCrowd(t *testing.T) {
	w := cluster(t, 1, 2, "10.32.0.0/24")
	if _, err := w.get(w.nodes[0], "first", w.rangep, time.Minute); err != nil {
		t.Fatal(err)
	}
	var crowd []*node
	for range 6 {
		n := w.addNode(Init{Mode: Consensus, N: 3})
		w.allocate(n, "c-"+n.String(), w.rangep)
		crowd = append(crowd, n)
	}
	w.muted = func(from, to *node, _ bool) bool { return slices.Contains(crowd, to) != slices.Contains(crowd, from) }
	w.run(3 * time.Second)
	w.muted = nil
	w.run(10 * time.Second)
	for _, n := range crowd {
		if n.cluster() != w.nodes[0].cluster() {
			t.Errorf("%s: cluster %x, want %x", n, n.cluster(), w.nodes[0].cluster())
		}
	}
	w.must(t)
}

// TestServesWhenRecorded: a new peer gets no space before all members in reach have recorded that it exists. Else
// those of them who remain could take over what it was given, never having heard of it.
func TestServesWhenRecorded(t *testing.T) {
	w := cluster(t, 1, 2, "10.32.0.0/24")
	w.trace = func(string, ...any) {}
	a, b := w.nodes[0], w.nodes[1]
	for i := range 4 {
		if _, err := w.get(w.nodes[i%2], fmt.Sprint("old", i), w.rangep, time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	fresh := w.addNode(Init{Mode: Observer})
	w.muted = func(from, to *node, _ bool) bool { return from == fresh || to == fresh }
	for fresh.state[a] != Alive || fresh.state[b] != Alive {
		w.run(simTick)
	}
	// Now a and the new one hear each other; b is alive, but what goes to it is lost.
	w.muted = func(from, to *node, _ bool) bool { return from == b || to == b }
	var got *result
	fresh.launch(&call{op: opAllocate, owner: "new", addr: w.rangep, answer: func(r result) {
		if got = &r; r.err == nil {
			w.acknowledged(fresh, "new", r.prefix, w.rangep)
		}
	}}, 20*time.Second)
	for range 50 {
		if w.run(simTick); fresh.core.answered[a.name] || fresh.core.serving {
			break
		}
	}
	w.run(10 * time.Second)
	if !fresh.core.answered[a.name] || fresh.core.answered[b.name] {
		t.Errorf("the new peer was answered by %v, want %s alone", fresh.core.answered, a)
	}
	if fresh.core.serving || got != nil {
		t.Errorf("the new peer serves (%v), though %s does not know it: %+v", fresh.core.serving, b, got)
	}
	// Who knows the new one is lost, and b takes its addresses, with those that the new one was given.
	a.kill()
	fresh.group, w.muted = 1, nil
	w.run(30 * time.Second)
	if _, err := w.removePeer(b, a, time.Minute); err != nil {
		t.Fatal(err)
	}
	for i := range 250 {
		w.allocate(b, fmt.Sprint("more", i), w.rangep)
	}
	w.must(t)
	for id, ct := range b.conts {
		if strings.HasPrefix(id, "more") && ct.addr.Addr().As4()[3]%2 == 0 {
			w.free(b, ct)
		}
	}
	w.heal()
	if _, err := w.get(fresh, "new", w.rangep, time.Minute); err != nil {
		t.Errorf("once all know it: %v", err)
	}
	w.must(t)
}

// TestReclaimAgain: what is given out meanwhile is no mistake of a list that lacks it.
func TestReclaimAgain(t *testing.T) {
	w := cluster(t, 1, 1, "10.32.0.0/24")
	n := w.nodes[0]
	p, err := w.get(n, "new", w.rangep, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	free := netip.MustParsePrefix("10.32.0.77/24")
	var bad []Collision
	n.step(func(c *core, now time.Time) {
		c.at(now)
		bad = c.reclaim([]Holding{{"found", p}, {"another", free}})
	})
	if len(bad) != 1 || bad[0].Owner != "found" || !strings.HasPrefix(bad[0].With, "new") {
		t.Errorf("collisions: %v", bad)
	}
	if h := n.core.holds.find("another", free.Addr()); h == nil || h.state != held {
		t.Errorf("%s is not held by what runs with it: %+v", free, h)
	}
	w.must(t)
}

// TestReclaimAfterFailedRenumbering: the write that gave a running container another one's address failed, but
// reached the disk. Both keep what they run with.
func TestReclaimAfterFailedRenumbering(t *testing.T) {
	w := cluster(t, 1, 1, "10.32.0.0/24")
	n := w.nodes[0]
	p, err := w.get(n, "a", w.rangep, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	q, err := w.get(n, "b", w.rangep, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	n.kill()
	delete(n.disk[bucketHeld], (&hold{owner: "a", addr: p}).key())
	delete(n.disk[bucketHeld], (&hold{owner: "b", addr: q}).key())
	n.disk[bucketHeld][(&hold{owner: "b", addr: p}).key()] = []byte{}
	n.known = nil
	n.start() // fails if it cannot reclaim
	w.run(5 * time.Second)
	w.must(t)
	for owner, addr := range map[string]netip.Prefix{"a": p, "b": q} {
		if h := n.core.holds.find(owner, addr.Addr()); h == nil || h.state != held {
			t.Errorf("%s does not hold %s: %+v", owner, addr, h)
		}
	}
}

// TestRestoredBackup puts an old copy of the state file back, after the peer had given space away.
func TestRestoredBackup(t *testing.T) {
	for seed := range int64(30) {
		w := cluster(t, seed, 4, "10.32.0.0/24")
		w.trace = func(string, ...any) {}
		n := w.nodes[w.rng.IntN(4)]
		for i := range 10 {
			w.get(n, fmt.Sprint("a", i), w.rangep, time.Minute)
		}
		n.old = copyDisk(n.disk)
		for i := range 150 { // the others need space
			w.allocate(w.nodes[i%4], fmt.Sprint("b", i), w.rangep)
		}
		w.run(20 * time.Second)
		n.kill()
		n.disk, n.known = n.old, nil
		w.run(30 * time.Second)
		n.start()
		for i := range 30 {
			w.allocate(n, fmt.Sprint("c", i), w.rangep)
			w.run(simTick)
		}
		w.run(10 * time.Second)
		w.finish()
		if w.err != nil {
			t.Fatalf("seed %d: %v", seed, w.err)
		}
	}
}

// What is found running keeps its address, whatever the state file says and whether it can be written.
func TestReclaimOnBadDisk(t *testing.T) {
	w := cluster(t, 1, 1, "10.32.0.0/24")
	n := w.nodes[0]
	p, err := w.get(n, "runs", w.rangep, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	// "runs" was to give its address to "waits", in a write that failed but reached the disk.
	n.kill()
	runs, waits := &hold{owner: "runs", addr: p}, &hold{owner: "waits", addr: p}
	delete(n.disk[bucketHeld], runs.key())
	n.disk[bucketHeld][waits.key()] = []byte{}
	delete(n.known, "runs")
	n.bad = true
	n.start()
	w.run(5 * time.Second)
	w.must(t)
	n.bad = false
	n.step(func(c *core, now time.Time) { c.at(now); c.release("waits", netip.Addr{}) }) // it never came to run
	if q, err := w.get(n, "next", w.rangep, time.Minute); err != nil || q == p {
		t.Errorf("another container got %s, %v; %s is in use", q, err, p)
	}
	w.must(t)
	if h := n.core.holds.byOff[1]; h == nil || h.owner != "runs" || n.disk[bucketHeld][runs.key()] == nil || n.disk[bucketHeld][waits.key()] != nil {
		t.Errorf("%s is held by %+v; on disk %v", p, h, n.disk[bucketHeld])
	}
}

// TestTwoClusters lets two founded clusters meet, and repairs them.
func TestTwoClusters(t *testing.T) {
	for seed := range int64(10) {
		w := newWorld(seed, func(string, ...any) {})
		w.rangep = netip.MustParsePrefix("10.32.0.0/24")
		w.forgot = 1 // they were told of three voters and are six: two rings are what we want
		for i := range 6 {
			w.addNode(Init{Mode: Consensus, N: 3}).group = i % 2
		}
		w.run(2 * time.Second)
		for i := range 30 {
			n := w.nodes[i%6]
			var got *result
			n.launch(&call{op: opAllocate, owner: fmt.Sprint("c", i), addr: w.rangep, answer: func(r result) { got = &r }}, time.Minute)
			for got == nil {
				w.run(simTick)
			}
			if got.err != nil {
				t.Fatal(got.err)
			}
			n.conts[fmt.Sprint("c", i)] = &container{fmt.Sprint("c", i), n, got.prefix, true} // the two know nothing of each other
		}
		w.heal()
		w.run(10 * time.Second)
		for _, n := range w.nodes {
			if s := n.core.status(); len(s.Strangers) != 3 {
				t.Fatalf("seed %d: %s sees %d strangers, want 3", seed, n, len(s.Strangers))
			}
			if _, err := w.get(n, "meanwhile-"+n.String(), netip.MustParsePrefix("10.32.0.0/25"), time.Minute); err != nil {
				t.Errorf("seed %d: %s cannot allocate beside another cluster: %v", seed, n, err)
			}
			w.err = nil // doubles are expected here
			for _, ct := range n.conts {
				ct.void = true
			}
		}
		missed := w.nodes[w.rng.IntN(6)]
		missed.kill()
		at := w.nodes[w.rng.IntN(6)]
		for at == missed {
			at = w.nodes[w.rng.IntN(6)]
		}
		var done *result
		at.launch(&call{op: opRepair, answer: func(r result) { done = &r }}, time.Minute)
		w.run(60 * time.Second)
		missed.start()
		w.run(60 * time.Second)
		if done == nil || done.err != nil && !errors.Is(done.err, ErrPending) {
			t.Fatalf("seed %d: repair on %s without %s: %v %v", seed, at, missed, done, done.err)
		}
		first, collisions := w.nodes[0].core.ring.Cluster(), 0
		for _, n := range w.nodes {
			if n.core.ring.Cluster() != first {
				t.Fatalf("seed %d: still two clusters", seed)
			}
			collisions += len(n.core.collisions())
		}
		w.review() // voids what is not held by the ring, and demands that the rest is unique
		if w.err != nil {
			t.Fatalf("seed %d: %v", seed, w.err)
		}
		if collisions == 0 {
			t.Errorf("seed %d: two clusters full of the same addresses, and no collision", seed)
		}
		// Renumbered, everything is unique again.
		for _, n := range w.nodes {
			for _, bad := range n.core.collisions() {
				n.conts[bad.Owner].void = true
				if _, err := w.get(n, bad.Owner, w.rangep, time.Minute); err != nil {
					t.Errorf("seed %d: renumber %v: %v", seed, bad, err)
				}
			}
		}
		w.finish()
		if w.err != nil {
			t.Fatalf("seed %d: %v", seed, w.err)
		}
	}
}

func TestRangeDiffers(t *testing.T) {
	w := cluster(t, 8, 2, "10.32.0.0/24")
	w.get(w.nodes[0], "c", w.rangep, time.Minute)
	other := w.rangep
	w.rangep = netip.MustParsePrefix("10.40.0.0/24")
	odd := w.addNode(Init{Mode: Consensus, N: 3})
	w.rangep = other
	w.err = nil
	w.run(3 * time.Second)
	w.err = nil // the simulated gossip calls a refused delta a failure
	for _, n := range w.nodes {
		s := n.core.status()
		want := 1
		if n == odd {
			want = 2
		}
		if len(s.Strangers) != want || !s.Strangers[0].Range.IsValid() {
			t.Errorf("%s sees strangers %+v, want %d with another range", n, s.Strangers, want)
		}
	}
}

func TestFoundingModes(t *testing.T) {
	t.Run("seed", func(t *testing.T) {
		w := newWorld(1, t.Logf)
		w.rangep = netip.MustParsePrefix("10.32.0.0/24")
		init := Init{Mode: Seed, Seed: []mesh.PeerName{{1, 0, 0, 0, 0, 1}, {1, 0, 0, 0, 0, 2}}}
		for range 3 {
			w.addNode(init)
		}
		w.nodes[0].group, w.nodes[1].group = 1, 2 // no agreement is needed
		w.nodes[2].group = 1
		w.run(2 * time.Second)
		for _, n := range w.nodes {
			if _, err := w.get(n, "c-"+n.String(), w.rangep, time.Minute); err != nil {
				t.Errorf("%s: %v", n, err)
			}
		}
		w.finish()
		w.must(t)
	})
	t.Run("only founders divide the range", func(t *testing.T) {
		w := newWorld(1, t.Logf)
		w.rangep = netip.MustParsePrefix("10.32.0.0/24")
		init := Init{Mode: Seed, Seed: []mesh.PeerName{{1, 0, 0, 0, 0, 2}}}
		n := w.addNode(init)
		if _, err := w.get(n, "c", w.rangep, 20*time.Second); err == nil || n.core.ring.Cluster() != 0 {
			t.Errorf("a peer that is no founder made a ring, alone: %v", err)
		}
		w.addNode(init)
		w.run(2 * time.Second)
		if _, err := w.get(n, "d", w.rangep, time.Minute); err != nil {
			t.Errorf("with the founder in reach: %v", err)
		}
		w.must(t)
	})
	t.Run("observer", func(t *testing.T) {
		w := newWorld(2, t.Logf)
		w.rangep = netip.MustParsePrefix("10.32.0.0/24")
		o := w.addNode(Init{Mode: Observer})
		if _, err := w.get(o, "c", w.rangep, 5*time.Second); err == nil {
			t.Error("an observer founded a ring")
		}
		for range 3 {
			w.addNode(Init{Mode: Consensus, N: 3})
		}
		w.run(2 * time.Second)
		if _, err := w.get(o, "c", w.rangep, time.Minute); err != nil {
			t.Errorf("with voters in reach: %v", err)
		}
		if slices.Contains(o.core.ring.Owned(o.core.me), ring.Segment{}) || o.core.ring.Owners(0, 256)[o.core.me] == 256 {
			t.Error("the observer got everything")
		}
		w.finish()
		w.must(t)
	})
	t.Run("no quorum", func(t *testing.T) {
		w := newWorld(3, t.Logf)
		w.rangep = netip.MustParsePrefix("10.32.0.0/24")
		n := w.addNode(Init{Mode: Consensus, N: 3})
		_, err := w.get(n, "c", w.rangep, 3*time.Second)
		if err == nil || !strings.Contains(err.Error(), "awaiting consensus (quorum: 2, known: 1)") {
			t.Errorf("got %v", err)
		}
		m := w.addNode(Init{Mode: Consensus, N: 3})
		w.run(2 * time.Second)
		for _, n := range []*node{n, m} {
			if _, err := w.get(n, "d-"+n.String(), w.rangep, time.Minute); err != nil {
				t.Error(err)
			}
		}
	})
}

// TestExhaustion is I5: a /28 among eight peers, 5,000 allocations and releases, nothing lost.
func TestExhaustion(t *testing.T) {
	w := cluster(t, 9, 8, "10.32.0.0/28")
	w.trace = func(string, ...any) {}
	w.loss = 0.05
	ops := 5000
	if testing.Short() {
		ops = 500
	}
	for op := range ops {
		n := w.nodes[w.rng.IntN(8)]
		if ct := n.anyContainer(); ct != nil && w.rng.IntN(2) == 0 {
			w.free(n, ct)
		} else {
			w.allocate(n, fmt.Sprint("c", op), w.rangep)
		}
		if w.rng.IntN(3) == 0 {
			w.run(simTick)
		}
		w.must(t)
	}
	w.run(20 * time.Second)
	for _, n := range w.nodes {
		for _, ct := range n.sortedConts(nil) {
			w.free(n, ct)
		}
	}
	for i := range 14 { // one peer can have them all
		if _, err := w.get(w.nodes[i%8], fmt.Sprint("last", i), w.rangep, time.Minute); err != nil {
			t.Fatalf("address %d of 14: %v", i+1, err)
		}
	}
	if p, err := w.get(w.nodes[0], "one more", w.rangep, time.Minute); !errors.Is(err, ErrFull) {
		t.Errorf("the 15th: got %v, %v, want ErrFull", p, err)
	}
	t.Log(w.counts)
	w.must(t)
}

// storm is I2: 62 hosts grow to 102 and shrink to 62 again, by kills, with names used again.
func storm(seed int64) *world {
	w := newWorld(seed, func(string, ...any) {})
	w.rangep = netip.MustParsePrefix("10.32.0.0/16")
	w.loss = 0.02
	w.reclaim = 30 * time.Second
	init := Init{Mode: Consensus, N: 3}
	launch := func(n *node) {
		w.nextCont++
		w.allocate(n, fmt.Sprint("c", w.nextCont), w.rangep)
	}
	for range 3 {
		w.addNode(init)
	}
	w.run(2 * time.Second)
	launch(w.nodes[0])
	w.run(5 * time.Second)
	grow := func(to int) {
		for len(w.up()) < to && w.err == nil {
			n := w.pick(isDown)
			if n == nil {
				n = w.addNode(init)
			} else {
				n.disk, n.known = make(map[string]map[string][]byte), nil // a new machine with an old name
				w.forgot++
				n.start()
			}
			for range 3 {
				launch(n)
			}
			if w.rng.IntN(4) == 0 {
				w.run(simTick)
			}
		}
	}
	grow(62)
	w.run(5 * time.Second)
	grow(102)
	w.run(10 * time.Second)
	for len(w.up()) > 62 && w.err == nil {
		n := w.pick(isUp)
		n.kill()
		clear(n.conts) // the machine is gone with them
		if w.rng.IntN(6) == 0 {
			grow(len(w.up()) + 1) // one of the names comes again
		}
		if w.rng.IntN(3) == 0 {
			w.run(simTick)
		}
	}
	w.run(70 * time.Second) // ReclaimAfter, and no command by hand
	w.review()
	if w.err != nil {
		return w
	}
	lost := uint64(0)
	n := w.up()[0]
	for id, owned := range n.core.ring.Owners(0, n.core.ring.Size()) {
		if host := w.by[id.Peer]; host == nil || !host.up || host.core.me != id {
			lost += owned
		}
	}
	if lost > 0 {
		w.fail("%d addresses were not reclaimed; %s", lost, n.describe())
	}
	return w
}

func (w *world) up() (out []*node) {
	for _, n := range w.nodes {
		if n.up {
			out = append(out, n)
		}
	}
	return out
}

func TestScaleStorm(t *testing.T) {
	seeds := 4
	switch {
	case os.Getenv("MESHD_LONG") != "":
		seeds = 200
	case testing.Short():
		seeds = 1
	}
	if *simSeeds > 0 {
		seeds = *simSeeds
	}
	if *simSeed >= 0 {
		*simFirst, seeds = *simSeed, 1
	}
	runSeeds(t, seeds, storm)
}
