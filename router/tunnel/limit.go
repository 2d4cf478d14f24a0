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

// sources limits handshakes per source, which is an address with its port, and what all sources of one IPv4 address
// or IPv6 /64 network have together: hosts behind one NAT do not wait for each other, and who has one address
// cannot take everything. When a table is full it starts afresh, so memory is bounded. Not safe for concurrent use.
type sources struct {
	hosts map[netip.AddrPort]*bucket
	nets  map[netip.Addr]*bucket
}

const (
	maxSources  = 4096
	sourceRate  = 10 // handshakes per second
	sourceBurst = 20
	netRate     = 100 // of all sources of one address; a quarter of what is served
)

func (s *sources) take(from netip.AddrPort, now time.Time) bool {
	addr := from.Addr().Unmap()
	if addr.Is6() {
		p, _ := addr.Prefix(64) // never fails for an IPv6 address
		addr = p.Addr()
	}
	return bucketOf(&s.hosts, from, sourceRate, sourceBurst).take(now) && bucketOf(&s.nets, addr, netRate, netRate).take(now)
}

func bucketOf[K comparable](all *map[K]*bucket, key K, rate, burst float64) *bucket {
	b := (*all)[key]
	if b == nil {
		if *all == nil || len(*all) >= maxSources {
			*all = make(map[K]*bucket)
		}
		b = &bucket{rate: rate, burst: burst}
		(*all)[key] = b
	}
	return b
}
