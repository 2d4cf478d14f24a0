package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"meshd/mesh"
	"meshd/proxy/wait"
)

// A connection whose request was refused half read lingers for half a second (net/http).
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("net/http.(*conn).closeWriteAndWait"))
}

// daemon is a Docker daemon as far as the proxy sees one.
type daemon struct {
	mu      sync.Mutex
	created []byte
	started []byte // body of the last start
	remaps  bool
	waiter  string // what "ours" has mounted
	calls   []string
	handler http.HandlerFunc // for what is not listed in ServeHTTP
	dies    bool             // in place of an answer to anything but an inspect
}

func (d *daemon) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.Contains(r.URL.Path, "refused") {
		d.handler(w, r)
		return
	}
	body, _ := io.ReadAll(r.Body)
	d.mu.Lock()
	d.calls = append(d.calls, r.Method+" "+r.URL.Path)
	if strings.HasSuffix(r.URL.Path, "/containers/create") {
		d.created = body
	}
	if strings.HasSuffix(r.URL.Path, "/start") {
		d.started = body
	}
	d.mu.Unlock()
	path := strings.TrimPrefix(r.URL.Path, "/v1.41")
	if d.dies && !strings.HasSuffix(path, "/json") {
		panic(http.ErrAbortHandler)
	}
	switch {
	case path == "/containers/create":
		w.WriteHeader(http.StatusCreated)
		io.WriteString(w, `{"Id":"c0ffee","Warnings":[]}`)
	case path == "/images/missing/json":
		http.Error(w, `{"message":"No such image"}`, http.StatusNotFound)
	case path == "/images/tool/json":
		io.WriteString(w, `{"Config":{"Entrypoint":["/tool"],"Cmd":["help"],"Env":["MESH_CIDR=net:10.5.0.0/16"]}}`)
	case path == "/images/mine/json":
		io.WriteString(w, `{"Config":{"Entrypoint":["`+wait.Path+`","ethmesh","/tool"],"Cmd":["help"],"Labels":{"`+LabelAddrs+`":""}}}`)
	case path == "/images/mine-sh/json":
		io.WriteString(w, `{"Config":{"Entrypoint":["`+wait.Path+`","ethmesh"],"Cmd":["sh"],"Labels":{"`+LabelAddrs+`":""}}}`)
	case path == "/images/bare/json":
		io.WriteString(w, `{"Config":{"Env":null}}`)
	case strings.HasPrefix(path, "/images/") && strings.HasSuffix(path, "/json"):
		io.WriteString(w, `{"Config":{"Entrypoint":null,"Cmd":["sh","-c","x"]}}`)
	case path == "/info" && d.remaps:
		io.WriteString(w, `{"SecurityOptions":["name=seccomp,profile=default","name=userns"]}`)
	case path == "/containers/ours/json":
		io.WriteString(w, `{"Id":"c0ffee","Config":{"Labels":{"`+LabelAddrs+`":"net:10.2.0.0/16"}},"HostConfig":{"NetworkMode":"default","ExtraHosts":["db:1.2.3.4"],"Binds":["`+d.waiter+`"]},"NetworkSettings":{"IPAddress":"172.17.0.2","Ports":{}}}`)
	case path == "/containers/plain/json":
		io.WriteString(w, `{"Id":"badcafe","Config":{"Labels":{}}}`)
	case strings.HasSuffix(path, "/start"), strings.HasSuffix(path, "/restart"), strings.HasSuffix(path, "/kill"):
		w.WriteHeader(http.StatusNoContent)
	case d.handler != nil:
		r.Body = io.NopCloser(bytes.NewReader(body))
		d.handler(w, r)
	default:
		http.NotFound(w, r)
	}
}

type fakeContainers struct {
	err      error
	requests []Request
	block    chan struct{} // Attach waits for it unless it is nil
}

