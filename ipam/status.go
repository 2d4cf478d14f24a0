package ipam

import (
	"net/netip"
	"slices"

	"meshd/ipam/ring"
	"meshd/mesh"
)

// State words of `status ipam`.
const (
	StateOff         = "off"
	StateIdle        = "idle"
	StateConsensus   = "awaiting consensus"
	StatePriming     = "priming"
	StateWaiting     = "waiting for IP(s)"
	StateUnreachable = "all ranges owned by unreachable peers"
	StateReady       = "ready"
	StateLeft        = "left"
)

// Status of address allocation.
type Status struct {
	State   string
	Why     string // what it waits for, if it does
	Range   netip.Prefix
	Default netip.Prefix
	Cluster string // 16 hexadecimal digits; empty before the founding

	Quorum, Known int // while awaiting consensus

	Entries []Entry // per owner; this peer first, the others by name
	Active  int     // addresses held on this host, inside the range

	UnreachableCount      int     // addresses owned by unreachable peers
	UnreachablePercentage float64 // of the range

	PendingAllocates []string // owners
	PendingClaims    []string // addresses
	Removals         []Removal
	Collisions       []Collision
	Strangers        []Stranger // peers of other clusters, or with another range
	Conflicts        int        // places where two contents had the same stamp (see ring.Conflict)
	DiskError        string
}

// Entry is one owner's share of the range.
type Entry struct {
	Peer       mesh.PeerName
	Life       uint32
	Owned      uint64
	Percentage float64
	Active     int  // addresses in use, for this peer only
	Reachable  bool // or this peer itself
	Removed    bool // declared lost; its share waits to be taken over
}

// Removal is a peer that was declared lost and whose addresses are not taken over yet.
type Removal struct {
	Peer       mesh.PeerName
	Takes      mesh.PeerName // who takes its addresses
	WaitingFor []string      // as far as this peer takes part in the removal
}

// Stranger is a peer that no ring can be shared with.
type Stranger struct {
	Peer    mesh.PeerName
	Range   netip.Prefix // theirs, if it differs
	Cluster string
}

func (c *core) status() Status {
	s := Status{State: StateOff, Active: len(c.holds.byOff), PendingAllocates: []string{}, PendingClaims: []string{}}
	if c.diskErr != nil {
		s.DiskError = c.diskErr.Error()
	}
	if !c.enabled() {
		return s
	}
	s.Range, s.Default = c.cfg.Range, c.cfg.DefaultSubnet
	if c.ring.Cluster() != 0 {
		s.Cluster = hex64(c.ring.Cluster())
	}
	for _, call := range c.waiting {
		switch call.op {
		case opAllocate:
			s.PendingAllocates = append(s.PendingAllocates, call.owner)
		case opClaim:
			s.PendingClaims = append(s.PendingClaims, call.addr.String())
		}
		if s.Why == "" {
			s.Why = c.whyWaiting(call)
		}
	}
	size := float64(c.ring.Size())
	reachable := false
	for id, n := range c.ring.Owners(0, c.ring.Size()) {
		if id.IsZero() {
			continue
		}
		m := c.ring.Member(id)
		e := Entry{Peer: id.Peer, Life: id.Life, Owned: n, Percentage: 100 * float64(n) / size,
			Reachable: c.alive(id.Peer) && !m.Fenced(), Removed: m.Fenced()}
		if id == c.me {
			e.Active = s.Active
		}
		if !e.Reachable {
			s.UnreachableCount += int(n)
			s.UnreachablePercentage += e.Percentage
		}
		reachable = reachable || e.Reachable
		s.Entries = append(s.Entries, e)
		if m.Fenced() {
			r := Removal{Peer: id.Peer, Takes: c.winner(id).Peer}
			if c.losses[id] != nil {
				r.WaitingFor, _ = c.missing(id)
			}
			s.Removals = append(s.Removals, r)
		}
	}
	slices.SortFunc(s.Entries, func(a, b Entry) int {
		if mine := a.Peer == c.cfg.Name; mine != (b.Peer == c.cfg.Name) {
			if mine {
				return -1
			}
			return 1
		}
		return ring.ID{Peer: a.Peer, Life: a.Life}.Compare(ring.ID{Peer: b.Peer, Life: b.Life})
	})
	slices.SortFunc(s.Removals, func(a, b Removal) int { return a.Peer.Compare(b.Peer) })
	for name, o := range c.strangers {
		s.Strangers = append(s.Strangers, Stranger{name, o.Range, hex64(o.Cluster)})
	}
	slices.SortFunc(s.Strangers, func(a, b Stranger) int { return a.Peer.Compare(b.Peer) })
	s.Collisions = c.collisions()
	s.Conflicts = len(c.ring.Conflicts())
	s.Quorum, s.Known = c.quorum, 1+len(c.alivePeers())
	s.State = c.stateWord(len(s.Entries) > 0 && !reachable, len(s.PendingAllocates)+len(s.PendingClaims) > 0)
	return s
}

func (c *core) stateWord(unreachable, pending bool) string {
	switch {
	case c.left:
		return StateLeft
	case c.ring.Cluster() == 0 && len(c.waiting) == 0:
		return StateIdle
	case c.ring.Cluster() == 0 && c.cfg.Init.Mode == Consensus:
		return StateConsensus
	case c.ring.Cluster() == 0:
		return StatePriming
	case unreachable:
		return StateUnreachable
	case pending && !c.ready:
		return StatePriming
	case pending:
		return StateWaiting
	}
	return StateReady
}
