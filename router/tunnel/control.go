package tunnel

import (
	"context"
	"maps"
	"net/netip"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// tickEvery is how often controlLoop looks at handshakes and at the ways in use; every timeout there is a
// multiple of it or longer. Keys and idle peers are looked at every upkeepEvery.
const (
	tickEvery   = 50 * time.Millisecond
	upkeepEvery = 250 * time.Millisecond
)

// control is what controlLoop owns.
type control struct {
	attempts map[uint32]*attempt // handshakes that we began, by our index
	half     map[uint32]*half    // handshakes that others began, by our index
	halfByID map[[sha]byte]*half
	halfFIFO []*half
	links    map[*peer]struct{}
	relays   map[*peer]struct{} // peers whose way by relay is being measured
	upkeep   time.Time          // last look at keys and idle peers
	events   []router.LinkEvent // to be delivered when the current event is done
	ceilings time.Time          // last look at the interfaces' MTUs
}

func (c *control) init() {
	c.attempts = make(map[uint32]*attempt)
	c.half = make(map[uint32]*half)
	c.halfByID = make(map[[sha]byte]*half)
	c.links = make(map[*peer]struct{})
	c.relays = make(map[*peer]struct{})
}

// event is what receivers and pumps tell controlLoop.
type event struct {
	kind   eventKind
	peer   *peer
	keys   *keys
	name   mesh.PeerName // eventWant
	secret *secret       // eventHello
	from   origin
	size   int // of the datagram, bytes
	at     time.Time
	body   []byte // own copy
}

type eventKind uint8

const (
	eventHello     eventKind = iota + 1 // body: handshake datagram whose MAC 1 is right
	eventCookie                         // body: cookie datagram
	eventLost                           // body: "unknown session" datagram
	eventBody                           // body: opened probe, ack or close
	eventConfirmed                      // keys were used by the other end for the first time
	eventRoamed                         // peer's newest datagram came from another address
	eventWant                           // body to be sent to name once there is a session
	eventTooBig                         // the interface refused size bytes to peer
)

func (t *Tunnel) controlLoop(ctx context.Context) error {
	ticker := time.NewTicker(tickEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			t.goodbye(time.Now())
			t.deliver()
			return nil
		case <-t.wake:
			t.mu.Lock()
			calls := t.calls
			t.calls = nil
			t.mu.Unlock()
			for _, f := range calls {
				f(time.Now())
			}
		case ev := <-t.events:
			t.handle(ev, time.Now())
		case ev := <-t.hellos:
			t.handle(ev, time.Now())
		case now := <-ticker.C:
			t.tick(now)
		}
		t.deliver()
	}
}

// deliver tells the handler what happened, after the event that caused it is dealt with.
func (t *Tunnel) deliver() {
	events := t.control.events
	t.control.events = nil
	for _, ev := range events {
		t.cfg.Handler.Link(ev)
	}
}

func (t *Tunnel) report(ev router.LinkEvent) { t.control.events = append(t.control.events, ev) }

func (t *Tunnel) handle(ev event, now time.Time) {
	switch ev.kind {
	case eventHello:
		switch ev.body[0] {
		case typeHello1:
			t.onHello1(ev, now)
		case typeHello2:
			t.onHello2(ev, now)
		case typeHello3:
			t.onHello3(ev, now)
		}
	case eventCookie:
		t.onCookie(ev, now)
	case eventLost:
		t.onLost(ev, now)
	case eventConfirmed:
		t.onConfirmed(ev.keys, ev.from, now)
	case eventRoamed:
		t.onRoamed(ev, now)
	case eventWant:
		t.onWant(ev, now)
	case eventTooBig:
		t.onTooBig(ev, now)
	case eventBody:
		if t.current(ev.keys) {
			t.onBody(ev, now)
		}
	}
}

// current reports whether k is still in use; its datagrams may have been opened before it was dropped.
func (t *Tunnel) current(k *keys) bool { return (*t.indexes.Load())[k.local] == k }

func (t *Tunnel) onBody(ev event, now time.Time) {
	switch ev.body[0] {
	case kindProbe:
		t.onProbe(ev, now)
	case kindAck:
		t.onAck(ev, now)
	case kindClose:
		t.onClose(ev, now)
	}
}

func (t *Tunnel) tick(now time.Time) {
	t.tickAttempts(now)
	t.tickHalf(now)
	if now.Sub(t.control.ceilings) >= 5*time.Second {
		t.control.ceilings = now
		t.followInterfaces(now)
	}
	for p := range t.control.links {
		t.tickLink(p, now)
	}
	for p := range t.control.relays {
		if !t.tickRelay(p, now) {
			delete(t.control.relays, p)
		}
	}
	if now.Sub(t.control.upkeep) >= upkeepEvery {
		t.control.upkeep = now
		for _, p := range *t.peers.Load() {
			t.tickPeer(p, now)
		}
	}
}

