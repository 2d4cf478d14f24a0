package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"meshd/integration/lab"
)

// TestRollingUpgrade is U1: host after host goes from one release to another, all the way back, and up again, while
// numbered datagrams cross the kernel path. MESHD_OLD_BIN is the directory of the other release's meshd and meshctl; without it
// that is the build under test as well, and just the restarts are tried.
func TestRollingUpgrade(t *testing.T) {
	old, hosts, interval := os.Getenv("MESHD_OLD_BIN"), 8, 800*time.Microsecond
	rounds := []string{binaries, old, binaries}
	if old == "" {
		old, hosts, rounds = binaries, 3, rounds[:1]
	}
	w := newWorld(t, hosts, 4*time.Minute)
	start := func(h *lab.Host, bin string, args ...string) {
		w.planReset(h)
		r, err := h.Run(w.ctx, append([]string{filepath.Join(bin, "meshctl"), "launch"}, args...)...)
		w.try(err)
		if r.Exit != 0 {
			t.Fatalf("%s: %s", h.Name, r)
		}
	}
	for i, h := range w.Hosts {
		if i == 0 {
			start(h, old)
		} else {
			start(h, old, w.Host(1).Addr.String())
		}
	}
	_, err := lab.WaitMesh(w.ctx, 15*time.Second, w.Hosts...)
	w.try(err)
	var members []*member
	var containers []*lab.Container
	for i, h := range w.Hosts {
		m := w.netns(h, fmt.Sprintf("c%d", i+1), fmt.Sprintf("10.2.1.%d/24", i+1))
		members, containers = append(members, m), append(containers, m.Container)
	}
	for i, h := range w.Hosts {
		w.waitOverlay(h, w.Hosts[(i+1)%hosts], "kernel", 30*time.Second)
		_, err := members[i].WaitPing(w.ctx, members[(i+1)%hosts].addr, 10*time.Second)
		w.try(err)
	}
	w.rest(2 * time.Second) // flows are established
	var flows []*watched
	for i := range hosts {
		flows = append(flows, w.watch(members[i], members[(i+1)%hosts], interval))
	}
	current := old
	for round, next := range rounds {
		for i, h := range w.Hosts {
			r, err := h.Run(w.ctx, filepath.Join(current, "meshctl"), "stop")
			w.try(err)
			if r.Exit != 0 {
				t.Fatalf("%s: %s", h.Name, r)
			}
			start(h, next, "--resume")
			took, err := lab.WaitMesh(w.ctx, 15*time.Second, w.Hosts...)
			w.try(err)
			w.waitOverlay(h, w.Hosts[(i+1)%hosts], "kernel", 30*time.Second)
			if i == hosts/2 {
				t.Logf("round %d, %s: full mesh after %v", round, h.Name, took)
				// Half and half: an address from the shared range, and its name, on either side.
				for k, h := range []*lab.Host{w.Hosts[0], w.Hosts[hosts-1]} {
					c, err := h.Netns(w.ctx, fmt.Sprintf("r%d%d", round, k))
					w.try(err)
					t.Cleanup(func() {
						if err := c.Remove(context.WithoutCancel(w.ctx)); err != nil {
							t.Error(err)
						}
					})
					_, err = c.Attach(w.ctx)
					w.try(err)
					containers = append(containers, c)
				}
			}
		}
		current = next
		versions := map[string]int{}
		for _, h := range w.Hosts {
			r, err := h.Report(w.ctx)
			w.try(err)
			versions[r.Version]++
		}
		t.Logf("round %d: versions %v", round, versions)
	}
	if n := w.noDuplicates(containers); n != len(containers) {
		t.Errorf("%d containers have %d addresses", len(containers), n)
	}
	for i, p := range flows {
		r := w.end(p)
		t.Logf("c%d to c%d: %v", i+1, (i+1)%hosts+1, r)
		if r.Lost > 0 || r.Duplicated > 0 {
			t.Errorf("c%d to c%d: %d lost, %d duplicated", i+1, (i+1)%hosts+1, r.Lost, r.Duplicated)
		}
	}
}
