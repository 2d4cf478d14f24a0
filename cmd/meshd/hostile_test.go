package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"meshd/dns/records"
	"meshd/mesh"
	"meshd/router"
	"meshd/router/gossip"
	"meshd/router/gossip/simnet"
	"meshd/router/tunnel"
)

// member is one peer of the test: a gossip node with its real key and its real table of endpoints and names.
type member struct {
	*simnet.Peer
	id    tunnel.Identity
	names *records.Table
	sw    *router.Switch // told of endpoints as meshd tells its own
}

const (
	observer = iota // reaches the victim by the relay alone
	relay
	victim
	mallory // has a link to the observer
)

// A member that turned says of another, over and over, that it is somewhere else, has other endpoints, has left, is
// dead; signed with its own key, or not at all. Nobody believes it, nobody passes it on, and all it told say who it was.
func TestHostileMember(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var members [4]*member
		for i := range members {
			seed := [32]byte{byte(i + 1)}
			id, err := tunnel.ParseIdentity(seed[:])
			if err != nil {
				t.Fatal(err)
			}
			members[i] = &member{id: id}
		}
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		c := simnet.NewCluster(t, simnet.Options{
			Seed: 1,
			Config: func(i int, cfg *gossip.Config) {
				id := members[i].id
				cfg.Self.Name, cfg.Self.Key, cfg.Keys, cfg.NoDiscovery = id.Name(), id.Public, id, true
			},
			Prepare: func(i int, n *gossip.Node) {
				m := members[i]
				var err error
				m.names, err = records.Open(records.Config{
					Self: m.id.Name(), Run: mesh.RunID(i + 1), Keys: rowKeys{m.id, n.Topology()}, Domain: "mesh.internal.", Now: time.Now(),
				})
				if err != nil {
					t.Fatal(err)
				}
				m.sw = router.NewSwitch(m.id.Name(), time.Now())
				m.names.OnChange(func(changes []records.Change) {
					for _, c := range changes {
						if c.Up {
							m.sw.UpdateEndpoints([]mesh.Endpoint{c.Endpoint}, nil)
						} else {
							m.sw.UpdateEndpoints(nil, []mesh.Endpoint{c.Endpoint})
						}
					}
				})
				n.AddTable(mesh.ChanNames, m.names)
				wg.Go(func() {
					err := m.names.Run(ctx, mesh.MaxMessage-1, func(d []byte) { n.Broadcast(mesh.ChanNames, d) })
					if err != nil {
						t.Error(err)
					}
				})
			},
		})
		defer c.Stop()
		defer wg.Wait()
		defer stop()
		for i, targets := range [][]int{observer: nil, relay: {observer}, victim: {relay}, mallory: {observer}} {
			members[i].Peer = c.Start(i, targets...)
		}
		who := members[victim].id.Name()
		honest := members[:mallory]
		ep := mesh.Endpoint{
			Peer: who, Owner: "c1", MAC: mesh.MAC{2, 1}, Addrs: []netip.Prefix{netip.MustParsePrefix("10.32.0.1/12")}, Names: []string{"web.mesh.internal."},
		}
		members[victim].names.Announce(ep)
		if err := members[victim].names.AddName("", "hand.mesh.internal", []netip.Addr{netip.MustParseAddr("192.0.2.1")}); err != nil {
			t.Fatal(err)
		}
		intact := func() error {
			for _, m := range honest {
				if _, ok := m.Node.Routes().NextHop(who); !ok && m.id.Name() != who {
					return fmt.Errorf("%v has no route to the victim", m.Name)
				}
				if p, _ := m.Node.Topology().Peer(who); p.Key != members[victim].id.Public || p.NickName != "peer2" || p.Incarnation != 1 {
					return fmt.Errorf("%v holds for the victim %+v", m.Name, p)
				}
				if got := m.names.Endpoints(); len(got) != 1 || fmt.Sprint(got[0]) != fmt.Sprint(ep) {
					return fmt.Errorf("%v has the endpoints %+v", m.Name, got)
				}
				for name, want := range map[string]string{"web": "[10.32.0.1]", "hand": "[192.0.2.1]"} {
					if got, err := m.names.Lookup(name); err != nil || fmt.Sprint(got) != want {
						return fmt.Errorf("%v: %s is %v, %v, want %s", m.Name, name, got, err, want)
					}
				}
			}
			return nil
		}
		c.Until("a mesh of four", 10*time.Second, func() error {
			for _, m := range members {
				if got := len(m.Node.Routes().Load().Reachable()); got != 3 {
					return fmt.Errorf("%v has %d routes", m.Name, got)
				}
			}
			return intact()
		})
		for _, m := range honest {
			m.Node.Subscribe(func(ev gossip.PeerEvent) { t.Errorf("%v: the victim or another is %v: %v", m.Name, ev.State, ev.Peer) })
			if got := m.Node.Status().Refusals; len(got) != 0 {
				t.Errorf("%v refused rows of honest peers: %+v", m.Name, got)
			}
		}

		evil := members[mallory]
		lies := func(round int) {
			for _, key := range [][32]byte{members[victim].id.Public, evil.id.Public} {
				topology := router.NewTopology(router.Peer{
					Name: who, Run: mesh.RunID(round + 100), Key: key, NickName: "elsewhere", Port: 1, Protocol: router.Protocol,
				}, evil.id)
				for _, d := range slices.Concat(
					topology.Update(func(p *router.Peer) { p.Flags = router.FlagForeign }),
					topology.SetLinks([]router.PeerLink{{To: evil.Name, Addr: netip.MustParseAddrPort("192.0.2.66:6783"), MTU: 1400}})) {
					evil.Node.Broadcast(mesh.ChanTopology, slices.Clone(d))
					for off := 0; off < len(d); off += 25 + 64 + int(binary.BigEndian.Uint16(d[off:])) {
						copy(d[off+9:], "\xff\xff\xff\xff") // the last of all incarnations
					}
					evil.Node.Broadcast(mesh.ChanTopology, d)
				}
			}
			names, err := records.Open(records.Config{ // the victim's table, as mallory would have it
				Self: who, Run: mesh.RunID(round + 100), Keys: rowKeys{evil.id, evil.Node.Topology()}, Domain: "mesh.internal.", Now: time.Now(),
			})
			if err != nil {
				t.Fatal(err)
			}
			false1 := ep
			false1.Addrs = []netip.Prefix{netip.MustParsePrefix("10.32.6.6/12")}
			names.Announce(false1)
			names.Withdraw(ep.Owner, ep.MAC)
			names.Settle()
			for _, d := range names.Drain(mesh.MaxMessage - 1) {
				evil.Node.Broadcast(mesh.ChanNames, d)
			}
			for _, m := range honest {
				for _, inc := range []uint32{uint32(round), 1<<30 - 1, 1<<31 - 1} {
					evil.Host.Send(m.Name, append([]byte{byte(mesh.ChanMember)}, deathOf(who, inc, evil.Name)...))
				}
			}
		}
		rng := rand.New(rand.NewPCG(1, 1))
		// Well-formed deltas and memberlist packets with something changed, and noise, on every channel, up to messages
		// far larger than any; from the tunnel, which has no limit of its own for what a member has sealed.
		noise := func() {
			genuine := evil.names.Encode(keysOf(evil.names.Items()), mesh.MaxMessage-1)
			genuine = append(genuine, evil.Node.Topology().Encode(keysOf(evil.Node.Topology().Items()), mesh.MaxMessage-1)...)
			for _, m := range honest {
				for ch := range byte(12) {
					b := make([]byte, []int{0, 1, 2, 100, mesh.MaxMessage - 1, mesh.MaxMessage, 65_000}[rng.IntN(7)])
					for i := range b {
						b[i] = byte(rng.Uint32())
					}
					if rng.IntN(2) == 0 && len(genuine) > 0 {
						b = slices.Clone(genuine[rng.IntN(len(genuine))])
						b[rng.IntN(len(b))] ^= 1 << rng.IntN(8)
						if rng.IntN(2) == 0 {
							b = b[:rng.IntN(len(b)+1)]
						}
					}
					m.Node.Message(evil.Name, append([]byte{ch}, b...))
				}
			}
		}
		for round := range 240 {
			lies(round)
			noise()
			time.Sleep(500 * time.Millisecond)
			if err := intact(); err != nil {
				t.Fatalf("after %d rounds of lies: %v", round+1, err)
			}
		}
		for _, m := range honest {
			s := m.Node.Status()
			if len(s.Refusals) != 1 || s.Refusals[0].From != evil.Name || s.Refusals[0].Forged == 0 || s.Refusals[0].Foreign == 0 {
				t.Errorf("%v names %+v, want mallory alone", m.Name, s.Refusals)
			}
			t.Logf("%v refused %d forged and %d foreign rows", m.Name, s.Counters["forged_rows"], s.Counters["foreign_rows"])
			if s.Members != 4 {
				t.Errorf("%v has %d members, want 4", m.Name, s.Members)
			}
			if s.Counters["malformed"] < 100 {
				t.Errorf("%v has counted %d messages as malformed", m.Name, s.Counters["malformed"])
			}
		}

		// What it says of itself is believed: it has the victim's MAC, address and name too. The name then has both
		// addresses; the frames go to whom had them first, and the clash is named.
		mine := ep
		mine.Peer, mine.Owner = evil.id.Name(), "mine"
		evil.names.Announce(mine)
		mine.Owner, mine.MAC, mine.Addrs = "other", mesh.MAC{2, 6}, []netip.Prefix{netip.MustParsePrefix("10.32.6.6/12")}
		evil.names.Announce(mine)
		c.Until("the claims to be heard", 10*time.Second, func() error {
			for _, m := range honest {
				if got := len(m.names.Endpoints()); got != 3 {
					return fmt.Errorf("%v has %d endpoints", m.Name, got)
				}
			}
			return nil
		})
		for _, m := range honest[:victim] {
			m.sw.SetPeers([]router.PeerFlags{{Name: who, Reachable: true}, {Name: evil.id.Name(), Reachable: true}})
			frame := append([]byte{2, 1, 0, 0, 0, 0, 2, 9, 0, 0, 0, 1, 8, 0}, make([]byte, 46)...)
			if d := m.sw.FromBridge(frame, make([]byte, 0, 128), time.Now()); d.Peer != who {
				t.Errorf("%v sends the victim's frames to %v (%+v)", m.Name, d.Peer, d)
			}
			if got := m.sw.Clashes(); len(got) != 2 || !slices.Contains(got[0].Peers, evil.id.Name()) { // of the MAC and the address
				t.Errorf("%v names the clashes %+v", m.Name, got)
			}
			if got, err := m.names.Lookup("web"); err != nil || len(got) != 2 {
				t.Errorf("%v: web is %v, %v", m.Name, got, err)
			}
		}
	})
}

