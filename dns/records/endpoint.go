package records

import (
	"cmp"
	"container/heap"
	"net/netip"
	"slices"

	"meshd/mesh"
)

// Announce says that this peer has ep, or that it has changed: addresses and names take the place of what
// was announced for the same owner and MAC. Announcing the same again costs nothing and sends nothing.
// Names that no answer could hold, and addresses beyond the 32nd, are left out with a warning.
func (t *Table) Announce(ep mesh.Endpoint) {
	ep.Peer = t.self
	if !validOwner(ep.Owner) || ep.MAC.IsMulticast() {
		t.log.Warn("endpoint not announced", "container", ep.Owner, "mac", ep.MAC, "err", "owner or MAC unusable")
		return
	}
	parts := t.split(ep)
	t.mu.Lock()
	for _, part := range parts {
		t.setOwnLocked(part)
	}
	t.withdrawLocked(ep.Owner, ep.MAC, uint8(len(parts)))
	t.unlock()
}

// Withdraw says that this peer has the endpoint no longer.
func (t *Table) Withdraw(owner string, mac mesh.MAC) {
	t.mu.Lock()
	t.withdrawLocked(owner, mac, 0)
	t.unlock()
}

// Settle says that all endpoints that this peer has were announced: what its former run announced and
// this one did not is dead from now on. It happens by itself ten seconds after Open.
func (t *Table) Settle() {
	t.mu.Lock()
	t.settleLocked()
	t.unlock()
}

// split makes rows small enough to travel: each has all addresses and some of the names.
func (t *Table) split(ep mesh.Endpoint) []*endpoint {
	base := endpoint{peer: ep.Peer, mac: ep.MAC, owner: ep.Owner}
	base.addrs = slices.Clone(ep.Addrs)
	base.addrs = slices.DeleteFunc(base.addrs, func(p netip.Prefix) bool { return !p.IsValid() || !validAddr(p.Addr()) })
	slices.SortFunc(base.addrs, comparePrefix)
	base.addrs = slices.Compact(base.addrs)
	if len(base.addrs) > maxAddrs {
		t.log.Warn("endpoint has too many addresses", "container", ep.Owner, "mac", ep.MAC, "announced", maxAddrs)
		base.addrs = base.addrs[:maxAddrs]
	}
	var names []string
	for _, n := range ep.Names {
		name, err := ParseName(n)
		if err != nil {
			t.log.Warn("name not announced", "container", ep.Owner, "err", err)
			continue
		}
		names = append(names, name)
	}
	slices.Sort(names)
	names = slices.Compact(names)

	const fixed = 6 + 6 + 1 + 1 + maxOwner + 8 + 9 + 1 + 1 + 1 + 1
	room := maxRow - fixed - 17*len(base.addrs)
	var parts []*endpoint
	for len(parts) == 0 || len(names) > 0 {
		if len(parts) == maxParts {
			t.log.Warn("endpoint has too many names", "container", ep.Owner, "mac", ep.MAC, "left_out", len(names))
			break
		}
		part := base
		part.part = uint8(len(parts))
		used, n := 0, 0
		for n < len(names) && n < 255 && (n == 0 || used+1+len(names[n]) <= room) {
			used += 1 + len(names[n])
			n++
		}
		part.names, names = names[:n:n], names[n:]
		parts = append(parts, &part)
	}
	for _, p := range parts {
		p.parts = uint8(len(parts))
	}
	return parts
}

// setOwnLocked gives a row of ours a version, unless it says nothing new.
func (t *Table) setOwnLocked(e *endpoint) {
	if r, _ := t.rowLocked(e); r != nil {
		was := r.rec.(*endpoint)
		if was.ver.gen == t.gen && !was.gone && !e.gone && was.parts == e.parts &&
			slices.Equal(was.addrs, e.addrs) && slices.Equal(was.names, e.names) {
			return
		}
		if was.gone && was.ver.gen == t.gen {
			t.ownDead--
		}
	} else if len(t.peers[t.self].rows) >= maxEndpointRows {
		t.refused++
		return
	}
	if e.gone {
		t.ownDead++
	}
	e.ver = t.nextLocked()
	t.sealLocked(e)
	t.sendLocked(t.putLocked(e))
}

func (t *Table) nextLocked() version {
	t.seq++
	return version{gen: t.gen, seq: t.seq}
}

// withdrawLocked buries the parts of an endpoint of ours from first on.
func (t *Table) withdrawLocked(owner string, mac mesh.MAC, first uint8) {
	for part := first; part < maxParts; part++ {
		key := &endpoint{peer: t.self, mac: mac, owner: owner, part: part, gone: true}
		r, _ := t.rowLocked(key)
		if r == nil || r.rec.(*endpoint).gone {
			break // parts are without gaps
		}
		t.setOwnLocked(key)
	}
	t.raiseFloorLocked()
}

// raiseFloorLocked gets rid of our tombstones when there are many. Whatever is at or below the floor is
// dead for every peer, now and later, so the oldest rows that still live are issued anew above it: one
// for each withdrawal, which bounds the tombstones by the live rows and doubles the traffic at most.
func (t *Table) raiseFloorLocked() {
	if !t.settled || t.ownDead <= ownTombstones {
		return
	}
	own := t.peers[t.self]
	to := t.floorLocked(own)
	for budget := 1; len(own.rows) > 0; {
		oldest := own.rows[0]
		e := oldest.rec.(*endpoint)
		if !e.gone && budget == 0 {
			break
		}
		to = e.ver
		if e.gone {
			t.dropLocked(oldest)
			continue
		}
		budget--
		again := *e
		again.ver = t.nextLocked()
		t.sealLocked(&again)
		t.sendLocked(t.putLocked(&again))
	}
	t.setFloorLocked(to)
}

