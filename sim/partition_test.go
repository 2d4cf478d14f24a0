package sim

import (
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var (
	cutFlag   = flag.Duration("cut", 0, "how long TestPartitions cuts; 0: drawn")
	hostsFlag = flag.Int("hosts", 0, "how many hosts TestPartitions has; 0: drawn")
)

// partition is one cut in half.
type partition struct {
	seed  uint64
	hosts int
	cut   time.Duration
}

// drawPartition draws small meshes more often than large ones, since the cost grows with more than the square, and
// the longest cut seldom and of small meshes: 24 h of a peer cost some seconds.
func drawPartition(seed uint64) partition {
	rng := rand.New(rand.NewPCG(seed, 3))
	p := partition{seed: seed}
	most := 64.0
	switch x := rng.IntN(100); {
	case x < 40:
		p.cut = 5 * time.Second
	case x < 75:
		p.cut = 45 * time.Second
	case x < 98:
		p.cut = 10 * time.Minute
	default:
		p.cut, most = 24*time.Hour, 6
	}
	u := rng.Float64()
	p.hosts = int(math.Round(2 * math.Pow(most/2, u*u*u)))
	if *cutFlag > 0 {
		p.cut = *cutFlag
	}
	if *hostsFlag > 0 {
		p.hosts = *hostsFlag
	}
	return p
}

// play cuts a mesh in two halves, both of which go on starting and ending containers, and returns how long
// after healing it took until it was whole: routes, tables, names, addresses, frames.
func (p partition) play(t *testing.T) (failed []string, healed time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, p.seed, p.hosts)
		w.few = w.random(2) == 0
		defer w.end()
		for i, h := range w.hosts {
			h.start(w.targets(i)...)
		}
		whole := func() error {
			if err := w.connected(); err != nil {
				return err
			}
			return w.truth()
		}
		churn := func(events int) {
			for range events {
				h := w.hosts[w.random(p.hosts)]
				if w.random(3) == 0 {
					h.detach(w.random(1000))
				} else {
					h.attach(w.random(len(subnets)))
				}
				time.Sleep(time.Duration(w.random(500)) * time.Millisecond)
			}
		}
		churn(20)
		time.Sleep(15 * time.Second)
		if _, ok := w.settle("the start", 30*time.Second, whole); ok {
			left := map[int]bool{}
			for len(left) < p.hosts/2 {
				left[w.random(p.hosts)] = true
			}
			for i, a := range w.hosts {
				for j, b := range w.hosts {
					if left[i] && !left[j] {
						w.cluster.Net.Cut(a.life.peer.Host, b.life.peer.Host)
					}
				}
			}
			end := time.Now().Add(p.cut)
			churn(int(min(p.cut/time.Second, 40)))
			if p.cut >= 10*time.Second {
				if late := time.Until(end); late > 12*time.Second {
					time.Sleep(late - 10*time.Second)
				}
				w.settle("apart", time.Until(end)+20*time.Second, w.connected)
			}
			time.Sleep(time.Until(end))
			w.cluster.Net.HealAll()
			healed, _ = w.settle("healing", 30*time.Second, whole)
			time.Sleep(11 * time.Second) // who waits for an address has one
			w.settle("after the end", 10*time.Second, whole)
			if n := w.cluster.Net.Stats().Loops; n > 0 {
				w.fail("%d messages went round", n)
			}
		}
		failed = w.failures()
	})
	return failed, healed
}

// TestPartitions cuts meshes of 2 to 64 hosts in halves for 5 s to 24 h: half a minute after healing they are
// whole, whatever the seed.
func TestPartitions(t *testing.T) {
	first, n := *firstFlag, 6
	switch {
	case *seedFlag != 0:
		first, n = *seedFlag, 1
	case *seedsFlag > 0:
		n = *seedsFlag
	case os.Getenv("MESHD_LONG") != "":
		n = 1000
	case testing.Short():
		n = 2
	}
	healed := map[time.Duration][]time.Duration{}
	for seed := first; seed < first+uint64(n); seed++ {
		p := drawPartition(seed)
		if n == 6 && p.cut > time.Hour {
			continue // more than the every-change run has time for
		}
		begun := realTime()
		failed, took := p.play(t)
		if len(failed) > 0 {
			t.Errorf("seed %d, %d hosts cut for %v:\n%s", seed, p.hosts, p.cut, strings.Join(failed, "\n"))
		}
		healed[p.cut] = append(healed[p.cut], took)
		if n > 6 || testing.Verbose() {
			fmt.Fprintf(os.Stderr, "seed %d: %d hosts cut for %v: whole after %v (%v of processor time)\n", seed, p.hosts, p.cut, took, (realTime() - begun).Round(time.Millisecond))
		}
	}
	for cut, all := range healed {
		slices.Sort(all)
		t.Logf("cut for %v: %d seeds, whole after %v, half of them after %v, the last after %v", cut, len(all), all[0], all[len(all)/2], all[len(all)-1])
	}
}
