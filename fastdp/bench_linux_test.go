package fastdp

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// What one frame costs in the programs alone, without the kernel's own work around them.
func BenchmarkPrograms(b *testing.B) {
	k := newBench(b)
	k.ready()
	udp := ip4("10.32.0.1", "10.32.0.3", 17, udp(9, 9, make([]byte, 64)...)...)
	tcp := ip4("10.32.0.1", "10.32.0.3", 6, make([]byte, 84)...)
	p7 := netip.MustParseAddr("192.0.2.7")
	k.put(k.Peers, uint32(9), peerValue(Peer{ID: 9, Addr: p7}, p7, true, true))
	for _, c := range []struct {
		name  string
		prog  *ebpf.Program
		frame []byte
	}{
		{"container to peer, UDP", k.PortIn, ether(far, mine, 0x0800, udp...)},
		{"container to peer, TCP", k.PortIn, ether(far, mine, 0x0800, tcp...)},
		{"container to container", k.PortIn, ether(near, mine, 0x0800, tcp...)},
		{"bridge to container", k.PortOut, ether(mine, near, 0x0800, tcp...)},
		{"host to peer", k.BridgeOut, ether(far, host, 0x0800, tcp...)},
		{"tunnel to container", k.received(outer{vni(upID, selfID), p7, 255}), ether(mine, far, 0x0800, tcp...)},
		{"tunnel to tunnel", k.received(outer{vni(upID, 9), p7, 255}), ether(slow, far, 0x0800, tcp...)},
	} {
		b.Run(c.name, func(b *testing.B) { k.measure(b, c.prog, c.frame) })
	}
}

func (k *bench) measure(b *testing.B, p *ebpf.Program, frame []byte) {
	b.Helper()
	const repeat = 1000000
	var best time.Duration
	for range b.N {
		// The kernel runs it so often and reports the mean.
		_, took, err := p.Benchmark(frame, repeat, nil)
		if err != nil {
			b.Fatal(err)
		}
		if best == 0 || took < best {
			best = took
		}
	}
	b.ReportMetric(float64(best.Nanoseconds()), "ns/frame")
	b.ReportMetric(0, "ns/op")
}

// The maps full: 4,096 peers and 65,000 endpoints must not make a frame dearer.
func TestScale(t *testing.T) {
	k := newBench(t)
	k.ready()
	// cost is what a frame to one of these takes: the median of several, for each may share its bucket with others.
	mac := func(i int) mesh.MAC { return mesh.MAC{0x0a, 1, byte(i >> 16), byte(i >> 8), byte(i), 7} }
	tunnelled := k.received(outer{vni(upID, selfID), netip.MustParseAddr("192.0.2.7"), 255})
	cost := func(endpoints int) (out, in time.Duration) {
		outs, ins := make([]time.Duration, 21), make([]time.Duration, 21)
		for i := range outs {
			remote := mac(i * endpoints / len(outs))
			to := ether(remote, mine, 0x0800, ip4("10.32.0.1", "10.32.0.3", 6, make([]byte, 20)...)...)
			from := ether(mine, remote, 0x0800, ip4("10.32.0.3", "10.32.0.1", 6, make([]byte, 20)...)...)
			k.put(k.Endpoints, macKey(remote), bpfEndpoint{Peer: upID, Nets: netset{1}})
			for frame, p := range map[string]*ebpf.Program{string(to): k.PortIn, string(from): tunnelled} {
				verdict, took, err := p.Benchmark([]byte(frame), 50000, nil)
				if err != nil || verdict != redirected {
					t.Fatalf("got %d, %v", verdict, err)
				}
				if p == k.PortIn {
					outs[i] = took
				} else {
					ins[i] = took
				}
			}
		}
		slices.Sort(outs)
		slices.Sort(ins)
		return outs[len(outs)/2], ins[len(ins)/2]
	}
	var few, many time.Duration
	var filled time.Duration
	peers, endpoints := 0, 0
	for _, size := range []struct{ peers, endpoints int }{{1, 30}, {100, 3000}, {maxPeers - 2, 65000}} {
		begun := time.Now()
		for id := mesh.ShortID(peers + 1); int(id) <= size.peers; id++ {
			if id != upID {
				k.peer(Peer{ID: id, Addr: netip.AddrFrom4([4]byte{198, 18, byte(id >> 8), byte(id)})}, true)
			}
		}
		for i := endpoints; i < size.endpoints; i++ {
			k.put(k.Endpoints, macKey(mac(i)), bpfEndpoint{Peer: uint16(1 + i%size.peers), Nets: netset{1}})
		}
		filled += time.Since(begun)
		peers, endpoints = size.peers, size.endpoints
		out, in := cost(endpoints)
		t.Logf("%d peers, %d endpoints: out %v, in %v per frame", peers, endpoints, out, in)
		if many = out + in; few == 0 {
			few = many
		}
	}
	var memory uint64
	for name, m := range (&objects{bpfObjects: k.bpfObjects}).maps() {
		info, err := m.Info()
		if err != nil {
			t.Fatal(err)
		}
		n, _ := info.Memlock()
		memory += n
		t.Logf("map %s: %d KiB", name, n>>10)
	}
	t.Logf("%d MiB; filled in %v", memory>>20, filled)
	if many > 2*few+50*time.Nanosecond && !slowMachine {
		t.Errorf("a frame costs %v, out and in, want about the %v of an empty mesh", many, few)
	}
	if memory > 64<<20 {
		t.Errorf("maps take %d bytes", memory)
	}
}

