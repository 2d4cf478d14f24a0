package integration

import (
	"context"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"meshd/integration/lab"
)

const proxySocket = "unix:///run/meshd/docker.sock"

// docker runs the Docker client against the proxy.
func (w *world) viaProxy(h *lab.Host, args ...string) (lab.Result, error) {
	return h.RunWith(w.ctx, func(c *exec.Cmd) { c.Env = append(c.Env, "DOCKER_HOST="+proxySocket) }, append([]string{"docker"}, args...)...)
}

// proxied starts a sleeping container through the proxy and gives it with its mesh address.
func (w *world) proxied(h *lab.Host, name string, options ...string) *member {
	w.t.Helper()
	args := append([]string{"run", "-d", "--name", name, "--stop-timeout", "1"}, options...)
	r, err := w.viaProxy(h, append(args, lab.Image, "sleep", "1000000")...)
	w.try(err)
	if r.Exit != 0 {
		w.t.Fatalf("%s: %s\n%s", h.Name, r, h.Log())
	}
	return w.adopted(h, name)
}

// adopted takes a container that has one address on the mesh.
func (w *world) adopted(h *lab.Host, name string) *member {
	w.t.Helper()
	c, err := h.Adopt(w.ctx, name, name)
	w.try(err)
	addrs, err := overlayAddrs(c)
	w.try(err)
	if len(addrs) != 1 {
		w.t.Fatalf("%s: container %s has addresses %v on the mesh\n%s", h.Name, name, addrs, h.Log())
	}
	w.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		_, _ = h.Run(ctx, "docker", "rm", "-f", name)
	})
	return &member{c, addrs[0].Addr()}
}

// waitAdopted waits until a container runs and has its address, and takes it.
func (w *world) waitAdopted(h *lab.Host, name string, want netip.Addr, limit time.Duration) *member {
	w.t.Helper()
	var got []netip.Prefix
	err := lab.Until(w.ctx, limit, name+" to be attached again", func() bool {
		c, err := h.Adopt(w.ctx, name, name)
		if err != nil {
			return false
		}
		got, err = overlayAddrs(c)
		return err == nil && len(got) == 1 && got[0].Addr() == want
	})
	if err != nil {
		out, _ := h.Out(w.ctx, "docker", "ps", "-a")
		w.t.Fatalf("%v: it has %v, want %v\n%s", err, got, want, out)
	}
	return w.adopted(h, name)
}

