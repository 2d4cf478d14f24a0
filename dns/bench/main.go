// Command bench compares the name server with dnsmasq and, if a binary is given, with CoreDNS: the same 10,000
// names, the same load, in turns. It needs dnsmasq and dnsperf, and a machine that does nothing else:
//
//	go run ./dns/bench
//	go run ./dns/bench -coredns ./coredns
//
// For each round and server it prints answers per second of wall time and per second of the server's CPU
// time under full load, and the latency of 5,000 queries a second from a client of its own. The last lines
// are medians and their ratios.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"log"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"meshd/dns"
	"meshd/dns/records"
	"meshd/mesh"
)

const domain = "mesh.internal."

func main() {
	log.SetFlags(0)
	names := flag.Int("names", 10_000, "names in the domain")
	rounds := flag.Int("rounds", 5, "rounds")
	seconds := flag.Int("seconds", 5, "seconds of load each")
	coredns := flag.String("coredns", "", "CoreDNS binary with the plugins hosts and bind")
	serve := flag.String("serve", "", "serve on this address and do nothing else")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var err error
	if *serve != "" {
		err = runServer(ctx, *serve, *names)
	} else {
		err = compare(ctx, *names, *rounds, *seconds, *coredns)
	}
	if err != nil {
		log.Fatal(err)
	}
}

func addressOf(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 32, byte(i >> 8), byte(i)}) }

func runServer(ctx context.Context, addr string, names int) error {
	table, err := records.Open(records.Config{Self: mesh.PeerName{1}, Domain: domain, Now: time.Now()})
	if err != nil {
		return err
	}
	for i := range names {
		table.Announce(mesh.Endpoint{
			Owner: fmt.Sprintf("%064x", i), MAC: mesh.MAC{2, 0, 0, 0, byte(i >> 8), byte(i)},
			Addrs: []netip.Prefix{netip.PrefixFrom(addressOf(i), 12)}, Names: []string{fmt.Sprintf("c%d.%s", i, domain)},
		})
	}
	listen, err := netip.ParseAddrPort(addr)
	if err != nil {
		return err
	}
	local := dns.NewInterfaces(nil, nil)
	s, err := dns.New(dns.Config{Domain: domain, Listen: listen, TTL: time.Second, ResolvConf: "/dev/null", Access: local.Access}, table)
	if err != nil {
		return err
	}
	if err := s.Open(); err != nil {
		return err
	}
	return s.Run(ctx)
}

// contestant is a server under test.
type contestant struct {
	name string
	addr string
	args func(addr string) []string

	perWall, perCPU, p50, p99 []float64
	rss                       int // KiB
}

func meshdContestant(names int) (*contestant, error) {
	self, err := os.Executable()
	return &contestant{name: "meshd", addr: "127.0.0.1:15353", args: func(addr string) []string {
		return []string{self, "-names", strconv.Itoa(names), "-serve", addr}
	}}, err
}

// start runs the server until stop is called.
func (c *contestant) start(ctx context.Context) (pid int, stop func(), err error) {
	args := c.args(c.addr)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	stop = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	if err := waitFor(c.addr); err != nil {
		stop()
		return 0, nil, err
	}
	c.rss = residentKiB(cmd.Process.Pid)
	return cmd.Process.Pid, stop, nil
}

func residentKiB(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	f := strings.Fields(string(b))
	if err != nil || len(f) < 2 {
		return 0
	}
	pages, _ := strconv.Atoi(f[1])
	return pages * os.Getpagesize() / 1024
}

