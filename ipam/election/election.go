// Package election agrees, once, on how the address ring is founded. It is single-decree Paxos (Lamport,
// "Paxos Made Simple", 2001) as pure state: messages go in, messages come out, and the caller writes
// State to disk before it sends any of them. Whatever is lost, doubled, delayed or restarted, two values
// are never decided, as long as any two quorums have a voter in common.
//
// The value is opaque here. Every voter's promise brings its card, and who proposes makes the value of
// the cards of the quorum that promised.
package election

import (
	"cmp"
	"encoding/binary"
	"errors"
	"maps"
	"slices"

	"meshd/mesh"
)

// Kind of a message.
type Kind byte

const (
	Prepare  Kind = iota + 1 // will you promise to ignore older ballots?
	Promise                  // yes; and this is what I accepted before, if anything
	Propose                  // accept this value
	Accepted                 // I did
	Reject                   // I promised a newer ballot, which is in Promised
	kindEnd
)

// Ballot numbers an attempt; later ones are greater, and no two proposers share one.
type Ballot struct {
	Round uint32
	By    mesh.PeerName
}

// Compare orders ballots.
func (b Ballot) Compare(o Ballot) int {
	return cmp.Or(cmp.Compare(b.Round, o.Round), b.By.Compare(o.By))
}

// Message is what voters and proposers say to each other.
type Message struct {
	Kind   Kind
	Ballot Ballot // the attempt that it belongs to
	Other  Ballot // Promise: of the accepted value, or zero; Reject: what was promised
	Card   []byte // Promise: at most MaxCard bytes
	Value  []byte // Propose, and Promise if something was accepted: at most MaxValue bytes
}

// Bounds of the opaque parts, so that a message fits a datagram.
const (
	MaxCard  = 32
	MaxValue = 1024
)

// Out is a message to send.
type Out struct {
	To  mesh.PeerName
	Msg Message
}

// Voter is one peer's part in the election: it votes, unless it only observes, and it may propose.
type Voter struct {
	self  mesh.PeerName
	votes bool
	card  []byte

	promised, accepted Ballot
	value              []byte // accepted one

	attempt *attempt
	decided []byte
}

type attempt struct {
	ballot   Ballot
	quorum   int
	make     func(cards map[mesh.PeerName][]byte) []byte
	cards    map[mesh.PeerName][]byte
	best     Ballot // of the newest value that a promise brought
	value    []byte // being proposed, once there is a quorum of promises
	accepts  map[mesh.PeerName]bool
	proposed bool
}

// New returns a voter, or an observer that never votes.
func New(self mesh.PeerName, votes bool, card []byte) *Voter {
	return &Voter{self: self, votes: votes, card: card}
}

// Decided returns the value once this peer knows of a quorum that accepted it.
func (v *Voter) Decided() []byte { return v.decided }

// Known is how many voters answered the running attempt.
func (v *Voter) Known() int {
	if v.attempt == nil {
		return 0
	}
	return max(len(v.attempt.cards), len(v.attempt.accepts))
}

// Start begins a new attempt among these peers (itself need not be in the list).
func (v *Voter) Start(peers []mesh.PeerName, quorum int, makeValue func(cards map[mesh.PeerName][]byte) []byte) []Out {
	round := max(v.promised.Round, v.accepted.Round)
	if v.attempt != nil {
		round = max(round, v.attempt.ballot.Round)
	}
	v.attempt = &attempt{ballot: Ballot{round + 1, v.self}, quorum: quorum, make: makeValue,
		cards: make(map[mesh.PeerName][]byte), accepts: make(map[mesh.PeerName]bool)}
	return v.toAll(peers, Message{Kind: Prepare, Ballot: v.attempt.ballot})
}

// toAll sends to the peers and handles the own copy at once.
func (v *Voter) toAll(peers []mesh.PeerName, m Message) (out []Out) {
	for _, p := range peers {
		if p != v.self {
			out = append(out, Out{p, m})
		}
	}
	if v.votes {
		out = append(out, v.Handle(v.self, m)...)
	}
	return out
}

// Handle takes one message. What it returns is to be sent after State is on disk.
func (v *Voter) Handle(from mesh.PeerName, m Message) []Out {
	switch m.Kind {
	case Prepare, Propose:
		if !v.votes {
			return nil
		}
		reply := v.vote(m)
		if from == v.self {
			return v.Handle(v.self, reply)
		}
		return []Out{{from, reply}}
	case Promise, Accepted:
		if a := v.attempt; a != nil && a.ballot == m.Ballot {
			return v.count(a, from, m)
		}
	case Reject:
		// The next attempt must be above what others promised.
		if a := v.attempt; a != nil && a.ballot == m.Ballot && m.Other.Compare(a.ballot) > 0 {
			a.ballot.Round = max(a.ballot.Round, m.Other.Round)
			a.proposed, a.value = true, nil // dead: nothing matches this ballot any more
			a.ballot.By = mesh.PeerName{}
		}
	}
	return nil
}

