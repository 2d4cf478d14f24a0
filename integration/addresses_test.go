package integration

import (
	"context"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"meshd/integration/lab"
)

// TestAddresses has containers of three hosts get addresses that nobody chose.
func TestAddresses(t *testing.T) {
	w := newWorld(t, 3, 90*time.Second)
	w.mesh("--ipalloc-range", "10.40.0.0/16", "--ipalloc-default-subnet", "10.40.1.0/24")
	held := map[netip.Addr]string{}
	var containers []*lab.Container
	w.t.Cleanup(func() {
		for _, c := range containers {
			w.try(c.Remove(context.Background()))
		}
	})
	attach := func(h *lab.Host, name string, spec ...string) []netip.Addr {
		t.Helper()
		c, err := h.Netns(w.ctx, name)
		w.try(err)
		containers = append(containers, c)
		got, err := c.Attach(w.ctx, spec...)
		w.try(err)
		for _, a := range got {
			if other := held[a]; other != "" {
				t.Errorf("%v was given to %s and to %s", a, other, name)
			}
			held[a] = name
		}
		return got
	}
	subnet := netip.MustParsePrefix("10.40.1.0/24")
	for _, h := range w.Hosts {
		for _, n := range []string{"a", "b", "c"} {
			if got := attach(h, h.Name+n); len(got) != 1 || !subnet.Contains(got[0]) {
				t.Errorf("%s got %v", h.Name+n, got)
			}
		}
	}
	if got := attach(w.Host(1), "several", "net:default", "net:10.40.2.0/24", "ip:10.50.0.1/24", "10.51.0.1/24"); len(got) != 4 ||
		!subnet.Contains(got[0]) || !netip.MustParsePrefix("10.40.2.0/24").Contains(got[1]) || got[2].String() != "10.50.0.1" || got[3].String() != "10.51.0.1" {
		t.Errorf("several at once: %v", got)
	}
	t.Run("SameAgain", func(t *testing.T) {
		w := w.in(t)
		for _, c := range containers[:3] {
			first, err := overlayAddrs(c)
			w.try(err)
			again, err := c.Attach(w.ctx)
			w.try(err)
			if len(first) != 1 || again[0] != first[0].Addr() {
				t.Errorf("%s had %v and got %v", c.Name, first, again)
			}
		}
	})
	t.Run("ClaimIsExclusive", func(t *testing.T) {
		w := w.in(t)
		taken, err := overlayAddrs(containers[0]) // on h1
		w.try(err)
		c, err := w.Host(2).Netns(w.ctx, "claims")
		w.try(err)
		containers = append(containers, c)
		w.refused(w.Host(2), 1, []string{taken[0].Addr().String()}, "attach", "ip:"+taken[0].String(), c.Ref)
		_, err = c.Attach(w.ctx, "ip:10.40.1.200/24")
		w.try(err)
	})
	t.Run("AcknowledgedSurvivesKill", func(t *testing.T) {
		w := w.in(t)
		h := w.Host(2)
		before := w.noDuplicates(containers)
		w.try(h.Kill(w.ctx, h.Meshd(), syscall.SIGKILL))
		w.try(lab.Until(w.ctx, 5*time.Second, "meshd to end", func() bool { return h.Meshd() == 0 }))
		w.launch(h, "--ipalloc-range", "10.40.0.0/16", "--ipalloc-default-subnet", "10.40.1.0/24", w.Host(1).Addr.String())
		for _, n := range []string{"d", "e", "f"} {
			c, err := h.Netns(w.ctx, h.Name+n)
			w.try(err)
			containers = append(containers, c)
			_, err = c.Attach(w.ctx)
			w.try(err)
		}
		if after := w.noDuplicates(containers); after != before+3 {
			t.Errorf("%d addresses before, %d after three more", before, after)
		}
	})
	t.Run("RemovedPeer", func(t *testing.T) {
		w := w.in(t)
		h := w.Host(3)
		const fixed = "10.52.0.1/24" // outside the range
		attach(h, "fixed", fixed)
		other, err := w.Host(2).Netns(w.ctx, "takes-over")
		w.try(err)
		containers = append(containers, other)
		w.try(lab.Until(w.ctx, 5*time.Second, fixed+" to be refused on another host", func() bool {
			r, err := w.Host(2).Ctl(w.ctx, "attach", fixed, other.Ref)
			if err == nil && r.Exit == 0 {
				_, err = w.Host(2).Must(w.ctx, "detach", fixed, other.Ref)
			}
			return err == nil && r.Exit == 1 && strings.Contains(r.Stderr, "rmpeer")
		}))
		w.try(h.Kill(w.ctx, h.Meshd(), syscall.SIGKILL))
		w.try(lab.Until(w.ctx, 20*time.Second, "h3 to be unreachable", func() bool {
			out, err := w.Host(1).Must(w.ctx, "status", "ipam")
			return err == nil && strings.Contains(out, "unreachable")
		}))
		if out, err := w.Host(1).Must(w.ctx, "status", "peers"); err != nil || strings.Contains(out, "(h3)\n") {
			t.Errorf("a peer that is gone is listed: %v\n%s", err, out)
		}
		out, err := w.Host(1).Must(w.ctx, "rmpeer", "h3")
		if err != nil || !strings.Contains(out, "h3") || strings.HasPrefix(out, "0 ") {
			t.Errorf("rmpeer: %v %q", err, out)
		}
		out, err = w.Host(1).Must(w.ctx, "status", "ipam")
		if err != nil || strings.Contains(out, "unreachable") {
			t.Errorf("after rmpeer: %v %q", err, out)
		}
		w.try(lab.Until(w.ctx, 5*time.Second, "what the lost peer had outside the range to be free on a third one", func() bool {
			_, err := other.Attach(w.ctx, fixed)
			return err == nil
		}))
		out, err = w.Host(1).Must(w.ctx, "rmpeer", "nobody")
		if err != nil || !strings.Contains(out, "0") {
			t.Errorf("rmpeer of nobody: %v %q", err, out)
		}
		// The ghost comes back. It may not hand out what is no longer its own, and it says which of its
		// containers' addresses others have meanwhile.
		var living []*lab.Container
		for _, c := range containers {
			if c.Host != h {
				living = append(living, c)
			}
		}
		first, err := w.Host(1).Netns(w.ctx, "first")
		w.try(err)
		containers = append(containers, first)
		_, err = first.Attach(w.ctx) // the lowest address that was the ghost's
		w.try(err)
		living = append(living, first)
		w.launch(h, "--ipalloc-range", "10.40.0.0/16", "--ipalloc-default-subnet", "10.40.1.0/24", w.Host(1).Addr.String())
		for i, h := range w.Hosts {
			c, err := h.Netns(w.ctx, "later")
			w.try(err)
			containers = append(containers, c)
			living = append(living, c)
			if _, err = c.Attach(w.ctx); err != nil {
				t.Errorf("host %d: %v", i+1, err)
			}
		}
		w.noDuplicates(living)
		stale := map[string]bool{}
		for _, c := range containers {
			if c.Host == h && c.Name != "later" {
				addrs, err := overlayAddrs(c)
				w.try(err)
				for _, a := range addrs {
					stale[a.Addr().String()] = true
				}
			}
		}
		taken, err := overlayAddrs(first)
		w.try(err)
		if len(taken) == 1 && stale[taken[0].Addr().String()] {
			err := lab.Until(w.ctx, 5*time.Second, "the ghost to say that "+taken[0].String()+" is held elsewhere", func() bool {
				status, err := h.Must(w.ctx, "status")
				return err == nil && strings.Contains(status+h.Log(), taken[0].Addr().String())
			})
			if err != nil {
				t.Error(err)
			}
		}
	})
}

