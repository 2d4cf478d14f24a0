package records

import (
	"bytes"
	"cmp"
	"hash/maphash"
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"
)

// Answer is what a name stands for. It never changes once published: a change publishes another one.
type Answer struct {
	V4 [][4]byte  // addresses of endpoints whose peer answers first, then those of suspected peers
	V6 [][16]byte // likewise
	// How many of V4 and V6, from the start, belong to peers that are not suspected.
	Live4, Live6 int

	holders  []*row // rows that carry this name
	children int    // names held below this one, which makes it exist without addresses (RFC 8020)
}

// Reverse is what an address stands for.
type Reverse struct {
	Name     string // wire form of the name that PTR answers with; empty if none lies in the domain
	Endpoint bool   // an endpoint has this address, not only a name made by hand

	holders []*row
}

// shardCount bounds what a change copies: with 10,000 names a shard holds ten.
const shardCount = 1024

// shards maps K to an immutable V. Reading takes no lock; writers are serialised by the table's.
type shards[V any] struct {
	seed maphash.Seed
	maps [shardCount]atomic.Pointer[map[string]*V]
}

// find allocates nothing: key may be a piece of a message.
func (s *shards[V]) find(key []byte) *V {
	m := s.maps[maphash.Bytes(s.seed, key)%shardCount].Load()
	if m == nil {
		return nil
	}
	return (*m)[string(key)]
}

func (s *shards[V]) get(key string) *V {
	m := s.maps[maphash.String(s.seed, key)%shardCount].Load()
	if m == nil {
		return nil
	}
	return (*m)[key]
}

// set publishes v under key; nil deletes.
func (s *shards[V]) set(key string, v *V) {
	p := &s.maps[maphash.String(s.seed, key)%shardCount]
	var next map[string]*V
	if old := p.Load(); old != nil {
		next = maps.Clone(*old)
	} else {
		next = make(map[string]*V)
	}
	if v == nil {
		delete(next, key)
	} else {
		next[key] = v
	}
	p.Store(&next)
}

// Find returns the answer for a lower-case wire name, or nil. It takes no lock and allocates nothing.
func (t *Table) Find(wire []byte) *Answer { return t.names.find(wire) }

// FindAddr returns what is known of an address, or nil. It takes no lock and allocates nothing.
func (t *Table) FindAddr(a netip.Addr) *Reverse {
	b := a.As16()
	return t.addrs.find(b[:])
}

func addrKey(a netip.Addr) string {
	b := a.As16()
	return string(b[:])
}

// view is what a row contributes to the index.
type view struct {
	names []string // in the domain
	addrs []netip.Addr
}

// viewLocked says what row r shows just now.
func (t *Table) viewLocked(r *row) (v view) {
	switch rec := r.rec.(type) {
	case *endpoint:
		if rec.gone {
			return v
		}
		for _, n := range rec.names {
			if inDomain(n, t.domain) {
				v.names = append(v.names, n)
			}
		}
		v.addrs = make([]netip.Addr, len(rec.addrs))
		for i, p := range rec.addrs {
			v.addrs[i] = p.Addr()
		}
	case *handmade:
		if rec.gone || !inDomain(rec.name, t.domain) || !t.ownerPresentLocked(rec.owner) {
			return v
		}
		v.names, v.addrs = []string{rec.name}, []netip.Addr{rec.addr}
	}
	return v
}

// suspectLocked reports whether all that r shows is on suspected peers.
func (t *Table) suspectLocked(r *row) bool {
	switch rec := r.rec.(type) {
	case *endpoint:
		return t.peers[rec.peer].state == Suspect
	case *handmade:
		o := t.owners[rec.owner]
		if o == nil || len(o.endpoints) == 0 {
			return false
		}
		return !slices.ContainsFunc(o.endpoints, func(e *row) bool { return !t.suspectLocked(e) })
	}
	return false
}

// reindexLocked brings the index up to date after row r changed what it shows from old to now.
// A name in both is republished once, so that no reader sees it missing between.
func (t *Table) reindexLocked(r *row, old, now view) {
	for _, n := range now.names {
		t.holdNameLocked(n, r, true)
	}
	for _, n := range old.names {
		if !slices.Contains(now.names, n) {
			t.holdNameLocked(n, r, false)
		}
	}
	for _, a := range now.addrs {
		t.holdAddrLocked(a, r, true)
	}
	for _, a := range old.addrs {
		if !slices.Contains(now.addrs, a) {
			t.holdAddrLocked(a, r, false)
		}
	}
}

