package tunnel

import (
	"context"
	"crypto/hmac"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// receiver takes datagrams from one socket: it opens data, forwards what is for others, and passes the rest
// to controlLoop.
type receiver struct {
	t       *Tunnel
	join    *joiner
	port    Port
	reply   *batch // frames that the switch answers to a peer with
	passing passing
	nonce   [nonceLen]byte
	now     time.Time
	ns      int64
	turn    turn
}

const (
	readBatch  = 64
	readAgain  = 4 // reads beyond the first before everything is flushed
	readBuffer = 65535
)

func newReceiver(t *Tunnel) *receiver {
	r := &receiver{t: t, reply: newBatch(t), passing: passing{t: t}}
	if len(t.cfg.Ports) > 0 {
		r.port = t.cfg.Ports[0]
	}
	r.join = newJoiner(r.write, t.cfg.TSO, t.cfg.USO)
	return r
}

func (r *receiver) write(buf []byte) {
	if _, err := r.port.Write(buf); err != nil {
		r.t.drops.add(dropPort)
	}
}

func (r *receiver) run(ctx context.Context) error {
	batch := make([]Datagrams, readBatch)
	for i := range batch {
		batch[i].Buf = make([]byte, readBuffer)
	}
	var failed bool
	for {
		n, err := r.t.conn.ReadBatch(batch, true)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			// Errors that ICMP left on the socket, and short troubles of memory.
			if !failed {
				r.t.log.Warn("socket does not deliver", "err", err)
				failed = true
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(10 * time.Millisecond):
			}
			continue
		}
		failed = false
		r.now = time.Now()
		r.ns = r.t.since(r.now)
		r.turn.take(r.now)
		// A full batch has most likely cut a superframe in two: what is held waits for the rest, if it is there.
		for again := 0; ; again++ {
			for i := range batch[:n] {
				r.datagrams(&batch[i])
			}
			if n < len(batch) || again == readAgain {
				break
			}
			if n, err = r.t.conn.ReadBatch(batch, false); err != nil {
				break // the next one that waits says so
			}
		}
		r.join.flush()
		r.passing.flush()
		r.reply.flush()
	}
}

// datagrams splits what one read delivered.
func (r *receiver) datagrams(d *Datagrams) {
	b, size := d.Buf[:d.N], d.Size
	if size <= 0 || size > d.N {
		size = d.N
	}
	from := origin{addr: d.Addr}
	for len(b) > 0 {
		n := min(size, len(b))
		if b[0] == typeRelay {
			n = r.relayed(b, n, d.Addr)
		} else {
			r.datagram(b[:n], from)
		}
		b = b[n:]
	}
}

// datagram deals with one that is for this peer.
func (r *receiver) datagram(b []byte, from origin) {
	switch b[0] {
	case typeData, typeClear:
		if len(b) < dataHeaderLen+1 || b[0] == typeData && len(b) < dataHeaderLen+1+sealLen {
			r.t.drops.add(dropType)
			return
		}
		k := (*r.t.indexes.Load())[binary.BigEndian.Uint32(b[4:])]
		if k == nil {
			r.t.drops.add(dropSession)
			r.lost(b, from)
			return
		}
		if b[0] == typeClear {
			r.clear(k, b, from)
		} else {
			r.sealed(k, b, from)
		}
	case typeHello1, typeHello2, typeHello3:
		r.hello(b, from)
	case typeCookie:
		if len(b) < cookieLen || b[1] != wireVersion {
			r.t.drops.add(dropType)
			return
		}
		r.t.post(event{kind: eventCookie, from: from, body: copyOf(b[:cookieLen])})
	case typeLost:
		if len(b) < lostLen {
			r.t.drops.add(dropType)
			return
		}
		if r.knows(from) && checkLost(*r.t.secrets.Load(), b) {
			r.t.post(event{kind: eventLost, from: from, body: copyOf(b[:lostLen])})
		} else {
			r.t.drops.add(dropHint)
		}
	default:
		r.t.drops.add(dropType)
	}
}

// knows reports whether a hint from there could mean anything, so that strangers do not fill the queue.
func (r *receiver) knows(from origin) bool {
	if from.relayed {
		return (*r.t.peers.Load())[from.src] != nil
	}
	return (*r.t.neigh.Load())[from.addr] != nil
}

