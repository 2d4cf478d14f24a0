package fastdp

import (
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"meshd/mesh"
)

// Each apply function computes what a map should hold from what the Datapath was told, and writes the
// difference to what it holds. Additions come before removals.

func (d *Datapath) applyConfig(c bpfConfig) error {
	if c == d.kernel.config {
		return nil
	}
	if err := d.obj.Config.Put(uint32(0), &c); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	d.kernel.config = c
	return nil
}

func (d *Datapath) applyPeers(now time.Time) error {
	want := make(map[mesh.ShortID]bpfPeer, len(d.peers))
	under := make(map[bpfUnderlayKey]uint32, len(d.peers))
	self := mesh.ShortID(d.kernel.config.Self)
	for _, s := range d.peers {
		if d.cfg.GuardOnly || s.ID == self {
			continue
		}
		if s.path == nil {
			if v := d.kernel.peers[s.ID]; s.told.Refuse == "" && !d.settled {
				v.Flags &^= peerUp // adopted: it may know a way to us while we know none to it yet
				want[s.ID] = v
			} else {
				want[s.ID] = bpfPeer{}
			}
			continue
		}
		relayed := !s.Via.IsZero() || !s.told.Via.IsZero() || now.Before(s.relayedUntil)
		p := s.Peer
		if !p.Addr.IsValid() {
			p.Addr = s.to // the way back is mostly by the same relay
		}
		v := peerValue(p, s.to, s.path.state == up, relayed)
		if s.local.Is4() && s.device != 0 && d.shortWay() {
			v.Device, v.Local = uint32(s.device), wireWords(s.local)[0]
		}
		v.Used = s.used
		want[s.ID] = v
		if s.Addr.IsValid() && s.Via.IsZero() {
			under[underlayKey(s.Addr)] = uint32(s.ID)
		}
	}
	var errs []error
	for key, id := range under {
		if have, ok := d.kernel.underlays[key]; ok && have == id {
			continue
		}
		if err := d.obj.Underlays.Put(&key, id); err != nil {
			errs = append(errs, fmt.Errorf("underlay address: %w", err))
			continue
		}
		d.kernel.underlays[key] = id
	}
	for id := mesh.ShortID(1); id < maxPeers; id++ {
		v, named := want[id]
		if !named && !d.settled && !d.cfg.GuardOnly && id != self {
			continue // adopted
		}
		same := plainPeer(v)
		if same == d.kernel.peers[id] {
			continue
		}
		if err := d.obj.Peers.Put(uint32(id), &v); err != nil {
			errs = append(errs, fmt.Errorf("peer %d: %w", id, err))
			continue
		}
		d.kernel.peers[id] = same
	}
	for key := range d.kernel.underlays {
		if _, ok := under[key]; ok || !d.settled && !d.cfg.GuardOnly {
			continue
		}
		if err := deleteKey(d.obj.Underlays, &key); err != nil {
			errs = append(errs, fmt.Errorf("underlay address: %w", err))
			continue
		}
		delete(d.kernel.underlays, key)
	}
	return errors.Join(errs...)
}

// What meshd writes, without the stamps and the state of the rate limiter, which are the programs' own.
func plainPeer(v bpfPeer) bpfPeer {
	v.Used, v.Heard, v.Whole = 0, 0, [2]uint64{}
	return v
}
func plainEndpoint(v bpfEndpoint) bpfEndpoint { v.Used = 0; return v }
func plainPort(v bpfPort) bpfPort             { v.GroupUntil = 0; return v }

func deleteKey(m *ebpf.Map, key any) error {
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}

// applyEndpoints brings networks, endpoints and ports up to date: they hang together by the numbers of
// the networks.
func (d *Datapath) applyEndpoints(now time.Time) error {
	local := make(map[netip.Prefix]bool)
	for _, p := range d.ports {
		for _, a := range p.Addrs {
			local[a.Masked()] = true
		}
	}
	for _, e := range d.endpoints {
		if e.Peer == d.self {
			for _, a := range e.Addrs {
				local[a.Masked()] = true
			}
		}
	}
	var errs []error
	_, left := d.nets.assign(local, !d.settled)
	if len(left) > 0 {
		errs = append(errs, fmt.Errorf("network %v: more than %d networks on this host: %w", left[0], maxNetworks, ErrTooMany))
	}
	// A bit that is given up must be gone from every endpoint before the map says so; one that is new may
	// be written first.
	errs = append(errs, d.applyNetworks(false))

	want := d.desiredEndpoints(now)
	if n := crowdOut(want, d.kernel.endpoints, maxForeign); n > 0 {
		errs = append(errs, fmt.Errorf("%d endpoints of other hosts beyond %d: %w", n, maxForeign, ErrTooMany))
	}
	for key, v := range want {
		if have, ok := d.kernel.endpoints[key]; ok && have == v {
			continue
		}
		if err := d.obj.Endpoints.Put(key, &v); err != nil {
			errs = append(errs, fmt.Errorf("endpoint %v: %w", keyMAC(key), err))
			continue
		}
		d.kernel.endpoints[key] = v
	}
	errs = append(errs, d.applyPorts(now))
	for key, v := range d.kernel.endpoints {
		_, named := want[key]
		if named || !d.settled && v.Flags&endpointVeth == 0 {
			continue // wanted, or adopted; the ports are known at any time
		}
		if err := deleteKey(d.obj.Endpoints, key); err != nil {
			errs = append(errs, fmt.Errorf("endpoint %v: %w", keyMAC(key), err))
			continue
		}
		delete(d.kernel.endpoints, key)
	}
	return errors.Join(append(errs, d.applyNetworks(true))...)
}

