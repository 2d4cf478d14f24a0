package hostnet

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// Frames that a port must not send, by fields of ARP (RFC 826), ICMP and ICMPv6 (RFC 4861, RFC 2710, RFC 3810).
const (
	arpOp, arpSenderMAC, arpSender, arpTarget = 6, 8, 14, 24 // offsets in the packet

	icmpRedirect   = 5
	icmp6MLDReport = 131
	icmp6MLDDone   = 132
	icmp6Router    = 134
	icmp6Solicit   = 135
	icmp6Advert    = 136
	icmp6Redirect  = 137
	icmp6MLD2      = 143

	etherTypeLLDP   = 0x88cc
	llcSpanningTree = 0x42 // IEEE 802.1D 9.3
)

// guardRules writes out the table of the family bridge that stands in for the kernel path's guard where there
// is none: a container speaks in its own name only, and not as a router, a switch or a DHCP server. Each port
// has five chains, to the first of which a map leads; what falls out of that one is let through.
func guardRules(ports []mesh.Port) (chains []chain) {
	base := chain{name: "guard", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, prio: nftables.ChainPriorityRef(-300)}
	for _, p := range ports {
		port, arp, ip4, ip6 := chain{name: p.HostEnd}, chain{name: p.HostEnd + "-arp"}, chain{name: p.HostEnd + "-ip4"}, chain{name: p.HostEnd + "-ip6"}
		base.devices = append(base.devices, p.HostEnd)

		port.add("another's MAC", bytesAt(expr.PayloadBaseLLHeader, 6, p.MAC[:], expr.CmpOpNeq), drop())
		port.add("link control", group([]byte{0x01, 0x80, 0xc2, 0, 0, 0}, 0xf0), drop()) // IEEE 802.1D 7.12.6
		port.add("Cisco's link control", group([]byte{0x01, 0, 0x0c, 0xcc, 0xcc, 0xcc}, 0xfe), drop())
		port.add("link discovery", etherType(etherTypeLLDP), drop())
		// Below 0x600 the type is a length, and an LLC header follows (IEEE 802.3 3.2.6).
		port.add("spanning tree", bytesAt(expr.PayloadBaseLLHeader, 12, []byte{6, 0}, expr.CmpOpLt),
			bytesAt(expr.PayloadBaseNetworkHeader, 0, []byte{llcSpanningTree}, expr.CmpOpEq), drop())
		for _, tagged := range []uint16{unix.ETH_P_8021Q, unix.ETH_P_8021AD} {
			port.add("tagged", etherType(tagged), drop())
		}
		port.add("ARP", etherType(unix.ETH_P_ARP), jump(arp.name))
		port.add("IPv4", etherType(unix.ETH_P_IP), jump(ip4.name))
		port.add("IPv6", etherType(unix.ETH_P_IPV6), jump(ip6.name))

		var own4, own6 []netip.Addr
		for _, a := range p.Addrs {
			if a.Addr().Is4() {
				own4 = append(own4, a.Addr())
			} else {
				own6 = append(own6, a.Addr())
			}
		}
		own6 = append(own6, linkLocal(p.MAC))

		arp.add("another's MAC", bytesAt(expr.PayloadBaseNetworkHeader, arpSenderMAC, p.MAC[:], expr.CmpOpNeq), drop())
		for _, a := range own4 {
			arp.add("from "+a.String(), addrAt(arpSender, a), ret())
			// A probe for a duplicate of its own address bears no sender (RFC 5227 2.1.1).
			arp.add("probe for "+a.String(), bytesAt(expr.PayloadBaseNetworkHeader, arpOp, []byte{0, 1}, expr.CmpOpEq),
				addrAt(arpSender, netip.IPv4Unspecified()), addrAt(arpTarget, a), ret())
		}
		arp.add("another's address", drop())

		ip4.add("DHCP server", udpPort(0, 67), drop())
		ip4.add("to a DHCP client", udpPort(2, 68), drop()) // which does not look at the port that it comes from
		ip4.add("redirect", icmpType(unix.IPPROTO_ICMP, icmpRedirect), drop())
		for _, a := range own4 {
			ip4.add("from "+a.String(), addrAt(12, a), ret())
		}
		ip4.add("another's address", drop())

		ip6.add("DHCP server", udpPort(0, 547), drop())
		ip6.add("to a DHCP client", udpPort(2, 546), drop())
		ip6.add("router", icmpType(unix.IPPROTO_ICMPV6, icmp6Router), drop())
		ip6.add("redirect", icmpType(unix.IPPROTO_ICMPV6, icmp6Redirect), drop())
		for _, kind := range []byte{icmp6Solicit, icmp6Advert} { // the MAC is their first option, of type 1 and 2
			ip6.add("neighbour discovery with another's MAC", icmpType(unix.IPPROTO_ICMPV6, kind),
				bytesAt(expr.PayloadBaseTransportHeader, 24, []byte{kind - icmp6Solicit + 1}, expr.CmpOpEq),
				bytesAt(expr.PayloadBaseTransportHeader, 26, p.MAC[:], expr.CmpOpNeq), drop())
		}
		none := addrAt(8, netip.IPv6Unspecified())
		for _, kind := range []byte{icmp6MLDReport, icmp6MLDDone, icmp6MLD2} { // RFC 3590
			ip6.add("multicast listener", none, icmpType(unix.IPPROTO_ICMPV6, kind), ret())
		}
		advert := chain{name: p.HostEnd + "-na"}
		ip6.add("advertisement", icmpType(unix.IPPROTO_ICMPV6, icmp6Advert), jump(advert.name))
		for _, a := range own6 {
			advert.add("of "+a.String(), target6(a), ret())
			ip6.add("probe for "+a.String(), none, icmpType(unix.IPPROTO_ICMPV6, icmp6Solicit), target6(a), ret())
			ip6.add("from "+a.String(), addrAt(8, a), ret())
		}
		advert.add("of another's address", drop())
		ip6.add("another's address", drop())
		chains = append(chains, advert, arp, ip4, ip6, port)
	}
	return append(chains, base)
}

