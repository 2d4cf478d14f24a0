package fastdp

import (
	"fmt"
	"time"
)

// Timing of the probes. A path in use that breaks is left after usedEvery + lostAfter, well before 1.4 s: so TCP moves
// again with its third retransmission, and on a busy machine with its fourth, within 3 s; one that is not in use, within that of its next
// use. One that works again is taken within the longest retry + provenBy answers < 30 s.
const (
	usedEvery    = 250 * time.Millisecond // while frames are sent to the peer
	idleLeast    = 500 * time.Millisecond // while none are, with few peers
	idleMost     = time.Minute            // and with many, see idleEvery
	idleRate     = 4                      // probes of full size per second, to all idle peers together: 6 kB/s
	missingEvery = 75 * time.Millisecond  // once an answer is overdue
	overdueAfter = 100 * time.Millisecond // beyond the usual round trip
	lostAfter    = 600 * time.Millisecond // from the first probe without answer, and two round trips more
	lostProbes   = 6                      // overdue by then: a starved meshd that sent fewer knows nothing
	trialEvery   = 100 * time.Millisecond
	trialFor     = 1500 * time.Millisecond
	retryFirst   = time.Second
	retryMost    = 10 * time.Second
	provenBy     = 3 // answers of full size within one trial
	maxInFlight  = 32
)

// probeSize is what a probe proves.
type probeSize uint8

const (
	small probeSize = iota // that datagrams pass at all
	full                   // that frames of the full MTU do
)

type pathState uint8

const (
	waiting pathState = iota // until the next trial
	trying
	up
)

// path decides whether the kernel path to one peer is used. It is told the time and sends nothing itself.
type path struct {
	state   pathState
	since   time.Time // of the last change between up and not
	next    time.Time // when to probe again, or to begin the next trial
	retry   time.Duration
	began   time.Time // of the trial
	answers int       // of full size, in this trial
	rtt     time.Duration
	heard   [2]time.Time // last answer, by size
	ever    [2]bool      // an answer of that size came in the last trial or since
	flight  []inFlight   // oldest first, at most maxInFlight
	mtu     int
	idle    time.Duration // between the probes while nothing is sent
}

// idleEvery is how often a path that nothing is sent on is probed: so that all idle peers together cost no more
// than a mesh may cost that does nothing. A path that broke meanwhile is found out when it is used.
func idleEvery(peers int) time.Duration {
	return min(max(time.Duration(peers)*time.Second/idleRate, idleLeast), idleMost)
}

type inFlight struct {
	nonce uint64
	sent  time.Time
	size  probeSize
}

func newPath(now time.Time, mtu int) *path {
	return &path{mtu: mtu, idle: idleMost, since: now, next: now, retry: retryFirst}
}

// adopt takes over a path that an earlier meshd had proven: it stays up unless probes fail.
func (p *path) adopt(now time.Time) {
	p.state, p.next, p.heard[full] = up, now, now
}

// tick says which probes to send now; used: a frame was sent to the peer lately. Each probe sent is
// reported by sent.
func (p *path) tick(now time.Time, used bool) (probes []probeSize) {
	switch p.state {
	case waiting:
		if now.Before(p.next) {
			return nil
		}
		p.state, p.began, p.answers, p.ever = trying, now, 0, [2]bool{}
		p.flight = p.flight[:0]
		p.next = now.Add(trialEvery)
		return []probeSize{small, full}
	case trying:
		if now.Sub(p.began) > trialFor {
			p.state, p.next = waiting, now.Add(p.retry)
			p.retry = min(2*p.retry, retryMost)
			return nil
		}
		if now.Before(p.next) {
			return nil
		}
		p.next = now.Add(trialEvery)
		return []probeSize{full}
	}
	// Up. The first probe since the last answer tells how long there has been silence.
	silentSince, overdue := p.unanswered(now)
	if overdue >= lostProbes && now.Sub(silentSince) > lostAfter+2*p.rtt {
		p.state, p.since, p.next, p.retry = waiting, now, now, retryFirst
		return p.tick(now, used) // the first trial begins at once, and finds out what is wrong
	}
	every := p.idle
	if used {
		every = usedEvery
	}
	due := p.next
	if last, ok := p.last(); ok {
		due = last.Add(every)
		if overdue > 0 {
			due = last.Add(missingEvery)
		}
	}
	if now.Before(due) {
		return nil
	}
	return []probeSize{full}
}

func (p *path) sent(now time.Time, nonce uint64, size probeSize) {
	if len(p.flight) == maxInFlight {
		p.flight = append(p.flight[:0], p.flight[1:]...)
	}
	p.flight = append(p.flight, inFlight{nonce, now, size})
}

// answer takes the answer to a probe; changed: the path came up by it.
func (p *path) answer(now time.Time, nonce uint64, size probeSize) (changed bool) {
	for i, f := range p.flight {
		if f.nonce != nonce || f.size != size {
			continue
		}
		p.flight = append(p.flight[:i], p.flight[i+1:]...)
		p.heard[size], p.ever[size] = now, true
		if size == small {
			return false
		}
		p.rtt = now.Sub(f.sent)
		if p.state != trying {
			return false
		}
		if p.answers++; p.answers < provenBy {
			return false
		}
		p.state, p.since, p.retry, p.next = up, now, retryFirst, now
		return true
	}
	return false
}

// unanswered counts the probes of full size that were sent since the last answer and should have been
// answered by now, and says when the first of them was sent.
func (p *path) unanswered(now time.Time) (first time.Time, overdue int) {
	for _, f := range p.flight {
		if f.size != full || !f.sent.After(p.heard[full]) || now.Sub(f.sent) <= p.rtt+overdueAfter {
			continue
		}
		if overdue == 0 {
			first = f.sent
		}
		overdue++
	}
	return first, overdue
}

func (p *path) last() (time.Time, bool) {
	t := p.heard[full]
	for _, f := range p.flight {
		if f.size == full && f.sent.After(t) {
			t = f.sent
		}
	}
	return t, !t.IsZero()
}

// reason is why the path is not up, for people.
func (p *path) reason(port uint16) string {
	switch {
	case p.state == up:
		return ""
	case p.ever[full]:
		return "being proven: some probes were answered"
	case p.ever[small]:
		return fmt.Sprintf("underlay MTU too small: small probes pass, packets of %d bytes do not", p.mtu)
	case p.state == trying && p.retry == retryFirst:
		return "being proven"
	}
	return fmt.Sprintf("no answer to probes: UDP port %d blocked, or no kernel path there", port)
}
