package gossip_test

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"meshd/mesh"
	"meshd/router/gossip/simnet"
)

// churnP99 is how long it took until everybody knew of a join or leave, 99 of 100 times, when this was last
// written down, by the size of the mesh. Simulated time does not depend on the machine.
var churnP99 = []struct {
	peers int
	long  bool // only with MESHD_LONG=1
	p99   time.Duration
}{
	{peers: 2, p99: 130 * time.Millisecond},
	{peers: 5, p99: 485 * time.Millisecond},
	{peers: 10, p99: 930 * time.Millisecond},
	{peers: 25, long: true, p99: 1570 * time.Millisecond},
	{peers: 64, long: true, p99: 2600 * time.Millisecond},
}

// TestChurn is M7: 1,000 times in a minute one of the peers, drawn anew each time, leaves with a goodbye or, if it is
// away, joins by somebody who is there. Half of them are there at any time, more or less. What is measured is how long
// it takes from each event until all that were there all the while know of it, or of a later one of the same peer.
// The mesh must not have become slower by a fifth.
func TestChurn(t *testing.T) {
	for _, size := range churnP99 {
		if size.long && os.Getenv("MESHD_LONG") == "" {
			continue
		}
		t.Run(fmt.Sprint(size.peers, " peers"), func(t *testing.T) {
			var took, each []time.Duration
			for seed := range uint64(cmp.Or(*seedsFlag, 3)) {
				synctest.Test(t, func(t *testing.T) {
					one := churn(t, seed+1, size.peers)
					took = append(took, one...)
					slices.Sort(one)
					each = append(each, one[len(one)*99/100])
				})
			}
			slices.Sort(each)
			t.Logf("99 of 100 of each of %d seeds: half of them %v, the slowest %v", len(each), each[len(each)/2], each[len(each)-1])
			slices.Sort(took)
			p99 := took[len(took)*99/100]
			t.Logf("%d events known everywhere after %v, 90 of 100 %v, 99 %v, the last %v",
				len(took), took[len(took)/2], took[len(took)*9/10], p99, took[len(took)-1])
			if limit := size.p99 * 12 / 10; p99 > limit {
				t.Errorf("99 of 100 events are known after %v, limit %v", p99, limit)
			}
		})
	}
}

// change is one join or leave.
type change struct {
	peer  mesh.PeerName
	run   mesh.RunID
	left  bool
	at    time.Time
	await []*simnet.Peer // who has not heard
}

func churn(t *testing.T, seed uint64, n int) (took []time.Duration) {
	const events, lasting = 1000, time.Minute
	rng := rand.New(rand.NewPCG(seed, 8))
	c := simnet.NewCluster(t, simnet.Options{Seed: seed})
	defer c.Stop()
	c.StartAll(n)
	c.Until("full mesh", 10*time.Second, fullMesh(c))
	time.Sleep(10 * time.Second)
	away := map[int]bool{}
	there := func(but int) (out []int) {
		for i := range n {
			if !away[i] && i != but {
				out = append(out, i)
			}
		}
		return out
	}
	var pending []*change
	look := func() {
		pending = slices.DeleteFunc(pending, func(e *change) bool {
			e.await = slices.DeleteFunc(e.await, func(p *simnet.Peer) bool {
				return c.Peers[p.Number] != p || away[p.Number] || knows(p, e)
			})
			if len(e.await) == 0 {
				took = append(took, time.Since(e.at))
			}
			return len(e.await) == 0
		})
	}
	for range events {
		i := rng.IntN(n)
		others := there(i)
		for len(others) == 0 { // somebody stays
			i = rng.IntN(n)
			others = there(i)
		}
		e := &change{peer: c.Peers[i].Name, left: !away[i], at: time.Now()}
		if e.left {
			c.Leave(i)
			away[i] = true
		} else {
			var targets []int
			for range 3 {
				targets = append(targets, others[rng.IntN(len(others))])
			}
			c.Start(i, targets...)
			delete(away, i)
		}
		e.run = c.Peers[i].Node.Topology().Self().Run
		for _, o := range others {
			e.await = append(e.await, c.Peers[o])
		}
		pending = append(pending, e)
		for end := e.at.Add(lasting / events); time.Now().Before(end); {
			time.Sleep(5 * time.Millisecond)
			look()
		}
	}
	for i := range away {
		c.Start(i, there(i)[0])
	}
	c.Until("all that there is to know", 10*time.Second, func() error {
		if look(); len(pending) > 0 {
			return fmt.Errorf("%d events are not known everywhere", len(pending))
		}
		return nil
	})
	c.Until("full mesh", 30*time.Second, fullMesh(c))
	return took
}

// knows reports whether a peer has heard of a change, or of a later one.
func knows(p *simnet.Peer, e *change) bool {
	known, ok := p.Node.Topology().Peer(e.peer)
	_, reached := p.Node.Routes().NextHop(e.peer)
	switch {
	case ok && known.Run > e.run:
		return true
	case e.left:
		return !reached
	}
	return ok && known.Run == e.run && reached
}