func (f *fakeContainers) Attach(ctx context.Context, r Request) error {
	f.requests = append(f.requests, r)
	if f.block != nil {
		f.block <- struct{}{}
		select {
		case <-f.block:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return f.err
}

func (f *fakeContainers) Interface(id string) (mesh.MAC, []netip.Prefix, bool) {
	return mesh.MAC{2, 0, 0, 0, 0, 1}, []netip.Prefix{netip.MustParsePrefix("10.32.0.1/12")}, id == "c0ffee"
}

type bench struct {
	daemon     *daemon
	containers *fakeContainers
	client     *http.Client
	socket     string
	wait       string // directory of the waiter
	stop       context.CancelFunc
}

// start runs a proxy between a fake daemon and a client.
func start(t *testing.T, change func(*Config)) *bench {
	t.Helper()
	dir := t.TempDir()
	b := &bench{daemon: &daemon{}, containers: &fakeContainers{}, socket: filepath.Join(dir, "proxy.sock"), wait: filepath.Join(dir, "wait")}
	docker := filepath.Join(dir, "docker.sock")
	l, err := net.Listen("unix", docker)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: b.daemon}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	b.daemon.waiter = b.wait + ":" + wait.Mount + ":ro"
	cfg := Config{
		Listen: []string{"unix://" + b.socket}, Docker: "unix://" + docker,
		WaitDir: b.wait, Ifname: "ethmesh",
		DNS: func() netip.AddrPort { return netip.MustParseAddrPort("172.17.0.1:53") }, DNSDomain: "mesh.internal.",
	}
	if change != nil {
		change(&cfg)
	}
	p, err := Listen(cfg, b.containers, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	b.stop = cancel
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", b.socket)
	}}
	b.client = &http.Client{Transport: transport}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Error("Run:", err)
		}
	})
	return b
}

