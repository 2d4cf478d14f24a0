package container

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"meshd/mesh"
)

// ExposeRequest gives the host addresses on the bridge.
type ExposeRequest struct {
	Addrs             []mesh.AddrSpec // none: an address of the default subnet
	FQDN              string          // a name for the host; "" for none
	WithoutMasquerade bool
}

// Expose gives the host the addresses asked for, beside those that it has, and lets their subnets
// through the firewall. With another name it adds the name.
func (m *Manager) Expose(ctx context.Context, req ExposeRequest) (out Changed, err error) {
	specs, err := wanted(req.Addrs)
	if err != nil {
		return out, err
	}
	unlock, err := m.lock(ctx, mesh.OwnerExpose)
	if err != nil {
		return out, err
	}
	defer unlock()
	old, existed := m.record(mesh.OwnerExpose)
	r := old.clone()
	r.Owner = mesh.OwnerExpose
	if r.MAC, _, err = m.cfg.Bridge.Bridge(); err != nil {
		return out, err
	}
	if req.FQDN != "" {
		name := strings.ToLower(strings.TrimSuffix(req.FQDN, ".")) + "."
		if !m.inDomain(name) {
			out.Warnings = append(out.Warnings, fmt.Sprintf("name %s is not in the domain %s and is ignored", req.FQDN, m.cfg.Domain))
		} else if !slices.Contains(r.Names, name) {
			r.Names = append(r.Names, name)
			slices.Sort(r.Names)
		}
	}
	if err := m.checkFree(r.Owner, specs); err != nil {
		return Changed{}, err
	}
	if err := m.keep(r.pending(specs)); err != nil {
		return Changed{}, err
	}
	if err = m.regainAll(ctx, &r); err != nil {
		specs = nil
	}
	for _, spec := range specs {
		var a netip.Prefix
		if a, err = m.acquire(ctx, &r, spec); err != nil {
			break
		}
		r.Holds[r.has(a.Addr())].Masquerade = !req.WithoutMasquerade
		if !slices.Contains(out.Addresses, a) {
			out.Addresses = append(out.Addresses, a)
		}
		out.Warnings = append(out.Warnings, m.overlap(spec)...)
	}
	if err == nil {
		m.giveUp(&r)
		for _, a := range without(old.held(), r.held()) {
			err = errors.Join(err, m.unexpose(ctx, a))
		}
	}
	if err == nil {
		err = m.establishExposed(r)
	}
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
		defer cancel()
		m.takeBackExposed(ctx, old, existed, r)
		return Changed{}, err
	}
	return out, nil
}

func (m *Manager) establishExposed(r record) error {
	if err := m.keep(r); err != nil {
		return err
	}
	if err := m.cfg.Bridge.AddBridgeAddrs(r.held()...); err != nil {
		return err
	}
	if m.cfg.Firewall != nil {
		for _, h := range r.Holds {
			if !h.Held {
				continue
			}
			if err := m.cfg.Firewall.Expose(h.Addr, h.Masquerade); err != nil {
				return fmt.Errorf("firewall for %v: %w", h.Addr, err)
			}
		}
	}
	m.announce(r)
	return nil
}

func (m *Manager) takeBackExposed(ctx context.Context, old record, existed bool, r record) {
	var errs []error
	for _, h := range r.Holds {
		if i := old.has(h.Addr.Addr()); i >= 0 && old.Holds[i].Held {
			continue
		}
		errs = append(errs, m.unexpose(ctx, h.Addr))
	}
	if existed {
		errs = append(errs, m.keep(old))
		m.announce(old)
	} else {
		m.cfg.Announcer.Withdraw(r.Owner, r.MAC)
		errs = append(errs, m.forget(r.Owner))
	}
	if err := errors.Join(errs...); err != nil {
		m.log.Warn("taking back an expose that failed", "err", err)
	}
}

// unexpose takes one address from firewall, bridge and allocator.
func (m *Manager) unexpose(ctx context.Context, a netip.Prefix) error {
	var errs []error
	if m.cfg.Firewall != nil {
		errs = append(errs, m.cfg.Firewall.Hide(a))
	}
	errs = append(errs, m.cfg.Bridge.RemoveBridgeAddrs(a))
	errs = append(errs, m.cfg.Allocator.Release(ctx, mesh.OwnerExpose, a.Addr()))
	return errors.Join(errs...)
}

// Hide takes the host's addresses back; without specs, those of the default subnet. What is not exposed
// is no error and not in the answer.
func (m *Manager) Hide(ctx context.Context, specs []mesh.AddrSpec) (out Changed, err error) {
	if specs, err = wanted(specs); err != nil {
		return out, err
	}
	unlock, err := m.lock(ctx, mesh.OwnerExpose)
	if err != nil {
		return out, err
	}
	defer unlock()
	r, ok := m.record(mesh.OwnerExpose)
	if !ok {
		return out, nil
	}
	for _, spec := range specs {
		for _, h := range r.Holds {
			if h.Addr.IsValid() && m.matches(spec, h) && !slices.Contains(out.Addresses, h.Addr) {
				out.Addresses = append(out.Addresses, h.Addr)
			}
		}
	}
	if len(out.Addresses) == 0 {
		return out, nil
	}
	left := r.clone()
	left.Holds = slices.DeleteFunc(left.Holds, func(h hold) bool { return slices.Contains(out.Addresses, h.Addr) })
	var errs []error
	for _, a := range out.Addresses {
		errs = append(errs, m.unexpose(ctx, a))
	}
	if len(left.Holds) == 0 {
		m.cfg.Announcer.Withdraw(r.Owner, r.MAC)
		errs = append(errs, m.forget(r.Owner))
	} else {
		errs = append(errs, m.keep(left))
		m.announce(left)
	}
	return out, errors.Join(errs...)
}

// exposeAgain restores what a restart of host or meshd took away.
func (m *Manager) exposeAgain(ctx context.Context, r record) error {
	if err := m.dropPending(ctx, &r); err != nil {
		return err
	}
	if len(r.Holds) == 0 {
		m.cfg.Announcer.Withdraw(r.Owner, r.MAC)
		if err := m.cfg.Allocator.ReleaseAll(ctx, r.Owner); err != nil {
			return err
		}
		return m.forget(r.Owner)
	}
	mac, _, err := m.cfg.Bridge.Bridge()
	if err != nil {
		return err
	}
	if mac != r.MAC {
		m.cfg.Announcer.Withdraw(r.Owner, r.MAC)
		r.MAC = mac
	}
	former := r.held()
	ctx, cancel := context.WithTimeout(ctx, regainTime)
	defer cancel()
	if err := m.regainAll(ctx, &r); err != nil {
		return err
	}
	for _, a := range without(former, r.held()) {
		if err := m.unexpose(ctx, a); err != nil {
			return err
		}
	}
	return m.establishExposed(r)
}

// Exposed lists the exposed addresses that are remembered, and whether they are masqueraded.
func (m *Manager) Exposed() map[netip.Prefix]bool {
	out := map[netip.Prefix]bool{}
	r, _ := m.record(mesh.OwnerExpose)
	for _, h := range r.Holds {
		if h.Held {
			out[h.Addr] = h.Masquerade
		}
	}
	return out
}
