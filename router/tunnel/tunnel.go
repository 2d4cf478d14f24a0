package tunnel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"meshd/mesh"
	"meshd/router"
)

// Router says by whom a peer is reached. It must not block: it is asked for every frame.
type Router interface {
	// Way is the neighbour to hand datagrams for dst to, dst itself if the link to it is the way, and how many
	// links there are on the way.
	Way(dst mesh.PeerName) (via mesh.PeerName, links int, ok bool)
}

// Switch decides about frames. It must not block and keeps no buffer.
type Switch interface {
	FromBridge(frame, scratch []byte, now time.Time) router.Decision
	FromPeer(frame []byte, src mesh.PeerName, now time.Time) router.Decision
}

// Port is one queue of a TAP. Every buffer starts with a virtio_net_hdr of 10 bytes, zeros if the kernel
// gave none. After Close, Read and Write return os.ErrClosed or io.EOF.
type Port interface {
	Read(buf []byte) (int, error) // blocks
	Write(buf []byte) (int, error)
}

// TryReader is what a Port may offer beside: a Read that does not wait and returns 0, nil when nothing is
// there. With it frames that queue up leave in common system calls.
type TryReader interface {
	TryRead(buf []byte) (int, error)
}

// Handler hears of links and messages. Its methods must not block; msg is borrowed until the call returns.
// Link is called by one goroutine, in order; Message by the receivers.
type Handler interface {
	Link(router.LinkEvent)
	Message(from mesh.PeerName, msg []byte)
}

// DefaultPort is the UDP and TCP port of the underlay.
const DefaultPort = 6783

// Config is all that a Tunnel needs to know.
type Config struct {
	Identity Identity
	Hello    router.Hello // what we say of ourselves; Key and, if zero, Name come from Identity

	// PSKs is the key ring: the first is used when we dial, all are accepted. Empty: no password.
	PSKs []PSK
	// SealFrames seals frames even without a password. With one they always are, but for Trusted.
	SealFrames bool
	// Trusted networks: frames to and from peers whose underlay address is there, and who think the same of
	// our address, go in clear in spite of a password. Messages are sealed all the same.
	Trusted []netip.Prefix
	// RekeyAge is how old a session's keys get; after a handshake the next one is a second later at the soonest. Zero:
	// 2 minutes.
	RekeyAge time.Duration

	Listen netip.AddrPort // UDP and TCP; zero: port 6783 on all addresses
	Ports  []Port         // queues of the TAP; none: no frames
	TSO    bool           // the ports take TCP superframes (TUN_F_TSO4, TUN_F_TSO6)
	USO    bool           // the ports take UDP superframes (TUN_F_USO4, Linux 6.2)
	MTU    int            // bytes of the overlay's packets; TCP MSS is clamped where a path carries less. 0: never
	Conn   Conn           // nil: open a UDP socket at Listen, and TCP for streams. Given: no streams

	// Accept may refuse a peer that has authenticated itself; the error's text is shown on both sides. It
	// must not block. The address is invalid for a session by relay. Nil: all are welcome.
	Accept func(router.Hello, netip.AddrPort) error

	Router  Router
	Switch  Switch // nil: no frames
	Handler Handler
	Log     *slog.Logger // nil: discard
}

var (
	// ErrSelf is the outcome of a dial that reached this very peer.
	ErrSelf = errors.New("this address is this peer itself")
	// ErrNoAnswer is the outcome of a dial that nobody answered.
	ErrNoAnswer = errors.New("no answer: not running, blocked on the way, or another password")
	// ErrNoRoute says that a peer cannot be reached at present.
	ErrNoRoute = errors.New("no route to the peer")
	// ErrTooLong refuses a message of more than MaxMessage bytes.
	ErrTooLong = errors.New("message too long")
	// ErrLinked is the outcome of a dial that found a peer to whom there is a link at another address.
	ErrLinked = errors.New("already linked at another address")
)

// Tunnel is the underlay of one peer.
type Tunnel struct {
	cfg    Config // fixed
	name   mesh.PeerName
	log    *slog.Logger
	epoch  time.Time
	aes    bool
	events chan event
	hellos chan event
	wake   chan struct{}
	conns  chan net.Conn // accepted streams
	noisy  bucket        // limits log lines that strangers can cause
	losts  bucket        // limits "unknown session" hints
	drops  drops

	conn     Conn // fixed by Listen
	listener net.Listener

	secrets atomic.Pointer[[]secret]
	peers   atomic.Pointer[map[mesh.PeerName]*peer]  // all known; written by controlLoop
	indexes atomic.Pointer[map[uint32]*keys]         // by local index; written by controlLoop
	neigh   atomic.Pointer[map[netip.AddrPort]*peer] // live links; written by controlLoop
	guard   guard

	mu    sync.Mutex // guards calls and ran
	calls []func(now time.Time)
	ran   bool

	control control // owned by controlLoop
}

