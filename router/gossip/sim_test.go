package gossip_test

import (
	"flag"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"meshd/mesh"
	"meshd/router"
	"meshd/router/gossip"
	"meshd/router/gossip/simnet"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "seed of the simulations; 0: a few fixed ones")
	seedsFlag = flag.Int("seeds", 0, "how many seeds the simulations run with; 0: a few")
	cutFlag   = flag.Duration("cut", 3*time.Hour, "how long TestForgottenHalves keeps the halves apart")
	linksFlag = flag.Int("links", 200, "the limit on links of a peer in TestScale")
	peersFlag = flag.Int("peers", 0, "run TestScale with so many peers")
	restFlag  = flag.Duration("rest", 30*time.Second, "how long TestScale waits before it looks at idle peers")

	coldFlag      = flag.Bool("cold", false, "TestScale ends when the cold start is over")
	cutOnlyFlag   = flag.Bool("halves", false, "TestScale does nothing but cut the mesh in half")
	convergedFlag = flag.Bool("converged", false, "TestScale begins with a mesh in which everybody knows everything")
)

// seeds runs a simulation in a bubble of its own for every seed.
func seeds(t *testing.T, n int, run func(t *testing.T, seed uint64)) {
	if *seedFlag != 0 {
		synctest.Test(t, func(t *testing.T) { run(t, *seedFlag) })
		return
	}
	if *seedsFlag > 0 {
		n = *seedsFlag
	} else if testing.Short() {
		n = 1
	}
	for seed := range n {
		t.Run(fmt.Sprint("seed=", seed+1), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { run(t, uint64(seed+1)) })
		})
	}
}

func fullMesh(c *simnet.Cluster) func() error {
	return func() error { return simnet.FullMesh(c.Peers) }
}

func TestJoin(t *testing.T) {
	seeds(t, 3, func(t *testing.T, seed uint64) {
		c := simnet.NewCluster(t, simnet.Options{Seed: seed})
		defer c.Stop()
		c.StartAll(10)
		t.Log("10 peers from one target to full mesh:", c.Until("full mesh", 5*time.Second, fullMesh(c)))
	})
}

// A cluster is cut in half, lives on in halves, and must be whole again within 30 s.
func TestPartition(t *testing.T) {
	seeds(t, 3, func(t *testing.T, seed uint64) {
		const n = 25
		c := simnet.NewCluster(t, simnet.Options{Seed: seed})
		defer c.Stop()
		c.StartAll(n)
		t.Log("join:", c.Until("full mesh", 10*time.Second, fullMesh(c)))
		time.Sleep(30 * time.Second)
		for _, cut := range []time.Duration{5 * time.Second, 45 * time.Second, 10 * time.Minute} {
			half := n / 2
			c.Net.Split(c.Hosts(0, half), c.Hosts(half, n))
			time.Sleep(cut)
			if cut > 10*time.Second {
				for _, group := range [][]*simnet.Peer{c.Peers[:half], c.Peers[half:]} {
					if err := separate(group); err != nil {
						t.Errorf("cut for %v: %v", cut, err)
					}
				}
			}
			c.Net.HealAll()
			t.Logf("cut for %v: whole after %v", cut, c.Until(fmt.Sprint("whole after ", cut), 30*time.Second, func() error { return simnet.Whole(c.Peers) }))
			c.Until("full mesh", 30*time.Second, fullMesh(c))
			time.Sleep(20 * time.Second)
		}
		t.Logf("%+v", c.Net.Stats())
	})
}

