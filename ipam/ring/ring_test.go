package ring

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp/cmpopts"

	gocmp "github.com/google/go-cmp/cmp"

	"meshd/mesh"
)

func id(n int) ID { return ID{mesh.PeerName{0, 0, 0, 0, 0, byte(n)}, uint32(n) << 8} }

func newSeed(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// check says what is wrong with the ring's shape.
func (r *Ring) invariant() error {
	if r.tokens[0].start != 0 {
		return fmt.Errorf("first token starts at %d", r.tokens[0].start)
	}
	for i := 1; i < len(r.tokens); i++ {
		if a, b := r.tokens[i-1], r.tokens[i]; a.start >= b.start || a.same(b) || b.start >= r.size {
			return fmt.Errorf("tokens %d and %d: %+v, %+v", i-1, i, a, b)
		}
	}
	return nil
}

// content is one address in the naive model.
type content struct {
	owner, by    ID
	epoch, count uint32
}

func (c content) compare(o content) int {
	return cmp.Or(cmp.Compare(c.epoch, o.epoch), cmp.Compare(c.count, o.count), c.by.Compare(o.by), c.owner.Compare(o.owner))
}

type model []content

func modelOf(r *Ring) model {
	m := make(model, r.size)
	for i := range m {
		s := r.At(uint64(i))
		m[i] = content{s.Owner, s.By, s.Epoch, s.Count}
	}
	return m
}

func (m model) merge(d Delta) {
	for _, s := range d.Segments {
		for i := s.Start; i < s.End; i++ {
			if c := (content{s.Owner, s.By, s.Epoch, s.Count}); c.compare(m[i]) > 0 {
				m[i] = c
			}
		}
	}
}

var testRange = netip.MustParsePrefix("10.32.0.0/26")

func randomDelta(rng *rand.Rand) Delta {
	d := Delta{Cluster: 7, Range: testRange}
	size := int(Size(testRange))
	for at := rng.IntN(size); at < size && rng.IntN(8) > 0; {
		end := at + 1 + rng.IntN(min(size-at, 12))
		d.Segments = append(d.Segments, Segment{uint64(at), uint64(end), id(1 + rng.IntN(4)), 1 + uint32(rng.IntN(3)), uint32(rng.IntN(4)), id(1 + rng.IntN(4))})
		at = end + rng.IntN(6)
	}
	for range rng.IntN(3) {
		m := Member{ID: id(1 + rng.IntN(4)), Flags: Flags(rng.IntN(8))}
		for range rng.IntN(3) {
			m.Fences = append(m.Fences, id(1+rng.IntN(4)))
		}
		d.Members = append(d.Members, m)
	}
	if rng.IntN(10) == 0 {
		d.Successor = 1 + uint64(rng.IntN(3))
	}
	return d
}

func mustMerge(t testing.TB, r *Ring, d Delta) Delta {
	t.Helper()
	news, err := r.Merge(d, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.invariant(); err != nil {
		t.Fatal(err)
	}
	return news
}

func sortedItems(r *Ring) []mesh.Item {
	items := r.Items()
	slices.SortFunc(items, func(a, b mesh.Item) int {
		return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Version, b.Version))
	})
	return items
}

