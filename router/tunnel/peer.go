package tunnel

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// peer is another meshd that we have, or want, a session with.
type peer struct {
	name mesh.PeerName // fixed

	// Published by controlLoop, read by pumps and receivers.
	info    atomic.Pointer[peerInfo]
	send    atomic.Pointer[keys] // nil: no session to send with
	direct  atomic.Pointer[path] // nil: no live link
	relayed atomic.Pointer[path] // what is known of the path by the relay in use

	// Written by receivers and pumps: nanoseconds since Tunnel.epoch.
	heard       atomic.Int64 // last authenticated datagram, by any way
	heardDirect atomic.Int64 // last one from the link's address
	used        atomic.Int64 // last message or frame in either direction
	big         atomic.Bool  // a large datagram was sent since controlLoop looked
	wanted      atomic.Bool  // controlLoop has been asked for a session
	roaming     atomic.Bool  // controlLoop has been told of another address; cleared every tick

	stats counters

	partMu sync.Mutex // guards parts
	parts  reassembly
	partID atomic.Uint32

	// Owned by controlLoop.
	ring     []*keys // all that may still receive, oldest first
	link     *link
	relay    *relayPath
	attempt  *attempt   // handshake under way that we began
	retry    time.Time  // no new one before
	hinted   time.Time  // last handshake because of a hint
	replaced mesh.RunID // the run whose place the present one took
	second   mesh.RunID // a run that took the present one's place while it lived
	pending  [][]byte   // bodies that wait for a session
	lastErr  error      // why the last link or handshake ended
	hungUp   time.Time
	gone     time.Time // since when there has been neither key nor link
}

type peerInfo struct {
	hello router.Hello
	err   string // why there is no direct link, "" if there is
}

// path is an immutable snapshot of one way to a peer.
type path struct {
	addr     netip.AddrPort // of the peer, or of the relay
	via      mesh.PeerName  // the relay; the peer itself if direct
	mtu      int            // bytes of the largest datagram (without relay header) that gets there
	mtuBoth  int            // the smaller of that and what the peer says of its own direction; 0 unknown
	rtt      time.Duration
	outbound bool
	trusted  bool // frames may go to this address in clear
}

// counters of one peer. Each direction is written by few goroutines, so plain atomics do.
type counters struct {
	framesIn, bytesIn   atomic.Uint64
	_                   [48]byte
	framesOut, bytesOut atomic.Uint64
}

const maxPending = 16

// reassembly puts bodies together that came in parts. One at a time: the first part of the next one pushes
// out what is incomplete, and no more is held than a body has, so nothing needs to expire.
type reassembly struct {
	id   uint16
	got  [maxParts][]byte
	have int
	size int
}

// add takes one part and returns the body when it was the last one missing, behind vnetLen spare bytes.
func (r *reassembly) add(p part) []byte {
	if r.have == 0 || r.id != p.id {
		*r = reassembly{id: p.id}
	}
	if r.got[p.index] != nil {
		return nil
	}
	if r.size += len(p.piece); r.size > maxWhole {
		*r = reassembly{}
		return nil
	}
	r.got[p.index] = append(make([]byte, 0, len(p.piece)), p.piece...)
	r.have++
	if r.have < int(p.count) {
		return nil
	}
	body := make([]byte, vnetLen, vnetLen+maxWhole)
	for _, piece := range r.got[:p.count] {
		if piece == nil {
			*r = reassembly{}
			return nil
		}
		body = append(body, piece...)
	}
	*r = reassembly{}
	return body
}

// route is how to send to a peer right now.
type route struct {
	peer    *peer
	keys    *keys
	to      netip.AddrPort
	mtu     int // bytes of datagram, relay header not counted
	relayed bool
	hops    byte // of a relayed one's header
	clear   bool // frames go in clear
}