// The halves are apart for longer than peers are remembered: nobody knows the other half any more, but for
// the addresses where it was.
func TestForgottenHalves(t *testing.T) {
	seeds(t, 1, func(t *testing.T, seed uint64) {
		c := simnet.NewCluster(t, simnet.Options{Seed: seed})
		defer c.Stop()
		c.StartAll(6)
		c.Until("full mesh", 10*time.Second, fullMesh(c))
		c.Net.Split(c.Hosts(0, 3), c.Hosts(3, 6))
		time.Sleep(*cutFlag)
		for _, p := range c.Peers {
			if got := len(p.Node.Topology().Peers()); *cutFlag > time.Hour && got != 3 {
				t.Errorf("%v knows %d peers, want 3", p.Name, got)
			}
		}
		c.Net.HealAll()
		t.Logf("cut for %v: whole after %v", *cutFlag, c.Until("whole", 30*time.Second, func() error { return simnet.Whole(c.Peers) }))
	})
}

// separate checks that a group reaches itself and nobody else.
func separate(group []*simnet.Peer) error {
	for _, p := range group {
		if got := len(p.Node.Routes().Load().Reachable()); got != len(group)-1 {
			return fmt.Errorf("%v reaches %d peers of its half of %d", p.Name, got, len(group))
		}
	}
	return nil
}

// Three in a row: the ends never reach each other directly.
func TestRow(t *testing.T) {
	seeds(t, 2, func(t *testing.T, seed uint64) {
		c := simnet.NewCluster(t, simnet.Options{
			Seed: seed, Config: func(_ int, cfg *gossip.Config) { cfg.NoDiscovery = true },
		})
		defer c.Stop()
		c.Start(0)
		c.Start(1, 0)
		c.Start(2, 1)
		c.Until("whole", 5*time.Second, func() error { return simnet.Whole(c.Peers) })
		r, _ := c.Peers[0].Node.Routes().Load().Route(c.Peers[2].Name)
		if r.Via != c.Peers[1].Name || r.Hops != 2 || r.Why != "no direct link" {
			t.Errorf("got %+v", r)
		}
		time.Sleep(5 * time.Minute)
		if err := simnet.Whole(c.Peers); err != nil {
			t.Error(err)
		}
	})
}

// Datagrams are lost one way between two of three: each finds the relay within 5 s and gives it up within
// 5 s of the path's return.
func TestOneWayLoss(t *testing.T) {
	seeds(t, 3, func(t *testing.T, seed uint64) {
		c := simnet.NewCluster(t, simnet.Options{Seed: seed})
		defer c.Stop()
		c.StartAll(3)
		c.Until("full mesh", 5*time.Second, fullMesh(c))
		time.Sleep(time.Minute)
		for range 3 {
			c.Net.CutOneWay(c.Peers[1].Host, c.Peers[2].Host)
			found := c.Until("relay", 5*time.Second, func() error {
				for _, ends := range [2][2]int{{1, 2}, {2, 1}} {
					if r, ok := c.Peers[ends[0]].Node.Routes().Load().Route(c.Peers[ends[1]].Name); !ok || r.Hops != 2 {
						return fmt.Errorf("%d to %d: %+v", ends[0], ends[1], r)
					}
				}
				return nil
			})
			time.Sleep(time.Minute)
			c.Net.HealAll()
			t.Log("relay found after", found, "given up after", c.Until("direct again", 5*time.Second, fullMesh(c)))
			time.Sleep(2 * time.Minute)
		}
	})
}

// A link that comes and goes must not take the routes along each time.
func TestFlappingLink(t *testing.T) {
	for _, period := range []time.Duration{time.Second, 5 * time.Second, 20 * time.Second, 15 * time.Minute} {
		t.Run(period.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := simnet.NewCluster(t, simnet.Options{Seed: 5})
				defer c.Stop()
				c.StartAll(4)
				c.Until("full mesh", 5*time.Second, fullMesh(c))
				time.Sleep(time.Minute)
				a, b := c.Peers[1], c.Peers[2]
				changes, flaps := 0, 0
				last, _ := a.Node.Routes().NextHop(b.Name)
				cycles := 20
				if period > time.Minute {
					cycles = 5
				}
				for range cycles {
					for _, cut := range []bool{true, false} {
						if cut {
							c.Net.Cut(a.Host, b.Host)
						} else {
							c.Net.HealAll()
						}
						flaps++
						for end := time.Now().Add(period / 2); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
							via, ok := a.Node.Routes().NextHop(b.Name)
							if ok && via != last {
								changes++
								last = via
							}
						}
					}
				}
				t.Logf("%d route changes for %d cuts and heals", changes, flaps)
				if changes > flaps {
					t.Errorf("%d route changes for %d cuts and heals", changes, flaps)
				}
				if period == 20*time.Second && changes > cycles/2+2 {
					t.Errorf("%d route changes in %d periods: damping does not work", changes, cycles)
				}
				c.Net.HealAll()
				c.Until("direct again", 2*time.Minute, fullMesh(c))
				if s := c.Net.Stats(); s.Loops != 0 {
					t.Errorf("%d messages went round in circles", s.Loops)
				}
			})
		})
	}
}

