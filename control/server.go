package control

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// Config is what a Server is made from.
type Config struct {
	Log *slog.Logger

	// Socket is the path of the unix socket; mode 0600, so that only root gets in.
	Socket string
	// HTTPAddr serves the same API, except for pprof: IP:port on loopback, or anywhere with TLS; or
	// the path of a second unix socket. Empty: none.
	HTTPAddr string
	// CACert, Cert and Key are files for HTTPAddr: all three, or none. Clients must have a certificate
	// that the CA signed.
	CACert, Cert, Key string
	// StatusAddr serves status, report and metrics, read-only, on IP:port or a socket. Empty: none.
	StatusAddr string
	// MetricsAddr serves metrics alone, likewise. Empty: none.
	MetricsAddr string

	headerTimeout time.Duration // 0: the constant; tests are in a hurry
}

// Limits of every listener.
const (
	headerTimeout = 10 * time.Second // for the head of a request, and for an idle connection
	bodyTimeout   = 10 * time.Second // for the rest of it
	writeTimeout  = 30 * time.Second // for a client to take the answer
	maxHeader     = 16 << 10         // bytes
	maxBody       = 64 << 10         // bytes
	mostConns     = 256              // per listener, where there are descriptors enough
)

// maxConns is how many connections a listener has; beyond it the oldest connection that waits is cut. It is an eighth
// of what the process may open at most, so that who holds them all keeps nobody from working.
func maxConns() int {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return mostConns
	}
	return int(min(files.Cur/8, mostConns))
}

// Server is the control API.
type Server struct {
	log           *slog.Logger
	back          Backends
	headerTimeout time.Duration
	faces         []*face
	unlink        []string // sockets to remove at the end
}

// face is one listener with its handler.
type face struct {
	ln    net.Listener
	http  *http.Server
	conns *connBound
}

// Listen opens every listener, or none. The API answers once Run is called.
func Listen(cfg Config, back Backends) (*Server, error) {
	s := &Server{log: cfg.Log, back: back, headerTimeout: cmp.Or(cfg.headerTimeout, headerTimeout)}
	err := s.listen(cfg)
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("control API: %w", err)
	}
	return s, nil
}

func (s *Server) listen(cfg Config) error {
	ln, err := s.open(cfg.Socket)
	if err != nil {
		return err
	}
	s.add(ln, s.controlHandler(true))
	if cfg.HTTPAddr != "" {
		tlsConfig, err := serverTLS(cfg)
		if err != nil {
			return err
		}
		if ap, err := netip.ParseAddrPort(cfg.HTTPAddr); err == nil && !ap.Addr().IsLoopback() && tlsConfig == nil {
			return fmt.Errorf("%s is not a loopback address and has no TLS client certificates", cfg.HTTPAddr)
		}
		ln, err := s.open(cfg.HTTPAddr)
		if err != nil {
			return err
		}
		h := s.controlHandler(false)
		if tlsConfig != nil {
			ln = tls.NewListener(ln, tlsConfig)
		} else {
			h = localHost(h)
		}
		s.add(ln, h)
	}
	for addr, h := range map[string]http.Handler{cfg.StatusAddr: s.statusHandler(), cfg.MetricsAddr: s.metricsHandler()} {
		if addr == "" {
			continue
		}
		ln, err := s.open(addr)
		if err != nil {
			return err
		}
		if a, ok := ln.Addr().(*net.TCPAddr); ok && a.IP.IsLoopback() {
			h = localHost(h)
		}
		s.add(ln, h)
	}
	return nil
}

func (s *Server) add(ln net.Listener, h http.Handler) {
	f := &face{ln: ln, conns: newConnBound(maxConns())}
	f.http = &http.Server{
		Handler:           f.conns.mark(s.guard(h)),
		ReadHeaderTimeout: s.headerTimeout,
		IdleTimeout:       s.headerTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ConnContext:       f.conns.connContext,
		ConnState:         f.conns.connState,
	}
	s.faces = append(s.faces, f)
}

// open listens on IP:port or, for an absolute path, on a unix socket that only this user may open.
func (s *Server) open(addr string) (net.Listener, error) {
	if !filepath.IsAbs(addr) {
		return net.Listen("tcp", addr)
	}
	if err := os.MkdirAll(filepath.Dir(addr), 0o755); err != nil {
		return nil, err
	}
	if err := mesh.ClearSocket(addr); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscallConn) error {
		// Linux gives the file the mode that the socket has at bind, so there is no moment at which
		// others could open it.
		var chmodErr error
		err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, chmodErr)
	}}
	ln, err := lc.Listen(context.Background(), "unix", addr)
	if err != nil {
		return nil, err
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false) // done by Close, which knows that it is ours
	s.unlink = append(s.unlink, addr)
	if err := os.Chmod(addr, 0o600); err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

func serverTLS(cfg Config) (*tls.Config, error) {
	if cfg.CACert == "" && cfg.Cert == "" && cfg.Key == "" {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(cfg.Cert, cfg.Key)
	if err != nil {
		return nil, err
	}
	pool, err := certPool(cfg.CACert)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert},
		ClientCAs:    pool,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		MinVersion:   tls.VersionTLS13,
	}, nil
}

func certPool(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", file)
	}
	return pool, nil
}

// Addr returns where the listener number i, in the order of Config, listens.
func (s *Server) Addr(i int) net.Addr { return s.faces[i].ln.Addr() }

// Run serves until ctx is done, then cuts every connection and removes the sockets.
func (s *Server) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, f := range s.faces {
		f.http.BaseContext = func(net.Listener) context.Context { return ctx }
		g.Go(func() error {
			if err := f.http.Serve(f.ln); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("control API on %s: %w", f.ln.Addr(), err)
			}
			return nil
		})
	}
	g.Go(func() error {
		<-ctx.Done()
		return s.shutdown()
	})
	return g.Wait()
}

// shutdown lets answers that are being written go out, but waits for nobody longer than a second.
func (s *Server) shutdown() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for _, f := range s.faces {
		_ = f.http.Shutdown(ctx)
	}
	return s.Close()
}

// Close closes the listeners and connections and removes the sockets.
func (s *Server) Close() error {
	var errs []error
	for _, f := range s.faces {
		errs = append(errs, f.http.Close())
		if err := f.ln.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	for _, path := range s.unlink {
		if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	s.unlink = nil
	return errors.Join(errs...)
}
