package fastdp

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"meshd/mesh"
)

// SetSelf says who this peer is. Without a short id (0) nothing is sent by the tunnel; an adopted one
// stays in force until Settle.
func (d *Datapath) SetSelf(name mesh.PeerName, id mesh.ShortID) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	moved := d.self != name
	d.self, d.selfID = name, id
	return d.applySelf(moved)
}

func (d *Datapath) applySelf(moved bool) error {
	c := d.kernel.config
	if d.selfID != 0 || d.settled {
		c.Self = uint32(d.selfID)
	}
	if d.cfg.GuardOnly || d.selfID > mesh.MaxShortID {
		c.Self = 0
	}
	moved = moved || c.Self != d.kernel.config.Self
	if err := d.applyConfig(c); err != nil || !moved {
		return err
	}
	return errors.Join(d.applyPeers(time.Now()), d.applyEndpoints(time.Now()))
}

// SetPeers says which other peers there are: all of them. A path that is up stays as it is when only the
// tunnel's link is lost or its route leads elsewhere, as when that meshd restarts: the probes know better.
func (d *Datapath) SetPeers(peers []Peer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	return d.setPeers(slices.Clone(peers), time.Now())
}

func (d *Datapath) setPeers(peers []Peer, now time.Time) error {
	d.told = peers
	next := make(map[mesh.PeerName]*peerState, len(peers))
	byID := make(map[mesh.ShortID]*peerState, len(peers))
	idsMoved := len(peers) != len(d.peers)
	for _, p := range peers {
		s := d.peers[p.Name]
		if s == nil {
			s = &peerState{Peer: Peer{Name: p.Name}}
		}
		if p.ID > mesh.MaxShortID {
			p.ID = 0
		}
		p.Addr = p.Addr.Unmap()
		if s.ID != p.ID {
			idsMoved = true
			s.ID, s.path = p.ID, nil
		}
		s.told, s.refused = p, p.Refuse
		next[p.Name] = s
		if p.ID == 0 {
			s.refused = first(s.refused, "it has no short id")
		} else if other := byID[p.ID]; other != nil {
			why := fmt.Sprintf("short id %d is claimed by %s and %s", p.ID, p.Name, other.Name)
			s.refused, other.refused = first(s.refused, why), first(other.refused, why)
		} else {
			byID[p.ID] = s
		}
	}
	idle := idleEvery(len(next))
	for _, s := range next {
		if s.refused != "" {
			s.Peer, s.to, s.path = s.told, netip.Addr{}, nil
			continue
		}
		d.choosePath(s, next, now)
		if s.path != nil {
			s.path.idle = idle
		}
	}
	d.peers, d.byID = next, byID
	d.lookAtRoutes(now)
	err := errors.Join(d.hookUnderlay(), d.applyPeers(now))
	if idsMoved {
		err = errors.Join(err, d.applyEndpoints(now))
	}
	return err
}

// choosePath decides where a peer's frames go, and keeps the path if that has not changed.
func (d *Datapath) choosePath(s *peerState, all map[mesh.PeerName]*peerState, now time.Time) {
	p, to, why := s.told, s.told.Addr, ""
	if !p.Via.IsZero() {
		to = netip.Addr{}
		if via := all[p.Via]; via == nil || via.refused != "" || !via.told.Addr.IsValid() || !via.told.Via.IsZero() {
			why = "its relay has no kernel path"
		} else {
			to = via.told.Addr
		}
	} else if !to.IsValid() {
		why = "no underlay address known"
	}
	if s.path == nil && !d.settled && !d.cfg.GuardOnly {
		d.adoptPath(s, now)
	}
	if s.path != nil {
		if s.to == to && s.Addr == p.Addr && s.Via == p.Via {
			return
		}
		if s.path.state == up && (!to.IsValid() || !p.Via.IsZero()) {
			return // not better than what works
		}
		if s.to == to && s.path.state == up {
			s.Peer = p
			return
		}
	}
	if !s.Via.IsZero() && p.Via.IsZero() {
		s.relayedUntil = now.Add(relayedFor)
	}
	s.Peer, s.to, s.path, s.refused = p, to, nil, why
	if to.IsValid() {
		s.path = newPath(now, d.cfg.MTU)
	}
}

// adoptPath takes over a path that is up in the kernel since an earlier meshd.
func (d *Datapath) adoptPath(s *peerState, now time.Time) {
	k := d.kernel.peers[s.ID]
	if k.Flags&peerUp == 0 {
		return
	}
	s.to = underlayAddr(k.To, k.Flags&peerToV6 != 0)
	s.Addr, s.Via = underlayAddr(k.From, k.Flags&peerFromV6 != 0), mesh.PeerName{}
	if k.Flags&peerRelayed != 0 {
		s.relayedUntil = now.Add(relayedFor)
	}
	if k.Device != 0 {
		s.device, s.local = int(k.Device), wordsAddr([4]uint32{k.Local}, false)
	}
	s.path = newPath(now, d.cfg.MTU)
	s.path.adopt(now)
}

func first(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// SetEndpoints says which endpoints there are: all of them, those of this peer included. Of two with one
// MAC the one on this host wins, then the one whose peer has the lower name.
func (d *Datapath) SetEndpoints(all []mesh.Endpoint) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	now := time.Now()
	next := make(map[mesh.MAC]mesh.Endpoint, len(all))
	for _, e := range all {
		if e.MAC.IsZero() || e.MAC.IsMulticast() {
			continue
		}
		have, taken := next[e.MAC]
		if taken && (have.Peer == d.self || e.Peer != d.self && have.Peer.Compare(e.Peer) <= 0) {
			continue
		}
		next[e.MAC] = e
	}
	d.endpoints = next
	return d.applyEndpoints(now)
}
