package tunnel

import "time"

// pmtu finds the largest datagram that a path carries, by probing alone: ICMP is neither needed nor
// believed. All sizes are bytes of UDP payload. It is pure: tick says which sizes to probe, answered and
// tooBig tell it the outcome.
//
// A search sends a volley of sizes spread over the unknown range and narrows it to what lies between the
// largest answered and the smallest unanswered one. Sizes are tried three times before they count as
// unanswered, so that loss is not taken for a limit; where it is all the same, the next search upwards
// corrects it. A proven size is verified from time to time, often while it is in use: when it stops
// passing and small datagrams still do, the path has shrunk.
type pmtu struct {
	mtu     int // in use
	proven  bool
	ceiling int // what the interface carries

	lo, hi int // while searching: lo passes, hi does not
	volley []trial
	tries  int
	sent   time.Time // of the last volley or verification

	verifies int       // sent in a row without an answer
	began    time.Time // the first of them
	verified time.Time // last answer at mtu
	nextUp   time.Time // next search upwards
}

type trial struct {
	size     int
	answered bool
}

const (
	volleySize     = 7
	volleyTries    = 3
	searchStep     = 8 // bytes; closer is not worth a probe
	verifyIdle     = 10 * time.Second
	verifyBusy     = 500 * time.Millisecond
	verifyTries    = 4
	searchUpEvery  = 15 * time.Second
	verifyInterval = 100 * time.Millisecond // between repeated verifications
)

// start begins anew. assume is the size to be used until something is proven; ceiling the largest to try.
func (p *pmtu) start(assume, ceiling int, now time.Time) {
	ceiling = max(minDatagram, min(ceiling, maxDatagram))
	*p = pmtu{mtu: max(minDatagram, min(assume, ceiling)), ceiling: ceiling}
	p.search(minDatagram, ceiling+1, now)
}

func (p *pmtu) searching() bool { return p.volley != nil }

func (p *pmtu) search(lo, hi int, now time.Time) {
	p.lo, p.hi, p.tries, p.verifies = lo, hi, 0, 0
	p.volley = p.spread()
	p.nextUp = now.Add(searchUpEvery)
}

// spread picks the sizes of a volley: the top, and others at equal distances below it.
func (p *pmtu) spread() []trial {
	out := make([]trial, 0, volleySize)
	n := min(volleySize, p.hi-p.lo-1)
	for i := 1; i <= n; i++ {
		out = append(out, trial{size: p.lo + (p.hi-1-p.lo)*i/n})
	}
	return out
}

// tick says which sizes to probe now. timeout is how long an answer may take, busy whether large
// datagrams are being sent, heard when the peer was last heard of on this path.
func (p *pmtu) tick(now time.Time, timeout time.Duration, busy bool, heard time.Time) []int {
	if p.searching() {
		if p.tries > 0 && now.Sub(p.sent) < timeout {
			return nil
		}
		if p.tries == volleyTries {
			p.narrow(now)
			if !p.searching() {
				return nil
			}
		}
		p.tries++
		p.sent = now
		var sizes []int
		for _, t := range p.volley {
			if !t.answered && t.size > p.lo {
				sizes = append(sizes, t.size)
			}
		}
		return sizes
	}
	if p.verifies > 0 {
		switch {
		case now.Sub(p.sent) < max(timeout, verifyInterval):
			return nil
		case p.verifies < verifyTries:
			p.verifies++
			p.sent = now
			return []int{p.mtu}
		case heard.After(p.began):
			p.search(minDatagram, p.mtu+1, now) // may be back at once if it was loss after all
			return p.tick(now, timeout, busy, heard)
		}
		p.verifies = 0 // nothing at all comes back: not a matter of size
	}
	every := verifyIdle
	if busy {
		every = verifyBusy
	}
	if now.Sub(p.verified) >= every && now.Sub(p.sent) >= every {
		p.verifies, p.sent, p.began = 1, now, now
		return []int{p.mtu}
	}
	if p.mtu < p.ceiling && !now.Before(p.nextUp) {
		p.search(p.mtu, p.ceiling+1, now)
		return p.tick(now, timeout, busy, heard)
	}
	return nil
}

// narrow draws the conclusion of a volley that was sent often enough.
func (p *pmtu) narrow(now time.Time) {
	for _, t := range p.volley {
		if !t.answered && t.size > p.lo && t.size < p.hi {
			p.hi = t.size
		}
	}
	p.mtu, p.proven = p.lo, true
	if p.hi-p.lo <= searchStep {
		p.volley = nil
		return
	}
	p.tries = 0
	p.volley = p.spread()
}

// answered says that a datagram of size came through.
func (p *pmtu) answered(size int, now time.Time) {
	if size > p.ceiling {
		return
	}
	if size >= p.mtu {
		p.verifies, p.verified = 0, now
	}
	if !p.searching() {
		return
	}
	if size > p.lo {
		p.lo = size
	}
	if p.lo > p.mtu {
		p.mtu, p.proven = p.lo, true // larger is usable at once; smaller only when the volley is over
	}
	left := false
	for i := range p.volley {
		t := &p.volley[i]
		t.answered = t.answered || t.size <= size
		left = left || !t.answered
	}
	if left {
		return
	}
	if p.hi-1 <= p.lo {
		p.mtu, p.proven, p.volley = p.lo, true, nil
		return
	}
	p.tries = 0
	p.volley = p.spread()
	p.sent = time.Time{}
}

// tooBig says that the interface itself refused a datagram of size.
func (p *pmtu) tooBig(size int, now time.Time) {
	if size <= minDatagram || size > p.ceiling {
		return
	}
	p.ceiling = size - 1
	if p.mtu > p.ceiling {
		p.mtu = p.ceiling
		p.search(minDatagram, p.ceiling+1, now)
	} else if p.searching() {
		p.hi = min(p.hi, size)
		p.lo = min(p.lo, p.hi-1)
		p.tries = 0
		p.volley = p.spread()
	}
}

// setCeiling follows a change of the interface's MTU.
func (p *pmtu) setCeiling(ceiling int, now time.Time) {
	ceiling = max(minDatagram, min(ceiling, maxDatagram))
	switch {
	case ceiling < p.ceiling:
		p.tooBig(ceiling+1, now)
	case ceiling > p.ceiling:
		p.ceiling = ceiling
		if !p.searching() {
			p.search(p.mtu, ceiling+1, now)
		}
	}
}
