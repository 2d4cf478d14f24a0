package fastdp

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

const (
	tickEvery      = 100 * time.Millisecond
	usedEveryRead  = 250 * time.Millisecond // how often the peers' stamps are read
	reconcileEvery = 500 * time.Millisecond
	inUseFor       = time.Second
	relayedFor     = 10 * time.Second // after a peer became direct, frames may still come by relays
)

// Datapath is the kernel path of this host. Its methods may be called from any goroutine; each says what
// should be, and the difference to what is goes into the maps before it returns. mu is held across those
// system calls: it orders the changes, and no frame ever waits for it.
type Datapath struct {
	cfg   Config
	log   *slog.Logger
	lock  *os.File
	obj   *objects
	hooks *hooks

	mu        sync.Mutex
	closed    bool
	opened    time.Time
	settled   bool
	fault     string // what reconcile could not repair
	self      mesh.PeerName
	selfID    mesh.ShortID // as SetSelf said last
	told      []Peer       // as SetPeers said last
	peers     map[mesh.PeerName]*peerState
	byID      map[mesh.ShortID]*peerState
	endpoints map[mesh.MAC]mesh.Endpoint
	announced map[mesh.MAC]time.Time // local endpoints: since when others are being told
	ports     map[int]Port
	veth      map[int]bool // ports that are veth pairs
	whole     map[int]bool // ports that AttachPort has finished
	nets      networks
	prober    *prober
	stampsAt  time.Time
	kernel    mirror
}

// mirror is what the maps hold, stamps aside.
type mirror struct {
	config    bpfConfig
	peers     [maxPeers]bpfPeer
	underlays map[bpfUnderlayKey]uint32
	endpoints map[uint64]bpfEndpoint
	ports     map[uint32]bpfPort
	networks  [maxNetworks]netip.Prefix
}

type peerState struct {
	Peer                    // as it is in force
	told         Peer       // as SetPeers said last
	to           netip.Addr // where frames go; invalid: nowhere
	path         *path
	refused      string    // why there is no path at all
	relayedUntil time.Time // its frames may come from other peers' addresses
	used         uint64    // the kernel's stamp, ns of CLOCK_MONOTONIC
}

// Open loads the programs and attaches those of the bridge, the TAP and the vxlan device. What an earlier
// meshd left pinned is adopted as it is and goes on without a gap; call Settle when peers, endpoints and
// ports are told again. The error wraps ErrNotSupported if this kernel or host cannot do it, and ErrBusy
// if another meshd does it already.
func Open(cfg Config) (*Datapath, error) {
	cfg = cfg.withDefaults()
	lock, err := preparePinDir(cfg.PinDir)
	if err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENODEV) {
			err = fmt.Errorf("%w: no bpffs: %w", ErrNotSupported, err)
		}
		return nil, fmt.Errorf("kernel path: %w", err)
	}
	d := &Datapath{
		cfg: cfg, log: cfg.Log, lock: lock, opened: time.Now(),
		peers:     make(map[mesh.PeerName]*peerState),
		endpoints: make(map[mesh.MAC]mesh.Endpoint),
		announced: make(map[mesh.MAC]time.Time),
		ports:     make(map[int]Port),
		veth:      make(map[int]bool),
		whole:     make(map[int]bool),
	}
	if err := d.open(); err != nil {
		d.Close()
		return nil, fmt.Errorf("kernel path: %w", err)
	}
	return d, nil
}

func (d *Datapath) open() (err error) {
	if d.obj, err = openObjects(d.cfg.PinDir, d.cfg.layout); err != nil {
		return err
	}
	if d.obj.lost != nil {
		d.log.Warn("kernel path begins anew, the state of another version could not be read", "err", d.obj.lost)
	}
	if d.hooks, err = openHooks(d.cfg.PinDir, d.cfg.clsact); err != nil {
		return err
	}
	if err := d.readKernel(); err != nil {
		return err
	}
	d.adoptPorts()
	if d.cfg.GuardOnly {
		if err := removeVXLAN(d.cfg.VXLAN); err != nil {
			return err
		}
	}
	if err := d.applyPeers(time.Now()); err != nil {
		return err
	}
	if err := d.reconcileLocked(); err != nil {
		if !d.obj.adopted {
			d.removeLocked()
		}
		return err
	}
	return d.dropOtherLayouts()
}

