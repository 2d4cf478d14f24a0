package fastdp

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"meshd/mesh"
)

// Frames for the tests, built from the inside out. Checksums are left zero: nothing under test reads them.

func ether(dst, src mesh.MAC, etherType uint16, payload ...byte) []byte {
	b := append(dst[:], src[:]...)
	b = binary.BigEndian.AppendUint16(b, etherType)
	return append(b, payload...)
}

func ip4(src, dst string, proto byte, payload ...byte) []byte {
	b := make([]byte, 20, 20+len(payload))
	b[0], b[8], b[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
	s, d := netip.MustParseAddr(src).As4(), netip.MustParseAddr(dst).As4()
	copy(b[12:], s[:])
	copy(b[16:], d[:])
	return append(b, payload...)
}

func ip6(src, dst string, next byte, payload ...byte) []byte {
	b := make([]byte, 40, 40+len(payload))
	b[0], b[6], b[7] = 0x60, next, 255
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	s, d := netip.MustParseAddr(src).As16(), netip.MustParseAddr(dst).As16()
	copy(b[8:], s[:])
	copy(b[24:], d[:])
	return append(b, payload...)
}

func udp(sport, dport uint16, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, sport)
	b = binary.BigEndian.AppendUint16(b, dport)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	return append(append(b, 0, 0), payload...)
}

func arp(op byte, senderMAC mesh.MAC, sender string, targetMAC mesh.MAC, target string) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, op}
	s, t := netip.MustParseAddr(sender).As4(), netip.MustParseAddr(target).As4()
	return slices.Concat(b, senderMAC[:], s[:], targetMAC[:], t[:])
}

// neighbour is an ICMPv6 message of neighbour discovery, with one link-layer option.
func neighbour(icmpType byte, target string, option byte, mac mesh.MAC) []byte {
	t := netip.MustParseAddr(target).As16()
	return slices.Concat([]byte{icmpType, 0, 0, 0, 0, 0, 0, 0}, t[:], []byte{option, 1}, mac[:])
}