// TestMergeLaws merges random deltas in different orders, cuts and repetitions and compares with a
// model that keeps one content per address.
func TestMergeLaws(t *testing.T) {
	rng := newSeed(t)
	for round := range 400 {
		deltas := make([]Delta, 1+rng.IntN(12))
		want := make(model, Size(testRange))
		for i := range deltas {
			deltas[i] = randomDelta(rng)
			want.merge(deltas[i])
		}
		var rings [3]*Ring
		disk := make(map[string][]byte)
		for n := range rings {
			r := New(testRange)
			order := rng.Perm(len(deltas))
			for _, i := range append(order, order[:rng.IntN(len(order))]...) {
				before := modelOf(r)
				news := mustMerge(t, r, deltas[i])
				for j, c := range modelOf(r) {
					inNews := slices.ContainsFunc(news.Segments, func(s Segment) bool { return s.Start <= uint64(j) && uint64(j) < s.End })
					if changed := c != before[j]; changed != inNews {
						t.Fatalf("round %d: address %d changed: %v, in the news: %v", round, j, changed, inNews)
					}
				}
				if again := mustMerge(t, r, news); !again.Empty() {
					t.Fatalf("round %d: merging the news again gave %+v", round, again)
				}
				if n == 0 && rng.IntN(2) == 0 {
					changes := r.Changes()
					if rng.IntN(3) == 0 {
						r.Retry(changes) // the write failed
						continue
					}
					writeTo(disk, changes)
				}
			}
			rings[n] = r
			if diff := gocmp.Diff(want, modelOf(r), gocmp.AllowUnexported(content{})); diff != "" {
				t.Fatalf("round %d: against the model: %s", round, diff)
			}
		}
		for _, r := range rings[1:] {
			if !slices.Equal(sortedItems(rings[0]), sortedItems(r)) || rings[0].MembersDigest() != r.MembersDigest() {
				t.Fatalf("round %d: equal views have different items", round)
			}
		}
		// A view put together from the other's parts is equal.
		copied := New(netip.Prefix{})
		for _, part := range rings[0].Select(nil).Split(256) {
			if len(part) > 256 {
				t.Fatalf("a part of %d bytes", len(part))
			}
			d, err := ParseDelta(part)
			if err != nil {
				t.Fatal(err)
			}
			mustMerge(t, copied, d)
		}
		if !slices.Equal(sortedItems(rings[0]), sortedItems(copied)) && len(rings[0].Items()) > 0 {
			t.Fatalf("round %d: a copy by deltas differs", round)
		}
		writeTo(disk, rings[0].Changes())
		loaded, err := Load(testRange, 7, rings[0].Successor(), disk)
		if err != nil {
			t.Fatal(err)
		}
		if err := loaded.invariant(); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(sortedItems(rings[0]), sortedItems(loaded)) || loaded.MembersDigest() != rings[0].MembersDigest() {
			t.Fatalf("round %d: the ring from disk differs", round)
		}
	}
}

func writeTo(disk, changes map[string][]byte) {
	maps.Copy(disk, changes)
	maps.DeleteFunc(disk, func(_ string, v []byte) bool { return v == nil })
}

// TestAntiEntropy repairs two views by their items alone, the way the gossip room does.
func TestAntiEntropy(t *testing.T) {
	rng := newSeed(t)
	for range 200 {
		a, b := New(testRange), New(testRange)
		for range 1 + rng.IntN(10) {
			d := randomDelta(rng)
			if rng.IntN(3) > 0 {
				mustMerge(t, a, d)
			}
			if rng.IntN(3) > 0 {
				mustMerge(t, b, d)
			}
		}
		pull := func(to, from *Ring) {
			have := to.Items()
			var keys []uint64
			for _, it := range from.Items() {
				if !slices.Contains(have, it) {
					keys = append(keys, it.Key)
				}
			}
			if len(keys) == 0 {
				return
			}
			for _, part := range from.Select(keys).Split(300) {
				d, err := ParseDelta(part)
				if err != nil {
					t.Fatal(err)
				}
				mustMerge(t, to, d)
			}
		}
		for range 3 {
			pull(a, b)
			pull(b, a)
		}
		if !slices.Equal(sortedItems(a), sortedItems(b)) {
			t.Fatal("the views still differ")
		}
	}
}

