package integration

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"meshd/integration/lab"
)

// shell runs a script in the host's shell.
func (w *world) shell(h *lab.Host, script string) lab.Result {
	w.t.Helper()
	r, err := h.Run(w.ctx, "/bin/sh", "-c", script)
	w.try(err)
	return r
}

// TestProxyEnvironment points the Docker client at the proxy in all the ways there are.
func TestProxyEnvironment(t *testing.T) {
	w := newWorld(t, 1, 3*time.Minute)
	h := w.Host(1)
	w.docker(h)
	const attached = `docker run --rm lab ip -o -4 addr show dev ethmesh`
	w.launch(h)
	for _, c := range []struct {
		script string
		mesh   bool
	}{
		{attached, false},
		{`eval $(meshctl env); ` + attached, true},
		{`eval "$(meshctl env)"; ` + attached, true},
		{`docker $(meshctl config) run --rm lab ip -o -4 addr show dev ethmesh`, true},
		{`eval $(meshctl env); eval $(meshctl env --restore); ` + attached, false},
		{`eval $(meshctl env); eval $(meshctl env); eval $(meshctl env --restore); ` + attached, false},
		{`export DOCKER_HOST=unix:///run/docker.sock; eval $(meshctl env); ` + attached, true},
		{`export DOCKER_HOST=unix:///run/docker.sock; eval $(meshctl env); eval $(meshctl env --restore); test $DOCKER_HOST = unix:///run/docker.sock && ` + attached, false},
	} {
		r := w.shell(h, c.script)
		if got := len(meshAddrs(r.Stdout)) == 1; got != c.mesh || !c.mesh && !strings.Contains(r.Stderr, "ethmesh") {
			t.Errorf("%s", r)
		}
	}
	// Who may use Docker may use the proxy, and nobody else.
	r := w.shell(h, `stat -c '%a %u %g' /run/docker.sock /run/meshd/docker.sock`)
	if f := strings.Split(strings.TrimSpace(r.Stdout), "\n"); len(f) != 2 || f[0] != f[1] || !strings.HasPrefix(f[0], "660 0 ") {
		t.Errorf("sockets: %s", r)
	}
	t.Run("NoProxy", func(t *testing.T) {
		w := w.in(t)
		_, err := h.Must(w.ctx, "stop")
		w.try(err)
		for script, want := range map[string]int{`meshctl env`: 0, `meshctl config`: 1, `eval $(meshctl env); docker ps -q`: 0} {
			if r := w.shell(h, script); r.Exit != want || r.Stdout != "" {
				t.Errorf("without meshd: %s, want exit %d and nothing", r, want)
			}
		}
		w.launch(h, "--proxy=false")
		for script, want := range map[string]int{`meshctl env`: 0, `meshctl config`: 1} {
			if r := w.shell(h, script); r.Exit != want || r.Stdout != "" {
				t.Errorf("without a proxy: %s, want exit %d and nothing", r, want)
			}
		}
		_, err = h.Must(w.ctx, "stop")
		w.try(err)
	})
	t.Run("Endpoints", func(t *testing.T) {
		w := w.in(t)
		w.launch(h, "-H", "unix:///run/other/deep.sock", "-H", "tcp://127.0.0.1:12375", "-H", "tcp://[::1]:12377")
		r := w.shell(h, `curl -s --unix-socket /run/meshd/meshd.sock http://meshd/proxyaddrs`)
		addrs := strings.Fields(r.Stdout)
		if len(addrs) != 3 || addrs[0] != "unix:///run/other/deep.sock" || addrs[1] != "tcp://127.0.0.1:12375" {
			t.Fatalf("addresses: %s", r)
		}
		for _, endpoint := range addrs {
			r := w.dockerAt(h, endpoint, "", slices.Concat([]string{"run", "--rm", lab.Image}, inMesh)...)
			if len(meshAddrs(r.Stdout)) != 1 {
				t.Errorf("%s: %s", endpoint, r)
			}
		}
		_, err := h.Must(w.ctx, "stop")
		w.try(err)
		w.shell(h, "rmdir /run/other")
	})
	t.Run("PathsInTheWay", func(t *testing.T) {
		w := w.in(t)
		w.shell(h, `mkdir /run/way; echo precious > /run/way/file; ln -s /run/docker.sock /run/way/link; ln -s /nowhere /run/way/dangling; mkdir /run/way/dir`)
		for endpoint, word := range map[string]string{
			"unix:///run/way/file": "not a socket", "unix:///run/way/link": "not a socket", "unix:///run/way/dangling": "not a socket",
			"unix:///run/way/dir": "not a socket", "unix:///run/docker.sock": "", "unix:///var/run/docker.sock": "", "unix://relative": "absolute",
			"tcp://0.0.0.0:12375": "root on this host", ":12375": "root on this host", "fd://": "", "nonsense": "", "tcp://127.0.0.1": "",
		} {
			r, err := h.Ctl(w.ctx, "launch", "-H", endpoint)
			w.try(err)
			if r.Exit == 0 || !strings.Contains(r.Stderr, word) {
				t.Errorf("-H %s: %s, want %q", endpoint, r, word)
			}
			if r.Exit == 0 {
				_, err = h.Must(w.ctx, "stop")
				w.try(err)
			}
		}
		if r := w.shell(h, `cat /run/way/file; docker version -f ok; ls -l /run/way/link; test -d /run/way/dir && rm -r /run/way`); r.Exit != 0 || !strings.HasPrefix(r.Stdout, "precious\nok\n") {
			t.Errorf("what was in the way has changed: %s", r)
		}
		// A socket that nobody listens on any more gives way.
		w.launch(h, "-H", "unix:///run/stale.sock")
		w.killMeshd(h)
		w.launch(h, "-H", "unix:///run/stale.sock")
		if r := w.dockerAt(h, "unix:///run/stale.sock", "", "ps", "-q"); r.Exit != 0 {
			t.Errorf("%s", r)
		}
		_, err := h.Must(w.ctx, "stop")
		w.try(err)
		if r := w.shell(h, "ls /run/stale.sock"); r.Exit == 0 {
			t.Errorf("the socket outlives meshd: %s", r)
		}
	})
	t.Run("TLS", func(t *testing.T) {
		w := w.in(t)
		w.certificates(h, "/run/tls")
		w.launch(h, "-H", "tcp://0.0.0.0:12376", "--tlsverify", "--tlscacert", "/run/tls/ca.pem", "--tlscert", "/run/tls/server.pem", "--tlskey", "/run/tls/server-key.pem")
		docker := func(cert string) lab.Result {
			args := []string{"docker", "-H", fmt.Sprintf("tcp://%s:12376", h.Addr), "--tlsverify", "--tlscacert", "/run/tls/ca.pem"}
			if cert != "" {
				args = append(args, "--tlscert", "/run/tls/"+cert+".pem", "--tlskey", "/run/tls/"+cert+"-key.pem")
			}
			r, err := h.Run(w.ctx, slices.Concat(args, []string{"run", "--rm", "-i", lab.Image}, inMesh)...)
			w.try(err)
			return r
		}
		if r := docker("client"); len(meshAddrs(r.Stdout)) != 1 {
			t.Errorf("%s", r)
		}
		for _, cert := range []string{"", "stranger"} {
			if r := docker(cert); r.Exit == 0 {
				t.Errorf("let in with certificate %q: %s", cert, r)
			}
		}
		if r := w.dockerAt(h, "tcp://127.0.0.1:12376", "", "ps"); r.Exit == 0 {
			t.Errorf("let in without TLS: %s", r)
		}
		out, err := h.Must(w.ctx, "env")
		if err != nil || !strings.Contains(out, "DOCKER_HOST=tcp://127.0.0.1:12376") {
			t.Errorf("env: %v %s", err, out)
		}
		_, err = h.Must(w.ctx, "stop")
		w.try(err)
		w.shell(h, "rm -r /run/tls")
	})
	t.Run("Twice", func(t *testing.T) {
		w := w.in(t)
		w.launch(h)
		r, err := h.Run(w.ctx, "meshd", "--state-dir", "/run/second", "--run-dir", "/run/second", "--pin-dir", "/sys/fs/bpf/second", "--port", "7783",
			"--bridge", "mesh2", "--status-addr", "127.0.0.1:0", "--nft-table", "mesh2", "-H", proxySocket)
		w.try(err)
		if r.Exit == 0 || !strings.Contains(r.Stderr+r.Stdout, "/run/meshd/docker.sock") {
			t.Errorf("a second meshd: %s", r)
		}
		w.shell(h, "rm -rf /run/second /run/second-wait")
		if r := w.dockerAt(h, proxySocket, "", slices.Concat([]string{"run", "--rm", lab.Image}, inMesh)...); len(meshAddrs(r.Stdout)) != 1 {
			t.Errorf("the first one suffers: %s", r)
		}
	})
}

// certificates makes a CA, certificates of a server and a client of it, and one of a stranger.
func (w *world) certificates(h *lab.Host, dir string) {
	w.t.Helper()
	script := fmt.Sprintf(`set -e; mkdir -p %s; cd %[1]s
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=ca -keyout ca-key.pem -out ca.pem
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=stranger -keyout stranger-key.pem -out stranger.pem
for who in server client; do
	openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=$who -keyout $who-key.pem -out $who.csr
	printf 'subjectAltName=IP:%s,IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n' > ext
	openssl x509 -req -in $who.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 -extfile ext -out $who.pem
done`, dir, h.Addr)
	r, err := h.RunWith(w.ctx, func(c *exec.Cmd) { c.Env = append(c.Env, "HOME=/run") }, "/bin/sh", "-c", script)
	w.try(err)
	if r.Exit != 0 {
		w.t.Fatal(r)
	}
}
