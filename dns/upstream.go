package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	miekg "github.com/miekg/dns"
)

type netIP = net.IP

var (
	errNoServers = errors.New("no upstream name server")
	errMismatch  = errors.New("the answer does not fit the question")
	errFlood     = errors.New("too many answers that do not fit the question")
)

// upstream is one of the host's own name servers.
type upstream struct {
	addr netip.AddrPort

	mu     sync.Mutex // guards both
	misses int        // questions in a row that came to nothing or that another server answered first
	bench  time.Time  // until then the others come first
}

func (u *upstream) hit() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.misses, u.bench = 0, time.Time{}
}

func (u *upstream) miss(now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.misses++; u.misses >= benchMisses {
		u.bench = now.Add(benchTime)
	}
}

func (u *upstream) benched(now time.Time) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return now.Before(u.bench)
}

// ranked returns the servers in the order to ask them.
func (f *forwarder) ranked(now time.Time) []*upstream {
	var fit, benched []*upstream
	for _, u := range *f.servers.Load() {
		if u.benched(now) {
			benched = append(benched, u)
		} else {
			fit = append(fit, u)
		}
	}
	return append(fit, benched...)
}

type upstreamQuestion struct {
	name   string // wire form
	qtype  uint16
	do, cd bool
}

// exchange asks one server after the other, without waiting long for any, and takes the first answer that
// says something. Servers that say that they cannot (SERVFAIL, REFUSED and their like) count as failed.
func (f *forwarder) exchange(ctx context.Context, q upstreamQuestion) (*miekg.Msg, error) {
	servers := f.ranked(time.Now())
	if len(servers) == 0 {
		return nil, errNoServers
	}
	ctx, cancel := context.WithCancel(ctx)
	type outcome struct {
		server *upstream
		msg    *miekg.Msg
		err    error
	}
	const rounds = 2
	outcomes := make(chan outcome, rounds*len(servers)) // room for all: nobody waits to report
	var attempts sync.WaitGroup
	defer attempts.Wait()
	defer cancel()

	started, running := 0, 0
	hedge := time.NewTimer(0)
	defer hedge.Stop()
	var failed *miekg.Msg
	var asked []*upstream
	var err error
	next := func() {
		if started == rounds*len(servers) {
			return
		}
		u := servers[started%len(servers)]
		started++
		running++
		asked = append(asked, u)
		attempts.Go(func() {
			m, err := f.askServer(ctx, u.addr, q)
			outcomes <- outcome{u, m, err}
		})
		if started == len(servers) {
			hedge.Reset(retryAfter)
		} else {
			hedge.Reset(hedgeAfter)
		}
	}
	for {
		select {
		case <-hedge.C:
			next()
		case o := <-outcomes:
			running--
			switch {
			case o.err != nil:
				err = fmt.Errorf("%s: %w", o.server.addr, o.err)
				o.server.miss(time.Now())
			case useless(o.msg.Rcode):
				failed, err = o.msg, fmt.Errorf("%s: %s", o.server.addr, miekg.RcodeToString[o.msg.Rcode])
			default:
				o.server.hit()
				// Those that were asked before and are silent still have missed.
				for _, u := range asked[:slices.Index(asked, o.server)] {
					u.miss(time.Now())
				}
				return o.msg, nil
			}
			if started < len(servers) {
				next() // at once
			} else if running == 0 && (started == rounds*len(servers) || failed != nil) {
				if failed != nil {
					return failed, nil
				}
				return nil, err
			}
		case <-ctx.Done():
			for _, u := range asked {
				u.miss(time.Now())
			}
			if failed != nil {
				return failed, nil
			}
			return nil, ctx.Err()
		}
	}
}

func useless(rcode int) bool { return rcode != miekg.RcodeSuccess && rcode != miekg.RcodeNameError }

// askServer asks one server by UDP, and by TCP when the answer did not fit.
func (f *forwarder) askServer(ctx context.Context, server netip.AddrPort, q upstreamQuestion) (*miekg.Msg, error) {
	m, err := f.askUDP(ctx, server, q, true)
	if err == nil && (m.Rcode == miekg.RcodeFormatError || m.Rcode == miekg.RcodeNotImplemented) && m.IsEdns0() == nil && !q.do {
		m, err = f.askUDP(ctx, server, q, false) // it knows no EDNS (RFC 6891 §7)
	}
	if err != nil || !m.Truncated {
		return m, err
	}
	return f.askTCP(ctx, server, q)
}

