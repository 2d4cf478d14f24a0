// Package ring says who owns which part of the address range. It is pure: no I/O, no clock, no lock.
//
// # What it is
//
// A Ring gives every address of the range, counted as an offset from its first one, an owner and a
// stamp. Neighbouring addresses with the same owner and stamp form a token: {start, owner, stamp}, which
// reaches to the next token. The tokens are sorted and the first one starts at 0, so that they cover the
// range exactly and no address ever has two owners in one view.
//
// Two views merge address by address: the higher stamp wins. Stamps are totally ordered, so merging is
// commutative, associative and idempotent whatever is merged and however it was cut into deltas.
// Beside the tokens the ring holds its members: grow-only facts that merge by union. A segment implies that
// its owner is a member.
//
// # Who may write
//
// A stamp is {epoch, count, by}. Only the owner of an address writes it, with its epoch kept and its
// count raised by one (a grant); so within one epoch no two writers ever compete. Only a takeover raises
// the epoch: it beats everything that the former owner may have written meanwhile, known or not. That
// takeovers do not compete either is the allocator's business; package ipam has the argument.
//
// # Fences
//
// A member that was declared lost is fenced, for ever. From when a peer has told the one who takes over
// what it knows of the lost member's addresses, they are frozen in its view: only a takeover changes them.
// Which owners are frozen the caller of Merge says.
package ring

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"sort"

	"meshd/mesh"
)

// ID names an owner: a peer and one life of its state. A peer whose state was lost, or whose space was
// taken over, carries on under a new life. The zero ID is nobody.
type ID struct {
	Peer mesh.PeerName
	Life uint32
}

// IsZero reports whether it names nobody.
func (id ID) IsZero() bool { return id == ID{} }

// Compare orders by name, then life.
func (id ID) Compare(o ID) int {
	return cmp.Or(id.Peer.Compare(o.Peer), cmp.Compare(id.Life, o.Life))
}

func (id ID) String() string { return fmt.Sprintf("%s/%08x", id.Peer, id.Life) }

// Segment is a run of addresses [Start, End), as offsets, with one owner and one stamp.
type Segment struct {
	Start, End uint64
	Owner      ID
	Epoch      uint32 // raised by takeovers; 1 at the founding
	Count      uint32 // raised by grants
	By         ID     // who wrote it
}

// Len is the number of addresses.
func (s Segment) Len() uint64 { return s.End - s.Start }

// Flags of a member; each is set once and stays.
type Flags byte

const (
	Joined Flags = 1 << iota // it may own addresses
	Seen                     // it has started (a seed is named before anybody has seen it)
	Left                     // it gave its addresses away and left, by its own decision
)

// Member is what is known of an ID.
type Member struct {
	ID     ID
	Flags  Flags
	Fences []ID // who declared it lost; sorted, never changed in place. Not empty: it is fenced
}

// Fenced reports whether it was declared lost.
func (m Member) Fenced() bool { return len(m.Fences) > 0 }

// Active reports whether it counts as a member: joined, and neither left nor fenced.
func (m Member) Active() bool { return m.Flags&(Joined|Left) == Joined && !m.Fenced() }

// Errors of Merge; none of them changes the ring.
var (
	ErrOtherCluster = errors.New("another cluster")
	ErrOtherRange   = errors.New("another range")
	ErrMalformed    = errors.New("malformed delta")
)

// Bounds on what peers can make us keep.
const (
	maxIDs       = 1 << 17
	maxFences    = 1 << 10
	maxConflicts = 16
	maxHostBits  = 62 // so that an offset and a size always fit an int64
)

// Conflict is a place where two contents bore the same epoch and count. The merge picked one of them,
// the same everywhere; it means that a disk was put back to an earlier state, or that two parts of a
// cluster declared each other lost.
type Conflict struct{ Kept, Dropped Segment }

type token struct {
	start        uint64
	owner, by    uint32 // index in ids
	epoch, count uint32
}

