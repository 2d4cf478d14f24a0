package integration

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"meshd/integration/lab"
)

// sample is what a meshd that is never killed occupies at one time.
type sample struct {
	rss, heap, held, stacks, runtime float64 // bytes; held: of the heap, in use or kept from the kernel
	goroutines, fds                  float64
}

func (w *world) sample(h *lab.Host) (s sample) {
	w.t.Helper()
	body, err := h.Get(w.ctx, "/metrics")
	w.try(err)
	var idle, released, sys float64
	for line := range strings.Lines(string(body)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if to := map[string]*float64{
			"process_resident_memory_bytes": &s.rss, "go_memstats_heap_inuse_bytes": &s.heap,
			"go_goroutines": &s.goroutines, "process_open_fds": &s.fds,
			"go_memstats_heap_idle_bytes": &idle, "go_memstats_heap_released_bytes": &released,
			"go_memstats_stack_inuse_bytes": &s.stacks, "go_memstats_sys_bytes": &sys,
		}[name]; to != nil {
			*to, err = strconv.ParseFloat(value, 64)
			w.try(err)
		}
	}
	s.held = s.heap + idle - released
	s.runtime = sys - s.heap - idle - s.stacks
	return s
}

// portFDs are the file descriptors that meshd holds for a container: one for each of the two programs at its port.
const portFDs = 2

// least is the least of each over some samples: what is in use for a moment does not count.
func least(all []sample) sample {
	out := all[0]
	for _, s := range all {
		out = sample{rss: min(out.rss, s.rss), heap: min(out.heap, s.heap), held: min(out.held, s.held), stacks: min(out.stacks, s.stacks),
			runtime: min(out.runtime, s.runtime), goroutines: min(out.goroutines, s.goroutines), fds: min(out.fds, s.fds)}
	}
	return out
}

// neverDropped are the reasons that peers of one version, killed and cut off as they may be, give nobody to count.
var neverDropped = []string{
	"tunnel_type", "tunnel_mac", "tunnel_forged", "tunnel_clear", "tunnel_body", "tunnel_counter", "tunnel_malformed", "tunnel_relay_hops",
	"switch_runt", "switch_source", "switch_forged_source", "switch_fdb_full", "gossip_malformed", "gossip_oversize", "gossip_unknown_channel",
}

