package router

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"meshd/mesh"
)

// PeerFlags is what the switch must know of a peer.
type PeerFlags struct {
	Name      mesh.PeerName
	Reachable bool // frames may be sent to it now
	Foreign   bool // its bridge has ports that are no endpoints
}

// MACEntry is one address as the switch knows it.
type MACEntry struct {
	MAC     mesh.MAC
	Peer    mesh.PeerName // behind whose bridge it is
	Learned bool          // from frames; otherwise announced
	Seen    time.Time     // of a learned one, to the second
}

// Switch decides what becomes of frames. Addresses that gossip announced are certain: they are neither
// learned nor moved by a frame, and a frame that bears one from the wrong place is dropped. All others
// are learned from the frames themselves and flooded as long as they are not known.
//
// Endpoints that share no subnet exchange no frames here, whatever addresses and routes a container gives itself.
// Addresses that nobody announced belong to interfaces that somebody joined to a bridge on purpose: they reach all.
//
// FromBridge and FromPeer may be called from any number of goroutines; they take no lock and allocate
// nothing. Frames are borrowed and never changed.
type Switch struct {
	self    mesh.PeerName // fixed
	started time.Time     // fixed

	known   *endpoints
	learned *fdb
	unknown limiter
	peers   atomic.Pointer[peerTable]
	floods  atomic.Pointer[map[mesh.MAC][]mesh.PeerName] // by sending endpoint of ours
	drops   [reasonCount]atomic.Uint64

	mu sync.Mutex // guards changes of known
}

// peerTable numbers the peers for the learned addresses.
type peerTable struct {
	number map[mesh.PeerName]owner
	name   map[owner]mesh.PeerName
	all    []mesh.PeerName // reachable, by name
}

// NewSwitch starts with nothing known. now begins its time.
func NewSwitch(self mesh.PeerName, now time.Time) *Switch {
	s := &Switch{self: self, started: now, known: newEndpoints(), learned: newFDB()}
	s.peers.Store(&peerTable{})
	s.floods.Store(&map[mesh.MAC][]mesh.PeerName{})
	return s
}

// seconds is the time in the learned table.
func (s *Switch) seconds(now time.Time) uint32 {
	return uint32(max(now.Sub(s.started), 0) / time.Second)
}

func (s *Switch) drop(r Reason) Decision {
	s.drops[r].Add(1)
	return Decision{Verdict: Drop, Reason: r}
}

// FromBridge decides on a frame read from our bridge. scratch holds an answer and must have room for 128
// bytes.
func (s *Switch) FromBridge(frame, scratch []byte, now time.Time) Decision {
	dst, src, kind, ok := parseEther(frame)
	if !ok {
		return s.drop(ReasonRunt)
	}
	if src.IsMulticast() || src.IsZero() {
		return s.drop(ReasonSource)
	}
	if isLinkControl(dst) {
		return s.drop(ReasonLink)
	}
	sender, announced := s.known.mac(src)
	switch {
	case !announced:
		s.learned.learn(src, ownerBridge, s.seconds(now))
	case !sender.has(s.self):
		return s.drop(ReasonMoved)
	}
	if n, ok := parseNeighbour(kind, frame[etherHeader:]); ok {
		if s.usurps(&n, func(holder) bool { return true }) {
			return s.drop(ReasonNeighbour)
		}
		if d, decided := s.neighbour(&n, dst, src, &sender, announced, scratch); decided {
			return d
		}
	}
	if !dst.IsMulticast() {
		if to, ok := s.known.mac(dst); ok {
			switch {
			case to.peer == s.self:
				return s.drop(ReasonLocal)
			case announced && sender.apart(&to):
				return s.drop(ReasonIsolated)
			}
			return Decision{Verdict: Unicast, Peer: to.peer}
		}
		switch who := s.learned.lookup(dst, s.seconds(now)); who {
		case noOwner:
			if !s.unknown.take(src, now.Sub(s.started)) {
				return s.drop(ReasonRate)
			}
		case ownerBridge:
			return s.drop(ReasonLocal)
		default:
			if name, ok := s.peers.Load().name[who]; ok {
				return Decision{Verdict: Unicast, Peer: name}
			}
		}
	}
	to := s.peers.Load().all
	if announced {
		to = (*s.floods.Load())[src]
	}
	if len(to) == 0 {
		return s.drop(ReasonNoPeer)
	}
	return Decision{Verdict: Flood, Peers: to}
}

