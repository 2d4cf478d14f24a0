package ipam

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"meshd/ipam/ring"
	"meshd/mesh"
)

// Mode is how the ring is founded.
type Mode byte

const (
	Consensus Mode = iota // by a quorum of N
	Seed                  // divided among the peers of Seed, without asking anybody
	Observer              // never votes; waits for others
)

// Init says how the ring is founded.
type Init struct {
	Mode Mode
	N    int             // Consensus: how many voters to expect; 0 means 1
	Seed []mesh.PeerName // Seed: the founders; the same list on every peer
}

// Config of an allocator. New works on a copy.
type Config struct {
	Name          mesh.PeerName
	Range         netip.Prefix // zero: address management is off, and the ring is only passed on
	DefaultSubnet netip.Prefix // zero: the range
	Init          Init

	// ReclaimAfter is how long a member must have been away before the others take over its space by
	// themselves, with a majority of all members present. 0 (the default): never, rmpeer decides. It has to
	// be longer than any cut that both sides are meant to survive with their addresses.
	ReclaimAfter time.Duration
	// Grace is how long a peer that knows others, and reaches none, waits after its start before it hands
	// out addresses. 0 means 5 s.
	Grace time.Duration
	// WaitForLive holds addresses back until Reclaim was called once with what is running on this host.
	WaitForLive bool

	// Lost is told of a peer that is out of reach and was removed, here or by another peer, and may be told again. It
	// must not block. nil: nobody wants to know.
	Lost func(mesh.PeerName)

	Store   Store
	Network Network
	Log     *slog.Logger // nil: none
}

// Store is the part of the state file that addresses are kept in. PutAll writes several buckets in one
// synced transaction (a nil value deletes) and may block for as long as the disk does.
type Store interface {
	All(bucket string) (map[string][]byte, error)
	PutAll(buckets map[string]map[string][]byte) error
}

// Network reaches the other peers; neither method blocks, and messages may be lost, doubled or reordered.
type Network interface {
	Broadcast(ch mesh.Channel, delta []byte)
	Send(to mesh.PeerName, ch mesh.Channel, msg []byte) error
}

// PeerState is what the membership room says of a peer.
type PeerState byte

const (
	Unknown PeerState = iota
	Alive
	Suspect
	Gone
)

// Errors that callers branch on.
var (
	ErrDisabled = errors.New("address allocation is off: no range is set")
	ErrFull     = errors.New("no free address")
	ErrTaken    = errors.New("address in use")
	ErrInvalid  = errors.New("invalid address")
	ErrLeft     = errors.New("this peer has given its addresses away")
	ErrAlive    = errors.New("that peer is alive")
	ErrPending  = errors.New("recorded, not finished yet")
	ErrChanged  = errors.New("the state file belongs to other settings")
	ErrNoHeir   = errors.New("no heir")
	ErrNoRing   = errors.New("the range is not divided yet, so there is nothing to repair")
	ErrStopped  = errors.New("address allocation has stopped")
)

const (
	defaultGrace  = 5 * time.Second
	tickInterval  = 200 * time.Millisecond
	answerTimeout = time.Second     // for one datagram and its answer
	retryAfter    = 5 * time.Second // after everybody refused
	prefetchPause = 30 * time.Second
	foundingPause = 2 * time.Second // between attempts, plus up to as much at random
	claimTries    = 5               // of an alive owner that does not answer
	settleLimit   = 5 * time.Second // for others to claim what is running on them
	lowWater      = 64              // addresses: fetch more when fewer are free, and a small share in small ranges
)

func (c Config) check() (Config, error) {
	if c.Name.IsZero() {
		return c, errors.New("ipam: no peer name")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Lost == nil {
		c.Lost = func(mesh.PeerName) {}
	}
	if c.Grace == 0 {
		c.Grace = defaultGrace
	}
	c.Init.N = max(c.Init.N, 1)
	if !c.Range.IsValid() {
		return c, nil
	}
	if err := ring.CheckRange(c.Range); err != nil {
		return c, fmt.Errorf("ipam: %w", err)
	}
	if !c.DefaultSubnet.IsValid() {
		c.DefaultSubnet = c.Range
	}
	if err := checkSubnet(c.Range, c.DefaultSubnet); err != nil {
		return c, fmt.Errorf("ipam: default subnet: %w", err)
	}
	if c.Init.Mode == Seed && len(c.Init.Seed) == 0 {
		return c, errors.New("ipam: seed without peers")
	}
	if len(c.Init.Seed) > maxFounders {
		return c, fmt.Errorf("ipam: more than %d seed peers", maxFounders)
	}
	return c, nil
}

// checkSubnet says why addresses cannot be allocated in a subnet of the range.
func checkSubnet(rng, s netip.Prefix) error {
	switch {
	case !s.IsValid():
		return fmt.Errorf("%w: not a subnet", ErrInvalid)
	case s != s.Masked():
		return fmt.Errorf("%w: subnet %s has host bits: did you mean %s?", ErrInvalid, s, s.Masked())
	case s.Addr().BitLen()-s.Bits() < 2:
		return fmt.Errorf("%w: subnet %s is smaller than 4 addresses", ErrInvalid, s)
	case s.Bits() < rng.Bits() || !rng.Contains(s.Addr()):
		return fmt.Errorf("%w: subnet %s is not inside the range %s", ErrInvalid, s, rng)
	}
	return nil
}

// checkClaim says why an address with the length of its subnet cannot be somebody's.
func checkClaim(p netip.Prefix) error {
	if !p.IsValid() || p.Addr().IsUnspecified() || p.Addr().Zone() != "" {
		return fmt.Errorf("%w: %s", ErrInvalid, p)
	}
	host := p.Addr().BitLen() - p.Bits()
	switch {
	case host == 0:
		return nil
	case host == 1:
		return fmt.Errorf("%w: %s: a subnet has at least 4 addresses", ErrInvalid, p)
	case p.Masked().Addr() == p.Addr():
		return fmt.Errorf("%w: %s is the network's own address", ErrInvalid, p)
	case p.Addr().Is4() && mesh.LastAddr(p) == p.Addr():
		return fmt.Errorf("%w: %s is the broadcast address", ErrInvalid, p)
	}
	return nil
}
