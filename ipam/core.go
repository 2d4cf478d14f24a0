package ipam

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"meshd/ipam/election"
	"meshd/ipam/ring"
	"meshd/mesh"
)

// core is the allocator without goroutines, disk and network: calls, messages, peer states and ticks go
// in, each with the time, and effects come out. The driver (Run, or the simulation) does
//
//	core.call / message / peerState / tick   any number of them, but stop once core.full()
//	kv := core.begin(); err := store.PutAll(kv)
//	effects := core.settle(err)              which are then performed
//	core.again()                             and if so, once more from begin
//
// so that nothing is answered or sent before what it rests on is on disk. If the write fails, the
// changes are undone, what would have been answered with success is answered with the error, and
// nothing is sent; every key that the failed write may have left on disk is written again next time.
type core struct {
	cfg  Config
	rand *rand.Rand
	log  *slog.Logger

	ring      *ring.Ring
	seenGen   uint64 // generation of the ring that ringChanged has looked at
	me        ring.ID
	fresh     bool // this life has not joined yet
	restarted bool // this life had joined before this process started
	left      bool

	clock time.Time     // of the last event
	now   time.Duration // since the start, not counting jumps of the clock
	birth time.Duration // when this life began

	holds *holds
	space []span // what is ours, sorted
	peers map[mesh.PeerName]*peer

	waiting []*call
	wants   map[netip.Prefix]*want
	asks    map[uint32]*ask
	number  uint32
	granted map[mesh.PeerName]*grantMade

	answered           map[mesh.PeerName]bool // whose view of us equals ours, in this life
	comparedAt         time.Duration
	founded            bool // by us: nobody else can know better
	liveKnown          bool
	serving, ready     bool
	servingAt          time.Duration
	voter              *election.Voter
	attemptAt          time.Duration
	quorum             int
	filling            int              // calls that wait for gaps in the ring to be filled
	acked              map[ring.ID]bool // whose addresses are frozen: we told a colleague what we know
	losses             map[ring.ID]*loss
	toldLost           map[ring.ID]bool  // of whom Config.Lost has been told, or need not be
	strays             map[ring.ID]int   // for how many looks one who left has owned something
	past               map[uint64]uint64 // clusters that we left, and for which one
	strangers          map[mesh.PeerName]stranger
	orphanAt, noticeAt time.Duration
	collectedAt        time.Duration // when the losses were looked at,
	collectedGen       uint64        // at which generation of the ring
	answersNew         bool          // and whether there was an answer since

	meta       map[string][]byte // as it should be on disk
	dirtyMeta  map[string]bool
	dirtyHolds map[string]bool
	urgent     bool // the ring has to be on disk before the effects
	savedAt    time.Duration
	writing    map[string]map[string][]byte // between begin and settle
	write      *ownWrite
	more       bool // advance is to be called once more, now that the own write is done
	undo       []func()
	saved      []*hold
	out        []effect
	diskErr    error
}

type span struct{ lo, hi uint64 }

// peer is what we know of another peer apart from the ring.
type peer struct {
	state    PeerState
	since    time.Duration // when the state last became or ceased to be Alive
	life     uint32
	heard    bool
	ringed   bool // has said that it has a ring of our range
	voter    bool
	claiming bool
	fills    bool   // has said so since we began to
	free     uint64 // as it last said
	knowFree bool
}

// stranger is a peer that we cannot share a ring with.
type stranger struct {
	Range   netip.Prefix // theirs, if that is the trouble
	Cluster uint64       // theirs
}

// ownWrite is a change of the ring that only we may make. It is on disk before it is in our own ring,
// and in the ring before anybody hears of it.
type ownWrite struct {
	delta  ring.Delta
	done   func()          // after it is in the ring; may add effects
	failed func(err error) // instead
}

// effect is one thing to do after the disk.
type effect struct {
	to        mesh.PeerName // with msg
	msg       []byte
	broadcast []byte        // a ring delta
	lost      mesh.PeerName // to tell Config.Lost of
	call      *call         // with res: answer it
	res       result
}

