package ring

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"net/netip"
	"slices"

	"meshd/mesh"
)

// A delta on the wire. Numbers of fixed size are big-endian, the others unsigned LEB128 (encoding/binary).
// Version rule: a reader refuses another version and ignores what follows the segments.
//
//	 0         1       2             10      11          11+A  (A: 4, or 16 if flag 2)
//	+---------+-------+-------------+-------+-----------+------------------------+-----+---------+----------+
//	| version | flags | cluster (8) | /bits | addr (A)  | successor (8) if flag 1 | ids | members | segments |
//	+---------+-------+-------------+-------+-----------+------------------------+-----+---------+----------+
//
//	ids       n, then n times: peer (6), life (4)
//	members   n, then n times: id (its number in ids), flags (1), fences f, f times: id
//	segments  n, then n times: gap since the end before, length - 1, owner id, epoch, count, by id
const (
	wireVersion   = 1
	flagSuccessor = 1
	flagIPv6      = 2
	fixedSize     = 1 + 1 + 8 + 1
	idSize        = 6 + 4
	countsSize    = 3 * 3 // three counts below 2^21
)

// Append appends the wire form of the delta.
func (d Delta) Append(b []byte) []byte {
	var flags byte
	if d.Successor != 0 {
		flags |= flagSuccessor
	}
	if d.Range.Addr().Is6() {
		flags |= flagIPv6
	}
	b = append(b, wireVersion, flags)
	b = binary.BigEndian.AppendUint64(b, d.Cluster)
	b = append(b, byte(d.Range.Bits()))
	b = append(b, d.Range.Addr().AsSlice()...)
	if d.Successor != 0 {
		b = binary.BigEndian.AppendUint64(b, d.Successor)
	}
	ids, number := d.ids()
	b = binary.AppendUvarint(b, uint64(len(ids)))
	for _, id := range ids {
		b = AppendID(b, id)
	}
	b = binary.AppendUvarint(b, uint64(len(d.Members)))
	for _, m := range d.Members {
		b = append(binary.AppendUvarint(b, number[m.ID]), byte(m.Flags))
		b = binary.AppendUvarint(b, uint64(len(m.Fences)))
		for _, f := range m.Fences {
			b = binary.AppendUvarint(b, number[f])
		}
	}
	b = binary.AppendUvarint(b, uint64(len(d.Segments)))
	end := uint64(0)
	for _, s := range d.Segments {
		for _, v := range [...]uint64{s.Start - end, s.End - s.Start - 1, number[s.Owner], uint64(s.Epoch), uint64(s.Count), number[s.By]} {
			b = binary.AppendUvarint(b, v)
		}
		end = s.End
	}
	return b
}

func (d Delta) ids() (ids []ID, number map[ID]uint64) {
	number = make(map[ID]uint64)
	add := func(id ID) {
		if _, ok := number[id]; !ok {
			number[id] = uint64(len(ids))
			ids = append(ids, id)
		}
	}
	for _, m := range d.Members {
		add(m.ID)
		for _, f := range m.Fences {
			add(f)
		}
	}
	for _, s := range d.Segments {
		add(s.Owner)
		add(s.By)
	}
	return ids, number
}

// AppendID appends the ten bytes of an ID.
func AppendID(b []byte, id ID) []byte {
	return binary.BigEndian.AppendUint32(append(b, id.Peer[:]...), id.Life)
}

// ParseID reads the first ten bytes of b, which must be there.
func ParseID(b []byte) ID {
	return ID{mesh.PeerName(b[:6]), binary.BigEndian.Uint32(b[6:])}
}

// reader takes bytes off the front; after the first shortage everything is zero and bad is set.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if r.bad || n > len(r.b) {
		r.bad = true
		return make([]byte, min(n, 16))
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.bad = true
		return 0
	}
	r.b = r.b[n:]
	return v
}

// count reads a count of things of at least size bytes each.
func (r *reader) count(size int) int {
	v := r.uvarint()
	if v > uint64(len(r.b)/size) {
		r.bad = true
		return 0
	}
	return int(v)
}

