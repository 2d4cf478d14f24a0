package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"meshd/integration/lab"
)

// seeded gives the randomness of a test and prints its seed; MESHD_SEED repeats a run.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("MESHD_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("MESHD_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// scaled gives the every-change value or, with MESHD_LONG, the long one.
func scaled[T any](every, whenLong T) T {
	if long() {
		return whenLong
	}
	return every
}

// overlayAddrs reads the addresses that the kernel has on a container's interface.
func overlayAddrs(c *lab.Container) (addrs []netip.Prefix, err error) {
	err = c.Do(func() error {
		ifi, err := net.InterfaceByName("ethmesh")
		if err != nil {
			return nil // it has none
		}
		list, err := ifi.Addrs()
		for _, a := range list {
			if p, perr := netip.ParsePrefix(a.String()); perr == nil && p.Addr().Is4() {
				addrs = append(addrs, p)
			}
		}
		return err
	})
	return addrs, err
}

// noDuplicates wants every overlay address of all these containers to be there once.
func (w *world) noDuplicates(containers []*lab.Container) (count int) {
	w.t.Helper()
	holder := map[netip.Addr]string{}
	for _, c := range containers {
		addrs, err := overlayAddrs(c)
		w.try(err)
		for _, a := range addrs {
			name := c.Host.Name + "/" + c.Name
			if other, taken := holder[a.Addr()]; taken {
				w.t.Errorf("%v is held by %s and by %s", a, other, name)
			}
			holder[a.Addr()] = name
			count++
		}
	}
	return count
}

// TestKillOneOfEight is P1: traffic between seven peers goes on while the eighth dies.
func TestKillOneOfEight(t *testing.T) {
	w := newWorld(t, 8, 90*time.Second)
	w.mesh()
	var members []*member
	for i, h := range w.Hosts {
		members = append(members, w.netns(h, fmt.Sprintf("c%d", i+1), fmt.Sprintf("10.2.1.%d/24", i+1)))
	}
	victim := w.Host(8)
	var flows []*watched
	for i := range 7 {
		_, err := members[i].WaitPing(w.ctx, members[(i+1)%7].addr, 10*time.Second)
		w.try(err)
	}
	for i := range 7 {
		flows = append(flows, w.watch(members[i], members[(i+1)%7], 5*time.Millisecond))
	}
	w.try(victim.Kill(w.ctx, victim.Meshd(), syscall.SIGKILL))
	start := time.Now()
	w.try(lab.Until(w.ctx, 20*time.Second, "all to withdraw their routes to the dead peer", func() bool {
		for _, h := range w.Hosts[:7] {
			if w.route(h, victim) != "" {
				return false
			}
		}
		return true
	}))
	w.within("routes to the dead peer withdrawn", time.Since(start), 3*time.Second)
	start = time.Now()
	w.launch(victim, w.Host(1).Addr.String())
	_, err := lab.WaitMesh(w.ctx, 20*time.Second, w.Hosts...)
	w.try(err)
	w.within("killed peer back in a full mesh", time.Since(start), 5*time.Second)
	for i, f := range flows {
		if r := w.end(f); r.Lost+r.Duplicated > 0 {
			t.Errorf("%s to %s: %v, want nothing lost", members[i].Name, members[(i+1)%7].Name, r)
		}
	}
}

// TestKillAtRandom is P2: a random peer is killed and started again every two seconds.
func TestKillAtRandom(t *testing.T) {
	hosts, lasting := scaled(6, 12), scaled(10*time.Second, 10*time.Minute)
	w := newWorld(t, hosts, lasting+90*time.Second)
	random := seeded(t)
	w.mesh()
	var containers []*lab.Container
	held := map[string]netip.Addr{}
	for i, h := range w.Hosts {
		c, err := h.Netns(w.ctx, fmt.Sprintf("c%d", i+1))
		w.try(err)
		w.t.Cleanup(func() { w.try(c.Remove(context.Background())) })
		got, err := c.Attach(w.ctx)
		w.try(err)
		containers = append(containers, c)
		held[c.Name] = got[0]
	}
	kills := 0
	for end := time.Now().Add(lasting); time.Now().Before(end); kills++ {
		h := w.Hosts[random.IntN(hosts)]
		w.try(h.Kill(w.ctx, h.Meshd(), syscall.SIGKILL))
		w.try(lab.Until(w.ctx, 5*time.Second, "meshd to end", func() bool { return h.Meshd() == 0 }))
		w.rest(time.Duration(random.IntN(1000)) * time.Millisecond)
		w.launch(h, "--resume")
		w.rest(time.Duration(random.IntN(1000)) * time.Millisecond)
	}
	start := time.Now()
	_, err := lab.WaitMesh(w.ctx, 30*time.Second, w.Hosts...)
	w.try(err)
	t.Logf("%d kills", kills)
	w.within("full mesh after the last kill", time.Since(start), 15*time.Second)
	if n := w.noDuplicates(containers); n != hosts {
		t.Errorf("%d addresses are left of %d", n, hosts)
	}
	for i, c := range containers {
		to := containers[(i+1)%hosts]
		w.pings(&member{c, held[c.Name]}, &member{to, held[to.Name]}, 5, 56)
	}
}

