package router

import (
	"encoding/binary"
	"net/netip"

	"meshd/mesh"
)

// Offsets and sizes of the headers that are looked at: Ethernet II, ARP for IPv4 over Ethernet (RFC 826),
// IPv6 (RFC 8200) and neighbour discovery (RFC 4861, 4.3 and 4.4). Tagged frames are not looked into:
// they are switched by address alone. Nothing here allocates, and any input may be given.
const (
	etherHeader = 14
	arpLength   = 28
	ip6Header   = 40
	ndLength    = 24 // type, code, checksum, flags, target

	typeARP  = 0x0806
	typeIPv6 = 0x86dd

	arpRequest = 1
	arpReply   = 2

	protoHopByHop     = 0
	protoRouting      = 43
	protoICMP6        = 58
	protoDestOpts     = 60
	mostExtensions    = 8 // headers before ICMPv6; the kernel takes neighbour discovery behind them
	neighbourSolicit  = 135
	neighbourAdvert   = 136
	optionSource      = 1
	optionTarget      = 2
	advertSolicited   = 0x40
	advertOverride    = 0x20
	answerLength      = etherHeader + ip6Header + ndLength + 8 // the longest answer
	minimumHopLimitND = 255
)

// Groups of what bridges and switches say to each other: those that bridges must not forward (IEEE 802.1D 7.12.6),
// for spanning tree, LACP and LLDP, and Cisco's for the same.
var (
	linkControl  = [5]byte{0x01, 0x80, 0xc2, 0x00, 0x00}
	ciscoControl = [5]byte{0x01, 0x00, 0x0c, 0xcc, 0xcc}
)

func isLinkControl(m mesh.MAC) bool {
	return m[5] < 0x10 && [5]byte(m[:5]) == linkControl || m[5]&^1 == 0xcc && [5]byte(m[:5]) == ciscoControl
}

// parseEther returns the addresses and the type of a frame.
func parseEther(f []byte) (dst, src mesh.MAC, kind uint16, ok bool) {
	if len(f) < etherHeader {
		return dst, src, 0, false
	}
	return mesh.MAC(f[:6]), mesh.MAC(f[6:12]), binary.BigEndian.Uint16(f[12:]), true
}

// neighbour is an ARP packet or a neighbour solicitation or advertisement, in one shape.
type neighbour struct {
	request  bool
	sender   netip.Addr // unspecified: it asks whether somebody has target (RFC 5227, RFC 4862)
	mac      mesh.MAC   // that the packet gives for sender, or for target in an advertisement; may be zero
	unsure   bool       // it gives another one as well: receivers differ in which they take
	target   netip.Addr
	announce bool // says where an address is without having been asked
}

// claims is the address that the packet says to be at mac.
func (n *neighbour) claims() netip.Addr {
	if n.target.Is6() && !n.request {
		return n.target
	}
	return n.sender
}

// parseNeighbour reads what follows the Ethernet header.
func parseNeighbour(kind uint16, b []byte) (n neighbour, ok bool) {
	switch kind {
	case typeARP:
		return parseARP(b)
	case typeIPv6:
		return parseND(b)
	}
	return n, false
}

func parseARP(b []byte) (n neighbour, ok bool) {
	// hardware Ethernet, or IEEE 802, which receivers take for the same; protocol IPv4, lengths 6 and 4
	if len(b) < arpLength {
		return n, false
	}
	if form := binary.BigEndian.Uint64(b) >> 16; form != 0x0001_0800_0604 && form != 0x0006_0800_0604 {
		return n, false
	}
	op := binary.BigEndian.Uint16(b[6:])
	if op != arpRequest && op != arpReply {
		return n, false
	}
	n = neighbour{
		request: op == arpRequest,
		mac:     mesh.MAC(b[8:14]),
		sender:  netip.AddrFrom4([4]byte(b[14:18])),
		target:  netip.AddrFrom4([4]byte(b[24:28])),
	}
	n.announce = n.sender == n.target
	return n, true
}

func parseND(b []byte) (n neighbour, ok bool) {
	if len(b) < ip6Header+ndLength || b[0]>>4 != 6 || b[7] != minimumHopLimitND {
		return n, false
	}
	size := int(binary.BigEndian.Uint16(b[4:]))
	if size < ndLength || size > len(b)-ip6Header {
		return n, false
	}
	icmp, next := b[ip6Header:ip6Header+size], b[6]
	for range mostExtensions {
		if next != protoHopByHop && next != protoRouting && next != protoDestOpts {
			break
		}
		length := 8 + 8*int(icmp[1])
		if len(icmp)-length < ndLength {
			return n, false
		}
		next, icmp = icmp[0], icmp[length:]
	}
	if next != protoICMP6 {
		return n, false
	}
	kind := icmp[0]
	if kind != neighbourSolicit && kind != neighbourAdvert || icmp[1] != 0 {
		return n, false
	}
	n = neighbour{
		request: kind == neighbourSolicit,
		sender:  netip.AddrFrom16([16]byte(b[8:24])),
		target:  netip.AddrFrom16([16]byte(icmp[8:24])),
	}
	want := byte(optionSource)
	if !n.request {
		want = optionTarget
		n.announce = icmp[4]&advertSolicited == 0
	}
	for opts := icmp[ndLength:]; len(opts) >= 8; {
		length := int(opts[1]) * 8
		if length == 0 || length > len(opts) {
			return n, false // RFC 4861, 4.6: such a packet is to be dropped whole
		}
		if mac := mesh.MAC(opts[2:8]); opts[0] == want {
			n.unsure = n.unsure || !n.mac.IsZero() && n.mac != mac
			n.mac = mac
		}
		opts = opts[length:]
	}
	return n, true
}

// appendAnswer writes the reply to a request: target is at mac. The frame goes to who asked.
func appendAnswer(b []byte, asker mesh.MAC, n *neighbour, mac mesh.MAC) []byte {
	b = append(b, asker[:]...)
	b = append(b, mac[:]...)
	if n.target.Is4() {
		b = binary.BigEndian.AppendUint16(b, typeARP)
		b = append(b, 0, 1, 8, 0, 6, 4, 0, arpReply)
		b = append(b, mac[:]...)
		b = append4(b, n.target)
		b = append(b, n.mac[:]...)
		return append4(b, n.sender)
	}
	b = binary.BigEndian.AppendUint16(b, typeIPv6)
	ip := len(b)
	b = append(b, 0x60, 0, 0, 0, 0, ndLength+8, protoICMP6, minimumHopLimitND)
	b = append16(b, n.target)
	b = append16(b, n.sender)
	icmp := len(b)
	b = append(b, neighbourAdvert, 0, 0, 0, advertSolicited|advertOverride, 0, 0, 0)
	b = append16(b, n.target)
	b = append(b, optionTarget, 1)
	b = append(b, mac[:]...)
	binary.BigEndian.PutUint16(b[icmp+2:], icmp6Checksum(b[ip+8:icmp], b[icmp:]))
	return b
}

func append4(b []byte, a netip.Addr) []byte {
	raw := a.As4()
	return append(b, raw[:]...)
}

func append16(b []byte, a netip.Addr) []byte {
	raw := a.As16()
	return append(b, raw[:]...)
}

// icmp6Checksum is the sum over the pseudo header (RFC 8200, 8.1) and the message, whose own checksum
// is zero. Both have even lengths.
func icmp6Checksum(addrs, msg []byte) uint16 {
	sum := uint32(len(msg)) + protoICMP6
	for _, part := range [2][]byte{addrs, msg} {
		for i := 0; i+1 < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
