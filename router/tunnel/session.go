package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// attempt is a handshake that this peer began.
type attempt struct {
	in      *initiator
	to      origin // where to: an address, or by relay to origin.src
	peer    *peer  // who is expected there; nil for a dial
	dial    bool   // the outcome is to be reported
	started time.Time
	next    time.Time // of the next retransmission
	wait    time.Duration
	theirs  terms
	hello3  []byte // set once hello2 has come
	keys    *keys
}

// half is a handshake that another peer began and that has not ended.
type half struct {
	r       *responder
	from    origin
	started time.Time
	answer  []byte // to hello3 when it comes again: the refusal; nil while there was none
	keys    *keys  // once hello3 has come
}

const (
	attemptFor   = 5 * time.Second        // then it has failed
	attemptFirst = 250 * time.Millisecond // until the first retransmission
	attemptMost  = time.Second            // between two
	halfFor      = 6 * time.Second
	maxHalf      = 1024
	retryAfter   = time.Second // between handshakes with one peer, unless dialled
	nameHeld     = 10 * time.Second
)

func (t *Tunnel) newIndex() uint32 {
	for {
		var b [4]byte
		fill(b[:])
		i := binary.BigEndian.Uint32(b[:])
		if i != 0 && t.control.attempts[i] == nil && t.control.half[i] == nil && (*t.indexes.Load())[i] == nil {
			return i
		}
	}
}

// dial begins a handshake with whoever is at addr.
func (t *Tunnel) dial(addr netip.AddrPort, now time.Time) {
	if !addr.IsValid() || addr.Port() == 0 || addr.Addr().IsUnspecified() || addr.Addr().IsMulticast() {
		t.dialFailed(addr, router.Hello{}, fmt.Errorf("%v is no address of a peer", addr))
		return
	}
	for _, a := range t.control.attempts {
		if !a.to.relayed && a.to.addr == addr {
			a.dial = true
			return
		}
	}
	if p := (*t.neigh.Load())[addr]; p != nil && p.link != nil && p.link.up {
		t.report(router.LinkEvent{State: router.LinkChanged, Link: linkOf(p, p.info.Load().hello, p.direct.Load())})
		return
	}
	t.begin(origin{addr: addr}, nil, true, now)
}

func (t *Tunnel) dialFailed(addr netip.AddrPort, who router.Hello, err error) {
	t.report(router.LinkEvent{State: router.LinkDialFailed, Link: router.Link{Peer: who, Addr: addr, Outbound: true}, Err: err})
}

// renew begins a handshake with a known peer, over its link or by relay.
func (t *Tunnel) renew(p *peer, now time.Time) {
	if p.link != nil {
		t.begin(origin{addr: p.link.addr}, p, false, now)
		return
	}
	if r, ok := t.routeTo(p.name); ok && r.relayed {
		t.begin(origin{addr: r.to, relayed: true, src: p.name}, p, false, now)
	}
}

func (t *Tunnel) begin(to origin, p *peer, dial bool, now time.Time) {
	in, err := newInitiator(t.cfg.Identity, (*t.secrets.Load())[0], t.newIndex(), offer{aes: t.aes})
	if err != nil {
		t.log.Error("handshake not begun", "err", err)
		return
	}
	a := &attempt{in: in, to: to, peer: p, dial: dial, started: now, wait: attemptFirst, next: now.Add(attemptFirst)}
	t.control.attempts[in.index] = a
	if p != nil {
		p.attempt = a
		p.retry = now.Add(retryAfter)
	}
	t.sendTo(a.to, in.hello1)
}

func (t *Tunnel) tickAttempts(now time.Time) {
	for _, a := range t.control.attempts {
		switch {
		case now.Sub(a.started) >= attemptFor:
			t.fail(a, ErrNoAnswer, now)
		case !now.Before(a.next):
			a.wait = min(a.wait*3/2, attemptMost)
			a.next = now.Add(a.wait)
			t.sendTo(a.to, a.datagram())
		}
	}
}

// datagram is what is to be sent again.
func (a *attempt) datagram() []byte {
	if a.hello3 != nil {
		return a.hello3
	}
	return a.in.hello1
}

// fail ends an attempt without a session.
func (t *Tunnel) fail(a *attempt, err error, now time.Time) {
	t.forget(a)
	if a.keys != nil {
		t.dropKeys(a.keys.peer, a.keys)
	}
	if p := a.peer; p != nil {
		p.lastErr = err
		t.publishInfo(p, nil)
		if p.send.Load() == nil {
			t.dropPending(p)
		}
	}
	if a.dial {
		who := a.theirs.hello
		if errors.Is(err, ErrNoAnswer) {
			who = router.Hello{} // it did not refuse: the handshake got lost on the way
		}
		t.dialFailed(a.to.addr, who, err)
	} else {
		t.log.Debug("handshake failed", "underlay", a.to.addr, "relayed", a.to.relayed, "err", err)
	}
}

