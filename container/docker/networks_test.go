package docker

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A bridge counts as isolated until Docker says that it is not, and nobody waits for Docker meanwhile.
func TestIsolated(t *testing.T) {
	var fails atomic.Bool
	fails.Store(true)
	d := &daemon{version: "1.41", oldest: "1.12", mux: http.NewServeMux()}
	d.mux.HandleFunc("GET /v1.41/networks", func(w http.ResponseWriter, r *http.Request) {
		if fails.Load() {
			http.Error(w, `{"message":"starting"}`, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprint(w, `[{"Id":"0123456789abcdef","Internal":true},{"Id":"abcdefabcdefabcdef","Internal":false,"Options":{"x":"y"}},`+
			`{"Id":"aaaaaaaaaaaaaaaa","Internal":true,"Options":{"com.docker.network.bridge.name":"br-own"}},{"Id":"short"}]`)
	})
	n := NewNetworks(d.start(t))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- n.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	if n.Isolated("docker0") || n.Isolated("mesh") || d.calls.Load() != 0 {
		t.Error("a bridge that belongs to no user's network counts as isolated")
	}
	if !n.Isolated("br-abcdefabcdef") {
		t.Error("a bridge that Docker was not asked about does not count as isolated")
	}
	until := func(true func() bool) {
		t.Helper()
		limit := time.After(5 * time.Second)
		for !true() {
			select {
			case <-time.After(time.Millisecond):
			case <-limit:
				t.Fatal("not within 5 s")
			}
		}
	}
	until(func() bool { return d.calls.Load() > 0 })
	if !n.Isolated("br-abcdefabcdef") {
		t.Error("without an answer of Docker's a bridge does not count as isolated")
	}
	fails.Store(false)
	until(func() bool { return !n.Isolated("br-abcdefabcdef") })
	for bridge, want := range map[string]bool{"br-0123456789ab": true, "br-own": true, "br-ffffffffffff": true} {
		if got := n.Isolated(bridge); got != want {
			t.Errorf("%s: isolated %v, want %v", bridge, got, want)
		}
	}
}

// However often somebody asks, Docker is asked once a second at most.
func TestIsolatedAsksSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := New(Config{Endpoint: "tcp://127.0.0.1:1"})
		if err != nil {
			t.Fatal(err)
		}
		var asked int
		c.http.Transport = roundTrip(func(*http.Request) (*http.Response, error) {
			asked++
			return nil, errors.New("nobody there")
		})
		n := NewNetworks(c)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		done := make(chan error)
		go func() { done <- n.Run(ctx) }()
		for ctx.Err() == nil {
			n.Isolated("br-0123456789ab")
			time.Sleep(time.Millisecond) // of the bubble's time
		}
		<-done
		if asked > 11 {
			t.Errorf("asked %d times in 10 s", asked)
		}
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
