package router

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"meshd/mesh"
)

// A delta of the topology is a sequence of records, each written by the peer that it is about. Numbers
// are big-endian.
//
//	 0  2  length n of the body
//	 2  6  peer
//	 8  1  page: 0 the peer itself, 1 to 255 a part of its links
//	 9  4  incarnation ┐
//	13  8  run         ┘ the epoch
//	21  4  version, counting within the epoch over all pages
//	25 64  signature
//	89  n  body
//
// The signature (Ed25519) is the peer's own, over "meshd topology 1", the 25 bytes before it and the body as
// it came. Its key is that of the peer's page 0; a page of links is understood by who has that.
//
// Body of page 0; a later version appends, an earlier one ignores what is appended and passes it on:
//
//	 0 32  public key
//	32  2  port
//	34  2  short id
//	36  2  MTU of the overlay
//	38  4  flags
//	42  4  seconds that the run had lasted when this was written
//	46  1  protocol version
//	47  1  length m of the nickname
//	48  m  nickname
//
// Body of the other pages: links, each with its length in front (not counted), so that a link can grow:
//
//	 0  1  length of what follows: 17 with an IPv4 address, 29 with IPv6
//	 1  6  to
//	 7  1  flags: 1 outbound, 2 sealed, 4 damped
//	 8  1  round trip: 10 µs × 2^(v/8)
//	 9  2  MTU of the link
//	11  1  length a of the address: 4 or 16
//	12  a  address
//	    2  port
//
// A page holds at most linksPerPage links, so that every record fits one message between peers.
const (
	signedHeader = 2 + 6 + 1 + 4 + 8 + 4
	recordHeader = signedHeader + 64
	peerBody     = 32 + 2 + 2 + 2 + 4 + 4 + 1 + 1
	nickLength   = peerBody - 1
	linkBody4    = 6 + 1 + 1 + 2 + 1 + 4 + 2
	linkBody6    = 6 + 1 + 1 + 2 + 1 + 16 + 2
	linksPerPage = 32
	maxPages     = 255
	maxBody      = mesh.MaxMessage - 8 - recordHeader // 8: headers of those who carry it
)

const (
	wireOutbound = 1 << iota
	wireSealed
	wireDamped
)

var errRecord = errors.New("malformed topology record")

// pageID names a record.
type pageID struct {
	peer mesh.PeerName
	page uint8
}

// record is one entry of the replicated table: what was said, and what it means.
type record struct {
	id      pageID
	epoch   Epoch
	version uint32
	sig     [64]byte
	body    []byte    // as it came, with what a newer version may have appended; never changed
	peer    Peer      // page 0
	digest  mesh.Item // of all the above, made on first use
}

// newer reports whether r replaces old. Equal epochs and versions with different bodies do not come from
// an honest peer; the order of their bytes decides, so that all peers decide alike.
func (r *record) newer(old *record) bool {
	if c := r.epoch.Compare(old.epoch); c != 0 {
		return c > 0
	}
	if r.version != old.version {
		return r.version > old.version
	}
	return string(r.body) > string(old.body)
}

func (r *record) appendHeader(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(r.body)))
	b = append(b, r.id.peer[:]...)
	b = append(b, r.id.page)
	b = binary.BigEndian.AppendUint32(b, r.epoch.Incarnation)
	b = binary.BigEndian.AppendUint64(b, uint64(r.epoch.Run))
	return binary.BigEndian.AppendUint32(b, r.version)
}

func appendRecord(b []byte, r *record) []byte {
	b = r.appendHeader(b)
	b = append(b, r.sig[:]...)
	return append(b, r.body...)
}

// signContext begins everything that a peer signs here, so that it stands for nothing else.
const signContext = "meshd topology 1"

// signed is what the signature is over.
func (r *record) signed() []byte {
	b := make([]byte, 0, len(signContext)+signedHeader+len(r.body))
	return append(r.appendHeader(append(b, signContext...)), r.body...)
}

