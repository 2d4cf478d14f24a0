package tunnel

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// flood makes hello1 datagrams with a right MAC, each with another index, cheaply.
type flood struct {
	s      secret
	hello1 []byte
	n      uint32
}

func newFlood(t testing.TB, psk PSK) *flood {
	s := newSecret(psk)
	in, err := newInitiator(testIdentity(t, 77), s, 1, offer{})
	if err != nil {
		t.Fatal(err)
	}
	return &flood{s: s, hello1: in.hello1}
}

func (f *flood) next() []byte {
	f.n++
	b := append([]byte(nil), f.hello1...)
	binary.BigEndian.PutUint32(b[4:], f.n)
	end := len(b) - 2*macLen
	m := mac(f.s.mac1[:], b[:end])
	copy(b[end:], m[:])
	return b
}

// A mesh without a password is flooded with 20,000 handshakes a second from invented addresses; a real
// peer still joins (C4). Cookies are what lets it in.
func TestHelloFlood(t *testing.T) {
	for seed := range uint64(3) {
		bubble(t, func(t *testing.T) []*node {
			n := newMemNet(seed)
			b := startNode(t, n, 2, "10.0.0.2:6783", nil)
			f := newFlood(t, PSK{})
			cookies := 0
			n.set(func() {
				n.sniff = func(from, _ netip.AddrPort, d []byte) {
					if from == b.conn.addr && d[0] == typeCookie {
						cookies++
					}
				}
			})
			rng := rand.New(rand.NewPCG(seed, 9))
			burst := func() {
				for range 20 {
					d := f.next()
					from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{byte(rng.IntN(220) + 1), byte(rng.Uint32()), byte(rng.Uint32()), 1}), 6783)
					b.conn.put(memPacket{d, 0, from})
				}
				wait(time.Millisecond)
			}
			for range 500 {
				burst()
			}
			a := startNode(t, n, 1, "10.0.0.1:6783", nil)
			start := time.Now()
			a.tun.Dial(b.conn.addr)
			for !linked(a, b) || !linked(b, a) {
				if time.Since(start) > 5*time.Second {
					t.Fatalf("seed %d: not joined within 5 s; drops %v", seed, b.tun.Drops())
				}
				burst()
			}
			t.Logf("seed %d: joined after %v, %d cookies, drops %v", seed, time.Since(start), cookies, b.tun.Drops())
			if cookies == 0 || b.tun.Drops()["busy"] == 0 {
				t.Error("the guard did not notice")
			}
			return []*node{a, b}
		})
	}
}

// With a password the flood does not know, it gets no answer and costs no state.
func TestHelloFloodWithoutPassword(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a, b := framePair(t, n, pskOne)
		f := newFlood(t, pskTwo)
		answers := 0
		n.set(func() {
			n.sniff = func(from, to netip.AddrPort, d []byte) {
				if from == b.conn.addr && to != a.conn.addr {
					answers++
				}
			}
		})
		for range 100 {
			for range 100 {
				b.conn.put(memPacket{f.next(), 0, netip.MustParseAddrPort("10.0.0.66:6783")})
			}
			wait(10 * time.Millisecond)
		}
		if d := b.tun.Drops(); answers != 0 || d["mac"] != 10_000 {
			t.Errorf("%d answers, drops %v", answers, d)
		}
		if !linked(a, b) {
			t.Error("the link suffered")
		}
		return []*node{a, b}
	})
}

// Unfinished handshakes fill a bounded table whose oldest entries give way (R3).
func TestHalfOpenIsBounded(t *testing.T) {
	nd := &node{routes: &fixedRoutes{}}
	n := newMemNet(1)
	tun, err := New(Config{Identity: testIdentity(t, 1), Conn: n.conn("10.0.0.1:1"), Router: nd.routes, Handler: nd})
	if err != nil {
		t.Fatal(err)
	}
	tun.conn = tun.cfg.Conn
	f := newFlood(t, PSK{})
	s := (*tun.secrets.Load())[0]
	now := time.Unix(100, 0)
	for i := range maxHalf + 200 {
		tun.onHello1(event{kind: eventHello, secret: &s, body: f.next(), from: origin{addr: netip.MustParseAddrPort("10.0.0.66:1")}}, now.Add(time.Duration(i)*time.Millisecond))
	}
	c := &tun.control
	if len(c.half) != maxHalf || len(c.halfByID) != maxHalf || len(c.halfFIFO) != maxHalf {
		t.Errorf("%d, %d, %d half-open handshakes", len(c.half), len(c.halfByID), len(c.halfFIFO))
	}
	tun.tickHalf(now.Add(time.Minute))
	if len(c.half) != 0 || len(c.halfByID) != 0 || len(c.halfFIFO) != 0 {
		t.Error("they are kept for ever")
	}
}

