package gossip

import (
	"encoding/binary"
	"hash/crc32"
	"net"
	"net/netip"
	"slices"
	"strconv"

	"meshd/mesh"
)

// memberlist addresses its nodes by IP and port. Ours stand for peers, whose datagrams the tunnel routes:
// a unique local address (RFC 4193) holds the peer's name in its last six bytes.
var memberPrefix = [10]byte{0xfd, 'm', 'e', 's', 'h', 'd', 0, 0, 0, 0}

const memberPort = 6783

func memberIP(p mesh.PeerName) net.IP { return append(memberPrefix[:], p[:]...) }

func memberAddr(p mesh.PeerName) string {
	return net.JoinHostPort(memberIP(p).String(), strconv.Itoa(memberPort))
}

// peerOfIP reads what memberIP wrote.
func peerOfIP(ip []byte) (p mesh.PeerName, ok bool) {
	if len(ip) != 16 || [10]byte(ip[:10]) != memberPrefix {
		return p, false
	}
	p = mesh.PeerName(ip[10:])
	return p, !p.IsZero()
}

func peerOfAddr(addr string) (p mesh.PeerName, ok bool) {
	a, err := netip.ParseAddrPort(addr)
	if err != nil {
		return p, false
	}
	raw := a.Addr().As16()
	return peerOfIP(raw[:])
}

// peerOfNode reads a node's name, which is a peer's name in full.
func peerOfNode(s string) (p mesh.PeerName, ok bool) {
	p, err := mesh.ParsePeerName(s)
	return p, err == nil && p.String() == s
}

// Packets of memberlist 0.7 as far as they are let through: a type byte and a msgpack map, a compound of
// such packets (count, lengths, packets), or one with a checksum in front.
const (
	memberPing = iota
	memberIndirect
	memberAck
	memberSuspect
	memberAlive
	memberDead
	_
	memberCompound
	_
	_
	_
	memberNack
	memberCRC
)

// maxDeath bounds the incarnation in which a peer can be said to have failed: lower than that in which it can
// be said to be alive, so that no claim is the last word. Honest peers count from one.
const maxDeath = 1 << 30

// claim is what a packet says of somebody's life.
type claim struct {
	kind        byte // memberSuspect, memberAlive or memberDead
	peer        mesh.PeerName
	incarnation uint32
}

// checkMember looks through a packet that from sent and returns what memberlist may see of it: every part is one of
// the known kinds with sane fields, the sender speaks for itself only where that is claimed, addresses stand for
// names, and nothing is compressed, nested or for somebody else's software; else ok is false. accept is asked about
// every claim. One that it does not believe is left out, and only that: the packet may hold a probe as well, and who
// does not answer is suspected in turn. The packet is borrowed, or empty when nothing is left.
func checkMember(from mesh.PeerName, b []byte, accept func(claim) bool) (packet []byte, ok bool) {
	if len(b) >= 5 && b[0] == memberCRC {
		if crc32.ChecksumIEEE(b[5:]) != binary.BigEndian.Uint32(b[1:]) {
			return nil, false
		}
		b = b[5:] // memberlist does without
	}
	if len(b) < 1 || b[0] != memberCompound {
		ok, believed := checkPart(from, b, accept)
		if !believed {
			b = nil
		}
		return b, ok
	}
	if len(b) < 2 || len(b) < 2+2*int(b[1]) {
		return nil, false
	}
	n := int(b[1])
	lengths, parts := b[2:2+2*n], b[2+2*n:]
	var left []byte // lengths of the parts that stay
	var stay []byte // and those parts
	for ; len(lengths) > 0; lengths = lengths[2:] {
		size := int(binary.BigEndian.Uint16(lengths))
		if size > len(parts) {
			return nil, false
		}
		ok, believed := checkPart(from, parts[:size], accept)
		if !ok {
			return nil, false
		}
		if believed {
			left = append(left, lengths[:2]...)
			stay = append(stay, parts[:size]...)
		}
		parts = parts[size:]
	}
	if len(left) == 0 {
		return nil, true
	}
	return slices.Concat([]byte{memberCompound, byte(len(left) / 2)}, left, stay), true
}

// checkPart reports whether a part is well-formed, and then whether it is believed.
func checkPart(from mesh.PeerName, b []byte, accept func(claim) bool) (ok, believed bool) {
	if len(b) < 2 {
		return false, false
	}
	kind := b[0]
	f, ok := parseFields(b[1:])
	if !ok {
		return false, false
	}
	node, named := peerOfNode(string(f.node))
	addr, addressed := peerOfIP(f.addr)
	switch kind {
	case memberPing:
		ok = (named || len(f.node) == 0) && f.source(from)
	case memberIndirect:
		target, targeted := peerOfIP(f.target)
		ok = targeted && named && target == node && f.source(from)
	case memberAck, memberNack:
		ok = true
	case memberAlive:
		ok = named && addressed && addr == node && f.port == memberPort && len(f.meta) == 0 && len(f.vsn) == 6
		return ok, ok && accept(claim{kind, node, uint32(f.incarnation)})
	case memberSuspect, memberDead:
		_, signed := peerOfNode(string(f.from))
		ok = named && signed && f.incarnation < maxDeath
		return ok, ok && accept(claim{kind, node, uint32(f.incarnation)})
	default:
		ok = false
	}
	return ok, ok
}

