package dns

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
	"unsafe"

	miekg "github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// D1: 100,000 malformed queries a second from eight sockets beside 5,000 good ones, for a second, with MESHD_LONG for a minute.
// Each is counted, by the server or, when its socket was full, by the kernel; each good one that was read is answered; one
// costs at most 20 µs of processor time (3 to 5 are usual), and nothing is kept.
// How many are lost and how long answers take depends on who else wants the processors: that is demanded with MESHD_ALONE=1, of a
// machine that does nothing else.
func TestFlood(t *testing.T) {
	const rate, goodRate, sources = 100_000, 5000, 8
	lasting := time.Second
	if os.Getenv("MESHD_LONG") != "" {
		lasting = time.Minute
	}
	table := newTable(t)
	addName(t, table, "web.mesh.internal", "10.32.0.1")
	s := startServer(t, table, nil)
	// The threads below keep a place in the scheduler for up to 10 ms after they have gone to sleep in a system call.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 3))
	r := rand.New(rand.NewPCG(1, 1))
	var bad [4096][]byte
	for i := range bad {
		bad[i] = malformed(r)
	}
	good := packed(t, "web.mesh.internal.", miekg.TypeA)
	latencies := make([]time.Duration, 0, int(lasting.Seconds()*goodRate))
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	cpu := cpuTime(t, unix.RUSAGE_SELF)

	// What is not the server is done by threads of their own, whose time is taken off.
	var (
		senders, readers sync.WaitGroup
		mu               sync.Mutex // guards the next two
		errs             []error
		others           time.Duration
		sent, sentGood   int
		started          [1 << 16]time.Duration // by number of the good query
		lock             sync.Mutex             // guards started
	)
	thread := func(g *sync.WaitGroup, f func() error) {
		g.Go(func() {
			runtime.LockOSThread()                   // and never unlocked: the thread ends with the goroutine
			before := cpuTime(t, unix.RUSAGE_THREAD) // of others' work
			err := f()
			used := cpuTime(t, unix.RUSAGE_THREAD) - before
			mu.Lock()
			defer mu.Unlock()
			errs, others = append(errs, err), others+used
		})
	}
	start := time.Now()
	paced := func(perSecond int, send func(n int) error) (n int, err error) {
		for time.Since(start) < lasting {
			for due := int(time.Since(start).Seconds() * float64(perSecond)); n < due; n++ {
				if err := send(n); err != nil {
					return n, err
				}
			}
			if err := unix.Nanosleep(&unix.Timespec{Nsec: 100_000}, nil); err != nil && !errors.Is(err, unix.EINTR) {
				return n, err
			}
		}
		return n, nil
	}
	thread(&senders, func() (err error) {
		var fds [sources]int
		for i := range fds {
			if fds[i], err = dialled(s.Addr()); err != nil {
				return err
			}
			defer unix.Close(fds[i])
		}
		sent, err = paced(rate, func(n int) error { return write(fds[n%sources], bad[n%len(bad)]) })
		return err
	})
	client, err := dialled(s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(client)
	thread(&senders, func() (err error) {
		query := slices.Clone(good)
		sentGood, err = paced(goodRate, func(n int) error {
			binary.BigEndian.PutUint16(query, uint16(n))
			lock.Lock()
			started[uint16(n)] = time.Since(start)
			lock.Unlock()
			return write(client, query)
		})
		return err
	})
	done := make(chan struct{})
	thread(&readers, func() error {
		buf := make([]byte, 512)
		for {
			n, err := unix.Read(client, buf)
			switch {
			case errors.Is(err, unix.EINTR):
			case errors.Is(err, unix.EAGAIN): // nothing came for a while
				select {
				case <-done:
					return nil
				default:
				}
			case err != nil:
				return err
			case n > headerLen && buf[7] == 1:
				lock.Lock()
				latencies = append(latencies, time.Since(start)-started[binary.BigEndian.Uint16(buf)])
				lock.Unlock()
			}
		}
	})
	senders.Wait()
	close(done)
	readers.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	perQuery := (cpuTime(t, unix.RUSAGE_SELF) - cpu - others) / time.Duration(sent+sentGood)
	runtime.GC()
	runtime.ReadMemStats(&after)

	s.mu.Lock()
	overrun := drops(t, client)
	lost := 0
	for _, conn := range s.listener.udp {
		raw, err := conn.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := raw.Control(func(fd uintptr) { lost += drops(t, int(fd)) }); err != nil {
			t.Fatal(err)
		}
	}
	s.mu.Unlock()
	st := s.Status().Counters
	slices.Sort(latencies)
	if len(latencies) == 0 {
		t.Fatal("no answer")
	}
	p99 := latencies[len(latencies)*99/100]
	t.Logf("%d malformed and %d good queries in %v: %v each of processor time, %d lost by full sockets, %d good ones answered, p99 %v; %v",
		sent, sentGood, lasting, perQuery, lost, len(latencies), p99, st)
	if got := int(st["queries"]) + lost; got != sent+sentGood {
		t.Errorf("%d were sent, %d counted", sent+sentGood, got)
	}
	if len(latencies) > sentGood || len(latencies) < sentGood-lost-overrun-int(st["unsent"]) {
		t.Errorf("%d of %d good queries answered; %d lost before, %d behind the server", len(latencies), sentGood, lost, overrun)
	}
	if perQuery > 20*time.Microsecond {
		t.Errorf("a query costs %v", perQuery)
	}
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 1<<20 {
		t.Errorf("%d bytes are kept", grown)
	}
	if os.Getenv("MESHD_ALONE") != "" && (len(latencies) < sentGood*999/1000 || p99 > 10*time.Millisecond || sent < int(lasting.Seconds())*rate*99/100) {
		t.Errorf("of %d good queries %d were answered, 99 %% of them within %v, beside %d malformed ones", sentGood, len(latencies), p99, sent)
	}
}

func cpuTime(t *testing.T, who int) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(who, &u); err != nil {
		t.Error(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// dialled is a blocking socket, which the Go runtime has nothing to do with. Reads end after half a second.
func dialled(to netip.AddrPort) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20) // for root
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 500_000})
	}
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	}
	return fd, err
}

func write(fd int, b []byte) error {
	for {
		if _, err := unix.Write(fd, b); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// drops is how many datagrams found a socket full (SO_MEMINFO, SK_MEMINFO_DROPS).
func drops(t *testing.T, fd int) int {
	var info [9]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO, uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 || size < uint32(unsafe.Sizeof(info)) {
		t.Errorf("SO_MEMINFO: %v, %d bytes", errno, size)
	}
	return int(info[8])
}

// malformed returns noise, a damaged query, or a name made of pointers.
func malformed(r *rand.Rand) []byte {
	b := []byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03web\x04mesh\x08internal\x00\x00\x01\x00\x01")
	switch r.IntN(4) {
	case 0:
		b = make([]byte, r.IntN(600))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
	case 1:
		b = b[:r.IntN(len(b))]
	case 2:
		b[12+r.IntN(len(b)-12)] = 0xc0
	default:
		b[4+r.IntN(8)] = byte(r.Uint32())
	}
	return b
}