// dropOtherLayouts removes the pins of other layouts, once no hook runs on their maps.
func (d *Datapath) dropOtherLayouts() error {
	versions, err := layouts(d.cfg.PinDir)
	if err != nil {
		return err
	}
	for _, v := range versions {
		if v == d.cfg.layout {
			continue
		}
		if err := os.RemoveAll(layoutDir(d.cfg.PinDir, v)); err != nil {
			return err
		}
		d.log.Info("kernel path taken over from another version", "layout", v)
	}
	return nil
}

// readKernel fills the mirror from the maps.
func (d *Datapath) readKernel() error {
	k := &d.kernel
	k.underlays = make(map[bpfUnderlayKey]uint32)
	k.endpoints = make(map[uint64]bpfEndpoint)
	k.ports = make(map[uint32]bpfPort)
	if err := d.obj.Config.Lookup(uint32(0), &k.config); err != nil {
		return err
	}
	for i := range uint32(maxPeers) {
		if err := d.obj.Peers.Lookup(i, &k.peers[i]); err != nil {
			return err
		}
		k.peers[i].Used = 0
	}
	for i := range uint32(maxNetworks) {
		var v bpfNetwork
		if err := d.obj.Networks.Lookup(i, &v); err != nil {
			return err
		}
		if p := valueNetwork(v); p.IsValid() {
			k.networks[i] = p
			if d.nets.number == nil {
				d.nets.number = make(map[netip.Prefix]int)
			}
			d.nets.number[p], d.nets.at[i] = int(i), p
		}
	}
	var under bpfUnderlayKey
	var id uint32
	it := d.obj.Underlays.Iterate()
	for it.Next(&under, &id) {
		k.underlays[under] = id
	}
	if err := it.Err(); err != nil {
		return err
	}
	var mac uint64
	var e bpfEndpoint
	it = d.obj.Endpoints.Iterate()
	for it.Next(&mac, &e) {
		e.Used = 0
		k.endpoints[mac] = e
		if e.Flags&endpointAnnounced != 0 {
			d.announced[keyMAC(mac)] = time.Time{}
		}
	}
	if err := it.Err(); err != nil {
		return err
	}
	var index uint32
	var p bpfPort
	it = d.obj.Ports.Iterate()
	for it.Next(&index, &p) {
		p.GroupUntil = 0
		k.ports[index] = p
	}
	return it.Err()
}

// adoptPorts takes over the ports of an earlier meshd whose programs still run.
func (d *Datapath) adoptPorts() {
	for index, v := range d.kernel.ports {
		h := hook{bpfProgPortIn, int(index)}
		if !d.hooks.runs(h) {
			continue // its interface has gone
		}
		p := Port{Index: int(index), MAC: keyMAC(v.Mac), Exempt: v.Flags&portExempt != 0}
		for i := range min(v.Count4, maxAddr4) {
			p.Addrs = append(p.Addrs, valueAddr([4]uint32{v.Addr4[i]}, [4]uint32{v.Mask4[i]}, false))
		}
		for i := range min(v.Count6, maxAddr6) {
			p.Addrs = append(p.Addrs, valueAddr(v.Addr6[i], v.Mask6[i], true))
		}
		d.ports[p.Index] = p
		d.veth[p.Index] = d.kernel.endpoints[v.Mac].Flags&endpointVeth != 0
	}
}

func valueAddr(addr, mask [4]uint32, v6 bool) netip.Prefix {
	return netip.PrefixFrom(wordsAddr(addr, v6), ones(mask))
}

// SetSelf says who this peer is. Without a short id (0) nothing is sent by the tunnel; an adopted one
// stays in force until Settle.
func (d *Datapath) SetSelf(name mesh.PeerName, id mesh.ShortID) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	moved := d.self != name
	d.self, d.selfID = name, id
	return d.applySelf(moved)
}