func (b *bench) post(t *testing.T, path, body string) (int, string) {
	t.Helper()
	resp, err := b.client.Post("http://docker"+path, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(answer)
}

type created struct {
	Hostname, Domainname string
	Entrypoint, Cmd      []string
	Labels               map[string]string
	HostConfig           struct {
		Binds, Dns, DnsSearch []string
	}
}

func TestCreate(t *testing.T) {
	waiter := []string{wait.Path, "ethmesh"}
	with := func(more ...string) []string { return append(append([]string{}, waiter...), more...) }
	type outcome struct {
		Entrypoint, Cmd []string
		Label           string // "-": none
		Hostname        string
		Search          string
	}
	for _, c := range []struct {
		name, query, body string
		want              outcome
	}{
		{"image command", "", `{"Image":"sh"}`, outcome{waiter, []string{"sh", "-c", "x"}, "", "", "mesh.internal"}},
		{"own command", "?name=web", `{"Image":"sh","Cmd":["ls"]}`, outcome{waiter, []string{"ls"}, "", "web", "mesh.internal"}},
		{"command as a string", "", `{"Image":"sh","Cmd":"ls"}`, outcome{waiter, []string{"ls"}, "", "", "mesh.internal"}},
		{"own entrypoint drops the image's command", "", `{"Image":"sh","Entrypoint":["/e"]}`, outcome{with("/e"), []string{}, "", "", "mesh.internal"}},
		{"image entrypoint and environment", "", `{"Image":"tool","Cmd":["go"]}`, outcome{with("/tool"), []string{"go"}, "net:10.5.0.0/16", "", "mesh.internal"}},
		{"own environment counts more", "", `{"Image":"tool","Env":["WEAVE_CIDR=net:10.7.0.0/16","MESH_CIDR=net:10.6.0.0/16"]}`, outcome{with("/tool"), []string{"help"}, "net:10.6.0.0/16", "", "mesh.internal"}},
		{"the other spelling", "", `{"Image":"sh","Env":["WEAVE_CIDR=ip:10.6.0.1/16 net:default"]}`, outcome{waiter, []string{"sh", "-c", "x"}, "ip:10.6.0.1/16 net:default", "", "mesh.internal"}},
		{"entrypoint cleared", "", `{"Image":"tool","Entrypoint":[""],"Cmd":["ls"]}`, outcome{waiter, []string{"ls"}, "net:10.5.0.0/16", "", "mesh.internal"}},
		{"empty entrypoint, as the daemon reads it", "", `{"Image":"tool","Entrypoint":[],"Cmd":["ls"]}`, outcome{waiter, []string{"ls"}, "net:10.5.0.0/16", "", "mesh.internal"}},
		{"image of a container of ours", "", `{"Image":"mine"}`, outcome{with("/tool"), []string{"help"}, "", "", "mesh.internal"}},
		{"no command", "", `{"Image":"bare"}`, outcome{nil, nil, "", "", "mesh.internal"}},
		{"missing image", "", `{"Image":"missing","Cmd":["ls"]}`, outcome{nil, nil, "", "", "mesh.internal"}},
		{"variable removed", "", `{"Image":"tool","Env":["MESH_CIDR"]}`, outcome{with("/tool"), []string{"help"}, "", "", "mesh.internal"}},
		{"image of a container of ours, opted out", "", `{"Image":"mine","Env":["MESH_CIDR=none"]}`, outcome{[]string{"/tool"}, []string{"help"}, "none", "", ""}},
		{"image of a container of ours without entrypoint, opted out", "", `{"Image":"mine-sh","Env":["MESH_CIDR=none"]}`, outcome{[]string{""}, []string{"sh"}, "none", "", ""}},
		{"two proxies", "", `{"Image":"sh","Entrypoint":["` + wait.Path + `","ethmesh"],"Cmd":["ls"],"HostConfig":{"Binds":["WAIT:` + wait.Mount + `:ro"],"Dns":["172.17.0.1"]}}`, outcome{waiter, []string{"ls"}, "", "", "mesh.internal"}},
		{"opted out", "", `{"Image":"sh","Env":["MESH_CIDR=none"]}`, outcome{nil, nil, "-", "", ""}},
		{"host network", "", `{"Image":"sh","HostConfig":{"NetworkMode":"host"}}`, outcome{nil, nil, "-", "", ""}},
		{"another's network", "", `{"Image":"sh","HostConfig":{"NetworkMode":"container:x"}}`, outcome{nil, nil, "-", "", ""}},
		{"no network", "", `{"Image":"sh","HostConfig":{"NetworkMode":"none"}}`, outcome{waiter, []string{"sh", "-c", "x"}, "", "", "mesh.internal"}},
		{"a user's network", "", `{"Image":"sh","HostConfig":{"NetworkMode":"mine"}}`, outcome{nil, nil, "-", "", ""}},
		{"a user's network on demand", "", `{"Image":"sh","Env":["MESH_CIDR="],"HostConfig":{"NetworkMode":"mine"}}`, outcome{waiter, []string{"sh", "-c", "x"}, "", "", "mesh.internal"}},
		{"label smuggled in", "", `{"Image":"sh","Labels":{"meshd.addresses":"ip:10.0.0.1/8"},"HostConfig":{"NetworkMode":"host"}}`, outcome{nil, nil, "none", "", ""}},
		{"own host name", "?name=web", `{"Image":"sh","Hostname":"db"}`, outcome{waiter, []string{"sh", "-c", "x"}, "", "db", "mesh.internal"}},
		{"name with an underscore", "?name=a_b", `{"Image":"sh"}`, outcome{waiter, []string{"sh", "-c", "x"}, "", "a_b", "mesh.internal"}},
		{"name that is no host name", "?name=a-", `{"Image":"sh"}`, outcome{waiter, []string{"sh", "-c", "x"}, "", "", "mesh.internal"}},
		{"name of 64 bytes", "?name=" + strings.Repeat("n", 64), `{"Image":"sh"}`, outcome{waiter, []string{"sh", "-c", "x"}, "", strings.Repeat("n", 64), "mesh.internal"}},
		{"name of 65 bytes", "?name=" + strings.Repeat("n", 65), `{"Image":"sh"}`, outcome{waiter, []string{"sh", "-c", "x"}, "", "", "mesh.internal"}},
		{"own search list", "", `{"Image":"sh","HostConfig":{"DnsSearch":["x.y"]}}`, outcome{waiter, []string{"sh", "-c", "x"}, "", "", "x.y"}},
		{"folded names", "", `{"image":"sh","hostconfig":{"networkmode":"host"}}`, outcome{nil, nil, "-", "", ""}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := start(t, nil)
			body := strings.Replace(c.body, "WAIT:", b.wait+":", 1)
			if code, answer := b.post(t, "/v1.41/containers/create"+c.query, body); code != http.StatusCreated {
				t.Fatalf("got %d %s", code, answer)
			}
			var got created
			if err := json.Unmarshal(b.daemon.created, &got); err != nil {
				t.Fatal(err)
			}
			have := outcome{got.Entrypoint, got.Cmd, "-", got.Hostname, strings.Join(got.HostConfig.DnsSearch, " ")}
			if v, ok := got.Labels[LabelAddrs]; ok {
				have.Label = v
			}
			if c.want.Entrypoint == nil { // as it came
				have.Entrypoint, have.Cmd = nil, nil
			}
			if diff := cmp.Diff(c.want, have); diff != "" {
				t.Errorf("(-want +got)\n%s\n%s", diff, b.daemon.created)
			}
			if attached := have.Label != "-" && have.Label != "none"; attached != (len(got.HostConfig.Dns) == 1) {
				t.Errorf("name servers %v", got.HostConfig.Dns)
			}
			if waits(got.Entrypoint) != (len(got.HostConfig.Binds) == 1) {
				t.Errorf("binds %v", got.HostConfig.Binds)
			}
		})
	}
}

