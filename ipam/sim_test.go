package ipam

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"meshd/ipam/ring"
	"meshd/mesh"
)

// The simulation runs whole clusters of cores on one goroutine, in simulated time, over a network that
// loses, doubles, delays and reorders, with disks that fail, processes that are killed between any two
// steps, cuts, removals, ghosts, lost and restored state files. One seed is one run, always the same.
// The oracle looks at every acknowledgement.

var (
	simSeed  = flag.Int64("sim.seed", -1, "run only this seed of the simulation, with its log")
	simStop  = flag.Int("sim.stop", 5, "give up after this many seeds have failed")
	simSeeds = flag.Int("sim.seeds", 0, "number of seeds; 0: 300, or 10000 with MESHD_LONG=1")
	simFirst = flag.Int64("sim.first", 0, "the first seed")
)

// world is one run.
type world struct {
	rng    *rand.Rand
	now    time.Time
	nodes  []*node
	by     map[mesh.PeerName]*node
	queue  []packet
	groups int // of the cut; 1: none
	trace  func(format string, args ...any)

	rangep  netip.Prefix
	subnets []netip.Prefix
	loss    float64
	muted   func(from, to *node, table bool) bool // what is lost though the two pass for alive: messages, or the table; or nil
	reclaim time.Duration

	removed map[ring.ID]bool      // lives that the operator has named
	witness map[ring.ID][]ring.ID // which members knew of a life when it began to serve
	former  map[ring.ID]bool      // lives that their own peer has fenced, or that were fenced after they had left
	known   map[ring.ID]bool      // the founders: whoever has the ring knows them
	orphans map[ring.ID]bool      // as judged at orphansAt

	clusters map[uint64]bool // all that were founded
	forgot   int             // how often a state file was lost or thrown away

	orphansAt time.Time
	rolled    bool           // a state file was restored at some time
	excused   map[string]int // why a breach was not counted
	err       error
	counts    map[string]int
	holders   int // containers looked at by all reviews,
	void      int // and how many of them rule 1 passed over
	nextCont  int
	history   *history // or nil
}

type packet struct {
	at    time.Time
	from  mesh.PeerName
	to    *node
	table bool
	data  []byte
}

// container is something that runs on a host and has an address, acknowledged.
type container struct {
	id   string
	host *node
	addr netip.Prefix
	void bool // its host was declared lost: others may be given its address
}

type node struct {
	w     *world
	name  mesh.PeerName
	init  Init
	up    bool
	gone  bool // for good: the machine is scrap
	group int

	core  *core
	table *Table
	disk  map[string]map[string][]byte
	old   map[string]map[string][]byte // a backup
	bad   bool                         // writes fail
	die   bool                         // at the next write, before or after it
	skew  time.Duration
	conts map[string]*container
	calls map[*call]time.Time // waiting, until when
	seen  map[*node]time.Time // last time reachable
	state map[*node]PeerState
	lost  []mesh.PeerName         // as told by Config.Lost
	known map[string]netip.Prefix // acknowledged, by owner and subnet, to be found again after a restart

	looked, counted uint64 // generations of the ring that noteOwnFences and noteFences have seen
}

var errDisk = errors.New("injected: no space left on device")

// All and PutAll are the node's disk.
func (n *node) All(bucket string) (map[string][]byte, error) { return maps.Clone(n.disk[bucket]), nil }

func (n *node) PutAll(kv map[string]map[string][]byte) error {
	if n.bad && n.w.rng.IntN(2) == 0 {
		return errDisk
	}
	if n.die && n.w.rng.IntN(2) == 0 {
		return errDisk
	}
	for bucket, m := range kv {
		if n.disk[bucket] == nil {
			n.disk[bucket] = make(map[string][]byte)
		}
		for k, v := range m {
			if v == nil {
				delete(n.disk[bucket], k)
			} else {
				n.disk[bucket][k] = slices.Clone(v)
			}
		}
	}
	if n.bad {
		return errDisk // it is on the disk all the same
	}
	return nil
}

func (n *node) Broadcast(mesh.Channel, []byte)                        {}
func (n *node) Send(to mesh.PeerName, _ mesh.Channel, b []byte) error { return nil }

func copyDisk(d map[string]map[string][]byte) map[string]map[string][]byte {
	out := make(map[string]map[string][]byte)
	for k, v := range d {
		out[k] = maps.Clone(v)
	}
	return out
}

func (w *world) fail(format string, args ...any) {
	if w.err == nil {
		w.err = fmt.Errorf(format, args...)
		w.trace("FAIL %v", w.err)
	}
}

func (w *world) addNode(init Init) *node {
	k := len(w.nodes) + 1
	n := &node{w: w, name: mesh.PeerName{1, 0, 0, 0, byte(k >> 8), byte(k)}, init: init, disk: make(map[string]map[string][]byte),
		conts: make(map[string]*container)}
	w.nodes = append(w.nodes, n)
	w.by[n.name] = n
	n.start()
	return n
}

