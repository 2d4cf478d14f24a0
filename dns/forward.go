package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	miekg "github.com/miekg/dns"
)

const (
	// Questions that may wait for upstream servers at a time, and those of one client among them. Each
	// holds a socket or two.
	maxForwards       = 256
	forwardsPerSource = 96

	// When a server has not answered for this long the next one is asked too. The order of resolv.conf
	// counts, since the first may know names that the others do not; so they are not all asked at once.
	hedgeAfter = 100 * time.Millisecond

	// When all have been asked, they are asked again after this long: datagrams get lost.
	retryAfter = time.Second

	// A server that failed three times in a row is asked after the others for so long.
	benchTime   = 10 * time.Second
	benchMisses = 3
)

// forwarder asks the host's own name servers, and remembers.
type forwarder struct {
	timeout  time.Duration // for all attempts at one question
	size     int           // bytes of a datagram that we tell upstream servers to send
	filtered func(netip.Addr) bool
	log      *slog.Logger
	waiting  *gate

	servers atomic.Pointer[[]*upstream]
	cache   cache
	removed atomic.Uint64 // addresses of the mesh in answers from outside

	mu      sync.Mutex // guards calls
	calls   map[string]*call
	pending sync.WaitGroup
}

// call is one question that servers are being asked, for everybody who wants to know.
type call struct {
	done  chan struct{}
	entry *cacheEntry // nil: no server answered; written before done is closed
	err   error
}

func newForwarder(timeout time.Duration, size int, filtered func(netip.Addr) bool, log *slog.Logger) *forwarder {
	f := &forwarder{timeout: timeout, size: size, filtered: filtered, log: log,
		waiting: newGate(maxForwards, forwardsPerSource), calls: make(map[string]*call)}
	f.servers.Store(&[]*upstream{})
	return f
}

// setServers replaces the upstream servers. What is known of those that stay is kept.
func (f *forwarder) setServers(addrs []netip.AddrPort) {
	old := *f.servers.Load()
	next := make([]*upstream, len(addrs))
	for i, a := range addrs {
		if at := slices.IndexFunc(old, func(u *upstream) bool { return u.addr == a }); at >= 0 {
			next[i] = old[at]
		} else {
			next[i] = &upstream{addr: a}
		}
	}
	f.servers.Store(&next)
	if len(old) > 0 && !slices.EqualFunc(old, next, func(a, b *upstream) bool { return a == b }) {
		f.cache.clear()
	}
}

func (f *forwarder) serverNames() []string {
	var out []string
	for _, u := range *f.servers.Load() {
		out = append(out, u.addr.String())
	}
	return out
}

// cached answers from memory, nil if it cannot.
func (f *forwarder) cached(out []byte, q *query, limit int, now time.Time) []byte {
	e := f.cache.get(q.cacheKey(), now)
	if e == nil {
		return nil
	}
	return f.finish(out, q, e, limit, now)
}

// resolve answers from upstream. It takes the timeout at most, and always returns an answer.
func (f *forwarder) resolve(ctx context.Context, q *query, limit int) []byte {
	if q.flags&flagRD == 0 {
		// Who does not want recursion gets what is in memory, and that was tried.
		return f.failure(q, miekg.RcodeRefused, 0)
	}
	c := f.ask(ctx, q)
	select {
	case <-c.done:
	case <-ctx.Done():
		return f.failure(q, miekg.RcodeServerFailure, miekg.ExtendedErrorCodeNotReady)
	}
	if c.entry == nil {
		code := miekg.ExtendedErrorCodeNetworkError
		if errors.Is(c.err, context.DeadlineExceeded) || errors.Is(c.err, errNoServers) {
			code = miekg.ExtendedErrorCodeNoReachableAuthority
		}
		return f.failure(q, miekg.RcodeServerFailure, code)
	}
	return f.finish(nil, q, c.entry, limit, time.Now())
}

// ask joins the call that is under way for the same question, or starts one.
func (f *forwarder) ask(ctx context.Context, q *query) *call {
	key := string(q.cacheKey())
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.calls[key]; c != nil {
		return c
	}
	c := &call{done: make(chan struct{})}
	f.calls[key] = c
	up := upstreamQuestion{name: string(q.lower), qtype: q.qtype, do: q.do, cd: q.flags&flagCD != 0}
	// The call goes on when the client that started it gives up; ctx is the server's.
	f.pending.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, f.timeout)
		defer cancel()
		m, err := f.exchange(ctx, up)
		if err == nil {
			c.entry, err = f.entryOf(key, m, time.Now())
		}
		c.err = err
		if c.entry != nil && c.entry.expires.After(c.entry.stored) {
			f.cache.put(c.entry)
		}
		f.mu.Lock()
		delete(f.calls, key)
		f.mu.Unlock()
		close(c.done)
		if err != nil && ctx.Err() != context.Canceled {
			f.log.Debug("not resolved", "name", miekgName(up.name), "err", err)
		}
	})
	return c
}

