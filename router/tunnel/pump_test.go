package tunnel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// address makes a frame go to a peer: wireSwitch takes the destination address for its name.
func address(buf []byte, to mesh.PeerName) []byte {
	copy(buf[vnetLen:], to[:])
	return buf
}

// framePair links two nodes that exchange frames.
func framePair(t *testing.T, n *memNet, psks ...PSK) (a, b *node) {
	a = startNode(t, n, 1, "10.0.0.1:6783", password(psks...))
	b = startNode(t, n, 2, "10.0.0.2:6783", password(psks...))
	a.tun.Dial(b.conn.addr)
	until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
	return a, b
}

// Superframes, odd frames and tiny ones arrive as they were, in clear and sealed, direct and relayed.
func TestFramesArrive(t *testing.T) {
	for _, sealed := range []bool{false, true} {
		for _, relayed := range []bool{false, true} {
			t.Run(fmt.Sprintf("sealed=%v,relayed=%v", sealed, relayed), func(t *testing.T) {
				bubble(t, func(t *testing.T) []*node {
					n := newMemNet(1)
					var psks []PSK
					if sealed {
						psks = []PSK{pskOne}
					}
					a := startNode(t, n, 1, "10.0.0.1:6783", password(psks...))
					b := startNode(t, n, 2, "10.0.0.2:6783", password(psks...))
					m := startNode(t, n, 3, "10.0.0.3:6783", password(psks...))
					if relayed {
						line(t, a, m, b)
					} else {
						a.tun.Dial(b.conn.addr)
						until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
					}
					kinds := map[byte]int{}
					leaked := 0
					n.set(func() {
						n.sniff = func(_, _ netip.AddrPort, d []byte) {
							if d[0] == typeRelay {
								d = d[relayHeaderLen:]
							}
							kinds[d[0]]++
							if bytes.Contains(d, []byte{0x0e, 0x15, 0x1c, 0x23, 0x2a}) { // part of every test payload
								leaked++
							}
						}
					})
					other := make([]byte, vnetLen+200)
					other[vnetLen+12], other[vnetLen+50] = 0x99, 7
					var want [][]byte
					for i, buf := range [][]byte{
						frameSpec{partial: true, flags: tcpACK, payload: 100}.build(), // waits for the session
						frameSpec{partial: true, flags: tcpACK, payload: 60000, gso: 1370}.build(),
						frameSpec{partial: true, flags: tcpACK, payload: 30000, gso: 1350, v6: true}.build(),
						frameSpec{udp: true, partial: true, payload: 1000, gso: 100}.build(),
						frameSpec{udp: true, payload: 18}.build(),
						other,
					} {
						address(buf, b.name())
						want = append(want, append([]byte(nil), buf...))
						a.port.in <- buf
						wait(10 * time.Millisecond)
						if i == 0 {
							wait(time.Second)
						}
					}
					wait(100 * time.Millisecond)
					got := b.port.frames()
					if len(got) != len(want) {
						t.Fatalf("%d frames arrived of %d; drops %v", len(got), len(want), a.tun.Drops())
					}
					find := func(w []byte) bool {
						for _, g := range got {
							// headerLen is a hint that plain frames lack at the sender.
							putHeaderLen(g, parseVnet(w).headerLen)
							if bytes.Equal(g, w) {
								return true
							}
						}
						return false
					}
					for i, w := range want {
						if !find(w) {
							t.Errorf("frame %d did not arrive as it was", i)
						}
					}
					if sealed != (kinds[typeClear] == 0) || sealed != (leaked == 0) {
						t.Errorf("types seen: %v, payloads in clear: %d", kinds, leaked)
					}
					if got := m.port.frames(); len(got) != 0 {
						t.Errorf("%d frames at the relay", len(got))
					}
					for _, x := range []*node{a, b, m} {
						if d := x.tun.Drops(); len(d) != 0 {
							t.Errorf("drops: %v", d)
						}
					}
					s := statusOf(a, b)
					if s.Sealed != sealed || s.FramesOut == 0 || statusOf(b, a).FramesIn != s.FramesOut || statusOf(b, a).BytesIn != s.BytesOut {
						t.Errorf("status: %+v", s)
					}
					return []*node{a, b, m}
				})
			})
		}
	}
}

func putHeaderLen(buf []byte, n uint16) { binary.NativeEndian.PutUint16(buf[2:], n) }