func TestCreateRefuses(t *testing.T) {
	b := start(t, nil)
	for _, body := range []string{
		`{"Image":"sh","Env":["MESH_CIDR=10.0.0.0/8"]}`,
		`{"Image":"sh","Env":["MESH_CIDR=nonsense"]}`,
		`{"Image":"sh","Env":["WEAVE_CIDR=none ip:10.2.1.1/24"]}`,
		`{"Image":"sh","HostConfig":{},"hostconfig":{"NetworkMode":"host"}}`,
		`{"Image":"sh","HostConfig":{"NetworkMode":"host","networkMode":""}}`,
		`{"Image":"sh","Env":"MESH_CIDR=none"}`,
		`{"Image":7}`,
		`{"Image":"sh","NetworkMode":"host"}`,
		`{"Image":"sh","privileged":true,"HostConfig":null}`,
		`[]`, `{`, `{} x`,
		`{"a":` + strings.Repeat(`[`, 10000) + strings.Repeat(`]`, 10000) + `}`,
	} {
		code, answer := b.post(t, "/v1.41/containers/create", body)
		var doc struct{ Message string }
		if json.Unmarshal([]byte(answer), &doc) != nil || code != http.StatusBadRequest || !strings.HasPrefix(doc.Message, "meshd: ") {
			t.Errorf("%.80s: got %d %s", body, code, answer)
		}
	}
	if b.daemon.created != nil {
		t.Errorf("the daemon got %s", b.daemon.created)
	}
	if code, _ := b.post(t, "/containers/create", `{"x":"`+strings.Repeat("y", maxBody)+`"}`); code != http.StatusRequestEntityTooLarge {
		t.Errorf("giant body: got %d", code)
	}
}