func (t token) same(o token) bool {
	return t.owner == o.owner && t.by == o.by && t.epoch == o.epoch && t.count == o.count
}

// Ring is one view of the range. It is not safe for concurrent use.
type Ring struct {
	rng       netip.Prefix
	size      uint64
	cluster   uint64
	successor uint64

	tokens  []token // sorted by start, the first at 0, neighbours differ
	ids     []ID    // ids[0] is nobody
	index   map[ID]uint32
	members map[ID]*Member

	gen       uint64 // of everything
	memberGen uint64 // of the members
	conflicts []Conflict
	dirty     map[uint64]struct{} // starts of tokens that came, went or changed
	dirtyIDs  map[ID]struct{}     // members that changed

	// What was computed of the rest, and at which generation (of the members, but for items).
	digest    uint64 // of the members
	digestGen uint64
	sorted    []Member
	sortedGen uint64
	items     []mesh.Item
	itemsGen  uint64
}

// CheckRange says why a prefix cannot be a range, or nil.
func CheckRange(rng netip.Prefix) error {
	switch bits := rng.Addr().BitLen() - rng.Bits(); {
	case !rng.IsValid():
		return errors.New("not an address range")
	case rng != rng.Masked():
		return fmt.Errorf("range %s has host bits: did you mean %s?", rng, rng.Masked())
	case bits < 2:
		return fmt.Errorf("range %s is smaller than 4 addresses", rng)
	case bits > maxHostBits:
		return fmt.Errorf("range %s is larger than 2^%d addresses", rng, maxHostBits)
	}
	return nil
}

// New returns a ring over the range in which nobody owns anything and no cluster is known. With the
// zero prefix it takes the range and cluster of the first delta, to pass on what it does not use.
func New(rng netip.Prefix) *Ring {
	r := &Ring{ids: []ID{{}}, index: map[ID]uint32{{}: 0}, members: make(map[ID]*Member),
		dirty: make(map[uint64]struct{}), dirtyIDs: make(map[ID]struct{})}
	if rng.IsValid() {
		r.setRange(rng)
	}
	return r
}

// Reset forgets everything but the range and goes on as an empty view of another cluster.
func (r *Ring) Reset(cluster uint64) {
	for _, t := range r.tokens {
		r.dirty[t.start] = struct{}{}
	}
	for id := range r.members {
		r.dirtyIDs[id] = struct{}{}
	}
	r.cluster, r.successor = cluster, 0
	r.tokens, r.ids, r.index = []token{{}}, []ID{{}}, map[ID]uint32{{}: 0}
	r.members, r.conflicts = make(map[ID]*Member), nil
	r.gen++
	r.memberGen++
}

func (r *Ring) setRange(rng netip.Prefix) {
	r.rng, r.size = rng, Size(rng)
	r.tokens = []token{{}}
}

// Size is the number of addresses of a prefix with at most 2^62 of them.
func Size(p netip.Prefix) uint64 { return 1 << min(p.Addr().BitLen()-p.Bits(), maxHostBits) }

// Range is the prefix that the ring covers.
func (r *Ring) Range() netip.Prefix { return r.rng }

// Size is the number of addresses in the range.
func (r *Ring) Size() uint64 { return r.size }

// Cluster is the id made at the founding; zero before it is known.
func (r *Ring) Cluster() uint64 { return r.cluster }

// Successor is the cluster that this one is to give way to; normally zero.
func (r *Ring) Successor() uint64 { return r.successor }

// Generation grows with every change.
func (r *Ring) Generation() uint64 { return r.gen }

// Conflicts returns the last few conflicts.
func (r *Ring) Conflicts() []Conflict { return slices.Clone(r.conflicts) }