// BenchmarkCompare measures the kernel path beside a Linux bridge with a vxlan port and static FDB, in
// alternating rounds, and reports the median of the rounds' ratios: of throughput and datagrams (more is
// better) and of round-trip time (less is). FASTDP_ROUNDS: default 3. The underlay passes superframes whole, or with
// FASTDP_WIRE=1 cut to its MTU, or with FASTDP_WIRE=gro cut and joined again by the receiving ends. With FASTDP_RELAY=1
// it is the kernel path by way of a third host beside the direct one, and with FASTDP_RELAY=router bridge and vxlan with
// a third host as their router, beside the direct ones. It wants a quiet machine.
func BenchmarkCompare(b *testing.B) {
	needRoot(b)
	rounds, _ := strconv.Atoi(os.Getenv("FASTDP_ROUNDS"))
	if rounds == 0 {
		rounds = 3
	}
	type candidate struct {
		name string
		a, b *labContainer
		got  map[string][]float64
	}
	var all []*candidate
	names := []string{"kernel path", "bridge and vxlan"}
	switch os.Getenv("FASTDP_RELAY") {
	case "":
	case "router":
		names = []string{"routed", "bridge and vxlan"}
	default:
		names = []string{"relayed", "kernel path"}
	}
	for _, name := range names {
		l := newLab(b)
		c := &candidate{name: name, got: make(map[string][]float64)}
		c.a, c.b = l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
		c.a.knows(c.b)
		c.b.knows(c.a)
		if name == "relayed" || name == "routed" {
			l.host()
		}
		if wire := os.Getenv("FASTDP_WIRE"); wire != "" {
			l.cutToMTU(wire == "gro")
		}
		switch name {
		case "kernel path":
			l.startAll()
		case "relayed":
			l.startRelayed(3)
		case "routed":
			l.run("nsenter", "--net=/run/netns/"+l.hosts[2].ns, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.eth0.send_redirects=0")
			l.ip("h1", "route add 192.0.2.2/32 via 192.0.2.3")
			l.ip("h2", "route add 192.0.2.1/32 via 192.0.2.3")
			l.hosts = l.hosts[:2]
			l.plainVXLAN()
		default:
			l.plainVXLAN()
		}
		all = append(all, c)
	}
	metrics := []string{"TCP 1", "TCP 4", "datagrams", "RTT"}
	for range rounds {
		for _, c := range all {
			l := c.a.host.lab
			c.got["TCP 1"] = append(c.got["TCP 1"], l.tcp(c.a, c.b, 1))
			c.got["TCP 4"] = append(c.got["TCP 4"], l.tcp(c.a, c.b, 4))
			c.got["datagrams"] = append(c.got["datagrams"], l.blast(c.a, c.b))
			c.got["RTT"] = append(c.got["RTT"], l.pingpong(c.a, c.b))
		}
		slices.Reverse(all)
	}
	slices.SortFunc(all, func(x, y *candidate) int { return slices.Index(names, x.name) - slices.Index(names, y.name) })
	b.ReportMetric(0, "ns/op")
	median := func(v []float64) float64 { v = slices.Sorted(slices.Values(v)); return v[len(v)/2] }
	for _, m := range metrics {
		var ratios []float64
		for i := range rounds {
			ratios = append(ratios, all[0].got[m][i]/all[1].got[m][i])
		}
		b.ReportMetric(median(ratios), strings.ReplaceAll(m, " ", "")+"-ratio")
		b.Logf("%s: rounds %.2f; %s %.2f, %s %.2f", m, slices.Sorted(slices.Values(ratios)),
			all[0].name, median(all[0].got[m]), all[1].name, median(all[1].got[m]))
	}
}

// plainVXLAN makes of the lab's two hosts what flannel and Docker's overlay make.
func (l *lab) plainVXLAN() {
	for i, h := range l.hosts {
		name, other := fmt.Sprintf("h%d", h.n), l.hosts[1-i]
		l.ip(name, fmt.Sprintf("link add vx mtu 1410 type vxlan id 7 dstport 6784 local %v nolearning", h.addr()))
		l.ip(name, "link set vx master mesh up")
		for _, c := range other.cts {
			l.run("nsenter", "--net=/run/netns/"+h.ns, "bridge", "fdb", "append", c.port.MAC.String(), "dev", "vx", "dst", other.addr().String())
			l.run("nsenter", "--net=/run/netns/"+h.ns, "bridge", "fdb", "add", c.port.MAC.String(), "dev", "vx", "master", "static")
		}
	}
}

// cutToMTU has the underlay carry packets of MTU size only. With gro the receiving ends join what belongs together, as
// the drivers of network cards do by default; those of veth devices do not.
func (l *lab) cutToMTU(gro bool) {
	for _, h := range l.hosts {
		for _, at := range [][2]string{{h.ns, "eth0"}, {l.prefix + "net", fmt.Sprintf("p%d", h.n)}} {
			l.run("nsenter", "--net=/run/netns/"+at[0], "ethtool", "-K", at[1], "tso", "off", "tx-udp-segmentation", "off",
				"tx-udp_tnl-segmentation", "off", "tx-udp_tnl-csum-segmentation", "off", "gro", map[bool]string{true: "on", false: "off"}[gro])
		}
	}
}

const benchFor = time.Second

// tcp is TCP throughput in Gbit/s.
func (l *lab) tcp(from, to *labContainer, streams int) float64 {
	l.t.Helper()
	return l.measured("drain", "pour "+strconv.Itoa(streams), from, to)
}

// blast is how many thousand 64-byte datagrams per second arrive when they are sent as fast as one socket can.
func (l *lab) blast(from, to *labContainer) float64 {
	l.t.Helper()
	return l.measured("sink", "blast", from, to) / 1000
}

// pingpong is the median round trip of small datagrams, in microseconds.
func (l *lab) pingpong(from, to *labContainer) float64 {
	l.t.Helper()
	return l.measured("echo", "ping", from, to)
}

func (l *lab) measured(far, near string, from, to *labContainer) float64 {
	l.t.Helper()
	addr := net.JoinHostPort(to.port.Addrs[0].Addr().String(), "7779")
	f := l.process(to.ns, "bench", stream{Listen: addr, To: far})
	var ready struct{}
	if err := f.out.Decode(&ready); err != nil {
		l.t.Fatal(err)
	}
	n := l.process(from.ns, "bench", stream{To: addr, Listen: near})
	var result float64
	if err := n.out.Decode(&result); err != nil {
		l.t.Fatal(err)
	}
	f.in.Close()
	if far != "echo" {
		if err := f.out.Decode(&result); err != nil {
			l.t.Fatal(err)
		}
	}
	n.in.Close()
	if err := errors.Join(n.cmd.Wait(), f.cmd.Wait()); err != nil {
		l.t.Fatal(err)
	}
	return result
}

// benchMain is one end of a measurement. They use the system calls alone: Go's poller would be most of
// what is measured.
func benchMain(arg string) int {
	var s stream
	if err := json.Unmarshal([]byte(arg), &s); err != nil {
		return 2
	}
	out := json.NewEncoder(os.Stdout)
	if s.To == "drain" {
		return drain(s.Listen, out)
	}
	if near, n, ok := strings.Cut(s.Listen, " "); ok && near == "pour" {
		streams, _ := strconv.Atoi(n)
		return pour(s.To, streams, out)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 1
	}
	server := s.To == "sink" || s.To == "echo"
	at := s.To
	if server {
		at = s.Listen
	}
	ap := netip.MustParseAddrPort(at)
	sa := &unix.SockaddrInet4{Addr: ap.Addr().As4(), Port: int(ap.Port())}
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200000})
	buf := make([]byte, 64)
	if server {
		if err := unix.Bind(fd, sa); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		out.Encode(struct{}{}) // ready
		if s.To == "echo" {
			stop := closedStdin()
			for {
				n, from, err := unix.Recvfrom(fd, buf, 0)
				if err == nil {
					unix.Sendto(fd, buf[:n], 0, from)
					continue
				}
				select {
				case <-stop:
					return 0
				default:
				}
			}
		}
		var n int
		var first, last time.Time
		for {
			if _, err := unix.Read(fd, buf); err != nil {
				if n > 0 {
					break
				}
				continue
			}
			if n++; n == 1 {
				first = time.Now()
			}
			if n%1000 == 0 {
				last = time.Now()
			}
		}
		out.Encode(float64(n/1000*1000) / last.Sub(first).Seconds())
		return 0
	}
	if err := unix.Connect(fd, sa); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	end := time.Now().Add(benchFor)
	if s.Listen == "blast" {
		n := 0
		for ; n%100 != 0 || time.Now().Before(end); n++ {
			unix.Write(fd, buf)
		}
		out.Encode(float64(n))
		return 0
	}
	var rtts []time.Duration
	for time.Now().Before(end) {
		begun := time.Now()
		unix.Write(fd, buf)
		if _, err := unix.Read(fd, buf); err == nil {
			rtts = append(rtts, time.Since(begun))
		}
	}
	if len(rtts) == 0 {
		return 1
	}
	slices.Sort(rtts)
	out.Encode(float64(rtts[len(rtts)/2].Nanoseconds()) / 1000)
	return 0
}

