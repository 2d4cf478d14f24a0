// Package simnet is an underlay in memory, for simulating whole meshes in a testing/synctest bubble. It
// stands for the tunnel: links between peers with delay and loss, that die three seconds after the path
// between them is cut in either direction; relaying by the routes that each peer has computed; streams
// between neighbours. All that is random comes of one seed.
//
// One goroutine carries everything, in order of time. Buffers are copied, what exceeds a queue is
// dropped, and what belongs to a peer that was killed fails.
package simnet

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// Handler is who hears of links and messages: a gossip.Node.
type Handler interface {
	Link(router.LinkEvent)
	Message(from mesh.PeerName, msg []byte)
	Accept(router.Hello, netip.AddrPort) error
}

const (
	linkDeath   = 3 * time.Second
	dialRetry   = time.Second
	dialTries   = 5
	maxInFlight = 20_000 // messages on their way from one host
)

var (
	errClosed  = errors.New("the underlay has ended")
	errNoRoute = errors.New("no route to the peer")
	errAnswer  = errors.New("no answer")
	errLinked  = errors.New("already linked at another address")
	errSelf    = errors.New("this address is this peer itself")
	errDead    = errors.New("no longer answering")
	errLeft    = errors.New("the peer said goodbye")
	errSize    = errors.New("message too long")
)

// Net is a simulated underlay network.
type Net struct {
	wake chan struct{}

	mu    sync.Mutex // guards all below and all hosts
	rng   *rand.Rand
	begun time.Time
	times times                               // when something happens, since then,
	what  map[time.Duration][]func(time.Time) // and what, in order
	hosts map[netip.AddrPort]*Host
	place map[netip.AddrPort]int32 // numbers every address that somebody was ever at
	cut   map[[2]int32]bool        // directed
	loss  float64
	twice float64
	late  float64
	delay time.Duration
	vary  time.Duration
	slot  time.Duration
	stats Stats
	kinds map[[2]byte]*Count
}

// Count is what was sent of one kind of message, on every link on its way.
type Count struct{ Messages, Bytes uint64 }

// lateness is how much longer than the others a late datagram takes at most.
const lateness = 2 * time.Second

// Stats counts what happened to messages.
type Stats struct {
	Delivered, Lost, NoRoute, Full uint64
	Strayed                        uint64 // came to a relay whose way has more links than are left
	Loops                          uint64 // came to the same relay again,
	Rounds                         uint64 // which did not drop them
}

// Host is one peer's access to the net: a gossip.Underlay.
type Host struct {
	net     *Net
	hello   router.Hello
	addr    netip.AddrPort
	place   int32
	handler Handler
	routes  *router.LiveRoutes
	streams chan net.Conn

	// Guarded by Net.mu.
	dead     bool
	links    map[mesh.PeerName]*link
	starved  time.Duration
	inFlight int
	Sent     uint64 // bytes, relayed ones included
	Received uint64
}

// link joins two hosts.
type link struct {
	ends  [2]*Host // ends[0] dialled
	sick  time.Time
	gone  bool
	conns []net.Conn
}

func (l *link) other(h *Host) *Host {
	if l.ends[0] == h {
		return l.ends[1]
	}
	return l.ends[0]
}

// times is a heap.
type times []time.Duration

func (t times) Len() int           { return len(t) }
func (t times) Less(i, j int) bool { return t[i] < t[j] }
func (t times) Swap(i, j int)      { t[i], t[j] = t[j], t[i] }
func (t *times) Push(x any)        { *t = append(*t, x.(time.Duration)) }
func (t *times) Pop() any {
	old := *t
	x := old[len(old)-1]
	*t = old[:len(old)-1]
	return x
}

// New makes a net with a delay of 1 ms and no loss.
func New(seed uint64) *Net {
	return &Net{
		wake: make(chan struct{}, 1), rng: rand.New(rand.NewPCG(seed, 77)),
		begun: time.Now(), what: map[time.Duration][]func(time.Time){}, hosts: map[netip.AddrPort]*Host{},
		place: map[netip.AddrPort]int32{}, cut: map[[2]int32]bool{},
		delay: time.Millisecond, vary: time.Millisecond / 4,
		kinds: map[[2]byte]*Count{},
	}
}