func (d *Datapath) applySelf(moved bool) error {
	c := d.kernel.config
	if d.selfID != 0 || d.settled {
		c.Self = uint32(d.selfID)
	}
	if d.cfg.GuardOnly || d.selfID > mesh.MaxShortID {
		c.Self = 0
	}
	moved = moved || c.Self != d.kernel.config.Self
	if err := d.applyConfig(c); err != nil || !moved {
		return err
	}
	return errors.Join(d.applyPeers(time.Now()), d.applyEndpoints(time.Now()))
}

// SetPeers says which other peers there are: all of them. A path that is up stays as it is when only the
// tunnel's link is lost or its route leads elsewhere, as when that meshd restarts: the probes know better.
func (d *Datapath) SetPeers(peers []Peer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	return d.setPeers(slices.Clone(peers), time.Now())
}

func (d *Datapath) setPeers(peers []Peer, now time.Time) error {
	d.told = peers
	next := make(map[mesh.PeerName]*peerState, len(peers))
	byID := make(map[mesh.ShortID]*peerState, len(peers))
	idsMoved := len(peers) != len(d.peers)
	for _, p := range peers {
		s := d.peers[p.Name]
		if s == nil {
			s = &peerState{Peer: Peer{Name: p.Name}}
		}
		if p.ID > mesh.MaxShortID {
			p.ID = 0
		}
		p.Addr = p.Addr.Unmap()
		if s.ID != p.ID {
			idsMoved = true
			s.ID, s.path = p.ID, nil
		}
		s.told, s.refused = p, p.Refuse
		next[p.Name] = s
		if p.ID == 0 {
			s.refused = first(s.refused, "it has no short id")
		} else if other := byID[p.ID]; other != nil {
			why := fmt.Sprintf("short id %d is claimed by %s and %s", p.ID, p.Name, other.Name)
			s.refused, other.refused = first(s.refused, why), first(other.refused, why)
		} else {
			byID[p.ID] = s
		}
	}
	idle := idleEvery(len(next))
	for _, s := range next {
		if s.refused != "" {
			s.Peer, s.to, s.path = s.told, netip.Addr{}, nil
			continue
		}
		d.choosePath(s, next, now)
		if s.path != nil {
			s.path.idle = idle
		}
	}
	d.peers, d.byID = next, byID
	err := d.applyPeers(now)
	if idsMoved {
		err = errors.Join(err, d.applyEndpoints(now))
	}
	return err
}

// choosePath decides where a peer's frames go, and keeps the path if that has not changed.
func (d *Datapath) choosePath(s *peerState, all map[mesh.PeerName]*peerState, now time.Time) {
	p, to, why := s.told, s.told.Addr, ""
	if !p.Via.IsZero() {
		to = netip.Addr{}
		if via := all[p.Via]; via == nil || via.refused != "" || !via.told.Addr.IsValid() || !via.told.Via.IsZero() {
			why = "its relay has no kernel path"
		} else {
			to = via.told.Addr
		}
	} else if !to.IsValid() {
		why = "no underlay address known"
	}
	if s.path == nil && !d.settled && !d.cfg.GuardOnly {
		d.adoptPath(s, now)
	}
	if s.path != nil {
		if s.to == to && s.Addr == p.Addr && s.Via == p.Via {
			return
		}
		if s.path.state == up && (!to.IsValid() || !p.Via.IsZero()) {
			return // not better than what works
		}
		if s.to == to && s.path.state == up {
			s.Peer = p
			return
		}
	}
	if !s.Via.IsZero() && p.Via.IsZero() {
		s.relayedUntil = now.Add(relayedFor)
	}
	s.Peer, s.to, s.path, s.refused = p, to, nil, why
	if to.IsValid() {
		s.path = newPath(now, d.cfg.MTU)
	}
}

