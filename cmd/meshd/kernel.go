package main

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"meshd/fastdp"
	"meshd/mesh"
	"meshd/router"
	"meshd/router/gossip"
)

// kernelPath feeds the kernel path with what the other rooms know. Everything is told anew after any
// change: fastdp applies the difference.
type kernelPath struct {
	h      *house
	log    *slog.Logger
	dp     atomic.Pointer[fastdp.Datapath] // nil: this kernel cannot do it
	off    string                          // why it carries nothing; fixed by open
	wake   chan struct{}
	shared mesh.ShortID // owned by run: the last one stored

	guarding sync.Mutex // held from listing the ports until they are told, so that no older list is told after a newer one
}

func newKernelPath(h *house) *kernelPath {
	return &kernelPath{h: h, log: h.log, wake: make(chan struct{}, 1)}
}

// open starts the kernel path; disabled, it only guards the ports. A kernel that lacks something is no error:
// off says what it is. What an earlier meshd left in the kernel goes on without us, and in clear: where we do
// not take it over, it has to go.
func (k *kernelPath) open(cfg fastdp.Config, disabled bool) error {
	sealed := cfg.GuardOnly
	cfg.GuardOnly = sealed || disabled
	dp, err := fastdp.Open(cfg)
	switch {
	case errors.Is(err, fastdp.ErrNotSupported):
		k.off = err.Error()
		k.log.Warn("the userspace path serves alone", "err", err)
		return k.clear(cfg, sealed)
	case err != nil:
		return err
	}
	switch {
	case disabled:
		k.off = "switched off by --no-fastdp"
	case sealed:
		k.off = "with a password all goes by userspace"
	}
	k.dp.Store(dp)
	if !cfg.GuardOnly {
		k.h.gossip.Update(func(p *router.Peer) { p.Flags |= router.FlagKernel })
	}
	return nil
}

// fault is what the kernel path cannot put right; "" if there is nothing, or no such path.
func (k *kernelPath) fault() string {
	if dp := k.dp.Load(); dp != nil {
		return dp.Fault()
	}
	return ""
}

// clear removes what an earlier meshd left. With a password meshd does not start beside that.
func (k *kernelPath) clear(cfg fastdp.Config, sealed bool) error {
	err := resetKernelPath(cfg)
	if err != nil && !sealed {
		k.log.Warn("what is left of the kernel path stays", "err", err)
		return nil
	}
	return err
}

// poke has everything told anew soon.
func (k *kernelPath) poke() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// Changes come in bursts, so one telling waits a moment for the next. Links are looked at regularly, since
// nobody tells of a link that only moved.
const (
	kernelGather = 50 * time.Millisecond
	kernelEvery  = time.Second
	// Restarted, we know our peers and endpoints after so long; what was adopted and is not among them goes.
	kernelSettle = 30 * time.Second
)

func (k *kernelPath) run(ctx context.Context) error {
	dp := k.dp.Load()
	if dp == nil {
		return k.guardOnly(ctx)
	}
	if err := k.h.firewall.Unguard(); err != nil {
		k.log.Warn("nftables still guards the ports, beside the kernel path", "err", err)
	}
	done := make(chan error, 1)
	go func() { done <- dp.Run(ctx) }() // ends with ctx, and run waits for it
	tick := time.NewTicker(kernelEvery)
	defer tick.Stop()
	settle := time.NewTimer(kernelSettle)
	defer settle.Stop()
	failed := ""
	for {
		err := k.tell(dp)
		if err != nil && err.Error() != failed {
			k.log.Warn("the kernel path lacks something", "err", err)
		}
		if failed = ""; err != nil {
			failed = err.Error()
		}
		select {
		case <-k.wake:
		case <-tick.C:
			continue
		case <-settle.C:
			if err := dp.Settle(); err != nil {
				k.log.Warn("the kernel path keeps what is old", "err", err)
			}
			continue
		case err := <-done:
			return err
		}
		select {
		case <-time.After(kernelGather):
		case err := <-done:
			return err
		}
	}
}

// guardOnly has nftables guard the ports where there is no kernel path to do so.
func (k *kernelPath) guardOnly(ctx context.Context) error {
	failed := ""
	for {
		err := k.guardAll()
		if err != nil && err.Error() != failed {
			k.log.Warn("containers are not kept to their own addresses", "err", err)
		}
		if failed = ""; err != nil {
			failed = err.Error()
		}
		select {
		case <-k.wake:
		case <-time.After(kernelEvery):
		case <-ctx.Done():
			return nil
		}
	}
}

