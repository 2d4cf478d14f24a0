package records

import (
	"container/heap"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"meshd/mesh"
)

// sim is a cluster of tables in virtual time: changes are broadcast and passed on as rumours, digests
// repair what got lost. Datagrams are delayed, reordered and lost, and none is larger than 1,200 bytes.
// One seed decides everything.
type sim struct {
	t      *testing.T
	rng    *rand.Rand
	now    time.Time
	events eventHeap
	order  int
	nodes  []*simNode
	loss   float64
	cut    func(a, b int) bool
	sent   int // bytes
}

type simNode struct {
	*Table
	n         int
	store     *memStore
	endpoints map[int]mesh.Endpoint // what this peer has, by number
	names     map[string]bool       // hand-made names that it looks after
}

type event struct {
	at    time.Time
	order int
	do    func()
}

type eventHeap []event

func (h eventHeap) Len() int { return len(h) }
func (h eventHeap) Less(i, j int) bool {
	return h[i].at.Before(h[j].at) || h[i].at.Equal(h[j].at) && h[i].order < h[j].order
}
func (h eventHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *eventHeap) Push(x any)   { *h = append(*h, x.(event)) }
func (h *eventHeap) Pop() any {
	e := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return e
}

const simDatagram = 1200

func newSim(t *testing.T, seed uint64, n int) *sim {
	s := &sim{t: t, rng: rand.New(rand.NewPCG(seed, 0)), now: t0, loss: 0.05, cut: func(int, int) bool { return false }}
	for i := range n {
		node := &simNode{n: i, store: &memStore{}, endpoints: make(map[int]mesh.Endpoint), names: make(map[string]bool)}
		node.Table = s.open(node)
		s.nodes = append(s.nodes, node)
	}
	for i, node := range s.nodes {
		for j := range n {
			node.SetPeerState(peerN(j+1), Alive)
		}
		s.every(20*time.Millisecond, func() {
			for _, d := range node.Drain(simDatagram - 1) {
				s.rumour(i, -1, d, n) // a broadcast goes to everybody
			}
		})
		s.every(500*time.Millisecond, func() { s.sync(i) })
		s.every(time.Second, func() { node.Expire(s.now) })
	}
	return s
}

func (s *sim) open(n *simNode) *Table {
	table, err := Open(Config{Self: peerN(n.n + 1), Keys: testKeys(peerN(n.n + 1)), Run: mesh.RunID(s.rng.Uint64()), Domain: "mesh.internal.", Store: n.store, Now: s.now})
	if err != nil {
		s.t.Fatal(err)
	}
	return table
}

func (s *sim) after(d time.Duration, do func()) {
	s.order++
	heap.Push(&s.events, event{s.now.Add(d), s.order, do})
}

func (s *sim) every(d time.Duration, do func()) {
	var again func()
	again = func() { do(); s.after(d, again) }
	s.after(time.Duration(s.rng.Int64N(int64(d))), again)
}

func (s *sim) run(d time.Duration) {
	end := s.now.Add(d)
	for len(s.events) > 0 && !s.events[0].at.After(end) {
		e := heap.Pop(&s.events).(event)
		s.now = e.at
		e.do()
	}
	s.now = end
}

// send hands a datagram of size bytes over after a while, or never.
func (s *sim) send(from, to, size int, do func()) {
	if size > simDatagram {
		s.t.Fatalf("datagram of %d bytes", size)
	}
	s.sent += size
	if s.rng.Float64() < s.loss || s.cut(from, to) {
		return
	}
	s.after(time.Millisecond+time.Duration(s.rng.Int64N(int64(50*time.Millisecond))), do)
}

// rumour sends a delta to at most fanout others, and what is news to them travels on to two more.
func (s *sim) rumour(from, except int, delta []byte, fanout int) {
	for _, to := range s.rng.Perm(len(s.nodes)) {
		if to == from || to == except {
			continue
		}
		if fanout--; fanout < 0 {
			return
		}
		s.send(from, to, 1+len(delta), func() {
			news, err := s.nodes[to].Merge(peerN(from+1), delta)
			if err != nil {
				s.t.Fatal(err)
			}
			if news != nil && s.rng.IntN(4) == 0 {
				s.rumour(to, from, news, 2)
			}
		})
	}
}