// Tiny frames that wait together leave in few datagrams; a single one leaves at once.
func TestTinyFramesShare(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a, b := framePair(t, n, pskOne)
		datagrams := 0
		n.set(func() {
			n.sniff = func(from, _ netip.AddrPort, d []byte) {
				if from == a.conn.addr && len(d) > 100 && d[0] == typeData {
					datagrams++
				}
			}
		})
		for i := range 60 {
			a.port.in <- address(frameSpec{udp: true, partial: true, payload: 64 + i%3}.build(), b.name())
		}
		wait(20 * time.Millisecond)
		total := 0
		for _, f := range b.port.frames() {
			h := parseVnet(f)
			count := 1
			if h.gso == gsoUDP {
				p := mustParse(f[vnetLen:])
				count = (p.end - p.payload + int(h.gsoSize) - 1) / int(h.gsoSize)
			}
			total += count
		}
		if total != 60 || datagrams > 30 {
			t.Errorf("%d frames in %d datagrams", total, datagrams)
		}
		return []*node{a, b}
	})
}

// The queues of a port are read side by side: nothing is lost, no counter is used twice (the far side would
// take one for a replay), and each queue's frames keep their order.
func TestQueues(t *testing.T) {
	const queues, frames = 4, 200
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		ports := make([]*memPort, queues)
		a := startNode(t, n, 1, "10.0.0.1:6783", func(c *Config) {
			c.PSKs, c.Ports = []PSK{pskOne}, nil
			for i := range ports {
				ports[i] = newMemPort()
				c.Ports = append(c.Ports, ports[i])
			}
		})
		b := startNode(t, n, 2, "10.0.0.2:6783", password(pskOne))
		a.tun.Dial(b.conn.addr)
		until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
		ports[0].in <- address(frameSpec{partial: true, flags: tcpACK, payload: 100}.build(), b.name())
		wait(time.Second) // a session is there
		b.port.frames()
		for q, p := range ports {
			go func() {
				for i := range frames {
					f := address(make([]byte, vnetLen+200), b.name())
					f[vnetLen+12] = 0x99 // an EtherType that nobody joins
					f[vnetLen+20], f[vnetLen+21] = byte(q), byte(i)
					p.in <- f
				}
			}()
		}
		wait(time.Second)
		var next [queues]int
		for _, f := range b.port.frames() {
			q, i := f[vnetLen+20], f[vnetLen+21]
			if int(i) != next[q] {
				t.Fatalf("queue %d: frame %d arrived where %d was due", q, i, next[q])
			}
			next[q]++
		}
		for q, n := range next {
			if n != frames {
				t.Errorf("queue %d: %d of %d frames arrived", q, n, frames)
			}
		}
		for _, x := range []*node{a, b} {
			if d := x.tun.Drops(); len(d) != 0 {
				t.Errorf("drops: %v", d)
			}
		}
		return []*node{a, b}
	})
}

// The path shrinks to 1280 and 1000 with no ICMP, and grows again, while TCP superframes, full segments
// and large datagrams are sent (P11).
func TestPathShrinksUnderTraffic(t *testing.T) {
	for _, relayed := range []bool{false, true} {
		t.Run(fmt.Sprintf("relayed=%v", relayed), func(t *testing.T) {
			bubble(t, func(t *testing.T) []*node {
				n := newMemNet(1)
				n.delay = 10 * time.Millisecond
				a := startNode(t, n, 1, "10.0.0.1:6783", password(pskOne))
				b := startNode(t, n, 2, "10.0.0.2:6783", password(pskOne))
				m := startNode(t, n, 3, "10.0.0.3:6783", password(pskOne))
				if relayed {
					line(t, a, m, b)
				} else {
					a.tun.Dial(b.conn.addr)
					until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
				}
				seq := uint32(0)
				bytesArrived := func() (n int) {
					for _, f := range b.port.frames() {
						p := mustParse(f[vnetLen:])
						n += p.end - p.payload
					}
					return n
				}
				const chunk = 1370 * 8
				burst := func() (complete bool) {
					a.port.in <- address(frameSpec{partial: true, flags: tcpACK, seq: seq, payload: chunk, gso: 1370}.build(), b.name())
					seq += chunk
					wait(100 * time.Millisecond)
					return bytesArrived() == chunk
				}
				steady := func(what string, most time.Duration) {
					t.Helper()
					took := until(t, 20*time.Second, what, burst)
					for range 10 {
						if !burst() {
							t.Errorf("%s: not steady", what)
						}
					}
					t.Logf("%s: whole after %v, MTU %d", what, took, statusOf(a, b).MTU)
					if took > most {
						t.Errorf("%s: whole after %v", what, took)
					}
				}
				steady("start", time.Second)
				for _, mtu := range []int{1280, 1000} {
					n.set(func() { n.size = mtu - 28 })
					steady(fmt.Sprint(mtu), 3*time.Second)
					// A full segment alone, a datagram that may be fragmented, one that may not.
					for i, s := range []frameSpec{
						{partial: true, flags: tcpACK, payload: 1370, df: true},
						{udp: true, partial: true, payload: 1382},
						{udp: true, partial: true, payload: 1280 - 48, v6: true},
						{udp: true, partial: true, payload: 1382, df: true},
					} {
						a.port.in <- address(s.build(), b.name())
						wait(100 * time.Millisecond)
						toB, toA := b.port.frames(), a.port.frames()
						if told := i == 3; told != (len(toB) == 0) || told != (len(toA) == 1) {
							t.Errorf("MTU %d, case %d: %d frames there, %d back", mtu, i, len(toB), len(toA))
						}
					}
					if got := statusOf(a, b).MTU; got > mtu-28 || got < mtu-28-20-relayHeaderLen {
						t.Errorf("MTU %d: found %d", mtu, got)
					}
					if err := a.tun.Send(b.name(), make([]byte, MaxMessage)); err != nil {
						t.Error(err)
					}
					wait(100 * time.Millisecond)
					if got := b.got(); len(got) != 1 || len(got[0]) != MaxMessage {
						t.Errorf("MTU %d: a long message did not arrive", mtu)
					}
				}
				n.set(func() { n.size = 0 })
				took := until(t, 40*time.Second, "grown", func() bool { burst(); return statusOf(a, b).MTU >= 1472-relayHeaderLen })
				t.Logf("grown after %v", took)
				if d := append(a.took(router.LinkDown), b.took(router.LinkDown)...); len(d) != 0 {
					t.Errorf("link lost: %v", d[0].Err)
				}
				return []*node{a, b, m}
			})
		})
	}
}

