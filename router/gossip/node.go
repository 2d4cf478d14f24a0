package gossip

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"meshd/mesh"
	"meshd/router"
)

// Underlay moves messages and streams between peers. None of its methods but DialStream blocks; Send
// copies what it keeps, and after the underlay has ended everything fails or does nothing.
type Underlay interface {
	Dial(netip.AddrPort)                                                  // the outcome is a LinkEvent
	Hangup(peer mesh.PeerName, why string)                                // drops the direct link
	Send(peer mesh.PeerName, msg []byte) error                            // by the current route, at most mesh.MaxMessage bytes
	DialStream(ctx context.Context, peer mesh.PeerName) (net.Conn, error) // to a peer with a live link
	Streams() <-chan net.Conn
}

// Table is a replicated table. Its methods are called by one goroutine, never block, keep no buffer, and
// may be called while others use the table.
//
// A table that refuses some rows of a delta, and takes in the others, says so by a *mesh.Refusal beside the news.
type Table interface {
	Merge(from mesh.PeerName, delta []byte) (news []byte, err error) // news: what was new, to pass on; nil: nothing
	Items() []mesh.Item                                              // every entry
	Encode(keys []uint64, limit int) [][]byte                        // deltas holding those, each at most limit bytes
}

// splitter is a Table that can cut a delta of its own that exceeds a message.
type splitter interface {
	Split(delta []byte, limit int) [][]byte
}

var _ interface {
	Table
	splitter
} = (*router.Topology)(nil)

// Config is what a Node needs to know.
type Config struct {
	Self        router.Peer      // Name, Run, Key, NickName, Port, Protocol, MTU, Flags; ShortID: the last one used, or 0
	Keys        router.Keys      // of Self; nil: nobody else's word is taken
	NoDiscovery bool             // dial only the targets
	ConnLimit   int              // links; 0: any number. Soft: targets are dialled all the same
	TargetPort  uint16           // of targets that name none; 0: Self.Port
	Suspect     time.Duration    // unreachable for so long, a peer is suspected; 0: 2 s
	Gone        time.Duration    // and for so long, forgotten; 0: 1 h
	RoutesPause time.Duration    // at least, between computations of routes; 0: 20 ms
	Remembered  []netip.AddrPort // where an earlier run met peers (see Met), dialled like what others tell of
	Seed        uint64           // of all that is random here; 0: a random one

	// Routes is kept up to date; nil: a new one. The tunnel reads it.
	Routes *router.LiveRoutes
	// OnPeers is told, by the loop, whenever the set of peers, their flags or their reachability change:
	// the switch's SetPeers. It must not block.
	OnPeers func([]router.PeerFlags)
	// Resolve looks up a target's host; nil: the system's resolver. It runs beside the loop.
	Resolve func(ctx context.Context, host string) ([]netip.Addr, error)
	Log     *slog.Logger // nil: discard
}

// PeerEvent is news about a peer.
type PeerEvent struct {
	Peer     mesh.PeerName
	NickName string
	State    router.PeerState
}

// Node is this peer's part in the gossip.
type Node struct {
	cfg      Config // fixed
	self     mesh.PeerName
	under    Underlay
	log      *slog.Logger
	topology *router.Topology
	routes   *router.LiveRoutes
	members  *members
	inbox    chan inMessage
	wake     chan struct{}
	counters counters
	beat     atomic.Pointer[time.Time] // when the loop last came round

	mu          sync.Mutex // guards all below; held for bookkeeping only, never across a call to another room
	links       []router.LinkEvent
	outbox      []queued
	book        *linkBook
	dialer      *dialer
	subscribers []func(PeerEvent)
	conflict    string                         // why we keep to ourselves, if we do
	ended       uint64                         // links that have come to an end
	refusals    map[mesh.PeerName]mesh.Refusal // by who sent the rows
	ctx         context.Context

	// Owned by the loop, but for tables and handlers, which are complete before Run.
	tables   map[mesh.Channel]Table
	handlers map[mesh.Channel]func(mesh.PeerName, []byte)
	rng      *rand.Rand
	spread   spreader
	state    loopState
}

type inMessage struct {
	from mesh.PeerName
	msg  []byte
}

type queued struct {
	ch   mesh.Channel
	body []byte
}

// counters count what did not go as it should, and what was sent.
type counters struct {
	inboxFull, malformed, unknown, oversize, unsent atomic.Uint64
	forged, foreign, keyless                        atomic.Uint64 // rows
	sent, sentBytes, received, receivedBytes        atomic.Uint64
}

const (
	inboxSize    = 4096
	outboxSize   = 4096
	tickInterval = 100 * time.Millisecond
)

