package ipam

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"time"

	"meshd/ipam/ring"
	"meshd/mesh"
)

// want is a wish for more space in a subnet, of a waiting call or in advance.
type want struct {
	subnet netip.Prefix
	demand bool
	number uint32         // of the request under way, or 0
	no     map[ring.ID]no // who refused or did not answer
	pause  time.Duration  // nobody is asked again before
}

type no struct {
	reason reason // 0: no answer
	at     time.Duration
}

// stands reports whether the owner need not be asked again yet.
func (n no) stands(now time.Duration) bool {
	if n.reason == reasonFull {
		return now-n.at < retryAfter
	}
	return now-n.at < answerTimeout
}

// ask is a request on its way.
type ask struct {
	to   ring.ID
	at   time.Duration
	off  uint64 // of an exact one
	want *want
	call *call
	hold *hold
}

// grantMade remembers the last grant to a peer, so that a doubled request gets the same space and not more.
type grantMade struct {
	life   uint32
	number uint32
	delta  ring.Delta
}

// wantSpace asks for space in the call's subnet, or answers that there is none.
func (c *core) wantSpace(call *call) (done bool) {
	w := c.wants[call.addr]
	if w == nil {
		w = &want{subnet: call.addr, no: make(map[ring.ID]no)}
		c.wants[call.addr] = w
	}
	if !w.demand {
		w.demand = true // who can spare nothing in advance may have some for one in need
		clear(w.no)
	}
	var full bool
	call.why, full = c.pursue(w)
	if full {
		c.reply(call, result{err: fmt.Errorf("%s: %w: %s", call, ErrFull, call.why)})
		return true
	}
	return false
}

// prefetch asks for space before it is needed.
func (c *core) prefetch(subnet netip.Prefix) {
	if w := c.wants[subnet]; w != nil {
		if !w.demand && w.number == 0 && c.now >= w.pause {
			delete(c.wants, subnet)
		} else {
			return
		}
	}
	lo, hi := c.usable(subnet)
	share := (hi - lo) / uint64(8*(1+len(c.activeMembers())))
	if c.hasFree(lo, hi, min(lowWater, share)) {
		return
	}
	w := &want{subnet: subnet, no: make(map[ring.ID]no)}
	c.wants[subnet] = w
	c.pursue(w)
}

// pursue keeps one request for the want under way and says whom it waits for; full means that every
// owner of the subnet has answered that nothing is free.
func (c *core) pursue(w *want) (why string, full bool) {
	if w.number != 0 {
		return fmt.Sprintf("peer %s has been asked for space in %s", c.asks[w.number].to.Peer, w.subnet), false
	}
	lo, hi := c.offsets(w.subnet)
	owners := c.ring.Owners(lo, hi)
	delete(owners, c.me)
	ids := slices.SortedFunc(maps.Keys(owners), ring.ID.Compare)
	var away, open []ring.ID
	var silent []string
	for _, id := range ids {
		refusal, refused := w.no[id]
		switch {
		case id.IsZero() || !c.ring.Member(id).Active() || !c.alive(id.Peer):
			away = append(away, id)
		case !refused || !refusal.stands(c.now):
			open = append(open, id)
		case refusal.reason != reasonFull:
			silent = append(silent, id.Peer.String())
		}
	}
	if len(open) > 0 {
		return c.askSpace(w, c.weighted(open, owners)), false
	}
	if !w.demand {
		w.pause = c.now + prefetchPause
		return "", false
	}
	switch {
	case len(away) > 0 && len(away) == len(ids):
		return "all free space is owned by unreachable peers: " + c.describe(away, owners), false
	case len(away) > 0:
		return fmt.Sprintf("the reachable peers have nothing free in %s; waiting for %s", w.subnet, c.describe(away, owners)), false
	case len(silent) > 0:
		return "no answer yet from " + strings.Join(silent, ", "), false
	}
	return fmt.Sprintf("all of %s is in use", w.subnet), true
}

// weighted picks one of the owners, at random by how much space they have free, or own if that is unknown.
func (c *core) weighted(ids []ring.ID, owned map[ring.ID]uint64) ring.ID {
	total := uint64(0)
	sums := make([]uint64, len(ids))
	for i, id := range ids {
		weight := owned[id]
		if p := c.peers[id.Peer]; p != nil && p.knowFree {
			weight = min(p.free, weight)
		}
		total += weight + 1
		sums[i] = total
	}
	x := c.rand.Uint64N(total)
	return ids[sort.Search(len(sums), func(i int) bool { return sums[i] > x })]
}

func (c *core) describe(ids []ring.ID, owned map[ring.ID]uint64) string {
	var out []string
	for _, id := range ids {
		switch {
		case id.IsZero():
			out = append(out, fmt.Sprintf("an owner not known yet (%d addresses)", owned[id]))
		case c.ring.Fenced(id):
			out = append(out, fmt.Sprintf("%s (being removed, %d addresses)", id.Peer, owned[id]))
		default:
			out = append(out, fmt.Sprintf("%s (unreachable, %d addresses)", id.Peer, owned[id]))
		}
	}
	if len(out) > 5 {
		out = append(out[:5], fmt.Sprintf("%d more", len(out)-5))
	}
	return strings.Join(out, ", ")
}

