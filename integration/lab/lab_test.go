package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"meshd/integration/lab/probe"
)

// newLab builds a lab for a test and closes it, leaks being failures. Without root the test is skipped;
// with root nothing is.
func newLab(t *testing.T, hosts int) (*Lab, context.Context) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("hosts made of namespaces need root")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	l, err := New(ctx, Config{Hosts: hosts})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l, ctx
}

func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// answers counts the answers to pings between hosts over the underlay.
func answers(t *testing.T, ctx context.Context, from, to *Host, options ...string) int {
	t.Helper()
	args := append([]string{"ping", "-n", "-q", "-c", "5", "-i", "0.01", "-W", "0.1"}, options...)
	r, err := from.Run(ctx, append(args, to.Addr.String())...)
	try(t, err)
	var sent, got int
	for line := range strings.Lines(r.Stdout) {
		if strings.Contains(line, "packets transmitted") {
			if _, err := fmt.Sscanf(line, "%d packets transmitted, %d received", &sent, &got); err != nil {
				t.Fatalf("%v in %q", err, line)
			}
		}
	}
	return got
}

func TestTenHostsAreFast(t *testing.T) {
	start := time.Now()
	l, ctx := newLab(t, 10)
	took := time.Since(start)
	t.Logf("ten hosts in %v", took)
	if took > 3*time.Second {
		t.Errorf("ten hosts took %v, want less than 3 s", took)
	}
	if got := answers(t, ctx, l.Host(1), l.Host(10)); got != 5 {
		t.Errorf("h1 got %d of 5 answers from h10", got)
	}
	r, err := l.Host(3).Out(ctx, "ping", "-6", "-c", "1", "-W", "1", l.Host(4).Addr6.String())
	if err != nil {
		t.Errorf("IPv6: %v %s", err, r)
	}
}

func TestHostIsItsOwn(t *testing.T) {
	l, ctx := newLab(t, 2)
	h := l.Host(1)
	for _, c := range []struct{ command, want string }{
		{"hostname", "h1"},
		{"ls /sys/class/net | tr '\n' ' '", "eth0 lo "},
		{"ls -d /sys/fs/bpf/meshd 2>/dev/null", ""},
		{"stat -f -c %T /sys/fs/bpf", "bpf_fs"},
		{"ls /var/lib/docker /var/lib/meshd 2>/dev/null", "/var/lib/docker:"},
		{"cat /etc/hostname", "h1"},
		{"cat /proc/1/comm", "sh"},
		{"test -c /dev/net/tun && echo yes", "yes"},
	} {
		if got, _ := h.Out(ctx, "/bin/sh", "-c", c.command); got != c.want {
			t.Errorf("%s: got %q, want %q", c.command, got, c.want)
		}
	}
	try(t, h.WriteFile("/etc/lab-test", []byte("x"), 0o600))
	try(t, h.WriteFile("/var/lib/meshd/lab-test", []byte("x"), 0o600))
	if _, err := l.Host(2).ReadFile("/etc/lab-test"); err == nil {
		t.Error("another host sees the file")
	}
	if _, err := os.Stat("/etc/lab-test"); err == nil {
		t.Error("the machine sees the file")
	}
}

