package tunnel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"meshd/mesh"
	"meshd/router"
)

// These tests use real sockets, and namespaces called tun-test-… that they make and remove.

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

func run(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// inNS runs f on a thread in the namespace. What f opens stays there.
func inNS(t testing.TB, ns string, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		fd, err := unix.Open("/run/netns/"+ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatalf("in %s: %v", ns, err)
	}
}

// twoHosts makes two namespaces joined by a veth pair, 10.99.0.1 and .2, fd99::1 and ::2.
func twoHosts(t testing.TB) [2]string {
	needRoot(t)
	id := fmt.Sprintf("tun-test-%x", rand.Uint32())
	ns := [2]string{id + "a", id + "b"}
	for i, n := range ns {
		run(t, "ip", "netns", "add", n)
		t.Cleanup(func() { run(t, "ip", "netns", "del", n) })
		run(t, "ip", "-n", n, "link", "set", "lo", "up")
		if i == 1 {
			run(t, "ip", "-n", ns[0], "link", "add", "under", "type", "veth", "peer", "name", "under", "netns", ns[1])
		}
	}
	for i, n := range ns {
		run(t, "ip", "-n", n, "addr", "add", fmt.Sprintf("10.99.0.%d/24", i+1), "dev", "under")
		run(t, "ip", "-n", n, "addr", "add", fmt.Sprintf("fd99::%d/64", i+1), "dev", "under", "nodad")
		run(t, "ip", "-n", n, "link", "set", "under", "up")
	}
	return ns
}

func readAll(t *testing.T, c Conn, n int) (datagrams [][]byte, from netip.AddrPort, joined bool) {
	t.Helper()
	batch := make([]Datagrams, 4)
	for i := range batch {
		batch[i].Buf = make([]byte, readBuffer)
	}
	stop := time.AfterFunc(5*time.Second, func() { c.Close() })
	defer stop.Stop()
	for len(datagrams) < n {
		got, err := c.ReadBatch(batch, true)
		if err != nil {
			t.Fatalf("%d of %d datagrams: %v", len(datagrams), n, err)
		}
		for _, d := range batch[:got] {
			from = d.Addr
			size := d.Size
			if size == 0 {
				size = d.N
			}
			for b := d.Buf[:d.N]; len(b) > 0; {
				m := min(size, len(b))
				joined = joined || m < d.N
				datagrams = append(datagrams, append([]byte(nil), b[:m]...))
				b = b[m:]
			}
		}
	}
	return datagrams, from, joined
}

func TestUDPOffload(t *testing.T) {
	for _, c := range []struct{ listen, dial string }{
		{"127.0.0.1:0", "127.0.0.1"}, {"[::]:0", "127.0.0.1"}, {"[::]:0", "::1"}, {"[::1]:0", "::1"},
	} {
		for _, gso := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s from %s, gso=%v", c.dial, c.listen, gso), func(t *testing.T) {
				a, err := ListenUDP(netip.MustParseAddrPort(c.listen), slog.New(slog.DiscardHandler))
				if err != nil {
					t.Fatal(err)
				}
				defer a.Close()
				b, err := ListenUDP(netip.MustParseAddrPort(c.listen), slog.New(slog.DiscardHandler))
				if err != nil {
					t.Fatal(err)
				}
				defer b.Close()
				if !a.(*udpConn).gso.Load() || !b.(*udpConn).gro {
					t.Fatal("this kernel should have UDP_SEGMENT and UDP_GRO")
				}
				a.(*udpConn).gso.Store(gso)
				to := netip.AddrPortFrom(netip.MustParseAddr(c.dial), b.LocalAddr().Port())
				sent := make([]byte, 40*1200+700)
				for i := range sent {
					sent[i] = byte(i * 3)
				}
				if err := a.Write(sent, 1200, to, true); err != nil {
					t.Fatal(err)
				}
				got, from, joined := readAll(t, b, 41)
				if !bytes.Equal(bytes.Join(got, nil), sent) || len(got[40]) != 700 || len(got[0]) != 1200 {
					t.Error("not what was sent")
				}
				if from != netip.AddrPortFrom(netip.MustParseAddr(c.dial), a.LocalAddr().Port()) {
					t.Errorf("from %v", from)
				}
				if gso && !joined {
					t.Error("nothing was joined")
				}
				if err := a.Write([]byte("short"), 5, to, false); err != nil {
					t.Error(err)
				}
				if got, _, _ := readAll(t, b, 1); string(got[0]) != "short" {
					t.Errorf("got %q", got[0])
				}
			})
		}
	}
}