// holdersWith returns a copy of holders with or without r; without any it is nil.
func holdersWith(holders []*row, r *row, held bool) []*row {
	i := slices.Index(holders, r)
	switch {
	case held && i < 0:
		return append(slices.Clip(holders), r)
	case !held && len(holders) == 1 && i == 0:
		return nil
	case !held && i >= 0:
		return slices.Delete(slices.Clone(holders), i, i+1)
	}
	return holders
}

func (t *Table) holdNameLocked(name string, r *row, held bool) {
	wire := WireName(name)
	old := t.names.get(wire)
	if old == nil {
		old = &Answer{}
	}
	next := &Answer{holders: holdersWith(old.holders, r, held), children: old.children}
	if len(next.holders) == 0 && next.children == 0 {
		t.names.set(wire, nil)
	} else {
		t.fillLocked(next)
		t.names.set(wire, next)
	}
	if (len(old.holders) == 0) != (len(next.holders) == 0) {
		t.countAncestorsLocked(wire, len(next.holders) > 0)
	}
}

// countAncestorsLocked makes the names between wire and the domain exist, or no longer.
func (t *Table) countAncestorsLocked(wire string, up bool) {
	for up1 := parentOf(wire); len(up1) > len(t.wireDomain); up1 = parentOf(up1) {
		next := Answer{}
		if old := t.names.get(up1); old != nil {
			next = *old
		}
		if up {
			next.children++
		} else {
			next.children--
		}
		if next.children == 0 && len(next.holders) == 0 {
			t.names.set(up1, nil)
		} else {
			t.names.set(up1, &next)
		}
	}
}

func parentOf(wire string) string { return wire[1+int(wire[0]):] }

// fillLocked collects the addresses of a's holders, each once, suspected peers' last.
func (t *Table) fillLocked(a *Answer) {
	var late4 [][4]byte
	var late6 [][16]byte
	for _, r := range a.holders {
		v4, v6 := &a.V4, &a.V6
		if t.suspectLocked(r) {
			v4, v6 = &late4, &late6
		}
		add := func(addr netip.Addr) {
			if addr.Is4() {
				*v4 = append(*v4, addr.As4())
			} else {
				*v6 = append(*v6, addr.As16())
			}
		}
		switch rec := r.rec.(type) {
		case *endpoint:
			for _, p := range rec.addrs {
				add(p.Addr())
			}
		case *handmade:
			add(rec.addr)
		}
	}
	a.V4, a.Live4 = join(a.V4, late4, func(x, y [4]byte) int { return bytes.Compare(x[:], y[:]) })
	a.V6, a.Live6 = join(a.V6, late6, func(x, y [16]byte) int { return bytes.Compare(x[:], y[:]) })
}

// join returns first and then what only late has, each once, and how many are of first.
func join[T any](first, late []T, compare func(x, y T) int) ([]T, int) {
	tidy := func(s []T) []T {
		slices.SortFunc(s, compare)
		return slices.CompactFunc(s, func(x, y T) bool { return compare(x, y) == 0 })
	}
	first = tidy(first)
	n := len(first)
	for _, x := range tidy(late) {
		if _, found := slices.BinarySearchFunc(first[:n], x, compare); !found {
			first = append(first, x)
		}
	}
	return first, n
}

func (t *Table) holdAddrLocked(addr netip.Addr, r *row, held bool) {
	key := addrKey(addr)
	var holders []*row
	if old := t.addrs.get(key); old != nil {
		holders = old.holders
	}
	next := &Reverse{holders: holdersWith(holders, r, held)}
	if len(next.holders) == 0 {
		t.addrs.set(key, nil)
		return
	}
	// The first name, in an order that all peers share: endpoints before hand-made, then by spelling.
	type candidate struct {
		rank int
		name string
	}
	var best *candidate
	for _, h := range next.holders {
		c := candidate{rank: 1}
		names := []string(nil)
		switch rec := h.rec.(type) {
		case *endpoint:
			c.rank, names, next.Endpoint = 0, rec.names, true
		case *handmade:
			names = []string{rec.name}
		}
		for _, n := range names {
			if !inDomain(n, t.domain) {
				continue
			}
			c.name = n
			if best == nil || cmp.Or(cmp.Compare(c.rank, best.rank), cmp.Compare(c.name, best.name)) < 0 {
				kept := c
				best = &kept
			}
			break // names of an endpoint are sorted
		}
	}
	if best != nil {
		next.Name = WireName(best.name)
	}
	t.addrs.set(key, next)
}
