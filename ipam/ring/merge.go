package ring

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// Delta is a part of a view, or a wish to change it: what peers exchange. Its segments are sorted and
// do not overlap.
type Delta struct {
	Cluster   uint64
	Range     netip.Prefix
	Successor uint64 // the cluster that this one gives way to; normally zero
	Members   []Member
	Segments  []Segment
}

// Empty reports whether it says nothing.
func (d Delta) Empty() bool { return len(d.Members) == 0 && len(d.Segments) == 0 && d.Successor == 0 }

// Accepts returns nil if a delta with this cluster and range may be merged, else one of the errors.
func (r *Ring) Accepts(cluster uint64, rng netip.Prefix) error {
	switch {
	case r.rng.IsValid() && rng != r.rng:
		return fmt.Errorf("%w: theirs is %s, ours %s", ErrOtherRange, rng, r.rng)
	case r.cluster != 0 && cluster != r.cluster:
		return fmt.Errorf("%w: theirs is %016x, ours %016x", ErrOtherCluster, cluster, r.cluster)
	}
	return nil
}

// Merge takes over from the delta whatever is newer, and returns just that. The first delta with a
// cluster founds this view. Addresses leave an owner that is frozen, says the caller, only by a takeover; a
// nil function freezes nobody.
func (r *Ring) Merge(d Delta, frozen func(owner ID) bool) (news Delta, err error) {
	if err := r.check(d); err != nil {
		return Delta{}, err
	}
	if !r.rng.IsValid() {
		r.setRange(d.Range)
	}
	if r.cluster == 0 && d.Cluster != 0 {
		r.cluster = d.Cluster
		r.gen++
	}
	news = Delta{Cluster: r.cluster, Range: r.rng}
	if d.Successor != 0 && (r.successor == 0 || d.Successor < r.successor) {
		r.successor, news.Successor = d.Successor, d.Successor
	}
	for _, m := range d.Members {
		if r.mergeMember(m) {
			news.Members = append(news.Members, m)
		}
	}
	// Who owns something is a member, also to those whom its joining has not reached, and whether or not its
	// segment wins: else all who know that it is one could be lost, and nobody could ever remove it.
	for i, s := range d.Segments {
		if i == 0 || s.Owner != d.Segments[i-1].Owner {
			if m := (Member{ID: s.Owner, Flags: Joined}); r.mergeMember(m) {
				news.Members = append(news.Members, m)
			}
		}
	}
	news.Segments = r.mergeSegments(d.Segments, frozen)
	if !news.Empty() {
		r.gen++
	}
	return news, nil
}

func (r *Ring) check(d Delta) error {
	if d.Cluster == 0 {
		return fmt.Errorf("%w: no cluster", ErrMalformed)
	}
	if err := CheckRange(d.Range); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if err := r.Accepts(d.Cluster, d.Range); err != nil {
		return err
	}
	size, last, fresh := Size(d.Range), uint64(0), 0
	count := func(id ID) {
		if _, known := r.index[id]; !known {
			fresh++
		}
	}
	for i, s := range d.Segments {
		if s.Start >= s.End || s.End > size || i > 0 && s.Start < last {
			return fmt.Errorf("%w: segments out of order or out of range", ErrMalformed)
		}
		if s.Owner.IsZero() || s.By.IsZero() || s.Epoch == 0 {
			return fmt.Errorf("%w: a segment of nobody", ErrMalformed)
		}
		last = s.End
		count(s.Owner)
		count(s.By)
		if r.members[s.Owner] == nil {
			fresh++
		}
	}
	for _, m := range d.Members {
		if r.members[m.ID] == nil {
			fresh++
		}
		if m.ID.IsZero() || len(m.Fences) > maxFences || slices.ContainsFunc(m.Fences, ID.IsZero) {
			return fmt.Errorf("%w: a member without a name", ErrMalformed)
		}
	}
	if fresh > 0 && len(r.ids)+len(r.members)+fresh > maxIDs {
		return fmt.Errorf("%w: more than %d members", ErrMalformed, maxIDs)
	}
	return nil
}

func (r *Ring) mergeMember(in Member) (changed bool) {
	m := r.members[in.ID]
	if m == nil {
		m = &Member{ID: in.ID}
		r.members[in.ID] = m
		changed = true
	}
	if in.Flags&^m.Flags != 0 {
		m.Flags |= in.Flags
		changed = true
	}
	for _, f := range in.Fences {
		if i, found := slices.BinarySearchFunc(m.Fences, f, ID.Compare); !found && len(m.Fences) < maxFences {
			m.Fences = slices.Insert(slices.Clone(m.Fences), i, f)
			changed = true
		}
	}
	if changed {
		r.memberGen++
		r.dirtyIDs[in.ID] = struct{}{}
	}
	return changed
}

