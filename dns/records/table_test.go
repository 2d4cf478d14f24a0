package records

import (
	"bytes"
	"cmp"
	"crypto/sha512"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"meshd/mesh"
)

var t0 = time.Now()

// memStore is a Store in memory that can be told to fail.
type memStore struct {
	mu   sync.Mutex
	kv   map[string][]byte
	fail error
	puts int
}

func (s *memStore) Put(_ string, kv map[string][]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	s.puts++
	if s.kv == nil {
		s.kv = make(map[string][]byte)
	}
	for k, v := range kv {
		if v == nil {
			delete(s.kv, k)
		} else {
			s.kv[k] = v
		}
	}
	return nil
}

func (s *memStore) All(string) (map[string][]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.kv), nil
}

func (s *memStore) counts() (puts, records int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.puts, len(s.kv)
}

func peerN(n int) mesh.PeerName { return mesh.PeerName{4: byte(n >> 8), 5: byte(n)} }

// testKeys sign with a hash that everybody could compute; a peer's key is made of its name.
type testKeys mesh.PeerName

func keyOf(p mesh.PeerName) (key [32]byte) {
	copy(key[1:], p[:])
	key[0] = 7
	return key
}

func signWith(key [32]byte, msg []byte) [64]byte { return sha512.Sum512(append(key[:], msg...)) }

func (k testKeys) Sign(msg []byte) [64]byte { return signWith(keyOf(mesh.PeerName(k)), msg) }

func (testKeys) Verify(key [32]byte, msg []byte, sig [64]byte) bool { return signWith(key, msg) == sig }

func (testKeys) Key(p mesh.PeerName) ([32]byte, bool) { return keyOf(p), true }

func (testKeys) Bearer(key [32]byte) mesh.PeerName { return mesh.PeerName(key[1:7]) }

// sign signs rows as whom they are about.
func sign(recs ...record) {
	for _, rec := range recs {
		s := rec.seal()
		s.body = rec.appendRest(rec.appendKey(nil))
		var by [32]byte
		switch rec := rec.(type) {
		case *floor:
			by = keyOf(rec.peer)
		case *endpoint:
			by = keyOf(rec.peer)
		case *handmade:
			by = rec.key
		}
		s.sig = signWith(by, signed(nil, rec))
	}
}

func appendSigned(b []byte, rec record) []byte {
	sign(rec)
	return appendRow(b, rec)
}

func openTest(t testing.TB, n int, s Store) *Table {
	t.Helper()
	table, err := Open(Config{Self: peerN(n), Keys: testKeys(peerN(n)), Domain: "mesh.internal.", Store: s, Now: t0, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func endpointN(n int, names ...string) mesh.Endpoint {
	return mesh.Endpoint{
		Owner: fmt.Sprintf("%064x", n),
		MAC:   mesh.MAC{2, 0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)},
		Addrs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 32 + byte(n>>16), byte(n >> 8), byte(n)}), 12)},
		Names: names,
	}
}

// exchange makes tables alike, as digests would.
func exchange(t testing.TB, tables ...*Table) {
	t.Helper()
	for range 10 {
		quiet := true
		for _, a := range tables {
			a.Drain(1100)
			for _, b := range tables {
				if a == b {
					continue
				}
				for _, delta := range a.Encode(missing(a, b), 1100) {
					if _, err := b.Merge(a.self, delta); err != nil {
						t.Fatal(err)
					}
					quiet = false
				}
			}
		}
		if quiet {
			return
		}
	}
}

// missing returns the keys of what a has and b has not, or has otherwise.
func missing(a, b *Table) []uint64 {
	has := make(map[mesh.Item]bool)
	for _, it := range b.Items() {
		has[it] = true
	}
	var keys []uint64
	for _, it := range a.Items() {
		if !has[it] {
			keys = append(keys, it.Key)
		}
	}
	return keys
}

func sortedItems(t *Table) []mesh.Item {
	items := t.Items()
	slices.SortFunc(items, func(a, b mesh.Item) int { return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Version, b.Version)) })
	return items
}