func (r *reader) u32() uint32 {
	v := r.uvarint()
	r.bad = r.bad || v > math.MaxUint32
	return uint32(v)
}

// ParseDelta reads what Append wrote. It allocates no more than a small multiple of len(b), and what it
// returns satisfies the order that Merge needs; Merge checks the rest.
func ParseDelta(b []byte) (Delta, error) {
	r := &reader{b: b}
	head := r.take(fixedSize)
	if r.bad {
		return Delta{}, fmt.Errorf("%w: %d bytes", ErrMalformed, len(b))
	}
	if head[0] != wireVersion {
		return Delta{}, fmt.Errorf("%w: version %d, this one knows %d", ErrMalformed, head[0], wireVersion)
	}
	d := Delta{Cluster: binary.BigEndian.Uint64(head[2:])}
	size := 4
	if head[1]&flagIPv6 != 0 {
		size = 16
	}
	addr, _ := netip.AddrFromSlice(r.take(size))
	d.Range = netip.PrefixFrom(addr, int(head[10]))
	if head[1]&flagSuccessor != 0 {
		d.Successor = binary.BigEndian.Uint64(r.take(8))
	}
	ids := make([]ID, r.count(idSize))
	for i := range ids {
		ids[i] = ParseID(r.take(idSize))
	}
	id := func() ID {
		v := r.uvarint()
		if v >= uint64(len(ids)) {
			r.bad = true
			return ID{}
		}
		return ids[v]
	}
	for range r.count(3) {
		m := Member{ID: id(), Flags: Flags(r.take(1)[0])}
		for range r.count(1) {
			m.Fences = append(m.Fences, id())
		}
		d.Members = append(d.Members, m)
	}
	if n := r.count(6); n > 0 {
		d.Segments = make([]Segment, 0, n)
		for end := uint64(0); n > 0 && !r.bad; n-- {
			gap, length := r.uvarint(), r.uvarint()
			s := Segment{Owner: id(), Epoch: r.u32(), Count: r.u32(), By: id()}
			if gap > 1<<maxHostBits-end || length > 1<<maxHostBits-end-gap-1 {
				r.bad = true
				break
			}
			s.Start = end + gap
			s.End = s.Start + length + 1
			end = s.End
			d.Segments = append(d.Segments, s)
		}
	}
	if r.bad {
		return Delta{}, fmt.Errorf("%w: cut short or out of bounds", ErrMalformed)
	}
	return d, nil
}

func uvarintLen(v uint64) int { return (bits.Len64(v|1) + 6) / 7 }

// Split cuts a delta into parts of at most limit bytes on the wire each; limit is at least 256. A member
// with too many fences for one part goes in several, which merge to the same.
func (d Delta) Split(limit int) [][]byte {
	var out [][]byte
	base := fixedSize + len(d.Range.Addr().AsSlice()) + 8 + countsSize
	part := Delta{Cluster: d.Cluster, Range: d.Range, Successor: d.Successor}
	size, seen, end := base, make(map[ID]bool), uint64(0)
	flush := func() {
		out = append(out, part.Append(nil))
		part = Delta{Cluster: d.Cluster, Range: d.Range}
		size, end = base, 0
		clear(seen)
	}
	room := func(n int, ids ...ID) {
		cost := func() int {
			c := n
			for _, id := range ids {
				c += 3 // its number, three bytes at most
				if !seen[id] {
					c += idSize
				}
			}
			return c
		}
		if size+cost() > limit && !part.Empty() {
			flush()
		}
		size += cost()
		for _, id := range ids {
			seen[id] = true
		}
	}
	for _, m := range d.Members {
		for first := true; first || len(m.Fences) > 0; first = false {
			n := min(len(m.Fences), 8)
			room(1+2, append([]ID{m.ID}, m.Fences[:n]...)...)
			part.Members = append(part.Members, Member{m.ID, m.Flags, m.Fences[:n]})
			m.Fences = m.Fences[n:]
		}
	}
	for _, s := range d.Segments {
		gap := uvarintLen(s.Start) // of the worst case, a part of its own
		if len(part.Segments) > 0 {
			gap = uvarintLen(s.Start - end)
		}
		room(gap+uvarintLen(s.Len())+uvarintLen(uint64(s.Epoch))+uvarintLen(uint64(s.Count)), s.Owner, s.By)
		part.Segments = append(part.Segments, s)
		end = s.End
	}
	if !part.Empty() {
		flush()
	}
	return out
}

