package records

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"meshd/mesh"
)

// A delta is what travels: some rows of the table.
//
//	delta     ┌─────────┬─────┬─────┬─ ─
//	          │ 2 (ver.)│ row │ row │       integers are big-endian; uv = unsigned varint (encoding/binary)
//	          └─────────┴─────┴─────┴─ ─
//	row       ┌─────────┬───────────┬──────────────┬───────────────────────┬────────────┐
//	          │ kind 1  │ length uv │ signature 64 │ age uv (names only)   │ body       │
//	          └─────────┴───────────┴──────────────┴───────────────────────┴────────────┘
//	          length counts what follows it. A reader skips kinds that it does not know, and passes on
//	          what follows a body that it does know
//
//	           ──────── key ─────────────────────────┬─ version ──────┬─ content ────────────────────
//	floor     │ peer 6                               │ gen 8 │ seq uv │
//	endpoint  │ peer 6 │ mac 6 │ part 1 │ owner      │ gen 8 │ seq uv │ flags 1 │ parts 1 │ n 1 │ n × prefix │ m 1 │ m × text
//	name      │ addr │ owner │ text                  │ clock uv │ key 32 │ flags 1 │
//
//	text      │ length 1 │ bytes │     a name as ParseName returns it
//	owner     │ length 1 │ bytes │     top bit of length set: bytes stand for lower-case hex (container ids)
//	addr      │ length 1 (4 or 16) │ bytes │
//	prefix    │ bits 1 │ bytes │       0…32: 4 bytes follow; 64…192: IPv6 of bits-64, 16 bytes follow
//	flags     1 = tombstone: for an endpoint nothing follows
//	age       of a tombstone, in minutes; else zero
//
// The signature (Ed25519) is over "meshd names 2", the kind and the body as it came. Floors and endpoints are
// signed by their peer, whose key the topology has; names by their writer, whose key is in the row, so that it
// outlives the writer. The age is not signed, since everybody who keeps a tombstone counts it on.
const deltaVersion = 2

const signContext = "meshd names 2"

const (
	kindFloor    = 1
	kindEndpoint = 2
	kindName     = 3
)

const flagGone = 1

const (
	maxRow     = 1000 // bytes of a row's body as this version writes it; a datagram holds one for sure
	maxOwner   = 120  // bytes; a container id has 64
	maxAddrs   = 32   // of one endpoint
	maxParts   = 32   // rows that one endpoint's names are spread over
	maxCount   = 1 << 62
	maxGen     = 1 << 63
	maxRowSize = 1<<14 - 1 // what two bytes of length can say
)

// Bytes of a row before its body: kind and a length below 2¹⁴.
const rowHeader = 1 + 2

var errCodec = errors.New("malformed delta")

// version orders the rows of one peer.
type version struct {
	gen uint64 // run of that peer: a count in the upper half, random bits in the lower
	seq uint64 // counts that run's changes
}

func (v version) compare(w version) int {
	if v.gen != w.gen {
		if v.gen < w.gen {
			return -1
		}
		return 1
	}
	switch {
	case v.seq < w.seq:
		return -1
	case v.seq > w.seq:
		return 1
	}
	return 0
}

// record is one row's content. Records are immutable: a newer one takes the place of the old.
type record interface {
	kind() byte
	appendKey(b []byte) []byte
	appendRest(b []byte) []byte // version and content
	seal() *sealed
}

// sealed is a row's body as its writer signed it, with what a newer version may have appended. It never changes.
type sealed struct {
	sig  [64]byte
	body []byte
}

func (s *sealed) seal() *sealed { return s }

// signed is what the signature of a row is over.
func signed(b []byte, rec record) []byte {
	b = append(b, signContext...)
	b = append(b, rec.kind())
	return append(b, rec.seal().body...)
}

type floor struct {
	sealed
	peer mesh.PeerName
	ver  version
}

type endpoint struct {
	sealed
	peer  mesh.PeerName
	mac   mesh.MAC
	part  uint8
	owner string

	ver   version
	gone  bool
	parts uint8          // how many rows this endpoint has; all carry its addresses
	addrs []netip.Prefix // sorted
	names []string       // sorted
}

// memory is about what an endpoint takes, in bytes, with its places in all indexes and in the switch. Each name
// is found with all addresses, and each address with all names.
func (e *endpoint) memory() int {
	if e == nil {
		return 0
	}
	return 1024 + 2*len(e.body) + 256*len(e.addrs) + len(e.names)*(256+64*len(e.addrs))
}

type handmade struct {
	sealed
	addr  netip.Addr
	owner string
	name  string

	clock uint64
	key   [32]byte // the writer's
	gone  bool
	age   time.Duration // of a tombstone when it was encoded; not part of its version, and not signed
}

func (*floor) kind() byte    { return kindFloor }
func (*endpoint) kind() byte { return kindEndpoint }
func (*handmade) kind() byte { return kindName }

func (f *floor) appendKey(b []byte) []byte { return append(b, f.peer[:]...) }