// Offset is the place of addr in the range.
func (r *Ring) Offset(addr netip.Addr) (uint64, bool) {
	if !r.rng.IsValid() || !r.rng.Contains(addr) {
		return 0, false
	}
	a, b := addr.As16(), r.rng.Addr().As16()
	return binary.BigEndian.Uint64(a[8:]) - binary.BigEndian.Uint64(b[8:]), true
}

// Addr is the address at an offset below Size.
func (r *Ring) Addr(off uint64) netip.Addr {
	b := r.rng.Addr().As16()
	binary.BigEndian.PutUint64(b[8:], binary.BigEndian.Uint64(b[8:])+off)
	if r.rng.Addr().Is4() {
		return netip.AddrFrom16(b).Unmap()
	}
	return netip.AddrFrom16(b)
}

// end is where token i ends.
func (r *Ring) end(i int) uint64 {
	if i+1 < len(r.tokens) {
		return r.tokens[i+1].start
	}
	return r.size
}

// at is the index of the token that holds an offset below size.
func (r *Ring) at(off uint64) int {
	return sort.Search(len(r.tokens), func(i int) bool { return r.tokens[i].start > off }) - 1
}

func (r *Ring) segment(i int) Segment {
	t := r.tokens[i]
	return Segment{t.start, r.end(i), r.ids[t.owner], t.epoch, t.count, r.ids[t.by]}
}

// At returns the segment that holds an offset; its owner is zero if nobody is known to own it.
func (r *Ring) At(off uint64) Segment {
	if off >= r.size {
		return Segment{}
	}
	return r.segment(r.at(off))
}

// Segments calls yield for the segments that overlap [lo, hi), in order, cut to it.
func (r *Ring) Segments(lo, hi uint64, yield func(Segment) bool) {
	hi = min(hi, r.size)
	if lo >= hi {
		return
	}
	for i := r.at(lo); i < len(r.tokens) && r.tokens[i].start < hi; i++ {
		s := r.segment(i)
		s.Start, s.End = max(s.Start, lo), min(s.End, hi)
		if !yield(s) {
			return
		}
	}
}

// Owned returns what an ID owns, in order.
func (r *Ring) Owned(id ID) []Segment {
	var out []Segment
	if n, ok := r.index[id]; ok {
		for i := range r.tokens {
			if r.tokens[i].owner == n {
				out = append(out, r.segment(i))
			}
		}
	}
	return out
}

// Owners returns how many addresses of [lo, hi) each owner has, nobody included.
func (r *Ring) Owners(lo, hi uint64) map[ID]uint64 {
	counts := make([]uint64, len(r.ids))
	if hi = min(hi, r.size); lo < hi {
		for i := r.at(lo); i < len(r.tokens) && r.tokens[i].start < hi; i++ {
			counts[r.tokens[i].owner] += min(r.end(i), hi) - max(r.tokens[i].start, lo)
		}
	}
	out := make(map[ID]uint64)
	for n, c := range counts {
		if c > 0 {
			out[r.ids[n]] = c
		}
	}
	return out
}

// Unowned is how many addresses belong to nobody as far as this view goes: somewhere, somebody knows better.
func (r *Ring) Unowned() (n uint64) {
	for i, t := range r.tokens {
		if t.owner == 0 {
			n += r.end(i) - t.start
		}
	}
	return n
}

// Member returns what is known of an ID.
func (r *Ring) Member(id ID) Member {
	if m := r.members[id]; m != nil {
		return *m
	}
	return Member{ID: id}
}

// Fenced reports whether an ID was declared lost.
func (r *Ring) Fenced(id ID) bool {
	m := r.members[id]
	return m != nil && m.Fenced()
}

// Members returns all members, sorted. The slice is shared until the next change: nobody may write to it.
func (r *Ring) Members() []Member {
	if r.sorted == nil || r.sortedGen != r.memberGen {
		out := make([]Member, 0, len(r.members))
		for _, m := range r.members {
			out = append(out, *m)
		}
		slices.SortFunc(out, func(a, b Member) int { return a.ID.Compare(b.ID) })
		r.sorted, r.sortedGen = out, r.memberGen
	}
	return r.sorted
}

