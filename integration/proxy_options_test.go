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

// TestProxyChurn starts and ends containers from all sides at once, and wants nothing to be left.
func TestProxyChurn(t *testing.T) {
	w := newWorld(t, 1, 10*time.Minute)
	h := w.Host(1)
	w.docker(h)
	w.mesh()
	w.proxyDocker(h, "run", "--rm", lab.Image, "true") // from now on the waiter is installed
	w.try(lab.Until(w.ctx, 10*time.Second, "that container to be gone", func() bool {
		out, err := h.Must(w.ctx, "ps")
		return err == nil && strings.Count(out, "\n") == 0 // the host's own line
	}))
	before, err := h.Snapshot(w.ctx)
	w.try(err)
	var wg sync.WaitGroup
	for worker := range scaled(10, 20) {
		wg.Go(func() {
			for i := range scaled(4, 20) {
				name := fmt.Sprintf("c%d-%d", worker, i)
				args := []string{"run", "--rm", "--name", name, "-e", "MESH_CIDR=net:10.32.9.0/27", lab.Image, "true"}
				if worker%2 == 1 { // ended from outside, at whatever moment
					args = []string{"run", "-d", "--rm", "--name", name, "-e", "MESH_CIDR=net:10.32.9.0/27", lab.Image, "sleep", "1000"}
				}
				var killer sync.WaitGroup
				if worker%2 == 1 {
					killer.Go(func() {
						err := lab.Until(w.ctx, time.Minute, "something to kill", func() bool {
							r, err := h.Run(w.ctx, "docker", "kill", name)
							return err == nil && r.Exit == 0
						})
						if err != nil {
							w.t.Error(err)
						}
					})
				}
				r, err := h.RunWith(w.ctx, func(c *exec.Cmd) { c.Env = append(c.Env, "DOCKER_HOST="+proxySocket) }, append([]string{"docker"}, args...)...)
				killer.Wait()
				if err != nil || r.Exit != 0 {
					w.t.Errorf("%v %s", err, r)
				}
			}
		})
	}
	wg.Wait()
	start := time.Now()
	err = lab.Until(w.ctx, time.Minute, "everything to be gone", func() bool {
		out, err := h.Out(w.ctx, "docker", "ps", "-aq")
		return err == nil && out == ""
	})
	w.try(err)
	w.try(h.WaitSame(w.ctx, before))
	w.within("nothing is left", time.Since(start), time.Minute)
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
