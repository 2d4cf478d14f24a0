package sim

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"meshd/dns/records"
	"meshd/ipam"
	"meshd/mesh"
	"meshd/router"
	"meshd/router/gossip"
	"meshd/router/gossip/simnet"
)

// world is one mesh with what runs on its hosts, and what the oracle knows.
type world struct {
	t       testing.TB
	seed    uint64
	cluster *simnet.Cluster
	hosts   []*host
	founded int  // voters of the ring
	few     bool // hosts have one target each
	wg      sync.WaitGroup

	mu     sync.Mutex // guards all below and the hosts' containers
	rng    *rand.Rand
	last   int                       // container numbered last
	holder map[netip.Addr]*container // the oracle's book
	failed []string
	counts map[string]int
}

// container is what the oracle believes to run on a host.
type container struct {
	id   string
	host *host
	mac  mesh.MAC
	addr netip.Prefix
	name string
}

// host is a machine: a disk, containers that outlive meshd, and now and then a meshd.
type host struct {
	w    *world
	n    int
	disk *disk

	conts map[string]*container
	life  *life // nil: no meshd
}

// life is one run of meshd on a host: the rooms as cmd/meshd connects them.
type life struct {
	host   *host
	mount  *mount
	peer   *simnet.Peer
	addrs  *ipam.Allocator
	names  *records.Table
	frames *router.Switch
	ctx    context.Context
	stop   context.CancelFunc

	topology atomic.Pointer[router.Topology] // whose keys bear the names; nil until the gossip is made
}

const domain = "mesh.internal."

var (
	addrRange = netip.MustParsePrefix("10.32.0.0/20")
	subnets   = []netip.Prefix{addrRange, netip.MustParsePrefix("10.32.4.0/24"), netip.MustParsePrefix("10.32.8.0/22")}
)

// newWorld makes hosts 0 to n-1 without a meshd.
func newWorld(t testing.TB, seed uint64, n int) *world {
	w := &world{
		t: t, seed: seed, founded: n, rng: rand.New(rand.NewPCG(seed, 99)), holder: map[netip.Addr]*container{}, counts: map[string]int{},
	}
	for i := range n {
		w.hosts = append(w.hosts, &host{w: w, n: i, disk: &disk{data: map[string]map[string][]byte{}}, conts: map[string]*container{}})
	}
	w.cluster = simnet.NewCluster(t, simnet.Options{Seed: seed, Config: w.config, Prepare: w.prepare})
	return w
}

// end stops everything.
func (w *world) end() {
	for _, h := range w.hosts {
		h.kill()
	}
	w.wg.Wait()
	w.cluster.Stop()
}

func (w *world) fail(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failLocked(format, args...)
}

func (w *world) failLocked(format string, args ...any) {
	w.failed = append(w.failed, fmt.Sprintf(format, args...))
}

func (w *world) count(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.counts[what]++
}

func (w *world) random(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rng.IntN(n)
}

// config and prepare are called by start for the life that is being built.
func (w *world) config(i int, cfg *gossip.Config) { cfg.OnPeers = w.hosts[i].life.frames.SetPeers }

func (w *world) prepare(i int, node *gossip.Node) {
	l := w.hosts[i].life
	l.topology.Store(node.Topology())
	node.AddTable(mesh.ChanNames, l.names)
	node.AddTable(mesh.ChanRing, l.addrs.Table())
	node.Handle(mesh.ChanAddresses, l.addrs.Message)
	node.Subscribe(func(ev gossip.PeerEvent) {
		l.names.SetPeerState(ev.Peer, map[router.PeerState]records.PeerState{
			router.Alive: records.Alive, router.Suspect: records.Suspect, router.Gone: records.Gone,
		}[ev.State])
		l.addrs.SetPeerState(ev.Peer, map[router.PeerState]ipam.PeerState{
			router.Alive: ipam.Alive, router.Suspect: ipam.Suspect, router.Gone: ipam.Gone,
		}[ev.State])
	})
}

// Broadcast and Send make the life ipam's Network.
// Sign, Verify, Key and Bearer make the life records.Keys.
func (l *life) Sign(msg []byte) [64]byte { return simnet.Keys(simnet.KeyOf(l.host.n)).Sign(msg) }

