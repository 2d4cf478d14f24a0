package ipam

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"meshd/ipam/ring"
	"meshd/mesh"
)

const (
	fenceEvery  = 500 * time.Millisecond
	orphanEvery = time.Second
	strayChecks = 10
)

// loss is the removal of one fenced member, as one of those see it who declared it lost.
type loss struct {
	answers  map[ring.ID]answer // the last one of every member
	askedAt  time.Duration
	tookAt   time.Duration
	finished bool
	taken    int // addresses that came to us
}

type answer struct{ digest, members uint64 }

// fence declares a member lost and begins to collect what is known of it.
func (c *core) fence(id ring.ID) {
	c.learn(c.delta(ring.Member{ID: id, Fences: []ring.ID{c.me}}))
	c.freeze(id)
	if c.losses[id] == nil {
		c.losses[id] = &loss{answers: make(map[ring.ID]answer), askedAt: c.now - fenceEvery, tookAt: c.now - fenceEvery}
	}
}

// startRemove declares a peer lost; done is false if the call has been answered.
func (c *core) startRemove(call *call) (goOn bool) {
	if call.peer == c.cfg.Name {
		c.reply(call, result{})
		return false
	}
	if c.alive(call.peer) {
		c.reply(call, result{err: fmt.Errorf("%s: %w: run reset there", call, ErrAlive)})
		return false
	}
	if c.suspect(call.peer) {
		c.out = append(c.out, effect{lost: call.peer})
	}
	if c.ring.Cluster() == 0 {
		c.reply(call, result{})
		return false
	}
	for _, m := range c.ring.Members() {
		if m.ID.Peer == call.peer && m.Flags&ring.Left == 0 && (!m.Fenced() || len(c.ring.Owned(m.ID)) > 0) {
			call.lost = append(call.lost, m.ID)
		}
	}
	if len(call.lost) == 0 {
		c.reply(call, result{})
		return false
	}
	return true
}

func (c *core) tryRemove(call *call) bool {
	c.becomeMember() // only a member is consulted by others, so only a member may take over
	n := 0
	for _, id := range call.lost {
		if !slices.Contains(c.ring.Member(id).Fences, c.me) {
			c.log.Info("removing a peer from address allocation", "peer", id.Peer, "life", id)
		}
		c.fence(id)
	}
	for _, id := range call.lost {
		l := c.losses[id]
		if !l.finished {
			missing, never := c.missing(id)
			switch {
			case !c.serving:
				call.why = c.notReady()
			case len(missing) > 0:
				call.why = "waiting for " + few(missing) + ", to hear what they know of its addresses (if they have gone too: meshctl rmpeer)"
			default:
				call.why = fmt.Sprintf("waiting for peer %s, which takes its addresses", c.winner(id).Peer)
			}
			if never && c.serving {
				c.reply(call, result{err: fmt.Errorf("%s: %w: %s; it goes on by itself once they answer or are removed too", call, ErrPending, call.why)})
				return true
			}
			return false
		}
		n += l.taken
	}
	c.reply(call, result{n: n})
	return true
}

// missing lists the members whose view of the lost one is not known to equal ours; never says that one
// of them is not even expected back.
func (c *core) missing(id ring.ID) (names []string, never bool) {
	l := c.losses[id]
	want := answer{c.ring.Digest(id), c.ring.MembersDigest()}
	for _, m := range c.activeMembers() {
		if m == id || l.answers[m] == want {
			continue
		}
		names = append(names, m.Peer.String())
		if p := c.peers[m.Peer]; (p == nil || p.state != Suspect && p.state != Alive) && c.now-c.birth > c.cfg.Grace {
			never = true
		}
	}
	return names, never
}

// winner is who takes the lost member's addresses: of those who declared it lost, the first that counts
// as a member itself; a later life of the same peer before all others, because what holds the addresses may
// still run there. When the views are known to be equal everywhere, nobody can know of another one.
func (c *core) winner(id ring.ID) (first ring.ID) {
	for _, f := range c.ring.Member(id).Fences {
		if c.ring.Member(f).Active() && (first.IsZero() || f.Peer == id.Peer && first.Peer != id.Peer) {
			first = f
		}
	}
	return first
}

func (c *core) handleLosses() {
	if c.ring.Cluster() == 0 || c.left {
		return
	}
	member := c.ring.Member(c.me).Active()
	if c.now-c.orphanAt >= orphanEvery {
		c.orphanAt = c.now
		if member {
			c.adoptLosses()
			c.declareLosses()
		}
		c.verifyLosses() // who is no member has a view as well
		c.tellLost()
	}
	if !member {
		return
	}
	// Messages come by the thousand, and a look at all answers about all losses is long.
	if c.ring.Generation() == c.collectedGen && !c.answersNew && c.now-c.collectedAt < tickInterval {
		return
	}
	c.collectedGen, c.collectedAt, c.answersNew = c.ring.Generation(), c.now, false
	for _, id := range slices.SortedFunc(maps.Keys(c.losses), ring.ID.Compare) {
		c.collect(id)
	}
	c.askLosses()
}

