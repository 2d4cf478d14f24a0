package ipam

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"meshd/ipam/ring"
	"meshd/mesh"
)

// kind of a message between two allocators.
type kind byte

const (
	kindCompare  kind = iota + 1 // what do you know of these members' addresses?
	kindCompared                 // digests of it
	kindFacts                    // part of a ring view, to merge
	kindRequest                  // give me space
	kindGrant                    // here it is
	kindRefuse                   // no, and why
	kindVote                     // a message of the founding election
	kindFound                    // an observer asks for the election to begin
	kindNotice                   // this cluster gives way to that one
	kindEnd
)

// A message on mesh.ChanAddresses. Numbers of fixed size are big-endian, the others unsigned LEB128.
// Version rule: a reader refuses another version and ignores what follows a body.
//
//	 0         1      2       3       4          4+A           12+A       16+A
//	+---------+------+-------+-------+----------+-------------+----------+------
//	| version | kind | flags | /bits | addr (A) | cluster (8) | life (4) | body
//	+---------+------+-------+-------+----------+-------------+----------+------
//	A: 4, or 16 if flagIPv6; range and cluster are the sender's, cluster 0 before it has one
//
//	compare, compared   members digest (8), n, then n times: id (10), digest of its addresses (8)
//	facts               a ring delta
//	request             number (4), first and end offset
//	grant               number (4), free addresses that the sender has left, a ring delta
//	refuse              number (4), free addresses, reason (1), text to the end
//	vote                an election message
//	found               nothing
//	notice              the cluster that gives way (8), the one that stays (8)
const (
	messageVersion = 1
	messageFixed   = 1 + 1 + 1 + 1 + 8 + 4
	compareItem    = 10 + 8
	maxCompare     = 48   // members in one compare
	deltaLimit     = 1100 // bytes of a ring delta inside a message
	maxBody        = mesh.MaxMessage - 1
)

// Flags of a message.
const (
	flagIPv6     = 1 << iota
	flagVoter    // the sender votes in elections
	flagClaiming // the sender has live addresses that it has not been given yet
	flagFence    // compare: these members are lost, treat them so
	flagReply    // facts: tell me what you know better
	flagExact    // request: just this one address, which a container has or shall have
	flagDemand   // request: a container is waiting
	flagFills    // the sender is about to take what nobody owns
)

// reason of a refusal.
type reason byte

const (
	reasonFull     reason = iota + 1 // nothing is free in that subnet
	reasonTaken                      // that address is in use; the text names by what
	reasonNotMine                    // that address belongs to another peer
	reasonStranger                   // the sender does not know the asking peer as a member
	reasonNotReady                   // the sender has just started
	reasonNoDisk                     // the sender cannot write its state
)

type item struct {
	id     ring.ID
	digest uint64
}

type message struct {
	kind    kind
	flags   byte
	rng     netip.Prefix
	cluster uint64
	life    uint32

	members uint64 // digest
	items   []item
	number  uint32
	lo, hi  uint64
	free    uint64
	reason  reason
	text    string
	rest    []byte // delta or election message
	old, to uint64 // clusters of a notice
}

func (m *message) append(b []byte) []byte {
	flags := m.flags
	if m.rng.Addr().Is6() {
		flags |= flagIPv6
	}
	b = append(b, messageVersion, byte(m.kind), flags, byte(m.rng.Bits()))
	b = append(b, m.rng.Addr().AsSlice()...)
	b = binary.BigEndian.AppendUint64(b, m.cluster)
	b = binary.BigEndian.AppendUint32(b, m.life)
	switch m.kind {
	case kindCompare, kindCompared:
		b = binary.BigEndian.AppendUint64(b, m.members)
		b = binary.AppendUvarint(b, uint64(len(m.items)))
		for _, it := range m.items {
			b = binary.BigEndian.AppendUint64(ring.AppendID(b, it.id), it.digest)
		}
	case kindRequest:
		b = binary.BigEndian.AppendUint32(b, m.number)
		b = binary.AppendUvarint(binary.AppendUvarint(b, m.lo), m.hi)
	case kindGrant:
		b = binary.BigEndian.AppendUint32(b, m.number)
		b = append(binary.AppendUvarint(b, m.free), m.rest...)
	case kindRefuse:
		b = binary.BigEndian.AppendUint32(b, m.number)
		b = append(binary.AppendUvarint(b, m.free), byte(m.reason))
		b = append(b, m.text[:min(len(m.text), 200)]...)
	case kindFacts, kindVote:
		b = append(b, m.rest...)
	case kindNotice:
		b = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(b, m.old), m.to)
	}
	return b
}

var errMessage = errors.New("malformed message")

func parseMessage(b []byte) (*message, error) {
	if len(b) < messageFixed || b[0] != messageVersion || b[1] == 0 || kind(b[1]) >= kindEnd {
		return nil, errMessage
	}
	m := &message{kind: kind(b[1]), flags: b[2]}
	size := 4
	if m.flags&flagIPv6 != 0 {
		size = 16
	}
	if len(b) < messageFixed+size {
		return nil, errMessage
	}
	addr, _ := netip.AddrFromSlice(b[4 : 4+size])
	m.rng = netip.PrefixFrom(addr, int(b[3]))
	if ring.CheckRange(m.rng) != nil {
		return nil, fmt.Errorf("%w: range", errMessage)
	}
	b = b[4+size:]
	m.cluster, m.life = binary.BigEndian.Uint64(b), binary.BigEndian.Uint32(b[8:])
	return m, m.parseBody(b[12:])
}

func (m *message) parseBody(b []byte) error {
	fixed := map[kind]int{kindCompare: 8, kindCompared: 8, kindRequest: 4, kindGrant: 4, kindRefuse: 4, kindNotice: 16}[m.kind]
	if len(b) < fixed {
		return errMessage
	}
	ok := true
	uvarint := func() uint64 {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			ok = false
			return 0
		}
		b = b[n:]
		return v
	}
	switch m.kind {
	case kindCompare, kindCompared:
		m.members, b = binary.BigEndian.Uint64(b), b[8:]
		n := uvarint()
		if n > maxCompare || int(n)*compareItem > len(b) {
			return errMessage
		}
		for range n {
			m.items = append(m.items, item{ring.ParseID(b), binary.BigEndian.Uint64(b[10:])})
			b = b[compareItem:]
		}
	case kindRequest:
		m.number, b = binary.BigEndian.Uint32(b), b[4:]
		m.lo, m.hi = uvarint(), uvarint()
		ok = ok && m.lo < m.hi && m.hi <= ring.Size(m.rng)
	case kindGrant:
		m.number, b = binary.BigEndian.Uint32(b), b[4:]
		m.free = uvarint()
		m.rest = b
	case kindRefuse:
		m.number, b = binary.BigEndian.Uint32(b), b[4:]
		m.free = uvarint()
		if len(b) < 1 {
			return errMessage
		}
		m.reason, m.text = reason(b[0]), string(b[1:min(len(b), 201)])
	case kindFacts, kindVote:
		m.rest = b
	case kindNotice:
		m.old, m.to = binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])
	}
	if !ok {
		return errMessage
	}
	return nil
}
