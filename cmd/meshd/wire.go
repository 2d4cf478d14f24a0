package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"meshd/container"
	"meshd/container/docker"
	"meshd/control"
	"meshd/dns"
	"meshd/dns/records"
	"meshd/fastdp"
	"meshd/ipam"
	"meshd/mesh"
	"meshd/proxy"
	"meshd/proxy/wait"
	"meshd/router"
	"meshd/router/gossip"
	"meshd/router/hostnet"
	"meshd/router/tunnel"
	"meshd/store"
)

const stateFile = "meshd.db"

// house is the rooms of one meshd, built in the order of the fields: each knows only those above it, but
// for the gossip, which gets its underlay when that exists.
type house struct {
	cfg   Config
	log   *slog.Logger
	state *store.Store
	id    tunnel.Identity
	self  mesh.PeerName
	run   mesh.RunID

	host      *hostnet.Host
	mtu       int // bytes of the overlay's packets
	switcher  *router.Switch
	gossip    *gossip.Node
	tunnel    *tunnel.Tunnel
	passwords *passwords
	records   *records.Table
	names     *dns.Server // nil with --no-dns

	addresses  *ipam.Allocator
	docker     *docker.Client   // nil without Docker
	networks   *docker.Networks // nil without Docker
	containers *container.Manager
	firewall   *hostnet.Firewall
	proxy      *proxy.Proxy // nil without
	control    *control.Server

	tap     *hostnet.TAP
	kernel  *kernelPath
	foreign atomic.Bool      // the bridge has ports that are not ours
	met     []netip.AddrPort // owned by expireLoop: what is stored
}

// serve builds the rooms, runs them until ctx is done and returns the first failure.
func serve(ctx context.Context, cfg Config, log *slog.Logger, notify *notifier) error {
	h := &house{cfg: cfg, log: log}
	h.kernel = newKernelPath(h)
	defer h.close()
	// What can be refused comes first, so that a refused start leaves nothing behind.
	for _, build := range []func() error{
		h.openState, h.checkHost, h.buildMesh, h.buildNames, h.buildAddresses, h.buildContainers, h.openControl,
		h.openDevices, h.openKernel,
	} {
		if err := build(); err != nil {
			return err
		}
	}
	if err := keepCapabilities(kept); errors.Is(err, errors.ErrUnsupported) {
		log.Warn("keeping all capabilities: this meshd was not built as a static program (CGO_ENABLED=0)")
	} else if err != nil {
		return err
	}
	return h.serve(ctx, notify)
}

func (h *house) openState() error {
	var err error
	if h.state, err = store.Open(filepath.Join(h.cfg.StateDir, stateFile)); err != nil {
		return err
	}
	if h.id, err = identity(h.state); err != nil {
		return err
	}
	h.run = newRunID()
	if h.self = h.cfg.Underlay.Name; h.self.IsZero() {
		h.self = h.id.Name()
	}
	return nil
}

// checkHost looks at the host's network and changes nothing: what is wrong is known before anything is made.
func (h *house) checkHost() error {
	var err error
	hc := hostConfig(h.cfg, h.log)
	hc.Guard = func(p mesh.Port) error { return h.kernel.guard(p) }
	if h.host, err = hostnet.Open(hc); err != nil {
		return err
	}
	if h.mtu = h.cfg.Overlay.MTU; h.mtu == 0 {
		if h.mtu, err = overlayMTU(h.host); err != nil {
			return err
		}
	}
	return errors.Join(h.host.Check(), h.checkRange())
}

// checkRange refuses the default range where the host routes a part of it elsewhere. Somebody who chose the
// range knows better and is warned.
func (h *house) checkRange() error {
	a := h.cfg.Addresses
	if !a.Range.IsValid() {
		return nil
	}
	err := h.host.CheckOverlap(a.Range)
	if err == nil {
		return nil
	}
	if a.RangeGiven {
		h.log.Warn("containers cannot reach a part of what the host routes", "err", err)
		return nil
	}
	return fmt.Errorf("--ipalloc-range: %w", err)
}