func TestUDPClosed(t *testing.T) {
	c, err := ListenUDP(netip.MustParseAddrPort("127.0.0.1:0"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := c.ReadBatch([]Datagrams{{Buf: make([]byte, 100)}}, true)
		done <- err
	}()
	c.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
	if err := c.Write([]byte("x"), 1, netip.MustParseAddrPort("127.0.0.1:9"), true); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after close: %v", err)
	}
}

func TestUDPTooLarge(t *testing.T) {
	ns := twoHosts(t)
	for _, c := range []struct {
		to  string
		fit int
	}{{"10.99.0.2", 1472}, {"fd99::2", 1452}} {
		run(t, "ip", "-n", ns[0], "link", "set", "under", "mtu", "1500")
		var conn Conn
		inNS(t, ns[0], func() (err error) {
			conn, err = ListenUDP(netip.MustParseAddrPort("[::]:0"), slog.New(slog.DiscardHandler))
			return err
		})
		defer conn.Close()
		to := netip.AddrPortFrom(netip.MustParseAddr(c.to), 6783)
		b := make([]byte, 10*1473)
		if err := conn.Write(b[:c.fit], c.fit, to, true); err != nil {
			t.Errorf("%d bytes: %v", c.fit, err)
		}
		if err := conn.Write(b[:10*c.fit], c.fit, to, true); err != nil {
			t.Errorf("10 x %d bytes: %v", c.fit, err)
		}
		for _, n := range []int{1, 10} {
			if err := conn.Write(b[:n*(c.fit+1)], c.fit+1, to, true); !errors.Is(err, errTooLarge) {
				t.Errorf("%d x %d bytes: %v", n, c.fit+1, err)
			}
		}
		if !conn.(*udpConn).gso.Load() {
			t.Error("segmentation was given up for a datagram that was too large")
		}
		if mtu := conn.PathMTU(to.Addr()); mtu != 1500 {
			t.Errorf("MTU %d", mtu)
		}
		run(t, "ip", "-n", ns[0], "link", "set", "under", "mtu", "1300")
		if mtu := conn.PathMTU(to.Addr()); mtu != 1300 {
			t.Errorf("MTU %d after the change to 1300", mtu)
		}
	}
}

// tap is a Port on a real TAP with virtio headers.
type tap struct {
	file *os.File
	raw  syscall.RawConn
}

func openTap(name string) (*tap, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return nil, err
	}
	const csum, tso4, tso6, ecn, uso4, uso6 = 1, 2, 4, 8, 0x20, 0x40
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, csum|tso4|tso6|ecn|uso4|uso6); err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), name)
	raw, err := file.SyscallConn()
	return &tap{file, raw}, err
}

func (p *tap) Read(b []byte) (int, error)  { return p.file.Read(b) }
func (p *tap) Write(b []byte) (int, error) { return p.file.Write(b) }
func (p *tap) Close() error                { return p.file.Close() }

func (p *tap) TryRead(b []byte) (n int, err error) {
	cerr := p.raw.Read(func(fd uintptr) bool {
		r, _, errno := unix.Syscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		if errno == unix.EAGAIN {
			return true
		}
		if errno != 0 {
			err = errno
		} else {
			n = int(r)
		}
		return true
	})
	return n, errors.Join(cerr, err)
}

// pairSwitch joins two peers like a cable.
type pairSwitch struct{ other mesh.PeerName }