const buckets = 128

func sums(items []mesh.Item) (out [buckets]uint64) {
	for _, it := range items {
		out[it.Key%buckets] ^= it.Version*0x9e3779b97f4a7c15 ^ it.Key
	}
	return out
}

// sync compares digests with one other: sums of buckets there, items of those that differ back, and then
// deltas both ways.
func (s *sim) sync(a int) {
	b := s.rng.IntN(len(s.nodes))
	if a == b {
		return
	}
	digest := sums(s.nodes[a].Items())
	s.send(a, b, 8*buckets, func() {
		items := s.nodes[b].Items()
		theirs := sums(items)
		items = slices.DeleteFunc(items, func(it mesh.Item) bool { return theirs[it.Key%buckets] == digest[it.Key%buckets] })
		slices.SortFunc(items, func(x, y mesh.Item) int { return int(x.Key%buckets) - int(y.Key%buckets) })
		var differ [buckets]bool
		for i := range differ {
			differ[i] = theirs[i] != digest[i]
		}
		const perMessage = (simDatagram - 100) / 16
		for first := true; first || len(items) > 0; first = false {
			chunk := items[:min(perMessage, len(items))]
			items = items[len(chunk):]
			last := len(items) == 0
			s.send(b, a, 16+16*len(chunk), func() {
				has := make(map[uint64]uint64)
				for _, it := range chunk {
					has[it.Key] = it.Version
				}
				mine := make(map[uint64]uint64)
				var give, want []uint64
				for _, it := range s.nodes[a].Items() {
					mine[it.Key] = it.Version
					v, known := has[it.Key]
					// What a chunk does not list may be in another one; only a single one is conclusive.
					if known && v != it.Version || !known && last && len(chunk) < perMessage && differ[it.Key%buckets] {
						give = append(give, it.Key)
					}
				}
				for k, v := range has {
					if mine[k] != v {
						want = append(want, k)
					}
				}
				slices.Sort(give)
				slices.Sort(want)
				s.deliver(a, b, give)
				for w := range slices.Chunk(want, 140) {
					s.send(a, b, 8*len(w), func() { s.deliver(b, a, w) })
				}
			})
		}
	})
}

func (s *sim) deliver(from, to int, keys []uint64) {
	for _, d := range s.nodes[from].Encode(keys, simDatagram-1) {
		s.rumour2(from, to, d)
	}
}

func (s *sim) rumour2(from, to int, d []byte) {
	s.send(from, to, 1+len(d), func() {
		if _, err := s.nodes[to].Merge(peerN(from+1), d); err != nil {
			s.t.Fatal(err)
		}
	})
}

// change makes one change somewhere: a container comes, goes or is renamed, or a name is made by hand.
func (s *sim) change(i int) {
	n := s.nodes[s.rng.IntN(len(s.nodes))]
	switch kind := s.rng.IntN(20); {
	case kind == 0:
		name := fmt.Sprintf("hand%d-%d.mesh.internal.", n.n, s.rng.IntN(20))
		if n.names[name] {
			if _, err := n.RemoveName("", name, nil); err != nil {
				s.t.Fatal(err)
			}
			delete(n.names, name)
		} else {
			if err := n.AddName("", name, []netip.Addr{netip.MustParseAddr("192.0.2.1")}); err != nil {
				s.t.Fatal(err)
			}
			n.names[name] = true
		}
	case kind < 9 && len(n.endpoints) > 20:
		gone := slices.Sorted(maps.Keys(n.endpoints))[s.rng.IntN(len(n.endpoints))]
		n.Withdraw(n.endpoints[gone].Owner, n.endpoints[gone].MAC)
		delete(n.endpoints, gone)
	default:
		ep := endpointN(i, fmt.Sprintf("c%d.mesh.internal.", i), fmt.Sprintf("shared%d.mesh.internal.", i%100))
		ep.Peer = n.self
		n.Announce(ep)
		n.endpoints[i] = ep
	}
}

