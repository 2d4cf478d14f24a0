package hostnet

import (
	"encoding/binary"
	"net/netip"

	"meshd/mesh"
)

const (
	etherLen = 14
	arpLen   = 28
	ipv6Len  = 40
	naLen    = 32 // neighbour advertisement with the target's link-layer address

	etherTypeARP  = 0x0806
	etherTypeIPv6 = 0x86dd
)

// appendGratuitousARP appends the frame by which mac tells everyone that it has the IPv4 address a: an
// ARP request for the own address (RFC 5227 3, "ARP announcement").
//
//	0  destination ff:ff:ff:ff:ff:ff, source mac, type 0x0806
//	14 Ethernet (1), IPv4 (0x0800), lengths 6 and 4, request (1)
//	22 sender mac, a; target zero, a
func appendGratuitousARP(b []byte, mac mesh.MAC, a netip.Addr) []byte {
	ip := a.As4()
	b = append(b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	b = append(b, mac[:]...)
	b = binary.BigEndian.AppendUint16(b, etherTypeARP)
	b = append(b, 0, 1, 8, 0, 6, 4, 0, 1)
	b = append(b, mac[:]...)
	b = append(b, ip[:]...)
	b = append(b, 0, 0, 0, 0, 0, 0)
	return append(b, ip[:]...)
}

// appendNeighbourAdvertisement appends the frame by which mac tells all nodes that it has the IPv6
// address a (RFC 4861 4.4 and 7.2.6): unsolicited, overriding, from a itself, hop limit 255.
func appendNeighbourAdvertisement(b []byte, mac mesh.MAC, a netip.Addr) []byte {
	ip := a.As16()
	allNodes := [16]byte{0: 0xff, 1: 0x02, 15: 1}
	b = append(b, 0x33, 0x33, 0, 0, 0, 1)
	b = append(b, mac[:]...)
	b = binary.BigEndian.AppendUint16(b, etherTypeIPv6)
	b = append(b, 0x60, 0, 0, 0, 0, naLen, 58, 255)
	b = append(b, ip[:]...)
	b = append(b, allNodes[:]...)
	body := len(b)
	b = append(b, 136, 0, 0, 0) // type, code, checksum
	b = append(b, 0x20, 0, 0, 0)
	b = append(b, ip[:]...)
	b = append(b, 2, 1) // option: target link-layer address, one unit of 8 bytes
	b = append(b, mac[:]...)
	sum := sum16(uint32(naLen)+58, ip[:], allNodes[:], b[body:])
	binary.BigEndian.PutUint16(b[body+2:], sum)
	return b
}

// sum16 is the Internet checksum (RFC 1071) of parts, each of even length, on top of start.
func sum16(start uint32, parts ...[]byte) uint16 {
	sum := uint64(start)
	for _, p := range parts {
		for ; len(p) >= 2; p = p[2:] {
			sum += uint64(binary.BigEndian.Uint16(p))
		}
		if len(p) == 1 {
			sum += uint64(p[0]) << 8
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
