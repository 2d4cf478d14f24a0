package fastdp

import (
	"encoding/binary"

	"meshd/mesh"
)

// A probe is an Ethernet frame of its own type. The far kernel swaps the addresses, changes the type and
// sends it back, whole:
//
//	 0  destination MAC  02:6d:65:73:iH:iL, i = short id it is for (6)
//	 6  source MAC       the same with the sender's id (6)
//	12  type             0x88b5, in the answer 0x88b6 (2, big-endian)
//	14  magic            "meshprob" (8)
//	22  nonce            random, so that only who saw the probe can answer (8)
//	30  size class       0 small, 1 full (1)
//	31  zeros            up to the size being proven
const (
	probeHeader = 6 + 6 + 2
	probeLen    = probeHeader + 8 + 8 + 1
	typeProbe   = 0x88b5
	typeProbed  = 0x88b6
	smallProbe  = 64 // bytes of payload
)

const probeMagic = "meshprob"

// appendProbe makes a probe of mtu bytes after the Ethernet header, or a small one.
func appendProbe(b []byte, from, to mesh.ShortID, nonce uint64, size probeSize, mtu int) []byte {
	dst, src := probeMAC(to), probeMAC(from)
	start := len(b)
	b = append(b, dst[:]...)
	b = append(b, src[:]...)
	b = binary.BigEndian.AppendUint16(b, typeProbe)
	b = append(b, probeMagic...)
	b = binary.BigEndian.AppendUint64(b, nonce)
	b = append(b, byte(size))
	want := probeHeader + smallProbe
	if size == full {
		want = probeHeader + mtu
	}
	for len(b)-start < want {
		b = append(b, 0)
	}
	return b
}

// parseProbe reads an answer; from is whose it is.
func parseProbe(b []byte, mtu int) (from mesh.ShortID, nonce uint64, size probeSize, ok bool) {
	if len(b) < probeLen || binary.BigEndian.Uint16(b[12:]) != typeProbed || string(b[14:22]) != probeMagic {
		return 0, 0, 0, false
	}
	from = mesh.ShortID(b[10])<<8 | mesh.ShortID(b[11])
	if from == 0 || from > mesh.MaxShortID || mesh.MAC(b[6:12]) != probeMAC(from) {
		return 0, 0, 0, false
	}
	switch size = probeSize(b[30]); {
	case size == small:
	case size == full && len(b) >= probeHeader+mtu:
	default:
		return 0, 0, 0, false
	}
	return from, binary.BigEndian.Uint64(b[22:]), size, true
}