// New builds a Node. It starts nothing: messages and links that come before Run wait.
func New(cfg Config, under Underlay) *Node {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Routes == nil {
		cfg.Routes = &router.LiveRoutes{}
	}
	if cfg.Resolve == nil {
		cfg.Resolve = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	if cfg.Suspect == 0 {
		cfg.Suspect = 2 * time.Second
	}
	if cfg.Gone == 0 {
		cfg.Gone = time.Hour
	}
	if cfg.RoutesPause == 0 {
		cfg.RoutesPause = routesPause
	}
	if cfg.TargetPort == 0 {
		cfg.TargetPort = cfg.Self.Port
	}
	if cfg.Seed == 0 {
		cfg.Seed = rand.Uint64()
	}
	self := cfg.Self.Name
	n := &Node{
		cfg: cfg, self: self, under: under, log: cfg.Log, routes: cfg.Routes,
		topology: router.NewTopology(cfg.Self, cfg.Keys),
		members:  newMembers(self, under, cfg.Log),
		inbox:    make(chan inMessage, inboxSize),
		wake:     make(chan struct{}, 1),
		book:     newLinkBook(),
		refusals: map[mesh.PeerName]mesh.Refusal{},
		dialer:   newDialer(self, cfg.TargetPort, cfg.ConnLimit, !cfg.NoDiscovery, rand.New(rand.NewPCG(cfg.Seed, 1))),
		tables:   map[mesh.Channel]Table{},
		handlers: map[mesh.Channel]func(mesh.PeerName, []byte){},
		rng:      rand.New(rand.NewPCG(cfg.Seed, 2)),
		state:    loopState{again: map[mesh.PeerName]time.Time{}, syncShares: map[mesh.PeerName]int{}},
	}
	n.tables[mesh.ChanTopology] = n.topology
	n.dialer.remember(cfg.Remembered)
	n.routes.Store(n.topology.Routes())
	return n
}

// Topology is the table of peers.
func (n *Node) Topology() *router.Topology { return n.topology }

// Routes are the routes of the moment.
func (n *Node) Routes() *router.LiveRoutes { return n.routes }

// AddTable has a table replicated on a channel. Call it before Run.
func (n *Node) AddTable(ch mesh.Channel, t Table) { n.tables[ch] = t }

// Handle has messages of a channel that is no table's given to f, by the loop: it must not block, and
// keeps no buffer. Call it before Run.
func (n *Node) Handle(ch mesh.Channel, f func(from mesh.PeerName, msg []byte)) { n.handlers[ch] = f }

// Subscribe has f told of every peer that comes alive, is suspected or is gone for good, by the loop and
// without a lock held. It must not block.
func (n *Node) Subscribe(f func(PeerEvent)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.subscribers = append(n.subscribers, f)
}

// Link takes in what the tunnel reports. It never blocks.
func (n *Node) Link(ev router.LinkEvent) {
	n.mu.Lock()
	n.links = append(n.links, ev) // as many as there are links and dials, so not bounded here
	n.mu.Unlock()
	n.poke()
}

// Message takes in what a peer sent. It never blocks; msg is borrowed.
func (n *Node) Message(from mesh.PeerName, msg []byte) {
	n.counters.received.Add(1)
	n.counters.receivedBytes.Add(uint64(len(msg)))
	switch {
	case len(msg) < 2 || len(msg) > mesh.MaxMessage || from == n.self:
		n.counters.malformed.Add(1)
		return
	case mesh.Channel(msg[0]) == mesh.ChanMember:
		n.members.message(from, msg[1:])
		return
	}
	select {
	case n.inbox <- inMessage{from, append([]byte(nil), msg...)}:
	default:
		n.counters.inboxFull.Add(1)
	}
}

var errOversize = errors.New("delta exceeds a message and its table cannot split it")

// Broadcast has a delta of a table told to everybody. The room has it in its table already. It never
// blocks and takes over delta.
func (n *Node) Broadcast(ch mesh.Channel, delta []byte) error {
	parts := [][]byte{delta}
	if len(delta) > mesh.MaxMessage-1 {
		s, ok := n.tables[ch].(splitter)
		if !ok {
			n.counters.oversize.Add(1)
			return fmt.Errorf("broadcast %d bytes on channel %d: %w", len(delta), ch, errOversize)
		}
		parts = s.Split(delta, mesh.MaxMessage-1)
	}
	n.mu.Lock()
	for _, p := range parts {
		if len(n.outbox) < outboxSize {
			n.outbox = append(n.outbox, queued{ch, p})
		} else {
			n.counters.inboxFull.Add(1) // digests will carry it
		}
	}
	n.mu.Unlock()
	n.poke()
	return nil
}

// Send gives one peer a message for its handler of a channel.
func (n *Node) Send(to mesh.PeerName, ch mesh.Channel, msg []byte) error {
	if len(msg) > mesh.MaxMessage-1 {
		n.counters.oversize.Add(1)
		return fmt.Errorf("send to %v: message of %d bytes", to, len(msg))
	}
	return n.send(to, append([]byte{byte(ch)}, msg...))
}

func (n *Node) send(to mesh.PeerName, msg []byte) error {
	n.counters.sent.Add(1)
	n.counters.sentBytes.Add(uint64(len(msg)))
	err := n.under.Send(to, msg)
	if err != nil {
		n.counters.unsent.Add(1)
	}
	return err
}

// Connect adds targets and dials them at once; replace makes them the only ones. A target that is no
// address or name at all is an error and changes nothing; one that does not resolve is retried.
func (n *Node) Connect(targets []string, replace bool) error {
	n.mu.Lock()
	err := n.dialer.connect(targets, replace)
	n.mu.Unlock()
	n.poke()
	return err
}

// Forget drops targets by the words that they were given with. Links stay.
func (n *Node) Forget(targets []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dialer.forget(targets)
}

// Targets lists the targets as they were given.
func (n *Node) Targets() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dialer.targetTexts()
}

