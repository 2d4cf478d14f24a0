package ipam

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"meshd/ipam/ring"
	"meshd/mesh"
)

// Allocator is address management on this host. Its methods may be called from any goroutine, once Run
// is running; those with a context wait for as long as that allows, and their error then says for whom
// they waited and why. Callers must not be the goroutine that runs Run.
type Allocator struct {
	cfg   Config
	table *Table

	core *core // guarded by table.mu; between begin and settle only Run changes it

	events  chan event
	wake    chan struct{} // the ring or a peer's state has changed
	stopped chan struct{}
	dropped atomic.Uint64

	statesMu sync.Mutex // guards states
	states   []peerStateChange
}

// event is one thing for the core, handled on Run's goroutine with the lock held.
type event func(c *core, now time.Time)

type peerStateChange struct {
	peer  mesh.PeerName
	state PeerState
}

// Limits of the queue to Run. Messages beyond messageQueue are dropped, as the network might have done.
const (
	eventQueue   = 2048
	messageQueue = 1024
	maxBatch     = 512 // events in one write to disk

	// After its context has ended a call waits this long for the reason; only a hanging disk takes longer.
	diskPatience = 2 * time.Second
)

// New reads the state and starts nothing.
func New(cfg Config) (*Allocator, error) {
	cfg, err := cfg.check()
	if err != nil {
		return nil, err
	}
	if cfg.Store == nil || cfg.Network == nil {
		return nil, errors.New("ipam: no store or no network")
	}
	r := ring.New(cfg.Range)
	c, err := newCore(cfg, r, rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())))
	if err != nil {
		return nil, err
	}
	a := &Allocator{cfg: cfg, table: &Table{ring: r}, core: c,
		events: make(chan event, eventQueue), wake: make(chan struct{}, 1), stopped: make(chan struct{})}
	a.table.changed = a.rouse
	a.table.stranger = func(from mesh.PeerName, d ring.Delta) {
		a.offer(func(c *core, _ time.Time) { c.strangeDelta(from, d) })
	}
	if c.enabled() {
		a.table.frozen = c.frozen
	}
	return a, nil
}

// Table is what the gossip room spreads on mesh.ChanRing.
func (a *Allocator) Table() *Table { return a.table }

func (a *Allocator) rouse() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// offer queues an event that may be lost.
func (a *Allocator) offer(e event) {
	if len(a.events) < messageQueue {
		select {
		case a.events <- e:
			return
		default:
		}
	}
	a.dropped.Add(1)
}

// queue queues an event that must not be lost.
func (a *Allocator) queue(ctx context.Context, e event) error {
	select {
	case a.events <- e:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-a.stopped:
		return ErrStopped
	}
}

// Message takes a message that came on mesh.ChanAddresses; it copies it and never blocks.
func (a *Allocator) Message(from mesh.PeerName, msg []byte) {
	msg = slices.Clone(msg)
	a.offer(func(c *core, now time.Time) { c.message(from, msg, now) })
}

// SetPeerState notes what the membership room says of a peer. It never blocks.
func (a *Allocator) SetPeerState(p mesh.PeerName, s PeerState) {
	a.statesMu.Lock()
	a.states = append(a.states, peerStateChange{p, s})
	a.statesMu.Unlock()
	a.rouse()
}

// Run does the work until the context ends. It returns nil then, and calls that still wait get ErrStopped.
func (a *Allocator) Run(ctx context.Context) error {
	defer close(a.stopped)
	tick := time.NewTicker(tickInterval)
	defer tick.Stop()
	for {
		first := func(c *core, now time.Time) { c.tick(now) }
		select {
		case <-ctx.Done():
			a.stop()
			return nil
		case e := <-a.events:
			first = e
		case <-a.wake:
			first = a.peerStates
		case <-tick.C:
		}
		a.batch(first)
	}
}

// peerStates handles what SetPeerState has left, and whatever else is under way.
func (a *Allocator) peerStates(c *core, now time.Time) {
	a.statesMu.Lock()
	changes := a.states
	a.states = nil
	a.statesMu.Unlock()
	for _, ch := range changes {
		c.peerState(ch.peer, ch.state, now)
	}
	c.tick(now)
}

