package integration

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"meshd/integration/lab"
)

// socketOf is the path of an endpoint on a unix socket.
func socketOf(endpoint string) string { return strings.TrimPrefix(endpoint, "unix://") }

// api makes one request to Docker's API, by the proxy or directly, and gives status and body.
func (w *world) api(h *lab.Host, endpoint, method, path, body string) (int, string) {
	w.t.Helper()
	client := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return h.DialUnix(ctx, socketOf(endpoint)) }}}
	req, err := http.NewRequestWithContext(w.ctx, method, "http://docker"+path, strings.NewReader(body))
	w.try(err)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := client.Do(req)
	w.try(err)
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	w.try(err)
	return resp.StatusCode, string(got)
}

// meshdMemory is the most memory that a host's meshd has had resident, in bytes.
func (w *world) meshdMemory(h *lab.Host) int {
	w.t.Helper()
	status, err := h.ReadFile(fmt.Sprintf("/proc/%d/status", h.Meshd()))
	w.try(err)
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
	if m == nil {
		w.t.Fatalf("no VmHWM in %s", status)
	}
	kB, err := strconv.Atoi(string(m[1]))
	w.try(err)
	return kB << 10
}

// pattern is an endless stream that never repeats a block.
type pattern struct{ n uint64 }

func (p *pattern) Read(b []byte) (int, error) {
	for i := 0; i+8 <= len(b); i += 8 {
		p.n++
		x := p.n * 0x9e3779b97f4a7c15
		for j := range 8 {
			b[i+j] = byte(x >> (8 * j))
		}
	}
	return len(b) &^ 7, nil
}