// What was captured and comes again is not delivered (C1): in the window, behind it, after a rekey, after a
// restart. What was changed or invented is not either (C3).
func TestReplayedAndForged(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a, b := framePair(t, n, pskOne)
		var captured [][]byte
		n.set(func() {
			n.sniff = func(from, to netip.AddrPort, d []byte) {
				if from == a.conn.addr && to == b.conn.addr {
					captured = append(captured, d)
				}
			}
		})
		for i := range 9000 {
			a.port.in <- address(frameSpec{udp: true, payload: 30 + i%7}.build(), b.name())
			if i%50 == 0 {
				wait(time.Millisecond)
			}
		}
		wait(time.Second)
		n.set(func() { n.sniff = nil })
		if len(b.port.frames()) == 0 {
			t.Fatal("nothing arrived")
		}
		evil := n.conn("10.0.0.66:6783")
		inject := func(c *memConn, d []byte) { c.Write(d, len(d), b.conn.addr, false) }
		all := func(what string) {
			for i, d := range captured {
				inject(a.conn, d)
				if i%3 == 0 {
					inject(evil, d)
				}
				if i%500 == 0 {
					wait(10 * time.Millisecond)
				}
			}
			wait(100 * time.Millisecond)
			if got := b.port.frames(); len(got) != 0 {
				t.Errorf("%s: %d frames delivered again", what, len(got))
			}
			if !linked(a, b) || !linked(b, a) || b.tun.Links()[0].Addr != a.conn.addr {
				t.Errorf("%s: the link suffered", what)
			}
		}
		all("in the window")
		for i := range captured {
			d := append([]byte(nil), captured[i%len(captured)]...)
			d[i%len(d)] ^= byte(1 + i%255)
			binary.BigEndian.PutUint64(d[8:], binary.BigEndian.Uint64(d[8:])+1<<20)
			inject(evil, d)
			if i%500 == 0 {
				wait(10 * time.Millisecond)
			}
		}
		wait(100 * time.Millisecond)
		if got := b.port.frames(); len(got) != 0 {
			t.Errorf("%d forged frames delivered", len(got))
		}
		if d := b.tun.Drops(); d["forged"] == 0 || d["replay"] == 0 {
			t.Errorf("drops: %v", d)
		}
		wait(rekeyAge + 5*time.Second)
		all("after a rekey")
		b.kill()
		again := startNode(t, n, 2, "10.0.0.2:6783", password(pskOne))
		b = again
		until(t, 2*time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
		all("after a restart")
		return []*node{a, b}
	})
}

