package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"meshd/ipam/ring"
	"meshd/mesh"
)

type op byte

const (
	opAllocate op = iota
	opClaim
	opPrime
	opRemove
	opLeave
	opRepair
)

// call is one request of this host that may have to wait.
type call struct {
	op     op
	owner  string
	addr   netip.Prefix  // claim: address; allocate: subnet
	peer   mesh.PeerName // remove
	answer func(result)  // called once by the driver, outside the core's lock

	why    string // it still waits for; empty: for allocation to be ready
	number uint32 // claim: of the request under way, or 0
	tries  int    // claim: unanswered
	lost   []ring.ID
	heir   ring.ID
	gaps   bool          // repair: is of gaps in the ring
	merges bool          // and of two clusters
	taken  uint64        // and took so many addresses that were nobody's
	since  time.Duration // and when it began
}

// Holding is an address that something on this host has.
type Holding struct {
	Owner string
	Addr  netip.Prefix
}

// Collision is an address of something on this host that somebody else has as well: one of the two has
// to be renumbered.
type Collision struct {
	Holding
	With string // who has it, as far as known
}

func (c *call) String() string {
	switch c.op {
	case opAllocate:
		return "allocate" // who asks says for whom, and in a word that people know
	case opClaim:
		return "claim"
	case opRemove:
		return fmt.Sprintf("remove peer %s", c.peer)
	case opLeave:
		return "give the address space away"
	case opRepair:
		return "repair"
	}
	return "prime"
}

// start takes a new call.
func (c *core) start(call *call) {
	if err := c.checkCall(call); err != nil {
		c.reply(call, result{err: fmt.Errorf("%s: %w", call, err)})
		return
	}
	if call.op == opRemove && !c.startRemove(call) {
		return
	}
	if call.op == opLeave && !c.startLeave(call) {
		return
	}
	if call.op == opRepair && !c.startRepair(call) {
		return
	}
	if !c.attempt(call) {
		c.waiting = append(c.waiting, call)
		c.advance()
	}
}

func (c *core) checkCall(call *call) error {
	if !c.enabled() && call.op != opClaim {
		return ErrDisabled
	}
	if c.left && call.op != opLeave {
		return ErrLeft
	}
	switch call.op {
	case opAllocate:
		if call.owner == "" || strings.ContainsRune(call.owner, 0) || len(call.owner) > 512 {
			return fmt.Errorf("%w: owner %q", ErrInvalid, call.owner)
		}
		if !call.addr.IsValid() {
			call.addr = c.cfg.DefaultSubnet
		}
		return checkSubnet(c.cfg.Range, call.addr)
	case opClaim:
		if call.owner == "" || strings.ContainsRune(call.owner, 0) || len(call.owner) > 512 {
			return fmt.Errorf("%w: owner %q", ErrInvalid, call.owner)
		}
		return checkClaim(call.addr)
	}
	return nil
}

// cancel takes a waiting call out and answers it with why it has waited.
func (c *core) cancel(call *call, cause error) {
	i := slices.Index(c.waiting, call)
	if i < 0 {
		return // answered already
	}
	c.waiting = slices.Delete(c.waiting, i, i+1)
	c.reply(call, result{err: fmt.Errorf("%s: %w (%s)", call, cause, c.whyWaiting(call))})
}

func (c *core) whyWaiting(call *call) string {
	if call.why == "" {
		return c.notReady()
	}
	return call.why
}

func (c *core) tryWaiting() {
	if c.full() {
		return
	}
	kept := c.waiting[:0]
	for i, call := range c.waiting {
		if c.full() { // the others after the disk
			kept = append(kept, c.waiting[i:]...)
			break
		}
		if !c.attempt(call) {
			kept = append(kept, call)
		}
	}
	clear(c.waiting[len(kept):])
	c.waiting = kept
	for subnet, w := range c.wants {
		if w.demand && !slices.ContainsFunc(c.waiting, func(call *call) bool { return call.op == opAllocate && call.addr == subnet }) {
			delete(c.wants, subnet)
		}
	}
}

