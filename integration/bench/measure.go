package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/ipv4"
)

// What is measured, by the names under which it is reported.
const (
	tcp1There  = "TCP 1 stream, Gbit/s"
	tcp1Back   = "TCP 1 stream back, Gbit/s"
	tcp4There  = "TCP 4 streams, Gbit/s"
	tcp4Back   = "TCP 4 streams back, Gbit/s"
	cpuPerGB   = "CPU s/GB"
	datagrams  = "64-byte datagrams, 1000/s"
	rttIdle50  = "RTT p50, µs"
	rttIdle99  = "RTT p99, µs"
	rttLoaded  = "RTT p99 under load, µs"
	memoryEach = "RSS, MiB"
	daemonCPU  = "daemon's CPU s/GB"
)

func (n *network) add(what string, value float64) {
	if _, known := n.results[what]; !known {
		n.order = append(n.order, what)
	}
	n.results[what] = append(n.results[what], value)
}

// last is the newest figures in one line.
func (n *network) last() string {
	var b strings.Builder
	b.WriteString(n.name)
	for _, what := range n.order {
		v := n.results[what]
		fmt.Fprintf(&b, "; %s %.4g", what, v[len(v)-1])
	}
	return b.String()
}

// measure takes one turn: every figure once.
func (n *network) measure(ctx context.Context, o options) error {
	for _, kind := range []struct {
		name string
		run  func(context.Context, time.Duration) error
	}{{"tcp", n.measureTCP}, {"datagrams", n.measureDatagrams}, {"rtt", n.measureRTT}} {
		if !slices.Contains(strings.Split(o.measure, ","), kind.name) {
			continue
		}
		stop, err := profile(o.profile, n.name+" "+kind.name)
		if err != nil {
			return err
		}
		if err := errors.Join(kind.run(ctx, o.length), stop()); err != nil {
			return err
		}
	}
	return n.measureMemory()
}

// profile has perf watch all processors until stop is called, if there is a directory to write to.
func profile(dir, name string) (stop func() error, err error) {
	if dir == "" {
		return func() error { return nil }, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	file := filepath.Join(dir, strings.ReplaceAll(name, " ", "-")+".perf")
	cmd := exec.Command("perf", "record", "-q", "-a", "-g", "-F", "1999", "-o", file)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	return func() error {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait() // perf ends by the signal
		_, err := os.Stat(file)
		return err
	}, nil
}

func (n *network) measureTCP(ctx context.Context, length time.Duration) error {
	for _, x := range []struct {
		what    string
		from    end
		to      end
		streams int
	}{{tcp1There, n.a, n.b, 1}, {tcp1Back, n.b, n.a, 1}, {tcp4There, n.a, n.b, 4}, {tcp4Back, n.b, n.a, 4}} {
		before, err := busy()
		if err != nil {
			return err
		}
		daemons, err := n.daemonTime()
		if err != nil {
			return err
		}
		bytes, took, err := streams(ctx, x.from, x.to, x.streams, length)
		if err != nil {
			return fmt.Errorf("%s: %w", x.what, err)
		}
		after, err := busy()
		if err != nil {
			return err
		}
		daemonsAfter, err := n.daemonTime()
		if err != nil {
			return err
		}
		n.add(x.what, float64(bytes)*8/took.Seconds()/1e9)
		if x.what == tcp1There {
			n.add(cpuPerGB, (after-before).Seconds()/(float64(bytes)/1e9))
			if len(n.daemons) > 0 {
				n.add(daemonCPU, (daemonsAfter-daemons).Seconds()/(float64(bytes)/1e9))
			}
		}
	}
	return nil
}

func (n *network) measureDatagrams(ctx context.Context, length time.Duration) error {
	rate, err := datagramRate(ctx, n.a, n.b, length)
	if err != nil {
		return fmt.Errorf("%s: %w", datagrams, err)
	}
	n.add(datagrams, rate/1000)
	return nil
}

func (n *network) measureRTT(ctx context.Context, length time.Duration) error {
	idle, err := roundTrips(ctx, n.a, n.b, length/2)
	if err != nil {
		return fmt.Errorf("%s: %w", rttIdle50, err)
	}
	n.add(rttIdle50, percentile(idle, 50))
	n.add(rttIdle99, percentile(idle, 99))

	lctx, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { _, _, err := streams(lctx, n.a, n.b, 1, time.Minute); done <- err }()
	loaded, err := roundTrips(ctx, n.a, n.b, length)
	stop()
	if serr := <-done; err == nil && serr != nil && ctx.Err() != nil {
		err = serr
	}
	if err != nil {
		return fmt.Errorf("%s: %w", rttLoaded, err)
	}
	n.add(rttLoaded, percentile(loaded, 99))
	return nil
}

// measureMemory takes the most resident memory of the daemons.
func (n *network) measureMemory() error {
	if len(n.daemons) == 0 {
		return nil
	}
	most := 0.0
	for _, d := range n.daemons {
		for _, pid := range d.host.PIDs(d.comm) {
			status, err := d.host.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(status)) {
				if f := strings.Fields(line); len(f) > 1 && f[0] == "VmRSS:" {
					kib, _ := strconv.ParseFloat(f[1], 64)
					most = max(most, kib/1024)
				}
			}
		}
	}
	n.add(memoryEach, most)
	return nil
}

