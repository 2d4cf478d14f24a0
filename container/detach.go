package container

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"meshd/mesh"
)

// Detach takes addresses from the target, and its interface with the last one. Without specs these are
// its addresses of the default subnet, or all of them when there is no such subnet. It never allocates,
// never waits for other peers, and needs Docker only to learn an id from a name it has not seen.
func (m *Manager) Detach(ctx context.Context, text string, specs []mesh.AddrSpec) (Changed, error) {
	specs, err := wanted(specs)
	if err != nil {
		return Changed{}, err
	}
	if text == mesh.OwnerExpose {
		return Changed{}, fmt.Errorf("%s %w: see hide", text, ErrNotAttached)
	}
	owner, err := m.locate(ctx, text)
	if err != nil {
		return Changed{}, err
	}
	unlock, err := m.lock(ctx, owner)
	if err != nil {
		return Changed{}, err
	}
	defer unlock()
	r, ok := m.record(owner)
	if !ok || len(r.Holds) == 0 {
		return Changed{}, fmt.Errorf("%s %w", text, ErrNotAttached)
	}
	gone, err := m.pick(r, specs)
	if err != nil {
		return Changed{}, fmt.Errorf("%s: %w", text, err)
	}
	return Changed{Addresses: gone}, m.detachLocked(ctx, r, gone)
}

// pick chooses the addresses of r that specs are about; each must find one.
func (m *Manager) pick(r record, specs []mesh.AddrSpec) (out []netip.Prefix, err error) {
	for _, spec := range specs {
		n := len(out)
		for _, h := range r.Holds {
			if h.Addr.IsValid() && m.matches(spec, h) && !slices.Contains(out, h.Addr) {
				out = append(out, h.Addr)
			}
		}
		if len(out) == n {
			var all []string
			for _, h := range r.Holds {
				if h.Addr.IsValid() {
					all = append(all, h.Addr.String())
				}
			}
			return nil, fmt.Errorf("%w with %v; it has %v", ErrNotAttached, spec, all)
		}
	}
	return out, nil
}

func (m *Manager) matches(spec mesh.AddrSpec, h hold) bool {
	subnet := spec.Prefix
	switch spec.Kind {
	case mesh.AddrExact:
		return h.Addr.Addr() == spec.Prefix.Addr()
	case mesh.AddrDefault:
		subnet = m.cfg.Allocator.DefaultSubnet()
		if !subnet.IsValid() {
			return true // without address management there is nothing to tell them apart by
		}
	}
	return h.Addr.Masked() == subnet
}

// detachLocked needs the owner's lock.
func (m *Manager) detachLocked(ctx context.Context, r record, gone []netip.Prefix) error {
	left := r.clone()
	left.Holds = slices.DeleteFunc(left.Holds, func(h hold) bool { return slices.Contains(gone, h.Addr) })
	last := len(left.Holds) == 0
	// The kernel first: what is interrupted here is attached in full again by the next run.
	if last {
		if err := m.cfg.Network.DetachPort(r.Owner); err != nil {
			return err
		}
		m.cfg.Announcer.Withdraw(r.Owner, r.MAC)
		if ns, err := m.reopen(r); err == nil {
			m.rewriteHosts(left)
			ns.Close()
		}
	} else {
		ns, err := m.reopen(r)
		if err == nil {
			err = m.cfg.Network.RemoveAddrs(ns, r.Owner, gone)
			ns.Close()
			if err != nil {
				return err
			}
			m.rewriteHosts(left)
		} else if has, err := m.hasPort(r.Owner); err != nil {
			return err
		} else if has { // and with it the addresses, which others must not be given
			return fmt.Errorf("%s: what names its network is gone, so it cannot lose single addresses: detach all, or attach it by another name first", r.label())
		}
		m.announceIfAlive(left)
	}
	var errs []error
	for _, a := range gone {
		errs = append(errs, m.cfg.Allocator.Release(ctx, r.Owner, a.Addr()))
	}
	if last {
		errs = append(errs, m.forget(r.Owner))
	} else {
		errs = append(errs, m.keep(left))
	}
	return errors.Join(errs...)
}

func (m *Manager) announceIfAlive(r record) {
	if !m.isDead(r.Owner) {
		m.announce(r)
	}
}
