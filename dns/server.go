package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"meshd/dns/records"
)

// Config of a Server.
type Config struct {
	Domain string // of the mesh, as records.ParseName returns it

	// Listen is where to listen, by UDP and TCP. Without an address that of Bridge is taken, and waited for;
	// port 0 becomes 53, except for tests, which give an address.
	Listen netip.AddrPort
	Bridge string // normally docker0

	TTL     time.Duration // of answers about the mesh, whole seconds; what they say of names stays true no longer
	UDPSize int           // bytes of an answer by UDP at most; 0: 1232, which no path that we know fragments

	ResolvConf string        // names the upstream servers; empty: there are none
	Timeout    time.Duration // for a question to the upstream servers; 0: 5 s

	// Access says what a client may have, by its address and the index of the interface its query came in
	// on (0 for TCP, where the address is proven). It must not block. nil: the containers on Docker's bridges
	// and on Bridge, and this host.
	Access func(src netip.Addr, ifindex int) Access

	// Ranges are the addresses of the mesh. Answers from outside that point there are filtered, as are the
	// addresses of all endpoints, unless AllowRebind.
	Ranges      []netip.Prefix
	AllowRebind bool

	Log *slog.Logger
}

// Server answers by UDP and TCP.
type Server struct {
	cfg     Config
	table   Table
	domain  string // wire form
	forward *forwarder
	log     *slog.Logger
	clients *gate    // by TCP
	count   counters // of TCP clients and of what is not a UDP loop's

	forwarding sync.WaitGroup // questions of UDP clients that are being forwarded

	mu       sync.Mutex // guards all below
	listener *listener
	problem  string // why there is no listener
	counts   []*counters
}

// counters are atomic because status reads them; each UDP loop has its own.
type counters struct {
	queries, answered, cached, forwarded, malformed, dropped, refused, overload, unsent atomic.Uint64
	_                                                                                   [64]byte // a cache line apart
}

// New checks cfg and touches nothing.
func New(cfg Config, table Table) (*Server, error) {
	domain, err := records.ParseName(cfg.Domain)
	if err != nil {
		return nil, fmt.Errorf("name server: domain: %w", err)
	}
	if !cfg.Listen.Addr().IsValid() && cfg.Bridge == "" {
		return nil, errors.New("name server: neither an address to listen on nor a bridge; give --dns-listen-address")
	}
	if cfg.UDPSize == 0 {
		cfg.UDPSize = 1232
	}
	if cfg.UDPSize < plainUDP || cfg.UDPSize > 4096 {
		return nil, fmt.Errorf("name server: %d bytes by UDP are outside 512 to 4096", cfg.UDPSize)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 5 * time.Second
	}
	if cfg.Access == nil {
		cfg.Access = NewInterfaces([]string{cfg.Bridge}, nil).Access
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, table: table, domain: records.WireName(domain), log: cfg.Log, clients: newGate(tcpClients, tcpPerSource)}
	filtered := s.isMeshAddr
	if cfg.AllowRebind {
		filtered = nil
	}
	s.forward = newForwarder(cfg.Timeout, cfg.UDPSize, filtered, cfg.Log)
	return s, nil
}

func (s *Server) isMeshAddr(a netip.Addr) bool {
	for _, p := range s.cfg.Ranges {
		if p.Contains(a) {
			return true
		}
	}
	rev := s.table.FindAddr(a)
	return rev != nil && rev.Endpoint
}

func (s *Server) access(src netip.Addr, ifindex int) Access {
	return s.cfg.Access(src.Unmap().WithZone(""), ifindex)
}

func (s *Server) newCounters() *counters {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &counters{}
	s.counts = append(s.counts, c)
	return c
}

// Open binds the sockets, so that a taken port is known before anything else starts: then the error is a
// *PortTakenError. A bridge that is not there yet is no error: Run waits for it.
func (s *Server) Open() error {
	addr, err := s.target()
	if err != nil {
		s.setProblem(err)
		return nil
	}
	l, err := bind(addr, socketCount())
	if err != nil {
		s.setProblem(err)
		return err
	}
	s.setListener(l)
	return nil
}

// target is the address to listen on, as things are now.
func (s *Server) target() (netip.AddrPort, error) {
	if s.cfg.Listen.Addr().IsValid() {
		return s.cfg.Listen, nil
	}
	port := s.cfg.Listen.Port()
	if port == 0 {
		port = resolvPort
	}
	a, err := bridgeAddress(s.cfg.Bridge)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("name server waits: %w; --dns-listen-address chooses an address without it, --no-dns does without names", err)
	}
	return netip.AddrPortFrom(a, port), nil
}