// LastStep is when the loop last came round, which it does ten times a second: for a watchdog. It is the
// zero time before Run.
func (n *Node) LastStep() time.Time {
	if at := n.beat.Load(); at != nil {
		return *at // with its monotonic reading, so that a clock that is set does not matter
	}
	return time.Time{}
}

// Met lists where peers have been met, for a later run to remember.
func (n *Node) Met() []netip.AddrPort {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dialer.met()
}

// Update changes what is said of this peer, for example its flags when a foreign port appears on the
// bridge, and tells everybody.
func (n *Node) Update(change func(*router.Peer)) {
	for _, d := range n.topology.Update(change) {
		_ = n.Broadcast(mesh.ChanTopology, d) // fits: it is split already
	}
}

// Accept judges a peer that has proven its key, before there is a link: whoever takes a live peer's name
// is refused, and whoever exceeds the limit on links, unless it is a target of ours or reached in no
// other way. The text of the error is for the operators of both.
func (n *Node) Accept(hello router.Hello, addr netip.AddrPort) error {
	n.mu.Lock()
	conflict, links, linked := n.conflict, len(n.book.live), n.book.live[hello.Name] != nil
	asked := n.dialer.wanted(addr)
	for _, ev := range n.links { // not taken in yet
		if ev.State == router.LinkUp {
			links++
		}
	}
	n.mu.Unlock()
	if conflict != "" {
		return errors.New(conflict)
	}
	if hello.Protocol < router.Protocol {
		return fmt.Errorf("%s speaks protocol %d and does not sign what it tells, %s demands %d: install the newer release on both",
			hello.NickName, hello.Protocol, n.cfg.Self.NickName, router.Protocol)
	}
	if !n.topology.MayBear(hello.Name, hello.Key) {
		known, _ := n.topology.Peer(hello.Name)
		return fmt.Errorf("the name %v belongs to %s, who has another key: start %s with another --name, or without",
			hello.Name, cmp.Or(known.NickName, "another peer"), hello.NickName)
	}
	_, reachable := n.routes.NextHop(hello.Name)
	if n.cfg.ConnLimit > 0 && links >= n.cfg.ConnLimit && reachable && !linked && !asked {
		return fmt.Errorf("%s has %d connections, which is its limit", n.cfg.Self.NickName, links)
	}
	return nil
}

func (n *Node) poke() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// Run serves until ctx ends.
func (n *Node) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	n.mu.Lock()
	n.ctx = ctx
	n.mu.Unlock()
	g.Go(func() error { return n.members.run(ctx) })
	g.Go(func() error { n.loop(ctx); return nil })
	return g.Wait()
}

func (n *Node) loop(ctx context.Context) {
	var lookups sync.WaitGroup
	defer lookups.Wait()
	tick := time.NewTicker(tickInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-n.wake:
		case m := <-n.inbox:
			n.handle(m)
			for range len(n.inbox) { // what is there already, before the rounds
				n.handle(<-n.inbox)
			}
		}
		now := time.Now()
		n.beat.Store(&now)
		n.step(ctx, now, &lookups)
	}
}

// handle deals with one message.
func (n *Node) handle(m inMessage) {
	ch, body := mesh.Channel(m.msg[0]), m.msg[1:]
	switch ch {
	case mesh.ChanBundle:
		parts, ok := parseBundle(body)
		if !ok {
			n.counters.malformed.Add(1)
			return
		}
		for _, p := range parts {
			if p.ch == mesh.ChanBundle || p.ch == mesh.ChanMember || p.ch == mesh.ChanSync {
				n.counters.malformed.Add(1)
				continue
			}
			n.dispatch(m.from, p.ch, p.body)
		}
	case mesh.ChanSync:
		n.handleSync(m.from, body)
	default:
		n.dispatch(m.from, ch, body)
	}
}

