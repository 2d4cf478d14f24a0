package control

import (
	"context"
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
	"testing"
	"time"

	"go.uber.org/goleak"

	"meshd/mesh"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// get asks a server by hand, as scripts with curl do.
func get(t *testing.T, addr net.Addr, method, path string, header http.Header, body string) (int, string) {
	t.Helper()
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, addr.Network(), addr.String())
	}}
	host := "localhost"
	if addr.Network() == "tcp" {
		host = addr.String()
	}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+host+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	if h := header.Get("Host"); h != "" {
		req.Host = h
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestPaths(t *testing.T) {
	f := &fake{report: sample(t)}
	s := start(t, Config{}, f.backends())
	for _, c := range []struct {
		method, path, body string
		code               int
		answer             string // what it starts with
		call               string // what the backend is asked
	}{
		{"POST", "/connect?peer=a&peer=b", "", 204, "", `connect ["a" "b"] false`},
		{"POST", "/connect?replace=true", "", 204, "", `connect [] true`},
		{"POST", "/forget?peer=a", "", 204, "", `forget ["a"]`},
		{"GET", "/ring", "", 204, "", "prime"},
		{"POST", "/ring/repair", "", 200, "merged", "repair"},
		{"DELETE", "/peer", "", 204, "", "leave"},
		{"POST", "/password", `{"Password":"sesame"}`, 200, "0a0b0c0d\n", "password add sesame"},
		{"POST", "/password", `{"Pasword":"sesame"}`, 400, "request: json: unknown field \"Pasword\"\n", ""},
		{"POST", "/password/0a0b0c0d/use", "", 204, "", "password use 0a0b0c0d"},
		{"DELETE", "/password/01020304", "", 204, "", "password remove 01020304"},
		{"DELETE", "/peer/host2", "", 200, "12 IPs taken over from host2\n", "rmpeer host2"},
		{"GET", "/ip", "", 200, "{\n    \"c1\": [\n        \"10.32.0.1/12\"\n    ]\n}\n", ""},
		{"GET", "/ip/c1", "", 200, "10.32.0.1/12 10.33.0.1/24", "lookup c1 invalid Prefix"},
		{"GET", "/ip/c1/10.33.0.0/24", "", 200, "10.32.0.1/12", "lookup c1 10.33.0.0/24"},
		{"GET", "/ip/nobody", "", 404, "nobody has no address", "lookup nobody invalid Prefix"},
		{"POST", "/ip/c1", "", 200, "10.32.0.1/12", "allocate c1 invalid Prefix"},
		{"POST", "/ip/c1/10.33.0.0/24?check-alive=true", "", 200, "10.32.0.1/12", "allocate c1 10.33.0.0/24"},
		{"POST", "/ip/c1/10.33.0.1/24", "", 400, "10.33.0.1/24 has bits set", ""},
		{"POST", "/ip/c1/10.33.0.0/31", "", 400, "10.33.0.0/31: the smallest subnet", ""},
		{"PUT", "/ip/c1/10.33.0.1/24", "", 204, "", "claim c1 10.33.0.1/24"},
		{"PUT", "/ip/c1/10.33.0.x/24", "", 400, `"10.33.0.x/24" is not a CIDR`, ""},
		{"DELETE", "/ip/c1", "", 204, "", "release c1"},
		{"DELETE", "/ip/c1/10.33.0.1", "", 204, "", "release c1 10.33.0.1"},
		{"DELETE", "/ip/c1/10.33.0.1/24", "", 204, "", "release c1 10.33.0.1"},
		{"DELETE", "/ip/c1/x", "", 400, `"x" is not an IP address`, ""},
		{"GET", "/ipinfo/defaultsubnet", "", 200, "10.32.0.0/12", ""},
		{"GET", "/ipinfo/tracker", "", 200, "", ""},
		{"PUT", "/name/c1/10.2.1.1?fqdn=a.mesh.internal", "", 204, "", "add c1 [10.2.1.1] a.mesh.internal"},
		{"PUT", "/name/mesh:extern?ip=10.2.1.1&ip=10.2.1.2&fqdn=a", "", 204, "", "add mesh:extern [10.2.1.1 10.2.1.2] a"},
		{"PUT", "/name/mesh:extern/10.2.1.1", "", 400, "without a container", ""},
		{"PUT", "/name/netns:%2Frun%2Fnetns%2Fx", "", 204, "", "add netns:/run/netns/x [] "},
		{"DELETE", "/name/c1/10.2.1.1?fqdn=a", "", 204, "", "remove c1 [10.2.1.1] a"},
		{"DELETE", "/name/c1?ip=bogus", "", 400, `"bogus" is not`, ""},
		{"GET", "/name?fqdn=ONE", "", 200, "[\n    {\n        \"Hostname\": \"one.mesh.internal.\"", ""},
		{"GET", "/name/mesh:expose", "", 200, "[\n    {\n        \"Hostname\": \"a.two", ""},
		{"GET", "/name?fqdn=gone", "", 200, "[]", ""},
		{"GET", "/domain", "", 200, "mesh.internal.", ""},
		{"GET", "/dns-address", "", 200, "172.17.0.1", ""},
		{"GET", "/dns-address-port", "", 200, "172.17.0.1:53", ""},
		{"GET", "/proxyaddrs", "", 200, "unix:///run/meshd/docker.sock\ntcp://0.0.0.0:12375\n", ""},
		{"GET", "/ps?container=c1", "", 200, "[", `ps ["c1"]`},
		{"POST", "/attach", `{"Container":"c1","Addresses":["10.2.1.1/24","net:default"]}`, 200, "{",
			"attach {Container:c1 Addresses:[ip:10.2.1.1/24 net:default] WithoutDNS:false RewriteHosts:false AddHosts:[] NoMulticastRoute:false}"},
		{"POST", "/attach", `{"Container":"c1","Addresses":["10.2.1.0/24"]}`, 400, `request: address "10.2.1.0/24": is the network address`, ""},
		{"POST", "/attach", `{"Container":"c1","Bogus":1}`, 400, `request: json: unknown field "Bogus"`, ""},
		{"POST", "/attach", `{}`, 400, "a container is needed", ""},
		{"POST", "/attach", `{} {}`, 400, "request: more than one JSON value", ""},
		{"POST", "/attach", `{"Container":"c1","AddHosts":["x"]}`, 400, `"x" is not name:address`, ""},
		{"POST", "/attach", ``, 400, "request: EOF", ""},
		{"POST", "/detach", `{"Container":"c1"}`, 200, "{", "detach {Container:c1 Addresses:[]}"},
		{"POST", "/expose", `{"FQDN":"h.mesh.internal"}`, 200, "{", "expose {Addresses:[] FQDN:h.mesh.internal WithoutMasquerade:false}"},
		{"POST", "/expose/10.2.1.1/24?skipNAT=true", "", 204, "", "expose {Addresses:[ip:10.2.1.1/24] FQDN: WithoutMasquerade:true}"},
		{"POST", "/hide", `{}`, 200, "{", "hide {Addresses:[]}"},
		{"GET", "/status", "", 200, "        Version: 1.2.3", ""},
		{"GET", "/status/targets", "", 200, "192.168.48.14\n", ""},
		{"GET", "/status/nonsense", "", 400, `there is no status "nonsense"`, ""},
		{"GET", "/report", "", 200, "{\n    \"Ready\": true", ""},
		{"GET", "/report?format={{.Version}}", "", 200, "1.2.3", ""},
		{"GET", "/report?format={{", "", 400, "template:", ""},
		{"GET", "/metrics", "", 200, "# HELP", ""},
		{"GET", "/debug/pprof/", "", 200, "<html>", ""},
		{"GET", "/attach", "", 405, "Method Not Allowed", ""},
		{"GET", "/nonsense", "", 404, "404", ""},
		{"GET", "/ring?timeout=soon", "", 400, `timeout "soon"`, ""},
	} {
		before := len(f.log())
		code, answer := get(t, s.Addr(0), c.method, c.path, nil, c.body)
		if code != c.code || !strings.HasPrefix(answer, c.answer) {
			t.Errorf("%s %s: got %d %q, want %d %q", c.method, c.path, code, answer, c.code, c.answer)
		}
		calls := strings.Join(f.log()[before:], "; ")
		if calls != c.call {
			t.Errorf("%s %s: got calls %q, want %q", c.method, c.path, calls, c.call)
		}
	}
}

func TestFeaturesThatAreOff(t *testing.T) {
	s := start(t, Config{}, Backends{Reporter: &fake{report: Report{Ready: true}}})
	for _, c := range []struct{ method, path, body string }{
		{"POST", "/connect?peer=a", ""}, {"GET", "/ring", ""}, {"DELETE", "/peer", ""}, {"GET", "/ip/c1", ""}, {"GET", "/domain", ""},
		{"GET", "/name", ""}, {"PUT", "/name/c1/1.2.3.4", ""}, {"GET", "/ps", ""}, {"POST", "/attach", "{}"}, {"POST", "/detach", "{}"},
		{"POST", "/expose", "{}"}, {"POST", "/expose/1.2.3.4/8", ""}, {"POST", "/hide", "{}"}, {"GET", "/proxyaddrs", ""}, {"GET", "/status/ipam", ""},
		{"GET", "/status/dns", ""}, {"GET", "/status/peers", ""},
	} {
		if code, answer := get(t, s.Addr(0), c.method, c.path, nil, c.body); code != 404 || !strings.HasSuffix(answer, "is turned off\n") {
			t.Errorf("%s %s: got %d %q, want 404", c.method, c.path, code, answer)
		}
	}
}

func TestStatusWhileStarting(t *testing.T) {
	s := start(t, Config{}, Backends{Reporter: &fake{}})
	if code, answer := get(t, s.Addr(0), "GET", "/status", nil, ""); code != 503 || answer != "meshd is starting\n" {
		t.Errorf("got %d %q", code, answer)
	}
	if code, _ := get(t, s.Addr(0), "GET", "/report", nil, ""); code != 200 {
		t.Errorf("report: got %d", code)
	}
}

func TestReadOnlyFaces(t *testing.T) {
	f := &fake{report: sample(t)}
	s := start(t, Config{HTTPAddr: "127.0.0.1:0", StatusAddr: "127.0.0.1:0", MetricsAddr: filepath.Join(t.TempDir(), "m.sock")}, f.backends())
	for i := range s.faces {
		if code, _ := get(t, s.Addr(i), "GET", "/metrics", nil, ""); code != 200 {
			t.Errorf("metrics on listener %d: got %d", i, code)
		}
	}
	faces := map[string]net.Addr{}
	for _, fc := range s.faces[2:] {
		faces[fc.ln.Addr().Network()] = fc.ln.Addr()
	}
	http, status, metrics := s.Addr(1), faces["tcp"], faces["unix"]
	for _, c := range []struct {
		addr         net.Addr
		method, path string
		code         int
	}{
		{http, "POST", "/connect?peer=a", 204},
		{http, "GET", "/debug/pprof/", 404},
		{status, "GET", "/status", 200},
		{status, "GET", "/report", 200},
		{status, "GET", "/report?format={{.Version}}", 400},
		{status, "POST", "/connect?peer=a", 404},
		{status, "POST", "/attach", 404},
		{status, "GET", "/ring", 404},
		{status, "DELETE", "/peer", 404},
		{status, "GET", "/ps", 404},
		{status, "GET", "/debug/pprof/", 404},
		{metrics, "GET", "/status", 404},
	} {
		if code, answer := get(t, c.addr, c.method, c.path, nil, ""); code != c.code {
			t.Errorf("%s %s on %s: got %d %q, want %d", c.method, c.path, c.addr, code, answer, c.code)
		}
	}
}

func TestWebPagesAreRefused(t *testing.T) {
	f := &fake{report: sample(t)}
	s := start(t, Config{HTTPAddr: "127.0.0.1:0"}, f.backends())
	for _, h := range []http.Header{
		{"Origin": {"http://evil.example"}}, {"Origin": {"null"}}, {"Sec-Fetch-Site": {"cross-site"}}, {"Sec-Fetch-Site": {"same-origin"}},
		{"Host": {"evil.example"}}, {"Host": {"evil.example:6784"}}, {"Host": {"192.0.2.1:6784"}},
	} {
		if code, _ := get(t, s.Addr(1), "POST", "/connect?peer=a", h, ""); code != 403 {
			t.Errorf("%v: got %d, want 403", h, code)
		}
	}
	for _, h := range []http.Header{{"Host": {"localhost:6784"}}, {"Host": {"[::1]:6784"}}, {"Host": {"127.0.0.1"}}, {"Sec-Fetch-Site": {"none"}}} {
		if code, _ := get(t, s.Addr(1), "GET", "/status", h, ""); code != 200 {
			t.Errorf("%v: got %d, want 200", h, code)
		}
	}
	if got := f.log(); len(got) > 0 {
		t.Errorf("a refused request came through: %q", got)
	}
}

// A daemon that takes the connection and says nothing, because it is stopped or stuck, is given up.
func TestSilentDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "silent")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := NewClient(ClientConfig{Addr: path})
	if err != nil {
		t.Fatal(err)
	}
	c.answer = 20 * time.Millisecond
	if _, err := c.Status(t.Context(), ""); !errors.Is(err, ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("status: got %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := c.Prime(ctx); errors.Is(err, ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("what may have to wait for other peers: got %v", err)
	}
}

