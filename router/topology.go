package router

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"meshd/mesh"
)

// Topology is the replicated table of peers and their links. Every peer writes its own records and
// nobody else's; of two versions of a record the later in {incarnation, run, version} stays, and records
// of a run that a later one has superseded are dropped. That is a join of semilattices, so merging
// commutes, associates and may be repeated, once it is known whose keys bear the names.
//
// Records are signed by the peer that they are about (see Keys): what somebody else says in its name is not
// taken in and not passed on. Which key bears a name is said in bears.
//
// A peer that has been unreachable for half of the time after which it is forgotten is no longer
// offered to others: by the time that one peer forgets it, nobody is left who would bring it back.
//
// All methods may be called from any goroutine; none blocks.
type Topology struct {
	self mesh.PeerName // fixed
	keys Keys

	mu      sync.Mutex
	me      Peer
	links   [][]PeerLink // own links; links[i] is page i+1
	version uint32       // the last one used
	lastID  mesh.ShortID // the last short id that we had, of an earlier run perhaps
	peers   map[mesh.PeerName]*entry
	byKey   map[uint64]*record
	changes uint64      // counts what may alter routes or states
	digests []mesh.Item // what Items last returned, by key; nil: to be made anew
	dirty   []uint64    // keys of what changed since then
	started time.Time   // the first and the last time that Reach was told
	now     time.Time
	foreign map[mesh.RunID]*foreignRun
	rival   *Epoch
}

// foreignRun is what is known of another run under our name.
type foreignRun struct {
	seen   int    // how often it outbid us
	uptime uint32 // seconds
}

// entry is all that is known of one peer.
type entry struct {
	base   *record // nil as long as only links are known
	pages  map[uint8]*record
	down   time.Time // when it was first found unreachable; zero while reachable
	known  bool      // a state has been reported
	state  PeerState
	hidden bool     // not offered to others any more
	linked bool     // there is a live link to it,
	proven [32]byte // whose handshake proved this key

	away   time.Time                   // when its bearer was first not reached; zero while it is
	rivals map[mesh.PeerName]time.Time // who has told us of another bearer, and when last
}

// Bounds on what a peer gone mad, or as many as it makes keys, can make us hold. A record takes up to 1.3 kB.
const (
	maxPeers   = 1 << 14
	maxRecords = 1 << 16 // of all peers; beyond them
	surePages  = 2       // pages of links are taken of each peer
)

// rivalProof is how often another run must outbid us before we believe that it lives: remains of an
// earlier run turn up once, or twice after a partition, but do not answer.
const rivalProof = 3

// NewTopology starts a table with the peer itself in it. Incarnation is ignored: it starts at one and
// grows when an earlier run is met. Without keys nobody else's word is taken in.
func NewTopology(self Peer, keys Keys) *Topology {
	if keys == nil {
		keys = noKeys{}
	}
	t := &Topology{
		self:    self.Name,
		keys:    keys,
		me:      self,
		peers:   map[mesh.PeerName]*entry{self.Name: {pages: map[uint8]*record{}}},
		byKey:   map[uint64]*record{},
		foreign: map[mesh.RunID]*foreignRun{},
	}
	t.me.Incarnation, t.lastID = 1, self.ShortID
	t.drawShortIDLocked()
	t.stampLocked(0)
	return t
}

// Self returns what is said of this peer.
func (t *Topology) Self() Peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.me
}

// Rival returns the epoch of another live peer that uses our name, once that is proven. The run that has
// lasted shorter is the one to find a rival; it has stopped contesting.
func (t *Topology) Rival() (Epoch, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.rival == nil {
		return Epoch{}, false
	}
	return *t.rival, true
}

// Contest makes a peer that had given way to a rival try again.
func (t *Topology) Contest() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rival = nil
	clear(t.foreign)
}

// Changes counts what may have altered routes or states of peers.
func (t *Topology) Changes() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.changes
}

// Update changes what is said of this peer and returns the deltas to broadcast, none if nothing changed.
func (t *Topology) Update(change func(*Peer)) [][]byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.me
	change(&p)
	p.Name, p.Run, p.Incarnation, p.Uptime = t.me.Name, t.me.Run, t.me.Incarnation, t.me.Uptime
	if p == t.me {
		return nil
	}
	t.me = p
	t.drawShortIDLocked()
	return pack([]*record{t.stampLocked(0)}, mesh.MaxMessage-1)
}

