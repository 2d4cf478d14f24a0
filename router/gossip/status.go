package gossip

import (
	"slices"
	"strings"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// States of a connection, in Weave's words.
const (
	StateEstablished = "established" // there is a link, and the far end says so too
	StatePending     = "pending"     // there is a link, which the far end has not confirmed to everybody yet
	StateConnecting  = "connecting"  // the first dial is on its way
	StateRetrying    = "retrying"    // another dial is on its way
	StateFailed      = "failed"      // waiting for the next dial
)

// Connection is a link of ours, or the attempt at one.
type Connection struct {
	Address  string // where the other is, or a target that does not resolve
	Target   string // the target that led to it, word for word; empty for links and peers that others told of
	Outbound bool
	State    string
	Peer     mesh.PeerName // zero if unknown
	NickName string
	RTT      time.Duration
	MTU      int // bytes of the largest UDP payload; 0: unknown
	Sealed   bool
	Damped   bool // it went up and down of late
	Error    string
	NextTry  time.Time // of a failed one; zero: never
}

// Status is a snapshot for people and scripts.
type Status struct {
	Self        router.Peer
	Peers       []router.PeerView // this one included, by name
	Connections []Connection      // links first
	Routes      []router.Route
	Targets     []string
	Conflict    string // why we keep to ourselves; normally empty
	Ended       uint64 // links that have come to an end
	Members     int    // alive, to memberlist
	Refusals    []Refusal
	Counters    map[string]uint64
}

// Refusal counts the rows that a peer passed on and that were not taken in.
type Refusal struct {
	From mesh.PeerName
	mesh.Refusal
}

// Members is how many members are alive to memberlist, this peer included.
func (n *Node) Members() int { return n.members.count() }

// Status returns what is known now.
func (n *Node) Status() Status {
	s := Status{
		Self: n.topology.Self(), Peers: n.topology.Peers(), Routes: n.routes.Load().All(), Members: n.members.count(),
		Counters: map[string]uint64{
			"inbox_full": n.counters.inboxFull.Load(), "malformed": n.counters.malformed.Load(),
			"unknown_channel": n.counters.unknown.Load(), "oversize": n.counters.oversize.Load(),
			"forged_rows": n.counters.forged.Load(), "foreign_rows": n.counters.foreign.Load(), "keyless_rows": n.counters.keyless.Load(),
			"unsent": n.counters.unsent.Load(), "member_refused": n.members.refused.Load(), "member_lost": n.members.lost.Load(),
			"sent": n.counters.sent.Load(), "sent_bytes": n.counters.sentBytes.Load(),
			"received": n.counters.received.Load(), "received_bytes": n.counters.receivedBytes.Load(),
		},
	}
	nick := make(map[mesh.PeerName]string, len(s.Peers))
	confirmed := map[mesh.PeerName]bool{}
	for _, p := range s.Peers {
		nick[p.Name] = p.NickName
		confirmed[p.Name] = slices.ContainsFunc(p.Links, func(l router.PeerLink) bool { return l.To == n.self })
	}
	now := time.Now()
	n.mu.Lock()
	s.Targets, s.Conflict, s.Ended = n.dialer.targetTexts(), n.conflict, n.ended
	for _, name := range sortedNames(n.refusals) {
		s.Refusals = append(s.Refusals, Refusal{name, n.refusals[name]})
	}
	for _, name := range sortedNames(n.book.live) {
		ll := n.book.live[name]
		c := Connection{
			Address: ll.link.Addr.String(), Outbound: ll.link.Outbound, State: StateEstablished, Peer: name,
			NickName: ll.link.Peer.NickName, RTT: ll.link.RTT, MTU: ll.link.MTU, Sealed: ll.link.Sealed, Damped: now.Before(ll.steadyAt),
		}
		if !confirmed[name] {
			c.State = StatePending
		}
		s.Connections = append(s.Connections, c)
	}
	attempts := n.dialer.attempts()
	n.mu.Unlock()
	slices.SortFunc(attempts, func(a, b Connection) int { return strings.Compare(a.Address, b.Address) })
	for _, c := range attempts {
		c.NickName = nick[c.Peer]
		s.Connections = append(s.Connections, c)
	}
	return s
}
