package ipam

import (
	"errors"
	"fmt"
	"slices"
)

// Two clusters that meet (because a quorum was guessed too small, or two networks were joined later)
// both go on with their own ring: nothing is merged, nobody's addresses change, no connection is cut.
// Both sides say so in their log and status. Addresses of the two may be equal, which only people can
// decide about; so joining them is a command.
//
// Repair makes one cluster of two. The one with the lower id stays, so that repairs run on both sides
// at once mean the same. The other one's ring is marked with its successor, which spreads like any other
// part of it; every peer that sees the mark forgets the old ring, begins a new life in the successor, and
// asks there for the addresses of what runs on it, one by one, as any peer does that lost its space. What
// somebody else has already is a collision: it is logged, listed in Status and returned, and the
// container keeps its address until it is renumbered (its next Allocate gives it another one). A peer that
// missed all this, because it was away, is told so by the first peer of the successor that it talks to.
//
// The other thing to repair is a ring with gaps: ranges whose owners nobody left has ever heard of, because
// all who had lost their state files, and the one that remained had been told a part of the ring only. Nobody
// hands out addresses then, for the owners may just be away. That they are not is for people to say: the peer
// that is told to repair takes the gaps. Of several that are told so, the first does, and no two: see fillGaps.
// The limit: they see each other. Who fills gaps while another who fills them is out of reach has the same addresses,
// until they meet.

// Repaired is what a repair came to.
type Repaired struct {
	Merged     bool   // this cluster and another one are one
	Filled     bool   // there were addresses of nobody, which have owners now:
	Taken      uint64 // of these, this peer took so many; the others were taken by another one
	Collisions []Collision
}

// startRepair joins this cluster with another one in sight.
func (c *core) startRepair(call *call) (goOn bool) {
	call.since = c.now
	if c.ring.Cluster() == 0 {
		c.reply(call, result{err: fmt.Errorf("%s: %w: %s", call, ErrNoRing, c.notReady())})
		return false
	}
	other := c.otherCluster()
	if other == 0 {
		if len(c.holds.contest) > 0 || c.ring.Successor() != 0 {
			return true // under way already
		}
		if c.ring.Unowned() > 0 {
			call.gaps = true
			c.filling++
			clear(c.answered)
			for _, p := range c.peers {
				p.fills = false
			}
			return true
		}
		c.reply(call, result{repaired: Repaired{Collisions: c.collisions()}})
		return false
	}
	call.merges = true
	if other < c.ring.Cluster() {
		c.giveWay(other)
	}
	return true
}

// otherCluster is a cluster of our range that a live peer belongs to, or 0.
func (c *core) otherCluster() (other uint64) {
	for name, s := range c.strangers {
		if s.Cluster != 0 && !s.Range.IsValid() && c.alive(name) && (other == 0 || s.Cluster < other) {
			other = s.Cluster
		}
	}
	return other
}

func (c *core) tryRepair(call *call) bool {
	if other := c.otherCluster(); other != 0 {
		call.why = "waiting for the peers of cluster " + hex64(other)
		if other > c.ring.Cluster() && c.now-c.noticeAt >= fenceEvery {
			c.noticeAt = c.now
			for _, name := range c.alivePeers() {
				if s := c.strangers[name]; s.Cluster != 0 && !s.Range.IsValid() {
					c.send(name, &message{kind: kindNotice, old: s.Cluster, to: c.ring.Cluster()})
				}
			}
		}
		return false
	}
	if call.gaps && c.ring.Unowned() > 0 {
		c.fillGaps(call)
		return false
	}
	if n := len(c.holds.contest); n > 0 {
		call.why = "asking for the addresses of what runs here"
		for h := range c.holds.contest {
			if owner := c.ring.At(h.off).Owner; !c.serving || owner.IsZero() || !c.ring.Fenced(owner) && c.alive(owner.Peer) {
				return false
			}
		}
		c.reply(call, result{err: fmt.Errorf("%s: %w: the owners of %d addresses are unreachable", call, ErrPending, n)})
		return true
	}
	c.reply(call, result{repaired: Repaired{Merged: call.merges, Filled: call.gaps, Taken: call.taken, Collisions: c.collisions()}})
	return true
}

// fillGaps takes what nobody owns, once all peers in reach have had the time to say who does, and have answered, after
// the call began, that they see the same members and the same gaps. That keeps two from doing it. Whoever is
// answered by the other has told it before that it fills, and what it is answered says whether the other one does too:
// then the first of the two goes on alone. And when the other one has finished already, its gaps are not the same.
func (c *core) fillGaps(call *call) {
	c.becomeMember()
	call.why = "waiting for whoever knows more of the ring"
	for _, id := range c.activeMembers() {
		if id.Peer != c.cfg.Name && c.alive(id.Peer) && !c.answered[id.Peer] {
			return
		}
	}
	for _, name := range c.alivePeers() {
		if c.peers[name].fills && name.Compare(c.cfg.Name) < 0 {
			call.why = fmt.Sprintf("peer %s is taking them", name)
			return
		}
	}
	if c.full() || c.now-call.since < c.cfg.Grace || c.ring.Successor() != 0 {
		return
	}
	d, n := c.ring.Fill(c.me), c.ring.Unowned()
	c.write = &ownWrite{delta: d, done: func() {
		c.log.Warn("took the addresses that nobody in reach knows the owner of", "addresses", n)
		c.broadcast(d)
		c.judgeHolds()
		call.taken = n
	}}
}

// giveWay marks our ring with its successor; seeing the mark, ringChanged moves us over.
func (c *core) giveWay(to uint64) {
	d := c.delta()
	d.Successor = to
	c.learn(d)
}

// heedNotice hears that a cluster, ours perhaps, gives way.
func (c *core) heedNotice(m *message) {
	if m.rng == c.cfg.Range && m.old == c.ring.Cluster() && m.old != 0 && m.to != 0 && m.to < m.old {
		c.giveWay(m.to)
		c.advance()
	}
}

// moveTo leaves the cluster for its successor.
func (c *core) moveTo(next uint64) {
	old := c.ring.Cluster()
	c.log.Warn("this cluster gives way to another", "old", hex64(old), "new", hex64(next))
	c.past[old] = next
	c.setMeta(metaPast+hex64(old), putU64(next))
	c.setMeta(metaWrite, nil)
	c.ring.Reset(next)
	c.seenGen = c.ring.Generation()
	for _, h := range c.holds.byOff {
		if h.state == collided { // what collided there may be free here
			c.holds.set(h, contest)
			h.number, h.rival = 0, ""
		}
	}
	c.newLife("cluster " + hex64(old) + " gave way to " + hex64(next))
	for _, name := range c.alivePeers() {
		if s := c.strangers[name]; s.Cluster == next {
			delete(c.strangers, name)
		}
		c.send(name, c.compare(nil, 0))
	}
}

// failWaiting answers every waiting call with an error, when the allocator stops.
func (c *core) failWaiting() {
	for _, call := range slices.Clone(c.waiting) {
		c.cancel(call, errors.Join(ErrStopped))
	}
}
