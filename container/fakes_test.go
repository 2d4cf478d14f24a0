package container

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"meshd/container/docker"
	"meshd/mesh"
)

// world is everything around a manager, made of maps. The files below proc stand for namespaces.
type world struct {
	t    *testing.T
	proc string

	mu        sync.Mutex
	ports     map[string]fakePort
	bridge    []netip.Prefix
	rules     map[netip.Prefix]bool // subnets let through, and whether masqueraded
	owned     map[netip.Addr]string // by the allocator
	length    map[netip.Addr]int
	rivals    map[netip.Addr]bool // held by its owner and, as turned out, by somebody else
	announced map[string]mesh.Endpoint
	remote    []mesh.Endpoint
	stored    map[string][]byte
	fail      map[string]error // by the name of the method
	block     chan struct{}    // what Allocate waits for, if not nil
	noIPAM    bool

	containers map[string]docker.Container // by full id
	away       bool
	events     chan docker.Event
}

type fakePort struct {
	inode uint64
	port  mesh.Port
}

var (
	peerA      = mesh.PeerName{0xa}
	peerB      = mesh.PeerName{0xb}
	subnet     = netip.MustParsePrefix("10.32.0.0/28")
	errDeliver = errors.New("made to fail")
)

func newWorld(t *testing.T) *world {
	return &world{
		t: t, proc: t.TempDir(), ports: map[string]fakePort{}, rules: map[netip.Prefix]bool{}, owned: map[netip.Addr]string{},
		length: map[netip.Addr]int{}, rivals: map[netip.Addr]bool{}, announced: map[string]mesh.Endpoint{}, stored: map[string][]byte{}, fail: map[string]error{},
		containers: map[string]docker.Container{}, events: make(chan docker.Event, 1000),
	}
}

// manager makes one over this world, as a restart of meshd does.
func (w *world) manager() *Manager {
	w.t.Helper()
	m, err := New(w.config())
	if err != nil {
		w.t.Fatal(err)
	}
	return m
}

func (w *world) config() Config {
	return Config{
		Peer: peerA, Domain: "Mesh.Internal", ProcPath: w.proc, Network: w, Bridge: w, Firewall: w, Allocator: w, Announcer: w,
		Store: w, Docker: w, OpenNamespace: w.openNamespace, Log: slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

// run runs m until the returned function is called.
func (w *world) run(m *Manager) (stop func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			w.t.Errorf("Run: %v", err)
		}
	}
}

func id(i int) string { return fmt.Sprintf("%064x", i) }

// start makes a container run as process pid with a network of its own.
func (w *world) start(i, pid int, name string) string {
	w.process(pid)
	w.mu.Lock()
	c := docker.Container{ID: id(i), Name: "/" + name}
	c.State.Running, c.State.Pid = true, pid
	c.Config.Hostname, c.Config.Domainname = name, "mesh.internal"
	c.HostConfig.NetworkMode = "default"
	w.containers[c.ID] = c
	w.mu.Unlock()
	w.tell(docker.Started, c.ID)
	return c.ID
}

func (w *world) process(pid int) {
	w.t.Helper()
	dir := filepath.Join(w.proc, fmt.Sprint(pid))
	for _, d := range []string{"/ns", "/root/etc"} {
		if err := os.MkdirAll(dir+d, 0o700); err != nil {
			w.t.Fatal(err)
		}
	}
	for name, text := range map[string]string{"/ns/net": "", "/root/etc/hosts": "127.0.0.1\tlocalhost\n172.17.0.2\tweb.mesh.internal web\n", "/root/etc/hostname": "web\n"} {
		if err := os.WriteFile(dir+name, []byte(text), 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
}

// die ends the process of a container, and its network with it.
func (w *world) die(id string) {
	w.mu.Lock()
	c := w.containers[id]
	w.dieLocked(c.State.Pid)
	c.State.Running, c.State.Pid = false, 0
	w.containers[id] = c
	w.mu.Unlock()
	w.tell(docker.Died, id)
}

func (w *world) dieLocked(pid int) {
	path := filepath.Join(w.proc, fmt.Sprint(pid))
	if f, err := os.Open(path + "/ns/net"); err == nil {
		inode, _ := inodeOf(f)
		f.Close()
		maps.DeleteFunc(w.ports, func(_ string, p fakePort) bool { return p.inode == inode })
	}
	os.RemoveAll(path)
}

func (w *world) destroy(id string) {
	w.die(id)
	w.mu.Lock()
	delete(w.containers, id)
	w.mu.Unlock()
	w.tell(docker.Destroyed, id)
}

func (w *world) tell(kind docker.EventKind, id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.away {
		w.events <- docker.Event{Kind: kind, ID: id}
	}
}

// dockerd comes or goes.
func (w *world) dockerd(there bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.away = !there
	if there {
		w.events <- docker.Event{Kind: docker.Connected}
	}
}

// failing makes one method fail until told otherwise.
func (w *world) failing(method string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail[method] = err
}

// state is what a call that fails must leave as it was.
func (w *world) state() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var records []string
	for owner, b := range w.stored {
		records = append(records, owner+string(b))
	}
	slices.Sort(records)
	return fmt.Sprintf("ports %v\nbridge %v\nrules %v\nowned %v\nannounced %v\nrecords %v", w.ports, w.bridge, w.rules, w.owned, w.announced, records)
}

func (w *world) openNamespace(path string) (*os.File, error) { return os.Open(path) }

// Network

func (w *world) AttachPort(ns *os.File, p mesh.Port) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.fail["AttachPort"]; err != nil {
		return err
	}
	inode, err := inodeOf(ns)
	if err != nil {
		return err
	}
	old, ok := w.ports[p.Owner]
	if ok && old.inode == inode {
		for _, a := range old.port.Addrs {
			if !slices.Contains(p.Addrs, a) {
				p.Addrs = append(p.Addrs, a)
			}
		}
	}
	slices.SortFunc(p.Addrs, netip.Prefix.Compare)
	w.ports[p.Owner] = fakePort{inode, p}
	if err := w.fail["AttachPort half way"]; err != nil {
		return err
	}
	return nil
}

