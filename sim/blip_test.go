package sim

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"meshd/router/gossip/simnet"
)

// TestBlip is M6: one of 16 hosts is cut off from all others for 30 s. They go on answering for its names, which
// are marked, and so does the host for theirs; within 2 s of its return nothing is marked any more, and nobody
// ever took a name away.
func TestBlip(t *testing.T) {
	for seed := range uint64(3) {
		synctest.Test(t, func(t *testing.T) { blip(t, seed+1) })
	}
}

func blip(t *testing.T, seed uint64) {
	const hosts, away, limit = 16, 7, 2 * time.Second
	w := newWorld(t, seed, hosts)
	defer w.end()
	for i, h := range w.hosts {
		h.start(w.targets(i)...)
	}
	for _, h := range w.hosts {
		h.attach(0)
		h.attach(0)
	}
	time.Sleep(15 * time.Second)
	w.settle("the start", 10*time.Second, w.truth)
	var all, theirs []*simnet.Host
	for _, h := range w.hosts {
		if all = append(all, h.life.peer.Host); h.n != away {
			theirs = append(theirs, h.life.peer.Host)
		}
	}
	// marked reports who thinks what of whose names; all are there, always.
	marked := func() (who []string) {
		for _, h := range w.hosts {
			entries := h.life.names.Entries()
			if len(entries) != 2*hosts {
				w.fail("seed %d: host %d knows %d names of %d", seed, h.n, len(entries), 2*hosts)
			}
			for _, e := range entries {
				if got, err := h.life.names.Lookup(e.Name); err != nil || !slices.Equal(got, []netip.Addr{e.Addr}) {
					w.fail("seed %d: host %d says that %s is %v (%v)", seed, h.n, e.Name, got, err)
				}
				if e.Suspect {
					who = append(who, fmt.Sprintf("host %d marks %s of %v", h.n, e.Name, e.Origin))
				}
			}
		}
		return who
	}
	w.cluster.Net.Split([]*simnet.Host{all[away]}, theirs)
	for range 300 {
		time.Sleep(100 * time.Millisecond)
		marked()
	}
	// Each of the others marks two names, the one that is away marks all but its own two.
	if got, want := len(marked()), 2*2*(hosts-1); got != want {
		w.fail("seed %d: %d names are marked after 30 s, want %d", seed, got, want)
	}
	w.cluster.Net.HealAll()
	begun := time.Now()
	for left := marked(); len(left) > 0; left = marked() {
		if time.Since(begun) > limit {
			w.fail("seed %d: %v after its return: %v", seed, limit, left)
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Logf("seed %d: nothing is marked %v after the return", seed, time.Since(begun))
	for _, f := range w.failures() {
		t.Error(f)
	}
}
