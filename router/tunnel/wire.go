package tunnel

import (
	"encoding/binary"

	"meshd/mesh"
)

// wireVersion is the second byte of every handshake datagram. A datagram of another version is dropped.
const wireVersion = 1

// Types: the first byte of every datagram. Numbers are big endian everywhere.
const (
	typeHello1 = 0x01 // first handshake message, from the initiator
	typeHello2 = 0x02 // second, from the responder
	typeHello3 = 0x03 // third, from the initiator
	typeCookie = 0x04 // "come back with this": the responder is busy
	typeLost   = 0x05 // "I know no such session": a hint, never trusted by itself
	typeData   = 0x10 // sealed
	typeClear  = 0x11 // frames in clear, tagged with a secret of the session
	typeRelay  = 0x20 // another datagram inside, for a third peer
)

// Data header:
//
//	0        1                 4                 8                               16
//	+--------+-----------------+-----------------+-------------------------------+
//	| type   | reserved, 0     | receiver index  | counter (sealed), tag (clear) |
//	+--------+-----------------+-----------------+-------------------------------+
//
// It is the additional data of the seal, so none of it can be changed on the way.
const (
	dataHeaderLen = 1 + 3 + 4 + 8
	sealLen       = 16 // tag of either AEAD
	lostLen       = 1 + 3 + 4 + macLen
	frameLenLen   = 2 // length before each frame
)

// Relay header:
//
//	0        1        2                 8                 14
//	+--------+--------+-----------------+-----------------+----------------
//	| type   | hops   | to, peer name   | from, peer name | inner datagram
//	+--------+--------+-----------------+-----------------+----------------
//
// hops is how many more links it may take: see router.Onward.
const (
	relayHeaderLen = 1 + 1 + 6 + 6
	maxHops        = 8
)

// The body of a data datagram starts with a byte below 0x80 when it holds frames (the high byte of the
// first frame's length) and with one of these when it does not.
const (
	kindMessage = 0x80 // for Handler.Message: the rest of the body
	kindProbe   = 0x81 // are you there, and does this size get through
	kindAck     = 0x82 // answer to a probe
	kindClose   = 0x83 // goodbye, or refused: code and text
	kindPart    = 0x84 // piece of a body that the path is too narrow for
)

// Before each frame stand two bytes: bit 15 is zero, bit 14 says that the transport checksum holds only
// the sum of the pseudo header (the receiver or its kernel completes it), the other 14 are the length.
const (
	framePartial = 1 << 14
	frameLenMask = framePartial - 1
)

// Overheads, in bytes of an underlay packet that carries one overlay packet.
const (
	ipv4HeaderLen = 20
	ipv6HeaderLen = 40
	udpHeaderLen  = 8
	etherLen      = 14
	bodyOverhead  = dataHeaderLen + frameLenLen + sealLen // around a frame, inside a UDP payload

	// Overhead4 is what one underlay packet over IPv4 spends, Ethernet header of the overlay and relay
	// header included: an underlay of 1500 carries overlay packets of 1500-Overhead4 = 1410 bytes.
	Overhead4 = ipv4HeaderLen + udpHeaderLen + relayHeaderLen + bodyOverhead + etherLen
	// Overhead6 is the same over IPv6: 1390 bytes of 1500.
	Overhead6 = ipv6HeaderLen + udpHeaderLen + relayHeaderLen + bodyOverhead + etherLen

	// MaxMessage is the largest message that Send takes, in bytes. A path too narrow for it gets it in
	// several datagrams.
	MaxMessage = mesh.MaxMessage
	// maxDatagram is the largest UDP payload ever sent or probed: jumbo frames of 9,216 bytes.
	maxDatagram = 9216 - ipv4HeaderLen - udpHeaderLen
	// minDatagram is the smallest a path may offer: IPv4's 576 bytes (RFC 791).
	minDatagram = 576 - ipv4HeaderLen - udpHeaderLen
)

func putDataHeader(b []byte, typ byte, index uint32, counter uint64) {
	b[0], b[1], b[2], b[3] = typ, 0, 0, 0
	binary.BigEndian.PutUint32(b[4:], index)
	binary.BigEndian.PutUint64(b[8:], counter)
}

func putRelayHeader(b []byte, hops byte, to, from mesh.PeerName) {
	b[0], b[1] = typeRelay, hops
	copy(b[2:8], to[:])
	copy(b[8:14], from[:])
}

// parseRelay reads a relay header; ok is false for what is too short or names nobody.
func parseRelay(b []byte) (hops byte, to, from mesh.PeerName, inner []byte, ok bool) {
	if len(b) <= relayHeaderLen || b[0] != typeRelay {
		return 0, to, from, nil, false
	}
	copy(to[:], b[2:8])
	copy(from[:], b[8:14])
	return b[1], to, from, b[relayHeaderLen:], !to.IsZero() && !from.IsZero() && to != from
}