// Founding is the delta that founds a cluster: the range divided among the members at CIDR boundaries,
// as evenly as powers of two allow. It is the same wherever it is computed.
func Founding(rng netip.Prefix, cluster uint64, members []ID, flags Flags, by ID) Delta {
	ids := slices.Clone(members)
	slices.SortFunc(ids, ID.Compare)
	ids = slices.Compact(ids)
	d := Delta{Cluster: cluster, Range: rng}
	for _, id := range ids {
		d.Members = append(d.Members, Member{ID: id, Flags: Joined | flags})
	}
	var split func(start, size uint64, ids []ID)
	split = func(start, size uint64, ids []ID) {
		if len(ids) == 1 || size == 1 {
			d.Segments = append(d.Segments, Segment{start, start + size, ids[0], 1, 1, by})
			return
		}
		n := (len(ids) + 1) / 2
		split(start, size/2, ids[:n])
		split(start+size/2, size/2, ids[n:])
	}
	split(0, Size(rng), ids)
	return d
}

// Grant is the delta by which from gives [start, end), all of which it must own, to another.
func (r *Ring) Grant(from ID, start, end uint64, to ID) (Delta, error) {
	d := Delta{Cluster: r.cluster, Range: r.rng}
	if start >= end || end > r.size {
		return d, fmt.Errorf("grant of [%d, %d) in a range of %d", start, end, r.size)
	}
	var err error
	r.Segments(start, end, func(s Segment) bool {
		if s.Owner != from {
			err = fmt.Errorf("grant of [%d, %d): [%d, %d) belongs to %s", start, end, s.Start, s.End, s.Owner)
		} else if s.Count == math.MaxUint32 {
			err = errors.New("grant: no higher stamp is left")
		}
		d.Segments = append(d.Segments, Segment{s.Start, s.End, to, s.Epoch, s.Count + 1, from})
		return err == nil
	})
	return d, err
}

// Takeover is the delta by which one member takes all that another, fenced one owns in this view. Each
// fenced colleague who had declared it lost as well may have finished a takeover that nobody has heard
// of; so the epoch rises by one more for each of them, and this takeover wins.
func (r *Ring) Takeover(of, by ID) Delta {
	d := Delta{Cluster: r.cluster, Range: r.rng}
	rise := uint32(1)
	for _, id := range r.Member(of).Fences {
		if r.Fenced(id) {
			rise++
		}
	}
	for _, s := range r.Owned(of) {
		if s.Epoch <= math.MaxUint32-rise {
			d.Segments = append(d.Segments, Segment{s.Start, s.End, by, s.Epoch + rise, s.Count, by})
		}
	}
	return d
}

// Fill is the delta by which one member takes all that nobody owns in this view. It beats the founding.
func (r *Ring) Fill(by ID) Delta {
	d := Delta{Cluster: r.cluster, Range: r.rng, Members: []Member{{ID: by, Flags: Joined | Seen}}}
	for _, s := range r.Owned(ID{}) {
		d.Segments = append(d.Segments, Segment{s.Start, s.End, by, 2, 1, by})
	}
	return d
}

// Digest stands for what an ID owns in this view: equal digests, equal tokens.
func (r *Ring) Digest(id ID) uint64 {
	h := newHash('d')
	if n, ok := r.index[id]; ok {
		for i := range r.tokens {
			if r.tokens[i].owner == n {
				h = r.hashToken(h, i)
			}
		}
	}
	return h.sum()
}

// MembersDigest stands for the members and their flags and fences in this view.
func (r *Ring) MembersDigest() uint64 {
	if r.digestGen != r.memberGen {
		r.digest, r.digestGen = 0, r.memberGen
		for _, m := range r.members {
			r.digest += hashMember(*m).sum() // the order of the map must not matter
		}
	}
	return r.digest
}
