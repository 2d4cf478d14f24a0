package gossip_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"meshd/mesh"
	"meshd/router/gossip"
	"meshd/router/gossip/simnet"
)

// Random histories of cuts, deaths, restarts, loss and changes of a table. Whatever happened, a while
// after the last fault the mesh must be whole: all routes direct, all tables and memberships equal,
// nobody's change lost, no message going round. rapid shrinks what fails; -rapid.seed repeats it.
func TestHistories(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	rapid.Check(t, func(rt *rapid.T) {
		synctest.Test(t, func(t *testing.T) { history(t, rt) })
	})
}

func history(t *testing.T, rt *rapid.T) {
	n := rapid.IntRange(2, 8).Draw(rt, "peers")
	tables := map[*gossip.Node]*setTable{}
	c := simnet.NewCluster(t, simnet.Options{
		Seed: rapid.Uint64Range(1, 1<<31).Draw(rt, "seed"),
		Prepare: func(_ int, node *gossip.Node) {
			tables[node] = newSetTable()
			node.AddTable(mesh.ChanNames, tables[node])
		},
	})
	defer c.Stop()
	c.StartAll(n)
	pick := func(what string) *simnet.Peer { return c.Peers[rapid.IntRange(0, n-1).Draw(rt, what)] }
	wait := func() {
		time.Sleep(time.Duration(rapid.SampledFrom([]int{0, 10, 300, 2000, 4000, 20_000, 90_000}).Draw(rt, "ms")) * time.Millisecond)
	}
	dead := map[int]bool{}
	entries := 0
	for range rapid.IntRange(0, 15).Draw(rt, "events") {
		wait()
		switch rapid.SampledFrom([]string{"cut", "one way", "heal", "split", "kill", "restart", "change", "loss", "fine"}).Draw(rt, "event") {
		case "cut":
			if a, b := pick("a"), pick("b"); a != b {
				c.Net.Cut(a.Host, b.Host)
			}
		case "one way":
			if a, b := pick("from"), pick("to"); a != b {
				c.Net.CutOneWay(a.Host, b.Host)
			}
		case "heal":
			c.Net.Heal(pick("a").Host, pick("b").Host)
		case "split":
			k := rapid.IntRange(0, n).Draw(rt, "left")
			c.Net.Split(c.Hosts(0, k), c.Hosts(k, n))
		case "kill":
			if p := pick("victim"); !dead[p.Number] {
				c.Kill(p.Number)
				dead[p.Number] = true
			}
		case "restart":
			if p := pick("again"); n > 1 {
				c.Start(p.Number, (p.Number+1)%n)
				delete(dead, p.Number)
			}
		case "change":
			if p := pick("author"); !dead[p.Number] {
				entries++
				if err := p.Node.Broadcast(mesh.ChanNames, tables[p.Node].add(fmt.Sprint("entry ", entries))); err != nil {
					t.Error(err)
				}
			}
		case "loss":
			c.Net.SetLoss(rapid.Float64Range(0, 0.3).Draw(rt, "share"))
		case "fine":
			c.Net.SetLoss(0)
		}
	}
	c.Net.HealAll()
	c.Net.SetLoss(0)
	for i := range n {
		if dead[i] {
			c.Start(i, (i+1)%n)
		}
	}
	end := time.Now()
	var err error
	for time.Since(end) < 30*time.Second {
		if err = simnet.FullMesh(c.Peers); err == nil {
			err = equalTables(c, tables)
		}
		if err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		rt.Errorf("30 s after the last fault: %v", err)
		return
	}
	before := c.Net.Stats().Loops
	time.Sleep(2 * time.Minute) // damping has ended, and nothing moves any more
	if err := simnet.FullMesh(c.Peers); err != nil {
		rt.Errorf("later: %v", err)
	}
	if after := c.Net.Stats().Loops; after != before {
		rt.Errorf("%d messages went round in a mesh that is whole", after-before)
	}
	for _, p := range c.Peers {
		if why := p.Node.Status().Conflict; why != "" {
			rt.Errorf("%v gives way to nobody: %s", p.Name, why)
		}
	}
}

func equalTables(c *simnet.Cluster, tables map[*gossip.Node]*setTable) error {
	want := tables[c.Peers[0].Node].len()
	for _, p := range c.Peers {
		if got := tables[p.Node].len(); got != want {
			return fmt.Errorf("%v has %d entries, another %d", p.Name, got, want)
		}
	}
	return nil
}