// TestDockerRun uses Docker as always, by the proxy.
func TestDockerRun(t *testing.T) {
	w := newWorld(t, 2, 4*time.Minute)
	h1, h2 := w.Host(1), w.Host(2)
	w.docker(h1, h2)
	w.mesh()
	out, err := h1.Must(w.ctx, "env")
	if err != nil || !strings.HasPrefix(out, "export DOCKER_HOST="+proxySocket) {
		t.Errorf("env: %v %q", err, out)
	}
	web := w.proxied(h1, "web")
	db := w.proxied(h2, "db")
	sub := w.proxied(h1, "sub", "-e", "MESH_CIDR=net:10.32.2.0/24")
	old := w.proxied(h2, "old", "-e", "WEAVE_CIDR=10.2.1.7/24")
	if old.addr.String() != "10.2.1.7" || !netip.MustParsePrefix("10.32.2.0/24").Contains(sub.addr) {
		t.Errorf("asked for addresses, got %v and %v", old.addr, sub.addr)
	}
	w.pings(web, db, 5, 56)
	w.pings(db, web, 5, 10000)
	t.Run("Names", func(t *testing.T) {
		w := w.in(t)
		for _, name := range []string{"db.mesh.internal", "web.mesh.internal"} {
			r, err := web.Exec(w.ctx, "nslookup", name)
			want := map[string]string{"db.mesh.internal": db.addr.String(), "web.mesh.internal": web.addr.String()}[name]
			if err != nil || r.Exit != 0 || !strings.Contains(r.Stdout, want) {
				t.Errorf("%v %s, want %s", err, r, want)
			}
		}
		r, err := web.Exec(w.ctx, "cat", "/etc/hosts")
		if err != nil || !strings.Contains(r.Stdout, web.addr.String()) {
			t.Errorf("/etc/hosts: %v %s", err, r)
		}
	})
	t.Run("ProcessStartsAttached", func(t *testing.T) {
		w := w.in(t)
		for _, options := range [][]string{nil, {"--read-only"}, {"--user", "1000:1000"}, {"--network", "none"}, {"--entrypoint", "/bin/ip"}} {
			args := append(append([]string{"run", "--rm"}, options...), lab.Image)
			if len(options) < 2 || options[0] != "--entrypoint" {
				args = append(args, "ip")
			}
			r, err := w.viaProxy(h1, append(args, "-o", "addr", "show", "dev", "ethmesh")...)
			if err != nil || r.Exit != 0 || !strings.Contains(r.Stdout, "inet 10.") {
				t.Errorf("%v %s", err, r)
			}
		}
	})
	t.Run("NotOurs", func(t *testing.T) {
		w := w.in(t)
		for _, options := range [][]string{{"-e", "MESH_CIDR=none"}, {"--network", "host"}} {
			args := append(append([]string{"run", "--rm"}, options...), lab.Image, "ip", "link", "show", "dev", "ethmesh")
			r, err := w.viaProxy(h1, args...)
			if err != nil || r.Exit == 0 {
				t.Errorf("attached although asked not to: %v %s", err, r)
			}
		}
	})
	t.Run("BadCIDRRefusedAtCreate", func(t *testing.T) {
		w := w.in(t)
		for bad, why := range map[string]string{
			"10.2.1": "length of the subnet is missing", "net:": "length of the subnet is missing", "nonsense": "length of the subnet is missing",
			"10.2.1.0/24": "network address", "10.2.1.255/24": "broadcast address", "10.2.1.1/24 x": `"x"`, "10.2.1.1/24 10.2.1.1/16": "the lengths 24 and 16",
			"none net:default": "stands alone", "10.2.1.1/24,": "not an address", "net:10.48.0.0/24": "outside the range 10.32.0.0/12",
		} {
			r, err := w.viaProxy(h1, "run", "--name", "bad", "-e", "MESH_CIDR="+bad, lab.Image, "true")
			w.try(err)
			if r.Exit != 125 || !strings.Contains(r.Stderr, "Error response from daemon: meshd: MESH_CIDR=") || !strings.Contains(r.Stderr, why) {
				t.Errorf("MESH_CIDR=%s: %s, want %q", bad, r, why)
			}
			if out, err := h1.Out(w.ctx, "docker", "ps", "-aq", "--filter", "name=^bad$"); err != nil || out != "" {
				t.Errorf("MESH_CIDR=%s left a container: %v %q", bad, err, out)
				_, _ = h1.Out(w.ctx, "docker", "rm", "-f", "bad")
			}
		}
	})
	t.Run("StreamsPass", func(t *testing.T) {
		w := w.in(t)
		r, err := h1.RunWith(w.ctx, func(c *exec.Cmd) {
			c.Env = append(c.Env, "DOCKER_HOST="+proxySocket)
			c.Stdin = strings.NewReader(strings.Repeat("0123456789abcdef", 1<<16))
		}, "docker", "run", "--rm", "-i", lab.Image, "md5sum")
		if err != nil || !strings.HasPrefix(r.Stdout, "0861c3ac06ae2f3bbeaae7d34c5a9b10") && len(strings.Fields(r.Stdout)) != 2 {
			t.Errorf("1 MiB through stdin: %v %s", err, r)
		}
		r, err = w.viaProxy(h1, "exec", "web", "echo", "hello")
		if err != nil || r.Stdout != "hello\n" {
			t.Errorf("exec: %v %s", err, r)
		}
		r, err = w.viaProxy(h1, "ps", "--format", "{{.Names}}")
		if err != nil || !strings.Contains(r.Stdout, "web") {
			t.Errorf("ps: %v %s", err, r)
		}
	})
	t.Run("FiftyInASmallSubnet", func(t *testing.T) {
		w := w.in(t)
		for i := range scaled(20, 50) { // a /28 has fourteen
			r, err := w.viaProxy(h2, "run", "--rm", "-e", "MESH_CIDR=net:10.32.9.16/28", lab.Image, "true")
			w.try(err)
			if r.Exit != 0 {
				t.Fatalf("run %d: %s", i, r)
			}
		}
	})
	restarted := false
	t.Run("RestartMatrix", func(t *testing.T) {
		w := w.in(t)
		keeps := w.proxied(h2, "keeps", "--restart", "always")
		everybody := []*member{db, keeps}
		check := func(what string, limit time.Duration, names ...string) {
			t.Helper()
			start := time.Now()
			for _, m := range everybody {
				if slices.Contains(names, m.Name) {
					again := w.waitAdopted(h2, m.Name, m.addr, limit)
					if _, err := web.WaitPing(w.ctx, again.addr, 5*time.Second); err != nil {
						t.Errorf("after %s: %v", what, err)
					}
				}
			}
			t.Logf("%s: working again after %v", what, time.Since(start))
		}
		_, err := h2.Out(w.ctx, "docker", "restart", "-t", "1", "db")
		w.try(err)
		check("docker restart", 10*time.Second, "db")
		pid, err := h2.Out(w.ctx, "docker", "inspect", "-f", "{{.State.Pid}}", "keeps")
		w.try(err)
		_, err = h2.Out(w.ctx, "/bin/sh", "-c", "kill -9 "+pid)
		w.try(err)
		check("kill -9 of a container's process", 10*time.Second, "keeps")
		w.try(h2.Kill(w.ctx, h2.Meshd(), syscall.SIGKILL))
		w.try(lab.Until(w.ctx, 5*time.Second, "meshd to end", func() bool { return h2.Meshd() == 0 }))
		w.launch(h2, h1.Addr.String())
		check("kill -9 of meshd", 10*time.Second, "db", "keeps")
		w.try(h2.StopDocker(true))
		w.try(h2.StartDocker(w.ctx))
		check("kill -9 of dockerd", 20*time.Second, "keeps")
		_, err = h2.Out(w.ctx, "docker", "start", "db")
		w.try(err)
		check("docker start", 10*time.Second, "db")
		w.try(h2.Reboot(w.ctx))
		w.try(h2.StartDocker(w.ctx)) // before meshd: it must not wait for it
		restarted = true
		w.launch(h2, h1.Addr.String())
		check("reboot", 20*time.Second, "keeps")
	})
	if restarted {
		// dockerd is another one, with other sockets and a bridge of another address: what has to be
		// restored is a host with that one and without a mesh.
		_, err := h2.Must(w.ctx, "reset")
		w.try(err)
		_, err = h2.Out(w.ctx, "docker", "rm", "-f", "keeps", "db", "old")
		w.try(err)
		w.rebase(h2)
		w.launch(h2)
	}
}