// SetLinks replaces this peer's own links and returns the deltas to broadcast. Links stay in the page
// that they are in, so that a change touches one page.
func (t *Topology) SetLinks(links []PeerLink) [][]byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	want := make(map[mesh.PeerName]PeerLink, len(links))
	for _, l := range links {
		if l.To != t.self && !l.To.IsZero() {
			l.RTT = RoundRTT(l.RTT)
			want[l.To] = l
		}
	}
	dirty := map[int]bool{}
	for i, page := range t.links {
		kept := make([]PeerLink, 0, len(page))
		for _, old := range page {
			l, ok := want[old.To]
			delete(want, old.To)
			if ok {
				kept = append(kept, l)
			}
			if !ok || l != old {
				dirty[i] = true
			}
		}
		t.links[i] = kept
	}
	fresh := make([]PeerLink, 0, len(want))
	for _, l := range want {
		fresh = append(fresh, l)
	}
	slices.SortFunc(fresh, func(a, b PeerLink) int { return a.To.Compare(b.To) })
	page := 0
	for _, l := range fresh {
		for page < len(t.links) && len(t.links[page]) >= linksPerPage {
			page++
		}
		if page == maxPages {
			break // 8,160 links; the rest stays unannounced
		}
		if page == len(t.links) {
			t.links = append(t.links, nil)
		}
		t.links[page] = append(t.links[page], l)
		dirty[page] = true
	}
	var out []*record
	for i, links := range t.links {
		if dirty[i] {
			slices.SortFunc(links, func(a, b PeerLink) int { return a.To.Compare(b.To) }) // spares the others sorting
			out = append(out, t.stampLocked(i+1))
		}
	}
	return pack(out, mesh.MaxMessage-1)
}

// stampLocked writes one of our own records anew, under the next version.
func (t *Topology) stampLocked(page int) *record {
	t.version++
	r := &record{
		id:      pageID{t.self, uint8(page)},
		epoch:   Epoch{t.me.Incarnation, t.me.Run},
		version: t.version,
	}
	if page == 0 {
		t.me.Uptime = t.uptimeLocked()
		r.peer = t.me
		r.body = appendPeer(nil, &t.me)
	} else {
		for i := range t.links[page-1] {
			r.body = appendLink(r.body, &t.links[page-1][i])
		}
	}
	r.sig = t.keys.Sign(r.signed())
	t.storeLocked(t.peers[t.self], r)
	return r
}

func (t *Topology) storeLocked(e *entry, r *record) {
	if r.id.page == 0 {
		if e.base == nil || e.base.epoch != r.epoch {
			for page, p := range e.pages {
				if p.epoch.Compare(r.epoch) < 0 {
					delete(e.pages, page)
					t.removeLocked(p)
				}
			}
		}
		e.base = r
	} else {
		e.pages[r.id.page] = r
	}
	key := r.id.key()
	t.byKey[key] = r
	t.dirty = append(t.dirty, key)
	t.changes++
}

// removeLocked takes a record out of the index.
func (t *Topology) removeLocked(r *record) {
	key := r.id.key()
	delete(t.byKey, key)
	t.dirty = append(t.dirty, key)
}