// hash mixes words: the same on every peer, not meant against forgery.
type hash uint64

func newHash(kind byte) hash { return hash(14695981039346656037).word(uint64(kind)) }

func (h hash) word(v uint64) hash {
	h = (h ^ hash(v)) * 0x9e3779b97f4a7c15
	return h ^ h>>29
}

func (h hash) id(id ID) hash {
	var b [8]byte
	copy(b[:], id.Peer[:])
	return h.word(binary.BigEndian.Uint64(b[:])).word(uint64(id.Life))
}

func (h hash) sum() uint64 {
	v := uint64(h)
	v ^= v >> 33
	v *= 0xff51afd7ed558ccd // the finalizer of MurmurHash3
	v ^= v >> 33
	return v
}

func (r *Ring) hashToken(h hash, i int) hash {
	t := r.tokens[i]
	return h.word(t.start).word(r.end(i)).id(r.ids[t.owner]).word(uint64(t.epoch)<<32 | uint64(t.count)).id(r.ids[t.by])
}

func hashMember(m Member) hash {
	h := newHash('m').id(m.ID).word(uint64(m.Flags))
	for _, f := range m.Fences {
		h = h.id(f)
	}
	return h
}

func (r *Ring) tokenKey(i int) uint64 {
	return newHash('t').word(r.cluster).word(r.tokens[i].start).sum()
}
func (r *Ring) memberKey(id ID) uint64 {
	return newHash('k').word(r.cluster).id(id).sum()
}
func (r *Ring) successorKey() uint64 { return newHash('s').word(r.cluster).sum() }

// Items returns what stands for every entry of this view when two peers compare theirs.
func (r *Ring) Items() []mesh.Item {
	if r.cluster == 0 {
		return nil
	}
	if r.items == nil || r.itemsGen != r.gen {
		r.items, r.itemsGen = r.makeItems(), r.gen
	}
	return slices.Clone(r.items)
}

func (r *Ring) makeItems() []mesh.Item {
	out := make([]mesh.Item, 0, len(r.tokens)+len(r.members)+1)
	for i, t := range r.tokens {
		if t.owner != 0 {
			out = append(out, mesh.Item{Key: r.tokenKey(i), Version: r.hashToken(newHash('v').word(r.cluster), i).sum()})
		}
	}
	for _, m := range r.Members() {
		out = append(out, mesh.Item{Key: r.memberKey(m.ID), Version: hashMember(m).word(r.cluster).sum()})
	}
	if r.successor != 0 {
		out = append(out, mesh.Item{Key: r.successorKey(), Version: newHash('v').word(r.successor).sum()})
	}
	return out
}

// Select returns the entries with these keys, or all of them if keys is nil.
func (r *Ring) Select(keys []uint64) Delta {
	d := Delta{Cluster: r.cluster, Range: r.rng}
	want := func(uint64) bool { return true }
	if keys != nil {
		set := make(map[uint64]bool, len(keys))
		for _, k := range keys {
			set[k] = true
		}
		want = func(k uint64) bool { return set[k] }
	}
	for _, m := range r.Members() {
		if want(r.memberKey(m.ID)) {
			d.Members = append(d.Members, m)
		}
	}
	for i, t := range r.tokens {
		if t.owner != 0 && want(r.tokenKey(i)) {
			d.Segments = append(d.Segments, r.segment(i))
		}
	}
	if r.successor != 0 && want(r.successorKey()) {
		d.Successor = r.successor
	}
	return d
}
