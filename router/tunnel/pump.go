package tunnel

import (
	"context"
	"errors"
	"io"
	"os"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// maxFrame is the largest superframe of a port, virtio header included.
const maxFrame = vnetLen + etherLen + 8 + 65535

// pump moves frames from one queue of the TAP into the tunnel.
type pump struct {
	t       *Tunnel
	port    Port
	try     TryReader // nil: the port has none
	out     *batch
	held    *backlog
	now     time.Time
	turn    turn
	cut     cutter
	scratch [256]byte // for the switch's answers
	reply   [vnetLen + maxTooBig]byte
	piece   [maxFrame]byte // a datagram that is to be fragmented
}

func newPump(t *Tunnel, port Port) *pump {
	p := &pump{t: t, port: port, out: newBatch(t), held: newBacklog()}
	p.try, _ = port.(TryReader)
	return p
}

const maxBurst = 64 // frames read between two superframes at most

func (p *pump) run(ctx context.Context) error {
	if p.t.cfg.Switch == nil {
		return nil
	}
	if c, ok := p.port.(io.Closer); ok {
		stop := context.AfterFunc(ctx, func() { c.Close() })
		defer stop()
	}
	var broken bool
	for {
		buf := p.held.buffer()
		n, err := p.port.Read(buf)
		if err != nil {
			p.held.release(buf)
			if ctx.Err() != nil || errors.Is(err, os.ErrClosed) || errors.Is(err, io.EOF) {
				return nil
			}
			p.t.drops.add(dropPort)
			if !broken {
				p.t.log.Error("port does not deliver frames", "err", err)
				broken = true
			}
			select { // the port may come back
			case <-ctx.Done():
				return nil
			case <-time.After(time.Second):
			}
			continue
		}
		if broken {
			p.t.log.Info("port delivers frames again")
			broken = false
		}
		p.now = time.Now()
		p.turn.take(p.now)
		p.take(buf, n)
		p.drain()
	}
}

// drain sends what was read and what else is there: first what need not wait, then one superframe, and so on.
func (p *pump) drain() {
	for {
		for range maxBurst {
			if p.try == nil || p.held.full() {
				break
			}
			buf := p.held.buffer()
			n, err := p.try.TryRead(buf)
			if n == 0 || err != nil {
				p.held.release(buf)
				break
			}
			p.take(buf, n)
		}
		buf := p.held.next()
		if buf != nil {
			p.frame(buf, p.now)
			p.held.release(buf)
		}
		p.out.flush()
		if buf == nil {
			return
		}
		p.now = time.Now()
		p.turn.take(p.now)
	}
}

// take deals with what is in buf[:n], now or later.
func (p *pump) take(buf []byte, n int) {
	if p.held.ahead(buf[:n]) {
		p.frame(buf[:n], p.now)
		p.held.release(buf)
	} else {
		p.held.add(buf[:n])
	}
}

// frame deals with one buffer from the port.
func (p *pump) frame(buf []byte, now time.Time) {
	if !p.cut.load(buf) {
		p.t.drops.add(dropMalformed)
		return
	}
	d := p.t.cfg.Switch.FromBridge(p.cut.frame, p.scratch[:], now)
	switch d.Verdict {
	case router.Unicast:
		p.send(d.Peer, now)
	case router.Flood:
		for _, peer := range d.Peers {
			p.send(peer, now)
		}
	case router.Answer:
		clear(p.reply[:vnetLen])
		p.write(p.reply[:vnetLen+copy(p.reply[vnetLen:], d.Reply)])
	}
}

func (p *pump) write(buf []byte) {
	if _, err := p.port.Write(buf); err != nil {
		p.t.drops.add(dropPort)
	}
}

// send puts the loaded frame on its way to one peer.
func (p *pump) send(dst mesh.PeerName, now time.Time) {
	t, c := p.t, &p.cut
	r, ok := t.routeTo(dst)
	switch {
	case !ok:
		t.drops.add(dropNoRoute)
		return
	case r.keys == nil:
		p.want(dst, r.peer)
		return
	}
	t.touch(r.peer, now)
	room := r.room()
	if mtu := room - etherLen; mtu < t.cfg.MTU {
		c.clampMSS(mtu)
	}
	switch c.plan(room) {
	case planWhole:
		copy(p.out.frame(&r, len(c.frame), c.partial), c.frame)
		p.big(&r, len(c.frame))
	case planCut:
		for n := c.pieceLen(); n > 0; n = c.pieceLen() {
			c.next(p.out.frame(&r, n, c.partial))
		}
		p.big(&r, min(room, c.p.payload+c.size))
	case planFragment:
		p.fragment(&r, room)
		p.big(&r, room)
	case planParts:
		p.out.flush() // keep the order
		t.sendRoute(&r, c.body())
		p.big(&r, room)
	case planTooBig:
		p.big(&r, room)
		n := tooBig(p.reply[vnetLen:], c.frame, c.p, room-c.p.l3)
		if n == 0 {
			t.drops.add(dropTooBig)
			return
		}
		t.drops.add(dropTooBigTold)
		clear(p.reply[:vnetLen])
		p.write(p.reply[:vnetLen+n])
	default:
		t.drops.add(dropTooBig)
	}
}

// big takes note that a frame nearly as large as the path was sent, so that its MTU is checked often.
func (p *pump) big(r *route, n int) {
	if n*8 >= r.room()*7 && !r.peer.big.Load() {
		r.peer.big.Store(true)
	}
}

// fragment sends an IPv4 packet that may be fragmented in pieces that fit.
func (p *pump) fragment(r *route, room int) {
	c := &p.cut
	one := func(frame []byte, pk packet, partial bool) {
		if partial {
			pk.setChecksum(frame, pk.end)
		}
		if !fragmentIPv4(frame, pk, room, func(n int) []byte { return p.out.frame(r, n, false) }) {
			p.t.drops.add(dropTooBig)
		}
	}
	if c.h.gso == gsoNone {
		n := copy(p.piece[:], c.frame) // a flood goes to several peers: the frame must stay as it is
		one(p.piece[:n], c.p, c.partial)
		return
	}
	for n := c.pieceLen(); n > 0; n = c.pieceLen() {
		c.next(p.piece[:n])
		pk := c.p
		pk.end = n
		one(p.piece[:n], pk, c.partial)
	}
}

// want asks for a session. The frame waits for it if it is small enough for any path.
func (p *pump) want(dst mesh.PeerName, known *peer) {
	t, c := p.t, &p.cut
	if c.h.gso != gsoNone || len(c.frame) > minDatagram-bodyOverhead {
		t.drops.add(dropNoSession)
		if known == nil || known.wanted.CompareAndSwap(false, true) {
			t.post(event{kind: eventWant, name: dst})
		}
		return
	}
	t.post(event{kind: eventWant, name: dst, body: c.body()})
}

// body is the loaded frame as the body of a datagram, in memory of its own.
func (c *cutter) body() []byte {
	word := uint16(len(c.frame))
	if c.partial {
		word |= framePartial
	}
	return append([]byte{byte(word >> 8), byte(word)}, c.frame...)
}

// touch takes note, to the second, that the session is in use.
func (t *Tunnel) touch(p *peer, now time.Time) {
	if at := t.since(now); at-p.used.Load() > int64(time.Second) || p.used.Load() == 0 {
		p.used.Store(at)
	}
}