func (t *Tunnel) forget(a *attempt) {
	delete(t.control.attempts, a.in.index)
	if a.peer != nil && a.peer.attempt == a {
		a.peer.attempt = nil
	}
}

func (t *Tunnel) ours(index uint32, from origin) terms {
	return terms{hello: t.cfg.Hello, own: index, aes: t.aes, clear: t.clearTo(from)}
}

// onHello1 answers the first message of a handshake. Its MAC 1 is right, so its sender has the password.
func (t *Tunnel) onHello1(ev event, now time.Time) {
	id := hello1ID(ev.body)
	if h := t.control.halfByID[id]; h != nil {
		t.sendTo(ev.from, h.r.hello2)
		return
	}
	index := t.newIndex()
	r, err := newResponder(t.cfg.Identity, *ev.secret, ev.body, t.ours(index, ev.from))
	if err != nil {
		t.drops.add(dropHandshake)
		return
	}
	h := &half{r: r, from: ev.from, started: now}
	t.control.half[index] = h
	t.control.halfByID[id] = h
	t.control.halfFIFO = append(t.control.halfFIFO, h)
	for len(t.control.half) > maxHalf {
		t.popHalf()
	}
	t.sendTo(ev.from, r.hello2)
}

// popHalf forgets the oldest half-open handshake.
func (t *Tunnel) popHalf() {
	h := t.control.halfFIFO[0]
	t.control.halfFIFO[0] = nil
	t.control.halfFIFO = t.control.halfFIFO[1:]
	delete(t.control.half, h.r.ours.own)
	delete(t.control.halfByID, h.r.hello1)
}

func (t *Tunnel) tickHalf(now time.Time) {
	for len(t.control.halfFIFO) > 0 && now.Sub(t.control.halfFIFO[0].started) >= halfFor {
		t.popHalf()
	}
}

// onHello2 goes on with a handshake of ours.
func (t *Tunnel) onHello2(ev event, now time.Time) {
	a := t.control.attempts[binary.BigEndian.Uint32(ev.body[8:])]
	if a == nil {
		t.drops.add(dropHandshake)
		return
	}
	if a.hello3 != nil { // the answer came twice, so hello3 may have got lost
		t.sendTo(a.to, a.hello3)
		return
	}
	theirs, err := a.in.readHello2(ev.body)
	if err != nil {
		t.drops.add(dropHandshake)
		return
	}
	a.theirs = theirs
	if a.peer != nil && theirs.hello.Name != a.peer.name {
		t.fail(a, fmt.Errorf("%v answers in the place of %v", theirs.hello.Name, a.peer.name), now)
		return
	}
	refusal := t.judge(theirs.hello, a.to, now)
	if errors.Is(refusal, ErrSelf) {
		t.fail(a, refusal, now)
		return
	}
	hello3, k, err := a.in.writeHello3(t.ours(a.in.index, a.to), theirs)
	if err != nil {
		t.fail(a, err, now)
		return
	}
	if refusal != nil {
		t.sendTo(a.to, hello3)
		t.sendWith(k, a.to, appendClose(nil, closeRefused, refusal.Error()))
		t.logRefusal(theirs.hello, a.to, refusal)
		t.fail(a, refusal, now)
		return
	}
	a.hello3, a.wait, a.next = hello3, attemptFirst, now.Add(attemptFirst)
	p := t.peerOf(theirs.hello, now)
	if a.peer != nil && a.peer != p && a.peer.attempt == a {
		a.peer.attempt = nil
	}
	if p.attempt == nil {
		a.peer, p.attempt = p, a
	}
	a.keys = k
	t.addKeys(p, k, now) // before the other end can use them
	t.sendTo(a.to, hello3)
}

// onConfirmed ends a handshake of ours: the other end has sealed something with its keys.
func (t *Tunnel) onConfirmed(k *keys, from origin, now time.Time) {
	if !t.current(k) {
		return
	}
	p := k.peer
	t.adopt(p, k, now)
	a := t.control.attempts[k.local]
	if a == nil {
		return
	}
	t.forget(a)
	if !a.to.relayed {
		t.ensureLink(p, a.to.addr, a.dial, now)
	}
}