func TestLargeBodies(t *testing.T) {
	s := start(t, Config{}, (&fake{report: sample(t)}).backends())
	if code, _ := get(t, s.Addr(0), "POST", "/attach", nil, strings.Repeat(" ", maxBody+1)); code != 413 {
		t.Errorf("got %d, want 413", code)
	}
}

// waitFor waits until f was called n times.
func waitFor(t *testing.T, f *fake, n int) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for len(f.log()) < n {
		if time.Now().After(deadline) {
			t.Fatalf("got calls %q, want %d", f.log(), n)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestLongWaitsEndWithTheirClient(t *testing.T) {
	f := &fake{report: sample(t), block: true}
	c := serve(t, f)
	ctx, hangUp := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := c.Attach(ctx, AttachRequest{Container: "c1"})
		done <- err
	}()
	waitFor(t, f, 1)
	hangUp()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that the call was cancelled", err)
	}
	waitFor(t, f, 2) // the backend has heard of it
}

func TestLongWaitsOutliveTheReadTimeout(t *testing.T) {
	f := &fake{report: sample(t), block: true}
	s := start(t, Config{headerTimeout: 20 * time.Millisecond}, f.backends())
	code, answer := get(t, s.Addr(0), "POST", "/ip/c1?timeout=200ms", nil, "")
	if code != 504 || !strings.Contains(answer, "waited for 7e:21:4a:70:2f:45(host2), which is unreachable") {
		t.Errorf("got %d %q, want 504 with whom it waited for", code, answer)
	}
}

