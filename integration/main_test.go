// Package integration runs meshd and meshctl as a user does: real binaries on hosts made of namespaces,
// with real dockerds. It knows the product by its commands alone.
//
// The tests need root and are skipped without it; with root nothing is skipped, and what is missing is a
// failure. MESHD_LONG=1 makes those that move volumes move more. A test that fails prints the last lines of each
// host's log, as many as MESHD_LOG_LINES says.
package integration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"meshd/integration/lab"
	"meshd/integration/lab/probe"
)

var binaries string // directory of the meshd and meshctl under test

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Geteuid() != 0 {
			return m.Run()
		}
		if binaries = os.Getenv("MESHD_BIN"); binaries == "" {
			dir, err := os.MkdirTemp("", "meshd-bin-")
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			defer os.RemoveAll(dir)
			cmd := exec.Command("go", "build", "-o", dir, "meshd/cmd/meshd", "meshd/cmd/meshctl")
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "build the binaries under test: %v\n%s", err, out)
				return 1
			}
			binaries = dir
		}
		var err error
		if binaries, err = filepath.Abs(binaries); err == nil {
			err = errors.Join(lab.Requirements(), lab.DockerRequirements())
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// long reports whether volumes and times are those of the long run.
func long() bool { return os.Getenv("MESHD_LONG") != "" }

// world is one test's lab with the helpers that fail the test.
type world struct {
	*lab.Lab
	t   testing.TB
	ctx context.Context

	before map[*lab.Host]lab.Snapshot // hosts on which meshd was launched, as they were before
}

// newWorld builds a lab for one test. At the end hosts on which meshd was launched are reset and
// compared with what they were before, and logs are printed if the test failed.
func newWorld(t testing.TB, hosts int, limit time.Duration) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	// The time is that of the test's own work; what cleans up after it has more.
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	l, err := lab.New(ctx, lab.Config{Hosts: hosts, Bin: binaries})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Lab: l, t: t, ctx: ctx, before: map[*lab.Host]lab.Snapshot{}}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		if t.Failed() {
			for _, h := range l.Hosts {
				if log := h.Log(); log != "" {
					t.Log(lastLines(log, logLines()))
				}
			}
		}
	})
	return w
}

// logLines says how much of each host's log a failed test prints: little, so that what failed is found
// among the logs of many hosts. MESHD_LOG_LINES says how much else.
func logLines() int {
	if n, err := strconv.Atoi(os.Getenv("MESHD_LOG_LINES")); err == nil {
		return n
	}
	return 12
}

// lastLines gives the first line of a text, which says whose it is, and the last n, none longer than 300 bytes.
func lastLines(text string, n int) string {
	head, rest, _ := strings.Cut(strings.TrimSpace(text), "\n")
	lines := strings.Split(rest, "\n")
	lines = lines[max(0, len(lines)-n):]
	for i, line := range lines {
		if len(line) > 300 {
			lines[i] = line[:300] + "…"
		}
	}
	return head + "\n" + strings.Join(lines, "\n")
}

// in gives the world for a subtest.
func (w *world) in(t *testing.T) *world {
	c := *w
	c.t = t
	return &c
}

func (w *world) try(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// docker starts dockerd on the hosts and runs a container on each, for what Docker makes at the first one.
func (w *world) docker(hosts ...*lab.Host) {
	w.t.Helper()
	var g errgroup.Group
	for _, h := range hosts {
		g.Go(func() error {
			if err := h.StartDocker(w.ctx); err != nil {
				return err
			}
			_, err := h.Out(w.ctx, "docker", "run", "--rm", lab.Image, "true")
			return err
		})
	}
	w.try(g.Wait())
}

// launch starts meshd on a host and plans the check that a reset leaves nothing.
func (w *world) launch(h *lab.Host, args ...string) {
	w.t.Helper()
	w.launchWith(h, nil, args...)
}

func (w *world) launchWith(h *lab.Host, env []string, args ...string) {
	w.t.Helper()
	w.planReset(h)
	w.try(h.LaunchWith(w.ctx, env, args...))
}

func (w *world) planReset(h *lab.Host) {
	w.t.Helper()
	if w.before[h] != nil {
		return
	}
	w.rebase(h)
	w.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if r, err := h.Ctl(ctx, "reset", "--force"); err != nil || r.Exit != 0 {
			w.t.Errorf("%s: reset: %v %s\n%s", h.Name, err, r, h.Log())
			return
		}
		if err := h.WaitSame(ctx, w.before[h]); err != nil {
			w.t.Errorf("after reset %v", err)
		}
	})
}

// rebase takes the host as it is for what a reset has to restore.
func (w *world) rebase(h *lab.Host) {
	w.t.Helper()
	s, err := h.Snapshot(w.ctx)
	w.try(err)
	w.before[h] = s
}

// mesh launches meshd on all hosts, the first one being everybody's target, and waits for the full mesh.
func (w *world) mesh(args ...string) {
	w.t.Helper()
	for i, h := range w.Hosts {
		if i == 0 {
			w.launch(h, args...)
		} else {
			w.launch(h, append(args[:len(args):len(args)], w.Host(1).Addr.String())...)
		}
	}
	_, err := lab.WaitMesh(w.ctx, 15*time.Second, w.Hosts...)
	w.try(err)
}