// busy is the time for which the machine's processors have been at work.
func busy() (time.Duration, error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(data), "\n")
	var ticks int64
	for i, f := range strings.Fields(line)[1:] {
		v, _ := strconv.ParseInt(f, 10, 64)
		if i != 3 && i != 4 && i < 8 { // idle, iowait; guest time is in user already
			ticks += v
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil // USER_HZ is 100 everywhere
}

// daemonTime is the processor time of one daemon: of the relay, where there is one, else the mean of the two.
// What the kernel does on its behalf, such as sending the packets on, is in it for the most part.
func (n *network) daemonTime() (time.Duration, error) {
	list := n.daemons
	if len(list) == 3 {
		list = list[1:2]
	}
	var ticks int64
	for _, d := range list {
		for _, pid := range d.host.PIDs(d.comm) {
			stat, err := d.host.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil {
				return 0, err
			}
			// utime and stime are fields 14 and 15; the name before may hold blanks.
			f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
			for _, field := range f[11:13] {
				v, _ := strconv.ParseInt(field, 10, 64)
				ticks += v
			}
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond / time.Duration(max(1, len(list))), nil
}

// streams sends as much as it can over so many connections at once and tells what arrived.
func streams(ctx context.Context, from, to end, count int, length time.Duration) (bytes int64, took time.Duration, err error) {
	// Queues that the measurement before has filled are empty when a ping comes back.
	if _, err := from.WaitPing(ctx, to.addr, 10*time.Second); err != nil {
		return 0, 0, err
	}
	listener, err := to.Listen(ctx, netip.AddrPortFrom(to.addr, 0).String())
	if err != nil {
		return 0, 0, err
	}
	defer listener.Close()
	type pair struct{ out, in net.Conn }
	var pairs []pair
	defer func() {
		for _, p := range pairs {
			_ = p.out.Close()
			_ = p.in.Close()
		}
	}()
	for range count {
		out, err := from.Dial(ctx, "tcp", listener.Addr().String())
		if err != nil {
			return 0, 0, err
		}
		in, err := listener.Accept()
		if err != nil {
			return 0, 0, errors.Join(err, out.Close())
		}
		pairs = append(pairs, pair{out, in})
	}
	ctx, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	start := time.Now()
	var total atomic.Int64
	var wg sync.WaitGroup
	for _, p := range pairs {
		wg.Go(func() {
			buf := make([]byte, 256<<10)
			for {
				if _, err := p.out.Write(buf); err != nil {
					return
				}
			}
		})
		wg.Go(func() {
			buf := make([]byte, 256<<10)
			for {
				n, err := p.in.Read(buf)
				total.Add(int64(n))
				if err != nil {
					return
				}
			}
		})
		context.AfterFunc(ctx, func() { _ = p.out.Close(); _ = p.in.Close() })
	}
	<-ctx.Done()
	bytes, took = total.Load(), time.Since(start)
	wg.Wait()
	if bytes == 0 {
		err = errors.New("nothing arrived")
	}
	return bytes, took, err
}

// datagramRate looks for the highest rate of 64-byte datagrams at which fewer than one in a thousand is
// lost, by halving the interval in which it lies.
func datagramRate(ctx context.Context, from, to end, length time.Duration) (float64, error) {
	out, err := from.ListenUDP(ctx, netip.AddrPortFrom(from.addr, 0).String())
	if err != nil {
		return 0, err
	}
	defer out.Close()
	in, err := to.ListenUDP(ctx, netip.AddrPortFrom(to.addr, 0).String())
	if err != nil {
		return 0, err
	}
	defer in.Close()
	var received atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		batch := messages(64, nil)
		conn := ipv4.NewPacketConn(in)
		for {
			n, err := conn.ReadBatch(batch, 0)
			if err != nil && errors.Is(err, net.ErrClosed) {
				return
			}
			received.Add(int64(n))
		}
	}()
	dst := net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.addr, in.LocalAddr().(*net.UDPAddr).AddrPort().Port()))
	batch := messages(32, dst)
	conn := ipv4.NewPacketConn(out)
	// try offers a rate and gives what arrived per second, and whether that was nearly all.
	try := func(rate float64) (float64, bool, error) {
		before, sent := received.Load(), 0
		start := time.Now()
		for time.Since(start) < length/8 {
			if due := int(time.Since(start).Seconds() * rate); sent >= due {
				continue
			}
			n, err := conn.WriteBatch(batch, 0)
			if err != nil {
				return 0, false, err
			}
			sent += n
		}
		took := time.Since(start)
		for last := int64(-1); last != received.Load(); { // until nothing more arrives
			last = received.Load()
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
				return 0, false, ctx.Err()
			}
		}
		got := received.Load() - before
		return float64(got) / took.Seconds(), float64(got) > 0.999*float64(sent) && float64(sent) > 0.9*rate*took.Seconds(), nil
	}
	low, high, best := 0.0, 1.5e6, 0.0
	for range 8 {
		rate := (low + high) / 2
		got, fine, err := try(rate)
		if err == nil && !fine { // one that failed for a moment's hiccup would bar all higher ones
			got, fine, err = try(rate)
		}
		if err != nil {
			return 0, err
		}
		if fine {
			low, best = rate, max(best, got)
		} else {
			high = rate
		}
	}
	_ = in.Close()
	<-done
	return best, nil
}

