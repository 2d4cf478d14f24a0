package router

import (
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
	peer    mesh.PeerName // whom frames to it go to: this peer if it is among them, else the lowest
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
	}
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
		link(e.byMAC, key.mac, key)
		macs[key.mac] = true
		floods = e.countLocked(&ep, 1) || ep.Peer == self || floods
		for _, p := range ep.Addrs {
			link(e.byIP, p.Addr(), key)
			ips[p.Addr()] = true
		}
	}
	e.publishLocked(self, macs, ips)
	return floods
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
		if len(e.byMAC[m]) == 0 {
			delete(freshMACs[s], m)
			continue
		}
		var k known
		for key := range e.byMAC[m] {
			k.peers = append(k.peers, key.peer)
			for _, p := range e.all[key].Addrs {
				k.subnets = append(k.subnets, p.Masked())
			}
		}
		slices.SortFunc(k.subnets, netip.Prefix.Compare)
		k.subnets = slices.Compact(k.subnets)
		slices.SortFunc(k.peers, mesh.PeerName.Compare)
		k.peers = slices.Compact(k.peers)
		k.peer = k.peers[0]
		if slices.Contains(k.peers, self) {
			k.peer = self
		}
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
		if len(e.byIP[a]) == 0 {
			delete(freshIPs[s], a)
			continue
		}
		var list []holder
		for key := range e.byIP[a] {
			for _, p := range e.all[key].Addrs {
				if p.Addr() == a {
					list = append(list, holder{key.mac, key.peer, p.Masked()})
				}
			}
		}
		slices.SortFunc(list, func(x, y holder) int { return x.peer.Compare(y.peer) })
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