// truth is what every table should show.
func (s *sim) truth() map[string]bool {
	out := make(map[string]bool)
	for _, n := range s.nodes {
		for _, ep := range n.endpoints {
			for _, name := range ep.Names {
				out[name+" "+ep.Addrs[0].Addr().String()+" "+ep.Owner] = true
			}
		}
		for name := range n.names {
			out[name+" 192.0.2.1 "+mesh.OwnerExtern] = true
		}
	}
	return out
}

// agreed returns what is wrong with the first table that does not show the truth, or "".
func (s *sim) agreed() string {
	want := s.truth()
	for _, n := range s.nodes {
		got := make(map[string]bool)
		for _, e := range n.Entries() {
			got[e.Name+" "+e.Addr.String()+" "+e.Owner] = true
		}
		for k := range want {
			if !got[k] {
				return fmt.Sprintf("node %d lacks %s", n.n, k)
			}
		}
		for k := range got {
			if !want[k] {
				return fmt.Sprintf("node %d still has %s", n.n, k)
			}
		}
	}
	return ""
}

// settle runs until all agree and returns how long that took.
func (s *sim) settle(limit time.Duration) time.Duration {
	start := s.now
	for {
		why := s.agreed()
		took := s.now.Sub(start)
		if why == "" {
			return took
		}
		if took >= limit {
			s.t.Fatalf("after %v: %s", took, why)
		}
		s.run(100 * time.Millisecond)
	}
}

func simSeed(t *testing.T) uint64 {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return seed
}

// 1,000 changes a second over 16 peers with loss, a cut, and a restart: all agree within three seconds of
// the last change, and within three of the healing.
func TestChurn(t *testing.T) {
	s := newSim(t, simSeed(t), 16)
	length := 2 * time.Second
	if testing.Short() {
		length = 500 * time.Millisecond
	}
	i := 0
	churn := func(d time.Duration) {
		for end := s.now.Add(d); s.now.Before(end); i++ {
			s.change(i)
			s.run(time.Millisecond)
		}
	}
	churn(length)
	t.Logf("agreed %v after the last change", s.settle(3*time.Second))

	s.cut = func(a, b int) bool { return a%2 != b%2 }
	churn(length)
	s.cut = func(a, b int) bool { return false }
	t.Logf("agreed %v after the healing", s.settle(3*time.Second))

	// A peer is killed and comes back with half of its containers.
	n := s.nodes[5]
	n.Table = s.open(n)
	for j := range s.nodes {
		n.SetPeerState(peerN(j+1), Alive)
	}
	for k, ep := range n.endpoints {
		if k%2 == 0 {
			n.Announce(ep)
		} else {
			delete(n.endpoints, k)
		}
	}
	n.Settle()
	churn(length)
	t.Logf("agreed %v after the last change", s.settle(3*time.Second))
	t.Logf("%d changes, %d names, %.0f bytes/s sent by a peer", i, len(s.truth()), float64(s.sent)/s.now.Sub(t0).Seconds()/16)
	for _, n := range s.nodes {
		if st := n.Stats(); st.Tombstones > st.Endpoints/2+16*(ownTombstones+2)+20*16 {
			t.Errorf("node %d: %+v", n.n, st)
		}
		checkIndex(t, n.Table)
	}
}

