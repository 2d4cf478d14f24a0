package sim

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"meshd/mesh"
	"meshd/router"
	"meshd/router/gossip/simnet"
)

// settle waits until check holds, looking twice a second of simulated time, and returns how long that took.
func (w *world) settle(what string, limit time.Duration, check func() error) (took time.Duration, ok bool) {
	for begun := time.Now(); ; time.Sleep(500 * time.Millisecond) {
		err := check()
		took = time.Since(begun)
		switch {
		case err == nil:
			return took, true
		case took >= limit:
			w.fail("%s: not within %v: %v", what, limit, err)
			return took, false
		}
	}
}

// parts are the hosts that run, grouped by who reaches whom over pairs that hear each other.
func (w *world) parts() (out [][]*host) {
	seen := map[*host]bool{}
	for _, h := range w.hosts {
		if seen[h] || !h.up() {
			continue
		}
		part := []*host{h}
		seen[h] = true
		for i := 0; i < len(part); i++ {
			for _, o := range w.hosts {
				if !seen[o] && o.up() && hears(part[i], o) {
					seen[o] = true
					part = append(part, o)
				}
			}
		}
		slices.SortFunc(part, func(a, b *host) int { return a.n - b.n })
		out = append(out, part)
	}
	return out
}

func hears(a, b *host) bool {
	return a.life.peer.Host.Passes(b.life.peer.Host) && b.life.peer.Host.Passes(a.life.peer.Host)
}

// connected demands that within each part everybody reaches everybody, by routes that do not go round and
// do lead there, and that tables are equal; and that nobody believes to reach another part.
func (w *world) connected() error {
	for _, part := range w.parts() {
		for _, a := range part {
			if got := len(a.life.peer.Node.Routes().Load().Reachable()); got != len(part)-1 {
				return fmt.Errorf("host %d reaches %d of the %d others of its part", a.n, got, len(part)-1)
			}
			for _, b := range part {
				if a != b {
					if err := w.walk(a, b); err != nil {
						return err
					}
				}
			}
		}
		for _, a := range part[1:] {
			for name, table := range map[string]func(*life) []mesh.Item{
				"topology": func(l *life) []mesh.Item { return l.peer.Node.Topology().Items() },
				"names":    func(l *life) []mesh.Item { return l.names.Items() },
				"ring":     func(l *life) []mesh.Item { return l.addrs.Table().Items() },
			} {
				if !slices.Equal(sorted(table(a.life)), sorted(table(part[0].life))) {
					return fmt.Errorf("the %s of hosts %d and %d differ", name, part[0].n, a.n)
				}
			}
		}
	}
	return nil
}

// walk follows the next hops of every host on the way from a to b.
func (w *world) walk(a, b *host) error {
	to := simnet.NameOf(b.n)
	for at, hops := a, 0; at != b; hops++ {
		via, ok := at.life.peer.Node.Routes().NextHop(to)
		if !ok {
			return fmt.Errorf("host %d has no route to %d", at.n, b.n)
		}
		next := w.named(via)
		if next == nil || !next.up() || !hears(at, next) {
			return fmt.Errorf("the route from host %d to %d leads over %v, which %d does not reach", a.n, b.n, via, at.n)
		}
		if at = next; hops > len(w.hosts) {
			return fmt.Errorf("the route from host %d to %d goes round", a.n, b.n)
		}
	}
	return nil
}

func (w *world) named(name mesh.PeerName) *host {
	for _, h := range w.hosts {
		if simnet.NameOf(h.n) == name {
			return h
		}
	}
	return nil
}

func sorted(items []mesh.Item) []mesh.Item {
	items = slices.Clone(items)
	slices.SortFunc(items, func(a, b mesh.Item) int { return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Version, b.Version)) })
	return items
}

