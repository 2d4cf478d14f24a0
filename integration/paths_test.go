package integration

import (
	"context"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"meshd/integration/lab"
)

// route says by whom a host reaches another one: the nickname of the next peer, "" when there is no way.
func (w *world) route(from, to *lab.Host) string {
	r, err := from.Report(w.ctx)
	if err != nil {
		return ""
	}
	nick := map[string]string{}
	for _, p := range r.Router.Peers {
		nick[p.Name] = p.NickName
	}
	for _, u := range r.Router.UnicastRoutes {
		if nick[u.Dest] == to.Name {
			return nick[u.Via]
		}
	}
	return ""
}

// waitRoute waits until one host reaches another by way of a third, or directly when they are the same.
func (w *world) waitRoute(from, to, via *lab.Host, limit time.Duration) time.Duration {
	w.t.Helper()
	start := time.Now()
	err := lab.Until(w.ctx, limit, from.Name+" to reach "+to.Name+" by "+via.Name, func() bool { return w.route(from, to) == via.Name })
	if err != nil {
		out, _ := from.Must(w.ctx, "status", "connections")
		w.t.Errorf("%v; it is reached by %q\n%s", err, w.route(from, to), out)
	}
	return time.Since(start)
}

// TestThreeInARow talks through a middle that has nothing to do with it.
func TestThreeInARow(t *testing.T) {
	w := newWorld(t, 3, time.Minute)
	h1, h2, h3 := w.Host(1), w.Host(2), w.Host(3)
	w.launch(h2, "--no-discovery")
	w.launch(h1, "--no-discovery", h2.Addr.String())
	w.launch(h3, "--no-discovery", h2.Addr.String())
	c1 := w.netns(h1, "c1", "10.2.1.1/24")
	c3 := w.netns(h3, "c3", "10.2.1.3/24")
	took, err := c1.WaitPing(w.ctx, c3.addr, 10*time.Second)
	w.try(err)
	w.within("first ping through the middle", took, 5*time.Second)

	// Whatever crosses the middle's bridge or TAP that is to or from one of the containers is seen here.
	mac := map[string]bool{}
	for _, c := range []*member{c1, c3} {
		f, err := c.OpenFrames("ethmesh")
		w.try(err)
		mac[string(f.MAC)] = true
		w.try(f.Close())
	}
	seen := make(chan string, 2)
	for _, dev := range []string{"mesh", "mesh-tap"} {
		f, err := h2.OpenFrames(dev)
		w.try(err)
		defer f.Close()
		go func() {
			report := ""
			f.Collect(4*time.Second, func(frame []byte) bool {
				if mac[string(frame[:6])] || mac[string(frame[6:12])] {
					report = dev + " of the middle saw " + hex.EncodeToString(frame[:min(len(frame), 42)])
				}
				return false
			})
			seen <- report
		}()
	}
	w.pings(c1, c3, 20, 56)
	w.pings(c3, c1, 20, 10000)
	t.Log("through the middle: ", w.stream(c1, c3, 200<<20, 30*time.Second))
	t.Log("and back: ", w.stream(c3, c1, 50<<20, 30*time.Second))
	for range 2 {
		if report := <-seen; report != "" {
			t.Error(report)
		}
	}
	for _, h := range []*lab.Host{h1, h3} {
		if got := h.Established(w.ctx); len(got) == 0 || got["h2"].State == "" {
			t.Errorf("%s has no connection to the middle: %v", h.Name, got)
		}
	}
	if via := w.route(h1, h3); via != "h2" {
		t.Errorf("h1 reaches h3 by %q", via)
	}
}