// Without a password, frames in clear are taken only with the session's tag and where both agreed.
func TestClearFrames(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a, b := framePair(t, n)
		var clear []byte
		n.set(func() {
			n.sniff = func(from, _ netip.AddrPort, d []byte) {
				if from == a.conn.addr && d[0] == typeClear {
					clear = d
				}
			}
		})
		a.port.in <- address(frameSpec{udp: true, payload: 30}.build(), b.name())
		wait(50 * time.Millisecond)
		if clear == nil || len(b.port.frames()) != 1 {
			t.Fatal("no frame in clear")
		}
		evil := n.conn("10.0.0.66:6783")
		forged := append([]byte(nil), clear...)
		forged[10] ^= 1
		evil.Write(forged, len(forged), b.conn.addr, false)
		wait(50 * time.Millisecond)
		if got := b.port.frames(); len(got) != 0 || b.tun.Drops()["forged"] != 1 {
			t.Errorf("%d frames, drops %v", len(got), b.tun.Drops())
		}
		// One of them wants everything sealed.
		c := startNode(t, n, 3, "10.0.0.3:6783", func(c *Config) { c.SealFrames = true })
		a.tun.Dial(c.conn.addr)
		until(t, time.Second, "link", func() bool { return linked(a, c) && linked(c, a) })
		clear = nil
		a.port.in <- address(frameSpec{udp: true, payload: 30}.build(), c.name())
		wait(50 * time.Millisecond)
		if clear != nil || len(c.port.frames()) != 1 || !statusOf(a, c).Sealed || !c.tun.Links()[0].Sealed {
			t.Errorf("not sealed: %+v", statusOf(a, c))
		}
		return []*node{a, b, c}
	})
}

// With a password, trusted networks go in clear only if both ends trust the other's address, and never
// by relay or after the peer has moved elsewhere.
func TestTrusted(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		trusting := func(c *Config) {
			c.PSKs, c.Trusted = []PSK{pskOne}, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}
		}
		a := startNode(t, n, 1, "10.0.0.1:6783", trusting)
		b := startNode(t, n, 2, "10.0.0.2:6783", trusting)
		c := startNode(t, n, 3, "10.0.0.3:6783", password(pskOne))
		for _, x := range []*node{b, c} {
			a.tun.Dial(x.conn.addr)
			until(t, time.Second, "link", func() bool { return linked(a, x) && linked(x, a) })
		}
		inClear := 0
		n.set(func() {
			n.sniff = func(_, _ netip.AddrPort, d []byte) {
				if d[0] == typeClear || d[0] == typeRelay && d[relayHeaderLen] == typeClear {
					inClear++
				}
			}
		})
		try := func(what string, to *node, want bool) {
			t.Helper()
			inClear = 0
			a.port.in <- address(frameSpec{udp: true, payload: 30}.build(), to.name())
			wait(50 * time.Millisecond)
			if (inClear > 0) != want || len(to.port.frames()) != 1 || statusOf(a, to).Sealed == want {
				t.Errorf("%s: %d in clear, want %v; status %+v", what, inClear, want, statusOf(a, to))
			}
		}
		try("both trust", b, true)
		try("one trusts", c, false)
		b.conn.moveTo("192.168.7.7:6783")
		until(t, 4*time.Second, "move", func() bool {
			for _, l := range a.tun.Links() {
				if l.Peer.Name == b.name() && l.Addr == b.conn.addr {
					return true
				}
			}
			return false
		})
		try("moved elsewhere", b, false)
		b.conn.moveTo("10.0.0.2:6783")
		until(t, 4*time.Second, "move", func() bool {
			return a.tun.Links()[0].Addr == b.conn.addr || a.tun.Links()[len(a.tun.Links())-1].Addr == b.conn.addr
		})
		b.tun.Dial(c.conn.addr)
		until(t, time.Second, "link", func() bool { return linked(b, c) && linked(c, b) })
		a.routes.set(b.name(), c.name())
		try("by relay", b, false)
		return []*node{a, b, c}
	})
}

// A frame in clear on a session with a password is dropped, whatever its tag.
func TestNoClearWithPassword(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a, b := framePair(t, n, pskOne)
		k := (*a.tun.peers.Load())[b.name()].send.Load()
		frame := frameSpec{udp: true, payload: 30}.build()[vnetLen:]
		d := make([]byte, dataHeaderLen)
		putDataHeader(d, typeClear, k.remote, 0)
		copy(d[8:], k.sendTag[:])
		d = append(binary.BigEndian.AppendUint16(d, uint16(len(frame))), frame...)
		a.conn.Write(d, len(d), b.conn.addr, false)
		wait(50 * time.Millisecond)
		if len(b.port.frames()) != 0 || b.tun.Drops()["clear"] != 1 {
			t.Errorf("drops: %v", b.tun.Drops())
		}
		return []*node{a, b}
	})
}
