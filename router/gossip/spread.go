package gossip

import (
	"encoding/binary"
	"math/rand/v2"
	"time"

	"meshd/mesh"
)

// A change is passed on by everybody who hears of it for the first time, in spreadRounds rounds, each to
// spreadFanout peers drawn anew: nine copies a peer, which misses one peer in eight thousand, and digests
// find that one. The first round goes out at once, spaced just enough to share messages.
const (
	spreadRounds   = 3
	spreadFanout   = 3
	spreadInterval = 100 * time.Millisecond
	spreadFirst    = 20 * time.Millisecond // between first rounds
	spreadBudget   = 16                    // messages to one peer in one round
	spreadQueue    = 4096                  // rumours held
)

// rumour is a change on its way.
type rumour struct {
	ch     mesh.Channel
	body   []byte
	from   mesh.PeerName // who told us; it need not hear it from us
	rounds int           // left
}

// spreader queues rumours. It is owned by the loop.
type spreader struct {
	queue   []*rumour
	fresh   int       // how many of the queue, at its end, have not been told yet
	first   time.Time // last first round
	last    time.Time // last round of all
	dropped uint64
}

// add takes over body, which must leave room for the channel in a message.
func (s *spreader) add(ch mesh.Channel, body []byte, from mesh.PeerName) {
	if len(s.queue) >= spreadQueue {
		s.queue = s.queue[1:] // the oldest has been told most often
		s.dropped++
	}
	s.queue = append(s.queue, &rumour{ch, body, from, spreadRounds})
	s.fresh = min(s.fresh+1, len(s.queue))
}

func (s *spreader) due(now time.Time) bool {
	return len(s.queue) > 0 && now.Sub(s.last) >= spreadInterval || s.fresh > 0 && now.Sub(s.first) >= spreadFirst
}

// letter is one message to one peer.
type letter struct {
	to  mesh.PeerName
	msg []byte
}

// round draws the peers of one round and writes what they are to be told: everything, or between the rounds
// of all just what nobody has been told yet.
func (s *spreader) round(now time.Time, peers []mesh.PeerName, rng *rand.Rand) (out []letter) {
	var old []*rumour
	if now.Sub(s.last) < spreadInterval {
		old = s.queue[:len(s.queue)-s.fresh]
	} else {
		s.last = now
	}
	s.first = now
	queue := s.queue[len(old):]
	chosen := draw(peers, spreadFanout, rng)
	told := 0 // rumours from the front that every chosen peer's budget covers
	for i, to := range chosen {
		msgs, n := bundle(queue, to, spreadBudget)
		for _, m := range msgs {
			out = append(out, letter{to, m})
		}
		if i == 0 || n < told {
			told = n
		}
	}
	if len(chosen) == 0 {
		told = len(queue) // nobody to tell: whoever comes later compares digests
	}
	kept := s.queue[:len(old)]
	s.fresh = 0
	for i, r := range queue {
		if i < told {
			r.rounds--
			if len(peers) <= spreadFanout || len(chosen) == 0 {
				r.rounds = min(r.rounds, 1) // everybody has been told; once more against loss
			}
			if len(chosen) == 0 {
				r.rounds = 0
			}
		}
		if r.rounds > 0 {
			kept = append(kept, r)
		}
		if i >= told {
			s.fresh++ // beyond what fits; told next, even if some of it was told before
		}
	}
	clear(s.queue[len(kept):])
	s.queue = kept
	return out
}

// draw returns up to n different peers.
func draw(peers []mesh.PeerName, n int, rng *rand.Rand) []mesh.PeerName {
	if len(peers) <= n {
		return peers
	}
	out := make([]mesh.PeerName, 0, n)
next:
	for len(out) < n {
		p := peers[rng.IntN(len(peers))]
		for _, q := range out {
			if p == q {
				continue next
			}
		}
		out = append(out, p)
	}
	return out
}

// A bundle carries several messages in one:
//
//	0  1  ChanBundle
//	1  1  channel  ┐
//	2  2  length n │ repeated
//	4  n  body     ┘
const bundleHeader = 3

// bundle packs rumours for to into at most budget messages and returns how many rumours that covers.
func bundle(queue []*rumour, to mesh.PeerName, budget int) (msgs [][]byte, covered int) {
	var group []*rumour
	size := 1
	flush := func() {
		if len(group) == 1 {
			msgs = append(msgs, append([]byte{byte(group[0].ch)}, group[0].body...))
		} else if len(group) > 1 {
			m := append(make([]byte, 0, size), byte(mesh.ChanBundle))
			for _, r := range group {
				m = append(m, byte(r.ch))
				m = binary.BigEndian.AppendUint16(m, uint16(len(r.body)))
				m = append(m, r.body...)
			}
			msgs = append(msgs, m)
		}
		group, size = group[:0], 1
	}
	for i, r := range queue {
		if r.from == to {
			continue
		}
		if len(group) > 0 && size+bundleHeader+len(r.body) > mesh.MaxMessage {
			flush()
			if len(msgs) == budget {
				return msgs, i
			}
		}
		group = append(group, r)
		size += bundleHeader + len(r.body)
	}
	flush()
	return msgs, len(queue)
}

// parseBundle splits what follows the channel byte; ok is false if it is malformed. The parts are slices of b.
func parseBundle(b []byte) (parts []part, ok bool) {
	for len(b) > 0 {
		if len(b) < bundleHeader {
			return nil, false
		}
		n := int(binary.BigEndian.Uint16(b[1:]))
		if len(b) < bundleHeader+n {
			return nil, false
		}
		parts = append(parts, part{mesh.Channel(b[0]), b[bundleHeader : bundleHeader+n]})
		b = b[bundleHeader+n:]
	}
	return parts, true
}

type part struct {
	ch   mesh.Channel
	body []byte
}
