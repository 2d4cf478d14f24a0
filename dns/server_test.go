package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	miekg "github.com/miekg/dns"

	"meshd/dns/records"
	"meshd/mesh"
)

const domain = "mesh.internal."

// trust believes everybody.
type trust struct{}

func (trust) Sign([]byte) (sig [64]byte)                { return sig }
func (trust) Verify([32]byte, []byte, [64]byte) bool    { return true }
func (trust) Key(mesh.PeerName) (key [32]byte, ok bool) { return [32]byte{1}, true }
func (trust) Bearer([32]byte) (nobody mesh.PeerName)    { return nobody }

func newTable(t testing.TB) *records.Table {
	t.Helper()
	table, err := records.Open(records.Config{Self: mesh.PeerName{1}, Keys: trust{}, Domain: domain, Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func addName(t testing.TB, table *records.Table, name string, addrs ...string) {
	t.Helper()
	var list []netip.Addr
	for _, a := range addrs {
		list = append(list, netip.MustParseAddr(a))
	}
	if err := table.AddName("", name, list); err != nil {
		t.Fatal(err)
	}
}

// startServer runs a server on a loopback port until the test ends.
func startServer(t testing.TB, table Table, change func(*Config)) *Server {
	t.Helper()
	cfg := Config{
		Domain: domain, Listen: netip.MustParseAddrPort("127.0.0.1:0"), TTL: time.Second,
		Ranges: []netip.Prefix{netip.MustParsePrefix("10.32.0.0/12")},
		Log:    slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg, table)
	if err != nil {
		t.Fatal(err)
	}
	err = s.Open()
	for range 10 {
		// The port that is free by TCP may not be so by UDP.
		if err == nil || cfg.Listen.Port() != 0 {
			break
		}
		err = s.Open()
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s
}

func ask(t testing.TB, s *Server, network, name string, qtype uint16, change ...func(*miekg.Msg)) *miekg.Msg {
	t.Helper()
	m := new(miekg.Msg)
	m.SetQuestion(name, qtype)
	for _, c := range change {
		c(m)
	}
	c := &miekg.Client{Net: network, Timeout: 5 * time.Second, UDPSize: 4096}
	r, _, err := c.Exchange(m, s.Addr().String())
	if err != nil {
		t.Fatalf("%s %s by %s: %v", name, miekg.TypeToString[qtype], network, err)
	}
	return r
}

func edns(size uint16) func(*miekg.Msg) {
	return func(m *miekg.Msg) { m.SetEdns0(size, false) }
}

// data is the answer section in short, sorted.
func data(m *miekg.Msg) []string {
	var out []string
	for _, rr := range m.Answer {
		f := strings.Fields(rr.String())
		out = append(out, strings.Join(append(f[3:4:4], f[4:]...), " "))
	}
	slices.Sort(out)
	return out
}

func TestAnswers(t *testing.T) {
	table := newTable(t)
	addName(t, table, "web.mesh.internal", "10.32.0.1", "10.32.0.2", "fd00::1")
	addName(t, table, "v4.mesh.internal", "10.32.0.3")
	addName(t, table, "a.b.mesh.internal", "10.32.0.4")
	long := strings.Repeat("x", 63) + "." + strings.Repeat("y", 63) + ".mesh.internal"
	addName(t, table, long, "10.32.0.5")
	s := startServer(t, table, nil)
	for _, c := range []struct {
		name  string
		qtype uint16
		rcode int
		want  []string
	}{
		{"web.mesh.internal.", miekg.TypeA, 0, []string{"A 10.32.0.1", "A 10.32.0.2"}},
		{"web.mesh.internal.", miekg.TypeAAAA, 0, []string{"AAAA fd00::1"}},
		{"wEb.MESH.internal.", miekg.TypeA, 0, []string{"A 10.32.0.1", "A 10.32.0.2"}},
		{"web.", miekg.TypeA, 0, []string{"A 10.32.0.1", "A 10.32.0.2"}},
		{"WEB.", miekg.TypeAAAA, 0, []string{"AAAA fd00::1"}},
		{"v4.", miekg.TypeAAAA, 0, nil}, // NODATA, or musl gives up (D10)
		{"v4.mesh.internal.", miekg.TypeAAAA, 0, nil},
		{"v4.mesh.internal.", miekg.TypeTXT, 0, nil},
		{"v4.mesh.internal.", miekg.TypeMX, 0, nil},
		{"v4.mesh.internal.", miekg.TypeHTTPS, 0, nil},
		{"a.b.mesh.internal.", miekg.TypeA, 0, []string{"A 10.32.0.4"}},
		{"b.mesh.internal.", miekg.TypeA, 0, nil}, // exists, since there is something below
		{"c.a.b.mesh.internal.", miekg.TypeA, miekg.RcodeNameError, nil},
		{"nobody.mesh.internal.", miekg.TypeA, miekg.RcodeNameError, nil},
		{"nobody.mesh.internal.", miekg.TypeANY, miekg.RcodeNameError, nil},
		{"mesh.internal.", miekg.TypeA, 0, nil},
		{"mesh.internal.", miekg.TypeSOA, 0, []string{"SOA ns.mesh.internal. hostmaster.mesh.internal. 1 3600 600 86400 1"}},
		{"web.mesh.internal.", miekg.TypeANY, 0, []string{`HINFO "RFC8482" ""`}},
		{long + ".", miekg.TypeA, 0, []string{"A 10.32.0.5"}},
		{"1.0.32.10.in-addr.arpa.", miekg.TypePTR, 0, []string{"PTR web.mesh.internal."}},
		{"1.0.32.10.IN-ADDR.arpa.", miekg.TypeA, 0, nil},
		{"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.", miekg.TypePTR, 0, []string{"PTR web.mesh.internal."}},
		{"mesh.internal.", miekg.TypeAXFR, miekg.RcodeRefused, nil},
		{"web.mesh.internal.", miekg.TypeIXFR, miekg.RcodeRefused, nil},
		{"example.org.", miekg.TypeAXFR, miekg.RcodeRefused, nil},
		{"x.mesh.internal.", miekg.TypeTSIG, miekg.RcodeRefused, nil},
		{"example.org.", miekg.TypeA, miekg.RcodeServerFailure, nil}, // no upstream
	} {
		for _, network := range []string{"udp", "tcp"} {
			for _, opt := range []bool{false, true} {
				m := new(miekg.Msg)
				m.SetQuestion(c.name, c.qtype)
				if opt {
					m.SetEdns0(1400, true)
				}
				client := &miekg.Client{Net: network, Timeout: 5 * time.Second}
				if c.qtype == miekg.TypeAXFR {
					m.Question[0].Qtype = c.qtype
				}
				r, _, err := client.Exchange(m, s.Addr().String())
				what := fmt.Sprintf("%s %s by %s, EDNS %v", c.name, miekg.TypeToString[c.qtype], network, opt)
				if err != nil {
					t.Errorf("%s: %v", what, err)
					continue
				}
				if got := data(r); r.Rcode != c.rcode || !slices.Equal(got, c.want) {
					t.Errorf("%s: got %s %v, want %s %v", what, miekg.RcodeToString[r.Rcode], got, miekg.RcodeToString[c.rcode], c.want)
				}
				if r.Question[0].Name != c.name {
					t.Errorf("%s: question echoed as %s", what, r.Question[0].Name)
				}
				for _, rr := range r.Answer {
					if rr.Header().Name != c.name || rr.Header().Ttl != 1 {
						t.Errorf("%s: got %v", what, rr)
					}
				}
				if o := r.IsEdns0(); (o != nil) != opt || o != nil && (o.UDPSize() != 1232 || !o.Do()) {
					t.Errorf("%s: OPT is %v", what, o)
				}
				local := strings.HasSuffix(strings.ToLower(c.name), domain) && c.qtype != miekg.TypeAXFR && c.qtype != miekg.TypeIXFR && c.qtype != miekg.TypeTSIG
				if local && len(c.want) == 0 {
					if len(r.Ns) != 1 || r.Ns[0].Header().Name == "" || r.Ns[0].(*miekg.SOA).Minttl != 1 || r.Ns[0].Header().Ttl != 1 {
						t.Errorf("%s: authority is %v, want the SOA record", what, r.Ns)
					}
				}
				if local && !r.Authoritative || !r.RecursionAvailable || !r.RecursionDesired {
					t.Errorf("%s: flags of %v", what, r.MsgHdr)
				}
			}
		}
	}
}

func TestClassesAndCodes(t *testing.T) {
	table := newTable(t)
	s := startServer(t, table, nil)
	r := ask(t, s, "udp", "version.bind.", miekg.TypeTXT, func(m *miekg.Msg) { m.Question[0].Qclass = miekg.ClassCHAOS })
	if r.Rcode != miekg.RcodeRefused {
		t.Errorf("class CH: got %s", miekg.RcodeToString[r.Rcode])
	}
	r = ask(t, s, "udp", "x.mesh.internal.", miekg.TypeA, func(m *miekg.Msg) { m.Opcode = miekg.OpcodeUpdate })
	if r.Rcode != miekg.RcodeNotImplemented || r.Opcode != miekg.OpcodeUpdate {
		t.Errorf("update: got %v", r)
	}
	r = ask(t, s, "udp", "x.mesh.internal.", miekg.TypeA, func(m *miekg.Msg) {
		m.Question = append(m.Question, m.Question[0])
	})
	if r.Rcode != miekg.RcodeFormatError {
		t.Errorf("two questions: got %s", miekg.RcodeToString[r.Rcode])
	}
	r = ask(t, s, "udp", "x.mesh.internal.", miekg.TypeA, edns(1232), func(m *miekg.Msg) { m.IsEdns0().SetVersion(1) })
	if r.Rcode != miekg.RcodeBadVers {
		t.Errorf("EDNS 1: got %s", miekg.RcodeToString[r.Rcode])
	}
}

// 50 addresses are an ordinary case: whole by TCP and with EDNS, cut and marked without.
func TestTruncation(t *testing.T) {
	table := newTable(t)
	var all []string
	for i := range 50 {
		all = append(all, fmt.Sprintf("10.32.1.%d", i))
	}
	addName(t, table, "many.mesh.internal", all...)
	for i := range 50 {
		addName(t, table, "many6.mesh.internal", fmt.Sprintf("fd00::%x", i+1))
	}
	s := startServer(t, table, nil)
	for _, c := range []struct {
		network, name string
		qtype         uint16
		edns          uint16
		want          int
		cut           bool
	}{
		{"udp", "many.mesh.internal.", miekg.TypeA, 0, 29, true}, // (512-12-24)/16
		{"udp", "many.mesh.internal.", miekg.TypeA, 100, 29, true},
		{"udp", "many.mesh.internal.", miekg.TypeA, 1232, 50, false},
		{"udp", "many.mesh.internal.", miekg.TypeA, 4096, 50, false},
		{"tcp", "many.mesh.internal.", miekg.TypeA, 0, 50, false},
		{"udp", "many6.mesh.internal.", miekg.TypeAAAA, 4096, 42, true}, // we send 1,232 bytes at most
		{"tcp", "many6.mesh.internal.", miekg.TypeAAAA, 4096, 50, false},
	} {
		var change []func(*miekg.Msg)
		if c.edns != 0 {
			change = append(change, edns(c.edns))
		}
		r := ask(t, s, c.network, c.name, c.qtype, change...)
		if len(r.Answer) != c.want || r.Truncated != c.cut {
			t.Errorf("%+v: got %d answers, truncated %v", c, len(r.Answer), r.Truncated)
		}
	}
}

func TestShuffle(t *testing.T) {
	table := newTable(t)
	peer := mesh.PeerName{2}
	addName(t, table, "web.mesh.internal", "10.32.0.1", "10.32.0.2", "10.32.0.3", "10.32.0.4")
	other, err := records.Open(records.Config{Self: peer, Keys: trust{}, Domain: domain, Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	other.Announce(mesh.Endpoint{Owner: "c", MAC: mesh.MAC{2}, Addrs: []netip.Prefix{netip.MustParsePrefix("10.32.0.9/12")}, Names: []string{"web.mesh.internal."}})
	for _, d := range other.Drain(1100) {
		if _, err := table.Merge(peer, d); err != nil {
			t.Fatal(err)
		}
	}
	table.SetPeerState(peer, records.Suspect)
	s := startServer(t, table, nil)
	first := make(map[string]int)
	const n = 2000
	for range n {
		r := ask(t, s, "udp", "web.mesh.internal.", miekg.TypeA)
		if last := r.Answer[4].(*miekg.A).A.String(); last != "10.32.0.9" {
			t.Fatalf("the suspected peer's address is not last: %v", data(r))
		}
		first[r.Answer[0].(*miekg.A).A.String()]++
	}
	for a, k := range first {
		if k < n/8 || k > n/2 {
			t.Errorf("%s came first %d times of %d", a, k, n)
		}
	}
	if len(first) != 4 {
		t.Errorf("got %v", first)
	}
}

// Who may not ask gets REFUSED, not larger than the query, and not often; by TCP nothing at all.
func TestAccess(t *testing.T) {
	table := newTable(t)
	addName(t, table, "web.mesh.internal", "10.32.0.1")
	var access atomic.Int32
	s := startServer(t, table, func(c *Config) {
		c.Access = func(src netip.Addr, index int) Access {
			if !src.IsLoopback() {
				t.Errorf("source %v", src)
			}
			return Access(access.Load())
		}
	})
	access.Store(int32(Names))
	if r := ask(t, s, "udp", "web.mesh.internal.", miekg.TypeA); len(r.Answer) != 1 {
		t.Errorf("names only: got %v", r)
	}
	if r := ask(t, s, "udp", "example.org.", miekg.TypeA); r.Rcode != miekg.RcodeRefused {
		t.Errorf("names only: got %s for an outside name", miekg.RcodeToString[r.Rcode])
	}
	if r := ask(t, s, "tcp", "example.org.", miekg.TypeA); r.Rcode != miekg.RcodeRefused {
		t.Errorf("names only: got %s for an outside name", miekg.RcodeToString[r.Rcode])
	}
	access.Store(int32(Refuse))
	var m *miekg.Msg
	for _, qtype := range []uint16{miekg.TypeA, miekg.TypeANY, miekg.TypeDNSKEY, miekg.TypeTXT} {
		for _, opt := range []bool{false, true} {
			m = new(miekg.Msg)
			m.SetQuestion("web.mesh.internal.", qtype)
			if opt {
				m.SetEdns0(4096, true)
			}
			sent, _ := m.Pack()
			r := ask(t, s, "udp", "web.mesh.internal.", qtype, func(x *miekg.Msg) { *x = *m })
			if got := r.Len(); r.Rcode != miekg.RcodeRefused || len(r.Answer) != 0 || got > len(sent) {
				t.Errorf("a stranger got %d bytes for %d: %v", got, len(sent), r)
			}
		}
	}
	c := &miekg.Client{Net: "tcp", Timeout: time.Second}
	if r, _, err := c.Exchange(m, s.Addr().String()); err == nil {
		t.Errorf("a stranger got an answer by TCP: %v", r)
	}
	// A burst is not answered packet by packet.
	conn, err := net.Dial("udp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	q, _ := m.Pack()
	for range 2000 {
		if _, err := conn.Write(q); err != nil {
			t.Fatal(err)
		}
	}
	got := 0
	buf := make([]byte, 4096)
	for conn.SetReadDeadline(time.Now().Add(200*time.Millisecond)) == nil {
		if _, err := conn.Read(buf); err != nil {
			break
		}
		got++
	}
	if got > 4*refusalsPerSecond {
		t.Errorf("%d refusals for a burst", got)
	}
}

func TestPortTaken(t *testing.T) {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s, err := New(Config{Domain: domain, Listen: conn.LocalAddr().(*net.UDPAddr).AddrPort()}, newTable(t))
	if err != nil {
		t.Fatal(err)
	}
	err = s.Open()
	var taken *PortTakenError
	if !errors.As(err, &taken) {
		t.Fatalf("got %v, want a PortTakenError", err)
	}
	comm, _ := os.ReadFile("/proc/self/comm")
	for _, want := range []string{strings.TrimSpace(string(comm)), fmt.Sprint(os.Getpid()), "--dns-listen-address", conn.LocalAddr().String()} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got %q, want it to say %q", err, want)
		}
	}
}

// Two servers of our own do not share a port unnoticed.
func TestSecondServer(t *testing.T) {
	first := startServer(t, newTable(t), nil)
	s, err := New(Config{Domain: domain, Listen: first.Addr()}, newTable(t))
	if err != nil {
		t.Fatal(err)
	}
	var taken *PortTakenError
	if err := s.Open(); !errors.As(err, &taken) {
		t.Errorf("got %v, want a PortTakenError", err)
	}
}

// Malformed TCP clients and slow ones are dropped; there are only so many of them.
func TestTCPClients(t *testing.T) {
	table := newTable(t)
	addName(t, table, "web.mesh.internal", "10.32.0.1")
	s := startServer(t, table, nil)
	closed := make(chan bool, 3*tcpPerSource)
	for range cap(closed) {
		c, err := net.Dial("tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		go func() { // ends with the deadline
			if _, err := c.Write([]byte{0, 40, 1}); err != nil { // and then nothing
				closed <- true
				return
			}
			if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
				t.Error(err)
			}
			_, err := c.Read(make([]byte, 1))
			closed <- !errors.Is(err, os.ErrDeadlineExceeded)
		}()
	}
	n := 0
	for range cap(closed) {
		if <-closed {
			n++
		}
	}
	if n != 2*tcpPerSource {
		t.Errorf("%d of %d connections were closed, want %d", n, cap(closed), 2*tcpPerSource)
	}
	if r := ask(t, s, "udp", "web.mesh.internal.", miekg.TypeA); len(r.Answer) != 1 {
		t.Errorf("UDP meanwhile: got %v", r)
	}
}

func TestParseProcAddr(t *testing.T) {
	for in, want := range map[string]string{
		"0100007F:0035":                         "127.0.0.1:53",
		"00000000:0035":                         "0.0.0.0:53",
		"00000000000000000000000001000000:0050": "[::1]:80",
		"0000000000000000FFFF0000010011AC:0035": "172.17.0.1:53",
	} {
		if got, ok := parseProcAddr(in); !ok || got.String() != want {
			t.Errorf("parseProcAddr(%q) = %v, want %s", in, got, want)
		}
	}
	for _, in := range []string{"", "xx:0035", "0100007F", "01:0035", "0100007F:fffff"} {
		if got, ok := parseProcAddr(in); ok {
			t.Errorf("parseProcAddr(%q) = %v", in, got)
		}
	}
}

func endpointAt(prefix string, names ...string) mesh.Endpoint {
	return mesh.Endpoint{Owner: "c", MAC: mesh.MAC{2}, Addrs: []netip.Prefix{netip.MustParsePrefix(prefix)}, Names: names}
}

// eventually waits up to five seconds, the time in which the server takes note of its surroundings.
func eventually(t testing.TB, true func() bool) {
	t.Helper()
	limit := time.After(5 * time.Second)
	for !true() {
		select {
		case <-time.After(time.Millisecond):
		case <-limit:
			t.Fatal("not within 5 s")
		}
	}
}

// A thousand TCP clients that send a byte now and then hold no more places than there are, lose them in
// time, and UDP does not notice.
func TestSlowTCPClients(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	table := newTable(t)
	addName(t, table, "web.mesh.internal", "10.32.0.1")
	s := startServer(t, table, nil)
	const clients, perSource = 1000, 25
	start := time.Now()
	var wg sync.WaitGroup
	var cut atomic.Int32
	stop := make(chan struct{})
	for i := range clients {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i/perSource))}, Timeout: 5 * time.Second}
		c, err := d.Dial("tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		wg.Go(func() { // ends when the server cuts the connection, or with stop
			drip := []byte{2, 0} // the length of a request that never gets there
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			for n := 0; ; n++ {
				b := byte(0)
				if n < len(drip) {
					b = drip[n]
				}
				if _, err := c.Write([]byte{b}); err != nil {
					cut.Add(1)
					return
				}
				select {
				case <-tick.C:
				case <-stop:
					return
				}
			}
		})
	}
	most := 0
	var took []time.Duration
	conn, err := net.Dial("udp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	q, buf := packed(t, "web.mesh.internal.", miekg.TypeA), make([]byte, 512)
	for cut.Load() < clients && time.Since(start) < tcpIdle+tcpMessage {
		most = max(most, s.clients.count())
		asked := time.Now()
		if _, err := conn.Write(q); err != nil {
			t.Fatal(err)
		}
		if err := conn.SetReadDeadline(asked.Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(buf); err != nil {
			t.Fatalf("by UDP meanwhile: %v", err)
		}
		took = append(took, time.Since(asked))
		<-time.After(time.Millisecond)
	}
	close(stop)
	wg.Wait()
	slices.Sort(took)
	t.Logf("%d clients at most, all cut after %v; by UDP meanwhile: median %v, 99th percentile %v", most, time.Since(start).Round(time.Millisecond), took[len(took)/2], took[len(took)*99/100])
	if cut.Load() != clients {
		t.Errorf("%d of %d clients were cut", cut.Load(), clients)
	}
	if most > tcpClients || most < tcpClients/2 {
		t.Errorf("%d clients at a time, want up to %d", most, tcpClients)
	}
	if p99 := took[len(took)*99/100]; p99 > 100*time.Millisecond {
		t.Errorf("UDP took %v", p99)
	}
	if r := ask(t, s, "tcp", "web.mesh.internal.", miekg.TypeA); len(r.Answer) != 1 {
		t.Errorf("TCP afterwards: got %v", r)
	}
}

// Whatever resolv.conf says, what comes of it are a few servers, none of them this one.
func FuzzResolvConf(f *testing.F) {
	f.Add([]byte("nameserver 192.0.2.1\nnameserver fe80::1%eth0\noptions ndots:2 timeout:1 attempts:9\nsearch a b\n"))
	f.Add([]byte("nameserver ::ffff:127.0.0.1\nnameserver\ndomain\noptions ndots:\noptions timeout:-1\n"))
	own := netip.MustParseAddrPort("127.0.0.1:53")
	f.Fuzz(func(t *testing.T, text []byte) {
		servers := parseResolvConf(text, func(s netip.AddrPort) bool { return s == own })
		if len(servers) > maxUpstreams {
			t.Errorf("%d servers", len(servers))
		}
		for i, s := range servers {
			if !s.IsValid() || s.Port() != resolvPort || s == own || slices.Contains(servers[:i], s) {
				t.Errorf("%v is among %v", s, servers)
			}
		}
	})
}

// /proc/net/udp, as the kernel writes it.
func FuzzProcAddr(f *testing.F) {
	f.Add("0100007F:0035")
	f.Add("00000000000000000000000001000000:0035")
	f.Add("0000:")
	f.Fuzz(func(t *testing.T, s string) {
		if a, ok := parseProcAddr(s); ok && !a.IsValid() {
			t.Errorf("%q: %v", s, a)
		}
	})
}
