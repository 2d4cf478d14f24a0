package tunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// A link is alive as long as something authenticated comes from its address. When nothing does for
// longer than a heartbeat, probes go out in quick succession, so that losing every fifth datagram does not
// look like death, and two and a half seconds without anything do. So do four without an answer: then the way back
// is whole, but nothing of ours arrives; the peer, which hears nothing, has given up by then.
const (
	heartbeatEvery = time.Second
	heartbeatLate  = heartbeatEvery + 200*time.Millisecond
	heartbeatFast  = 200 * time.Millisecond
	deadAfter      = 2500 * time.Millisecond // with what follows from it, routes are withdrawn within 3 s
	deafAfter      = 4 * time.Second
	upAnyway       = 600 * time.Millisecond // a link is up then even if its MTU is not found yet
	probeKept      = 3 * time.Second        // an answer may come so late
	maxProbes      = 64
	busyFor        = time.Second // after the last large datagram a path counts as busy
)

var (
	errRestarted = errors.New("the peer was restarted")
	errDeaf      = fmt.Errorf("nothing answered for %v", deafAfter)
	errLeft      = errors.New("the peer said goodbye")
	errDead      = fmt.Errorf("nothing heard for %v", deadAfter)
	errUnproven  = errors.New("the handshake went through but no probe was answered")
)

// track is what is measured on one way to a peer, by probes.
type track struct {
	rtt       rtt
	mtu       pmtu
	out       map[uint32]sentProbe
	nextID    uint32
	lastProbe time.Time // last heartbeat sent
	theirMTU  int       // what the peer says of the other direction, 0 unknown
	busy      time.Time // last large datagram sent
}

type sentProbe struct {
	size int
	at   time.Time
}

// link is the direct way to a peer.
type link struct {
	track
	addr     netip.AddrPort
	outbound bool
	dialled  []netip.AddrPort // dials that wait for the outcome
	up       bool
	answered bool // some probe was
	lastAck  time.Time
	created  time.Time
	told     router.Link // as last reported
	toldAt   time.Time
}

// ensureLink makes a link of a direct session, or finds that there is one.
func (t *Tunnel) ensureLink(p *peer, addr netip.AddrPort, dialled bool, now time.Time) {
	l := p.link
	switch {
	case l == nil:
		l = &link{addr: addr, outbound: dialled, created: now}
		l.out = make(map[uint32]sentProbe)
		p.link = l
		p.hungUp = time.Time{}
		t.control.links[p] = struct{}{}
		p.heardDirect.Store(t.since(now))
		l.mtu.start(minDatagram, t.ceiling(addr), now)
	case l.addr == addr:
	case t.sinceHeard(p, now) < 2*time.Second:
		if dialled {
			t.dialFailed(addr, p.info.Load().hello, fmt.Errorf("%w: %v", ErrLinked, l.addr))
		}
		return
	default:
		t.moveLink(p, addr, now)
	}
	if dialled {
		if l.up {
			t.report(router.LinkEvent{State: router.LinkChanged, Link: linkOf(p, p.info.Load().hello, p.direct.Load())})
		} else {
			l.dialled = append(l.dialled, addr)
		}
	}
	t.tickLink(p, now)
}

// sinceHeard is how long nothing has come directly from p.
func (t *Tunnel) sinceHeard(p *peer, now time.Time) time.Duration {
	return time.Duration(t.since(now) - p.heardDirect.Load())
}

// ceiling is the largest UDP payload that the interface towards addr carries in one packet.
func (t *Tunnel) ceiling(addr netip.AddrPort) int {
	mtu := t.conn.PathMTU(addr.Addr())
	if mtu == 0 {
		mtu = 1500
	}
	if addr.Addr().Unmap().Is4() {
		return mtu - ipv4HeaderLen - udpHeaderLen
	}
	return mtu - ipv6HeaderLen - udpHeaderLen
}

// followInterfaces adapts to interfaces whose MTU was changed.
func (t *Tunnel) followInterfaces(now time.Time) {
	for p := range t.control.links {
		p.link.mtu.setCeiling(t.ceiling(p.link.addr), now)
	}
}

// moveLink gives a link another address: the peer has roamed, or was found elsewhere.
func (t *Tunnel) moveLink(p *peer, addr netip.AddrPort, now time.Time) {
	l := p.link
	old := l.addr
	l.addr = addr
	l.mtu.start(l.mtu.mtu, t.ceiling(addr), now)
	if l.up {
		t.setNeighbours(func(m map[netip.AddrPort]*peer) {
			if m[old] == p {
				delete(m, old)
			}
			m[addr] = p
		})
		t.publishLink(p, now)
	}
}