// start begins a process on the node, from its disk.
func (n *node) start() {
	w := n.w
	r := ring.New(w.rangep)
	cfg, err := Config{Name: n.name, Range: w.rangep, Init: n.init, Store: n, Network: n, ReclaimAfter: w.reclaim, WaitForLive: true}.check()
	if err != nil {
		w.fail("%v", err)
		return
	}
	if *simSeed >= 0 {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.String("node", fmt.Sprintf("%s t=%v", n, w.now.Sub(epoch)))
			}
			return a
		}}))
	}
	c, err := newCore(cfg, r, rand.New(rand.NewPCG(w.rng.Uint64(), 1)))
	if err != nil {
		w.fail("%s starts: %v", n, err)
		return
	}
	n.core, n.table = c, &Table{ring: r, frozen: c.frozen, changed: func() {}, stranger: func(from mesh.PeerName, d ring.Delta) { c.strangeDelta(from, d) }}
	n.up, n.calls = true, make(map[*call]time.Time)
	n.seen, n.state = make(map[*node]time.Time), make(map[*node]PeerState)
	n.die, n.looked, n.counted = false, 0, 0
	n.step(func(c *core, now time.Time) {
		c.at(now)
		// Rule 4: what was acknowledged and still runs is there.
		for _, ct := range n.conts {
			renumbering := ct.void && c.holds.inSubnet(ct.id, ct.addr.Masked()) != nil
			if c.holds.find(ct.id, ct.addr.Addr()) == nil && n.known[ct.id] == ct.addr && !renumbering {
				w.fail("%s forgot %s of %s", n, ct.addr, ct.id)
			}
		}
		var live []Holding
		for _, ct := range n.sortedConts(nil) {
			live = append(live, Holding{ct.id, ct.addr})
		}
		for _, bad := range c.reclaim(live) {
			w.fail("%s cannot reclaim %v", n, bad)
		}
		for _, owner := range slices.Sorted(maps.Keys(c.holds.byOwner)) {
			if n.conts[owner] == nil {
				c.release(owner, netip.Addr{}) // what the container manager does with the dead
			}
		}
	})
	known := n.known
	n.known = make(map[string]netip.Prefix)
	for id, ct := range n.conts {
		// What was found running is acknowledged from when the disk has it.
		if _, ok := n.disk[bucketHeld][(&hold{owner: id, addr: ct.addr}).key()]; ok || known[id] == ct.addr {
			n.known[id] = ct.addr
		}
	}
}

func (n *node) String() string { return fmt.Sprintf("n%d", int(n.name[4])<<8+int(n.name[5])) }

// kill ends the process; the containers stay.
func (n *node) kill() {
	n.up = false
	n.core, n.table, n.calls = nil, nil, nil
}

// step drives the core the way Run does.
func (n *node) step(e event) {
	if !n.up {
		return
	}
	e(n.core, n.w.now.Add(n.skew))
	for more := true; more; more = n.core.again() {
		n.w.watch(n)
		kv := n.core.begin()
		var err error
		if kv != nil {
			err = n.PutAll(kv)
			if n.die {
				n.w.trace("%s dies at a write", n)
				n.kill()
				return
			}
		}
		for _, ef := range n.core.settle(err) {
			n.perform(ef)
		}
	}
}

func (n *node) perform(e effect) {
	w := n.w
	switch {
	case e.call != nil:
		delete(n.calls, e.call)
		e.call.answer(e.res)
	case !e.lost.IsZero():
		n.lost = append(n.lost, e.lost)
	case e.broadcast != nil:
		if len(e.broadcast) > maxBody {
			w.fail("a delta of %d bytes", len(e.broadcast))
		}
		for _, to := range w.nodes {
			if to != n {
				w.post(packet{from: n.name, to: to, table: true, data: e.broadcast})
			}
		}
	default:
		if len(e.msg) > maxBody {
			w.fail("a message of %d bytes", len(e.msg))
		}
		if to := w.by[e.to]; to != nil {
			w.post(packet{from: n.name, to: to, data: e.msg})
		}
	}
}

func (w *world) post(p packet) {
	if w.muted != nil && w.muted(w.by[p.from], p.to, p.table) {
		return
	}
	for copies := 1; copies > 0; copies-- {
		if w.rng.Float64() < w.loss {
			continue
		}
		if w.rng.IntN(30) == 0 {
			copies++
		}
		delay := time.Duration(1+w.rng.IntN(30)) * time.Millisecond
		if w.rng.IntN(50) == 0 {
			delay += time.Duration(w.rng.IntN(5000)) * time.Millisecond
		}
		p.at = w.now.Add(delay)
		w.queue = append(w.queue, p)
	}
}

func (w *world) reachable(a, b *node) bool { return a.up && b.up && a.group == b.group }

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

const simTick = 200 * time.Millisecond

// run lets time pass.
func (w *world) run(d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end) && w.err == nil; {
		w.now = w.now.Add(simTick)
		w.deliver()
		for _, n := range w.nodes {
			if !n.up {
				continue
			}
			w.membership(n)
			for _, call := range n.sortedCalls() {
				if until := n.calls[call]; w.now.After(until) {
					n.step(func(c *core, now time.Time) { c.cancel(call, context.DeadlineExceeded) })
				}
				if !n.up {
					break
				}
			}
			n.step(func(c *core, now time.Time) { c.tick(now) })
			if n.up && w.rng.IntN(5) == 0 {
				w.sync(n)
			}
		}
	}
}

func (n *node) sortedCalls() []*call {
	out := slices.Collect(maps.Keys(n.calls))
	slices.SortFunc(out, func(a, b *call) int {
		if a.owner != b.owner {
			if a.owner < b.owner {
				return -1
			}
			return 1
		}
		return int(a.op) - int(b.op)
	})
	return out
}

func (w *world) deliver() {
	for len(w.queue) > 0 && w.err == nil {
		var due, later []packet
		for _, p := range w.queue {
			if p.at.After(w.now) {
				later = append(later, p)
			} else {
				due = append(due, p)
			}
		}
		if len(due) == 0 {
			return
		}
		slices.SortStableFunc(due, func(a, b packet) int { return a.at.Compare(b.at) })
		w.queue = later
		for _, p := range due {
			if from := w.by[p.from]; p.to.up && from.group == p.to.group {
				if p.table {
					if _, err := p.to.table.Merge(p.from, p.data); err != nil && !errors.Is(err, ring.ErrOtherCluster) {
						w.fail("merge: %v", err)
					}
					p.to.step(func(c *core, now time.Time) { c.at(now); c.advance() })
				} else {
					p.to.step(func(c *core, now time.Time) { c.message(p.from, p.data, now) })
				}
			}
		}
	}
}

