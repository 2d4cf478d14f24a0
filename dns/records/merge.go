package records

import (
	"slices"

	"meshd/mesh"
)

// Merge takes in what another peer sent. news is a delta of what was new here, to be passed on, nil if
// nothing was; the caller may reuse delta afterwards. A malformed delta changes nothing; rows that are not
// signed as they must be are left out, and then the error is a *mesh.Refusal.
func (t *Table) Merge(_ mesh.PeerName, delta []byte) (news []byte, err error) {
	recs, err := parseDelta(delta)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	t.refusal = mesh.Refusal{}
	fresh := recs[:0]
	n := len(recs)
	if n > 0 && t.heard.IsZero() {
		t.heard = t.now
	}
	for _, rec := range recs {
		if t.mergeLocked(rec) {
			fresh = append(fresh, rec)
		}
	}
	refused := t.refusal // others may merge while subscribers are told
	t.unlock()
	switch {
	case len(fresh) == 0:
		return nil, refused.Err()
	case len(fresh) == n:
		return slices.Clone(delta), nil
	}
	news = []byte{deltaVersion}
	for _, rec := range fresh {
		news = appendRow(news, rec)
	}
	return news, refused.Err()
}

// mergeLocked reports whether rec was news.
func (t *Table) mergeLocked(rec record) bool {
	switch rec := rec.(type) {
	case *floor:
		return t.mergeFloorLocked(rec)
	case *endpoint:
		return t.mergeEndpointLocked(rec)
	case *handmade:
		return t.mergeHandmadeLocked(rec)
	}
	return false
}

// presentLocked returns the writer of an incoming row and its key, nil if its rows are not wanted. News of a
// peer that went for good, from one who has not heard that yet, is not, nor of one whose key is not known.
func (t *Table) presentLocked(name mesh.PeerName) (p *peer, key [32]byte) {
	if p = t.peers[name]; p != nil && p.state == Gone {
		return nil, key
	}
	key, known := t.keys.Key(name)
	if !known {
		t.refusal.Unknown++
		return nil, key
	}
	if p = t.peerLocked(name); p == nil {
		t.refused++
		return nil, key
	}
	t.bindLocked(name, p, key)
	return p, key
}

func (t *Table) mergeFloorLocked(f *floor) bool {
	p, key := t.presentLocked(f.peer)
	if p == nil || f.ver.compare(t.floorLocked(p)) <= 0 || !t.genuineLocked(key, f) {
		return false
	}
	if f.peer == t.self && f.ver.gen >= t.gen {
		t.bumpLocked(f.ver.gen)
		return false
	}
	t.putLocked(f)
	t.buryLocked(p)
	return true
}

func (t *Table) mergeEndpointLocked(e *endpoint) bool {
	p, key := t.presentLocked(e.peer)
	if p == nil || e.ver.compare(t.floorLocked(p)) <= 0 {
		return false
	}
	r, _ := t.rowLocked(e)
	switch {
	case r != nil && compareRecords(e, r.rec) <= 0:
		return false
	case !t.genuineLocked(key, e):
		return false
	case e.peer == t.self && e.ver.gen >= t.gen:
		t.bumpLocked(e.ver.gen)
		return false
	case r == nil && len(p.rows) >= maxEndpointRows, !t.fitsLocked(p, r, e):
		t.refused++
		return false
	}
	t.putLocked(e)
	return true
}

// fitsLocked reports whether there is room for e in the place of r.
func (t *Table) fitsLocked(p *peer, r *row, e *endpoint) bool {
	more := e.memory()
	if r != nil {
		more -= r.rec.(*endpoint).memory()
	}
	return more <= 0 || t.memory+more <= t.room || p.memory+more <= sureMemory
}

func (t *Table) mergeHandmadeLocked(h *handmade) bool {
	r, _ := t.rowLocked(h)
	if r == nil {
		// A tombstone for what is unknown here only matters if somebody else may still bring it.
		if h.gone && (h.age >= TombstoneAge || t.dead >= maxHandmadeDead) {
			return false
		}
		if t.handmade >= maxHandmade {
			t.refused++
			return false
		}
	} else if compareRecords(h, r.rec) <= 0 {
		return false
	}
	if !t.genuineLocked(h.key, h) {
		return false
	}
	t.clock = max(t.clock, h.clock)
	if r != nil && r.early && t.now.Sub(t.heard) < earlyTime {
		// Written here just after the start by a peer that knew nothing: its clock had yet to learn what
		// came before. It was meant as the latest word, and now it can be.
		r.early = false
		again := *r.rec.(*handmade)
		t.signNameLocked(&again)
		t.sendLocked(t.putLocked(&again))
		return false
	}
	t.putLocked(h)
	return true
}

// Items returns the hashes of every row, for the digests.
func (t *Table) Items() []mesh.Item {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.items)
}

// Encode returns deltas of at most limit bytes with the rows that keys stand for. Unknown keys are
// skipped: the row may have gone since.
func (t *Table) Encode(keys []uint64, limit int) [][]byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	var rows []*row
	for _, k := range keys {
		for r := t.rows[k]; r != nil; r = r.next {
			if r.slot >= 0 {
				rows = append(rows, r)
			}
		}
	}
	return t.encodeLocked(rows, limit)
}

// Drain returns, as deltas of at most limit bytes, what changed here by itself since the last call and
// what the other peers are to be told.
func (t *Table) Drain(limit int) [][]byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	rows := t.out
	t.out = nil
	for _, r := range rows {
		r.queued = false
	}
	return t.encodeLocked(rows, limit)
}

// encodeLocked packs rows, floors last: a reader that takes a floor before the rows that were issued
// above it would miss names for a moment.
func (t *Table) encodeLocked(rows []*row, limit int) [][]byte {
	var deltas [][]byte
	delta := []byte{deltaVersion}
	add := func(rec record) {
		before := len(delta)
		delta = appendRow(delta, rec)
		if len(delta) <= limit {
			return
		}
		row := slices.Clone(delta[before:])
		if before > 1 {
			deltas = append(deltas, slices.Clip(delta[:before]))
		}
		delta = []byte{deltaVersion}
		if 1+len(row) <= limit {
			delta = append(delta, row...)
		}
	}
	for _, r := range rows {
		switch rec := r.rec.(type) {
		case *endpoint:
			add(rec)
		case *handmade:
			if rec.gone {
				rec = t.agedLocked(r)
			}
			add(rec)
		}
	}
	for _, r := range rows {
		if f, ok := r.rec.(*floor); ok {
			add(f)
		}
	}
	if len(delta) > 1 {
		deltas = append(deltas, delta)
	}
	return deltas
}

// agedLocked is r's tombstone with its age of this moment.
func (t *Table) agedLocked(r *row) *handmade {
	h := *r.rec.(*handmade)
	h.age = min(max(t.now.Sub(r.since), 0), forgetAge)
	return &h
}