func (t *Tunnel) onRoamed(ev event, now time.Time) {
	p := ev.peer
	if l := p.link; l != nil && l.addr != ev.from.addr && t.current(ev.keys) {
		t.log.Info("peer moved", "peer", p.name, "underlay", ev.from.addr, "from", l.addr)
		p.heardDirect.Store(t.since(now))
		t.moveLink(p, ev.from.addr, now)
	}
}

// endLink drops a link; err nil if we want it so.
func (t *Tunnel) endLink(p *peer, err error, now time.Time) {
	l := p.link
	p.link = nil
	delete(t.control.links, p)
	p.direct.Store(nil)
	p.lastErr = err
	t.setNeighbours(func(m map[netip.AddrPort]*peer) {
		if m[l.addr] == p {
			delete(m, l.addr)
		}
	})
	t.publishInfo(p, nil)
	hello := p.info.Load().hello
	if l.up {
		lost := l.told
		lost.Peer = hello
		t.report(router.LinkEvent{State: router.LinkDown, Link: lost, Err: err})
		t.log.Debug("link down", "peer", p.name, "underlay", l.addr, "err", err)
	}
	for _, addr := range l.dialled {
		t.dialFailed(addr, router.Hello{}, err)
	}
}

func (t *Tunnel) hangup(name mesh.PeerName, why string, now time.Time) {
	p := (*t.peers.Load())[name]
	if p == nil || p.link == nil {
		return
	}
	if k := p.send.Load(); k != nil {
		t.sendWith(k, origin{addr: p.link.addr}, appendClose(nil, closeLink, why))
	}
	p.hungUp = now
	t.endLink(p, fmt.Errorf("hung up: %s", why), now)
}

// tickLink sends the probes that are due, and decides whether the link lives.
func (t *Tunnel) tickLink(p *peer, now time.Time) {
	l := p.link
	silent, deaf := t.sinceHeard(p, now), time.Duration(0)
	if l.answered {
		deaf = now.Sub(l.lastAck)
	}
	if deaf >= deafAfter && silent < deadAfter {
		t.endLink(p, errDeaf, now)
		return
	}
	if silent >= deadAfter || !l.up && now.Sub(l.created) >= deadAfter {
		err := errDead
		if !l.up {
			err = errUnproven
		}
		t.endLink(p, err, now)
		return
	}
	p.roaming.Store(false)
	if p.big.Swap(false) {
		l.busy = now
	}
	k := p.send.Load()
	if k == nil {
		return
	}
	sizes := l.mtu.tick(now, l.rtt.timeout(), now.Sub(l.busy) < busyFor, now.Add(-silent))
	every := heartbeatEvery
	if max(silent, deaf) > heartbeatLate || !l.answered || l.mtu.verifies > 1 {
		every = heartbeatFast
	}
	if now.Sub(l.lastProbe) >= every {
		t.sendProbe(p, &l.track, k, origin{addr: l.addr}, 0, now)
	}
	for _, size := range sizes {
		t.sendProbe(p, &l.track, k, origin{addr: l.addr}, size, now)
	}
	if l.answered {
		t.publishLink(p, now)
	}
}

// sendProbe sends a probe that makes a datagram of size bytes, 0 for the shortest.
func (t *Tunnel) sendProbe(p *peer, tr *track, k *keys, to origin, size int, now time.Time) {
	for id, s := range tr.out {
		if now.Sub(s.at) >= probeKept || len(tr.out) >= maxProbes {
			delete(tr.out, id)
		}
	}
	tr.nextID++
	pr := probe{id: tr.nextID, rtt: uint32(min(tr.rtt.smooth.Microseconds(), 1<<31))}
	if tr.mtu.proven {
		pr.mtu = uint16(tr.mtu.mtu)
	}
	datagram := t.sealBody(k, appendProbe(nil, pr, size-dataHeaderLen-sealLen))
	if datagram == nil {
		return
	}
	tr.out[tr.nextID] = sentProbe{len(datagram), now}
	if size == 0 { // a large one may fail for its size alone and is no heartbeat
		tr.lastProbe = now
	}
	if to.relayed {
		t.sendRelayed(p.name, datagram)
		return
	}
	err := t.conn.Write(datagram, len(datagram), to.addr, false)
	if errors.Is(err, errTooLarge) {
		tr.mtu.tooBig(len(datagram), now)
	} else if err != nil {
		t.drops.add(dropOf(err))
	}
}