// TestProxyStreams passes everything that Docker's API streams.
func TestProxyStreams(t *testing.T) {
	w := newWorld(t, 1, 6*time.Minute)
	h := w.Host(1)
	w.docker(h)
	w.mesh()
	w.proxied(h, "box")
	const data = 8 << 20
	sum := func() string {
		s := sha256.New()
		_, err := io.CopyN(s, new(pattern), data)
		w.try(err)
		return fmt.Sprintf("%x", s.Sum(nil))
	}()
	// piped runs the Docker client by the proxy with data on its standard input.
	piped := func(w *world, args ...string) lab.Result {
		w.t.Helper()
		r, err := h.RunWith(w.ctx, func(c *exec.Cmd) {
			c.Env = append(c.Env, "DOCKER_HOST="+proxySocket)
			c.Stdin = io.LimitReader(new(pattern), data)
		}, append([]string{"docker"}, args...)...)
		w.try(err)
		return r
	}
	t.Run("HalfClose", func(t *testing.T) {
		w := w.in(t)
		const script = "sha256sum; echo end; echo error >&2"
		for _, args := range [][]string{
			{"run", "--rm", "-i", lab.Image, "sh", "-c", script},
			{"exec", "-i", "box", "sh", "-c", script},
		} {
			r := piped(w, args...)
			if r.Exit != 0 || !strings.HasPrefix(r.Stdout, sum) || !strings.HasSuffix(r.Stdout, "end\n") || r.Stderr != "error\n" {
				t.Errorf("%s", r)
			}
		}
		w.proxyDocker(h, "create", "-i", "--name", "reader", lab.Image, "sh", "-c", script)
		if r := piped(w, "start", "-a", "-i", "reader"); r.Exit != 0 || !strings.HasPrefix(r.Stdout, sum) || !strings.HasSuffix(r.Stdout, "end\n") {
			t.Errorf("%s", r)
		}
		w.proxyDocker(h, "rm", "reader")
	})
	// A client that sends all it has to say, the end included, before it hears anything.
	t.Run("HalfCloseBeforeTheAnswer", func(t *testing.T) {
		w := w.in(t)
		var got [2]string
		for i, endpoint := range []string{dockerSocket, proxySocket} {
			w.proxyDocker(h, "run", "-d", "-i", "--name", "early", lab.Image, "sh", "-c", "sha256sum; echo end")
			conn, err := h.DialUnix(w.ctx, socketOf(endpoint))
			w.try(err)
			w.try(conn.SetDeadline(time.Now().Add(20 * time.Second)))
			const head = "POST /v1.41/containers/early/attach?stream=1&stdin=1&stdout=1 HTTP/1.1\r\nHost: docker\r\n" +
				"Connection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n"
			_, err = io.WriteString(conn, head+strings.Repeat("abcdefgh", 1000))
			w.try(err)
			w.try(conn.(*net.UnixConn).CloseWrite())
			all, err := io.ReadAll(conn)
			w.try(err)
			_, got[i], _ = strings.Cut(string(all), "\r\n\r\n")
			w.try(conn.Close())
			w.proxyDocker(h, "rm", "-f", "early")
		}
		if got[0] != got[1] {
			t.Errorf("direct %q, by the proxy %q", got[0], got[1])
		}
	})
	t.Run("LogsFollow", func(t *testing.T) {
		w := w.in(t)
		w.proxyDocker(h, "run", "-d", "--name", "talks", lab.Image, "sh", "-c", "while sleep 0.1; do date +%s%N; done")
		in, out := io.Pipe()
		p, err := h.Start(w.ctx, func(c *exec.Cmd) {
			c.Env = append(c.Env, "DOCKER_HOST="+proxySocket)
			c.Stdout = out
		}, "docker", "logs", "-f", "talks")
		w.try(err)
		lines := bufio.NewScanner(in)
		late := time.Duration(0)
		for range 20 {
			if !lines.Scan() {
				t.Fatal(lines.Err())
			}
			if n, err := strconv.ParseInt(lines.Text()[:min(len(lines.Text()), 10)], 10, 64); err == nil {
				late = time.Since(time.Unix(n, 0))
			}
		}
		if late > 3*time.Second {
			t.Errorf("a line came %v after it was printed", late)
		}
		w.proxyDocker(h, "rm", "-f", "talks")
		go io.Copy(io.Discard, in)
		ctx, cancel := context.WithTimeout(w.ctx, 10*time.Second)
		defer cancel()
		w.try(p.Wait(ctx))
	})
	t.Run("Events", func(t *testing.T) {
		w := w.in(t)
		conn, err := h.DialUnix(w.ctx, socketOf(proxySocket))
		w.try(err)
		defer conn.Close()
		w.try(conn.SetDeadline(time.Now().Add(15 * time.Second)))
		_, err = io.WriteString(conn, "GET /v1.41/events HTTP/1.1\r\nHost: docker\r\n\r\n")
		w.try(err)
		r := bufio.NewReader(conn)
		if line, err := r.ReadString('\n'); err != nil || !strings.Contains(line, "200") {
			t.Fatalf("%q %v: the head of an answer without an end has to come at once", line, err)
		}
		w.proxyDocker(h, "run", "--rm", lab.Image, "true")
		for seen := ""; !strings.Contains(seen, `"status":"die"`); {
			line, err := r.ReadString('\n')
			if err != nil {
				t.Fatalf("%v after %q", err, seen)
			}
			seen += line
		}
	})
	t.Run("SaveLoadBuild", func(t *testing.T) {
		w := w.in(t)
		saved := func(endpoint string) string {
			s := sha256.New()
			r, err := h.RunWith(w.ctx, func(c *exec.Cmd) {
				c.Env = append(c.Env, "DOCKER_HOST="+endpoint)
				c.Stdout = s
			}, "docker", "save", lab.Image)
			if err != nil || r.Exit != 0 {
				t.Fatal(err, r)
			}
			return fmt.Sprintf("%x", s.Sum(nil))
		}
		if a, b := saved(dockerSocket), saved(proxySocket); a != b {
			t.Errorf("an image saved by the proxy has sum %s, directly %s", b, a)
		}
		out, err := h.Out(w.ctx, "/bin/sh", "-c", "export DOCKER_HOST="+proxySocket+"; docker tag lab copy && docker save copy >/var/tmp/copy && docker rmi copy >/dev/null && docker load </var/tmp/copy; rm /var/tmp/copy")
		if err != nil || !strings.Contains(out, "Loaded image: copy:latest") {
			t.Errorf("load: %v %s", err, out)
		}
		dockerfile := "FROM lab\nCOPY f /f\nRUN cat /f /f >/g\nENTRYPOINT [\"cat\"]\nCMD [\"/g\"]\n"
		w.try(h.WriteFile("/var/tmp/px/Dockerfile", []byte(dockerfile), 0o600))
		w.try(h.WriteFile("/var/tmp/px/f", []byte("hello\n"), 0o600))
		r := w.dockerAt(h, proxySocket, "", "build", "-t", "built", "/var/tmp/px")
		if r.Exit != 0 || !strings.Contains(r.Stdout, "Step 4/5") {
			t.Errorf("%s", r)
		}
		if r := w.dockerAt(h, proxySocket, "", "run", "--rm", "built"); r.Stdout != "hello\nhello\n" {
			t.Errorf("%s", r)
		}
		_, err = h.Out(w.ctx, "rm", "-r", "/var/tmp/px")
		w.try(err)
	})
	t.Run("Copy", func(t *testing.T) { testProxyCopy(w.in(t), h) })
	t.Run("DockerdGoesAway", func(t *testing.T) {
		w := w.in(t)
		var procs []*lab.Proc
		for _, args := range [][]string{{"logs", "-f", "box"}, {"wait", "box"}, {"events"}, {"exec", "box", "sleep", "1000"}, {"attach", "box"}} {
			p, err := h.Start(w.ctx, func(c *exec.Cmd) { c.Env = append(c.Env, "DOCKER_HOST="+proxySocket) }, append([]string{"docker"}, args...)...)
			w.try(err)
			procs = append(procs, p)
		}
		w.proxyDocker(h, "exec", "box", "true")
		w.try(h.StopDocker(true))
		for _, p := range procs {
			ctx, cancel := context.WithTimeout(w.ctx, 10*time.Second)
			if err := p.Wait(ctx); ctx.Err() != nil {
				t.Errorf("%v hangs although dockerd is dead: %v", p.Cmd.Args, err)
			}
			cancel()
		}
		direct, proxied := w.dockerAt(h, dockerSocket, "", "ps"), w.dockerAt(h, proxySocket, "", "ps")
		if direct.Exit != proxied.Exit || !strings.Contains(proxied.Stderr, "Cannot connect to the Docker daemon") {
			t.Errorf("without dockerd: %s\ndirect: %s", proxied, direct)
		}
		w.try(h.StartDocker(w.ctx))
		w.proxyDocker(h, "start", "box")
		w.waitAttached(h, "box", w.adopted(h, "box").addr)
	})
	// A daemon that does not answer for a while keeps nobody waiting but those who want something of it.
	t.Run("DockerdSleeps", func(t *testing.T) {
		w := w.in(t)
		pids := h.PIDs("dockerd")
		if len(pids) != 1 {
			t.Fatalf("dockerds: %v", pids)
		}
		w.proxyDocker(h, "create", "--name", "late", lab.Image, "sleep", "1000")
		w.try(h.Kill(w.ctx, pids[0], syscall.SIGSTOP))
		p, err := h.Start(w.ctx, func(c *exec.Cmd) { c.Env = append(c.Env, "DOCKER_HOST="+proxySocket) }, "docker", "start", "late")
		w.try(err)
		impatient, cancel := context.WithTimeout(w.ctx, time.Second)
		q, err := h.Start(impatient, func(c *exec.Cmd) { c.Env = append(c.Env, "DOCKER_HOST="+proxySocket) }, "docker", "run", "--rm", lab.Image, "true")
		w.try(err)
		w.netns(h, "apart", "10.2.1.1/24")
		for end := time.Now().Add(scaled(5*time.Second, 30*time.Second)); time.Now().Before(end); {
			start := time.Now()
			for _, args := range [][]string{{"status"}, {"ps"}, {"dns-lookup", "box"}} {
				_, err := h.Must(w.ctx, args...)
				w.try(err)
			}
			if d := time.Since(start); d > time.Second {
				t.Errorf("three questions to meshd took %v while dockerd sleeps", d)
			}
			w.rest(500 * time.Millisecond)
		}
		cancel()
		_ = q.Wait(w.ctx) // it was killed, or said that it was refused
		w.try(h.Kill(w.ctx, pids[0], syscall.SIGCONT))
		w.try(p.Wait(w.ctx))
		w.waitAttached(h, "late", netip.Addr{})
		w.proxyDocker(h, "rm", "-f", "late")
	})
	w.dockerAt(h, dockerSocket, "", "rm", "-f", "box")
	_, err := h.Must(w.ctx, "reset", "--force")
	w.try(err)
	w.rebase(h)
	w.launch(h)
}