func TestFaults(t *testing.T) {
	l, ctx := newLab(t, 3)
	a, b, c := l.Host(1), l.Host(2), l.Host(3)
	all := func(want12, want21, want13 int) {
		t.Helper()
		for _, x := range []struct {
			from, to *Host
			want     int
		}{{a, b, want12}, {b, a, want21}, {a, c, want13}} {
			if got := answers(t, ctx, x.from, x.to); got != x.want {
				t.Errorf("%s to %s: %d of 5 answers, want %d", x.from.Name, x.to.Name, got, x.want)
			}
		}
	}
	all(5, 5, 5)
	try(t, l.Cut(ctx, a, b))
	all(0, 0, 5)
	try(t, l.Heal(ctx, a, b))
	all(5, 5, 5)
	try(t, l.CutOff(ctx, a))
	all(0, 0, 0)
	try(t, l.HealAll(ctx))

	udp := func(port string, want bool) {
		t.Helper()
		var conn net.PacketConn
		try(t, b.Do(func() (err error) {
			conn, err = net.ListenPacket("udp", "0.0.0.0:"+port)
			return err
		}))
		defer conn.Close()
		try(t, a.Do(func() error {
			out, err := net.Dial("udp", b.Addr.String()+":"+port)
			if err == nil {
				_, err = out.Write([]byte("x"))
				_ = out.Close()
			}
			return err
		}))
		try(t, conn.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
		if _, _, err := conn.ReadFrom(make([]byte, 10)); (err == nil) != want {
			t.Errorf("datagram to port %s: %v, want arrival %v", port, err, want)
		}
	}
	try(t, l.BlockPort(ctx, a, b, "udp", 7000))
	udp("7000", false)
	udp("7001", true)
	try(t, l.CutOneWay(ctx, b, a))
	udp("7001", true) // the other way is open
	all(0, 0, 5)
	try(t, l.HealAll(ctx))

	try(t, l.Loss(ctx, a, b, 0.5))
	r, err := a.Out(ctx, "ping", "-n", "-q", "-c", "200", "-i", "0.002", "-W", "0.3", b.Addr.String())
	if err != nil || !strings.Contains(r, "% packet loss") {
		t.Fatalf("%v: %s", err, r)
	}
	var sent, got int
	if _, err := fmt.Sscanf(r[strings.Index(r, "200 packets"):], "%d packets transmitted, %d received", &sent, &got); err != nil {
		t.Fatal(err)
	}
	if got < 20 || got > 85 { // a quarter come through both ways; ten standard deviations are 61
		t.Errorf("with half the packets lost each way %d of %d pings were answered, want about 50", got, sent)
	}
}

func TestMTU(t *testing.T) {
	l, ctx := newLab(t, 2)
	a, b := l.Host(1), l.Host(2)
	big := func(from, to *Host) (answers int, toldMTU bool) {
		t.Helper()
		r, err := from.Run(ctx, "ping", "-n", "-c", "2", "-i", "0.01", "-W", "0.3", "-M", "do", "-s", "1200", to.Addr.String())
		try(t, err)
		return strings.Count(r.Stdout, "1208 bytes from"), strings.Contains(r.Stdout+r.Stderr, "mtu = 1000") || strings.Contains(r.Stdout+r.Stderr, "mtu=1000")
	}
	if n, _ := big(a, b); n != 2 {
		t.Fatalf("%d of 2 answers at 1500", n)
	}
	try(t, l.SetMTU(ctx, a, b, 1000))
	if n, told := big(a, b); n != 0 || !told {
		t.Errorf("at 1000: %d answers, told so: %v", n, told)
	}
	if n, told := big(b, a); n != 0 || !told {
		t.Errorf("at 1000, the other way: %d answers, told so: %v", n, told)
	}
	try(t, l.SetMTU(ctx, a, b, 0))
	for _, h := range l.Hosts {
		_, err := h.Out(ctx, "ip", "route", "flush", "cache")
		try(t, err)
	}
	if n, _ := big(a, b); n != 2 {
		t.Errorf("%d of 2 answers at 1500 again", n)
	}

	// With ICMP blocked a datagram that is too big vanishes, also as a part of a superframe.
	try(t, l.SetMTU(ctx, a, b, 1000))
	try(t, l.BlockICMP(ctx, a, b))
	var from, to *net.UDPConn
	open := func(h *Host, conn **net.UDPConn) {
		try(t, h.Do(func() (err error) {
			*conn, err = net.ListenUDP("udp", &net.UDPAddr{IP: h.Addr.AsSlice(), Port: 7000})
			return err
		}))
	}
	open(a, &from)
	open(b, &to)
	defer from.Close()
	defer to.Close()
	for _, c := range []struct {
		size, want int
	}{{900, 3}, {1200, 0}} {
		raw, err := from.SyscallConn()
		try(t, err)
		try(t, raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, c.size)
		}))
		try(t, err)
		try(t, raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
		}))
		try(t, err)
		_, err = from.WriteToUDPAddrPort(make([]byte, 3*c.size), netip.AddrPortFrom(b.Addr, 7000))
		try(t, err)
		try(t, to.SetReadDeadline(time.Now().Add(300*time.Millisecond)))
		got := 0
		for buf := make([]byte, 9000); ; got++ {
			if n, err := to.Read(buf); err != nil {
				break
			} else if n != c.size {
				t.Errorf("a datagram of %d bytes arrived, %d were sent", n, c.size)
			}
		}
		if got != c.want {
			t.Errorf("datagrams of %d bytes in a superframe: %d arrived, want %d", c.size, got, c.want)
		}
	}
}