func TestStart(t *testing.T) {
	b := start(t, nil)
	if code, answer := b.post(t, "/v1.41/containers/ours/start", ""); code != http.StatusNoContent {
		t.Fatalf("got %d %s", code, answer)
	}
	want := []Request{{
		Container: "c0ffee", Addrs: []mesh.AddrSpec{{Kind: mesh.AddrSubnet, Prefix: netip.MustParsePrefix("10.2.0.0/16")}},
		RewriteHosts: true, AddHosts: []string{"db:1.2.3.4"},
	}}
	if diff := cmp.Diff(want, b.containers.requests, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if code, _ := b.post(t, "/containers/plain/start", ""); code != http.StatusNoContent || len(b.containers.requests) != 1 {
		t.Errorf("a container that is not ours: got %d, %d requests", code, len(b.containers.requests))
	}
	b.containers.err = errors.New("no address is free")
	code, answer := b.post(t, "/containers/ours/restart", "")
	if code != http.StatusInternalServerError || !strings.Contains(answer, "no address is free") {
		t.Errorf("failed attach: got %d %s", code, answer)
	}
	if last := b.daemon.calls[len(b.daemon.calls)-1]; last != "POST /containers/c0ffee/kill" {
		t.Errorf("the last call was %s", last)
	}
	b.containers.err = fmt.Errorf("attach: %w", ErrEnded)
	if code, answer := b.post(t, "/containers/ours/start", ""); code != http.StatusNoContent {
		t.Errorf("ended while it was attached: got %d %s", code, answer)
	}
}

// Where root is somebody else Docker cannot set a domain name, so that it goes into the host name.
func TestCreateRemapped(t *testing.T) {
	b := start(t, nil)
	b.daemon.remaps = true
	for body, want := range map[string][2]string{
		`{"Image":"sh"}`: {"web.mesh.internal", ""},
		`{"Image":"sh","HostConfig":{"UsernsMode":"host"}}`: {"web", "mesh.internal"},
		`{"Image":"sh","Hostname":"own"}`:                   {"own", ""},
	} {
		if code, answer := b.post(t, "/v1.41/containers/create?name=web", body); code != http.StatusCreated {
			t.Fatalf("%s: %d %s", body, code, answer)
		}
		var got created
		if err := json.Unmarshal(b.daemon.created, &got); err != nil {
			t.Fatal(err)
		}
		if got.Hostname != want[0] || got.Domainname != want[1] {
			t.Errorf("%s: got %q and %q, want %q", body, got.Hostname, got.Domainname, want)
		}
	}
}

// Settings that come with a start, as clients of old send them, get what those of create had got.
func TestStartWithSettings(t *testing.T) {
	b := start(t, nil)
	code, answer := b.post(t, "/containers/ours/start", `{"Binds":["/a:/b"],"Privileged":true,"ExtraHosts":["far:192.0.2.1"],"Unknown":[1]}`)
	if code != http.StatusNoContent {
		t.Fatalf("got %d %s", code, answer)
	}
	want := `{"Binds":["/a:/b","` + b.daemon.waiter + `"],"Privileged":true,"ExtraHosts":["far:192.0.2.1"],"Unknown":[1],"Dns":["172.17.0.1"],"DnsSearch":["mesh.internal"]}`
	if got := string(b.daemon.started); got != want {
		t.Errorf("the daemon got %s, want %s", got, want)
	}
	if r := b.containers.requests; len(r) != 1 || !slices.Equal(r[0].AddHosts, []string{"far:192.0.2.1"}) {
		t.Errorf("attached %v", r)
	}
	for _, bad := range []string{`{"NetworkMode":"host"}`, `{"NetworkMode":"container:x"}`, `{"Binds":[],"binds":["/:/x"]}`, `[{"Binds":[]}]`, `{"Binds":"x"}`, `{"Binds":[]} {}`} {
		if code, answer := b.post(t, "/containers/ours/start", bad); code != http.StatusBadRequest {
			t.Errorf("%s: got %d %s", bad, code, answer)
		}
	}
	if len(b.containers.requests) != 1 {
		t.Errorf("attached %v", b.containers.requests)
	}
}

// A client that goes away while its container is attached ends nothing.
func TestClientLeaves(t *testing.T) {
	b := start(t, nil)
	b.containers.block = make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	req, _ := http.NewRequestWithContext(ctx, http.MethodPost, "http://docker/containers/ours/start", nil)
	left := make(chan error)
	go func() {
		_, err := b.client.Do(req)
		left <- err
	}()
	<-b.containers.block
	cancel()
	if err := <-left; err == nil {
		t.Error("the request ended well")
	}
	b.containers.block <- struct{}{}
	b.containers.block = nil
	if code, _ := b.post(t, "/containers/plain/start", ""); code != http.StatusNoContent {
		t.Errorf("got %d", code)
	}
	b.daemon.mu.Lock()
	defer b.daemon.mu.Unlock()
	for _, call := range b.daemon.calls {
		if strings.HasSuffix(call, "/kill") {
			t.Errorf("the container was stopped: %v", b.daemon.calls)
		}
	}
}

// A daemon that dies in the middle of a call leaves an error, and nothing attached.
func TestDaemonDies(t *testing.T) {
	b := start(t, nil)
	b.daemon.dies = true
	for _, path := range []string{"/containers/create", "/containers/ours/start", "/containers/ours/restart", "/containers/x/attach", "/build", "/events"} {
		body := ""
		if path == "/containers/create" {
			body = `{"Image":"sh"}`
		}
		resp, err := b.client.Post("http://docker"+path, "application/json", strings.NewReader(body))
		if err != nil {
			if path == "/build" {
				continue // the connection ends as the daemon's did
			}
			t.Fatalf("%s: %v", path, err)
		}
		answer, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode < 400 || !json.Valid(answer) {
			t.Errorf("%s: got %d %s", path, resp.StatusCode, answer)
		}
	}
	if len(b.containers.requests) > 0 {
		t.Errorf("attached %v", b.containers.requests)
	}
}

// An answer that the daemon does not end is not ended by the proxy either.
func TestAnswerCut(t *testing.T) {
	b := start(t, nil)
	b.daemon.handler = func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "the first part")
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	for _, path := range []string{"/containers/x/attach", "/containers/x/wait", "/build"} {
		resp, err := b.client.Post("http://docker"+path, "application/json", nil)
		if err != nil {
			continue
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err == nil {
			t.Errorf("%s: %q passes for the whole answer", path, got)
		}
	}
}

// A client that closes its sending half before there is an answer gets a true one or none.
func TestHalfClosedBeforeAnswer(t *testing.T) {
	b := start(t, nil)
	b.daemon.handler = func(_ http.ResponseWriter, r *http.Request) {
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
	conn, err := net.Dial("unix", b.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "POST /containers/x/wait HTTP/1.1\r\nHost: docker\r\n\r\n")
	conn.(*net.UnixConn).CloseWrite()
	if got, err := io.ReadAll(conn); len(got) > 0 || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestInspectRewritten(t *testing.T) {
	b := start(t, func(c *Config) { c.RewriteInspect = true })
	resp, err := b.client.Get("http://docker/containers/ours/json")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	want := `"NetworkSettings":{"IPAddress":"10.32.0.1","Ports":{},"MacAddress":"02:00:00:00:00:01","IPPrefixLen":12}`
	if !bytes.Contains(body, []byte(want)) {
		t.Errorf("got %s", body)
	}
}

// A hijacked stream ends each way on its own: what the daemon says after the client is done still arrives.
func TestHijackHalfClose(t *testing.T) {
	for _, upgrade := range []bool{true, false} {
		t.Run(fmt.Sprint("upgrade ", upgrade), func(t *testing.T) {
			b := start(t, nil)
			b.daemon.handler = func(w http.ResponseWriter, r *http.Request) {
				conn, rw, err := http.NewResponseController(w).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				if upgrade {
					io.WriteString(conn, "HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nhello\n")
				} else {
					io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\nhello\n")
				}
				all, err := io.ReadAll(rw)
				fmt.Fprintf(conn, "got %d bytes, %v\n", len(all), err)
			}
			conn, err := net.Dial("unix", b.socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			head := "POST /containers/x/attach?stdin=1 HTTP/1.1\r\nHost: docker\r\n"
			if upgrade {
				head += "Connection: Upgrade\r\nUpgrade: tcp\r\n"
			}
			io.WriteString(conn, head+"\r\n")
			br := bufio.NewReader(conn)
			for line := ""; line != "hello\n"; {
				if line, err = br.ReadString('\n'); err != nil {
					t.Fatal(err)
				}
			}
			conn.Write(bytes.Repeat([]byte("x"), 1<<20))
			conn.(*net.UnixConn).CloseWrite()
			rest, err := io.ReadAll(br)
			if want := "got 1048576 bytes, <nil>\n"; string(rest) != want || err != nil {
				t.Errorf("got %q, %v, want %q", rest, err, want)
			}
		})
	}
}

func TestPassThrough(t *testing.T) {
	b := start(t, nil)
	b.daemon.handler = func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Path", r.URL.EscapedPath())
		w.Header().Set("X-Query", r.URL.RawQuery)
		w.WriteHeader(http.StatusTeapot)
		io.Copy(w, r.Body)
	}
	body := strings.Repeat("{\"a\":1,\"a\":2}\xff", 100000)
	resp, err := b.client.Post("http://docker/v1.99/images/load%2Fx?a=b%20c&a", "application/x-tar", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusTeapot || string(got) != body ||
		resp.Header.Get("X-Path") != "/v1.99/images/load%2Fx" || resp.Header.Get("X-Query") != "a=b%20c&a" {
		t.Errorf("got %d, %d bytes, %v", resp.StatusCode, len(got), resp.Header)
	}
}

// What moves much is passed on undecoded, with its framing, and ends when the daemon has answered.
func TestBulk(t *testing.T) {
	b := start(t, nil)
	b.daemon.handler = func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "refused") {
			http.Error(w, `{"message":"no space"}`, http.StatusInsufficientStorage)
			return
		}
		w.Header().Set("X-Length", fmt.Sprint(r.ContentLength, r.TransferEncoding))
		w.Header().Set("X-Query", r.URL.RawQuery)
		io.Copy(w, r.Body)
	}
	body := strings.Repeat("0123456789abcdef", 1<<16)
	for _, c := range []struct {
		method, path, length string
		body                 io.Reader
	}{
		{http.MethodPut, "/v1.41/containers/x/archive?path=%2F&a;b", "1048576 []", strings.NewReader(body)},
		{http.MethodPost, "/build?t=x", "-1 [chunked]", io.LimitReader(strings.NewReader(body), 1<<20)},
		{http.MethodPost, "/images/load", "0 []", nil},
		{http.MethodGet, "/images/a/b/get", "0 []", nil},
		{http.MethodGet, "/images/get?names=a", "0 []", nil},
	} {
		req, err := http.NewRequest(c.method, "http://docker"+c.path, c.body)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := b.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		want := ""
		if c.body != nil {
			want = body
		}
		if err != nil || string(got) != want || resp.Header.Get("X-Length") != c.length || resp.Header.Get("X-Query") != req.URL.RawQuery {
			t.Errorf("%s %s: %d bytes, %v, %v", c.method, c.path, len(got), resp.Header, err)
		}
		if !bulkPath.MatchString(req.URL.Path) {
			t.Errorf("%s is not taken for bulk", c.path)
		}
	}
	for range 20 { // the refusal arrives though the client is still sending
		resp, err := b.client.Post("http://docker/containers/refused/archive", "application/x-tar", io.LimitReader(zeros{}, 8<<20))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusInsufficientStorage || !bytes.Contains(got, []byte("no space")) {
			t.Errorf("got %d %s %v", resp.StatusCode, got, err)
		}
		resp.Body.Close()
	}
	for _, path := range []string{"/containers/json", "/images/json", "/images/x/json", "/containers/x/archived", "/build/prune", "/images/search", "/containers/archive"} {
		if bulkPath.MatchString(path) {
			t.Errorf("%s is taken for bulk", path)
		}
	}
}

// Between sockets the kernel passes on what comes; what is none, or sealed, stays untouched for others to copy.
func TestPassOn(t *testing.T) {
	pair := func() (near, far net.Conn) {
		t.Helper()
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		var conns [2]net.Conn
		for i, fd := range fds {
			f := os.NewFile(uintptr(fd), "pair")
			if conns[i], err = net.FileConn(f); err != nil {
				t.Fatal(err)
			}
			f.Close()
			t.Cleanup(func() { conns[i].Close() })
		}
		return conns[0], conns[1]
	}
	near, client := pair()
	far, daemon := pair()
	src, dst := ownThread(near), ownThread(far)
	defer src.Close()
	if passOn(dst, strings.NewReader("x")) || passOn(struct{ io.Writer }{dst}, src) {
		t.Error("what is no socket has passed the kernel")
	}
	const size = 8 << 20
	passed := make(chan bool, 1)
	go func() {
		passed <- passOn(dst, src)
		dst.Close()
	}()
	go func() {
		io.CopyN(client, strings.NewReader(strings.Repeat("0123456789abcde", size/15+1)), size)
		client.Close()
	}()
	got, err := io.ReadAll(daemon)
	if err != nil || len(got) != size || !strings.HasPrefix(strings.Repeat("0123456789abcde", size/15+1), string(got)) {
		t.Errorf("%d bytes of %d, or others: %v", len(got), size, err)
	}
	if !<-passed {
		t.Error("sockets are left to others")
	}
}

// A transfer that stands still ends when the proxy ends, and soon after the daemon has had its say.
func TestBulkCut(t *testing.T) {
	for _, c := range []string{"proxy ends", "daemon ends"} {
		t.Run(c, func(t *testing.T) {
			l, err := net.Listen("unix", filepath.Join(t.TempDir(), "docker.sock"))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			b := start(t, func(cfg *Config) { cfg.Docker = "unix://" + l.Addr().String() })
			client, err := net.Dial("unix", b.socket)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			client.SetDeadline(time.Now().Add(10 * time.Second))
			io.WriteString(client, "PUT /containers/x/archive HTTP/1.1\r\nHost: docker\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
			daemon, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer daemon.Close()
			daemon.SetDeadline(time.Now().Add(10 * time.Second))
			for r := bufio.NewReader(daemon); ; {
				if line, err := r.ReadString('\n'); err != nil {
					t.Fatal(err)
				} else if line == "hello\r\n" {
					break
				}
			}
			want := ""
			if c == "proxy ends" {
				b.stop()
			} else {
				want = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndone"
				io.WriteString(daemon, want)
				daemon.Close()
			}
			if got, err := io.ReadAll(client); err != nil || string(got) != want {
				t.Errorf("got %q, %v", got, err)
			}
			for err == nil { // until nobody reads it any more
				_, err = client.Write(make([]byte, 1<<10))
			}
			if !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the connection lives on: %v", err)
			}
		})
	}
}

func TestDaemonAbsent(t *testing.T) {
	b := start(t, func(c *Config) { c.Docker = "unix:///nowhere/docker.sock" })
	for _, path := range []string{"/version", "/containers/x/attach", "/build", "/containers/x/start", "/containers/create"} {
		code, answer := b.post(t, path, `{"Image":"sh"}`)
		if code < 400 || !json.Valid([]byte(answer)) || !strings.Contains(answer, "docker") {
			t.Errorf("%s: got %d %s", path, code, answer)
		}
	}
}

func TestListenRefuses(t *testing.T) {
	dir := t.TempDir()
	first, err := listen("unix://"+dir+"/a.sock", Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if err := os.Symlink(".", dir+"/here"); err != nil {
		t.Fatal(err)
	}
	for endpoint, want := range map[string]string{
		"unix://" + dir + "/here/a.sock": "another process listens",
		"unix://" + dir:                  "not a socket",
		"unix://relative":                "absolute",
		"unix://" + dir + "/d.sock":      "Docker's own",
		"http://x":                       "neither",
		"tcp://0.0.0.0:0":                "root on this host",
		"nonsense":                       "neither",
	} {
		l, err := listen(endpoint, Config{Docker: "unix://" + dir + "/here/d.sock"})
		if err == nil {
			l.Close()
			t.Errorf("%s: listens", endpoint)
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %q, want %q", endpoint, err, want)
		}
	}
}

// Beyond loopback only those with a certificate are let in.
func TestListenForAll(t *testing.T) {
	verifying := &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert}
	for _, c := range []struct {
		endpoint string
		tls      *tls.Config
		ok       bool
	}{
		{"tcp://0.0.0.0:0", nil, false}, {"tcp://0.0.0.0:0", &tls.Config{}, false},
		{"tcp://0.0.0.0:0", &tls.Config{ClientAuth: tls.VerifyClientCertIfGiven}, false}, {"tcp://0.0.0.0:0", verifying, true},
		{"tcp://127.0.0.1:0", nil, true}, {"tcp://127.0.0.1:0", &tls.Config{}, true},
	} {
		l, err := listen(c.endpoint, Config{TLS: c.tls})
		if (err == nil) != c.ok {
			t.Errorf("%s, %+v: %v", c.endpoint, c.tls, err)
		}
		if err == nil {
			l.Close()
		}
	}
}