// testProxyCopy moves a big file out of a container and into one, and an image of that size out of dockerd and into it, in turns
// by the proxy and directly.
func testProxyCopy(w *world, h *lab.Host) {
	size := scaled(128, 1024) // MiB
	_, err := h.Out(w.ctx, "docker", "exec", "box", "dd", "if=/dev/zero", "of=/big", "bs=1M", "count="+strconv.Itoa(size))
	w.try(err)
	_, err = h.Out(w.ctx, "sh", "-c", fmt.Sprintf("mkdir /var/tmp/image && truncate -s %dM /var/tmp/image/big && tar -C /var/tmp/image -cf /var/tmp/big.tar big && rm -r /var/tmp/image", size))
	w.try(err)
	before := w.meshdMemory(h)
	took := map[string][]time.Duration{}
	run := func(what, endpoint string, stdin io.Reader, stdout io.Writer, args ...string) {
		w.t.Helper()
		start := time.Now()
		r, err := h.RunWith(w.ctx, func(c *exec.Cmd) {
			c.Env = append(c.Env, "DOCKER_HOST="+endpoint)
			c.Stdin = stdin
			if stdout != nil {
				c.Stdout = stdout
			}
		}, append([]string{"docker"}, args...)...)
		w.try(err)
		if r.Exit != 0 {
			w.t.Fatal(r)
		}
		key := what + map[bool]string{true: " by the proxy", false: " directly"}[endpoint == proxySocket]
		took[key] = append(took[key], time.Since(start))
	}
	var sums [2]hash.Hash
	for round := range scaled(2, 5) {
		for i, endpoint := range []string{dockerSocket, proxySocket} {
			if round == 0 {
				sums[i] = sha256.New() // it takes its time, so once
				run("out and sum", endpoint, nil, sums[i], "cp", "box:/big", "-")
				continue
			}
			run("out", endpoint, nil, nil, "cp", "box:/big", "/var/tmp/big")
			run("in", endpoint, nil, nil, "cp", "/var/tmp/big", "box:/big2")
			if round == 1 && i == 0 {
				w.dockerAt(h, dockerSocket, "", "import", "/var/tmp/big.tar", "big")
			}
			run("save", endpoint, nil, nil, "save", "-o", "/var/tmp/image", "big")
			w.dockerAt(h, dockerSocket, "", "rmi", "big") // or load has nothing to do
			run("load", endpoint, nil, nil, "load", "-i", "/var/tmp/image")
		}
	}
	w.dockerAt(h, dockerSocket, "", "rmi", "big")
	_, err = h.Out(w.ctx, "rm", "/var/tmp/big", "/var/tmp/big.tar", "/var/tmp/image")
	w.try(err)
	if !bytes.Equal(sums[0].Sum(nil), sums[1].Sum(nil)) {
		w.t.Error("what came out by the proxy is something else")
	}
	r := w.dockerAt(h, dockerSocket, "", "exec", "box", "cmp", "/big", "/big2")
	if r.Exit != 0 {
		w.t.Error(r)
	}
	w.dockerAt(h, dockerSocket, "", "exec", "box", "rm", "/big", "/big2")
	grown := w.meshdMemory(h) - before
	for _, what := range []string{"out", "in", "save", "load"} {
		direct, proxied := slices.Min(took[what+" directly"]), slices.Min(took[what+" by the proxy"])
		w.t.Logf("%d MiB, %s: %v directly, %v by the proxy: %.2f of the throughput", size, what, direct, proxied, float64(direct)/float64(proxied))
	}
	w.t.Logf("meshd grew by %d kB", grown>>10)
	if grown > 32<<20 {
		w.t.Errorf("meshd grew by %d MB while a file was copied", grown>>20)
	}
}

