package tunnel

import (
	"bytes"
	"encoding/binary"
)

// joiner makes superframes of consecutive TCP segments of a flow, and of UDP datagrams of one size where the
// port takes them, so that the far container's kernel handles 64 KiB at once as if a network card had
// done it (as Linux's own GRO does, net/ipv4/tcp_offload.c). Only packets whose checksum is the sum of
// the pseudo header are joined: their payload is guarded by the tunnel's seal, so nothing that was
// damaged gets a new checksum. It holds packets only within one batch of reads. One goroutine owns it.
type joiner struct {
	write func(buf []byte) // takes virtio header and frame; the buffer is borrowed
	tso   bool
	uso   bool
	slots [joinSlots]joinSlot
	used  int // slots in use are the first ones
}

const (
	joinSlots  = 8
	joinMax    = 65535 // bytes of IP packet
	joinMaxUDP = 64    // datagrams, UDP_MAX_SEGMENTS before Linux 6.9
)

type joinSlot struct {
	buf   []byte // virtio header, superframe so far
	p     packet
	count int
	size  int    // payload of each packet but the last
	next  uint32 // sequence number that continues it
	ended bool   // nothing may follow
}

func newJoiner(write func([]byte), tso, uso bool) *joiner {
	return &joiner{write: write, tso: tso, uso: uso}
}

// add takes a frame whose buffer has vnetLen bytes before it that may be overwritten. False if the frame
// makes no sense: it claims a checksum of the pseudo header but is neither TCP nor UDP.
func (j *joiner) add(buf []byte, partial bool) bool {
	frame := buf[vnetLen:]
	if !partial {
		clear(buf[:vnetLen])
		// It may belong to a flow that is held; keep the order.
		if p, ok := parsePacket(frame); ok && p.proto != 0 {
			j.flushFlow(frame, &p)
		}
		j.write(buf)
		return true
	}
	p, ok := parsePacket(frame)
	if !ok || p.proto == 0 {
		return false
	}
	s := j.find(frame, &p)
	if s != nil && s.extends(frame, &p) {
		s.append(frame, &p)
		return true
	}
	if s != nil {
		j.flushSlot(s)
	}
	if j.starts(frame, &p) {
		if s == nil {
			if j.used == joinSlots {
				j.flush()
			}
			s = &j.slots[j.used]
			j.used++
		}
		s.start(frame, &p)
		return true
	}
	if s != nil {
		j.remove(s)
	}
	putVnet(buf, vnetHeader{flags: vnetNeedsCsum, headerLen: uint16(p.payload), csumStart: uint16(p.l4), csumOffset: uint16(p.checksumAt() - p.l4)})
	j.write(buf)
	return true
}

// find looks for the slot of the frame's flow.
func (j *joiner) find(frame []byte, p *packet) *joinSlot {
	for i := range j.used {
		if s := &j.slots[i]; s.sameFlow(frame, p) {
			return s
		}
	}
	return nil
}

func (s *joinSlot) sameFlow(frame []byte, p *packet) bool {
	if s.p.l3 != p.l3 || s.p.l4 != p.l4 || s.p.proto != p.proto || s.p.v6 != p.v6 {
		return false
	}
	held := s.buf[vnetLen:]
	addrs := p.l3 + 12
	if p.v6 {
		addrs = p.l3 + 8
	}
	return bytes.Equal(held[p.l4:p.l4+4], frame[p.l4:p.l4+4]) &&
		bytes.Equal(held[addrs:addrs+8], frame[addrs:addrs+8]) &&
		(!p.v6 || bytes.Equal(held[addrs+8:addrs+32], frame[addrs+8:addrs+32])) &&
		bytes.Equal(held[:p.l3], frame[:p.l3])
}

// starts reports whether more packets may be joined to this one.
func (j *joiner) starts(frame []byte, p *packet) bool {
	if p.end != len(frame) || p.end == p.payload || !p.v6 && p.l4-p.l3 != ipv4HeaderLen {
		return false
	}
	if p.proto == protoUDP {
		return j.uso
	}
	return j.tso && frame[p.l4+13] == tcpACK
}