// Run carries what is sent until ctx ends.
func (n *Net) Run(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		n.mu.Lock()
		now := time.Now()
		next := time.Hour
		var ready []func(time.Time)
		if len(n.times) > 0 {
			next = n.times[0] - now.Sub(n.begun)
		}
		if next <= 0 {
			at := heap.Pop(&n.times).(time.Duration)
			ready = n.what[at]
			delete(n.what, at)
		}
		n.mu.Unlock()
		for _, do := range ready {
			do(now)
		}
		if next <= 0 {
			continue
		}
		timer.Reset(next)
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-n.wake:
		}
	}
}

func (n *Net) afterLocked(d time.Duration, do func(now time.Time)) {
	at := time.Since(n.begun) + d
	if n.slot > 0 {
		at = (at + n.slot - 1) / n.slot * n.slot
	}
	n.what[at] = append(n.what[at], do)
	if len(n.what[at]) > 1 {
		return
	}
	heap.Push(&n.times, at)
	if n.times[0] != at {
		return // it is not the next one
	}
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// Add puts a peer on the net. It hears nothing before Attach. A peer that was killed may come back.
func (n *Net) Add(hello router.Hello, addr netip.AddrPort) *Host {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.place[addr]; !ok {
		n.place[addr] = int32(len(n.place))
	}
	h := &Host{net: n, hello: hello, addr: addr, place: n.place[addr], links: map[mesh.PeerName]*link{}, streams: make(chan net.Conn, 16)}
	n.hosts[addr] = h
	return h
}

// Attach connects the peer to its node.
func (h *Host) Attach(handler Handler, routes *router.LiveRoutes) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	h.handler, h.routes = handler, routes
}

// Addr is where the peer is.
func (h *Host) Addr() netip.AddrPort { return h.addr }

// Traffic returns the bytes that the peer sent and received.
func (h *Host) Traffic() (sent, received uint64) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	return h.Sent, h.Received
}

// Kill takes the peer away without a goodbye: the others notice when its links stop answering.
func (h *Host) Kill() {
	n := h.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if h.dead {
		return
	}
	h.goneLocked()
	for _, name := range slices.SortedFunc(maps.Keys(h.links), mesh.PeerName.Compare) {
		n.watchLocked(h.links[name])
	}
}

func (h *Host) goneLocked() {
	h.dead = true
	if h.net.hosts[h.addr] == h {
		delete(h.net.hosts, h.addr)
	}
}

// Leave takes the peer away after it said goodbye to its neighbours, as a daemon does that is stopped.
func (h *Host) Leave() {
	n := h.net
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, name := range slices.SortedFunc(maps.Keys(h.links), mesh.PeerName.Compare) {
		l := h.links[name]
		n.afterLocked(n.delay, func(time.Time) { n.end(l, errLeft) })
	}
	h.goneLocked()
}

// Cut stops datagrams between two addresses.
func (n *Net) Cut(a, b *Host) { n.set(true, [2]*Host{a, b}, [2]*Host{b, a}) }

// CutOneWay stops datagrams from one address to another.
func (n *Net) CutOneWay(from, to *Host) { n.set(true, [2]*Host{from, to}) }

// Heal undoes Cut and CutOneWay.
func (n *Net) Heal(a, b *Host) { n.set(false, [2]*Host{a, b}, [2]*Host{b, a}) }

// HealAll undoes all cuts.
func (n *Net) HealAll() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.cut)
}

// Split cuts every path between the two groups.
func (n *Net) Split(left, right []*Host) {
	var ways [][2]*Host
	for _, a := range left {
		for _, b := range right {
			ways = append(ways, [2]*Host{a, b}, [2]*Host{b, a})
		}
	}
	n.set(true, ways...)
}

// SetLoss drops that share of all datagrams, at random.
func (n *Net) SetLoss(share float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.loss = share
}

