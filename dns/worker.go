package dns

import (
	"math/rand/v2"
	"time"

	miekg "github.com/miekg/dns"
)

// worker is what a reading goroutine needs to answer. It is that goroutine's own.
type worker struct {
	srv     *Server
	respond responder
	q       query
	count   *counters

	refusals    int // answers left for this second to clients that get nothing
	refusalsEnd time.Time
}

func newWorker(s *Server, count *counters) worker {
	return worker{
		srv:   s,
		count: count,
		respond: responder{
			table: s.table, domain: s.domain, ttl: uint32(s.cfg.TTL / time.Second), size: s.cfg.UDPSize,
			rng: rand.NewPCG(rand.Uint64(), rand.Uint64()),
		},
	}
}

// refusalsPerSecond bounds what strangers make a worker send; it is never more bytes than they sent.
const refusalsPerSecond = 100

// answerNow answers without waiting: nil means no answer, later that the question must be forwarded.
func (w *worker) answerNow(out, msg []byte, access Access, limit int, tcp bool) (answer []byte, later bool) {
	w.count.queries.Add(1)
	q := &w.q
	v := q.parse(msg)
	if access == Refuse {
		w.count.refused.Add(1)
		if v != ok || !w.mayRefuse() {
			return nil, false
		}
		return w.respond.code(out, q, miekg.RcodeRefused), false
	}
	switch v {
	case drop:
		w.count.dropped.Add(1)
		return nil, false
	case formErr, notImp:
		w.count.malformed.Add(1)
		q.question, q.edns = nil, false
		if v == notImp {
			return w.respond.code(out, q, miekg.RcodeNotImplemented), false
		}
		return w.respond.code(out, q, miekg.RcodeFormatError), false
	}
	if !tcp {
		limit = min(limit, q.size)
	}
	if answer = w.respond.answer(out, q, limit); answer != nil {
		w.count.answered.Add(1)
		return answer, false
	}
	if access != Full {
		w.count.refused.Add(1)
		return w.respond.code(out, q, miekg.RcodeRefused), false
	}
	if answer = w.srv.forward.cached(out, q, limit, time.Now()); answer != nil {
		w.count.cached.Add(1)
		return answer, false
	}
	w.count.forwarded.Add(1)
	return nil, true
}

func (w *worker) mayRefuse() bool {
	if w.refusals == 0 {
		now := time.Now()
		if now.Before(w.refusalsEnd) {
			return false
		}
		w.refusals, w.refusalsEnd = refusalsPerSecond, now.Add(time.Second)
	}
	w.refusals--
	return true
}