// netns makes a plain container, attaches it at an address such as "10.2.1.1/24" and removes it at the end.
func (w *world) netns(h *lab.Host, name, addr string) *member {
	w.t.Helper()
	c, err := h.Netns(w.ctx, name)
	w.try(err)
	return w.member(c, addr)
}

// container is netns with a Docker container.
func (w *world) container(h *lab.Host, name, addr string) *member {
	w.t.Helper()
	c, err := h.Docker(w.ctx, name)
	w.try(err)
	return w.member(c, addr)
}

// member is an attached container with the address it has on the mesh.
type member struct {
	*lab.Container
	addr netip.Addr
}

func (w *world) member(c *lab.Container, addr string) *member {
	w.t.Helper()
	w.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := c.Remove(ctx); err != nil {
			w.t.Error(err)
		}
	})
	got, err := c.Attach(w.ctx, addr)
	w.try(err)
	want := netip.MustParsePrefix(addr).Addr()
	if len(got) != 1 || got[0] != want {
		w.t.Fatalf("attach %s %s printed %v", addr, c.Ref, got)
	}
	return &member{c, want}
}

// pings wants every one of count pings to be answered, at least at the third time of asking: a burst may
// meet a machine that is busy with something else.
func (w *world) pings(from, to *member, count, size int) {
	w.t.Helper()
	for try := range 3 {
		got, out, err := from.Ping(w.ctx, to.addr, count, size)
		w.try(err)
		if got == count {
			return
		}
		report := w.t.Logf
		if try == 2 {
			report = w.t.Errorf
		}
		report("%s to %s: %d of %d pings with %d bytes were answered\n%s", from.Name, to.Name, got, count, size, out)
	}
}

// stream sends bytes of TCP and compares checksums.
func (w *world) stream(from, to *member, bytes int64, limit time.Duration) probe.Transfer {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, limit)
	defer cancel()
	l, err := to.Listen(ctx, netip.AddrPortFrom(to.addr, 0).String())
	w.try(err)
	defer l.Close()
	t, err := probe.Stream(ctx, l, func() (net.Conn, error) { return from.Dial(ctx, "tcp", l.Addr().String()) }, bytes, 1)
	if err != nil {
		w.t.Errorf("TCP from %s to %s: %v", from.Name, to.Name, err)
	}
	return t
}

// watched is a run of numbered datagrams in the background.
type watched struct {
	stop   context.CancelFunc
	report probe.Report
	err    error
	done   chan struct{}
}

// watch starts sending numbered datagrams from one container to another.
func (w *world) watch(from, to *member, interval time.Duration) *watched {
	w.t.Helper()
	src, err := from.ListenUDP(w.ctx, netip.AddrPortFrom(from.addr, 0).String())
	w.try(err)
	dst, err := to.ListenUDP(w.ctx, netip.AddrPortFrom(to.addr, 0).String())
	w.try(err)
	ctx, cancel := context.WithCancel(w.ctx)
	p := &watched{stop: cancel, done: make(chan struct{})}
	port := dst.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	go func() {
		defer close(p.done)
		p.report, p.err = probe.Datagrams{Interval: interval, Size: 100}.Run(ctx, src, dst, netip.AddrPortFrom(to.addr, port))
		p.err = errors.Join(p.err, src.Close(), dst.Close())
	}()
	w.t.Cleanup(func() { cancel(); <-p.done })
	return p
}

// end stops the datagrams and gives the count.
func (w *world) end(p *watched) probe.Report {
	w.t.Helper()
	p.stop()
	<-p.done
	w.try(p.err)
	return p.report
}

// refused runs meshctl, which has to fail with that status, print nothing on standard output, and say
// each of the words on standard error.
func (w *world) refused(h *lab.Host, exit int, words []string, args ...string) lab.Result {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, 30*time.Second)
	defer cancel()
	r, err := h.Ctl(ctx, args...)
	w.try(err)
	if r.Exit != exit {
		w.t.Errorf("%s, want exit %d", r, exit)
	}
	if strings.TrimSpace(r.Stdout) != "" {
		w.t.Errorf("%s: a refusal belongs on standard error", r)
	}
	for _, word := range words {
		if !strings.Contains(strings.ToLower(r.Stderr), strings.ToLower(word)) {
			w.t.Errorf("%s: the message has no %q", r, word)
		}
	}
	if lines := strings.Count(strings.TrimSpace(r.Stderr), "\n"); lines > 2 {
		w.t.Errorf("%s: the message has %d lines", r, lines+1)
	}
	return r
}

// within fails the test if something took longer than it may.
func (w *world) within(what string, took, limit time.Duration) {
	w.t.Helper()
	w.t.Logf("%s: %v (at most %v)", what, took.Round(time.Millisecond), limit)
	if took > limit {
		w.t.Errorf("%s took %v, want at most %v", what, took, limit)
	}
}