func (s pairSwitch) FromBridge([]byte, []byte, time.Time) router.Decision {
	return router.Decision{Verdict: router.Unicast, Peer: s.other}
}

func (s pairSwitch) FromPeer([]byte, mesh.PeerName, time.Time) router.Decision {
	return router.Decision{Verdict: router.Deliver}
}

type realHandler struct{ up chan struct{} }

func (h *realHandler) Link(ev router.LinkEvent) {
	if ev.State == router.LinkUp {
		h.up <- struct{}{}
	}
}
func (h *realHandler) Message(mesh.PeerName, []byte) {}

// cable is two hosts with a TAP each, 10.98.0.1 and .2 and fd98::1 and ::2 with an MTU of 1410, joined by
// the tunnel.
type cable struct {
	ns   [2]string
	tun  [2]*Tunnel
	stop func()
}

func newCable(t testing.TB, change func(*Config)) *cable {
	c := &cable{ns: twoHosts(t)}
	ctx, cancel := context.WithCancel(context.Background())
	var g sync.WaitGroup
	var once sync.Once
	c.stop = func() { once.Do(func() { cancel(); g.Wait() }) }
	t.Cleanup(c.stop)
	ids := [2]Identity{testIdentity(t, 1), testIdentity(t, 2)}
	up := make(chan struct{}, 16)
	for i := range c.ns {
		cfg := Config{
			Identity: ids[i], Router: &fixedRoutes{}, Handler: &realHandler{up: up}, Switch: pairSwitch{ids[1-i].Name()},
			MTU: 1410, TSO: true, USO: true, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
			Hello: router.Hello{NickName: fmt.Sprint("host", i), Run: mesh.RunID(i + 1)},
		}
		inNS(t, c.ns[i], func() error {
			p, err := openTap("mesh-tap")
			if err != nil {
				return err
			}
			cfg.Ports = []Port{p}
			if change != nil {
				change(&cfg)
			}
			if c.tun[i], err = New(cfg); err != nil {
				return err
			}
			return c.tun[i].Listen()
		})
		run(t, "ip", "-n", c.ns[i], "link", "set", "mesh-tap", "address", fmt.Sprintf("02:00:00:00:00:0%d", i+1), "mtu", "1410", "up")
		run(t, "ip", "-n", c.ns[i], "addr", "add", fmt.Sprintf("10.98.0.%d/24", i+1), "dev", "mesh-tap")
		run(t, "ip", "-n", c.ns[i], "addr", "add", fmt.Sprintf("fd98::%d/64", i+1), "dev", "mesh-tap", "nodad")
		g.Go(func() {
			if err := c.tun[i].Run(ctx); err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
	c.tun[0].Dial(netip.MustParseAddrPort("10.99.0.2:6783"))
	for range 2 {
		select {
		case <-up:
		case <-time.After(5 * time.Second):
			t.Fatal("no link")
		}
	}
	return c
}

// transfer sends n bytes over TCP from one host to the other and checks every one.
func (c *cable) transfer(t testing.TB, from int, addr string, n int) time.Duration {
	t.Helper()
	var l net.Listener
	inNS(t, c.ns[1-from], func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(addr, "0"))
		return err
	})
	defer l.Close()
	type result struct {
		n   int
		err error
	}
	done := make(chan result, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			done <- result{0, err}
			return
		}
		defer conn.Close()
		got, buf := 0, make([]byte, 1<<18)
		for {
			m, err := conn.Read(buf)
			for i := 0; i < m; i += 997 {
				if buf[i] != byte((got+i)>>3) {
					done <- result{got + i, errors.New("wrong byte")}
					return
				}
			}
			got += m
			if err != nil {
				if err == io.EOF {
					err = nil
				}
				done <- result{got, err}
				return
			}
		}
	}()
	var conn net.Conn
	inNS(t, c.ns[from], func() (err error) {
		conn, err = net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
		return err
	})
	start := time.Now()
	buf := make([]byte, 1<<18)
	for i := range buf {
		buf[i] = byte(i >> 3)
	}
	conn.SetDeadline(start.Add(30 * time.Second))
	for left := n; left > 0; left -= len(buf) {
		if _, err := conn.Write(buf[:min(left, len(buf))]); err != nil {
			t.Fatal(err)
		}
	}
	conn.Close()
	r := <-done
	if r.err != nil || r.n != n {
		t.Fatalf("%d bytes arrived of %d: %v", r.n, n, r.err)
	}
	return time.Since(start)
}

