package proxy

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// zeros is an endless body.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// BenchmarkBulk moves 64 MiB in each direction, as docker cp does, directly and by the proxy. cpu-ms is the
// processor time of all three.
func BenchmarkBulk(b *testing.B) {
	const size = 64 << 20
	dir := b.TempDir()
	docker, socket := filepath.Join(dir, "docker.sock"), filepath.Join(dir, "proxy.sock")
	l, err := net.Listen("unix", docker)
	if err != nil {
		b.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			io.CopyN(w, zeros{}, size)
		}
		io.Copy(io.Discard, r.Body)
	})}
	go server.Serve(l)
	defer server.Close()
	p, err := Listen(Config{Listen: []string{"unix://" + socket}, Docker: "unix://" + docker}, &fakeContainers{}, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error)
	go func() { done <- p.Run(ctx) }()
	defer func() { cancel(); <-done }()
	for _, method := range []string{http.MethodPut, http.MethodGet} {
		for _, path := range []string{docker, socket} {
			name := map[string]string{http.MethodPut: "in", http.MethodGet: "out"}[method] + map[string]string{docker: "/directly", socket: "/by the proxy"}[path]
			b.Run(name, func(b *testing.B) {
				transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					return (&net.Dialer{}).DialContext(ctx, "unix", path)
				}}
				defer transport.CloseIdleConnections()
				b.SetBytes(size)
				before := cpuTime()
				for b.Loop() {
					var body io.Reader
					if method == http.MethodPut {
						body = io.LimitReader(zeros{}, size)
					}
					req, _ := http.NewRequest(method, "http://docker/v1.41/containers/x/archive?path=/", body)
					resp, err := transport.RoundTrip(req)
					if err != nil {
						b.Fatal(err)
					}
					if n, err := io.Copy(io.Discard, resp.Body); err != nil || method == http.MethodGet && n != size {
						b.Fatal(n, err)
					}
					resp.Body.Close()
				}
				b.ReportMetric(float64((cpuTime()-before)/time.Millisecond)/float64(b.N), "cpu-ms/op")
			})
		}
	}
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