// TestRangeOverlap has a default range that is in use on the host, and one that was chosen.
func TestRangeOverlap(t *testing.T) {
	w := newWorld(t, 1, 30*time.Second)
	h := w.Host(1)
	w.planReset(h)
	_, err := h.Out(w.ctx, "ip", "route", "add", "10.33.0.0/16", "via", "198.18.1.1")
	w.try(err)
	w.refused(h, 1, []string{"10.32.0.0/12", "10.33.0.0/16"}, "launch")
	r, err := h.Ctl(w.ctx, "launch", "--ipalloc-range", "10.33.1.0/24")
	w.try(err)
	if r.Exit != 0 {
		t.Errorf("%s: a chosen range warns only", r)
	}
	if text := r.Stderr + h.Log(); !strings.Contains(text, "10.33.0.0/16") {
		t.Errorf("there is no warning: %s", text)
	}
	_, err = h.Out(w.ctx, "ip", "route", "del", "10.33.0.0/16")
	w.try(err)
}

// TestKernelDeviceTaken: what the kernel path lacks is in the status, and goes from there when it is put right.
func TestKernelDeviceTaken(t *testing.T) {
	w := newWorld(t, 1, 30*time.Second)
	h := w.Host(1)
	w.planReset(h)
	_, err := h.Out(w.ctx, "ip", "link", "add", "mesh-vx", "type", "veth", "peer", "name", "other")
	w.try(err)
	w.launch(h, "--no-dns")
	status := func(taken bool) {
		w.t.Helper()
		w.try(lab.Until(w.ctx, 10*time.Second, "the status to tell how it is", func() bool {
			r, err := h.Ctl(w.ctx, "status", "--strict")
			return err == nil && (r.Exit == 5) == taken && strings.Contains(r.Stdout, "mesh-vx: the name is taken") == taken
		}))
	}
	status(true)
	_, err = h.Out(w.ctx, "ip", "link", "del", "mesh-vx")
	w.try(err)
	status(false)
}