// usurps reports whether an ARP or ND packet gives a MAC for an address that others are known to have, and none of them at
// that MAC. stands says whether a holder counts.
func (s *Switch) usurps(n *neighbour, stands func(holder) bool) bool {
	claimed := n.claims()
	if claimed.IsUnspecified() || n.mac.IsZero() {
		return false
	}
	others := false
	for _, h := range s.known.holders(claimed) {
		if h.mac == n.mac && !n.unsure {
			return false
		}
		others = others || stands(h)
	}
	return others
}

// neighbour looks at an ARP or ND packet from the bridge. It answers a request for an announced address
// of another peer. It does not answer where somebody asks whether an address is taken (no sender) or says
// that it has it now: those must reach who has the address, or duplicate address detection would be
// answered by a table that may be behind.
func (s *Switch) neighbour(n *neighbour, dst, src mesh.MAC, sender *known, announced bool, scratch []byte) (Decision, bool) {
	if !n.request || n.announce || n.sender.IsUnspecified() || !dst.IsMulticast() || n.mac != src {
		return Decision{}, false
	}
	holders := s.known.holders(n.target)
	if len(holders) == 0 {
		return Decision{}, false
	}
	var at holder
	for _, h := range holders {
		if h.peer == s.self {
			return s.drop(ReasonLocal), true // it heard the request on the bridge
		}
		if h.mac != src && at.peer.IsZero() && (!announced || h.subnet.Contains(n.sender) && slices.Contains(sender.subnets, h.subnet)) {
			at = h
		}
	}
	if at.peer.IsZero() || cap(scratch) < answerLength {
		return Decision{}, false
	}
	return Decision{Verdict: Answer, Reply: appendAnswer(scratch[:0], src, n, at.mac)}, true
}

// FromPeer decides on a frame that arrived by tunnel from src, end to end. It is delivered to the bridge
// or dropped, and never sent on.
func (s *Switch) FromPeer(frame []byte, src mesh.PeerName, now time.Time) Decision {
	dst, from, kind, ok := parseEther(frame)
	if !ok {
		return s.drop(ReasonRunt)
	}
	if from.IsMulticast() || from.IsZero() {
		return s.drop(ReasonSource)
	}
	if isLinkControl(dst) {
		return s.drop(ReasonLink)
	}
	sender, announced := s.known.mac(from)
	if announced {
		if !sender.has(src) || src == s.self {
			return s.drop(ReasonForged)
		}
	} else if number, ok := s.peers.Load().number[src]; ok {
		s.learned.learn(from, number, s.seconds(now))
	}
	// A peer that turned must not say that another's address is with it. What belonged to one that is out of reach may have
	// moved there.
	if n, ok := parseNeighbour(kind, frame[etherHeader:]); ok && s.usurps(&n, func(h holder) bool { return h.peer != src && s.inReach(h.peer) }) {
		return s.drop(ReasonNeighbour)
	}
	if !dst.IsMulticast() {
		if to, ok := s.known.mac(dst); ok {
			switch {
			case !to.has(s.self):
				return s.drop(ReasonLocal)
			case announced && sender.apart(&to):
				return s.drop(ReasonIsolated)
			}
		}
	}
	return Decision{Verdict: Deliver}
}

func (s *Switch) inReach(peer mesh.PeerName) bool {
	_, ok := slices.BinarySearchFunc(s.peers.Load().all, peer, mesh.PeerName.Compare)
	return ok || peer == s.self
}

