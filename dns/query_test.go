package dns

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	miekg "github.com/miekg/dns"
)

func newTestWorker(t testing.TB) worker {
	t.Helper()
	table := newTable(t)
	for i := range 60 {
		addName(t, table, "many.mesh.internal", fmt.Sprintf("10.32.1.%d", i))
	}
	addName(t, table, "web.mesh.internal", "10.32.0.1", "fd00::1")
	s, err := New(Config{Domain: domain, Listen: netip.MustParseAddrPort("127.0.0.1:0"), TTL: time.Second}, table)
	if err != nil {
		t.Fatal(err)
	}
	return newWorker(s, &s.count)
}

func packed(t testing.TB, name string, qtype uint16, change ...func(*miekg.Msg)) []byte {
	t.Helper()
	m := new(miekg.Msg)
	m.SetQuestion(name, qtype)
	for _, c := range change {
		c(m)
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseQuery(t *testing.T) {
	header := "\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00"
	opt := "\x00\x00\x29\x04\xd0\x00\x00\x80\x00\x00\x00"
	with := func(additional int, rest string) string {
		return header[:11] + string(rune(additional)) + rest
	}
	q63 := "\x3f" + strings.Repeat("a", 63)
	for what, c := range map[string]struct {
		in   string
		want verdict
	}{
		"plain":                {header + "\x03web\x00\x00\x01\x00\x01", ok},
		"root":                 {header + "\x00\x00\x01\x00\x01", ok},
		"longest":              {header + q63 + q63 + q63 + "\x3d" + strings.Repeat("b", 61) + "\x00\x00\x01\x00\x01", ok},
		"too long":             {header + q63 + q63 + q63 + "\x3e" + strings.Repeat("b", 62) + "\x00\x00\x01\x00\x01", formErr},
		"far too long":         {header + strings.Repeat(q63, 8) + "\x00\x00\x01\x00\x01", formErr},
		"empty":                {"", drop},
		"short":                {header[:11], drop},
		"only a header":        {header, formErr},
		"no end":               {header + "\x03web", formErr},
		"label cut":            {header + "\x07web\x00", formErr},
		"no type":              {header + "\x03web\x00\x00", formErr},
		"pointer":              {header + "\xc0\x0c\x00\x01\x00\x01", formErr},
		"label type":           {header + "\x41a\x00\x00\x01\x00\x01", formErr},
		"answer":               {"\x12\x34\x81" + header[3:] + "\x00\x00\x01\x00\x01", drop},
		"status opcode":        {"\x12\x34\x11" + header[3:] + "\x00\x00\x01\x00\x01", notImp},
		"with OPT":             {with(1, "\x03web\x00\x00\x01\x00\x01"+opt), ok},
		"two OPTs":             {with(2, "\x03web\x00\x00\x01\x00\x01"+opt+opt), formErr},
		"OPT with a name":      {with(1, "\x03web\x00\x00\x01\x00\x01\x01a"+opt), formErr},
		"OPT cut":              {with(1, "\x03web\x00\x00\x01\x00\x01"+opt[:10]), formErr},
		"OPT data cut":         {with(1, "\x03web\x00\x00\x01\x00\x01"+opt[:10]+"\x05abc"), formErr},
		"additional announced": {with(1, "\x03web\x00\x00\x01\x00\x01"), formErr},
		"answers announced":    {header[:7] + "\x01" + header[8:] + "\x00\x00\x01\x00\x01", formErr},
		"no question":          {header[:5] + "\x00" + header[6:], formErr},
	} {
		var q query
		if got := q.parse([]byte(c.in)); got != c.want {
			t.Errorf("%s: got %d, want %d", what, got, c.want)
		}
	}
	var q query
	if q.parse([]byte(with(1, "\x03WeB\x01X\x00\x00\x1c\x00\x01"+opt))) != ok || string(q.lower) != "\x03web\x01x\x00" ||
		q.qtype != miekg.TypeAAAA || !q.edns || q.size != 1232 || !q.do || q.labels != 2 {
		t.Errorf("got %+v", q)
	}
}

func TestReverseNames(t *testing.T) {
	for name, want := range map[string]string{
		"4.3.2.1.in-addr.arpa.":     "1.2.3.4",
		"255.0.32.10.IN-ADDR.ARPA.": "10.32.0.255",
		"256.0.32.10.in-addr.arpa.": "", "01.0.32.10.in-addr.arpa.": "", "x.0.32.10.in-addr.arpa.": "", "0.32.10.in-addr.arpa.": "",
		"1.4.3.2.1.in-addr.arpa.": "",
		"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.B.d.0.1.0.0.2.ip6.arpa.":  "2001:db8::1",
		"g.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.":  "",
		"10.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.": "",
	} {
		var q query
		if q.parse(packed(t, name, miekg.TypePTR)) != ok {
			t.Fatal(name)
		}
		got, is := q.reverse()
		if is != (want != "") || is && got.String() != want {
			t.Errorf("%s: got %v, want %q", name, got, want)
		}
	}
}

func TestAnswerDoesNotAllocate(t *testing.T) {
	w := newTestWorker(t)
	out := make([]byte, 0, 1232)
	for _, msg := range [][]byte{
		packed(t, "many.mesh.internal.", miekg.TypeA, edns(1232)), packed(t, "web.", miekg.TypeAAAA), packed(t, "no.mesh.internal.", miekg.TypeA),
		packed(t, "1.0.32.10.in-addr.arpa.", miekg.TypePTR), {1, 2, 3}, make([]byte, 100),
	} {
		if n := testing.AllocsPerRun(100, func() { w.answerNow(out, msg, Full, 1232, false) }); n != 0 {
			t.Errorf("%q: %v allocations", msg, n)
		}
	}
}

// checkAnswer holds for every request whatsoever.
func checkAnswer(t *testing.T, msg, answer []byte, limit int) {
	t.Helper()
	if answer == nil {
		return
	}
	if len(answer) > limit {
		t.Fatalf("%d bytes, limit %d", len(answer), limit)
	}
	m := new(miekg.Msg)
	if err := m.Unpack(answer); err != nil {
		t.Fatalf("answer %q: %v", answer, err)
	}
	if !bytes.Equal(answer[:2], msg[:2]) || !m.Response {
		t.Fatalf("answer %v to %q", m, msg)
	}
	if len(m.Question) == 1 && !bytes.HasPrefix(msg[headerLen:], answer[headerLen:headerLen+4]) {
		t.Fatalf("question of %q came back as %q", msg, answer)
	}
}

func FuzzQuery(f *testing.F) {
	for _, q := range []struct {
		name  string
		qtype uint16
	}{{"many.mesh.internal.", miekg.TypeA}, {"web.", miekg.TypeAAAA}, {"web.mesh.internal.", miekg.TypeANY}, {"x.mesh.internal.", miekg.TypeMX},
		{"mesh.internal.", miekg.TypeAXFR}, {"1.0.32.10.in-addr.arpa.", miekg.TypePTR}, {"example.org.", miekg.TypeA}} {
		f.Add(packed(f, q.name, q.qtype))
		f.Add(packed(f, q.name, q.qtype, edns(4096)))
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		w := newFuzzWorker(t)
		for _, limit := range []int{512, 1232, maxMessage} {
			answer, later := w.answerNow(make([]byte, 0, limit), msg, Full, limit, limit == maxMessage)
			checkAnswer(t, msg, answer, limit)
			if later {
				checkAnswer(t, msg, w.srv.forward.failure(&w.q, miekg.RcodeServerFailure, 22), len(msg)+6+optLen)
			}
		}
		if answer, later := w.answerNow(nil, msg, Refuse, 1232, false); later || len(answer) > len(msg) {
			t.Fatalf("a stranger's %d bytes were answered with %d, forwarded: %v", len(msg), len(answer), later)
		}
	})
}

var newFuzzWorker = func() func(t testing.TB) *worker {
	var once sync.Once
	var w worker
	return func(t testing.TB) *worker {
		once.Do(func() { w = newTestWorker(t) })
		fresh := newWorker(w.srv, &w.srv.count)
		return &fresh
	}
}()

// FuzzUpstream feeds what a server might send: whatever is accepted can be kept and handed on.
func FuzzUpstream(f *testing.F) {
	q := packed(f, "example.org.", miekg.TypeA)
	m := new(miekg.Msg)
	if err := m.Unpack(q); err != nil {
		f.Fatal(err)
	}
	for _, rrs := range [][]string{
		{"example.org. 60 IN A 192.0.2.1"}, {"example.org. 60 IN CNAME a.example.org.", "a.example.org. 60 IN A 10.32.0.1"},
		{`example.org. 60 IN HTTPS 1 . ipv4hint=10.32.0.5 alpn=h2`}, {`example.org. 60 IN TYPE65400 \# 3 010203`}, {"example.org. 60 IN TXT \"x\""},
	} {
		b, err := replyTo(m, rrs...).Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b[2:])
	}
	// A signature whose fields are not there: it is read, but what is written of it is not.
	f.Add([]byte("\x81\x80\x00\x01\x00\x01\x00\x00\x00\x00\x07example\x03org\x00\x00\x01\x00\x01\x00\x00\xfa0000/\xf4\x00\x00"))
	// A start of authority without any, and one that is cut short.
	f.Add([]byte("\x81\x80\x00\x01\x00\x01\x00\x00\x00\x00\x07example\x03org\x00\x00\x01\x00\x01\x00\x00\x060000/\x80\x00\x01\x00"))
	f.Add([]byte("\x81\x80\x00\x01\x00\x01\x00\x00\x00\x00\x07example\x03org\x00\x00\x01\x00\x01\x00\x00\x060000/\xd5\x00\x00"))
	mesh := netip.MustParsePrefix("10.32.0.0/12")
	f.Fuzz(func(t *testing.T, b []byte) {
		fw := newForwarder(time.Second, 1232, mesh.Contains, nil)
		var p query
		if p.parse(q) != ok {
			t.Fatal("parse")
		}
		up := upstreamQuestion{name: string(p.lower), qtype: p.qtype}
		m, err := parseAnswer(append(q[:2:2], b...), binary.BigEndian.Uint16(q), up)
		if err != nil {
			return
		}
		e, err := fw.entryOf(string(p.cacheKey()), m, time.Now())
		if err != nil {
			return
		}
		for _, limit := range []int{512, 1232, maxMessage} {
			answer := fw.finish(nil, &p, e, limit, time.Now().Add(time.Minute))
			if len(answer) > limit {
				t.Fatalf("%d bytes, limit %d", len(answer), limit)
			}
			r := new(miekg.Msg)
			if err := r.Unpack(answer); err != nil {
				t.Fatalf("handed on %q: %v", answer, err)
			}
			for _, rr := range r.Answer {
				if a, is := rr.(*miekg.A); is {
					if ip, _ := netip.AddrFromSlice(a.A.To4()); mesh.Contains(ip) {
						t.Fatalf("an address of the mesh from outside: %v", rr)
					}
				}
			}
		}
	})
}

func BenchmarkAnswer(b *testing.B) {
	for _, c := range []struct {
		name string
		msg  []byte
	}{
		{"one", packed(b, "web.mesh.internal.", miekg.TypeA, edns(1232))},
		{"fifty", packed(b, "many.mesh.internal.", miekg.TypeA, edns(1232))},
		{"nobody", packed(b, "nobody.mesh.internal.", miekg.TypeA)},
		{"malformed", packed(b, "web.mesh.internal.", miekg.TypeA)[:20]},
	} {
		b.Run(c.name, func(b *testing.B) {
			w := newTestWorker(b)
			out := make([]byte, 0, 1232)
			b.ReportAllocs()
			for b.Loop() {
				w.answerNow(out, c.msg, Full, 1232, false)
			}
		})
	}
}
