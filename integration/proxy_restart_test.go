package integration

import (
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"meshd/integration/lab"
)

// killMeshd ends a host's meshd without a chance to do anything.
func (w *world) killMeshd(h *lab.Host) {
	w.t.Helper()
	pid := h.Meshd()
	if pid == 0 {
		w.t.Fatalf("%s: no meshd runs\n%s", h.Name, h.Log())
	}
	w.try(h.Kill(w.ctx, pid, syscall.SIGKILL))
	w.try(lab.Until(w.ctx, 5*time.Second, "meshd to end", func() bool { return h.Meshd() == 0 }))
}

// killContainer ends the first process of a container from outside, as a crash does.
func (w *world) killContainer(h *lab.Host, name string) {
	w.t.Helper()
	out, err := h.Out(w.ctx, "docker", "inspect", "-f", "{{.State.Pid}}", name)
	w.try(err)
	pid, err := strconv.Atoi(out)
	w.try(err)
	w.try(h.Kill(w.ctx, pid, syscall.SIGKILL))
	w.try(lab.Until(w.ctx, 10*time.Second, "dockerd to notice", func() bool {
		now, err := h.Out(w.ctx, "docker", "inspect", "-f", "{{.State.Pid}}", name)
		return err == nil && now != out
	}))
}

// TestProxyRestarts restarts containers, dockerd, meshd and the host in every order.
func TestProxyRestarts(t *testing.T) {
	w := newWorld(t, 2, scaled(6*time.Minute, time.Hour))
	h1, h2 := w.Host(1), w.Host(2)
	w.docker(h1, h2)
	w.mesh()
	asks := w.proxied(h1, "asks")
	all := map[string]*member{
		"always":    w.proxied(h2, "always", "--restart", "always"),
		"unless":    w.proxied(h2, "unless", "--restart", "unless-stopped", "-e", "MESH_CIDR=net:10.32.2.0/24"),
		"onfailure": w.proxied(h2, "onfailure", "--restart", "on-failure", "-e", "MESH_CIDR=ip:10.9.1.1/24"),
		"plain":     w.proxied(h2, "plain"),
	}
	everyone := []string{"always", "unless", "onfailure", "plain"}
	// works wants containers to be attached as at first, resolvable and, in the default subnet, reachable.
	works := func(t *testing.T, what string, names ...string) {
		t.Helper()
		w := w.in(t)
		start := time.Now()
		for _, name := range names {
			m := w.waitAttached(h2, name, all[name].addr)
			w.waitName(asks.Container, dockerDNS, name+".mesh.internal.", 10*time.Second, m.addr.String())
			if name == "always" || name == "plain" {
				if _, err := asks.WaitPing(w.ctx, m.addr, 5*time.Second); err != nil {
					t.Errorf("after %s: %v", what, err)
				}
			}
		}
		t.Logf("%s: working after %v", what, time.Since(start).Round(time.Millisecond))
	}
	step := func(name string, f func(t *testing.T, w *world)) {
		t.Run(name, func(t *testing.T) { f(t, w.in(t)) })
	}
	launch := func(w *world) { w.launch(h2, h1.Addr.String()) }

	step("DockerRestart", func(t *testing.T, w *world) {
		for _, name := range everyone {
			w.dockerAt(h2, map[bool]string{true: proxySocket, false: dockerSocket}[name == "plain"], "", "restart", "-t", "0", name)
		}
		works(t, "docker restart", everyone...)
	})
	step("ContainersCrash", func(t *testing.T, w *world) {
		for _, name := range everyone {
			w.killContainer(h2, name)
		}
		works(t, "crash", "always", "unless", "onfailure")
		w.proxyDocker(h2, "start", "plain")
		works(t, "docker start", "plain")
	})
	step("KillMeshd", func(t *testing.T, w *world) {
		out, err := h2.Out(w.ctx, "docker", "inspect", "-f", "{{.State.StartedAt}}", "plain")
		w.try(err)
		w.killMeshd(h2)
		launch(w)
		works(t, "kill -9 of meshd", everyone...)
		if again, err := h2.Out(w.ctx, "docker", "inspect", "-f", "{{.State.StartedAt}}", "plain"); err != nil || again != out {
			t.Errorf("the container was restarted: %v %s", err, again)
		}
	})
	step("CrashWhileMeshdIsAway", func(t *testing.T, w *world) {
		w.killMeshd(h2)
		for _, name := range everyone {
			w.killContainer(h2, name)
		}
		w.dockerAt(h2, dockerSocket, "", "start", "plain")
		launch(w)
		works(t, "crash while meshd is away", everyone...)
	})
	step("KillDockerd", func(t *testing.T, w *world) {
		w.try(h2.StopDocker(true))
		w.try(h2.StartDocker(w.ctx))
		works(t, "kill -9 of dockerd", "always")
		w.dockerAt(h2, proxySocket, "", "start", "plain", "unless", "onfailure") // Docker takes what it ended itself for stopped
		works(t, "docker start", everyone...)
	})
	for i, order := range [][]string{
		{"kill meshd", "kill dockerd", "start dockerd", "start meshd"},
		{"kill meshd", "kill dockerd", "start meshd", "start dockerd"},
		{"kill dockerd", "kill meshd", "start dockerd", "start meshd"},
		{"kill dockerd", "kill meshd", "start meshd", "start dockerd"},
		{"stop dockerd", "stop meshd", "start meshd", "start dockerd"},
		{"reboot", "start dockerd", "start meshd"},
		{"reboot", "start meshd", "start dockerd"},
	} {
		step("Order"+strconv.Itoa(i+1), func(t *testing.T, w *world) {
			for _, what := range order {
				switch what {
				case "kill meshd":
					w.killMeshd(h2)
				case "stop meshd":
					_, err := h2.Must(w.ctx, "stop")
					w.try(err)
				case "start meshd":
					launch(w)
				case "kill dockerd":
					w.try(h2.StopDocker(true))
				case "stop dockerd":
					w.try(h2.StopDocker(false))
				case "start dockerd":
					w.try(h2.StartDocker(w.ctx))
				case "reboot":
					w.try(h2.Reboot(w.ctx))
				}
			}
			works(t, fmt.Sprint(order), "always")
			w.dockerAt(h2, proxySocket, "", "start", "plain", "unless", "onfailure")
			works(t, "docker start", everyone...)
		})
	}
	step("KilledAnywhere", func(t *testing.T, w *world) { testKilledAnywhere(w, h2, launch) })
	step("StateLost", func(t *testing.T, w *world) {
		w.proxyDocker(h2, "create", "--name", "later", "-e", "MESH_CIDR=ip:10.9.1.9/24", lab.Image, "sleep", "1000000")
		w.killMeshd(h2)
		_, err := h2.Out(w.ctx, "/bin/sh", "-c", "ip link del mesh; rm -rf /var/lib/meshd")
		w.try(err)
		w.dockerAt(h2, dockerSocket, "", "start", "later")
		launch(w)
		c := w.waitAttached(h2, "later", netip.Addr{})
		if c.addr.String() != "10.9.1.9" {
			t.Errorf("got %v", c.addr)
		}
		w.waitAttached(h2, "onfailure", all["onfailure"].addr) // it asked for its address by itself
		w.proxyDocker(h2, "rm", "-f", "later")
	})
	step("PlainStart", func(t *testing.T, w *world) {
		w.proxyDocker(h2, "create", "--name", "later", lab.Image, "sleep", "1000000")
		w.dockerAt(h2, dockerSocket, "", "start", "later")
		w.waitAttached(h2, "later", netip.Addr{})
		w.proxyDocker(h2, "rm", "-f", "later")
	})
	// dockerd is another one than at first: what a reset has to restore is a host with that one.
	for _, name := range everyone {
		w.dockerAt(h2, dockerSocket, "", "rm", "-f", name)
	}
	_, err := h2.Must(w.ctx, "reset", "--force")
	w.try(err)
	w.rebase(h2)
	launch(w)
}

