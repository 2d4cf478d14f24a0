package fastdp

import (
	"errors"
	"net/netip"
	"os"
	"time"
)

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
		k.peers[i] = plainPeer(k.peers[i])
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
		k.endpoints[mac] = plainEndpoint(e)
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
		k.ports[index] = plainPort(p)
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