func TestShape(t *testing.T) {
	l, ctx := newLab(t, 2)
	a, b := l.Host(1), l.Host(2)
	run := func() probe.Report {
		t.Helper()
		var from, to *net.UDPConn
		try(t, a.Do(func() (err error) {
			from, err = net.ListenUDP("udp", &net.UDPAddr{IP: a.Addr.AsSlice()})
			return err
		}))
		try(t, b.Do(func() (err error) {
			to, err = net.ListenUDP("udp", &net.UDPAddr{IP: b.Addr.AsSlice(), Port: 7000})
			return err
		}))
		defer from.Close()
		defer to.Close()
		rctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
		defer cancel()
		r, err := probe.Datagrams{Interval: time.Millisecond, Size: 100}.Run(rctx, from, to, netip.AddrPortFrom(b.Addr, 7000))
		try(t, err)
		return r
	}
	if r := run(); r.Lost != 0 || r.Duplicated != 0 || r.Reordered != 0 || r.Sent < 100 {
		t.Errorf("plain link: %v", r)
	}
	try(t, l.Shape(ctx, a, b, Shape{Delay: 20 * time.Millisecond, Jitter: 10 * time.Millisecond, Loss: 0.1, Duplicate: 0.1, Seed: 1}))
	r := run()
	t.Logf("shaped link: %v", r)
	if r.Lost == 0 || r.Duplicated == 0 || r.Reordered == 0 || r.MaxDelay < 20*time.Millisecond {
		t.Errorf("shaped link: %v", r)
	}
	if out, err := a.Out(ctx, "ping", "-c", "3", "-i", "0.05", "-q", b.Addr.String()); err != nil && !strings.Contains(out, " received") {
		t.Errorf("ping over the shaped link: %v", err)
	}
	try(t, l.Shape(ctx, a, b, Shape{}))
	if r := run(); r.Lost != 0 || r.Duplicated != 0 || r.Reordered != 0 {
		t.Errorf("plain link again: %v", r)
	}
}

func TestContainersWithoutDocker(t *testing.T) {
	l, ctx := newLab(t, 1)
	h := l.Host(1)
	c, err := h.Netns(ctx, "c1")
	try(t, err)
	if c.Ref != "netns:/run/netns/c1" {
		t.Errorf("reference is %q", c.Ref)
	}
	if out, err := c.Out(ctx, "ip", "-br", "link"); err != nil || !strings.HasPrefix(out, "lo ") || strings.Contains(out, "eth0") {
		t.Errorf("links of a new container: %v, %q", err, out)
	}
	if out, err := h.Out(ctx, "ip", "-br", "link", "show", "eth0"); err != nil || out == "" {
		t.Errorf("the host's thread did not come back: %v, %q", err, out)
	}
	ln, err := c.Listen(ctx, "127.0.0.1:0")
	try(t, err)
	defer ln.Close()
	tr, err := probe.Stream(ctx, ln, func() (net.Conn, error) { return c.Dial(ctx, "tcp", ln.Addr().String()) }, 20<<20, 1)
	if err != nil || tr.Bytes != 20<<20 {
		t.Errorf("stream: %v, %v", tr, err)
	}
	try(t, c.Remove(ctx))
	if out, _ := h.Out(ctx, "ip", "netns", "list"); out != "" {
		t.Errorf("left after removal: %q", out)
	}
}