// TestProxyVersions speaks several versions of the API, by the proxy and directly.
func TestProxyVersions(t *testing.T) {
	w := newWorld(t, 1, 2*time.Minute)
	h := w.Host(1)
	w.docker(h)
	w.mesh()
	id := regexp.MustCompile(`[0-9a-f]{64}`)
	// Whatever way of writing the path dockerd takes for a create, the proxy does too.
	for _, path := range []string{"/containers/create", "/containers/%63reate", "//containers/create", "/./containers/create", "/v1.41//containers/create",
		"/v1.41/x/../containers/create", "/containers/create/", "/Containers/create", "/containers/create;x", "/containers/create%2f", "/containers/create%00"} {
		const body = `{"Image":"lab","Cmd":["true"]}`
		code, _ := w.api(h, dockerSocket, "POST", path+"?name=way", body)
		w.api(h, dockerSocket, "DELETE", "/containers/way", "")
		pcode, answer := w.api(h, proxySocket, "POST", path+"?name=way", body)
		_, made := w.api(h, dockerSocket, "GET", "/containers/way/json", "")
		if code != pcode || code == http.StatusCreated && !strings.Contains(made, `"meshd.addresses":""`) {
			t.Errorf("create at %s: %d directly, %d by the proxy: %s\n%s", path, code, pcode, answer, made)
		}
		w.api(h, dockerSocket, "DELETE", "/containers/way", "")
	}
	_, version := w.api(h, dockerSocket, "GET", "/version", "")
	limits := regexp.MustCompile(`"ApiVersion":"1\.(\d+)","MinAPIVersion":"1\.(\d+)"`).FindStringSubmatch(version)
	if limits == nil {
		t.Fatalf("Docker says of itself %s", version)
	}
	newest, err := strconv.Atoi(limits[1])
	w.try(err)
	oldest, err := strconv.Atoi(limits[2])
	w.try(err)
	for _, v := range []string{"", "/v1.12", "/v1.24", "/v1.30", "/v1.41", "/v1.44", "/v1.56", "/v0.1", "/v9"} {
		for _, c := range []struct{ method, path, body string }{
			{"GET", "/version", ""}, {"HEAD", "/_ping", ""}, {"GET", "/no/such/path", ""}, {"DELETE", "/containers/nobody", ""},
			{"POST", "/containers/create", `{"Image":"no-such-image","Cmd":["true"]}`},
			{"POST", "/containers/create", `{"Image":"UPPER CASE","Cmd":["true"]}`},
			{"POST", "/containers/create", `{"Cmd":["true"]}`},
			{"POST", "/containers/create", ``},
			{"POST", "/containers/create", `{"Image":"lab"}`},
			{"POST", "/containers/create?name=!", `{"Image":"lab","Cmd":["true"]}`},
			{"POST", "/containers/nobody/start", ""}, {"POST", "/containers/nobody/restart", ""}, {"POST", "/containers/nobody/attach", ""},
			{"POST", "/containers/a%2Fb/start", ""}, {"POST", "/containers//start", ""}, {"GET", "/containers/nobody/json?size=1;x&a", ""},
		} {
			code, body := w.api(h, dockerSocket, c.method, v+c.path, c.body)
			pcode, pbody := w.api(h, proxySocket, c.method, v+c.path, c.body)
			if code != pcode || id.ReplaceAllString(body, "") != id.ReplaceAllString(pbody, "") {
				t.Errorf("%s %s %s: directly %d %.300s\nby the proxy %d %.300s", c.method, v+c.path, c.body, code, body, pcode, pbody)
			}
		}
		code, body := w.api(h, proxySocket, "POST", v+"/containers/create?name=one", `{"Image":"lab","Cmd":["sleep","1000"]}`)
		if n, err := strconv.Atoi(strings.TrimPrefix(v, "/v1.")); v != "" && (err != nil || n < oldest || n > newest) {
			if code != http.StatusBadRequest || !strings.Contains(body, "version") {
				t.Errorf("%s: %d %s", v, code, body)
			}
			continue
		}
		if code != http.StatusCreated {
			t.Errorf("%s: create: %d %s", v, code, body)
			continue
		}
		start := ""
		if v == "/v1.12" {
			start = "{}" // as clients of then did
		}
		if code, body := w.api(h, proxySocket, "POST", v+"/containers/one/start", start); code != http.StatusNoContent {
			t.Errorf("%s: start: %d %s", v, code, body)
		} else {
			w.waitAttached(h, "one", netip.Addr{})
		}
		if code, body := w.api(h, proxySocket, "POST", v+"/containers/one/start", ""); code != http.StatusNotModified {
			t.Errorf("%s: second start: %d %s", v, code, body)
		}
		// Settings at start were for clients before 1.24, and replace those of create.
		if code, body := w.api(h, proxySocket, "POST", v+"/containers/create?name=two", `{"Image":"lab","Cmd":["sleep","1000"]}`); code != http.StatusCreated {
			t.Errorf("%s: create: %d %s", v, code, body)
		}
		code, body = w.api(h, proxySocket, "POST", v+"/containers/two/start", `{"Binds":["/etc:/mnt:ro"]}`)
		if v != "/v1.12" {
			if code != http.StatusBadRequest {
				t.Errorf("%s: start with settings: %d %s", v, code, body)
			}
		} else {
			if code != http.StatusNoContent {
				t.Errorf("%s: start with settings: %d %s", v, code, body)
			}
			w.waitAttached(h, "two", netip.Addr{})
			r := w.dockerAt(h, proxySocket, "", "exec", "two", "sh", "-c", "ls /mnt/hostname && nslookup one.mesh.internal")
			if r.Exit != 0 {
				t.Errorf("%s: started with settings: %s", v, r)
			}
		}
		w.api(h, proxySocket, "DELETE", v+"/containers/two?force=1", "")
		if code, body := w.api(h, proxySocket, "DELETE", v+"/containers/one?force=1", ""); code != http.StatusNoContent {
			t.Errorf("%s: remove: %d %s", v, code, body)
		}
	}
}
