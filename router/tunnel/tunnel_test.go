package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"meshd/router"
)

func TestTwoPeers(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a := startNode(t, n, 1, "10.0.0.1:6783", nil)
		b := startNode(t, n, 2, "10.0.0.2:6783", nil)
		a.tun.Dial(b.conn.addr)
		took := until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
		t.Logf("linked after %v", took)
		up := a.took(router.LinkUp)
		if len(up) != 1 || up[0].Link.Peer.Name != b.name() || up[0].Link.Addr != b.conn.addr || !up[0].Link.Outbound || up[0].Link.MTU != 1472 {
			t.Errorf("events: %+v", up)
		}
		if up[0].Link.Sealed {
			t.Error("sealed without a password")
		}
		if up := b.took(router.LinkUp); len(up) != 1 || up[0].Link.Outbound || up[0].Link.Peer.Key != a.tun.cfg.Identity.Public {
			t.Errorf("events: %+v", up)
		}
		for i := range 10 {
			if err := a.tun.Send(b.name(), fmt.Append(nil, "to b ", i)); err != nil {
				t.Error(err)
			}
			if err := b.tun.Send(a.name(), []byte(strings.Repeat("x", MaxMessage))); err != nil {
				t.Error(err)
			}
		}
		wait(100 * time.Millisecond)
		if got := b.got(); len(got) != 10 || got[3] != "to b 3" {
			t.Errorf("b got %q", got)
		}
		if got := a.got(); len(got) != 10 || len(got[0]) != MaxMessage {
			t.Errorf("a got %d messages", len(got))
		}
		if err := a.tun.Send(b.name(), make([]byte, MaxMessage+1)); !errors.Is(err, ErrTooLong) {
			t.Errorf("too long: %v", err)
		}
		for _, x := range []*node{a, b} {
			if d := x.tun.Drops(); len(d) != 0 {
				t.Errorf("drops: %v", d)
			}
		}
		b.stop()
		wait(50 * time.Millisecond)
		if down := a.took(router.LinkDown); len(down) != 1 || !errors.Is(down[0].Err, errLeft) {
			t.Errorf("goodbye: %+v", down)
		}
		return []*node{a}
	})
}

func password(psks ...PSK) func(*Config) { return func(c *Config) { c.PSKs = psks } }

var (
	pskOne = PSK{1, 2, 3}
	pskTwo = PSK{4, 5, 6}
)

// Only equal passwords meet; a stranger gets no answer at all.
func TestPasswords(t *testing.T) {
	for _, c := range []struct {
		name   string
		a, b   []PSK
		linked bool
	}{
		{"none", nil, nil, true},
		{"same", []PSK{pskOne}, []PSK{pskOne}, true},
		{"different", []PSK{pskOne}, []PSK{pskTwo}, false},
		{"only the dialler has one", []PSK{pskOne}, nil, false},
		{"only the listener has one", nil, []PSK{pskOne}, false},
		{"old one still in the listener's ring", []PSK{pskOne}, []PSK{pskTwo, pskOne}, true},
		{"none beside one", nil, []PSK{pskTwo, {}}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) []*node {
				n := newMemNet(1)
				a := startNode(t, n, 1, "10.0.0.1:6783", password(c.a...))
				b := startNode(t, n, 2, "10.0.0.2:6783", password(c.b...))
				answers := 0
				n.set(func() {
					n.sniff = func(from, _ netip.AddrPort, _ []byte) {
						if from == b.conn.addr {
							answers++
						}
					}
				})
				a.tun.Dial(b.conn.addr)
				wait(6 * time.Second)
				if linked(a, b) != c.linked || linked(b, a) != c.linked {
					t.Fatalf("linked: %v, %v, want %v", linked(a, b), linked(b, a), c.linked)
				}
				if c.linked {
					if up := a.took(router.LinkUp); len(up) != 1 || up[0].Link.Sealed != (c.a != nil) {
						t.Errorf("events: %+v", up)
					}
					return []*node{a, b}
				}
				if failed := a.took(router.LinkDialFailed); len(failed) != 1 || failed[0].Link.Addr != b.conn.addr || !errors.Is(failed[0].Err, ErrNoAnswer) {
					t.Errorf("events: %+v", failed)
				}
				if answers != 0 {
					t.Errorf("%d answers to a stranger", answers)
				}
				if d := b.tun.Drops(); d["mac"] == 0 || len(d) != 1 {
					t.Errorf("drops: %v", d)
				}
				return []*node{a, b}
			})
		})
	}
}