// linkLocal is the address that the kernel makes from a MAC (RFC 4291 appendix A).
func linkLocal(m mesh.MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// bytesAt compares bytes of a header.
func bytesAt(base expr.PayloadBase, offset uint32, want []byte, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: uint32(len(want))},
		&expr.Cmp{Op: op, Register: 1, Data: want},
	}
}

func addrAt(offset uint32, a netip.Addr) []expr.Any {
	return bytesAt(expr.PayloadBaseNetworkHeader, offset, a.AsSlice(), expr.CmpOpEq)
}

func etherType(kind uint16) []expr.Any {
	return bytesAt(expr.PayloadBaseLLHeader, 12, binary.BigEndian.AppendUint16(nil, kind), expr.CmpOpEq)
}

// group matches destinations of which the last byte is masked.
func group(mac []byte, mask byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseLLHeader, Offset: 0, Len: 6},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 6, Mask: []byte{0xff, 0xff, 0xff, 0xff, 0xff, mask}, Xor: make([]byte, 6)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: mac},
	}
}

func transport(proto byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}}}
}

// udpPort compares a port of UDP, the source at offset 0 or the destination at 2.
func udpPort(offset uint32, port uint16) []expr.Any {
	return append(transport(unix.IPPROTO_UDP), bytesAt(expr.PayloadBaseTransportHeader, offset, binary.BigEndian.AppendUint16(nil, port), expr.CmpOpEq)...)
}

func icmpType(proto, kind byte) []expr.Any {
	return append(transport(proto), bytesAt(expr.PayloadBaseTransportHeader, 0, []byte{kind}, expr.CmpOpEq)...)
}

// target6 compares the target of a neighbour solicitation or advertisement.
func target6(a netip.Addr) []expr.Any {
	return bytesAt(expr.PayloadBaseTransportHeader, 8, a.AsSlice(), expr.CmpOpEq)
}