func (w *world) RemoveAddrs(ns *os.File, owner string, addrs []netip.Prefix) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	p, ok := w.ports[owner]
	if ok {
		p.port.Addrs = slices.DeleteFunc(slices.Clone(p.port.Addrs), func(a netip.Prefix) bool { return slices.Contains(addrs, a) })
		w.ports[owner] = p
	}
	return nil
}

func (w *world) DetachPort(owner string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.ports, owner)
	return nil
}

func (w *world) Ports() (out []mesh.Port, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range w.ports {
		out = append(out, p.port)
	}
	return out, w.fail["Ports"]
}

// Bridge and Firewall

func (w *world) AddBridgeAddrs(addrs ...netip.Prefix) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range addrs {
		if !slices.Contains(w.bridge, a) {
			w.bridge = append(w.bridge, a)
		}
	}
	return w.fail["AddBridgeAddrs"]
}

func (w *world) RemoveBridgeAddrs(addrs ...netip.Prefix) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.bridge = slices.DeleteFunc(w.bridge, func(a netip.Prefix) bool { return slices.Contains(addrs, a) })
	if len(w.bridge) == 0 {
		w.bridge = nil
	}
	return nil
}

func (w *world) Bridge() (mesh.MAC, []netip.Prefix, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return mesh.MAC{2, 0xb}, slices.Clone(w.bridge), w.fail["Bridge"]
}

func (w *world) Expose(p netip.Prefix, masquerade bool) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rules[p] = masquerade
	return w.fail["Expose"]
}

func (w *world) Hide(p netip.Prefix) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.rules, p)
	return nil
}

// Allocator

func (w *world) DefaultSubnet() netip.Prefix {
	if w.noIPAM {
		return netip.Prefix{}
	}
	return subnet
}

func (w *world) Allocate(ctx context.Context, owner string, in netip.Prefix) (netip.Prefix, error) {
	w.mu.Lock()
	block := w.block
	w.mu.Unlock()
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
			return netip.Prefix{}, fmt.Errorf("waiting for others: %w", ctx.Err())
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.fail["Allocate"]; err != nil {
		return netip.Prefix{}, err
	}
	if w.noIPAM {
		return netip.Prefix{}, errors.New("address allocation is off")
	}
	if !in.IsValid() {
		in = subnet
	}
	for a, o := range w.owned {
		if o == owner && in.Contains(a) && w.length[a] == in.Bits() {
			if w.rivals[a] {
				w.owned[a] = "somebody else"
				continue
			}
			return netip.PrefixFrom(a, in.Bits()), nil
		}
	}
	last := mesh.LastAddr(in)
	for a := in.Addr().Next(); a.Less(last); a = a.Next() {
		if w.owned[a] == "" {
			w.owned[a], w.length[a] = owner, in.Bits()
			return netip.PrefixFrom(a, in.Bits()), nil
		}
	}
	return netip.Prefix{}, errors.New("no free address")
}

func (w *world) Claim(ctx context.Context, owner string, p netip.Prefix) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.fail["Claim"]; err != nil {
		return err
	}
	if o := w.owned[p.Addr()]; o != "" && o != owner {
		return fmt.Errorf("%v belongs to %s", p, o)
	}
	w.owned[p.Addr()], w.length[p.Addr()] = owner, p.Bits()
	return nil
}