func TestTimeoutOfTheClient(t *testing.T) {
	f := &fake{report: sample(t), block: true}
	c := serve(t, f)
	c.timeout = 50 * time.Millisecond
	err := c.Prime(t.Context())
	if e := new(Error); !errors.As(err, &e) || e.Code != 504 || !strings.Contains(e.Text, "unreachable") {
		t.Errorf("got %v, want 504 with whom it waited for", err)
	}
}

// Clients that send nothing, in any number, keep nobody out.
func TestIdleConnectionsKeepNobodyOut(t *testing.T) {
	f := &fake{report: sample(t), block: true}
	s := start(t, Config{}, f.backends())
	addr := s.Addr(0).String()
	held := make(chan int, 1)
	go func() { // one request that is being served all the while
		code, _ := get(t, s.Addr(0), "POST", "/ip/c1?timeout=1s", nil, "")
		held <- code
	}()
	waitFor(t, f, 1)
	var idle []net.Conn
	defer func() {
		for _, c := range idle {
			c.Close()
		}
	}()
	for i := range 2 * maxConns() {
		c, err := net.Dial("unix", addr)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		idle = append(idle, c)
		if i%2 == 0 { // half of them begin a request
			fmt.Fprint(c, "GET /status HTTP/1.1\r\n")
		}
	}
	for range 10 {
		if code, _ := get(t, s.Addr(0), "GET", "/status", nil, ""); code != 200 {
			t.Fatalf("got %d", code)
		}
	}
	b := s.faces[0].conns
	b.mu.Lock()
	n := b.waiting.Len() + len(b.busy)
	b.mu.Unlock()
	if n > maxConns() {
		t.Errorf("%d connections are kept, at most %d should be", n, maxConns())
	}
	idle[0].SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := idle[0].Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the oldest idle connection was not cut: %v", err)
	}
	if code := <-held; code != 504 {
		t.Errorf("the request that was being served: got %d, want 504 from its own timeout", code)
	}
}

