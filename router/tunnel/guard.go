package tunnel

import (
	"sync"
	"time"
)

// guard stands before the handshakes: below busyRate it lets every hello1 with the right MAC pass, above
// it only those whose sender has proven its address with a cookie, and of these a few per source.
type guard struct {
	mu      sync.Mutex // guards all; taken for handshakes only
	baker   baker
	sources sources
	window  time.Time // start of the second that is being counted
	count   int       // hello1 in it
	before  int       // hello1 in the second before
	served  bucket
}

const (
	busyRate   = 50  // hello1 per second: about 1 % of a core
	servedRate = 400 // with cookies, from all sources together
)

// admit decides about a hello1 with a right MAC 1. Instead of true it may return a cookie to be sent back.
func (g *guard) admit(s *secret, hello1 []byte, from origin, now time.Time) (ok bool, cookie []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if d := now.Sub(g.window); d >= time.Second || d < 0 {
		g.before = 0
		if d < 2*time.Second {
			g.before = g.count
		}
		g.window, g.count = now, 0
	}
	g.count++
	if g.count <= busyRate && g.before <= busyRate {
		return true, nil
	}
	if !g.baker.proven(hello1, from, now) {
		return false, g.baker.reply(s, hello1, from, now)
	}
	if g.served.rate == 0 {
		g.served.rate, g.served.burst = servedRate, servedRate
	}
	return g.sources.take(from.addr, now) && g.served.take(now), nil
}