// SetDuplicates delivers that share of all datagrams twice.
func (n *Net) SetDuplicates(share float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.twice = share
}

// SetReordering has that share of all datagrams come up to two seconds late, after others sent later.
func (n *Net) SetReordering(share float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.late = share
}

// Starve has everything that the host sends or takes in wait for up to that long, as if it had no processor
// time; 0 ends that.
func (h *Host) Starve(most time.Duration) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	h.starved = most
}

// Passes reports whether datagrams get from the host to another.
func (h *Host) Passes(to *Host) bool {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	return h.net.passesLocked(h, to)
}

// SetDelay has datagrams take that long, more or less.
func (n *Net) SetDelay(delay, vary time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.delay, n.vary = delay, vary
}

// SetSlot has everything happen at whole multiples of slot, a little late: a large mesh takes less of the processor
// when it wakes for many datagrams at once.
func (n *Net) SetSlot(slot time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.slot = slot
}

// Stats returns what happened so far.
func (n *Net) Stats() Stats {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stats
}

// Kinds returns what was sent so far, by the first two bytes of messages: the channel and, where the channel has
// kinds, the kind.
func (n *Net) Kinds() map[[2]byte]Count {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := map[[2]byte]Count{}
	for kind, c := range n.kinds {
		out[kind] = *c
	}
	return out
}

// set cuts ways, each from one host to another, or heals them.
func (n *Net) set(cut bool, ways ...[2]*Host) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range ways {
		pair := [2]int32{w[0].place, w[1].place}
		if !cut {
			delete(n.cut, pair)
			continue
		}
		n.cut[pair] = true
		for _, h := range w {
			if l := h.links[w[0].hello.Name]; l != nil {
				n.watchLocked(l)
			}
			if l := h.links[w[1].hello.Name]; l != nil {
				n.watchLocked(l)
			}
		}
	}
}

// passesLocked reports whether datagrams get from one host to the other.
func (n *Net) passesLocked(from, to *Host) bool {
	return !from.dead && !to.dead && (len(n.cut) == 0 || !n.cut[[2]int32{from.place, to.place}])
}

func (n *Net) wellLocked(l *link) bool {
	return n.passesLocked(l.ends[0], l.ends[1]) && n.passesLocked(l.ends[1], l.ends[0])
}

// watchLocked ends a link if nothing gets through for linkDeath.
func (n *Net) watchLocked(l *link) {
	if l.gone || !l.sick.IsZero() {
		return
	}
	l.sick = time.Now()
	var look func(now time.Time)
	look = func(now time.Time) {
		n.mu.Lock()
		if l.gone || n.wellLocked(l) {
			l.sick = time.Time{}
			n.mu.Unlock()
			return
		}
		if now.Sub(l.sick) < linkDeath {
			n.afterLocked(linkDeath/10, look)
			n.mu.Unlock()
			return
		}
		n.mu.Unlock()
		n.end(l, errDead)
	}
	n.afterLocked(linkDeath/10, look)
}

// end takes a link away and tells both ends.
func (n *Net) end(l *link, err error) {
	n.mu.Lock()
	if l.gone {
		n.mu.Unlock()
		return
	}
	l.gone = true
	for i, h := range l.ends {
		if other := l.ends[1-i]; h.links[other.hello.Name] == l {
			delete(h.links, other.hello.Name)
		}
	}
	conns := l.conns
	n.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
	for i, h := range l.ends {
		n.report(h, router.LinkEvent{State: router.LinkDown, Link: n.seen(l, i), Err: err})
	}
}

// seen is the link as end i sees it.
func (n *Net) seen(l *link, i int) router.Link {
	other := l.ends[1-i]
	return router.Link{Peer: other.hello, Addr: other.addr, Outbound: i == 0, Sealed: true, RTT: 2 * n.delay, MTU: 1432}
}

func (n *Net) report(h *Host, ev router.LinkEvent) {
	n.mu.Lock()
	handler, dead := h.handler, h.dead
	n.mu.Unlock()
	if handler != nil && !dead {
		handler.Link(ev)
	}
}

