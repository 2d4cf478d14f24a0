package container

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"meshd/mesh"
)

// Request asks for an interface in a container.
type Request struct {
	Target           string          // id, name, pid:N or netns:PATH
	Addrs            []mesh.AddrSpec // none: an address of the default subnet
	WithoutDNS       bool            // announce no name
	RewriteHosts     bool            // put the addresses into the container's /etc/hosts
	AddHosts         []string        // further lines there, as host:address
	NoMulticastRoute bool
}

// undoTime bounds what is done after a call failed or was given up.
const undoTime = 5 * time.Second

// Attach makes sure that the target has an interface with the addresses asked for, beside those that it
// has already, and returns the former in the order of the request. Asking twice gives the same. It may wait for
// other peers until ctx ends. When it fails, nothing of it remains.
func (m *Manager) Attach(ctx context.Context, req Request) (Changed, error) {
	specs, err := wanted(req.Addrs)
	if err != nil {
		return Changed{}, err
	}
	for _, h := range req.AddHosts {
		if _, _, err := parseAddHost(h); err != nil {
			return Changed{}, err
		}
	}
	t, err := m.find(ctx, req.Target)
	if err != nil {
		return Changed{}, err
	}
	unlock, err := m.lock(ctx, t.owner)
	if err != nil {
		return Changed{}, err
	}
	defer unlock()
	return m.attachLocked(ctx, t, specs, req)
}

func wanted(specs []mesh.AddrSpec) ([]mesh.AddrSpec, error) {
	if len(specs) == 0 {
		return []mesh.AddrSpec{{Kind: mesh.AddrDefault}}, nil
	}
	for _, s := range specs {
		if s.Kind == mesh.AddrNone {
			return nil, errors.New(`address "none" attaches nothing`)
		}
	}
	return specs, nil
}

// attachLocked needs the owner's lock.
func (m *Manager) attachLocked(ctx context.Context, t target, specs []mesh.AddrSpec, req Request) (out Changed, err error) {
	old, existed := m.record(t.owner)
	r := old.clone()
	if !existed {
		r = record{Owner: t.owner, MAC: newMAC()}
	}
	if t.docker {
		r.Name, r.Names = t.name, nil
		if t.fqdn != "" {
			r.Names = []string{t.fqdn}
		}
	} else if !existed {
		r.Target = t.text
	}
	r.WithoutDNS, r.NoMulticastRoute = req.WithoutDNS, req.NoMulticastRoute
	r.RewriteHosts = r.RewriteHosts || req.RewriteHosts
	for _, h := range req.AddHosts {
		if !slices.Contains(r.AddHosts, h) {
			r.AddHosts = append(r.AddHosts, h)
		}
	}
	if err := m.checkFree(r.Owner, specs); err != nil {
		return out, err
	}
	// From here on a crash leaves a trace to clean up by.
	if err := m.keep(r.pending(specs)); err != nil {
		return out, err
	}
	var ns *os.File
	undo := func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
		defer cancel()
		m.takeBack(ctx, ns, old, existed, r)
	}
	if err := m.regainAll(ctx, &r); err != nil {
		undo()
		return Changed{}, err
	}
	for _, spec := range specs {
		a, err := m.acquire(ctx, &r, spec)
		if err != nil {
			undo()
			return Changed{}, err
		}
		if !slices.Contains(out.Addresses, a) {
			out.Addresses = append(out.Addresses, a)
		}
		out.Warnings = append(out.Warnings, m.overlap(spec)...)
	}
	m.giveUp(&r)
	var inode uint64
	if ns, inode, err = m.open(ctx, t); err != nil {
		undo()
		return Changed{}, err
	}
	defer ns.Close()
	if other := m.ownerByInode(inode); other != "" && other != r.Owner {
		o, _ := m.record(other)
		undo()
		return Changed{}, fmt.Errorf("%s: its network is attached already, as %s", r.label(), o.label())
	}
	if r.Inode, r.Boot = inode, m.boot; t.pid != 0 {
		r.Pid, r.HostsPath = t.pid, t.hosts
	}
	if !t.docker { // it may have been known by a name that is gone, or by none
		if again, err := m.reopen(r); err != nil {
			r.Target = t.text
		} else {
			again.Close()
		}
	}
	if err := m.establish(ns, old.held(), r); err != nil {
		undo()
		return Changed{}, err
	}
	return out, nil
}

// giveUp takes those addresses out of r that the allocator gave up for new ones, because somebody else has them.
func (m *Manager) giveUp(r *record) {
	have := m.cfg.Allocator.Lookup(r.Owner, netip.Prefix{})
	r.Holds = slices.DeleteFunc(r.Holds, func(h hold) bool {
		if !h.Held || containsAddr(have, h.Addr.Addr()) {
			return false
		}
		m.log.Warn("a container loses an address that somebody else has", "container", r.label(), "addr", h.Addr)
		return true
	})
}

// without is the addresses of a that are not in b.
func without(a, b []netip.Prefix) (out []netip.Prefix) {
	for _, p := range a {
		if !containsAddr(b, p.Addr()) {
			out = append(out, p)
		}
	}
	return out
}

