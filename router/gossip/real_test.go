package gossip_test

import (
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"meshd/mesh"
	"meshd/router"
	"meshd/router/gossip"
	"meshd/router/gossip/simnet"
)

// The same outside a bubble, in real time, for the race detector; and nothing may be left running.
func TestRealTime(t *testing.T) {
	var told atomic.Int32
	tables := make([]*setTable, 5)
	c := simnet.NewCluster(t, simnet.Options{
		Seed: 1, RealTime: true,
		Config: func(i int, cfg *gossip.Config) {
			cfg.OnPeers = func([]router.PeerFlags) { told.Add(1) }
		},
		Prepare: func(i int, n *gossip.Node) {
			tables[i] = newSetTable()
			n.AddTable(mesh.ChanNames, tables[i])
			n.Subscribe(func(gossip.PeerEvent) { told.Add(1) })
		},
	})
	c.StartAll(5)
	t.Log("full mesh after", c.Until("full mesh", 10*time.Second, fullMesh(c)))
	if err := c.Peers[2].Node.Broadcast(mesh.ChanNames, tables[2].add("entry")); err != nil {
		t.Error(err)
	}
	c.Peers[3].Node.Update(func(p *router.Peer) { p.Flags |= router.FlagForeign })
	c.Until("news everywhere", 5*time.Second, func() error {
		for i, table := range tables {
			p, _ := c.Peers[i].Node.Topology().Peer(c.Peers[3].Name)
			if table.len() != 1 || p.Flags&router.FlagForeign == 0 {
				return errNotYet
			}
		}
		return nil
	})
	if age := time.Since(c.Peers[0].Node.LastStep()); age > 2*time.Second {
		t.Errorf("the loop last came round %v ago", age)
	}
	if told.Load() == 0 {
		t.Error("nobody was told of the peers")
	}
	c.Stop()
	deadline := time.Now().Add(20 * time.Second)
	for err := goleak.Find(); err != nil; err = goleak.Find() { // memberlist's probes end by and by
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}