// testKilledAnywhere is K7: meshd is killed at any moment of a docker run and, in long runs, dockerd is killed or sleeps. What is
// there afterwards is attached as a whole or can be started again, and no address is lost. (In every run proxy has it
// with a daemon of its own: TestDaemonDiesAnywhere, TestSlowDaemon.)
func testKilledAnywhere(w *world, h *lab.Host, launch func(*world)) {
	const options = "-d --stop-timeout 1 -e MESH_CIDR=net:10.32.9.8/29" // which has six addresses
	run := func(name string) []string {
		return slices.Concat([]string{"docker", "run", "--name", name}, strings.Fields(options), []string{lab.Image, "sleep", "1000000"})
	}
	viaProxy := func(c *exec.Cmd) { c.Env = append(c.Env, "DOCKER_HOST="+proxySocket) }
	start := time.Now()
	r, err := h.RunWith(w.ctx, viaProxy, run("whole")...)
	w.try(err)
	whole := time.Since(start)
	if r.Exit != 0 {
		w.t.Fatal(r)
	}
	w.dockerAt(h, dockerSocket, "", "rm", "-f", "whole")
	meshds, dockerds, sleeps := scaled(4, 60), scaled(0, 20), scaled(0, 8)
	seen := map[string]int{}
	for i := range meshds + dockerds + sleeps {
		name := fmt.Sprintf("k%d", i)
		p, err := h.Start(w.ctx, viaProxy, run(name)...)
		w.try(err)
		rounds, n := meshds, i
		if i >= meshds {
			rounds, n = dockerds, i-meshds
		}
		if n >= rounds {
			rounds, n = sleeps, n-rounds
		}
		w.rest(whole * time.Duration(2*n+1) / time.Duration(2*rounds))
		what := "meshd killed"
		switch {
		case i < meshds:
			w.killMeshd(h)
			_ = p.Wait(w.ctx) // well or not, it has ended
			launch(w)
		case i < meshds+dockerds:
			what = "dockerd killed"
			w.try(h.StopDocker(true))
			if err := h.StartDocker(w.ctx); err != nil { // containerd was in the middle of something
				w.t.Log(err)
				w.try(h.StartDocker(w.ctx))
			}
			_ = p.Wait(w.ctx)
		default: // for longer than meshd waits for an answer
			what = "dockerd asleep for 30 s"
			pid := h.PIDs("dockerd")[0]
			w.try(h.Kill(w.ctx, pid, syscall.SIGSTOP))
			w.rest(30 * time.Second)
			w.try(h.Kill(w.ctx, pid, syscall.SIGCONT))
			if err := p.Wait(w.ctx); err != nil {
				w.t.Errorf("%s: %s: %v", name, what, err)
			}
		}
		state := w.dockerAt(h, dockerSocket, "", "inspect", "-f", "{{.State.Status}}", name)
		status := strings.TrimSpace(state.Stdout)
		seen[what+": "+status]++
		switch status {
		case "":
			w.proxyDocker(h, run(name)[1:]...)
		case "created", "exited":
			// A dockerd that was killed may have left behind, in containerd, what keeps it from starting that one.
			if lab.Until(w.ctx, 5*time.Second, "a start", func() bool { return w.dockerAt(h, proxySocket, "", "start", name).Exit == 0 }) != nil {
				if r := w.dockerAt(h, dockerSocket, "", "start", name); r.Exit == 0 || i < meshds {
					w.t.Errorf("%s: %s, then it was %s: not to be started by the proxy; directly: %s", name, what, status, r)
				}
				seen[what+": broken"]++
				w.dockerAt(h, dockerSocket, "", "rm", "-f", name)
				w.proxyDocker(h, run(name)[1:]...)
			}
		}
		m := w.waitAttached(h, name, netip.Addr{})
		if !netip.MustParsePrefix("10.32.9.8/29").Contains(m.addr) {
			w.t.Errorf("%s: %s, then it was %s: attached at %v", name, what, status, m.addr)
		}
		if i < meshds && i%2 == 1 { // removed while nobody looks
			w.killMeshd(h)
			w.dockerAt(h, dockerSocket, "", "rm", "-f", name)
			launch(w)
		} else {
			w.dockerAt(h, dockerSocket, "", "rm", "-f", name)
		}
	}
	w.t.Logf("a docker run takes %v; interrupted, the container was %v", whole.Round(time.Millisecond), seen)
	start = time.Now()
	var names []string
	for i := range 6 {
		name := fmt.Sprintf("full%d", i)
		names = append(names, name)
		err := lab.Until(w.ctx, time.Minute, "the addresses to be free again", func() bool {
			r := w.dockerAt(h, proxySocket, "", run(name)[1:]...)
			if r.Exit != 0 {
				w.dockerAt(h, dockerSocket, "", "rm", "-f", name)
			}
			return r.Exit == 0
		})
		w.try(err)
	}
	w.within("all addresses are free again", time.Since(start), time.Minute)
	w.dockerAt(h, dockerSocket, "", append([]string{"rm", "-f"}, names...)...)
}

