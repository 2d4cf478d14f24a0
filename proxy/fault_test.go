package proxy

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// slowDaemon is a daemon in a bubble: every answer takes its time, and calls whose path has dies in it find it dead,
// after they did what they ask for.
type slowDaemon struct {
	takes time.Duration
	dies  string

	done    []string // what changes something, in its order
	created []byte
}

func (d *slowDaemon) RoundTrip(r *http.Request) (*http.Response, error) {
	var body []byte
	if r.Body != nil {
		body, _ = io.ReadAll(r.Body)
	}
	select {
	case <-time.After(d.takes):
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	code, answer := http.StatusOK, `{"Config":{"Cmd":["sh"]}}`
	switch {
	case strings.HasSuffix(r.URL.Path, "/create"):
		code, answer = http.StatusCreated, `{"Id":"c0ffee"}`
		d.done, d.created = append(d.done, "create"), body
	case strings.HasSuffix(r.URL.Path, "/start"), strings.HasSuffix(r.URL.Path, "/kill"):
		code, answer = http.StatusNoContent, ""
		d.done = append(d.done, r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:])
	case strings.HasPrefix(r.URL.Path, "/containers/"):
		answer = `{"Id":"c0ffee","Config":{"Labels":{"` + LabelAddrs + `":""}}}`
	}
	if d.dies != "" && strings.Contains(r.URL.Path, d.dies) {
		return nil, syscall.ECONNRESET
	}
	return &http.Response{StatusCode: code, Header: http.Header{}, Request: r, Body: io.NopCloser(strings.NewReader(answer))}, nil
}

// attaching is what a test does in place of Attach.
type attaching func(ctx context.Context) error

func (f attaching) Attach(ctx context.Context, _ Request) error { return f(ctx) }

func (attaching) Interface(string) (mac mesh.MAC, addrs []netip.Prefix, ok bool) { return }

// inBubble gives a proxy before a daemon in this bubble, what asks it for something, and what ends it.
func inBubble(t *testing.T, d *slowDaemon, attach attaching) (ask func(path, body string) *httptest.ResponseRecorder, end func()) {
	p, err := newProxy(Config{Listen: []string{":0"}, Docker: "unix:///nowhere", WaitDir: t.TempDir(), Ifname: "ethmesh", Range: netip.MustParsePrefix("10.32.0.0/12")},
		attach, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	p.backend.transport.RegisterProtocol("http", d)
	ctx, cancel := context.WithCancel(t.Context())
	p.backend.run = ctx
	return func(path, body string) *httptest.ResponseRecorder {
		t.Helper()
		w := httptest.NewRecorder()
		p.ServeHTTP(w, httptest.NewRequest(http.MethodPost, path, strings.NewReader(body)))
		if w.Code >= 400 {
			var doc struct{ Message string }
			if err := json.Unmarshal(w.Body.Bytes(), &doc); err != nil || doc.Message == "" {
				t.Errorf("%s: %d is not said as Docker does: %s", path, w.Code, w.Body)
			}
		}
		return w
	}, cancel
}

// A daemon that takes 30 s for every answer is waited for, also when it has to stop what cannot be attached.
func TestSlowDaemon(t *testing.T) {
	for _, fails := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			d := &slowDaemon{takes: 30 * time.Second}
			ask, end := inBubble(t, d, func(context.Context) error {
				if fails {
					return errors.New("no address is free")
				}
				return nil
			})
			defer end()
			if w := ask("/containers/create", `{"Image":"i"}`); w.Code != http.StatusCreated {
				t.Errorf("create: %d %s", w.Code, w.Body)
			}
			w := ask("/containers/x/start", "")
			code, done := http.StatusNoContent, []string{"create", "start"}
			if fails {
				code, done = http.StatusInternalServerError, append(done, "kill")
			}
			if w.Code != code || !slices.Equal(d.done, done) {
				t.Errorf("fails=%t: start: %d %s; the daemon did %v, want %v", fails, w.Code, w.Body, d.done, done)
			}
		})
	}
}