func (n *Node) dispatch(from mesh.PeerName, ch mesh.Channel, body []byte) {
	if t := n.tables[ch]; t != nil {
		n.pass(ch, t, from, n.merge(t, ch, from, body))
		return
	}
	if f := n.handlers[ch]; f != nil {
		f(from, body)
		return
	}
	n.counters.unknown.Add(1)
}

// merge has a table take in a delta, and returns what was new.
func (n *Node) merge(t Table, ch mesh.Channel, from mesh.PeerName, delta []byte) []byte {
	news, err := t.Merge(from, delta)
	var refused *mesh.Refusal
	switch {
	case errors.As(err, &refused):
		n.refuse(from, ch, *refused)
	case err != nil:
		n.counters.malformed.Add(1)
		n.log.Debug("bad delta", "peer", from, "channel", ch, "err", err)
		return nil
	}
	return news
}

// maxRefusals bounds the peers for whom refused rows are counted one by one.
const maxRefusals = 1024

// refuse notes that rows of a delta were not taken in.
func (n *Node) refuse(from mesh.PeerName, ch mesh.Channel, r mesh.Refusal) {
	n.counters.forged.Add(uint64(r.Forged))
	n.counters.foreign.Add(uint64(r.Foreign))
	n.counters.keyless.Add(uint64(r.Unknown))
	if now := time.Now(); r.Unknown > 0 && now.Sub(n.state.lacked) >= lackPause {
		// It has the keys as well: they come first when tables are compared.
		n.state.lacked = now
		n.state.again[from] = now.Add(syncAgain)
	}
	if r.Forged+r.Foreign == 0 {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	sum, ok := n.refusals[from]
	if !ok && len(n.refusals) >= maxRefusals {
		return
	}
	if !ok {
		n.log.Warn("a peer passes on what others have not signed", "peer", from, "channel", ch, "err", r.Error())
	}
	sum.Forged += r.Forged
	sum.Foreign += r.Foreign
	n.refusals[from] = sum
}

// pass spreads what was new here.
func (n *Node) pass(ch mesh.Channel, t Table, from mesh.PeerName, news []byte) {
	if len(news) == 0 {
		return
	}
	if len(news) <= mesh.MaxMessage-1 {
		n.spread.add(ch, news, from)
		return
	}
	if s, ok := t.(splitter); ok {
		for _, p := range s.Split(news, mesh.MaxMessage-1) {
			n.spread.add(ch, p, from)
		}
		return
	}
	n.state.hint = true
}

// handleSync goes on with a comparison of tables. What it brings is not spread in full: others probably
// have it. A few are asked to compare with us instead, and so on until nobody finds anything new.
func (n *Node) handleSync(from mesh.PeerName, body []byte) {
	now := time.Now()
	out := answerSync(n.tables, body, n.syncRoom(from, now))
	if out.bad {
		n.counters.malformed.Add(1)
		return
	}
	if out.data != nil {
		if news := n.merge(n.tables[out.ch], out.ch, from, out.data); len(news) > 0 {
			n.state.hint = true
			n.state.brought += len(news)
			n.state.again[from] = now.Add(n.syncPause())
		}
	}
	for _, m := range out.replies {
		n.state.syncCredit--
		n.state.syncShares[from]++
		_ = n.send(from, m)
	}
}

// syncRoom is with how many messages a peer's message may be answered. The next comparison goes on from there. While
// many ask at once each gets a little, rather than a few everything: they have each other to ask for more.
func (n *Node) syncRoom(from mesh.PeerName, now time.Time) int {
	s := &n.state
	s.syncCredit = min(s.syncCredit+syncRate*now.Sub(s.syncAt).Seconds(), syncBurst)
	s.syncAt = now
	if now.Sub(s.syncShared) >= time.Second {
		s.syncShared = now
		clear(s.syncShares)
	}
	room := min(int(s.syncCredit), maxSyncReply)
	if s.syncCredit < syncBurst/2 {
		room = min(room, max(syncShare-s.syncShares[from], 0))
	}
	if room == 0 {
		n.counters.unsent.Add(1)
	}
	return room
}

// sortedNames returns the keys of m by name.
func sortedNames[V any](m map[mesh.PeerName]V) []mesh.PeerName {
	out := make([]mesh.PeerName, 0, len(m))
	for p := range m {
		out = append(out, p)
	}
	slices.SortFunc(out, mesh.PeerName.Compare)
	return out
}
