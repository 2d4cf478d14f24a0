package router

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"

	"meshd/mesh"
)

// endpoints is the part of the switch that gossip fills: which addresses are whose. Readers take no lock:
// both tables are cut into shards that are replaced whole, so that one change copies a small part.
type endpoints struct {
	macs [shards]atomic.Pointer[map[mesh.MAC]known]
	ips  [shards]atomic.Pointer[map[netip.Addr][]holder]

	// The same, arranged for changing it; guarded by Switch.mu.
	all     map[endpointKey]mesh.Endpoint
	byMAC   map[mesh.MAC]map[endpointKey]bool
	byIP    map[netip.Addr]map[endpointKey]bool
	subnets map[netip.Prefix]map[mesh.PeerName]int // how many endpoints a peer has in it
	flags   map[mesh.PeerName]PeerFlags
	since   map[endpointKey]uint64 // in which order they were announced
	changes uint64                 // counts them

	// What more than one peer announces.
	contestedMACs map[mesh.MAC]bool
	contestedIPs  map[netip.Addr]bool
}

const shards = 256

type endpointKey struct {
	peer  mesh.PeerName
	owner string
	mac   mesh.MAC
}

// known is what gossip says of a MAC. More than one peer may announce it for a moment, when an endpoint
// moves; all of them may send from it then.
type known struct {
	peer    mesh.PeerName // whom frames to it go to: see precedes
	peers   []mesh.PeerName
	subnets []netip.Prefix // of all its addresses, sorted
}

func (k known) has(p mesh.PeerName) bool { return k.peer == p || slices.Contains(k.peers, p) }

// apart reports whether two endpoints share no subnet, to the same length: they do not hear each other then,
// by this path as by the kernel's.
func (k *known) apart(o *known) bool {
	for _, p := range k.subnets {
		if slices.Contains(o.subnets, p) {
			return false
		}
	}
	return true
}

// holder is an endpoint that has a certain address.
type holder struct {
	mac    mesh.MAC
	peer   mesh.PeerName
	subnet netip.Prefix
}

func macShard(m mesh.MAC) uint8 { return uint8(mix64(macBits(m))) }

func ipShard(a netip.Addr) uint8 {
	raw := a.As16()
	return uint8(mix64(hash64(hashStart, raw[8:])))
}

func newEndpoints() *endpoints {
	return &endpoints{
		all:     map[endpointKey]mesh.Endpoint{},
		byMAC:   map[mesh.MAC]map[endpointKey]bool{},
		byIP:    map[netip.Addr]map[endpointKey]bool{},
		subnets: map[netip.Prefix]map[mesh.PeerName]int{},
		flags:   map[mesh.PeerName]PeerFlags{},
		since:   map[endpointKey]uint64{},

		contestedMACs: map[mesh.MAC]bool{},
		contestedIPs:  map[netip.Addr]bool{},
	}
}

// precedes orders endpoints that announce the same: this peer's own first, then those of peers that can be
// reached, and of these who was heard of first. So nobody draws what another has to himself by announcing it too,
// not even when that one is away for a moment. Who were heard of at once, as by a newcomer, go by their names.
func (e *endpoints) precedes(self mesh.PeerName, a, b endpointKey) int {
	rank := func(k endpointKey) int {
		switch {
		case k.peer == self:
			return 0
		case e.flags[k.peer].Reachable:
			return 1
		}
		return 2
	}
	return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(e.since[a], e.since[b]), a.peer.Compare(b.peer))
}

// orderedLocked sorts endpoints and returns how many peers they belong to.
func (e *endpoints) orderedLocked(self mesh.PeerName, set map[endpointKey]bool) (keys []endpointKey, peers int) {
	keys = slices.AppendSeq(make([]endpointKey, 0, len(set)), maps.Keys(set))
	slices.SortFunc(keys, func(a, b endpointKey) int { return e.precedes(self, a, b) })
	for i := range keys {
		if !slices.ContainsFunc(keys[:i], func(k endpointKey) bool { return k.peer == keys[i].peer }) {
			peers++
		}
	}
	return keys, peers
}

func (e *endpoints) mac(m mesh.MAC) (known, bool) {
	p := e.macs[macShard(m)].Load()
	if p == nil {
		return known{}, false
	}
	k, ok := (*p)[m]
	return k, ok
}

func (e *endpoints) holders(a netip.Addr) []holder {
	p := e.ips[ipShard(a)].Load()
	if p == nil {
		return nil
	}
	return (*p)[a]
}

func keyOf(ep *mesh.Endpoint) endpointKey { return endpointKey{ep.Peer, ep.Owner, ep.MAC} }

func sameEndpoint(a, b *mesh.Endpoint) bool { return slices.Equal(a.Addrs, b.Addrs) }

