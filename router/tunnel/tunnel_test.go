package tunnel

import (
	"errors"
	"fmt"
	"net/netip"
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

// One in five datagrams is lost for an hour: the link comes up and stays.
func TestLossyHour(t *testing.T) {
	bubble(t, func(t *testing.T) []*node {
		const seed = 11
		n := newMemNet(seed)
		n.loss, n.delay, n.jitter, n.repeat = 0.2, 50*time.Millisecond, 20*time.Millisecond, 0.01
		a := startNode(t, n, 1, "10.0.0.1:6783", password(pskOne))
		b := startNode(t, n, 2, "10.0.0.2:6783", password(pskOne))
		a.tun.Dial(b.conn.addr)
		until(t, 4*time.Second, "link", func() bool { return linked(a, b) && linked(b, a) })
		wait(time.Hour)
		if d := append(a.took(router.LinkDown), b.took(router.LinkDown)...); len(d) != 0 {
			t.Errorf("seed %d: %d flaps in an hour, first: %v", seed, len(d), d[0].Err)
		}
		if !linked(a, b) || !linked(b, a) {
			t.Error("not linked any more")
		}
		t.Logf("seed %d: %d datagrams carried in an hour", seed, n.carried)
		return []*node{a, b}
	})
}

// A peer that falls silent is dead after three seconds, not before, and is found again by a dial.
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
		if took < 1900*time.Millisecond {
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
		took := until(t, 7*time.Second, "link down on both sides", func() bool { return !linked(a, b) && !linked(b, a) })
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
