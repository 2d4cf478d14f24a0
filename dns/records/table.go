package records

import (
	"container/heap"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"meshd/mesh"
)

// TombstoneAge is how long the deletion of a hand-made name is kept, counted while this peer runs: a week.
// It is the longest partition, and the longest absence of a peer, that we promise to heal without a
// deleted name coming back.
const TombstoneAge = 7 * 24 * time.Hour

const (
	// Old tombstones are no longer offered at TombstoneAge, but still known for this long, so that peers
	// whose count of the age differs a little do not hand them back to each other.
	forgetAge = TombstoneAge + 2*time.Hour

	// What a fresh run announces within this time is all there is, unless Settle says so earlier.
	settleAfter = 10 * time.Second

	// Peers away for half of the time after which they are gone are no longer offered to others, nor are their
	// keys: who does not know them yet could not believe their rows.
	hideAfter = 30 * time.Minute

	// A peer that nobody told us anything about: its rows came from a peer that will drop them too.
	strangerAge = 10 * time.Minute

	// How long after its start, and after it first heard from another peer, a peer without memory may
	// write over what it turns out not to have known.
	earlyTime = 30 * time.Second

	// Between two changes of generation that somebody else forces upon us.
	bumpEvery = time.Second
)

// Bounds on what other peers can make this table hold. One member can be many peers, each with a key of its own: so what
// endpoints take is bounded as a whole, but for a share that is each peer's whatever the others take.
const (
	maxPeers          = 1 << 13
	maxEndpointRows   = 1 << 15   // of one peer
	maxEndpointMemory = 256 << 20 // bytes, as endpoint.memory has it: some 100,000 endpoints of the usual kind
	sureMemory        = 32 << 10  // bytes of one peer
	maxHandmade       = 1 << 16   // rows, tombstones included
	maxHandmadeDead   = 1 << 14   // tombstones among them
	ownTombstones     = 64        // endpoints withdrawn before the floor is raised past them
	maxPersistedBatch = 1 << 12
)

// PeerState is what the gossip room thinks of a peer.
type PeerState uint8

const (
	Alive   PeerState = iota
	Suspect           // its names stay, ordered last
	Gone              // for good: its endpoints are dropped, and come back if it does
)

// Store keeps rows over restarts. Put is one durable transaction in which a nil value deletes.
type Store interface {
	Put(bucket string, kv map[string][]byte) error
	All(bucket string) (map[string][]byte, error)
}

// Config of a Table.
type Config struct {
	Self   mesh.PeerName
	Run    mesh.RunID // random; tells this run from the others when the store was lost
	Domain string     // names below it are answered; as ParseName returns it
	Keys   Keys       // nil: no row of another peer is believed
	Store  Store      // nil: nothing survives a restart
	Now    time.Time  // any time with a monotonic reading; Expire continues from it
	Log    *slog.Logger
}

// Change is an endpoint that came, changed (Up) or went.
type Change struct {
	Endpoint mesh.Endpoint
	Up       bool
}

// Table is safe for concurrent use. No method waits for the network; AddName and RemoveName wait for the
// store, the others do not.
type Table struct {
	self       mesh.PeerName
	runBits    uint64
	domain     string
	wireDomain string
	keys       Keys
	store      Store
	log        *slog.Logger
	dirtied    chan struct{} // capacity 1: there is something to send

	names shards[Answer]  // by wire name; written with mu held
	addrs shards[Reverse] // by the 16 bytes of the address; written with mu held

	edit sync.Mutex // one AddName or RemoveName at a time; taken before mu

	mu       sync.Mutex // guards all below
	now      time.Time
	rows     map[uint64]*row // by hash of the key, chained where hashes collide
	listed   []*row          // those that other peers are offered: all but the oldest tombstones
	items    []mesh.Item     // of listed, in the same order
	peers    map[mesh.PeerName]*peer
	owners   map[string]*ownerRows
	handmade int    // rows of hand-made names
	dead     int    // tombstones among them
	clock    uint64 // Lamport clock of the hand-made names
	gen      uint64
	seq      uint64
	ownDead  int // own tombstones of this generation
	started  time.Time
	settled  bool
	blank    bool      // the store was empty at the start
	heard    time.Time // when the first delta from another peer came in; zero: none did
	bumped   time.Time
	bumpTo   uint64 // generation to exceed at the next Expire; zero: none
	refused  uint64 // rows ignored because a bound was reached
	memory   int    // of all endpoints
	room     int    // for them; maxEndpointMemory but in tests
	out      []*row // to be sent
	unsaved  map[*row]bool
	saveGen  bool
	scratch  []byte
	signing  []byte       // what Sign and Verify look at
	refusal  mesh.Refusal // of the delta that is being merged

	subscribers []*subscriber
	telling     bool // somebody is delivering
}