// New builds a Tunnel and touches nothing.
func New(cfg Config) (*Tunnel, error) {
	if cfg.Router == nil || cfg.Handler == nil {
		return nil, errors.New("tunnel: Router and Handler are needed")
	}
	if cfg.Identity.private == [32]byte{} {
		return nil, errors.New("tunnel: an Identity is needed")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.RekeyAge == 0 {
		cfg.RekeyAge = rekeyAge
	}
	if !cfg.Listen.IsValid() {
		cfg.Listen = netip.AddrPortFrom(netip.IPv6Unspecified(), DefaultPort)
	}
	cfg.Hello.Key = cfg.Identity.Public
	if cfg.Hello.Name.IsZero() {
		cfg.Hello.Name = cfg.Identity.Name()
	}
	if cfg.Hello.Port == 0 {
		cfg.Hello.Port = cfg.Listen.Port()
	}
	if cfg.Hello.Protocol == 0 {
		cfg.Hello.Protocol = wireVersion
	}
	t := &Tunnel{
		cfg: cfg, name: cfg.Hello.Name, log: cfg.Log, epoch: time.Now(), aes: haveAES(),
		events: make(chan event, 1024), hellos: make(chan event, 64), wake: make(chan struct{}, 1),
		conns: make(chan net.Conn, maxStreams),
		noisy: bucket{rate: 1, burst: 5}, losts: bucket{rate: 200, burst: 50},
	}
	secrets := newSecrets(cfg.PSKs)
	t.secrets.Store(&secrets)
	t.peers.Store(&map[mesh.PeerName]*peer{})
	t.indexes.Store(&map[uint32]*keys{})
	t.neigh.Store(&map[netip.AddrPort]*peer{})
	t.control.init()
	return t, nil
}

// Listen opens the sockets; Run does it if it was not called. The error names the address.
func (t *Tunnel) Listen() error {
	if t.conn != nil {
		return nil
	}
	if t.cfg.Conn != nil {
		t.conn = t.cfg.Conn
		return nil
	}
	conn, err := ListenUDP(t.cfg.Listen, t.log)
	if err != nil {
		return fmt.Errorf("listen on UDP %v: %w", t.cfg.Listen, err)
	}
	l, err := listenStreams(t.cfg.Listen)
	if err != nil {
		return errors.Join(fmt.Errorf("listen on TCP %v: %w", t.cfg.Listen, err), conn.Close())
	}
	t.conn, t.listener = conn, l
	return nil
}

// Attach gives a tunnel that was built without ports its ports, before Run: sockets come before devices,
// because a port that is taken is found out with the sockets. tso and uso: see Config.
func (t *Tunnel) Attach(ports []Port, tso, uso bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ran {
		return errors.New("tunnel: Attach comes before Run")
	}
	t.cfg.Ports, t.cfg.TSO, t.cfg.USO = ports, tso, uso
	return nil
}

// Run serves until ctx ends, then says goodbye to the peers and closes the sockets. The ports stay
// open but must be closed by their owner for Run to return: a pump waits in Read.
func (t *Tunnel) Run(ctx context.Context) error {
	t.mu.Lock()
	ran := t.ran
	t.ran = true
	t.mu.Unlock()
	if ran {
		return errors.New("tunnel: Run was called before")
	}
	if err := t.Listen(); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		err := t.controlLoop(ctx)
		return errors.Join(err, t.conn.Close())
	})
	g.Go(func() error { return newReceiver(t).run(ctx) })
	for _, port := range t.cfg.Ports {
		g.Go(func() error { return newPump(t, port).run(ctx) })
	}
	if t.listener != nil {
		g.Go(func() error { return t.streamLoop(ctx) })
	}
	return g.Wait()
}

// Dial tries to link with whoever listens at addr. It returns at once; the outcome is a LinkEvent: LinkUp,
// or LinkDialFailed with Link.Addr equal to addr.
func (t *Tunnel) Dial(addr netip.AddrPort) {
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	t.call(func(now time.Time) { t.dial(addr, now) })
}

// Hangup says goodbye to peer and drops the direct link. The session stays, for relays.
func (t *Tunnel) Hangup(name mesh.PeerName, why string) {
	t.call(func(now time.Time) { t.hangup(name, why, now) })
}

// SetPSKs replaces the key ring: the first is used from now on to dial, all are accepted. Sessions
// made with a key that is gone are made anew, and end after a grace time where that fails.
func (t *Tunnel) SetPSKs(psks []PSK) {
	secrets := newSecrets(psks)
	t.call(func(now time.Time) { t.setSecrets(secrets, now) })
}

// Streams delivers accepted TCP streams; see DialStream. It is closed when Run returns.
func (t *Tunnel) Streams() <-chan net.Conn { return t.conns }

// Drops counts by reason what went no further. Reasons that never occurred are left out.
func (t *Tunnel) Drops() map[string]uint64 { return t.drops.snapshot() }

// LocalAddr is where the socket is bound, after Listen.
func (t *Tunnel) LocalAddr() netip.AddrPort { return t.conn.LocalAddr() }

// call hands f to controlLoop. It never blocks.
func (t *Tunnel) call(f func(now time.Time)) {
	t.mu.Lock()
	t.calls = append(t.calls, f)
	t.mu.Unlock()
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// post hands an event to controlLoop, or drops it.
func (t *Tunnel) post(ev event) {
	select {
	case t.events <- ev:
	default:
		t.drops.add(dropQueue)
	}
}

// open reports whether this is a mesh without a password.
func (t *Tunnel) open() bool { return (*t.secrets.Load())[0].psk.IsZero() }

// clearTo reports whether, as far as this side is concerned, frames may cross the underlay to and
// from addr in clear.
func (t *Tunnel) clearTo(from origin) bool {
	if t.open() {
		return !t.cfg.SealFrames
	}
	if from.relayed {
		return false
	}
	for _, p := range t.cfg.Trusted {
		if p.Contains(from.addr.Addr().Unmap()) {
			return true
		}
	}
	return false
}

func (t *Tunnel) since(now time.Time) int64 { return int64(now.Sub(t.epoch)) }