func TestCable(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*Config)
		after  func(*cable)
	}{
		{"clear", nil, nil},
		{"sealed", password(pskOne), nil},
		{"no superframes at the ports", func(c *Config) { c.TSO, c.USO = false, false }, nil},
		{"no segmentation in the socket", nil, func(c *cable) {
			for _, x := range c.tun {
				x.conn.(*udpConn).gso.Store(false)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := newCable(t, c.change)
			if c.after != nil {
				c.after(k)
			}
			const n = 32 << 20
			for _, addr := range []string{"10.98.0.2", "fd98::2"} {
				took := k.transfer(t, 0, addr, n)
				t.Logf("%s: %.2f Gbit/s", addr, float64(n)*8/took.Seconds()/1e9)
			}
			took := k.transfer(t, 1, "10.98.0.1", n)
			t.Logf("back: %.2f Gbit/s", float64(n)*8/took.Seconds()/1e9)
			run(t, "ip", "netns", "exec", k.ns[0], "ping", "-q", "-c", "3", "-i", "0.02", "-s", "10000", "-W", "2", "10.98.0.2")
			k.stop()
			for i, x := range k.tun {
				for why, n := range x.Drops() {
					if why != "no_session" && why != "no_route" && why != "session" && why != "hint" { // before and after the link
						t.Errorf("host %d: %d drops: %s", i, n, why)
					}
				}
			}
			goleak.VerifyNone(t)
		})
	}
}

// New keys under load, made by age every 2 s and by both sides at a time every 50 ms: of numbered datagrams, sent at a gigabit a
// second one way and a tenth of it back, none is lost or doubled (C6). MESHD_LONG: 10 minutes by age.
func TestRekeyUnderLoad(t *testing.T) {
	for _, c := range []struct {
		name       string
		every      time.Duration
		short, far time.Duration
		crossing   bool
	}{
		{"by age", 2 * time.Second, 5 * time.Second, 10 * time.Minute, false},
		{"crossing", 50 * time.Millisecond, time.Second, 10 * time.Second, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			lasting, long := c.short, os.Getenv("MESHD_LONG") != ""
			if long {
				lasting = c.far
			}
			k := newCable(t, func(cfg *Config) {
				cfg.PSKs = []PSK{pskOne}
				if !c.crossing {
					cfg.RekeyAge = c.every
				}
			})
			there, back := k.numbered(t, 0, 1e9), k.numbered(t, 1, 1e8)
			seen := map[uint32]bool{}
			for tick, start := time.NewTicker(min(c.every, 100*time.Millisecond)), time.Now(); time.Since(start) < lasting; <-tick.C {
				for i, x := range k.tun {
					p := (*x.peers.Load())[k.tun[1-i].name]
					if p == nil || p.send.Load() == nil {
						t.Fatal("no session")
					}
					if i == 0 {
						seen[p.send.Load().local] = true
					}
					if c.crossing {
						x.call(func(now time.Time) {
							if p.attempt == nil {
								x.renew(p, now)
							}
						})
					}
				}
			}
			for way, f := range map[string]*flow{"there": there, "back": back} {
				f.end()
				t.Logf("%s: %d datagrams of %d bytes in %v, %.2f Gbit/s; lost %d, doubled %d", way, f.sent.Load(), segment, f.took.Round(time.Millisecond),
					float64(f.sent.Load()*segment*8)/f.took.Seconds()/1e9, f.sent.Load()-f.received.Load(), f.doubled)
				if f.err != nil {
					t.Errorf("%s: %v", way, f.err)
				}
				if f.received.Load() != f.sent.Load() || f.doubled != 0 || f.sent.Load() < 1000 {
					t.Errorf("%s: of %d datagrams %d arrived, and %d once more", way, f.sent.Load(), f.received.Load(), f.doubled)
				}
				if way == "there" && long && float64(f.sent.Load()*segment*8)/f.took.Seconds() < 0.5e9 { // beside other packages' long tests
					t.Error("this is not half a gigabit a second: it shows nothing")
				}
			}
			for i, x := range k.tun {
				d := x.Drops()
				t.Logf("host %d: drops %v", i, d)
				for _, why := range []string{"session", "forged", "replay", "counter", "no_session", "queue"} {
					if d[why] != 0 {
						t.Errorf("host %d: %d drops: %s", i, d[why], why)
					}
				}
				if t.Failed() {
					out, _ := exec.Command("ip", "netns", "exec", k.ns[i], "sh", "-c", "ip -s link show mesh-tap; ip -s link show under; cat /proc/net/udp /proc/net/udp6 /proc/net/snmp | cut -c1-200").CombinedOutput()
					t.Logf("%s", out)
				}
			}
			t.Logf("%d keys", len(seen))
			if want := int(lasting / max(c.every, 250*time.Millisecond) * 3 / 4); len(seen) < want {
				t.Errorf("%d keys seen, want %d", len(seen), want)
			}
		})
	}
}

