package ipam

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"slices"
	"time"

	"meshd/ipam/election"
	"meshd/ipam/ring"
	"meshd/mesh"
)

// maxFounders bounds who gets a share at the founding; the others ask when they need space.
const maxFounders = 100

// found gets the ring founded, if it is needed and nobody has it.
func (c *core) found() {
	if c.ring.Cluster() != 0 || c.left {
		return
	}
	needed := len(c.holds.contest) > 0 || slices.ContainsFunc(c.waiting, func(call *call) bool {
		return call.op == opAllocate || call.op == opClaim || call.op == opPrime
	})
	if !needed {
		return
	}
	switch c.cfg.Init.Mode {
	case Seed:
		if slices.Contains(c.cfg.Init.Seed, c.cfg.Name) {
			c.foundBySeed()
		} else {
			c.askFounders()
		}
	case Observer:
		c.askFounders()
	case Consensus:
		c.wantElection()
	}
}

// askFounders has those found the ring who may.
func (c *core) askFounders() {
	if c.now >= c.attemptAt {
		c.attemptAt = c.now + time.Second
		for _, name := range c.alivePeers() {
			c.send(name, &message{kind: kindFound})
		}
	}
}

// foundBySeed divides the range among the seed, without asking; only a founder does. But a founder that
// lost its state file looks just like one that never had any, so first it hears out all peers in reach, or
// waits for the grace time if there are none: whoever has the ring says so. The limit: a founder that
// starts without its state, and reaches nobody, hands its share out again. It stays out of reach of those
// who know better until they meet; then it is treated like any peer with an old state file.
func (c *core) foundBySeed() {
	if c.ring.Cluster() != 0 || c.cfg.Init.Mode != Seed || c.left || !slices.Contains(c.cfg.Init.Seed, c.cfg.Name) {
		return
	}
	if alive := c.alivePeers(); c.hearing(alive) || len(alive) == 0 && c.now-c.birth < c.cfg.Grace {
		return
	}
	h := fnv.New64a()
	h.Write([]byte(c.cfg.Range.String()))
	names := slices.Clone(c.cfg.Init.Seed)
	slices.SortFunc(names, mesh.PeerName.Compare)
	var ids []ring.ID
	for _, name := range slices.Compact(names) {
		h.Write(name[:])
		ids = append(ids, ring.ID{Peer: name})
	}
	c.founded = len(ids) == 1 && ids[0].Peer == c.cfg.Name
	c.founding(ring.Founding(c.cfg.Range, max(h.Sum64(), 1), ids, 0, ids[0]))
}

func (c *core) founding(d ring.Delta) {
	news, err := c.ring.Merge(d, nil)
	if err != nil {
		c.log.Error("the ring cannot be founded", "err", err)
		return
	}
	c.log.Info("the address ring is founded", "range", c.cfg.Range, "cluster", hex64(d.Cluster), "founders", len(d.Members))
	c.urgent = true
	c.broadcast(news)
	c.ringChanged()
}

// hearing reports whether one of these peers has a ring, which is on its way here, or has not said whether it has
// one. For that nobody is waited for longer than the grace time: not everybody takes part in allocation.
func (c *core) hearing(alive []mesh.PeerName) bool {
	return slices.ContainsFunc(alive, func(name mesh.PeerName) bool {
		p := c.peers[name]
		return p.ringed || !p.heard && c.now-c.birth < c.cfg.Grace
	})
}

// wantElection begins an attempt to found the ring by consensus, if the time has come and enough voters
// are in reach. When many join a mesh at once they are a quorum of their own, and may agree before one of the few
// who have its ring gets a word in. So they, too, hear out all peers in reach first.
func (c *core) wantElection() {
	if c.ring.Cluster() != 0 || c.cfg.Init.Mode != Consensus || c.left || c.now < c.attemptAt {
		return
	}
	alive, voters := c.alivePeers(), 1
	if c.hearing(alive) {
		return
	}
	for _, name := range alive {
		if c.peers[name].voter {
			voters++
		}
	}
	// A wrong guess of how many there will be is harmless as long as they know of each other.
	c.quorum = max(c.cfg.Init.N, voters)/2 + 1
	if 1+len(alive) < c.quorum {
		return
	}
	c.attemptAt = c.now + foundingPause + time.Duration(c.rand.Int64N(int64(foundingPause)))
	c.voted(c.voter.Start(alive, c.quorum, c.foundersValue))
}

// The value that is agreed on: the cluster's id (8), then the IDs (10 each) of who gets a share, the
// proposer's first.
func (c *core) foundersValue(cards map[mesh.PeerName][]byte) []byte {
	cluster := c.rand.Uint64() | 1
	value := ring.AppendID(binary.BigEndian.AppendUint64(nil, cluster), c.me)
	for name, card := range cards {
		if name != c.cfg.Name && len(card) == 10 && len(value) < 8+10*maxFounders {
			value = append(value, card...)
		}
	}
	return value
}

func (c *core) heedVote(from mesh.PeerName, m *message) {
	if c.ring.Cluster() != 0 {
		if m.cluster == 0 {
			c.sendFacts(from, c.ring.Select(nil), 0)
		}
		return
	}
	vote, err := election.Parse(m.rest)
	if err != nil {
		c.log.Debug("bad vote", "peer", from, "err", err)
		return
	}
	c.voted(c.voter.Handle(from, vote))
}

// voted sends what came out of a step of the election and looks whether it is over.
func (c *core) voted(outs []election.Out) {
	c.setMeta(metaElection, c.voter.State())
	for _, o := range outs {
		c.send(o.To, &message{kind: kindVote, rest: o.Msg.Append(nil)})
	}
	value := c.voter.Decided()
	if value == nil || c.ring.Cluster() != 0 {
		return
	}
	if len(value) < 18 || len(value)%10 != 8 {
		c.log.Error("the election ended with a value that makes no sense", "bytes", len(value))
		return
	}
	var ids []ring.ID
	for b := value[8:]; len(b) > 0; b = b[10:] {
		ids = append(ids, ring.ParseID(b))
	}
	c.founded = true
	c.founding(ring.Founding(c.cfg.Range, binary.BigEndian.Uint64(value), ids, ring.Seen, ids[0]))
}

func (c *core) whyNoRing() string {
	alive := c.alivePeers()
	mode := c.cfg.Init.Mode
	switch {
	case mode == Seed && !slices.Contains(c.cfg.Init.Seed, c.cfg.Name):
		return "waiting for a peer of the seed"
	case mode == Observer:
		return "waiting for the voters to found the ring"
	case mode == Seed || c.hearing(alive):
		return "waiting to hear whether the peers in reach have a ring already"
	}
	q := c.quorum
	if q == 0 {
		q = c.cfg.Init.N/2 + 1
	}
	return fmt.Sprintf("awaiting consensus (quorum: %d, known: %d)", q, 1+len(alive))
}
