package gossip

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"meshd/mesh"
	"meshd/router"
)

const (
	publishPause = 50 * time.Millisecond  // between publications, when a link went up or down;
	publishMost  = 500 * time.Millisecond // it doubles up to this, both longer by half a millisecond per peer,
	publishQuiet = 2 * time.Second        // until so long nothing was published
	publishLazy  = time.Second            // between publications when anything else changed
	routesPause  = 20 * time.Millisecond  // between computations of routes
	reachPause   = 500 * time.Millisecond
	knowPause    = 100 * time.Millisecond // and 10 ms more for every peer, up to knowMost
	knowMost     = 1500 * time.Millisecond
	dialPause    = 50 * time.Millisecond // between looks for whom to dial
	bearPause    = time.Second           // between looks whether links lead to those who are told of, if nothing changes
	checkPause   = 3 * time.Second       // between looks for peers that are no members

	syncEvery = 2 * time.Second        // between comparisons with a random peer
	syncAgain = 200 * time.Millisecond // after one that brought something,
	syncMore  = time.Millisecond / 2   // and this for every peer, unless
	syncLot   = 16 << 10               // so many bytes came: there is likely to be more
	lackPause = time.Second            // between such that are due to a missing key alone
	syncRate  = 2000                   // messages a second in answer to comparisons
	syncBurst = 500
	syncShare = 8 // of them to each peer while they are scarce

	memberDoubt   = 5 * time.Second // dead for so long to memberlist, a peer is suspected if we have no link to it
	conflictPause = time.Minute     // before a peer that gave way to another of its name tries again
)

// loopState is what the loop remembers between steps.
type loopState struct {
	publish   bool // a link went up or down
	lazy      bool // something less urgent changed
	published time.Time
	burst     time.Duration // how long to wait after published
	settled   time.Time     // until when damping has been looked at
	looked    time.Time     // when that was
	changes   uint64        // of the topology, when routes were computed last
	computed  time.Time
	pause     time.Duration
	reached   time.Time
	knew      time.Time
	knewAt    uint64 // changes of the topology then
	checked   time.Time
	dialled   time.Time
	bore      time.Time // when links were last compared with who bears their peers' names
	boreAt    uint64    // changes of the topology then
	synced    time.Time
	hint      bool // others should compare with us
	hinted    time.Time
	again     map[mesh.PeerName]time.Time // whom to compare with again
	brought   int                         // bytes of news that comparisons brought since hinted
	conflict  time.Time
	lacked    time.Time // when a key was missing last
	flags     []router.PeerFlags
	told      *router.Routes // and
	toldAt    uint64         // changes of the topology when flags were made

	syncCredit float64
	syncAt     time.Time
	syncShared time.Time
	syncShares map[mesh.PeerName]int // messages since then
}

// step does whatever is due.
func (n *Node) step(ctx context.Context, now time.Time, lookups *sync.WaitGroup) {
	n.mu.Lock()
	links, outbox := n.links, n.outbox
	n.links, n.outbox = nil, nil
	n.mu.Unlock()
	for _, ev := range links {
		n.onLink(ev, now)
	}
	for _, q := range outbox {
		n.spread.add(q.ch, q.body, n.self)
	}
	n.publish(now)
	n.route(now)
	n.checkRival(now)
	if n.spread.due(now) {
		for _, l := range n.spread.round(now, n.routes.Load().Reachable(), n.rng) {
			_ = n.send(l.to, l.msg)
		}
	}
	n.compare(now)
	n.dial(ctx, now, lookups)
	n.checkMembers(now)
}

