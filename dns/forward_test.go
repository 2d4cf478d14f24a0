package dns

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	miekg "github.com/miekg/dns"
)

// fakeUpstream answers by UDP and TCP on one loopback port with what handle returns; nil is silence.
type fakeUpstream struct {
	addr  netip.AddrPort
	asked atomic.Int32
	names sync.Map
}

func startUpstream(t testing.TB, handle func(q *miekg.Msg, tcp bool) *miekg.Msg) *fakeUpstream {
	t.Helper()
	u := &fakeUpstream{}
	serve := func(w miekg.ResponseWriter, q *miekg.Msg) {
		u.asked.Add(1)
		u.names.Store(q.Question[0].Name, true)
		_, tcp := w.RemoteAddr().(*net.TCPAddr)
		if r := handle(q, tcp); r != nil {
			_ = w.WriteMsg(r)
		}
	}
	var ln net.Listener
	var pc net.PacketConn
	for range 10 { // the port that is free by TCP may not be so by UDP
		var err error
		if ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		if pc, err = net.ListenPacket("udp", ln.Addr().String()); err == nil {
			break
		}
		ln.Close()
	}
	if pc == nil {
		t.Fatal("no port is free")
	}
	u.addr = ln.Addr().(*net.TCPAddr).AddrPort()
	for _, s := range []*miekg.Server{{Listener: ln, Handler: miekg.HandlerFunc(serve)}, {PacketConn: pc, Handler: miekg.HandlerFunc(serve)}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		done := make(chan error)
		go func() { done <- s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() {
			_ = s.Shutdown()
			<-done
		})
	}
	return u
}

