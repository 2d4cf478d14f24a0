// Package mesh holds the value types that every room speaks: peer names, MAC addresses, short ids
// and endpoints. It imports the standard library only, keeps no state and starts nothing, so that
// any room may use it without learning about another.
package mesh

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// PeerName identifies one meshd: 48 bits, written like a MAC address ("7a:9f:eb:b6:0c:6e").
// The zero value names nobody.
type PeerName [6]byte

// MAC is an IEEE 802 48-bit address.
type MAC [6]byte

// ShortID is a peer's 12-bit id on the kernel path, where two of them fill a VNI. Zero means none.
type ShortID uint16

// MaxShortID is the largest short id.
const MaxShortID ShortID = 1<<12 - 1

// RunID tells one run of a meshd from the next: random at every start.
type RunID uint64

// Owner ids of endpoints that belong to no container.
const (
	OwnerExpose = "mesh:expose" // the host's own address on the bridge
	OwnerExtern = "mesh:extern" // dns-add of addresses without a container
)

// Endpoint is one interface attached to the mesh.
type Endpoint struct {
	Peer  PeerName       // the peer whose bridge it is on
	Owner string         // container id or one of the Owner constants
	MAC   MAC            // of the interface inside
	Addrs []netip.Prefix // address and the length of its subnet, sorted
	Names []string       // fully qualified, lower case, with the final dot, sorted
}

var errPeerName = errors.New("a peer name is six hexadecimal bytes such as 7a:9f:eb:b6:0c:6e, or shortened such as ::1")

// ParsePeerName reads MAC notation; "::" stands, once, for as many zero bytes as are missing.
func ParsePeerName(s string) (PeerName, error) {
	b, err := parseSix(s)
	if err != nil {
		return PeerName{}, fmt.Errorf("peer name %q: %w", s, errPeerName)
	}
	if b == [6]byte{} {
		return PeerName{}, fmt.Errorf("peer name %q: all zero names nobody", s)
	}
	return PeerName(b), nil
}

// ParseMAC reads "02:42:ac:11:00:02".
func ParseMAC(s string) (MAC, error) {
	if strings.Contains(s, "::") {
		return MAC{}, fmt.Errorf("MAC address %q: not six hexadecimal bytes", s)
	}
	b, err := parseSix(s)
	if err != nil {
		return MAC{}, fmt.Errorf("MAC address %q: not six hexadecimal bytes", s)
	}
	return MAC(b), nil
}

func parseSix(s string) (b [6]byte, err error) {
	head, tail, short := strings.Cut(s, "::")
	left, err := parseBytes(head)
	if err != nil {
		return b, err
	}
	right, err := parseBytes(tail)
	if err != nil {
		return b, err
	}
	n := len(left) + len(right)
	if n > 6 || !short && n != 6 || short && n == 6 {
		return b, errPeerName
	}
	copy(b[:], left)
	copy(b[6-len(right):], right)
	return b, nil
}

func parseBytes(s string) ([]byte, error) {
	if s == "" {
		return nil, nil
	}
	var out []byte
	for part := range strings.SplitSeq(s, ":") {
		if len(part) > 2 {
			return nil, errPeerName
		}
		v, err := strconv.ParseUint(part, 16, 8)
		if err != nil {
			return nil, err
		}
		out = append(out, byte(v))
	}
	return out, nil
}

func sixString(b [6]byte) string {
	var out [17]byte
	for i, v := range b {
		if i > 0 {
			out[3*i-1] = ':'
		}
		hex.Encode(out[3*i:3*i+2], []byte{v})
	}
	return string(out[:])
}

func (p PeerName) String() string { return sixString(p) }

// IsZero reports whether p names nobody.
func (p PeerName) IsZero() bool { return p == PeerName{} }

// Compare orders names bytewise.
func (p PeerName) Compare(q PeerName) int { return cmp.Compare(p.number(), q.number()) }

// number orders names as their bytes do; it is there because Compare sorts thousands, which strings make slow.
func (p PeerName) number() uint64 {
	return uint64(binary.BigEndian.Uint32(p[:]))<<16 | uint64(binary.BigEndian.Uint16(p[4:]))
}

// MarshalText writes MAC notation, so that names are JSON strings and map keys.
func (p PeerName) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads what MarshalText wrote; the empty text and the zero name are the zero name.
func (p *PeerName) UnmarshalText(text []byte) error {
	if len(text) == 0 || string(text) == (PeerName{}).String() {
		*p = PeerName{}
		return nil
	}
	v, err := ParsePeerName(string(text))
	if err == nil {
		*p = v
	}
	return err
}

func (m MAC) String() string { return sixString(m) }

// IsMulticast reports whether the group bit is set; broadcast is one such address.
func (m MAC) IsMulticast() bool { return m[0]&1 != 0 }

// IsBroadcast reports whether m is ff:ff:ff:ff:ff:ff.
func (m MAC) IsBroadcast() bool { return m == MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff} }

// IsZero reports whether m is 00:00:00:00:00:00.
func (m MAC) IsZero() bool { return m == MAC{} }

// MarshalText writes MAC notation.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (m *MAC) UnmarshalText(text []byte) error {
	v, err := ParseMAC(string(text))
	if err == nil {
		*m = v
	}
	return err
}
