package integration

import (
	"fmt"
	"net/netip"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"meshd/integration/lab"
)

const dockerSocket = "unix:///run/docker.sock"

// docker runs the Docker client against an endpoint, with something to read.
func (w *world) dockerAt(h *lab.Host, endpoint, stdin string, args ...string) lab.Result {
	w.t.Helper()
	r, err := h.RunWith(w.ctx, func(c *exec.Cmd) {
		c.Env = append(c.Env, "DOCKER_HOST="+endpoint)
		c.Stdin = strings.NewReader(stdin)
	}, append([]string{"docker"}, args...)...)
	w.try(err)
	return r
}

// proxyDocker is docker, which has to succeed, by the proxy.
func (w *world) proxyDocker(h *lab.Host, args ...string) string {
	w.t.Helper()
	r := w.dockerAt(h, proxySocket, "", args...)
	if r.Exit != 0 {
		w.t.Fatalf("%s: %s\n%s", h.Name, r, h.Log())
	}
	return strings.TrimSpace(r.Stdout)
}

// inMesh is what a container prints of its addresses on the mesh.
var inMesh = []string{"ip", "-o", "-4", "addr", "show", "dev", "ethmesh"}

func meshAddrs(out string) (addrs []string) {
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 3 && f[2] == "inet" {
			addrs = append(addrs, f[3])
		}
	}
	slices.Sort(addrs)
	return addrs
}