func (v *Voter) vote(m Message) Message {
	if m.Ballot.Compare(v.promised) < 0 {
		return Message{Kind: Reject, Ballot: m.Ballot, Other: v.promised}
	}
	v.promised = m.Ballot
	if m.Kind == Prepare {
		return Message{Kind: Promise, Ballot: m.Ballot, Other: v.accepted, Card: v.card, Value: v.value}
	}
	v.accepted, v.value = m.Ballot, m.Value
	return Message{Kind: Accepted, Ballot: m.Ballot}
}

func (v *Voter) count(a *attempt, from mesh.PeerName, m Message) []Out {
	if m.Kind == Accepted {
		if a.value != nil {
			if a.accepts[from] = true; len(a.accepts) >= a.quorum {
				v.decided = a.value
			}
		}
		return nil
	}
	if a.proposed {
		return nil
	}
	a.cards[from] = m.Card
	if m.Other.Compare(a.best) > 0 {
		a.best, a.value = m.Other, m.Value
	}
	if len(a.cards) < a.quorum {
		return nil
	}
	a.proposed = true
	if a.value == nil {
		a.value = a.make(a.cards)
	}
	return v.toAll(slices.SortedFunc(maps.Keys(a.cards), mesh.PeerName.Compare), Message{Kind: Propose, Ballot: a.ballot, Value: a.value})
}

// A message on the wire, big-endian; what follows it is ignored.
//
//	 0      1       5      11       15     21         22        22+c        24+c
//	+------+-------+------+--------+------+----------+---------+-----------+-----------+
//	| kind | round | by   | other  | by   | card len | card    | value len | value     |
//	| 1    | 4     | 6    | 4      | 6    | c: 1     | c       | 2         |           |
//	+------+-------+------+--------+------+----------+---------+-----------+-----------+
const fixedSize = 1 + 2*(4+6) + 1 + 2

var errMalformed = errors.New("malformed election message")

// Append appends the wire form.
func (m Message) Append(b []byte) []byte {
	b = appendBallot(append(b, byte(m.Kind)), m.Ballot)
	b = appendBallot(b, m.Other)
	b = append(append(b, byte(len(m.Card))), m.Card...)
	return append(binary.BigEndian.AppendUint16(b, uint16(len(m.Value))), m.Value...)
}

func appendBallot(b []byte, x Ballot) []byte {
	return append(binary.BigEndian.AppendUint32(b, x.Round), x.By[:]...)
}

func parseBallot(b []byte) Ballot {
	return Ballot{binary.BigEndian.Uint32(b), mesh.PeerName(b[4:10])}
}

// Parse reads what Append wrote, copying what it keeps.
func Parse(b []byte) (Message, error) {
	if len(b) < fixedSize || b[0] == 0 || Kind(b[0]) >= kindEnd {
		return Message{}, errMalformed
	}
	m := Message{Kind: Kind(b[0]), Ballot: parseBallot(b[1:]), Other: parseBallot(b[11:])}
	card := int(b[21])
	if card > MaxCard || len(b) < fixedSize+card {
		return Message{}, errMalformed
	}
	value := int(binary.BigEndian.Uint16(b[22+card:]))
	if value > MaxValue || len(b) < fixedSize+card+value {
		return Message{}, errMalformed
	}
	if card > 0 {
		m.Card = slices.Clone(b[22 : 22+card])
	}
	if value > 0 {
		m.Value = slices.Clone(b[24+card : 24+card+value])
	}
	if m.Kind == Propose && value == 0 || m.Ballot.Round == 0 {
		return Message{}, errMalformed
	}
	return m, nil
}

// State is what must be on disk before anything that came out of the last call is sent.
func (v *Voter) State() []byte {
	return Message{Kind: Promise, Ballot: v.promised, Other: v.accepted, Value: v.value}.Append(nil)
}

// Restore puts back what State returned.
func (v *Voter) Restore(state []byte) error {
	if len(state) >= fixedSize && parseBallot(state[1:]) == (Ballot{}) {
		return nil // nothing was ever promised
	}
	m, err := Parse(state)
	if err != nil {
		return err
	}
	v.promised, v.accepted, v.value = m.Ballot, m.Other, m.Value
	return nil
}
