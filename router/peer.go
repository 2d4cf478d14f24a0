package router

import (
	"math"
	"net/netip"
	"time"

	"meshd/mesh"
)

// Flags say what a peer is or can do. Unknown bits are kept and passed on.
type Flags uint32

const (
	FlagForeign Flags = 1 << iota // its bridge has ports that are no endpoints: a VM, another bridge
	FlagKernel                    // it speaks the kernel path and wants a short id
)

// Peer is what a peer says of itself to everybody.
type Peer struct {
	Name        mesh.PeerName
	Run         mesh.RunID
	Incarnation uint32 // grows with every run: see Epoch
	Uptime      uint32 // seconds that the run had lasted when this was written
	Key         [32]byte
	NickName    string // at most MaxNickName bytes
	ShortID     mesh.ShortID
	Port        uint16 // UDP and TCP
	Protocol    uint8
	MTU         int // bytes of the largest overlay packet it takes; 0: not said
	Flags       Flags
}

// Protocol is the version of what peers tell each other. Since 2 they sign it; who does not is refused.
const Protocol = 2

// MaxNickName is the largest nickname in bytes.
const MaxNickName = 64

// PeerLink is one live link as one of its ends sees it.
type PeerLink struct {
	To       mesh.PeerName
	Addr     netip.AddrPort // where the reporting peer reaches To
	RTT      time.Duration  // rounded by rttCode
	MTU      int            // bytes of the largest UDP payload; at most 65535
	Outbound bool           // the reporting peer dialled, so that Addr is an address to dial
	Sealed   bool
	Damped   bool // it went up and down of late: used only if there is no other way
}

// Epoch orders the runs of one peer without any clock. A restarted peer learns from the others how far
// its earlier run had counted and goes one further; the run id only decides between two runs that have
// not heard of each other yet.
type Epoch struct {
	Incarnation uint32
	Run         mesh.RunID
}

// Compare returns -1, 0 or 1.
func (e Epoch) Compare(f Epoch) int {
	switch {
	case e.Incarnation != f.Incarnation:
		if e.Incarnation < f.Incarnation {
			return -1
		}
		return 1
	case e.Run != f.Run:
		if e.Run < f.Run {
			return -1
		}
		return 1
	}
	return 0
}

// PeerState is what the others make of a peer.
type PeerState uint8

const (
	Alive   PeerState = iota + 1 // there is a way to it
	Suspect                      // there is none just now
	Gone                         // there has been none for so long that it is forgotten
)

func (s PeerState) String() string {
	switch s {
	case Alive:
		return "alive"
	case Suspect:
		return "suspect"
	case Gone:
		return "gone"
	}
	return "unknown"
}

// Round trips travel as one byte on a logarithmic scale: 10 µs times 2^(code/8), so that neighbouring
// codes differ by 9 % and 255 stands for ten hours.
const rttUnit = 10 * time.Microsecond

func rttCode(d time.Duration) byte {
	if d <= rttUnit {
		return 0
	}
	return byte(min(math.Round(8*math.Log2(float64(d)/float64(rttUnit))), 255))
}

var rtts = func() (out [256]time.Duration) {
	for code := range out {
		out[code] = time.Duration(float64(rttUnit) * math.Exp2(float64(code)/8))
	}
	return out
}()

func rttOf(code byte) time.Duration { return rtts[code] }

// RoundRTT is d as every peer will see it.
func RoundRTT(d time.Duration) time.Duration { return rttOf(rttCode(d)) }