// probe is the body of kindProbe, padded with zeros to the size that is being tried.
//
//	0        1                 5                 9                 11
//	+--------+-----------------+-----------------+-----------------+--------
//	| kind   | id              | my RTT, µs      | my MTU, bytes   | zeros
//	+--------+-----------------+-----------------+-----------------+--------
type probe struct {
	id  uint32
	rtt uint32 // sender's smoothed RTT in µs, 0 unknown
	mtu uint16 // largest UDP payload known to reach the receiver, 0 unknown
}

const probeLen = 1 + 4 + 4 + 2

// appendProbe makes a body of size bytes, or of probeLen if that is more.
func appendProbe(b []byte, p probe, size int) []byte {
	at := len(b)
	b = append(b, kindProbe)
	b = binary.BigEndian.AppendUint32(b, p.id)
	b = binary.BigEndian.AppendUint32(b, p.rtt)
	b = binary.BigEndian.AppendUint16(b, p.mtu)
	for len(b)-at < size {
		b = append(b, 0)
	}
	return b
}

func parseProbe(b []byte) (p probe, ok bool) {
	if len(b) < probeLen || b[0] != kindProbe {
		return p, false
	}
	return probe{binary.BigEndian.Uint32(b[1:]), binary.BigEndian.Uint32(b[5:]), binary.BigEndian.Uint16(b[9:])}, true
}

// ack is the body of kindAck: id of the probe, and the bytes of UDP payload that it arrived with.
//
//	0        1                 5                 7
//	+--------+-----------------+-----------------+
//	| kind   | id              | size            |
//	+--------+-----------------+-----------------+
type ack struct {
	id   uint32
	size uint16
}

const ackLen = 1 + 4 + 2

func appendAck(b []byte, a ack) []byte {
	b = append(b, kindAck)
	b = binary.BigEndian.AppendUint32(b, a.id)
	return binary.BigEndian.AppendUint16(b, a.size)
}

func parseAck(b []byte) (a ack, ok bool) {
	if len(b) < ackLen || b[0] != kindAck {
		return a, false
	}
	return ack{binary.BigEndian.Uint32(b[1:]), binary.BigEndian.Uint16(b[5:])}, true
}

// part is the body of kindPart: piece number index of count, of a body that holds a message, or one frame
// with an IPv6 packet of up to 1,280 bytes, which may not be refused (RFC 8200 5). All pieces of a body
// share an id.
//
//	0        1                 3        4        5
//	+--------+-----------------+--------+--------+----------------
//	| kind   | id              | index  | count  | piece
//	+--------+-----------------+--------+--------+----------------
type part struct {
	id           uint16
	index, count byte
	piece        []byte
}

const (
	partLen  = 1 + 2 + 1 + 1
	maxParts = 4 // maxWhole over the narrowest path, with room
	// maxWhole is the largest body that is sent in parts: an IPv6 packet of the smallest MTU, in a frame
	// with two tags.
	maxWhole = frameLenLen + etherLen + 2*4 + ipv6MinMTU

	ipv6MinMTU = 1280
)

func appendPart(b []byte, p part) []byte {
	b = append(b, kindPart)
	b = binary.BigEndian.AppendUint16(b, p.id)
	return append(append(b, p.index, p.count), p.piece...)
}

func parsePart(b []byte) (p part, ok bool) {
	if len(b) <= partLen || b[0] != kindPart {
		return p, false
	}
	p = part{binary.BigEndian.Uint16(b[1:]), b[3], b[4], b[partLen:]}
	return p, p.count <= maxParts && p.index < p.count
}

// closeCode says how much a close message ends.
type closeCode byte

const (
	closeLink    closeCode = 1 // the direct link only
	closeSession closeCode = 2 // everything: the sender stops
	closeRefused closeCode = 3 // the handshake went through but the sender does not want this peer
)

const maxCloseText = 200

// appendClose makes the body of kindClose: code, then up to maxCloseText bytes of text.
func appendClose(b []byte, code closeCode, why string) []byte {
	return append(append(b, kindClose, byte(code)), why[:min(len(why), maxCloseText)]...)
}

func parseClose(b []byte) (code closeCode, why string, ok bool) {
	if len(b) < 2 || b[0] != kindClose {
		return 0, "", false
	}
	return closeCode(b[1]), printable(b[2:min(len(b), 2+maxCloseText)]), true
}

// printable makes text of a stranger's bytes fit for a log line.
func printable(b []byte) string {
	out := make([]rune, 0, len(b))
	for _, r := range string(b) {
		if r < ' ' || r == 0x7f || r == 0xfffd {
			r = '?'
		}
		out = append(out, r)
	}
	return string(out)
}