// row is the place of one key in the table.
type row struct {
	item  mesh.Item
	next  *row // another key with the same hash
	rec   record
	place int // in its peer's heap; endpoints only
	slot  int // in Table.listed, or -1

	since  time.Time // tombstone of a hand-made name: when its age was zero
	queued bool      // in Table.out
	early  bool      // made by hand at the start of a blank peer, before it heard from any other
}

// peer is what the table knows of one writer of endpoints.
type peer struct {
	key      [32]byte // by which its rows were judged; zero before the first
	state    PeerState
	hidden   bool // its rows are not offered any more
	stranger bool // SetPeerState never spoke of it
	seen     time.Time
	rows     rowHeap
	memory   int  // of the rows
	floor    *row // nil: nothing is dead yet
}

// ownerRows are the rows of one container.
type ownerRows struct {
	endpoints []*row // live ones
	names     []*row // made by hand for it, dead or alive; not kept for the owners of package mesh
}

// rowHeap has the row with the lowest version on top.
type rowHeap []*row

func (h rowHeap) Len() int { return len(h) }
func (h rowHeap) Less(i, j int) bool {
	return h[i].rec.(*endpoint).ver.compare(h[j].rec.(*endpoint).ver) < 0
}
func (h rowHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i]; h[i].place, h[j].place = i, j }
func (h *rowHeap) Push(x any)   { r := x.(*row); r.place = len(*h); *h = append(*h, r) }
func (h *rowHeap) Pop() any {
	last := len(*h) - 1
	r := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return r
}