func TestRefusals(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a := startNode(t, n, 1, "10.0.0.1:6783", nil)
		b := startNode(t, n, 2, "10.0.0.2:6783", func(c *Config) {
			c.Accept = func(h router.Hello, _ netip.AddrPort) error {
				if h.NickName == "hostb" {
					return errors.New("another cluster")
				}
				return nil
			}
		})
		refused := func(x *node, addr netip.AddrPort, text string) {
			t.Helper()
			x.took(0)
			x.tun.Dial(addr)
			wait(time.Second)
			f := x.took(router.LinkDialFailed)
			if len(f) != 1 || f[0].Link.Addr != addr || !strings.Contains(f[0].Err.Error(), text) {
				t.Errorf("dial %v: %+v, want %q", addr, f, text)
			}
		}
		refused(a, b.conn.addr, "another cluster")
		refused(b, a.conn.addr, "another cluster")
		refused(a, a.conn.addr, "itself")
		refused(a, netip.AddrPort{}, "no address")
		if len(a.tun.Links())+len(b.tun.Links()) != 0 {
			t.Error("linked in spite of it")
		}
		clone := startNode(t, n, 1, "10.0.0.3:6783", nil)
		refused(clone, a.conn.addr, "same key")
		twin := startNode(t, n, 3, "10.0.0.4:6783", func(c *Config) { c.Hello.Name = a.name() })
		refused(twin, a.conn.addr, "--name")
		refused(a, twin.conn.addr, "--name")
		// Two of one name meet at a third.
		third := startNode(t, n, 4, "10.0.0.5:6783", nil)
		a.tun.Dial(third.conn.addr)
		until(t, time.Second, "link", func() bool { return linked(a, third) && linked(third, a) })
		refused(twin, third.conn.addr, "another key")
		refused(third, twin.conn.addr, "another key")
		if !linked(third, a) {
			t.Error("the first of the two lost its link")
		}
		// When the first is gone the name is free.
		a.kill()
		wait(11 * time.Second)
		twin.tun.Dial(third.conn.addr)
		until(t, time.Second, "link", func() bool { return linked(twin, third) })
		return []*node{b, clone, twin, third}
	})
}

// Both dial each other at the same moment, with datagrams out of order: one session on both sides.
func TestSimultaneousDial(t *testing.T) {
	for seed := range uint64(20) {
		bubble(t, func(t *testing.T) []*node {
			n := newMemNet(seed)
			n.jitter = 5 * time.Millisecond
			a := startNode(t, n, 1, "10.0.0.1:6783", password(pskOne))
			b := startNode(t, n, 2, "10.0.0.2:6783", password(pskOne))
			a.tun.Dial(b.conn.addr)
			b.tun.Dial(a.conn.addr)
			until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
			wait(6 * time.Second)
			for _, x := range []*node{a, b} {
				x.mu.Lock()
				ups, rest := 0, 0
				for _, ev := range x.events {
					if ev.State == router.LinkUp {
						ups++
					} else if ev.State != router.LinkChanged {
						rest++
					}
				}
				x.mu.Unlock()
				if ups != 1 || rest != 0 {
					t.Errorf("seed %d: %d LinkUp, %d others", seed, ups, rest)
				}
			}
			ka, kb := (*a.tun.peers.Load())[b.name()].send.Load(), (*b.tun.peers.Load())[a.name()].send.Load()
			if ka.local != kb.remote || kb.local != ka.remote {
				t.Errorf("seed %d: they send with different keys", seed)
			}
			return []*node{a, b}
		})
	}
}

