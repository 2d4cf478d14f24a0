package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// maxBody bounds a body that is decoded, in bytes; Docker's own creates have a few kilobytes.
	maxBody = 16 << 20
	// attachTimeout bounds how long start waits for an address and an interface.
	attachTimeout = 2 * time.Minute
	headerTimeout = 10 * time.Second
)

// Proxy serves Docker's API.
type Proxy struct {
	cfg        Config
	backend    *backend
	containers Containers
	log        *slog.Logger
	ready      chan struct{} // closed when every address is listened on

	mu        sync.Mutex
	addresses []string // listened on, in the order of Config.Listen
}

// New builds the proxy and touches nothing.
func New(cfg Config, containers Containers, log *slog.Logger) (*Proxy, error) {
	if len(cfg.Listen) == 0 {
		return nil, errors.New("proxy: no address to listen on")
	}
	if cfg.HostnameMatch == nil {
		cfg.HostnameMatch = regexp.MustCompile(`(.*)`)
		if cfg.HostnameReplacement == "" {
			cfg.HostnameReplacement = "$1"
		}
	}
	b, err := newBackend(cfg)
	if err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	return &Proxy{cfg: cfg, backend: b, containers: containers, log: log, ready: make(chan struct{})}, nil
}

// Run listens and serves until ctx is done; streams that are open then are cut. It does not need the
// daemon to be there: requests are refused until it is.
func (p *Proxy) Run(ctx context.Context) error {
	var listeners []net.Listener
	closeAll := func() {
		for _, l := range listeners {
			l.Close()
		}
	}
	for _, endpoint := range p.cfg.Listen {
		l, err := listen(endpoint, p.cfg)
		if err != nil {
			closeAll()
			return fmt.Errorf("proxy: %w", err)
		}
		listeners = append(listeners, l)
		p.mu.Lock()
		p.addresses = append(p.addresses, address(l))
		p.mu.Unlock()
	}
	g, ctx := errgroup.WithContext(ctx)
	p.backend.run = ctx
	close(p.ready)
	server := &http.Server{
		Handler:           p,
		ReadHeaderTimeout: headerTimeout,
		ErrorLog:          slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	for _, l := range listeners {
		g.Go(func() error {
			p.log.Info("Docker proxy listens", "addr", address(l))
			if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("proxy: %w", err)
			}
			return nil
		})
	}
	g.Go(func() error {
		<-ctx.Done()
		return server.Close()
	})
	err := g.Wait()
	p.backend.transport.CloseIdleConnections()
	return err
}

// Ready is closed when every address is listened on.
func (p *Proxy) Ready() <-chan struct{} { return p.ready }

// Addresses is where the proxy listens, for DOCKER_HOST.
func (p *Proxy) Addresses() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.addresses...)
}

func address(l net.Listener) string {
	return l.Addr().Network() + "://" + l.Addr().String()
}

// The calls that are not simply passed on. Docker's daemon takes them with and without a version.
var (
	createPath  = regexp.MustCompile(`^(/v[0-9.]+)?/containers/create$`)
	startPath   = regexp.MustCompile(`^(/v[0-9.]+)?/containers/(.+)/(start|restart)$`) // linked names have a slash
	inspectPath = regexp.MustCompile(`^(/v[0-9.]+)?/containers/(.+)/json$`)
)

func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := r.URL.Path
	switch {
	case r.Method == http.MethodPost && createPath.MatchString(path):
		p.create(w, r, createPath.FindStringSubmatch(path)[1])
	case r.Method == http.MethodPost && startPath.MatchString(path):
		m := startPath.FindStringSubmatch(path)
		p.start(w, r, m[1], m[2])
	case r.Method == http.MethodGet && p.cfg.RewriteInspect && inspectPath.MatchString(path):
		p.inspect(w, r)
	default:
		p.backend.forward(w, r)
	}
}

// readBody reads a body that is to be decoded.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		return nil, fmt.Errorf("read the request body: %w", err)
	}
	return body, nil
}