func (f *floor) appendRest(b []byte) []byte { return appendVersion(b, f.ver) }

func (e *endpoint) appendKey(b []byte) []byte {
	b = append(b, e.peer[:]...)
	b = append(b, e.mac[:]...)
	b = append(b, e.part)
	return appendOwner(b, e.owner)
}

func (e *endpoint) appendRest(b []byte) []byte {
	b = appendVersion(b, e.ver)
	if e.gone {
		return append(b, flagGone)
	}
	b = append(b, 0, e.parts, byte(len(e.addrs)))
	for _, p := range e.addrs {
		b = appendPrefix(b, p)
	}
	b = append(b, byte(len(e.names)))
	for _, n := range e.names {
		b = appendText(b, n)
	}
	return b
}

func (h *handmade) appendKey(b []byte) []byte {
	a := h.addr.AsSlice()
	b = append(b, byte(len(a)))
	b = append(b, a...)
	b = appendOwner(b, h.owner)
	return appendText(b, h.name)
}

func (h *handmade) appendRest(b []byte) []byte {
	b = binary.AppendUvarint(b, h.clock)
	b = append(b, h.key[:]...)
	if !h.gone {
		return append(b, 0)
	}
	return append(b, flagGone)
}

// itemOf hashes a record for the digests. SHA-256 keeps a container's owner from choosing names that
// collide on purpose. A tombstone's age changes by itself and is left out, and so is the signature.
func itemOf(rec record, scratch []byte) mesh.Item {
	b := append(scratch[:0], rec.kind())
	b = rec.appendKey(b)
	key := sha256.Sum256(b)
	b = rec.appendRest(b)
	ver := sha256.Sum256(b)
	return mesh.Item{Key: binary.BigEndian.Uint64(key[:]), Version: binary.BigEndian.Uint64(ver[:])}
}

// appendRow appends a whole row, as it was signed.
func appendRow(b []byte, rec record) []byte {
	start := len(b)
	b = append(b, rec.kind(), 0, 0)
	b = append(b, rec.seal().sig[:]...)
	if h, ok := rec.(*handmade); ok {
		b = binary.AppendUvarint(b, uint64(h.age/time.Minute))
	}
	b = append(b, rec.seal().body...)
	n := len(b) - start - rowHeader
	// Two bytes always: a varint may be longer than it needs to be.
	b[start+1] = byte(n) | 0x80
	b[start+2] = byte(n >> 7)
	return b
}

func appendVersion(b []byte, v version) []byte {
	b = binary.BigEndian.AppendUint64(b, v.gen)
	return binary.AppendUvarint(b, v.seq)
}

func appendText(b []byte, s string) []byte { return append(append(b, byte(len(s))), s...) }

func appendOwner(b []byte, s string) []byte {
	if packed, ok := packHex(s); ok {
		b = append(b, byte(len(packed))|0x80)
		return append(b, packed...)
	}
	return appendText(b, s)
}

// packHex halves container ids. Short strings are left alone.
func packHex(s string) ([]byte, bool) {
	if len(s) < 32 || len(s)%2 != 0 || len(s)/2 > 0x7f {
		return nil, false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return nil, false
		}
	}
	p, err := hex.DecodeString(s)
	return p, err == nil
}

func appendPrefix(b []byte, p netip.Prefix) []byte {
	if p.Addr().Is4() {
		a := p.Addr().As4()
		return append(append(b, byte(p.Bits())), a[:]...)
	}
	a := p.Addr().As16()
	return append(append(b, 64+byte(p.Bits())), a[:]...)
}

// parseDelta reads a whole delta or nothing. What it returns shares no memory with the input.
func parseDelta(b []byte) ([]record, error) {
	if len(b) == 0 || b[0] != deltaVersion {
		return nil, fmt.Errorf("%w: version", errCodec)
	}
	r := reader{b: b[1:]}
	var out []record
	for len(r.b) > 0 {
		kind := r.byte()
		n := r.uvarint(maxRowSize)
		body := reader{b: r.take(int(n))}
		if r.bad {
			return nil, fmt.Errorf("%w: row %d is cut short", errCodec, len(out))
		}
		rec, ok := parseBody(kind, &body)
		if !ok {
			return nil, fmt.Errorf("%w: row %d of kind %d", errCodec, len(out), kind)
		}
		if rec != nil {
			out = append(out, rec)
		}
	}
	return out, nil
}

// parseBody returns nil and true for a kind of row that this version does not know.
func parseBody(kind byte, r *reader) (rec record, ok bool) {
	if kind < kindFloor || kind > kindName {
		return nil, true
	}
	var s sealed
	var age time.Duration
	copy(s.sig[:], r.take(len(s.sig)))
	if kind == kindName {
		age = time.Duration(r.uvarint(uint64(forgetAge/time.Minute))) * time.Minute
	}
	s.body = bytes.Clone(r.b)
	switch kind {
	case kindFloor:
		f := &floor{sealed: s, peer: r.peer(), ver: r.version()}
		r.check(!f.peer.IsZero())
		rec = f
	case kindEndpoint:
		e := r.endpoint()
		e.sealed = s
		rec = e
	case kindName:
		h := r.handmade()
		h.sealed, h.age = s, age
		r.check(h.gone || age == 0)
		rec = h
	}
	return rec, !r.bad
}

