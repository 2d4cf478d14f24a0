package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/flynn/noise"

	"meshd/mesh"
	"meshd/router"
)

// Streams are TCP connections to the same port number, for what does not fit a datagram. The same
// handshake as for sessions opens them, then every record is sealed with ChaCha20-Poly1305 under the keys
// of that handshake, its number in the stream as nonce (Noise revision 34, section 5.1):
//
//	0                 2
//	+-----------------+------------------------
//	| length, bytes   | sealed record, or Noise message of the handshake
//	+-----------------+------------------------
//
// Only peers with a live link get one; the handshake proves who it is. Connections from other addresses
// than those of the links are let in as well, for a peer may have several, but few at a time.
const (
	maxStreams     = 64 // being opened from addresses of links; waiting to be taken
	maxGuests      = 8  // being opened from other addresses
	streamDeadline = 10 * time.Second
	maxRecord      = 16 << 10 // bytes of payload
	recordLenLen   = 2
)

var errStranger = errors.New("not a peer with a live link")

func listenStreams(addr netip.AddrPort) (net.Listener, error) {
	return net.Listen(network("tcp", addr), addr.String())
}

// network narrows "tcp" or "udp" to IPv4 if addr is, so that 0.0.0.0 does not also take IPv6.
func network(name string, addr netip.AddrPort) string {
	if addr.Addr().Is4() {
		return name + "4"
	}
	return name
}

// streamLoop accepts connections until ctx ends.
func (t *Tunnel) streamLoop(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { t.listener.Close() })
	defer stop()
	var g sync.WaitGroup
	known, guests := make(chan struct{}, maxStreams), make(chan struct{}, maxGuests)
	for {
		c, err := t.listener.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				break
			}
			select { // out of descriptors, most likely
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		slots := guests
		if a, ok := c.RemoteAddr().(*net.TCPAddr); ok && t.linkedFrom(a.AddrPort().Addr()) {
			slots = known
		}
		select {
		case slots <- struct{}{}:
		default:
			t.drops.add(dropStream)
			c.Close()
			continue
		}
		g.Go(func() {
			defer func() { <-slots }()
			s, err := t.acceptStream(ctx, c)
			if err != nil {
				t.drops.add(dropStream)
				c.Close()
				if t.noisy.take(time.Now()) {
					t.log.Warn("stream turned away", "underlay", c.RemoteAddr().String(), "err", err)
				}
				return
			}
			select {
			case t.conns <- s:
			default:
				t.drops.add(dropStream)
				c.Close()
			}
		})
	}
	g.Wait()
	close(t.conns)
	for c := range t.conns {
		c.Close()
	}
	return nil
}

// linkedFrom reports whether there is a live link to that IP address.
func (t *Tunnel) linkedFrom(ip netip.Addr) bool {
	for addr := range *t.neigh.Load() {
		if addr.Addr() == ip.Unmap() {
			return true
		}
	}
	return false
}

// linkedTo finds the peer with a live link who says hello; nil if there is none.
func (t *Tunnel) linkedTo(hello router.Hello) *peer {
	p := (*t.peers.Load())[hello.Name]
	if p == nil || p.direct.Load() == nil || !sameHost(p.info.Load().hello, hello) {
		return nil
	}
	return p
}

func (t *Tunnel) acceptStream(ctx context.Context, c net.Conn) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	c.SetDeadline(time.Now().Add(streamDeadline))
	first, err := readRecord(c, maxHelloLen)
	if err != nil {
		return nil, err
	}
	// There is no MAC here: a TCP connection has proven its address. Each password is tried.
	var hs *noise.HandshakeState
	for _, s := range *t.secrets.Load() {
		try, err := newNoise(t.cfg.Identity, s.psk, false)
		if err != nil {
			return nil, err
		}
		if _, _, _, err = try.ReadMessage(nil, first); err == nil {
			hs = try
			break
		}
	}
	if hs == nil {
		return nil, errHandshake
	}
	second, _, _, err := hs.WriteMessage(nil, appendTerms(nil, t.ours(0, origin{})))
	if err != nil {
		return nil, err
	}
	if err := writeRecord(c, second); err != nil {
		return nil, err
	}
	third, err := readRecord(c, maxHelloLen)
	if err != nil {
		return nil, err
	}
	payload, up, down, err := hs.ReadMessage(nil, third)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errHandshake, err)
	}
	theirs, err := parseTerms(payload, hs.PeerStatic())
	if err != nil {
		return nil, err
	}
	p := t.linkedTo(theirs.hello)
	if p == nil {
		return nil, errStranger
	}
	if !stop() {
		return nil, ctx.Err()
	}
	c.SetDeadline(time.Time{})
	return &stream{Conn: c, peer: p.name, seal: down, open: up}, nil
}