// membership plays the room that watches peers.
func (w *world) membership(n *node) {
	for _, o := range w.nodes {
		if o == n {
			continue
		}
		if w.reachable(n, o) {
			n.seen[o] = w.now
		}
		was := n.state[o]
		is := was
		switch silent := w.now.Sub(n.seen[o]); {
		case n.seen[o].IsZero():
		case silent > 20*time.Second:
			is = Gone
		case silent > 2*time.Second:
			is = Suspect
		case silent == 0 && w.rng.IntN(3) == 0:
			is = Alive
		}
		if is != was {
			n.state[o] = is
			n.step(func(c *core, now time.Time) { c.peerState(o.name, is, now) })
			if !n.up {
				return
			}
		}
	}
}

// sync compares tables with a random peer, as the gossip room does.
func (w *world) sync(n *node) {
	o := w.nodes[w.rng.IntN(len(w.nodes))]
	if o == n || !w.reachable(n, o) || w.muted != nil && w.muted(n, o, true) {
		return
	}
	for range 2 {
		var keys []uint64
		if mine, theirs := n.table.Items(), o.table.Items(); !slices.Equal(mine, theirs) {
			have := make(map[mesh.Item]bool)
			for _, it := range mine {
				have[it] = true
			}
			for _, it := range theirs {
				if !have[it] {
					keys = append(keys, it.Key)
				}
			}
		}
		for _, part := range o.table.Encode(keys, maxBody) {
			if len(part) > maxBody {
				w.fail("a table part of %d bytes", len(part))
			}
			if _, err := n.table.Merge(o.name, part); err != nil && !errors.Is(err, ring.ErrOtherCluster) {
				w.fail("merge: %v", err)
			}
		}
		n.step(func(c *core, now time.Time) { c.at(now); c.advance() })
		if !n.up {
			return
		}
		n, o = o, n
		if !n.up || !o.up {
			return
		}
	}
}

// launch starts a call on a node.
func (n *node) launch(call *call, patience time.Duration) {
	n.calls[call] = n.w.now.Add(patience)
	n.step(func(c *core, now time.Time) { c.at(now); c.start(call) })
}

func (w *world) allocate(n *node, id string, subnet netip.Prefix) {
	call := &call{op: opAllocate, owner: id, addr: subnet}
	invoked := w.history.invoke()
	call.answer = func(r result) {
		if r.err != nil {
			w.counts["refused"]++
			return
		}
		w.counts["allocated"]++
		w.acknowledged(n, id, r.prefix, subnet)
		w.history.done(invoked, n, "alloc", id, r.prefix.Addr())
	}
	n.launch(call, time.Duration(w.rng.IntN(15_000))*time.Millisecond)
}

func (w *world) claim(n *node, id string, addr netip.Prefix) {
	call := &call{op: opClaim, owner: id, addr: addr}
	invoked := w.history.invoke()
	call.answer = func(r result) {
		if r.err != nil {
			w.counts["claims refused"]++
			return
		}
		w.counts["claimed"]++
		w.acknowledged(n, id, r.prefix, addr.Masked())
		w.history.done(invoked, n, "alloc", id, r.prefix.Addr())
	}
	n.launch(call, time.Duration(w.rng.IntN(15_000))*time.Millisecond)
}

// acknowledged is where the oracle sees an address given out.
func (w *world) acknowledged(n *node, id string, p, subnet netip.Prefix) {
	if old := n.conts[id]; old != nil {
		// The same owner and subnet keep their address, unless it collided after a removal.
		if old.addr != p && !old.void {
			w.fail("%s: %s had %s, now got %s", n, id, old.addr, p)
		}
		if old.addr == p {
			return
		}
	}
	// Rule 2.
	if p.Masked() != subnet || p.Masked().Addr() == p.Addr() || mesh.LastAddr(p) == p.Addr() || !w.rangep.Contains(p.Addr()) {
		w.fail("%s: %s got %s, asked for one in %s", n, id, p, subnet)
	}
	// Rule 7.
	off, _ := n.core.ring.Offset(p.Addr())
	if owner := n.core.ring.At(off).Owner; owner != n.core.me && !w.rolled {
		w.fail("%s gave out %s, which it sees owned by %s", n, p, owner)
	}
	w.noteFences(n)
	ct := &container{id, n, p, w.removed[n.core.me] || w.orphan(n.core.me) || w.minor(n)}
	n.conts[id] = ct
	n.known[id] = p
	w.trace("%s: %s has %s (void %v)", n, id, p, ct.void)
	w.check1(ct)
}

// check1 is rule 1: one live container per address. Containers of a host that was declared lost do not
// count, until the host has been given their addresses again.
func (w *world) check1(ct *container) {
	if ct.void {
		return
	}
	for _, n := range w.nodes {
		for _, o := range n.conts {
			if o != ct && !o.void && o.addr.Addr() == ct.addr.Addr() {
				if ct.host.up && w.orphan(ct.host.core.me) || o.host.up && w.orphan(o.host.core.me) {
					w.excused["a member that nobody left knew of"]++
					ct.void, o.void = true, true
					continue
				}
				w.fail("%s is held by %s on %s and by %s on %s%s", ct.addr, ct.id, ct.host, o.id, o.host, w.views(ct.addr.Addr()))
			}
		}
	}
}

