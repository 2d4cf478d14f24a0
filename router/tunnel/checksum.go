package tunnel

import (
	"encoding/binary"
	"math/bits"
)

// sum adds b as big-endian 16-bit words to s (RFC 1071), an odd last byte padded with zero. s must be
// smaller than 2^48.
func sum(b []byte, s uint64) uint64 {
	// Eight bytes at a time with end-around carry: sums of 64-bit words fold to the same 16 bits.
	var carry uint64
	for len(b) >= 32 {
		s, carry = bits.Add64(s, binary.BigEndian.Uint64(b), carry)
		s, carry = bits.Add64(s, binary.BigEndian.Uint64(b[8:]), carry)
		s, carry = bits.Add64(s, binary.BigEndian.Uint64(b[16:]), carry)
		s, carry = bits.Add64(s, binary.BigEndian.Uint64(b[24:]), carry)
		b = b[32:]
	}
	for len(b) >= 8 {
		s, carry = bits.Add64(s, binary.BigEndian.Uint64(b), carry)
		b = b[8:]
	}
	// Down to 33 bits, so that the rest cannot overflow.
	s = s>>32 + s&0xffffffff + carry
	for len(b) >= 2 {
		s += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	return s
}

// fold brings a sum down to 16 bits.
func fold(s uint64) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