// adoptPath takes over a path that is up in the kernel since an earlier meshd.
func (d *Datapath) adoptPath(s *peerState, now time.Time) {
	k := d.kernel.peers[s.ID]
	if k.Flags&peerUp == 0 {
		return
	}
	s.to = underlayAddr(k.To, k.Flags&peerToV6 != 0)
	s.Addr, s.Via = underlayAddr(k.From, k.Flags&peerFromV6 != 0), mesh.PeerName{}
	if k.Flags&peerRelayed != 0 {
		s.relayedUntil = now.Add(relayedFor)
	}
	s.path = newPath(now, d.cfg.MTU)
	s.path.adopt(now)
}

func first(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// SetEndpoints says which endpoints there are: all of them, those of this peer included. Of two with one
// MAC the one on this host wins, then the one whose peer has the lower name.
func (d *Datapath) SetEndpoints(all []mesh.Endpoint) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	now := time.Now()
	next := make(map[mesh.MAC]mesh.Endpoint, len(all))
	for _, e := range all {
		if e.MAC.IsZero() || e.MAC.IsMulticast() {
			continue
		}
		have, taken := next[e.MAC]
		if taken && (have.Peer == d.self || e.Peer != d.self && have.Peer.Compare(e.Peer) <= 0) {
			continue
		}
		next[e.MAC] = e
	}
	d.endpoints = next
	return d.applyEndpoints(now)
}

// AttachPort guards an interface of the bridge and gives it the kernel path, or changes what is known of
// it. It wraps ErrTooMany if the port has more than 16 IPv4 or 8 IPv6 addresses, or this host more than
// 256 networks.
func (d *Datapath) AttachPort(p Port) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	if err := d.attachPort(p); err != nil {
		return fmt.Errorf("kernel path: attach port %d: %w", p.Index, err)
	}
	return nil
}

func (d *Datapath) attachPort(p Port) error {
	if err := validPrefixes(p.Addrs); err != nil {
		return err
	}
	p.Exempt = p.Exempt || d.cfg.NoGuard
	p.Addrs = slices.Clone(p.Addrs)
	before, had := d.ports[p.Index]
	if had && d.whole[p.Index] && before.MAC == p.MAC && before.Exempt == p.Exempt && slices.Equal(before.Addrs, p.Addrs) {
		return nil // reconcile keeps it so
	}
	if _, err := portValue(p, netset{}, false); err != nil {
		return err
	}
	veth, err := isVeth(p.Index)
	if err != nil {
		return err
	}
	delete(d.whole, p.Index)
	d.ports[p.Index], d.veth[p.Index] = p, veth
	if had && before.MAC != p.MAC && !before.Exempt {
		unsettle(p.Index, before.MAC)
	}
	if err := d.applyEndpoints(time.Now()); err != nil {
		return err
	}
	if !p.Exempt {
		if err := settleInBridge(p.Index, p.MAC); err != nil {
			return err
		}
	}
	if err := d.hookPort(p.Index); err != nil {
		return err
	}
	d.whole[p.Index] = true
	return nil
}

func (d *Datapath) hookPort(index int) error {
	if _, err := d.hooks.ensure(hook{bpfProgPortOut, index}, d.obj.PortOut); err != nil {
		return err
	}
	_, err := d.hooks.ensure(hook{bpfProgPortIn, index}, d.obj.PortIn)
	return err
}

// DetachPort undoes AttachPort; an interface that is not attached or has gone is no error.
func (d *Datapath) DetachPort(index int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	if _, ok := d.ports[index]; !ok {
		return nil
	}
	return d.detachPort(index)
}

func (d *Datapath) detachPort(index int) error {
	p := d.ports[index]
	delete(d.ports, index)
	delete(d.veth, index)
	delete(d.whole, index)
	var errs []error
	for _, prog := range []string{bpfProgPortIn, bpfProgPortOut} {
		errs = append(errs, d.hooks.remove(hook{prog, index}))
	}
	if !p.Exempt {
		unsettle(index, p.MAC)
	}
	return errors.Join(append(errs, d.applyEndpoints(time.Now()))...)
}

// Ports are the ports attached now, adopted ones included.
func (d *Datapath) Ports() []Port {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]Port, 0, len(d.ports))
	for _, p := range d.ports {
		all = append(all, p)
	}
	return all
}