// views says what everybody sees of an address.
func (w *world) views(a netip.Addr) (out string) {
	for _, n := range w.nodes {
		if n.up {
			off, _ := n.core.ring.Offset(a)
			s := n.core.ring.At(off)
			out += fmt.Sprintf("\n  %s (%s) sees [%d, %d) of %s, %d.%d by %s", n, n.core.me, s.Start, s.End, s.Owner, s.Epoch, s.Count, s.By)
			if h := n.core.holds.byOff[off]; h != nil {
				out += fmt.Sprintf("; holds it for %s, state %d", h.owner, h.state)
			}
		}
	}
	return out
}

// orphan reports whether all who knew of a life when it began to serve have been removed, or are such
// themselves: the one case that cannot be excluded (see the package comment). Its containers do not count
// until a member that remains knows it, and sees as its own what it sees as its own, and none sees a later owner of that.
// That one is a witness from then on. Where nobody was removed there are no orphans, and founders never are: whoever has the ring
// knows them. A life that began to serve alone, after the grace time, has no witness at all: once anybody was
// removed it is an orphan, for nobody can be asked who knows that it exists.
func (w *world) orphan(life ring.ID) bool {
	if w.orphansAt != w.now {
		w.orphansAt, w.orphans = w.now, make(map[ring.ID]bool)
	}
	is, known := w.orphans[life]
	if !known {
		is = w.orphanOf(life, make(map[ring.ID]bool))
		w.orphans[life] = is
	}
	return is
}

func (w *world) orphanOf(life ring.ID, seen map[ring.ID]bool) bool {
	if w.known[life] || w.witness[life] == nil || len(w.removed) == 0 {
		return false // nil: it does not serve yet
	}
	if seen[life] {
		return true // only each other
	}
	seen[life] = true
	for _, id := range w.witness[life] {
		if !w.removed[id] && !w.orphanOf(id, seen) {
			return false
		}
	}
	for _, n := range w.nodes {
		if !n.up || n.core.me != life || w.overtaken(n) {
			continue
		}
		for _, o := range w.nodes {
			if o == n || !o.up || w.removed[o.core.me] || !o.core.serving || !o.core.ring.Member(life).Active() || w.orphanOf(o.core.me, seen) {
				continue
			}
			if slices.Equal(n.core.ring.Owned(life), o.core.ring.Owned(life)) {
				w.witness[life] = append(w.witness[life], o.core.me) // until that one is removed as well
				return false
			}
		}
	}
	return true
}

// overtaken reports whether a member that remains sees a later owner of something that n sees as its own: n has
// yet to hear of that, and those who know it, such as a new life of whoever gave it that, may be as far behind.
func (w *world) overtaken(n *node) (is bool) {
	for _, s := range n.core.ring.Owned(n.core.me) {
		for _, o := range w.nodes {
			if o == n || !o.up || w.removed[o.core.me] {
				continue
			}
			o.core.ring.Segments(s.Start, s.End, func(t ring.Segment) bool {
				is = is || t.Epoch > s.Epoch && t.Owner != n.core.me
				return !is
			})
		}
	}
	return is
}

// watch notes who knows of a new life, and demands that no takeover overlooks a life that an active
// member knows of.
func (w *world) watch(n *node) {
	c := n.core
	w.noteOwnFences(n)
	w.noteCluster(n)
	if c.serving && w.witness[c.me] == nil {
		ids := []ring.ID{}
		for _, id := range c.activeMembers() {
			if c.answered[id.Peer] || c.alive(id.Peer) { // an alive one has to have answered: no excuse if it has not
				ids = append(ids, id)
			}
		}
		w.witness[c.me] = ids
	}
	if c.write == nil || len(c.write.delta.Segments) == 0 || c.write.delta.Segments[0].Owner != c.me {
		return
	}
	for _, o := range w.nodes {
		if o.gone || o == n || !o.up || w.removed[o.core.me] || w.witness[o.core.me] == nil {
			continue
		}
		if m := c.ring.Member(o.core.me); m.Active() || m.Fenced() || m.Flags&ring.Left != 0 {
			continue
		}
		// It may have come after the witnesses had answered. Then it knows of the removal through them,
		// and has got nothing of what is taken.
		if harmless := !slices.ContainsFunc(c.write.delta.Segments, func(s ring.Segment) bool {
			return o.core.ring.At(s.Start).Owner == o.core.me || !o.core.ring.Fenced(c.ring.At(s.Start).Owner)
		}); harmless {
			continue
		}
		for _, id := range w.witness[o.core.me] {
			if c.ring.Member(id).Active() {
				w.fail("%s takes over without knowing of %s, which member %s knows", n, o, id)
			}
		}
		w.counts["takeovers that could not know all"]++
	}
}

// review looks at everything that must always be true.
func (w *world) review() {
	for _, n := range w.nodes {
		if !n.up {
			continue
		}
		for _, ct := range n.sortedConts(func(ct *container) bool {
			w.holders++
			if ct.void {
				w.void++
			}
			return ct.void || n.core.holds.find(ct.id, ct.addr.Addr()) == nil
		}) {
			h := n.core.holds.find(ct.id, ct.addr.Addr())
			if h == nil {
				w.fail("%s lost %s of %s", n, ct.addr, ct.id)
				return
			}
			if ct.void && h.state == held && !w.removed[n.core.me] && n.core.serving && !w.orphan(n.core.me) && !w.minor(n) {
				ct.void = false // it was given its address again
				w.check1(ct)
			}
		}
		w.noteFences(n)
		for _, c := range n.core.ring.Conflicts() { // rule 6
			if c.Kept.By == c.Dropped.By && !w.rolled {
				w.fail("%s saw two contents with one stamp: %+v", n, c)
			}
		}
	}
}

