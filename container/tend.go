package container

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"meshd/container/docker"
	"meshd/mesh"
)

const (
	lookAgain  = 10 * time.Second // how often the ports in the kernel are compared with the records, and Docker is asked that did not answer
	firstRetry = 2 * time.Second  // after a failure to attach again, doubled each time
	lastRetry  = time.Minute
	regainTime = 20 * time.Second // for getting the addresses of one container back; then others may work on it
	claimTime  = 2 * time.Second  // for trying to get a former address back before another is taken
)

// Run adopts what is attached already, and then keeps it so: it hears from Docker who starts and ends,
// and looks at the kernel now and then. It returns when ctx ends. It waits for nobody at the start.
func (m *Manager) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	m.mu.Lock()
	m.runCtx, m.running = ctx, &running
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.running = nil
		m.mu.Unlock()
	}()

	if err := m.adopt(); err != nil {
		return err
	}
	if m.cfg.Docker != nil {
		running.Go(func() { m.cfg.Docker.Watch(ctx, m.hear) })
	}
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			m.Recheck()
		}
	}
}

// adopt takes over what the kernel has: live ports are announced at once, those without a record get one.
func (m *Manager) adopt() error {
	ports, err := m.cfg.Network.Ports()
	if err != nil {
		return fmt.Errorf("adopt attached containers: %w", err)
	}
	live := map[string][]netip.Prefix{}
	for _, p := range ports {
		if p.Owner == "" || p.MAC.IsZero() {
			continue
		}
		r, ok := m.record(p.Owner)
		if !ok {
			r = record{Owner: p.Owner, MAC: p.MAC, Boot: m.boot, NoMulticastRoute: p.NoMulticastRoute}
			for _, a := range p.Addrs {
				r.Holds = append(r.Holds, hold{Spec: "ip:" + a.String(), Addr: a, Held: true})
			}
			if value, err := r.marshal(); err != nil || !readable(value) {
				m.log.Warn("a port in the kernel has addresses that cannot be ours", "container", shortID(p.Owner), "addr", p.Addrs)
				continue
			}
			m.log.Warn("found a port that nobody remembers", "container", shortID(p.Owner), "addr", p.Addrs)
			if err := m.keep(r); err != nil {
				return err
			}
		}
		if held := r.held(); len(held) > 0 {
			live[p.Owner] = held
			m.announce(r)
		}
	}
	if r, ok := m.record(mesh.OwnerExpose); ok {
		live[mesh.OwnerExpose] = r.held()
	}
	if m.cfg.Reclaim != nil {
		m.cfg.Reclaim(live)
		close(m.adopted)
	}
	for _, r := range m.all() {
		m.tend(r.Owner)
	}
	return nil
}

func readable(record []byte) bool {
	_, err := parseRecord(record)
	return err == nil
}

// hear is told by Docker what happened; it looks for itself.
func (m *Manager) hear(e docker.Event) {
	switch e.Kind {
	case docker.Connected:
		for _, r := range m.all() {
			if !isNamespaceOwner(r.Owner) && r.Owner != mesh.OwnerExpose {
				m.tend(r.Owner)
			}
		}
		if m.cfg.Wanted != nil {
			m.tend(wantedOwner)
		}
	case docker.Started, docker.Died, docker.Destroyed:
		if _, ok := m.record(e.ID); ok || m.cfg.Wanted != nil && e.Kind == docker.Started {
			m.tend(e.ID)
		}
	}
}

// wantedOwner stands, where an owner is tended, for all containers that are wanted and not known.
const wantedOwner = "wanted"

// lookForWanted tends the running containers that may be wanted.
func (m *Manager) lookForWanted(ctx context.Context) (next time.Duration, err error) {
	ids, err := m.cfg.Docker.Running(ctx, m.cfg.WantedLabel)
	if errors.Is(err, docker.ErrUnavailable) {
		return lookAgain, nil
	}
	for _, id := range ids {
		m.tend(id)
	}
	return 0, err
}