// Settle says that SetPeers and SetEndpoints have been given all there is: what was adopted and has not
// been named again goes. Ports go only by DetachPort or with their interface.
func (d *Datapath) Settle() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.settleLocked()
}

func (d *Datapath) settleLocked() error {
	if d.settled || d.closed {
		return nil
	}
	d.settled = true
	now := time.Now()
	return errors.Join(d.applySelf(false), d.setPeers(d.told, now), d.applyEndpoints(now))
}

// Run probes the paths and repairs what was removed, until ctx is done. Forwarding does not depend on it.
func (d *Datapath) Run(ctx context.Context) error {
	ticker := time.NewTicker(tickEvery)
	defer ticker.Stop()
	var readers sync.WaitGroup
	defer readers.Wait()
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.closeProber()
	}()
	var reconciled time.Time
	for {
		now := time.Now()
		if now.Sub(reconciled) >= reconcileEvery {
			reconciled = now
			d.reconcile()
			if p := d.renewProber(); p != nil {
				readers.Go(func() { d.receiveLoop(p) })
			}
		}
		d.tick(now)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

// renewProber opens the probe sockets if the devices are there and the sockets are not theirs yet.
func (d *Datapath) renewProber() *prober {
	d.mu.Lock()
	defer d.mu.Unlock()
	bridge, vxlan := int(d.kernel.config.Bridge), int(d.kernel.config.Vxlan)
	if d.closed || bridge == 0 || vxlan == 0 {
		d.closeProber()
		return nil
	}
	if p := d.prober; p != nil && p.bridge == bridge && p.vxlan == vxlan {
		return nil
	}
	d.closeProber()
	p, err := openProber(bridge, vxlan)
	if err != nil {
		d.note(err)
		return nil
	}
	d.prober = p
	return p
}

func (d *Datapath) closeProber() {
	if d.prober != nil {
		d.prober.close()
		d.prober = nil
	}
}

func (d *Datapath) receiveLoop(p *prober) {
	buf := make([]byte, 1<<16)
	for {
		n, err := p.receive(buf)
		if errors.Is(err, unix.ENETDOWN) {
			continue // the device went down; reconcile sets it up or closes this socket
		}
		if err != nil {
			return
		}
		if from, nonce, size, ok := parseProbe(buf[:n], d.cfg.MTU); ok {
			d.answered(time.Now(), from, nonce, size)
		}
	}
}

func (d *Datapath) answered(now time.Time, from mesh.ShortID, nonce uint64, size probeSize) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.byID[from]
	if d.closed || s == nil || s.path == nil || !s.path.answer(now, nonce, size) {
		return
	}
	d.log.Info("kernel path up", "peer", s.Name, "underlay", s.to, "rtt", s.path.rtt)
	d.note(d.applyPeers(now))
}

// tick sends the probes that are due and applies what time has changed.
func (d *Datapath) tick(now time.Time) {
	d.mu.Lock()
	prober := d.prober
	frames := d.tickLocked(now)
	d.mu.Unlock()
	if prober == nil {
		return
	}
	for _, f := range frames {
		// What cannot be sent is not answered, and that is what the path goes by.
		_ = prober.send(f)
	}
}

func (d *Datapath) tickLocked(now time.Time) (frames [][]byte) {
	if d.closed {
		return nil
	}
	if !d.settled && now.Sub(d.opened) > d.cfg.SettleAfter {
		d.note(d.settleLocked())
	}
	if now.Sub(d.stampsAt) > usedEveryRead {
		d.stampsAt = now
		d.readStamps()
	}
	mono := monotonic()
	self := mesh.ShortID(d.kernel.config.Self)
	changed := false
	for _, s := range d.peers {
		if s.path == nil || self == 0 {
			continue
		}
		wasUp := s.path.state == up
		inUse := s.used != 0 && mono-s.used < uint64(inUseFor)
		for _, size := range s.path.tick(now, inUse) {
			nonce := newNonce()
			s.path.sent(now, nonce, size)
			frames = append(frames, appendProbe(nil, self, s.ID, nonce, size, d.cfg.MTU))
		}
		if wasUp && s.path.state != up {
			changed = true
			d.log.Info("kernel path down, frames go by the userspace path", "peer", s.Name, "underlay", s.to)
		}
	}
	if changed {
		d.note(d.setPeers(d.told, now)) // perhaps there is another way to them by now
	}
	if d.announcementsDue(now) {
		d.note(d.applyEndpoints(now))
	}
	return frames
}

