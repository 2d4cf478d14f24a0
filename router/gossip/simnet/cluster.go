package simnet

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"meshd/mesh"
	"meshd/router"
	"meshd/router/gossip"
)

// Cluster is a number of peers with their gossip on one Net. Make it inside a synctest bubble and call
// Stop before the bubble ends.
type Cluster struct {
	Net   *Net
	Peers []*Peer // by number; nil: never started

	t    testing.TB
	opts Options
	ctx  context.Context
	stop func()
	wg   sync.WaitGroup
	runs uint64
}

// Options of a Cluster.
type Options struct {
	Seed     uint64
	RealTime bool                            // not in a bubble
	Config   func(i int, cfg *gossip.Config) // changes a peer's configuration; may be nil
	Prepare  func(i int, n *gossip.Node)     // adds tables and handlers before the node runs; may be nil
}

// Peer is one run of one peer.
type Peer struct {
	Number int
	Name   mesh.PeerName
	Node   *gossip.Node
	Host   *Host
	stop   func()
}

// NewCluster makes an empty cluster.
func NewCluster(t testing.TB, opts Options) *Cluster {
	c := &Cluster{Net: New(opts.Seed), t: t, opts: opts}
	c.ctx, c.stop = context.WithCancel(context.Background())
	c.wg.Go(func() { c.Net.Run(c.ctx) })
	return c
}

// Stop ends everything and waits for it.
func (c *Cluster) Stop() {
	for _, p := range c.Peers {
		if p != nil {
			p.stop()
		}
	}
	c.stop()
	c.wg.Wait()
	// memberlist's goroutines see the end when their probe is over, and a bubble's time stands still once
	// its test has returned.
	if !c.opts.RealTime {
		time.Sleep(time.Minute)
	}
}

// NameOf is the name of peer i.
func NameOf(i int) mesh.PeerName { return mesh.PeerName{0x0e, 0, 0, 0, byte(i >> 8), byte(i)} }

// KeyOf is the key of peer i.
func KeyOf(i int) [32]byte { return [32]byte{byte(i), byte(i >> 8), 1} }

// AddrOf is the address of peer i.
func AddrOf(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), 6783)
}

// Start starts peer i, or starts it again as another run, with targets to dial.
func (c *Cluster) Start(i int, targets ...int) *Peer {
	c.t.Helper()
	p := c.Build(i, targets...)
	c.Run(p)
	return p
}

// Run lets a peer that was built run.
func (c *Cluster) Run(p *Peer) {
	ctx, stop := context.WithCancel(c.ctx)
	p.stop = stop
	c.wg.Go(func() {
		if err := p.Node.Run(ctx); err != nil {
			c.t.Errorf("peer %d: %v", p.Number, err)
		}
	})
}

// Build is Start but for running: links that the peer gets wait, as do messages.
func (c *Cluster) Build(i int, targets ...int) *Peer {
	c.t.Helper()
	for len(c.Peers) <= i {
		c.Peers = append(c.Peers, nil)
	}
	if c.Peers[i] != nil {
		c.Kill(i)
	}
	c.runs++
	name := NameOf(i)
	hello := router.Hello{
		Name: name, Run: mesh.RunID(c.opts.Seed<<32 + c.runs), Key: KeyOf(i),
		NickName: fmt.Sprint("peer", i), Port: 6783, Protocol: router.Protocol,
	}
	cfg := gossip.Config{
		Self: router.Peer{
			Name: name, Run: hello.Run, Key: hello.Key, NickName: hello.NickName, Port: hello.Port,
			Protocol: hello.Protocol, MTU: 1400, Flags: router.FlagKernel,
		},
		Seed: (c.opts.Seed+1)*1_000_003 + c.runs,
		Log:  slog.New(slog.DiscardHandler),
	}
	if c.opts.Config != nil {
		c.opts.Config(i, &cfg)
	}
	hello.Name, hello.Key, hello.Protocol = cfg.Self.Name, cfg.Self.Key, cfg.Self.Protocol
	if cfg.Keys == nil {
		cfg.Keys = Keys(cfg.Self.Key)
	}
	host := c.Net.Add(hello, AddrOf(i))
	node := gossip.New(cfg, host)
	if c.opts.Prepare != nil {
		c.opts.Prepare(i, node)
	}
	host.Attach(node, node.Routes())
	var texts []string
	for _, t := range targets {
		texts = append(texts, AddrOf(t).Addr().String())
	}
	if err := node.Connect(texts, false); err != nil {
		c.t.Fatal(err)
	}
	p := &Peer{Number: i, Name: cfg.Self.Name, Node: node, Host: host, stop: func() {}}
	c.Peers[i] = p
	return p
}