// resolve looks a name up as the server does.
func resolve(t *Table, name string) []string {
	a := t.Find([]byte(WireName(name)))
	if a == nil {
		return nil
	}
	var out []string
	for _, v := range a.V4 {
		out = append(out, netip.AddrFrom4(v).String())
	}
	for _, v := range a.V6 {
		out = append(out, netip.AddrFrom16(v).String())
	}
	return out
}

func wantAddrs(t *testing.T, table *Table, name string, want ...string) {
	t.Helper()
	if got := resolve(table, name); !slices.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", name, got, want)
	}
}

func TestMergeLaws(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for round := range 2000 {
		var deltas [][]byte
		for range 2 + r.IntN(6) {
			var recs []record
			for range 1 + r.IntN(4) {
				recs = append(recs, randomRecord(r))
			}
			deltas = append(deltas, encodeAll(recs...))
		}
		ordered, shuffled, grouped := openTest(t, 9, nil), openTest(t, 9, nil), openTest(t, 9, nil)
		for _, d := range deltas {
			if _, err := ordered.Merge(peerN(1), d); err != nil {
				t.Fatal(err)
			}
		}
		// Another order, with repetitions.
		for _, i := range append(r.Perm(len(deltas)), r.Perm(len(deltas))...) {
			if _, err := shuffled.Merge(peerN(1), deltas[i]); err != nil {
				t.Fatal(err)
			}
		}
		// Another grouping: halves are joined elsewhere first, and only news travels on.
		for _, half := range [][][]byte{deltas[:len(deltas)/2], deltas[len(deltas)/2:]} {
			via := openTest(t, 8, nil)
			for _, d := range half {
				news, err := via.Merge(peerN(1), d)
				if err != nil {
					t.Fatal(err)
				}
				if news != nil {
					if _, err := grouped.Merge(peerN(8), news); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		want := sortedItems(ordered)
		if !slices.Equal(sortedItems(shuffled), want) {
			t.Fatalf("seed %d round %d: order matters", seed, round)
		}
		if !slices.Equal(sortedItems(grouped), want) {
			t.Fatalf("seed %d round %d: grouping matters", seed, round)
		}
		for _, d := range deltas {
			if news, _ := ordered.Merge(peerN(1), d); news != nil {
				t.Fatalf("seed %d round %d: repetition is news", seed, round)
			}
		}
		checkIndex(t, ordered)
		checkIndex(t, shuffled)
		if !reflect.DeepEqual(ordered.Entries(), shuffled.Entries()) || !reflect.DeepEqual(ordered.Endpoints(), grouped.Endpoints()) {
			t.Fatalf("seed %d round %d: same rows, other sight", seed, round)
		}
	}
}

// checkIndex compares what readers find with what the rows say, from scratch.
func checkIndex(t testing.TB, table *Table) {
	t.Helper()
	wantNames, wantAddrs := make(map[string][]string), make(map[netip.Addr]bool)
	for _, e := range table.Entries() {
		w := WireName(e.Name)
		wantNames[w] = append(wantNames[w], e.Addr.String())
	}
	table.mu.Lock()
	defer table.mu.Unlock()
	for i, r := range table.listed {
		if r.slot != i || table.items[i] != r.item {
			t.Fatalf("item %d is not that of its row", i)
		}
	}
	for _, r := range table.rows {
		for ; r != nil; r = r.next {
			for _, a := range table.viewLocked(r).addrs {
				wantAddrs[a] = true
			}
		}
	}
	names, addrs := 0, 0
	for i := range table.names.maps {
		if m := table.names.maps[i].Load(); m != nil {
			for w, a := range *m {
				var got []string
				for _, v := range a.V4 {
					got = append(got, netip.AddrFrom4(v).String())
				}
				for _, v := range a.V6 {
					got = append(got, netip.AddrFrom16(v).String())
				}
				slices.Sort(got)
				want := slices.Compact(slices.Sorted(slices.Values(wantNames[w])))
				if !slices.Equal(got, want) {
					t.Fatalf("index of %q: got %v, want %v", w, got, want)
				}
				below := 0
				for other := range wantNames {
					if len(other) > len(w) && strings.HasSuffix(other, w) {
						below++
					}
				}
				if a.children != below || len(got) == 0 && below == 0 && len(a.holders) == 0 {
					t.Fatalf("index of %q: %d below, want %d", w, a.children, below)
				}
				if len(got) > 0 {
					names++
				}
			}
		}
		if m := table.addrs.maps[i].Load(); m != nil {
			addrs += len(*m)
		}
	}
	if names != len(wantNames) || addrs != len(wantAddrs) {
		t.Fatalf("index: got %d names and %d addresses, want %d and %d", names, addrs, len(wantNames), len(wantAddrs))
	}
}

func TestAnnounceWithdraw(t *testing.T) {
	a, b := openTest(t, 1, nil), openTest(t, 2, nil)
	a.Announce(endpointN(1, "Web.mesh.internal", "x.y.mesh.internal.", "elsewhere.org."))
	exchange(t, a, b)
	for _, table := range []*Table{a, b} {
		wantAddrs(t, table, "web.mesh.internal.", "10.32.0.1")
		wantAddrs(t, table, "x.y.mesh.internal.", "10.32.0.1")
		wantAddrs(t, table, "elsewhere.org.")
		if got := table.Find([]byte(WireName("y.mesh.internal."))); got == nil || len(got.V4) != 0 {
			t.Errorf("a name between: got %v, want one without addresses", got)
		}
		if got := table.FindAddr(netip.MustParseAddr("10.32.0.1")); got == nil || got.Name != WireName("web.mesh.internal.") || !got.Endpoint {
			t.Errorf("reverse: got %+v", got)
		}
	}
	a.Drain(1100)
	a.Announce(endpointN(1, "web.mesh.internal.", "x.y.mesh.internal.", "elsewhere.org."))
	if d := a.Drain(1100); d != nil {
		t.Errorf("announcing the same again sends %q", d)
	}
	a.Withdraw(endpointN(1).Owner, endpointN(1).MAC)
	exchange(t, a, b)
	for _, table := range []*Table{a, b} {
		wantAddrs(t, table, "web.mesh.internal.")
		if table.Find([]byte(WireName("y.mesh.internal."))) != nil || table.FindAddr(netip.MustParseAddr("10.32.0.1")) != nil {
			t.Error("something is left")
		}
		checkIndex(t, table)
	}
}

// An endpoint with more names than fit into one row is spread over several.
func TestManyNames(t *testing.T) {
	a, b := openTest(t, 1, nil), openTest(t, 2, nil)
	var last []Change
	b.OnChange(func(c []Change) { last = c })
	var names []string
	for i := range 100 {
		names = append(names, fmt.Sprintf("%s-%03d.mesh.internal.", strings.Repeat("n", 40), i))
	}
	ep := endpointN(1, names...)
	for i := range 20 {
		ep.Addrs = append(ep.Addrs, netip.MustParsePrefix(fmt.Sprintf("fd00::%x/64", i+1)))
	}
	a.Announce(ep)
	for _, d := range a.Drain(1100) {
		if len(d) > 1100 {
			t.Errorf("delta of %d bytes", len(d))
		}
	}
	exchange(t, a, b)
	got := b.Endpoints()
	ep.Peer = peerN(1)
	if len(got) != 1 || !reflect.DeepEqual(got[0], ep) {
		t.Fatalf("got %+v, want %+v", got, ep)
	}
	if len(last) == 0 || !reflect.DeepEqual(last[len(last)-1].Endpoint, ep) {
		t.Errorf("last change: got %+v", last)
	}
	ep.Names = names[:2]
	a.Announce(ep)
	exchange(t, a, b)
	if got := b.Endpoints(); len(got) != 1 || !reflect.DeepEqual(got[0], ep) {
		t.Errorf("shrunk: got %+v", got)
	}
	checkIndex(t, b)
}

// Any number of withdrawals leaves few tombstones, and what was withdrawn stays dead for a peer that
// was away meanwhile, however long.
func TestFloor(t *testing.T) {
	a, b, away := openTest(t, 1, nil), openTest(t, 2, nil), openTest(t, 3, nil)
	for i := range 50 {
		a.Announce(endpointN(i, fmt.Sprintf("keep%d.mesh.internal.", i)))
	}
	for i := 100; i < 150; i++ {
		a.Announce(endpointN(i, fmt.Sprintf("old%d.mesh.internal.", i)))
	}
	a.Settle()
	exchange(t, a, b, away)
	for i := 100; i < 150; i++ {
		a.Withdraw(endpointN(i).Owner, endpointN(i).MAC)
	}
	for i := 1000; i < 11_000; i++ {
		a.Announce(endpointN(i, "churn.mesh.internal."))
		a.Withdraw(endpointN(i).Owner, endpointN(i).MAC)
		if i%50 == 0 {
			exchange(t, a, b)
		}
	}
	for range 2 {
		exchange(t, a, b)
		for _, table := range []*Table{a, b} {
			if s := table.Stats(); s.Tombstones > ownTombstones+50+2 {
				t.Errorf("%d tombstones", s.Tombstones)
			}
		}
	}
	exchange(t, away, b) // not with a itself
	exchange(t, a, b, away)
	for _, table := range []*Table{b, away} {
		if got := table.Endpoints(); len(got) != 50 {
			t.Errorf("got %d endpoints, want 50", len(got))
		}
		if !slices.Equal(sortedItems(table), sortedItems(a)) {
			t.Error("tables differ")
		}
		checkIndex(t, table)
	}
}

// A new run ends what the former one announced, once it has settled, and does not interrupt what it
// announces again.
func TestRestart(t *testing.T) {
	for _, disk := range []string{"kept", "lost"} {
		t.Run(disk, func(t *testing.T) {
			store := &memStore{}
			a, b, c := openTest(t, 1, store), openTest(t, 2, nil), openTest(t, 3, nil)
			for i := range 20 { // a sequence that the new run is far from
				a.Announce(endpointN(7, fmt.Sprintf("was%d.mesh.internal.", i)))
			}
			a.Announce(endpointN(1, "stays.mesh.internal."))
			a.Announce(endpointN(2, "goes.mesh.internal."))
			a.Settle()
			exchange(t, a, b, c)

			if disk == "lost" {
				store = nil
			}
			var s Store
			if store != nil {
				s = store
			}
			again := openTest(t, 1, s)
			again.Announce(endpointN(1, "stays.mesh.internal."))
			seen := true
			b.OnChange(func([]Change) { seen = seen && resolve(b, "stays.mesh.internal.") != nil })
			exchange(t, again, b) // c hears from b
			wantAddrs(t, b, "goes.mesh.internal.", "10.32.0.2")
			again.Settle()
			exchange(t, again, b)
			again.Expire(t0.Add(2 * time.Second))
			exchange(t, again, b)
			exchange(t, b, c)
			for _, table := range []*Table{again, b, c} {
				wantAddrs(t, table, "stays.mesh.internal.", "10.32.0.1")
				wantAddrs(t, table, "goes.mesh.internal.")
				wantAddrs(t, table, "was19.mesh.internal.")
				checkIndex(t, table)
			}
			if !seen {
				t.Error("the name that stays was away for a moment")
			}
			again.Withdraw(endpointN(1).Owner, endpointN(1).MAC)
			exchange(t, again, b)
			wantAddrs(t, b, "stays.mesh.internal.")
		})
	}
}

// A restarted peer that does not announce anything again settles by itself.
func TestSettlesByItself(t *testing.T) {
	store := &memStore{}
	a, b := openTest(t, 1, store), openTest(t, 2, nil)
	a.Announce(endpointN(1, "web.mesh.internal."))
	exchange(t, a, b)
	again := openTest(t, 1, store)
	again.Expire(t0.Add(settleAfter - time.Second))
	exchange(t, again, b)
	wantAddrs(t, b, "web.mesh.internal.", "10.32.0.1")
	again.Expire(t0.Add(settleAfter))
	exchange(t, again, b)
	wantAddrs(t, b, "web.mesh.internal.")
}

func TestPeerStates(t *testing.T) {
	a, b, c := openTest(t, 1, nil), openTest(t, 2, nil), openTest(t, 3, nil)
	a.Announce(endpointN(1, "web.mesh.internal."))
	b.Announce(endpointN(2, "web.mesh.internal."))
	if err := a.AddName(endpointN(1).Owner, "hand.mesh.internal", []netip.Addr{netip.MustParseAddr("192.0.2.1")}); err != nil {
		t.Fatal(err)
	}
	exchange(t, a, b, c)
	c.SetPeerState(peerN(1), Suspect)
	if got := c.Find([]byte(WireName("web.mesh.internal."))); got == nil || got.Live4 != 1 || got.V4[0] != [4]byte{10, 32, 0, 2} || got.V4[1] != [4]byte{10, 32, 0, 1} {
		t.Errorf("suspect: got %+v, want its address last", got)
	}
	if got := c.Find([]byte(WireName("hand.mesh.internal."))); got == nil || got.Live4 != 0 || len(got.V4) != 1 {
		t.Errorf("suspect: got %+v", got)
	}
	var down int
	c.OnChange(func(cs []Change) {
		for _, ch := range cs {
			if !ch.Up {
				down++
			}
		}
	})
	c.SetPeerState(peerN(1), Gone)
	wantAddrs(t, c, "web.mesh.internal.", "10.32.0.2")
	wantAddrs(t, c, "hand.mesh.internal.")
	if down != 1 {
		t.Errorf("told of %d endpoints that went, want 1", down)
	}
	exchange(t, b, c) // b does not know yet, and offers them
	wantAddrs(t, c, "web.mesh.internal.", "10.32.0.2")
	c.SetPeerState(peerN(1), Alive)
	exchange(t, a, c)
	wantAddrs(t, c, "web.mesh.internal.", "10.32.0.1", "10.32.0.2")
	wantAddrs(t, c, "hand.mesh.internal.", "192.0.2.1")
	for _, table := range []*Table{a, b, c} {
		checkIndex(t, table)
	}
}

// Rows of a peer that nobody ever vouched for do not stay for ever.
func TestStranger(t *testing.T) {
	a, b := openTest(t, 1, nil), openTest(t, 2, nil)
	a.Announce(endpointN(1, "web.mesh.internal."))
	exchange(t, a, b)
	b.Expire(t0.Add(strangerAge))
	wantAddrs(t, b, "web.mesh.internal.", "10.32.0.1")
	b.Expire(t0.Add(strangerAge + time.Minute))
	wantAddrs(t, b, "web.mesh.internal.")
	b.SetPeerState(peerN(1), Alive)
	exchange(t, a, b)
	b.Expire(t0.Add(3 * strangerAge))
	wantAddrs(t, b, "web.mesh.internal.", "10.32.0.1")
}

func TestHandmade(t *testing.T) {
	sa, sb := &memStore{}, &memStore{}
	a, b := openTest(t, 1, sa), openTest(t, 2, sb)
	addrs := func(s ...string) (out []netip.Addr) {
		for _, x := range s {
			out = append(out, netip.MustParseAddr(x))
		}
		return out
	}
	for _, c := range []struct {
		name string
		want error
	}{{"web.other.org.", ErrDomain}, {"web", ErrDomain}, {"mesh.internal.", ErrDomain}, {"wéb.mesh.internal", ErrName}, {"a..mesh.internal", ErrName}} {
		if err := a.AddName("", c.name, addrs("10.0.0.1")); !errors.Is(err, c.want) {
			t.Errorf("AddName(%q): got %v, want %v", c.name, err, c.want)
		}
	}
	if err := a.AddName("", "db.mesh.internal", nil); err == nil {
		t.Error("no address: want an error")
	}
	if err := a.AddName("", "DB.mesh.internal", addrs("10.0.0.1", "fd00::1", "::ffff:10.0.0.2")); err != nil {
		t.Fatal(err)
	}
	exchange(t, a, b)
	if err := b.Flush(); err != nil {
		t.Fatal(err)
	}
	// The maker is lost, the other restarts: the record is there.
	b = openTest(t, 2, sb)
	b.SetPeerState(peerN(1), Gone)
	wantAddrs(t, b, "db.mesh.internal.", "10.0.0.1", "10.0.0.2", "fd00::1")
	// Another peer removes it while the maker is away.
	if n, err := b.RemoveName("", "", addrs("10.0.0.1")); n != 1 || err != nil {
		t.Errorf("RemoveName: got %d, %v, want 1", n, err)
	}
	if n, err := b.RemoveName("", "db.mesh.internal", nil); n != 2 || err != nil {
		t.Errorf("RemoveName: got %d, %v, want 2", n, err)
	}
	b = openTest(t, 2, sb)
	wantAddrs(t, b, "db.mesh.internal.")
	a = openTest(t, 1, sa)
	wantAddrs(t, a, "db.mesh.internal.", "10.0.0.1", "10.0.0.2", "fd00::1")
	exchange(t, a, b)
	wantAddrs(t, a, "db.mesh.internal.")
	// And back again.
	if err := a.AddName(mesh.OwnerExtern, "db.mesh.internal", addrs("10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	exchange(t, a, b)
	wantAddrs(t, b, "db.mesh.internal.", "10.0.0.1")

	sa.fail = errors.New("disk full")
	if err := a.AddName("", "full.mesh.internal", addrs("10.0.0.1")); !errors.Is(err, sa.fail) {
		t.Errorf("got %v, want %v", err, sa.fail)
	}
	wantAddrs(t, a, "full.mesh.internal.")
}

// Names for a container show as long as it is attached, and come back with it.
func TestHandmadeForContainer(t *testing.T) {
	a := openTest(t, 1, nil)
	ep := endpointN(1, "c.mesh.internal.")
	if err := a.AddName(ep.Owner, "alias.mesh.internal", []netip.Addr{ep.Addrs[0].Addr()}); !errors.Is(err, ErrNotAttached) {
		t.Errorf("got %v, want %v", err, ErrNotAttached)
	}
	a.Announce(ep)
	if got := a.Attached(ep.Owner); len(got) != 1 || got[0].MAC != ep.MAC {
		t.Errorf("attached: got %v", got)
	}
	if err := a.AddName(ep.Owner, "alias.mesh.internal", []netip.Addr{ep.Addrs[0].Addr()}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		a.Announce(ep)
		wantAddrs(t, a, "alias.mesh.internal.", "10.32.0.1")
		a.Withdraw(ep.Owner, ep.MAC)
		wantAddrs(t, a, "alias.mesh.internal.")
	}
	a.Announce(ep)
	if n, err := a.RemoveName(ep.Owner, "", nil); n != 2 || err != nil {
		t.Errorf("RemoveName: got %d, %v, want 2", n, err)
	}
	wantAddrs(t, a, "alias.mesh.internal.")
	wantAddrs(t, a, "c.mesh.internal.")
	if eps := a.Endpoints(); len(eps) != 1 || len(eps[0].Names) != 0 {
		t.Errorf("got %+v, want the endpoint without names", eps)
	}
	if err := a.AddName(ep.Owner, "alias.mesh.internal", []netip.Addr{ep.Addrs[0].Addr()}); err != nil {
		t.Fatal(err)
	}
	if err := a.ReleaseOwner(ep.Owner); err != nil {
		t.Fatal(err)
	}
	wantAddrs(t, a, "alias.mesh.internal.")
	checkIndex(t, a)
}

// A peer that lost its store and writes before it has heard from anybody means it.
func TestHandmadeEarly(t *testing.T) {
	a, b := openTest(t, 1, nil), openTest(t, 2, nil)
	addr := []netip.Addr{netip.MustParseAddr("10.0.0.1")}
	for range 5 {
		if err := b.AddName("", "x.mesh.internal", addr); err != nil {
			t.Fatal(err)
		}
		if _, err := b.RemoveName("", "x.mesh.internal", nil); err != nil {
			t.Fatal(err)
		}
	}
	b.Expire(t0.Add(time.Hour)) // it is no newcomer
	if _, err := b.Merge(peerN(3), encodeAll(&floor{peer: peerN(3)})); err != nil {
		t.Fatal(err)
	}
	b.Expire(t0.Add(2 * time.Hour))
	if err := a.AddName("", "x.mesh.internal", addr); err != nil {
		t.Fatal(err)
	}
	exchange(t, a, b)
	wantAddrs(t, a, "x.mesh.internal.", "10.0.0.1")
	wantAddrs(t, b, "x.mesh.internal.", "10.0.0.1")
}

// Tombstones of hand-made names outlive TombstoneAge of running time, restarts included, and then go
// everywhere without being handed round for ever.
func TestTombstoneAge(t *testing.T) {
	sa := &memStore{}
	a, b := openTest(t, 1, sa), openTest(t, 2, nil)
	addr := []netip.Addr{netip.MustParseAddr("10.0.0.1")}
	old := openTest(t, 3, nil) // has the record and sleeps
	if err := a.AddName("", "x.mesh.internal", addr); err != nil {
		t.Fatal(err)
	}
	exchange(t, a, b, old)
	if _, err := a.RemoveName("", "x.mesh.internal", nil); err != nil {
		t.Fatal(err)
	}
	exchange(t, a, b)
	now := t0.Add(TombstoneAge - time.Hour)
	a.Expire(now)
	b.Expire(now)
	a.unsaved[a.rows[missing(a, old)[0]]] = true // as if written now, with its age
	if err := a.Flush(); err != nil {
		t.Fatal(err)
	}
	a = openTest(t, 1, sa)
	exchange(t, a, b)
	fresh := openTest(t, 4, nil)
	exchange(t, fresh, b) // gets the tombstone with its age
	exchange(t, old, b)
	wantAddrs(t, old, "x.mesh.internal.")
	for _, table := range []*Table{a, fresh} {
		if got := table.Stats().Handmade; got != 1 {
			t.Errorf("got %d rows, want the tombstone", got)
		}
		table.Expire(t0.Add(3*time.Hour + time.Minute))
	}
	b.Expire(now.Add(3*time.Hour + time.Minute))
	exchange(t, a, b, fresh)
	for _, table := range []*Table{a, b, fresh} {
		if got := table.Stats().Handmade; got != 0 {
			t.Errorf("got %d rows, want none", got)
		}
	}
}

func TestBounds(t *testing.T) {
	table := openTest(t, 1, nil)
	delta := []byte{deltaVersion}
	for i := range maxHandmade + 100 {
		delta = appendSigned(delta, &handmade{addr: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), owner: "x",
			name: "a.mesh.internal.", clock: 1, key: keyOf(peerN(2)), gone: i%2 == 0})
	}
	if _, err := table.Merge(peerN(2), delta); err != nil {
		t.Fatal(err)
	}
	table.Expire(t0.Add(time.Second))
	if s := table.Stats(); s.Handmade > maxHandmade || s.Tombstones > maxHandmadeDead {
		t.Errorf("got %+v", s)
	}
	for i := range maxPeers + 100 {
		if _, err := table.Merge(peerN(2), encodeAll(&floor{peer: mesh.PeerName{1, 4: byte(i >> 8), 5: byte(i)}, ver: version{gen: 1}})); err != nil {
			t.Fatal(err)
		}
	}
	if len(table.peers) > maxPeers {
		t.Errorf("%d peers", len(table.peers))
	}
}

// Whoever claims to be us does not make us give in, nor spin.
func TestForgedSelf(t *testing.T) {
	a, b := openTest(t, 1, nil), openTest(t, 2, nil)
	a.Announce(endpointN(1, "web.mesh.internal."))
	a.Settle()
	exchange(t, a, b)
	for i := range 1000 {
		f := &floor{peer: peerN(1), ver: version{gen: uint64(i+10) << 32}}
		if _, err := a.Merge(peerN(3), encodeAll(f)); err != nil {
			t.Fatal(err)
		}
		if i == 500 {
			if _, err := b.Merge(peerN(3), encodeAll(f)); err != nil {
				t.Fatal(err)
			}
			wantAddrs(t, b, "web.mesh.internal.")
		}
	}
	if got := a.gen >> 32; got > 20 {
		t.Errorf("generation %d: went along with every claim", got)
	}
	a.Expire(t0.Add(time.Second))
	exchange(t, a, b)
	wantAddrs(t, a, "web.mesh.internal.", "10.32.0.1")
	wantAddrs(t, b, "web.mesh.internal.", "10.32.0.1")
}

// Subscribers that apply all changes in order hold what Endpoints returns.
func TestOnChangeIsComplete(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	table := openTest(t, 1, nil)
	type key struct {
		peer  mesh.PeerName
		owner string
		mac   mesh.MAC
	}
	got := make(map[key]mesh.Endpoint)
	table.Announce(endpointN(1, "first.mesh.internal."))
	table.OnChange(func(cs []Change) {
		for _, c := range cs {
			k := key{c.Endpoint.Peer, c.Endpoint.Owner, c.Endpoint.MAC}
			if c.Up {
				got[k] = c.Endpoint
			} else {
				delete(got, k)
			}
		}
	})
	for range 5000 {
		switch r.IntN(6) {
		case 0:
			table.Announce(endpointN(r.IntN(5), []string{"a.mesh.internal.", "b.mesh.internal."}[r.IntN(2)]))
		case 1:
			ep := endpointN(r.IntN(5))
			table.Withdraw(ep.Owner, ep.MAC)
		case 2:
			table.SetPeerState(peerN(1+r.IntN(3)), PeerState(r.IntN(3)))
		default:
			if _, err := table.Merge(peerN(2), encodeAll(randomRecord(r), randomRecord(r))); err != nil {
				t.Fatal(err)
			}
		}
		want := table.Endpoints()
		if len(want) != len(got) {
			t.Fatalf("seed %d: got %d endpoints, want %d", seed, len(got), len(want))
		}
		for _, ep := range want {
			if !reflect.DeepEqual(got[key{ep.Peer, ep.Owner, ep.MAC}], ep) {
				t.Fatalf("seed %d: got %+v, want %+v", seed, got[key{ep.Peer, ep.Owner, ep.MAC}], ep)
			}
		}
	}
	checkIndex(t, table)
}

// A subscriber may call back into the table.
func TestOnChangeReentrant(t *testing.T) {
	table := openTest(t, 1, nil)
	calls := 0
	table.OnChange(func(cs []Change) {
		if calls++; calls == 1 {
			table.Announce(endpointN(2))
		}
	})
	table.Announce(endpointN(1))
	if calls != 2 {
		t.Errorf("got %d calls, want 2", calls)
	}
}

func TestStoreDamage(t *testing.T) {
	s := &memStore{kv: map[string][]byte{"row/x": []byte("\x03\x05"), "generation": {1, 2}}}
	if _, err := Open(Config{Self: peerN(1), Domain: "m.", Store: s, Now: t0}); err == nil {
		t.Error("a damaged generation: want an error")
	}
	delete(s.kv, "generation")
	var out bytes.Buffer
	if _, err := Open(Config{Self: peerN(1), Domain: "m.", Store: s, Now: t0, Log: slog.New(slog.NewTextHandler(&out, nil))}); err != nil || !strings.Contains(out.String(), "not understood") {
		t.Errorf("a damaged row: got %v, %q", err, out.String())
	}
}
