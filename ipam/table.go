package ipam

import (
	"errors"
	"sync"

	"meshd/ipam/ring"
	"meshd/mesh"
)

// Table is the ring as the gossip room sees it: a replicated table whose deltas it spreads and compares.
// It is safe for concurrent use and never waits for disk or network. With address management off it
// still passes the ring of the others on.
type Table struct {
	mu   sync.Mutex // guards everything below, and the core's whole state
	ring *ring.Ring

	frozen   func(ring.ID) bool // called with mu held
	changed  func()             // called without; must not block
	stranger func(from mesh.PeerName, d ring.Delta)
}

// Merge takes a delta and returns what was new in it, nil if nothing was.
func (t *Table) Merge(from mesh.PeerName, delta []byte) (news []byte, err error) {
	d, err := ring.ParseDelta(delta)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	fresh, err := t.ring.Merge(d, t.frozen)
	t.mu.Unlock()
	if err != nil {
		if errors.Is(err, ring.ErrOtherCluster) || errors.Is(err, ring.ErrOtherRange) {
			t.stranger(from, d)
		}
		return nil, err
	}
	if fresh.Empty() {
		return nil, nil
	}
	t.changed()
	if news = fresh.Append(nil); len(news) > len(delta) {
		news = delta // cut into more pieces than it came in; the whole says the same
	}
	return news, nil
}

// Items returns what stands for each entry when tables are compared.
func (t *Table) Items() []mesh.Item {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.ring.Items()
}

// Encode returns deltas of at most limit bytes each that hold the entries with these keys.
func (t *Table) Encode(keys []uint64, limit int) [][]byte {
	if len(keys) == 0 {
		return nil
	}
	t.mu.Lock()
	d := t.ring.Select(keys)
	t.mu.Unlock()
	if d.Empty() {
		return nil
	}
	return d.Split(max(limit, 256))
}