// TestProxyAddresses goes through what MESH_CIDR and WEAVE_CIDR can say, and the kinds of networks.
func TestProxyAddresses(t *testing.T) {
	w := newWorld(t, 1, 2*time.Minute)
	h := w.Host(1)
	w.docker(h)
	_, err := h.Out(w.ctx, "docker", "network", "create", "users")
	w.try(err)
	_, err = h.Out(w.ctx, "docker", "run", "--rm", "--network", "users", lab.Image, "true") // its bridge is as it stays
	w.try(err)
	w.mesh()
	w.proxied(h, "anchor")
	outside := w.proxied(h, "outside", "-e", "MESH_CIDR=net:10.34.0.0/24")
	for _, c := range []struct {
		options string
		want    string // each address as it is, or the subnet that it has to be in
	}{
		{"", "10.32.0.0/12"},
		{"-e MESH_CIDR=", "10.32.0.0/12"},
		{"-e MESH_CIDR=net:default", "10.32.0.0/12"},
		{"-e MESH_CIDR=net:10.32.2.0/24", "10.32.2.0/24"},
		{"-e MESH_CIDR=10.9.1.1/24", "10.9.1.1/24"},
		{"-e MESH_CIDR=ip:10.9.1.1/24", "10.9.1.1/24"},
		{"-e WEAVE_CIDR=10.9.1.2/24", "10.9.1.2/24"},
		{"-e WEAVE_CIDR=none -e MESH_CIDR=10.9.1.3/24", "10.9.1.3/24"},
		{"-e MESH_CIDR=10.9.1.4/24 -e WEAVE_CIDR=none", "10.9.1.4/24"},
		{"-e MESH_CIDR=none", ""},
		{"-e WEAVE_CIDR=none", ""},
		{"-e MESH_CIDR=none --network none", ""},
		{"--network none", "10.32.0.0/12"},
		{"--network bridge", "10.32.0.0/12"},
		{"--network default", "10.32.0.0/12"},
		{"--network host", ""},
		{"--network host -e MESH_CIDR=10.9.1.5/24", ""},
		{"--network container:outside", outside.addr.String() + "/24"},
		{"--network users", ""},
		{"--network users -e MESH_CIDR=", "10.32.0.0/12"},
		{"--network users -e MESH_CIDR=net:10.32.2.0/24", "10.32.2.0/24"},
	} {
		r := w.dockerAt(h, proxySocket, "", slices.Concat([]string{"run", "--rm"}, strings.Fields(c.options), []string{lab.Image}, inMesh)...)
		got := meshAddrs(r.Stdout)
		ok := r.Exit == 0 && len(got) == 1
		if c.want == "" {
			ok = r.Exit != 0 && len(got) == 0
		} else if ok {
			a, want := netip.MustParsePrefix(got[0]), netip.MustParsePrefix(c.want)
			ok = a == want || want == want.Masked() && want.Contains(a.Addr()) && a.Bits() == want.Bits()
		}
		if !ok {
			t.Errorf("%q: want %q, got %s", c.options, c.want, r)
		}
	}
	t.Run("Several", func(t *testing.T) {
		w := w.in(t)
		r := w.dockerAt(h, proxySocket, "", slices.Concat([]string{"run", "--rm", "-e", "MESH_CIDR=10.9.2.1/24 net:10.32.3.0/24 net:default"}, []string{lab.Image}, inMesh)...)
		got := meshAddrs(r.Stdout)
		if len(got) != 3 || !slices.Contains(got, "10.9.2.1/24") {
			t.Errorf("got %v %s", got, r)
		}
	})
	t.Run("UsersNetworkHasNames", func(t *testing.T) {
		w := w.in(t)
		w.proxied(h, "friend", "--network", "users", "-e", "MESH_CIDR=")
		for _, name := range []string{"friend", "anchor.mesh.internal"} {
			r := w.dockerAt(h, proxySocket, "", "run", "--rm", "--network", "users", "-e", "MESH_CIDR=", lab.Image, "nslookup", name)
			if r.Exit != 0 {
				t.Errorf("%s in a network of the user's: %s", name, r)
			}
		}
	})
	t.Run("InUse", func(t *testing.T) {
		w := w.in(t)
		first := w.proxied(h, "first", "-e", "MESH_CIDR=10.9.3.1/24")
		r := w.dockerAt(h, proxySocket, "", "run", "--name", "second", "-e", "MESH_CIDR=10.9.3.1/24", lab.Image, "sleep", "1000")
		if r.Exit != 125 || !strings.Contains(r.Stderr, "10.9.3.1") || !strings.Contains(r.Stderr, "first") {
			t.Errorf("an address in use: %s", r)
		}
		if state, err := h.Out(w.ctx, "docker", "inspect", "-f", "{{.State.Running}}", "second"); err != nil || state != "false" {
			t.Errorf("the container that was refused its address runs: %v %q", err, state)
		}
		// Once the address is free, the same container starts.
		w.proxyDocker(h, "rm", "-f", "first")
		err := lab.Until(w.ctx, 10*time.Second, "the address to be free", func() bool {
			return w.dockerAt(h, proxySocket, "", "start", "second").Exit == 0
		})
		w.try(err)
		if again := w.adopted(h, "second"); again.addr != first.addr {
			t.Errorf("got %v", again.addr)
		}
	})
	t.Run("NothingLeaks", func(t *testing.T) {
		w := w.in(t)
		out, err := h.Out(w.ctx, "docker", "ps", "-q", "--filter", "name=^/(anchor|outside)$")
		w.try(err)
		running := len(strings.Fields(out))
		err = lab.Until(w.ctx, 10*time.Second, "addresses to be given back", func() bool {
			out, err := h.Must(w.ctx, "ps")
			w.try(err)
			n := 0
			for line := range strings.Lines(out) {
				if !strings.HasPrefix(line, "mesh:expose") {
					n++
				}
			}
			return n <= running+2 // those of the other subtests that still run
		})
		w.try(err)
	})
}