// entryOf makes of a server's answer what is kept and handed out.
func (f *forwarder) entryOf(key string, m *miekg.Msg, now time.Time) (*cacheEntry, error) {
	f.filter(m)
	m.Extra = slices.DeleteFunc(m.Extra, func(rr miekg.RR) bool {
		t := rr.Header().Rrtype
		return t == miekg.TypeOPT || t == miekg.TypeTSIG || t == miekg.TypeSIG
	})
	keep := lifetime(m)
	if m.Rcode != miekg.RcodeSuccess && m.Rcode != miekg.RcodeNameError {
		keep = 0
	}
	m.Compress = true
	m.Question[0].Name = miekgName(key[:len(key)-3]) // ours, in lower case: the client's spelling replaces it
	wire, err := m.Pack()
	if err != nil {
		return nil, err
	}
	// A record that is cut short is read, with empty fields, and written as something that no client can read.
	if err := new(miekg.Msg).Unpack(wire); err != nil {
		return nil, err
	}
	ttls, good := ttlOffsets(wire)
	if !good {
		return nil, errMismatch
	}
	return &cacheEntry{key: key, wire: wire, ttls: ttls, stored: now, expires: now.Add(keep)}, nil
}

// filter removes addresses of the mesh from an answer from outside: with them, a page from the Internet
// could make a browser here talk to containers (DNS rebinding).
func (f *forwarder) filter(m *miekg.Msg) {
	if f.filtered == nil {
		return
	}
	mesh := func(rr miekg.RR) bool {
		var ip []byte
		switch rr := rr.(type) {
		case *miekg.A:
			ip = rr.A
		case *miekg.AAAA:
			ip = rr.AAAA
		case *miekg.SVCB:
			rr.Value = f.filterHints(rr.Value)
			return false
		case *miekg.HTTPS:
			rr.Value = f.filterHints(rr.Value)
			return false
		default:
			return false
		}
		return f.isMesh(ip)
	}
	m.Answer = slices.DeleteFunc(m.Answer, mesh)
	m.Ns = slices.DeleteFunc(m.Ns, mesh)
	m.Extra = slices.DeleteFunc(m.Extra, mesh)
}

// isMesh sees through the forms of IPv6 that carry an IPv4 address: mapped, compatible, and NAT64's.
func (f *forwarder) isMesh(ip []byte) bool {
	a, valid := netip.AddrFromSlice(ip)
	if !valid {
		return false
	}
	a = a.Unmap()
	hit := f.filtered(a)
	if a.Is6() {
		b := a.As16()
		if nat64.Contains(a) || compatible.Contains(a) {
			hit = hit || f.filtered(netip.AddrFrom4([4]byte(b[12:])))
		}
	}
	if hit {
		f.removed.Add(1)
	}
	return hit
}

var (
	nat64      = netip.MustParsePrefix("64:ff9b::/96") // RFC 6052 §2.1
	compatible = netip.MustParsePrefix("::/96")        // RFC 4291 §2.5.5.1
)

func (f *forwarder) filterHints(values []miekg.SVCBKeyValue) []miekg.SVCBKeyValue {
	return slices.DeleteFunc(values, func(v miekg.SVCBKeyValue) bool {
		switch v := v.(type) {
		case *miekg.SVCBIPv4Hint:
			return slices.ContainsFunc(v.Hint, func(ip netIP) bool { return f.isMesh(ip) })
		case *miekg.SVCBIPv6Hint:
			return slices.ContainsFunc(v.Hint, func(ip netIP) bool { return f.isMesh(ip) })
		}
		return false
	})
}

// finish makes of an entry the answer to one client: its id, its spelling of the name, its EDNS, its size.
func (f *forwarder) finish(out []byte, q *query, e *cacheEntry, limit int, now time.Time) []byte {
	opt := 0
	if q.edns {
		opt = optLen
	}
	fits := len(e.wire)+opt <= limit
	if fits {
		out = append(out[:0], e.wire...)
		e.age(out, now)
	} else {
		out = append(out[:0], e.wire[:headerLen+len(q.question)]...)
		clear(out[6:])
	}
	flags := binary.BigEndian.Uint16(out[2:])
	flags &^= flagTC | flagCD | flagAA | flagRD
	flags |= flagQR | flagRA | q.flags&(flagRD|flagCD)
	if q.flags&flagAD == 0 && !q.do { // RFC 6840 §5.8
		flags &^= flagAD
	}
	if !fits {
		flags |= flagTC
	}
	copy(out, q.msg[:2])
	binary.BigEndian.PutUint16(out[2:], flags)
	copy(out[headerLen:], q.question)
	if q.edns {
		binary.BigEndian.PutUint16(out[10:], binary.BigEndian.Uint16(out[10:])+1)
		out = appendOPT(out, f.size, 0, q.do)
	}
	return out
}

// failure is an answer with a code, and with an extended error (RFC 8914) for clients that know EDNS.
func (f *forwarder) failure(q *query, rcode int, extended uint16) []byte {
	out := append([]byte(nil), q.msg[:headerLen]...)
	out = append(out, q.question...)
	binary.BigEndian.PutUint16(out[2:], flagQR|flagRA|q.flags&(flagRD|flagCD)|uint16(rcode))
	counts := uint64(1) << 48
	if q.edns {
		counts++
		out = appendOPT(out, f.size, rcode, q.do)
		if extended != 0 {
			out[len(out)-1] = 6 // an option of two bytes: code 15, length 2
			out = append(out, 0, miekg.EDNS0EDE, 0, 2, byte(extended>>8), byte(extended))
		}
	}
	binary.BigEndian.PutUint64(out[4:], counts)
	return out
}