func compare(ctx context.Context, names, rounds, seconds int, coredns string) error {
	dir, err := os.MkdirTemp("", "dnsbench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var hosts, queries bytes.Buffer
	for i := range names {
		fmt.Fprintf(&hosts, "%s c%d.%s\n", addressOf(i), i, strings.TrimSuffix(domain, "."))
		fmt.Fprintf(&queries, "c%d.%s A\n", i*7919%names, domain)
	}
	hostsFile, queryFile := filepath.Join(dir, "hosts"), filepath.Join(dir, "queries")
	if err := os.WriteFile(hostsFile, hosts.Bytes(), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(queryFile, queries.Bytes(), 0o644); err != nil {
		return err
	}
	ours, err := meshdContestant(names)
	if err != nil {
		return err
	}
	servers := []*contestant{
		ours,
		{name: "dnsmasq", addr: "127.0.0.1:15354", args: func(addr string) []string {
			_, port, _ := net.SplitHostPort(addr)
			return []string{"dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--addn-hosts=" + hostsFile,
				"--listen-address=127.0.0.1", "--bind-interfaces", "--port=" + port, "--local=/mesh.internal/", "--user=root", "--pid-file="}
		}},
	}
	if coredns != "" {
		corefile := filepath.Join(dir, "Corefile")
		// Without reload: a file that is read again now and then is no part of the comparison.
		text := fmt.Sprintf("%s:15355 {\n\tbind 127.0.0.1\n\thosts %s {\n\t\tttl 1\n\t\treload 0\n\t}\n}\n", strings.TrimSuffix(domain, "."), hostsFile)
		if err := os.WriteFile(corefile, []byte(text), 0o644); err != nil {
			return err
		}
		servers = append(servers, &contestant{name: "CoreDNS", addr: "127.0.0.1:15355", args: func(string) []string {
			return []string{coredns, "-quiet", "-conf", corefile}
		}})
	}
	for round := range rounds {
		for _, s := range servers {
			if err := s.measure(ctx, queryFile, names, seconds); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			last := len(s.perCPU) - 1
			fmt.Printf("round %d %-8s %9.0f answers/s %9.0f answers/CPU-s   at 5,000/s: p50 %6.0f µs p99 %6.0f µs\n",
				round+1, s.name, s.perWall[last], s.perCPU[last], s.p50[last], s.p99[last])
		}
	}
	for _, s := range servers {
		fmt.Printf("median  %-8s %9.0f answers/s %9.0f answers/CPU-s   at 5,000/s: p50 %6.0f µs p99 %6.0f µs   %d KiB resident\n",
			s.name, median(s.perWall), median(s.perCPU), median(s.p50), median(s.p99), s.rss)
	}
	for _, s := range servers[1:] {
		fmt.Printf("%s/%s: %.2f answers/s, %.2f answers/CPU-s, %.2f p99\n", ours.name, s.name,
			median(ours.perWall)/median(s.perWall), median(ours.perCPU)/median(s.perCPU), median(ours.p99)/median(s.p99))
	}
	return nil
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

var completed = regexp.MustCompile(`Queries completed:\s+(\d+)`)

func (c *contestant) measure(ctx context.Context, queryFile string, names, seconds int) error {
	pid, stop, err := c.start(ctx)
	if err != nil {
		return err
	}
	defer stop()
	_, port, _ := net.SplitHostPort(c.addr)
	before, err := cpuSeconds(pid)
	if err != nil {
		return err
	}
	start := time.Now()
	out, err := exec.CommandContext(ctx, "dnsperf", "-s", "127.0.0.1", "-p", port, "-d", queryFile,
		"-l", strconv.Itoa(seconds), "-c", "20", "-q", "200").CombinedOutput()
	if err != nil {
		return fmt.Errorf("dnsperf: %w: %s", err, out)
	}
	wall := time.Since(start).Seconds()
	after, err := cpuSeconds(pid)
	if err != nil {
		return err
	}
	m := completed.FindSubmatch(out)
	if m == nil {
		return fmt.Errorf("dnsperf said %s", out)
	}
	n, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		return err
	}
	c.perWall = append(c.perWall, n/wall)
	c.perCPU = append(c.perCPU, n/(after-before))
	p50, p99, _, err := latency(ctx, c.addr, names, 5000, 2*time.Second)
	c.p50, c.p99 = append(c.p50, p50), append(c.p99, p99)
	return err
}

// cpuSeconds reads utime and stime of a process with all its threads (proc_pid_stat(5)).
func cpuSeconds(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	user, err := strconv.ParseFloat(f[11], 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseFloat(f[12], 64)
	const ticks = 100 // USER_HZ, the same on every architecture of Linux that we build for
	return (user + system) / ticks, err
}

func question(id uint16, i int) []byte {
	b := []byte{byte(id >> 8), byte(id), 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	b = append(b, records.WireName(fmt.Sprintf("c%d.%s", i, domain))...)
	return append(b, 0, 1, 0, 1)
}

func waitFor(addr string) error {
	for range 100 {
		conn, err := net.Dial("udp", addr)
		if err != nil {
			return err
		}
		_, _ = conn.Write(question(1, 0))
		_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := bufio.NewReader(conn).Read(make([]byte, 512))
		conn.Close()
		if err == nil && n > 0 {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("no answer from %s", addr)
}

// latency asks rate questions a second at even distances and returns the median and the 99th percentile
// of the answers' times in microseconds; lost ones count as a second.
func latency(ctx context.Context, addr string, names, rate int, length time.Duration) (p50, p99 float64, lost int, err error) {
	conn, err := net.Dial("udp", addr)
	if err != nil {
		return 0, 0, 0, err
	}
	defer conn.Close()
	// Bursts of answers must not be lost here.
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err != nil {
		return 0, 0, 0, err
	}
	if err := raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20) }); err != nil {
		return 0, 0, 0, err
	}
	total := int(length.Seconds() * float64(rate))
	var sent [1 << 16]atomic.Int64 // nanoseconds after start, by id
	start := time.Now()
	took := make([]float64, 0, total)
	done := make(chan struct{})
	go func() { // ends when conn is closed or silent
		defer close(done)
		b := make([]byte, 1024)
		for len(took) < total {
			_ = conn.SetReadDeadline(time.Now().Add(time.Second))
			n, err := conn.Read(b)
			if err != nil {
				return
			}
			if n >= 12 {
				took = append(took, float64(int64(time.Since(start))-sent[binary.BigEndian.Uint16(b)].Load())/1e3)
			}
		}
	}()
	for i := range total {
		at := start.Add(time.Duration(i) * time.Second / time.Duration(rate))
		if d := time.Until(at); d > 0 {
			time.Sleep(d)
		}
		if ctx.Err() != nil {
			return 0, 0, 0, ctx.Err()
		}
		id := uint16(i)
		q := question(id, i%names)
		sent[id].Store(int64(time.Since(start)))
		if _, err := conn.Write(q); err != nil {
			return 0, 0, 0, err
		}
	}
	<-done
	for ; len(took) < total; lost++ {
		took = append(took, 1e6)
	}
	slices.Sort(took)
	return took[total/2], took[total*99/100], lost, nil
}