// TestRelay cuts a link of a full mesh and wants another way found, and the better one taken back. Each
// case has a mesh of its own: a link that was cut before has to prove itself for longer.
func TestRelay(t *testing.T) {
	for _, x := range []struct {
		name string
		cut  func(w *world, a, b *lab.Host) error
	}{
		{"BothWays", func(w *world, a, b *lab.Host) error { return w.Cut(w.ctx, a, b) }},
		{"OneWay", func(w *world, a, b *lab.Host) error { return w.CutOneWay(w.ctx, a, b) }},
		{"PortBlocked", func(w *world, a, b *lab.Host) error { return w.BlockPort(w.ctx, a, b, "udp", 6783) }},
	} {
		t.Run(x.name, func(t *testing.T) {
			w := newWorld(t, 3, time.Minute)
			h1, h2, h3 := w.Host(1), w.Host(2), w.Host(3)
			w.mesh()
			c1 := w.netns(h1, "c1", "10.2.1.1/24")
			c2 := w.netns(h2, "c2", "10.2.1.2/24")
			_, err := c1.WaitPing(w.ctx, c2.addr, 5*time.Second)
			w.try(err)
			there, back := w.watch(c1, c2, time.Millisecond), w.watch(c2, c1, time.Millisecond)
			w.try(x.cut(w, h1, h2))
			start := time.Now()
			w.waitRoute(h1, h2, h3, 15*time.Second)
			w.waitRoute(h2, h1, h3, 15*time.Second)
			w.within("relay found", time.Since(start), 5*time.Second)
			// The kernel path decides for itself, and may be a moment behind.
			_, err = c1.WaitPing(w.ctx, c2.addr, 5*time.Second)
			w.try(err)
			w.pings(c1, c2, 10, 56)
			w.pings(c2, c1, 10, 10000)
			r1, r2 := w.end(there), w.end(back)
			t.Log("there: ", r1)
			t.Log("back: ", r2)
			w.within("longest silence", max(r1.MaxGap, r2.MaxGap), 5*time.Second)
			if r1.Duplicated+r2.Duplicated > 0 {
				t.Errorf("duplicated datagrams")
			}

			there, back = w.watch(c1, c2, time.Millisecond), w.watch(c2, c1, time.Millisecond)
			w.try(w.HealAll(w.ctx))
			start = time.Now()
			w.waitRoute(h1, h2, h2, 15*time.Second)
			w.waitRoute(h2, h1, h1, 15*time.Second)
			w.within("better path taken back", time.Since(start), 5*time.Second)
			r1, r2 = w.end(there), w.end(back)
			t.Log("there: ", r1)
			t.Log("back: ", r2)
			if r1.Lost+r2.Lost > 0 {
				t.Errorf("the change to the better path lost %d and %d datagrams", r1.Lost, r2.Lost)
			}
		})
	}
}

// overlay says by which overlay a host reaches another one.
func (w *world) overlay(from, to *lab.Host) string { return from.Established(w.ctx)[to.Name].Overlay }

// waitOverlay waits until two hosts reach each other by an overlay.
func (w *world) waitOverlay(a, b *lab.Host, want string, limit time.Duration) time.Duration {
	w.t.Helper()
	start := time.Now()
	err := lab.Until(w.ctx, limit, "the path to be "+want, func() bool { return w.overlay(a, b) == want && w.overlay(b, a) == want })
	if err != nil {
		out, _ := a.Must(w.ctx, "status", "connections")
		w.t.Errorf("%v: %s", err, out)
	}
	return time.Since(start)
}

// TestPathChange moves traffic from the userspace path to the kernel path and back.
func TestPathChange(t *testing.T) {
	w := newWorld(t, 2, 90*time.Second)
	h1, h2 := w.Host(1), w.Host(2)
	w.try(w.BlockPort(w.ctx, h1, h2, "udp", 6784))
	w.mesh()
	c1 := w.netns(h1, "c1", "10.2.1.1/24")
	c2 := w.netns(h2, "c2", "10.2.1.2/24")
	_, err := c1.WaitPing(w.ctx, c2.addr, 5*time.Second)
	w.try(err)
	w.waitOverlay(h1, h2, "userspace", 5*time.Second)
	if reason := h1.Established(w.ctx)["h2"].Reason; reason == "" {
		t.Error("the status does not say why the kernel path is not used")
	} else {
		t.Log("with its port blocked: ", reason)
	}
	there, back := w.watch(c1, c2, time.Millisecond), w.watch(c2, c1, time.Millisecond)
	w.try(w.HealAll(w.ctx))
	w.within("kernel path taken", w.waitOverlay(h1, h2, "kernel", 40*time.Second), 30*time.Second)
	w.rest(time.Second)
	r1, r2 := w.end(there), w.end(back)
	t.Log("there: ", r1)
	t.Log("back: ", r2)
	if r1.Lost+r2.Lost+r1.Duplicated+r2.Duplicated > 0 {
		t.Error("the change to the kernel path lost or doubled datagrams")
	}
	there, back = w.watch(c1, c2, time.Millisecond), w.watch(c2, c1, time.Millisecond)
	w.try(w.BlockPort(w.ctx, h1, h2, "udp", 6784))
	w.waitOverlay(h1, h2, "userspace", 10*time.Second)
	w.rest(500 * time.Millisecond)
	r1, r2 = w.end(there), w.end(back)
	t.Log("there: ", r1)
	t.Log("back: ", r2)
	w.within("longest silence when the kernel path breaks", max(r1.MaxGap, r2.MaxGap), 3*time.Second)
}