func (d *Datapath) applyNetworks(clear bool) error {
	for i, p := range d.nets.at {
		if p == d.kernel.networks[i] || p.IsValid() == clear {
			continue
		}
		v := networkValue(p)
		if err := d.obj.Networks.Put(uint32(i), &v); err != nil {
			return fmt.Errorf("network %v: %w", p, err)
		}
		d.kernel.networks[i] = p
	}
	return nil
}

func (d *Datapath) desiredEndpoints(now time.Time) map[uint64]bpfEndpoint {
	want := make(map[uint64]bpfEndpoint, len(d.endpoints)+len(d.ports))
	self := uint16(d.kernel.config.Self)
	for mac := range d.announced {
		if e, ok := d.endpoints[mac]; d.settled && (!ok || e.Peer != d.self) {
			delete(d.announced, mac)
		}
	}
	for mac, e := range d.endpoints {
		v := bpfEndpoint{Nets: d.nets.of(e.Addrs)}
		if e.Peer != d.self {
			if s := d.peers[e.Peer]; s != nil && s.ID != 0 {
				v.Peer = uint16(s.ID)
			} else if have := d.kernel.endpoints[macKey(mac)]; !d.settled {
				v.Peer = have.Peer // adopted, and its peer not named yet
			}
			want[macKey(mac)] = v
			continue
		}
		if _, told := d.announced[mac]; !told {
			d.announced[mac] = now
		}
		v.Peer, v.Flags = self, endpointLocal
		if e.Owner == mesh.OwnerExpose {
			v.Flags |= endpointHost
			v.Ifindex = d.kernel.config.Bridge
		}
		if d.isAnnounced(mac, now) {
			v.Flags |= endpointAnnounced
		}
		want[macKey(mac)] = v
	}
	for index, p := range d.ports {
		if p.MAC.IsZero() {
			continue // a foreign interface: nobody in particular is behind it
		}
		v := bpfEndpoint{Peer: self, Flags: endpointLocal, Ifindex: uint32(index), Nets: d.nets.of(p.Addrs)}
		if d.veth[index] {
			v.Flags |= endpointVeth
		}
		if d.isAnnounced(p.MAC, now) {
			v.Flags |= endpointAnnounced
		}
		want[macKey(p.MAC)] = v
	}
	return want
}

func (d *Datapath) isAnnounced(mac mesh.MAC, now time.Time) bool {
	since, told := d.announced[mac]
	return told && now.Sub(since) >= d.cfg.AnnounceDelay
}

// announcementsDue reports whether a local endpoint has become announced that the maps do not show as such.
func (d *Datapath) announcementsDue(now time.Time) bool {
	for mac := range d.announced {
		if v, ok := d.kernel.endpoints[macKey(mac)]; ok && v.Flags&endpointLocal != 0 && v.Flags&endpointAnnounced == 0 && d.isAnnounced(mac, now) {
			return true
		}
	}
	return false
}

func (d *Datapath) applyPorts(now time.Time) error {
	var errs []error
	for index, p := range d.ports {
		v, err := portValue(p, d.nets.of(p.Addrs), d.isAnnounced(p.MAC, now))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if have, ok := d.kernel.ports[uint32(index)]; ok && have == v {
			continue
		}
		if err := d.obj.Ports.Put(uint32(index), &v); err != nil {
			errs = append(errs, fmt.Errorf("port %d: %w", index, err))
			continue
		}
		d.kernel.ports[uint32(index)] = v
	}
	for index := range d.kernel.ports {
		if _, ok := d.ports[int(index)]; ok {
			continue
		}
		if err := deleteKey(d.obj.Ports, index); err != nil {
			errs = append(errs, fmt.Errorf("port %d: %w", index, err))
			continue
		}
		delete(d.kernel.ports, index)
	}
	return errors.Join(errs...)
}

func newNonce() uint64 { return rand.Uint64() }

// ones is the length of a prefix by its mask.
func ones(mask [4]uint32) (n int) {
	for _, w := range mask {
		n += bits.OnesCount32(w)
	}
	return n
}
