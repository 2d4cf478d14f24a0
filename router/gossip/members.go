package gossip

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	"meshd/mesh"
)

// members runs memberlist over the tunnel. It says who is a member and who failed; who is reached, and
// by whom, is the topology's matter.
//
// Facts about memberlist 0.7 that shape this: a probe whose sending returns an error is taken for our own
// fault and suspects nobody, so sending never fails here. Callbacks hold its locks, so they note and
// return. It never tries again to reach those that it declared dead, so members that the topology still
// reaches are introduced anew. Packets reach it only through checkMember.
type members struct {
	self  mesh.PeerName // fixed
	under Underlay
	log   *slog.Logger

	packets chan *memberlist.Packet
	streams chan net.Conn
	joins   chan mesh.PeerName
	done    chan struct{} // closed by Shutdown
	refused atomic.Uint64 // packets that were not let through
	lost    atomic.Uint64 // packets that found no room

	mu          sync.Mutex // guards the rest; a leaf
	ended       bool
	direct      map[mesh.PeerName]bool   // peers with a live link
	incarnation map[mesh.PeerName]uint32 // the highest heard of
	alive       map[mesh.PeerName]bool
	dead        map[mesh.PeerName]time.Time // since when
}

func newMembers(self mesh.PeerName, under Underlay, log *slog.Logger) *members {
	return &members{
		self: self, under: under, log: log,
		packets: make(chan *memberlist.Packet, 512), streams: make(chan net.Conn, 16),
		joins: make(chan mesh.PeerName, 64), done: make(chan struct{}),
		direct: map[mesh.PeerName]bool{}, incarnation: map[mesh.PeerName]uint32{},
		alive: map[mesh.PeerName]bool{}, dead: map[mesh.PeerName]time.Time{},
	}
}

// run keeps memberlist going until ctx ends.
func (m *members) run(ctx context.Context) error {
	cfg := memberlist.DefaultLANConfig()
	cfg.Name = m.self.String()
	cfg.Transport = m
	cfg.BindPort, cfg.AdvertisePort = memberPort, memberPort
	cfg.UDPBufferSize = mesh.MaxMessage - 32 // a checksum and the channel come on top
	cfg.EnableCompression = false
	cfg.DisableTcpPings = true // streams reach neighbours only, whose life the tunnel watches
	cfg.TCPTimeout = 5 * time.Second
	cfg.PushPullInterval = time.Minute
	cfg.Alive, cfg.Events = m, m
	cfg.Logger = log.New(io.Discard, "", 0)
	if m.log.Enabled(ctx, slog.LevelDebug) {
		cfg.Logger.SetOutput(logWriter{m.log})
	}
	ml, err := memberlist.Create(cfg)
	if err != nil {
		return fmt.Errorf("membership: %w", err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { m.streamLoop(ctx) })
	for {
		select {
		case <-ctx.Done():
			err := ml.Shutdown()
			wg.Wait()
			return err
		case p := <-m.joins:
			if m.isMember(p) || ctx.Err() != nil {
				continue
			}
			if _, err := ml.Join([]string{p.String() + "/" + memberAddr(p)}); err != nil {
				m.log.Debug("membership: no stream, introducing by datagram", "peer", p, "err", err)
				m.introduce(p)
			}
		}
	}
}

// join asks that p be made a member.
func (m *members) join(p mesh.PeerName) {
	select {
	case m.joins <- p:
	default: // the loop asks again
	}
}

// introduce tells our memberlist that p is alive, which we know from elsewhere: from a link or a route.
func (m *members) introduce(p mesh.PeerName) {
	m.mu.Lock()
	inc := max(m.incarnation[p], 1)
	if _, dead := m.dead[p]; dead {
		// More than was ever heard, and more each time: memberlist may know of a later claim. Who hears more of
		// itself than it said outbids that, and all of it goes to everybody, so this is for the dead alone.
		inc = min(inc+1, 1<<31-1) // what checkMember lets through
		m.incarnation[p] = inc
	}
	m.mu.Unlock()
	m.offer(p, appendAlive(nil, p, inc))
}

func (m *members) isMember(p mesh.PeerName) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.alive[p]
}

// failed returns since when memberlist has held p for dead, if it does.
func (m *members) failed(p mesh.PeerName) (since time.Time, dead bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	since, dead = m.dead[p]
	return since, dead
}

// count returns how many members are alive, this peer included.
func (m *members) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.alive)
}

// setDirect notes whether there is a live link to p.
func (m *members) setDirect(p mesh.PeerName, up bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if up {
		m.direct[p] = true
	} else {
		delete(m.direct, p)
	}
}

// forget drops what is noted of a peer that is gone.
func (m *members) forget(p mesh.PeerName) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.incarnation, p)
	delete(m.dead, p)
}