// maxMisfits is how many datagrams that are no answer to our question we read before we take it that
// somebody is guessing.
const maxMisfits = 64

// askUDP uses a socket of its own: the kernel picks a random port for it and drops what comes from
// elsewhere. With a random id this is 32 bits for a forger to guess (RFC 5452 §4).
func (f *forwarder) askUDP(ctx context.Context, server netip.AddrPort, q upstreamQuestion, edns bool) (*miekg.Msg, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "udp", server.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	id := uint16(rand.Uint32()) // ChaCha8 seeded by the kernel: not to be guessed from former ones
	if _, err := conn.Write(appendQuestion(nil, id, q, f.size, edns)); err != nil {
		return nil, fromContext(ctx, err)
	}
	buf := make([]byte, max(f.size, 4096))
	for range maxMisfits {
		n, err := conn.Read(buf)
		if err != nil {
			return nil, fromContext(ctx, err)
		}
		if m, err := parseAnswer(buf[:n], id, q); err == nil {
			return m, nil
		}
	}
	return nil, errFlood
}

func (f *forwarder) askTCP(ctx context.Context, server netip.AddrPort, q upstreamQuestion) (*miekg.Msg, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", server.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	id := uint16(rand.Uint32())
	msg := appendQuestion([]byte{0, 0}, id, q, f.size, true)
	binary.BigEndian.PutUint16(msg, uint16(len(msg)-2))
	if _, err := conn.Write(msg); err != nil {
		return nil, fromContext(ctx, err)
	}
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return nil, fromContext(ctx, err)
	}
	buf := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(conn, buf); err != nil {
		return nil, fromContext(ctx, err)
	}
	return parseAnswer(buf, id, q)
}

// fromContext prefers the reason why a connection was closed under its reader.
func fromContext(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func appendQuestion(b []byte, id uint16, q upstreamQuestion, size int, edns bool) []byte {
	flags := uint16(flagRD)
	if q.cd {
		flags |= flagCD
	}
	extra := byte(0)
	if edns {
		extra = 1
		flags |= flagAD // we understand it (RFC 6840 §5.7)
	}
	b = append(b, byte(id>>8), byte(id), byte(flags>>8), byte(flags), 0, 1, 0, 0, 0, 0, 0, extra)
	b = append(b, q.name...)
	b = append(b, byte(q.qtype>>8), byte(q.qtype), 0, miekg.ClassINET)
	if edns {
		b = appendOPT(b, size, 0, q.do)
	}
	return b
}

// parseAnswer accepts what answers our question and nothing else.
func parseAnswer(b []byte, id uint16, q upstreamQuestion) (*miekg.Msg, error) {
	if len(b) < headerLen || binary.BigEndian.Uint16(b) != id {
		return nil, errMismatch
	}
	m := new(miekg.Msg)
	err := m.Unpack(b)
	// Servers leave the question out when they could not read it.
	bare := len(m.Question) == 0 && m.Rcode == miekg.RcodeFormatError
	if err != nil && !bare && !(m.Truncated && len(m.Question) == 1) {
		return nil, err
	}
	if !m.Response || m.Opcode != miekg.OpcodeQuery {
		return nil, errMismatch
	}
	want := miekg.Question{Name: miekgName(q.name), Qtype: q.qtype, Qclass: miekg.ClassINET}
	if bare {
		m.Question = []miekg.Question{want}
		return m, nil
	}
	if len(m.Question) != 1 {
		return nil, errMismatch
	}
	got := m.Question[0]
	if !strings.EqualFold(got.Name, want.Name) || got.Qtype != want.Qtype || got.Qclass != want.Qclass {
		return nil, errMismatch
	}
	for _, section := range [][]miekg.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			// Types 128 to 255 are no data but about a message (RFC 6895 §3.1), and not about ours.
			if t := rr.Header().Rrtype; t >= 128 && t <= 255 {
				return nil, errMismatch
			}
		}
	}
	return m, nil
}

// miekgName writes a wire name as miekg/dns does, with its escapes.
func miekgName(wire string) string {
	name, _, err := miekg.UnpackDomainName([]byte(wire), 0)
	if err != nil {
		return "."
	}
	return name
}
