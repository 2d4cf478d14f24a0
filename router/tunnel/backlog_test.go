package tunnel

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"meshd/mesh"
)

// wireConn is a Conn that opens what is sent and writes down the frames.
type wireConn struct {
	Conn
	keys   *keys
	frames [][]byte
	sends  int
}

func (c *wireConn) Write(b []byte, size int, _ netip.AddrPort, _ bool) error {
	c.sends++
	for len(b) > 0 {
		n := min(size, len(b))
		var nonce [nonceLen]byte
		body, _, why := c.keys.openAt(bytes.Clone(b[:n]), &nonce)
		if why != dropNone {
			return errFull
		}
		for len(body) > frameLenLen {
			l := int(binary.BigEndian.Uint16(body) & frameLenMask)
			c.frames = append(c.frames, body[frameLenLen:frameLenLen+l])
			body = body[frameLenLen+l:]
		}
		b = b[n:]
	}
	return nil
}

// testPump makes a pump with one peer, whose port has the given buffers waiting.
func testPump(t testing.TB, bufs ...[]byte) (*pump, *wireConn) {
	r, other := testReceiver(t)
	r.t.conn = &wireConn{keys: other}
	p := (*r.t.peers.Load())[mesh.PeerName{2}]
	p.direct.Store(&path{addr: netip.MustParseAddrPort("10.0.0.2:1"), via: p.name, mtu: 1472})
	port := r.t.cfg.Ports[0].(*memPort)
	for _, b := range bufs {
		port.in <- address(b, p.name)
	}
	return newPump(r.t, port), r.t.conn.(*wireConn)
}

// A lone frame leaves before the superframes that were read before it, but never before its own flow.
func TestSmallFramesGoAhead(t *testing.T) {
	super := frameSpec{partial: true, flags: tcpACK, payload: 40 * 1370, gso: 1370, srcPort: 1000}
	rest := frameSpec{partial: true, flags: tcpACK | tcpPSH, seq: 40 * 1370, payload: 77, srcPort: 1000}
	ping := frameSpec{udp: true, partial: true, payload: 64, srcPort: 2000}
	pump, conn := testPump(t, super.build(), super.build(), super.build(), rest.build(), ping.build())
	pump.drain()
	var order strings.Builder
	for _, f := range conn.frames {
		p := mustParse(f)
		switch n := p.end - p.payload; {
		case p.proto == protoUDP:
			order.WriteByte('p')
		case n == 77:
			order.WriteByte('r')
		default:
			order.WriteByte('.')
		}
	}
	if got := strings.ReplaceAll(order.String(), strings.Repeat(".", 40), "S"); got != "pSSSr" {
		t.Errorf("order %s", got)
	}
	if d := pump.t.Drops(); len(d) != 0 {
		t.Errorf("drops: %v", d)
	}
}

