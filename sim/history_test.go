package sim

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"meshd/router/gossip/simnet"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "run only this seed")
	seedsFlag = flag.Int("seeds", 0, "how many seeds; 0: a few, and many with MESHD_LONG=1")
	firstFlag = flag.Uint64("first", 1, "the first of the seeds")
)

// history is what happens to a mesh. Its text form is one line.
type history struct {
	seed   uint64 // of the network's and the peers' own choices
	hosts  int
	few    bool // hosts have one target each, not all others
	events []event
}

// event is one thing that happens. What a, b and c mean depends on it.
type event struct {
	what    string
	a, b, c int
}

func (h history) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d %d %t", h.seed, h.hosts, h.few)
	for _, e := range h.events {
		fmt.Fprintf(&b, "; %s %d %d %d", e.what, e.a, e.b, e.c)
	}
	return b.String()
}

func parseHistory(line string) (h history, err error) {
	parts := strings.Split(line, ";")
	if _, err = fmt.Sscanf(parts[0], "%d %d %t", &h.seed, &h.hosts, &h.few); err != nil {
		return h, err
	}
	for _, p := range parts[1:] {
		var e event
		if _, err = fmt.Sscanf(p, "%s %d %d %d", &e.what, &e.a, &e.b, &e.c); err != nil {
			return h, fmt.Errorf("%q: %w", p, err)
		}
		if happen[e.what] == nil {
			return h, fmt.Errorf("there is no event %q", e.what)
		}
		h.events = append(h.events, e)
	}
	return h, nil
}

// happen is what each event does. Hosts are counted from 0, times are milliseconds, shares are percent.
var happen = map[string]func(w *world, e event){
	"wait":   func(w *world, e event) { time.Sleep(time.Duration(e.a) * time.Millisecond) },
	"attach": func(w *world, e event) { w.hosts[e.a].attach(e.b % len(subnets)) },
	"claim":  func(w *world, e event) { w.hosts[e.a].claim(e.b) },
	"detach": func(w *world, e event) { w.hosts[e.a].detach(e.b) },
	"kill":   func(w *world, e event) { w.hosts[e.a].kill() },
	"die": func(w *world, e event) { // at a write
		if l := w.hosts[e.a].life; l != nil {
			l.mount.light(1+e.b, e.c%2 == 0)
		}
	},
	"start":  func(w *world, e event) { w.hosts[e.a].start(w.targets(e.a)...) },
	"cut":    func(w *world, e event) { w.pair(e, w.cluster.Net.Cut) },
	"oneway": func(w *world, e event) { w.pair(e, w.cluster.Net.CutOneWay) },
	"heal":   func(w *world, e event) { w.pair(e, w.cluster.Net.Heal) },
	"split": func(w *world, e event) { // a: the parts; b: who is in which, in that many digits
		part := func(i int) int {
			x := e.b
			for range i {
				x /= e.a
			}
			return x % e.a
		}
		for i := range w.hosts {
			for j := range i {
				if part(i) != part(j) {
					w.pair(event{"", i, j, 0}, w.cluster.Net.Cut)
				}
			}
		}
	},
	"healall": func(w *world, e event) { w.cluster.Net.HealAll() },
	"loss":    func(w *world, e event) { w.cluster.Net.SetLoss(float64(e.a) / 100) },
	"double":  func(w *world, e event) { w.cluster.Net.SetDuplicates(float64(e.a) / 100) },
	"reorder": func(w *world, e event) { w.cluster.Net.SetReordering(float64(e.a) / 100) },
	"delay": func(w *world, e event) {
		w.cluster.Net.SetDelay(time.Duration(e.a)*time.Millisecond, time.Duration(e.b)*time.Millisecond)
	},
	"starve": func(w *world, e event) {
		if l := w.hosts[e.a].life; l != nil {
			l.peer.Host.Starve(time.Duration(e.b) * time.Millisecond)
		}
	},
	"full":  func(w *world, e event) { w.hosts[e.a].disk.fill(e.b%2 == 0) },
	"check": func(w *world, e event) { w.check() },
}

// pair does something to two hosts that have been up.
func (w *world) pair(e event, do func(a, b *simnet.Host)) {
	if p := w.cluster.Peers; e.a != e.b && p[e.a] != nil && p[e.b] != nil {
		do(p[e.a].Host, p[e.b].Host)
	}
}

// targets are whom a host dials.
func (w *world) targets(i int) (out []int) {
	n := len(w.hosts)
	for d := 1; d < n; d++ {
		if out = append(out, (i+d)%n); w.few {
			break
		}
	}
	return out
}

// check demands in the middle of everything that what can work does: faults that last are a mesh like
// any other after a while, unless datagrams are lost, late or starved, or somebody has not heard of the others.
func (w *world) check() {
	if !w.few {
		w.settle("in between", 45*time.Second, w.connected)
	}
}