func (s *joinSlot) start(frame []byte, p *packet) {
	if s.buf == nil {
		s.buf = make([]byte, 0, maxFrame)
	}
	s.buf = append(s.buf[:vnetLen], frame...)
	s.p, s.count, s.size, s.ended = *p, 1, p.end-p.payload, false
	if p.proto == protoTCP {
		s.next = binary.BigEndian.Uint32(frame[p.l4+4:]) + uint32(s.size)
	}
}

// extends reports whether a packet of the same flow continues what is held.
func (s *joinSlot) extends(frame []byte, p *packet) bool {
	payload := p.end - p.payload
	if s.ended || p.end != len(frame) || p.payload != s.p.payload || payload == 0 || payload > s.size ||
		len(s.buf)-vnetLen-p.l3+payload > joinMax {
		return false
	}
	held := s.buf[vnetLen:]
	l3, l4 := p.l3, p.l4
	if p.v6 {
		// Version, traffic class and flow label; hop limit.
		if !bytes.Equal(held[l3:l3+4], frame[l3:l3+4]) || held[l3+7] != frame[l3+7] {
			return false
		}
	} else if held[l3] != frame[l3] || held[l3+1] != frame[l3+1] || // header length, type of service
		held[l3+6] != frame[l3+6] || held[l3+8] != frame[l3+8] { // flags, TTL
		return false
	}
	if p.proto == protoUDP {
		return s.count < joinMaxUDP
	}
	return binary.BigEndian.Uint32(frame[l4+4:]) == s.next &&
		frame[l4+13]&^tcpPSH == tcpACK &&
		bytes.Equal(held[l4+8:l4+13], frame[l4+8:l4+13]) && // acknowledgement, header length
		bytes.Equal(held[l4+14:l4+16], frame[l4+14:l4+16]) && // window
		bytes.Equal(held[l4+18:p.payload], frame[l4+18:p.payload]) // urgent pointer, options
}

func (s *joinSlot) append(frame []byte, p *packet) {
	payload := frame[p.payload:p.end]
	s.buf = append(s.buf, payload...)
	s.count++
	s.next += uint32(len(payload))
	s.ended = len(payload) < s.size
	if p.proto == protoTCP && frame[p.l4+13]&tcpPSH != 0 {
		s.buf[vnetLen+p.l4+13] |= tcpPSH
		s.ended = true
	}
}

// flushSlot writes what a slot holds; the slot stays in place, to be started again or removed.
func (j *joiner) flushSlot(s *joinSlot) {
	frame := s.buf[vnetLen:]
	h := vnetHeader{flags: vnetNeedsCsum, headerLen: uint16(s.p.payload), csumStart: uint16(s.p.l4), csumOffset: uint16(s.p.checksumAt() - s.p.l4)}
	if s.count > 1 {
		h.gsoSize = uint16(s.size)
		s.p.setLength(frame, len(frame))
		switch {
		case s.p.proto == protoUDP:
			h.gso = gsoUDP
			binary.BigEndian.PutUint16(frame[s.p.l4+4:], uint16(len(frame)-s.p.l4))
		case s.p.v6:
			h.gso = gsoTCPv6
		default:
			h.gso = gsoTCPv4
		}
		s.p.setPartial(frame, len(frame))
	}
	putVnet(s.buf, h)
	j.write(s.buf)
}

// remove gives a written slot back, keeping the others in order.
func (j *joiner) remove(s *joinSlot) {
	for i := range j.used {
		if &j.slots[i] == s {
			free := j.slots[i]
			copy(j.slots[i:], j.slots[i+1:j.used])
			j.used--
			j.slots[j.used] = free
			return
		}
	}
}

func (j *joiner) flushFlow(frame []byte, p *packet) {
	if s := j.find(frame, p); s != nil {
		j.flushSlot(s)
		j.remove(s)
	}
}

// flush writes everything that is held, oldest first.
func (j *joiner) flush() {
	for i := range j.used {
		j.flushSlot(&j.slots[i])
	}
	j.used = 0
}
