package docker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// daemon is a Docker that says what the test wants.
type daemon struct {
	version, oldest string
	mux             *http.ServeMux
	calls           atomic.Int64
}

// start serves d on a unix socket and returns a client for it.
func (d *daemon) start(t *testing.T) *Client {
	t.Helper()
	path := t.TempDir() + "/docker.sock"
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if d.mux == nil {
		d.mux = http.NewServeMux()
	}
	d.mux.HandleFunc("GET /version", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"ApiVersion":%q,"MinAPIVersion":%q,"Os":"linux"}`, d.version, d.oldest)
	})
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.calls.Add(1)
		d.mux.ServeHTTP(w, r)
	})}}
	s.Start()
	t.Cleanup(s.Close)
	c, err := New(Config{Endpoint: "unix://" + path, Timeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestAgree(t *testing.T) {
	for _, c := range []struct{ theirs, low, want string }{
		{"1.24", "1.12", "1.24"}, {"1.41", "1.12", "1.41"}, {"1.44", "1.24", "1.44"}, {"1.51", "1.40", "1.51"},
		{"1.56", "1.44", "1.51"}, {"1.99", "1.51", "1.51"}, {"2.0", "1.51", "1.51"}, {"1.41", "", "1.41"},
		{"1.23", "1.12", ""}, {"1.99", "1.52", ""}, {"", "", ""}, {"1", "", ""}, {"1.x", "", ""}, {"1.41", "x", ""}, {"-1.41", "", ""},
	} {
		v, err := agree(c.theirs, c.low)
		if c.want == "" {
			if !errors.Is(err, ErrVersion) {
				t.Errorf("agree(%q, %q) = %v, %v, want ErrVersion", c.theirs, c.low, v, err)
			}
		} else if err != nil || v.String() != c.want {
			t.Errorf("agree(%q, %q) = %v, %v, want %s", c.theirs, c.low, v, err, c.want)
		}
	}
}

func TestContainer(t *testing.T) {
	d := &daemon{version: "1.41", oldest: "1.12", mux: http.NewServeMux()}
	d.mux.HandleFunc("GET /v1.41/containers/{name}/json", func(w http.ResponseWriter, r *http.Request) {
		switch r.PathValue("name") {
		case "web":
			fmt.Fprint(w, `{"Id":"abc","Name":"/web","State":{"Running":true,"Pid":42},"Config":{"Hostname":"web","Domainname":"mesh.internal"},"HostConfig":{"NetworkMode":"default"},"Unknown":[1]}`)
		case "garbage":
			fmt.Fprint(w, `{"Id":`)
		case "empty":
			fmt.Fprint(w, `{}`)
		case "giant":
			w.Write([]byte(`{"Id":"` + strings.Repeat("x", maxBody) + `"}`))
		case "broken":
			w.WriteHeader(500)
			fmt.Fprint(w, `{"message":"the disk is on fire"}`)
		case "silent":
			w.WriteHeader(503)
		default:
			w.WriteHeader(404)
			fmt.Fprint(w, `{"message":"No such container: x"}`)
		}
	})
	c := d.start(t)
	got, err := c.Container(t.Context(), "/web")
	if err != nil || got.ID != "abc" || got.State.Pid != 42 || got.Config.Domainname != "mesh.internal" || got.HostConfig.NetworkMode != "default" {
		t.Errorf("got %+v, %v", got, err)
	}
	before := d.calls.Load()
	if _, err := c.Container(t.Context(), "x"); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "No such container: x") {
		t.Errorf("unknown: got %v", err)
	}
	if n := d.calls.Load() - before; n != 1 {
		t.Errorf("%d calls for one inspect, want the version to be remembered", n)
	}
	for name, want := range map[string]string{
		"garbage": "answer", "empty": "has no id", "giant": "longer than", "broken": "the disk is on fire", "silent": "503",
		"": "not a name", "../images/x": "not a name", "a/../b": "not a name", strings.Repeat("n", 257): "not a name",
	} {
		if _, err := c.Container(t.Context(), name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: got %v, want %q", name, err, want)
		}
	}
}

func TestRunning(t *testing.T) {
	d := &daemon{version: "1.41", mux: http.NewServeMux()}
	d.mux.HandleFunc("GET /v1.41/containers/json", func(w http.ResponseWriter, r *http.Request) {
		if got := r.URL.Query().Get("filters"); got != `{"label":["l"],"status":["running"]}` {
			w.WriteHeader(500)
		}
		fmt.Fprint(w, `[{"Id":"a","Names":["/x"]},{"Id":"b"}]`)
	})
	c := d.start(t)
	if ids, err := c.Running(t.Context(), "l"); err != nil || len(ids) != 2 || ids[1] != "b" {
		t.Errorf("got %v, %v", ids, err)
	}
	if _, err := c.Running(t.Context(), "other"); err == nil {
		t.Error("a refusal is no error")
	}
}

func TestNamesStayInTheirPlace(t *testing.T) {
	for name, want := range map[string]string{
		"a?force=1": "/i/a%3Fforce=1/json", "a#b": "/i/a%23b/json", "reg:5000/a/b:tag": "/i/reg:5000/a/b:tag/json", "a%2fb": "/i/a%252fb/json",
	} {
		if got, err := namePath("/i/", name, "/json"); err != nil || got != want {
			t.Errorf("%s: got %s, %v, want %s", name, got, err, want)
		}
	}
}

// The daemon is exchanged for an older one between two calls.
func TestVersionChanges(t *testing.T) {
	d := &daemon{version: "1.51", mux: http.NewServeMux()}
	d.mux.HandleFunc("GET /{version}/containers/{name}/json", func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("version") != "v"+d.version {
			w.WriteHeader(400)
			fmt.Fprintf(w, `{"message":"client version %s is too new. Maximum supported API version is %s"}`, r.PathValue("version"), d.version)
			return
		}
		fmt.Fprint(w, `{"Id":"c0ffee"}`)
	})
	c := d.start(t)
	for _, v := range []string{"1.51", "1.41", "1.44"} {
		d.version = v
		if got, err := c.Container(t.Context(), "box"); err != nil || got.ID != "c0ffee" {
			t.Errorf("%s: got %+v, %v", v, got, err)
		}
		if v == "1.41" {
			c.forget()
		}
	}
}

func TestUnavailable(t *testing.T) {
	c, err := New(Config{Endpoint: t.TempDir() + "/none.sock"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Container(t.Context(), "x"); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "none.sock") {
		t.Errorf("got %v, want ErrUnavailable naming the socket", err)
	}
	// A daemon that accepts and never answers.
	path := t.TempDir() + "/mute.sock"
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if c, err = New(Config{Endpoint: path, Timeout: 50 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Container(t.Context(), "x"); !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
	// One that stops in the middle of its answer, and one that dies there.
	for _, dies := range []bool{false, true} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/version" {
				io.WriteString(w, `{"ApiVersion":"1.41","MinAPIVersion":"1.12"}`)
				return
			}
			io.WriteString(w, `{"Id":"c0ffee",`)
			http.NewResponseController(w).Flush()
			if dies {
				panic(http.ErrAbortHandler)
			}
			<-r.Context().Done()
		}))
		c, err := New(Config{Endpoint: "tcp://" + s.Listener.Addr().String(), Timeout: 200 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Container(t.Context(), "x"); !errors.Is(err, ErrUnavailable) {
			t.Errorf("dies=%t: got %v, want ErrUnavailable", dies, err)
		}
		c.Close()
		s.Close()
	}
}

func TestParseEndpoint(t *testing.T) {
	for in, want := range map[string]string{
		"unix:///run/docker.sock": "unix /run/docker.sock", "/run/docker.sock": "unix /run/docker.sock", "tcp://[::1]:2375": "tcp [::1]:2375",
		"tcp://host:2376": "tcp host:2376", "unix://run": "", "tcp://host": "", "tcp://:2375": "", "tcp://host:0": "", "tcp://host:x": "", "npipe:////./pipe": "", "": "",
	} {
		network, addr, err := ParseEndpoint(in)
		if got := strings.TrimSpace(network + " " + addr); got != want || (err != nil) != (want == "") {
			t.Errorf("%q: got %q, %v, want %q", in, got, err, want)
		}
	}
}

func TestWatch(t *testing.T) {
	d := &daemon{version: "1.41", mux: http.NewServeMux()}
	var streams atomic.Int64
	d.mux.HandleFunc("GET /v1.41/events", func(w http.ResponseWriter, r *http.Request) {
		if !strings.Contains(r.URL.Query().Get("filters"), `"destroy"`) || r.URL.Query().Get("since") == "" {
			t.Errorf("query is %s", r.URL.RawQuery)
		}
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		n := streams.Add(1)
		fmt.Fprintf(w, `{"Type":"container","Action":"start","Actor":{"ID":"c%d"}}`+"\n", n)
		fmt.Fprint(w, "garbage\n\n[]\n"+`{"Type":"network","Action":"start","Actor":{"ID":"n"}}`+"\n")
		fmt.Fprintf(w, `{"Type":"container","Action":"die","Actor":{"ID":"c%d"}}`+"\n", n)
		w.(http.Flusher).Flush()
		if n == 2 {
			<-r.Context().Done()
		}
	})
	c := d.start(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []string
	err := c.Watch(ctx, func(e Event) {
		got = append(got, fmt.Sprint(e.Kind, e.ID))
		if e.ID == "c2" && e.Kind == Died {
			cancel()
		}
	})
	if got := strings.Join(got, "|"); got != "1|2c1|3c1|1|2c2|3c2" {
		t.Errorf("got %s", got)
	}
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Watch ended with %v", err)
	}
}

func FuzzParseEvent(f *testing.F) {
	f.Add([]byte(`{"Type":"container","Action":"start","Actor":{"ID":"c"}}`))
	f.Add([]byte(`{"Type":1}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		if e, ok := parseEvent(line); ok && (e.ID == "" || e.Kind == 0) {
			t.Errorf("%q gives %+v", line, e)
		}
	})
}