func (l *life) Verify(key [32]byte, msg []byte, sig [64]byte) bool {
	return simnet.Keys{}.Verify(key, msg, sig)
}

func (l *life) Key(peer mesh.PeerName) (key [32]byte, ok bool) {
	if peer == simnet.NameOf(l.host.n) {
		return simnet.KeyOf(l.host.n), true
	}
	if topology := l.topology.Load(); topology != nil {
		return topology.KeyOf(peer)
	}
	return key, false
}

func (l *life) Bearer(key [32]byte) mesh.PeerName { return l.topology.Load().Bearer(key) }

func (l *life) Broadcast(ch mesh.Channel, delta []byte) { _ = l.peer.Node.Broadcast(ch, delta) }

func (l *life) Send(to mesh.PeerName, ch mesh.Channel, msg []byte) error {
	return l.peer.Node.Send(to, ch, msg)
}

// start begins a meshd on the host, in place of one that may be running. With a disk that does not work
// it fails, as the real one does.
func (h *host) start(targets ...int) {
	h.kill()
	w := h.w
	l := &life{host: h}
	l.ctx, l.stop = context.WithCancel(context.Background())
	l.mount = &mount{disk: h.disk, die: func() { w.count("died at a write"); l.peer.Host.Kill(); l.stop() }}
	self := simnet.NameOf(h.n)
	var err error
	l.names, err = records.Open(records.Config{
		Self: self, Run: mesh.RunID(w.random(1 << 62)), Keys: l, Domain: domain, Store: l.mount, Now: time.Now(),
	})
	if errors.Is(err, errFull) {
		w.count("start refused: disk")
		l.stop()
		return
	}
	if err == nil {
		l.addrs, err = ipam.New(ipam.Config{
			Name: self, Range: addrRange, Init: ipam.Init{Mode: ipam.Consensus, N: w.founded}, WaitForLive: true,
			Store: l.mount, Network: l,
		})
	}
	if err != nil {
		w.fail("host %d does not start: %v", h.n, err)
		l.stop()
		return
	}
	l.frames = router.NewSwitch(self, time.Now())
	l.names.OnChange(func(changes []records.Change) {
		var set, gone []mesh.Endpoint
		for _, c := range changes {
			if c.Up {
				set = append(set, c.Endpoint)
			} else {
				gone = append(gone, c.Endpoint)
			}
		}
		l.frames.UpdateEndpoints(set, gone)
	})
	h.life = l
	l.peer = w.cluster.Start(h.n, targets...)
	w.wg.Go(func() { _ = l.addrs.Run(l.ctx) })
	w.wg.Go(func() {
		_ = l.names.Run(l.ctx, mesh.MaxMessage-1, func(delta []byte) { l.Broadcast(mesh.ChanNames, delta) })
	})
	w.wg.Go(l.adopt)
	w.count("starts")
}

// adopt is what the container room does first: it says what runs here, announces it and gives back what
// does not run any more.
func (l *life) adopt() {
	w, h := l.host.w, l.host
	w.mu.Lock()
	var live []ipam.Holding
	var eps []mesh.Endpoint
	ids := slices.Sorted(maps.Keys(h.conts))
	for _, id := range ids {
		c := h.conts[id]
		live = append(live, ipam.Holding{Owner: c.id, Addr: c.addr})
		eps = append(eps, c.endpoint())
	}
	w.mu.Unlock()
	for {
		ctx, cancel := context.WithTimeout(l.ctx, 10*time.Second)
		collisions, err := l.addrs.Reclaim(ctx, live)
		cancel()
		for _, c := range collisions {
			w.fail("host %d: %v", h.n, c)
		}
		if err == nil {
			break
		}
		if !l.pause(time.Second) {
			return
		}
	}
	w.mu.Lock()
	for _, ep := range eps {
		if h.conts[ep.Owner] != nil {
			l.names.Announce(ep)
		}
	}
	w.mu.Unlock()
	l.names.Settle()
	for owner := range l.addrs.Owners() {
		if !slices.Contains(ids, owner) {
			l.release(owner)
		}
	}
}

