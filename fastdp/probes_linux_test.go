package fastdp

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The probe stream: numbered datagrams at a fixed rate from one container to another, counted there.

type stream struct {
	Listen string
	To     string
	Every  time.Duration
	Count  int // 0: until its standard input closes
	Size   int
}

// tally is what came of a stream. Gap is the longest time between two arrivals.
type tally struct {
	Sent, Got, Twice, Late int
	Gap                    time.Duration
}

func (t tally) String() string {
	return fmt.Sprintf("%d sent, %d lost, %d twice, %d out of order, longest gap %v", t.Sent, t.Sent-t.Got+t.Twice, t.Twice, t.Late, t.Gap)
}

func closedStdin() <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		var b [1]byte
		for {
			if _, err := os.Stdin.Read(b[:]); err != nil {
				return
			}
		}
	}()
	return done
}

func sendMain(arg string) int {
	var s stream
	if err := json.Unmarshal([]byte(arg), &s); err != nil {
		return 2
	}
	c, err := net.Dial("udp", s.To)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer c.Close()
	buf := make([]byte, max(s.Size, 8))
	n := 0
	stop := closedStdin()
	begun := time.Now()
	for s.Count == 0 || n < s.Count {
		due := time.NewTimer(time.Until(begun.Add(time.Duration(n) * s.Every)))
		select {
		case <-stop:
			json.NewEncoder(os.Stdout).Encode(tally{Sent: n})
			return 0
		case <-due.C:
		}
		binary.BigEndian.PutUint64(buf, uint64(n))
		if _, err := c.Write(buf); err != nil {
			fmt.Fprintln(os.Stderr, n, err)
		}
		n++
	}
	json.NewEncoder(os.Stdout).Encode(tally{Sent: n})
	return 0
}

func receiveMain(arg string) int {
	var s stream
	if err := json.Unmarshal([]byte(arg), &s); err != nil {
		return 2
	}
	c, err := net.ListenPacket("udp", s.Listen)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	u := c.(*net.UDPConn)
	if err := enlarge(u); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("{}") // ready
	stop := closedStdin()
	go func() {
		<-stop
		u.SetReadDeadline(time.Now().Add(200 * time.Millisecond)) // what is still under way
	}()
	var r tally
	seen := make(map[uint64]bool)
	highest, last := int64(-1), time.Time{}
	buf := make([]byte, 1<<16)
	for {
		n, _, err := u.ReadFromUDP(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil || n < 8 {
			continue
		}
		now := time.Now()
		if !last.IsZero() {
			r.Gap = max(r.Gap, now.Sub(last))
		}
		last = now
		k := binary.BigEndian.Uint64(buf)
		r.Got++
		if seen[k] {
			r.Twice++
		}
		seen[k] = true
		if int64(k) < highest {
			r.Late++
		}
		highest = max(highest, int64(k))
	}
	json.NewEncoder(os.Stdout).Encode(r)
	return 0
}

// enlarge gives the socket more room than net.core.rmem_max: the tests are about the network's losses.
func enlarge(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
	}); err != nil {
		return err
	}
	return failed
}

// running is a stream under way.
type running struct {
	t              testing.TB
	sender, getter *process
}

type process struct {
	cmd *exec.Cmd
	in  interface{ Close() error }
	out *json.Decoder
}

func (l *lab) process(ns, role string, s stream) *process {
	l.t.Helper()
	arg, err := json.Marshal(s)
	if err != nil {
		l.t.Fatal(err)
	}
	cmd := l.inside(ns, os.Args[0])
	cmd.Env = append(os.Environ(), labEnv+"="+role+" "+string(arg))
	cmd.Stderr = logLines(l.t, ns)
	in, err := cmd.StdinPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { in.Close(); cmd.Process.Kill(); cmd.Wait() })
	return &process{cmd, in, json.NewDecoder(out)}
}

// stream begins sending from one container to another.
func (l *lab) stream(from, to *labContainer, every time.Duration) *running {
	l.t.Helper()
	addr := net.JoinHostPort(to.port.Addrs[0].Addr().String(), "7777")
	getter := l.process(to.ns, "receive", stream{Listen: addr})
	var ready struct{}
	if err := getter.out.Decode(&ready); err != nil {
		l.t.Fatal(err)
	}
	return &running{l.t, l.process(from.ns, "send", stream{To: addr, Every: every}), getter}
}

// stop ends it and says what came of it.
func (r *running) stop() tally {
	r.t.Helper()
	var sent, got tally
	r.sender.in.Close()
	if err := r.sender.out.Decode(&sent); err != nil {
		r.t.Fatal(err)
	}
	r.getter.in.Close()
	if err := r.getter.out.Decode(&got); err != nil {
		r.t.Fatal(err)
	}
	got.Sent = sent.Sent
	return got
}

// tcpMain is one end of a TCP transfer: it sends Count bytes to To, or says how many came to Listen.
func tcpMain(arg string) int {
	var s stream
	if err := json.Unmarshal([]byte(arg), &s); err != nil {
		return 2
	}
	if s.Listen != "" {
		l, err := net.Listen("tcp", s.Listen)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Println("{}") // ready
		c, err := l.Accept()
		if err != nil {
			return 1
		}
		n, err := io.Copy(io.Discard, c)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		json.NewEncoder(os.Stdout).Encode(tally{Got: int(n)})
		return 0
	}
	c, err := net.DialTimeout("tcp", s.To, 5*time.Second)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	n, err := io.CopyN(c, zeros{}, int64(s.Count))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	c.Close()
	json.NewEncoder(os.Stdout).Encode(tally{Sent: int(n)})
	return 0
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// transfer moves bytes by TCP.
func (l *lab) transfer(from, to *labContainer, bytes int) (took time.Duration) {
	l.t.Helper()
	addr := net.JoinHostPort(to.port.Addrs[0].Addr().String(), "7778")
	getter := l.process(to.ns, "tcp", stream{Listen: addr})
	var ready struct{}
	if err := getter.out.Decode(&ready); err != nil {
		l.t.Fatal(err)
	}
	begun := time.Now()
	sender := l.process(from.ns, "tcp", stream{To: addr, Count: bytes})
	var sent, got tally
	if err := errors.Join(sender.out.Decode(&sent), getter.out.Decode(&got)); err != nil {
		l.t.Fatal(err)
	}
	if got.Got != bytes {
		l.t.Errorf("TCP: %d bytes arrived, want %d", got.Got, bytes)
	}
	return time.Since(begun)
}