func TestFounding(t *testing.T) {
	for _, n := range []int{1, 2, 3, 5, 8, 64, 100} {
		var ids []ID
		for i := range n {
			ids = append(ids, id(n-i), id(n-i))
		}
		r := New(testRange)
		mustMerge(t, r, Founding(testRange, 9, ids, 0, id(1)))
		owners := owners(r.Owners(0, r.Size()))
		if len(owners) != min(n, 64) || !owners.covers(r.Size()) {
			t.Errorf("%d members: %d own %v", n, len(owners), owners)
		}
		for _, s := range r.Owned(id(1)) {
			if s.Len()&(s.Len()-1) != 0 || s.Start%s.Len() != 0 {
				t.Errorf("%d members: [%d, %d) is no CIDR block", n, s.Start, s.End)
			}
		}
		if r.Cluster() != 9 || len(r.Members()) != n {
			t.Errorf("%d members: cluster %d, members %v", n, r.Cluster(), r.Members())
		}
	}
}

type owners map[ID]uint64

func (o owners) covers(size uint64) bool {
	for _, n := range o {
		size -= n
	}
	return size == 0
}

func TestGrantTakeoverFence(t *testing.T) {
	founded := func() *Ring {
		r := New(testRange)
		mustMerge(t, r, Founding(testRange, 9, []ID{id(1)}, 0, id(1)))
		return r
	}
	a, b := founded(), founded()
	grant, err := a.Grant(id(1), 16, 32, id(2))
	if err != nil {
		t.Fatal(err)
	}
	mustMerge(t, a, grant)
	if _, err := a.Grant(id(1), 8, 24, id(3)); err == nil {
		t.Error("granted what is another's")
	}
	if _, err := a.Grant(id(1), 8, 8, id(3)); err == nil {
		t.Error("granted nothing")
	}

	// b has not heard of the grant when it fences 1 and says what it knows of 1's addresses.
	frozen := func(o ID) bool { return o == id(1) }
	mustMerge(t, b, Delta{Cluster: 9, Range: testRange, Members: []Member{{ID: id(1), Fences: []ID{id(3)}}}})
	if news, err := b.Merge(grant, frozen); err != nil || len(news.Segments) > 0 {
		t.Errorf("a frozen address changed: %+v, %v", news, err)
	}
	c := founded()
	mustMerge(t, c, Delta{Cluster: 9, Range: testRange, Members: []Member{{ID: id(1), Fences: []ID{id(3)}}}})
	if news, _ := c.Merge(grant, nil); news.Empty() {
		t.Error("what a colleague knew before the fence was refused")
	}
	if c.Digest(id(1)) == b.Digest(id(1)) {
		t.Error("digests of different holdings are equal")
	}

	// The takeover beats the grant that b never heard of, wherever they meet and in whatever order.
	take := b.Takeover(id(1), id(3))
	mustMerge(t, b, take)
	if news, _ := b.Merge(grant, frozen); !news.Empty() {
		t.Error("a grant of the fenced one beat the takeover")
	}
	mustMerge(t, a, take)
	if s := a.At(20); s.Owner != id(3) || s.Epoch != 2 {
		t.Errorf("got %+v, want it taken over", s)
	}
}