// openDevices makes or adopts the bridge and the TAP.
func (h *house) openDevices() error {
	if _, err := h.host.EnsureBridge(h.bridgeSpec()); err != nil {
		return err
	}
	var err error
	if h.tap, err = h.host.OpenTAP(tapQueues()); err != nil {
		return err
	}
	if missing := h.tap.Offload.Missing; missing != "" {
		h.log.Warn("the userspace path is slower than it could be", "missing", missing)
	}
	var ports []tunnel.Port
	for _, q := range h.tap.Queues() {
		ports = append(ports, q)
	}
	return h.tunnel.Attach(ports, h.tap.Offload.TSO, h.tap.Offload.USO)
}

// tapQueues is how many goroutines read frames from the bridge. The kernel spreads flows over them, so each keeps
// its order. With two processors a second one gains nothing: one sender's thread, one receiver's and those who
// talk are more than there is room for.
func tapQueues() int { return max(1, min(runtime.NumCPU()/2, 4)) }

// bridgeSpec is the bridge with an address made of the peer's name, so that it is the same after a reboot and
// no other peer's.
func (h *house) bridgeSpec() hostnet.BridgeSpec {
	mac := mesh.MAC(h.self)
	mac[0] = mac[0]&^1 | 2 // locally administered, of one interface (IEEE 802 8.2)
	return hostnet.BridgeSpec{MTU: h.mtu, MAC: mac}
}

func hostConfig(cfg Config, log *slog.Logger) hostnet.Config {
	o := cfg.Overlay
	return hostnet.Config{
		Bridge: o.Bridge, TAP: o.TAP, VXLAN: o.VXLAN, Inside: o.Ifname, DockerBridge: o.DockerBridge,
		Table: o.NFTable, Log: log.With("room", "hostnet"),
	}
}

// overlayMTU is what the underlay carries less what the larger path, the userspace one, puts around it.
func overlayMTU(host *hostnet.Host) (int, error) {
	u, err := host.Underlay()
	if err != nil {
		return 0, fmt.Errorf("find the underlay's MTU: %w", err)
	}
	mtu := u.MTU - tunnel.Overhead4
	if u.IPv6 {
		mtu = u.MTU - tunnel.Overhead6
	}
	// IPv6 inside needs 1280 bytes (RFC 8200 section 5); the tunnel splits what does not fit.
	return min(max(mtu, 1280), 65535-tunnel.Overhead6), nil
}

func (h *house) buildMesh() error {
	u := h.cfg.Underlay
	shortID, err := loadShortID(h.state)
	if err != nil {
		return err
	}
	h.passwords = &passwords{h: h}
	if err := h.passwords.load(u.Password); err != nil {
		return err
	}
	var remembered []netip.AddrPort
	if u.Resume {
		if remembered, err = loadMet(h.state); err != nil {
			return err
		}
	}
	h.switcher = router.NewSwitch(h.self, time.Now())
	routes := &router.LiveRoutes{}
	under := &lateUnderlay{}
	h.gossip = gossip.New(gossip.Config{
		Self: router.Peer{
			Name: h.self, Run: h.run, Key: h.id.Public, NickName: u.NickName, ShortID: shortID,
			Port: u.Port, Protocol: router.Protocol, MTU: h.mtu,
		},
		Keys:        h.id,
		NoDiscovery: u.NoDiscovery,
		ConnLimit:   u.ConnLimit,
		TargetPort:  u.Port,
		Routes:      routes,
		OnPeers:     h.onPeers,
		Remembered:  remembered,
		Log:         h.log.With("room", "gossip"),
	}, under)
	h.tunnel, err = tunnel.New(tunnel.Config{
		Identity: h.id,
		Hello:    router.Hello{Name: h.self, Run: h.run, NickName: u.NickName, Port: u.Port, Protocol: router.Protocol},
		PSKs:     h.passwords.ring,
		Trusted:  u.TrustedSubnets,
		Listen:   listenAddr(u),
		MTU:      h.mtu,
		Accept:   h.gossip.Accept,
		Router:   routes,
		Switch:   h.switcher,
		Handler:  h.gossip,
		Log:      h.log.With("room", "tunnel"),
	})
	if err != nil {
		return err
	}
	under.Tunnel = h.tunnel
	return h.tunnel.Listen()
}