// noteOwnFences looks for peers that fence their own former lives, as they may, and for those that were
// fenced because they left and still owned something: who fences them knows that they left. Others, who
// carry that on, may be heard of first, and so may the fence before the leaving.
func (w *world) noteOwnFences(n *node) {
	if n.looked == n.core.ring.Generation() {
		return
	}
	n.looked = n.core.ring.Generation()
	for _, m := range n.core.ring.Members() {
		if slices.ContainsFunc(m.Fences, func(f ring.ID) bool { return f.Peer == m.ID.Peer }) || m.Fenced() && m.Flags&ring.Left != 0 {
			w.former[m.ID] = true
		}
	}
}

// noteFences looks for removals that nobody ordered. A peer may fence others after ReclaimAfter.
func (w *world) noteFences(n *node) {
	if n.counted == n.core.ring.Generation() {
		return
	}
	n.counted = n.core.ring.Generation()
	for _, m := range n.core.ring.Members() {
		host := w.by[m.ID.Peer]
		if !m.Fenced() || w.removed[m.ID] || m.Flags&ring.Left != 0 || w.former[m.ID] {
			continue
		}
		w.removed[m.ID] = true
		if w.reclaim == 0 && !w.rolled {
			w.fail("%s sees %s fenced by %v, whom nobody removed", n, m.ID, m.Fences)
		}
		w.trace("%s is removed after a while", host)
		for _, ct := range host.conts {
			ct.void = true
		}
		w.voidOrphans()
	}
}

// declareLost is the operator's rmpeer of a host, on some node.
func (w *world) declareLost(at, n *node) {
	call := &call{op: opRemove, peer: n.name}
	call.answer = func(r result) { w.trace("%s: rmpeer %s: %d, %v", at, n, r.n, r.err) }
	w.trace("%s: rmpeer %s", at, n)
	w.voidHost(n, at)
	at.launch(call, 20*time.Second)
}

// voidHost notes that the host may lose its addresses.
func (w *world) voidHost(n, at *node) {
	for _, m := range at.core.ring.Members() {
		if m.ID.Peer == n.name {
			w.removed[m.ID] = true
		}
	}
	if n.up {
		w.removed[n.core.me] = true
	} else if life, ok := u64(n.disk[bucketMeta][metaLife]); ok {
		w.removed[ring.ID{Peer: n.name, Life: uint32(life)}] = true
	}
	for _, ct := range n.conts {
		ct.void = true
	}
	w.voidOrphans()
}

// life is the life that the node has, or had before it went down.
func (n *node) life() ring.ID {
	if n.up {
		return n.core.me
	}
	life, _ := u64(n.disk[bucketMeta][metaLife])
	return ring.ID{Peer: n.name, Life: uint32(life)}
}

// voidOrphans notes that a removal may have made orphans of lives that nobody named. They go on with what
// they have, and those who removed all that knew of them hand it out again, as the package comment says:
// once they meet, the orphan's containers count when it has got their addresses back.
func (w *world) voidOrphans() {
	w.orphansAt = time.Time{}
	for _, n := range w.nodes {
		if len(n.conts) > 0 && w.orphan(n.life()) {
			for _, ct := range n.conts {
				ct.void = true
			}
		}
	}
}

// noteCluster looks for rings beside the first one. When voters have forgotten what they promised, because
// their state is lost, or the operator reset them, and the others are out of reach, then they make a quorum
// that founds anew: nothing tells them from new ones. Both clusters go on, with the same addresses, and say
// so when they meet. The containers of all but the one that a repair keeps do not count until they are in it.
func (w *world) noteCluster(n *node) {
	if id := n.core.ring.Cluster(); id != 0 && !w.clusters[id] {
		w.clusters[id] = true
		for _, m := range n.core.ring.Members() {
			w.known[m.ID] = true // seen in the very step that founds the ring
		}
		if len(w.clusters) > 1 {
			w.trace("cluster %x is a second one", id)
			w.excused["another ring founded by voters that forgot"]++
			if w.forgot == 0 {
				w.fail("%s founds the ring again", n)
			}
		}
	}
	if len(w.clusters) > 1 {
		for _, n := range w.nodes {
			if w.minor(n) {
				for _, ct := range n.conts {
					ct.void = true
				}
			}
		}
	}
}

// minor reports whether the node is in a cluster that will give way.
func (w *world) minor(n *node) bool {
	if len(w.clusters) < 2 {
		return false
	}
	main := n.cluster()
	for _, o := range w.nodes {
		if id := o.cluster(); id != 0 && !o.gone {
			main = min(main-1, id-1) + 1 // zero comes last
		}
	}
	return n.cluster() != main
}

// cluster is the node's, also while it is down; zero if it has none.
func (n *node) cluster() uint64 {
	if n.up {
		return n.core.ring.Cluster()
	}
	id, _ := u64(n.disk[bucketMeta][metaCluster])
	return id
}

func (w *world) pick(ok func(*node) bool) *node {
	var fit []*node
	for _, n := range w.nodes {
		if ok(n) {
			fit = append(fit, n)
		}
	}
	if len(fit) == 0 {
		return nil
	}
	return fit[w.rng.IntN(len(fit))]
}

func isUp(n *node) bool   { return n.up }
func isDown(n *node) bool { return !n.up && !n.gone }

func newWorld(seed int64, trace func(string, ...any)) *world {
	return &world{rng: rand.New(rand.NewPCG(uint64(seed), 7)), now: epoch, by: make(map[mesh.PeerName]*node), groups: 1, trace: trace,
		removed: make(map[ring.ID]bool), witness: make(map[ring.ID][]ring.ID), former: make(map[ring.ID]bool), known: make(map[ring.ID]bool), clusters: make(map[uint64]bool), excused: make(map[string]int), counts: make(map[string]int)}
}