func TestDocker(t *testing.T) {
	if os.Geteuid() == 0 {
		try(t, DockerRequirements())
	}
	l, ctx := newLab(t, 2)
	h := l.Host(1)
	start := time.Now()
	try(t, h.StartDocker(ctx))
	t.Logf("dockerd and image in %v", time.Since(start))
	c, err := h.Docker(ctx, "c1", "--hostname", "one")
	try(t, err)
	r, err := c.Exec(ctx, "hostname")
	if err != nil || r.Exit != 0 || strings.TrimSpace(r.Stdout) != "one" {
		t.Errorf("exec: %v, %v", r, err)
	}
	if out, err := c.Out(ctx, "ip", "-br", "addr", "show", "eth0"); err != nil || !strings.Contains(out, "172.17.") {
		t.Errorf("from the host, in the container's network: %v, %q", err, out)
	}
	if out, err := h.Out(ctx, "docker", "run", "--rm", Image, "echo", "hello"); err != nil || out != "hello" {
		t.Errorf("docker run: %v, %q", err, out)
	}
	if out, err := exec.Command("docker", "ps").CombinedOutput(); err == nil {
		t.Logf("the machine has a dockerd of its own: %s", out)
	}
	try(t, h.StopDocker(true))
	try(t, h.StartDocker(ctx))
	try(t, c.Remove(ctx))
}

// TestLeakCheck plants one leak of each kind and wants to see it reported, and then its end.
func TestLeakCheck(t *testing.T) {
	l, ctx := newLab(t, 1)
	h := l.Host(1)
	before, err := h.Snapshot(ctx)
	try(t, err)
	try(t, h.WaitSame(ctx, before))
	for _, c := range []struct{ kind, plant, remove string }{
		{"link", "ip link add leak0 type bridge", "ip link del leak0"},
		{"address", "ip addr add 10.9.9.9/32 dev lo", "ip addr del 10.9.9.9/32 dev lo"},
		{"route", "ip route add 10.9.9.0/24 dev eth0", "ip route del 10.9.9.0/24"},
		{"rule", "ip rule add from 10.9.9.9 lookup 99", "ip rule del from 10.9.9.9"},
		{"neighbour", "ip neigh add 198.18.1.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent", "ip neigh del 198.18.1.9 dev eth0"},
		{"nft", "nft add table inet leak", "nft delete table inet leak"},
		{"nft", "iptables -I FORWARD -s 10.9.9.9 -j ACCEPT", "iptables -D FORWARD -s 10.9.9.9 -j ACCEPT; nft delete table ip filter"},
		{"netns", "ip netns add leak", "ip netns del leak"},
		{"mount", "mkdir /run/leak && mount -t tmpfs leak /run/leak", "umount /run/leak && rmdir /run/leak"},
		{"file", "touch /run/leak", "rm /run/leak"},
		{"file", "mkdir -p /var/lib/meshd && touch /var/lib/meshd/leak", "rm -r /var/lib/meshd"},
		{"file", "mkdir /sys/fs/bpf/leak", "rmdir /sys/fs/bpf/leak"},
		{"process", "sleep 987654 & echo $! > /etc/leak.pid", "kill $(cat /etc/leak.pid)"},
		{"socket", "busybox nc -l -p 9876 </dev/null >/dev/null 2>&1 & echo $! > /etc/leak.pid", "kill $(cat /etc/leak.pid)"},
	} {
		if out, err := h.Out(ctx, "/bin/sh", "-c", "exec >/dev/null 2>&1; "+c.plant); err != nil {
			t.Errorf("%s: %v %s", c.plant, err, out)
			continue
		}
		seen := func() bool {
			now, err := h.Snapshot(ctx)
			return err == nil && strings.Contains(strings.Join(before.Diff(now), "\n"), "+ "+c.kind+": ")
		}
		if err := Until(ctx, 2*time.Second, "the leak to be seen", seen); err != nil {
			t.Errorf("%s: no %s is reported", c.plant, c.kind)
		}
		if out, err := h.Out(ctx, "/bin/sh", "-c", c.remove); err != nil {
			t.Errorf("%s: %v %s", c.remove, err, out)
		}
		if err := h.WaitSame(ctx, before); err != nil {
			t.Errorf("after %s: %v", c.remove, err)
		}
	}
}