// lateUnderlay is the tunnel, which is built after the gossip that uses it.
type lateUnderlay struct{ *tunnel.Tunnel }

// onPeers is told of every change of the set of peers.
func (h *house) onPeers(peers []router.PeerFlags) {
	h.switcher.SetPeers(peers)
	h.kernel.poke()
}

func (h *house) buildNames() error {
	d := h.cfg.DNS
	var err error
	h.records, err = records.Open(records.Config{
		Self: h.self, Run: h.run, Keys: rowKeys{h.id, h.gossip.Topology()}, Domain: d.Domain, Store: h.state, Now: time.Now(), Log: h.log.With("room", "names"),
	})
	if err != nil {
		return err
	}
	h.records.OnChange(func(changes []records.Change) {
		var set, gone []mesh.Endpoint
		for _, c := range changes {
			if c.Up {
				set = append(set, c.Endpoint)
			} else {
				gone = append(gone, c.Endpoint)
			}
		}
		h.switcher.UpdateEndpoints(set, gone)
		h.kernel.poke()
	})
	h.gossip.AddTable(mesh.ChanNames, h.records)
	h.gossip.Subscribe(func(ev gossip.PeerEvent) {
		h.records.SetPeerState(ev.Peer, map[router.PeerState]records.PeerState{
			router.Alive: records.Alive, router.Suspect: records.Suspect, router.Gone: records.Gone,
		}[ev.State])
	})
	if d.Off {
		return nil
	}
	h.names, err = dns.New(dns.Config{
		Domain: d.Domain, Listen: d.Listen, Bridge: h.cfg.Overlay.DockerBridge, TTL: d.TTL,
		ResolvConf: d.ResolvConf, Timeout: d.FallbackTimeout,
		Access: dns.NewInterfaces([]string{h.cfg.Overlay.Bridge}, h.isolated).Access,
		Ranges: ranges(h.cfg.Addresses), AllowRebind: d.AllowRebind,
		Log: h.log.With("room", "dns"),
	}, h.records)
	if err != nil {
		return err
	}
	return h.names.Open()
}

// isolated is for dns, which runs when everything is built.
func (h *house) isolated(bridge string) bool { return h.networks != nil && h.networks.Isolated(bridge) }

func (h *house) openKernel() error {
	o := h.cfg.Overlay
	return h.kernel.open(fastdp.Config{
		Bridge: o.Bridge, TAP: o.TAP, VXLAN: o.VXLAN, PinDir: h.cfg.PinDir, Port: h.cfg.Underlay.VXLANPort, MTU: h.mtu,
		GuardOnly: h.passwords.any(), NoGuard: o.NoSpoofGuard, Log: h.log.With("room", "fastdp"),
	}, o.NoFastDP)
}

func (h *house) buildAddresses() error {
	a := h.cfg.Addresses
	var err error
	h.addresses, err = ipam.New(ipam.Config{
		Name: h.self, Range: a.Range, DefaultSubnet: a.DefaultSubnet,
		Init: ipam.Init{
			Mode: map[InitMode]ipam.Mode{InitConsensus: ipam.Consensus, InitSeed: ipam.Seed, InitObserver: ipam.Observer}[a.Init],
			N:    a.Peers, Seed: a.Seeds,
		},
		Lost:         func(name mesh.PeerName) { h.records.SetPeerState(name, records.Gone) },
		ReclaimAfter: a.ReclaimAfter, WaitForLive: true, Store: h.state, Network: h, Log: h.log.With("room", "ipam"),
	})
	if err != nil {
		return err
	}
	h.gossip.AddTable(mesh.ChanRing, h.addresses.Table())
	h.gossip.Handle(mesh.ChanAddresses, h.addresses.Message)
	h.gossip.Subscribe(func(ev gossip.PeerEvent) {
		h.addresses.SetPeerState(ev.Peer, map[router.PeerState]ipam.PeerState{
			router.Alive: ipam.Alive, router.Suspect: ipam.Suspect, router.Gone: ipam.Gone,
		}[ev.State])
	})
	return nil
}