// kill -9: routes through the dead peer end within its links' 3 s and a little, the others lose nothing,
// and a restart is taken in at once.
func TestKillAndRestart(t *testing.T) {
	seeds(t, 3, func(t *testing.T, seed uint64) {
		c := simnet.NewCluster(t, simnet.Options{Seed: seed})
		defer c.Stop()
		c.StartAll(8)
		c.Until("full mesh", 10*time.Second, fullMesh(c))
		time.Sleep(time.Minute)
		victim := c.Peers[3].Name
		var events []string
		c.Peers[0].Node.Subscribe(func(ev gossip.PeerEvent) { events = append(events, fmt.Sprint(ev.Peer == victim, ev.State)) })
		c.Kill(3)
		others := append(append([]*simnet.Peer{}, c.Peers[:3]...), c.Peers[4:]...)
		t.Log("routes withdrawn after", c.Until("withdrawn", 4*time.Second, func() error {
			for _, p := range others {
				if via, ok := p.Node.Routes().NextHop(victim); ok {
					return fmt.Errorf("%v still by %v", p.Name, via)
				}
			}
			return nil
		}))
		time.Sleep(30 * time.Second)
		for _, p := range others {
			if got := p.Node.Status().Members; got != 7 {
				t.Errorf("%v: %d members, want 7", p.Name, got)
			}
		}
		c.Start(3, 0)
		t.Log("full mesh again after", c.Until("full mesh", 5*time.Second, fullMesh(c)))
		// The same in a hurry: nobody has noticed the death yet, but all hear of the new run at once.
		time.Sleep(10 * time.Second)
		c.Start(3, 0)
		t.Log("after a quick restart:", c.Until("full mesh", 2*time.Second, fullMesh(c))) // a dead link takes 3 s to be found
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if got := fmt.Sprint(events); got != "[true suspect true alive]" {
			t.Errorf("got events %s", got)
		}
	})
}

// Peers that are gone for good are forgotten by all and stay forgotten.
func TestGone(t *testing.T) {
	seeds(t, 1, func(t *testing.T, seed uint64) {
		c := simnet.NewCluster(t, simnet.Options{
			Seed: seed, Config: func(_ int, cfg *gossip.Config) { cfg.Gone = 10 * time.Minute },
		})
		defer c.Stop()
		c.StartAll(6)
		c.Until("full mesh", 10*time.Second, fullMesh(c))
		gone := 0
		c.Peers[0].Node.Subscribe(func(ev gossip.PeerEvent) {
			if ev.State == router.Gone {
				gone++
			}
		})
		c.Kill(5)
		time.Sleep(9 * time.Minute)
		c.Start(4, 0) // learns of the dead one late, if at all
		time.Sleep(30 * time.Minute)
		synctest.Wait()
		for _, p := range c.Peers[:5] {
			if got := len(p.Node.Topology().Peers()); got != 5 {
				t.Errorf("%v knows %d peers, want 5", p.Name, got)
			}
		}
		if gone != 1 {
			t.Errorf("told %d times that somebody is gone", gone)
		}
	})
}

