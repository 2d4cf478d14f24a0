package ipam

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"meshd/ipam/ring"
	"meshd/mesh"
)

const (
	compareEvery  = 300 * time.Millisecond
	maxUnready    = 5 // names in a message to people
	claimingLimit = settleLimit
)

// ringChanged looks at what the last merges mean for this peer.
func (c *core) ringChanged() {
	if c.ring.Generation() == c.seenGen || c.ring.Cluster() == 0 {
		return
	}
	for c.ring.Generation() != c.seenGen {
		c.seenGen = c.ring.Generation()
		if c.ring.Successor() != 0 && c.ring.Successor() != c.ring.Cluster() {
			c.moveTo(c.ring.Successor())
			return
		}
		c.adoptSeed()
		switch m := c.ring.Member(c.me); {
		case m.Fenced():
			c.newLife(fmt.Sprintf("peer %s declared it lost", m.Fences[0].Peer))
		case m.Flags&ring.Left != 0 && !c.left:
			c.newLife("it had given its addresses away")
		default:
			c.compareSpace()
		}
		c.fenceFormerLives()
	}
}

// compareSpace notes what came to us, and notices if something of ours went to others without our doing:
// then our state file is older than what we had told them.
func (c *core) compareSpace() {
	space := c.ownSpans()
	if slices.Equal(space, c.space) {
		return
	}
	was := c.space
	c.space = space
	for _, s := range was {
		for off := s.lo; off < s.hi; {
			seg := c.ring.At(off)
			if seg.Owner != c.me {
				c.newLife(fmt.Sprintf("[%s, %s] belongs to peer %s, by a change that the state file here does not have",
					c.ring.Addr(off), c.ring.Addr(min(seg.End, s.hi)-1), seg.Owner.Peer))
				return
			}
			off = seg.End
		}
	}
	c.urgent = true // space is on disk before it is used
	c.judgeHolds()
}

// adoptSeed takes the life under which a seed founded this peer before anybody had seen it.
func (c *core) adoptSeed() {
	seed := ring.ID{Peer: c.cfg.Name}
	if m := c.ring.Member(seed); c.fresh && c.me != seed && m.Active() && m.Flags&ring.Seen == 0 && !c.ring.Member(c.me).Active() {
		c.setLife(0)
		c.space = nil
		c.compareSpace()
		c.learn(c.delta(ring.Member{ID: seed, Flags: ring.Joined | ring.Seen}))
	}
}

// fenceFormerLives declares lost what this peer was before it lost its state: nobody knows better. A life that a
// former one has declared lost is the present one's affair too: what runs here may have its addresses.
func (c *core) fenceFormerLives() {
	if c.left {
		return
	}
	for _, m := range c.ring.Members() {
		if m.ID.Peer != c.me.Peer || m.ID == c.me {
			continue
		}
		inherited := !slices.Contains(m.Fences, c.me) && len(c.ring.Owned(m.ID)) > 0 &&
			slices.ContainsFunc(m.Fences, func(f ring.ID) bool { return f.Peer == c.me.Peer })
		if m.Active() || inherited {
			c.log.Warn("the state of an earlier life of this peer is lost; taking its address space over", "life", m.ID)
			c.fence(m.ID)
		}
	}
}

// busy reports whether this peer needs to be a member.
func (c *core) busy() bool {
	if c.left {
		return false
	}
	if len(c.holds.contest) > 0 || len(c.space) > 0 || len(c.losses) > 0 {
		return true
	}
	return slices.ContainsFunc(c.waiting, func(call *call) bool { return call.op == opAllocate || call.op == opClaim || call.op == opRemove })
}

// join makes this peer a member, if it has to be one.
func (c *core) join() {
	if c.busy() {
		c.becomeMember()
	}
}

func (c *core) becomeMember() {
	const flags = ring.Joined | ring.Seen
	if c.ring.Cluster() != 0 && c.ring.Successor() == 0 && c.ring.Member(c.me).Flags&flags != flags {
		c.learn(c.delta(ring.Member{ID: c.me, Flags: flags}))
		c.ringChanged()
	}
}