// batch hands the event and whatever else is queued to the core, and then does what came out of it, with
// one write to disk for all of them.
func (a *Allocator) batch(e event) {
	a.table.mu.Lock()
	for n := 0; ; {
		e(a.core, time.Now())
		if n++; n == maxBatch || a.core.full() {
			break
		}
		select {
		case e = <-a.events:
			continue
		default:
		}
		break
	}
	for more := true; more; more = a.core.again() {
		kv := a.core.begin()
		a.table.mu.Unlock()
		var err error
		if kv != nil {
			err = a.cfg.Store.PutAll(kv)
		}
		a.table.mu.Lock()
		effects := a.core.settle(err)
		a.table.mu.Unlock()
		a.perform(effects)
		a.table.mu.Lock()
	}
	a.table.mu.Unlock()
}

func (a *Allocator) perform(effects []effect) {
	for _, e := range effects {
		switch {
		case e.call != nil:
			e.call.answer(e.res)
		case !e.lost.IsZero():
			a.cfg.Lost(e.lost)
		case e.broadcast != nil:
			a.cfg.Network.Broadcast(mesh.ChanRing, e.broadcast)
		default:
			if err := a.cfg.Network.Send(e.to, mesh.ChanAddresses, e.msg); err != nil {
				a.cfg.Log.Debug("message not sent", "peer", e.to, "err", err)
			}
		}
	}
}

// stop answers what still waits, and what is queued, with ErrStopped.
func (a *Allocator) stop() {
	a.table.mu.Lock()
	a.core.failWaiting()
	effects := a.core.out
	a.core.out = nil
	a.table.mu.Unlock()
	for _, e := range effects {
		if e.call != nil && e.res.err != nil {
			e.call.answer(e.res)
		}
	}
}

// do runs a call to its end.
func (a *Allocator) do(ctx context.Context, call *call) (result, error) {
	if err := ctx.Err(); err != nil {
		return result{}, fmt.Errorf("%s: %w", call, err)
	}
	done := make(chan result, 1)
	call.answer = func(r result) { done <- r }
	if err := a.queue(ctx, func(c *core, now time.Time) { c.at(now); c.start(call) }); err != nil {
		return result{}, fmt.Errorf("%s: %w", call, err)
	}
	ended := ctx.Done()
	var late <-chan time.Time
	for {
		select {
		case r := <-done:
			return r, r.err
		case <-late:
			return result{}, fmt.Errorf("%s: %w (waiting for the disk)", call, context.Cause(ctx))
		case <-ended:
			ended, late = nil, time.After(diskPatience)
			cause := context.Cause(ctx)
			if err := a.queue(context.Background(), func(c *core, _ time.Time) { c.cancel(call, cause) }); err != nil {
				return result{}, fmt.Errorf("%s: %w", call, err)
			}
		case <-a.stopped:
			select {
			case r := <-done:
				return r, r.err
			default:
				return result{}, fmt.Errorf("%s: %w", call, ErrStopped)
			}
		}
	}
}

// Allocate gives the owner an address in the subnet (zero: the default subnet), with the subnet's
// length: the one it has there already, or the lowest free one. What it returns is on disk.
func (a *Allocator) Allocate(ctx context.Context, owner string, subnet netip.Prefix) (netip.Prefix, error) {
	r, err := a.do(ctx, &call{op: opAllocate, owner: owner, addr: subnet})
	return r.prefix, err
}

// Claim takes this very address for the owner: outside the range by just noting it, inside it
// exclusively in the whole cluster.
func (a *Allocator) Claim(ctx context.Context, owner string, addr netip.Prefix) error {
	_, err := a.do(ctx, &call{op: opClaim, owner: owner, addr: addr})
	return err
}

// Lookup returns the owner's addresses in a subnet (zero: everywhere), sorted. It allocates nothing and
// waits for nothing.
func (a *Allocator) Lookup(owner string, subnet netip.Prefix) []netip.Prefix {
	a.table.mu.Lock()
	defer a.table.mu.Unlock()
	var out []netip.Prefix
	for _, h := range a.core.holds.byOwner[owner] {
		if h.saved && (!subnet.IsValid() || h.addr.Masked() == subnet.Masked()) {
			out = append(out, h.addr)
		}
	}
	slices.SortFunc(out, func(x, y netip.Prefix) int { return x.Addr().Compare(y.Addr()) })
	return out
}