// Loss of one datagram in five and a long way: nobody is suspected.
func TestLossyNet(t *testing.T) {
	seeds(t, 2, func(t *testing.T, seed uint64) {
		c := simnet.NewCluster(t, simnet.Options{Seed: seed})
		defer c.Stop()
		c.Net.SetLoss(0.2)
		c.Net.SetDelay(100*time.Millisecond, 30*time.Millisecond)
		c.StartAll(8)
		t.Log("full mesh after", c.Until("full mesh", 30*time.Second, fullMesh(c)))
		for _, p := range c.Peers {
			p.Node.Subscribe(func(ev gossip.PeerEvent) {
				if ev.State != router.Alive {
					t.Errorf("%v thinks %v %v", p.Name, ev.Peer, ev.State)
				}
			})
		}
		time.Sleep(30 * time.Minute)
		// At any one moment memberlist may doubt somebody who has not had the time to object.
		c.Until("full mesh in the end", 10*time.Second, fullMesh(c))
	})
}

// A cloned disk: two live peers with one name and key. The one that came later keeps to itself.
func TestClone(t *testing.T) {
	seeds(t, 3, func(t *testing.T, seed uint64) {
		clone := func(i int, cfg *gossip.Config) {
			if i == 4 {
				cfg.Self.Name, cfg.Self.Key = simnet.NameOf(1), simnet.KeyOf(1)
			}
		}
		c := simnet.NewCluster(t, simnet.Options{Seed: seed, Config: clone})
		defer c.Stop()
		c.StartAll(4)
		c.Until("full mesh", 5*time.Second, fullMesh(c))
		time.Sleep(time.Minute)
		c.Start(4, 2)
		c.Until("conflict noticed", 20*time.Second, func() error {
			if c.Peers[4].Node.Status().Conflict == "" {
				return fmt.Errorf("not by the clone")
			}
			return nil
		})
		// The struggle made links fall, so some are damped for up to a minute.
		c.Until("the others are a full mesh again", 90*time.Second, func() error { return simnet.FullMesh(c.Peers[:4]) })
		if got := c.Peers[1].Node.Status().Conflict; got != "" {
			t.Errorf("the first one gives way: %s", got)
		}
	})
}

// A different peer takes the name of a live one: refused, and shown why.
func TestStolenName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := simnet.NewCluster(t, simnet.Options{Seed: 1, Config: func(i int, cfg *gossip.Config) {
			if i == 3 {
				cfg.Self.Name = simnet.NameOf(1)
			}
		}})
		defer c.Stop()
		c.StartAll(3)
		c.Until("full mesh", 5*time.Second, fullMesh(c))
		thief := c.Start(3, 2)
		time.Sleep(time.Minute)
		if n := thief.Host.Links(); n != 0 {
			t.Errorf("the thief has %d links", n)
		}
		for _, conn := range thief.Node.Status().Connections {
			if !strings.Contains(conn.Error, "belongs to") {
				t.Errorf("the thief is told %q", conn.Error)
			}
		}
		if err := simnet.FullMesh(c.Peers[:3]); err != nil {
			t.Error(err)
		}
		// The rightful owner dies and is forgotten by the links: now the name may be taken over.
		c.Kill(1)
		c.Until("taken over", 30*time.Second, func() error {
			if thief.Host.Links() != 2 {
				return fmt.Errorf("%d links", thief.Host.Links())
			}
			return nil
		})
	})
}

