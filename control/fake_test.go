package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"meshd/mesh"
)

func name(t testing.TB, s string) mesh.PeerName {
	t.Helper()
	p, err := mesh.ParsePeerName(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// sample is a report with something of everything.
func sample(t testing.TB) Report {
	host1, host2, host3 := name(t, "4a:0f:f6:ec:1c:93"), name(t, "7e:21:4a:70:2f:45"), name(t, "::3")
	return Report{
		Ready:    true,
		Version:  "1.2.3",
		Problems: []string{"the kernel path is not in use: no bpf file system at /sys/fs/bpf"},
		Router: &Router{
			Protocol: "mesh", ProtocolMinVersion: 1, ProtocolMaxVersion: 1,
			Encryption: true, PeerDiscovery: true, Name: host1, NickName: "host1", Port: 6783,
			Peers: []Peer{
				{Name: host1, NickName: "host1", UID: 7, ShortID: 1, Version: 3, Connections: []PeerConnection{
					{Name: host2, NickName: "host2", Address: "192.168.48.12:33866", Established: true},
				}},
				{Name: host2, NickName: "host2", UID: 8, ShortID: 2, Version: 4, Connections: []PeerConnection{
					{Name: host1, NickName: "host1", Address: "192.168.48.11:6783", Outbound: true, Established: true},
					{Name: host3, NickName: "host3", Address: "192.168.48.13:6783", Outbound: true},
				}},
				{Name: host3, NickName: "host3", UID: 9, Version: 1},
			},
			UnicastRoutes:   []UnicastRoute{{Dest: host2, Via: host2, Hops: 1}, {Dest: host3, Via: host2, Hops: 2, Why: "no direct link"}},
			BroadcastRoutes: []BroadcastRoute{{Source: host1, Via: []mesh.PeerName{host2, host3}}},
			Connections: []Connection{
				{Address: "192.168.48.12:33866", State: ConnEstablished, Encrypted: true, Overlay: OverlayKernel, Peer: host2, NickName: "host2", MTU: 1376, RTT: time.Millisecond},
				{Address: "192.168.48.13:60773", State: ConnPending, Overlay: OverlayUserspace, Peer: host3, NickName: "host3", Reason: "this kernel has no vxlan"},
				{State: ConnEstablished, Encrypted: true, Overlay: OverlayRelay, Peer: host3, NickName: "host3", MTU: 1340, Reason: "by host2: no direct link"},
				{Address: "192.168.48.14:6783", Outbound: true, State: ConnRetrying, Error: "no answer from 192.168.48.14:6783"},
				{Address: "192.168.48.15:6783", Outbound: true, State: ConnFailed, Error: "no such host", NextTry: time.Date(2026, 8, 6, 18, 55, 38, 0, time.UTC)},
				{Address: "192.168.48.16:6783", Outbound: true, State: ConnConnecting},
			},
			TerminationCount: 2,
			Targets:          []string{"192.168.48.14", "host5:6783"},
			MACs:             []MACEntry{{Mac: mesh.MAC{2, 0, 0, 0, 0, 1}, Name: host2, NickName: "host2"}},
			Drops:            map[string]uint64{"runt": 3, "forged_source": 1},
			Clashes:          []Clash{{Address: "10.32.0.9", Peers: []mesh.PeerName{host2, host3}}},
			Offences: []Offence{
				{ContainerID: "eebd81120ee4a0c2", Mac: mesh.MAC{2, 0, 0, 0, 0, 9}, Reason: "arp", Frames: 1000},
				{ContainerID: "eebd81120ee4a0c2", Mac: mesh.MAC{2, 0, 0, 0, 0, 9}, Reason: "source_ip4", Frames: 7},
				{Mac: mesh.MAC{2, 0, 0, 0, 0, 8}, Reason: "dhcp", Frames: 2},
			},
			Traffic: []PeerTraffic{{Name: host2, NickName: "host2", BytesIn: 10, BytesOut: 20, FramesIn: 1, FramesOut: 2}},
			Flows:   5,
		},
		IPAM: &IPAM{
			Status: IPAMReady, Range: "10.32.0.0/12", RangeNumIPs: 1 << 20, ActiveIPs: 1, DefaultSubnet: "10.32.0.0/12",
			Entries: []RingEntry{
				{Token: "10.32.0.0", Size: 786432, Peer: host2, Nickname: "host2"},
				{Token: "10.44.0.0", Size: 262144, Peer: host1, Nickname: "host1", IsKnownPeer: true},
			},
			PendingAllocates: []string{"c1", "c2"},
		},
		DNS: &DNS{
			Domain: "mesh.internal.", Upstream: []string{"8.8.8.8", "8.8.4.4"}, Address: "172.17.0.1:53", TTL: 1,
			Entries: []DNSEntry{
				{Hostname: "one.mesh.internal.", Origin: host1, ContainerID: "eebd81120ee4a0c2", Address: "10.32.0.1"},
				{Hostname: "a.two.mesh.internal.", Origin: host2, ContainerID: mesh.OwnerExpose, Address: "10.32.0.2"},
				{Hostname: "gone.mesh.internal.", Origin: host2, ContainerID: "c0ffee", Address: "10.32.0.3", Tombstone: 1},
			},
		},
		Proxy: &Proxy{Addresses: []string{"unix:///run/meshd/docker.sock", "tcp://0.0.0.0:12375"}},
	}
}

// fake is every backend: it writes down what it was asked and answers with what it was given.
type fake struct {
	report Report

	mu    sync.Mutex
	calls []string
	err   error
	block bool // methods with a context wait for its end
}

func (f *fake) call(format string, args ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
	return f.err
}

func (f *fake) wait(ctx context.Context, format string, args ...any) error {
	err := f.call(format, args...)
	f.mu.Lock()
	block := f.block
	f.mu.Unlock()
	if block {
		<-ctx.Done()
		_ = f.call("over")
		return fmt.Errorf("waited for 7e:21:4a:70:2f:45(host2), which is unreachable: %w", ctx.Err())
	}
	return err
}

func (f *fake) log() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

func (f *fake) Report() Report { return f.report }

func (f *fake) Connect(targets []string, replace bool) error {
	return f.call("connect %q %v", targets, replace)
}
func (f *fake) Forget(targets []string) error { return f.call("forget %q", targets) }

func (f *fake) Allocate(ctx context.Context, owner string, subnet netip.Prefix) (netip.Prefix, error) {
	return netip.MustParsePrefix("10.32.0.1/12"), f.wait(ctx, "allocate %s %v", owner, subnet)
}
func (f *fake) Claim(ctx context.Context, owner string, addr netip.Prefix) error {
	return f.wait(ctx, "claim %s %v", owner, addr)
}
func (f *fake) Release(ctx context.Context, owner string, addr netip.Addr) error {
	return f.wait(ctx, "release %s %v", owner, addr)
}
func (f *fake) ReleaseAll(ctx context.Context, owner string) error {
	return f.wait(ctx, "release %s", owner)
}
func (f *fake) Lookup(owner string, subnet netip.Prefix) []netip.Prefix {
	_ = f.call("lookup %s %v", owner, subnet)
	if owner == "nobody" {
		return nil
	}
	return []netip.Prefix{netip.MustParsePrefix("10.32.0.1/12"), netip.MustParsePrefix("10.33.0.1/24")}
}
func (f *fake) Owners() map[string][]netip.Prefix {
	return map[string][]netip.Prefix{"c1": {netip.MustParsePrefix("10.32.0.1/12")}}
}
func (f *fake) DefaultSubnet() netip.Prefix { return netip.MustParsePrefix("10.32.0.0/12") }

func (f *fake) Prime(ctx context.Context) error { return f.wait(ctx, "prime") }
func (f *fake) Leave(ctx context.Context) error { return f.wait(ctx, "leave") }
func (f *fake) RemovePeer(ctx context.Context, peer string) (int, error) {
	return 12, f.wait(ctx, "rmpeer %s", peer)
}
func (f *fake) Repair(ctx context.Context) (string, error) { return "merged\n", f.wait(ctx, "repair") }

func (f *fake) Add(ctx context.Context, req NameRequest) error {
	return f.wait(ctx, "add %s %v %s", req.Container, req.Addrs, req.FQDN)
}
func (f *fake) Remove(ctx context.Context, req NameRequest) error {
	return f.wait(ctx, "remove %s %v %s", req.Container, req.Addrs, req.FQDN)
}
func (f *fake) Domain() string         { return "mesh.internal." }
func (f *fake) Server() netip.AddrPort { return netip.MustParseAddrPort("172.17.0.1:53") }

func (f *fake) changed() Changed {
	return Changed{Addresses: []netip.Prefix{netip.MustParsePrefix("10.2.1.1/24")}, Warnings: []string{"careful"}}
}
func (f *fake) Attach(ctx context.Context, req AttachRequest) (Changed, error) {
	return f.changed(), f.wait(ctx, "attach %+v", req)
}
func (f *fake) Detach(ctx context.Context, req DetachRequest) (Changed, error) {
	return f.changed(), f.wait(ctx, "detach %+v", req)
}
func (f *fake) Expose(ctx context.Context, req ExposeRequest) (Changed, error) {
	return f.changed(), f.wait(ctx, "expose %+v", req)
}
func (f *fake) Hide(ctx context.Context, req HideRequest) (Changed, error) {
	return f.changed(), f.wait(ctx, "hide %+v", req)
}
func (f *fake) List(ctx context.Context, containers []string) ([]Attached, error) {
	return []Attached{{ID: mesh.OwnerExpose, MAC: mesh.MAC{2, 1}}}, f.wait(ctx, "ps %q", containers)
}

func (f *fake) backends() Backends {
	return Backends{Reporter: f, Peers: f, Addresses: f, Ring: f, Names: f, Attachments: f, Exposure: f, Passwords: fakePasswords{f}}
}

var errRefused = errors.New("10.2.1.1/24 is already used by container c2")

// start serves back until the test ends.
func start(t *testing.T, cfg Config, back Backends) *Server {
	t.Helper()
	cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	if cfg.Socket == "" {
		cfg.Socket = filepath.Join(t.TempDir(), "meshd.sock")
	}
	s, err := Listen(cfg, back)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s
}

// serve starts a server for f and returns a client of its unix socket.
func serve(t *testing.T, f *fake) *Client {
	t.Helper()
	s := start(t, Config{}, f.backends())
	c, err := NewClient(ClientConfig{Addr: s.Addr(0).String()})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

type fakePasswords struct{ f *fake }

func (p fakePasswords) Add(password string) (string, error) {
	return "0a0b0c0d", p.f.call("password add %s", password)
}
func (p fakePasswords) Use(id string) error    { return p.f.call("password use %s", id) }
func (p fakePasswords) Remove(id string) error { return p.f.call("password remove %s", id) }
func (p fakePasswords) List() []Password {
	return []Password{{ID: "0a0b0c0d", InUse: true}, {ID: "01020304"}}
}
