package tunnel

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// memNet is an underlay in memory: it loses, delays, repeats and reorders by a seed, and drops when a
// queue is full.
type memNet struct {
	mu        sync.Mutex // guards all
	rng       *rand.Rand
	hosts     map[netip.AddrPort]*memConn
	loss      float64
	loseHello float64 // of handshake datagrams only
	repeat    float64
	delay     time.Duration
	jitter    time.Duration
	size      int // largest datagram that passes; 0: any
	cut       map[[2]netip.AddrPort]bool
	sniff     func(from, to netip.AddrPort, b []byte) // sees all that is sent
	ifMTU     int                                     // what PathMTU says
	refuse    int                                     // datagrams larger than this are refused by the sender's interface; 0: none
	fail      error                                   // what Write returns
	carried   int
	last      time.Time // without jitter datagrams keep their order: each arrives a little later than the one before
}

func newMemNet(seed uint64) *memNet {
	return &memNet{rng: rand.New(rand.NewPCG(seed, 1)), hosts: map[netip.AddrPort]*memConn{}, cut: map[[2]netip.AddrPort]bool{}, delay: time.Millisecond, ifMTU: 1500}
}

type memPacket struct {
	b    []byte
	size int // of each datagram in b but the last, 0: there is one
	from netip.AddrPort
}

type memConn struct {
	n      *memNet
	addr   netip.AddrPort
	in     chan memPacket
	closed chan struct{}
	once   sync.Once
}

func (n *memNet) conn(addr string) *memConn {
	c := &memConn{n: n, addr: netip.MustParseAddrPort(addr), in: make(chan memPacket, 4096), closed: make(chan struct{})}
	n.mu.Lock()
	n.hosts[c.addr] = c
	n.mu.Unlock()
	return c
}

// set changes the network's behaviour.
func (n *memNet) set(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
}

func (n *memNet) cutBoth(a, b *memConn, on bool) {
	n.set(func() { n.cut[[2]netip.AddrPort{a.addr, b.addr}], n.cut[[2]netip.AddrPort{b.addr, a.addr}] = on, on })
}

func (c *memConn) ReadBatch(batch []Datagrams, wait bool) (int, error) {
	for i := range batch {
		var p memPacket
		if i == 0 && wait {
			select {
			case <-c.closed:
				return 0, net.ErrClosed
			case p = <-c.in:
			}
		} else {
			select {
			case p = <-c.in:
			default:
				return i, nil
			}
		}
		batch[i].N, batch[i].Size, batch[i].Addr = copy(batch[i].Buf, p.b), p.size, p.from
	}
	return len(batch), nil
}

func (c *memConn) Write(b []byte, size int, to netip.AddrPort, _ bool) error {
	select {
	case <-c.closed:
		return net.ErrClosed
	default:
	}
	n := c.n
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fail != nil {
		return n.fail
	}
	var together []byte
	var receiver *memConn
	for len(b) > 0 {
		d := append([]byte(nil), b[:min(size, len(b))]...)
		b = b[len(d):]
		if n.sniff != nil {
			n.sniff(c.addr, to, d)
		}
		if n.refuse > 0 && len(d) > n.refuse {
			return errTooLarge
		}
		dst := n.hosts[to]
		if dst == nil || n.cut[[2]netip.AddrPort{c.addr, to}] || n.size > 0 && len(d) > n.size {
			continue
		}
		for range 1 + n.chance(n.repeat) {
			if n.chance(n.loss) == 1 || d[0] <= typeHello3 && n.chance(n.loseHello) == 1 {
				continue
			}
			n.carried++
			p := memPacket{d, 0, c.addr}
			if n.jitter > 0 {
				time.AfterFunc(n.delay+time.Duration(n.rng.Int64N(int64(n.jitter))), func() { dst.put(p) })
			} else { // as UDP_GRO would deliver it
				together = append(together, d...)
				receiver = dst
			}
		}
	}
	if len(together) == 0 {
		return nil
	}
	delay := n.delay
	if at := time.Now().Add(delay); !at.After(n.last) {
		delay = time.Until(n.last) + 1
	}
	n.last = time.Now().Add(delay)
	time.AfterFunc(delay, func() {
		receiver.put(memPacket{together, size, c.addr})
	})
	return nil
}

// put queues a datagram, or loses it when the queue is full.
func (c *memConn) put(p memPacket) {
	select {
	case c.in <- p:
	default:
	}
}

func (n *memNet) chance(p float64) int {
	if p > 0 && n.rng.Float64() < p {
		return 1
	}
	return 0
}

func (c *memConn) PathMTU(netip.Addr) int {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	return c.n.ifMTU
}
func (c *memConn) LocalAddr() netip.AddrPort { return c.addr }
func (c *memConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

// moveTo gives the connection another address, as a NAT or a roaming host would.
func (c *memConn) moveTo(addr string) {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	delete(c.n.hosts, c.addr)
	c.addr = netip.MustParseAddrPort(addr)
	c.n.hosts[c.addr] = c
}

// fixedRoutes is a Router that a test sets by hand.
type fixedRoutes struct {
	mu sync.Mutex
	m  map[mesh.PeerName]mesh.PeerName
}

// Way counts one link to a neighbour and two to everybody else.
func (f *fixedRoutes) Way(dst mesh.PeerName) (via mesh.PeerName, links int, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	via, ok = f.m[dst]
	if links = 1; via != dst {
		links = 2
	}
	return via, links, ok
}

func (f *fixedRoutes) set(dst, via mesh.PeerName) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.m == nil {
		f.m = map[mesh.PeerName]mesh.PeerName{}
	}
	if via.IsZero() {
		delete(f.m, dst)
	} else {
		f.m[dst] = via
	}
}

