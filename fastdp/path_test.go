package fastdp

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// wire carries a path's probes in simulated time.
type wire struct {
	p     *path
	now   time.Time
	used  bool
	rtt   time.Duration
	lost  func(probeSize) bool
	sent  int
	pend  []pending
	nonce uint64
}

type pending struct {
	at    time.Time
	nonce uint64
	size  probeSize
}

func newWire() *wire {
	now := time.Unix(1000, 0)
	return &wire{p: newPath(now, 1410), now: now, used: true, rtt: time.Millisecond, lost: func(probeSize) bool { return false }}
}

// until steps time until cond holds, at most for d, and says how long it took.
func (w *wire) until(d time.Duration, cond func() bool) (time.Duration, bool) {
	for start := w.now; w.now.Sub(start) <= d; w.now = w.now.Add(10 * time.Millisecond) {
		for len(w.pend) > 0 && !w.pend[0].at.After(w.now) {
			w.p.answer(w.now, w.pend[0].nonce, w.pend[0].size)
			w.pend = w.pend[1:]
		}
		for _, size := range w.p.tick(w.now, w.used) {
			w.nonce++
			w.sent++
			w.p.sent(w.now, w.nonce, size)
			if !w.lost(size) {
				w.pend = append(w.pend, pending{w.now.Add(w.rtt), w.nonce, size})
			}
		}
		if cond() {
			return w.now.Sub(start), true
		}
	}
	return d, false
}

func (w *wire) isUp() bool   { return w.p.state == up }
func (w *wire) isDown() bool { return w.p.state != up }
func never() bool            { return false }

func TestPathTakenAndLeft(t *testing.T) {
	for _, used := range []bool{true, false} {
		w := newWire()
		w.used = used
		if took, ok := w.until(time.Second, w.isUp); !ok || took > 500*time.Millisecond {
			t.Fatalf("taken after %v, %v", took, ok)
		}
		w.until(time.Minute, never)
		w.lost = func(probeSize) bool { return true }
		if !used { // it breaks, and only then somebody sends
			w.until(4*time.Second, never)
			w.used = true
		}
		took, ok := w.until(10*time.Second, w.isDown)
		if !ok || took > 1500*time.Millisecond {
			t.Errorf("used %v: left after %v, %v, want 1.5 s", used, took, ok)
		}
		w.until(10*time.Minute, never)
		if r := w.p.reason(6784); !strings.Contains(r, "6784") {
			t.Errorf("reason %q", r)
		}
		w.lost = func(probeSize) bool { return false }
		took, ok = w.until(time.Minute, w.isUp)
		if !ok || took > 30*time.Second {
			t.Errorf("used %v: taken again after %v, %v, want 30 s", used, took, ok)
		}
		t.Logf("taken again after %v", took)
	}
}

func TestPathSmallMTU(t *testing.T) {
	w := newWire()
	w.lost = func(s probeSize) bool { return s == full }
	if _, ok := w.until(time.Minute, w.isUp); ok {
		t.Fatal("taken though full-size probes do not pass")
	}
	if r := w.p.reason(6784); !strings.Contains(r, "MTU") {
		t.Errorf("reason %q, want the MTU", r)
	}
}

// A fifth of the datagrams lost each way must not make the path flap: less than once per hour.
func TestPathUnderLoss(t *testing.T) {
	const hours = 20
	rnd := rand.New(rand.NewPCG(1, 1)) // it is some 0.6 an hour, and at random more than one each now and then
	w := newWire()
	w.rtt = 200 * time.Millisecond
	w.lost = func(probeSize) bool { return rnd.Float64() < 0.36 }
	if took, ok := w.until(time.Minute, w.isUp); !ok {
		t.Fatalf("not taken within %v", took)
	}
	flaps, wasUp := 0, true
	w.until(hours*time.Hour, func() bool {
		if wasUp && !w.isUp() {
			flaps++
		}
		wasUp = w.isUp()
		return false
	})
	if flaps > hours {
		t.Errorf("%d flaps in %d hours", flaps, hours)
	}
	t.Logf("%d flaps in %d hours, %.1f probes/s", flaps, hours, float64(w.sent)/hours/3600)
}

