package integration

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"meshd/integration/lab"
)

// TestProxyOptions launches meshd with each of the proxy's options.
func TestProxyOptions(t *testing.T) {
	w := newWorld(t, 1, 3*time.Minute)
	h := w.Host(1)
	w.docker(h)
	const look = "hostname; ip -o -4 addr show dev ethmesh; ip route; cat /etc/hosts /etc/resolv.conf"
	for _, c := range []struct {
		launch, run      string
		unwanted, wanted []string
	}{
		{"", "", nil, []string{"name\n", "ethmesh", "224.0.0.0/4", "name.mesh.internal", "nameserver 172.17.0.1", "search mesh.internal"}},
		{"--no-default-ipalloc", "", []string{"ethmesh", "nameserver 172.17.0.1"}, nil},
		{"--no-default-ipalloc", "-e MESH_CIDR=", nil, []string{"ethmesh"}},
		{"--without-dns", "", []string{"mesh.internal", "172.17.0.1\n"}, []string{"ethmesh"}},
		{"--without-dns", "-h own.mesh.internal", []string{"nameserver 172.17.0.1"}, []string{"own.mesh.internal"}},
		{"--no-dns", "", []string{"mesh.internal"}, []string{"ethmesh"}},
		{"--no-multicast-route", "", []string{"224.0.0.0/4"}, []string{"ethmesh"}},
		{"--no-rewrite-hosts", "", []string{"10.32.0.1\tname"}, []string{"ethmesh", "name.mesh.internal"}},
		{"--hostname-from-label role", "--label role=chief", nil, []string{"chief\n", "chief.mesh.internal"}},
		{"--hostname-from-label role", "", nil, []string{"name\n", "name.mesh.internal"}},
		{"--hostname-match ^(n)am(.)$ --hostname-replacement $2-$1", "", nil, []string{"e-n\n", "e-n.mesh.internal"}},
		{"--dns-domain other.domain", "", []string{"mesh.internal"}, []string{"name.other.domain", "search other.domain"}},
		{"--ifname mesh9", "", []string{"ethmesh"}, []string{"dev mesh9"}},
	} {
		w.launch(h, strings.Fields(c.launch)...)
		r := w.dockerAt(h, proxySocket, "", slices.Concat([]string{"run", "--rm", "--name", "name", "--add-host", "far:192.0.2.1"}, strings.Fields(c.run), []string{lab.Image, "sh", "-c", look})...)
		out := strings.ReplaceAll(r.Stdout, "Device \"ethmesh\"", "")
		for _, s := range c.wanted {
			if !strings.Contains(out, s) {
				t.Errorf("%q %q: no %q in %s", c.launch, c.run, s, r)
			}
		}
		for _, s := range c.unwanted {
			if strings.Contains(out, s) {
				t.Errorf("%q %q: %q in %s", c.launch, c.run, s, r)
			}
		}
		if strings.Count(out, "192.0.2.1") == 0 {
			t.Errorf("%q %q: --add-host is lost: %s", c.launch, c.run, r)
		}
		_, err := h.Must(w.ctx, "stop")
		w.try(err)
	}
	w.launch(h, "--rewrite-inspect")
	m := w.proxied(h, "shown")
	if got := w.proxyDocker(h, "inspect", "-f", "{{.NetworkSettings.IPAddress}}/{{.NetworkSettings.IPPrefixLen}}", "shown"); got != m.addr.String()+"/12" {
		t.Errorf("inspect shows %s, want %v", got, m.addr)
	}
}