// checkFree refuses an address that another container is known to have, here or elsewhere.
func (m *Manager) checkFree(owner string, specs []mesh.AddrSpec) error {
	for _, spec := range specs {
		if spec.Kind != mesh.AddrExact {
			continue
		}
		a := spec.Prefix.Addr()
		for _, r := range m.all() {
			i := r.has(a)
			if i < 0 || !r.Holds[i].Held {
				continue
			}
			if r.Owner != owner {
				return fmt.Errorf("address %v %w by %s", a, ErrInUse, r.label())
			}
			if r.Holds[i].Addr != spec.Prefix {
				return fmt.Errorf("address %v: %s has it as %v", spec.Prefix, r.label(), r.Holds[i].Addr)
			}
		}
		for _, e := range m.cfg.Announcer.Endpoints() {
			if e.Peer == m.cfg.Peer {
				continue // what is ours is in the records
			}
			if slices.ContainsFunc(e.Addrs, func(p netip.Prefix) bool { return p.Addr() == a }) {
				return fmt.Errorf("address %v %w by %s on peer %v (if that has gone for good: meshctl rmpeer %v)", a, ErrInUse, shortID(e.Owner), e.Peer, e.Peer)
			}
		}
	}
	return nil
}

// acquire gets the address for one specification and enters it into r.
func (m *Manager) acquire(ctx context.Context, r *record, spec mesh.AddrSpec) (a netip.Prefix, err error) {
	switch spec.Kind {
	case mesh.AddrExact:
		a, err = spec.Prefix, m.cfg.Allocator.Claim(ctx, r.Owner, spec.Prefix)
	case mesh.AddrSubnet:
		a, err = m.cfg.Allocator.Allocate(ctx, r.Owner, spec.Prefix)
	case mesh.AddrDefault:
		a, err = m.cfg.Allocator.Allocate(ctx, r.Owner, netip.Prefix{})
	default:
		err = errors.New("not an address")
	}
	if err != nil {
		return a, fmt.Errorf("address %v for %s: %w", spec, r.label(), err)
	}
	if i := r.has(a.Addr()); i >= 0 {
		r.Holds[i].Addr, r.Holds[i].Held = a, true
		return a, nil
	}
	r.Holds = append(r.Holds, hold{Spec: spec.String(), Addr: a, Held: true})
	return a, nil
}

// establish makes everything outside the allocator agree with r, which had the former addresses. A container's process may run from the
// moment when its interface is there, so all that it sees of itself comes before.
func (m *Manager) establish(ns *os.File, former []netip.Prefix, r record) error {
	if err := m.keep(r); err != nil {
		return err
	}
	m.rewriteHosts(r)
	m.announce(r)
	err := m.cfg.Network.AttachPort(ns, mesh.Port{
		Owner: r.Owner, MAC: r.MAC, Addrs: r.held(), NoMulticastRoute: r.NoMulticastRoute,
	})
	if err != nil {
		m.cfg.Announcer.Withdraw(r.Owner, r.MAC)
		return err
	}
	if gone := without(former, r.held()); len(gone) > 0 {
		if err := m.cfg.Network.RemoveAddrs(ns, r.Owner, gone); err != nil {
			return err
		}
	}
	m.mu.Lock()
	delete(m.dead, r.Owner)
	m.mu.Unlock()
	return nil
}

// rewriteHosts puts the addresses into the container's /etc/hosts if that is wanted. A container without
// the file, or with a read-only one, is attached all the same.
func (m *Manager) rewriteHosts(r record) {
	if !r.RewriteHosts || r.Pid == 0 {
		return
	}
	err := m.writeHosts(r)
	if errors.Is(err, os.ErrNotExist) { // it has none, or has ended
		m.log.Debug("no /etc/hosts to write", "container", r.label(), "err", err)
	} else if err != nil {
		m.log.Warn("cannot write the container's /etc/hosts", "container", r.label(), "err", err)
	}
}

// takeBack undoes what led from old to r.
func (m *Manager) takeBack(ctx context.Context, ns *os.File, old record, existed bool, r record) {
	var fresh []netip.Prefix
	for _, h := range r.Holds {
		if i := old.has(h.Addr.Addr()); i < 0 || !old.Holds[i].Held {
			fresh = append(fresh, h.Addr)
		}
	}
	var errs []error
	live := existed && len(old.held()) > 0
	if !live {
		errs = append(errs, m.cfg.Network.DetachPort(r.Owner))
	} else if ns != nil {
		errs = append(errs, m.cfg.Network.RemoveAddrs(ns, r.Owner, fresh))
	}
	if back := old.clone(); ns != nil && r.RewriteHosts {
		back.RewriteHosts, back.Names = true, r.Names
		back.Pid, back.Inode, back.Boot = r.Pid, r.Inode, r.Boot
		if !old.RewriteHosts {
			back.Holds, back.AddHosts = nil, nil
		}
		m.rewriteHosts(back)
	}
	for _, a := range fresh {
		errs = append(errs, m.cfg.Allocator.Release(ctx, r.Owner, a.Addr()))
	}
	if existed {
		errs = append(errs, m.keep(old))
		if live {
			m.announce(old)
		}
	} else {
		m.cfg.Announcer.Withdraw(r.Owner, r.MAC)
		errs = append(errs, m.forget(r.Owner))
	}
	if err := errors.Join(errs...); err != nil {
		m.log.Warn("taking back an attachment that failed", "container", r.label(), "err", err)
	}
}

// overlap warns of an address that was asked for by itself and hides a route of the host.
func (m *Manager) overlap(spec mesh.AddrSpec) []string {
	if m.cfg.CheckOverlap == nil || spec.Kind != mesh.AddrExact {
		return nil
	}
	if err := m.cfg.CheckOverlap(spec.Prefix.Masked()); err != nil {
		return []string{err.Error()}
	}
	return nil
}

// parseAddHost reads host:address.
func parseAddHost(s string) (host string, a netip.Addr, err error) {
	host, text, ok := strings.Cut(s, ":")
	a, perr := netip.ParseAddr(text)
	if !ok || perr != nil || host == "" || len(host) > 253 || strings.ContainsAny(host, " \t\r\n#") {
		return "", a, fmt.Errorf("host entry %q: want host:address", s)
	}
	return host, a, nil
}