// SetEndpoints replaces all announced endpoints, this peer's own among them.
func (s *Switch) SetEndpoints(all []mesh.Endpoint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	keep := make(map[endpointKey]bool, len(all))
	for i := range all {
		keep[keyOf(&all[i])] = true
	}
	var gone []endpointKey
	for key := range s.known.all {
		if !keep[key] {
			gone = append(gone, key)
		}
	}
	changed := s.known.changeLocked(s.self, all, gone)
	s.afterLocked(changed, all)
}

// UpdateEndpoints announces some endpoints and withdraws others.
func (s *Switch) UpdateEndpoints(set, gone []mesh.Endpoint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	keys := make([]endpointKey, len(gone))
	for i := range gone {
		keys[i] = keyOf(&gone[i])
	}
	changed := s.known.changeLocked(s.self, set, keys)
	s.afterLocked(changed, set)
}

// afterLocked forgets what had been learned about addresses that are announced now.
func (s *Switch) afterLocked(changed bool, set []mesh.Endpoint) {
	if changed {
		s.setFloodsLocked()
	}
	announced := make(map[mesh.MAC]bool, len(set))
	for i := range set {
		announced[set[i].MAC] = true
	}
	s.learned.forget(func(mac mesh.MAC, _ owner, _ uint32) bool { return announced[mac] })
}

// SetPeers replaces what is known of the other peers.
func (s *Switch) SetPeers(peers []PeerFlags) {
	s.mu.Lock()
	defer s.mu.Unlock()
	flags := make(map[mesh.PeerName]PeerFlags, len(peers))
	for _, p := range peers {
		if p.Name != s.self {
			flags[p.Name] = p
		}
	}
	if maps.Equal(flags, s.known.flags) {
		return
	}
	s.known.flags = flags
	old := s.peers.Load()
	table := &peerTable{number: make(map[mesh.PeerName]owner, len(flags)), name: make(map[owner]mesh.PeerName, len(flags))}
	for name := range flags {
		if n, ok := old.number[name]; ok {
			table.number[name], table.name[n] = n, name
		}
	}
	// Addresses behind peers that are gone leave before their numbers are given to others.
	s.learned.forget(func(_ mesh.MAC, who owner, _ uint32) bool { return who >= firstOwner && table.name[who].IsZero() })
	next := firstOwner
	for name, f := range flags {
		if f.Reachable {
			table.all = append(table.all, name)
		}
		if _, ok := table.number[name]; ok {
			continue
		}
		for !table.name[next].IsZero() {
			next++
		}
		table.number[name], table.name[next] = next, name
	}
	slices.SortFunc(table.all, mesh.PeerName.Compare)
	s.peers.Store(table)
	s.known.judgeLocked(s.self)
	s.setFloodsLocked()
}

// setFloodsLocked works out whom a broadcast of each of our endpoints goes to: every reachable peer with
// an endpoint in one of its subnets, or with foreign ports.
func (s *Switch) setFloodsLocked() {
	e := s.known
	floods := map[mesh.MAC][]mesh.PeerName{}
	sets := map[string][]mesh.PeerName{}
	for mac, keys := range e.byMAC {
		var nets []netip.Prefix
		local := false
		for key := range keys {
			if key.peer == s.self {
				local = true
				for _, p := range e.all[key].Addrs {
					nets = append(nets, p.Masked())
				}
			}
		}
		if !local {
			continue
		}
		slices.SortFunc(nets, netip.Prefix.Compare)
		nets = slices.Compact(nets)
		id := subnetsID(nets)
		set, done := sets[id]
		if !done {
			set = e.floodSetLocked(nets, s.known.flags)
			sets[id] = set
		}
		floods[mac] = set
	}
	s.floods.Store(&floods)
}