func (s *Server) setListener(l *listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listener, s.problem = l, ""
}

// setProblem notes and logs why there is no listener, once per reason.
func (s *Server) setProblem(err error) {
	s.mu.Lock()
	known := s.problem == err.Error()
	s.listener, s.problem = nil, err.Error()
	s.mu.Unlock()
	if !known {
		s.log.Warn("name server does not listen", "err", err)
	}
}

// Run serves until ctx ends. It calls Open if nobody did, and again whenever the bridge got another address.
func (s *Server) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { s.reloadLoop(ctx); return nil })
	g.Go(func() error { return s.listenLoop(ctx) })
	err := g.Wait()
	s.forwarding.Wait()
	s.forward.pending.Wait()
	return err
}

const lookForBridge = time.Second

// listenLoop keeps sockets open on the address that is wanted.
func (s *Server) listenLoop(ctx context.Context) error {
	tick := time.NewTicker(lookForBridge)
	defer tick.Stop()
	var serving *listener
	defer func() {
		s.mu.Lock()
		l := s.listener
		s.listener = nil
		s.mu.Unlock()
		if l != nil {
			_ = l.close() // its sockets are of no more use, whatever close says
		}
	}()
	for {
		s.mu.Lock()
		l := s.listener
		s.mu.Unlock()
		addr, err := s.target()
		switch {
		case l != nil && (err != nil || addr.Addr() != l.addr.Addr()):
			// The bridge went, or was made anew with another address.
			if err == nil {
				err = fmt.Errorf("name server moves to %s", addr)
			}
			s.setProblem(err)
			_ = l.close()
			continue
		case l == nil && err != nil:
			s.setProblem(err)
		case l == nil:
			if l, err = bind(addr, socketCount()); err != nil {
				s.setProblem(err)
			} else {
				s.setListener(l)
			}
		}
		if l != nil && l != serving {
			if err := s.serve(ctx, l); err != nil {
				return err
			}
			serving = l
			s.log.Info("name server listens", "addr", l.addr)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// serve starts l's goroutines, which end when l is closed.
func (s *Server) serve(ctx context.Context, l *listener) error {
	for _, conn := range l.udp {
		loop, err := newUDPLoop(s, conn, l.addr.Addr().IsUnspecified())
		if err != nil {
			return err
		}
		l.done.Go(func() { loop.run(ctx) })
	}
	l.done.Go(func() { s.acceptLoop(ctx, l.tcp) })
	return nil
}

// Addr is where the server listens, or will when its bridge has come; invalid if that is unknown.
func (s *Server) Addr() netip.AddrPort {
	s.mu.Lock()
	l := s.listener
	s.mu.Unlock()
	if l != nil {
		return l.addr
	}
	addr, err := s.target()
	if err != nil {
		return netip.AddrPort{}
	}
	return addr
}

// Status is what there is to say about the server.
type Status struct {
	Address  netip.AddrPort // invalid while it does not listen
	Problem  string         // why not
	Upstream []string       // servers of the outside, in order
	TTL      time.Duration
	Cached   int // answers from outside in memory
	// What became of queries: "queries", "answered", "cached", "forwarded", "malformed", "dropped",
	// "refused", "overload", "unsent"; and "filtered", addresses of the mesh in answers from outside.
	Counters map[string]uint64
}

// Status takes a look.
func (s *Server) Status() Status {
	s.mu.Lock()
	st := Status{Problem: s.problem, TTL: s.cfg.TTL, Counters: make(map[string]uint64)}
	if s.listener != nil {
		st.Address = s.listener.addr
	}
	all := append([]*counters{&s.count}, s.counts...)
	s.mu.Unlock()
	st.Upstream = s.forward.serverNames()
	st.Cached = s.forward.cache.len()
	for _, c := range all {
		for name, v := range map[string]*atomic.Uint64{
			"queries": &c.queries, "answered": &c.answered, "cached": &c.cached, "forwarded": &c.forwarded, "malformed": &c.malformed,
			"dropped": &c.dropped, "refused": &c.refused, "overload": &c.overload, "unsent": &c.unsent,
		} {
			st.Counters[name] += v.Load()
		}
	}
	st.Counters["filtered"] = s.forward.removed.Load()
	return st
}