// TestProxyChurn starts and ends containers from all sides at once, and wants nothing to be left. In long runs the
// last of it is K10: 200 docker run --rm at a time, twenty times over, beside a part of the same without the proxy.
func TestProxyChurn(t *testing.T) {
	w := newWorld(t, 1, scaled(10*time.Minute, 3*time.Hour))
	h := w.Host(1)
	w.docker(h)
	w.mesh()
	w.proxyDocker(h, "run", "--rm", lab.Image, "true") // from now on the waiter is installed
	w.try(lab.Until(w.ctx, 10*time.Second, "that container to be gone", func() bool {
		out, err := h.Must(w.ctx, "ps")
		own := strings.Count(out, "\n") == 0 // the host's own line
		return err == nil && own && len(h.Glob("/sys/fs/bpf/meshd/links/port_in-*")) == 0
	}))
	before, err := h.Snapshot(w.ctx)
	w.try(err)
	idle := w.sample(h)
	nothingLeft := func(w *world) {
		w.t.Helper()
		start := time.Now()
		w.try(lab.Until(w.ctx, time.Minute, "everything to be gone", func() bool {
			out, err := h.Out(w.ctx, "docker", "ps", "-aq")
			return err == nil && out == ""
		}))
		w.try(h.WaitSame(w.ctx, before))
		w.within("nothing is left", time.Since(start), time.Minute)
		// Idle connections to dockerd are among them, which end by themselves.
		var now sample
		err := lab.Until(w.ctx, 90*time.Second, "meshd to be idle again", func() bool {
			now = w.sample(h)
			return now.fds <= idle.fds+8 && now.goroutines <= idle.goroutines+16
		})
		w.t.Logf("meshd: descriptors %.0f to %.0f, goroutines %.0f to %.0f, %.0f MB resident", idle.fds, now.fds, idle.goroutines, now.goroutines, now.rss/1e6)
		if err != nil {
			w.t.Error(err)
		}
	}
	t.Run("EndedFromOutside", func(t *testing.T) {
		w := w.in(t)
		failed := w.crowd(scaled(10, 20), scaled(4, 20), func(name string, worker int) lab.Result {
			if worker%2 == 0 {
				return w.crowdRun(h, proxySocket, "run", "--rm", "--name", name, "-e", "MESH_CIDR=net:10.32.9.0/27", lab.Image, "true")
			}
			var killer sync.WaitGroup
			defer killer.Wait()
			killer.Go(func() { // at whatever moment
				w.try(lab.Until(w.ctx, time.Minute, "something to kill", func() bool {
					r, err := h.Run(w.ctx, "docker", "kill", name)
					return err == nil && r.Exit == 0
				}))
			})
			return w.crowdRun(h, proxySocket, "run", "-d", "--rm", "--name", name, "-e", "MESH_CIDR=net:10.32.9.0/27", lab.Image, "sleep", "1000")
		})
		if failed > 0 {
			t.Errorf("%d failed", failed)
		}
		nothingLeft(w)
	})
	t.Run("AtATime", func(t *testing.T) {
		w := w.in(t)
		for _, endpoint := range []string{dockerSocket, proxySocket} {
			each := scaled(1, map[string]int{dockerSocket: 5, proxySocket: 20}[endpoint])
			failed := w.crowd(scaled(10, 200), each, func(name string, _ int) lab.Result {
				return w.crowdRun(h, endpoint, "run", "--rm", "--name", name, "-e", "MESH_CIDR=net:10.32.12.0/22", lab.Image, "true")
			})
			if failed > 0 && endpoint == proxySocket {
				t.Errorf("%d failed by the proxy", failed)
			}
			nothingLeft(w)
		}
	})
	// All thirty addresses of the subnet can be had.
	for i := range 30 {
		name := fmt.Sprintf("full%d", i)
		r := w.dockerAt(h, proxySocket, "", "run", "-d", "--name", name, "-e", "MESH_CIDR=net:10.32.9.0/27", lab.Image, "sleep", "1000000")
		if r.Exit != 0 {
			t.Fatalf("address %d of 30 is gone: %s", i+1, r)
		}
	}
	var names []string
	for i := range 30 {
		names = append(names, fmt.Sprintf("full%d", i))
	}
	w.dockerAt(h, proxySocket, "", append([]string{"rm", "-f"}, names...)...)
}

// crowdRun runs the Docker client against an endpoint, from any goroutine.
func (w *world) crowdRun(h *lab.Host, endpoint string, args ...string) lab.Result {
	r, err := h.RunWith(w.ctx, func(c *exec.Cmd) { c.Env = append(c.Env, "DOCKER_HOST="+endpoint) }, append([]string{"docker"}, args...)...)
	if err != nil {
		r.Exit, r.Stderr = -1, err.Error()
	}
	return r
}

// crowd has workers run containers, each so many one after the other, and gives the number of those that failed.
func (w *world) crowd(workers, each int, run func(name string, worker int) lab.Result) (failed int) {
	w.t.Helper()
	start := time.Now()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var took []time.Duration
	for worker := range workers {
		wg.Go(func() {
			for i := range each {
				start := time.Now()
				r := run(fmt.Sprintf("c%d-%d", worker, i), worker)
				mu.Lock()
				took = append(took, time.Since(start))
				if r.Exit != 0 {
					if failed++; failed <= 5 {
						w.t.Log(r)
					}
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	slices.Sort(took)
	w.t.Logf("%d at a time, %d each: %d failed, %v in all, each %v (median), %v (longest)", workers, each, failed,
		time.Since(start).Round(time.Second), took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
	return failed
}