func copyOf(b []byte) []byte { return append(make([]byte, 0, len(b)), b...) }

// lost tells the sender of a datagram that its session is not known here.
func (r *receiver) lost(b []byte, from origin) {
	if len(b) < lostLen || !r.t.losts.take(r.now) { // no answer is longer than the question
		return
	}
	r.t.sendTo(from, newLost(&(*r.t.secrets.Load())[0], b[4:8]))
}

// newLost makes the hint that the session with that index is not known. The MAC shows that the sender has the
// password, no more: it is as good as the index is hard to guess.
func newLost(s *secret, index []byte) []byte {
	hint := make([]byte, 4, lostLen)
	hint[0] = typeLost
	hint = append(hint, index...)
	m := mac(s.mac1[:], hint)
	return append(hint, m[:]...)
}

// checkLost reports whether a hint comes from somebody with one of our passwords.
func checkLost(secrets []secret, b []byte) bool {
	for i := range secrets {
		if macEqual(mac(secrets[i].mac1[:], b[:lostLen-macLen]), b[lostLen-macLen:lostLen]) {
			return true
		}
	}
	return false
}

// sealed opens a data datagram.
func (r *receiver) sealed(k *keys, b []byte, from origin) {
	t := r.t
	size := len(b)
	body, newest, why := k.openAt(b, &r.nonce)
	if why != dropNone {
		t.drops.add(why)
		return
	}
	p := k.peer
	p.heard.Store(r.ns)
	if !from.relayed {
		if d := p.direct.Load(); d == nil || d.addr == from.addr {
			p.heardDirect.Store(r.ns)
		} else if newest && p.roaming.CompareAndSwap(false, true) {
			t.post(event{kind: eventRoamed, peer: p, keys: k, from: from})
		}
	}
	if !k.confirmed.Load() && k.confirmed.CompareAndSwap(false, true) {
		t.post(event{kind: eventConfirmed, keys: k, from: from})
	}
	switch {
	case body[0] < kindMessage:
		t.touch(p, r.now)
		r.frames(p, b, dataHeaderLen, dataHeaderLen+len(body))
	case body[0] == kindMessage:
		t.touch(p, r.now)
		t.cfg.Handler.Message(p.name, body[1:])
	case body[0] == kindPart:
		r.part(p, body)
	case body[0] == kindProbe || body[0] == kindAck || body[0] == kindClose:
		t.post(event{kind: eventBody, keys: k, from: from, size: size, at: r.now, body: copyOf(body[:min(len(body), 2+maxCloseText)])})
	default:
		t.drops.add(dropBody)
	}
}

func (r *receiver) part(p *peer, body []byte) {
	pt, ok := parsePart(body)
	if !ok {
		r.t.drops.add(dropBody)
		return
	}
	r.t.touch(p, r.now)
	p.partMu.Lock()
	buf := p.parts.add(pt)
	p.partMu.Unlock()
	if len(buf) <= vnetLen {
		return
	}
	switch body := buf[vnetLen:]; {
	case body[0] < kindMessage:
		r.frames(p, buf, vnetLen, len(buf))
	case body[0] == kindMessage:
		r.t.cfg.Handler.Message(p.name, body[1:])
	default:
		r.t.drops.add(dropBody)
	}
}

// clear takes frames that came in clear, where that was agreed and the address is one we agreed to it for.
func (r *receiver) clear(k *keys, b []byte, from origin) {
	t := r.t
	if !k.clear || !t.clearTo(from) {
		t.drops.add(dropClear)
		return
	}
	if !hmac.Equal(b[8:16], k.recvTag[:]) {
		t.drops.add(dropForged)
		return
	}
	t.touch(k.peer, r.now)
	r.frames(k.peer, b, dataHeaderLen, len(b))
}

// frames takes the frames out of b[at:end]. What is before at may be overwritten.
func (r *receiver) frames(p *peer, b []byte, at, end int) {
	t := r.t
	if r.port == nil || t.cfg.Switch == nil {
		t.drops.add(dropPort)
		return
	}
	for at < end {
		if end-at < frameLenLen {
			t.drops.add(dropBody)
			return
		}
		word := binary.BigEndian.Uint16(b[at:])
		n := int(word & frameLenMask)
		at += frameLenLen
		if word > framePartial|frameLenMask || n > end-at || n == 0 {
			t.drops.add(dropBody)
			return
		}
		p.stats.framesIn.Add(1)
		p.stats.bytesIn.Add(uint64(n))
		r.frame(p, b[at-vnetLen:at+n], word&framePartial != 0)
		at += n
	}
}