// Both halves of a partition delete and add, names of the other half's making too; healed, all show
// exactly what is left, however long it took. Clocks do not matter: they are an hour apart.
func TestPartition(t *testing.T) {
	for _, length := range []time.Duration{5 * time.Second, 10 * time.Minute, 24 * time.Hour} {
		t.Run(length.String(), func(t *testing.T) {
			s := newSim(t, simSeed(t), 6)
			for i := range 300 {
				s.change(i)
			}
			addr := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
			s.run(time.Second)
			for k := range 40 {
				n := s.nodes[k%6]
				name := fmt.Sprintf("given%d.mesh.internal.", k)
				if err := n.AddName("", name, addr); err != nil {
					t.Fatal(err)
				}
				n.names[name] = true
			}
			s.settle(3 * time.Second)

			s.cut = func(a, b int) bool { return a < 3 != (b < 3) }
			for i := range 300 {
				s.change(1000 + i)
			}
			for k := range 20 { // by a peer of the other half, or of the same
				name := fmt.Sprintf("given%d.mesh.internal.", k)
				if _, err := s.nodes[(k+3*(k%2))%6].RemoveName("", name, nil); err != nil {
					t.Fatal(err)
				}
				delete(s.nodes[k%6].names, name)
			}
			if length > time.Minute { // the halves give each other up
				s.run(5 * time.Second)
				s.declare(Gone)
				for _, n := range s.nodes { // and nothing happens for long
					n.Expire(s.now.Add(length))
				}
				s.now = s.now.Add(length)
				s.events = nil
				s.restartTimers()
			} else {
				s.declare(Suspect)
				s.run(length)
			}
			for i := range 100 {
				s.change(2000 + i)
			}
			s.cut = func(a, b int) bool { return false }
			s.declare(Alive)
			// Comparing tables takes a peer to meet the right other one, by chance: mostly 1 s, once in some hundred times more than 3.
			t.Logf("agreed %v after the healing", s.settle(6*time.Second))
			for _, n := range s.nodes {
				checkIndex(t, n.Table)
			}
		})
	}
}

// declare sets what each half thinks of the other.
func (s *sim) declare(state PeerState) {
	for a, n := range s.nodes {
		for b := range s.nodes {
			if a < 3 != (b < 3) {
				n.SetPeerState(peerN(b+1), state)
			}
		}
	}
}

func (s *sim) restartTimers() {
	for i, node := range s.nodes {
		s.every(20*time.Millisecond, func() {
			for _, d := range node.Drain(simDatagram - 1) {
				s.rumour(i, -1, d, len(s.nodes))
			}
		})
		s.every(500*time.Millisecond, func() { s.sync(i) })
	}
}