// Anybody's noise: nothing of it is delivered, answered more than it should be, or kept (C3).
func TestGarbage(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a, b := framePair(t, n, pskOne)
		rng := rand.New(rand.NewPCG(4, 4))
		answers := 0
		n.set(func() {
			n.sniff = func(from, to netip.AddrPort, d []byte) {
				if from == b.conn.addr && to != a.conn.addr {
					answers += len(d)
				}
			}
		})
		k := (*a.tun.peers.Load())[b.name()].send.Load()
		types := []byte{typeHello1, typeHello2, typeHello3, typeCookie, typeLost, typeData, typeClear, typeRelay, 0, 0xff}
		sent := 0
		for range 2000 {
			for range 10 {
				d := make([]byte, rng.IntN(200))
				for i := range d {
					d[i] = byte(rng.Uint32())
				}
				if len(d) > 8 {
					d[0] = types[rng.IntN(len(types))]
					d[1] = byte(rng.IntN(2))
					if rng.IntN(2) == 0 {
						binary.BigEndian.PutUint32(d[4:], k.remote)
					}
				}
				from := netip.MustParseAddrPort("10.0.0.66:6783")
				if rng.IntN(3) == 0 {
					from = a.conn.addr
				}
				sent += len(d)
				b.conn.put(memPacket{d, 0, from})
			}
			wait(time.Millisecond)
		}
		wait(time.Second)
		if !linked(a, b) || len(b.got()) != 0 || len(b.port.frames()) != 0 || len(*b.tun.peers.Load()) != 1 {
			t.Error("garbage had an effect")
		}
		if answers > 20_000 { // hints, 200 a second
			t.Errorf("%d bytes answered to %d", answers, sent)
		}
		b.tun.Send(a.name(), []byte("fine"))
		wait(100 * time.Millisecond)
		if got := a.got(); len(got) != 1 {
			t.Error("the session suffered")
		}
		t.Logf("drops: %v", b.tun.Drops())
		return []*node{a, b}
	})
}

// A false hint costs one handshake a second at most.
func TestFalseHints(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a, b := framePair(t, n, pskOne)
		hellos := 0
		s := newSecret(pskTwo)
		n.set(func() {
			n.sniff = func(from, _ netip.AddrPort, d []byte) {
				if from == a.conn.addr && d[0] == typeHello1 {
					hellos++
				}
			}
		})
		for range 500 {
			index := binary.BigEndian.AppendUint32(nil, (*a.tun.peers.Load())[b.name()].send.Load().remote)
			a.conn.put(memPacket{newLost(&s, index), 0, b.conn.addr})
			wait(10 * time.Millisecond)
		}
		if hellos != 0 {
			t.Errorf("%d handshakes for hints without the password", hellos)
		}
		s = newSecret(pskOne)
		for range 500 {
			index := binary.BigEndian.AppendUint32(nil, (*a.tun.peers.Load())[b.name()].send.Load().remote)
			a.conn.put(memPacket{newLost(&s, index), 0, b.conn.addr})
			wait(10 * time.Millisecond)
		}
		if hellos == 0 || hellos > 6 {
			t.Errorf("%d handshakes in 5 s", hellos)
		}
		if down := a.took(router.LinkDown); len(down) != 0 {
			t.Errorf("link lost: %v", down[0].Err)
		}
		return []*node{a, b}
	})
}

// testReceiver makes a receiver with one session, for single datagrams.
func testReceiver(t testing.TB) (*receiver, *keys) {
	n := newMemNet(1)
	nd := &node{routes: &fixedRoutes{}}
	tun, err := New(Config{
		Identity: testIdentity(t, 1), Conn: n.conn("10.0.0.1:1"), Router: nd.routes, Handler: nd, Switch: wireSwitch{},
		Ports: []Port{newMemPort()}, TSO: true, PSKs: []PSK{pskOne},
	})
	if err != nil {
		t.Fatal(err)
	}
	tun.conn = tun.cfg.Conn
	ours, theirs := terms{own: 11, other: 22, aes: true}, terms{own: 22, other: 11, aes: true}
	k := newKeys(ours, theirs, [32]byte{1}, [32]byte{2})
	p := &peer{name: mesh.PeerName{2}}
	p.info.Store(&peerInfo{hello: router.Hello{Name: p.name}})
	tun.setPeers(func(m map[mesh.PeerName]*peer) { m[p.name] = p })
	tun.addKeys(p, k, time.Now())
	k.confirmed.Store(true)
	p.send.Store(k)
	r := newReceiver(tun)
	r.now = time.Now()
	return r, newKeys(theirs, ours, [32]byte{2}, [32]byte{1})
}