func (h *house) buildContainers() error {
	d := h.cfg.Docker
	h.firewall = h.host.NewFirewall(firewallConfig(h.cfg))
	cfg := container.Config{
		Peer: h.self, Domain: h.cfg.DNS.Domain,
		Network: h.host, Bridge: h.host, Firewall: h.firewall, Allocator: h.addresses, Announcer: h.records, Store: h.state,
		OpenNamespace: hostnet.OpenNamespace, CheckOverlap: h.host.CheckOverlap, Reclaim: h.reclaim, Gone: h.gone,
		Log: h.log.With("room", "container"),
	}
	if d.API != "" {
		var err error
		if h.docker, err = docker.New(docker.Config{Endpoint: d.API, Log: cfg.Log}); err != nil {
			return err
		}
		cfg.Docker, h.networks = h.docker, docker.NewNetworks(h.docker)
	}
	if d.API != "" { // also when the proxy is off by now, for what it made waits
		cfg.Wanted, cfg.WantedLabel = h.wanted, proxy.LabelAddrs
	}
	var err error
	if h.containers, err = container.New(cfg); err != nil {
		return err
	}
	h.firewall.Assume(h.containers.Exposed())
	if !d.Proxy.On || d.API == "" {
		return nil
	}
	p := d.Proxy
	pc := proxy.Config{
		Listen: p.Listen, Docker: d.API, WaitDir: waitDir(h.cfg), Ifname: h.cfg.Overlay.Ifname,
		Range: h.cfg.Addresses.Range, NoDefaultIPAlloc: p.NoDefaultIPAlloc, NoRewriteHosts: p.NoRewriteHosts, NoMulticastRoute: p.NoMulticastRoute,
		RewriteInspect: p.RewriteInspect, DNSDomain: h.cfg.DNS.Domain,
		HostnameFromLabel: p.HostnameFromLabel, HostnameMatch: p.HostnameMatch, HostnameReplacement: p.HostnameReplacement,
	}
	if len(pc.Listen) == 0 {
		pc.Listen = []string{"unix://" + filepath.Join(h.cfg.RunDir, "docker.sock")}
	}
	if h.names != nil && !p.NoDNS {
		pc.DNS = h.names.Addr
	}
	if pc.TLS, err = proxyTLS(p); err != nil {
		return err
	}
	h.proxy, err = proxy.Listen(pc, containers{h.containers}, h.log.With("room", "proxy"))
	return err
}

// wanted says how a container that the proxy made is attached when Docker starts it by itself. The label
// alone does not count, for any image may have it; the waiter's place can only come from the proxy.
func (h *house) wanted(c docker.Container) (container.Request, bool) {
	p := h.cfg.Docker.Proxy
	value, labelled := c.Config.Labels[proxy.LabelAddrs]
	specs, err := mesh.ParseAddrSpecs(value)
	if !labelled || err != nil || !slices.Contains(c.HostConfig.Binds, waitDir(h.cfg)+":"+wait.Mount+":ro") {
		return container.Request{}, false
	}
	ownHosts := slices.Contains([]string{"", "default", "bridge", "none"}, c.HostConfig.NetworkMode)
	return container.Request{
		Addrs: specs, WithoutDNS: h.names == nil || p.NoDNS, RewriteHosts: ownHosts && !p.NoRewriteHosts,
		AddHosts: c.HostConfig.ExtraHosts, NoMulticastRoute: p.NoMulticastRoute,
	}, true
}