func keysOf(items []mesh.Item) (keys []uint64) {
	for _, it := range items {
		keys = append(keys, it.Key)
	}
	return keys
}

// deathOf is memberlist's packet that says that a peer has failed.
func deathOf(peer mesh.PeerName, incarnation uint32, by mesh.PeerName) []byte {
	str := func(b []byte, s string) []byte { return append(append(b, 0xa0|byte(len(s))), s...) }
	b := str([]byte{5, 0x83}, "Incarnation")
	b = binary.BigEndian.AppendUint32(append(b, 0xce), incarnation)
	return str(str(str(str(b, "Node"), peer.String()), "From"), by.String())
}

// What is signed when 1,000 peers with 20 endpoints each meet a newcomer.
func BenchmarkColdStart(b *testing.B) {
	newcomer, err := tunnel.NewIdentity()
	if err != nil {
		b.Fatal(err)
	}
	topology := router.NewTopology(router.Peer{Name: newcomer.Name(), Key: newcomer.Public}, newcomer)
	var deltas [][]byte
	const peers, endpoints = 100, 20
	for i := range peers {
		id, err := tunnel.NewIdentity()
		if err != nil {
			b.Fatal(err)
		}
		own := router.NewTopology(router.Peer{Name: id.Name(), Key: id.Public, NickName: "host"}, id)
		for _, d := range own.Update(func(p *router.Peer) { p.MTU = 1400 }) {
			if _, err := topology.Merge(id.Name(), d); err != nil {
				b.Fatal(err)
			}
		}
		table, err := records.Open(records.Config{Self: id.Name(), Keys: rowKeys{id, own}, Domain: "mesh.internal.", Now: time.Now()})
		if err != nil {
			b.Fatal(err)
		}
		for j := range endpoints {
			table.Announce(mesh.Endpoint{
				Owner: fmt.Sprintf("%064x", i*endpoints+j), MAC: mesh.MAC{2, 0, 0, byte(i >> 8), byte(i), byte(j)},
				Addrs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 32 + byte(i>>8), byte(i), byte(j)}), 12)},
				Names: []string{fmt.Sprintf("c%d-%d.mesh.internal.", i, j)},
			})
		}
		deltas = append(deltas, table.Drain(mesh.MaxMessage-3)...)
	}
	rows := 0
	b.ReportAllocs()
	for b.Loop() {
		table, err := records.Open(records.Config{
			Self: newcomer.Name(), Keys: rowKeys{newcomer, topology}, Domain: "mesh.internal.", Now: time.Now(),
		})
		if err != nil {
			b.Fatal(err)
		}
		for _, d := range deltas {
			if _, err := table.Merge(mesh.PeerName{1}, d); err != nil {
				b.Fatal(err)
			}
		}
		rows += peers * endpoints
		if got := len(table.Endpoints()); got != peers*endpoints {
			b.Fatalf("%d endpoints", got)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(rows), "ns/row")
}
