package tunnel

import "encoding/binary"

// maxTooBig is the largest frame that tooBig makes: IPv6's minimum MTU and an Ethernet header with tags.
const maxTooBig = ipv6MinMTU + etherLen + 8

// tooBig writes to dst the frame that tells the sender of frame, an IP packet at p, that the path carries
// packets of mtu bytes: ICMP "fragmentation needed" (RFC 1191 4) or ICMPv6 "packet too big"
// (RFC 4443 3.2). It comes from the address that the packet was for, for there is no router to name. 0 when
// there is nobody to be told: sources and destinations that are groups, and ICMP errors themselves.
func tooBig(dst, frame []byte, p packet, mtu int) int {
	if frame[0]&1 != 0 || frame[6]&1 != 0 {
		return 0
	}
	ip := frame[p.l3:p.end]
	copy(dst[0:6], frame[6:12])
	copy(dst[6:12], frame[0:6])
	copy(dst[12:p.l3], frame[12:p.l3])
	out := dst[p.l3:]
	if p.v6 {
		if ip[8] == 0xff || ip[24] == 0xff || ip[6] == protoICMPv6 && (len(ip) <= ipv6HeaderLen || ip[ipv6HeaderLen] < 128) {
			return 0
		}
		quoted := min(len(ip), ipv6MinMTU-ipv6HeaderLen-8)
		icmp := 8 + quoted
		clear(out[:ipv6HeaderLen+8])
		out[0] = 6 << 4
		binary.BigEndian.PutUint16(out[4:], uint16(icmp))
		out[6], out[7] = protoICMPv6, 64
		copy(out[8:24], ip[24:40])
		copy(out[24:40], ip[8:24])
		b := out[ipv6HeaderLen : ipv6HeaderLen+icmp]
		b[0] = 2
		binary.BigEndian.PutUint32(b[4:], uint32(max(mtu, ipv6MinMTU)))
		copy(b[8:], ip[:quoted])
		c := sum(out[8:40], uint64(protoICMPv6)+uint64(icmp))
		binary.BigEndian.PutUint16(b[2:], ^fold(sum(b, c)))
		return p.l3 + ipv6HeaderLen + icmp
	}
	if ip[12] >= 224 || ip[16] >= 224 || binary.BigEndian.Uint16(ip[6:])&0x1fff != 0 {
		return 0
	}
	header := p.l4 - p.l3
	if ip[9] == protoICMP && (len(ip) <= header || ip[header] != 8 && ip[header] != 0) {
		return 0
	}
	quoted := min(len(ip), 576-ipv4HeaderLen-8)
	clear(out[:ipv4HeaderLen+8])
	out[0] = 4<<4 | 5
	binary.BigEndian.PutUint16(out[2:], uint16(ipv4HeaderLen+8+quoted))
	out[8], out[9] = 64, protoICMP
	copy(out[12:16], ip[16:20])
	copy(out[16:20], ip[12:16])
	binary.BigEndian.PutUint16(out[10:], ^fold(sum(out[:ipv4HeaderLen], 0)))
	b := out[ipv4HeaderLen : ipv4HeaderLen+8+quoted]
	b[0], b[1] = 3, 4
	binary.BigEndian.PutUint16(b[6:], uint16(mtu))
	copy(b[8:], ip[:quoted])
	binary.BigEndian.PutUint16(b[2:], ^fold(sum(b, 0)))
	return p.l3 + ipv4HeaderLen + 8 + quoted
}