// The backlog is bounded, keeps the order of every flow, and uses its buffers again.
func TestBacklog(t *testing.T) {
	b := newBacklog()
	fill := func(s frameSpec) []byte { return append(b.buffer()[:0], s.build()...) }
	for i := 0; !b.full(); i++ {
		if i > maxBacklog {
			t.Fatal("never full")
		}
		b.add(fill(frameSpec{partial: true, payload: 3000 + i, gso: 1000, srcPort: uint16(i % 5)}))
	}
	for port := range uint16(6) {
		for _, udp := range []bool{false, true} {
			f := frameSpec{udp: udp, payload: 10, srcPort: port}.build()
			if got, want := b.ahead(f), udp || port == 5; got != want {
				t.Errorf("UDP %v, port %d: ahead %v, want %v", udp, port, got, want)
			}
		}
	}
	if b.ahead(frameSpec{partial: true, payload: 3000, gso: 1000, srcPort: 77}.build()) {
		t.Error("a superframe goes ahead")
	}
	for _, n := range []int{0, 1, vnetLen, vnetLen + etherLen - 1} {
		if !b.ahead(make([]byte, n)) {
			t.Errorf("%d bytes are to wait", n)
		}
	}
	for i := range maxBacklog {
		buf := b.next()
		if p := mustParse(buf[vnetLen:]); p.end-p.payload != 3000+i {
			t.Fatalf("number %d is out of order", i)
		}
		b.release(buf)
	}
	if b.next() != nil || len(b.free) != maxBacklog {
		t.Errorf("%d buffers are left", len(b.free))
	}
	buf := frameSpec{partial: true, payload: 3000, gso: 1000}.build()
	small := frameSpec{udp: true, payload: 10}.build()
	if n := testing.AllocsPerRun(100, func() {
		b.add(append(b.buffer()[:0], buf...))
		b.ahead(small)
		b.release(b.next())
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Whatever a container hands over, of any length and with any virtio header, is sent or counted, never more; what
// comes after it arrives.
func TestHostileFrames(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	pump, conn := testPump(t)
	name := mesh.PeerName{2}
	at := time.Now()
	var drops uint64
	bases := []frameSpec{
		{partial: true, flags: tcpACK, payload: 60000, gso: 1370}, {partial: true, flags: tcpSYN, options: 8, payload: 1000, gso: 100, v6: true},
		{udp: true, partial: true, payload: 60000, gso: 1000}, {udp: true, payload: 40000, v6: true}, {payload: 65000, vlan: 2, flags: tcpACK},
	}
	for n := 0; n <= maxFrame; n += 1 + n/37 {
		for _, base := range bases {
			buf := append(make([]byte, 0, maxFrame), base.build()...)[:maxFrame]
			address(buf, name)
			buf = buf[:n]
			for range 3 { // the virtio header is the kernel's, what it says of the packet need not be true
				if n >= vnetLen {
					putVnet(buf, vnetHeader{
						flags: byte(rng.UintN(4)), gso: []byte{0, 1, 3, 4, 5, 0x81, 0x84, 0xff}[rng.UintN(8)], headerLen: uint16(rng.Uint32()),
						gsoSize: []uint16{0, 1, 7, 1370, 9000, 65535}[rng.UintN(6)], csumStart: []uint16{0, 14, 34, 54, uint16(rng.Uint32())}[rng.UintN(5)],
						csumOffset: []uint16{6, 16, uint16(rng.Uint32())}[rng.UintN(3)],
					})
				}
				conn.frames = conn.frames[:0]
				pump.take(append(pump.held.buffer()[:0], buf...), n)
				pump.drain()
				total := 0
				for _, f := range conn.frames {
					total += len(f)
					if len(f) > 1472-bodyOverhead {
						t.Fatalf("%d bytes: a frame of %d on a path that does not carry it", n, len(f))
					}
				}
				was := drops
				drops = 0
				for _, count := range pump.t.Drops() {
					drops += count
				}
				if total == 0 && drops == was {
					t.Fatalf("%d bytes, header % x: neither sent nor counted", n, buf[:min(n, vnetLen)])
				}
			}
		}
	}
	if took := time.Since(at); took > 30*time.Second {
		t.Errorf("took %v", took)
	}
	conn.frames = nil
	pump.take(append(pump.held.buffer()[:0], address(frameSpec{udp: true, payload: 64}.build(), name)...), vnetLen+etherLen+28+64)
	pump.drain()
	if len(conn.frames) != 1 {
		t.Errorf("%d frames after all that", len(conn.frames))
	}
}

// What is relayed one by one leaves together, in order, and only what goes to the same neighbour.
func TestPassing(t *testing.T) {
	type send struct {
		b    string
		size int
		to   netip.AddrPort
	}
	var sent []send
	tun := &Tunnel{conn: recordConn{write: func(b []byte, size int, to netip.AddrPort) { sent = append(sent, send{string(b), size, to}) }}}
	p := passing{t: tun}
	x, y := netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:1")
	for _, b := range []string{"aaaa", "bbbb", "cc", "dddd"} { // cc ends the first send
		p.add([]byte(b), len(b), x)
	}
	p.add([]byte("eeee"), 4, y)
	p.add([]byte("ffffffff"), 8, y)
	p.add([]byte("gggggggg"+"gggggggg"+"ggg"), 8, y)
	p.add([]byte("hhhhhhhh"+"hhh"), 8, y)
	p.flush()
	p.flush()
	want := []send{
		{"aaaabbbbcc", 4, x}, {"dddd", 4, x}, {"eeee", 4, y}, {"ffffffffggggggggggggggggggg", 8, y}, {"hhhhhhhhhhh", 8, y},
	}
	if len(sent) != len(want) {
		t.Fatalf("%d sends: %+v", len(sent), sent)
	}
	for i := range want {
		if sent[i] != want[i] {
			t.Errorf("send %d: %+v, want %+v", i, sent[i], want[i])
		}
	}
	sent = nil
	for range 2*maxSegments + 1 {
		p.add(make([]byte, 1400), 1400, x)
	}
	p.flush()
	total := 0
	for _, s := range sent {
		if len(s.b) > maxBatch || len(s.b) > maxSegments*s.size {
			t.Errorf("a send of %d bytes in pieces of %d", len(s.b), s.size)
		}
		total += len(s.b)
	}
	if total != (2*maxSegments+1)*1400 || len(sent) > 4 {
		t.Errorf("%d bytes in %d sends", total, len(sent))
	}
}

type recordConn struct {
	Conn
	write func(b []byte, size int, to netip.AddrPort)
}

func (c recordConn) Write(b []byte, size int, to netip.AddrPort, _ bool) error {
	c.write(b, size, to)
	return nil
}

// A superframe that two reads have cut in two is one again at the port, if the rest is there.
func TestJoinAcrossReads(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		n.delay = 0
		a, b := framePair(t, n, pskOne)
		wait(100 * time.Millisecond)
		var datagrams [][]byte
		n.set(func() {
			n.sniff = func(from, _ netip.AddrPort, d []byte) {
				if from == a.conn.addr && len(d) > 1000 {
					datagrams = append(datagrams, bytes.Clone(d))
				}
			}
			n.cut[[2]netip.AddrPort{a.conn.addr, b.conn.addr}] = true
		})
		for i := range 3 {
			a.port.in <- address(frameSpec{partial: true, flags: tcpACK, seq: uint32(i * 44 * 1358), payload: 44 * 1358, gso: 1358}.build(), b.name())
		}
		wait(50 * time.Millisecond)
		for _, d := range datagrams { // one by one, all at once: 132 datagrams are three reads
			b.conn.in <- memPacket{b: d, from: a.conn.addr}
		}
		n.set(func() { n.cut = map[[2]netip.AddrPort]bool{} })
		wait(50 * time.Millisecond)
		if got := len(b.port.frames()); len(datagrams) != 132 || got != 3 {
			t.Errorf("%d superframes of %d datagrams", got, len(datagrams))
		}
		return []*node{a, b}
	})
}