// Memory of a table with 10,000 names, tombstones of as many others included.
func TestMemory(t *testing.T) {
	writer := openTest(t, 1, nil)
	writer.Settle()
	var before, after runtime.MemStats
	table := openTest(t, 2, nil)
	runtime.GC()
	runtime.ReadMemStats(&before)
	const n = 10_000
	load := func(i int) {
		writer.Announce(endpointN(i, fmt.Sprintf("container-%d.mesh.internal.", i)))
		for _, d := range writer.Drain(1100) {
			if _, err := table.Merge(peerN(1), d); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i := range 2 * n {
		load(i)
	}
	for i := range n {
		writer.Withdraw(endpointN(i).Owner, endpointN(i).MAC)
	}
	for _, d := range writer.Drain(1100) {
		if _, err := table.Merge(peerN(1), d); err != nil {
			t.Fatal(err)
		}
	}
	stats := table.Stats()
	writer = nil
	runtime.GC()
	runtime.ReadMemStats(&after)
	used := float64(after.HeapAlloc-before.HeapAlloc) / (1 << 20)
	t.Logf("%.1f MiB for %d names; %+v", used, len(table.Entries()), stats)
	if used > 30 {
		t.Errorf("%.1f MiB, want at most 30", used)
	}
	runtime.KeepAlive(table)
}

// A member that turned can be as many peers as it makes keys, and each says that it has endpoints without end. What they take is
// bounded, whatever their form, and honest peers that come later find room.
func TestMemoryOfLiars(t *testing.T) {
	const room = 4 << 20
	names := func(i, n int) (all []string) {
		for j := range n {
			all = append(all, fmt.Sprintf("%x-%x.mesh.internal.", i, j))
		}
		return all
	}
	for what, form := range map[string]struct{ names, addrs int }{
		"bare": {0, 1}, "usual": {2, 1}, "many names": {40, 1}, "many addresses": {1, 32}, "many of both": {16, 24},
	} {
		t.Run(what, func(t *testing.T) {
			table := openTest(t, 1, nil)
			table.room = room
			sent := 0
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			for peer := 2; table.Stats().Refused < 500 && peer < 30; peer++ {
				liar := openTest(t, peer, nil)
				liar.Settle()
				for i := range 250 {
					e := endpointN(peer<<10+i, names(peer<<10+i, form.names)...)
					for j := len(e.Addrs); j < form.addrs; j++ {
						e.Addrs = append(e.Addrs, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(j), byte(i >> 8), byte(i)}), 12))
					}
					liar.Announce(e)
				}
				for _, d := range liar.Drain(1100) {
					if _, err := table.Merge(peerN(2), d); err != nil {
						t.Fatal(err)
					}
					sent += len(d)
				}
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			held := int(after.HeapAlloc) - int(before.HeapAlloc)
			t.Logf("of %d bytes in rows %d endpoints are kept, which take %.1f MiB; %.1f reckoned", sent, table.Stats().Endpoints,
				float64(held)/(1<<20), float64(table.memory)/(1<<20))
			if most := room + table.Stats().Peers*sureMemory; table.memory > most || held > most*5/4 {
				t.Errorf("%d bytes, %d reckoned; want %d at most", held, table.memory, most)
			}
			honest := openTest(t, 999, nil)
			honest.Settle()
			for i := range 5 {
				honest.Announce(endpointN(i, fmt.Sprintf("honest-%d.mesh.internal.", i)))
			}
			exchange(t, honest, table)
			for i := range 5 {
				if table.Find([]byte(WireName(fmt.Sprintf("honest-%d.mesh.internal.", i)))) == nil {
					t.Errorf("no room for endpoint %d of an honest peer", i)
				}
			}
			for peer := range table.peers {
				if peer != table.self {
					table.SetPeerState(peer, Gone)
				}
			}
			if table.memory != 0 {
				t.Errorf("%d bytes are reckoned for nothing", table.memory)
			}
		})
	}
}

func BenchmarkFind(b *testing.B) {
	table := openTest(b, 1, nil)
	names := make([][]byte, 10_000)
	for i := range names {
		name := fmt.Sprintf("container-%d.mesh.internal.", i)
		table.Announce(endpointN(i, name))
		names[i] = []byte(WireName(name))
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for i := rand.IntN(len(names)); pb.Next(); i = (i + 7919) % len(names) {
			if table.Find(names[i]) == nil {
				b.Error("not found")
				return
			}
		}
	})
}

// One change at a peer and its arrival at another, beside 10,000 names.
func BenchmarkChange(b *testing.B) {
	from, to := openTest(b, 1, nil), openTest(b, 2, nil)
	from.Settle()
	for i := range 10_000 {
		from.Announce(endpointN(i, fmt.Sprintf("container-%d.mesh.internal.", i)))
	}
	for _, d := range from.Drain(1100) {
		if _, err := to.Merge(peerN(1), d); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	bytes := 0
	for i := 0; b.Loop(); i++ {
		ep := endpointN(20_000+i/2, fmt.Sprintf("new-%d.mesh.internal.", i/2))
		if i%2 == 0 {
			from.Announce(ep)
		} else {
			from.Withdraw(ep.Owner, ep.MAC)
		}
		for _, d := range from.Drain(1100) {
			bytes += len(d)
			if _, err := to.Merge(peerN(1), d); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(bytes)/float64(b.N), "wire-B/op")
}

func BenchmarkItems(b *testing.B) {
	table := openTest(b, 1, nil)
	for i := range 10_000 {
		table.Announce(endpointN(i, fmt.Sprintf("container-%d.mesh.internal.", i)))
	}
	b.ReportAllocs()
	var sum uint64
	for b.Loop() {
		for _, it := range table.Items() {
			sum ^= it.Version
		}
	}
	runtime.KeepAlive(binary.BigEndian.AppendUint64(nil, sum))
}
