package tunnel

import (
	"encoding/binary"
)

// plan is what becomes of a frame from the port on a path with room for frames of a given length.
type plan uint8

const (
	planWhole    plan = iota // as it is
	planCut                  // into TCP segments or UDP datagrams
	planFragment             // into IPv4 fragments, after cutting it to datagrams if it holds several
	planTooBig               // its sender must be told
	planParts                // it may not be refused: in parts, as a whole (IPv6 packets of up to 1,280 bytes)
	planBad                  // makes no sense
	planNoFit                // too big, and nobody to be told
)

// cutter turns one frame from the port, which may be a superframe of up to 64 KiB, into complete frames that
// fit a path. TCP is cut at whatever size fits, superframe or not: segments are but pieces of a stream,
// so a path that has become narrower does not stop a connection. It is pure, and used again for every frame.
type cutter struct {
	frame   []byte
	h       vnetHeader
	p       packet
	ip      bool // p is valid
	partial bool // the checksum holds the sum of the pseudo header
	size    int  // bytes of payload per piece
	room    int

	at    int // payload done
	piece int // number of pieces done
}

const (
	tcpFIN = 0x01
	tcpSYN = 0x02
	tcpRST = 0x04
	tcpPSH = 0x08
	tcpACK = 0x10
	tcpURG = 0x20
	tcpCWR = 0x80

	minPiece = 8 // bytes of TCP payload in a segment that is worth it
)

// load takes a buffer from the port: virtio header and frame. False for what makes no sense; nothing of a
// container is trusted. It completes checksums that only this host could complete.
func (c *cutter) load(buf []byte) bool {
	if len(buf) < vnetLen+etherLen {
		return false
	}
	*c = cutter{frame: buf[vnetLen:], h: parseVnet(buf)}
	c.p, c.ip = parsePacket(c.frame)
	if c.h.flags&vnetNeedsCsum != 0 {
		start, at := int(c.h.csumStart), int(c.h.csumStart)+int(c.h.csumOffset)
		switch {
		case c.ip && c.p.proto != 0 && start == c.p.l4 && at == c.p.checksumAt():
			c.partial = true
		case at+2 > len(c.frame):
			return false
		case c.h.gso != gsoNone:
			return false
		default: // a checksum that the other side would not find
			sum := ^fold(sum(c.frame[start:], 0))
			if sum == 0 {
				sum = 0xffff
			}
			binary.BigEndian.PutUint16(c.frame[at:], sum)
		}
	}
	switch c.h.gso &^ gsoECN {
	case gsoNone:
		return c.h.gso == gsoNone
	case gsoTCPv4:
		return c.ip && c.p.proto == protoTCP && !c.p.v6 && c.h.gsoSize != 0
	case gsoTCPv6:
		return c.ip && c.p.proto == protoTCP && c.p.v6 && c.h.gsoSize != 0
	case gsoUDP:
		return c.ip && c.p.proto == protoUDP && c.h.gsoSize != 0
	}
	return false
}

// plan says how the frame goes over a path with room for frames of so many bytes.
func (c *cutter) plan(room int) plan {
	c.at, c.piece, c.room = 0, 0, room
	header := c.p.payload
	super := c.h.gso != gsoNone
	if !super && len(c.frame) <= room {
		return planWhole
	}
	if !c.ip {
		return planNoFit
	}
	payload := c.p.end - header
	c.size = payload
	if super {
		c.size = int(c.h.gsoSize)
	}
	switch c.p.proto {
	case protoTCP:
		flags := c.frame[c.p.l4+13]
		if !super && flags&(tcpSYN|tcpRST|tcpURG) != 0 {
			break
		}
		if !super && c.p.end <= room { // only its Ethernet padding is too much
			c.size = max(payload, 1)
			return planCut
		}
		c.size = min(c.size, room-header)
		if c.size < min(minPiece, payload) {
			return planNoFit
		}
		return planCut
	case protoUDP:
		if super && header+c.size <= room {
			return planCut
		}
	}
	if !c.p.v6 && c.frame[c.p.l3+6]&0x40 == 0 {
		return planFragment
	}
	if c.p.v6 && !super && c.p.end-c.p.l3 <= ipv6MinMTU && len(c.frame) <= maxWhole-frameLenLen {
		return planParts
	}
	return planTooBig
}