// frame hands one frame, with vnetLen spare bytes before it, to the bridge.
func (r *receiver) frame(p *peer, buf []byte, partial bool) {
	t := r.t
	d := t.cfg.Switch.FromPeer(buf[vnetLen:], p.name, r.now)
	switch d.Verdict {
	case router.Deliver:
		if !r.join.add(buf, partial) {
			t.drops.add(dropMalformed)
		}
	case router.Answer:
		rt, ok := t.routeTo(p.name)
		if ok && rt.keys != nil && len(d.Reply) <= rt.room() {
			copy(r.reply.frame(&rt, len(d.Reply), false), d.Reply)
		} else {
			t.drops.add(dropNoRoute)
		}
	case router.Unicast, router.Flood:
		t.drops.add(dropSwitch)
	}
}

// hello filters handshake datagrams: strangers are met with silence.
func (r *receiver) hello(b []byte, from origin) {
	t := r.t
	if !checkHello(b) {
		t.drops.add(dropType)
		return
	}
	s := checkMAC1(*t.secrets.Load(), b)
	if s == nil {
		t.drops.add(dropMAC)
		if t.noisy.take(r.now) {
			why := "its password is not ours"
			if !t.open() && checkMAC1([]secret{newSecret(PSK{})}, b) != nil {
				why = "it has no password and we have"
			}
			t.log.Warn("stranger turned away", "underlay", from.addr, "relayed", from.relayed, "err", why)
		}
		return
	}
	if b[0] == typeHello1 {
		ok, cookie := t.guard.admit(s, b, from, r.now)
		if cookie != nil {
			t.sendTo(from, cookie)
		}
		if !ok {
			t.drops.add(dropBusy)
			return
		}
	}
	select {
	case t.hellos <- event{kind: eventHello, secret: s, from: from, body: copyOf(b)}:
	default:
		t.drops.add(dropBusy)
	}
}

// relayed deals with datagrams that bear a relay header: the first n bytes of b are one, and what follows in
// pieces of n too, as one read delivered them. It returns how many bytes it has dealt with. What goes to
// the same peer is not opened, and leaves together.
func (r *receiver) relayed(b []byte, n int, from netip.AddrPort) int {
	t := r.t
	hops, to, src, inner, ok := parseRelay(b[:n])
	if !ok || inner[0] == typeRelay {
		t.drops.add(dropType)
		return n
	}
	sender := (*t.neigh.Load())[from]
	if sender == nil {
		t.drops.add(dropRelaySource)
		return n
	}
	if to == t.name {
		r.datagram(inner, origin{addr: from, relayed: true, src: src})
		return n
	}
	if src == t.name || hops == 0 || hops > maxHops {
		t.drops.add(dropRelayHops)
		return n
	}
	// All that follows with the same header goes the same way.
	run, count := n, 1
	for count < maxSegments && len(b)-run > relayHeaderLen && string(b[run:run+relayHeaderLen]) == string(b[:relayHeaderLen]) {
		run += min(n, len(b)-run)
		count++
	}
	d, links := r.nextHop(to, sender)
	if d == nil {
		t.drops.add(dropRelayRoute)
		return run
	}
	next, ok := router.Onward(int(hops), links)
	if !ok {
		t.drops.add(dropRelayStray)
		return run
	}
	if n > d.mtu {
		t.drops.add(dropRelaySize)
		return run
	}
	for at := 0; at < run; at += n {
		b[at+1] = byte(next)
	}
	r.passing.add(b[:run], n, d.addr)
	return run
}

// nextHop is the link to forward to, never the one that the datagram came by, and how many links there are from
// here.
func (r *receiver) nextHop(to mesh.PeerName, sender *peer) (d *path, links int) {
	peers := *r.t.peers.Load()
	via, links, known := r.t.cfg.Router.Way(to)
	if q := peers[via]; known && q != nil && q != sender {
		d = q.direct.Load()
	}
	if q := peers[to]; d == nil && q != nil && q != sender {
		d, links = q.direct.Load(), 1
	}
	return d, links
}