// onHello3 ends a handshake that another peer began.
func (t *Tunnel) onHello3(ev event, now time.Time) {
	h := t.control.half[binary.BigEndian.Uint32(ev.body[8:])]
	if h == nil {
		t.drops.add(dropHandshake)
		return
	}
	if h.keys != nil { // it came again: our answer got lost
		if h.answer == nil && t.current(h.keys) {
			t.sendWith(h.keys, ev.from, appendProbe(nil, probe{}, 0))
		} else if h.answer != nil {
			t.sendTo(ev.from, h.answer)
		}
		return
	}
	theirs, k, err := h.r.readHello3(ev.body)
	if err != nil {
		t.drops.add(dropHandshake)
		return
	}
	h.keys = k
	k.created = now
	if ev.from.relayed && theirs.hello.Name != ev.from.src {
		t.drops.add(dropHandshake)
		return
	}
	if err := t.judge(theirs.hello, ev.from, now); err != nil {
		h.answer = t.sealBody(k, appendClose(nil, closeRefused, err.Error()))
		t.sendTo(ev.from, h.answer)
		if !errors.Is(err, ErrSelf) {
			t.logRefusal(theirs.hello, ev.from, err)
		}
		return
	}
	p := t.peerOf(theirs.hello, now)
	t.addKeys(p, k, now)
	p.heard.Store(t.since(now))
	t.sendWith(k, ev.from, appendProbe(nil, probe{}, 0))
	t.adopt(p, k, now)
	if !ev.from.relayed {
		t.ensureLink(p, ev.from.addr, false, now)
	}
}

func (t *Tunnel) logRefusal(hello router.Hello, from origin, why error) {
	if t.noisy.take(time.Now()) {
		t.log.Warn("peer refused", "peer", hello.Name, "nickname", hello.NickName, "underlay", from.addr, "err", why)
	}
}

// judge says why a peer that has proven its key is not welcome, or nil.
func (t *Tunnel) judge(hello router.Hello, from origin, now time.Time) error {
	switch own := t.cfg.Hello; {
	case sameHost(hello, own):
		return ErrSelf
	case hello.Key == own.Key:
		return fmt.Errorf("%s (%v) and %s (%v) run with the same key: a cloned disk? remove the state file on one of them",
			own.NickName, own.Name, hello.NickName, hello.Name)
	case hello.Name == own.Name:
		return fmt.Errorf("%s and %s both have the name %v: start one of them with another --name", own.NickName, hello.NickName, own.Name)
	}
	if p := (*t.peers.Load())[hello.Name]; p != nil && p.info.Load() != nil {
		known := p.info.Load().hello
		alive := time.Duration(t.since(now)-p.heard.Load()) < nameHeld && len(p.ring) > 0
		switch {
		case known.Key != hello.Key && alive && NameOf(hello.Key) != hello.Name:
			return fmt.Errorf("the name %v belongs to %s, who is alive and has another key: start %s with another --name",
				hello.Name, known.NickName, hello.NickName)
		case known.Key == hello.Key && known.Run != hello.Run && p.second == hello.Run && alive:
			return fmt.Errorf("%s and %s run with the same key and name %v: a cloned disk? remove the state file on one of them",
				known.NickName, hello.NickName, hello.Name)
		}
	}
	if t.cfg.Accept == nil {
		return nil
	}
	if from.relayed {
		from.addr = netip.AddrPort{} // that is the relay's
	}
	return t.cfg.Accept(hello, from.addr)
}

// peerOf finds or makes the peer. Another run, or another key, of a known name replaces what was.
func (t *Tunnel) peerOf(hello router.Hello, now time.Time) *peer {
	p := (*t.peers.Load())[hello.Name]
	if p == nil {
		p = &peer{name: hello.Name}
		p.info.Store(&peerInfo{hello: hello})
		t.setPeers(func(m map[mesh.PeerName]*peer) { m[p.name] = p })
		return p
	}
	if info := p.info.Load(); info != nil && !sameHost(info.hello, hello) {
		if p.link != nil {
			t.endLink(p, errRestarted, now)
		}
		t.dropAllKeys(p)
		// A run that comes back after another took its place was never over: the other is a clone of it,
		// which judge turns away from now on, for it came second.
		replaced := p.replaced
		p.replaced, p.second = 0, 0
		switch {
		case info.hello.Key != hello.Key:
		case replaced == hello.Run:
			p.second = info.hello.Run
		default:
			p.replaced = info.hello.Run
		}
		p.relay = nil
		p.relayed.Store(nil)
	}
	t.publishInfo(p, &hello)
	return p
}

// publishInfo refreshes what Sessions shows; hello nil keeps the one known.
func (t *Tunnel) publishInfo(p *peer, hello *router.Hello) {
	old := p.info.Load()
	if hello == nil {
		if old == nil {
			return
		}
		hello = &old.hello
	}
	info := &peerInfo{hello: *hello}
	if (p.link == nil || !p.link.up) && p.lastErr != nil {
		info.err = p.lastErr.Error()
	}
	p.info.Store(info)
}