// tickPeer renews and buries keys, and finds out which ways by relay are in use.
func (t *Tunnel) tickPeer(p *peer, now time.Time) {
	for i := 0; i < len(p.ring); {
		if k := p.ring[i]; k.dead(now) {
			t.dropKeys(p, k)
		} else {
			i++
		}
	}
	if t.relayInUse(p, now) {
		t.control.relays[p] = struct{}{}
	}
	k := p.send.Load()
	if k != nil && p.attempt == nil && k.due(now, t.cfg.RekeyAge) && !now.Before(p.retry) && t.inUse(p, now) {
		t.renew(p, now)
	}
	if len(p.ring) > 0 || p.link != nil || p.attempt != nil || len(p.pending) > 0 {
		p.gone = time.Time{}
		return
	}
	if p.gone.IsZero() {
		p.gone = now
	}
	if now.Sub(p.gone) >= deadAge {
		t.setPeers(func(m map[mesh.PeerName]*peer) { delete(m, p.name) })
	}
}

// inUse reports whether a session is worth a new handshake: there is a link, or something was sent or
// received lately.
func (t *Tunnel) inUse(p *peer, now time.Time) bool {
	return p.link != nil || time.Duration(t.since(now)-p.used.Load()) < deadAge
}

func (t *Tunnel) setPeers(change func(map[mesh.PeerName]*peer)) {
	m := maps.Clone(*t.peers.Load())
	change(m)
	t.peers.Store(&m)
}

func (t *Tunnel) setIndexes(change func(map[uint32]*keys)) {
	m := maps.Clone(*t.indexes.Load())
	change(m)
	t.indexes.Store(&m)
}

func (t *Tunnel) setNeighbours(change func(map[netip.AddrPort]*peer)) {
	m := maps.Clone(*t.neigh.Load())
	change(m)
	t.neigh.Store(&m)
}

// addKeys lets k receive.
func (t *Tunnel) addKeys(p *peer, k *keys, now time.Time) {
	k.peer, k.created = p, now
	p.ring = append(p.ring, k)
	t.setIndexes(func(m map[uint32]*keys) { m[k.local] = k })
	for len(p.ring) > maxKeysPerPeer {
		oldest := p.ring[0]
		if oldest == p.send.Load() {
			oldest = p.ring[1]
		}
		t.dropKeys(p, oldest)
	}
}

func (t *Tunnel) dropKeys(p *peer, k *keys) {
	for i := range p.ring {
		if p.ring[i] == k {
			p.ring = append(p.ring[:i:i], p.ring[i+1:]...)
			break
		}
	}
	t.setIndexes(func(m map[uint32]*keys) { delete(m, k.local) })
	if p.send.Load() == k {
		var next *keys
		for _, other := range p.ring {
			if other.confirmed.Load() {
				next = other
			}
		}
		p.send.Store(next)
	}
}

func (t *Tunnel) dropAllKeys(p *peer) {
	for len(p.ring) > 0 {
		t.dropKeys(p, p.ring[len(p.ring)-1])
	}
}

// adopt starts to send with k, unless a crossing handshake is preferred, and flushes what waited.
func (t *Tunnel) adopt(p *peer, k *keys, now time.Time) {
	k.confirmed.Store(true)
	p.send.Store(preferred(p.send.Load(), k, t.name.Compare(p.name) < 0))
	p.wanted.Store(false)
	p.used.CompareAndSwap(0, t.since(now))
	pending := p.pending
	p.pending = nil
	for _, body := range pending {
		t.sendBody(p.name, body)
	}
}

// onWant queues a body and sees to it that a session comes up.
func (t *Tunnel) onWant(ev event, now time.Time) {
	p := (*t.peers.Load())[ev.name]
	if p == nil {
		p = &peer{name: ev.name}
		t.setPeers(func(m map[mesh.PeerName]*peer) { m[ev.name] = p })
	}
	if p.send.Load() != nil {
		if ev.body != nil {
			t.sendBody(p.name, ev.body)
		}
		p.wanted.Store(false)
		return
	}
	if ev.body != nil {
		if len(p.pending) >= maxPending {
			t.drops.add(dropNoSession)
		} else {
			p.pending = append(p.pending, ev.body)
		}
	}
	if p.attempt == nil && !now.Before(p.retry) {
		t.renew(p, now)
	}
	if p.attempt == nil {
		t.dropPending(p)
	}
}

func (t *Tunnel) dropPending(p *peer) {
	for range p.pending {
		t.drops.add(dropNoSession)
	}
	p.pending = nil
	p.wanted.Store(false)
}

// setSecrets puts a new key ring in place.
func (t *Tunnel) setSecrets(secrets []secret, now time.Time) {
	t.secrets.Store(&secrets)
	has := make(map[PSK]bool)
	for _, s := range secrets {
		has[s.psk] = true
	}
	for _, p := range *t.peers.Load() {
		for _, k := range p.ring {
			if !has[k.psk] {
				// Old enough to be renewed at once, young enough to serve until that is done.
				if limit := now.Add(-(deadAge - retireGrace)); k.created.After(limit) {
					k.created = limit
				}
			}
		}
	}
}

// retireGrace is how long a session made with a removed password goes on.
const retireGrace = 10 * time.Second

// goodbye tells every peer that this one stops.
func (t *Tunnel) goodbye(now time.Time) {
	body := appendClose(nil, closeSession, "stopped")
	for _, p := range *t.peers.Load() {
		if p.send.Load() != nil {
			t.sendBody(p.name, body)
		}
		if p.link != nil {
			t.endLink(p, nil, now)
		}
	}
}