// onLink takes in one report of the tunnel.
func (n *Node) onLink(ev router.LinkEvent, now time.Time) {
	name := ev.Link.Peer.Name
	log := n.log.With("peer", name, "nickname", ev.Link.Peer.NickName, "underlay", ev.Link.Addr)
	switch ev.State {
	case router.LinkUp:
		n.mu.Lock()
		conflict := n.conflict
		known := n.book.live[name] != nil
		if conflict == "" {
			n.book.up(ev.Link, now)
			n.dialer.up(ev.Link, now)
		}
		n.mu.Unlock()
		if conflict != "" {
			n.under.Hangup(name, conflict)
			return
		}
		n.topology.Linked(name, ev.Link.Peer.Key, true)
		log.Info("link up", "outbound", ev.Link.Outbound, "sealed", ev.Link.Sealed, "mtu", ev.Link.MTU, "rtt", ev.Link.RTT)
		n.state.publish = true
		n.members.setDirect(name, true)
		_, reached := n.routes.NextHop(name)
		if !reached {
			n.members.join(name) // it may have other members
		} else if !n.members.isMember(name) {
			n.members.introduce(name)
		}
		if !known && !reached {
			n.state.again[name] = now // it may be the first of a whole other part of the mesh
		}
	case router.LinkChanged:
		n.mu.Lock()
		n.book.changed(ev.Link, now)
		n.mu.Unlock()
		n.state.lazy = true
	case router.LinkDown:
		n.mu.Lock()
		_, was := n.book.live[name]
		lived := n.book.down(name, now)
		n.dialer.down(name, lived, ev.Err, now)
		if was {
			n.ended++
		}
		n.mu.Unlock()
		if was {
			log.Info("link down", "err", ev.Err, "lived", lived.Round(time.Second))
			n.topology.Linked(name, ev.Link.Peer.Key, false)
			n.members.setDirect(name, false)
			n.state.publish = true
		}
	case router.LinkDialFailed:
		n.mu.Lock()
		if name == n.self && ev.Link.Peer.Run == n.cfg.Self.Run {
			n.dialer.itself(ev.Link.Addr, ev.Err)
		} else {
			n.dialer.failed(ev.Link.Addr, ev.Link.Peer, ev.Err, now)
		}
		n.mu.Unlock()
		log.Debug("dial failed", "err", ev.Err)
	}
}

// publish says what our links are, at once after one went up or down, and otherwise once a second at most.
// While many change it waits longer each time, and all the more in a large mesh, since everybody's word
// reaches everybody.
func (n *Node) publish(now time.Time) {
	s := &n.state
	large := time.Duration(len(n.routes.Load().Reachable())) * time.Millisecond / 2
	if now.Sub(s.published) >= publishQuiet {
		s.burst = 0
	}
	settles := false
	n.mu.Lock()
	if now.Sub(s.looked) >= publishPause {
		s.looked = now
		settles = n.book.settles(s.settled, now)
	}
	if s.publish || s.lazy && now.Sub(s.published) >= publishLazy || settles {
		if now.Sub(s.published) < s.burst {
			n.mu.Unlock()
			return
		}
		s.burst = min(max(2*s.burst, publishPause+large), publishMost+large)
		s.publish, s.lazy, s.published, s.settled = false, false, now, now
	} else {
		n.mu.Unlock()
		return
	}
	links := n.book.links(now)
	n.mu.Unlock()
	for _, d := range n.topology.SetLinks(links) {
		n.spread.add(mesh.ChanTopology, d, n.self)
	}
}

// route computes the routes when the topology changed, and tells who has become reachable or not.
func (n *Node) route(now time.Time) {
	s := &n.state
	changes := n.topology.Changes()
	if changes != s.changes && now.Sub(s.computed) >= s.pause {
		begun := time.Now()
		n.routes.Store(n.topology.Routes())
		s.changes, s.computed = changes, now
		s.pause = max(n.cfg.RoutesPause, 5*time.Since(begun)) // a sixth of a core at most
		s.reached = time.Time{}
	}
	if now.Sub(s.reached) < reachPause {
		return
	}
	s.reached = now
	routes := n.routes.Load()
	limit := router.Patience{Suspect: n.cfg.Suspect, Gone: n.cfg.Gone}
	events := n.topology.Reach(now, limit, func(p mesh.PeerName) bool {
		via, ok := routes.NextHop(p)
		if !ok || via == p {
			return ok
		}
		since, dead := n.members.failed(p)
		return !dead || now.Sub(since) < memberDoubt
	})
	n.tell(events)
	n.tellPeers()
}

