package tunnel

import (
	"fmt"
	"time"

	"meshd/mesh"
)

// Send seals msg, end to end, and sends it to peer by the current route. It never blocks, and like a
// datagram it may be lost. Without a session one is started and msg waits for it, as one of a few. msg may be
// used again after the call.
func (t *Tunnel) Send(dst mesh.PeerName, msg []byte) error {
	if len(msg) > MaxMessage {
		return fmt.Errorf("send to %v: %d bytes: %w", dst, len(msg), ErrTooLong)
	}
	r, ok := t.routeTo(dst)
	if !ok {
		t.drops.add(dropNoRoute)
		return fmt.Errorf("send to %v: %w", dst, ErrNoRoute)
	}
	body := append(append(make([]byte, 0, 1+len(msg)), kindMessage), msg...)
	if r.keys == nil {
		t.post(event{kind: eventWant, name: dst, body: body})
		return nil
	}
	t.touch(r.peer, time.Now())
	t.sendRoute(&r, body)
	return nil
}

// sendBody sends a body by the current route; one that finds no route or session is lost.
func (t *Tunnel) sendBody(dst mesh.PeerName, body []byte) {
	r, ok := t.routeTo(dst)
	switch {
	case !ok:
		t.drops.add(dropNoRoute)
	case r.keys == nil:
		t.drops.add(dropNoSession)
	default:
		t.sendRoute(&r, body)
	}
}

// sendRoute sends a body over r, in parts where the path is too narrow for it.
func (t *Tunnel) sendRoute(r *route, body []byte) {
	if body[0] < kindMessage { // a single frame
		r.peer.stats.framesOut.Add(1)
		r.peer.stats.bytesOut.Add(uint64(len(body) - frameLenLen))
	}
	room := r.mtu - dataHeaderLen - sealLen
	if len(body) <= room {
		t.writeBody(r, body)
		return
	}
	per := room - partLen
	p := part{id: uint16(r.peer.partID.Add(1)), count: byte((len(body) + per - 1) / per)}
	for at := 0; at < len(body); at += per {
		p.piece = body[at:min(at+per, len(body))]
		t.writeBody(r, appendPart(nil, p))
		p.index++
	}
}

func (t *Tunnel) writeBody(r *route, body []byte) {
	counter, err := r.keys.reserve(1)
	if err != nil {
		t.drops.add(dropCounter)
		return
	}
	at := r.prefix()
	b := make([]byte, at+dataHeaderLen+len(body)+sealLen)
	copy(b[at+dataHeaderLen:], body)
	var nonce [nonceLen]byte
	n := at + r.keys.sealAt(b[at:], dataHeaderLen+len(body), counter, &nonce)
	if r.relayed {
		putRelayHeader(b, r.hops, r.peer.name, t.name)
	}
	if err := t.conn.Write(b[:n], n, r.to, false); err != nil {
		t.drops.add(dropOf(err))
	}
}