type result struct {
	prefix   netip.Prefix
	n        int
	repaired Repaired
	err      error
}

// Buckets and keys of the state file.
const (
	bucketMeta = "ipam"
	bucketRing = "ipam.ring"
	bucketHeld = "ipam.held"

	metaRange     = "range"
	metaName      = "name"
	metaLife      = "life"
	metaCluster   = "cluster"
	metaSuccessor = "successor"
	metaElection  = "election"
	metaWrite     = "write"  // the last own write, until the ring's own keys hold it
	metaAcked     = "acked/" // + id: see core.acked
	metaPast      = "past/"  // + cluster: the one that followed
	metaLeft      = "left"
)

// newCore reads the state. The store may fail; it is never taken for empty.
func newCore(cfg Config, r *ring.Ring, rnd *rand.Rand) (*core, error) {
	c := &core{cfg: cfg, rand: rnd, log: cfg.Log, ring: r, holds: newHolds(), peers: make(map[mesh.PeerName]*peer),
		wants: make(map[netip.Prefix]*want), asks: make(map[uint32]*ask), granted: make(map[mesh.PeerName]*grantMade),
		answered: make(map[mesh.PeerName]bool), acked: make(map[ring.ID]bool), losses: make(map[ring.ID]*loss), toldLost: make(map[ring.ID]bool), strays: make(map[ring.ID]int),
		past: make(map[uint64]uint64), strangers: make(map[mesh.PeerName]stranger),
		meta: make(map[string][]byte), dirtyMeta: make(map[string]bool), dirtyHolds: make(map[string]bool),
		liveKnown: !cfg.WaitForLive, number: rnd.Uint32(), me: ring.ID{Peer: cfg.Name}}
	if err := c.load(); err != nil {
		return nil, fmt.Errorf("ipam: %w", err)
	}
	c.voter = election.New(cfg.Name, cfg.Init.Mode == Consensus, ring.AppendID(nil, c.me))
	if state := c.meta[metaElection]; state != nil {
		if err := c.voter.Restore(state); err != nil {
			return nil, fmt.Errorf("ipam: state of the election: %w", err)
		}
	}
	c.restarted = c.ring.Member(c.me).Flags&ring.Joined != 0
	c.fresh = !c.restarted
	c.seenGen = c.ring.Generation()
	for _, m := range c.ring.Members() { // removed before this start: what they announced since then is theirs
		c.toldLost[m.ID] = m.Fenced()
	}
	c.space = c.ownSpans()
	c.judgeHolds()
	return c, nil
}

func (c *core) enabled() bool { return c.cfg.Range.IsValid() }

func (c *core) load() error {
	meta, err := c.cfg.Store.All(bucketMeta)
	if err != nil {
		return err
	}
	tokens, err := c.cfg.Store.All(bucketRing)
	if err != nil {
		return err
	}
	held, err := c.cfg.Store.All(bucketHeld)
	if err != nil {
		return err
	}
	maps.Copy(c.meta, meta)
	if c.enabled() {
		if err := c.loadRing(tokens); err != nil {
			return err
		}
	}
	for key := range held {
		h, ok := parseHoldKey(key)
		if !ok {
			return fmt.Errorf("a held address cannot be read: %q", key)
		}
		h.off, h.in = c.offset(h.addr.Addr())
		c.holds.add(h)
	}
	return nil
}

