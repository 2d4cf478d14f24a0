package gossip

import (
	"slices"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// A link that went down is damped when it comes back: published as unsteady, and so the last choice. That
// lasts dampFirst after the first three falls, so that a repaired path is taken back soon, then four
// seconds, and twice as long after each further fall, up to dampMost. A minute of steady life makes up for
// one fall. A link to another run of the peer starts afresh: that was a restart.
const (
	dampFirst  = time.Second
	dampMost   = time.Minute
	steadyTime = time.Minute
)

func damping(falls int) time.Duration {
	if falls <= 3 {
		return dampFirst
	}
	return min(dampFirst<<min(falls-2, 10), dampMost)
}

// Round trips are measured on busy hosts, which make them look long, and every change travels to every
// peer. So what is published goes up at most once in rttPause, to the least that was measured meanwhile;
// it changes by rttStep at least and by a third; and a new link is first taken for a quick one.
const (
	rttStep  = 10 * time.Millisecond
	rttPause = 30 * time.Second
	rttYoung = 20 * time.Millisecond
)

// linkBook holds this peer's live links and what is published about them.
type linkBook struct {
	live map[mesh.PeerName]*liveLink
	past map[mesh.PeerName]*linkPast
}

type liveLink struct {
	link      router.Link
	since     time.Time
	steadyAt  time.Time // damped until then
	published router.PeerLink
	low       time.Duration // least round trip since lowAt
	lowAt     time.Time
}

// linkPast is what is remembered of a peer's links.
type linkPast struct {
	run   mesh.RunID
	falls int
	down  time.Time
}

const maxPast = 4096

func newLinkBook() *linkBook {
	return &linkBook{live: map[mesh.PeerName]*liveLink{}, past: map[mesh.PeerName]*linkPast{}}
}

// up notes a live link, or that one was replaced by another to the same peer.
func (b *linkBook) up(l router.Link, now time.Time) {
	ll := &liveLink{link: l, since: now}
	name := l.Peer.Name
	if old := b.live[name]; old != nil && old.link.Peer.Run == l.Peer.Run {
		ll.since, ll.steadyAt = old.since, old.steadyAt
	} else if past := b.past[name]; past != nil && past.run == l.Peer.Run && past.falls > 0 {
		ll.steadyAt = now.Add(damping(past.falls))
	}
	b.live[name] = ll
	b.publish(ll, now)
}

func (b *linkBook) changed(l router.Link, now time.Time) {
	if ll := b.live[l.Peer.Name]; ll != nil {
		ll.link = l
		ll.low = min(ll.low, l.RTT)
	} else {
		b.up(l, now)
	}
}

// down notes the end of a link and returns how long it had lived.
func (b *linkBook) down(name mesh.PeerName, now time.Time) time.Duration {
	ll := b.live[name]
	if ll == nil {
		return 0
	}
	delete(b.live, name)
	past := b.past[name]
	if past == nil || past.run != ll.link.Peer.Run {
		b.forgetOldest()
		past = &linkPast{run: ll.link.Peer.Run}
		b.past[name] = past
	}
	lived := now.Sub(ll.since)
	past.falls = max(past.falls-int(lived/steadyTime), 0) + 1
	past.down = now
	return lived
}

func (b *linkBook) forgetOldest() {
	if len(b.past) < maxPast {
		return
	}
	var oldest mesh.PeerName
	for name, p := range b.past {
		if oldest.IsZero() || p.down.Before(b.past[oldest].down) {
			oldest = name
		}
	}
	delete(b.past, oldest)
}

func (b *linkBook) publish(ll *liveLink, now time.Time) {
	l := &ll.link
	p := router.PeerLink{
		To: l.Peer.Name, Addr: l.Addr, RTT: ll.published.RTT, MTU: l.MTU,
		Outbound: l.Outbound, Sealed: l.Sealed, Damped: now.Before(ll.steadyAt),
	}
	switch step := max(rttStep, p.RTT/3); {
	case ll.lowAt.IsZero():
		p.RTT = router.RoundRTT(min(l.RTT, rttYoung))
		ll.low, ll.lowAt = l.RTT, now
	case p.RTT-l.RTT >= step:
		p.RTT = router.RoundRTT(l.RTT)
	case now.Sub(ll.lowAt) >= rttPause:
		if ll.low-p.RTT >= step {
			p.RTT = router.RoundRTT(ll.low)
		}
		ll.low, ll.lowAt = l.RTT, now
	}
	ll.published = p
}

// links is what is to be published now, by name.
func (b *linkBook) links(now time.Time) []router.PeerLink {
	out := make([]router.PeerLink, 0, len(b.live))
	for _, ll := range b.live {
		b.publish(ll, now)
		out = append(out, ll.published)
	}
	slices.SortFunc(out, func(x, y router.PeerLink) int { return x.To.Compare(y.To) })
	return out
}

// settles reports whether what is published of a link may change between the two times by itself: it
// stops being damped, or its round trip may go up.
func (b *linkBook) settles(last, now time.Time) bool {
	for _, ll := range b.live {
		if ll.steadyAt.After(last) && !ll.steadyAt.After(now) {
			return true
		}
		if ll.low-ll.published.RTT >= rttStep && now.Sub(ll.lowAt) >= rttPause {
			return true
		}
	}
	return false
}
