package dns

import (
	"encoding/binary"
	"net/netip"

	miekg "github.com/miekg/dns"
)

// Sizes from RFC 1035 §4.1 and RFC 6891 §6.1.2.
const (
	headerLen   = 12
	maxWireName = 255
	optLen      = 11 // an OPT record without options
	plainUDP    = 512
	maxMessage  = 65535
)

// Bits of the second 16 bits of the header.
const (
	flagQR = 1 << 15
	flagAA = 1 << 10
	flagTC = 1 << 9
	flagRD = 1 << 8
	flagRA = 1 << 7
	flagAD = 1 << 5
	flagCD = 1 << 4

	opcodeMask = 0xf << 11
)

// query is a request taken apart. It is reused; slices point into the request or into name.
type query struct {
	msg      []byte // the request
	question []byte // name as asked, type and class
	flags    uint16
	qtype    uint16
	class    uint16
	labels   int
	lower    []byte // the name in lower case, in wire form
	name     [maxWireName + 64]byte

	edns    bool
	version byte
	do      bool
	size    int // bytes that the sender takes by UDP
}

// verdict is what to do with a request.
type verdict int

const (
	ok      verdict = iota
	drop            // no answer: not a request, or too short to answer
	formErr         // answer with this code
	notImp
)

// parse takes a request apart. It copies nothing but the name, and what it costs is bounded by the length
// of msg: it follows no compression pointer.
func (q *query) parse(msg []byte) verdict {
	if len(msg) < headerLen {
		return drop
	}
	q.msg, q.question = msg, nil
	q.edns, q.do, q.version, q.size = false, false, 0, plainUDP
	q.flags = binary.BigEndian.Uint16(msg[2:])
	if q.flags&flagQR != 0 {
		return drop
	}
	if q.flags&opcodeMask != 0 {
		return notImp
	}
	counts := binary.BigEndian.Uint64(msg[4:])
	if counts>>48 != 1 {
		return formErr
	}
	at, v := q.parseName(headerLen)
	if v != ok || len(msg) < at+4 {
		return formErr
	}
	q.qtype = binary.BigEndian.Uint16(msg[at:])
	q.class = binary.BigEndian.Uint16(msg[at+2:])
	at += 4
	q.question = msg[headerLen:at]
	v = formErr
	if counts>>16&0xffffffff == 0 {
		v = q.parseAdditional(at, int(counts&0xffff))
	}
	if q.transfer() {
		return ok // IXFR brings a record along; it is refused all the same
	}
	return v
}

// parseName folds the question's name into q.lower and returns where it ends.
func (q *query) parseName(at int) (int, verdict) {
	n := 0
	q.labels = 0
	for {
		if at >= len(q.msg) {
			return 0, formErr
		}
		size := int(q.msg[at])
		if size > 63 || n+1+size >= maxWireName+1 || at+1+size > len(q.msg) {
			return 0, formErr
		}
		for _, c := range q.msg[at : at+1+size] {
			if 'A' <= c && c <= 'Z' { // never a length byte: those are at most 63
				c += 'a' - 'A'
			}
			q.name[n] = c
			n++
		}
		at += 1 + size
		if size == 0 {
			q.lower = q.name[:n]
			return at, ok
		}
		q.labels++
	}
}

// parseAdditional looks for OPT. Other records (TSIG, SIG(0)) are stepped over.
func (q *query) parseAdditional(at, count int) verdict {
	if count > 4 {
		return formErr
	}
	for range count {
		root := at < len(q.msg) && q.msg[at] == 0
		end := skipName(q.msg, at)
		if end < 0 || len(q.msg) < end+10 {
			return formErr
		}
		length := int(binary.BigEndian.Uint16(q.msg[end+8:]))
		if len(q.msg) < end+10+length {
			return formErr
		}
		if binary.BigEndian.Uint16(q.msg[end:]) == miekg.TypeOPT {
			if q.edns || !root {
				return formErr // RFC 6891 §6.1.1
			}
			q.edns = true
			q.size = max(plainUDP, int(binary.BigEndian.Uint16(q.msg[end+2:])))
			q.version = q.msg[end+5]
			q.do = q.msg[end+6]&0x80 != 0
		}
		at = end + 10 + length
	}
	return ok
}

// skipName returns the offset behind the name at at, or -1. A compression pointer ends a name.
func skipName(msg []byte, at int) int {
	for at < len(msg) {
		switch c := msg[at]; {
		case c == 0:
			return at + 1
		case c&0xc0 == 0xc0:
			if at+2 > len(msg) {
				return -1
			}
			return at + 2
		case c&0xc0 != 0:
			return -1
		default:
			at += 1 + int(c)
		}
	}
	return -1
}

func (q *query) transfer() bool { return q.qtype == miekg.TypeAXFR || q.qtype == miekg.TypeIXFR }

// below reports whether the name is domain or lies below it. domain is a lower-case wire name.
func (q *query) below(domain string) bool {
	for name := q.lower; len(name) >= len(domain); name = name[1+int(name[0]):] {
		if len(name) == len(domain) {
			return string(name) == domain
		}
		if name[0] == 0 {
			break
		}
	}
	return false
}

const (
	reverse4 = "\x07in-addr\x04arpa\x00"
	reverse6 = "\x03ip6\x04arpa\x00"
)

// reverse returns the address whose reverse name was asked for (RFC 1035 §3.5, RFC 3596 §2.5).
func (q *query) reverse() (netip.Addr, bool) {
	switch {
	case q.labels == 6 && q.below(reverse4):
		var a [4]byte
		name := q.lower
		for i := 3; i >= 0; i-- {
			n, digits := 0, name[1:1+int(name[0])]
			for _, c := range digits {
				if c < '0' || c > '9' {
					return netip.Addr{}, false
				}
				n = 10*n + int(c-'0')
				if n > 255 {
					return netip.Addr{}, false
				}
			}
			if len(digits) > 1 && digits[0] == '0' {
				return netip.Addr{}, false
			}
			a[i] = byte(n)
			name = name[1+len(digits):]
		}
		return netip.AddrFrom4(a), true
	case q.labels == 34 && q.below(reverse6):
		var a [16]byte
		for i := range 32 {
			if q.lower[2*i] != 1 {
				return netip.Addr{}, false
			}
			var n byte
			switch c := q.lower[2*i+1]; {
			case c >= '0' && c <= '9':
				n = c - '0'
			case c >= 'a' && c <= 'f':
				n = c - 'a' + 10
			default:
				return netip.Addr{}, false
			}
			a[15-i/2] |= n << (4 * (i % 2))
		}
		return netip.AddrFrom16(a), true
	}
	return netip.Addr{}, false
}
