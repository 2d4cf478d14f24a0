package dns

import (
	"container/list"
	"encoding/binary"
	"sync"
	"time"

	miekg "github.com/miekg/dns"
)

const (
	cacheEntries = 10_000
	cacheBytes   = 16 << 20

	maxPositive = 24 * time.Hour // RFC 8767 §4 advises days at most
	maxNegative = 3 * time.Hour  // RFC 2308 §5
)

// cacheKey tells questions apart whose answers may differ: name, type, and the bits DO and CD. It is
// valid until q's next parse.
func (q *query) cacheKey() []byte {
	bits := byte(0)
	if q.do {
		bits |= 1
	}
	if q.flags&flagCD != 0 {
		bits |= 2
	}
	return append(q.lower, byte(q.qtype>>8), byte(q.qtype), bits) // there is room behind the name
}

// cacheEntry is a whole answer without its OPT record. It does not change.
type cacheEntry struct {
	key     string
	wire    []byte
	ttls    []uint16 // where the TTLs stand in wire
	stored  time.Time
	expires time.Time
}

func (e *cacheEntry) bytes() int { return len(e.wire) + 2*len(e.ttls) + len(e.key) + 200 }

// cache keeps the answers used last.
type cache struct {
	mu    sync.Mutex // guards all below
	items map[string]*list.Element
	order list.List // the one used last in front
	bytes int
}

func (c *cache) get(key []byte, now time.Time) *cacheEntry {
	c.mu.Lock()
	defer c.mu.Unlock()
	el := c.items[string(key)]
	if el == nil {
		return nil
	}
	e := el.Value.(*cacheEntry)
	if !now.Before(e.expires) {
		c.removeLocked(el)
		return nil
	}
	c.order.MoveToFront(el)
	return e
}

func (c *cache) put(e *cacheEntry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.items == nil {
		c.items = make(map[string]*list.Element)
	}
	if old := c.items[e.key]; old != nil {
		c.removeLocked(old)
	}
	c.items[e.key] = c.order.PushFront(e)
	c.bytes += e.bytes()
	for len(c.items) > cacheEntries || c.bytes > cacheBytes {
		c.removeLocked(c.order.Back())
	}
}

func (c *cache) removeLocked(el *list.Element) {
	e := c.order.Remove(el).(*cacheEntry)
	delete(c.items, e.key)
	c.bytes -= e.bytes()
}

// clear forgets everything: other servers may know other names.
func (c *cache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.items)
	c.order.Init()
	c.bytes = 0
}

func (c *cache) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.items)
}

// lifetime says how long an answer may be kept: as long as the record that lives shortest, and for the
// lack of one as long as its SOA record says (RFC 2308 §5). Zero means not at all.
func lifetime(m *miekg.Msg) time.Duration {
	ttl, found := uint32(1<<32-1), false
	take := func(v uint32) { ttl, found = min(ttl, v), true }
	negative := m.Rcode == miekg.RcodeNameError || len(m.Answer) == 0 || !answersType(m)
	for _, rr := range m.Answer {
		take(rr.Header().Ttl)
	}
	soa := false
	for _, rr := range m.Ns {
		take(rr.Header().Ttl)
		if s, is := rr.(*miekg.SOA); is {
			take(s.Minttl)
			soa = true
		}
	}
	for _, rr := range m.Extra {
		if rr.Header().Rrtype != miekg.TypeOPT {
			take(rr.Header().Ttl)
		}
	}
	if !found || negative && !soa || ttl > 1<<31-1 { // RFC 2181 §8: the top bit means zero
		return 0
	}
	if negative {
		return min(time.Duration(ttl)*time.Second, maxNegative)
	}
	return min(time.Duration(ttl)*time.Second, maxPositive)
}

// answersType reports whether an answer has what was asked for, not only the aliases on the way.
func answersType(m *miekg.Msg) bool {
	want := m.Question[0].Qtype
	for _, rr := range m.Answer {
		if t := rr.Header().Rrtype; t == want || want == miekg.TypeANY {
			return true
		}
	}
	return false
}

// ttlOffsets returns where the TTLs of a message without OPT stand; false if it is malformed.
func ttlOffsets(wire []byte) ([]uint16, bool) {
	if len(wire) < headerLen || len(wire) > maxMessage {
		return nil, false
	}
	at := headerLen
	for range binary.BigEndian.Uint16(wire[4:]) {
		if at = skipName(wire, at); at < 0 || at+4 > len(wire) {
			return nil, false
		}
		at += 4
	}
	records := int(binary.BigEndian.Uint16(wire[6:])) + int(binary.BigEndian.Uint16(wire[8:])) + int(binary.BigEndian.Uint16(wire[10:]))
	var out []uint16
	for range records {
		if at = skipName(wire, at); at < 0 || at+10 > len(wire) {
			return nil, false
		}
		out = append(out, uint16(at+4))
		at += 10 + int(binary.BigEndian.Uint16(wire[at+8:]))
	}
	return out, at == len(wire)
}

// age takes the seconds since the answer was stored off its TTLs, in a copy of it.
func (e *cacheEntry) age(wire []byte, now time.Time) {
	passed := uint32(max(0, now.Sub(e.stored)/time.Second))
	for _, at := range e.ttls {
		ttl := binary.BigEndian.Uint32(wire[at:])
		if ttl > 1<<31-1 {
			ttl = 0
		}
		binary.BigEndian.PutUint32(wire[at:], ttl-min(passed, ttl))
	}
}