// segment is the payload of numbered datagrams, with which they just fit.
const segment = 1380

// flow is a run of numbered datagrams from one host of a cable to the other.
type flow struct {
	sent, received atomic.Int64
	doubled        int64
	took           time.Duration
	err, readErr   error
	end            func()
}

// numbered sends at that rate, in bits of payload a second, until end is called. What cannot be sent in time is sent as soon as
// possible, but never more than fits into the buffers on the way: what is lost was dropped.
func (c *cable) numbered(t testing.TB, from int, rate float64) *flow {
	t.Helper()
	const batch, window = 40, 2 << 20
	f := &flow{}
	// The kernel drops what waits for an answer to ARP, but for some.
	run(t, "ip", "-n", c.ns[from], "neigh", "replace", fmt.Sprintf("10.98.0.%d", 2-from), "lladdr", fmt.Sprintf("02:00:00:00:00:0%d", 2-from), "dev", "mesh-tap", "nud", "permanent")
	var src, dst *net.UDPConn
	to := netip.MustParseAddrPort(fmt.Sprintf("10.98.0.%d:9009", 2-from))
	inNS(t, c.ns[1-from], func() (err error) {
		dst, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(to))
		return err
	})
	inNS(t, c.ns[from], func() (err error) {
		src, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to))
		return err
	})
	for _, o := range []struct {
		conn               *net.UDPConn
		level, name, value int
	}{{src, unix.SOL_UDP, unix.UDP_SEGMENT, segment}, {dst, unix.SOL_UDP, unix.UDP_GRO, 1}, {dst, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8 * window}} {
		raw, err := o.conn.SyscallConn()
		if err == nil {
			cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), o.level, o.name, o.value) })
			err = errors.Join(err, cerr)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var reading, writing sync.WaitGroup
	stop := make(chan struct{})
	reading.Go(func() {
		buf, seen := make([]byte, 1<<16), []uint64{}
		for {
			n, err := dst.Read(buf)
			if err != nil {
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					f.readErr = err
				}
				return
			}
			for b := buf[:n]; len(b) >= segment; b = b[segment:] {
				i := binary.BigEndian.Uint64(b)
				if i >= 1<<30 {
					f.readErr = fmt.Errorf("a datagram with the number %d", i)
					return
				}
				if i/64 >= uint64(len(seen)) {
					seen = append(seen, make([]uint64, i/64+1-uint64(len(seen)))...)
				}
				if bit := uint64(1) << (i % 64); seen[i/64]&bit != 0 {
					f.doubled++
				} else {
					seen[i/64] |= bit
					f.received.Add(1)
				}
			}
		}
	})
	start := time.Now()
	writing.Go(func() {
		buf := make([]byte, batch*segment)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				f.took = time.Since(start)
				return
			case <-tick.C:
			}
			due := int64(rate / 8 / segment * time.Since(start).Seconds())
			for n := f.sent.Load(); n+batch <= due && (n-f.received.Load())*segment < window; n += batch {
				for i := range batch {
					binary.BigEndian.PutUint64(buf[i*segment:], uint64(n)+uint64(i))
				}
				if _, err := src.Write(buf); err != nil {
					f.err = err
					return
				}
				f.sent.Add(batch)
			}
		}
	})
	f.end = sync.OnceFunc(func() {
		close(stop)
		writing.Wait()
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for end := time.Now().Add(5 * time.Second); f.received.Load() < f.sent.Load() && time.Now().Before(end); {
			<-tick.C
		}
		_ = dst.SetReadDeadline(time.Now().Add(100 * time.Millisecond)) // for what would come twice
		reading.Wait()
		f.err = errors.Join(f.err, f.readErr, src.Close(), dst.Close())
	})
	t.Cleanup(f.end)
	return f
}