// TestProxyLatency compares docker run through the proxy with docker run without it, in turns.
func TestProxyLatency(t *testing.T) {
	w := newWorld(t, 1, 2*time.Minute)
	h := w.Host(1)
	w.docker(h)
	w.launch(h)
	var direct, proxied []time.Duration
	for i := range scaled(12, 100) {
		for _, x := range []struct {
			host string
			into *[]time.Duration
		}{{"unix:///run/docker.sock", &direct}, {proxySocket, &proxied}} {
			start := time.Now()
			r, err := h.RunWith(w.ctx, func(c *exec.Cmd) { c.Env = append(c.Env, "DOCKER_HOST="+x.host) }, "docker", "run", "--rm", lab.Image, "true")
			w.try(err)
			if r.Exit != 0 {
				t.Fatal(r)
			}
			if i > 0 { // the first one warms up
				*x.into = append(*x.into, time.Since(start))
			}
		}
	}
	slices.Sort(direct)
	slices.Sort(proxied)
	for _, x := range []struct {
		what string
		at   int // of a hundred
	}{{"median", 50}, {"99th percentile", 99}} {
		d, p := direct[len(direct)*x.at/100], proxied[len(proxied)*x.at/100]
		t.Logf("docker run --rm, %s: %v direct, %v by the proxy, %v more", x.what, d, p, p-d)
		if p-d > 50*time.Millisecond && (x.at == 50 || long()) { // of a dozen, the 99th is the worst
			t.Errorf("the proxy adds %v to the %s, want at most 50 ms", p-d, x.what)
		}
	}
}