// Merge takes in what another peer passed on and returns what of it was new here, and what we had to
// say to it: a delta to pass on in turn, possibly larger than one message (see Split). A malformed delta
// is rejected whole; records that are not signed as they must be are left out, and then the error is a
// *mesh.Refusal.
func (t *Topology) Merge(from mesh.PeerName, delta []byte) (news []byte, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	records, err := parseNews(delta, t.recordLocked)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(records, basesFirst) // a peer's own record brings the key for its pages
	var refused mesh.Refusal
	for _, r := range records {
		if r.id.peer == t.self {
			if t.echoLocked(r) {
				continue
			}
			if t.genuineLocked(r, &refused) {
				for _, own := range t.answerLocked(r) {
					news = appendRecord(news, own)
				}
			}
			continue
		}
		if t.staleLocked(r) {
			continue
		}
		if foreign := refused.Foreign; !t.genuineLocked(r, &refused) {
			if refused.Foreign > foreign {
				t.peers[r.id.peer].rival(from, t.now)
			}
			continue
		}
		e := t.entryLocked(r.id.peer)
		if e == nil {
			continue
		}
		if r.id.page == 0 && e.base != nil && e.base.peer.Key != r.peer.Key {
			t.dropLocked(e) // the name has another bearer now
		}
		t.storeLocked(e, r)
		news = appendRecord(news, r)
		if r.id.page == 0 && r.peer.ShortID == t.me.ShortID && r.peer.ShortID != 0 && r.id.peer.Compare(t.self) < 0 {
			t.drawShortIDLocked()
			news = appendRecord(news, t.stampLocked(0))
		}
	}
	return news, refused.Err()
}

// recordLocked is the record of that name that is held; nil if none is.
func (t *Topology) recordLocked(id pageID) *record {
	switch e := t.peers[id.peer]; {
	case e == nil:
		return nil
	case id.page == 0:
		return e.base
	default:
		return e.pages[id.page]
	}
}

func basesFirst(a, b *record) int { return min(int(a.id.page), 1) - min(int(b.id.page), 1) }

// entryLocked finds or makes the entry of a peer; nil if there are too many.
func (t *Topology) entryLocked(name mesh.PeerName) *entry {
	e := t.peers[name]
	if e == nil && len(t.peers) < maxPeers {
		e = &entry{pages: map[uint8]*record{}}
		t.peers[name] = e
	}
	return e
}

// dropLocked forgets all records of a peer.
func (t *Topology) dropLocked(e *entry) {
	for _, r := range e.records() {
		t.removeLocked(r)
	}
	e.base = nil
	clear(e.pages)
	clear(e.rivals)
	t.changes++
}

// staleLocked reports whether another peer's record says nothing new. It is asked before the signature is
// looked at, so that every record is verified once however often it comes.
func (t *Topology) staleLocked(r *record) bool {
	e := t.peers[r.id.peer]
	if e == nil {
		return len(t.peers) >= maxPeers
	}
	if r.id.page == 0 {
		// Versions order the words of one key only.
		return e.base != nil && e.base.peer.Key == r.peer.Key && !r.newer(e.base)
	}
	if e.base != nil && r.epoch.Compare(e.base.epoch) < 0 {
		return true // of a run that is over
	}
	old := e.pages[r.id.page]
	if old == nil {
		return r.id.page > surePages && len(t.byKey) >= maxRecords
	}
	return !r.newer(old)
}

// echoLocked reports whether a record of our own name is our own word, or older.
func (t *Topology) echoLocked(r *record) bool {
	if c := r.epoch.Compare(Epoch{t.me.Incarnation, t.me.Run}); c != 0 {
		return c < 0
	}
	old := t.peers[t.self].base
	if r.id.page != 0 {
		old = t.peers[t.self].pages[r.id.page]
	}
	return old != nil && !r.newer(old)
}

// answerLocked deals with a record that our own key signed and that outdoes what we say: remains of an
// earlier run, or the word of a clone.
func (t *Topology) answerLocked(r *record) []*record {
	mine := Epoch{t.me.Incarnation, t.me.Run}
	switch {
	case r.epoch == mine:
		t.version = max(t.version, r.version) // a clone wrote it, or we before our clock of versions was lost
	default:
		if t.rival != nil {
			return nil
		}
		if r.epoch.Run != t.me.Run && t.secondLocked(r) {
			t.rival = &Epoch{r.epoch.Incarnation, r.epoch.Run}
			return nil
		}
		if r.epoch.Incarnation == ^uint32(0) {
			return nil // nothing beats it
		}
		t.me.Incarnation = r.epoch.Incarnation + 1
	}
	out := []*record{t.stampLocked(0)}
	if r.id.page != 0 {
		for len(t.links) < int(r.id.page) && r.epoch == mine {
			t.links = append(t.links, nil)
		}
	}
	for i := range t.links {
		out = append(out, t.stampLocked(i+1))
	}
	return out
}