// truth demands that every host knows of exactly the containers that there are, by name and by frame. All
// hosts have to be up and in one part.
func (w *world) truth() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []*container
	for _, h := range w.hosts {
		for _, id := range slices.Sorted(maps.Keys(h.conts)) {
			all = append(all, h.conts[id])
		}
	}
	for _, h := range w.hosts {
		if got := len(h.life.names.Entries()); got != len(all) {
			return fmt.Errorf("host %d knows %d names, there are %d", h.n, got, len(all))
		}
		for _, c := range all {
			got, err := h.life.names.Lookup(c.name)
			if err != nil || len(got) != 1 || got[0] != c.addr.Addr() {
				return fmt.Errorf("host %d says that %s is %v (%v), it is %v", h.n, c.name, got, err, c.addr)
			}
		}
		if held := h.life.addrs.Owners(); len(held) != len(h.conts) {
			return fmt.Errorf("host %d holds addresses for %d owners and has %d containers", h.n, len(held), len(h.conts))
		}
		for id, c := range h.conts {
			if got := h.life.addrs.Lookup(id, netip.Prefix{}); len(got) != 1 || got[0] != c.addr {
				return fmt.Errorf("host %d holds %v for %s, which has %v", h.n, got, c.name, c.addr)
			}
		}
	}
	for i, a := range all {
		for _, b := range all[max(0, i-12):min(len(all), i+12)] { // pairs grow with the square
			if a != b {
				if err := a.speaks(b, w.hosts); err != nil {
					return fmt.Errorf("%s on host %d to %s on host %d: %w", a.name, a.host.n, b.name, b.host.n, err)
				}
			}
		}
	}
	return nil
}

// speaks sends frames from one container to another through the switches of all hosts.
func (a *container) speaks(b *container, hosts []*host) error {
	now := time.Now()
	var scratch [128]byte
	us, them := simnet.NameOf(a.host.n), simnet.NameOf(b.host.n)
	ours, theirs := a.host.life.frames, b.host.life.frames
	frame := append(append(append([]byte{}, b.mac[:]...), a.mac[:]...), 8, 0)
	frame = append(frame, make([]byte, 46)...)
	d := ours.FromBridge(frame, scratch[:], now)
	if a.host == b.host {
		if d.Verdict != router.Drop || d.Reason != router.ReasonLocal {
			return fmt.Errorf("a frame between neighbours on one bridge: %+v", d)
		}
		return nil
	}
	if a.addr.Masked() != b.addr.Masked() {
		return nil // networks of their own
	}
	if d.Verdict != router.Unicast || d.Peer != them {
		return fmt.Errorf("a frame leaves as %+v", d)
	}
	if d := theirs.FromPeer(frame, us, now); d.Verdict != router.Deliver {
		return fmt.Errorf("a frame arrives as %+v", d)
	}
	for _, h := range hosts {
		if h == a.host || h == b.host {
			continue
		}
		if d := theirs.FromPeer(frame, simnet.NameOf(h.n), now); d.Reason != router.ReasonForged {
			return fmt.Errorf("the same frame from host %d: %+v", h.n, d)
		}
		break
	}
	ask := arp(a, b.addr.Addr())
	d = ours.FromBridge(ask, scratch[:], now)
	if d.Verdict != router.Answer || mesh.MAC(d.Reply[6:12]) != b.mac {
		return fmt.Errorf("the question for its address: %+v", d)
	}
	return nil
}

// arp is the request of a container for an address.
func arp(c *container, target netip.Addr) []byte {
	sender, wanted := c.addr.Addr().As4(), target.As4()
	f := []byte{255, 255, 255, 255, 255, 255}
	f = append(f, c.mac[:]...)
	f = append(f, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	f = append(f, c.mac[:]...)
	f = append(f, sender[:]...)
	f = append(f, 0, 0, 0, 0, 0, 0)
	return append(f, wanted[:]...)
}

// finish ends all faults and demands that half a minute later all is well: one mesh, equal tables, the
// truth known everywhere, and addresses for whoever asks.
func (w *world) finish() (healed time.Duration) {
	w.cluster.Net.HealAll()
	w.cluster.Net.SetLoss(0)
	w.cluster.Net.SetDuplicates(0)
	w.cluster.Net.SetReordering(0)
	for _, h := range w.hosts {
		h.disk.fill(false)
		if !h.up() {
			h.start(w.targets(h.n)...)
		} else {
			h.life.mount.light(0, false)
			h.life.peer.Host.Starve(0)
		}
	}
	whole := func() error {
		if err := w.connected(); err != nil {
			return err
		}
		return w.truth()
	}
	healed, ok := w.settle("healing", 30*time.Second, whole)
	if !ok {
		return healed
	}
	time.Sleep(11 * time.Second) // who asked before has an answer
	before := w.counted("attached")
	for _, h := range w.hosts {
		h.attach(0)
	}
	time.Sleep(11 * time.Second)
	if got := w.counted("attached") - before; got != len(w.hosts) {
		w.fail("of %d hosts %d could have an address", len(w.hosts), got)
	}
	w.settle("after the end", 10*time.Second, whole)
	if n := w.cluster.Net.Stats().Loops; n > 0 {
		w.fail("%d messages went round", n)
	}
	return healed
}

func (w *world) counted(what string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.counts[what]
}