// parseRecords reads a whole delta or nothing. The records own their bytes.
func parseRecords(b []byte) ([]*record, error) {
	return parseNews(b, func(pageID) *record { return nil })
}

// parseNews is parseRecords for somebody who has records already: one that is the same, byte for byte, stands
// for what came. Most of what comes is known.
func parseNews(b []byte, have func(pageID) *record) ([]*record, error) {
	var out []*record
	for len(b) > 0 {
		if len(b) < recordHeader {
			return nil, fmt.Errorf("%w: %d bytes left", errRecord, len(b))
		}
		n := int(binary.BigEndian.Uint16(b))
		if n > maxBody || len(b) < recordHeader+n {
			return nil, fmt.Errorf("%w: body of %d bytes", errRecord, n)
		}
		id := pageID{mesh.PeerName(b[2:8]), b[8]}
		if old := have(id); old != nil && old.same(b[:recordHeader+n]) {
			out = append(out, old)
			b = b[recordHeader+n:]
			continue
		}
		r := &record{
			id:      id,
			epoch:   Epoch{binary.BigEndian.Uint32(b[9:]), mesh.RunID(binary.BigEndian.Uint64(b[13:]))},
			version: binary.BigEndian.Uint32(b[21:]),
			sig:     [64]byte(b[signedHeader:]),
			body:    append([]byte(nil), b[recordHeader:recordHeader+n]...),
		}
		if r.id.peer.IsZero() {
			return nil, fmt.Errorf("%w: no peer", errRecord)
		}
		var err error
		if r.id.page == 0 {
			r.peer, err = parsePeer(r.body)
			r.peer.Name, r.peer.Run, r.peer.Incarnation = r.id.peer, r.epoch.Run, r.epoch.Incarnation
		} else {
			err = checkLinks(r.body, r.id.peer)
		}
		if err != nil {
			return nil, err
		}
		out = append(out, r)
		b = b[recordHeader+n:]
	}
	return out, nil
}

// same reports whether b, header and body, is what this record is on the wire.
func (r *record) same(b []byte) bool {
	return r.version == binary.BigEndian.Uint32(b[21:]) && r.epoch.Incarnation == binary.BigEndian.Uint32(b[9:]) &&
		uint64(r.epoch.Run) == binary.BigEndian.Uint64(b[13:]) &&
		string(r.sig[:]) == string(b[signedHeader:recordHeader]) && string(r.body) == string(b[recordHeader:])
}

func appendPeer(b []byte, p *Peer) []byte {
	nick := p.NickName[:min(len(p.NickName), MaxNickName)]
	b = append(b, p.Key[:]...)
	b = binary.BigEndian.AppendUint16(b, p.Port)
	b = binary.BigEndian.AppendUint16(b, uint16(p.ShortID))
	b = binary.BigEndian.AppendUint16(b, uint16(min(max(p.MTU, 0), 0xffff)))
	b = binary.BigEndian.AppendUint32(b, uint32(p.Flags))
	b = binary.BigEndian.AppendUint32(b, p.Uptime)
	b = append(b, p.Protocol, byte(len(nick)))
	return append(b, nick...)
}

func parsePeer(b []byte) (p Peer, err error) {
	if len(b) < peerBody || int(b[nickLength]) > MaxNickName || len(b) < peerBody+int(b[nickLength]) {
		return p, fmt.Errorf("%w: peer of %d bytes", errRecord, len(b))
	}
	p = Peer{
		Key:      [32]byte(b[:32]),
		Port:     binary.BigEndian.Uint16(b[32:]),
		ShortID:  mesh.ShortID(binary.BigEndian.Uint16(b[34:])),
		MTU:      int(binary.BigEndian.Uint16(b[36:])),
		Flags:    Flags(binary.BigEndian.Uint32(b[38:])),
		Uptime:   binary.BigEndian.Uint32(b[42:]),
		Protocol: b[46],
		NickName: string(b[peerBody : peerBody+int(b[nickLength])]),
	}
	if p.ShortID > mesh.MaxShortID {
		return p, fmt.Errorf("%w: short id %d", errRecord, p.ShortID)
	}
	return p, nil
}

