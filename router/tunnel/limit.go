package tunnel

import (
	"net/netip"
	"sync"
	"time"
)

// bucket is a token bucket. The zero value is full. Safe for concurrent use; meant for rare events.
type bucket struct {
	rate, burst float64 // per second, and at once; fixed

	mu     sync.Mutex
	tokens float64
	last   time.Time
}

func (b *bucket) take(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.last.IsZero() {
		b.tokens = b.burst
	} else if d := now.Sub(b.last); d > 0 {
		b.tokens = min(b.burst, b.tokens+d.Seconds()*b.rate)
	}
	b.last = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// sources limits handshakes per source address: IPv4 addresses and IPv6 /64 networks. When the table is
// full it starts afresh, so its memory is bounded. Not safe for concurrent use.
type sources struct {
	seen map[netip.Addr]*bucket
}

const (
	maxSources  = 4096
	sourceRate  = 10 // handshakes per second
	sourceBurst = 20
)

func (s *sources) take(addr netip.Addr, now time.Time) bool {
	addr = addr.Unmap()
	if addr.Is6() {
		p, _ := addr.Prefix(64) // never fails for an IPv6 address
		addr = p.Addr()
	}
	b := s.seen[addr]
	if b == nil {
		if s.seen == nil || len(s.seen) >= maxSources {
			s.seen = make(map[netip.Addr]*bucket)
		}
		b = &bucket{rate: sourceRate, burst: sourceBurst}
		s.seen[addr] = b
	}
	return b.take(now)
}
