package gossip_test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"meshd/mesh"
	"meshd/router/gossip"
	"meshd/router/gossip/simnet"
)

// TestScale measures a large mesh: go test -run TestScale -peers 100 -v. What it reports is what gossip
// sends, without the tunnel's headers and heartbeats. Routes are computed less often the more peers there are: a real peer
// takes a sixth of its own core for that at most, here one core computes those of all.
func TestScale(t *testing.T) {
	n := *peersFlag
	if n == 0 {
		t.Skip("needs -peers")
	}
	synctest.Test(t, func(t *testing.T) {
		tables, base := map[int]*setTable{}, newSetTable()
		own := func(t *setTable, i int) {
			for k := range 20 {
				t.add(fmt.Sprintf("%d endpoint %d with a name and an address or two", i, k))
			}
		}
		if *convergedFlag {
			for i := range n {
				own(base, i)
			}
		}
		c := simnet.NewCluster(t, simnet.Options{
			Seed: max(*seedFlag, 1),
			Config: func(i int, cfg *gossip.Config) {
				cfg.ConnLimit, cfg.RoutesPause = *linksFlag, time.Duration(n)*time.Millisecond
				cfg.Self.ShortID = mesh.ShortID(i + 1)
			},
			Prepare: func(i int, node *gossip.Node) {
				if tables[i] = above(base); !*convergedFlag {
					own(tables[i], i)
				}
				node.AddTable(mesh.ChanNames, tables[i])
			},
		})
		defer c.Stop()
		c.Net.SetSlot(time.Millisecond / 2)
		mark, kinds := meter(c), kindMeter(t, c)
		if *convergedFlag {
			preload(t, c, n, *linksFlag)
		} else {
			c.StartAll(n)
		}
		whole := func() error {
			for i := range tables {
				if got := tables[i].len(); got < 20*n {
					return fmt.Errorf("peer %d has %d names of %d", i, got, 20*n)
				}
			}
			return simnet.Whole(c.Peers)
		}
		until := func(what string, limit time.Duration, ok func() error) time.Duration {
			begun, told := time.Now(), time.Now()
			return c.Until(what, limit, func() error {
				err := ok()
				if err != nil && time.Since(told) >= time.Second {
					told = time.Now()
					t.Logf("after %v: %v; %+v, %d s of processor time", time.Since(begun), err, c.Net.Stats(), processTime()/time.Second)
				}
				return err
			})
		}
		took := until("cold start", 10*time.Minute, whole)
		t.Logf("%d peers, cold start: %v; %s", n, took, mark())
		kinds()
		if *coldFlag {
			return
		}
		halves := func() {
			c.Net.Split(c.Hosts(0, n/2), c.Hosts(n/2, n))
			time.Sleep(45 * time.Second)
			t.Logf("half/half cut for 45 s: %s, %+v", mark(), c.Net.Stats())
			kinds()
			c.Net.HealAll()
			t.Logf("whole after: %v; %s", until("heal", 5*time.Minute, whole), mark())
			t.Logf("%+v", c.Net.Stats())
			kinds()
		}
		if *cutOnlyFlag {
			halves()
			return
		}
		for range *restFlag / (30 * time.Second) { // memberlist goes on telling who has joined
			time.Sleep(30 * time.Second)
			t.Logf("afterwards: %s", mark())
			kinds()
		}
		time.Sleep(30 * time.Second)
		t.Logf("idle: %s", mark())
		kinds()
		links := 0
		for _, p := range c.Peers {
			links += p.Host.Links()
		}
		t.Logf("links per peer: %d", links/n)
		if err := c.Peers[n/2].Node.Broadcast(mesh.ChanNames, tables[n/2].add("one more")); err != nil {
			t.Fatal(err)
		}
		took = c.Until("one change", 30*time.Second, func() error {
			for i := range tables {
				if tables[i].len() != 20*n+1 {
					return fmt.Errorf("peer %d", i)
				}
			}
			return nil
		})
		t.Logf("one change: %v; %s", took, mark())
		c.Kill(n - 1)
		took = c.Until("death", 30*time.Second, func() error {
			for _, p := range c.Peers[:n-1] {
				if _, ok := p.Node.Routes().NextHop(c.Peers[n-1].Name); ok {
					return fmt.Errorf("%v", p.Name)
				}
			}
			return nil
		})
		t.Logf("one death known: %v; %s", took, mark())
		c.Start(n-1, 0)
		t.Logf("restart: %v; %s", c.Until("restart", 5*time.Minute, whole), mark())
		time.Sleep(20 * time.Second)
		halves()
	})
}

// preload builds a mesh that has been whole for a while: every peer has its links, and knows all peers and links. What
// memberlist knows it is told as soon as it runs.
func preload(t *testing.T, c *simnet.Cluster, n, links int) {
	for i := range n {
		c.Build(i)
	}
	rng, now := rand.New(rand.NewPCG(max(*seedFlag, 1), 6)), time.Now()
	for _, step := range rng.Perm(n/2 - 1)[:links/2] {
		for i := range n {
			c.Net.Join(c.Peers[i].Host, c.Peers[(i+step+1)%n].Host)
		}
	}
	var all [][]byte
	for _, p := range c.Peers {
		all = append(all, p.Node.Preload(now)...)
	}
	for _, p := range c.Peers {
		for _, delta := range all {
			if _, err := p.Node.Topology().Merge(p.Name, delta); err != nil {
				t.Fatal(err)
			}
		}
		p.Node.Routes().Store(p.Node.Topology().Routes())
	}
	for _, p := range c.Peers {
		c.Run(p)
	}
}

// meter returns a function that says what was spent since it was last called, per peer.
func meter(c *simnet.Cluster) func() string {
	var sent uint64
	cpu, at := processTime(), time.Now()
	return func() string {
		var total, most uint64
		for _, p := range c.Peers {
			if p != nil {
				s, _ := p.Host.Traffic()
				total += s
				most = max(most, s)
			}
		}
		used, took := processTime()-cpu, time.Since(at)
		peers := max(len(c.Peers), 1)
		var mem runtime.MemStats
		runtime.ReadMemStats(&mem)
		out := fmt.Sprintf("%.2f kB/s sent per peer, %.2f%% of a core per peer, %d kB of heap per peer, in %v",
			float64(total-sent)/1000/float64(peers)/took.Seconds(), 100*used.Seconds()/took.Seconds()/float64(peers),
			mem.HeapAlloc/1000/uint64(peers), took.Round(time.Second))
		sent, cpu, at = total, processTime(), time.Now()
		return out
	}
}

// kindMeter returns a function that logs what was sent of each kind since it was last called, per peer.
func kindMeter(t *testing.T, c *simnet.Cluster) func() {
	last, at := map[[2]byte]simnet.Count{}, time.Now()
	return func() {
		now := c.Net.Kinds()
		took, n := time.Since(at).Seconds(), float64(len(c.Peers))
		for _, kind := range slices.SortedFunc(maps.Keys(now), func(a, b [2]byte) int { return bytes.Compare(a[:], b[:]) }) {
			messages, sent := float64(now[kind].Messages-last[kind].Messages), float64(now[kind].Bytes-last[kind].Bytes)
			if sent > 0.01*took*n {
				t.Logf("  channel %d kind %3d: %.2f messages and %.0f bytes a second", kind[0], kind[1], messages/took/n, sent/took/n)
			}
		}
		last, at = now, time.Now()
	}
}

// processTime is the processor time that the whole process has used. In a bubble the clock is not real;
// this one is.
func processTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