// onCookie: the other end is under load and wants proof of our address.
func (t *Tunnel) onCookie(ev event, now time.Time) {
	a := t.control.attempts[binary.BigEndian.Uint32(ev.body[4:])]
	if a == nil || a.hello3 != nil {
		t.drops.add(dropHandshake)
		return
	}
	cookie, ok := openCookie(&a.in.secret, ev.body, a.in.hello1)
	if !ok {
		t.drops.add(dropHandshake)
		return
	}
	a.in.setCookie(cookie)
	a.wait, a.next = attemptFirst, now.Add(attemptFirst)
	t.sendTo(a.to, a.in.hello1)
}

// onLost: somebody says that the other end does not know our session any more, most likely because it
// was restarted. Anyone can say so; the worst it costs is a handshake per second and peer.
func (t *Tunnel) onLost(ev event, now time.Time) {
	index := binary.BigEndian.Uint32(ev.body[4:])
	var p *peer
	if ev.from.relayed {
		p = (*t.peers.Load())[ev.from.src]
	} else {
		for q := range t.control.links {
			if q.link.addr == ev.from.addr {
				p = q
			}
		}
	}
	if p == nil || p.attempt != nil || now.Sub(p.hinted) < retryAfter {
		t.drops.add(dropHint)
		return
	}
	if k := p.send.Load(); k == nil || k.remote != index {
		t.drops.add(dropHint)
		return
	}
	p.hinted = now
	t.begin(ev.from, p, false, now)
}

// onClose ends a link, a session or a handshake.
func (t *Tunnel) onClose(ev event, now time.Time) {
	code, why, ok := parseClose(ev.body)
	if !ok {
		t.drops.add(dropBody)
		return
	}
	p := ev.keys.peer
	switch code {
	case closeRefused:
		err := fmt.Errorf("refused by %s (%v): %s", p.info.Load().hello.NickName, p.name, why)
		if a := t.control.attempts[ev.keys.local]; a != nil {
			t.logRefusal(a.theirs.hello, a.to, err)
			t.fail(a, err, now)
			return
		}
		t.dropKeys(p, ev.keys)
		p.lastErr = err
		if p.link != nil && (len(p.ring) == 0 || !p.link.up) {
			t.endLink(p, err, now)
		}
		t.publishInfo(p, nil)
	case closeSession:
		if p.link != nil {
			t.endLink(p, fmt.Errorf("%w: %s", errLeft, why), now)
		}
		t.dropAllKeys(p)
	case closeLink:
		if p.link != nil && !ev.from.relayed {
			t.endLink(p, fmt.Errorf("%w: %s", errLeft, why), now)
		}
	default:
		t.drops.add(dropBody)
	}
}

// sealBody makes a whole datagram of a control body; nil if the counter is used up.
func (t *Tunnel) sealBody(k *keys, body []byte) []byte {
	counter, err := k.reserve(1)
	if err != nil {
		t.drops.add(dropCounter)
		return nil
	}
	b := make([]byte, dataHeaderLen+len(body)+sealLen)
	copy(b[dataHeaderLen:], body)
	var nonce [nonceLen]byte
	return b[:k.sealAt(b, dataHeaderLen+len(body), counter, &nonce)]
}

// sendWith seals body with k and sends it to a given place.
func (t *Tunnel) sendWith(k *keys, to origin, body []byte) {
	if b := t.sealBody(k, body); b != nil {
		t.sendTo(to, b)
	}
}

// sendTo sends one datagram to an address, or by the current relay to a peer.
func (t *Tunnel) sendTo(to origin, datagram []byte) {
	if to.relayed {
		t.sendRelayed(to.src, datagram)
		return
	}
	if err := t.conn.Write(datagram, len(datagram), to.addr, false); err != nil {
		t.drops.add(dropOf(err))
	}
}

// sendRelayed wraps a datagram for dst and hands it to the next hop.
func (t *Tunnel) sendRelayed(dst mesh.PeerName, datagram []byte) {
	via, links, ok := t.cfg.Router.Way(dst)
	q := (*t.peers.Load())[via]
	if !ok || via == dst || q == nil {
		t.drops.add(dropNoRoute)
		return
	}
	d := q.direct.Load()
	if d == nil {
		t.drops.add(dropNoRoute)
		return
	}
	b := make([]byte, relayHeaderLen, relayHeaderLen+len(datagram))
	putRelayHeader(b, hopsOf(links), dst, t.name)
	b = append(b, datagram...)
	if err := t.conn.Write(b, len(b), d.addr, false); err != nil {
		t.drops.add(dropOf(err))
	}
}