func (c *core) loadRing(tokens map[string][]byte) error {
	if c.meta[metaLife] == nil {
		if len(tokens) > 0 || len(c.meta) > 0 {
			return fmt.Errorf("the state file holds a ring without an owner")
		}
		c.setMeta(metaRange, []byte(c.cfg.Range.String()))
		c.setMeta(metaName, []byte(c.cfg.Name.String()))
		c.setLife(c.newNumber())
		return nil
	}
	for key, want := range map[string]string{metaRange: c.cfg.Range.String(), metaName: c.cfg.Name.String()} {
		if got := string(c.meta[key]); got != want {
			return fmt.Errorf("%w: its %s is %s, not %s (reset first)", ErrChanged, key, got, want)
		}
	}
	life, ok1 := u64(c.meta[metaLife])
	cluster, ok2 := u64(c.meta[metaCluster])
	successor, ok3 := u64(c.meta[metaSuccessor])
	if !ok1 || !ok2 || !ok3 {
		return fmt.Errorf("the state file's numbers cannot be read")
	}
	c.me.Life = uint32(life)
	r, err := ring.Load(c.cfg.Range, cluster, successor, tokens)
	if err != nil {
		return err
	}
	*c.ring = *r
	if w := c.meta[metaWrite]; len(w) > 0 {
		d, err := ring.ParseDelta(w)
		if err == nil {
			_, err = c.ring.Merge(d, nil)
		}
		if err != nil {
			return fmt.Errorf("the last change of the ring: %w", err)
		}
		c.setMeta(metaWrite, nil)
	}
	for key, v := range c.meta {
		if raw, err := hex.DecodeString(trim(key, metaAcked)); err == nil && len(raw) == 10 {
			c.acked[ring.ParseID(raw)] = true
		}
		if old, err := strconv.ParseUint(trim(key, metaPast), 16, 64); err == nil {
			c.past[old], _ = u64(v)
		}
	}
	c.left = c.meta[metaLeft] != nil
	if c.left {
		c.left = false
		c.setMeta(metaLeft, nil)
		c.newLife("it had given its addresses away")
	}
	return nil
}

// trim returns what follows the prefix, or something that is no hexadecimal number.
func trim(key, prefix string) string {
	if len(key) > len(prefix) && key[:len(prefix)] == prefix {
		return key[len(prefix):]
	}
	return "-"
}

func u64(b []byte) (uint64, bool) {
	if len(b) == 0 {
		return 0, true
	}
	if len(b) != 8 {
		return 0, false
	}
	return binary.BigEndian.Uint64(b), true
}

func putU64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

func (c *core) setMeta(key string, value []byte) {
	if value == nil {
		delete(c.meta, key)
	} else {
		c.meta[key] = value
	}
	c.dirtyMeta[key] = true
}

func (c *core) newNumber() uint32 {
	for {
		if n := c.rand.Uint32(); n != 0 {
			return n
		}
	}
}

func (c *core) setLife(life uint32) {
	c.me.Life = life
	c.setMeta(metaLife, putU64(uint64(life)))
	if c.voter != nil { // its card bears the life
		state := c.voter.State()
		c.voter = election.New(c.cfg.Name, c.cfg.Init.Mode == Consensus, ring.AppendID(nil, c.me))
		if err := c.voter.Restore(state); err != nil {
			panic("ipam: our own election state: " + err.Error())
		}
	}
}

// newLife gives up all claim to space under the present life and goes on under another. What runs here
// keeps its addresses and is asked back one by one.
func (c *core) newLife(why string) {
	old := c.me
	c.setLife(c.newNumber())
	c.log.Warn("this peer's address space is no longer its own; it goes on under a new life and asks for the addresses of what runs here",
		"why", why, "old", old, "new", c.me)
	c.birth, c.founded, c.restarted, c.serving, c.ready = c.now, false, false, false, false
	clear(c.answered)
	clear(c.losses)
	c.thaw() // nobody counts on what the old life said
	c.space = nil
	c.judgeHolds()
}

// offset is the place of an address in our range.
func (c *core) offset(a netip.Addr) (uint64, bool) {
	if !c.enabled() || !c.cfg.Range.Contains(a) {
		return 0, false
	}
	return c.ring.Offset(a)
}

