package tunnel

import (
	"math/rand/v2"
	"testing"
	"time"
)

// pathSim answers probes as a path of a given size and loss would.
type pathSim struct {
	p    pmtu
	now  time.Time
	size int     // what passes
	loss float64 // of a probe and its answer together
	rng  *rand.Rand
	sent int
}

func newPathSim(assume, ceiling, size int, loss float64, seed uint64) *pathSim {
	s := &pathSim{now: time.Unix(1, 0), size: size, loss: loss, rng: rand.New(rand.NewPCG(seed, 0))}
	s.p.start(assume, ceiling, s.now)
	return s
}

func (s *pathSim) run(d time.Duration, busy bool, until func() bool) time.Duration {
	const step, delay = 50 * time.Millisecond, 10 * time.Millisecond
	start := s.now
	for s.now.Sub(start) < d && (until == nil || !until()) {
		for _, size := range s.p.tick(s.now, 100*time.Millisecond, busy, s.now) {
			s.sent++
			if size <= s.size && s.rng.Float64() >= s.loss {
				s.p.answered(size, s.now.Add(delay))
			}
		}
		s.now = s.now.Add(step)
	}
	return s.now.Sub(start)
}

func TestPMTUFullSizeAtOnce(t *testing.T) {
	s := newPathSim(minDatagram, 1472, 1472, 0, 1)
	s.run(60*time.Millisecond, false, nil)
	if s.p.mtu != 1472 || s.p.searching() {
		t.Errorf("after one round trip: mtu %d, searching %v", s.p.mtu, s.p.searching())
	}
	sent := s.sent
	s.run(time.Minute, false, nil)
	if n := s.sent - sent; n > 8 {
		t.Errorf("%d probes in an idle minute", n)
	}
}

func TestPMTUFinds(t *testing.T) {
	for _, size := range []int{minDatagram, 700, 972, 1252, 1280, 1399, 1400, 1471, 1472} {
		s := newPathSim(minDatagram, 1472, size, 0, 1)
		took := s.run(5*time.Second, false, func() bool { return !s.p.searching() })
		if s.p.mtu > size || s.p.mtu < size-searchStep {
			t.Errorf("path of %d: found %d", size, s.p.mtu)
		}
		if took > 2*time.Second {
			t.Errorf("path of %d: took %v", size, took)
		}
	}
}

// The path shrinks twice without a word and grows again (P11).
func TestPMTUShrinksAndGrows(t *testing.T) {
	s := newPathSim(minDatagram, 1472, 1472, 0, 1)
	s.run(3*time.Second, true, nil)
	for _, size := range []int{1252, 972} {
		s.size = size
		took := s.run(5*time.Second, true, func() bool { return s.p.mtu <= size })
		if s.p.mtu > size || took > 1600*time.Millisecond {
			t.Errorf("shrunk to %d: mtu %d after %v", size, s.p.mtu, took)
		}
		s.run(2*time.Second, true, nil)
		if s.p.mtu < size-searchStep {
			t.Errorf("shrunk to %d: settled at %d", size, s.p.mtu)
		}
	}
	s.size = 1472
	took := s.run(time.Minute, true, func() bool { return s.p.mtu == 1472 })
	if s.p.mtu != 1472 || took > searchUpEvery+time.Second {
		t.Errorf("grown to 1472: mtu %d after %v", s.p.mtu, took)
	}
}

// With 36 % of round trips lost (20 % each way) the size may be underestimated for a while, never for long.
func TestPMTULossy(t *testing.T) {
	low, total := 0, 0
	for seed := range uint64(20) {
		s := newPathSim(minDatagram, 1472, 1472, 0.36, seed)
		for range 1200 {
			s.run(50*time.Millisecond, true, nil)
			total++
			if s.p.mtu < 1400 {
				low++
			}
		}
	}
	t.Logf("below 1,400 for %.2f %% of the time", 100*float64(low)/float64(total))
	if low*10 > total {
		t.Errorf("below 1,400 in %d of %d samples", low, total)
	}
}

func TestPMTUSillyValues(t *testing.T) {
	now := time.Unix(1, 0)
	for _, v := range []int{-5, 0, 8, 68, 65535, 1 << 30} {
		var p pmtu
		p.start(v, v, now)
		p.tooBig(v, now)
		p.answered(v, now)
		p.setCeiling(v, now)
		for range 100 {
			now = now.Add(time.Second)
			for _, size := range p.tick(now, time.Second, true, now) {
				if size < minDatagram || size > maxDatagram {
					t.Errorf("value %d: probes %d", v, size)
				}
			}
		}
		if p.mtu < minDatagram || p.mtu > maxDatagram {
			t.Errorf("value %d: mtu %d", v, p.mtu)
		}
	}
}

func TestPMTUInterfaceShrinks(t *testing.T) {
	s := newPathSim(minDatagram, 1472, 1472, 0, 1)
	s.run(time.Second, false, nil)
	s.size = 1252
	s.p.tooBig(1472, s.now)
	s.p.setCeiling(1252, s.now)
	if s.p.mtu > 1252 {
		t.Errorf("mtu %d while the interface carries 1252", s.p.mtu)
	}
	s.run(time.Second, false, nil)
	if s.p.mtu != 1252 {
		t.Errorf("settled at %d", s.p.mtu)
	}
	s.size = 1472
	s.p.setCeiling(1472, s.now)
	s.run(time.Second, false, nil)
	if s.p.mtu != 1472 {
		t.Errorf("interface grew: mtu %d", s.p.mtu)
	}
}