// One in five datagrams is lost for an hour: the link comes up, and flaps less than once per hour and peer.
func TestLossyHour(t *testing.T) {
	seeds, flaps := 3, 0
	if os.Getenv("MESHD_LONG") != "" {
		seeds = 50
	}
	for seed := range uint64(seeds) {
		bubble(t, func(t *testing.T) []*node {
			n := newMemNet(seed)
			n.loss, n.delay, n.jitter, n.repeat = 0.2, 100*time.Millisecond, 20*time.Millisecond, 0.01
			a := startNode(t, n, 1, "10.0.0.1:6783", password(pskOne))
			b := startNode(t, n, 2, "10.0.0.2:6783", password(pskOne))
			a.tun.Dial(b.conn.addr)
			until(t, 5*time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
			wait(time.Hour)
			d := a.took(router.LinkDown)
			flaps += len(d)
			if len(d) > 0 {
				t.Logf("seed %d: %d flaps, first: %v", seed, len(d), d[0].Err)
				return []*node{a, b}
			}
			if !linked(a, b) || !linked(b, a) {
				t.Errorf("seed %d: not linked any more", seed)
			}
			t.Logf("seed %d: %d datagrams carried in an hour", seed, n.carried)
			return []*node{a, b}
		})
	}
	if flaps*2 > seeds {
		t.Errorf("%d flaps in %d hours", flaps, seeds)
	}
}

// A peer that falls silent is dead after almost three seconds, not before, and is found again by a dial.
func TestSilence(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a := startNode(t, n, 1, "10.0.0.1:6783", nil)
		b := startNode(t, n, 2, "10.0.0.2:6783", nil)
		a.tun.Dial(b.conn.addr)
		until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
		wait(5 * time.Second)
		n.cutBoth(a.conn, b.conn, true)
		took := until(t, 4*time.Second, "link down", func() bool { return !linked(a, b) && !linked(b, a) })
		t.Logf("declared dead after %v", took)
		if took < deadAfter-heartbeatLate {
			t.Errorf("dead after %v", took)
		}
		if d := a.took(router.LinkDown); len(d) != 1 || !errors.Is(d[0].Err, errDead) {
			t.Errorf("events: %+v", d)
		}
		n.cutBoth(a.conn, b.conn, false)
		b.tun.Dial(a.conn.addr)
		until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
		return []*node{a, b}
	})
}

// One way only is no link: both sides agree on that.
func TestOneWay(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a := startNode(t, n, 1, "10.0.0.1:6783", nil)
		b := startNode(t, n, 2, "10.0.0.2:6783", nil)
		a.tun.Dial(b.conn.addr)
		until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
		n.set(func() { n.cut[[2]netip.AddrPort{a.conn.addr, b.conn.addr}] = true })
		took := until(t, 4500*time.Millisecond, "link down on both sides", func() bool { return !linked(a, b) && !linked(b, a) })
		t.Logf("given up after %v", took)
		wait(10 * time.Second)
		if linked(a, b) || linked(b, a) {
			t.Error("came back one way")
		}
		return []*node{a, b}
	})
}

// kill -9 and a new start at the same address: traffic resumes within a second, whoever speaks first.
func TestRestart(t *testing.T) {
	for _, sealed := range []bool{false, true} {
		bubble(t, func(t *testing.T) []*node {
			var psks []PSK
			if sealed {
				psks = []PSK{pskOne}
			}
			n := newMemNet(1)
			a := startNode(t, n, 1, "10.0.0.1:6783", password(psks...))
			b := startNode(t, n, 2, "10.0.0.2:6783", password(psks...))
			a.tun.Dial(b.conn.addr)
			until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
			wait(3 * time.Second)
			b.kill()
			wait(500 * time.Millisecond)
			a.took(0)
			again := startNode(t, n, 2, "10.0.0.2:6783", password(psks...))
			took := until(t, 2*time.Second, "message", func() bool {
				a.tun.Send(again.name(), []byte("hello"))
				return len(again.got()) > 0
			})
			t.Logf("resumed after %v", took)
			if took > time.Second {
				t.Errorf("resumed after %v", took)
			}
			until(t, time.Second, "link", func() bool { return linked(a, again) && linked(again, a) })
			a.mu.Lock()
			var states []router.LinkState
			for _, ev := range a.events {
				states = append(states, ev.State)
			}
			a.mu.Unlock()
			if len(states) != 2 || states[0] != router.LinkDown || states[1] != router.LinkUp {
				t.Errorf("events: %v", states)
			}
			return []*node{a, again}
		})
	}
}

// A cloned disk: the first run comes back to where the second took its place, and stays; the second is
// told why it may not. It may once the first is gone.
func TestCloneOfALivePeer(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		third := startNode(t, n, 4, "10.0.0.5:6783", nil)
		first := startNode(t, n, 1, "10.0.0.1:6783", nil)
		second := startNode(t, n, 1, "10.0.0.2:6783", nil)
		keepDialling := func(x *node) bool {
			x.tun.Dial(third.conn.addr)
			wait(500 * time.Millisecond)
			return linked(x, third)
		}
		until(t, 2*time.Second, "link of the first", func() bool { return keepDialling(first) })
		until(t, 2*time.Second, "link of the second", func() bool { return keepDialling(second) })
		until(t, 15*time.Second, "the first again", func() bool { return keepDialling(first) })
		second.took(0)
		for range 20 {
			keepDialling(second)
		}
		failures := second.took(router.LinkDialFailed)
		if len(failures) == 0 || !strings.Contains(failures[len(failures)-1].Err.Error(), "cloned disk") {
			t.Errorf("the second hears %+v", failures)
		}
		if !linked(first, third) || !linked(third, first) {
			t.Error("the first lost its link to the second")
		}
		first.kill()
		wait(11 * time.Second)
		until(t, 2*time.Second, "link of the second", func() bool { return keepDialling(second) })
		return []*node{second, third}
	})
}