// R6: the kernel has no room. A socket whose datagrams wait in a queue says EAGAIN. When the queue itself drops them it tells the
// socket nothing unless that asked to hear of errors (IP_RECVERR: udp_send_skb in Linux's net/ipv4/udp.c), and then it says
// ENOBUFS. Both are errFull to who does not wait; the next datagram goes when there is room.
func TestUDPFull(t *testing.T) {
	ns := twoHosts(t)
	to := netip.MustParseAddrPort("10.99.0.2:6783")
	var conn, other Conn
	for i, c := range []struct {
		conn *Conn
		at   string
	}{{&conn, "0.0.0.0:0"}, {&other, "0.0.0.0:6783"}} {
		inNS(t, ns[i], func() (err error) {
			*c.conn, err = ListenUDP(netip.MustParseAddrPort(c.at), slog.New(slog.DiscardHandler))
			return err
		})
		defer (*c.conn).Close()
	}
	b := make([]byte, 1000)
	run(t, "ip", "netns", "exec", ns[0], "ping", "-c", "1", "10.99.0.2") // the neighbour is known
	option := func(level, name, value int) {
		t.Helper()
		var err error
		cerr := conn.(*udpConn).raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, name, value) })
		if err = errors.Join(err, cerr); err != nil {
			t.Fatal(err)
		}
	}
	full := func() (sent int, err error) {
		for sent = range 2000 {
			if err = conn.Write(b, len(b), to, false); err != nil {
				break
			}
		}
		return sent, err
	}
	for _, c := range []struct {
		what   string
		limit  string // of the queue, in bytes
		buffer int    // of the socket
		hear   int
		want   error
	}{
		{"socket", "100000000", 20_000, 0, errFull},
		{"queue", "20000", 100_000_000, 0, nil},
		{"queue, told", "20000", 100_000_000, 1, errFull},
	} {
		option(unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, c.buffer)
		option(unix.IPPROTO_IP, unix.IP_RECVERR, c.hear)
		run(t, "tc", "-n", ns[0], "qdisc", "replace", "dev", "under", "root", "tbf", "rate", "8kbit", "burst", "2000", "limit", c.limit)
		sent, err := full()
		t.Logf("%s full: %v after %d datagrams", c.what, err, sent)
		if !errors.Is(err, c.want) || c.want == nil && err != nil {
			t.Errorf("%s full: got %v, want %v", c.what, err, c.want)
		}
		run(t, "tc", "-n", ns[0], "qdisc", "del", "dev", "under", "root")
		if err := conn.Write(b, len(b), to, true); err != nil {
			t.Errorf("%s: with room again: %v", c.what, err)
		}
	}
}