func (c *core) at(t time.Time) {
	if !c.clock.IsZero() {
		// A suspended or stepped clock must not make anybody look long gone.
		c.now += min(max(t.Sub(c.clock), 0), 2*time.Second)
	}
	c.clock = t
}

func (c *core) peer(name mesh.PeerName) *peer {
	p := c.peers[name]
	if p == nil {
		p = &peer{since: c.now}
		c.peers[name] = p
	}
	return p
}

func (c *core) alive(name mesh.PeerName) bool {
	p := c.peers[name]
	return name == c.cfg.Name || p != nil && p.state == Alive
}

func (c *core) alivePeers() (out []mesh.PeerName) {
	for name, p := range c.peers {
		if p.state == Alive {
			out = append(out, name)
		}
	}
	slices.SortFunc(out, mesh.PeerName.Compare) // so that a seed means one run
	return out
}

// activeMembers are the members that count, this peer left out.
func (c *core) activeMembers() (out []ring.ID) {
	for _, m := range c.ring.Members() {
		if m.Active() && m.ID != c.me {
			out = append(out, m.ID)
		}
	}
	return out
}

// peerState notes what the membership room says.
func (c *core) peerState(name mesh.PeerName, s PeerState, t time.Time) {
	c.at(t)
	if name == c.cfg.Name || !c.enabled() {
		return
	}
	p := c.peer(name)
	if (p.state == Alive) != (s == Alive) {
		p.since = c.now
	}
	was := p.state
	p.state = s
	if s == Alive && was != Alive {
		c.send(name, c.compare(nil, 0)) // hello
	}
	if s != Alive {
		delete(c.answered, name)
		c.dropAsks(name)
		p.fills = false
	}
	if s == Gone {
		delete(c.strangers, name)
	}
	c.advance()
}

func (c *core) tick(t time.Time) {
	c.at(t)
	if !c.enabled() {
		return
	}
	c.expireAsks()
	c.advance()
}

// advance moves on everything that is under way.
func (c *core) advance() {
	if !c.enabled() {
		return
	}
	c.ringChanged()
	c.found()
	c.join()
	c.attach()
	c.chase()
	c.handleLosses()
	c.tryWaiting()
}

// full reports that the batch has to end: an own write is to be on disk before anything else looks at
// the ring.
func (c *core) full() bool { return c.write != nil }

// begin returns what has to be written before the effects may happen; nil is nothing.
func (c *core) begin() map[string]map[string][]byte {
	if len(c.dirtyMeta)+len(c.dirtyHolds) == 0 && c.write == nil && !c.urgent && c.now-c.savedAt < time.Second {
		return nil
	}
	kv := make(map[string]map[string][]byte)
	if c.enabled() {
		if got, _ := u64(c.meta[metaCluster]); got != c.ring.Cluster() {
			c.setMeta(metaCluster, putU64(c.ring.Cluster()))
		}
		if got, _ := u64(c.meta[metaSuccessor]); got != c.ring.Successor() {
			c.setMeta(metaSuccessor, putU64(c.ring.Successor()))
		}
		if changes := c.ring.Changes(); len(changes) > 0 {
			kv[bucketRing] = changes
		}
	}
	if c.write != nil {
		c.setMeta(metaWrite, c.write.delta.Append(nil))
	} else if c.enabled() && c.meta[metaWrite] != nil {
		c.setMeta(metaWrite, nil) // the ring's keys say it now
	}
	if len(c.dirtyMeta) > 0 {
		m := make(map[string][]byte, len(c.dirtyMeta))
		for key := range c.dirtyMeta {
			m[key] = c.meta[key]
		}
		kv[bucketMeta] = m
	}
	if len(c.dirtyHolds) > 0 {
		m := make(map[string][]byte, len(c.dirtyHolds))
		for key := range c.dirtyHolds {
			m[key] = nil
			if c.holds.byKey[key] != nil {
				m[key] = []byte{}
			}
		}
		kv[bucketHeld] = m
	}
	clear(c.dirtyMeta)
	clear(c.dirtyHolds)
	c.urgent, c.savedAt = false, c.now
	if len(kv) == 0 {
		return nil
	}
	c.writing = kv
	return kv
}