// A peer of the release before, which does not sign what it tells, is refused whoever dials, and the operator is
// told what to do. A later release is taken in: it judges by itself whether it speaks with us.
func TestOtherProtocols(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := simnet.NewCluster(t, simnet.Options{Seed: 1, Config: func(i int, cfg *gossip.Config) {
			switch i {
			case 1:
				cfg.Self.Protocol = router.Protocol - 1
			case 2:
				cfg.Self.Protocol = router.Protocol + 1
			}
		}})
		defer c.Stop()
		c.Start(0, 1)
		c.Start(1, 2)
		c.Start(2, 0)
		time.Sleep(time.Minute)
		for who, want := range map[int]string{0: "peer1 speaks protocol 1", 1: "peer2 demands 2", 2: ""} {
			p := c.Peers[who]
			told := ""
			for _, conn := range p.Node.Status().Connections {
				told += conn.Error
			}
			if !strings.Contains(told, want) || want != "" && !strings.Contains(told, "install the newer release") {
				t.Errorf("peer %d is told %q, want %q and what to do", who, told, want)
			}
		}
		if n := c.Peers[1].Host.Links(); n != 0 {
			t.Errorf("the old one has %d links", n)
		}
		if n := c.Peers[0].Host.Links(); n != 1 {
			t.Errorf("the other two have %d links", n)
		}
	})
}

// A target that nobody answers at for ten minutes, and then somebody does.
func TestLateTarget(t *testing.T) {
	seeds(t, 2, func(t *testing.T, seed uint64) {
		c := simnet.NewCluster(t, simnet.Options{Seed: seed})
		defer c.Stop()
		c.StartAll(4)
		c.Start(4, 2)
		c.Start(5, 4)
		c.Net.Split(c.Hosts(0, 4), c.Hosts(4, 6))
		time.Sleep(10 * time.Minute)
		if err := separate(c.Peers[4:]); err != nil {
			t.Error(err)
		}
		c.Net.HealAll()
		t.Log("joined after", c.Until("joined", 30*time.Second, fullMesh(c)))
	})
}

// A peer whose targets are all out of reach comes back by the peers that its earlier run had met.
func TestRememberedPeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var remembered []netip.AddrPort
		c := simnet.NewCluster(t, simnet.Options{Seed: 1, Config: func(_ int, cfg *gossip.Config) { cfg.Remembered = remembered }})
		defer c.Stop()
		c.StartAll(5)
		c.Until("full mesh", 10*time.Second, fullMesh(c))
		remembered = c.Peers[4].Node.Met()
		if len(remembered) != 4 {
			t.Fatalf("met peers at %v", remembered)
		}
		c.Kill(0)
		c.Start(4, 0)
		c.Until("joined by another", 10*time.Second, func() error { return separate(c.Peers[1:]) })
		if got := c.Peers[4].Node.Met(); len(got) != 4 {
			t.Errorf("the dead peer's address is forgotten: %v", got)
		}
	})
}

func TestConnLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := simnet.NewCluster(t, simnet.Options{Seed: 1, Config: func(_ int, cfg *gossip.Config) { cfg.ConnLimit = 6 }})
		defer c.Stop()
		c.StartAll(30)
		time.Sleep(time.Minute)
		if err := simnet.Whole(c.Peers); err != nil {
			t.Error(err)
		}
		for i, p := range c.Peers[1:] { // peer 0 is everybody's target; the limit is soft, as several may dial one at a time
			if n := p.Host.Links(); n > 12 {
				t.Errorf("peer %d has %d links", i+1, n)
			}
		}
		if s := c.Net.Stats(); s.Loops != 0 {
			t.Errorf("%d messages went round in circles", s.Loops)
		}
	})
}

// A mesh with fewer links than peers is quiet when nothing happens. Once a doubt about a neighbour of the receiver cost the
// probe in the same packet, who did not answer was doubted in turn, and that never ended: 100 peers sent 14 to
// 52 kB/s each.
func TestQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 100
		c := simnet.NewCluster(t, simnet.Options{Seed: 1, Config: func(_ int, cfg *gossip.Config) { cfg.ConnLimit = 20 }})
		defer c.Stop()
		c.StartAll(n)
		c.Until("whole", 30*time.Second, func() error { return simnet.Whole(c.Peers) })
		c.Kill(n - 1) // something to doubt
		time.Sleep(time.Minute)
		sent := func() (sum uint64) {
			for _, p := range c.Peers[:n-1] {
				bytes, _ := p.Host.Traffic()
				sum += bytes
			}
			return sum
		}
		before := sent()
		time.Sleep(30 * time.Second)
		each := (sent() - before) / 30 / (n - 1)
		t.Logf("%d bytes a second and peer", each)
		if each > 500 {
			t.Errorf("an idle peer sends %d bytes a second, limit 500", each)
		}
	})
}

func TestTargetsAndStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := simnet.NewCluster(t, simnet.Options{Seed: 1})
		defer c.Stop()
		c.StartAll(2)
		c.Until("full mesh", 5*time.Second, fullMesh(c))
		n := c.Peers[1].Node
		if err := n.Connect([]string{"bad host"}, false); err == nil {
			t.Error("a target that is no name is taken")
		}
		own := c.Peers[1].Host.Addr().String()
		if err := n.Connect([]string{own, "192.0.9.9"}, false); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second)
		states := map[string]string{}
		for _, conn := range n.Status().Connections {
			states[conn.Address] = conn.State + " " + conn.Error
		}
		for addr, want := range map[string]string{
			c.Peers[0].Host.Addr().String(): "established ",
			own:                             "failed this address is this peer itself",
		} {
			if states[addr] != want {
				t.Errorf("%s: got %q, want %q", addr, states[addr], want)
			}
		}
		if s := states["192.0.9.9:6783"]; s != "failed no answer" && s != "retrying no answer" {
			t.Errorf("a target where nobody is: got %q", s)
		}
		if got := fmt.Sprint(n.Targets()); got != "[192.0.0.0 "+own+" 192.0.9.9]" {
			t.Errorf("got targets %s", got)
		}
		n.Forget([]string{own, "192.0.9.9", "192.0.0.0"})
		if got := n.Targets(); len(got) != 0 {
			t.Errorf("got targets %v after all were forgotten", got)
		}
		if err := simnet.FullMesh(c.Peers); err != nil {
			t.Errorf("forgetting targets took links: %v", err)
		}
	})
}

// The rooms' tables ride along: an entry put in at one peer is everywhere soon, deltas of any number.
func TestTables(t *testing.T) {
	seeds(t, 2, func(t *testing.T, seed uint64) {
		tables := map[int]*setTable{}
		c := simnet.NewCluster(t, simnet.Options{Seed: seed, Prepare: func(i int, n *gossip.Node) {
			tables[i] = newSetTable()
			n.AddTable(mesh.ChanNames, tables[i])
		}})
		defer c.Stop()
		c.StartAll(20)
		c.Until("full mesh", 10*time.Second, fullMesh(c))
		same := func(want int) func() error {
			return func() error {
				for i, p := range tables {
					if got := p.len(); got != want {
						return fmt.Errorf("peer %d has %d entries of %d", i, got, want)
					}
				}
				return nil
			}
		}
		add := func(i int, entry string) {
			if err := c.Peers[i].Node.Broadcast(mesh.ChanNames, tables[i].add(entry)); err != nil {
				t.Fatal(err)
			}
		}
		add(3, "one")
		t.Log("one change everywhere after", c.Until("one", 2*time.Second, same(1)))
		for k := range 1000 {
			add(k%20, fmt.Sprint("entry ", k))
		}
		t.Log("a thousand changes everywhere after", c.Until("many", 5*time.Second, same(1001)))
		// Never broadcast: only digests can find it.
		for k := range 500 {
			tables[7].add(fmt.Sprint("silent ", k))
		}
		t.Log("500 silent changes everywhere after", c.Until("silent", 15*time.Second, same(1501)))
		c.Net.Split(c.Hosts(0, 10), c.Hosts(10, 20))
		time.Sleep(45 * time.Second)
		for k := range 200 {
			add(k%20, fmt.Sprint("apart ", k))
		}
		time.Sleep(5 * time.Second)
		c.Net.HealAll()
		t.Log("after healing", c.Until("healed", 30*time.Second, same(1701)))
		late := c.Start(20, 5)
		t.Log("a newcomer has everything after", c.Until("newcomer", 5*time.Second, same(1701)))
		_ = late
	})
}
