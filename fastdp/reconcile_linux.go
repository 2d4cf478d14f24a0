package fastdp

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

const (
	filterRounds = 3   // every so many rounds the filters of ports are looked at
	looksAtOnce  = 512 // entries of a map that one round compares; a lookup takes 1 µs
)

// reconcile puts back what somebody removed: devices, hooks, pins and what is in the maps.
func (d *Datapath) reconcile() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed {
		d.note("repair", d.reconcileLocked())
	}
}

func (d *Datapath) reconcileLocked() error {
	var errs []error
	errs = append(errs, d.repairPins())
	c := d.kernel.config
	c.Flags = configRelay
	if d.cfg.NoRelay {
		c.Flags = 0
	}
	c.GroupInterval = uint64(time.Second) / uint64(d.cfg.GroupRate)
	c.GroupBurst = c.GroupInterval * uint64(d.cfg.GroupBurst)
	c.Bridge, c.Tap = uint32(indexOf(d.cfg.Bridge)), uint32(indexOf(d.cfg.TAP))
	before := c.Vxlan
	if c.Vxlan = 0; !d.cfg.GuardOnly {
		// Without it the ports are guarded all the same, and the paths say why they are not up.
		index, err := ensureVXLAN(d.cfg.VXLAN, d.cfg.Port, d.cfg.MTU)
		c.Vxlan = uint32(index)
		d.note("vxlan", err)
	} else {
		c.Self = 0
	}
	if c.Vxlan != 0 {
		_, err := d.hooks.ensure(hook{bpfProgVxIn, int(c.Vxlan)}, d.obj.VxIn)
		errs = append(errs, err)
	}
	if before != 0 && before != c.Vxlan {
		errs = append(errs, d.hooks.remove(hook{bpfProgVxIn, int(before)}))
	}
	moved := c.Bridge != d.kernel.config.Bridge
	errs = append(errs, d.applyConfig(c))
	if moved {
		errs = append(errs, d.applyEndpoints(time.Now()))
	}
	for _, index := range []uint32{c.Bridge, c.Tap} {
		if index != 0 {
			_, err := d.hooks.ensure(hook{bpfProgBridgeOut, int(index)}, d.obj.BridgeOut)
			errs = append(errs, err)
		}
	}
	errs = append(errs, d.reconcileShortWay(time.Now()), d.restoreMaps())
	// Filters cost a listing each to look at, links next to nothing. The bridge carries frames meanwhile.
	d.rounds++
	if d.hooks.clsact && d.rounds%filterRounds != 1 {
		return errors.Join(errs...)
	}
	for index := range d.ports {
		err := d.hookPort(index)
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) && indexGone(index) {
			err = d.detachPort(index)
		}
		errs = append(errs, err)
	}
	for _, h := range d.hooks.pinned() {
		if !d.wanted(h) {
			errs = append(errs, d.hooks.remove(h))
		}
	}
	return errors.Join(errs...)
}

func (d *Datapath) wanted(h hook) bool {
	c := d.kernel.config
	switch h.program {
	case bpfProgVxIn:
		return h.ifindex == int(c.Vxlan)
	case bpfProgUnderIn:
		return !d.settled || d.underlayDevices()[h.ifindex]
	case bpfProgJoinedIn:
		return h.ifindex == d.joined && d.shortWay()
	case bpfProgBridgeOut:
		return h.ifindex == int(c.Bridge) || h.ifindex == int(c.Tap)
	}
	_, ok := d.ports[h.ifindex]
	return ok
}

// restoreMaps writes again what somebody changed in the maps by hand. Of a large one each round compares a part,
// another one each time.
func (d *Datapath) restoreMaps() error {
	k := &d.kernel
	config := func(yield func(uint32, bpfConfig) bool) { yield(0, k.config) }
	peers := func(yield func(uint32, bpfPeer) bool) {
		for id := range d.byID {
			if !yield(uint32(id), k.peers[id]) {
				return
			}
		}
	}
	return errors.Join(
		restore(d, d.obj.Config, bpfMapConfig, config, func(v bpfConfig) bpfConfig { return v }),
		restore(d, d.obj.Peers, bpfMapPeers, peers, plainPeer),
		restore(d, d.obj.Underlays, bpfMapUnderlays, maps.All(k.underlays), func(v uint32) uint32 { return v }),
		restore(d, d.obj.Endpoints, bpfMapEndpoints, maps.All(k.endpoints), plainEndpoint),
		restore(d, d.obj.Ports, bpfMapPorts, maps.All(k.ports), plainPort),
	)
}

func restore[K, V comparable](d *Datapath, m *ebpf.Map, name string, want iter.Seq2[K, V], plain func(V) V) error {
	var key K
	var have V
	looked, wrong := 0, 0
	for k, v := range want {
		if looked++; looked > looksAtOnce {
			break
		}
		key = k
		if err := m.Lookup(&key, &have); err == nil && plain(have) == v {
			continue
		} else if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("map %s: %w", name, err)
		}
		wrong++
		have = v
		if err := m.Put(&key, &have); err != nil {
			return fmt.Errorf("map %s: %w", name, err)
		}
	}
	if wrong > 0 {
		d.log.Warn("kernel path: what somebody changed in a map is put back", "map", name, "entries", wrong)
	}
	return nil
}