// node is a Tunnel under test that remembers what it was told.
type node struct {
	t      testing.TB
	tun    *Tunnel
	conn   *memConn
	routes *fixedRoutes
	port   *memPort
	cancel context.CancelFunc
	done   chan struct{}

	mu       sync.Mutex // guards the rest
	events   []router.LinkEvent
	messages []string
	senders  []mesh.PeerName
}

func (n *node) Link(ev router.LinkEvent) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.events = append(n.events, ev)
}

func (n *node) Message(from mesh.PeerName, msg []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.messages = append(n.messages, string(msg))
	n.senders = append(n.senders, from)
}

func (n *node) name() mesh.PeerName { return n.tun.name }

// got takes the messages that have come.
func (n *node) got() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := n.messages
	n.messages, n.senders = nil, nil
	return out
}

// took takes the events of one kind that have come and forgets all others.
func (n *node) took(state router.LinkState) []router.LinkEvent {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []router.LinkEvent
	for _, ev := range n.events {
		if ev.State == state {
			out = append(out, ev)
		}
	}
	n.events = nil
	return out
}

func (n *node) stop() {
	n.cancel()
	<-n.done
}

// kill ends a node without a goodbye.
func (n *node) kill() {
	n.conn.Close()
	n.conn.n.set(func() { delete(n.conn.n.hosts, n.conn.addr) })
	n.stop()
}

func testIdentity(t testing.TB, seed byte) Identity {
	t.Helper()
	var b [32]byte
	for i := range b {
		b[i] = seed + byte(i)*7
	}
	id, err := ParseIdentity(b[:])
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// startNode runs a Tunnel on net at addr. change may adapt its configuration.
func startNode(t testing.TB, n *memNet, seed byte, addr string, change func(*Config)) *node {
	t.Helper()
	nd := &node{t: t, conn: n.conn(addr), routes: &fixedRoutes{}, port: newMemPort(), done: make(chan struct{})}
	cfg := Config{
		Identity: testIdentity(t, seed), Conn: nd.conn, Router: nd.routes, Handler: nd, MTU: 1410, TSO: true, USO: true,
		Ports: []Port{nd.port}, Switch: wireSwitch{},
		Hello: router.Hello{NickName: "host" + string('a'+rune(seed)), Run: mesh.RunID(rand.Uint64()), Port: nd.conn.addr.Port()},
		Log:   slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if nd.tun, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	var ctx context.Context
	ctx, nd.cancel = context.WithCancel(context.Background())
	go func() {
		defer close(nd.done)
		if err := nd.tun.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	t.Cleanup(func() { nd.cancel() })
	return nd
}

// wireSwitch sends every frame to the peer that the first six bytes name, and delivers what comes.
type wireSwitch struct{}

func (wireSwitch) FromBridge(frame, _ []byte, _ time.Time) router.Decision {
	return router.Decision{Verdict: router.Unicast, Peer: mesh.PeerName(frame[:6])}
}

func (wireSwitch) FromPeer([]byte, mesh.PeerName, time.Time) router.Decision {
	return router.Decision{Verdict: router.Deliver}
}

// memPort is a TAP in memory.
type memPort struct {
	in     chan []byte
	mu     sync.Mutex // guards out, err
	out    [][]byte
	err    error // of Read and Write
	closed chan struct{}
	once   sync.Once
}

func newMemPort() *memPort {
	return &memPort{in: make(chan []byte, 1024), closed: make(chan struct{})}
}

var errMemClosed = errors.Join(net.ErrClosed, errors.New("closed"))

func (p *memPort) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = err
}

func (p *memPort) failed() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

func (p *memPort) Read(b []byte) (int, error) {
	if err := p.failed(); err != nil {
		return 0, err
	}
	select {
	case f := <-p.in:
		return copy(b, f), nil
	case <-p.closed:
		return 0, errMemClosed
	}
}

func (p *memPort) TryRead(b []byte) (int, error) {
	select {
	case f := <-p.in:
		return copy(b, f), nil
	default:
		return 0, nil
	}
}

func (p *memPort) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return 0, p.err
	}
	p.out = append(p.out, append([]byte(nil), b...))
	return len(b), nil
}

func (p *memPort) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

// frames takes what was written to the port.
func (p *memPort) frames() [][]byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := p.out
	p.out = nil
	return out
}

// bubble runs f in a synctest bubble and stops the nodes that it returns.
func bubble(t *testing.T, f func(t *testing.T) []*node) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		for _, n := range f(t) {
			if n != nil {
				n.stop()
			}
		}
	})
}

// until waits, in fake time, for something to become true, and returns how long that took.
func until(t *testing.T, most time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > most {
			t.Fatalf("%s: not within %v", what, most)
		}
		wait(10 * time.Millisecond)
	}
	return time.Since(start)
}

// wait lets fake time pass and everybody act on it.
func wait(d time.Duration) {
	timer := time.NewTimer(d)
	<-timer.C
	synctest.Wait()
}

func linked(a, b *node) bool {
	for _, l := range a.tun.Links() {
		if l.Peer.Name == b.name() {
			return true
		}
	}
	return false
}