// collect takes the lost member's addresses once all views of them are equal, if that is up to us.
func (c *core) collect(id ring.ID) {
	l := c.losses[id]
	empty := len(c.ring.Owned(id)) == 0
	if l.finished && empty {
		return
	}
	l.finished = false
	if names, _ := c.missing(id); len(names) > 0 {
		return
	}
	if empty {
		l.finished = true
		return
	}
	if c.winner(id) != c.me || !c.serving || c.full() || c.now-l.tookAt < fenceEvery {
		return
	}
	d := c.ring.Takeover(id, c.me)
	l.tookAt = c.now
	if len(d.Segments) == 0 { // no higher stamp is left
		return
	}
	n := 0
	for _, s := range d.Segments {
		n += int(s.Len())
	}
	c.write = &ownWrite{delta: d, done: func() {
		c.log.Info("took over the addresses of a lost peer", "peer", id.Peer, "addresses", n)
		l.taken += n
		l.finished = true
		c.broadcast(d)
		c.judgeHolds()
	}}
}

// askLosses asks every member whose answer is missing, about all losses at once.
func (c *core) askLosses() {
	todo := make(map[mesh.PeerName][]ring.ID)
	members := c.ring.MembersDigest()
	for _, id := range slices.SortedFunc(maps.Keys(c.losses), ring.ID.Compare) {
		l := c.losses[id]
		if l.finished || c.now-l.askedAt < fenceEvery {
			continue
		}
		l.askedAt = c.now
		want := answer{c.ring.Digest(id), members}
		for _, m := range c.activeMembers() {
			if m != id && l.answers[m] != want && c.alive(m.Peer) {
				todo[m.Peer] = append(todo[m.Peer], id)
			}
		}
	}
	for _, name := range slices.SortedFunc(maps.Keys(todo), mesh.PeerName.Compare) {
		for part := range slices.Chunk(todo[name], maxCompare) {
			c.send(name, c.compare(part, flagFence))
		}
	}
}

// adoptLosses takes up removals that nobody carries on: those that this peer declared before a restart,
// and, on the first of the members that are alive, those whose declarers are all gone themselves.
func (c *core) adoptLosses() {
	first := c.firstAlive()
	for _, m := range c.ring.Members() {
		if m.Active() || c.losses[m.ID] != nil || len(c.ring.Owned(m.ID)) == 0 {
			delete(c.strays, m.ID)
			continue
		}
		if !m.Fenced() { // it left; who has not heard of that may still give it something
			if c.strays[m.ID]++; first && c.strays[m.ID] > strayChecks {
				c.fence(m.ID)
			}
			continue
		}
		if slices.Contains(m.Fences, c.me) || first && c.winner(m.ID).IsZero() {
			c.fence(m.ID)
		}
	}
}

// verifyLosses asks whoever takes a lost member's addresses about those that this view still has. Our
// view of them is frozen, and what it has may be older than what was known when all views were equal:
// only the one who collects them can put it right.
func (c *core) verifyLosses() {
	todo := make(map[mesh.PeerName][]ring.ID)
	for _, m := range c.ring.Members() {
		if m.Fenced() && len(c.ring.Owned(m.ID)) > 0 {
			if w := c.winner(m.ID); !w.IsZero() && w != c.me && c.alive(w.Peer) {
				todo[w.Peer] = append(todo[w.Peer], m.ID)
			}
		}
	}
	for _, name := range slices.SortedFunc(maps.Keys(todo), mesh.PeerName.Compare) {
		c.send(name, c.compare(todo[name][:min(len(todo[name]), maxCompare)], 0))
	}
}

// tellLost tells of those whom others have removed: what they announced, such as addresses outside the range, is free.
// It is told once for a life. One that is here again under another life may go for a while as anybody may.
func (c *core) tellLost() {
	for _, m := range c.ring.Members() {
		if !m.Fenced() || c.toldLost[m.ID] {
			continue
		}
		switch {
		case c.alive(m.ID.Peer):
			c.toldLost[m.ID] = true
		case c.suspect(m.ID.Peer):
			c.toldLost[m.ID] = true
			c.out = append(c.out, effect{lost: m.ID.Peer})
		}
	}
}

// suspect reports whether a peer is one that was here and is not.
func (c *core) suspect(name mesh.PeerName) bool {
	p := c.peers[name]
	return p != nil && p.state == Suspect
}

