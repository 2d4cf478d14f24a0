package integration

import (
	"context"
	"strings"
	"syscall"
	"testing"
	"time"

	"meshd/integration/lab"
)

// TestMistakes is what operators do by mistake to a mesh that works: each is refused or costs the others nothing.
func TestMistakes(t *testing.T) {
	w := newWorld(t, 4, 2*time.Minute)
	h1, h2, h3, h4 := w.Host(1), w.Host(2), w.Host(3), w.Host(4)
	const name = "02:00:00:00:00:0d"
	w.launch(h1, "--ipalloc-init", "consensus=3")
	w.launch(h2, "--ipalloc-init", "consensus=3", h1.Addr.String())
	w.launch(h3, "--ipalloc-init", "consensus=3", "--name", name, h1.Addr.String())
	_, err := lab.WaitMesh(w.ctx, 15*time.Second, h1, h2, h3)
	w.try(err)
	c1, err := h1.Netns(w.ctx, "c1")
	w.try(err)
	c3, err := h3.Netns(w.ctx, "c3")
	w.try(err)
	t.Cleanup(func() { w.try(c1.Remove(context.Background())); w.try(c3.Remove(context.Background())) })
	a1, err := c1.Attach(w.ctx)
	w.try(err)
	a3, err := c3.Attach(w.ctx)
	w.try(err)

	t.Run("TwoDaemonsOnOneStateDirectory", func(t *testing.T) {
		w := w.in(t)
		defer h1.Run(w.ctx, "rm", "-r", "/run/other")
		for options, word := range map[string]string{"": "already running", "--run-dir=/run/other": "/var/lib/meshd"} {
			start := time.Now()
			r, err := h1.Run(w.ctx, "sh", "-c", "exec meshd --port=7783 --vxlan-port=7784 "+options)
			w.try(err)
			w.within("the second to end", time.Since(start), 10*time.Second) // 2 s where nothing else runs: store has that test
			if r.Exit == 0 || !strings.Contains(r.Stderr, word) {
				t.Errorf("%s: want a failure with the words %q", r, word)
			}
		}
	})
	t.Run("AnotherRange", func(t *testing.T) {
		w := w.in(t)
		w.try(h2.Kill(w.ctx, h2.Meshd(), syscall.SIGKILL))
		w.try(lab.Until(w.ctx, 5*time.Second, "meshd to end", func() bool { return h2.Meshd() == 0 }))
		w.refused(h2, 1, []string{"10.32.0.0/12", "reset"}, "launch", "--ipalloc-range", "10.64.0.0/16", h1.Addr.String())
		w.launch(h2, "--resume")
		_, err := lab.WaitMesh(w.ctx, 15*time.Second, h1, h2, h3)
		w.try(err)
	})
	t.Run("SameNameTwice", func(t *testing.T) {
		w := w.in(t)
		w.launch(h4, "--name", name, h1.Addr.String())
		w.try(lab.Until(w.ctx, 15*time.Second, "the second to be told", func() bool {
			r, err := h4.Report(w.ctx)
			if err != nil {
				return false
			}
			for _, c := range r.Router.Connections {
				if strings.Contains(c.Error, name) {
					return true
				}
			}
			return false
		}))
		_, err := lab.WaitMesh(w.ctx, 15*time.Second, h1, h2, h3)
		w.try(err)
		w.pings(&member{c1, a1[0]}, &member{c3, a3[0]}, 5, 56)
	})
	t.Run("ResetOfALivePeer", func(t *testing.T) {
		w := w.in(t)
		if _, err := h3.Must(w.ctx, "reset", "--force"); err != nil {
			t.Fatal(err)
		}
		_, err := lab.WaitMesh(w.ctx, 15*time.Second, h1, h2)
		w.try(err)
		// What it had comes back: somebody else can have its address.
		w.try(lab.Until(w.ctx, 15*time.Second, "its address to be free", func() bool {
			_, err := c1.Attach(w.ctx, a3[0].String()+"/12")
			return err == nil
		}))
	})
}