// Owners returns everything that is held, per owner.
func (a *Allocator) Owners() map[string][]netip.Prefix {
	a.table.mu.Lock()
	defer a.table.mu.Unlock()
	out := make(map[string][]netip.Prefix, len(a.core.holds.byOwner))
	for owner, hs := range a.core.holds.byOwner {
		for _, h := range hs {
			if h.saved {
				out[owner] = append(out[owner], h.addr)
			}
		}
	}
	return out
}

// Release frees one address; not having it is no error. It waits for the disk, never for the network.
func (a *Allocator) Release(ctx context.Context, owner string, addr netip.Addr) error {
	return a.release(ctx, owner, addr)
}

// ReleaseAll frees all the owner's addresses.
func (a *Allocator) ReleaseAll(ctx context.Context, owner string) error {
	return a.release(ctx, owner, netip.Addr{})
}

func (a *Allocator) release(ctx context.Context, owner string, addr netip.Addr) error {
	done := make(chan result, 1)
	call := &call{answer: func(r result) { done <- r }}
	return a.wait(ctx, "release addresses of "+owner, done, func(c *core, now time.Time) {
		c.at(now)
		c.release(owner, addr)
		c.reply(call, result{})
	})
}

// Reclaim says what is running on this host, found without this package's help: each keeps its address,
// and what somebody else has as well is returned and shown in Status. With Config.WaitForLive nothing is
// handed out before the first call.
func (a *Allocator) Reclaim(ctx context.Context, live []Holding) ([]Collision, error) {
	done := make(chan result, 1)
	call := &call{answer: func(r result) { done <- r }}
	var bad []Collision
	err := a.wait(ctx, "reclaim addresses", done, func(c *core, now time.Time) {
		c.at(now)
		bad = c.reclaim(live)
		c.reply(call, result{})
	})
	if err != nil {
		return nil, err
	}
	return bad, nil
}

// wait queues an event and waits until the disk has what it did.
func (a *Allocator) wait(ctx context.Context, what string, done chan result, e event) error {
	if err := a.queue(ctx, e); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	select {
	case r := <-done:
		if r.err != nil {
			return fmt.Errorf("%s: %w", what, r.err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %w (waiting for the disk)", what, context.Cause(ctx))
	case <-a.stopped:
		return fmt.Errorf("%s: %w", what, ErrStopped)
	}
}

// DefaultSubnet is where addresses come from if none is asked for; the zero prefix if allocation is off.
func (a *Allocator) DefaultSubnet() netip.Prefix { return a.cfg.DefaultSubnet }

// Range is the whole range; the zero prefix if allocation is off.
func (a *Allocator) Range() netip.Prefix { return a.cfg.Range }

// Prime waits until the ring is founded.
func (a *Allocator) Prime(ctx context.Context) error {
	_, err := a.do(ctx, &call{op: opPrime})
	return err
}

// RemovePeer declares a peer lost for good and returns how many of its addresses came to this peer; 0
// and no error if it had none, is unknown, or is this peer. It refuses a peer that is alive, and says
// ErrPending if it has to wait for a member that is away as well.
func (a *Allocator) RemovePeer(ctx context.Context, name mesh.PeerName) (int, error) {
	r, err := a.do(ctx, &call{op: opRemove, peer: name})
	return r.n, err
}

// LeaveAll forgets all addresses of this host and gives its space to an heir: a live member, else another
// live peer, else a member that may come back. It returns once the heir has it, or is not there to
// answer, and how many addresses that were. Nothing can be allocated afterwards.
func (a *Allocator) LeaveAll(ctx context.Context) (int, error) {
	r, err := a.do(ctx, &call{op: opLeave})
	return r.n, err
}

// Repair makes one cluster of this one and another one in sight, or fills the gaps of the ring; that there is nothing
// to do is no error. The collisions are addresses on this host that somebody else has too: these have to be
// renumbered. See repair.go for what it does.
func (a *Allocator) Repair(ctx context.Context) (Repaired, error) {
	r, err := a.do(ctx, &call{op: opRepair})
	return r.repaired, err
}

// Status describes the present state.
func (a *Allocator) Status() Status {
	a.table.mu.Lock()
	defer a.table.mu.Unlock()
	return a.core.status()
}

// Dropped is how many messages found the queue full.
func (a *Allocator) Dropped() uint64 { return a.dropped.Load() }
