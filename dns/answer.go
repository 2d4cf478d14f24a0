package dns

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"

	miekg "github.com/miekg/dns"

	"meshd/dns/records"
)

// Table is where the names of the mesh are. Neither method blocks or allocates.
type Table interface {
	Find(wire []byte) *records.Answer
	FindAddr(netip.Addr) *records.Reverse
}

var _ Table = (*records.Table)(nil)

// responder builds answers; each reading goroutine has one of its own.
type responder struct {
	table  Table
	domain string // wire form
	ttl    uint32 // seconds
	size   int    // bytes that we send by UDP at most, and that we tell clients to send us
	rng    *rand.PCG
	order  []uint16 // scratch
}

// reply is a message under construction.
type reply struct {
	b     []byte
	limit int // bytes, with the OPT record that is still to come taken off
	tc    bool
	rcode int
	aa    bool
	an    uint16
	ns    uint16
}

// begin writes header and question; the header's counts and flags follow in end.
func (r *responder) begin(out []byte, q *query, limit int) reply {
	out = append(out[:0], q.msg[:headerLen]...)
	out = append(out, q.question...)
	if q.edns {
		limit -= optLen
	}
	return reply{b: out, limit: limit}
}

func (r *responder) end(p *reply, q *query) []byte {
	flags := flagQR | flagRA | q.flags&(opcodeMask|flagRD|flagCD) | uint16(p.rcode&0xf)
	if p.aa {
		flags |= flagAA
	}
	if p.tc {
		flags |= flagTC
	}
	binary.BigEndian.PutUint16(p.b[2:], flags)
	var counts uint64
	if len(q.question) > 0 {
		counts = 1 << 48
	}
	counts |= uint64(p.an)<<32 | uint64(p.ns)<<16
	if q.edns {
		counts++
		p.b = appendOPT(p.b, r.size, p.rcode, q.do)
	}
	binary.BigEndian.PutUint64(p.b[4:], counts)
	return p.b
}

// appendOPT appends a bare OPT record (RFC 6891 §6.1.2).
func appendOPT(b []byte, size, rcode int, do bool) []byte {
	b = append(b, 0, 0, byte(miekg.TypeOPT), byte(size>>8), byte(size), byte(rcode>>4), 0, 0, 0, 0, 0)
	if do {
		b[len(b)-4] = 0x80
	}
	return b
}

// code answers with a code and nothing else; for malformed requests the question is left out.
func (r *responder) code(out []byte, q *query, rcode int) []byte {
	p := r.begin(out, q, maxMessage)
	p.rcode = rcode
	return r.end(&p, q)
}

// answer answers a question that is about the mesh, or that nobody will be asked about. It returns nil for
// all other questions: they are for the outside. limit is the size of the largest answer that may be sent.
func (r *responder) answer(out []byte, q *query, limit int) []byte {
	switch {
	case q.edns && q.version != 0:
		return r.code(out, q, miekg.RcodeBadVers)
	case q.class != miekg.ClassINET, q.transfer(), q.qtype == 0, q.qtype > 128 && q.qtype < miekg.TypeANY, q.qtype == miekg.TypeOPT:
		// CH, whole zones, and types that are no data: nobody has a use for them here.
		return r.code(out, q, miekg.RcodeRefused)
	case q.below(r.domain):
		if len(q.lower) == len(r.domain) {
			p := r.begin(out, q, limit)
			p.aa = true
			if q.qtype == miekg.TypeSOA {
				p.an++
				p.b = r.appendSOA(p.b, headerLen)
			} else {
				r.noData(&p, q)
			}
			return r.end(&p, q)
		}
		a := r.table.Find(q.lower)
		if a == nil {
			p := r.begin(out, q, limit)
			p.aa, p.rcode = true, miekg.RcodeNameError
			r.noData(&p, q)
			return r.end(&p, q)
		}
		return r.addresses(out, q, limit, a)
	case q.labels == 1:
		// The bare name of a container, from a resolver that does not append the domain.
		full := append(q.lower[:len(q.lower)-1:len(q.name)], r.domain...)
		if len(full) > maxWireName {
			return nil
		}
		a := r.table.Find(full)
		q.lower[len(q.lower)-1] = 0 // append wrote over the root
		if a == nil || len(a.V4)+len(a.V6) == 0 {
			return nil
		}
		return r.addresses(out, q, limit, a)
	}
	addr, is := q.reverse()
	if !is {
		return nil
	}
	rev := r.table.FindAddr(addr)
	if rev == nil || rev.Name == "" {
		return nil
	}
	p := r.begin(out, q, limit)
	p.aa = true
	if q.qtype == miekg.TypePTR || q.qtype == miekg.TypeANY {
		p.b = r.appendRecord(p.b, miekg.TypePTR, len(rev.Name))
		p.b = append(p.b, rev.Name...)
		p.an = 1
	} else {
		r.noData(&p, q)
	}
	return r.end(&p, q)
}