func (c *core) newAsk(a *ask) uint32 {
	c.number++
	if c.number == 0 {
		c.number++
	}
	a.at = c.now
	c.asks[c.number] = a
	return c.number
}

func (c *core) askSpace(w *want, id ring.ID) string {
	lo, hi := c.offsets(w.subnet)
	w.number = c.newAsk(&ask{to: id, want: w})
	m := &message{kind: kindRequest, number: w.number, lo: lo, hi: hi}
	if w.demand {
		m.flags = flagDemand
	}
	c.send(id.Peer, m)
	return fmt.Sprintf("peer %s has been asked for space in %s", id.Peer, w.subnet)
}

// askExact asks the owner of one address for it; number is 0 if that makes no sense now.
func (c *core) askExact(off uint64, a *ask) (why string, number uint32) {
	owner := c.ring.At(off).Owner
	switch {
	case owner.IsZero():
		return "its owner is not known yet", 0
	case c.ring.Fenced(owner):
		return fmt.Sprintf("it belongs to peer %s, which is being removed", owner.Peer), 0
	case !c.alive(owner.Peer):
		return fmt.Sprintf("it belongs to peer %s, which is unreachable", owner.Peer), 0
	}
	a.to, a.off = owner, off
	number = c.newAsk(a)
	c.send(owner.Peer, &message{kind: kindRequest, flags: flagExact | flagDemand, number: number, lo: off, hi: off + 1})
	return fmt.Sprintf("peer %s has been asked for it", owner.Peer), number
}

// chase asks for the addresses of what runs here but is not ours by the ring (any more).
func (c *core) chase() {
	if len(c.holds.contest) == 0 || !c.serving {
		return
	}
	n := 0
	for h := range c.holds.contest {
		if h.number != 0 {
			n++
		}
	}
	todo := make([]*hold, 0, len(c.holds.contest))
	for h := range c.holds.contest {
		if h.number == 0 && c.now-h.asked >= answerTimeout/2 {
			todo = append(todo, h)
		}
	}
	slices.SortFunc(todo, func(a, b *hold) int { return int(int64(a.off) - int64(b.off)) })
	for _, h := range todo {
		if n >= 64 {
			return
		}
		if _, h.number = c.askExact(h.off, &ask{hold: h}); h.number != 0 {
			n++
		}
		h.asked = c.now
	}
}

func (c *core) whyContest(h *hold) string {
	if !c.serving {
		return c.notReady()
	}
	owner := c.ring.At(h.off).Owner
	if c.ring.Fenced(owner) || !c.alive(owner.Peer) {
		return fmt.Sprintf("it belongs to peer %s, which is unreachable or being removed", owner.Peer)
	}
	return fmt.Sprintf("peer %s has it to give", owner.Peer)
}

// expireAsks gives up on requests that were not answered in time.
func (c *core) expireAsks() {
	for _, number := range slices.Sorted(maps.Keys(c.asks)) {
		if a := c.asks[number]; c.now-a.at >= answerTimeout {
			c.unanswered(number, a)
		}
	}
}

// dropAsks does so for the requests to a peer that is not alive.
func (c *core) dropAsks(name mesh.PeerName) {
	for _, number := range slices.Sorted(maps.Keys(c.asks)) {
		if a := c.asks[number]; a.to.Peer == name {
			c.unanswered(number, a)
		}
	}
}

func (c *core) unanswered(number uint32, a *ask) {
	delete(c.asks, number)
	switch {
	case a.want != nil:
		a.want.number = 0
		a.want.no[a.to] = no{at: c.now}
		if !a.want.demand {
			c.pursue(a.want)
		}
	case a.call != nil:
		a.call.number = 0
		a.call.tries++
	case a.hold != nil && a.hold.number == number:
		a.hold.number = 0
	}
}

// answerRequest gives space to another member, or says why not.
func (c *core) answerRequest(from mesh.PeerName, m *message) {
	to := ring.ID{Peer: from, Life: m.life}
	if g := c.granted[from]; g != nil && g.life == m.life && g.number == m.number {
		c.sendGrant(from, g)
		return
	}
	refuse := func(r reason, text string) {
		c.send(from, &message{kind: kindRefuse, number: m.number, reason: r, text: text, free: c.freeIn(0, c.ring.Size())})
	}
	if m.hi > c.ring.Size() {
		return
	}
	if !c.serving || !c.liveKnown || c.left {
		refuse(reasonNotReady, "")
		return
	}
	if !c.ring.Member(to).Active() {
		refuse(reasonStranger, "")
		c.sendFacts(from, c.delta(c.ring.Members()...), 0)
		return
	}
	if c.full() { // one own write at a time; they will ask again
		refuse(reasonNotReady, "")
		return
	}
	start, end := m.lo, m.hi
	if m.flags&flagExact != 0 {
		h := c.holds.byOff[m.lo]
		switch {
		case m.hi != m.lo+1:
			return
		case !c.ours(m.lo):
			refuse(reasonNotMine, c.ring.At(m.lo).Owner.Peer.String())
			return
		case h != nil:
			refuse(reasonTaken, h.owner)
			return
		}
	} else {
		start, end = c.spare(m.lo, m.hi, m.flags&flagDemand != 0)
		if start == end {
			refuse(reasonFull, "")
			return
		}
	}
	d, err := c.ring.Grant(c.me, start, end, to)
	if err != nil {
		c.log.Error("cannot give space away", "peer", from, "err", err)
		refuse(reasonNotReady, "")
		return
	}
	g := &grantMade{life: m.life, number: m.number, delta: d}
	c.write = &ownWrite{delta: d,
		done: func() {
			c.granted[from] = g
			c.broadcast(d)
			c.sendGrant(from, g)
		},
		failed: func(error) { refuse(reasonNoDisk, "") },
	}
}