// attempt answers the call if it can be, and otherwise sets going what it needs.
func (c *core) attempt(call *call) (done bool) {
	if c.left && call.op != opLeave {
		c.reply(call, result{err: fmt.Errorf("%s: %w", call, ErrLeft)})
		return true
	}
	switch call.op {
	case opAllocate:
		return c.tryAllocate(call)
	case opClaim:
		return c.tryClaim(call)
	case opPrime:
		if c.ring.Cluster() == 0 {
			call.why = ""
			return false
		}
		c.reply(call, result{})
	case opRemove:
		return c.tryRemove(call)
	case opLeave:
		return c.tryLeave(call)
	case opRepair:
		return c.tryRepair(call)
	}
	return true
}

// hold notes an address as held and answers the call, once both are on disk.
func (c *core) hold(call *call, h *hold) {
	c.holds.add(h)
	c.dirtyHolds[h.key()] = true
	c.saved = append(c.saved, h)
	c.undo = append(c.undo, func() { c.holds.remove(h) })
	c.reply(call, result{prefix: h.addr})
}

// drop forgets a hold, once that is on disk.
func (c *core) drop(h *hold) {
	c.holds.remove(h)
	c.dirtyHolds[h.key()] = true
	c.undo = append(c.undo, func() {
		if h.in && c.holds.byOff[h.off] != nil {
			return // found running meanwhile, which no failed write undoes (reclaim)
		}
		c.holds.add(h)
	})
}

func (c *core) tryAllocate(call *call) bool {
	subnet := call.addr
	old := c.holds.inSubnet(call.owner, subnet)
	if h := old; h != nil {
		switch h.state {
		case held:
			c.reply(call, result{prefix: h.addr})
			return true
		case contest:
			call.why = fmt.Sprintf("its address %s is being asked back: %s", h.addr, c.whyContest(h))
			return false
		}
	}
	if !c.ready {
		call.why = ""
		return false
	}
	off, ok := c.lowestFree(subnet)
	if !ok {
		return c.wantSpace(call)
	}
	if old != nil {
		c.drop(old) // somebody else has that one for good
	}
	addr := netip.PrefixFrom(c.ring.Addr(off), subnet.Bits())
	c.hold(call, &hold{owner: call.owner, addr: addr, off: off, in: true})
	c.prefetch(subnet)
	return true
}

// usable is the offsets of a subnet that containers may have: all but the network's own address and,
// in IPv4, the broadcast address.
func (c *core) usable(subnet netip.Prefix) (lo, hi uint64) {
	lo, hi = c.offsets(subnet)
	if subnet.Addr().Is4() {
		hi--
	}
	return lo + 1, hi
}

func (c *core) offsets(subnet netip.Prefix) (lo, hi uint64) {
	lo, _ = c.ring.Offset(subnet.Addr())
	return lo, lo + ring.Size(subnet)
}

func (c *core) lowestFree(subnet netip.Prefix) (off uint64, ok bool) {
	lo, hi := c.usable(subnet)
	for _, s := range c.space {
		if off, ok := c.holds.used.nextFree(max(lo, s.lo), min(hi, s.hi)); ok {
			return off, true
		}
	}
	return 0, false
}

// freeIn is how many addresses of ours in [lo, hi) are free.
func (c *core) freeIn(lo, hi uint64) (n uint64) {
	for _, s := range c.space {
		if a, b := max(lo, s.lo), min(hi, s.hi); a < b {
			n += b - a - c.holds.used.countIn(a, b)
		}
	}
	return n
}

// hasFree reports whether at least want addresses of ours in [lo, hi) are free. However many are used, it
// takes no more steps than that.
func (c *core) hasFree(lo, hi, want uint64) bool {
	for _, s := range c.space {
		for off, end := max(lo, s.lo), min(hi, s.hi); want > 0; want-- {
			free, ok := c.holds.used.nextFree(off, end)
			if !ok {
				break
			}
			off = free + 1
		}
	}
	return want == 0
}

func (c *core) ours(off uint64) bool {
	i, found := slices.BinarySearchFunc(c.space, off, func(s span, off uint64) int {
		if s.hi <= off {
			return -1
		}
		if s.lo > off {
			return 1
		}
		return 0
	})
	return found && i < len(c.space)
}