func subnetsID(nets []netip.Prefix) string {
	var b []byte
	for _, p := range nets {
		b = p.AppendTo(b)
		b = append(b, ' ')
	}
	return string(b)
}

func (e *endpoints) floodSetLocked(nets []netip.Prefix, flags map[mesh.PeerName]PeerFlags) []mesh.PeerName {
	in := map[mesh.PeerName]bool{}
	for _, net := range nets {
		for p := range e.subnets[net] {
			in[p] = true
		}
	}
	var out []mesh.PeerName
	for name, f := range flags {
		if f.Reachable && (f.Foreign || in[name]) {
			out = append(out, name)
		}
	}
	slices.SortFunc(out, mesh.PeerName.Compare)
	return out
}

// Expire frees the slots of learned addresses that have been silent for too long. Call it now and then.
func (s *Switch) Expire(now time.Time) {
	at := s.seconds(now)
	s.learned.forget(func(_ mesh.MAC, _ owner, seen uint32) bool { return expired(seen, at) })
}

// Foreign reports whether an address that is no endpoint was seen on our bridge of late.
func (s *Switch) Foreign(now time.Time) (found bool) {
	at := s.seconds(now)
	s.learned.each(func(_ mesh.MAC, who owner, seen uint32) {
		found = found || who == ownerBridge && !expired(seen, at)
	})
	return found
}

// MACs lists all announced and learned addresses, by address.
func (s *Switch) MACs() []MACEntry {
	var out []MACEntry
	for i := range s.known.macs {
		if m := s.known.macs[i].Load(); m != nil {
			for mac, k := range *m {
				out = append(out, MACEntry{MAC: mac, Peer: k.peer})
			}
		}
	}
	peers := s.peers.Load()
	s.learned.each(func(mac mesh.MAC, who owner, seen uint32) {
		name := s.self
		if who != ownerBridge {
			name = peers.name[who]
		}
		out = append(out, MACEntry{MAC: mac, Peer: name, Learned: true, Seen: s.started.Add(time.Duration(seen) * time.Second)})
	})
	slices.SortFunc(out, func(a, b MACEntry) int {
		return cmp.Compare(macBits(a.MAC), macBits(b.MAC))
	})
	return out
}

// Owner is whom frames to an announced address go to.
func (s *Switch) Owner(mac mesh.MAC) (mesh.PeerName, bool) {
	k, ok := s.known.mac(mac)
	return k.peer, ok
}

// Clash is a MAC or IP address that more than one peer announces that can be reached.
type Clash struct {
	What  string
	Peers []mesh.PeerName // the first is whom frames go to
}

// Clashes lists what more than one peer announces, by address. It is somebody's mistake, or worse: endpoints that move
// leave no trace here for longer than news take to spread.
func (s *Switch) Clashes() []Clash {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Clash
	add := func(what string, set map[endpointKey]bool) {
		keys, _ := s.known.orderedLocked(s.self, set)
		c := Clash{What: what}
		for _, k := range keys {
			if (k.peer == s.self || s.known.flags[k.peer].Reachable) && !slices.Contains(c.Peers, k.peer) {
				c.Peers = append(c.Peers, k.peer)
			}
		}
		if len(c.Peers) > 1 {
			out = append(out, c)
		}
	}
	for mac := range s.known.contestedMACs {
		add(mac.String(), s.known.byMAC[mac])
	}
	for addr := range s.known.contestedIPs {
		add(addr.String(), s.known.byIP[addr])
	}
	slices.SortFunc(out, func(a, b Clash) int { return cmp.Compare(a.What, b.What) })
	return out
}

// Drops counts dropped frames by reason, and addresses that found no room in the learned table.
func (s *Switch) Drops() map[string]uint64 {
	out := map[string]uint64{"fdb_full": s.learned.full.Load()}
	for r := range s.drops {
		if r != int(NoReason) {
			out[Reason(r).String()] = s.drops[r].Load()
		}
	}
	return out
}