// What one forged datagram costs (C3: at most 3 µs).
func BenchmarkForged(b *testing.B) {
	r, other := testReceiver(b)
	good := make([]byte, 1500)
	size := other.sealAt(good, 1400, 5, &r.nonce)
	from := origin{addr: netip.MustParseAddrPort("10.0.0.66:6783")}
	b.Run("bad seal, 1400 bytes", func(b *testing.B) {
		d := make([]byte, size)
		b.ReportAllocs()
		for b.Loop() {
			copy(d, good[:size])
			d[100] ^= 1
			r.datagram(d, from)
		}
	})
	b.Run("replay", func(b *testing.B) {
		d := bytes.Clone(good[:size])
		r.datagram(d, from)
		b.ReportAllocs()
		for b.Loop() {
			copy(d, good[:size])
			r.datagram(d, from)
		}
	})
	b.Run("unknown session", func(b *testing.B) {
		d := bytes.Clone(good[:size])
		d[4] ^= 1
		b.ReportAllocs()
		for b.Loop() {
			r.datagram(d, from)
		}
	})
	b.Run("hello1, wrong password", func(b *testing.B) {
		d := newFlood(b, pskTwo).next()
		b.ReportAllocs()
		for b.Loop() {
			r.datagram(d, from)
		}
	})
	// Made beforehand, and answered to nowhere: what counts is the receiver's part.
	f := newFlood(b, pskOne)
	hellos := make([][]byte, 4096)
	for i := range hellos {
		hellos[i] = f.next()
	}
	r.t.conn = nullConn{}
	for _, x := range []struct {
		name string
		mac2 byte
	}{{"hello1, right MAC, under load", 0}, {"hello1, right MAC and an invented second one, under load", 1}} {
		b.Run(x.name, func(b *testing.B) {
			for _, d := range hellos {
				d[len(d)-1] = x.mac2
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				r.datagram(hellos[i%len(hellos)], from)
			}
		})
	}
	b.Run("noise", func(b *testing.B) {
		d := make([]byte, 1400)
		b.ReportAllocs()
		for b.Loop() {
			r.datagram(d, from)
		}
	})
}

// Frames in steady state cost no allocation, out or in.
func TestFramePathDoesNotAllocate(t *testing.T) {
	r, other := testReceiver(t)
	buf := frameSpec{partial: true, flags: tcpACK, payload: 1382}.build()
	frame := buf[vnetLen:]
	d := make([]byte, 1600)
	from := origin{addr: netip.MustParseAddrPort("10.0.0.2:6783")}
	counter := uint64(0)
	var nonce [nonceLen]byte
	r.join.write = func([]byte) {}
	in := testing.AllocsPerRun(200, func() {
		binary.BigEndian.PutUint16(d[dataHeaderLen:], uint16(len(frame))|framePartial)
		n := dataHeaderLen + frameLenLen + copy(d[dataHeaderLen+frameLenLen:], frame)
		n = other.sealAt(d, n, counter, &nonce)
		counter++
		r.datagram(d[:n], from)
		r.join.flush()
	})
	if in != 0 {
		t.Errorf("%v allocations to receive", in)
	}
	tun := r.t
	tun.conn = nullConn{}
	p := (*tun.peers.Load())[mesh.PeerName{2}]
	p.direct.Store(&path{addr: from.addr, via: p.name, mtu: 1472})
	pump := newPump(tun, tun.cfg.Ports[0])
	super := frameSpec{partial: true, flags: tcpACK, payload: 60000, gso: 1370}.build()
	address(super, p.name)
	address(buf, p.name)
	now := time.Now()
	out := testing.AllocsPerRun(100, func() {
		pump.frame(super, now)
		pump.frame(buf, now)
		pump.out.flush()
	})
	if out != 0 {
		t.Errorf("%v allocations to send", out)
	}
	if d := tun.Drops(); len(d) != 0 {
		t.Errorf("drops: %v", d)
	}
}

type nullConn struct{ Conn }

func (nullConn) Write([]byte, int, netip.AddrPort, bool) error { return nil }