// A daemon that does not answer whoever attaches, though it has just started the container, is asked again.
func TestDaemonAwayDuringAttach(t *testing.T) {
	for _, c := range []struct {
		away time.Duration
		then error
		code int
		done []string
	}{
		{30 * time.Second, nil, http.StatusNoContent, []string{"start"}},
		{30 * time.Second, ErrEnded, http.StatusNoContent, []string{"start"}}, // it ended with the daemon
		{30 * time.Second, errors.New("no address is free"), http.StatusInternalServerError, []string{"start", "kill"}},
		{time.Hour, nil, http.StatusInternalServerError, []string{"start", "kill"}},
	} {
		synctest.Test(t, func(t *testing.T) {
			d := &slowDaemon{}
			back := time.Now().Add(c.away)
			ask, end := inBubble(t, d, func(context.Context) error {
				if time.Now().Before(back) {
					return fmt.Errorf("attach: %w", ErrAway)
				}
				return c.then
			})
			defer end()
			start := time.Now()
			w := ask("/containers/x/start", "")
			if w.Code != c.code || !slices.Equal(d.done, c.done) {
				t.Errorf("away for %v, then %v: %d %s; the daemon did %v, want %v", c.away, c.then, w.Code, w.Body, d.done, c.done)
			}
			if took := time.Since(start); took > attachTimeout+time.Second {
				t.Errorf("away for %v: took %v", c.away, took)
			}
		})
	}
}

// A daemon that dies at any point of a create or a start leaves an error, nothing that is attached without running, and
// the same request can be made again.
func TestDaemonDiesAnywhere(t *testing.T) {
	for _, c := range []struct{ path, body, dies string }{
		{"/containers/create", `{"Image":"i"}`, "/images/"}, {"/containers/create", `{"Image":"i"}`, "/create"},
		{"/containers/x/start", "", "/json"}, {"/containers/x/start", "", "/start"},
	} {
		synctest.Test(t, func(t *testing.T) {
			attached := 0
			d := &slowDaemon{dies: c.dies}
			ask, end := inBubble(t, d, func(context.Context) error { attached++; return nil })
			defer end()
			w := ask(c.path, c.body)
			if w.Code != http.StatusBadGateway || !strings.Contains(w.Body.String(), "Cannot connect to the Docker daemon") || attached > 0 {
				t.Errorf("%s, dying at %s: %d %s, %d attached", c.path, c.dies, w.Code, w.Body, attached)
			}
			d.dies = ""
			if w := ask(c.path, c.body); w.Code >= 300 {
				t.Errorf("%s again: %d %s", c.path, w.Code, w.Body)
			}
		})
	}
}

// A proxy that ends while it attaches stops nobody, for the next one goes on, and gives no answer.
func TestProxyEndsDuringAttach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &slowDaemon{}
		var end func()
		ask, end := inBubble(t, d, func(ctx context.Context) error {
			end()
			<-ctx.Done()
			return ctx.Err()
		})
		defer func() {
			if v := recover(); v != http.ErrAbortHandler || !slices.Equal(d.done, []string{"start"}) {
				t.Errorf("ended with %v; the daemon did %v", v, d.done)
			}
		}()
		w := ask("/containers/x/start", "")
		t.Errorf("answered %d %s", w.Code, w.Body)
	})
}