// Dial links with whoever is at addr.
func (h *Host) Dial(addr netip.AddrPort) {
	n := h.net
	n.mu.Lock()
	defer n.mu.Unlock()
	tries := 0
	var try func(now time.Time)
	try = func(time.Time) {
		tries++
		n.mu.Lock()
		to := n.hosts[addr]
		ok := to != nil && to.handler != nil && n.passesLocked(h, to) && n.passesLocked(to, h)
		if ok && n.loss > 0 {
			there, back := n.rng.Float64(), n.rng.Float64()
			ok = min(there, back) > n.loss
		}
		again := !ok && tries < dialTries && !h.dead
		if again {
			n.afterLocked(dialRetry, try)
		}
		n.mu.Unlock()
		switch {
		case again:
		case !ok:
			n.report(h, router.LinkEvent{State: router.LinkDialFailed, Link: router.Link{Addr: addr}, Err: errAnswer})
		default:
			n.join(h, to)
		}
	}
	n.afterLocked(3*n.delay, try)
}

// Join links two hosts at once, as if the first had dialled.
func (n *Net) Join(from, to *Host) { n.join(from, to) }

func (n *Net) join(from, to *Host) {
	fail := func(err error) {
		n.report(from, router.LinkEvent{State: router.LinkDialFailed, Link: router.Link{Addr: to.addr, Peer: to.hello}, Err: err})
	}
	if from == to {
		fail(errSelf)
		return
	}
	if from.hello.Name == to.hello.Name {
		fail(fmt.Errorf("both have the name %v", to.hello.Name))
		return
	}
	for _, side := range [2][2]*Host{{from, to}, {to, from}} {
		if err := side[0].handler.Accept(side[1].hello, side[1].addr); err != nil {
			fail(err)
			return
		}
	}
	// Another run of the same peer ends the link to the earlier one; another peer of its name is refused.
	n.mu.Lock()
	var old []*link
	var taken error
	for _, side := range [2][2]*Host{{from, to}, {to, from}} {
		if l := side[0].links[side[1].hello.Name]; l != nil && l.other(side[0]) != side[1] {
			old = append(old, l)
			if l.other(side[0]).hello.Key != side[1].hello.Key && n.wellLocked(l) {
				taken = fmt.Errorf("the name %v belongs to another peer that is alive", side[1].hello.Name)
			}
		}
	}
	n.mu.Unlock()
	if taken != nil {
		fail(taken)
		return
	}
	for _, l := range old {
		n.end(l, errors.New("the peer was restarted"))
	}
	n.mu.Lock()
	if from.links[to.hello.Name] != nil {
		n.mu.Unlock()
		fail(errLinked)
		return
	}
	l := &link{ends: [2]*Host{from, to}}
	from.links[to.hello.Name], to.links[from.hello.Name] = l, l
	if !n.wellLocked(l) {
		n.watchLocked(l) // cut meanwhile
	}
	n.mu.Unlock()
	for i, h := range l.ends {
		n.report(h, router.LinkEvent{State: router.LinkUp, Link: n.seen(l, i)})
	}
}

// Hangup ends a link.
func (h *Host) Hangup(peer mesh.PeerName, why string) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	if l := h.links[peer]; l != nil {
		h.net.afterLocked(0, func(time.Time) { h.net.end(l, errors.New(why)) })
	}
}

// Send carries a message by the routes of every peer on the way.
func (h *Host) Send(peer mesh.PeerName, msg []byte) error {
	if len(msg) > mesh.MaxMessage {
		return errSize
	}
	n := h.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if h.dead {
		return errClosed
	}
	if _, ok := h.routes.NextHop(peer); !ok && h.links[peer] == nil {
		return errNoRoute
	}
	if h.inFlight >= maxInFlight {
		n.stats.Full++
		return nil
	}
	h.inFlight++
	n.forwardLocked(&parcel{src: h, dst: peer, msg: append([]byte(nil), msg...)}, h, nil, -1)
	return nil
}