// secondLocked notes that another run outbid us and reports whether it lives and came before this one.
func (t *Topology) secondLocked(r *record) bool {
	if len(t.foreign) > 64 {
		clear(t.foreign)
	}
	f := t.foreign[r.epoch.Run]
	if f == nil {
		f = &foreignRun{}
		t.foreign[r.epoch.Run] = f
	}
	f.seen++
	if r.id.page == 0 {
		f.uptime = r.peer.Uptime
	}
	mine := t.uptimeLocked()
	return f.seen >= rivalProof && (f.uptime > mine || f.uptime == mine && r.epoch.Run < t.me.Run)
}

func (t *Topology) uptimeLocked() uint32 { return uint32(t.now.Sub(t.started) / time.Second) }

// Items lists the records for anti-entropy, by key. Nobody may change the list. While much changes it is asked
// for after nearly every change, so a few changes are worked into a copy of the last list.
func (t *Topology) Items() []mesh.Item {
	t.mu.Lock()
	defer t.mu.Unlock()
	byKey := func(a, b mesh.Item) int { return cmp.Compare(a.Key, b.Key) }
	switch {
	case t.digests == nil || len(t.dirty) > len(t.digests)/8:
		out := make([]mesh.Item, 0, len(t.byKey))
		for _, r := range t.byKey {
			if !t.peers[r.id.peer].hidden {
				out = append(out, r.cachedItem())
			}
		}
		slices.SortFunc(out, byKey)
		t.digests = out
	case len(t.dirty) > 0:
		slices.Sort(t.dirty)
		out, old := make([]mesh.Item, 0, len(t.digests)+len(t.dirty)), t.digests
		for _, key := range slices.Compact(t.dirty) {
			at, found := slices.BinarySearchFunc(old, mesh.Item{Key: key}, byKey)
			out, old = append(out, old[:at]...), old[at:]
			if found {
				old = old[1:]
			}
			if r := t.byKey[key]; r != nil && !t.peers[r.id.peer].hidden {
				out = append(out, r.cachedItem())
			}
		}
		t.digests = append(out, old...)
	}
	t.dirty = t.dirty[:0]
	return t.digests
}

// Encode writes the records with those keys as deltas of at most limit bytes each.
func (t *Topology) Encode(keys []uint64, limit int) [][]byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []*record
	for _, k := range keys {
		if r := t.byKey[k]; r != nil {
			out = append(out, r)
		}
	}
	slices.SortStableFunc(out, basesFirst) // nobody understands a page without
	return pack(out, limit)
}

// Split cuts a delta between its records into deltas of at most limit bytes each.
func (t *Topology) Split(delta []byte, limit int) [][]byte {
	records, err := parseRecords(delta)
	if err != nil {
		return nil
	}
	return pack(records, limit)
}

// pack lays records into as few deltas as their order allows. One that exceeds the limit alone is left out.
func pack(records []*record, limit int) (out [][]byte) {
	var b []byte
	for _, r := range records {
		size := recordHeader + len(r.body)
		if size > limit {
			continue
		}
		if len(b) > 0 && len(b)+size > limit {
			out = append(out, b)
			b = nil
		}
		b = appendRecord(b, r)
	}
	if len(b) > 0 {
		out = append(out, b)
	}
	return out
}

// PeerView is one peer as this one knows it.
type PeerView struct {
	Peer
	State PeerState // Alive for this peer itself
	Since time.Time // unreachable since then; zero while reachable
	Links []PeerLink
}

// Peers lists all known peers, this one included, by name.
func (t *Topology) Peers() []PeerView {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]PeerView, 0, len(t.peers))
	for name, e := range t.peers {
		if e.base == nil {
			continue
		}
		v := PeerView{Peer: e.base.peer, State: Alive, Since: e.down}
		if !e.down.IsZero() {
			v.State = Suspect
		}
		for _, page := range e.livePages() {
			for l, rest := cutLink(page.body); l != nil; l, rest = cutLink(rest) {
				v.Links = append(v.Links, l.parse())
			}
		}
		if name == t.self {
			v.State = Alive
		}
		slices.SortFunc(v.Links, func(a, b PeerLink) int { return a.To.Compare(b.To) })
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b PeerView) int { return a.Name.Compare(b.Name) })
	return out
}