func appendLink(b []byte, l *PeerLink) []byte {
	addr := l.Addr.Addr().Unmap().WithZone("")
	size := byte(linkBody4)
	if addr.Is6() {
		size = linkBody6
	}
	flags := byte(0)
	if l.Outbound {
		flags |= wireOutbound
	}
	if l.Sealed {
		flags |= wireSealed
	}
	if l.Damped {
		flags |= wireDamped
	}
	b = append(b, size)
	b = append(b, l.To[:]...)
	b = append(b, flags, rttCode(l.RTT))
	b = binary.BigEndian.AppendUint16(b, uint16(min(max(l.MTU, 0), 0xffff)))
	if !addr.IsValid() {
		addr = netip.IPv4Unspecified()
	}
	raw := addr.AsSlice()
	b = append(b, byte(len(raw)))
	b = append(b, raw...)
	return binary.BigEndian.AppendUint16(b, l.Addr.Port())
}

// checkLinks checks the body of a page of from's links.
func checkLinks(b []byte, from mesh.PeerName) error {
	count := 0
	for ; len(b) > 0; b = b[1+int(b[0]):] {
		n := int(b[0])
		if n < linkBody4 || len(b) < 1+n {
			return fmt.Errorf("%w: link of %d bytes", errRecord, n)
		}
		if a := int(b[11]); a != 4 && a != 16 || n < 11+a+2 {
			return fmt.Errorf("%w: address of %d bytes", errRecord, a)
		}
		if to := wireLink(b[1 : 1+n]).to(); to.IsZero() || to == from || count == linksPerPage {
			return fmt.Errorf("%w: link to %v", errRecord, to)
		}
		count++
	}
	return nil
}

// wireLink is one link of a page that was checked. A mesh has tens of thousands, so they are held as they came.
type wireLink []byte

func (l wireLink) to() mesh.PeerName  { return mesh.PeerName(l[:6]) }
func (l wireLink) damped() bool       { return l[6]&wireDamped != 0 }
func (l wireLink) rtt() time.Duration { return rttOf(l[7]) }

func (l wireLink) parse() PeerLink {
	a := int(l[10])
	addr, _ := netip.AddrFromSlice(l[11 : 11+a])
	return PeerLink{
		To:       l.to(),
		Outbound: l[6]&wireOutbound != 0,
		Sealed:   l[6]&wireSealed != 0,
		Damped:   l.damped(),
		RTT:      l.rtt(),
		MTU:      int(binary.BigEndian.Uint16(l[8:])),
		Addr:     netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(l[11+a:])),
	}
}

// cutLink returns the first link of the body of a page, nil if there is none, and the rest.
func cutLink(b []byte) (wireLink, []byte) {
	if len(b) == 0 {
		return nil, nil
	}
	n := 1 + int(b[0])
	return wireLink(b[1:n]), b[n:]
}

// hash64 is FNV-1a with a final mix: digests are compared in parts, so every bit must depend on every byte.
func hash64(h uint64, b []byte) uint64 {
	for _, c := range b {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return h
}

const hashStart uint64 = 14695981039346656037

func mix64(h uint64) uint64 {
	h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>27) * 0x94d049bb133111eb
	return h ^ h>>31
}

func (id pageID) key() uint64 {
	h := hash64(hashStart, id.peer[:])
	return mix64(hash64(h, []byte{id.page}))
}

func (r *record) cachedItem() mesh.Item {
	if r.digest == (mesh.Item{}) {
		r.digest = mesh.Item{Key: r.id.key(), Version: mix64(hash64(hashStart, r.signed()))}
	}
	return r.digest
}
