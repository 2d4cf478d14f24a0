package main

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"meshd/dns/records"
	"meshd/mesh"
	"meshd/router/gossip"
	"meshd/router/gossip/simnet"
	"meshd/router/tunnel"
)

// That rows wait for their peers' keys does not slow down a join: the keys come first.
func TestNewcomerLearnsAll(t *testing.T) {
	const peers, endpoints = 12, 20
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var tables [peers + 1]*records.Table
		identity := func(i int) tunnel.Identity {
			seed := [32]byte{byte(i + 1)}
			id, err := tunnel.ParseIdentity(seed[:])
			if err != nil {
				t.Fatal(err)
			}
			return id
		}
		c := simnet.NewCluster(t, simnet.Options{
			Seed: 3,
			Config: func(i int, cfg *gossip.Config) {
				id := identity(i)
				cfg.Self.Name, cfg.Self.Key, cfg.Keys = id.Name(), id.Public, id
			},
			Prepare: func(i int, n *gossip.Node) {
				id := identity(i)
				table, err := records.Open(records.Config{
					Self: id.Name(), Run: mesh.RunID(i + 1), Keys: rowKeys{id, n.Topology()}, Domain: "mesh.internal.", Now: time.Now(),
				})
				if err != nil {
					t.Fatal(err)
				}
				tables[i] = table
				n.AddTable(mesh.ChanNames, table)
				wg.Go(func() {
					if err := table.Run(ctx, mesh.MaxMessage-1, func(d []byte) { n.Broadcast(mesh.ChanNames, d) }); err != nil {
						t.Error(err)
					}
				})
				for j := range endpoints {
					table.Announce(mesh.Endpoint{
						Owner: fmt.Sprintf("%064x", i*endpoints+j), MAC: mesh.MAC{2, 0, 0, 0, byte(i), byte(j)},
						Addrs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 32, byte(i), byte(j)}), 12)},
						Names: []string{fmt.Sprintf("c%d-%d.mesh.internal.", i, j)},
					})
				}
				table.Settle()
			},
		})
		defer c.Stop()
		defer wg.Wait()
		defer stop()
		all := func(n int) func() error {
			return func() error {
				for i, table := range tables[:n] {
					if got := len(table.Endpoints()); got != n*endpoints {
						return fmt.Errorf("peer %d has %d endpoints of %d", i, got, n*endpoints)
					}
				}
				return nil
			}
		}
		c.StartAll(peers)
		t.Log("all at once: everything everywhere after", c.Until("everything everywhere", 10*time.Second, all(peers)))
		time.Sleep(time.Minute)
		c.Start(peers, 0)
		t.Log("a newcomer: everything everywhere after", c.Until("newcomer", 3*time.Second, all(peers+1)))
		for _, p := range c.Peers {
			s := p.Node.Status()
			if len(s.Refusals) != 0 {
				t.Errorf("%v refused %+v", p.Name, s.Refusals)
			}
			if p.Number == peers {
				t.Logf("the newcomer left out %d rows at first", s.Counters["keyless_rows"])
			}
		}
	})
}