func (n *Node) tell(events []router.StateChange) {
	if len(events) == 0 {
		return
	}
	n.mu.Lock()
	subscribers := slices.Clone(n.subscribers)
	n.mu.Unlock()
	for _, ev := range events {
		peer, _ := n.topology.Peer(ev.Peer)
		n.log.Info("peer "+ev.State.String(), "peer", ev.Peer, "nickname", peer.NickName)
		switch {
		case ev.State == router.Gone:
			n.members.forget(ev.Peer)
		case ev.State == router.Alive && !n.members.isMember(ev.Peer):
			n.members.introduce(ev.Peer)
		}
		for _, f := range subscribers {
			f(PeerEvent{ev.Peer, peer.NickName, ev.State})
		}
	}
}

func (n *Node) tellPeers() {
	if n.cfg.OnPeers == nil {
		return
	}
	s, routes, changes := &n.state, n.routes.Load(), n.topology.Changes()
	if s.told == routes && s.toldAt == changes {
		return
	}
	s.told, s.toldAt = routes, changes
	var flags []router.PeerFlags
	for _, p := range n.topology.Roster() {
		if p.Name != n.self {
			_, ok := routes.NextHop(p.Name)
			flags = append(flags, router.PeerFlags{Name: p.Name, Reachable: ok, Foreign: p.Flags&router.FlagForeign != 0})
		}
	}
	if !slices.Equal(flags, s.flags) {
		s.flags = flags
		n.cfg.OnPeers(flags)
	}
}

// checkRival gives way to a live peer that had our name before us: it hangs up, says why, and tries again
// later, in case the other has gone.
func (n *Node) checkRival(now time.Time) {
	s := &n.state
	if !s.conflict.IsZero() {
		if now.Sub(s.conflict) < conflictPause {
			return
		}
		s.conflict = time.Time{}
		n.topology.Contest()
		n.mu.Lock()
		n.conflict = ""
		n.mu.Unlock()
		return
	}
	if _, rival := n.topology.Rival(); !rival {
		return
	}
	s.conflict = now
	why := "the name " + n.self.String() + " is in use by another live peer that came first (a cloned disk?): " +
		"start " + n.cfg.Self.NickName + " with another --name, or remove its state file"
	n.log.Error("giving way to another peer with our name", "peer", n.self, "err", why)
	n.mu.Lock()
	n.conflict = why
	live := sortedNames(n.book.live)
	n.mu.Unlock()
	for _, p := range live {
		n.under.Hangup(p, why)
	}
}

// compare begins comparisons of tables: with new neighbours, with who had news, and with a random peer
// now and then.
func (n *Node) compare(now time.Time) {
	s := &n.state
	peers := n.routes.Load().Reachable()
	var with []mesh.PeerName
	for p, at := range s.again {
		if !at.After(now) {
			with = append(with, p)
			delete(s.again, p)
		}
	}
	slices.SortFunc(with, mesh.PeerName.Compare)
	if s.hint && now.Sub(s.hinted) >= n.syncPause() {
		few := spreadFanout
		if s.brought >= syncLot {
			few = 1 // many entries differ, and are listed each time
		}
		s.hint, s.hinted, s.brought = false, now, 0
		with = append(with, draw(peers, few, n.rng)...)
	}
	if now.Sub(s.synced) >= syncEvery && len(peers) > 0 {
		s.synced = now
		with = append(with, draw(peers, 1, n.rng)...)
	}
	if len(with) == 0 {
		return
	}
	m := rootsMessage(n.tables, n.rng.Uint64())
	for _, p := range slices.Compact(with) {
		_ = n.send(p, m)
	}
}

// syncPause is how long to wait after a comparison that brought something. In a large mesh that changes most of what
// differs comes as a rumour by itself.
func (n *Node) syncPause() time.Duration {
	if n.state.brought >= syncLot {
		return syncAgain
	}
	return syncAgain + syncMore*time.Duration(len(n.routes.Load().Reachable()))
}