// draw makes a history.
func draw(seed uint64) history {
	rng := rand.New(rand.NewPCG(seed, 1))
	h := history{seed: seed, hosts: 2 + rng.IntN(6), few: rng.IntN(3) == 0}
	weights := []struct {
		what   string
		weight int
		draw   func(e *event)
	}{
		{"wait", 30, func(e *event) { e.a = []int{1, 30, 300, 2000, 5000, 20_000, 90_000}[rng.IntN(7)] }},
		{"attach", 25, func(e *event) { e.b = rng.IntN(8) % len(subnets) }},
		{"claim", 4, func(e *event) { e.b = rng.IntN(4096) }},
		{"detach", 12, func(e *event) { e.b = rng.IntN(1000) }},
		{"kill", 5, nil},
		{"die", 5, func(e *event) { e.b, e.c = rng.IntN(4), rng.IntN(2) }},
		{"start", 9, nil},
		{"cut", 4, nil},
		{"oneway", 3, nil},
		{"heal", 3, nil},
		{"split", 3, func(e *event) { e.a, e.b = 2+rng.IntN(2), rng.IntN(2187) }},
		{"healall", 4, nil},
		{"loss", 2, func(e *event) { e.a = rng.IntN(3) * 15 }},
		{"double", 2, func(e *event) { e.a = rng.IntN(3) * 20 }},
		{"reorder", 2, func(e *event) { e.a = rng.IntN(3) * 10 }},
		{"delay", 1, func(e *event) { e.a, e.b = 1+rng.IntN(100), rng.IntN(30) }},
		{"starve", 2, func(e *event) { e.b = rng.IntN(3) * 700 }},
		{"full", 2, func(e *event) { e.b = rng.IntN(2) }},
		{"check", 3, nil},
	}
	total := 0
	for _, k := range weights {
		total += k.weight
	}
	for range 10 + rng.IntN(50) {
		x := rng.IntN(total)
		for _, k := range weights {
			if x -= k.weight; x < 0 {
				e := event{k.what, rng.IntN(h.hosts), rng.IntN(h.hosts), 0}
				if k.draw != nil {
					k.draw(&e)
				}
				h.events = append(h.events, e)
				break
			}
		}
	}
	return h
}

// run plays a history in a bubble and returns what the oracle found.
func run(t *testing.T, h history) (failed []string, counts map[string]int, healed time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, h.seed, h.hosts)
		w.few = h.few
		defer w.end()
		for i, host := range w.hosts {
			host.start(w.targets(i)...)
		}
		for _, e := range h.events {
			happen[e.what](w, e)
			if len(w.failures()) > 0 {
				break
			}
		}
		if len(w.failures()) == 0 {
			healed = w.finish()
		}
		failed, counts = w.failures(), w.counts
	})
	return failed, counts, healed
}

func (w *world) failures() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.failed)
}

// shorten leaves out events for as long as the history still fails.
func shorten(t *testing.T, h history) history {
	fails := func(h history) bool {
		failed, _, _ := run(t, h)
		return len(failed) > 0
	}
	tries := 60
	for size := max(len(h.events)/2, 1); tries > 0; {
		shorter := false
		for at := 0; at < len(h.events) && tries > 0; tries-- {
			less := h
			less.events = slices.Delete(slices.Clone(h.events), at, min(at+size, len(h.events)))
			if fails(less) {
				h, shorter = less, true
			} else {
				at += size
			}
		}
		if size == 1 && !shorter {
			break
		}
		size = max(size/2, 1)
	}
	return h
}

// TestHistories plays histories drawn from seeds.
func TestHistories(t *testing.T) {
	first, n := *firstFlag, 12
	switch {
	case *seedFlag != 0:
		first, n = *seedFlag, 1
	case *seedsFlag > 0:
		n = *seedsFlag
	case os.Getenv("MESHD_LONG") != "":
		n = 2000
	case testing.Short():
		n = 3
	}
	total := map[string]int{}
	var healed []time.Duration
	for seed := first; seed < first+uint64(n) && !t.Failed(); seed++ {
		h := draw(seed)
		failed, counts, took := run(t, h)
		healed = append(healed, took)
		for k, v := range counts {
			total[k] += v
		}
		if len(failed) > 0 {
			t.Errorf("seed %d (go test ./sim -run TestHistories -seed %d):\n%s\nfrom %v", seed, seed, strings.Join(failed, "\n"), h)
			t.Logf("as short as it gets: %v", shorten(t, h))
		}
	}
	slices.Sort(healed)
	t.Logf("%d histories; healed in %v to %v, half in %v; %v", len(healed), healed[0], healed[len(healed)-1], healed[len(healed)/2], total)
}

// TestKept plays the histories that once failed.
func TestKept(t *testing.T) {
	files, err := filepath.Glob("testdata/histories/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
				continue
			}
			h, err := parseHistory(line)
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			if h.String() != line {
				t.Errorf("%s: got %v, want %s", file, h, line)
			}
			if failed, _, _ := run(t, h); len(failed) > 0 {
				t.Errorf("%s: %v:\n%s", file, h, strings.Join(failed, "\n"))
			}
		}
	}
}