// simulate is one run of the given number of operations.
func simulate(seed int64, ops int, trace func(string, ...any)) *world {
	w := newWorld(seed, trace)
	w.rangep = netip.MustParsePrefix([]string{"10.32.0.0/22", "10.32.0.0/24", "10.32.0.0/26", "10.32.0.0/16"}[w.rng.IntN(4)])
	w.subnets = []netip.Prefix{w.rangep, w.rangep, w.rangep, netip.PrefixFrom(w.rangep.Addr(), w.rangep.Bits()+1),
		netip.PrefixFrom(mesh.LastAddr(netip.PrefixFrom(w.rangep.Addr(), w.rangep.Bits()+2)).Next(), w.rangep.Bits()+2)}
	w.loss = float64(w.rng.IntN(4)) * 0.07
	if w.rng.IntN(4) == 0 {
		w.reclaim = 40 * time.Second
	}
	peers := 3 + w.rng.IntN(10)
	init := Init{Mode: Consensus, N: peers}
	if w.rng.IntN(4) == 0 {
		init = Init{Mode: Seed}
		for i := range 1 + w.rng.IntN(3) {
			init.Seed = append(init.Seed, mesh.PeerName{1, 0, 0, 0, 0, byte(i + 1)})
		}
	}
	for range peers {
		w.addNode(init)
	}
	w.run(2 * time.Second)
	kills := w.rng.IntN(3) // how rough this run is
	side := rand.New(rand.NewPCG(uint64(seed), 8))
	for op := 0; op < ops && w.err == nil; op++ {
		w.operation(kills, init)
		if w.rng.IntN(3) == 0 {
			w.run(simTick)
		}
		if side.IntN(50) == 0 {
			w.findPort(side)
		}
		w.review()
	}
	w.finish()
	return w
}

func (w *world) operation(rough int, init Init) {
	n := w.pick(isUp)
	if n == nil {
		if n = w.pick(isDown); n != nil {
			n.start()
		}
		return
	}
	switch x := w.rng.IntN(1000); {
	case x < 420:
		w.nextCont++
		w.allocate(n, fmt.Sprintf("c%d", w.nextCont), w.subnets[w.rng.IntN(len(w.subnets))])
	case x < 520: // the same again, or a container that restarts
		if ct := n.anyContainer(); ct != nil {
			w.allocate(n, ct.id, ct.addr.Masked())
		}
	case x < 600:
		w.nextCont++
		addr := n.core.ring.Addr(w.rng.Uint64N(ring.Size(w.rangep)))
		if p := netip.PrefixFrom(addr, w.rangep.Bits()); checkClaim(p) == nil {
			w.claim(n, fmt.Sprintf("c%d", w.nextCont), p)
		}
	case x < 880:
		if ct := n.anyContainer(); ct != nil {
			w.free(n, ct)
		}
	case x < 880+10*rough:
		w.kill(n)
	case x < 910:
		if d := w.pick(isDown); d != nil {
			w.trace("%s starts", d)
			d.start()
		}
	case x < 915:
		n.bad = true
	case x < 925:
		for _, n := range w.nodes {
			n.bad = false
		}
	case x < 930:
		n.skew += time.Duration(w.rng.IntN(7200)-3600) * time.Second
	case x < 935 && rough > 0:
		w.groups = 1 + w.rng.IntN(3)
		for _, n := range w.nodes {
			n.group = w.rng.IntN(w.groups)
		}
		w.trace("cut into %d", w.groups)
	case x < 945:
		w.heal()
	case x < 948 && rough > 0 && len(w.nodes) < 16:
		if init.Mode == Consensus {
			init.Mode = Observer // one voter too many, while the ring is being founded, could make two rings
		}
		m := w.addNode(init)
		m.group = n.group
		w.trace("%s is new", m)
	case x < 951 && rough > 1 && n.core.ring.Cluster() != 0 && !slices.Contains(n.init.Seed, n.name):
		// Not while the ring is founded, or a voter would forget its promise; and not a founder of a seed,
		// which alone cannot know that it is not new.
		// A host is lost for good, or its state is.
		if w.rng.IntN(2) == 0 {
			w.scrap(n)
		} else {
			w.trace("%s loses its state", n)
			n.kill()
			n.disk = make(map[string]map[string][]byte)
			n.known = nil
			w.forgot++
		}
	case x < 957 && rough > 0:
		// The operator removes one that is down, gone or cut off, on one node or on two at once.
		if lost := w.pick(func(o *node) bool { return o != n && !w.reachable(n, o) && n.state[o] != Alive }); lost != nil {
			w.declareLost(n, lost)
			if m := w.pick(func(o *node) bool {
				return o != lost && o != n && o.up && !w.reachable(o, lost) && o.state[lost] != Alive
			}); m != nil && w.rng.IntN(2) == 0 {
				w.declareLost(m, lost)
			}
		}
	case x < 958 && rough > 0 && !slices.Contains(n.init.Seed, n.name):
		w.leave(n) // not a founder of a seed, which comes back without its state and cannot know it, alone
	default:
		w.run(time.Duration(w.rng.IntN(2000)) * time.Millisecond)
	}
}

func (w *world) kill(n *node) {
	w.trace("%s is killed", n)
	if w.rng.IntN(2) == 0 {
		n.die = true // at its next write
	} else {
		n.kill()
	}
}

func (w *world) scrap(n *node) {
	w.trace("%s is scrapped", n)
	n.kill()
	n.gone = true
	clear(n.conts)
}

func (w *world) heal() {
	w.groups = 1
	for _, n := range w.nodes {
		n.group = 0
	}
	w.trace("healed")
}