// images makes images with an entrypoint and a command on every host: those that are given, and some that
// hold nothing but one static program.
func (w *world) images(h *lab.Host) {
	w.t.Helper()
	_, err := h.Out(w.ctx, "docker", "create", "--name", "base", lab.Image, "true")
	w.try(err)
	for name, change := range map[string]string{
		"both":    `ENTRYPOINT ["echo","entry"]|CMD ["command"]`,
		"entry":   `ENTRYPOINT ["echo","entry"]`,
		"cmd":     `CMD ["echo","command"]`,
		"shell":   `CMD echo $0 shell`,
		"user":    `USER 1000:1000|CMD ["id"]|WORKDIR /tmp`,
		"healthy": `HEALTHCHECK --interval=1s CMD ["ip","link","show","dev","ethmesh"]|CMD ["sleep","1000"]`,
		"broken":  `CMD ["no-such-program"]`,
		"denied":  `ENTRYPOINT ["/etc/passwd"]`,
	} {
		args := []string{"docker", "commit"}
		for c := range strings.SplitSeq(change, "|") {
			args = append(args, "-c", c)
		}
		_, err := h.Out(w.ctx, append(args, "base", name)...)
		w.try(err)
	}
	_, err = h.Out(w.ctx, "docker", "rm", "base")
	w.try(err)
	busybox, err := exec.LookPath("busybox")
	w.try(err)
	for name, change := range map[string]string{"scratch": `ENTRYPOINT ["/busybox","echo"]`, "bare": ""} {
		script := fmt.Sprintf("tar c -C %s busybox | docker import -c '%s' - %s", path.Dir(busybox), change, name)
		if change == "" {
			script = fmt.Sprintf("tar c -C %s busybox | docker import - %s", path.Dir(busybox), name)
		}
		_, err := h.Out(w.ctx, "/bin/sh", "-c", script)
		w.try(err)
	}
}

// ports are those of clients, which vary.
var ports = regexp.MustCompile(`:\d+->`)

// TestProxyCommands runs the same by the proxy and without it and wants to see no difference.
func TestProxyCommands(t *testing.T) {
	w := newWorld(t, 1, 3*time.Minute)
	h := w.Host(1)
	w.docker(h)
	w.images(h)
	w.mesh()
	for _, c := range []string{
		"both", "both own", "entry", "entry own", "cmd", "cmd echo own", "shell", "user", "user pwd",
		"--entrypoint id both", "--entrypoint id both -u", "--entrypoint echo cmd", "--entrypoint= both", "--entrypoint= both echo own",
		"--entrypoint= cmd", "scratch hello", "bare /busybox id", "bare", "--entrypoint /busybox bare echo own",
		"--read-only lab id", "--read-only --user 65534 scratch hello", "--user 1000:1000 lab id", "--user nobody lab id", "--cap-drop ALL lab id",
		"--security-opt no-new-privileges lab id", "--init lab echo init", "--tmpfs /run lab echo tmpfs", "--workdir /etc lab pwd",
		"-e PATH=/nowhere lab id", "-e PATH= lab id", "-e PATH=/etc:/bin lab id", "-e A=b lab sh -c echo\t$A", "--env HOSTNAME=x lab printenv HOSTNAME",
		"lab sh -c exit\t7", "lab sh -c kill\t-9\t$$", "lab sh -c echo\tout;echo\terr>&2;exit\t3", "lab false",
		"lab no-such-program", "lab /no/such/program", "lab /etc", "lab /etc/passwd", "broken", "denied", "--entrypoint nothing both",
		"--network host lab echo host", "--pid host lab echo pid", "--ipc private lab echo ipc", "-w /no/such/dir lab pwd", "--memory 64m lab echo memory",
		"no-such-image:ever", "no-such-image:ever sh", "UPPER", "lab@sha256:00 x",
	} {
		args := strings.Split(c, " ")
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], "\t", " ")
		}
		args = append([]string{"run", "--rm", "-i"}, args...)
		direct, proxied := w.dockerAt(h, dockerSocket, "", args...), w.dockerAt(h, proxySocket, "", args...)
		if direct.Exit != proxied.Exit || direct.Stdout != proxied.Stdout {
			t.Errorf("%q:\ndirect %s\nby the proxy %s", c, direct, proxied)
		} else if ports.ReplaceAllString(direct.Stderr, "") != ports.ReplaceAllString(proxied.Stderr, "") && direct.Exit != 126 && direct.Exit != 127 { // there it is the waiter that speaks
			t.Errorf("%q: standard error\ndirect %s\nby the proxy %s", c, direct.Stderr, proxied.Stderr)
		}
	}
	t.Run("Health", func(t *testing.T) {
		w := w.in(t)
		w.proxyDocker(h, "run", "-d", "--name", "healthy", "healthy")
		state := ""
		err := lab.Until(w.ctx, 15*time.Second, "a healthy container", func() bool {
			state = w.proxyDocker(h, "inspect", "-f", "{{.State.Health.Status}}", "healthy")
			return state == "healthy"
		})
		if err != nil {
			t.Errorf("%v: it is %s", err, state)
		}
		w.proxyDocker(h, "rm", "-f", "healthy")
	})
	t.Run("Committed", func(t *testing.T) {
		w := w.in(t)
		w.proxyDocker(h, "run", "--name", "origin", "both", "own")
		w.proxyDocker(h, "commit", "origin", "derived")
		w.proxyDocker(h, "rm", "origin")
		for _, options := range [][]string{nil, {"-e", "MESH_CIDR=none"}, {"--network", "host"}, {"--entrypoint", "id"}} {
			args := append(append([]string{"run", "--rm"}, options...), "derived")
			r := w.dockerAt(h, proxySocket, "", args...)
			if want := map[bool]string{false: "entry own\n", true: "uid=0(root) gid=0(root)"}[len(options) > 0 && options[1] == "id"]; r.Exit != 0 || !strings.HasPrefix(r.Stdout, want) {
				t.Errorf("%v: an image of a container of ours: %s, want %q", options, r, want)
			}
		}
	})
	t.Run("StopWhileWaiting", func(t *testing.T) {
		w := w.in(t)
		w.proxyDocker(h, "create", "--name", "waits", lab.Image, "sleep", "1000")
		w.try(h.Kill(w.ctx, h.Meshd(), 19)) // meshd sleeps: nobody attaches
		w.dockerAt(h, dockerSocket, "", "start", "waits")
		start := time.Now()
		r := w.dockerAt(h, dockerSocket, "", "stop", "waits")
		w.within("stop a container that waits for its interface", time.Since(start), 3*time.Second)
		w.try(h.Kill(w.ctx, h.Meshd(), 18))
		if code := w.dockerAt(h, dockerSocket, "", "inspect", "-f", "{{.State.ExitCode}}", "waits"); r.Exit != 0 || code.Stdout != "143\n" {
			t.Errorf("%s %s", r, code)
		}
		w.proxyDocker(h, "rm", "-f", "waits")
	})
}