// pause waits; it returns false when the process has ended.
func (l *life) pause(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-l.ctx.Done():
		return false
	}
}

// release gives an owner's addresses back, and tries until it is on disk.
func (l *life) release(owner string) {
	w := l.host.w
	for {
		w.mu.Lock()
		running := l.host.conts[owner] != nil
		w.mu.Unlock()
		if running {
			return // attached meanwhile
		}
		ctx, cancel := context.WithTimeout(l.ctx, 5*time.Second)
		err := l.addrs.ReleaseAll(ctx, owner)
		cancel()
		if err == nil || !l.pause(time.Second) {
			return
		}
	}
}

// kill takes meshd away without a word.
func (h *host) kill() {
	l := h.life
	if l == nil {
		return
	}
	l.mount.unmount()
	h.w.cluster.Kill(h.n)
	l.stop()
	h.life = nil
}

// up reports whether meshd runs on the host.
func (h *host) up() bool { return h.life != nil && !h.life.mount.gone() }

func (c *container) endpoint() mesh.Endpoint {
	return mesh.Endpoint{
		Peer: simnet.NameOf(c.host.n), Owner: c.id, MAC: c.mac, Addrs: []netip.Prefix{c.addr}, Names: []string{c.name},
	}
}

// attach starts a container in a subnet, in the background: an address may be long in coming.
func (h *host) attach(subnet int) {
	h.begin(func(ctx context.Context, l *life, id string) (netip.Prefix, error) {
		return l.addrs.Allocate(ctx, id, subnets[subnet])
	})
}

// claim starts a container with an address that somebody chose.
func (h *host) claim(offset int) {
	h.begin(func(ctx context.Context, l *life, id string) (netip.Prefix, error) {
		raw := addrRange.Addr().As4()
		raw[2], raw[3] = raw[2]+byte(offset>>8&15), byte(offset)
		p := netip.PrefixFrom(netip.AddrFrom4(raw), addrRange.Bits())
		return p, l.addrs.Claim(ctx, id, p)
	})
}

func (h *host) begin(ask func(ctx context.Context, l *life, id string) (netip.Prefix, error)) {
	l, w := h.life, h.w
	if !h.up() {
		return
	}
	w.mu.Lock()
	w.last++
	n := w.last
	id := fmt.Sprintf("%064x", n)
	w.mu.Unlock()
	w.wg.Go(func() {
		ctx, cancel := context.WithTimeout(l.ctx, 10*time.Second)
		defer cancel()
		addr, err := ask(ctx, l, id)
		if err != nil {
			w.count("refused an address")
			if !l.mount.gone() {
				l.release(id)
			}
			return
		}
		w.mu.Lock()
		if l.mount.gone() {
			w.mu.Unlock()
			return // nobody was there any more to start it
		}
		c := &container{id, h, mesh.MAC{2, 0x42, 0, 0, byte(n >> 8), byte(n)}, addr, fmt.Sprintf("c%d.%s", n, domain)}
		if other := w.holder[addr.Addr()]; other != nil {
			w.failLocked("%v was given to %s on host %d and to %s on host %d", addr, c.name, h.n, other.name, other.host.n)
		}
		w.holder[addr.Addr()] = c
		h.conts[id] = c
		w.counts["attached"]++
		l.names.Announce(c.endpoint())
		w.mu.Unlock()
	})
}

// detach ends one of the host's containers; which one, choice says.
func (h *host) detach(choice int) {
	w := h.w
	w.mu.Lock()
	ids := slices.Sorted(maps.Keys(h.conts))
	if len(ids) == 0 {
		w.mu.Unlock()
		return
	}
	c := h.conts[ids[choice%len(ids)]]
	delete(h.conts, c.id)
	delete(w.holder, c.addr.Addr())
	w.counts["detached"]++
	l, up := h.life, h.up()
	if up {
		l.names.Withdraw(c.id, c.mac)
	}
	w.mu.Unlock()
	if up {
		w.wg.Go(func() { l.release(c.id) })
	}
}