func messages(count int, dst net.Addr) []ipv4.Message {
	list := make([]ipv4.Message, count)
	for i := range list {
		list[i] = ipv4.Message{Buffers: [][]byte{make([]byte, 64)}, Addr: dst}
	}
	return list
}

// roundTrips sends a datagram there and back again and again, and gives the times in microseconds, sorted.
func roundTrips(ctx context.Context, from, to end, length time.Duration) ([]float64, error) {
	if _, err := from.WaitPing(ctx, to.addr, 10*time.Second); err != nil { // as for streams
		return nil, err
	}
	in, err := to.ListenUDP(ctx, netip.AddrPortFrom(to.addr, 0).String())
	if err != nil {
		return nil, err
	}
	defer in.Close()
	go func() {
		buf := make([]byte, 2048)
		for {
			n, addr, err := in.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = in.WriteToUDPAddrPort(buf[:n], addr)
			}
		}
	}()
	out, err := from.Dial(ctx, "udp", netip.AddrPortFrom(to.addr, in.LocalAddr().(*net.UDPAddr).AddrPort().Port()).String())
	if err != nil {
		return nil, err
	}
	defer out.Close()
	var times []float64
	buf := make([]byte, 64)
	lost := 0
	for start := time.Now(); time.Since(start) < length && ctx.Err() == nil; {
		sent := time.Now()
		if _, err := out.Write(buf); err != nil {
			return nil, err
		}
		if err := out.SetReadDeadline(sent.Add(200 * time.Millisecond)); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(out, buf); err != nil {
			if lost++; lost > 20 {
				return nil, fmt.Errorf("%d datagrams without an answer: %w", lost, err)
			}
			continue
		}
		times = append(times, float64(time.Since(sent).Nanoseconds())/1000)
	}
	if len(times) == 0 {
		return nil, errors.New("no answer")
	}
	slices.Sort(times)
	return times, nil
}

// percentile of sorted values.
func percentile(sorted []float64, p int) float64 {
	return sorted[min(len(sorted)-1, len(sorted)*p/100)]
}