func (w *world) Lookup(owner string, in netip.Prefix) (out []netip.Prefix) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for a, o := range w.owned {
		if o == owner && (!in.IsValid() || in.Contains(a)) {
			out = append(out, netip.PrefixFrom(a, w.length[a]))
		}
	}
	return out
}

func (w *world) Release(_ context.Context, owner string, a netip.Addr) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.owned[a] == owner {
		delete(w.owned, a)
	}
	return nil
}

func (w *world) ReleaseAll(_ context.Context, owner string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.DeleteFunc(w.owned, func(_ netip.Addr, o string) bool { return o == owner })
	return w.fail["ReleaseAll"]
}

// Announcer

func (w *world) Announce(e mesh.Endpoint) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.announced[e.Owner] = e
}

func (w *world) Withdraw(owner string, mac mesh.MAC) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.announced[owner].MAC == mac {
		delete(w.announced, owner)
	}
}

func (w *world) Endpoints() []mesh.Endpoint {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append(slices.Collect(maps.Values(w.announced)), w.remote...)
}

// Store

func (w *world) All(string) (map[string][]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.stored), nil
}

func (w *world) Put(_ string, kv map[string][]byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.fail["Put"]; err != nil {
		return err
	}
	for k, v := range kv {
		if v == nil {
			delete(w.stored, k)
		} else {
			w.stored[k] = v
		}
	}
	return nil
}

// Docker

func (w *world) Container(_ context.Context, name string) (docker.Container, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.away {
		return docker.Container{}, docker.ErrUnavailable
	}
	if err := w.fail["Container"]; err != nil {
		return docker.Container{}, err
	}
	for id, c := range w.containers {
		if c.Name == "/"+name || id == name || len(name) >= 12 && strings.HasPrefix(id, name) {
			return c, nil
		}
	}
	return docker.Container{}, fmt.Errorf("container %s: %w", name, docker.ErrNotFound)
}

func (w *world) Running(_ context.Context, label string) (ids []string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.away {
		return nil, docker.ErrUnavailable
	}
	for id, c := range w.containers {
		if _, ok := c.Config.Labels[label]; ok && c.State.Running {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

func (w *world) Watch(ctx context.Context, f func(docker.Event)) error {
	w.mu.Lock()
	away := w.away
	w.mu.Unlock()
	if !away {
		f(docker.Event{Kind: docker.Connected})
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-w.events:
			f(e)
		}
	}
}

// Helpers of the tests.

func specs(t *testing.T, s string) []mesh.AddrSpec {
	t.Helper()
	out, err := mesh.ParseAddrSpecs(s)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func prefixes(s string) (out []netip.Prefix) {
	for w := range strings.FieldsSeq(s) {
		out = append(out, netip.MustParsePrefix(w))
	}
	return out
}

// attach expects success and these addresses.
func (w *world) attach(m *Manager, target, addrs, want string) {
	w.t.Helper()
	got, err := m.Attach(w.t.Context(), Request{Target: target, Addrs: specs(w.t, addrs)})
	if err != nil {
		w.t.Fatalf("attach %s %s: %v", target, addrs, err)
	}
	if !reflect.DeepEqual(got.Addresses, prefixes(want)) {
		w.t.Fatalf("attach %s %s: got %v, want %s", target, addrs, got.Addresses, want)
	}
}

// wantPort expects a port with these addresses, announced with them, and owned.
func (w *world) wantPort(owner, addrs string) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	p, ok := w.ports[owner]
	if !ok || !reflect.DeepEqual(p.port.Addrs, prefixes(addrs)) {
		w.t.Errorf("port %.12s is %+v, want %s", owner, p, addrs)
	}
	e, ok := w.announced[owner]
	if !ok || !reflect.DeepEqual(e.Addrs, prefixes(addrs)) || e.MAC != p.port.MAC || e.Peer != peerA {
		w.t.Errorf("announced for %.12s is %+v, want %s", owner, e, addrs)
	}
	for _, a := range p.port.Addrs {
		if w.owned[a.Addr()] != owner {
			w.t.Errorf("%v is owned by %q", a, w.owned[a.Addr()])
		}
	}
}

// wantNothing expects that no trace of owner is left but, perhaps, its record.
func (w *world) wantNothing(owner string, record bool) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if p, ok := w.ports[owner]; ok {
		w.t.Errorf("port %+v is left", p)
	}
	if e, ok := w.announced[owner]; ok {
		w.t.Errorf("announcement %+v is left", e)
	}
	for a, o := range w.owned {
		if o == owner {
			w.t.Errorf("address %v is left", a)
		}
	}
	if _, ok := w.stored[owner]; ok != record {
		w.t.Errorf("record is there: %v, want %v", ok, record)
	}
}