// lookUnknown attaches a container that nobody asked to attach, if it is wanted.
func (m *Manager) lookUnknown(ctx context.Context, id string) (next time.Duration, err error) {
	if m.cfg.Docker == nil || m.cfg.Wanted == nil || isNamespaceOwner(id) || id == mesh.OwnerExpose {
		return 0, nil
	}
	c, err := m.cfg.Docker.Container(ctx, id)
	if errors.Is(err, docker.ErrUnavailable) {
		return lookAgain, nil
	}
	if errors.Is(err, docker.ErrNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	req, ok := m.cfg.Wanted(c)
	if !ok || !c.State.Running {
		return 0, nil
	}
	specs, err := wanted(req.Addrs)
	if err != nil {
		return 0, nil // it says itself that it stays off
	}
	t, err := m.runningTarget(c)
	if err != nil {
		return 0, nil
	}
	short, cancel := context.WithTimeout(ctx, regainTime)
	defer cancel()
	_, err = m.attachLocked(short, t, specs, req)
	if errors.Is(err, ErrNotRunning) {
		return 0, nil
	}
	return 0, err
}

// Recheck compares the records with the ports in the kernel and sees to those that differ. The watcher
// of the bridge may call it when ports vanish; it does not block.
func (m *Manager) Recheck() {
	ports, err := m.cfg.Network.Ports()
	if err != nil {
		m.log.Warn("cannot list ports", "err", err)
		return
	}
	there := map[string]bool{}
	for _, p := range ports {
		there[p.Owner] = true
	}
	if _, addrs, err := m.cfg.Bridge.Bridge(); err == nil {
		r, _ := m.record(mesh.OwnerExpose)
		there[mesh.OwnerExpose] = !slices.ContainsFunc(r.held(), func(a netip.Prefix) bool { return !slices.Contains(addrs, a) })
	}
	for _, r := range m.all() {
		if !there[r.Owner] && (isNamespaceOwner(r.Owner) || !m.isDead(r.Owner)) { // Docker tells when the dead rise
			m.tend(r.Owner)
		}
	}
}

func (m *Manager) isDead(owner string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, dead := m.dead[owner]
	return dead
}

// tend makes a goroutine look after an owner until there is nothing to do, or tells the one that does.
func (m *Manager) tend(owner string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.running == nil || m.runCtx.Err() != nil {
		return
	}
	again := m.tenders[owner]
	if again == nil {
		again = make(chan struct{}, 1)
		m.tenders[owner] = again
		ctx := m.runCtx
		m.running.Go(func() { m.tendLoop(ctx, owner, again) })
		return
	}
	select {
	case again <- struct{}{}:
	default: // told already
	}
}

func (m *Manager) tendLoop(ctx context.Context, owner string, again chan struct{}) {
	retry := firstRetry
	for {
		next, err := m.look(ctx, owner)
		if err != nil && ctx.Err() == nil {
			m.log.Warn("cannot attach again; trying later", "container", shortID(owner), "err", err, "in", retry)
			next, retry = retry, min(2*retry, lastRetry)
		} else {
			retry = firstRetry
		}
		m.mu.Lock()
		told := len(again) > 0
		if ctx.Err() != nil || next == 0 && !told {
			delete(m.tenders, owner)
			m.mu.Unlock()
			return
		}
		m.mu.Unlock()
		if told {
			<-again
			continue
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
		case <-again:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// look brings one owner to where it should be, and says when to look again; zero means when something happens.
func (m *Manager) look(ctx context.Context, owner string) (next time.Duration, err error) {
	if owner == wantedOwner {
		return m.lookForWanted(ctx)
	}
	unlock, err := m.lock(ctx, owner)
	if err != nil {
		return 0, err
	}
	defer unlock()
	r, ok := m.record(owner)
	if !ok {
		return m.lookUnknown(ctx, owner)
	}
	if owner == mesh.OwnerExpose {
		return 0, m.exposeAgain(ctx, r)
	}
	if err := m.dropPending(ctx, &r); err != nil {
		return 0, err
	}
	if len(r.Holds) == 0 {
		return 0, m.bury(ctx, r)
	}
	if isNamespaceOwner(owner) {
		return m.lookNamespace(ctx, r)
	}
	return m.lookContainer(ctx, r)
}

func (m *Manager) lookContainer(ctx context.Context, r record) (next time.Duration, err error) {
	if m.cfg.Docker == nil {
		return 0, nil
	}
	c, err := m.cfg.Docker.Container(ctx, r.Owner)
	switch {
	case errors.Is(err, docker.ErrUnavailable):
		return lookAgain, nil
	case errors.Is(err, docker.ErrNotFound):
		return 0, m.bury(ctx, r)
	case err != nil:
		return 0, err
	}
	t, err := m.runningTarget(c)
	if errors.Is(err, ErrNotRunning) {
		return m.mourn(ctx, r)
	}
	if err != nil { // its network is another's since it was made anew under the same id; cannot be
		return 0, m.bury(ctx, r)
	}
	ns, inode, err := m.open(ctx, t)
	if errors.Is(err, ErrNotRunning) {
		return m.mourn(ctx, r)
	}
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	r.Name, r.Pid, r.HostsPath, r.Inode, r.Boot = t.name, t.pid, t.hosts, inode, m.boot
	r.Names = nil
	if t.fqdn != "" {
		r.Names = []string{t.fqdn}
	}
	return 0, m.attachAgain(ctx, ns, r)
}

func (m *Manager) lookNamespace(ctx context.Context, r record) (next time.Duration, err error) {
	ns, err := m.reopen(r)
	if err != nil && strings.HasPrefix(r.Target, "netns:") { // made anew under its path
		var t target
		if t, err = m.find(ctx, r.Target); err == nil && t.owner == r.Owner {
			ns, r.Inode, err = m.openNamespace(t.path)
			r.Boot = m.boot
		} else if err == nil {
			err = os.ErrNotExist // another's now
		}
	}
	if err == nil {
		defer ns.Close()
		return 0, m.attachAgain(ctx, ns, r)
	}
	// Whoever is inside may live on without the path or process that named it: the port tells.
	ports, err := m.cfg.Network.Ports()
	if err != nil {
		return 0, err
	}
	for _, p := range ports {
		if p.Owner == r.Owner {
			m.announce(r)
			return 0, nil
		}
	}
	return m.mourn(ctx, r)
}

// attachAgain gets the addresses of r back and makes the port.
func (m *Manager) attachAgain(ctx context.Context, ns *os.File, r record) error {
	short, cancel := context.WithTimeout(ctx, regainTime)
	defer cancel()
	former := r.held()
	if err := m.regainAll(short, &r); err != nil {
		return err
	}
	return m.establish(ns, former, r)
}

// dropPending takes an attach back that was killed while it waited for addresses.
func (m *Manager) dropPending(ctx context.Context, r *record) error {
	for i := 0; i < len(r.Holds); {
		if r.Holds[i].Addr.IsValid() {
			i++
			continue
		}
		spec, err := mesh.ParseAddrSpec(r.Holds[i].Spec)
		if err != nil {
			return err
		}
		r.Holds = slices.Delete(r.Holds, i, i+1)
		subnet := spec.Prefix.Masked()
		if spec.Kind == mesh.AddrDefault {
			subnet = m.cfg.Allocator.DefaultSubnet()
		}
		for _, a := range m.cfg.Allocator.Lookup(r.Owner, subnet) {
			mine := spec.Kind != mesh.AddrExact || a.Addr() == spec.Prefix.Addr()
			if mine && r.has(a.Addr()) < 0 {
				if err := m.cfg.Allocator.Release(ctx, r.Owner, a.Addr()); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// regainAll gets those addresses of r back that the allocator does not have for it any more.
func (m *Manager) regainAll(ctx context.Context, r *record) error {
	have := m.cfg.Allocator.Lookup(r.Owner, netip.Prefix{})
	for i := range r.Holds {
		h := &r.Holds[i]
		if h.Held && containsAddr(have, h.Addr.Addr()) {
			continue
		}
		former := h.Addr
		if err := m.regain(ctx, *r, h); err != nil {
			return err
		}
		if former != h.Addr {
			m.log.Warn("a container comes back with another address", "container", r.label(), "addr", h.Addr, "former", former)
		}
	}
	return nil
}

func containsAddr(list []netip.Prefix, a netip.Addr) bool {
	for _, p := range list {
		if p.Addr() == a {
			return true
		}
	}
	return false
}

// regain gets one address back: the same if it can be had, else one of the same subnet if it was not
// asked for by itself.
func (m *Manager) regain(ctx context.Context, r record, h *hold) error {
	spec, err := mesh.ParseAddrSpec(h.Spec)
	if err != nil {
		return err
	}
	if h.Addr.IsValid() && spec.Kind != mesh.AddrExact {
		quick, cancel := context.WithTimeout(ctx, claimTime)
		err := m.cfg.Allocator.Claim(quick, r.Owner, h.Addr)
		cancel()
		if err == nil {
			h.Held = true
			return nil
		}
	}
	one := record{Owner: r.Owner, Name: r.Name, Target: r.Target}
	a, err := m.acquire(ctx, &one, spec)
	if err != nil {
		return err
	}
	h.Addr, h.Held = a, true
	return nil
}

// mourn notes that an owner is gone. Its names end now, its addresses after the grace time unless it
// comes back; a container's record stays, for it may be started again.
func (m *Manager) mourn(ctx context.Context, r record) (next time.Duration, err error) {
	m.mu.Lock()
	since, known := m.dead[r.Owner]
	if !known {
		since = time.Now()
		m.dead[r.Owner] = since
	}
	m.mu.Unlock()
	if !known {
		m.log.Info("attached container is gone", "container", r.label())
	}
	m.cfg.Announcer.Withdraw(r.Owner, r.MAC)
	if err := m.cfg.Network.DetachPort(r.Owner); err != nil {
		return 0, err
	}
	if left := m.cfg.Grace - time.Since(since); left > 0 {
		return left, nil
	}
	if isNamespaceOwner(r.Owner) {
		return 0, m.bury(ctx, r)
	}
	// The allocator may have more than the record, which could not be written.
	if len(r.held()) == 0 && len(m.cfg.Allocator.Lookup(r.Owner, netip.Prefix{})) == 0 {
		return 0, nil
	}
	if err := m.cfg.Allocator.ReleaseAll(ctx, r.Owner); err != nil {
		return 0, fmt.Errorf("release the addresses of %s: %w", r.label(), err)
	}
	for i := range r.Holds {
		r.Holds[i].Held = false
	}
	return 0, m.keep(r)
}

// bury removes all traces of an owner that will not come back.
func (m *Manager) bury(ctx context.Context, r record) error {
	m.cfg.Announcer.Withdraw(r.Owner, r.MAC)
	if err := m.cfg.Network.DetachPort(r.Owner); err != nil {
		return err
	}
	if err := m.cfg.Allocator.ReleaseAll(ctx, r.Owner); err != nil {
		return fmt.Errorf("release the addresses of %s: %w", r.label(), err)
	}
	if m.cfg.Gone != nil {
		m.cfg.Gone(r.Owner)
	}
	return m.forget(r.Owner)
}
