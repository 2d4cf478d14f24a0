package container

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"meshd/container/docker"
	"meshd/mesh"
)

// Config of a Manager. New works on a copy.
type Config struct {
	Peer     mesh.PeerName
	Domain   string        // of names, with the final dot; empty means that containers get none
	Grace    time.Duration // how long a dead container keeps its addresses; zero means 30 s
	ProcPath string        // default "/proc"

	Network   Network
	Bridge    Bridge
	Firewall  Firewall // nil: exposed addresses are for this host only
	Allocator Allocator
	Announcer Announcer
	Store     Store
	Docker    Docker // nil: no containers by name, only pid:N and netns:PATH

	// Wanted says whether a running container that nobody asked to attach belongs on the mesh, and how: one
	// that the proxy made and Docker started by itself. nil: none does. WantedLabel is what such ones bear.
	Wanted      func(docker.Container) (Request, bool)
	WantedLabel string

	// OpenNamespace opens the file of a network namespace, and nothing else.
	OpenNamespace func(path string) (*os.File, error)
	// CheckOverlap reports a route of the host that a subnet would hide; nil means that nobody looks.
	CheckOverlap func(netip.Prefix) error
	// Reclaim is told once, early in Run, what is attached in the kernel; may be nil. Must not block for long. Until it
	// has returned, calls that change something wait.
	Reclaim func(live map[string][]netip.Prefix)
	// Gone is told of an owner that will not come back; may be nil.
	Gone func(owner string)

	Log *slog.Logger
}

// Errors that callers tell apart.
var (
	ErrNotAttached = errors.New("is not attached")
	ErrInUse       = errors.New("is in use")
	ErrNotRunning  = errors.New("is not running")
)

// Changed says which addresses a call was about, and what a person should know besides.
type Changed struct {
	Addresses []netip.Prefix
	Warnings  []string
}

// Manager keeps containers attached. Its methods may be called concurrently, also before Run.
type Manager struct {
	cfg  Config
	log  *slog.Logger
	boot string // id of this boot: process ids of another one mean nothing

	adopted chan struct{} // closed when Reclaim has been told

	mu      sync.Mutex // guards what follows; never held during a call to a neighbour
	records map[string]record
	locks   map[string]*ownerLock
	dead    map[string]time.Time // since when an owner is gone
	tenders map[string]chan struct{}
	running *sync.WaitGroup // of Run; nil outside
	runCtx  context.Context
}

// New reads the records and touches nothing else.
func New(cfg Config) (*Manager, error) {
	if cfg.Grace == 0 {
		cfg.Grace = 30 * time.Second
	}
	if cfg.ProcPath == "" {
		cfg.ProcPath = "/proc"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Domain != "" {
		cfg.Domain = strings.ToLower(strings.TrimSuffix(cfg.Domain, ".")) + "."
	}
	m := &Manager{
		cfg: cfg, log: cfg.Log, records: map[string]record{}, locks: map[string]*ownerLock{},
		dead: map[string]time.Time{}, tenders: map[string]chan struct{}{}, adopted: make(chan struct{}),
	}
	if cfg.Reclaim == nil {
		close(m.adopted)
	}
	if id, err := os.ReadFile(cfg.ProcPath + "/sys/kernel/random/boot_id"); err == nil {
		m.boot = strings.TrimSpace(string(id))
	}
	all, err := cfg.Store.All(bucket)
	if err != nil {
		return nil, fmt.Errorf("read attachments: %w", err)
	}
	for owner, value := range all {
		r, err := parseRecord(value)
		if err == nil && r.Owner != owner {
			err = fmt.Errorf("it is about %q", r.Owner)
		}
		if err != nil {
			return nil, fmt.Errorf("attachment %q in the state file: unreadable: %w", owner, err)
		}
		m.records[owner] = r
	}
	return m, nil
}

// record returns what is known of an owner.
func (m *Manager) record(owner string) (record, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, ok := m.records[owner]
	return r.clone(), ok
}

// all returns every record, sorted by owner.
func (m *Manager) all() []record {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []record
	for _, r := range m.records {
		out = append(out, r.clone())
	}
	slices.SortFunc(out, func(a, b record) int { return strings.Compare(a.Owner, b.Owner) })
	return out
}

// keep writes a record down; forget, that there is none any more.
func (m *Manager) keep(r record) error {
	value, err := r.marshal()
	if err != nil {
		return err
	}
	if now, ok := m.record(r.Owner); ok {
		if same, err := now.marshal(); err == nil && bytes.Equal(same, value) {
			return nil // memory and disk agree always
		}
	}
	if err := m.cfg.Store.Put(bucket, map[string][]byte{r.Owner: value}); err != nil {
		return fmt.Errorf("remember attachment: %w", err)
	}
	m.mu.Lock()
	m.records[r.Owner] = r.clone()
	m.mu.Unlock()
	return nil
}

func (m *Manager) forget(owner string) error {
	if err := m.cfg.Store.Put(bucket, map[string][]byte{owner: nil}); err != nil {
		return fmt.Errorf("forget attachment: %w", err)
	}
	m.mu.Lock()
	delete(m.records, owner)
	delete(m.dead, owner)
	m.mu.Unlock()
	return nil
}

// ownerLock makes the calls about one owner follow each other.
type ownerLock struct {
	held  chan struct{} // capacity 1
	users int           // who hold it or wait for it
}

// lock waits until nobody else works on owner, or ctx ends. It also waits for what the kernel has to be adopted: a port
// that is listed, and detached before its record is looked up, would be taken for one that nobody remembers.
func (m *Manager) lock(ctx context.Context, owner string) (unlock func(), err error) {
	select {
	case <-m.adopted:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for attached containers to be counted: %w", ctx.Err())
	}
	m.mu.Lock()
	l := m.locks[owner]
	if l == nil {
		l = &ownerLock{held: make(chan struct{}, 1)}
		m.locks[owner] = l
	}
	l.users++
	m.mu.Unlock()
	leave := func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(m.locks, owner)
		}
	}
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("wait for another call about the same container: %w", ctx.Err())
	}
}

// announce tells everyone of an attached record.
func (m *Manager) announce(r record) {
	e := mesh.Endpoint{Peer: m.cfg.Peer, Owner: r.Owner, MAC: r.MAC, Addrs: r.held()}
	slices.SortFunc(e.Addrs, netip.Prefix.Compare)
	if !r.WithoutDNS {
		e.Names = slices.Clone(r.Names)
	}
	m.cfg.Announcer.Announce(e)
}

// newMAC makes a random address of the locally administered kind (IEEE 802 8.2).
func newMAC() (m mesh.MAC) {
	rand.Read(m[:])
	m[0] = m[0]&^1 | 2
	return m
}