// TestSoak is Z1: a mesh in which containers come and go, a meshd is killed every minute and the mesh is
// cut in half every five. What its peers occupy does not grow, and nothing is lost, doubled or left behind.
// MESHD_SOAK says how long, for example 8h.
func TestSoak(t *testing.T) {
	lasting := scaled(30*time.Second, 30*time.Minute)
	if s := os.Getenv("MESHD_SOAK"); s != "" {
		var err error
		if lasting, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	const hosts, lastingOnes = 6, 3 // hosts 1 to 3 are not killed: they are measured
	killEvery, cutEvery, cutFor := min(time.Minute, lasting/4), min(5*time.Minute, lasting/2), min(30*time.Second, lasting/6)
	w := newWorld(t, hosts, lasting+3*time.Minute)
	random := seeded(t)
	w.mesh()

	var fixed []*member // one container per host, for the traffic
	for i, h := range w.Hosts {
		fixed = append(fixed, w.netns(h, "fixed", fmt.Sprintf("10.2.1.%d/24", i+1)))
	}
	var flows []*watched // between hosts that are never killed
	for i := range lastingOnes {
		_, err := fixed[i].WaitPing(w.ctx, fixed[(i+1)%lastingOnes].addr, 10*time.Second)
		w.try(err)
		flows = append(flows, w.watch(fixed[i], fixed[(i+1)%lastingOnes], 20*time.Millisecond))
	}
	var churned []*lab.Container
	made := 0
	churn := func() {
		if len(churned) > 12 || len(churned) > 0 && random.IntN(2) == 0 {
			i := random.IntN(len(churned))
			c := churned[i]
			churned = slices.Delete(churned, i, i+1)
			if random.IntN(2) == 0 {
				_, err := c.Host.Ctl(w.ctx, "detach", c.Ref)
				w.try(err)
			}
			w.try(c.Remove(w.ctx))
			return
		}
		h := w.Hosts[random.IntN(hosts)]
		made++
		c, err := h.Netns(w.ctx, fmt.Sprintf("c%d", made))
		w.try(err)
		w.try(lab.Until(w.ctx, 60*time.Second, "attach on "+h.Name, func() bool {
			_, err := c.Attach(w.ctx)
			return err == nil
		}))
		churned = append(churned, c)
	}
	t.Cleanup(func() {
		for _, c := range churned {
			if err := c.Remove(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})

	start := time.Now()
	warm := lasting / 5 // what a peer of this mesh needs is allocated by then
	killAt, cutAt, healAt := start.Add(killEvery), start.Add(cutEvery), time.Time{}
	samples := make([][]sample, lastingOnes)
	kills, cuts := 0, 0
	for sampled := start; time.Since(start) < lasting; {
		now := time.Now()
		churn()
		switch {
		case !healAt.IsZero() && now.After(healAt):
			w.try(w.HealAll(w.ctx))
			healAt = time.Time{}
		case healAt.IsZero() && now.After(killAt):
			h := w.Hosts[lastingOnes+random.IntN(hosts-lastingOnes)]
			w.try(h.Kill(w.ctx, h.Meshd(), syscall.SIGKILL))
			w.try(lab.Until(w.ctx, 5*time.Second, "meshd to end", func() bool { return h.Meshd() == 0 }))
			w.launch(h, "--resume")
			killAt = now.Add(killEvery)
			kills++
		case healAt.IsZero() && now.After(cutAt) && lasting-time.Since(start) > 2*cutFor:
			// The hosts that are measured stay together, so that their flows have to lose nothing.
			w.try(w.Split(w.ctx, w.Hosts[:lastingOnes], w.Hosts[lastingOnes:]))
			cutAt, healAt = now.Add(cutEvery), now.Add(cutFor)
			cuts++
		}
		if now.Sub(sampled) >= lasting/60 {
			sampled = now
			for i := range samples {
				s := w.sample(w.Hosts[i])
				for _, c := range churned {
					if c.Host == w.Hosts[i] {
						s.fds -= portFDs
					}
				}
				samples[i] = append(samples[i], s)
			}
		}
		w.rest(time.Second)
	}
	w.try(w.HealAll(w.ctx))
	_, err := lab.WaitMesh(w.ctx, 60*time.Second, w.Hosts...)
	w.try(err)
	t.Logf("%v: %d containers made, %d kills, %d cuts", lasting, made, kills, cuts)

	for i, f := range flows {
		if r := w.end(f); r.Lost+r.Duplicated > 0 {
			t.Errorf("%s to %s: %v, want nothing lost", fixed[i].Host.Name, fixed[(i+1)%lastingOnes].Host.Name, r)
		}
	}
	all := slices.Clone(churned)
	for _, m := range fixed {
		all = append(all, m.Container)
	}
	if n := w.noDuplicates(all); n != len(all) {
		t.Errorf("%d addresses are left of %d", n, len(all))
	}
	for i := range lastingOnes {
		n := len(samples[i])
		first := int(float64(n) * float64(warm) / float64(lasting))
		span := max((n-first)/4, 1)
		early, late := least(samples[i][first:min(first+span, n)]), least(samples[i][n-span:])
		drift := 100 * (late.rss/early.rss - 1)
		t.Logf("%s: RSS %.1f to %.1f MB (%+.1f %%), heap in use %.1f to %.1f MB, goroutines %.0f to %.0f, fds %.0f to %.0f", w.Hosts[i].Name,
			early.rss/1e6, late.rss/1e6, drift, early.heap/1e6, late.heap/1e6, early.goroutines, late.goroutines, early.fds, late.fds)
		for some := range slices.Chunk(samples[i], n/4+1) {
			s := least(some)
			t.Logf("%s: in a quarter of the time at least: RSS %.1f MB, heap in use %.1f, heap held %.1f, stacks %.1f, rest of the runtime %.1f",
				w.Hosts[i].Name, s.rss/1e6, s.heap/1e6, s.held/1e6, s.stacks/1e6, s.runtime/1e6)
		}
		if drift >= 5 && lasting >= 10*time.Minute {
			t.Errorf("%s: RSS drifts by %.1f %%", w.Hosts[i].Name, drift)
		}
		if late.goroutines > early.goroutines+8 || late.fds > early.fds+4 {
			t.Errorf("%s: goroutines or fds grow", w.Hosts[i].Name)
		}
	}
	for _, h := range w.Hosts {
		r, err := h.Report(w.ctx)
		w.try(err)
		t.Logf("%s dropped %v", h.Name, nonzero(r.Router.Drops))
		for reason, n := range r.Router.Drops {
			if n > 0 && slices.Contains(neverDropped, reason) {
				t.Errorf("%s: %d times %s", h.Name, n, reason)
			}
		}
	}
}

func nonzero(counts map[string]uint64) map[string]uint64 {
	out := map[string]uint64{}
	for k, n := range counts {
		if n > 0 {
			out[k] = n
		}
	}
	return out
}