// A meshd that gets no CPU for seconds at a time finds the answers when it does: no reason to leave.
func TestPathStarved(t *testing.T) {
	w := newWire()
	w.until(time.Second, w.isUp)
	for range 1000 {
		w.now = w.now.Add(3 * time.Second)
		for _, size := range w.p.tick(w.now, true) { // before what has arrived is read
			w.nonce++
			w.p.sent(w.now, w.nonce, size)
			w.pend = append(w.pend, pending{w.now.Add(w.rtt), w.nonce, size})
		}
		for len(w.pend) > 3 { // and some of it later still
			w.p.answer(w.now, w.pend[0].nonce, w.pend[0].size)
			w.pend = w.pend[1:]
		}
		if w.isDown() {
			t.Fatal("left")
		}
	}
}

func TestPathAdopted(t *testing.T) {
	w := newWire()
	w.p.adopt(w.now)
	if took, ok := w.until(time.Minute, w.isDown); ok {
		t.Fatalf("left after %v", took)
	}
	w = newWire()
	w.p.adopt(w.now)
	w.lost = func(probeSize) bool { return true }
	if took, ok := w.until(time.Minute, w.isDown); !ok || took > 3*time.Second {
		t.Errorf("a dead one was left after %v, %v", took, ok)
	}
}

func TestPathIdleProbes(t *testing.T) {
	w := newWire()
	w.used = false
	w.until(time.Second, w.isUp)
	w.sent = 0
	w.until(time.Minute, never)
	if w.sent > 13 {
		t.Errorf("%d probes in an idle minute, want 12", w.sent)
	}
}

func TestPathForeignAnswers(t *testing.T) {
	w := newWire()
	w.lost = func(probeSize) bool { return true }
	w.until(time.Second, never)
	for n := range uint64(1000) {
		if w.p.answer(w.now, 1e9+n, full) || w.isUp() {
			t.Fatal("an answer that nobody was asked for counts")
		}
	}
	// One probe counts once.
	nonce := w.p.flight[len(w.p.flight)-1].nonce
	for range 10 {
		w.p.answer(w.now, nonce, full)
	}
	if w.isUp() {
		t.Error("the same answer counts again")
	}
}

func TestProbeRoundTrip(t *testing.T) {
	for _, size := range []probeSize{small, full} {
		b := appendProbe(nil, 0x123, 0xfff, 42, size, 1410)
		if want := map[probeSize]int{small: 14 + 64, full: 14 + 1410}[size]; len(b) != want {
			t.Errorf("size %d: got %d bytes, want %d", size, len(b), want)
		}
		if _, _, _, ok := parseProbe(b, 1410); ok {
			t.Error("a request passes for an answer")
		}
		b[13] = 0xb6
		if from, nonce, s, ok := parseProbe(b, 1410); !ok || from != 0x123 || nonce != 42 || s != size {
			t.Errorf("got %x %d %d %v", from, nonce, s, ok)
		}
		if _, _, _, ok := parseProbe(b[:len(b)-1], 1410); ok && size == full {
			t.Error("a full-size answer that is not full counts")
		}
	}
}

func FuzzParseProbe(f *testing.F) {
	b := appendProbe(nil, 1, 2, 3, small, 1410)
	b[13] = 0xb6
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		from, nonce, size, ok := parseProbe(b, 1410)
		if !ok {
			return
		}
		again := appendProbe(nil, from, 1, nonce, size, 1410)
		again[13] = 0xb6
		if f2, n2, s2, ok := parseProbe(again, 1410); !ok || f2 != from || n2 != nonce || s2 != size {
			t.Errorf("got %d %d %d %v, want %d %d %d", f2, n2, s2, ok, from, nonce, size)
		}
	})
}