func (r *Ring) intern(id ID) uint32 {
	n, ok := r.index[id]
	if !ok {
		n = uint32(len(r.ids))
		r.ids = append(r.ids, id)
		r.index[id] = n
	}
	return n
}

// stampOrder is the total order of contents: positive if a beats b.
func (r *Ring) stampOrder(a, b token) int {
	if c := cmp.Or(cmp.Compare(a.epoch, b.epoch), cmp.Compare(a.count, b.count)); c != 0 || a.same(b) {
		return c
	}
	return cmp.Or(r.ids[a.by].Compare(r.ids[b.by]), r.ids[a.owner].Compare(r.ids[b.owner]))
}

// nearby is how many untouched tokens between two segments are rather walked over than spliced around.
const nearby = 64

func (r *Ring) mergeSegments(segs []Segment, frozen func(ID) bool) (news []Segment) {
	for len(segs) > 0 {
		n := 1
		for n < len(segs) && r.at(segs[n].Start)-r.at(segs[n-1].End-1) < nearby {
			n++
		}
		news = r.mergeGroup(segs[:n], frozen, news)
		segs = segs[n:]
	}
	return news
}

// mergeGroup lays the segments over the tokens between the first and the last of them.
func (r *Ring) mergeGroup(segs []Segment, frozen func(ID) bool, news []Segment) []Segment {
	first, past := r.at(segs[0].Start), r.at(segs[len(segs)-1].End-1)+1
	from := max(first-1, 0) // the neighbours may become one with what comes
	to := min(past+1, len(r.tokens))
	out := make([]token, 0, to-from+2*len(segs))
	emit := func(start uint64, t token) {
		t.start = start
		if len(out) == 0 || !out[len(out)-1].same(t) {
			out = append(out, t)
		}
	}
	for i := from; i < to; i++ {
		cur, pos, end := r.tokens[i], r.tokens[i].start, r.end(i)
		stuck := frozen != nil && frozen(r.ids[cur.owner])
		for pos < end {
			for len(segs) > 0 && segs[0].End <= pos {
				segs = segs[1:]
			}
			if len(segs) == 0 || segs[0].Start >= end {
				emit(pos, cur)
				break
			}
			if s := segs[0]; s.Start > pos {
				emit(pos, cur)
				pos = s.Start
			}
			s := segs[0]
			stop := min(s.End, end)
			in := token{owner: r.intern(s.Owner), by: r.intern(s.By), epoch: s.Epoch, count: s.Count}
			wins := r.stampOrder(in, cur) > 0
			if wins && stuck && in.epoch == cur.epoch {
				wins = false
			}
			r.noteConflict(pos, stop, in, cur, wins)
			if wins {
				emit(pos, in)
				s.Start, s.End = pos, stop
				news = append(news, s)
			} else {
				emit(pos, cur)
			}
			pos = stop
		}
	}
	r.splice(from, to, out)
	return news
}

func (r *Ring) noteConflict(start, end uint64, in, cur token, wins bool) {
	if in.epoch != cur.epoch || in.count != cur.count || in.same(cur) {
		return
	}
	a := Segment{start, end, r.ids[in.owner], in.epoch, in.count, r.ids[in.by]}
	b := Segment{start, end, r.ids[cur.owner], cur.epoch, cur.count, r.ids[cur.by]}
	c := Conflict{a, b}
	if !wins {
		c = Conflict{b, a}
	}
	if !slices.Contains(r.conflicts, c) {
		if len(r.conflicts) == maxConflicts {
			r.conflicts = slices.Delete(r.conflicts, 0, 1)
		}
		r.conflicts = append(r.conflicts, c)
	}
}

// splice puts out in the place of tokens [from, to) and notes which starts differ.
func (r *Ring) splice(from, to int, out []token) {
	old := r.tokens[from:to]
	for i, j := 0, 0; i < len(old) || j < len(out); {
		switch {
		case j == len(out) || i < len(old) && old[i].start < out[j].start:
			r.dirty[old[i].start] = struct{}{}
			i++
		case i == len(old) || out[j].start < old[i].start:
			r.dirty[out[j].start] = struct{}{}
			j++
		default:
			if old[i] != out[j] {
				r.dirty[out[j].start] = struct{}{}
			}
			i++
			j++
		}
	}
	if len(out) == len(old) {
		copy(old, out)
		return
	}
	r.tokens = slices.Replace(r.tokens, from, to, out...)
}