func TestSlowHeadersAreCut(t *testing.T) {
	s := start(t, Config{headerTimeout: 20 * time.Millisecond}, Backends{Reporter: &fake{}})
	c, err := net.Dial("unix", s.Addr(0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "GET /status HTTP/1.1\r\nX: ")
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a slow header was not cut")
	}
}

func TestSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "meshd.sock")
	cfg := Config{Log: slog.New(slog.DiscardHandler), Socket: path}
	back := Backends{Reporter: &fake{}}
	s, err := Listen(cfg, back)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of the socket: got %v, %v, want 0600", info.Mode(), err)
	}
	if _, err := Listen(cfg, back); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("second server: got %v", err)
	}
	// A socket that a killed daemon left behind is taken over.
	s.unlink = nil
	s.Close()
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	if s, err = Listen(cfg, back); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket was left: %v", err)
	}
	// Another's file is not.
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(cfg, back); err == nil || !strings.Contains(err.Error(), "is not a socket") {
		t.Errorf("file in the way: got %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("the file in the way was destroyed")
	}
	// Nor is another's socket of another kind.
	cfg.Socket = filepath.Join(dir, "datagrams")
	other, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: cfg.Socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if s, err := Listen(cfg, back); err == nil || !strings.Contains(err.Error(), "another process listens") {
		s.Close()
		t.Errorf("a socket for datagrams in the way: got %v", err)
	}
}

