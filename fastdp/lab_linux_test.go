package fastdp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// The lab: hosts and containers are network namespaces, the underlay is a bridge in one more. The
// Datapath of a host runs in a process of its own, this test binary started again, so that it can be
// killed; it is spoken to in lines of JSON.

const labEnv = "FASTDP_LAB"

func TestMain(m *testing.M) {
	switch role, arg, _ := strings.Cut(os.Getenv(labEnv), " "); role {
	case "host":
		os.Exit(hostMain(arg))
	case "send":
		os.Exit(sendMain(arg))
	case "receive":
		os.Exit(receiveMain(arg))
	case "bench":
		os.Exit(benchMain(arg))
	case "tcp":
		os.Exit(tcpMain(arg))
	}
	os.Exit(m.Run())
}

// order is what the test tells a host's process to do; answer what it says.
type order struct {
	Op        string
	Name      mesh.PeerName
	ID        mesh.ShortID
	Peers     []Peer
	Endpoints []mesh.Endpoint
	Port      Port
	Index     int
}

type answer struct {
	Err      string
	Paths    []PathStatus
	Counters map[string]Counter
	Offences []Offence
	Status   Status
	Ports    []Port
	Used     map[mesh.MAC]time.Duration
}

type hostConfig struct {
	Config
	Clsact bool
	Layout int
}

