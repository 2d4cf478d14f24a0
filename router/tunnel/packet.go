package tunnel

import "encoding/binary"

// EtherTypes and protocol numbers.
const (
	etherIPv4   = 0x0800
	etherIPv6   = 0x86dd
	etherVLAN   = 0x8100 // IEEE 802.1Q
	etherQinQ   = 0x88a8 // IEEE 802.1ad
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)

// packet says where the headers of a frame are: offsets into the frame.
type packet struct {
	v6       bool
	proto    byte // 0 unless the transport header is complete in the frame
	fragment bool // IPv4 fragment
	l3, l4   int  // IP header, transport header
	payload  int  // behind the TCP or UDP header
	end      int  // of the IP packet; Ethernet padding may follow
}

// checksumAt is the offset of the transport checksum, for TCP and UDP.
func (p *packet) checksumAt() int {
	if p.proto == protoTCP {
		return p.l4 + 16
	}
	return p.l4 + 6
}

// parsePacket looks through Ethernet, up to two VLAN tags, IPv4 or IPv6 without extension headers, and TCP
// or UDP. ok is false for what is not IP or contradicts itself.
func parsePacket(frame []byte) (p packet, ok bool) {
	if len(frame) < etherLen {
		return p, false
	}
	at, etype := etherLen, binary.BigEndian.Uint16(frame[12:])
	for range 2 {
		if (etype == etherVLAN || etype == etherQinQ) && len(frame) >= at+4 {
			etype = binary.BigEndian.Uint16(frame[at+2:])
			at += 4
		}
	}
	p.l3 = at
	b := frame[at:]
	var proto byte
	switch etype {
	case etherIPv4:
		if len(b) < ipv4HeaderLen || b[0]>>4 != 4 {
			return p, false
		}
		header, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
		if header < ipv4HeaderLen || total < header || total > len(b) {
			return p, false
		}
		p.l4, p.end = at+header, at+total
		p.fragment = binary.BigEndian.Uint16(b[6:])&0x3fff != 0
		proto = b[9]
	case etherIPv6:
		if len(b) < ipv6HeaderLen || b[0]>>4 != 6 {
			return p, false
		}
		total := ipv6HeaderLen + int(binary.BigEndian.Uint16(b[4:]))
		if total > len(b) {
			return p, false
		}
		p.v6, p.l4, p.end = true, at+ipv6HeaderLen, at+total
		proto = b[6]
	default:
		return p, false
	}
	if p.fragment {
		return p, true
	}
	l4 := frame[p.l4:p.end]
	switch proto {
	case protoTCP:
		if len(l4) < 20 {
			return p, true
		}
		n := int(l4[12]>>4) * 4
		if n < 20 || n > len(l4) {
			return p, true
		}
		p.proto, p.payload = proto, p.l4+n
	case protoUDP:
		if len(l4) < udpHeaderLen || int(binary.BigEndian.Uint16(l4[4:])) != len(l4) {
			return p, true
		}
		p.proto, p.payload = proto, p.l4+udpHeaderLen
	}
	return p, true
}

// setLength writes the length of the IP packet, from l3 to n, and fixes what depends on it.
func (p *packet) setLength(frame []byte, n int) {
	b := frame[p.l3:n]
	if p.v6 {
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-ipv6HeaderLen))
		return
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	p.fixIPv4(frame)
}

// fixIPv4 computes the header checksum.
func (p *packet) fixIPv4(frame []byte) {
	b := frame[p.l3:p.l4]
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], ^fold(sum(b, 0)))
}

// pseudo is the sum of the pseudo header for n bytes of transport header and payload.
func (p *packet) pseudo(frame []byte, n int) uint64 {
	s := uint64(p.proto) + uint64(n)
	if p.v6 {
		return sum(frame[p.l3+8:p.l3+40], s)
	}
	return sum(frame[p.l3+12:p.l3+20], s)
}

// setPartial puts the sum of the pseudo header in place of the checksum, for a packet that ends at n.
func (p *packet) setPartial(frame []byte, n int) {
	binary.BigEndian.PutUint16(frame[p.checksumAt():], fold(p.pseudo(frame, n-p.l4)))
}

// setChecksum computes the transport checksum of a packet that ends at n.
func (p *packet) setChecksum(frame []byte, n int) {
	at := p.checksumAt()
	frame[at], frame[at+1] = 0, 0
	c := ^fold(sum(frame[p.l4:n], p.pseudo(frame, n-p.l4)))
	if c == 0 && p.proto == protoUDP {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(frame[at:], c)
}