// accept decides on a claim: that a peer is dead which we have a live link to is not believed.
func (m *members) accept(c claim) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.kind != memberAlive && m.direct[c.peer] {
		return false
	}
	if old, ok := m.incarnation[c.peer]; ok && c.incarnation > old || !ok && len(m.incarnation) < maxKnown*4 {
		m.incarnation[c.peer] = c.incarnation
	}
	return true
}

// message takes a packet from the tunnel. b is borrowed.
func (m *members) message(from mesh.PeerName, b []byte) {
	packet, ok := checkMember(from, b, m.accept)
	switch {
	case !ok:
		m.refused.Add(1)
	case len(packet) > 0:
		m.offer(from, slices.Clone(packet))
	}
}

func (m *members) offer(from mesh.PeerName, b []byte) {
	packet := &memberlist.Packet{Buf: b, From: &net.UDPAddr{IP: memberIP(from), Port: memberPort}, Timestamp: time.Now()}
	select {
	case m.packets <- packet:
	default:
		m.lost.Add(1)
	}
}

// The rest is what memberlist calls.

var (
	_ memberlist.NodeAwareTransport = (*members)(nil)
	_ memberlist.AliveDelegate      = (*members)(nil)
	_ memberlist.EventDelegate      = (*members)(nil)
)

// NotifyAlive refuses nodes whose address does not stand for their name: those that came by stream
// have not been through checkMember.
func (m *members) NotifyAlive(n *memberlist.Node) error {
	p, ok := peerOfNode(n.Name)
	q, ok2 := peerOfIP(n.Addr.To16())
	if !ok || !ok2 || p != q || n.Port != memberPort || len(n.Meta) > 0 {
		return errors.New("address does not stand for the name")
	}
	return nil
}

func (m *members) NotifyJoin(n *memberlist.Node) {
	if p, ok := peerOfNode(n.Name); ok {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.alive[p] = true
		delete(m.dead, p)
	}
}

func (m *members) NotifyLeave(n *memberlist.Node) {
	if p, ok := peerOfNode(n.Name); ok {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.alive, p)
		m.dead[p] = time.Now()
	}
}

func (m *members) NotifyUpdate(*memberlist.Node) {}

// FinalAdvertiseAddr gives the address that stands for our name.
func (m *members) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return memberIP(m.self), memberPort, nil
}

// WriteTo sends a packet to the peer that addr stands for.
func (m *members) WriteTo(b []byte, addr string) (time.Time, error) {
	if p, ok := peerOfAddr(addr); ok && len(b) < mesh.MaxMessage {
		checkMember(m.self, b, m.accept) // keeps count of incarnations
		_ = m.under.Send(p, append([]byte{byte(mesh.ChanMember)}, b...))
	} else {
		m.refused.Add(1)
	}
	return time.Now(), nil
}

// WriteToAddress is WriteTo; the name says nothing that the address does not.
func (m *members) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return m.WriteTo(b, a.Addr)
}

// PacketCh delivers packets.
func (m *members) PacketCh() <-chan *memberlist.Packet { return m.packets }

// DialTimeout opens a stream to the peer that addr stands for.
func (m *members) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	p, ok := peerOfAddr(addr)
	if !ok {
		return nil, fmt.Errorf("%s stands for no peer", addr)
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	go func() {
		select {
		case <-m.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	c, err := m.under.DialStream(ctx, p)
	if err != nil {
		return nil, err
	}
	return &boundedConn{Conn: c, left: maxStream}, nil
}

// DialAddressTimeout is DialTimeout.
func (m *members) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return m.DialTimeout(a.Addr, timeout)
}

// StreamCh delivers accepted streams.
func (m *members) StreamCh() <-chan net.Conn { return m.streams }

// Shutdown ends what waits for the transport.
func (m *members) Shutdown() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.ended {
		m.ended = true
		close(m.done)
	}
	return nil
}

// streamLoop hands accepted streams to memberlist. Those that it takes too long to fetch are closed.
func (m *members) streamLoop(ctx context.Context) {
	defer func() {
		for {
			select {
			case c := <-m.streams:
				c.Close()
			default:
				return
			}
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return
		case c, ok := <-m.under.Streams():
			if !ok {
				return
			}
			select {
			case m.streams <- &boundedConn{Conn: c, left: maxStream}:
			default:
				m.lost.Add(1)
				c.Close()
			}
		}
	}
}

// maxStream bounds what is read from one stream: the states of some ten thousand members.
const maxStream = 2 << 20

type boundedConn struct {
	net.Conn
	left int
}

func (c *boundedConn) Read(b []byte) (int, error) {
	if c.left <= 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := c.Conn.Read(b[:min(len(b), c.left)])
	c.left -= n
	return n, err
}

// logWriter passes memberlist's lines on: none of them is news for an operator, who is told by the loop.
type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(b []byte) (int, error) {
	w.log.Debug("memberlist", "line", strings.TrimSpace(string(b)))
	return len(b), nil
}
