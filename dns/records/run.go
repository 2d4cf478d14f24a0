package records

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

const bucket = "names"

// Row keys carry this prefix in the store, so that they cannot be mistaken for the generation, nor for the
// unsigned rows of old.
const storePrefix = "signed/"

const generationKey = "generation"

func storeKey(h *handmade) string { return storePrefix + string(h.appendKey(nil)) }

// load reads the hand-made names and counts the generation up, on disk before anyone can see it.
func (t *Table) load() error {
	if t.store == nil {
		t.gen |= t.runBits
		return nil
	}
	kv, err := t.store.All(bucket)
	if err != nil {
		return fmt.Errorf("names: %w", err)
	}
	t.blank = len(kv) == 0
	last := uint64(0)
	for key, value := range kv {
		if key == generationKey {
			r := reader{b: value}
			v := r.version()
			if r.bad {
				return errors.New("names: the stored generation is damaged")
			}
			last = v.gen
			continue
		}
		recs, err := parseDelta(append([]byte{deltaVersion}, value...)) // verified when it was written
		if err == nil && !strings.HasPrefix(key, storePrefix) {
			err = errors.New("of an older release")
		}
		if err != nil {
			t.log.Warn("stored name not understood", "err", err)
			continue
		}
		for _, rec := range recs {
			if h, ok := rec.(*handmade); ok && t.handmade < maxHandmade {
				t.putLocked(h)
			}
		}
	}
	clear(t.unsaved)
	t.gen = (last>>32+1)<<32 | t.runBits
	if err := t.store.Put(bucket, map[string][]byte{generationKey: appendVersion(nil, version{gen: t.gen})}); err != nil {
		return fmt.Errorf("names: %w", err)
	}
	return nil
}

// Flush writes to the store what other peers told and what expired, at most maxPersistedBatch rows of it. AddName and RemoveName need no Flush.
func (t *Table) Flush() error {
	if t.store == nil {
		t.mu.Lock()
		clear(t.unsaved)
		t.mu.Unlock()
		return nil
	}
	t.edit.Lock() // or an older value could overwrite that of AddName
	defer t.edit.Unlock()
	t.mu.Lock()
	kv := make(map[string][]byte)
	var rows []*row
	for r := range t.unsaved {
		if len(kv) >= maxPersistedBatch {
			break
		}
		rows = append(rows, r)
		delete(t.unsaved, r)
		switch rec := r.rec.(type) {
		case tomb:
			if now, _ := t.rowLocked(rec.record); now == nil {
				kv[storeKey(rec.record.(*handmade))] = nil
			}
		case *handmade:
			if rec.gone {
				rec = t.agedLocked(r)
			}
			kv[storeKey(rec)] = appendRow(nil, rec)
		}
	}
	saveGen := t.saveGen
	t.saveGen = false
	if saveGen {
		kv[generationKey] = appendVersion(nil, version{gen: t.gen})
	}
	t.mu.Unlock()
	if len(kv) == 0 {
		return nil
	}
	err := t.store.Put(bucket, kv)
	if err == nil {
		return nil
	}
	t.mu.Lock()
	for _, r := range rows {
		t.unsaved[r] = true
	}
	t.saveGen = t.saveGen || saveGen
	t.mu.Unlock()
	return fmt.Errorf("names: %w", err)
}

const (
	// After the first change of a burst, which goes out at once, the others wait so long for company.
	gather = 20 * time.Millisecond
	// What other peers tell is written so often at most. Losing it costs nothing: they tell it again.
	saveEvery = time.Second
)

// Run sends changes with broadcast, as deltas of at most limit bytes, keeps the store up to date and lets
// time pass, until ctx ends. broadcast must not block.
func (t *Table) Run(ctx context.Context, limit int, broadcast func(delta []byte)) error {
	saved := make(chan error)
	go func() { saved <- t.saveLoop(ctx) }() // ends with ctx, and Run waits for it
	t.sendLoop(ctx, limit, broadcast)
	return <-saved
}

func (t *Table) sendLoop(ctx context.Context, limit int, broadcast func(delta []byte)) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			t.Expire(now)
			continue
		case <-t.dirtied:
		case <-ctx.Done():
		}
		for _, delta := range t.Drain(limit) {
			broadcast(delta)
		}
		select {
		case <-time.After(gather):
		case <-ctx.Done():
			return
		}
	}
}

// saveLoop has a goroutine of its own, since a slow disk must not delay what the peers hear.
func (t *Table) saveLoop(ctx context.Context) error {
	tick := time.NewTicker(saveEvery)
	defer tick.Stop()
	failing := false
	for {
		select {
		case <-tick.C:
			err := t.Flush()
			if err != nil && !failing {
				t.log.Error("names cannot be stored", "err", err)
			}
			failing = err != nil
		case <-ctx.Done():
			return t.Flush()
		}
	}
}

// Stats counts what the table holds.
type Stats struct {
	Endpoints  int    // rows of endpoints, tombstones included
	Handmade   int    // rows of names made by hand, tombstones included
	Tombstones int    // of both kinds, those of other peers' endpoints included
	Own        int    // live endpoint rows of this peer
	Peers      int    // that wrote rows
	Refused    uint64 // rows ignored because a bound was reached
	Settled    bool   // this run has said all that it has
}

// Stats takes a look.
func (t *Table) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := Stats{Handmade: t.handmade, Tombstones: t.dead, Refused: t.refused, Settled: t.settled}
	for name, p := range t.peers {
		if len(p.rows) > 0 {
			s.Peers++
		}
		s.Endpoints += len(p.rows)
		for _, r := range p.rows {
			switch e := r.rec.(*endpoint); {
			case e.gone:
				s.Tombstones++
			case name == t.self && e.ver.gen == t.gen:
				s.Own++
			}
		}
	}
	return s
}