func (k *kernelPath) guardAll() error {
	if k.h.cfg.Overlay.NoSpoofGuard {
		return k.h.firewall.Unguard()
	}
	k.guarding.Lock()
	defer k.guarding.Unlock()
	ports, err := k.h.containers.Ports()
	if err != nil {
		return err
	}
	return k.h.firewall.Guard(ports)
}

// guard is called for a port that is about to join the bridge.
func (k *kernelPath) guard(p mesh.Port) error {
	dp := k.dp.Load()
	if dp == nil {
		return k.guardAll()
	}
	k.guarding.Lock()
	defer k.guarding.Unlock()
	return dp.AttachPort(fastdp.Port{Index: p.Index, MAC: p.MAC, Addrs: p.Addrs})
}

// tell gives the kernel path peers, endpoints and ports as they are now.
func (k *kernelPath) tell(dp *fastdp.Datapath) error {
	st := k.h.gossip.Status()
	errs := []error{dp.SetSelf(k.h.self, st.Self.ShortID)}
	if st.Self.ShortID != 0 && st.Self.ShortID != k.shared {
		err := saveShortID(k.h.state, st.Self.ShortID)
		if err == nil {
			k.shared = st.Self.ShortID
		}
		errs = append(errs, err)
	}
	errs = append(errs, dp.SetPeers(k.peers(st)), dp.SetEndpoints(k.endpoints()), k.ports(dp))
	return errors.Join(errs...)
}

// endpoints is who has which MAC, as the switch sees it where more than one peer announces it.
func (k *kernelPath) endpoints() []mesh.Endpoint {
	return slices.DeleteFunc(k.h.records.Endpoints(), func(e mesh.Endpoint) bool {
		owner, known := k.h.switcher.Owner(e.MAC)
		return known && owner != e.Peer
	})
}

// peers is every other peer with its short id and the way to it.
func (k *kernelPath) peers(st gossip.Status) []fastdp.Peer {
	addrs := map[mesh.PeerName]netip.Addr{}
	for _, c := range st.Connections {
		if ap, err := netip.ParseAddrPort(c.Address); err == nil && (c.State == gossip.StateEstablished || c.State == gossip.StatePending) {
			addrs[c.Peer] = ap.Addr().Unmap()
		}
	}
	via := map[mesh.PeerName]mesh.PeerName{}
	for _, r := range st.Routes {
		via[r.Dst] = r.Via
	}
	var peers []fastdp.Peer
	for _, p := range st.Peers {
		if p.Name == k.h.self {
			continue
		}
		f := fastdp.Peer{Name: p.Name, ID: p.ShortID, Addr: addrs[p.Name]}
		if v := via[p.Name]; v != p.Name {
			f.Via = v
		}
		if p.Flags&router.FlagKernel == 0 {
			f.Refuse = "it has no kernel path"
		}
		peers = append(peers, f)
	}
	return peers
}

// ports attaches the kernel path to the host ends of our ports, and to foreign ports without a guard.
func (k *kernelPath) ports(dp *fastdp.Datapath) error {
	k.guarding.Lock()
	defer k.guarding.Unlock()
	have, err := k.h.containers.Ports()
	if err != nil {
		return err
	}
	var errs []error
	want := map[int]bool{}
	for _, p := range have {
		if p.Index == 0 || p.MAC.IsZero() {
			continue // half made or half gone
		}
		want[p.Index] = true
		errs = append(errs, dp.AttachPort(fastdp.Port{Index: p.Index, MAC: p.MAC, Addrs: p.Addrs}))
	}
	for _, p := range dp.Ports() {
		if !want[p.Index] {
			errs = append(errs, dp.DetachPort(p.Index))
		}
	}
	return errors.Join(errs...)
}

// status is the state of the kernel path to each peer.
func (k *kernelPath) status() map[mesh.PeerName]fastdp.PathStatus {
	dp := k.dp.Load()
	if dp == nil {
		return nil
	}
	out := map[mesh.PeerName]fastdp.PathStatus{}
	for _, p := range dp.Paths() {
		out[p.Peer] = p
	}
	return out
}

// leave is called before the userspace path stops.
func (k *kernelPath) leave() {
	if dp := k.dp.Load(); dp != nil {
		dp.Leave()
	}
}

func (k *kernelPath) close() error {
	if dp := k.dp.Load(); dp != nil {
		return dp.Close()
	}
	return nil
}

// resetKernelPath removes every trace of the kernel path.
func resetKernelPath(cfg fastdp.Config) error {
	if err := fastdp.Remove(cfg); err != nil && !errors.Is(err, fastdp.ErrNotSupported) {
		return err
	}
	return nil
}