func TestMergeRefuses(t *testing.T) {
	r := New(testRange)
	mustMerge(t, r, Founding(testRange, 9, []ID{id(1)}, 0, id(1)))
	before := sortedItems(r)
	seg := Segment{0, 8, id(1), 1, 1, id(1)}
	for name, c := range map[string]struct {
		d    Delta
		want error
	}{
		"cluster":    {Delta{Cluster: 8, Range: testRange, Segments: []Segment{seg}}, ErrOtherCluster},
		"range":      {Delta{Cluster: 9, Range: netip.MustParsePrefix("10.0.0.0/8"), Segments: []Segment{seg}}, ErrOtherRange},
		"no cluster": {Delta{Range: testRange}, ErrMalformed},
		"host bits":  {Delta{Cluster: 9, Range: netip.MustParsePrefix("10.32.0.1/26")}, ErrMalformed},
		"too long":   {Delta{Cluster: 9, Range: testRange, Segments: []Segment{{0, 65, id(1), 1, 1, id(1)}}}, ErrMalformed},
		"overlap":    {Delta{Cluster: 9, Range: testRange, Segments: []Segment{seg, seg}}, ErrMalformed},
		"backwards":  {Delta{Cluster: 9, Range: testRange, Segments: []Segment{{8, 4, id(1), 1, 1, id(1)}}}, ErrMalformed},
		"nobody":     {Delta{Cluster: 9, Range: testRange, Segments: []Segment{{0, 8, ID{}, 1, 1, id(1)}}}, ErrMalformed},
		"epoch 0":    {Delta{Cluster: 9, Range: testRange, Segments: []Segment{{0, 8, id(1), 0, 1, id(1)}}}, ErrMalformed},
		"no name":    {Delta{Cluster: 9, Range: testRange, Members: []Member{{}}}, ErrMalformed},
	} {
		if _, err := r.Merge(c.d, nil); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
	if !slices.Equal(before, sortedItems(r)) {
		t.Error("a refused delta changed the ring")
	}
}

// An owner is a member in every view that has heard of what it owns, even if what it owned is another's by now
// and its joining was never heard of.
func TestOwnersAreMembers(t *testing.T) {
	own := func(epoch uint32, who int) Delta {
		return Delta{Cluster: 9, Range: testRange, Segments: []Segment{{0, 8, id(who), epoch, 1, id(1)}}}
	}
	a, b := New(testRange), New(testRange)
	mustMerge(t, a, own(1, 2))
	mustMerge(t, a, own(2, 3))
	mustMerge(t, b, own(2, 3))
	news := mustMerge(t, b, own(1, 2)) // loses
	if len(news.Segments) > 0 || len(news.Members) != 1 {
		t.Errorf("news of an older segment: %+v", news)
	}
	for _, who := range []int{2, 3} {
		if !a.Member(id(who)).Active() || !b.Member(id(who)).Active() {
			t.Errorf("%s owns or owned something and is no member", id(who))
		}
	}
	if a.MembersDigest() != b.MembersDigest() || a.Digest(id(3)) != b.Digest(id(3)) {
		t.Error("the order of merging matters")
	}
	kv := a.Changes()
	for k := range kv {
		if k[0] == 'm' {
			delete(kv, k) // as an earlier version may have left it
		}
	}
	old, err := Load(testRange, 9, 0, kv)
	if err != nil || !old.Member(id(3)).Active() {
		t.Errorf("loaded: %+v, %v", old.Members(), err)
	}
}

func TestConflictIsReported(t *testing.T) {
	a, b := New(testRange), New(testRange)
	x := Delta{Cluster: 7, Range: testRange, Segments: []Segment{{0, 8, id(2), 1, 5, id(1)}}}
	y := Delta{Cluster: 7, Range: testRange, Segments: []Segment{{4, 8, id(3), 1, 5, id(1)}}}
	mustMerge(t, a, x)
	mustMerge(t, a, y)
	mustMerge(t, b, y)
	mustMerge(t, b, x)
	if !slices.Equal(sortedItems(a), sortedItems(b)) {
		t.Error("a conflict left two views")
	}
	for _, r := range []*Ring{a, b} {
		if c := r.Conflicts(); len(c) != 1 || c[0].Kept.Owner != id(3) || c[0].Dropped.Owner != id(2) || c[0].Kept.Start != 4 {
			t.Errorf("got conflicts %+v", c)
		}
	}
}

func TestOffsets(t *testing.T) {
	for _, c := range []struct {
		rng, addr string
		off       uint64
	}{{"10.32.0.0/12", "10.47.255.255", 1<<20 - 1}, {"fd00:1::/66", "fd00:1::2a", 42}, {"0.0.0.0/1", "127.0.0.0", 127 << 24}} {
		r := New(netip.MustParsePrefix(c.rng))
		off, ok := r.Offset(netip.MustParseAddr(c.addr))
		if !ok || off != c.off || r.Addr(off).String() != c.addr {
			t.Errorf("%s in %s: got %d %v, and back %s", c.addr, c.rng, off, ok, r.Addr(off))
		}
	}
	for _, bad := range []string{"10.32.0.0/31", "10.32.0.1/12", "fd00::/64"} {
		if CheckRange(netip.MustParsePrefix(bad)) == nil {
			t.Errorf("range %s was accepted", bad)
		}
	}
}

func FuzzParseDelta(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		f.Add(randomDelta(rng).Append(nil))
	}
	f.Add(Founding(netip.MustParsePrefix("fd00::/100"), 5, []ID{id(1), id(2)}, Seen, id(1)).Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := ParseDelta(b)
		if err != nil {
			return
		}
		again, err := ParseDelta(d.Append(nil))
		if err != nil {
			t.Fatalf("re-encoded: %v", err)
		}
		if diff := gocmp.Diff(d, again, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
			t.Fatal(diff)
		}
		r := New(netip.Prefix{})
		if _, err := r.Merge(d, nil); err != nil {
			return
		}
		if err := r.invariant(); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(r.Range(), r.Cluster(), 0, r.Changes()); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzLoad(f *testing.F) {
	f.Add("t0000000000000000", make([]byte, tokenValueSize))
	f.Add("m0000000000010000000a", make([]byte, 11))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		r, err := Load(testRange, 1, 0, map[string][]byte{key: value})
		if err == nil {
			if err := r.invariant(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// bigRing has 1,000 members with 20 ranges each.
func bigRing(b *testing.B) (*Ring, [][]byte) {
	rng := netip.MustParsePrefix("10.32.0.0/12")
	r := New(rng)
	d := Delta{Cluster: 1, Range: rng}
	member := func(i int) ID { return ID{mesh.PeerName{1, 0, 0, 0, byte(i >> 8), byte(i)}, uint32(i)} }
	step := r.Size() / 20_000
	for i := range 20_000 {
		m := member(i % 1000)
		if i < 1000 {
			d.Members = append(d.Members, Member{ID: m, Flags: Joined | Seen})
		}
		end := uint64(i+1) * step
		if i == 19_999 {
			end = r.Size()
		}
		d.Segments = append(d.Segments, Segment{uint64(i) * step, end, m, 1, uint32(i), member((i + 1) % 1000)})
	}
	if _, err := r.Merge(d, nil); err != nil {
		b.Fatal(err)
	}
	return r, d.Split(mesh.MaxMessage - 1)
}

func BenchmarkMergeFull1000x20(b *testing.B) {
	_, parts := bigRing(b)
	b.ReportMetric(float64(len(parts)), "datagrams")
	for b.Loop() {
		r := New(netip.Prefix{})
		for _, p := range parts {
			d, err := ParseDelta(p)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := r.Merge(d, nil); err != nil {
				b.Fatal(err)
			}
		}
		if len(r.tokens) != 20_000 {
			b.Fatalf("got %d tokens", len(r.tokens))
		}
	}
}

func BenchmarkMergeFullAgain1000x20(b *testing.B) {
	r, parts := bigRing(b)
	for b.Loop() {
		for _, p := range parts {
			d, _ := ParseDelta(p)
			r.Merge(d, nil)
		}
	}
}

func BenchmarkMergeDelta1000x20(b *testing.B) {
	r, _ := bigRing(b)
	rng := rand.New(rand.NewPCG(1, 1))
	size := 0
	for b.Loop() {
		s := r.segment(rng.IntN(len(r.tokens)))
		mid := s.Start + (s.Len()+1)/2
		d, err := r.Grant(s.Owner, s.Start, mid, r.ids[1+rng.IntN(1000)])
		if err != nil {
			b.Fatal(err)
		}
		wire := d.Append(nil)
		size = max(size, len(wire))
		d, err = ParseDelta(wire)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := r.Merge(d, nil); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(size), "bytes/grant")
}

func BenchmarkItems1000x20(b *testing.B) {
	r, _ := bigRing(b)
	for b.Loop() {
		r.Items()
	}
}