func (w *world) free(n *node, ct *container) {
	call := &call{}
	invoked := w.history.invoke()
	// From now on it may be reused; if the disk fails the container manager tries again.
	answered := false
	call.answer = func(r result) {
		answered = true
		if r.err == nil {
			w.history.done(invoked, n, "free", ct.id, ct.addr.Addr())
			return
		}
		n.conts[ct.id] = ct // still there; whether the disk knows is open
		w.check1(ct)
	}
	delete(n.conts, ct.id)
	delete(n.known, ct.id)
	w.trace("%s: %s gives %s back", n, ct.id, ct.addr)
	n.step(func(c *core, now time.Time) {
		c.at(now)
		c.release(ct.id, ct.addr.Addr())
		c.reply(call, result{})
	})
	if !answered {
		w.history.open(invoked, n, ct) // it may have been freed just so
	}
}

// findPort has a host count once more what runs on it, while addresses are given out. It finds a container that
// nobody here remembers, and its list lacks some that have only just got their addresses. A found one keeps
// its address if that is free, and counts when the address is its host's; what was acknowledged stays.
func (w *world) findPort(side *rand.Rand) {
	n := w.nodes[side.IntN(len(w.nodes))]
	if !n.up || !n.core.liveKnown || n.core.left {
		return
	}
	addr := n.core.ring.Addr(side.Uint64N(ring.Size(w.rangep)))
	var live []Holding
	for _, ct := range n.sortedConts(nil) {
		if side.IntN(2) == 0 {
			live = append(live, Holding{ct.id, ct.addr})
		} else if side.IntN(4) == 0 {
			addr = ct.addr.Addr()
		}
	}
	w.nextCont++
	ct := &container{id: fmt.Sprintf("found%d", w.nextCont), host: n, addr: netip.PrefixFrom(addr, w.rangep.Bits()), void: true}
	if checkClaim(ct.addr) != nil {
		return
	}
	n.step(func(c *core, now time.Time) {
		c.at(now)
		bad := c.reclaim(append(live, Holding{ct.id, ct.addr}))
		w.trace("%s finds %s with %s: %v", n, ct.id, ct.addr, bad)
		switch {
		case len(bad) > 1:
			w.fail("%s cannot reclaim %v", n, bad)
		case len(bad) == 0:
			n.conts[ct.id] = ct
			w.counts["found"]++
		}
	})
}

func (w *world) leave(n *node) {
	call := &call{op: opLeave}
	call.answer = func(r result) { w.trace("%s: reset: %d, %v", n, r.n, r.err) }
	w.trace("%s resets", n)
	for _, call := range n.sortedCalls() {
		n.step(func(c *core, now time.Time) { c.cancel(call, context.Canceled) })
		if !n.up {
			return
		}
	}
	for _, ct := range n.sortedConts(nil) {
		w.free(n, ct)
		if !n.up {
			return
		}
	}
	n.launch(call, 10*time.Second)
	w.run(2 * time.Second)
	if n.up && n.core.left {
		n.kill()
		n.disk, n.known = make(map[string]map[string][]byte), nil
		w.forgot++
		clear(n.conts)
	}
}

// sortedConts is the node's containers of a kind, or all, in an order that a seed always gives.
func (n *node) sortedConts(kind func(*container) bool) (out []*container) {
	for _, ct := range n.conts {
		if kind == nil || kind(ct) {
			out = append(out, ct)
		}
	}
	slices.SortFunc(out, func(a, b *container) int { return strings.Compare(a.id, b.id) })
	return out
}

func (n *node) anyContainer() *container {
	if len(n.conts) == 0 {
		return nil
	}
	cts := n.sortedConts(nil)
	return cts[n.w.rng.IntN(len(cts))]
}

// finish heals everything, has the operator remove what is gone for good, and demands that all is well.
func (w *world) finish() {
	if w.err != nil {
		return
	}
	w.heal()
	w.loss = 0.02
	for _, n := range w.nodes {
		n.bad, n.die = false, false
		if isDown(n) {
			n.start()
		}
	}
	w.run(30 * time.Second)
	if w.err != nil {
		return
	}
	if w.pick(isUp) == nil {
		return
	}
	w.repair()
	for _, dead := range w.nodes {
		if dead.gone {
			w.declareLost(w.pick(isUp), dead)
		}
	}
	w.run(60 * time.Second)
	w.review()
	if w.err != nil {
		return
	}
	first := w.pick(isUp)
	items := sortedItems(first)
	if first.core.ring.Cluster() == 0 {
		return // nobody ever asked for an address
	}
	for _, n := range w.nodes {
		if !n.up {
			continue
		}
		for tries := 0; !slices.Equal(items, sortedItems(n)); tries++ {
			if tries == 10 {
				w.fail("at the end %s and %s differ:\n%s%s%s", first, n, difference(first, n), first.describe(), n.describe())
				return
			}
			w.run(3 * time.Second) // somebody may just be fetching space
			items = sortedItems(first)
		}
		for _, ct := range n.conts {
			if h := n.core.holds.find(ct.id, ct.addr.Addr()); h.state == contest {
				w.fail("at the end %s still asks for %s of %s: %s; %s %s", n, ct.addr, ct.id, n.core.whyContest(h), n.describe(), w.by[n.core.winner(n.core.ring.At(h.off).Owner).Peer].describe())
			}
		}
	}
	first.core.ring.Segments(0, first.core.ring.Size(), func(s ring.Segment) bool { // rule 3, and nothing lost
		if !first.core.ring.Member(s.Owner).Active() {
			w.fail("at the end [%d, %d) belongs to %s, which is no member: %+v", s.Start, s.End, s.Owner, first.core.ring.Member(s.Owner))
		}
		return true
	})
	// Everybody can have an address, unless the range is full.
	used := 0
	for _, n := range w.nodes {
		used += len(n.conts)
	}
	if used >= int(ring.Size(w.rangep))-2-len(w.nodes) {
		return
	}
	for _, n := range w.nodes {
		if n.up {
			var got *result
			call := &call{op: opAllocate, owner: "last-" + n.String(), addr: w.rangep, answer: func(r result) { got = &r }}
			n.launch(call, 20*time.Second)
			w.run(21 * time.Second)
			if got == nil || got.err != nil {
				w.fail("at the end %s gets no address: %+v; %d used of %d", n, got, used, ring.Size(w.rangep))
			} else {
				w.acknowledged(n, call.owner, got.prefix, w.rangep)
			}
		}
	}
	w.review()
}