func TestHangup(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a := startNode(t, n, 1, "10.0.0.1:6783", nil)
		b := startNode(t, n, 2, "10.0.0.2:6783", nil)
		a.tun.Dial(b.conn.addr)
		until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
		a.tun.Hangup(b.name(), "no longer wanted")
		wait(100 * time.Millisecond)
		if linked(a, b) || linked(b, a) {
			t.Error("still linked")
		}
		if d := b.took(router.LinkDown); len(d) != 1 || !strings.Contains(d[0].Err.Error(), "no longer wanted") {
			t.Errorf("events: %+v", d)
		}
		wait(10 * time.Second)
		if linked(a, b) || linked(b, a) {
			t.Error("linked again by itself")
		}
		b.tun.Dial(a.conn.addr)
		until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
		return []*node{a, b}
	})
}

// A peer's address changes, with traffic or without: the link follows.
func TestRoaming(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a := startNode(t, n, 1, "10.0.0.1:6783", password(pskOne))
		b := startNode(t, n, 2, "10.0.0.2:6783", password(pskOne))
		a.tun.Dial(b.conn.addr)
		until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
		wait(2 * time.Second)
		a.conn.moveTo("10.9.9.9:4000")
		took := until(t, 3*time.Second, "new address", func() bool {
			l := b.tun.Links()
			return len(l) == 1 && l[0].Addr == a.conn.addr
		})
		t.Logf("followed after %v", took)
		b.tun.Send(a.name(), []byte("found you"))
		wait(100 * time.Millisecond)
		if got := a.got(); len(got) != 1 {
			t.Errorf("got %q", got)
		}
		wait(5 * time.Second)
		if d := append(a.took(router.LinkDown), b.took(router.LinkDown)...); len(d) != 0 {
			t.Errorf("link lost: %v", d[0].Err)
		}
		return []*node{a, b}
	})
}

// line links nodes in a row and sets their routes along it.
func line(t *testing.T, nodes ...*node) {
	t.Helper()
	for i := range nodes[:len(nodes)-1] {
		nodes[i].tun.Dial(nodes[i+1].conn.addr)
	}
	for i, x := range nodes {
		for j, y := range nodes {
			switch {
			case j > i:
				x.routes.set(y.name(), nodes[i+1].name())
			case j < i:
				x.routes.set(y.name(), nodes[i-1].name())
			}
		}
	}
	for i := range nodes[:len(nodes)-1] {
		until(t, time.Second, "link", func() bool { return linked(nodes[i], nodes[i+1]) && linked(nodes[i+1], nodes[i]) })
	}
}

// Over one relay and over two: messages both ways, sealed end to end, and nothing in the middle's hands.
func TestRelay(t *testing.T) {
	for _, middles := range []int{1, 2} {
		t.Run(fmt.Sprint(middles), func(t *testing.T) {
			bubble(t, func(t *testing.T) []*node {
				n := newMemNet(1)
				var nodes []*node
				for i := range middles + 2 {
					nodes = append(nodes, startNode(t, n, byte(i+1), fmt.Sprintf("10.0.0.%d:6783", i+1), password(pskOne)))
				}
				line(t, nodes...)
				a, z := nodes[0], nodes[len(nodes)-1]
				if err := a.tun.Send(z.name(), []byte("first")); err != nil {
					t.Fatal(err)
				}
				took := until(t, time.Second, "message", func() bool { return len(z.got()) == 1 })
				t.Logf("first message after %v", took)
				z.tun.Send(a.name(), []byte(strings.Repeat("y", MaxMessage)))
				wait(50 * time.Millisecond)
				if got := a.got(); len(got) != 1 || len(got[0]) != MaxMessage {
					t.Errorf("a got %d messages", len(got))
				}
				for _, m := range nodes[1 : len(nodes)-1] {
					if got := m.got(); len(got) != 0 {
						t.Errorf("a relay read %q", got)
					}
				}
				wait(2 * time.Second)
				s := statusOf(a, z)
				if s.Path != "relay" || s.Via != nodes[1].name() || !s.Sealed || s.Why == "" || s.RTT == 0 || s.MTU != 1472-relayHeaderLen {
					t.Errorf("status: %+v", s)
				}
				for _, x := range nodes {
					if d := x.tun.Drops(); len(d) != 0 {
						t.Errorf("drops: %v", d)
					}
				}
				return nodes
			})
		})
	}
}