// firewallConfig closes to containers what only peers and the host itself have business with.
func firewallConfig(cfg Config) hostnet.FirewallConfig {
	fw := hostnet.FirewallConfig{
		UDPPorts:   []uint16{cfg.Underlay.Port, cfg.Underlay.VXLANPort},
		KernelPort: cfg.Underlay.VXLANPort, KernelDevice: cfg.Overlay.VXLAN,
		TCPPorts:   []uint16{cfg.Underlay.Port},
		LocalPorts: []uint16{},
		Range:      cfg.Addresses.Range, NoMasqLocal: cfg.Overlay.NoMasqLocal,
	}
	if !cfg.DNS.Off {
		fw.DNSPort = cfg.DNS.Listen.Port()
	}
	for _, addr := range []string{cfg.Control.HTTPAddr, cfg.Control.StatusAddr, cfg.Control.MetricsAddr} {
		if a, err := netip.ParseAddrPort(addr); err == nil && a.Addr().IsLoopback() {
			fw.LocalPorts = append(fw.LocalPorts, a.Port())
		}
	}
	if a, err := netip.ParseAddrPort(cfg.Control.HTTPAddr); err == nil {
		fw.TCPPorts = append(fw.TCPPorts, a.Port())
	}
	return fw
}

func (h *house) openControl() error {
	backends := control.Backends{
		Reporter: h, Peers: targets{h}, Passwords: h.passwords, Attachments: attachments{h.containers}, Exposure: attachments{h.containers},
	}
	if h.cfg.Addresses.Range.IsValid() {
		backends.Addresses, backends.Ring = h.addresses, addressRing{h}
	}
	if h.names != nil {
		backends.Names = handmade{h}
	}
	var err error
	h.control, err = control.Listen(controlConfig(h.cfg.Control, h.log), backends)
	return err
}

// serve runs the rooms.
func (h *house) serve(ctx context.Context, notify *notifier) error {
	u := h.cfg.Underlay
	peers := u.Peers
	if u.Resume {
		var err error
		if peers, err = loadTargets(h.state); err != nil {
			return err
		}
	}
	if err := (targets{h}).Connect(peers, true); err != nil {
		return err
	}
	inner, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer context.AfterFunc(ctx, func() {
		h.kernel.leave()
		stop()
	})()
	defer stop()
	g, ctx := errgroup.WithContext(inner)
	run := func(room string, f func(context.Context) error) {
		g.Go(func() error { return ended(ctx, room, f(ctx)) })
	}
	run("tunnel", h.tunnel.Run)
	run("gossip", h.gossip.Run)
	run("names", func(ctx context.Context) error {
		return h.records.Run(ctx, mesh.MaxMessage-1, func(delta []byte) { h.broadcast(mesh.ChanNames, delta) })
	})
	if h.names != nil {
		run("dns", h.names.Run)
		if h.networks != nil {
			run("networks", h.networks.Run)
		}
	}
	run("ipam", h.addresses.Run)
	run("kernel path", h.kernel.run)
	run("hostnet", func(ctx context.Context) error { return h.host.Watch(ctx, h.onHost) })
	run("switch", h.expireLoop)
	run("firewall", h.firewall.Run)
	run("containers", h.containers.Run)
	if h.proxy != nil {
		run("proxy", h.proxy.Run)
	}
	run("control", h.control.Run)
	run("tap", func(ctx context.Context) error { // the pumps wait in Read until it is closed
		<-ctx.Done()
		return h.tap.Close()
	})
	h.log.Info("serving", "peer", h.self, "nickname", u.NickName, "mtu", h.mtu)
	notify.Ready(func(context.Context) error {
		if stuck := time.Since(h.gossip.LastStep()); stuck > loopPatience {
			return fmt.Errorf("the control loop has not come round for %v", stuck)
		}
		return nil
	})
	return g.Wait()
}

// Broadcast and Send make the house ipam's Network.
func (h *house) Broadcast(ch mesh.Channel, delta []byte) { h.broadcast(ch, delta) }

func (h *house) Send(to mesh.PeerName, ch mesh.Channel, msg []byte) error {
	return h.gossip.Send(to, ch, msg)
}