// repair has the operator do what the peers ask for in their status: make one of two clusters, and fill the
// gaps that nobody left knows the owners of.
func (w *world) repair() {
	for range 4 {
		n := w.pick(func(n *node) bool {
			return n.up && (n.core.otherCluster() != 0 || n.core.ring.Cluster() != 0 && n.core.ring.Unowned() > 0)
		})
		if n == nil || w.err != nil {
			return
		}
		call := &call{op: opRepair, answer: func(r result) { w.trace("%s: repair: %v, %v", n, r.repaired, r.err) }}
		w.trace("%s: repair", n)
		w.counts["repairs"]++
		n.launch(call, 20*time.Second)
		w.run(25 * time.Second)
	}
}

func sortedItems(n *node) []mesh.Item {
	items := n.table.Items()
	slices.SortFunc(items, func(a, b mesh.Item) int {
		if a.Key != b.Key {
			if a.Key < b.Key {
				return -1
			}
			return 1
		}
		return 0
	})
	return items
}

// describe is what a failure needs to know of a node.
func (n *node) describe() string {
	if n == nil || n.core == nil {
		return "\n(not running)"
	}
	c := n.core
	return fmt.Sprintf("\n%s is %s, serving %v, ready %v, disk %v, removals %+v", n, c.me, c.serving, c.ready, c.diskErr, c.status().Removals)
}

// difference lists what the two views have not in common.
func difference(a, b *node) (out string) {
	lines := func(n *node) map[string]bool {
		m := map[string]bool{fmt.Sprintf("%016x", n.core.ring.Cluster()): true}
		for _, e := range n.core.ring.Members() {
			m[fmt.Sprint(e)] = true
		}
		n.core.ring.Segments(0, n.core.ring.Size(), func(g ring.Segment) bool { m[fmt.Sprint(g)] = true; return true })
		return m
	}
	x, y := lines(a), lines(b)
	for _, l := range slices.Sorted(maps.Keys(x)) {
		if !y[l] {
			out += fmt.Sprintf("  %s %s\n", a, l)
		}
	}
	for _, l := range slices.Sorted(maps.Keys(y)) {
		if !x[l] {
			out += fmt.Sprintf("  %s %s\n", b, l)
		}
	}
	return out
}

func TestSimulation(t *testing.T) {
	if *simSeed >= 0 {
		w := simulate(*simSeed, 2000, func(f string, a ...any) { fmt.Printf(f+"\n", a...) })
		t.Log(w.counts, w.excused)
		if w.err != nil {
			t.Fatal(w.err)
		}
		return
	}
	seeds := 300
	if os.Getenv("MESHD_LONG") != "" {
		seeds = 10_000
	}
	if testing.Short() {
		seeds = 40
	}
	if *simSeeds > 0 {
		seeds = *simSeeds
	}
	for _, seed := range foundSeeds {
		if w := simulate(seed, 2000, func(string, ...any) {}); w.err != nil {
			t.Errorf("seed %d: %v", seed, w.err)
		}
	}
	runSeeds(t, seeds, func(seed int64) *world { return simulate(seed, 2000, func(string, ...any) {}) })
}

// foundSeeds are those that once failed, and are not among the first.
var foundSeeds = []int64{68049}

// minChecked is the share of containers, in percent, that rule 1 must not pass over, or passing says little.
const minChecked = 75

// runSeeds runs seeds on all processors and reports the first few failures.
func runSeeds(t *testing.T, seeds int, run func(seed int64) *world) {
	var (
		mu       sync.Mutex
		next     int64
		failures int
		holders  int
		void     int
		counts   = make(map[string]int)
		excused  = make(map[string]int)
		wg       sync.WaitGroup
	)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				mu.Lock()
				seed := *simFirst + next
				next++
				stop := next > int64(seeds) || failures >= *simStop
				mu.Unlock()
				if stop {
					return
				}
				w := run(seed)
				mu.Lock()
				holders, void = holders+w.holders, void+w.void
				for k, v := range w.counts {
					counts[k] += v
				}
				for k, v := range w.excused {
					excused[k] += v
				}
				if w.err != nil {
					failures++
					fmt.Fprintf(os.Stderr, "seed %d: %v\n", seed, w.err) // at once: the run may be long
					t.Errorf("seed %d (go test ./ipam -run %s -sim.seed %d): %v", seed, t.Name(), seed, w.err)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	t.Logf("%d seeds: %v, excused: %v", seeds, counts, excused)
	if holders == 0 {
		return
	}
	checked := 100 - 100*float64(void)/float64(holders)
	t.Logf("one holder per address was demanded of %.1f %% of all containers", checked)
	if seeds >= 40 && checked < minChecked {
		t.Errorf("the oracle excuses too much: it passed over all but %.1f %% of the containers, want at least %d %%", checked, minChecked)
	}
}