// fields are what the packets' maps may hold.
type fields struct {
	node, from, sourceNode        []byte
	addr, target, sourceAddr      []byte
	meta, vsn, payload            []byte
	incarnation, seq, port, sport uint64
}

// source reports whether the packet asks to be answered to its sender, or does not say.
func (f *fields) source(from mesh.PeerName) bool {
	if len(f.sourceNode) == 0 && len(f.sourceAddr) == 0 {
		return true
	}
	name, ok := peerOfNode(string(f.sourceNode))
	addr, ok2 := peerOfIP(f.sourceAddr)
	return ok && ok2 && name == from && addr == from
}

// parseFields reads one msgpack map of short strings, numbers, booleans and nil, as memberlist's own
// structs become, and nothing else. Unknown keys are a later version's and let through.
func parseFields(b []byte) (f fields, ok bool) {
	if len(b) == 0 || b[0]&0xf0 != 0x80 {
		return f, false
	}
	n := int(b[0] & 0x0f)
	b = b[1:]
	for range n {
		key, _, rest, ok := parseValue(b)
		if !ok || key == nil {
			return f, false
		}
		raw, number, rest, ok := parseValue(rest)
		if !ok {
			return f, false
		}
		b = rest
		switch string(key) {
		case "Node":
			f.node = raw
		case "From":
			f.from = raw
		case "SourceNode":
			f.sourceNode = raw
		case "Addr":
			f.addr = raw
		case "Target":
			f.target = raw
		case "SourceAddr":
			f.sourceAddr = raw
		case "Meta":
			f.meta = raw
		case "Vsn":
			f.vsn = raw
		case "Payload":
			f.payload = raw
		case "Incarnation":
			f.incarnation = number
		case "SeqNo":
			f.seq = number
		case "Port":
			f.port = number
		case "SourcePort":
			f.sport = number
		}
	}
	return f, len(b) == 0 && f.incarnation < 1<<31 && f.seq < 1<<32 && f.port < 1<<16 && f.sport < 1<<16
}

// parseValue reads one msgpack value: raw bytes of at most 64, or an unsigned number.
func parseValue(b []byte) (raw []byte, number uint64, rest []byte, ok bool) {
	if len(b) == 0 {
		return nil, 0, nil, false
	}
	c, b := b[0], b[1:]
	size := 0
	switch {
	case c < 0x80: // small number
		return nil, uint64(c), b, true
	case c >= 0xa0 && c < 0xc0: // short string
		size = int(c & 0x1f)
	case c == 0xc0 || c == 0xc2 || c == 0xc3: // nil, false, true
		return nil, 0, b, true
	case c == 0xc4 || c == 0xd9: // bytes, string
		if len(b) < 1 || b[0] > 64 {
			return nil, 0, nil, false
		}
		size, b = int(b[0]), b[1:]
	case c >= 0xcc && c <= 0xcf: // unsigned of 1, 2, 4 or 8 bytes
		width := 1 << (c - 0xcc)
		if len(b) < width {
			return nil, 0, nil, false
		}
		for _, x := range b[:width] {
			number = number<<8 | uint64(x)
		}
		return nil, number, b[width:], true
	default:
		return nil, 0, nil, false
	}
	if len(b) < size {
		return nil, 0, nil, false
	}
	return b[:size:size], 0, b[size:], true
}

// appendAlive writes the packet with which memberlist hears that peer is alive.
func appendAlive(b []byte, peer mesh.PeerName, incarnation uint32) []byte {
	str := func(s string) { b = append(append(b, 0xa0|byte(len(s))), s...) }
	b = append(b, memberAlive, 0x86)
	str("Incarnation")
	b = binary.BigEndian.AppendUint32(append(b, 0xce), incarnation)
	str("Node")
	str(peer.String())
	str("Addr")
	str(string(memberIP(peer)))
	str("Port")
	b = binary.BigEndian.AppendUint16(append(b, 0xcd), memberPort)
	str("Meta")
	str("")
	str("Vsn")
	str(string(memberVsn[:]))
	return b
}

// memberVsn is what a memberlist says of its versions: protocol min, max, current, and the same of the
// delegate, which we leave at zero.
var memberVsn = [6]byte{1, 5, 2, 0, 0, 0}