// onProbe answers a probe. One that comes from a peer to whom there is no link makes one: it proves that
// the peer reaches us directly.
func (t *Tunnel) onProbe(ev event, now time.Time) {
	pr, ok := parseProbe(ev.body)
	p := ev.keys.peer
	if !ok {
		t.drops.add(dropBody)
		return
	}
	to := origin{addr: ev.from.addr, relayed: ev.from.relayed, src: p.name}
	if !ev.from.relayed {
		if p.link == nil {
			if !p.hungUp.IsZero() && now.Sub(p.hungUp) < deadAfter {
				t.sendWith(ev.keys, to, appendClose(nil, closeLink, "hung up"))
				return
			}
			if t.control.attempts[ev.keys.local] == nil && p.send.Load() != nil {
				t.ensureLink(p, ev.from.addr, false, now)
			}
		}
		if p.link != nil {
			p.link.track.learn(pr, now)
		}
	} else if p.relay != nil {
		p.relay.track.learn(pr, now)
	}
	t.sendWith(ev.keys, to, appendAck(nil, ack{pr.id, uint16(ev.size)}))
}

// learn takes over what the peer tells of its own measurements, as far as there are none of ours.
func (tr *track) learn(pr probe, now time.Time) {
	tr.theirMTU = int(pr.mtu)
	if tr.rtt.smooth == 0 && pr.rtt != 0 {
		tr.rtt.add(time.Duration(pr.rtt) * time.Microsecond)
	}
}

func (t *Tunnel) onAck(ev event, now time.Time) {
	a, ok := parseAck(ev.body)
	p := ev.keys.peer
	if !ok {
		t.drops.add(dropBody)
		return
	}
	switch {
	case p.link != nil && !ev.from.relayed:
		if p.link.acked(a, ev.at, now) {
			p.link.answered, p.link.lastAck = true, now
			t.tickLink(p, now)
		}
	case p.relay != nil && ev.from.relayed:
		if p.relay.acked(a, ev.at, now) {
			t.publishRelay(p)
		}
	}
}

// acked takes note of an answer that arrived at a time; false if it answers nothing we asked lately.
func (tr *track) acked(a ack, at, now time.Time) bool {
	s, ok := tr.out[a.id]
	if !ok {
		return false
	}
	delete(tr.out, a.id)
	if d := at.Sub(s.at); d > 0 {
		tr.rtt.add(d)
	}
	if int(a.size) == s.size {
		tr.mtu.answered(s.size, now)
	}
	return true
}

func (t *Tunnel) onTooBig(ev event, now time.Time) {
	if l := ev.peer.link; l != nil && l.addr == ev.from.addr {
		l.mtu.setCeiling(t.ceiling(l.addr), now)
		l.mtu.tooBig(ev.size, now)
		t.publishLink(ev.peer, now)
	}
}

// publishLink lets pumps and receivers use what is known of a link, and reports what changed.
func (t *Tunnel) publishLink(p *peer, now time.Time) {
	l := p.link
	if l == nil || !l.answered {
		return
	}
	if !l.up && l.mtu.searching() && now.Sub(l.created) < upAnyway {
		return
	}
	d := path{addr: l.addr, via: p.name, mtu: l.mtu.mtu, mtuBoth: l.mtu.mtu, rtt: l.rtt.smooth, outbound: l.outbound, trusted: t.clearTo(origin{addr: l.addr})}
	if l.theirMTU != 0 {
		d.mtuBoth = min(d.mtu, l.theirMTU)
	}
	if old := p.direct.Load(); old == nil || *old != d {
		p.direct.Store(&d)
	}
	told := linkOf(p, p.info.Load().hello, &d)
	if !l.up {
		l.up = true
		p.lastErr = nil
		t.publishInfo(p, nil)
		t.setNeighbours(func(m map[netip.AddrPort]*peer) { m[l.addr] = p })
		l.told, l.toldAt, l.dialled = told, now, nil
		t.report(router.LinkEvent{State: router.LinkUp, Link: told})
		t.log.Debug("link up", "peer", p.name, "nickname", told.Peer.NickName, "underlay", l.addr, "rtt", d.rtt, "mtu", d.mtu, "sealed", told.Sealed)
		return
	}
	// The RTT of a quiet LAN jitters by more than a quarter; nobody chooses another path for less than 1 ms.
	diff := (told.RTT - l.told.RTT).Abs()
	slower := diff*4 >= l.told.RTT && diff >= time.Millisecond && now.Sub(l.toldAt) >= 10*time.Second
	if told.Addr != l.told.Addr || told.MTU != l.told.MTU && !l.mtu.searching() || told.Sealed != l.told.Sealed || slower {
		l.told, l.toldAt = told, now
		t.report(router.LinkEvent{State: router.LinkChanged, Link: told})
	}
}