func statusOf(a, b *node) Status {
	for _, s := range a.tun.Sessions() {
		if s.Peer.Name == b.name() {
			return s
		}
	}
	return Status{}
}

// From a relay to a direct link and back under traffic: the keys go on, nothing is lost that was not on
// the way over the path that died.
func TestRelayToDirectAndBack(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a := startNode(t, n, 1, "10.0.0.1:6783", password(pskOne))
		m := startNode(t, n, 2, "10.0.0.2:6783", password(pskOne))
		z := startNode(t, n, 3, "10.0.0.3:6783", password(pskOne))
		line(t, a, m, z)
		a.tun.Send(z.name(), []byte("start"))
		until(t, time.Second, "message", func() bool { return len(z.got()) == 1 })
		sent := 0
		traffic := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end); {
				if a.tun.Send(z.name(), []byte("x")) == nil {
					sent++
				}
				wait(5 * time.Millisecond)
			}
		}
		traffic(time.Second)
		a.tun.Dial(z.conn.addr)
		traffic(time.Second)
		a.routes.set(z.name(), z.name())
		z.routes.set(a.name(), a.name())
		traffic(time.Second)
		if s := statusOf(a, z); s.Path != "direct" {
			t.Errorf("status: %+v", s)
		}
		a.tun.Hangup(z.name(), "test")
		a.routes.set(z.name(), m.name())
		z.routes.set(a.name(), m.name())
		traffic(time.Second)
		wait(100 * time.Millisecond)
		if s := statusOf(a, z); s.Path != "relay" {
			t.Errorf("status: %+v", s)
		}
		if got := len(z.got()); got != sent {
			t.Errorf("sent %d, received %d", sent, got)
		}
		return []*node{a, m, z}
	})
}

// Nobody forwards for strangers, without end, or back to where it came from.
func TestRelayRefuses(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a := startNode(t, n, 1, "10.0.0.1:6783", nil)
		m := startNode(t, n, 2, "10.0.0.2:6783", nil)
		z := startNode(t, n, 3, "10.0.0.3:6783", nil)
		line(t, a, m, z)
		stranger := n.conn("10.0.0.66:6783")
		datagram := func(hops byte, to, from *node) []byte {
			b := make([]byte, relayHeaderLen+40)
			putRelayHeader(b, hops, to.name(), from.name())
			b[relayHeaderLen] = typeData
			return b
		}
		send := func(c *memConn, b []byte) {
			c.Write(b, len(b), m.conn.addr, false)
			wait(10 * time.Millisecond)
		}
		before := z.tun.Drops()["session"]
		send(stranger, datagram(3, z, a))
		send(a.conn, datagram(0, z, a))
		send(a.conn, datagram(200, z, a))
		send(a.conn, datagram(3, a, z))
		nested := datagram(3, z, a)
		nested[relayHeaderLen] = typeRelay
		send(a.conn, nested)
		send(a.conn, datagram(3, z, a)[:relayHeaderLen])
		d := m.tun.Drops()
		if d["relay_source"] != 1 || d["relay_hops"] != 2 || d["relay_route"] != 1 || d["type"] != 2 || z.tun.Drops()["session"] != before {
			t.Errorf("drops: %v", d)
		}
		// A relay that counts more links than its sender: one more is let pass, two are not.
		far := testIdentity(t, 9).Name()
		m.routes.set(far, z.name())
		for _, left := range []byte{1, 2} {
			b := datagram(left, z, a)
			copy(b[2:8], far[:])
			send(a.conn, b)
			if got := m.tun.Drops()["relay_stray"]; got != 1 {
				t.Errorf("%d links left of 2: %d strays", left, got)
			}
		}
		// Two relays that send it to each other for ever.
		m.routes.set(z.name(), a.name())
		a.routes.set(z.name(), m.name())
		carried := n.carried
		send(a.conn, datagram(8, z, a))
		if extra := n.carried - carried; extra > 40 {
			t.Errorf("%d datagrams for one", extra)
		}
		return []*node{a, m, z}
	})
}