// Open reads what the store has and counts this run. Endpoints of the run before are not in the store:
// other peers keep them until this run settles.
func Open(cfg Config) (*Table, error) {
	if cfg.Self.IsZero() {
		return nil, errors.New("names: no peer name")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Keys == nil {
		cfg.Keys = noKeys{}
	}
	domain, err := ParseName(cfg.Domain)
	if err != nil {
		return nil, fmt.Errorf("domain of the mesh: %w", err)
	}
	run := uint64(cfg.Run)
	if run == 0 {
		run = rand.Uint64()
	}
	t := &Table{
		self:       cfg.Self,
		runBits:    run & 0xffffffff,
		domain:     domain,
		wireDomain: WireName(domain),
		keys:       cfg.Keys,
		store:      cfg.Store,
		log:        cfg.Log,
		dirtied:    make(chan struct{}, 1),
		now:        cfg.Now,
		started:    cfg.Now,
		bumped:     cfg.Now.Add(-bumpEvery),
		rows:       make(map[uint64]*row),
		peers:      make(map[mesh.PeerName]*peer),
		owners:     make(map[string]*ownerRows),
		unsaved:    make(map[*row]bool),
		gen:        1 << 32,
		blank:      true,
		room:       maxEndpointMemory,
	}
	t.names.seed, t.addrs.seed = maphash.MakeSeed(), maphash.MakeSeed()
	t.peers[t.self] = &peer{seen: cfg.Now}
	if err := t.load(); err != nil {
		return nil, err
	}
	return t, nil
}

// Domain returns the domain with its final dot.
func (t *Table) Domain() string { return t.domain }

// rowLocked finds the row of rec's key, nil if there is none, and rec's hashes.
func (t *Table) rowLocked(rec record) (*row, mesh.Item) {
	if t.scratch == nil {
		t.scratch = make([]byte, 0, 2*maxRow)
	}
	item := itemOf(rec, t.scratch)
	for r := t.rows[item.Key]; r != nil; r = r.next {
		if sameKey(r.rec, rec) {
			return r, item
		}
	}
	return nil, item
}

// putLocked makes rec what its key holds, in the rows and in every index, and returns the row. The caller
// has made sure that rec is newer than what is there. Nothing is queued for sending.
func (t *Table) putLocked(rec record) *row {
	r, item := t.rowLocked(rec)
	var old view
	var was record
	if r == nil {
		r = &row{next: t.rows[item.Key], place: -1, slot: -1}
		t.rows[item.Key] = r
	} else {
		was, old = r.rec, t.viewLocked(r)
	}
	r.item, r.rec = item, rec
	hidden := false
	switch rec := rec.(type) {
	case *floor:
		p := t.peers[rec.peer]
		p.floor, hidden = r, p.hidden
	case *endpoint:
		p := t.peers[rec.peer]
		hidden = p.hidden
		if was == nil {
			heap.Push(&p.rows, r)
		} else {
			heap.Fix(&p.rows, r.place)
		}
		before, _ := was.(*endpoint)
		t.chargeLocked(p, rec.memory()-before.memory())
		t.ownLocked(r, rec.owner, !rec.gone)
		if same := before != nil && before.gone == rec.gone && before.parts == rec.parts &&
			slices.Equal(before.addrs, rec.addrs) && slices.Equal(before.names, rec.names); !same {
			t.reindexLocked(r, old, t.viewLocked(r))
			t.noteLocked(rec, before)
		}
	case *handmade:
		t.nameLocked(r, was, rec)
		t.reindexLocked(r, old, t.viewLocked(r))
		t.unsaved[r] = true
	}
	if !hidden {
		t.listLocked(r)
	}
	return r
}

func (t *Table) chargeLocked(p *peer, bytes int) {
	p.memory += bytes
	t.memory += bytes
}

// dropLocked forgets a row altogether.
func (t *Table) dropLocked(r *row) {
	old := t.viewLocked(r)
	switch rec := r.rec.(type) {
	case *floor:
		t.peers[rec.peer].floor = nil
	case *endpoint:
		heap.Remove(&t.peers[rec.peer].rows, r.place)
		t.chargeLocked(t.peers[rec.peer], -rec.memory())
		t.ownLocked(r, rec.owner, false)
		t.reindexLocked(r, old, view{})
		if !rec.gone {
			dead := *rec
			dead.gone = true
			t.noteLocked(&dead, rec)
		}
		if rec.peer == t.self && rec.gone && rec.ver.gen == t.gen {
			t.ownDead--
		}
	case *handmade:
		t.reindexLocked(r, old, view{})
		if o := t.owners[rec.owner]; o != nil && !isMeshOwner(rec.owner) {
			o.names = holdersWith(o.names, r, false)
			t.tidyOwnerLocked(rec.owner)
		}
		t.handmade--
		if rec.gone {
			t.dead--
		}
		t.unsaved[r] = true
	}
	t.unlistLocked(r)
	// Unlink from its chain.
	if head := t.rows[r.item.Key]; head == r && r.next == nil {
		delete(t.rows, r.item.Key)
	} else if head == r {
		t.rows[r.item.Key] = r.next
	} else {
		for head.next != r {
			head = head.next
		}
		head.next = r.next
	}
	r.rec = tomb{r.rec}
}

// listLocked offers r's present item to other peers.
func (t *Table) listLocked(r *row) {
	if r.slot < 0 {
		r.slot = len(t.listed)
		t.listed = append(t.listed, r)
		t.items = append(t.items, r.item)
	}
	t.items[r.slot] = r.item
}

func (t *Table) unlistLocked(r *row) {
	if r.slot < 0 {
		return
	}
	last := len(t.listed) - 1
	t.listed[r.slot], t.items[r.slot] = t.listed[last], t.items[last]
	t.listed[r.slot].slot = r.slot
	t.listed[last] = nil
	t.listed, t.items = t.listed[:last], t.items[:last]
	r.slot = -1
}

// tomb marks the record of a row that is in the table no longer, for those who still queue the row.
type tomb struct{ record }

// ownLocked notes that r, an endpoint of owner, is live or not. The first and the last of a container
// show and hide the names that were made by hand for it; so may the state of its peer.
func (t *Table) ownLocked(r *row, owner string, live bool) {
	o := t.owners[owner]
	if o == nil {
		if !live {
			return
		}
		o = &ownerRows{}
		t.owners[owner] = o
	}
	before := o.endpoints
	if slices.Contains(before, r) == live {
		return
	}
	hand := make([]view, len(o.names))
	for i, n := range o.names {
		hand[i] = t.viewLocked(n)
	}
	o.endpoints = holdersWith(before, r, live)
	for i, n := range o.names {
		t.reindexLocked(n, hand[i], t.viewLocked(n))
	}
	t.tidyOwnerLocked(owner)
}

func (t *Table) tidyOwnerLocked(owner string) {
	if o := t.owners[owner]; o != nil && len(o.endpoints) == 0 && len(o.names) == 0 {
		delete(t.owners, owner)
	}
}

// ownerPresentLocked: names made by hand for a container show while the container is attached somewhere.
// Those for no container always do.
func (t *Table) ownerPresentLocked(owner string) bool {
	if isMeshOwner(owner) {
		return true
	}
	o := t.owners[owner]
	return o != nil && len(o.endpoints) > 0
}

func isMeshOwner(owner string) bool { return owner == mesh.OwnerExtern || owner == mesh.OwnerExpose }

// sendLocked queues a row for the other peers.
func (t *Table) sendLocked(r *row) {
	if !r.queued {
		r.queued = true
		t.out = append(t.out, r)
	}
	t.wakeLocked()
}

func (t *Table) wakeLocked() {
	select {
	case t.dirtied <- struct{}{}:
	default:
	}
}

// SetPeerState tells what became of a peer. It may be repeated.
func (t *Table) SetPeerState(name mesh.PeerName, state PeerState) {
	if name == t.self || name.IsZero() {
		return
	}
	t.mu.Lock()
	p := t.peerLocked(name)
	if p == nil {
		t.mu.Unlock()
		return
	}
	p.stranger = false
	p.seen = t.now
	if p.hidden && state != Suspect {
		t.offerLocked(p, true)
	}
	if p.state != state {
		p.state = state
		if state == Gone {
			t.dropPeerLocked(p)
		} else {
			// Order within answers only; what is shown stays.
			for _, r := range p.rows {
				v := t.viewLocked(r)
				t.reindexLocked(r, v, v)
				for _, n := range t.handmadeOfLocked(r) {
					v := t.viewLocked(n)
					t.reindexLocked(n, v, v)
				}
			}
		}
	}
	t.unlock()
}

// offerLocked offers the rows of a peer to others, or no longer.
func (t *Table) offerLocked(p *peer, offer bool) {
	p.hidden = !offer
	rows := p.rows
	if p.floor != nil {
		rows = append(slices.Clone(rows), p.floor)
	}
	for _, r := range rows {
		if offer {
			t.listLocked(r)
		} else {
			t.unlistLocked(r)
		}
	}
}

func (t *Table) handmadeOfLocked(r *row) []*row {
	if o := t.owners[r.rec.(*endpoint).owner]; o != nil && !isMeshOwner(r.rec.(*endpoint).owner) {
		return o.names
	}
	return nil
}

func (t *Table) dropPeerLocked(p *peer) {
	for len(p.rows) > 0 {
		t.dropLocked(p.rows[len(p.rows)-1])
	}
	if p.floor != nil {
		t.dropLocked(p.floor)
	}
}

// peerLocked returns the place of a peer, made if need be; nil if there are too many.
func (t *Table) peerLocked(name mesh.PeerName) *peer {
	p := t.peers[name]
	if p == nil {
		if len(t.peers) >= maxPeers {
			return nil
		}
		p = &peer{stranger: true, seen: t.now}
		t.peers[name] = p
	}
	return p
}

// Expire lets time pass: now must not run backwards. Call it about once a second.
func (t *Table) Expire(now time.Time) {
	t.mu.Lock()
	t.now = now
	if !t.settled && now.Sub(t.started) >= settleAfter {
		t.settleLocked()
	}
	if t.bumpTo != 0 && now.Sub(t.bumped) >= bumpEvery {
		t.bumpLocked(t.bumpTo)
	}
	for name, p := range t.peers {
		if name == t.self {
			continue
		}
		if p.state == Suspect && !p.hidden && now.Sub(p.seen) > hideAfter {
			t.offerLocked(p, false)
		}
		if p.stranger && now.Sub(p.seen) > strangerAge {
			p.state, p.stranger = Gone, false
			p.seen = now
			t.dropPeerLocked(p)
		}
		// A peer that went is remembered as long as somebody might still offer its rows.
		if p.state == Gone && now.Sub(p.seen) > time.Hour {
			delete(t.peers, name)
		}
	}
	t.expireTombstonesLocked()
	t.unlock()
}

func (t *Table) expireTombstonesLocked() {
	if t.dead == 0 {
		return
	}
	var old, dead []*row
	for _, r := range t.rows {
		for ; r != nil; r = r.next {
			h, ok := r.rec.(*handmade)
			if !ok || !h.gone {
				continue
			}
			switch age := t.now.Sub(r.since); {
			case age >= forgetAge:
				old = append(old, r)
				continue
			case age >= TombstoneAge:
				t.unlistLocked(r) // all are about to forget it
			}
			dead = append(dead, r)
		}
	}
	if over := len(dead) - maxHandmadeDead; over > 0 {
		slices.SortFunc(dead, func(a, b *row) int { return a.since.Compare(b.since) })
		old = append(old, dead[:over]...)
	}
	for _, r := range old {
		t.dropLocked(r)
	}
}

// OnChange calls fn with all present endpoints and then with every change, in order. Calls come one at a
// time from whichever goroutine made a change, no lock held; fn must not block.
func (t *Table) OnChange(fn func([]Change)) {
	t.mu.Lock()
	s := &subscriber{fn: fn}
	for _, ep := range t.endpointsLocked() {
		s.pending = append(s.pending, Change{Endpoint: ep, Up: true})
	}
	t.subscribers = append(t.subscribers, s)
	t.unlock()
}

type subscriber struct {
	fn      func([]Change)
	pending []Change
}

// unlock releases mu after a change. What subscribers have to hear is delivered here, unless another
// goroutine is at it: then that one delivers this too. Their functions run with mu released.
func (t *Table) unlock() {
	if t.telling {
		t.mu.Unlock()
		return
	}
	t.telling = true
	for again := true; again; {
		again = false
		for _, s := range t.subscribers {
			if pending := s.pending; len(pending) > 0 {
				s.pending, again = nil, true
				t.mu.Unlock()
				s.fn(pending)
				t.mu.Lock()
			}
		}
	}
	t.telling = false
	t.mu.Unlock()
}