// Peer returns what a peer says of itself.
func (t *Topology) Peer(name mesh.PeerName) (Peer, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.peers[name]
	if e == nil || e.base == nil {
		return Peer{}, false
	}
	return e.base.peer, true
}

// records are the base and all pages.
func (e *entry) records() []*record {
	out := make([]*record, 0, 1+len(e.pages))
	if e.base != nil {
		out = append(out, e.base)
	}
	for _, p := range e.pages {
		out = append(out, p)
	}
	return out
}

// livePages are the pages of the run that the peer is in, in order.
func (e *entry) livePages() []*record {
	var out []*record
	for _, p := range e.pages {
		if e.base != nil && p.epoch == e.base.epoch {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b *record) int { return int(a.id.page) - int(b.id.page) })
	return out
}

// StateChange is news about a peer.
type StateChange struct {
	Peer  mesh.PeerName
	State PeerState
}

// Patience says how long a peer may be unreachable.
type Patience struct {
	Suspect time.Duration // before it is suspected: a link that is replaced makes no noise
	Gone    time.Duration // before it is forgotten
}

// Reach notes which peers can be reached now, forgets those that could not for too long, and returns
// whose state changed, by name. A peer is first reported when its own record is known.
func (t *Topology) Reach(now time.Time, limit Patience, reachable func(mesh.PeerName) bool) (out []StateChange) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.started.IsZero() {
		t.started = now
	}
	t.now = now
	for name, e := range t.peers {
		if name == t.self {
			continue
		}
		state, hidden := Alive, e.hidden
		reached := reachable(name)
		if reached && !t.rivalledLocked(name, e) {
			e.away = time.Time{}
		} else if e.away.IsZero() {
			e.away = now
		}
		if reached {
			e.down, e.hidden = time.Time{}, false
		} else {
			if e.down.IsZero() {
				e.down = now
			}
			e.hidden = now.Sub(e.down) > limit.Gone/2
			if !e.known || now.Sub(e.down) >= limit.Suspect {
				state = Suspect
			}
			if now.Sub(e.down) > limit.Gone {
				state = Gone
				delete(t.peers, name)
				for _, r := range e.records() {
					t.removeLocked(r)
				}
			}
		}
		if e.hidden != hidden {
			t.digests = nil
		}
		if state == e.state || e.base == nil || state == Gone && !e.known {
			continue
		}
		e.state, e.known = state, true
		out = append(out, StateChange{name, state})
	}
	slices.SortFunc(out, func(a, b StateChange) int { return a.Peer.Compare(b.Peer) })
	return out
}

// drawShortIDLocked keeps the short id that the peer has or last had, or draws one that nobody is known to
// use. The draw follows from the name, so that a restarted peer gets the same again if it is free. When two
// peers drew the same, the lower name keeps it: see Merge.
func (t *Topology) drawShortIDLocked() {
	if t.me.Flags&FlagKernel == 0 {
		t.me.ShortID = 0
		return
	}
	used := map[mesh.ShortID]bool{0: true}
	for name, e := range t.peers {
		if name != t.self && e.base != nil {
			used[e.base.peer.ShortID] = true
		}
	}
	switch {
	case !used[t.me.ShortID]:
	case !used[t.lastID]:
		t.me.ShortID = t.lastID
	case len(used) > int(mesh.MaxShortID):
		t.me.ShortID = 0 // more peers than ids: this one uses the userspace path
	default:
		for h := hash64(hashStart, t.self[:]); used[t.me.ShortID]; {
			h = mix64(h + 1)
			t.me.ShortID = mesh.ShortID(h) & mesh.MaxShortID
		}
	}
	if t.me.ShortID != 0 {
		t.lastID = t.me.ShortID
	}
}

// Roster lists what all known peers say of themselves, this one included, by name.
func (t *Topology) Roster() []Peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]Peer, 0, len(t.peers))
	for _, e := range t.peers {
		if e.base != nil {
			out = append(out, e.base.peer)
		}
	}
	slices.SortFunc(out, func(a, b Peer) int { return a.Name.Compare(b.Name) })
	return out
}