// routeTo finds the way and the keys to dst. ok is false without a way; keys is nil without a session.
func (t *Tunnel) routeTo(dst mesh.PeerName) (r route, ok bool) {
	peers := *t.peers.Load()
	p := peers[dst]
	via, links, known := t.cfg.Router.Way(dst)
	if p != nil {
		r.peer, r.keys = p, p.send.Load()
		// The link itself is the way also when the router has not heard of it yet, or when the relay
		// it names has just died.
		if d := p.direct.Load(); d != nil && (!known || via == dst || peers[via] == nil || peers[via].direct.Load() == nil) {
			r.to, r.mtu = d.addr, d.mtu
			r.clear = r.keys != nil && r.keys.clear && d.trusted
			return r, true
		}
	}
	if !known || via == dst {
		return r, false
	}
	q := peers[via]
	if q == nil {
		return r, false
	}
	d := q.direct.Load()
	if d == nil {
		return r, false
	}
	r.to, r.mtu, r.relayed, r.hops = d.addr, d.mtu-relayHeaderLen, true, hopsOf(links)
	if p != nil {
		if end := p.relayed.Load(); end != nil && end.via == via {
			r.mtu = min(r.mtu, end.mtu)
		}
		r.clear = r.keys != nil && r.keys.clear && t.open()
	}
	return r, true
}

// Status is what is known of one peer.
type Status struct {
	Peer      router.Hello
	Path      string         // "direct", "relay" or "none"
	Via       mesh.PeerName  // the relay, if one
	Addr      netip.AddrPort // of the peer, or of the relay
	Outbound  bool           // this side dialled the link
	Session   bool           // keys are in place
	Sealed    bool           // frames are encrypted on this path
	Cipher    string         // of what is sealed
	RTT       time.Duration
	MTU       int           // bytes of the largest UDP payload
	Why       string        // why not direct, "" if it is
	Heard     time.Duration // since the last authenticated datagram
	FramesIn  uint64
	BytesIn   uint64
	FramesOut uint64
	BytesOut  uint64
}

// Sessions lists every peer with whom there is or was lately a session.
func (t *Tunnel) Sessions() []Status {
	now := time.Now()
	var out []Status
	for name, p := range *t.peers.Load() {
		info := p.info.Load()
		if info == nil {
			continue
		}
		s := Status{
			Peer: info.hello, Path: "none", Heard: time.Duration(t.since(now) - p.heard.Load()),
			FramesIn: p.stats.framesIn.Load(), BytesIn: p.stats.bytesIn.Load(),
			FramesOut: p.stats.framesOut.Load(), BytesOut: p.stats.bytesOut.Load(),
		}
		if k := p.send.Load(); k != nil {
			s.Session, s.Cipher = true, cipherName(k.aes)
		}
		r, ok := t.routeTo(name)
		s.Sealed = !r.clear
		switch {
		case ok && !r.relayed:
			s.Path, s.Addr, s.MTU = "direct", r.to, r.mtu
			if d := p.direct.Load(); d != nil {
				s.RTT, s.Outbound = d.rtt, d.outbound
			}
		case ok:
			s.Path, s.Addr, s.MTU, s.Why = "relay", r.to, r.mtu, info.err
			s.Via, _, _ = t.cfg.Router.Way(name)
			if d := p.relayed.Load(); d != nil {
				s.RTT = d.rtt
			}
		default:
			s.Why = info.err
		}
		if s.Why == "" && s.Path != "direct" {
			s.Why = "no direct link yet"
			if p.direct.Load() != nil {
				s.Why = "the relay is the shorter way"
			}
		}
		out = append(out, s)
	}
	return out
}

// Links lists the live direct links.
func (t *Tunnel) Links() []router.Link {
	var out []router.Link
	for _, p := range *t.peers.Load() {
		if d, info := p.direct.Load(), p.info.Load(); d != nil && info != nil {
			out = append(out, linkOf(p, info.hello, d))
		}
	}
	return out
}

func linkOf(p *peer, hello router.Hello, d *path) router.Link {
	k := p.send.Load()
	return router.Link{
		Peer: hello, Addr: d.addr, Outbound: d.outbound, RTT: d.rtt, MTU: d.mtuBoth,
		Sealed: k == nil || !k.clear || !d.trusted,
	}
}

func cipherName(aes bool) string {
	if aes {
		return "AES-256-GCM"
	}
	return "ChaCha20-Poly1305"
}