// settle takes the outcome of the write and returns what may now be done.
func (c *core) settle(err error) []effect {
	if err != nil {
		c.settleFailed(err)
	} else {
		c.settleSaved()
	}
	out := c.out
	c.writing, c.undo, c.saved, c.out = nil, nil, nil, nil
	return out
}

// again goes on after an own write; it reports whether there is something to do.
func (c *core) again() bool {
	if !c.more {
		return false
	}
	c.more = false
	c.advance()
	return true
}

func (c *core) settleSaved() {
	if c.diskErr != nil && c.writing != nil {
		c.log.Info("the state file can be written again")
		c.diskErr = nil
	}
	for _, h := range c.saved {
		h.saved = true
	}
	if w := c.write; w != nil {
		c.write = nil
		if _, err := c.ring.Merge(w.delta, nil); err != nil {
			panic("ipam: our own change of the ring: " + err.Error())
		}
		c.space = c.ownSpans() // changed by ourselves: nobody took it
		w.done()
		c.more = true
	}
}

func (c *core) settleFailed(err error) {
	if c.diskErr == nil {
		c.log.Error("the state file cannot be written: addresses are refused until it can", "err", err)
	}
	c.diskErr = err
	for _, undo := range slices.Backward(c.undo) {
		undo()
	}
	for bucket, kv := range c.writing {
		for key := range kv {
			switch bucket {
			case bucketMeta:
				c.dirtyMeta[key] = true
			case bucketHeld:
				c.dirtyHolds[key] = true
			}
		}
		if bucket == bucketRing {
			c.ring.Retry(kv)
		}
	}
	kept := c.out[:0]
	for _, e := range c.out {
		if e.call == nil {
			continue // they will ask again
		}
		if e.res.err == nil {
			e.res = result{err: err}
		}
		kept = append(kept, e)
	}
	c.out = kept
	if w := c.write; w != nil {
		c.write = nil
		delete(c.meta, metaWrite)
		c.dirtyMeta[metaWrite] = true
		if w.failed != nil {
			w.failed(err)
		}
	}
}

// reply answers a call once the disk has what it rests on.
func (c *core) reply(call *call, res result) {
	if call.gaps {
		c.filling--
	}
	c.out = append(c.out, effect{call: call, res: res})
}

func (c *core) send(to mesh.PeerName, m *message) {
	m.rng, m.cluster, m.life = c.cfg.Range, c.ring.Cluster(), c.me.Life
	if c.cfg.Init.Mode == Consensus {
		m.flags |= flagVoter
	}
	if len(c.holds.contest) > 0 {
		m.flags |= flagClaiming
	}
	if c.filling > 0 {
		m.flags |= flagFills
	}
	c.out = append(c.out, effect{to: to, msg: m.append(nil)})
}

// broadcast tells everybody a part of the ring. Whoever misses it gets it by comparing tables.
func (c *core) broadcast(d ring.Delta) {
	for _, part := range d.Split(maxBody) {
		c.out = append(c.out, effect{broadcast: part})
	}
}

func (c *core) sendFacts(to mesh.PeerName, d ring.Delta, flags byte) {
	parts := d.Split(deltaLimit)
	for _, part := range parts[:min(len(parts), 16)] { // the rest comes by comparing tables
		c.send(to, &message{kind: kindFacts, flags: flags, rest: part})
	}
}

// learn merges facts of our own making, which are not exclusive, and tells everybody.
func (c *core) learn(d ring.Delta) {
	news, err := c.ring.Merge(d, nil)
	if err != nil {
		c.log.Error("the ring takes no more", "err", err)
		return
	}
	if !news.Empty() {
		c.urgent = true
		c.broadcast(news)
	}
}