// A socket that somebody has is left to him, whatever kind it is and however busy he is.
func TestListenLeavesSockets(t *testing.T) {
	dir := t.TempDir()
	for name, kind := range map[string]int{"busy": unix.SOCK_STREAM, "datagrams": unix.SOCK_DGRAM, "packets": unix.SOCK_SEQPACKET, "stale": unix.SOCK_STREAM} {
		path := filepath.Join(dir, name)
		fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			t.Fatal(err)
		}
		if kind != unix.SOCK_DGRAM && name != "stale" {
			if err := unix.Listen(fd, 0); err != nil {
				t.Fatal(err)
			}
		}
		for name == "busy" { // until nobody gets in any more
			conn, err := net.Dial("unix", path)
			if err != nil {
				break
			}
			defer conn.Close()
		}
		l, err := listen("unix://"+path, Config{})
		if err == nil {
			l.Close()
		}
		if (err == nil) != (name == "stale") {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && !strings.Contains(err.Error(), "another process listens") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A proxy whose daemon is itself, as when DOCKER_HOST was still set at launch, does not go round.
func TestLoop(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("second.sock", dir+"/link.sock"); err != nil {
		t.Fatal(err)
	}
	b := start(t, func(c *Config) {
		c.Listen = append(c.Listen, "unix://"+dir+"/second.sock")
		c.Docker = "unix://" + dir + "/link.sock"
	})
	for _, path := range []string{"/containers/create", "/containers/x/start", "/containers/x/attach", "/build", "/images/create", "/info"} {
		code, answer := b.post(t, path, `{"Image":"i"}`)
		if code != http.StatusLoopDetected || !strings.Contains(answer, "--docker-api") {
			t.Errorf("%s: %d %s", path, code, answer)
		}
	}
}

// Clients that open connections without end are refused in words, and beyond that not let in, and all is well when
// they go.
func TestTooManyConnections(t *testing.T) {
	for _, path := range []string{"/idle", "/containers/x/attach", "/build"} {
		t.Run(path, func(t *testing.T) {
			b := start(t, func(c *Config) { c.maxConns = 8 })
			b.daemon.handler = func(w http.ResponseWriter, r *http.Request) {
				switch path {
				case "/containers/x/attach":
					conn, _, err := http.NewResponseController(w).Hijack()
					if err != nil {
						t.Error(err)
						return
					}
					defer conn.Close()
					io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\n")
					io.Copy(io.Discard, conn)
				case "/build":
					http.NewResponseController(w).Flush()
					<-r.Context().Done()
				}
			}
			var held []net.Conn
			dial := func() net.Conn {
				t.Helper()
				conn, err := net.Dial("unix", b.socket)
				if err != nil {
					t.Fatal(err)
				}
				held = append(held, conn)
				conn.SetDeadline(time.Now().Add(5 * time.Second))
				return conn
			}
			ask := func(conn net.Conn) int {
				t.Helper()
				io.WriteString(conn, "POST "+path+" HTTP/1.1\r\nHost: docker\r\nContent-Length: 0\r\n\r\n")
				resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					t.Fatal(err)
				}
				return resp.StatusCode
			}
			for i := range 8 {
				if code := ask(dial()); code != http.StatusOK {
					t.Fatalf("connection %d: %d", i, code)
				}
			}
			if code := ask(dial()); code != http.StatusServiceUnavailable {
				t.Errorf("one more: %d", code)
			}
			var last net.Conn
			for range 20 {
				last = dial()
			}
			if got, err := io.ReadAll(last); len(got) > 0 || err != nil {
				t.Errorf("many more: %q %v", got, err)
			}
			for _, conn := range held {
				conn.Close()
			}
			code := 0
			for limit := time.Now().Add(10 * time.Second); code != http.StatusNoContent && time.Now().Before(limit); {
				if resp, err := b.client.Post("http://docker/containers/plain/start", "", nil); err == nil {
					resp.Body.Close()
					code = resp.StatusCode
				}
			}
			if code != http.StatusNoContent {
				t.Errorf("afterwards: %d", code)
			}
		})
	}
}

// A request that ends in its middle, and one that asks for a stream besides, gets no container past the proxy.
func TestCreateByOtherWays(t *testing.T) {
	const body = `{"Image":"sh","Cmd":["ls"]}`
	for name, request := range map[string]string{
		"cut":                "Content-Length: 100\r\n\r\n" + body,
		"cut where it could": "Content-Length: 28\r\n\r\n" + body,
		"chunk cut":          "Transfer-Encoding: chunked\r\n\r\n1b\r\n" + body + "\r\n",
		"chunk of no length": "Transfer-Encoding: chunked\r\n\r\nx\r\n" + body + "\r\n0\r\n\r\n",
		"two lengths":        "Content-Length: 27\r\nContent-Length: 5\r\n\r\n" + body,
		"both framings":      "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n1b\r\n" + body + "\r\n0\r\n\r\n",
		"stream":             "Connection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 27\r\n\r\n" + body,
		"chunked stream":     "Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n1b\r\n" + body + "\r\n0\r\n\r\n",
		"expecting":          "Expect: 100-continue\r\nContent-Length: 27\r\n\r\n" + body,
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t, nil)
			conn, err := net.Dial("unix", b.socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(5 * time.Second))
			io.WriteString(conn, "POST /v1.41/containers/create HTTP/1.1\r\nHost: docker\r\nContent-Type: application/json\r\n"+request)
			whole := slices.Contains([]string{"both framings", "stream", "chunked stream", "expecting"}, name)
			if !whole {
				conn.(*net.UnixConn).CloseWrite()
			}
			r := bufio.NewReader(conn)
			resp, err := http.ReadResponse(r, nil)
			for err == nil && resp.StatusCode == http.StatusContinue { // the proxy's and the daemon's
				resp, err = http.ReadResponse(r, nil)
			}
			if err != nil {
				t.Fatal(err)
			}
			b.daemon.mu.Lock()
			got := string(b.daemon.created)
			b.daemon.mu.Unlock()
			if code := map[bool]int{true: http.StatusCreated, false: http.StatusBadRequest}[whole]; resp.StatusCode != code || whole != strings.Contains(got, LabelAddrs) || !whole && got != "" {
				t.Errorf("the client got %d, the daemon %q", resp.StatusCode, got)
			}
		})
	}
}