// TestProxyStartsAttached wants the container's first process to find all in place that belongs to it.
func TestProxyStartsAttached(t *testing.T) {
	w := newWorld(t, 1, 5*time.Minute)
	h := w.Host(1)
	w.docker(h)
	w.mesh()
	// The loop is in the host, so that no more than what is looked at takes time.
	const look = `ip -o -4 addr show dev ethmesh; ip route show dev ethmesh; grep mesh.internal /etc/hosts; cat /etc/resolv.conf`
	var wg sync.WaitGroup
	var mu sync.Mutex
	bad := 0
	for worker := range 4 {
		wg.Go(func() {
			for i := range scaled(8, 25) {
				name := fmt.Sprintf("n%d-%d", worker, i)
				args := []string{"docker", "run", "--rm", "--name", name}
				if i%2 == 1 {
					args = append(args, "--read-only")
				}
				r, err := h.RunWith(w.ctx, func(c *exec.Cmd) { c.Env = append(c.Env, "DOCKER_HOST="+proxySocket) }, append(args, lab.Image, "sh", "-c", look)...)
				addrs := meshAddrs(r.Stdout)
				ok := err == nil && r.Exit == 0 && len(addrs) == 1 && strings.Contains(r.Stdout, "224.0.0.0/4") && strings.Contains(r.Stdout, "10.32.0.0/12") &&
					strings.Contains(r.Stdout, "nameserver 172.17.0.1") && strings.Contains(r.Stdout, "search mesh.internal") &&
					strings.Contains(r.Stdout, strings.Split(addrs[0], "/")[0]+"\t"+name+".mesh.internal "+name)
				mu.Lock()
				if !ok {
					if bad++; bad < 4 {
						w.t.Errorf("%s: %v %s", name, err, r)
					}
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if bad > 0 {
		t.Errorf("%d containers did not find everything in place", bad)
	}
}

// TestProxyTen starts ten containers at once on two hosts, as compose does, and has all find each other.
func TestProxyTen(t *testing.T) {
	w := newWorld(t, 2, 3*time.Minute)
	h1, h2 := w.Host(1), w.Host(2)
	w.docker(h1, h2)
	w.mesh()
	var wg sync.WaitGroup
	for i := range 10 {
		for _, h := range w.Hosts {
			wg.Go(func() {
				name := fmt.Sprintf("app_%s_%d", h.Name, i)
				r, err := h.RunWith(w.ctx, func(c *exec.Cmd) { c.Env = append(c.Env, "DOCKER_HOST="+proxySocket) },
					"docker", "run", "-d", "--name", name, "--stop-timeout", "1", "--restart", "unless-stopped", lab.Image, "sleep", "1000000")
				if err != nil || r.Exit != 0 {
					w.t.Errorf("%v %s", err, r)
				}
			})
		}
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	var all []*lab.Container
	for i := range 10 {
		all = append(all, w.adopted(h1, fmt.Sprintf("app_h1_%d", i)).Container, w.adopted(h2, fmt.Sprintf("app_h2_%d", i)).Container)
	}
	if n := w.noDuplicates(all); n != 20 {
		t.Errorf("%d addresses for 20 containers", n)
	}
	for _, c := range all {
		for _, other := range []string{"app_h1_3", "app_h2_7.mesh.internal"} {
			err := lab.Until(w.ctx, 5*time.Second, "a ping", func() bool {
				r, err := c.Exec(w.ctx, "ping", "-c", "1", "-W", "1", other)
				return err == nil && r.Exit == 0
			})
			if err != nil {
				t.Errorf("%s does not reach %s: %v", c.Name, other, err)
			}
		}
	}
	t.Run("NameGoesWithIt", func(t *testing.T) {
		w := w.in(t)
		asks := all[0]
		r, err := asks.Exec(w.ctx, "nslookup", "app_h2_9.mesh.internal")
		w.try(err)
		if r.Exit != 0 {
			t.Fatalf("not there before: %s", r)
		}
		start := time.Now()
		_, err = h2.Out(w.ctx, "docker", "kill", "app_h2_9")
		w.try(err)
		err = lab.Until(w.ctx, 10*time.Second, "the name to be gone", func() bool {
			r, err := asks.Exec(w.ctx, "nslookup", "app_h2_9.mesh.internal")
			return err == nil && r.Exit != 0
		})
		w.try(err)
		w.within("the name of a killed container gone on another host", time.Since(start), 2*time.Second)
	})
	t.Run("HostNames", func(t *testing.T) {
		w := w.in(t)
		long := strings.Repeat("n", 63)
		for _, c := range []struct {
			args string
			want string // host name, or part of it
			name string // that resolves
		}{
			{"--name given -h other", "other", ""},
			{"--name given -h other.mesh.internal", "other.mesh.internal", "other.mesh.internal"},
			{"--name given --domainname else.where", "given", ""},
			{"--name " + long, long, ""},
			{"--name " + long + "xyz", "", ""},
			{"--name with_under.score", "with_under.score", "with_under.score.mesh.internal"},
			{"--name Capital", "Capital", "capital.mesh.internal"},
		} {
			args := slices.Concat([]string{"run", "--rm"}, strings.Fields(c.args), []string{lab.Image, "hostname"})
			if c.name != "" {
				args = append(args[:len(args)-1], "sh", "-c", "hostname; nslookup "+c.name+" >&2")
			}
			r := w.dockerAt(h1, proxySocket, "", args...)
			if r.Exit != 0 || !strings.HasPrefix(r.Stdout, c.want) {
				t.Errorf("%s: want %s, got %s", c.args, c.want, r)
			}
		}
	})
}
