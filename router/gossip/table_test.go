package gossip_test

import (
	"encoding/binary"
	"errors"
	"hash/fnv"
	"sync"

	"meshd/mesh"
)

// setTable is the simplest replicated table: a set of short strings that only grows.
type setTable struct {
	base    *setTable // what everybody has from the beginning; nil: nothing. It does not change any more
	mu      sync.Mutex
	entries map[uint64]string
	items   []mesh.Item
}

// texts has every entry once for all tables of a simulation.
var texts sync.Map

func (t *setTable) putLocked(k uint64, s string) {
	shared, _ := texts.LoadOrStore(s, s)
	t.entries[k] = shared.(string)
	t.items = append(t.items, mesh.Item{Key: k, Version: k * 3})
}

func newSetTable() *setTable { return &setTable{entries: map[uint64]string{}} }

// above is a table that has all of base, which it shares.
func above(base *setTable) *setTable {
	return &setTable{base: base, entries: map[uint64]string{}, items: base.items[:len(base.items):len(base.items)]}
}

func key(s string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(s))
	v := h.Sum64()
	return v ^ v<<32
}

func encode(s string) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(s))), s...)
}

func (t *setTable) add(s string) []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.putLocked(key(s), s)
	return encode(s)
}

func (t *setTable) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.items)
}

// getLocked finds an entry.
func (t *setTable) getLocked(k uint64) (string, bool) {
	s, ok := t.entries[k]
	if !ok && t.base != nil {
		s, ok = t.base.entries[k]
	}
	return s, ok
}

func (t *setTable) Merge(_ mesh.PeerName, delta []byte) (news []byte, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(delta) > 0 {
		if len(delta) < 2 || len(delta) < 2+int(binary.BigEndian.Uint16(delta)) {
			return nil, errors.New("short")
		}
		n := 2 + int(binary.BigEndian.Uint16(delta))
		s := string(delta[2:n])
		if _, ok := t.getLocked(key(s)); !ok {
			t.putLocked(key(s), s)
			news = append(news, delta[:n]...)
		}
		delta = delta[n:]
	}
	return news, nil
}

func (t *setTable) Items() []mesh.Item {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.items[:len(t.items):len(t.items)]
}

func (t *setTable) Encode(keys []uint64, limit int) (out [][]byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var b []byte
	for _, k := range keys {
		s, ok := t.getLocked(k)
		if !ok {
			continue
		}
		e := encode(s)
		if len(b)+len(e) > limit {
			out, b = append(out, b), nil
		}
		b = append(b, e...)
	}
	return append(out, b)
}

var errNotYet = errors.New("not yet")