func (c *core) tryClaim(call *call) bool {
	off, in := c.offset(call.addr.Addr())
	if h := c.holds.find(call.owner, call.addr.Addr()); h != nil {
		switch h.state {
		case held:
			c.reply(call, result{prefix: h.addr})
			return true
		case contest:
			call.why = "it is being asked for: " + c.whyContest(h)
			return false
		}
		c.reply(call, result{err: fmt.Errorf("%s: %w by %s", call, ErrTaken, h.rival)})
		return true
	}
	if !in {
		c.hold(call, &hold{owner: call.owner, addr: call.addr})
		return true
	}
	if err := c.claimInside(call.addr); err != nil {
		c.reply(call, result{err: fmt.Errorf("%s: %w", call, err)})
		return true
	}
	if h := c.holds.byOff[off]; h != nil {
		c.reply(call, result{err: fmt.Errorf("%s: %w by %.12s on this host", call, ErrTaken, h.owner)})
		return true
	}
	if !c.serving || !c.liveKnown {
		call.why = ""
		return false
	}
	if c.ours(off) {
		c.hold(call, &hold{owner: call.owner, addr: call.addr, off: off, in: true})
		return true
	}
	if call.tries >= claimTries {
		c.reply(call, result{err: fmt.Errorf("%s: %w: it belongs to peer %s, which does not answer", call, ErrTaken, c.ring.At(off).Owner.Peer)})
		return true
	}
	if call.number == 0 {
		call.why, call.number = c.askExact(off, &ask{call: call})
	}
	return false
}

// claimInside says why an address of the range cannot be claimed with this length.
func (c *core) claimInside(p netip.Prefix) error {
	if p.Addr().BitLen()-p.Bits() < 2 {
		return fmt.Errorf("%w: %s: a subnet has at least 4 addresses", ErrInvalid, p)
	}
	return nil
}

// release frees the owner's address, or all of them if the address is invalid. It needs no network.
func (c *core) release(owner string, addr netip.Addr) {
	for _, h := range slices.Clone(c.holds.byOwner[owner]) {
		if !addr.IsValid() || h.addr.Addr() == addr {
			c.drop(h)
		}
	}
	if len(c.waiting) > 0 {
		c.tryWaiting()
	}
}

// reclaim takes all that runs on this host, found without our help, and returns what cannot be right. Before
// the first time nothing was given out that may be missing in the list, so that a hold which it contradicts
// is a mistake. Later a hold may be newer than the list, and stays.
func (c *core) reclaim(live []Holding) (bad []Collision) {
	type use struct {
		owner string
		addr  netip.Addr
	}
	running := make(map[use]bool, len(live))
	for _, l := range live {
		running[use{l.Owner, l.Addr.Addr()}] = true
	}
	for _, l := range live {
		if c.holds.find(l.Owner, l.Addr.Addr()) != nil {
			continue
		}
		if err := checkClaim(l.Addr); err != nil || l.Owner == "" {
			bad = append(bad, Collision{l, fmt.Sprint(err)})
			continue
		}
		h := &hold{owner: l.Owner, addr: l.Addr, saved: true} // in use, whatever the disk says
		h.off, h.in = c.offset(l.Addr.Addr())
		if h.in {
			other := c.holds.byOff[h.off]
			if other != nil && !running[use{other.owner, other.addr.Addr()}] && !c.liveKnown {
				c.drop(other) // a write that failed, and was not acknowledged, may have reached the disk
				other = nil
			}
			if other != nil {
				bad = append(bad, Collision{l, other.owner + " on this host"})
				continue
			}
			if !c.ours(h.off) {
				h.state = contest
			}
		}
		c.holds.add(h)
		c.dirtyHolds[h.key()] = true
	}
	c.liveKnown = true
	c.advance()
	return bad
}

// judgeHolds compares every hold with what is ours by the ring.
func (c *core) judgeHolds() {
	for off, h := range c.holds.byOff {
		switch mine := c.ours(off); {
		case mine && h.state != held:
			c.holds.set(h, held)
			h.number, h.rival = 0, ""
		case !mine && h.state == held:
			c.holds.set(h, contest)
			h.number = 0
		}
	}
}

// collisions lists the holds that somebody else has.
func (c *core) collisions() (out []Collision) {
	for _, h := range c.holds.byOff {
		if h.state == collided {
			out = append(out, Collision{Holding{h.owner, h.addr}, h.rival})
		}
	}
	slices.SortFunc(out, func(a, b Collision) int { return a.Addr.Addr().Compare(b.Addr.Addr()) })
	return out
}