// hostMain is the process of a host.
func hostMain(arg string) int {
	var cfg hostConfig
	if err := json.Unmarshal([]byte(arg), &cfg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	cfg.Config.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	cfg.Config.clsact, cfg.Config.layout = cfg.Clsact, cfg.Layout
	out := json.NewEncoder(os.Stdout)
	d, err := Open(cfg.Config)
	if err != nil {
		out.Encode(answer{Err: err.Error()})
		return 1
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ran := make(chan struct{})
	go func() { defer close(ran); d.Run(ctx) }()
	out.Encode(answer{})
	in := json.NewDecoder(os.Stdin)
	for {
		var o order
		if err := in.Decode(&o); err != nil {
			return 0
		}
		var a answer
		switch o.Op {
		case "self":
			err = d.SetSelf(o.Name, o.ID)
		case "peers":
			err = d.SetPeers(o.Peers)
		case "endpoints":
			err = d.SetEndpoints(o.Endpoints)
		case "attach":
			err = d.AttachPort(o.Port)
		case "detach":
			err = d.DetachPort(o.Index)
		case "settle":
			err = d.Settle()
		case "look":
			a.Counters, err = d.Counters()
			a.Paths, a.Offences, a.Status, a.Ports, a.Used = d.Paths(), d.Offences(), d.Status(), d.Ports(), d.LastUsed()
		case "close", "remove":
			d.Leave()
			cancel()
			<-ran
			if err = d.Close(); o.Op == "remove" {
				err = errors.Join(err, Remove(cfg.Config))
			}
		}
		if err != nil {
			a.Err = err.Error()
		}
		out.Encode(a)
	}
}

type lab struct {
	t      testing.TB
	prefix string
	dir    string // a bpffs
	v6     bool   // underlay
	clsact bool
	hosts  []*labHost
}

type labHost struct {
	lab  *lab
	n    int // from 1: short id 16+n, underlay .n
	ns   string
	name mesh.PeerName
	cfg  hostConfig
	cts  []*labContainer

	as  []string // a command that starts its process, such as setpriv
	cmd *exec.Cmd
	in  *json.Encoder
	out *json.Decoder
}

type labContainer struct {
	host *labHost
	ns   string
	veth string
	port Port
}

var labs atomic.Int32

func newLab(t testing.TB) *lab {
	needRoot(t)
	l := &lab{t: t, prefix: fmt.Sprintf("fastdp-%d-%d-", os.Getpid()%10000, labs.Add(1)), dir: t.TempDir()}
	if err := unix.Mount("bpf", l.dir, "bpf", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(l.dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	l.netns("net")
	l.ip("net", "link add sw type bridge")
	l.ip("net", "link set sw up mtu 9000")
	return l
}

func (l *lab) netns(name string) string {
	ns := l.prefix + name
	l.run("ip", "netns", "add", ns)
	l.t.Cleanup(func() { l.run("ip", "netns", "del", ns) })
	l.ip(name, "link set lo up")
	return ns
}

func (l *lab) run(args ...string) string {
	l.t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		l.t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (l *lab) ip(name, command string) string {
	l.t.Helper()
	return l.run(append([]string{"ip", "-n", l.prefix + name}, strings.Fields(command)...)...)
}

func (l *lab) inside(ns string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=/run/netns/" + ns}, args...)...)
}

// host makes a host with its bridge and TAP.
func (l *lab) host() *labHost {
	n := len(l.hosts) + 1
	name := fmt.Sprintf("h%d", n)
	h := &labHost{lab: l, n: n, ns: l.netns(name), name: mesh.PeerName{byte(n)}}
	l.hosts = append(l.hosts, h)
	l.ip(name, fmt.Sprintf("link add eth0 mtu 1500 type veth peer name p%d mtu 1500 netns %snet", n, l.prefix))
	l.ip("net", fmt.Sprintf("link set p%d master sw up", n))
	l.ip(name, fmt.Sprintf("addr add 192.0.2.%d/24 dev eth0", n))
	l.ip(name, fmt.Sprintf("addr add 2001:db8::%d/64 dev eth0 nodad", n))
	l.ip(name, "link set eth0 up")
	l.ip(name, "link add mesh mtu 1410 type bridge")
	l.ip(name, fmt.Sprintf("link set mesh address 02:00:00:0%d:00:00 up", n))
	l.ip(name, "tuntap add mesh-tap mode tap")
	l.ip(name, "link set mesh-tap mtu 1410 master mesh up")
	dir := filepath.Join(l.dir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		l.t.Fatal(err)
	}
	h.cfg = hostConfig{Config: Config{PinDir: filepath.Join(dir, "meshd"), AnnounceDelay: time.Millisecond, SettleAfter: time.Hour}, Clsact: l.clsact}
	return h
}

func (h *labHost) id() mesh.ShortID { return mesh.ShortID(16 + h.n) }

func (h *labHost) addr() netip.Addr {
	if h.lab.v6 {
		return netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", h.n))
	}
	return netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", h.n))
}

// container makes a namespace with ethmesh on the bridge; addrs are with the length of their subnet.
func (h *labHost) container(addrs ...string) *labContainer {
	l := h.lab
	k := len(h.cts) + 1
	name := fmt.Sprintf("h%dc%d", h.n, k)
	c := &labContainer{host: h, ns: l.netns(name), veth: fmt.Sprintf("vmesh%d", k)}
	c.port = Port{MAC: mesh.MAC{2, 0, 0, byte(h.n), 0, byte(k)}, Addrs: prefixes(addrs...)}
	host := fmt.Sprintf("h%d", h.n)
	l.ip(host, fmt.Sprintf("link add %s mtu 1410 type veth peer name ethmesh mtu 1410 address %v netns %s", c.veth, c.port.MAC, c.ns))
	l.ip(host, fmt.Sprintf("link set %s master mesh up", c.veth))
	for _, a := range addrs {
		nodad := ""
		if strings.Contains(a, ":") {
			nodad = " nodad"
		}
		l.ip(name, "addr add "+a+" dev ethmesh"+nodad)
	}
	l.ip(name, "link set ethmesh up")
	c.port.Index = l.index(host, c.veth)
	h.cts = append(h.cts, c)
	return c
}

func (l *lab) index(name, dev string) int {
	l.t.Helper()
	var link []struct{ Ifindex int }
	if err := json.Unmarshal([]byte(l.ip(name, "-j link show "+dev)), &link); err != nil || len(link) != 1 {
		l.t.Fatalf("index of %s: %v", dev, err)
	}
	return link[0].Ifindex
}

func (c *labContainer) ip(command string) string {
	c.host.lab.t.Helper()
	return c.host.lab.run(append([]string{"ip", "-n", c.ns}, strings.Fields(command)...)...)
}

// knows gives the container the other's MAC: the userspace path would answer its ARP.
func (c *labContainer) knows(others ...*labContainer) {
	for _, o := range others {
		for _, a := range o.port.Addrs {
			c.ip(fmt.Sprintf("neigh replace %v lladdr %v dev ethmesh nud permanent", a.Addr(), o.port.MAC))
		}
	}
}

// start begins the host's process. It is told nothing yet.
func (h *labHost) start() error {
	arg, err := json.Marshal(h.cfg)
	if err != nil {
		return err
	}
	h.cmd = h.lab.inside(h.ns, append(slices.Clone(h.as), os.Args[0])...)
	h.cmd.Env = append(os.Environ(), labEnv+"=host "+string(arg))
	h.cmd.Stderr = logLines(h.lab.t, fmt.Sprintf("h%d", h.n))
	stdin, err := h.cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := h.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := h.cmd.Start(); err != nil {
		return err
	}
	cmd := h.cmd
	h.lab.t.Cleanup(func() { stdin.Close(); cmd.Process.Kill(); cmd.Wait() })
	h.in, h.out = json.NewEncoder(stdin), json.NewDecoder(stdout)
	var a answer
	if err := h.out.Decode(&a); err != nil {
		return fmt.Errorf("host %d: %w", h.n, err)
	}
	if a.Err != "" {
		return errors.New(a.Err)
	}
	return nil
}

func logLines(t testing.TB, who string) io.Writer {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for s := bufio.NewScanner(r); s.Scan(); {
			fmt.Fprintf(t.Output(), "%s: %s\n", who, s.Text())
		}
	}()
	t.Cleanup(func() { w.Close() })
	return w
}

// kill is kill -9, waited for.
func (h *labHost) kill() {
	h.cmd.Process.Kill()
	h.cmd.Wait()
}

func (h *labHost) tell(o order) answer {
	h.lab.t.Helper()
	a, err := h.try(o)
	if err != nil {
		h.lab.t.Fatalf("host %d: %s: %v", h.n, o.Op, err)
	}
	return a
}

func (h *labHost) try(o order) (a answer, err error) {
	if err := h.in.Encode(o); err != nil {
		return a, err
	}
	if err := h.out.Decode(&a); err != nil {
		return a, err
	}
	if a.Err != "" {
		err = errors.New(a.Err)
	}
	return a, err
}

func (h *labHost) look() answer { h.lab.t.Helper(); return h.tell(order{Op: "look"}) }

// brief tells the host all that a meshd would: itself, the others, all endpoints, its ports. via, by
// host number, says who relays to whom.
func (h *labHost) brief(via map[int]int) {
	h.lab.t.Helper()
	h.tell(order{Op: "self", Name: h.name, ID: h.id()})
	var peers []Peer
	var ends []mesh.Endpoint
	for _, o := range h.lab.hosts {
		for _, c := range o.cts {
			ends = append(ends, mesh.Endpoint{Peer: o.name, Owner: c.ns, MAC: c.port.MAC, Addrs: c.port.Addrs})
		}
		if o == h {
			continue
		}
		p := Peer{Name: o.name, ID: o.id(), Addr: o.addr()}
		if relay := via[o.n]; relay != 0 {
			p.Via, p.Addr = mesh.PeerName{byte(relay)}, netip.Addr{}
		}
		peers = append(peers, p)
	}
	h.tell(order{Op: "peers", Peers: peers})
	h.tell(order{Op: "endpoints", Endpoints: ends})
	for _, c := range h.cts {
		h.tell(order{Op: "attach", Port: c.port})
	}
	h.tell(order{Op: "settle"})
}

// startAll starts all hosts, briefs them and waits until all paths are up.
func (l *lab) startAll() {
	l.t.Helper()
	for _, h := range l.hosts {
		if err := h.start(); err != nil {
			l.t.Fatal(err)
		}
		h.brief(nil)
	}
	l.allUp(5 * time.Second)
}

func (l *lab) allUp(within time.Duration) {
	l.t.Helper()
	for _, h := range l.hosts {
		var last []PathStatus
		if !eventually(within, func() bool {
			last = h.look().Paths
			for _, p := range last {
				if !p.Up {
					return false
				}
			}
			return len(last) == len(l.hosts)-1
		}) {
			l.t.Fatalf("host %d: paths %+v, counters %v", h.n, last, h.nonZero())
		}
	}
}

// carried waits until every host with containers has sent and received n more frames by the tunnel.
func (l *lab) carried(frames int) {
	n := uint64(frames)
	l.t.Helper()
	for _, h := range l.hosts {
		if len(h.cts) == 0 {
			continue
		}
		begun := h.nonZero()
		if !eventually(30*time.Second, func() bool {
			now := h.nonZero()
			return now["to_tunnel"] >= begun["to_tunnel"]+n && now["from_tunnel"] >= begun["from_tunnel"]+n
		}) {
			l.t.Fatalf("host %d: %v, and before %v", h.n, h.nonZero(), begun)
		}
	}
}

func (h *labHost) nonZero() map[string]uint64 {
	out := make(map[string]uint64)
	for name, c := range h.look().Counters {
		if c.Frames > 0 {
			out[name] = c.Frames
		}
	}
	return out
}

// drops fails the test if the host dropped anything for another reason than those given.
func (h *labHost) drops(allowed ...string) {
	h.lab.t.Helper()
	for name, n := range h.nonZero() {
		if strings.HasPrefix(name, "drop_") && !strings.Contains(" "+strings.Join(allowed, " ")+" ", " "+name+" ") {
			h.lab.t.Errorf("host %d: %s: %d frames", h.n, name, n)
		}
	}
}

// eventually looks every 20 ms.
func eventually(within time.Duration, cond func() bool) bool {
	if slowMachine {
		within *= 6
	}
	deadline := time.After(within)
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		if cond() {
			return true
		}
		select {
		case <-deadline:
			return cond()
		case <-ticker.C:
		}
	}
}

// inNetns runs f on a thread of its own inside the namespace; sockets made there stay there.
func inNetns(t testing.TB, ns string, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		fd, err := unix.Open("/run/netns/"+ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- err
			return
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// received is how many packets the container's interface has got.
func (c *labContainer) received() (n int) {
	var link []struct {
		Stats64 struct{ Rx struct{ Packets int } }
	}
	if err := json.Unmarshal([]byte(c.ip("-j -s link show ethmesh")), &link); err != nil || len(link) != 1 {
		c.host.lab.t.Fatalf("counters of %s: %v", c.ns, err)
	}
	return link[0].Stats64.Rx.Packets
}