func (t *Table) floorLocked(p *peer) version {
	if p.floor == nil {
		return version{}
	}
	return p.floor.rec.(*floor).ver
}

// setFloorLocked raises our own floor and tells the others.
func (t *Table) setFloorLocked(to version) {
	own := t.peers[t.self]
	if to.compare(t.floorLocked(own)) > 0 {
		f := &floor{peer: t.self, ver: to}
		t.sealLocked(f)
		t.sendLocked(t.putLocked(f))
		t.buryLocked(own)
	}
}

// buryLocked drops what lies at or below p's floor.
func (t *Table) buryLocked(p *peer) {
	limit := t.floorLocked(p)
	for len(p.rows) > 0 && p.rows[0].rec.(*endpoint).ver.compare(limit) <= 0 {
		t.dropLocked(p.rows[0])
	}
}

func (t *Table) settleLocked() {
	if !t.settled {
		t.settled = true
		t.setFloorLocked(version{gen: t.gen})
	}
}

// bumpLocked takes a generation above one that others hold of us although this run did not make it: the
// store was lost, or somebody speaks in our name. All that we have is issued anew.
func (t *Table) bumpLocked(above uint64) {
	if above < t.gen {
		t.bumpTo = 0
		return
	}
	if t.now.Sub(t.bumped) < bumpEvery || above>>32+1 >= maxGen>>32 {
		t.bumpTo = max(t.bumpTo, above)
		return
	}
	t.bumped, t.bumpTo = t.now, 0
	t.log.Info("other peers hold endpoints of this peer that it does not know; announcing all anew")
	var mine []*endpoint
	for _, r := range t.peers[t.self].rows {
		if e := r.rec.(*endpoint); e.ver.gen == t.gen && !e.gone {
			mine = append(mine, e)
		}
	}
	slices.SortFunc(mine, func(a, b *endpoint) int { return cmp.Compare(a.ver.seq, b.ver.seq) })
	t.gen = (above>>32+1)<<32 | t.runBits
	t.saveGen = true
	for _, e := range mine {
		again := *e
		again.ver = t.nextLocked()
		t.sealLocked(&again)
		t.sendLocked(t.putLocked(&again))
	}
	if t.settled {
		t.setFloorLocked(version{gen: t.gen})
	}
	t.ownDead = 0
	t.wakeLocked()
}

// Endpoints returns all endpoints that are attached anywhere, this peer's among them.
func (t *Table) Endpoints() []mesh.Endpoint {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.endpointsLocked()
}

// Attached returns the endpoints of one owner, wherever they are.
func (t *Table) Attached(owner string) []mesh.Endpoint {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []mesh.Endpoint
	if o := t.owners[owner]; o != nil {
		for _, r := range o.endpoints {
			if e := r.rec.(*endpoint); e.part == 0 {
				all = append(all, t.wholeLocked(e))
			}
		}
	}
	return all
}

func (t *Table) endpointsLocked() []mesh.Endpoint {
	var all []mesh.Endpoint
	for _, p := range t.peers {
		for _, r := range p.rows {
			if e := r.rec.(*endpoint); e.part == 0 && !e.gone {
				all = append(all, t.wholeLocked(e))
			}
		}
	}
	slices.SortFunc(all, func(a, b mesh.Endpoint) int {
		return cmp.Or(a.Peer.Compare(b.Peer), cmp.Compare(a.Owner, b.Owner), slices.Compare(a.MAC[:], b.MAC[:]))
	})
	return all
}

// wholeLocked puts an endpoint together from its parts; first is part 0.
func (t *Table) wholeLocked(first *endpoint) mesh.Endpoint {
	ep := mesh.Endpoint{Peer: first.peer, Owner: first.owner, MAC: first.mac, Addrs: first.addrs, Names: first.names}
	if first.parts <= 1 {
		return ep
	}
	ep.Names = slices.Clone(ep.Names)
	key := *first
	for key.part = 1; key.part < first.parts; key.part++ {
		if r, _ := t.rowLocked(&key); r != nil && !r.rec.(*endpoint).gone {
			ep.Names = append(ep.Names, r.rec.(*endpoint).names...)
		}
	}
	slices.Sort(ep.Names)
	return ep
}

// noteLocked queues a change for the subscribers: rec has taken the place of before, which may be nil.
func (t *Table) noteLocked(rec, before *endpoint) {
	if len(t.subscribers) == 0 {
		return
	}
	if rec.part > 0 {
		key := *rec
		key.part = 0
		r, _ := t.rowLocked(&key)
		if r == nil {
			return
		}
		rec = r.rec.(*endpoint)
		before = rec
		if rec.gone {
			return
		}
	}
	var c Change
	switch {
	case !rec.gone:
		c = Change{Endpoint: t.wholeLocked(rec), Up: true}
	case before != nil && !before.gone:
		c = Change{Endpoint: t.wholeLocked(before)}
	default:
		return
	}
	for _, s := range t.subscribers {
		s.pending = append(s.pending, c)
	}
}

var _ heap.Interface = (*rowHeap)(nil)