func (c *core) sendGrant(to mesh.PeerName, g *grantMade) {
	for _, part := range g.delta.Split(deltaLimit) {
		c.send(to, &message{kind: kindGrant, number: g.number, free: c.freeIn(0, c.ring.Size()), rest: part})
	}
}

// spare picks what to give away of our free space in [lo, hi): the largest aligned block that is at most
// half of it, from the top, because we fill up from the bottom. Half is rounded up for somebody who needs
// it now, so that the last address can be had.
func (c *core) spare(lo, hi uint64, demand bool) (start, end uint64) {
	// The network's and the broadcast address are of no use, neither to us nor to them.
	useless := func(off uint64) uint64 {
		if c.ours(off) && !c.holds.used.has(off) {
			return 1
		}
		return 0
	}
	free := c.freeIn(lo, hi)
	free -= useless(lo) + useless(hi-1)
	limit := free / 2
	if demand {
		limit = (free + 1) / 2
	}
	var size uint64
	for _, s := range c.space {
		c.holds.used.gaps(max(lo, s.lo), min(hi, s.hi), func(a, b uint64) {
			if b-a == 1 && (a == lo || a == hi-1) {
				return
			}
			for cut := range 2 { // with the useless ends, or, if only such a one would come out, without
				x, y := a, b
				if cut == 1 {
					x, y = max(a, lo+1), min(b, hi-1)
				}
				at, n := largestBlock(x, y, limit)
				if n == 1 && (at == lo || at == hi-1) {
					continue
				}
				if n > 0 && n >= size {
					start, end, size = at, at+n, n
				}
				break
			}
		})
	}
	return start, end
}

// heedAnswer takes a grant or a refusal.
func (c *core) heedAnswer(from mesh.PeerName, m *message) {
	p := c.peer(from)
	p.free, p.knowFree = m.free, true
	if m.kind == kindGrant {
		d, err := ring.ParseDelta(m.rest)
		if err == nil {
			_, err = c.ring.Merge(d, c.frozen)
		}
		if err != nil {
			c.log.Warn("bad grant", "peer", from, "err", err)
			return
		}
	}
	a := c.asks[m.number]
	if a == nil || a.to.Peer != from {
		return
	}
	delete(c.asks, m.number)
	if m.kind == kindRefuse && m.reason == reasonStranger {
		delete(c.answered, from)
		c.sendFacts(from, c.delta(c.ring.Members()...), 0)
	}
	switch {
	case a.want != nil:
		a.want.number = 0
		if m.kind == kindRefuse {
			a.want.no[a.to] = no{m.reason, c.now}
		}
		if !a.want.demand {
			if m.kind == kindGrant {
				a.want.pause = c.now
			} else {
				c.pursue(a.want)
			}
		}
	case a.call != nil:
		a.call.number = 0
		c.claimAnswered(a.call, m)
	case a.hold != nil:
		if a.hold.number == m.number {
			a.hold.number = 0
			c.contestAnswered(a.hold, from, m)
		}
	}
}

func (c *core) claimAnswered(call *call, m *message) {
	call.tries = 0
	if m.kind != kindRefuse || m.reason != reasonTaken {
		return // tried again: at once after a grant, else with the next tick
	}
	if i := slices.Index(c.waiting, call); i >= 0 {
		c.waiting = slices.Delete(c.waiting, i, i+1)
		c.reply(call, result{err: fmt.Errorf("%s: %w by %.12s, given out by another peer", call, ErrTaken, m.text)})
	}
}

func (c *core) contestAnswered(h *hold, from mesh.PeerName, m *message) {
	if m.kind != kindRefuse || m.reason != reasonTaken || h.state != contest || c.holds.byOff[h.off] != h {
		return
	}
	c.holds.set(h, collided)
	h.rival = fmt.Sprintf("%.12s on peer %s", m.text, from)
	c.log.Error("an address is in use twice: renumber one of the two", "addr", h.addr, "container", h.owner, "with", h.rival)
}

// ownSpans joins what is ours by the ring into runs.
func (c *core) ownSpans() (out []span) {
	for _, s := range c.ring.Owned(c.me) {
		if n := len(out); n > 0 && out[n-1].hi == s.Start {
			out[n-1].hi = s.End
		} else {
			out = append(out, span{s.Start, s.End})
		}
	}
	return out
}