// addresses answers for a name of the mesh that exists.
func (r *responder) addresses(out []byte, q *query, limit int, a *records.Answer) []byte {
	p := r.begin(out, q, limit)
	p.aa = true
	switch {
	case q.qtype == miekg.TypeA && len(a.V4) > 0:
		r.shuffle(len(a.V4), a.Live4)
		for _, i := range r.order {
			if len(p.b)+12+4 > p.limit {
				p.tc = true
				break
			}
			p.b = append(r.appendRecord(p.b, miekg.TypeA, 4), a.V4[i][:]...)
			p.an++
		}
	case q.qtype == miekg.TypeAAAA && len(a.V6) > 0:
		r.shuffle(len(a.V6), a.Live6)
		for _, i := range r.order {
			if len(p.b)+12+16 > p.limit {
				p.tc = true
				break
			}
			p.b = append(r.appendRecord(p.b, miekg.TypeAAAA, 16), a.V6[i][:]...)
			p.an++
		}
	case q.qtype == miekg.TypeANY && len(a.V4)+len(a.V6) > 0:
		// RFC 8482 §4.2: a small answer instead of all there is.
		const hinfo = "\x07RFC8482\x00"
		p.b = append(r.appendRecord(p.b, miekg.TypeHINFO, len(hinfo)), hinfo...)
		p.an++
	default:
		r.noData(&p, q)
	}
	return r.end(&p, q)
}

// appendRecord starts a record whose owner is the question's name.
func (r *responder) appendRecord(b []byte, rtype uint16, length int) []byte {
	return append(b, 0xc0, headerLen, byte(rtype>>8), byte(rtype), 0, miekg.ClassINET,
		byte(r.ttl>>24), byte(r.ttl>>16), byte(r.ttl>>8), byte(r.ttl), byte(length>>8), byte(length))
}

// shuffle fills r.order with 0…n-1: the first live of them in random order, and then the others likewise.
// Up to 65,536 addresses are told apart, more than a message holds.
func (r *responder) shuffle(n, live int) {
	n = min(n, 1<<16)
	r.order = r.order[:0]
	for i := range n {
		r.order = append(r.order, uint16(i))
	}
	r.mix(r.order[:min(live, n)])
	r.mix(r.order[min(live, n):])
}

func (r *responder) mix(s []uint16) {
	for i := len(s) - 1; i > 0; i-- {
		j := int(r.rng.Uint64() >> 32 * uint64(i+1) >> 32)
		s[i], s[j] = s[j], s[i]
	}
}

// noData adds the SOA record that lets a resolver keep the lack of an answer, for no longer than an answer
// itself (RFC 2308 §3).
func (r *responder) noData(p *reply, q *query) {
	at, owner := -1, len(r.domain)
	if q.below(r.domain) {
		at, owner = headerLen+len(q.lower)-len(r.domain), 2
	}
	if len(p.b)+owner+soaRest <= p.limit {
		p.b = r.appendSOA(p.b, at)
		p.ns++
	}
}

// An SOA record without its owner: type, class, TTL and length, two names, five numbers.
const soaRest = 10 + 5 + 13 + 5*4

// appendSOA appends the SOA record of the domain. at is where the domain stands in the message, or -1.
func (r *responder) appendSOA(b []byte, at int) []byte {
	if at >= 0 {
		b = append(b, 0xc0|byte(at>>8), byte(at))
	} else {
		at = len(b)
		b = append(b, r.domain...)
	}
	b = append(b, 0, byte(miekg.TypeSOA), 0, miekg.ClassINET)
	b = binary.BigEndian.AppendUint32(b, r.ttl)
	length := len(b)
	b = append(b, 0, 0)
	b = append(b, 2, 'n', 's', 0xc0|byte(at>>8), byte(at))
	b = append(b, 10, 'h', 'o', 's', 't', 'm', 'a', 's', 't', 'e', 'r', 0xc0|byte(at>>8), byte(at))
	for _, v := range [...]uint32{1, 3600, 600, 86400, r.ttl} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	binary.BigEndian.PutUint16(b[length:], uint16(len(b)-length-2))
	return b
}