// TestBusySocket: what waits in a socket to be read is no change of the host.
func TestBusySocket(t *testing.T) {
	l, ctx := newLab(t, 1)
	h := l.Host(1)
	var conn *net.UDPConn
	try(t, h.Do(func() (err error) {
		conn, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		return err
	}))
	defer conn.Close()
	before, err := h.Snapshot(ctx)
	try(t, err)
	_, err = conn.WriteTo(make([]byte, 1000), conn.LocalAddr())
	try(t, err)
	after, err := h.Snapshot(ctx)
	try(t, err)
	if diff := before.Diff(after); len(diff) > 0 {
		t.Errorf("%q", diff)
	}
}

// TestCrash kills a process that has a lab and wants everything gone.
func TestCrash(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("hosts made of namespaces need root")
	}
	if os.Getenv("MESHD_LAB_CRASH") != "" {
		l, ctx := newLab(t, 2)
		try(t, l.Host(1).StartDocker(ctx))
		_, err := l.Host(1).Docker(ctx, "c1")
		try(t, err)
		fmt.Println(l.scratch)
		try(t, syscall.Kill(os.Getpid(), syscall.SIGKILL))
		select {}
	}
	self, err := os.Executable()
	try(t, err)
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestCrash$")
	cmd.Env = append(os.Environ(), "MESHD_LAB_CRASH=1")
	out, _ := cmd.CombinedOutput()
	dir, _, _ := strings.Cut(string(out), "\n")
	if _, err := os.Stat(dir); err != nil || dir == "" {
		t.Fatalf("%v: %s", err, out)
	}
	marker := dir[strings.LastIndex(dir, "/")+1:]
	left := func() (names []string) {
		entries, _ := os.ReadDir("/proc")
		for _, e := range entries {
			env, _ := os.ReadFile("/proc/" + e.Name() + "/cgroup")
			args, _ := os.ReadFile("/proc/" + e.Name() + "/cmdline")
			if strings.Contains(string(env)+string(args), marker) {
				names = append(names, e.Name()+" "+string(args))
			}
		}
		return names
	}
	if err := Until(t.Context(), 10*time.Second, "the processes to end", func() bool { return len(left()) == 0 }); err != nil {
		t.Errorf("%v: %q", err, left())
	}
	try(t, sweep())
	if _, err := os.Stat(dir); err == nil {
		t.Errorf("%s is left", dir)
	}
	if out, _ := exec.Command("find", "/sys/fs/cgroup", "-name", marker+"*").Output(); len(out) > 0 {
		t.Errorf("cgroups are left: %s", out)
	}
}

// TestReboot wants a host to come back as it was at first, but for its disk.
func TestReboot(t *testing.T) {
	l, ctx := newLab(t, 1)
	h := l.Host(1)
	before, err := h.Snapshot(ctx)
	try(t, err)
	try(t, h.StartDocker(ctx))
	_, err = h.Docker(ctx, "keeps", "--restart", "always")
	try(t, err)
	_, err = h.Netns(ctx, "plain")
	try(t, err)
	_, err = h.Out(ctx, "/bin/sh", "-c", "ip link add b0 type bridge && nft add table inet x && mkdir /sys/fs/bpf/x && ip rule add from 10.9.9.9 lookup 99 && echo x > /var/lib/x")
	try(t, err)
	try(t, h.Reboot(ctx))
	try(t, h.WaitSame(ctx, before))
	if x, err := h.ReadFile("/var/lib/x"); err != nil || string(x) != "x\n" {
		t.Errorf("the disk lost its file: %v", err)
	}
	try(t, h.StartDocker(ctx))
	err = Until(ctx, 10*time.Second, "the container to be started again", func() bool {
		out, err := h.Out(ctx, "docker", "inspect", "-f", "{{.State.Running}}", "keeps")
		return err == nil && out == "true"
	})
	try(t, err)
	c, err := h.Adopt(ctx, "keeps", "keeps")
	try(t, err)
	if r, err := c.Exec(ctx, "true"); err != nil || r.Exit != 0 {
		t.Errorf("%v %s", err, r)
	}
}