// waitAttached waits until a container runs and has one address, this one if it is given. Unlike adopted it
// leaves removing the container to others.
func (w *world) waitAttached(h *lab.Host, name string, want netip.Addr) *member {
	w.t.Helper()
	var m *member
	var got []netip.Prefix
	err := lab.Until(w.ctx, 20*time.Second, name+" to be attached", func() bool {
		c, err := h.Adopt(w.ctx, name, name)
		if err != nil {
			return false
		}
		got, err = overlayAddrs(c)
		if err != nil || len(got) != 1 || want.IsValid() && got[0].Addr() != want {
			return false
		}
		m = &member{c, got[0].Addr()}
		return true
	})
	if err != nil {
		out, _ := h.Out(w.ctx, "docker", "ps", "-a")
		w.t.Fatalf("%s: %v: it has %v, want %v\n%s\n%s", h.Name, err, got, want, out, h.Log())
	}
	return m
}

// TestProxyFiftyReboots is K9: dockerd with containers that restart always, and meshd, start in varying order and at
// once, again and again. TestProxyRestarts has some of it in every run.
func TestProxyFiftyReboots(t *testing.T) {
	if !long() {
		t.Skip("takes minutes; MESHD_LONG=1 runs it")
	}
	w := newWorld(t, 1, 30*time.Minute)
	h := w.Host(1)
	w.docker(h)
	w.mesh()
	all := map[string]*member{
		"any":    w.proxied(h, "any", "--restart", "always"),
		"subnet": w.proxied(h, "subnet", "--restart", "always", "-e", "MESH_CIDR=net:10.32.2.0/24"),
		"exact":  w.proxied(h, "exact", "--restart", "always", "-e", "MESH_CIDR=10.9.1.1/24"),
	}
	var docker, attached []time.Duration
	for i := range 50 {
		w.try(h.Reboot(w.ctx))
		start := time.Now()
		dockerd := func() {
			start := time.Now()
			if err := h.StartDocker(w.ctx); err != nil {
				t.Error(err)
			}
			docker = append(docker, time.Since(start))
		}
		switch i % 3 {
		case 0:
			dockerd()
			w.launch(h)
		case 1:
			w.launch(h)
			dockerd()
		case 2:
			var both sync.WaitGroup
			both.Go(dockerd)
			w.launch(h)
			both.Wait()
		}
		for name, m := range all {
			w.waitAttached(h, name, m.addr)
		}
		attached = append(attached, time.Since(start))
	}
	slices.Sort(docker)
	slices.Sort(attached)
	t.Logf("dockerd answered after %v, at most %v; all were attached after %v, at most %v", docker[25], docker[49], attached[25], attached[49])
	w.dockerAt(h, dockerSocket, "", "rm", "-f", "any", "subnet", "exact")
	_, err := h.Must(w.ctx, "reset", "--force")
	w.try(err)
	w.rebase(h)
	w.launch(h)
}