func (c *core) delta(members ...ring.Member) ring.Delta {
	return ring.Delta{Cluster: c.ring.Cluster(), Range: c.cfg.Range, Members: members}
}

func (c *core) thaw() {
	for id := range c.acked {
		c.setMeta(metaAcked+hex.EncodeToString(ring.AppendID(nil, id)), nil)
	}
	clear(c.acked)
}

// frozen reports whether somebody who is to take this owner's addresses builds on what we said of them.
func (c *core) frozen(owner ring.ID) bool { return c.acked[owner] && !c.winner(owner).IsZero() }

// message takes one message from another peer.
func (c *core) message(from mesh.PeerName, b []byte, t time.Time) {
	c.at(t)
	if !c.enabled() || from == c.cfg.Name {
		return
	}
	m, err := parseMessage(b)
	if err != nil {
		c.log.Debug("bad message", "peer", from, "err", err)
		return
	}
	p := c.peer(from)
	p.heard, p.life, p.voter, p.claiming = true, m.life, m.flags&flagVoter != 0, m.flags&flagClaiming != 0
	p.fills = p.fills || m.flags&flagFills != 0 // messages overtake each other
	p.ringed = m.cluster != 0 && m.rng == c.cfg.Range
	if m.kind == kindNotice {
		c.heedNotice(m)
		return
	}
	if !c.sameWorld(from, m) {
		return
	}
	switch m.kind {
	case kindCompare:
		c.answerCompare(from, m)
	case kindCompared:
		c.noteCompared(from, m)
	case kindFacts:
		c.heedFacts(from, m)
	case kindRequest:
		c.answerRequest(from, m)
	case kindGrant, kindRefuse:
		c.heedAnswer(from, m)
	case kindVote:
		c.heedVote(from, m)
	case kindFound:
		c.foundBySeed()
		c.wantElection()
	}
	c.advance()
}

// sameWorld reports whether the sender's range and cluster are ours, and sees to it that both sides
// hear of it if they are not.
func (c *core) sameWorld(from mesh.PeerName, m *message) bool {
	var odd stranger
	switch mine := c.ring.Cluster(); {
	case m.rng != c.cfg.Range:
		odd = stranger{Range: m.rng, Cluster: m.cluster}
	case mine != 0 && m.cluster != 0 && m.cluster != mine:
		odd = stranger{Cluster: m.cluster}
	default:
		delete(c.strangers, from)
		return true
	}
	c.noteStranger(from, odd)
	if to, ok := c.past[m.cluster]; ok {
		c.send(from, &message{kind: kindNotice, old: m.cluster, to: to})
	} else if m.kind != kindCompared {
		c.send(from, &message{kind: kindCompared}) // so that they see whom they talk to
	}
	c.advance()
	return false
}

// strangeDelta hears that the gossip room could not merge what a peer passed on.
func (c *core) strangeDelta(from mesh.PeerName, d ring.Delta) {
	if _, past := c.past[d.Cluster]; past || !c.enabled() || c.ring.Accepts(d.Cluster, d.Range) == nil {
		return
	}
	if d.Range != c.cfg.Range {
		c.noteStranger(from, stranger{Range: d.Range, Cluster: d.Cluster})
	} else {
		c.noteStranger(from, stranger{Cluster: d.Cluster})
	}
}

func (c *core) noteStranger(from mesh.PeerName, odd stranger) {
	if c.strangers[from] == odd {
		return
	}
	c.strangers[from] = odd
	if odd.Range.IsValid() {
		c.log.Error("a peer has another address range: no addresses are shared with it", "peer", from, "range", odd.Range, "ours", c.cfg.Range)
	} else {
		c.log.Error("a peer belongs to another cluster: addresses may be doubled; both go on with their own (see meshctl ipam repair)",
			"peer", from, "cluster", hex64(odd.Cluster), "ours", hex64(c.ring.Cluster()))
	}
}

func hex64(v uint64) string { return fmt.Sprintf("%016x", v) }
