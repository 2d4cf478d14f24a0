package proxy

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"meshd/mesh"
)

// echo is a daemon that answers every call alike and counts those that change something.
type echo struct {
	code  int
	body  []byte
	calls int
}

func (e *echo) RoundTrip(r *http.Request) (*http.Response, error) {
	e.calls++
	if r.Body != nil {
		_, _ = io.Copy(io.Discard, r.Body)
		r.Body.Close()
	}
	return &http.Response{StatusCode: e.code, Header: http.Header{}, Request: r, Body: io.NopCloser(bytes.NewReader(e.body))}, nil
}

// nobody attaches all that it is asked to.
type nobody struct{}

func (nobody) Attach(context.Context, Request) error { return nil }

func (nobody) Interface(string) (mesh.MAC, []netip.Prefix, bool) {
	return mesh.MAC{2}, []netip.Prefix{netip.MustParsePrefix("10.32.0.1/12")}, true
}

// Whatever a client asks and the daemon answers, the client gets an answer. What the daemon has not seen is refused.
func FuzzRequest(f *testing.F) {
	f.Add("POST", "/v1.41/containers/create?name=a", []byte(`{"Image":"a","HostConfig":{}}`), 201, []byte(`{"Config":{"Env":["MESH_CIDR=net:default"]}}`))
	f.Add("POST", "/containers/a/b/start", []byte(`{"NetworkMode":"bridge"}`), 204, []byte(`{"Id":"c0ffee","Config":{"Labels":{"meshd.addresses":"net:default"}}}`))
	f.Add("GET", "/v1.9.9/containers/%2e%2e/json", []byte(nil), 200, []byte(`{"Id":"c0ffee","NetworkSettings":{}}`))
	f.Add("POST", "/containers/a/restart", []byte(nil), 200, []byte(`{"Config":{"Labels":{"meshd.addresses":"x"}}}`))
	f.Add("GET", "/_ping", []byte(nil), 599, []byte(nil))
	p, err := newProxy(Config{
		Listen: []string{":0"}, Docker: "unix:///nowhere", WaitDir: f.TempDir(), Ifname: "ethmesh", RewriteInspect: true,
		DNS: func() netip.AddrPort { return netip.MustParseAddrPort("172.17.0.1:53") }, DNSDomain: "mesh.internal.",
	}, nobody{}, slog.New(slog.DiscardHandler))
	if err != nil {
		f.Fatal(err)
	}
	p.backend.run = f.Context()
	daemon := &echo{}
	p.backend.transport.RegisterProtocol("http", daemon)
	f.Fuzz(func(t *testing.T, method, path string, body []byte, code int, answer []byte) {
		if code < 200 || code > 599 || bulkPath.MatchString(path) {
			return // those have a connection of their own
		}
		*daemon = echo{code: code, body: answer}
		r, err := http.NewRequestWithContext(t.Context(), method, "http://docker/", bytes.NewReader(body))
		if err != nil {
			return
		}
		if r.URL, err = r.URL.Parse(path); err != nil || mayHijack(r) || bulkPath.MatchString(r.URL.Path) {
			return
		}
		w := httptest.NewRecorder()
		p.ServeHTTP(w, r)
		if daemon.calls == 0 && w.Code < 400 {
			t.Errorf("%s %q %q: %d, and the daemon was not asked", method, path, body, w.Code)
		}
		if w.Code != code && w.Code < 400 {
			t.Errorf("%s %q %q: the daemon says %d, the client hears %d", method, path, body, code, w.Code)
		}
		if w.Code != code && !strings.Contains(w.Body.String(), "message") {
			t.Errorf("%s %q %q: refused with %d without a word: %q", method, path, body, w.Code, w.Body)
		}
	})
}