// saying is a Docker whose every answer is the same.
type saying struct {
	code int
	body []byte
}

func (s saying) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: s.code, Request: r, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(s.body))}, nil
}

// Whatever Docker answers, a call ends with what was asked for or an error.
func FuzzAnswer(f *testing.F) {
	f.Add(200, []byte(`{"Id":"c1","Name":"/c","State":{"Running":true,"Pid":7},"Config":{"Env":["a=b"],"Entrypoint":null},"HostConfig":{"ExtraHosts":["a:1.2.3.4"]}}`))
	f.Add(200, []byte(`[{"Id":"c1"},{"Id":"0123456789abcdef","Internal":true,"Options":{"com.docker.network.bridge.name":"br"}}]`))
	f.Add(200, []byte(`{"ApiVersion":"1.41","MinAPIVersion":"1.24"}`))
	f.Add(400, []byte(`{"message":"client version 1.51 is too new"}`))
	f.Add(404, []byte(`no such thing`))
	c, err := New(Config{})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, code int, body []byte) {
		if code < 200 || code > 599 {
			return
		}
		c.http.Transport = saying{code, body}
		c.forget()
		if v, err := c.negotiate(t.Context()); err == nil && (v.less(oldest) || newest.less(v)) {
			t.Errorf("agreed upon %v", v)
		}
		agreed := func() { c.version = newest }
		agreed()
		if got, err := c.Container(t.Context(), "c"); err == nil && (got.ID == "" || code >= 400) {
			t.Errorf("%d %q: container %+v", code, body, got)
		}
		agreed()
		_, _ = c.Running(t.Context(), "l")
		agreed()
		_, _ = c.bridges(t.Context())
	})
}

// A stream of events ends with an error, and tells of nothing that has no name.
func FuzzEvents(f *testing.F) {
	f.Add([]byte("{\"Type\":\"container\",\"Action\":\"start\",\"Actor\":{\"ID\":\"c\"}}\n{}\n\nx"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		err := readEvents(bytes.NewReader(stream), func(e Event) {
			if e.ID == "" || e.Kind == 0 {
				t.Errorf("%q gives %+v", stream, e)
			}
		})
		if err == nil {
			t.Error("no end")
		}
	})
}

// What is taken for an endpoint can be dialled.
func FuzzParseEndpoint(f *testing.F) {
	for _, s := range []string{"unix:///var/run/docker.sock", "/run/d", "tcp://h:2375", "tcp://[::1]:1", "unix://x", "tcp://:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		network, addr, err := ParseEndpoint(s)
		if err != nil {
			return
		}
		if addr == "" || network != "unix" && network != "tcp" {
			t.Errorf("%q: %s %q", s, network, addr)
		}
	})
}