func TestListenIsAllOrNothing(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	path := filepath.Join(t.TempDir(), "s")
	_, err = Listen(Config{Log: slog.New(slog.DiscardHandler), Socket: path, StatusAddr: ln.Addr().String()}, Backends{Reporter: &fake{}})
	if err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("taken port: got %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket was left: %v", err)
	}
	_, err = Listen(Config{Log: slog.New(slog.DiscardHandler), Socket: path, HTTPAddr: "192.0.2.1:6784"}, Backends{Reporter: &fake{}})
	if err == nil || !strings.Contains(err.Error(), "not a loopback address") {
		t.Errorf("open port: got %v", err)
	}
}

func TestClient(t *testing.T) {
	f := &fake{report: sample(t)}
	c := serve(t, f)
	ctx := t.Context()
	addr := mesh.AddrSpec{Kind: mesh.AddrExact, Prefix: netip.MustParsePrefix("10.2.1.1/24")}
	text := func(s string, err error) string { return fmt.Sprint(s, err) }
	for _, got := range []struct{ what, got, want string }{
		{"status", text(c.Status(ctx, "targets")), "192.168.48.14\nhost5:6783\n<nil>"},
		{"connect", fmt.Sprint(c.Connect(ctx, []string{"a b", "c"}, true)), "<nil>"},
		{"forget", fmt.Sprint(c.Forget(ctx, []string{"a"})), "<nil>"},
		{"prime", fmt.Sprint(c.Prime(ctx)), "<nil>"},
		{"leave", fmt.Sprint(c.Leave(ctx)), "<nil>"},
		{"repair", text(c.Repair(ctx)), "merged\n<nil>"},
		{"rmpeer", text(c.RemovePeer(ctx, "a/b")), "12 IPs taken over from a/b\n<nil>"},
		{"attach", fmt.Sprint(c.Attach(ctx, AttachRequest{Container: "c1", Addresses: []mesh.AddrSpec{addr}})), "{[10.2.1.1/24] [careful]} <nil>"},
		{"detach", fmt.Sprint(c.Detach(ctx, DetachRequest{Container: "c1"})), "{[10.2.1.1/24] [careful]} <nil>"},
		{"expose", fmt.Sprint(c.Expose(ctx, ExposeRequest{FQDN: "h"})), "{[10.2.1.1/24] [careful]} <nil>"},
		{"hide", fmt.Sprint(c.Hide(ctx, HideRequest{})), "{[10.2.1.1/24] [careful]} <nil>"},
		{"ps", fmt.Sprint(c.List(ctx, []string{"c1", "c2"})), "[{mesh:expose  02:01:00:00:00:00 []}] <nil>"},
		{"add", fmt.Sprint(c.AddName(ctx, NameRequest{Container: "pid:1", FQDN: "x"})), "<nil>"},
		{"remove", fmt.Sprint(c.RemoveName(ctx, NameRequest{Container: "c1", Addrs: []netip.Addr{addr.Prefix.Addr()}})), "<nil>"},
		{"dns", fmt.Sprint(c.DNS(ctx)), "mesh.internal.172.17.0.1 <nil>"},
		{"proxy", fmt.Sprint(c.ProxyAddrs(ctx)), "[unix:///run/meshd/docker.sock tcp://0.0.0.0:12375] <nil>"},
	} {
		if got.got != got.want {
			t.Errorf("%s: got %q, want %q", got.what, got.got, got.want)
		}
	}
	want := []string{
		`connect ["a b" "c"] true`, `forget ["a"]`, "prime", "leave", "repair", "rmpeer a/b",
		"attach {Container:c1 Addresses:[ip:10.2.1.1/24] WithoutDNS:false RewriteHosts:false AddHosts:[] NoMulticastRoute:false}",
		"detach {Container:c1 Addresses:[]}", "expose {Addresses:[] FQDN:h WithoutMasquerade:false}", "hide {Addresses:[]}",
		`ps ["c1" "c2"]`, "add pid:1 [] x", "remove c1 [10.2.1.1] ",
	}
	if got := f.log(); !slices.Equal(got, want) {
		t.Errorf("got calls\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	report, err := c.Report(ctx)
	if err != nil || report.Router.Name != f.report.Router.Name || len(report.DNS.Entries) != 3 {
		t.Errorf("report: got %+v, %v", report, err)
	}
	entries, err := c.LookupName(ctx, "a.two.mesh.internal")
	if err != nil || len(entries) != 1 || entries[0].Address != "10.32.0.2" {
		t.Errorf("lookup: got %+v, %v", entries, err)
	}
}

func TestErrorsReachTheClient(t *testing.T) {
	f := &fake{report: sample(t), err: errRefused}
	c := serve(t, f)
	_, err := c.Attach(t.Context(), AttachRequest{Container: "c1"})
	if e := new(Error); !errors.As(err, &e) || e.Code != 400 || e.Text != errRefused.Error() {
		t.Errorf("got %v, want 400 %v", err, errRefused)
	}
	if IsOff(err) {
		t.Error("a refusal is taken for a feature that is off")
	}
}

func TestUnreachable(t *testing.T) {
	for _, addr := range []string{filepath.Join(t.TempDir(), "none"), "127.0.0.1:1"} {
		c, err := NewClient(ClientConfig{Addr: addr})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Status(t.Context(), ""); !errors.Is(err, ErrUnreachable) {
			t.Errorf("%s: got %v, want ErrUnreachable", addr, err)
		}
	}
}

// No request, however odd, makes the server fail.
func FuzzRequest(f *testing.F) {
	f.Add("POST", "/attach", `{"Container":"c1","Addresses":["net:default"]}`)
	f.Add("GET", "/ip/c1/10.2.1.0/24", "")
	f.Add("PUT", "/name/c1/10.2.1.1?fqdn=x&ip=1", "")
	f.Add("GET", "/status/../report", "")
	back := &fake{report: sample(f)}
	s := &Server{log: slog.New(slog.DiscardHandler), back: back.backends()}
	h := s.guard(s.controlHandler(false))
	f.Fuzz(func(t *testing.T, method, path, body string) {
		req, err := http.NewRequest(method, "http://localhost/", strings.NewReader(body))
		if err != nil || strings.Contains(path, "timeout") || strings.Contains(path, "format") {
			return
		}
		if req.URL, err = req.URL.Parse(path); err != nil {
			return
		}
		w := &recorder{header: http.Header{}}
		h.ServeHTTP(w, req)
		if w.code >= 500 {
			t.Errorf("%s %q: got %d", method, path, w.code)
		}
		back.mu.Lock()
		back.calls = nil
		back.mu.Unlock()
	})
}

type recorder struct {
	header http.Header
	code   int
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) Write(p []byte) (int, error) { return len(p), nil }
func (r *recorder) WriteHeader(code int)        { r.code = code }