// TestSplitAllocating is P4: both halves of a partition go on allocating.
func TestSplitAllocating(t *testing.T) {
	hosts, lasting := scaled(4, 8), scaled(8*time.Second, 45*time.Second)
	w := newWorld(t, hosts, lasting+2*time.Minute)
	w.mesh()
	var mu sync.Mutex
	var containers []*lab.Container
	addrOf := map[string]netip.Addr{}
	attach := func(h *lab.Host, name string) error {
		c, err := h.Netns(w.ctx, name)
		if err != nil {
			return err
		}
		got, err := c.Attach(w.ctx)
		if err == nil {
			_, err = h.Must(w.ctx, "dns-add", got[0].String(), "-h", name+".mesh.internal")
		}
		mu.Lock()
		defer mu.Unlock()
		containers = append(containers, c)
		if err == nil {
			addrOf[name] = got[0]
		}
		return err
	}
	w.t.Cleanup(func() {
		for _, c := range containers {
			w.try(c.Remove(context.Background()))
		}
	})
	for _, h := range w.Hosts { // every peer has space of its own before the cut
		w.try(attach(h, h.Name+"-before"))
	}
	w.try(w.Split(w.ctx, w.Hosts[:hosts/2], w.Hosts[hosts/2:]))
	start := time.Now()
	for round := 0; time.Since(start) < lasting; round++ {
		var wg sync.WaitGroup
		errs := make([]error, hosts)
		for i, h := range w.Hosts {
			wg.Go(func() { errs[i] = attach(h, fmt.Sprintf("%s-cut%d", h.Name, round)) })
		}
		wg.Wait()
		w.try(errors.Join(errs...))
		w.rest(time.Second)
	}
	w.try(w.HealAll(w.ctx))
	start = time.Now()
	_, err := lab.WaitMesh(w.ctx, 45*time.Second, w.Hosts...)
	w.try(err)
	w.within("halves merged after "+lasting.String(), time.Since(start), 30*time.Second)
	w.noDuplicates(containers)
	start = time.Now()
	w.try(lab.Until(w.ctx, 30*time.Second, "all names on all hosts", func() bool {
		for _, h := range w.Hosts {
			r, err := h.Report(w.ctx)
			if err != nil || len(r.DNS.Entries) < len(addrOf) {
				return false
			}
			known := map[string]string{}
			for _, e := range r.DNS.Entries {
				known[e.Hostname] = e.Address
			}
			for name, a := range addrOf {
				if known[name+".mesh.internal."] != a.String() && known[name+".mesh.internal"] != a.String() {
					return false
				}
			}
		}
		return true
	}))
	t.Logf("%d names", len(addrOf))
	w.within("all names known everywhere after the merge", time.Since(start), 10*time.Second)
}

