package router

import (
	"net/netip"
	"time"

	"meshd/mesh"
)

// Hello is what a peer says of itself inside an authenticated handshake.
type Hello struct {
	Name     mesh.PeerName
	Run      mesh.RunID
	Key      [32]byte // its static Curve25519 public key, proven by the handshake
	NickName string   // for people, normally the host name; at most 64 bytes
	Port     uint16   // UDP and TCP port it listens on
	Protocol uint8    // highest protocol version it speaks
}

// Link is a direct path between this peer and another: datagrams cross the underlay without a relay.
type Link struct {
	Peer     Hello
	Addr     netip.AddrPort // where its datagrams come from and ours go to
	Outbound bool           // this side dialled
	Sealed   bool           // frames on it are encrypted
	RTT      time.Duration  // smoothed round-trip time
	MTU      int            // bytes of the largest UDP payload proven both ways
}

// LinkState says what happened to a link or to a dial.
type LinkState uint8

const (
	LinkUp         LinkState = iota + 1 // authenticated and answering both ways
	LinkChanged                         // address, RTT (by a quarter or more) or MTU differ
	LinkDown                            // no longer answering, hung up or replaced; Err says why
	LinkDialFailed                      // a dial to Addr came to nothing; Err says why
)

// LinkEvent is reported by the tunnel to whoever keeps the topology. For LinkDialFailed only
// Link.Addr and Err are set, and Link.Peer as far as it became known.
type LinkEvent struct {
	State LinkState
	Link  Link
	Err   error
}

// Verdict is what is to be done with a frame.
type Verdict uint8

const (
	Drop    Verdict = iota // Reason says why
	Unicast                // send to Peer
	Flood                  // send to each of Peers
	Deliver                // hand to the local bridge
	Answer                 // hand Reply to the side that the frame came from
)

// Decision is the outcome for one frame. Peers is a shared snapshot that nobody may change; Reply is
// the caller's own buffer, filled.
type Decision struct {
	Verdict Verdict
	Reason  Reason
	Peer    mesh.PeerName
	Peers   []mesh.PeerName
	Reply   []byte
}

// Reason is why a frame was dropped; each has a counter.
type Reason uint8

const (
	NoReason        Reason = iota
	ReasonRunt             // shorter than an Ethernet header
	ReasonLocal            // the destination is on the side that the frame came from
	ReasonLink             // link-local control address 01:80:c2:00:00:0x (IEEE 802.1D 7.12.6)
	ReasonSource           // source address is a group address or zero
	ReasonMoved            // a frame from the bridge bears the source of another peer's endpoint
	ReasonForged           // a frame from a peer bears a source that is not that peer's
	ReasonNoPeer           // nobody to send it to
	ReasonNeighbour        // an ARP or ND packet claims an address that is another endpoint's
	ReasonIsolated         // sender and addressee are endpoints that share no subnet
	ReasonRate             // its sender floods too much: frames for addresses that nobody knows
	reasonCount
)

var reasonNames = [reasonCount]string{"none", "runt", "local", "link_control", "source", "moved", "forged_source", "no_peer", "neighbour", "isolated", "rate"}

func (r Reason) String() string {
	if int(r) < len(reasonNames) {
		return reasonNames[r]
	}
	return "unknown"
}