// attach compares views with the other members, from the start of a life until every one that is alive
// knows of us and we know all that it knows of our addresses.
func (c *core) attach() {
	if c.ring.Cluster() == 0 || c.left {
		return
	}
	m := c.ring.Member(c.me)
	if !m.Active() {
		return
	}
	c.fresh = false
	if !c.serving {
		c.judgeServing()
	}
	if c.serving && !c.ready && c.liveKnown {
		c.ready = c.now-c.servingAt >= claimingLimit || !c.othersClaim()
	}
	if c.serving && c.ready || c.now-c.comparedAt < compareEvery {
		return
	}
	c.comparedAt = c.now
	ids := []ring.ID{c.me}
	if c.filling > 0 {
		ids = append(ids, ring.ID{})
	}
	for _, name := range c.alivePeers() {
		if !c.answered[name] {
			c.send(name, c.compare(ids, 0))
		}
	}
}

// judgeServing decides whether enough others have been heard for space to be handed out. A new life needs
// all members that are alive to know of it. A restarted one may have lost its space meanwhile, or have
// an old state file, and its neighbours are found only by and by: it needs all members, or the alive
// ones once the grace time is over. And a view with gaps decides nothing: those who own the gaps are members
// that this peer may never have heard of.
func (c *core) judgeServing() {
	others := c.activeMembers()
	answered, missing := 0, 0
	for _, id := range others {
		switch {
		case c.answered[id.Peer]:
			answered++
		case c.alive(id.Peer):
			missing++
		}
	}
	switch waited := c.now-c.birth >= c.cfg.Grace; {
	case missing > 0 || c.ring.Unowned() > 0:
		return
	case c.founded || answered == len(others) && answered > 0 || answered > 0 && !c.restarted:
	case !waited:
		return
	}
	c.serving, c.servingAt = true, c.now
	c.log.Info("address allocation is ready", "range", c.cfg.Range, "cluster", hex64(c.ring.Cluster()))
}

// othersClaim reports whether another peer is still being given the addresses of what runs on it.
func (c *core) othersClaim() bool {
	for _, p := range c.peers {
		if p.state == Alive && p.claiming {
			return true
		}
	}
	return false
}

// notReady says what allocation as a whole waits for.
func (c *core) notReady() string {
	if c.ring.Cluster() == 0 {
		return c.whyNoRing()
	}
	if !c.liveKnown {
		return "what is running on this host has not been counted yet"
	}
	if !c.serving {
		var names []string
		for _, id := range c.activeMembers() {
			if c.alive(id.Peer) && !c.answered[id.Peer] {
				names = append(names, id.Peer.String())
			}
		}
		if n := c.ring.Unowned(); n > 0 && c.now-c.birth > c.cfg.Grace {
			return fmt.Sprintf("nobody in reach knows who owns %d addresses of the range (if nobody who does comes back: meshctl ipam repair)", n)
		}
		if len(names) == 0 {
			return fmt.Sprintf("no other member is reachable; going on alone after %s", c.cfg.Grace)
		}
		return "comparing address ranges with " + few(names)
	}
	return "other peers are claiming the addresses of what runs on them"
}

func few(names []string) string {
	if len(names) > maxUnready {
		names = append(slices.Clone(names[:maxUnready]), fmt.Sprintf("%d more", len(names)-maxUnready))
	}
	return strings.Join(names, ", ")
}

// compare asks what the other side knows of these members' addresses.
func (c *core) compare(ids []ring.ID, flags byte) *message {
	m := &message{kind: kindCompare, flags: flags, members: c.ring.MembersDigest()}
	for _, id := range ids {
		m.items = append(m.items, item{id, c.ring.Digest(id)})
	}
	return m
}