// TestPathMTUShrinks makes the path narrower in the middle of a stream, with ICMP blocked.
func TestPathMTUShrinks(t *testing.T) {
	w := newWorld(t, 2, 90*time.Second)
	h1, h2 := w.Host(1), w.Host(2)
	w.mesh()
	c1 := w.netns(h1, "c1", "10.2.1.1/24")
	c2 := w.netns(h2, "c2", "10.2.1.2/24")
	_, err := c1.WaitPing(w.ctx, c2.addr, 5*time.Second)
	w.try(err)
	w.try(w.BlockICMP(w.ctx, h1, h2))
	for _, mtu := range []int{1280, 1000} {
		changed := make(chan error, 1)
		ctx, cancel := context.WithTimeout(w.ctx, 500*time.Millisecond)
		go func() {
			<-ctx.Done() // the stream is well under way
			changed <- w.SetMTU(w.ctx, h1, h2, mtu)
		}()
		// Long enough for the change to fall into it at any speed the machine may have.
		got := w.stream(c1, c2, 1<<30, 60*time.Second)
		cancel()
		w.try(<-changed)
		t.Logf("stream while the MTU became %d: %v", mtu, got)
		w.within("longest stall of TCP", got.MaxStall, 3*time.Second)
		t.Logf("and a new one: %v", w.stream(c2, c1, 20<<20, 20*time.Second))
		w.pings(c1, c2, 5, 56)
		start := time.Now() // the other direction may find out only now
		w.try(lab.Until(w.ctx, 10*time.Second, "large pings to pass", func() bool {
			n, _, err := c1.Ping(w.ctx, c2.addr, 3, 1400)
			return err == nil && n == 3
		}))
		w.within("large pings pass", time.Since(start), 3*time.Second)
		w.pings(c1, c2, 5, 1400)
		w.pings(c2, c1, 5, 10000)
		// One that may not be fragmented passes or is answered with ICMP.
		r, err := c1.Run(w.ctx, "ping", "-n", "-c", "3", "-i", "0.2", "-W", "1", "-M", "do", "-s", "1350", c2.addr.String())
		w.try(err)
		if !strings.Contains(r.Stdout, "1358 bytes from") && !strings.Contains(r.Stdout+r.Stderr, "mtu") {
			t.Errorf("a large ping that may not be fragmented neither passes nor gets an answer: %s", r)
		}
	}
	w.try(w.SetMTU(w.ctx, h1, h2, 0))
	w.pings(c1, c2, 5, 1400)
}

// TestForeignBridge joins a namespace to the mesh bridge behind meshd's back, as a VM would be.
func TestForeignBridge(t *testing.T) {
	w := newWorld(t, 2, time.Minute)
	w.mesh()
	c := w.netns(w.Host(1), "c1", "10.2.1.1/24")
	m := w.foreign(w.Host(2), "vm", "10.2.1.77/24")
	_, err := c.WaitPing(w.ctx, m.addr, 5*time.Second)
	w.try(err)
	w.pings(m, c, 5, 56)
	w.pings(c, m, 5, 10000)
	t.Log(w.stream(c, m, 50<<20, 20*time.Second))
}
