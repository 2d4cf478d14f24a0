package ipam

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"meshd/ipam/ring"
	"meshd/mesh"
)

// liar is a member that turned: it tells the others whatever they take for well formed.
type liar struct {
	w    *world
	rng  *rand.Rand
	name mesh.PeerName
}

func (l *liar) id() ring.ID {
	ids := []ring.ID{{Peer: l.name, Life: 1}, {Peer: l.name, Life: l.rng.Uint32()}, {Peer: mesh.PeerName{byte(l.rng.Uint32()), 7}, Life: l.rng.Uint32()}}
	for _, n := range l.w.nodes {
		ids = append(ids, n.core.me)
	}
	return ids[l.rng.IntN(len(ids))]
}

func (l *liar) number() uint32 {
	return []uint32{0, 1, 2, 1 << 16, math.MaxInt32, math.MaxUint32 - 1, math.MaxUint32, l.rng.Uint32()}[l.rng.IntN(8)]
}

// delta is a change of the ring that n knows, or of one made up.
func (l *liar) delta(n *node) ring.Delta {
	r := n.core.ring
	d := ring.Delta{Cluster: r.Cluster(), Range: r.Range()}
	switch l.rng.IntN(12) {
	case 0:
		d.Cluster = l.rng.Uint64N(r.Cluster()) // a smaller one wins
	case 1:
		d.Cluster = l.rng.Uint64()
	case 2:
		d.Successor = l.rng.Uint64()
	case 3:
		d.Range = netip.PrefixFrom(d.Range.Addr(), d.Range.Bits()-1)
	}
	if l.rng.IntN(2) == 0 {
		m := ring.Member{ID: l.id(), Flags: ring.Flags(l.rng.Uint32())}
		for range l.rng.IntN(3) {
			m.Fences = append(m.Fences, l.id())
		}
		slices.SortFunc(m.Fences, ring.ID.Compare)
		m.Fences = slices.Compact(m.Fences)
		d.Members = append(d.Members, m)
	}
	size := r.Size()
	for at := uint64(0); at < size && l.rng.IntN(4) > 0; {
		from := at + l.rng.Uint64N(size-at)
		to := from + 1 + l.rng.Uint64N(size-from)
		d.Segments = append(d.Segments, ring.Segment{Start: from, End: to, Owner: l.id(), Epoch: l.number(), Count: l.number(), By: l.id()})
		at = to
	}
	return d
}

// message is one to an allocator.
func (l *liar) message(n *node) []byte {
	c := n.core
	m := message{kind: kind(1 + l.rng.IntN(int(kindEnd)-1)), flags: byte(l.rng.Uint32()) &^ flagIPv6, rng: c.cfg.Range, cluster: c.ring.Cluster(),
		life: l.number(), members: l.rng.Uint64(), number: l.number(), lo: l.rng.Uint64N(300), hi: l.rng.Uint64N(300),
		free: uint64(l.number()) << l.rng.IntN(32), reason: reason(l.rng.Uint32()), text: string(make([]byte, l.rng.IntN(300)))}
	if l.rng.IntN(4) == 0 {
		m.lo, m.hi = l.rng.Uint64(), l.rng.Uint64()
	}
	for id := range c.asks { // as an answer to what was asked
		if l.rng.IntN(2) == 0 {
			m.number = id
		}
	}
	switch m.kind {
	case kindCompare, kindCompared:
		for range l.rng.IntN(5) {
			m.items = append(m.items, item{l.id(), l.rng.Uint64()})
		}
		if l.rng.IntN(2) == 0 {
			m.members = c.ring.MembersDigest()
		}
	case kindFacts, kindGrant:
		m.rest = l.delta(n).Append(nil)
	case kindVote:
		m.rest = make([]byte, l.rng.IntN(60))
		for i := range m.rest {
			m.rest[i] = byte(l.rng.Uint32())
		}
	case kindNotice:
		m.old, m.to = c.ring.Cluster(), l.rng.Uint64()
	}
	return m.append(nil)
}

// A member tells lies about the ring and to the allocators, 3,000 in ten minutes. It may have addresses doubled or used up
// by it, and the ring split for good (ARCHITECTURE.md), and no more: nobody fails, what runs keeps the address that it has,
// and what is known of the ring stays within bounds.
func TestHostileMember(t *testing.T) {
	seeds := 2
	if os.Getenv("MESHD_LONG") != "" {
		seeds = 200
	}
	most := 0
	for seed := range seeds {
		w := newWorld(int64(seed), func(string, ...any) {})
		w.rangep = netip.MustParsePrefix("10.32.0.0/24")
		for range 4 {
			w.addNode(Init{Mode: Consensus, N: 4})
		}
		w.run(3 * time.Second)
		for i, n := range w.nodes {
			for j := range 3 {
				for id := string(rune('a' + 3*i + j)); n.conts[id] == nil && w.err == nil; {
					w.allocate(n, id, w.rangep)
					w.run(5 * time.Second)
				}
			}
		}
		before := map[string]netip.Prefix{}
		for _, n := range w.nodes {
			for id, ct := range n.conts {
				before[id] = ct.addr
			}
		}
		if w.err != nil || len(before) != 12 {
			t.Fatalf("seed %d: %v, %d containers", seed, w.err, len(before))
		}
		l := &liar{w, rand.New(rand.NewPCG(uint64(seed), 3)), mesh.PeerName{6, 6}}
		for range 3000 {
			n := w.nodes[l.rng.IntN(len(w.nodes))]
			if l.rng.IntN(2) == 0 {
				_, _ = n.table.Merge(l.name, l.delta(n).Append(nil))
				n.step(func(c *core, now time.Time) { c.at(now) })
			} else {
				b := l.message(n)
				n.step(func(c *core, now time.Time) { c.message(l.name, b, now) })
			}
			w.run(200 * time.Millisecond)
			w.err = nil // the simulation's rules are broken, as they may be
			for _, n := range w.nodes {
				for id, ct := range n.conts {
					if n.core.holds.find(id, ct.addr.Addr()) == nil || before[id] != ct.addr {
						t.Fatalf("seed %d: %s of %s is not held any more: it had %s", seed, ct.addr, id, before[id])
					}
				}
			}
		}
		for _, n := range w.nodes {
			most = max(most, len(n.table.Items()))
		}
	}
	t.Logf("%d seeds; %d entries in a ring at most", seeds, most)
	if most > 1000 {
		t.Errorf("a ring of 256 addresses has %d entries", most)
	}
}