// dial dials what is due.
func (n *Node) dial(ctx context.Context, now time.Time, lookups *sync.WaitGroup) {
	s := &n.state
	pause := min(knowPause+time.Duration(len(n.routes.Load().Reachable()))*10*time.Millisecond, knowMost)
	if changes := n.topology.Changes(); changes != s.knewAt && now.Sub(s.knew) >= pause {
		s.knew, s.knewAt = now, changes
		all := n.candidates()
		n.mu.Lock()
		n.dialer.know(all, now)
		n.mu.Unlock()
	}
	if now.Sub(s.dialled) < dialPause {
		return
	}
	s.dialled = now
	n.mu.Lock()
	if n.conflict != "" {
		n.mu.Unlock()
		return
	}
	addrs, hosts := n.dialer.step(now)
	var usurpers []mesh.PeerName
	live, changes := n.book.live, n.topology.Changes()
	if changes == s.boreAt && now.Sub(s.bore) < bearPause {
		live = nil
	} else {
		s.bore, s.boreAt = now, changes
	}
	for name, ll := range live {
		known, ok := n.topology.Peer(name)
		if ok && known.Key != ll.link.Peer.Key {
			usurpers = append(usurpers, name)
			continue
		}
		if !ok || known.Run == ll.link.Peer.Run {
			continue
		}
		s.boreAt = 0 // look again soon
		// A link that is new may be ahead of what is told about its peer.
		if now.Sub(ll.since) > time.Second {
			if a, ok := n.dialer.restarted(name, now); ok {
				addrs = append(addrs, a)
			}
		}
	}
	n.mu.Unlock()
	slices.SortFunc(usurpers, mesh.PeerName.Compare)
	for _, p := range usurpers {
		n.under.Hangup(p, "the name "+p.String()+" belongs to another peer, from whose key it follows")
	}
	for _, a := range addrs {
		n.under.Dial(a)
	}
	for _, t := range hosts {
		text, host := t.text, t.host // fixed
		lookups.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			ips, err := n.cfg.Resolve(ctx, host)
			n.mu.Lock()
			n.dialer.resolved(text, ips, err, time.Now())
			n.mu.Unlock()
			n.poke()
		})
	}
}

// candidates are the peers that we might dial, at the addresses where others say that they reach them:
// first where they were dialled, then where they come from with the port that they listen on, then just
// where they come from.
func (n *Node) candidates() []candidate {
	if n.cfg.NoDiscovery {
		return nil
	}
	routes := n.routes.Load()
	peers := n.topology.Peers()
	type addrs struct{ dialled, inbound, raw []netip.AddrPort }
	at := make(map[mesh.PeerName]*addrs, len(peers))
	for i := range peers {
		at[peers[i].Name] = &addrs{}
	}
	ports := make(map[mesh.PeerName]uint16, len(peers))
	for i := range peers {
		ports[peers[i].Name] = peers[i].Port
	}
	put := func(list *[]netip.AddrPort, a netip.AddrPort) {
		if len(*list) < maxAddrs && dialable(a) && !slices.Contains(*list, a) {
			*list = append(*list, a)
		}
	}
	for i := range peers {
		for _, l := range peers[i].Links {
			to := at[l.To]
			switch {
			case to == nil:
			case l.Outbound:
				put(&to.dialled, l.Addr)
			default:
				put(&to.inbound, netip.AddrPortFrom(l.Addr.Addr(), ports[l.To]))
				put(&to.raw, l.Addr)
			}
		}
	}
	out := make([]candidate, 0, len(peers))
	for i := range peers {
		p := &peers[i]
		if p.Name == n.self {
			continue
		}
		_, ok := routes.NextHop(p.Name)
		a := at[p.Name]
		out = append(out, candidate{p.Name, slices.Concat(a.dialled, a.inbound, a.raw), ok, len(p.Links)})
	}
	return out
}

// checkMembers introduces peers that we reach and that memberlist has lost or never met.
func (n *Node) checkMembers(now time.Time) {
	s := &n.state
	if now.Sub(s.checked) < checkPause {
		return
	}
	s.checked = now
	for _, p := range n.routes.Load().Reachable() {
		if !n.members.isMember(p) {
			n.members.introduce(p)
		}
	}
}