// Ten minutes of messages while keys are made anew every two: none is lost.
func TestRekeyLosesNothing(t *testing.T) {
	for _, loss := range []float64{0, 0.2} {
		bubble(t, func(t *testing.T) []*node {
			n := newMemNet(5)
			n.delay, n.jitter = 20*time.Millisecond, 10*time.Millisecond
			a := startNode(t, n, 1, "10.0.0.1:6783", password(pskOne))
			b := startNode(t, n, 2, "10.0.0.2:6783", password(pskOne))
			a.tun.Dial(b.conn.addr)
			until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
			// Only handshakes are lost.
			n.set(func() { n.loseHello = loss })
			used := map[uint32]bool{}
			sent := 0
			for end := time.Now().Add(10 * time.Minute); time.Now().Before(end); {
				a.tun.Send(b.name(), []byte("x"))
				b.tun.Send(a.name(), []byte("x"))
				sent++
				wait(20 * time.Millisecond)
				used[(*a.tun.peers.Load())[b.name()].send.Load().local] = true
			}
			wait(time.Second)
			if x, y := len(a.got()), len(b.got()); x != sent || y != sent {
				t.Errorf("sent %d each way, received %d and %d", sent, y, x)
			}
			if len(used) < 4 || len(used) > 8 {
				t.Errorf("%d keys in ten minutes", len(used))
			}
			if d := append(a.took(router.LinkDown), b.took(router.LinkDown)...); len(d) != 0 {
				t.Errorf("link lost: %v", d[0].Err)
			}
			if loss == 0 {
				for _, x := range []*node{a, b} {
					if d := x.tun.Drops(); len(d) != 0 {
						t.Errorf("drops: %v", d)
					}
				}
			}
			return []*node{a, b}
		})
	}
}

// A session that cannot be renewed ends after three minutes; nothing is sealed with old keys after that.
func TestHardStop(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(5)
		a := startNode(t, n, 1, "10.0.0.1:6783", password(pskOne))
		b := startNode(t, n, 2, "10.0.0.2:6783", password(pskOne))
		a.tun.Dial(b.conn.addr)
		until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
		n.set(func() { n.loseHello = 1 })
		wait(deadAge + time.Second)
		n.set(func() {
			n.sniff = func(_, _ netip.AddrPort, b []byte) {
				if b[0] == typeData {
					t.Errorf("sealed with dead keys")
				}
			}
		})
		a.tun.Send(b.name(), []byte("late"))
		wait(time.Second)
		n.set(func() { n.sniff, n.loseHello = nil, 0 })
		if len(b.got()) != 0 {
			t.Error("received with dead keys")
		}
		a.tun.Dial(b.conn.addr)
		until(t, 2*time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
		return []*node{a, b}
	})
}