// answerCompare says what we know, first having noted who is lost if the sender says so.
func (c *core) answerCompare(from mesh.PeerName, m *message) {
	if c.ring.Cluster() == 0 || m.cluster == 0 {
		c.send(from, &message{kind: kindCompared, members: c.ring.MembersDigest()})
		if c.ring.Cluster() != 0 {
			c.sendFacts(from, c.ring.Select(nil), 0) // as much as fits: they have no ring yet
		}
		return
	}
	sender := ring.ID{Peer: from, Life: m.life}
	if m.flags&flagFence != 0 && !c.ring.Member(sender).Active() {
		// Either it has to hear first what became of it, or we have not heard of it yet.
		c.send(from, &message{kind: kindCompared, members: c.ring.MembersDigest()})
		c.sendFacts(from, c.delta(c.ring.Members()...), 0)
		return
	}
	reply := &message{kind: kindCompared}
	for _, it := range m.items {
		if m.flags&flagFence != 0 {
			c.learn(c.delta(ring.Member{ID: it.id, Fences: []ring.ID{sender}}))
			c.freeze(it.id)
		}
		reply.items = append(reply.items, item{it.id, c.ring.Digest(it.id)})
	}
	// It may be about us. Then the answer goes out under the new life, and the sender asks that one again.
	c.ringChanged()
	reply.members = c.ring.MembersDigest()
	c.send(from, reply)
	for i, it := range reply.items {
		if it.digest != m.items[i].digest && !it.id.IsZero() { // who fills gaps comes by comparing tables
			c.sendFacts(from, ring.Delta{Cluster: c.ring.Cluster(), Range: c.cfg.Range, Segments: c.ring.Owned(it.id)}, flagReply)
		}
	}
	if reply.members != m.members {
		c.sendFacts(from, c.delta(c.ring.Members()...), 0)
	}
}

// freeze notes, for good, that somebody builds on what we say of this member's addresses.
func (c *core) freeze(id ring.ID) {
	if !c.acked[id] {
		c.acked[id] = true
		c.setMeta(metaAcked+hex.EncodeToString(ring.AppendID(nil, id)), []byte{1})
	}
}

// noteCompared compares an answer with our view.
func (c *core) noteCompared(from mesh.PeerName, m *message) {
	if m.cluster == 0 || c.ring.Cluster() == 0 {
		return
	}
	sameMembers := m.members == c.ring.MembersDigest()
	if !sameMembers {
		c.sendFacts(from, c.delta(c.ring.Members()...), 0)
	}
	sender := ring.ID{Peer: from, Life: m.life}
	mine, gaps := false, c.filling == 0
	for _, it := range m.items {
		same := it.digest == c.ring.Digest(it.id)
		mine, gaps = mine || it.id == c.me && same, gaps || it.id.IsZero() && same
		if !same && !it.id.IsZero() {
			c.sendFacts(from, ring.Delta{Cluster: c.ring.Cluster(), Range: c.cfg.Range, Segments: c.ring.Owned(it.id)}, flagReply)
		}
		if l := c.losses[it.id]; l != nil {
			l.answers[sender] = answer{it.digest, m.members}
			c.answersNew = true
		}
	}
	if mine && gaps && sameMembers {
		c.answered[from] = true
	}
	c.noteHeir(sender)
}

// heedFacts merges what a colleague knows. Frozen addresses change if the one who collects the facts
// about their owner tells us, or if that is us.
func (c *core) heedFacts(from mesh.PeerName, m *message) {
	d, err := ring.ParseDelta(m.rest)
	if err != nil {
		c.log.Debug("bad facts", "peer", from, "err", err)
		return
	}
	sender := ring.ID{Peer: from, Life: m.life}
	collects := func(owner ring.ID) bool {
		fences := c.ring.Member(owner).Fences
		return slices.Contains(fences, sender) || slices.Contains(fences, c.me)
	}
	news, err := c.ring.Merge(d, func(owner ring.ID) bool { return c.frozen(owner) && !collects(owner) })
	if err != nil {
		c.log.Debug("bad facts", "peer", from, "err", err)
		return
	}
	c.urgent = c.urgent || !news.Empty()
	if m.flags&flagReply == 0 {
		return
	}
	better := ring.Delta{Cluster: c.ring.Cluster(), Range: c.cfg.Range}
	for _, s := range d.Segments {
		c.ring.Segments(s.Start, s.End, func(mine ring.Segment) bool {
			theirs := s
			theirs.Start, theirs.End = mine.Start, mine.End
			if mine != theirs && !mine.Owner.IsZero() {
				better.Segments = append(better.Segments, mine)
			}
			return true
		})
	}
	if !better.Empty() {
		c.sendFacts(from, better, 0)
	} else {
		c.send(from, &message{kind: kindCompared, members: c.ring.MembersDigest()})
	}
}
