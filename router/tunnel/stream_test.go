package tunnel

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"meshd/mesh"
	"meshd/router"
)

// loopNode is a Tunnel on a loopback address of its own.
type loopNode struct {
	tun    *Tunnel
	up     chan struct{}
	cancel context.CancelFunc
	done   chan error
}

func (l *loopNode) Link(ev router.LinkEvent) {
	if ev.State == router.LinkUp {
		l.up <- struct{}{}
	}
}
func (l *loopNode) Message(mesh.PeerName, []byte) {}

func startLoop(t *testing.T, seed byte, addr string, psks ...PSK) *loopNode {
	t.Helper()
	l := &loopNode{up: make(chan struct{}, 8), done: make(chan error, 1)}
	var err error
	l.tun, err = New(Config{
		Identity: testIdentity(t, seed), Router: &fixedRoutes{}, Handler: l, PSKs: psks,
		Listen: netip.MustParseAddrPort(addr), Hello: router.Hello{NickName: addr, Run: mesh.RunID(rand.Uint64())},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.tun.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	l.cancel = cancel
	go func() { l.done <- l.tun.Run(ctx) }()
	return l
}

func (l *loopNode) stop(t *testing.T) {
	l.cancel()
	if err := <-l.done; err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestStreams(t *testing.T) {
	defer goleak.VerifyNone(t)
	a := startLoop(t, 1, "127.71.0.1:26783", pskOne)
	b := startLoop(t, 2, "127.71.0.2:26783", pskTwo, pskOne)
	defer a.stop(t)
	defer b.stop(t)
	if _, err := a.tun.DialStream(t.Context(), b.tun.name); !errors.Is(err, errStranger) {
		t.Errorf("stream before the link: %v", err)
	}
	a.tun.Dial(b.tun.LocalAddr())
	for _, l := range []*loopNode{a, b} {
		select {
		case <-l.up:
		case <-time.After(5 * time.Second):
			t.Fatal("no link")
		}
	}
	var wg sync.WaitGroup
	sent := make([]byte, 300_000)
	for i := range sent {
		sent[i] = byte(i * 31)
	}
	wg.Go(func() {
		c := <-b.tun.Streams()
		if name, ok := PeerOf(c); !ok || name != a.tun.name {
			t.Errorf("stream of %v", name)
		}
		got, err := io.ReadAll(io.LimitReader(c, int64(len(sent))))
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%d bytes of %d: %v", len(got), len(sent), err)
		}
		c.Write([]byte("thanks"))
		c.Close()
	})
	// Dialled by the one whose password is first in the ring of both, or known there.
	c, err := a.tun.DialStream(t.Context(), b.tun.name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(sent); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "thanks" {
		t.Errorf("%q, %v", got, err)
	}
	c.Close()
	wg.Wait()
	if _, err := b.tun.DialStream(t.Context(), a.tun.name); err == nil {
		t.Error("a stream with a password that the other end does not know")
	}
}

// Strangers, garbage and damaged records do not get through, and one who says nothing is cut off by Close.
func TestStreamRefuses(t *testing.T) {
	defer goleak.VerifyNone(t)
	a := startLoop(t, 1, "127.71.1.1:26783", pskOne)
	b := startLoop(t, 2, "127.71.1.2:26783", pskOne)
	defer a.stop(t)
	dial := func(from string) net.Conn {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(from))}
		c, err := d.Dial("tcp", "127.71.1.2:26783")
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	closed := func(what string, c net.Conn) {
		t.Helper()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.ReadAll(c); errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: still open", what)
		}
		c.Close()
	}
	stranger := dial("127.71.1.66:0")
	writeRecord(stranger, make([]byte, 60))
	closed("stranger", stranger)
	a.tun.Dial(b.tun.LocalAddr())
	<-a.up
	<-b.up
	c := dial("127.71.1.1:0")
	c.Write([]byte{0xff, 0xff, 1, 2, 3})
	closed("long record", c)
	c = dial("127.71.1.1:0")
	writeRecord(c, make([]byte, 100))
	closed("garbage", c)
	// A peer at the same address as a linked one, with the password but another key.
	id := testIdentity(t, 9)
	c = dial("127.71.1.1:0")
	hs, _ := newNoise(id, pskOne, true)
	first, _, _, _ := hs.WriteMessage(nil, appendOffer(nil, offer{}))
	writeRecord(c, first)
	second, err := readRecord(c, maxHelloLen)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := hs.ReadMessage(nil, second); err != nil {
		t.Fatal(err)
	}
	third, _, _, _ := hs.WriteMessage(nil, appendTerms(nil, terms{hello: router.Hello{Name: id.Name(), Run: 1}}))
	writeRecord(c, third)
	closed("another key", c)
	silent := dial("127.71.1.1:0")
	defer silent.Close()
	if n := b.tun.Drops()["stream"]; n != 4 {
		t.Errorf("%d refused", n)
	}
	b.stop(t)
}

// Each end of a damaged stream notices.
func TestStreamDamage(t *testing.T) {
	x, y := net.Pipe()
	hs1, _ := newNoise(testIdentity(t, 1), PSK{}, true)
	hs2, _ := newNoise(testIdentity(t, 2), PSK{}, false)
	m, _, _, _ := hs1.WriteMessage(nil, nil)
	hs2.ReadMessage(nil, m)
	m, _, _, _ = hs2.WriteMessage(nil, nil)
	hs1.ReadMessage(nil, m)
	m, up, _, _ := hs1.WriteMessage(nil, nil)
	_, up2, _, _ := hs2.ReadMessage(nil, m)
	s := &stream{Conn: y, open: up2}
	go func() {
		sealed, _ := up.Encrypt(nil, nil, []byte("hello"))
		writeRecord(x, sealed)
		sealed, _ = up.Encrypt(nil, nil, []byte("world"))
		sealed[2] ^= 1
		writeRecord(x, sealed)
		x.Close()
	}()
	b := make([]byte, 10)
	if n, err := s.Read(b); err != nil || string(b[:n]) != "hello" {
		t.Errorf("%q, %v", b[:n], err)
	}
	if n, err := s.Read(b); err == nil {
		t.Errorf("damaged record read: %q", b[:n])
	}
}

func TestPortTaken(t *testing.T) {
	a := startLoop(t, 1, "127.71.2.1:26783")
	defer a.stop(t)
	tun, err := New(Config{Identity: testIdentity(t, 2), Router: &fixedRoutes{}, Handler: a, Listen: netip.MustParseAddrPort("127.71.2.1:26783")})
	if err != nil {
		t.Fatal(err)
	}
	err = tun.Run(t.Context())
	if err == nil || !bytes.Contains([]byte(err.Error()), []byte("127.71.2.1:26783")) {
		t.Errorf("got %v", err)
	}
}
