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
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// maxBody bounds a request body that is decoded, in bytes. While it is, it takes some seven times its size. Docker's own
	// creates have a few kilobytes, and a process can have 6 MiB of arguments and environment at most (execve(2)).
	maxBody = 6 << 20
	// maxAnswer bounds an answer of the daemon's that is decoded.
	maxAnswer = 16 << 20
	// attachTimeout bounds how long start waits for an address and an interface.
	attachTimeout = 2 * time.Minute
	attachAgain   = time.Second
	headerTimeout = 10 * time.Second
	idleTimeout   = 5 * time.Minute // between two requests of a connection
)

// Proxy serves Docker's API.
type Proxy struct {
	cfg        Config
	backend    *backend
	containers Containers
	log        *slog.Logger
	listeners  []net.Listener // in the order of Config.Listen

	remap      sync.Mutex // guards what follows; held while the daemon is asked
	remapped   bool
	remapAsked time.Time
}

// Listen builds the proxy and listens. It does not need the daemon to be there: requests are refused until
// it is.
func Listen(cfg Config, containers Containers, log *slog.Logger) (*Proxy, error) {
	p, err := newProxy(cfg, containers, log)
	if err != nil {
		return nil, err
	}
	for _, endpoint := range p.cfg.Listen {
		l, err := listen(endpoint, p.cfg)
		if err != nil {
			p.Close()
			return nil, fmt.Errorf("proxy: %w", err)
		}
		p.listeners = append(p.listeners, l)
	}
	return p, nil
}

// newProxy touches nothing.
func newProxy(cfg Config, containers Containers, log *slog.Logger) (*Proxy, error) {
	if len(cfg.Listen) == 0 {
		return nil, errors.New("proxy: no address to listen on")
	}
	if cfg.HostnameMatch == nil {
		cfg.HostnameMatch = regexp.MustCompile(`(.*)`)
		if cfg.HostnameReplacement == "" {
			cfg.HostnameReplacement = "$1"
		}
	}
	b, err := newBackend(cfg, log)
	if err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	return &Proxy{cfg: cfg, backend: b, containers: containers, log: log}, nil
}

// Run serves until ctx is done, and closes; streams that are open then are cut.
func (p *Proxy) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	p.backend.run = ctx
	server := &http.Server{
		Handler:           p,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		ConnState:         p.backend.conns.connState,
		ErrorLog:          slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	for _, l := range p.listeners {
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

// Close ends listening; Run does it too.
func (p *Proxy) Close() error {
	var errs []error
	for _, l := range p.listeners {
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Addresses is where the proxy listens, for DOCKER_HOST.
func (p *Proxy) Addresses() (all []string) {
	for _, l := range p.listeners {
		all = append(all, address(l))
	}
	return all
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
	switch {
	case slices.Contains(r.Header.Values("Via"), p.backend.via): // it would go round until nothing is left to open
		refuse(w, http.StatusLoopDetected, "meshd: what it has for the Docker daemon, %s://%s, is its own proxy: see --docker-api", p.backend.network, p.backend.addr)
		return
	case p.backend.conns.full():
		w.Header().Set("Connection", "close")
		refuse(w, http.StatusServiceUnavailable, "meshd: more than %d connections are open to its Docker API", p.backend.conns.max)
		return
	}
	r.Header.Add("Via", p.backend.via)
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

// refuseFor answers a request that is not passed on because of err.
func (p *Proxy) refuseFor(w http.ResponseWriter, r *http.Request, err error) {
	var tooLarge *http.MaxBytesError
	switch {
	case errors.Is(err, errAway) || errors.As(err, &tooLarge):
		p.backend.unreachable(w, r, err)
	default:
		refuse(w, http.StatusBadRequest, "meshd: %v", err)
	}
}