func monotonic() uint64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return uint64(ts.Nano())
}

// readStamps reads when frames were last sent to each peer.
func (d *Datapath) readStamps() {
	for _, s := range d.peers {
		if s.path == nil || s.path.state != up {
			continue
		}
		var v bpfPeer
		if err := d.obj.Peers.Lookup(uint32(s.ID), &v); err == nil {
			s.used = v.Used
		}
	}
}

// note logs an error of the loop once until it changes, and keeps it for the status.
func (d *Datapath) note(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != "" && text != d.fault {
		d.log.Error("kernel path", "err", err)
	}
	d.fault = text
}

// Close lets go of everything and leaves it working: frames go on as they did. It may be called twice.
func (d *Datapath) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.closeLocked()
}

func (d *Datapath) closeLocked() error {
	if d.closed {
		return nil
	}
	d.closed = true
	d.closeProber()
	if d.hooks != nil {
		d.hooks.close()
	}
	var err error
	if d.obj != nil {
		err = d.obj.Close()
	}
	return errors.Join(err, d.lock.Close())
}

// Remove closes and takes away every trace: programs, maps, pins and the vxlan device.
func (d *Datapath) Remove() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	err := d.removeLocked()
	return errors.Join(err, d.closeLocked())
}

func (d *Datapath) removeLocked() error {
	var more []hook
	for index, p := range d.ports {
		more = append(more, hook{bpfProgPortIn, index}, hook{bpfProgPortOut, index})
		if !p.Exempt {
			unsettle(index, p.MAC)
		}
	}
	c := d.kernel.config
	for _, index := range []uint32{c.Bridge, c.Tap} {
		if index != 0 {
			more = append(more, hook{bpfProgBridgeOut, int(index)})
		}
	}
	if c.Vxlan != 0 {
		more = append(more, hook{bpfProgVxIn, int(c.Vxlan)})
	}
	return errors.Join(d.hooks.removeAll(more), removeVXLAN(d.cfg.VXLAN), removePins(d.cfg.PinDir))
}

func removePins(dir string) error {
	entries, err := filepath.Glob(filepath.Join(dir, "v*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range append(entries, filepath.Join(dir, "links"), dir) {
		errs = append(errs, os.RemoveAll(e))
	}
	return errors.Join(errs...)
}

// Remove takes away every trace that a meshd with this configuration left, without one running.
func Remove(cfg Config) error {
	cfg = cfg.withDefaults()
	if _, err := os.Stat(cfg.PinDir); os.IsNotExist(err) {
		return removeVXLAN(cfg.VXLAN)
	}
	lock, err := preparePinDir(cfg.PinDir)
	if err != nil {
		return fmt.Errorf("remove kernel path: %w", err)
	}
	defer lock.Close()
	h := &hooks{dir: filepath.Join(cfg.PinDir, "links")}
	var more []hook
	if m, err := ebpf.LoadPinnedMap(filepath.Join(layoutDir(cfg.PinDir, cfg.layout), bpfMapPorts), nil); err == nil {
		var index uint32
		var v bpfPort
		for it := m.Iterate(); it.Next(&index, &v); {
			more = append(more, hook{bpfProgPortIn, int(index)}, hook{bpfProgPortOut, int(index)})
			unsettle(int(index), keyMAC(v.Mac))
		}
		m.Close()
	}
	for _, name := range []string{cfg.Bridge, cfg.TAP} {
		if index := indexOf(name); index != 0 {
			more = append(more, hook{bpfProgBridgeOut, index})
		}
	}
	return errors.Join(h.removeAll(more), removeVXLAN(cfg.VXLAN), removePins(cfg.PinDir))
}