// TestExpose has hosts and containers reach each other, and the firewall restored.
func TestExpose(t *testing.T) {
	w := newWorld(t, 3, 90*time.Second)
	h1, h2, outside := w.Host(1), w.Host(2), w.Host(3)
	w.docker(h1)
	w.launch(h1)
	w.launch(h2, h1.Addr.String())
	_, err := lab.WaitMesh(w.ctx, 15*time.Second, h1, h2)
	w.try(err)
	c1 := w.container(h1, "c1", "10.2.1.1/24")
	c2 := w.netns(h2, "c2", "10.2.1.2/24")
	self, err := h1.Self()
	w.try(err)
	host := &member{self, netip.MustParseAddr("10.2.1.101")}
	out, err := h1.Must(w.ctx, "expose", "10.2.1.101/24", "-h", "gate.mesh.internal")
	if err != nil || out != "10.2.1.101" {
		t.Errorf("expose: %v %q", err, out)
	}
	for _, m := range []*member{c1, c2} {
		_, err := host.WaitPing(w.ctx, m.addr, 5*time.Second)
		w.try(err)
		w.pings(m, host, 3, 56)
	}
	if out, err := h1.Must(w.ctx, "expose", "10.2.1.101/24"); err != nil || out != "10.2.1.101" {
		t.Errorf("expose again: %v %q", err, out)
	}
	if out, err := h1.Must(w.ctx, "ps", "mesh:expose"); err != nil || !strings.Contains(out, "10.2.1.101/24") {
		t.Errorf("ps mesh:expose: %v %q", err, out)
	}
	t.Run("OutsideThroughTheHost", func(t *testing.T) {
		w := w.in(t)
		_, err := c2.Out(w.ctx, "ip", "route", "add", "default", "via", "10.2.1.101")
		w.try(err)
		far := &member{addr: outside.Addr}
		far.Container, err = outside.Self()
		w.try(err)
		_, err = c2.WaitPing(w.ctx, far.addr, 5*time.Second)
		w.try(err)
		w.pings(c2, far, 3, 56)
	})
	t.Run("OutsideAsGateway", func(t *testing.T) {
		w := w.in(t)
		// The lab's router passes only what it has a route for, as a gateway of the user's would.
		w.try(w.RouteTo(w.ctx, "10.2.1.0/24", h1))
		far, err := outside.Self()
		w.try(err)
		_, err = far.WaitPing(w.ctx, c1.addr, 5*time.Second)
		w.try(err)
	})
	t.Run("FirewallComesBack", func(t *testing.T) {
		w := w.in(t)
		rules := func() string {
			out, err := h1.Out(w.ctx, "nft", "list", "tables")
			w.try(err)
			return out
		}
		before := rules()
		if !strings.Contains(before, "inet mesh") {
			t.Fatalf("there is no table of ours: %q", before)
		}
		_, err := h1.Out(w.ctx, "nft", "delete", "table", "inet", "mesh")
		w.try(err)
		start := time.Now()
		w.try(lab.Until(w.ctx, 5*time.Second, "the table to come back", func() bool { return strings.Contains(rules(), "inet mesh") }))
		w.within("firewall restored", time.Since(start), time.Second)
		far, err := outside.Self()
		w.try(err)
		w.pings(c2, &member{far, outside.Addr}, 3, 56)
	})
	out, err = h1.Must(w.ctx, "hide", "10.2.1.101/24")
	if err != nil || out != "10.2.1.101" {
		t.Errorf("hide: %v %q", err, out)
	}
	if n, _, err := c2.Ping(w.ctx, host.addr, 3, 56); err != nil || n > 0 {
		t.Errorf("a hidden host answers %d pings, %v", n, err)
	}
	w.pings(c1, c2, 3, 56)
}

// TestSubnetsAreApart wants containers of different subnets not to reach each other through us.
func TestSubnetsAreApart(t *testing.T) {
	w := newWorld(t, 2, time.Minute)
	w.mesh()
	a := w.netns(w.Host(1), "a", "10.2.1.1/24")
	near := w.netns(w.Host(1), "near", "10.2.2.2/24")
	far := w.netns(w.Host(2), "far", "10.2.2.3/24")
	friend := w.netns(w.Host(2), "friend", "10.2.1.2/24")
	_, err := a.WaitPing(w.ctx, friend.addr, 5*time.Second)
	w.try(err)
	_, err = near.WaitPing(w.ctx, far.addr, 5*time.Second)
	w.try(err)
	// A container that widens its own routes gets no further.
	for _, c := range []*member{a, near, far} {
		_, err := c.Out(w.ctx, "ip", "route", "replace", "10.2.0.0/16", "dev", "ethmesh")
		w.try(err)
	}
	var wg sync.WaitGroup
	for _, to := range []*member{near, far} {
		wg.Go(func() {
			if n, _, err := a.Ping(w.ctx, to.addr, 5, 56); err != nil || n > 0 {
				w.t.Errorf("%s of another subnet answers %d pings, %v", to.Name, n, err)
			}
		})
	}
	wg.Wait()
}
