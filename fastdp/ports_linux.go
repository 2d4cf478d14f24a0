package fastdp

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
)

// AttachPort guards an interface of the bridge and gives it the kernel path, or changes what is known of
// it. It wraps ErrTooMany if the port has more than 16 IPv4 or 8 IPv6 addresses, or this host more than
// 256 networks.
func (d *Datapath) AttachPort(p Port) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	err := d.attachPort(p)
	if err == nil {
		return nil
	}
	// A container that ended meanwhile took its interface along: then nothing of the port may stay.
	if _, lookup := netlink.LinkByIndex(p.Index); errors.As(lookup, new(netlink.LinkNotFoundError)) {
		return d.detachPort(p.Index)
	}
	return fmt.Errorf("kernel path: attach port %d: %w", p.Index, err)
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
	for index, other := range d.ports {
		if index == p.Index || other.MAC != p.MAC || p.MAC.IsZero() {
			continue
		}
		// A container that was attached anew: its former interface is about to go, or has gone.
		if err := d.detachPort(index); err != nil {
			return err
		}
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