// Counters near their limits (C5): new keys in time, and never a number twice.
func TestCounterLimits(t *testing.T) {
	for _, start := range []uint64{1<<32 - 10, rekeyCount - 10, deadCount - 1500} {
		bubble(t, func(t *testing.T) []*node {
			n := newMemNet(5)
			a := startNode(t, n, 1, "10.0.0.1:6783", password(pskOne))
			b := startNode(t, n, 2, "10.0.0.2:6783", password(pskOne))
			a.tun.Dial(b.conn.addr)
			until(t, time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
			k := (*a.tun.peers.Load())[b.name()].send.Load()
			seen := map[[2]uint64]bool{}
			n.set(func() {
				n.sniff = func(from, _ netip.AddrPort, d []byte) {
					if from != a.conn.addr || d[0] != typeData {
						return
					}
					id := [2]uint64{uint64(binary.BigEndian.Uint32(d[4:])), binary.BigEndian.Uint64(d[8:])}
					if seen[id] || id[1] >= deadCount {
						t.Errorf("start %d: counter %d used twice, or too high", start, id[1])
					}
					seen[id] = true
				}
			})
			k.counter.Store(start)
			for range 1000 {
				a.tun.Send(b.name(), []byte("x"))
				wait(time.Millisecond)
			}
			wait(100 * time.Millisecond)
			if got := len(b.got()); got != 1000 {
				t.Errorf("start %d: received %d of 1000", start, got)
			}
			renewed := (*a.tun.peers.Load())[b.name()].send.Load() != k
			if renewed != (start >= rekeyCount-10) {
				t.Errorf("start %d: renewed %v", start, renewed)
			}
			return []*node{a, b}
		})
	}
}

func TestCounterNeverWraps(t *testing.T) {
	k := &keys{}
	k.counter.Store(deadCount - 3)
	if first, err := k.reserve(2); err != nil || first != deadCount-3 {
		t.Errorf("got %d, %v", first, err)
	}
	for range 100_000 {
		if c, err := k.reserve(64); err == nil {
			t.Fatalf("counter %d given out", c)
		}
	}
	if c := k.counter.Load(); c >= deadCount {
		t.Errorf("counter went to %d", c)
	}
}

// The password ring is turned under traffic: add, use, remove, one peer after the other; and in the middle of it a
// peer that knows the new password comes back from the dead (M8).
func TestPasswordRotation(t *testing.T) {
	peers, rotations := 4, 10
	if os.Getenv("MESHD_LONG") != "" {
		peers, rotations = 16, 50
	}
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(5)
		quiet := func(ring []PSK) func(*Config) {
			return func(c *Config) { c.PSKs, c.Log = ring, slog.New(slog.DiscardHandler) }
		}
		var all []*node
		start := func(i int, ring []PSK) *node {
			x := startNode(t, n, byte(i+1), fmt.Sprintf("10.0.0.%d:6783", i+1), quiet(ring))
			for _, y := range all[:min(i, len(all))] {
				x.tun.Dial(y.conn.addr)
			}
			return x
		}
		meshed := func(who []*node) bool {
			for _, x := range who {
				for _, y := range who {
					if x != y && !linked(x, y) {
						return false
					}
				}
			}
			return true
		}
		for i := range peers {
			all = append(all, start(i, []PSK{pskOne}))
		}
		until(t, 5*time.Second, "full mesh", func() bool { return meshed(all) })
		last := peers - 1 // it is the one that dies
		sent := 0         // by each to each
		traffic := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end); sent++ {
				for _, x := range all[:last] {
					for _, y := range all[:last] {
						if x != y {
							x.tun.Send(y.name(), []byte("x"))
						}
					}
				}
				wait(50 * time.Millisecond)
			}
		}
		from, to, worst := pskOne, pskTwo, time.Duration(0)
		for r := range rotations {
			for step, ring := range [][]PSK{{from, to}, {to, from}, {to}} {
				for _, x := range all {
					x.tun.SetPSKs(ring)
					traffic(300 * time.Millisecond)
				}
				if step == r%3 {
					all[last].kill()
					traffic(500 * time.Millisecond)
					all[last] = start(last, ring)
					back := time.Now()
					for !meshed(all) {
						if time.Since(back) > 5*time.Second {
							t.Fatalf("rotation %d, step %d: no full mesh with the new peer", r, step)
						}
						traffic(50 * time.Millisecond)
					}
					worst = max(worst, time.Since(back))
				}
			}
			traffic(retireGrace + 2*time.Second)
			from, to = to, from
		}
		wait(time.Second)
		for i, x := range all[:last] {
			if got, want := len(x.got()), sent*(last-1); got != want {
				t.Errorf("peer %d: %d of %d messages", i+1, got, want)
			}
			for _, ev := range x.took(router.LinkDown) {
				if ev.Link.Peer.Name != all[last].name() {
					t.Errorf("peer %d: link to %v lost: %v", i+1, ev.Link.Peer.Name, ev.Err)
				}
			}
		}
		t.Logf("%d peers, %d rotations: %d messages between each two; who came back was there after %v at most", peers, rotations, sent, worst)
		// The one who keeps to a removed password is out after the grace time.
		a, b := all[0], all[1]
		a.tun.SetPSKs([]PSK{{9}})
		wait(retireGrace + 8*time.Second)
		if linked(a, b) || linked(b, a) {
			t.Error("linked with a removed password")
		}
		return all
	})
}