// pieceLen is the length of the next frame, 0 when all are made.
func (c *cutter) pieceLen() int {
	payload := c.p.end - c.p.payload
	if c.at >= payload && c.piece > 0 {
		return 0
	}
	return c.p.payload + min(c.size, payload-c.at)
}

// next makes the next frame in dst, which must be pieceLen long.
func (c *cutter) next(dst []byte) {
	p, payload := &c.p, c.p.end-c.p.payload
	n := copy(dst, c.frame[:p.payload])
	from := p.payload + c.at
	n += copy(dst[n:], c.frame[from:min(from+c.size, p.end)])
	if !p.v6 {
		id := binary.BigEndian.Uint16(dst[p.l3+4:])
		binary.BigEndian.PutUint16(dst[p.l3+4:], id+uint16(c.piece))
	}
	p.setLength(dst, n)
	if p.proto == protoTCP {
		seq := binary.BigEndian.Uint32(dst[p.l4+4:])
		binary.BigEndian.PutUint32(dst[p.l4+4:], seq+uint32(c.at))
		if c.at+c.size < payload {
			dst[p.l4+13] &^= tcpFIN | tcpPSH
		}
		if c.piece > 0 {
			dst[p.l4+13] &^= tcpCWR
		}
	} else {
		binary.BigEndian.PutUint16(dst[p.l4+4:], uint16(n-p.l4))
	}
	if c.partial {
		p.setPartial(dst, n)
	} else if p.proto == protoTCP || c.frame[p.checksumAt()] != 0 || c.frame[p.checksumAt()+1] != 0 {
		p.setChecksum(dst, n)
	}
	c.at += c.size
	c.piece++
}

// fragmentIPv4 cuts a complete frame with an IPv4 packet (RFC 791 2.3) into fragments of at most room bytes
// into the buffers of n bytes that emit returns. False if it cannot be done.
func fragmentIPv4(frame []byte, p packet, room int, emit func(n int) []byte) bool {
	header := frame[:p.l4]
	per := (room - p.l4) &^ 7
	if per < 8 {
		return false
	}
	body := frame[p.l4:p.end]
	flags := binary.BigEndian.Uint16(frame[p.l3+6:])
	offset, more := int(flags&0x1fff), flags&0x2000
	for at := 0; at < len(body); at += per {
		n := min(per, len(body)-at)
		dst := emit(p.l4 + n)
		copy(dst, header)
		copy(dst[p.l4:], body[at:at+n])
		f := uint16(offset+at/8) | more
		if at+n < len(body) {
			f |= 0x2000
		}
		binary.BigEndian.PutUint16(dst[p.l3+6:], f)
		if at > 0 {
			stripOptions(dst[p.l3+ipv4HeaderLen : p.l4])
		}
		p.setLength(dst, p.l4+n)
	}
	return true
}

// stripOptions blanks the IPv4 options that only the first fragment carries (copied flag, RFC 791 3.1).
func stripOptions(b []byte) {
	for i := 0; i < len(b); {
		switch {
		case b[i] == 0:
			return
		case b[i] == 1:
			i++
			continue
		case i+1 >= len(b) || b[i+1] < 2 || i+int(b[i+1]) > len(b):
			return
		}
		n := int(b[i+1])
		if b[i]&0x80 == 0 {
			for j := i; j < i+n; j++ {
				b[j] = 1
			}
		}
		i += n
	}
}

// clampMSS lowers the MSS option of a SYN (RFC 9293 3.7.1) to what the path carries, mtu bytes of packet.
func (c *cutter) clampMSS(mtu int) {
	p := &c.p
	if !c.ip || p.proto != protoTCP || c.frame[p.l4+13]&tcpSYN == 0 {
		return
	}
	most := mtu - ipv4HeaderLen - 20
	if p.v6 {
		most = mtu - ipv6HeaderLen - 20
	}
	options := c.frame[p.l4+20 : p.payload]
	for i := 0; i < len(options) && options[i] != 0; {
		if options[i] == 1 {
			i++
			continue
		}
		if i+1 >= len(options) || options[i+1] < 2 || i+int(options[i+1]) > len(options) {
			return
		}
		if options[i] == 2 && options[i+1] == 4 {
			if int(binary.BigEndian.Uint16(options[i+2:])) <= most || most < 64 {
				return
			}
			binary.BigEndian.PutUint16(options[i+2:], uint16(most))
			if !c.partial {
				p.setChecksum(c.frame, p.end)
			}
			return
		}
		i += int(options[i+1])
	}
}
