package router

import (
	"sync/atomic"
	"time"

	"meshd/mesh"
)

// Frames for an address that nobody knows go to every peer of the subnet, and are limited by sender as the port guard limits
// broadcasts: so many a second after a burst.
const (
	unknownPerSecond = 2000
	unknownBurst     = 4000
)

// limiter keeps the time of each group of senders (GCRA): a frame moves it on by an interval, and it runs ahead of the clock
// by a burst at most. Senders that make up addresses share all groups. It takes no lock and allocates nothing.
type limiter [64]atomic.Int64

func (l *limiter) take(src mesh.MAC, now time.Duration) bool {
	const interval = int64(time.Second / unknownPerSecond)
	until := &l[macShard(src)%uint8(len(l))]
	for {
		old := until.Load()
		from := max(old, int64(now))
		if from-int64(now) >= unknownBurst*interval {
			return false
		}
		if until.CompareAndSwap(old, from+interval) {
			return true
		}
	}
}