// A peer behind a relay is restarted: the other end learns of it by a hint through the relay.
func TestRestartBehindRelay(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a := startNode(t, n, 1, "10.0.0.1:6783", password(pskOne))
		m := startNode(t, n, 2, "10.0.0.2:6783", password(pskOne))
		z := startNode(t, n, 3, "10.0.0.3:6783", password(pskOne))
		line(t, a, m, z)
		a.tun.Send(z.name(), []byte("first"))
		until(t, time.Second, "message", func() bool { return len(z.got()) == 1 })
		wait(2 * time.Second)
		z.kill()
		wait(time.Second)
		again := startNode(t, n, 3, "10.0.0.3:6783", password(pskOne))
		again.routes.set(a.name(), m.name())
		again.tun.Dial(m.conn.addr)
		until(t, time.Second, "link", func() bool { return linked(m, again) && linked(again, m) })
		took := until(t, 3*time.Second, "message", func() bool {
			a.tun.Send(again.name(), []byte("again"))
			return len(again.got()) > 0
		})
		t.Logf("resumed after %v", took)
		if took > time.Second {
			t.Errorf("resumed after %v", took)
		}
		return []*node{a, m, again}
	})
}

// The interface's own MTU is lowered under a running link, and raised again.
func TestInterfaceMTUChanges(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a, b := framePair(t, n, pskOne)
		wait(2 * time.Second)
		seq := uint32(0)
		burst := func() bool {
			a.port.in <- address(frameSpec{partial: true, flags: tcpACK, seq: seq, payload: 1370 * 8, gso: 1370}.build(), b.name())
			seq += 1370 * 8
			wait(20 * time.Millisecond)
			got := 0
			for _, f := range b.port.frames() {
				p := mustParse(f[vnetLen:])
				got += p.end - p.payload
			}
			return got == 1370*8
		}
		if !burst() {
			t.Fatal("not whole at first")
		}
		n.set(func() { n.refuse, n.ifMTU = 1280-28, 1280 })
		took := until(t, 3*time.Second, "whole again", burst)
		t.Logf("whole after %v", took)
		if took > 500*time.Millisecond {
			t.Errorf("whole after %v", took)
		}
		if s := statusOf(a, b); s.MTU > 1252 || s.MTU < 1252-searchStep {
			t.Errorf("MTU %d", s.MTU)
		}
		n.set(func() { n.refuse, n.ifMTU = 0, 1500 })
		took = until(t, 10*time.Second, "full size", func() bool { return statusOf(a, b).MTU == 1472 })
		t.Logf("full size after %v", took)
		changed := a.took(router.LinkChanged)
		if len(changed) == 0 || changed[len(changed)-1].Link.MTU > 1472 {
			t.Errorf("events: %+v", changed)
		}
		return []*node{a, b}
	})
}

// Errors of the socket are counted and do not stop anything.
func TestSocketErrors(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a, b := framePair(t, n, pskOne)
		for _, c := range []struct {
			err  error
			want string
		}{{errFull, "send_full"}, {errors.New("operation not permitted"), "send_error"}, {errTooLarge, "send_size"}} {
			n.set(func() { n.fail = c.err })
			for range 20 {
				a.port.in <- address(frameSpec{udp: true, payload: 100}.build(), b.name())
				a.tun.Send(b.name(), []byte("x"))
			}
			wait(50 * time.Millisecond)
			n.set(func() { n.fail = nil })
			if d := a.tun.Drops(); d[c.want] == 0 {
				t.Errorf("%v: drops %v", c.err, d)
			}
		}
		wait(5 * time.Second)
		b.port.frames()
		b.got()
		a.port.in <- address(frameSpec{udp: true, payload: 100}.build(), b.name())
		a.tun.Send(b.name(), []byte("x"))
		wait(50 * time.Millisecond)
		if len(b.port.frames()) != 1 || len(b.got()) != 1 {
			t.Error("does not work any more")
		}
		return []*node{a, b}
	})
}

// A port that fails for a while is counted, named once in the log, and used again.
func TestPortFails(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		n := newMemNet(1)
		a, b := framePair(t, n)
		a.port.fail(errors.New("file descriptor in bad state"))
		b.port.fail(errors.New("no buffer space"))
		a.port.in <- address(frameSpec{udp: true, payload: 10}.build(), b.name()) // ends the read that waits
		wait(3 * time.Second)
		if n := a.tun.Drops()["port"]; n < 2 || n > 5 {
			t.Errorf("%d failed reads", n)
		}
		if b.tun.Drops()["port"] != 1 {
			t.Errorf("drops: %v", b.tun.Drops())
		}
		a.port.fail(nil)
		b.port.fail(nil)
		wait(2 * time.Second)
		a.port.in <- address(frameSpec{udp: true, payload: 10}.build(), b.name())
		wait(50 * time.Millisecond)
		if len(b.port.frames()) != 1 {
			t.Error("not used again")
		}
		return []*node{a, b}
	})
}