// DialStream opens a stream to a peer with a live link, within 10 s. The connection's RemoteAddr has the
// peer's address; PeerOf tells its name.
func (t *Tunnel) DialStream(ctx context.Context, dst mesh.PeerName) (net.Conn, error) {
	s, err := t.dialStream(ctx, dst)
	if err != nil {
		return nil, fmt.Errorf("stream to %v: %w", dst, err)
	}
	return s, nil
}

func (t *Tunnel) dialStream(ctx context.Context, dst mesh.PeerName) (net.Conn, error) {
	p := (*t.peers.Load())[dst]
	if p == nil || p.direct.Load() == nil {
		return nil, errStranger
	}
	if t.listener == nil {
		return nil, errors.New("streams are off")
	}
	ctx, cancel := context.WithTimeout(ctx, streamDeadline)
	defer cancel()
	hello := p.info.Load().hello
	addr := netip.AddrPortFrom(p.direct.Load().addr.Addr(), hello.Port)
	var d net.Dialer
	if local := t.cfg.Listen.Addr(); !local.IsUnspecified() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(local, 0))
	}
	c, err := d.DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	s, err := t.openStream(c, p)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return s, nil
}

func (t *Tunnel) openStream(c net.Conn, p *peer) (net.Conn, error) {
	c.SetDeadline(time.Now().Add(streamDeadline))
	hs, err := newNoise(t.cfg.Identity, (*t.secrets.Load())[0].psk, true)
	if err != nil {
		return nil, err
	}
	first, _, _, err := hs.WriteMessage(nil, appendOffer(nil, offer{}))
	if err != nil {
		return nil, err
	}
	if err := writeRecord(c, first); err != nil {
		return nil, err
	}
	second, err := readRecord(c, maxHelloLen)
	if err != nil {
		return nil, err
	}
	payload, _, _, err := hs.ReadMessage(nil, second)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errHandshake, err)
	}
	theirs, err := parseTerms(payload, hs.PeerStatic())
	if err != nil {
		return nil, err
	}
	if !sameHost(p.info.Load().hello, theirs.hello) {
		return nil, errStranger
	}
	third, up, down, err := hs.WriteMessage(nil, appendTerms(nil, t.ours(0, origin{})))
	if err != nil {
		return nil, err
	}
	if err := writeRecord(c, third); err != nil {
		return nil, err
	}
	c.SetDeadline(time.Time{})
	return &stream{Conn: c, peer: p.name, seal: up, open: down}, nil
}

// stream is one sealed connection. One goroutine may read while another writes.
type stream struct {
	net.Conn
	peer mesh.PeerName

	wmu  sync.Mutex // guards seal and the order of records
	seal *noise.CipherState
	rmu  sync.Mutex // guards open, rest
	open *noise.CipherState
	rest []byte
}

// Peer is the name of the peer at the other end.
func (s *stream) Peer() mesh.PeerName { return s.peer }

// PeerOf tells who is at the other end of a connection that came from Streams or DialStream.
func PeerOf(c net.Conn) (mesh.PeerName, bool) {
	s, ok := c.(*stream)
	if !ok {
		return mesh.PeerName{}, false
	}
	return s.peer, true
}

func (s *stream) Write(b []byte) (int, error) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	done := 0
	for len(b) > 0 {
		n := min(len(b), maxRecord)
		sealed, err := s.seal.Encrypt(nil, nil, b[:n])
		if err == nil {
			err = writeRecord(s.Conn, sealed)
		}
		if err != nil {
			s.Conn.Close() // a record may be half written: the stream cannot go on
			return done, err
		}
		done += n
		b = b[n:]
	}
	return done, nil
}

func (s *stream) Read(b []byte) (int, error) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	for len(s.rest) == 0 {
		sealed, err := readRecord(s.Conn, maxRecord+sealLen)
		if err != nil {
			return 0, err
		}
		if s.rest, err = s.open.Decrypt(nil, nil, sealed); err != nil {
			s.Conn.Close()
			return 0, fmt.Errorf("stream from %v: %w", s.peer, err)
		}
	}
	n := copy(b, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

func writeRecord(w io.Writer, b []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(make([]byte, 0, recordLenLen+len(b)), uint16(len(b))), b...))
	return err
}

func readRecord(r io.Reader, most int) ([]byte, error) {
	var head [recordLenLen]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(head[:]))
	if n > most {
		return nil, fmt.Errorf("record of %d bytes, at most %d expected", n, most)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return b, nil
}