// reader takes a body apart. After the first lack or nonsense bad is set and all it returns is zero.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if r.bad || n > len(r.b) {
		r.bad = true
		return nil
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) byte() byte {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uvarint(limit uint64) uint64 {
	v, n := binary.Uvarint(r.b)
	if r.bad || n <= 0 || v > limit {
		r.bad = true
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) peer() (p mesh.PeerName) {
	copy(p[:], r.take(6))
	return p
}

func (r *reader) version() (v version) {
	if b := r.take(8); b != nil {
		v.gen = binary.BigEndian.Uint64(b)
	}
	v.seq = r.uvarint(maxCount)
	r.check(v.gen < maxGen)
	return v
}

func (r *reader) check(ok bool) { r.bad = r.bad || !ok }

func (r *reader) text() string { return string(r.take(int(r.byte()))) }

func (r *reader) owner() string {
	n := r.byte()
	if n&0x80 != 0 {
		return hex.EncodeToString(r.take(int(n &^ 0x80)))
	}
	return string(r.take(int(n)))
}

func (r *reader) addr() netip.Addr {
	a, _ := netip.AddrFromSlice(r.take(int(r.byte())))
	r.check(validAddr(a))
	return a
}

func (r *reader) prefix() netip.Prefix {
	bits, size := int(r.byte()), 4
	if bits >= 64 {
		bits, size = bits-64, 16
	}
	a, _ := netip.AddrFromSlice(r.take(size))
	p := netip.PrefixFrom(a, bits)
	r.check(p.IsValid() && validAddr(a))
	return p
}

func (r *reader) endpoint() *endpoint {
	e := &endpoint{peer: r.peer()}
	copy(e.mac[:], r.take(6))
	e.part = r.byte()
	e.owner = r.owner()
	e.ver = r.version()
	e.gone = r.byte()&flagGone != 0
	r.check(!e.peer.IsZero() && e.part < maxParts && validOwner(e.owner) && !e.mac.IsMulticast())
	if e.gone || r.bad {
		return e
	}
	e.parts = r.byte()
	n := int(r.byte())
	r.check(e.parts > e.part && e.parts <= maxParts && n <= maxAddrs)
	for i := 0; i < n && !r.bad; i++ {
		e.addrs = append(e.addrs, r.prefix())
	}
	n = int(r.byte())
	for i := 0; i < n && !r.bad; i++ {
		name := r.text()
		r.check(validName(name))
		e.names = append(e.names, name)
	}
	r.check(strictlySorted(e.addrs, comparePrefix) && slices.IsSorted(e.names))
	return e
}

func (r *reader) handmade() *handmade {
	h := &handmade{addr: r.addr(), owner: r.owner(), name: r.text()}
	h.clock = r.uvarint(maxCount)
	copy(h.key[:], r.take(len(h.key)))
	h.gone = r.byte()&flagGone != 0
	r.check(validOwner(h.owner) && validName(h.name) && h.key != [32]byte{})
	return h
}

func strictlySorted[T any](s []T, cmp func(a, b T) int) bool {
	for i := 1; i < len(s); i++ {
		if cmp(s[i-1], s[i]) >= 0 {
			return false
		}
	}
	return true
}

// validOwner keeps owners printable, since status shows them.
func validOwner(s string) bool {
	if s == "" || len(s) > maxOwner {
		return false
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

func sameKey(a, b record) bool {
	switch a := a.(type) {
	case *floor:
		b, ok := b.(*floor)
		return ok && a.peer == b.peer
	case *endpoint:
		b, ok := b.(*endpoint)
		return ok && a.peer == b.peer && a.mac == b.mac && a.part == b.part && a.owner == b.owner
	case *handmade:
		b, ok := b.(*handmade)
		return ok && a.addr == b.addr && a.owner == b.owner && a.name == b.name
	}
	return false
}

// compareRecords orders two records of one key: the larger stays. Equal versions with different content
// are nobody's intention, but peers that see both must agree on one.
func compareRecords(a, b record) int {
	switch a := a.(type) {
	case *floor:
		return a.ver.compare(b.(*floor).ver)
	case *endpoint:
		if c := a.ver.compare(b.(*endpoint).ver); c != 0 {
			return c
		}
		return bytes.Compare(a.appendRest(nil), b.appendRest(nil))
	case *handmade:
		b := b.(*handmade)
		switch {
		case a.clock < b.clock:
			return -1
		case a.clock > b.clock:
			return 1
		case a.key != b.key:
			return bytes.Compare(a.key[:], b.key[:])
		case a.gone == b.gone:
			return 0
		case a.gone:
			return 1
		}
		return -1
	}
	return 0
}