// changeLocked puts and removes endpoints, and reports whether the sets of peers to flood to may differ.
func (e *endpoints) changeLocked(self mesh.PeerName, set []mesh.Endpoint, gone []endpointKey) (floods bool) {
	macs, ips := map[mesh.MAC]bool{}, map[netip.Addr]bool{}
	e.changes++
	drop := func(key endpointKey) {
		old, ok := e.all[key]
		if !ok {
			return
		}
		delete(e.all, key)
		unlink(e.byMAC, key.mac, key)
		macs[key.mac] = true
		floods = e.countLocked(&old, -1) || old.Peer == self || floods
		for _, p := range old.Addrs {
			unlink(e.byIP, p.Addr(), key)
			ips[p.Addr()] = true
		}
	}
	for _, key := range gone {
		drop(key)
	}
	for i := range set {
		ep := set[i]
		key := keyOf(&ep)
		if old, ok := e.all[key]; ok {
			if sameEndpoint(&old, &ep) {
				continue
			}
			drop(key)
		}
		ep.Addrs, ep.Names = slices.Clone(ep.Addrs), nil
		e.all[key] = ep
		if _, ok := e.since[key]; !ok {
			e.since[key] = e.changes
		}
		link(e.byMAC, key.mac, key)
		macs[key.mac] = true
		floods = e.countLocked(&ep, 1) || ep.Peer == self || floods
		for _, p := range ep.Addrs {
			link(e.byIP, p.Addr(), key)
			ips[p.Addr()] = true
		}
	}
	for _, key := range gone {
		if _, ok := e.all[key]; !ok {
			delete(e.since, key)
		}
	}
	e.publishLocked(self, macs, ips)
	return floods
}

// judgeLocked decides anew whom that belongs to which more than one peer announces.
func (e *endpoints) judgeLocked(self mesh.PeerName) {
	e.publishLocked(self, maps.Clone(e.contestedMACs), maps.Clone(e.contestedIPs))
}

func link[K comparable](m map[K]map[endpointKey]bool, k K, key endpointKey) {
	if m[k] == nil {
		m[k] = map[endpointKey]bool{}
	}
	m[k][key] = true
}

func unlink[K comparable](m map[K]map[endpointKey]bool, k K, key endpointKey) {
	delete(m[k], key)
	if len(m[k]) == 0 {
		delete(m, k)
	}
}

// countLocked keeps count of who has how many endpoints where, and reports whether somebody's first one
// came or last one went.
func (e *endpoints) countLocked(ep *mesh.Endpoint, by int) (changed bool) {
	step := func(m map[mesh.PeerName]int) {
		before := m[ep.Peer]
		m[ep.Peer] = before + by
		if m[ep.Peer] == 0 {
			delete(m, ep.Peer)
		}
		changed = changed || (before == 0) != (before+by == 0)
	}
	for _, p := range ep.Addrs {
		net := p.Masked()
		if e.subnets[net] == nil {
			e.subnets[net] = map[mesh.PeerName]int{}
		}
		step(e.subnets[net])
		if len(e.subnets[net]) == 0 {
			delete(e.subnets, net)
		}
	}
	return changed
}

func (e *endpoints) publishLocked(self mesh.PeerName, macs map[mesh.MAC]bool, ips map[netip.Addr]bool) {
	freshMACs := map[uint8]map[mesh.MAC]known{}
	for m := range macs {
		s := macShard(m)
		if freshMACs[s] == nil {
			freshMACs[s] = copyShard(&e.macs[s])
		}
		delete(e.contestedMACs, m)
		if len(e.byMAC[m]) == 0 {
			delete(freshMACs[s], m)
			continue
		}
		var k known
		keys, peers := e.orderedLocked(self, e.byMAC[m])
		if k.peer = keys[0].peer; peers > 1 {
			e.contestedMACs[m] = true
		}
		for _, key := range keys {
			k.peers = append(k.peers, key.peer)
			for _, p := range e.all[key].Addrs {
				k.subnets = append(k.subnets, p.Masked())
			}
		}
		slices.SortFunc(k.subnets, netip.Prefix.Compare)
		k.subnets = slices.Compact(k.subnets)
		slices.SortFunc(k.peers, mesh.PeerName.Compare)
		k.peers = slices.Compact(k.peers)
		freshMACs[s][m] = k
	}
	for s, m := range freshMACs {
		e.macs[s].Store(&m)
	}

	freshIPs := map[uint8]map[netip.Addr][]holder{}
	for a := range ips {
		s := ipShard(a)
		if freshIPs[s] == nil {
			freshIPs[s] = copyShard(&e.ips[s])
		}
		delete(e.contestedIPs, a)
		if len(e.byIP[a]) == 0 {
			delete(freshIPs[s], a)
			continue
		}
		var list []holder
		keys, peers := e.orderedLocked(self, e.byIP[a])
		if peers > 1 {
			e.contestedIPs[a] = true
		}
		for _, key := range keys {
			for _, p := range e.all[key].Addrs {
				if p.Addr() == a {
					list = append(list, holder{key.mac, key.peer, p.Masked()})
				}
			}
		}
		freshIPs[s][a] = list
	}
	for s, m := range freshIPs {
		e.ips[s].Store(&m)
	}
}

func copyShard[K comparable, V any](p *atomic.Pointer[map[K]V]) map[K]V {
	if old := p.Load(); old != nil {
		return maps.Clone(*old)
	}
	return map[K]V{}
}
