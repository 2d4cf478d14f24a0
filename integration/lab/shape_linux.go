package lab

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Shape is what a userspace link does to the packets from one host to another. The same seed makes the
// same choices for the same sequence of packets.
type Shape struct {
	Delay     time.Duration // added to every packet
	Jitter    time.Duration // added at random, 0 to this; packets overtake each other by it
	Loss      float64       // share dropped, 0 to 1
	Duplicate float64       // share sent twice, 0 to 1
	Queue     int           // packets in flight at most, more are dropped; 0: 10,000
	Seed      uint64
}

// shaper is a TUN device in the router: the flows that are routed into it come back out of it later.
type shaper struct {
	tun  *os.File // fixed
	done sync.WaitGroup
	wake chan struct{}

	mu     sync.Mutex // guards what follows
	flows  map[[2]netip.Addr]*shaped
	queue  delayed
	order  uint64
	closed bool
}

type shaped struct {
	Shape
	random   *rand.Rand
	inFlight int
}

// Shape sends the packets between two hosts, each way, through a userspace link. The zero Shape ends it.
// Such a link carries some 50,000 packets a second.
func (l *Lab) Shape(ctx context.Context, a, b *Host, s Shape) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shaper == nil {
		sh, err := l.newShaper(ctx)
		if err != nil {
			return fmt.Errorf("make a userspace link: %w", err)
		}
		l.shaper = sh
	}
	script := ""
	for i, f := range both(a, b) {
		for _, v := range []struct {
			family string
			key    [2]netip.Addr
		}{{"-4", [2]netip.Addr{f.from.Addr, f.to.Addr}}, {"-6", [2]netip.Addr{f.from.Addr6, f.to.Addr6}}} {
			rule := fmt.Sprintf("iif %s from %v to %v lookup 9999 pref 800", f.from.Name, v.key[0], v.key[1])
			script += fmt.Sprintf("ip %s rule del %s 2>/dev/null; ", v.family, rule)
			if s != (Shape{}) {
				script += fmt.Sprintf("ip %s rule add %s || exit 1; ", v.family, rule)
			}
			l.shaper.set(v.key, s, uint64(i))
		}
	}
	return l.inRouter(ctx, "", "/bin/sh", "-c", script+"true")
}

func (l *Lab) newShaper(ctx context.Context) (*shaper, error) {
	s := &shaper{flows: map[[2]netip.Addr]*shaped{}, wake: make(chan struct{}, 1)}
	err := l.router.do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
		}
		req, err := unix.NewIfreq("shape0")
		if err == nil {
			req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		}
		if err != nil {
			unix.Close(fd)
			return fmt.Errorf("create shape0: %w", err)
		}
		s.tun = os.NewFile(uintptr(fd), "shape0")
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = l.inRouter(ctx, "", "/bin/sh", "-c", "ip link set shape0 mtu 9000 txqueuelen 10000 up && "+
		"ip route add default dev shape0 table 9999 && ip -6 route add default dev shape0 table 9999")
	if err != nil {
		return nil, errors.Join(err, s.tun.Close())
	}
	s.done.Go(s.readLoop)
	s.done.Go(s.sendLoop)
	return s, nil
}

func (s *shaper) set(key [2]netip.Addr, shape Shape, direction uint64) {
	if shape.Queue == 0 {
		shape.Queue = 10000
	}
	s.mu.Lock()
	s.flows[key] = &shaped{Shape: shape, random: rand.New(rand.NewPCG(shape.Seed, direction))}
	s.mu.Unlock()
}

func (s *shaper) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	_ = s.tun.Close()
	s.nudge()
	s.done.Wait()
}

func (s *shaper) nudge() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *shaper) readLoop() {
	buf := make([]byte, 65536)
	for {
		n, err := s.tun.Read(buf)
		if err != nil {
			return
		}
		s.admit(buf[:n], time.Now())
	}
}

func (s *shaper) admit(packet []byte, now time.Time) {
	key, ok := addresses(packet)
	if !ok {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.flows[key]
	if f == nil || f.inFlight >= f.Queue || f.random.Float64() < f.Loss {
		return
	}
	copies := 1
	if f.random.Float64() < f.Duplicate {
		copies = 2
	}
	for range copies {
		due := now.Add(f.Delay)
		if f.Jitter > 0 {
			due = due.Add(time.Duration(f.random.Int64N(int64(f.Jitter))))
		}
		s.order++
		f.inFlight++
		heap.Push(&s.queue, waiting{due, s.order, append([]byte(nil), packet...), f})
	}
	s.nudge()
}

func (s *shaper) sendLoop() {
	for {
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			return
		}
		pause := time.Hour
		var next []byte
		if len(s.queue) > 0 {
			if pause = time.Until(s.queue[0].due); pause <= 0 {
				w := heap.Pop(&s.queue).(waiting)
				w.flow.inFlight--
				next = w.packet
			}
		}
		s.mu.Unlock()
		if next != nil {
			_, _ = s.tun.Write(next) // a full or vanished device loses the packet, as links do
			continue
		}
		select {
		case <-s.wake:
		case <-time.After(pause):
		}
	}
}

// addresses reads source and destination of an IP packet.
func addresses(p []byte) (key [2]netip.Addr, ok bool) {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		return [2]netip.Addr{netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))}, true
	case len(p) >= 40 && p[0]>>4 == 6:
		return [2]netip.Addr{netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))}, true
	}
	return key, false
}

type waiting struct {
	due    time.Time
	order  uint64
	packet []byte
	flow   *shaped
}

// delayed is a heap, the packet that is due first on top.
type delayed []waiting

func (d delayed) Len() int      { return len(d) }
func (d delayed) Swap(i, j int) { d[i], d[j] = d[j], d[i] }
func (d delayed) Less(i, j int) bool {
	if !d[i].due.Equal(d[j].due) {
		return d[i].due.Before(d[j].due)
	}
	return d[i].order < d[j].order
}
func (d *delayed) Push(x any) { *d = append(*d, x.(waiting)) }
func (d *delayed) Pop() any {
	last := (*d)[len(*d)-1]
	*d = (*d)[:len(*d)-1]
	return last
}