// reclaim tells ipam what is attached in the kernel.
func (h *house) reclaim(live map[string][]netip.Prefix) {
	var list []ipam.Holding
	for owner, addrs := range live {
		for _, a := range addrs {
			list = append(list, ipam.Holding{Owner: owner, Addr: a})
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), reclaimTime)
	defer cancel()
	collisions, err := h.addresses.Reclaim(ctx, list)
	if err != nil {
		h.log.Error("addresses are not handed out yet", "err", err)
	}
	for _, c := range collisions {
		h.log.Error("two have the same address; one must be renumbered", "addr", c.Addr, "container", c.Owner, "with", c.With)
	}
	h.records.Settle() // what the last run announced and this one has not is over
}

// gone forgets the names made by hand for a container that was removed.
func (h *house) gone(owner string) {
	if err := h.records.ReleaseOwner(owner); err != nil {
		h.log.Error("names of a removed container stay", "container", owner, "err", err)
	}
}

// loopPatience is how long the control loop may take over one round before systemd's watchdog hears of it.
const loopPatience = 10 * time.Second

const reclaimTime = 10 * time.Second

func (h *house) broadcast(ch mesh.Channel, delta []byte) {
	if err := h.gossip.Broadcast(ch, delta); err != nil {
		h.log.Error("a change reaches the peers late", "err", err) // by comparison of tables
	}
}

// onHost is told what changed on the bridge.
func (h *house) onHost(s hostnet.State) {
	if len(s.Missing) > 0 {
		h.log.Warn("somebody changed the bridge; putting it back", "missing", s.Missing)
		if err := h.host.Restore(h.bridgeSpec()); err != nil {
			h.log.Warn("cannot put the bridge back", "err", err)
		}
		if err := h.host.ReopenTAP(h.tap); err != nil {
			h.log.Error("the userspace path carries nothing", "err", err)
		}
	}
	h.foreign.Store(len(s.Foreign) > 0)
	h.tellForeign(time.Now())
	h.containers.Recheck()
	h.kernel.poke()
}

// rememberMet keeps where peers were met, for --resume.
func (h *house) rememberMet() {
	met := h.gossip.Met()
	if slices.Equal(met, h.met) {
		return
	}
	if err := saveMet(h.state, met); err != nil {
		h.log.Warn("cannot remember where the peers are", "err", err)
		return
	}
	h.met = met
}

// tellForeign tells the peers whether our bridge leads to more than endpoints: they flood what they do not
// know to such bridges only.
func (h *house) tellForeign(now time.Time) {
	foreign := h.foreign.Load() || h.switcher.Foreign(now)
	h.gossip.Update(func(p *router.Peer) {
		if p.Flags &^= router.FlagForeign; foreign {
			p.Flags |= router.FlagForeign
		}
	})
}

// expireLoop forgets learned addresses that have aged.
func (h *house) expireLoop(ctx context.Context) error {
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			h.switcher.Expire(now)
			h.tellForeign(now)
			h.rememberMet()
		case <-ctx.Done():
			return nil
		}
	}
}

// close releases what was opened. Devices, pinned programs and attached containers stay.
func (h *house) close() {
	var errs []error
	if h.control != nil {
		errs = append(errs, h.control.Close())
	}
	if h.proxy != nil {
		errs = append(errs, h.proxy.Close())
	}
	if h.docker != nil {
		errs = append(errs, h.docker.Close())
	}
	errs = append(errs, h.kernel.close())
	if h.tap != nil {
		errs = append(errs, h.tap.Close())
	}
	if h.host != nil {
		errs = append(errs, h.host.Close())
	}
	if h.state != nil {
		errs = append(errs, h.state.Close())
	}
	if err := errors.Join(errs...); err != nil {
		h.log.Warn("not everything could be closed", "err", err)
	}
}

func controlConfig(c ControlConfig, log *slog.Logger) control.Config {
	return control.Config{
		Log:         log.With("room", "control"),
		Socket:      c.Socket,
		HTTPAddr:    c.HTTPAddr,
		CACert:      c.TLS.CACert,
		Cert:        c.TLS.Cert,
		Key:         c.TLS.Key,
		StatusAddr:  c.StatusAddr,
		MetricsAddr: c.MetricsAddr,
	}
}
