package ipam

import (
	"net/netip"
	"slices"
	"strings"
	"time"
)

// A hold is one address of one owner (a container id or one of mesh's Owner constants).
type hold struct {
	owner string
	addr  netip.Prefix // with the length of its subnet
	off   uint64       // in the range, if inside
	in    bool         // inside the range

	state holdState
	saved bool // on disk: acknowledged

	// Of a hold that is not ours by the ring:
	number uint32 // of the request for it that is under way, or 0
	asked  time.Duration
	rival  string // who has it instead, once that is known
}

type holdState byte

const (
	held     holdState = iota // ours by the ring, or outside the range
	contest                   // running here, but its range belongs to another (again): being asked for
	collided                  // somebody else has it
)

// holds is the set of all holds of this peer.
type holds struct {
	byOwner map[string][]*hold
	byKey   map[string]*hold
	byOff   map[uint64]*hold
	used    *usedSet // offsets of byOff
	contest map[*hold]struct{}
}

func newHolds() *holds {
	return &holds{byOwner: make(map[string][]*hold), byKey: make(map[string]*hold), byOff: make(map[uint64]*hold), used: newUsedSet(), contest: make(map[*hold]struct{})}
}

func (s *holds) add(h *hold) {
	s.byOwner[h.owner] = append(s.byOwner[h.owner], h)
	s.byKey[h.key()] = h
	if h.in {
		s.byOff[h.off] = h
		s.used.add(h.off)
		if h.state == contest {
			s.contest[h] = struct{}{}
		}
	}
}

func (s *holds) remove(h *hold) {
	list := s.byOwner[h.owner]
	i := slices.Index(list, h)
	if i < 0 {
		return // its address may be another's by now
	}
	if list = slices.Delete(list, i, i+1); len(list) == 0 {
		delete(s.byOwner, h.owner)
	} else {
		s.byOwner[h.owner] = list
	}
	delete(s.byKey, h.key())
	if h.in {
		delete(s.byOff, h.off)
		s.used.remove(h.off)
		delete(s.contest, h)
	}
}

func (s *holds) set(h *hold, state holdState) {
	h.state = state
	if state == contest {
		s.contest[h] = struct{}{}
	} else {
		delete(s.contest, h)
	}
}

// find returns the owner's hold of exactly this address, whatever the length of its subnet.
func (s *holds) find(owner string, addr netip.Addr) *hold {
	for _, h := range s.byOwner[owner] {
		if h.addr.Addr() == addr {
			return h
		}
	}
	return nil
}

// inSubnet returns the owner's hold in this subnet.
func (s *holds) inSubnet(owner string, subnet netip.Prefix) *hold {
	for _, h := range s.byOwner[owner] {
		if h.addr.Masked() == subnet {
			return h
		}
	}
	return nil
}

// On disk a hold is a key: the address with its length, a space, the owner. The value is empty.
func (h *hold) key() string { return h.addr.String() + " " + h.owner }

func parseHoldKey(key string) (*hold, bool) {
	addr, owner, ok := strings.Cut(key, " ")
	p, err := netip.ParsePrefix(addr)
	return &hold{owner: owner, addr: p, saved: true}, ok && err == nil && owner != ""
}
