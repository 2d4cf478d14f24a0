package dns

import (
	"net/netip"
	"sync"
)

// gate lets in so many at a time, and so many of them from one source, so that no container shuts out
// the others.
type gate struct {
	limit, perSource int // fixed

	mu     sync.Mutex // guards all below
	inside int
	source map[netip.Addr]int
}

func newGate(limit, perSource int) *gate {
	return &gate{limit: limit, perSource: perSource, source: make(map[netip.Addr]int)}
}

func (g *gate) enter(src netip.Addr) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inside >= g.limit || g.source[src] >= g.perSource {
		return false
	}
	g.inside++
	g.source[src]++
	return true
}

func (g *gate) leave(src netip.Addr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.inside--
	if g.source[src]--; g.source[src] == 0 {
		delete(g.source, src)
	}
}

func (g *gate) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.inside
}