func replyTo(q *miekg.Msg, rrs ...string) *miekg.Msg {
	m := new(miekg.Msg)
	m.SetReply(q)
	m.RecursionAvailable = true
	for _, s := range rrs {
		rr, err := miekg.NewRR(s)
		if err != nil {
			panic(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	return m
}

func answering(rrs ...string) func(*miekg.Msg, bool) *miekg.Msg {
	return func(q *miekg.Msg, _ bool) *miekg.Msg { return replyTo(q, rrs...) }
}

func silent(*miekg.Msg, bool) *miekg.Msg { return nil }

func code(rcode int) func(*miekg.Msg, bool) *miekg.Msg {
	return func(q *miekg.Msg, _ bool) *miekg.Msg {
		m := replyTo(q)
		m.Rcode = rcode
		return m
	}
}

func withUpstreams(t testing.TB, s *Server, us ...*fakeUpstream) {
	t.Helper()
	var addrs []netip.AddrPort
	for _, u := range us {
		addrs = append(addrs, u.addr)
	}
	s.forward.setServers(addrs)
}

// closedPort is one where nobody listens, so that ICMP says so.
func closedPort(t testing.TB) *fakeUpstream {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	return &fakeUpstream{addr: pc.LocalAddr().(*net.UDPAddr).AddrPort()}
}

func TestFailover(t *testing.T) {
	good := startUpstream(t, answering("example.org. 0 IN A 192.0.2.1"))
	for what, bad := range map[string]*fakeUpstream{
		"silent":   startUpstream(t, silent),
		"closed":   closedPort(t),
		"SERVFAIL": startUpstream(t, code(miekg.RcodeServerFailure)),
		"REFUSED":  startUpstream(t, code(miekg.RcodeRefused)),
	} {
		t.Run(what, func(t *testing.T) {
			s := startServer(t, newTable(t), nil)
			withUpstreams(t, s, bad, good)
			var before int32
			for i := range 2 * benchMisses {
				if i == benchMisses {
					before = bad.asked.Load()
				}
				start := time.Now()
				r := ask(t, s, "udp", "example.org.", miekg.TypeA)
				took := time.Since(start)
				if got := data(r); !slices.Equal(got, []string{"A 192.0.2.1"}) {
					t.Fatalf("got %v", r)
				}
				if took > 500*time.Millisecond {
					t.Errorf("question %d took %v", i, took)
				}
			}
			// It had its chances and comes last now; only a slow machine makes us ask it again.
			if n := bad.asked.Load() - before; n == benchMisses {
				t.Errorf("the bad server was asked each time, %d times after it was known to be bad", n)
			}
		})
	}
}

func TestAllUpstreamsFail(t *testing.T) {
	s := startServer(t, newTable(t), func(c *Config) { c.Timeout = 500 * time.Millisecond })
	dead := startUpstream(t, silent)
	for what, us := range map[string][]*fakeUpstream{"none": nil, "silent": {dead, dead}, "closed": {closedPort(t)}, "SERVFAIL": {startUpstream(t, code(miekg.RcodeServerFailure))}} {
		withUpstreams(t, s, us...)
		r := ask(t, s, "udp", "example.org.", miekg.TypeA, edns(1232))
		if r.Rcode != miekg.RcodeServerFailure {
			t.Errorf("%s: got %v", what, r)
		}
		if what == "SERVFAIL" {
			continue // that is the server's answer
		}
		opt := r.IsEdns0()
		if opt == nil || len(opt.Option) != 1 || opt.Option[0].(*miekg.EDNS0_EDE) == nil {
			t.Errorf("%s: got %v, want an extended error", what, opt)
		}
	}
}

// Answers with another id, another question, or from another address are not ours.
func TestSpoofed(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	other, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	ids, ports := make(map[uint16]bool), make(map[string]bool)
	done := make(chan struct{})
	go func() { // ends when pc is closed
		defer close(done)
		b := make([]byte, 4096)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			q := new(miekg.Msg)
			if q.Unpack(b[:n]) != nil {
				continue
			}
			ids[q.Id], ports[from.String()] = true, true
			send := func(c net.PacketConn, m *miekg.Msg) {
				wire, _ := m.Pack()
				_, _ = c.WriteTo(wire, from)
			}
			bad := replyTo(q, "example.org. 60 IN A 192.0.2.66")
			bad.Id++
			send(pc, bad)
			bad.Id--
			bad.Question[0].Name = "example.net."
			send(pc, bad)
			bad.Question[0].Name, bad.Question[0].Qtype = "example.org.", miekg.TypeTXT
			send(pc, bad)
			bad.Question[0].Qtype, bad.Response = miekg.TypeA, false
			send(pc, bad)
			bad.Response = true
			send(other, bad)
			_, _ = pc.WriteTo([]byte("short"), from)
			good := replyTo(q, "example.org. 0 IN A 192.0.2.1")
			good.Question[0].Name = "eXample.ORG."
			send(pc, good)
		}
	}()
	s := startServer(t, newTable(t), nil)
	s.forward.setServers([]netip.AddrPort{pc.LocalAddr().(*net.UDPAddr).AddrPort()})
	const n = 50
	for range n {
		r := ask(t, s, "udp", "example.org.", miekg.TypeA)
		if got := data(r); !slices.Equal(got, []string{"A 192.0.2.1"}) || r.Question[0].Name != "example.org." {
			t.Fatalf("got %v", r)
		}
	}
	pc.Close()
	<-done
	if len(ids) < n*9/10 || len(ports) < n*9/10 {
		t.Errorf("%d ids and %d ports for %d questions", len(ids), len(ports), n)
	}
}

func TestUpstreamTruncates(t *testing.T) {
	var many []string
	for i := range 200 {
		many = append(many, fmt.Sprintf("big.example. 60 IN A 192.0.2.%d", i))
	}
	u := startUpstream(t, func(q *miekg.Msg, tcp bool) *miekg.Msg {
		if tcp {
			return replyTo(q, many...)
		}
		m := replyTo(q)
		m.Truncated = true
		return m
	})
	s := startServer(t, newTable(t), nil)
	withUpstreams(t, s, u)
	for range 2 { // from upstream, and from memory
		if r := ask(t, s, "udp", "big.example.", miekg.TypeA, edns(1232)); !r.Truncated || len(r.Answer) != 0 {
			t.Errorf("by UDP: got %d answers, truncated %v", len(r.Answer), r.Truncated)
		}
		if r := ask(t, s, "tcp", "big.example.", miekg.TypeA); r.Truncated || len(r.Answer) != 200 {
			t.Errorf("by TCP: got %d answers, truncated %v", len(r.Answer), r.Truncated)
		}
	}
	if n := u.asked.Load(); n != 2 {
		t.Errorf("upstream was asked %d times, want once by UDP and once by TCP", n)
	}
}

func TestNoEDNSUpstream(t *testing.T) {
	s := startServer(t, newTable(t), nil)
	withUpstreams(t, s, startUpstream(t, func(q *miekg.Msg, _ bool) *miekg.Msg {
		if q.IsEdns0() != nil {
			m := new(miekg.Msg)
			m.Id, m.Response, m.Rcode = q.Id, true, miekg.RcodeFormatError
			return m
		}
		return replyTo(q, "example.org. 60 IN A 192.0.2.1")
	}))
	if r := ask(t, s, "udp", "example.org.", miekg.TypeA, edns(1232)); len(r.Answer) != 1 || r.IsEdns0() == nil {
		t.Errorf("got %v", r)
	}
}

// What comes from upstream is handed on as it is: aliases in circles, unknown types. What cannot be
// read counts as no answer.
func TestStrangeAnswers(t *testing.T) {
	s := startServer(t, newTable(t), func(c *Config) { c.Timeout = 300 * time.Millisecond })
	loop := []string{"a.example. 60 IN CNAME b.example.", "b.example. 60 IN CNAME a.example."}
	withUpstreams(t, s, startUpstream(t, answering(loop...)))
	if r := ask(t, s, "udp", "a.example.", miekg.TypeA); len(r.Answer) != 2 || r.Rcode != 0 {
		t.Errorf("CNAME loop: got %v", r)
	}
	withUpstreams(t, s, startUpstream(t, answering(`a.example. 60 IN TYPE65400 \# 3 010203`)))
	if r := ask(t, s, "udp", "a.example.", 65400); len(r.Answer) != 1 {
		t.Errorf("unknown type: got %v", r)
	}

	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	go func() { // ends when pc is closed
		b := make([]byte, 4096)
		for i := 0; ; i++ {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			out := slices.Clone(b[:headerLen])
			binary.BigEndian.PutUint16(out[2:], flagQR|flagRA)
			binary.BigEndian.PutUint64(out[4:], 1<<48|0xffff<<32) // and 65,535 answers
			out = append(out, b[headerLen:n-optLen]...)
			for len(out) < 4000 {
				// Each name is a pointer to the pointer before, or to itself.
				at := len(out) - 12
				if i%2 == 0 {
					at = len(out)
				}
				out = append(out, 0xc0|byte(at>>8), byte(at), 0, 5, 0, 1, 0, 0, 0, 60, 0, 2)
			}
			_, _ = pc.WriteTo(out, from)
		}
	}()
	s.forward.setServers([]netip.AddrPort{pc.LocalAddr().(*net.UDPAddr).AddrPort()})
	for i := range 4 {
		if r := ask(t, s, "udp", fmt.Sprintf("bomb%d.example.", i), miekg.TypeA); r.Rcode != miekg.RcodeServerFailure {
			t.Errorf("pointer bomb: got %v", r)
		}
	}
}

func TestOneQuestionForMany(t *testing.T) {
	release := make(chan struct{})
	let := sync.OnceFunc(func() { close(release) })
	u := startUpstream(t, func(q *miekg.Msg, _ bool) *miekg.Msg {
		<-release
		return replyTo(q, "example.org. 60 IN A 192.0.2.1")
	})
	s := startServer(t, newTable(t), nil)
	withUpstreams(t, s, u)
	defer let()
	var clients sync.WaitGroup
	const n = 50
	for range n {
		clients.Go(func() {
			m := new(miekg.Msg)
			m.SetQuestion("Example.org.", miekg.TypeA)
			c := &miekg.Client{Timeout: 10 * time.Second}
			r, _, err := c.Exchange(m, s.Addr().String())
			if err != nil || len(r.Answer) != 1 || r.Question[0].Name != "Example.org." {
				t.Errorf("got %v, %v", r, err)
			}
		})
	}
	eventually(t, func() bool { return s.Status().Counters["forwarded"] == n })
	let()
	clients.Wait()
	if got := u.asked.Load(); got > 2 { // one, and one more if that took longer than retryAfter
		t.Errorf("upstream was asked %d times", got)
	}
	ask(t, s, "udp", "example.org.", miekg.TypeA)
	if st := s.Status(); st.Counters["cached"] != 1 || st.Cached != 1 {
		t.Errorf("got %+v", st)
	}
}

// More questions than there is room for are dropped; those about the mesh are answered all the same.
func TestForwardOverload(t *testing.T) {
	table := newTable(t)
	addName(t, table, "web.mesh.internal", "10.32.0.1")
	s := startServer(t, table, nil)
	withUpstreams(t, s, startUpstream(t, silent))
	conn, err := net.Dial("udp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for i := range 3 * maxForwards {
		m := new(miekg.Msg)
		m.SetQuestion(fmt.Sprintf("n%d.example.", i), miekg.TypeA)
		wire, _ := m.Pack()
		if _, err := conn.Write(wire); err != nil {
			t.Fatal(err)
		}
	}
	if r := ask(t, s, "udp", "web.mesh.internal.", miekg.TypeA); len(r.Answer) != 1 {
		t.Errorf("got %v", r)
	}
	if got := s.forward.waiting.count(); got > forwardsPerSource {
		t.Errorf("%d questions of one client are waiting", got)
	}
}

func TestRebinding(t *testing.T) {
	rrs := []string{
		"evil.example. 60 IN A 10.32.0.5", "evil.example. 60 IN A 192.0.2.1", "evil.example. 60 IN A 198.51.100.7",
		"evil.example. 60 IN AAAA ::ffff:10.40.1.1", "evil.example. 60 IN AAAA 64:ff9b::a20:5", "evil.example. 60 IN AAAA 2001:db8::1",
		"evil.example. 60 IN HTTPS 1 . ipv4hint=10.32.0.5,192.0.2.1 alpn=h2",
	}
	u := startUpstream(t, answering(rrs...))
	table := newTable(t)
	// Outside the range, but an endpoint's.
	table.Announce(endpointAt("198.51.100.7/24"))
	s := startServer(t, table, nil)
	withUpstreams(t, s, u)
	want := []string{"A 192.0.2.1", "AAAA 2001:db8::1", `HTTPS 1 . alpn="h2"`}
	for range 2 {
		if got := data(ask(t, s, "udp", "evil.example.", miekg.TypeA)); !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	}
	if n := s.Status().Counters["filtered"]; n != 5 {
		t.Errorf("%d addresses filtered, want 5", n)
	}
	open := startServer(t, table, func(c *Config) { c.AllowRebind = true })
	withUpstreams(t, open, u)
	if got := data(ask(t, open, "udp", "evil.example.", miekg.TypeA)); len(got) != len(rrs) {
		t.Errorf("with the filter off: got %v", got)
	}
}

// Nothing about the mesh is asked outside, and nothing at all for those who may not.
func TestStaysInside(t *testing.T) {
	u := startUpstream(t, answering())
	table := newTable(t)
	addName(t, table, "web.mesh.internal", "10.32.0.1")
	var access atomic.Int32
	access.Store(int32(Full))
	s := startServer(t, table, func(c *Config) { c.Access = func(netip.Addr, int) Access { return Access(access.Load()) } })
	withUpstreams(t, s, u)
	for _, n := range []string{"web.mesh.internal.", "nobody.mesh.internal.", "mesh.internal.", "web.", "1.0.32.10.in-addr.arpa."} {
		ask(t, s, "udp", n, miekg.TypePTR)
	}
	if n := u.asked.Load(); n != 0 {
		t.Errorf("upstream was asked %d times", n)
	}
	access.Store(int32(Names))
	ask(t, s, "udp", "example.org.", miekg.TypeA)
	ask(t, s, "tcp", "example.org.", miekg.TypeA)
	ask(t, s, "udp", "2.0.32.10.in-addr.arpa.", miekg.TypePTR)
	if n := u.asked.Load(); n != 0 {
		t.Errorf("upstream was asked %d times for one who may not", n)
	}
	access.Store(int32(Full))
	ask(t, s, "udp", "2.0.32.10.in-addr.arpa.", miekg.TypePTR) // not known here
	ask(t, s, "udp", "elsewhere.", miekg.TypeA)
	if n := u.asked.Load(); n != 2 {
		t.Errorf("upstream was asked %d times, want 2", n)
	}
	r := ask(t, s, "udp", "other.example.", miekg.TypeA, func(m *miekg.Msg) { m.RecursionDesired = false })
	if r.Rcode != miekg.RcodeRefused || u.asked.Load() != 2 {
		t.Errorf("without recursion: got %v", r)
	}
}

func TestCacheTimes(t *testing.T) {
	f := newForwarder(time.Second, 1232, nil, nil)
	now := time.Now()
	soa := "example. 300 IN SOA a. b. 1 2 3 4 60"
	for what, c := range map[string]struct {
		rcode  int
		answer []string
		ns     []string
		keep   time.Duration
	}{
		"positive":               {0, []string{"x.example. 100 IN A 192.0.2.1", "x.example. 70 IN A 192.0.2.2"}, nil, 70 * time.Second},
		"alias":                  {0, []string{"x.example. 100 IN CNAME y.example.", "y.example. 30 IN A 192.0.2.2"}, nil, 30 * time.Second},
		"TTL 0":                  {0, []string{"x.example. 0 IN A 192.0.2.1"}, nil, 0},
		"top bit":                {0, []string{"x.example. 4294967295 IN A 192.0.2.1"}, nil, 0},
		"days":                   {0, []string{"x.example. 1000000 IN A 192.0.2.1"}, nil, maxPositive},
		"NXDOMAIN":               {3, nil, []string{soa}, 60 * time.Second},
		"NXDOMAIN, short TTL":    {3, nil, []string{"example. 20 IN SOA a. b. 1 2 3 4 60"}, 20 * time.Second},
		"NXDOMAIN without SOA":   {3, nil, nil, 0},
		"no data":                {0, nil, []string{soa}, 60 * time.Second},
		"no data, no SOA":        {0, nil, []string{"example. 60 IN NS a."}, 0},
		"alias, no data":         {0, []string{"x.example. 100 IN CNAME y.example."}, []string{soa}, 60 * time.Second},
		"alias, no data, no SOA": {0, []string{"x.example. 100 IN CNAME y.example."}, nil, 0},
		"for ever nothing":       {3, nil, []string{"example. 1000000 IN SOA a. b. 1 2 3 4 1000000"}, maxNegative},
		"SERVFAIL":               {2, []string{"x.example. 100 IN A 192.0.2.1"}, nil, 0},
	} {
		q := new(miekg.Msg)
		q.SetQuestion("x.example.", miekg.TypeA)
		m := replyTo(q, c.answer...)
		m.Rcode = c.rcode
		for _, s := range c.ns {
			rr, err := miekg.NewRR(s)
			if err != nil {
				t.Fatal(err)
			}
			m.Ns = append(m.Ns, rr)
		}
		var p query
		wire, _ := q.Pack()
		if p.parse(wire) != ok {
			t.Fatal("parse")
		}
		e, err := f.entryOf(string(p.cacheKey()), m, now)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		if got := e.expires.Sub(e.stored); got != c.keep {
			t.Errorf("%s: kept for %v, want %v", what, got, c.keep)
		}
		if c.keep < 10*time.Second {
			continue
		}
		f.cache.put(e)
		later := now.Add(9*time.Second + 900*time.Millisecond)
		r := new(miekg.Msg)
		if err := r.Unpack(f.cached(nil, &p, 1232, later)); err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		for _, rr := range append(r.Answer, r.Ns...) {
			for _, was := range append(m.Answer, m.Ns...) {
				if was.Header().Name == rr.Header().Name && was.Header().Rrtype == rr.Header().Rrtype && miekg.IsDuplicate(was, rr) &&
					rr.Header().Ttl != was.Header().Ttl-9 {
					t.Errorf("%s: TTL %d after 9 s, was %d", what, rr.Header().Ttl, was.Header().Ttl)
				}
			}
		}
		if f.cached(nil, &p, 1232, now.Add(c.keep-time.Millisecond)) == nil {
			t.Errorf("%s: forgotten too early", what)
		}
		if f.cached(nil, &p, 1232, now.Add(c.keep)) != nil {
			t.Errorf("%s: kept too long", what)
		}
	}
}

func TestCacheBounds(t *testing.T) {
	var c cache
	now := time.Now()
	for i := range 3 * cacheEntries {
		c.put(&cacheEntry{key: fmt.Sprint(i), wire: make([]byte, 100), stored: now, expires: now.Add(time.Hour)})
	}
	if c.len() > cacheEntries {
		t.Errorf("%d entries", c.len())
	}
	if c.get([]byte("0"), now) != nil || c.get([]byte(fmt.Sprint(3*cacheEntries-1)), now) == nil {
		t.Error("not the oldest went")
	}
	for i := range 1000 {
		c.put(&cacheEntry{key: fmt.Sprint(i), wire: make([]byte, 60_000), stored: now, expires: now.Add(time.Hour)})
	}
	if c.bytes > cacheBytes {
		t.Errorf("%d bytes", c.bytes)
	}
	c.clear()
	if c.len() != 0 || c.bytes != 0 {
		t.Errorf("cleared: %d entries of %d bytes", c.len(), c.bytes)
	}
}

func TestResolvConf(t *testing.T) {
	own := netip.MustParseAddrPort("172.17.0.1:53")
	text := strings.Join([]string{
		"# comment", "search mesh.internal", "nameserver 172.17.0.1", "nameserver 192.0.2.1", "nameserver 192.0.2.1",
		"nameserver bogus", "nameserver fe80::1%eth0", "nameserver 2001:db8::1", "options edns0", "nameserver",
	}, "\n")
	got := fmt.Sprint(parseResolvConf([]byte(text), func(a netip.AddrPort) bool { return a == own }))
	if want := "[192.0.2.1:53 [fe80::1%eth0]:53 [2001:db8::1]:53]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestReload(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "resolv.conf")
	write := func(s string) {
		t.Helper()
		tmp := file + ".new"
		if err := os.WriteFile(tmp, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, file); err != nil {
			t.Fatal(err)
		}
	}
	s := startServer(t, newTable(t), func(c *Config) { c.ResolvConf = file })
	wait := func(want ...string) {
		t.Helper()
		eventually(t, func() bool { return slices.Equal(s.Status().Upstream, want) })
	}
	wait()
	write("nameserver 192.0.2.1\n")
	wait("192.0.2.1:53")
	write("nameserver 192.0.2.2\nnameserver 192.0.2.1\n")
	wait("192.0.2.2:53", "192.0.2.1:53")
}
