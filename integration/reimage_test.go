package integration

import (
	"context"
	"encoding/base64"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"meshd/integration/lab"
)

// TestReimagedHost is M5: a host of a sealed mesh is made anew, and images of what it was come back. One key is one
// peer: the old key returns to its own place, and to no other while somebody is there.
func TestReimagedHost(t *testing.T) {
	w := newWorld(t, 4, 2*time.Minute)
	h1, h2, h3, h4 := w.Host(1), w.Host(2), w.Host(3), w.Host(4)
	const name = "02:00:00:00:00:0e"
	env := []string{"MESH_PASSWORD=" + secret}
	w.launchWith(h1, env)
	w.launchWith(h2, env, h1.Addr.String())
	w.launchWith(h3, env, "--name", name, h1.Addr.String())
	joined := func(hosts ...*lab.Host) {
		t.Helper()
		took, err := lab.WaitMesh(w.ctx, 30*time.Second, hosts...)
		w.try(err)
		t.Log("a full mesh after ", took.Round(time.Millisecond))
	}
	joined(h1, h2, h3)
	c1 := w.netns(h1, "c1", "10.2.1.1/24")
	c2 := w.netns(h2, "c2", "10.2.1.2/24")
	_, err := c1.WaitPing(w.ctx, c2.addr, 10*time.Second)
	w.try(err)
	image := func(h *lab.Host) string {
		t.Helper()
		out, err := h.Out(w.ctx, "/bin/sh", "-c", "tar c -C /var/lib meshd | base64 -w 0")
		w.try(err)
		return out
	}
	restore := func(h *lab.Host, image string) {
		t.Helper()
		tar, err := base64.StdEncoding.DecodeString(strings.TrimSpace(image))
		w.try(err)
		w.try(h.WriteFile("/run/image.tar", tar, 0o600))
		_, err = h.Out(w.ctx, "/bin/sh", "-ec", "rm -rf /var/lib/meshd; tar x -C /var/lib -f /run/image.tar; rm /run/image.tar")
		w.try(err)
	}
	peer := func(h *lab.Host) string {
		t.Helper()
		r, err := h.Report(w.ctx)
		w.try(err)
		return r.Router.Name
	}
	w.planReset(h4)
	w.gone(h2, syscall.SIGKILL)
	w.gone(h3, syscall.SIGKILL)
	old2, old3 := image(h2), image(h3)
	w.launchWith(h2, env, h1.Addr.String())
	joined(h1, h2)
	before := peer(h2)

	t.Run("CopyOfALivePeer", func(t *testing.T) {
		w := w.in(t)
		p := w.watch(c1, c2, 5*time.Millisecond)
		restore(h4, old2)
		w.launchWith(h4, env, h1.Addr.String())
		w.reason(h4, h1, "disk")
		r := w.end(p)
		t.Log("meanwhile between the others: ", r)
		if r.Duplicated > 0 || r.MaxGap > 6*time.Second { // it passes for a restart until the true one has missed its links
			t.Error("the copy does more than interrupt for a moment")
		}
		if got := h4.Established(w.ctx); len(got) > 0 {
			t.Errorf("the copy got in: %v", got)
		}
		w.gone(h4, syscall.SIGKILL)
		joined(h1, h2)
	})
	t.Run("OldImageAtItsPlace", func(t *testing.T) {
		w := w.in(t)
		w.gone(h2, syscall.SIGKILL)
		restore(h2, old2)
		start := time.Now()
		w.launchWith(h2, env, h1.Addr.String())
		joined(h1, h2)
		w.within("to be back with the old key", time.Since(start), 8*time.Second)
		if got := peer(h2); got != before {
			t.Errorf("with the old key it is %s, and was %s", got, before)
		}
		_, err := c1.WaitPing(w.ctx, c2.addr, 10*time.Second)
		w.try(err)
	})
	t.Run("EmptyDisk", func(t *testing.T) {
		w := w.in(t)
		w.gone(h2, syscall.SIGKILL)
		_, err := h2.Out(w.ctx, "/bin/sh", "-c", "rm -rf /var/lib/meshd")
		w.try(err)
		w.launchWith(h2, env, h1.Addr.String())
		joined(h1, h2)
		if got := peer(h2); got == before {
			t.Errorf("without its key it still is %s", got)
		}
		// What it held under its old name is held as long as that may come back; another address is to be had.
		w.refused(h2, 1, []string{"in use", before}, "attach", "10.2.1.2/24", c2.Ref)
		_, err = c2.Attach(w.ctx, "10.2.1.22/24")
		w.try(err)
		_, err = c1.WaitPing(w.ctx, netip.MustParseAddr("10.2.1.22"), 20*time.Second)
		w.try(err)
	})
	t.Run("OldKeyUnderATakenName", func(t *testing.T) {
		w := w.in(t)
		// The bearer of a chosen name is made anew: with another key it has to wait until the old one is given up.
		_, err := h3.Out(w.ctx, "/bin/sh", "-c", "rm -rf /var/lib/meshd")
		w.try(err)
		w.launchWith(h3, env, "--name", name, h1.Addr.String())
		joined(h1, h2, h3)
		c3 := w.netns(h3, "c3", "10.2.1.3/24")
		_, err = c1.WaitPing(w.ctx, c3.addr, 10*time.Second)
		w.try(err)
		p := w.watch(c1, c3, 5*time.Millisecond)
		restore(h4, old3)
		w.launchWith(h4, env, "--name", name, h1.Addr.String())
		w.reason(h4, h1, "name")
		w.rest(time.Second)
		if got := h4.Established(w.ctx); len(got) > 0 {
			t.Errorf("the old key got in under a name that is taken: %v", got)
		}
		if r := w.end(p); r.Lost+r.Duplicated > 0 {
			t.Errorf("meanwhile to who has the name now: %v", r)
		}
		ctx, cancel := context.WithTimeout(w.ctx, 10*time.Second)
		defer cancel()
		status, err := h4.Ctl(ctx, "status", "connections")
		w.try(err)
		t.Logf("what the old one is told:\n%s", status.Stdout)
	})
}