// TestFlappingLink is P5: a link goes and comes; frames find their way and do not run in circles.
func TestFlappingLink(t *testing.T) {
	w := newWorld(t, 3, scaled(90*time.Second, 20*time.Minute))
	h1, h2 := w.Host(1), w.Host(2)
	w.mesh()
	c1 := w.netns(h1, "c1", "10.2.1.1/24")
	c2 := w.netns(h2, "c2", "10.2.1.2/24")
	_, err := c1.WaitPing(w.ctx, c2.addr, 5*time.Second)
	w.try(err)
	p := w.watch(c1, c2, 5*time.Millisecond)
	changes, last := 0, w.route(h1, h2)
	observe := func(d time.Duration) {
		for end := time.Now().Add(d); time.Now().Before(end); w.rest(50 * time.Millisecond) {
			if via := w.route(h1, h2); via != last && via != "" {
				changes, last = changes+1, via
			}
		}
	}
	flaps := 0
	for _, period := range scaled([]time.Duration{time.Second}, []time.Duration{time.Second, 5 * time.Second, 20 * time.Second, 15 * time.Minute}) {
		for range scaled(8, max(1, int(time.Minute/period))) {
			flaps++
			w.try(w.Cut(w.ctx, h1, h2))
			observe(period / 2)
			w.try(w.HealAll(w.ctx))
			observe(period / 2)
		}
	}
	w.waitRoute(h1, h2, h2, 15*time.Second)
	r := w.end(p)
	t.Logf("%d flaps, %d route changes; %v", flaps, changes, r)
	if changes > 2*flaps {
		t.Errorf("%d route changes in %d flaps", changes, flaps)
	}
	w.within("longest silence", r.MaxGap, 5*time.Second)
	if r.Duplicated > 0 {
		t.Errorf("%d datagrams arrived twice", r.Duplicated)
	}
	for _, h := range w.Hosts {
		report, err := h.Report(w.ctx)
		w.try(err)
		for reason, n := range report.Router.Drops {
			if n > 0 && (strings.Contains(reason, "hop") || strings.Contains(reason, "ttl") || strings.Contains(reason, "loop")) {
				t.Errorf("%s dropped %d frames for %s: they ran in a circle", h.Name, n, reason)
			}
		}
	}
}

// TestLossyUnderlay is P8: loss is not taken for death.
func TestLossyUnderlay(t *testing.T) {
	lasting := scaled(8*time.Second, 30*time.Minute)
	w := newWorld(t, 3, lasting+time.Minute)
	w.mesh()
	for i, a := range w.Hosts {
		for _, b := range w.Hosts[i+1:] {
			w.try(w.Loss(w.ctx, a, b, 0.05))
		}
	}
	steady := func(d time.Duration) (broken int) {
		for end := time.Now().Add(d); time.Now().Before(end); w.rest(200 * time.Millisecond) {
			for _, h := range w.Hosts {
				if n := len(h.Established(w.ctx)); n < 2 {
					broken++
				}
			}
		}
		return broken
	}
	if n := steady(lasting); n > 0 {
		t.Errorf("at 5 %% loss connections were seen broken %d times", n)
	}
	w.try(w.HealAll(w.ctx))
	for i, a := range w.Hosts {
		for _, b := range w.Hosts[i+1:] {
			w.try(w.Shape(w.ctx, a, b, lab.Shape{Delay: 100 * time.Millisecond, Loss: 0.2, Seed: 1}))
		}
	}
	n := steady(lasting)
	t.Logf("at 20 %% loss and 200 ms connections were seen broken %d times in %v", n, lasting)
	if n > 0 && !long() || n > 10 {
		t.Errorf("too often")
	}
}

// TestStarvedHost is P9: a host whose processors are busy is slow, not dead, and its kernel path loses nothing.
func TestStarvedHost(t *testing.T) {
	lasting := scaled(8*time.Second, 10*time.Minute)
	w := newWorld(t, 3, lasting+time.Minute)
	w.mesh()
	h1, h3 := w.Host(1), w.Host(3)
	c1, c3 := w.netns(h1, "c1", "10.2.1.1/24"), w.netns(h3, "c3", "10.2.1.3/24")
	w.waitOverlay(h1, h3, "kernel", 30*time.Second)
	_, err := c1.WaitPing(w.ctx, c3.addr, 5*time.Second)
	w.try(err)
	w.rest(2 * time.Second) // flows are established
	there, back := w.watch(c1, c3, time.Millisecond), w.watch(c3, c1, time.Millisecond)
	for range 8 {
		p, err := h3.Start(w.ctx, nil, "/bin/sh", "-c", "while :; do :; done")
		w.try(err)
		w.t.Cleanup(func() { _ = p.Stop(time.Second) })
	}
	for end := time.Now().Add(lasting); time.Now().Before(end); w.rest(200 * time.Millisecond) {
		c := h1.Established(w.ctx)["h3"]
		if c.State == "" {
			t.Fatal("the busy host was given up")
		}
		if c.Overlay != "kernel" {
			t.Fatalf("the busy host is reached by %q", c.Overlay)
		}
	}
	for name, p := range map[string]*watched{"to the busy host": there, "from the busy host": back} {
		r := w.end(p)
		t.Logf("%s: %v", name, r)
		if r.Lost > 0 || r.Duplicated > 0 {
			t.Errorf("%s: %d lost, %d duplicated", name, r.Lost, r.Duplicated)
		}
	}
}