// parcel is a message on its way.
type parcel struct {
	src *Host
	dst mesh.PeerName
	msg []byte
	met []*Host // relays that it has been at
}

// forwardLocked carries a message one hop on, by the rules of the tunnel: a relay never sends back to where it
// came from, nor by a way with more links than are left. left is -1 at the sender.
func (n *Net) forwardLocked(p *parcel, at, from *Host, left int) {
	drop := func(count *uint64) {
		*count++
		p.src.inFlight--
	}
	via, links, ok := at.routes.Way(p.dst)
	l := at.links[via]
	if direct := at.links[p.dst]; direct != nil && (!ok || l == nil) {
		l, links, ok = direct, 1, true
	}
	if !ok || l == nil || at.dead || from != nil && l.other(at) == from {
		drop(&n.stats.NoRoute)
		return
	}
	if left < 0 {
		left = links
	} else {
		again := slices.Contains(p.met, at)
		if again {
			n.stats.Loops++
		}
		if left, ok = router.Onward(left, links); !ok {
			drop(&n.stats.Strayed)
			return
		}
		if again {
			n.stats.Rounds++
		}
		p.met = append(p.met, at)
	}
	to := l.other(at)
	at.Sent += uint64(len(p.msg))
	kind := [2]byte(p.msg[:2])
	if kind[0] == byte(mesh.ChanMember) && kind[1] == 12 && len(p.msg) > 6 {
		kind[1] = p.msg[6] // after the checksum
	}
	c := n.kinds[kind]
	if c == nil {
		c = &Count{}
		n.kinds[kind] = c
	}
	c.Messages++
	c.Bytes += uint64(len(p.msg))
	if !n.passesLocked(at, to) || n.loss > 0 && n.rng.Float64() < n.loss {
		drop(&n.stats.Lost)
		return
	}
	n.carryLocked(p, at, to, left)
	if n.twice > 0 && n.rng.Float64() < n.twice {
		p.src.inFlight++
		n.carryLocked(&parcel{p.src, p.dst, p.msg, slices.Clone(p.met)}, at, to, left)
	}
}

// carryLocked takes a message over one link.
func (n *Net) carryLocked(p *parcel, at, to *Host, left int) {
	delay := n.delay
	for _, more := range [3]time.Duration{n.vary, at.starved, to.starved} {
		if more > 0 {
			delay += time.Duration(n.rng.Int64N(int64(more)))
		}
	}
	if n.late > 0 && n.rng.Float64() < n.late {
		delay += time.Duration(n.rng.Int64N(int64(lateness)))
	}
	n.afterLocked(delay, func(time.Time) {
		n.mu.Lock()
		to.Received += uint64(len(p.msg))
		if to.hello.Name != p.dst {
			n.forwardLocked(p, to, at, left)
			n.mu.Unlock()
			return
		}
		p.src.inFlight--
		n.stats.Delivered++
		handler, dead := to.handler, to.dead
		n.mu.Unlock()
		if !dead && handler != nil {
			handler.Message(p.src.hello.Name, p.msg)
		}
	})
}

// DialStream opens a stream to a neighbour.
func (h *Host) DialStream(ctx context.Context, peer mesh.PeerName) (net.Conn, error) {
	n := h.net
	n.mu.Lock()
	defer n.mu.Unlock()
	l := h.links[peer]
	if h.dead || l == nil || !n.wellLocked(l) {
		return nil, errNoRoute
	}
	ours, theirs := net.Pipe()
	select {
	case l.other(h).streams <- theirs:
	default:
		return nil, errAnswer
	}
	l.conns = append(slices.DeleteFunc(l.conns, func(net.Conn) bool { return len(l.conns) > 64 }), ours, theirs)
	return ours, ctx.Err()
}

// Streams delivers the streams that others opened.
func (h *Host) Streams() <-chan net.Conn { return h.streams }

// Links returns how many links the peer has.
func (h *Host) Links() int {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	return len(h.links)
}