// pour sends on so many connections at once.
func pour(to string, streams int, out *json.Encoder) int {
	var conns []net.Conn
	for range streams {
		c, err := net.Dial("tcp", to)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		conns = append(conns, c)
	}
	end := time.Now().Add(benchFor)
	done := make(chan error)
	for _, c := range conns {
		go func() {
			buf := make([]byte, 128<<10)
			for time.Now().Before(end) {
				if _, err := c.Write(buf); err != nil {
					done <- err
					return
				}
			}
			done <- c.Close()
		}()
	}
	for range conns {
		if err := <-done; err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	out.Encode(0.0)
	return 0
}

// drain receives until the last connection closes, and says the rate in Gbit/s.
func drain(at string, out *json.Encoder) int {
	l, err := net.Listen("tcp", at)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	out.Encode(struct{}{}) // ready
	var total, open atomic.Int64
	begun := make(chan time.Time, 1)
	done := make(chan struct{})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			select {
			case begun <- time.Now():
			default:
			}
			open.Add(1)
			go func() {
				buf := make([]byte, 256<<10)
				for {
					n, err := c.Read(buf)
					total.Add(int64(n))
					if err != nil {
						break
					}
				}
				if open.Add(-1) == 0 {
					close(done)
				}
			}()
		}
	}()
	<-done
	out.Encode(float64(total.Load()) * 8 / time.Since(<-begun).Seconds() / 1e9)
	return 0
}