// firstAlive reports whether this is the first of the members that are alive, in the order of IDs.
func (c *core) firstAlive() bool {
	for _, id := range c.activeMembers() {
		if c.alive(id.Peer) && id.Compare(c.me) < 0 {
			return false
		}
	}
	return true
}

// declareLosses removes members that have been away for longer than ReclaimAfter, if most of all
// members are here and this is the first of them.
func (c *core) declareLosses() {
	if c.cfg.ReclaimAfter <= 0 || !c.serving || !c.firstAlive() {
		return
	}
	members := c.activeMembers()
	here := 1
	for _, id := range members {
		if c.alive(id.Peer) {
			here++
		}
	}
	if 2*here <= 1+len(members) {
		return
	}
	for _, id := range members {
		since := time.Duration(0)
		if p := c.peers[id.Peer]; p != nil {
			since = p.since
		}
		if !c.alive(id.Peer) && c.now-since >= c.cfg.ReclaimAfter {
			c.log.Warn("a peer has been away for too long: removing it from address allocation", "peer", id.Peer, "after", c.cfg.ReclaimAfter)
			c.fence(id)
		}
	}
}

// startLeave picks the heir of all our space: a live member, else another live peer, else a member that
// may come back.
func (c *core) startLeave(call *call) (goOn bool) {
	if c.ring.Cluster() == 0 || !c.ring.Member(c.me).Active() {
		c.reply(call, result{})
		return false
	}
	call.heir = c.pickHeir()
	if call.heir.IsZero() {
		c.reply(call, result{err: fmt.Errorf("%s: %w: there is no other peer", call, ErrNoHeir)})
		return false
	}
	return true
}

func (c *core) pickHeir() ring.ID {
	owners := c.ring.Owners(0, c.ring.Size())
	var best ring.ID
	score := 0
	consider := func(id ring.ID, s int) {
		if s > score {
			best, score = id, s
		}
	}
	for _, id := range c.activeMembers() {
		switch alive := c.alive(id.Peer); {
		case alive && owners[id] > 0:
			consider(id, 5)
		case alive:
			consider(id, 4)
		case owners[id] > 0:
			consider(id, 2)
		default:
			consider(id, 1)
		}
	}
	for _, name := range c.alivePeers() {
		id := ring.ID{Peer: name, Life: c.peers[name].life}
		if c.peers[name].heard && !c.ring.Fenced(id) && c.ring.Member(id).Flags&ring.Left == 0 && c.strangers[name] == (stranger{}) {
			consider(id, 3)
		}
	}
	return best
}

func (c *core) tryLeave(call *call) bool {
	if c.left {
		call.why = fmt.Sprintf("peer %s has not confirmed", call.heir.Peer)
		if !c.alive(call.heir.Peer) {
			c.reply(call, result{n: call.tries}) // it will hear of it from the others
			return true
		}
		if c.now-c.noticeAt >= fenceEvery {
			c.noticeAt = c.now
			c.sendFacts(call.heir.Peer, c.leaving(call.heir), flagReply)
		}
		return false
	}
	if c.full() {
		return false
	}
	d := ring.Delta{Cluster: c.ring.Cluster(), Range: c.cfg.Range,
		Members: []ring.Member{{ID: c.me, Flags: ring.Left}, {ID: call.heir, Flags: ring.Joined}}}
	n := 0
	for _, s := range c.space {
		g, err := c.ring.Grant(c.me, s.lo, s.hi, call.heir)
		if err != nil {
			c.reply(call, result{err: err})
			return true
		}
		d.Segments = append(d.Segments, g.Segments...)
		n += int(s.hi - s.lo)
	}
	call.why = "the state file"
	c.write = &ownWrite{delta: d,
		done: func() {
			c.left, c.serving, c.ready = true, false, false
			c.setMeta(metaLeft, []byte{1})
			call.tries = n
			for _, h := range c.holds.byKey {
				c.drop(h)
			}
			c.broadcast(d)
		},
		failed: func(err error) {
			if i := slices.Index(c.waiting, call); i >= 0 {
				c.waiting = slices.Delete(c.waiting, i, i+1)
			}
			c.reply(call, result{err: err})
		},
	}
	return false
}

// leaving is what the heir has to know.
func (c *core) leaving(heir ring.ID) ring.Delta {
	return ring.Delta{Cluster: c.ring.Cluster(), Range: c.cfg.Range,
		Members:  []ring.Member{c.ring.Member(c.me), c.ring.Member(heir)},
		Segments: c.ring.Owned(heir)}
}

// noteHeir ends a leave that the heir has answered.
func (c *core) noteHeir(sender ring.ID) {
	if !c.left {
		return
	}
	c.waiting = slices.DeleteFunc(c.waiting, func(call *call) bool {
		done := call.op == opLeave && call.heir == sender
		if done {
			c.reply(call, result{n: call.tries})
		}
		return done
	})
}
