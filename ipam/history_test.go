package ipam

import (
	"math"
	"net/netip"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// history records what the hosts did with addresses, for a check that is independent of the oracle: that
// each address behaves like a register that is taken by at most one container at a time. A nil history
// records nothing.
type history struct {
	w   *world
	ops []porcupine.Operation
}

// open records a free that was never answered.
func (h *history) open(invoked int64, n *node, ct *container) {
	if h != nil {
		h.ops = append(h.ops, porcupine.Operation{ClientId: int(n.name[5]), Input: registerInput{ct.addr.Addr(), ct.id, true},
			Call: invoked, Return: math.MaxInt64})
	}
}

type registerInput struct {
	addr netip.Addr
	id   string
	free bool
}

func (h *history) invoke() int64 {
	if h == nil {
		return 0
	}
	return h.stamp()
}

// stamp is the simulated time, made unique.
func (h *history) stamp() int64 { return int64(h.w.now.Sub(epoch))*1000 + int64(len(h.ops)%1000) }

func (h *history) done(invoked int64, n *node, op, id string, addr netip.Addr) {
	if h == nil {
		return
	}
	h.ops = append(h.ops, porcupine.Operation{ClientId: int(n.name[5]), Input: registerInput{addr, id, op == "free"},
		Call: invoked, Return: max(h.stamp(), invoked+1)})
}

var register = porcupine.Model{
	Partition: func(ops []porcupine.Operation) [][]porcupine.Operation {
		by := make(map[netip.Addr][]porcupine.Operation)
		for _, op := range ops {
			a := op.Input.(registerInput).addr
			by[a] = append(by[a], op)
		}
		var out [][]porcupine.Operation
		for _, p := range by {
			out = append(out, p)
		}
		return out
	},
	Init: func() any { return "" },
	Step: func(state, input, _ any) (bool, any) {
		in, holder := input.(registerInput), state.(string)
		if in.free {
			return holder == in.id, ""
		}
		return holder == "" || holder == in.id, in.id
	},
}

// TestLinearizable checks runs in which nobody is removed with porcupine.
func TestLinearizable(t *testing.T) {
	seeds := 30
	if testing.Short() {
		seeds = 5
	}
	runSeeds(t, seeds, func(seed int64) *world {
		w := newWorld(seed, func(string, ...any) {})
		w.history = &history{w: w}
		w.rangep = netip.MustParsePrefix("10.32.0.0/26")
		w.subnets = []netip.Prefix{w.rangep, netip.MustParsePrefix("10.32.0.0/27")}
		w.loss = 0.1
		for range 6 {
			w.addNode(Init{Mode: Consensus, N: 6})
		}
		for op := 0; op < 1500 && w.err == nil; op++ {
			w.quietOperation()
		}
		w.heal()
		w.run(20 * time.Second)
		w.review()
		if r, _ := porcupine.CheckOperationsVerbose(register, w.history.ops, time.Minute); r != porcupine.Ok && w.err == nil {
			w.fail("porcupine: %v over %d operations", r, len(w.history.ops))
		}
		w.counts["operations checked"] += len(w.history.ops)
		return w
	})
}

// quietOperation allocates, claims, frees, kills, restarts, cuts and heals.
func (w *world) quietOperation() {
	n := w.pick(isUp)
	if d := w.pick(isDown); d != nil && (n == nil || w.rng.IntN(10) == 0) {
		d.start()
		return
	}
	switch x := w.rng.IntN(100); {
	case x < 35:
		w.nextCont++
		w.allocate(n, "c"+time.Duration(w.nextCont).String(), w.subnets[w.rng.IntN(len(w.subnets))])
	case x < 45:
		w.nextCont++
		if p := netip.PrefixFrom(n.core.ring.Addr(w.rng.Uint64N(64)), 26); checkClaim(p) == nil {
			w.claim(n, "c"+time.Duration(w.nextCont).String(), p)
		}
	case x < 80:
		if ct := n.anyContainer(); ct != nil {
			w.free(n, ct)
		}
	case x < 82:
		w.kill(n)
	case x < 83:
		for _, n := range w.nodes {
			n.group = w.rng.IntN(2)
		}
	case x < 85:
		w.heal()
	case x < 87:
		n.bad = !n.bad
	default:
		w.run(time.Duration(w.rng.IntN(1500)) * time.Millisecond)
	}
}