// StartAll starts n peers that dial peer 0.
func (c *Cluster) StartAll(n int) {
	for i := range n {
		if i == 0 {
			c.Start(i)
		} else {
			c.Start(i, 0)
		}
	}
}

// Kill takes peer i away without a goodbye.
func (c *Cluster) Kill(i int) {
	c.Peers[i].Host.Kill()
	c.Peers[i].stop()
}

// Leave takes peer i away with a goodbye.
func (c *Cluster) Leave(i int) {
	c.Peers[i].Host.Leave()
	c.Peers[i].stop()
}

// Hosts returns the hosts of the peers from one number up to another.
func (c *Cluster) Hosts(from, to int) []*Host {
	var out []*Host
	for _, p := range c.Peers[from:to] {
		out = append(out, p.Host)
	}
	return out
}

// Until waits until ok holds, looking every 50 ms, and returns how long that took; it fails the test
// after limit.
func (c *Cluster) Until(what string, limit time.Duration, ok func() error) time.Duration {
	c.t.Helper()
	begun := time.Now()
	for {
		err := ok()
		took := time.Since(begun)
		if err == nil {
			return took
		}
		if took >= limit {
			c.t.Fatalf("seed %d: %s: not within %v: %v", c.opts.Seed, what, limit, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Whole reports what is missing until all peers of a group reach each other, agree on the topology and
// have each other as members.
func Whole(peers []*Peer) error {
	want := digest(peers[0])
	names := make([]mesh.PeerName, len(peers))
	for i, p := range peers {
		names[i] = p.Name
	}
	slices.SortFunc(names, mesh.PeerName.Compare)
	for _, p := range peers {
		reached := p.Node.Routes().Load().Reachable()
		if len(reached) < len(peers)-1 {
			return fmt.Errorf("%v has %d routes of %d", p.Name, len(reached), len(peers)-1)
		}
		for _, q := range names { // both lists are in order
			for len(reached) > 0 && reached[0].Compare(q) < 0 {
				reached = reached[1:]
			}
			if q != p.Name && (len(reached) == 0 || reached[0] != q) {
				return fmt.Errorf("%v has no route to %v", p.Name, q)
			}
		}
		if digest(p) != want {
			return fmt.Errorf("the tables of %v and %v differ", p.Name, peers[0].Name)
		}
		if got := p.Node.Members(); got != len(peers) {
			return fmt.Errorf("%v has %d members of %d", p.Name, got, len(peers))
		}
	}
	return nil
}

// FullMesh is Whole, and all routes are direct.
func FullMesh(peers []*Peer) error {
	if err := Whole(peers); err != nil {
		return err
	}
	for _, p := range peers {
		for _, r := range p.Node.Routes().Load().All() {
			if r.Via != r.Dst {
				return fmt.Errorf("%v reaches %v by %v: %s", p.Name, r.Dst, r.Via, r.Why)
			}
		}
	}
	return nil
}

// digest is the same for equal tables: how many entries they have, and a sum over them.
func digest(p *Peer) (d [2]uint64) {
	for _, it := range p.Node.Topology().Items() {
		d[0]++
		d[1] += (it.Key ^ it.Version*0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9
	}
	return d
}
