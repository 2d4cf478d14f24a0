package ipam

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"meshd/mesh"
	"meshd/store"
)

// memory is a Store that can be told to fail.
type memory struct {
	mu     sync.Mutex
	data   map[string]map[string][]byte
	err    error
	writes int
}

func (m *memory) All(bucket string) (map[string][]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return nil, m.err
	}
	return maps.Clone(m.data[bucket]), nil
}

func (m *memory) PutAll(kv map[string]map[string][]byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	m.writes++
	if m.data == nil {
		m.data = make(map[string]map[string][]byte)
	}
	for bucket, entries := range kv {
		if m.data[bucket] == nil {
			m.data[bucket] = make(map[string][]byte)
		}
		for k, v := range entries {
			if v == nil {
				delete(m.data[bucket], k)
			} else {
				m.data[bucket][k] = v
			}
		}
	}
	return nil
}

func (m *memory) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
}

// wire joins allocators of one process. It calls them from a goroutine of its own, as the network does.
type wire struct {
	mu    sync.Mutex
	peers map[mesh.PeerName]*Allocator
	queue chan func()
}

type plug struct {
	*wire
	self mesh.PeerName
}

func newWire(t *testing.T) *wire {
	w := &wire{peers: make(map[mesh.PeerName]*Allocator), queue: make(chan func(), 10_000)}
	return w
}

func (w *wire) run(ctx context.Context) {
	for {
		select {
		case f := <-w.queue:
			f()
		case <-ctx.Done():
			return
		}
	}
}

func (p plug) Broadcast(_ mesh.Channel, delta []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, a := range p.peers {
		if name != p.self {
			p.queue <- func() { a.Table().Merge(p.self, delta) }
		}
	}
}

func (p plug) Send(to mesh.PeerName, _ mesh.Channel, msg []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.peers[to]
	if a == nil {
		return errors.New("no such peer")
	}
	msg = slices.Clone(msg)
	p.queue <- func() { a.Message(p.self, msg) }
	return nil
}

func peerName(i int) mesh.PeerName { return mesh.PeerName{2, 0, 0, 0, 0, byte(i)} }

// startPeers runs n allocators that know each other until the test is over.
func startPeers(t *testing.T, n int, rng string, edit func(i int, c *Config)) []*Allocator {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := newWire(t)
	var wg sync.WaitGroup
	var out []*Allocator
	for i := range n {
		cfg := Config{Name: peerName(i + 1), Range: netip.MustParsePrefix(rng), Init: Init{N: n}, Store: &memory{}, Network: plug{w, peerName(i + 1)},
			Log: slog.New(slog.NewTextHandler(t.Output(), nil)).With("self", i+1)}
		if edit != nil {
			edit(i, &cfg)
		}
		a, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		w.mu.Lock()
		w.peers[cfg.Name] = a
		w.mu.Unlock()
		out = append(out, a)
	}
	wg.Go(func() { w.run(ctx) })
	for _, a := range out {
		wg.Go(func() { a.Run(ctx) })
	}
	for i, a := range out {
		for j := range out {
			if i != j {
				a.SetPeerState(peerName(j+1), Alive)
			}
		}
	}
	t.Cleanup(func() { cancel(); wg.Wait() })
	return out
}

func TestAllocatorsTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		peers := startPeers(t, 4, "10.32.0.0/22", nil)
		var mu sync.Mutex
		seen := make(map[netip.Addr]string)
		var wg sync.WaitGroup
		for i := range 400 {
			wg.Go(func() {
				owner := fmt.Sprintf("c%03d", i)
				p, err := peers[i%4].Allocate(t.Context(), owner, netip.Prefix{})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				if other := seen[p.Addr()]; other != "" {
					t.Errorf("%s went to %s and %s", p, other, owner)
				}
				seen[p.Addr()] = owner
				if got := peers[i%4].Lookup(owner, netip.Prefix{}); len(got) != 1 || got[0] != p {
					t.Errorf("Lookup(%s): got %v, want %v", owner, got, p)
				}
			})
		}
		wg.Wait()
		time.Sleep(5 * time.Second) // of the bubble: let prefetching end
		for i, a := range peers {
			s := a.Status()
			if s.State != StateReady || s.Active != 100 || len(s.Entries) == 0 || s.Entries[0].Peer != peerName(i+1) || s.Entries[0].Active != 100 {
				t.Errorf("peer %d: status %+v", i+1, s)
			}
			total := uint64(0)
			for _, e := range s.Entries {
				total += e.Owned
			}
			if total != 1024 {
				t.Errorf("peer %d: the entries own %d of 1024", i+1, total)
			}
		}
		if err := peers[0].ReleaseAll(t.Context(), "c000"); err != nil {
			t.Error(err)
		}
		if err := peers[0].Release(t.Context(), "c004", netip.MustParseAddr("9.9.9.9")); err != nil {
			t.Errorf("releasing what is not held: %v", err)
		}
		if got := peers[0].Lookup("c000", netip.Prefix{}); len(got) != 0 {
			t.Errorf("released, and still %v", got)
		}
	})
}

func TestDeadlineNamesWhatIsMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := startPeers(t, 1, "10.32.0.0/24", func(_ int, c *Config) { c.Init.N = 5 })[0]
		if s := a.Status(); s.State != StateIdle {
			t.Errorf("before anything: state %q", s.State)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- a.Prime(ctx) }()
		time.Sleep(time.Second)
		if s := a.Status(); s.State != StateConsensus || s.Quorum != 3 || s.Known != 1 {
			t.Errorf("while priming: %+v", s)
		}
		err := <-done
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "quorum: 3, known: 1") {
			t.Errorf("got %v", err)
		}
		if err := a.Claim(t.Context(), "c", netip.MustParsePrefix("192.168.1.7/24")); err != nil {
			t.Errorf("an address outside the range needs no ring: %v", err)
		}
	})
}

func TestOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := startPeers(t, 1, "10.32.0.0/24", func(_ int, c *Config) { c.Range = netip.Prefix{} })[0]
		if _, err := a.Allocate(t.Context(), "c", netip.Prefix{}); !errors.Is(err, ErrDisabled) {
			t.Errorf("Allocate: got %v, want ErrDisabled", err)
		}
		if err := a.Prime(t.Context()); !errors.Is(err, ErrDisabled) {
			t.Errorf("Prime: got %v, want ErrDisabled", err)
		}
		p := netip.MustParsePrefix("10.32.0.7/24")
		if err := a.Claim(t.Context(), "c", p); err != nil {
			t.Errorf("Claim: %v", err)
		}
		if got := a.Lookup("c", netip.Prefix{}); len(got) != 1 || got[0] != p {
			t.Errorf("Lookup: %v", got)
		}
		// The ring of the others is passed on all the same.
		w := cluster(t, 1, 1, "10.32.0.0/24")
		w.get(w.nodes[0], "c", w.rangep, time.Minute)
		for _, it := range w.nodes[0].table.Items() {
			for _, part := range w.nodes[0].table.Encode([]uint64{it.Key}, 1000) {
				if news, err := a.Table().Merge(w.nodes[0].name, part); err != nil || news == nil {
					t.Errorf("merge: %v, %v", news, err)
				}
				if news, err := a.Table().Merge(w.nodes[0].name, part); err != nil || news != nil {
					t.Errorf("merged again: %v, %v", news, err)
				}
			}
		}
		if len(a.Table().Items()) != len(w.nodes[0].table.Items()) {
			t.Error("the relayed table differs")
		}
	})
}

// TestDiskFails is S3 from the allocator's side.
func TestDiskFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := &memory{}
		a := startPeers(t, 1, "10.32.0.0/24", func(_ int, c *Config) { c.Store = disk })[0]
		if _, err := a.Allocate(t.Context(), "before", netip.Prefix{}); err != nil {
			t.Fatal(err)
		}
		eio := errors.New("injected: input/output error")
		disk.fail(eio)
		for i := range 20 {
			if p, err := a.Allocate(t.Context(), fmt.Sprint("during", i), netip.Prefix{}); !errors.Is(err, eio) {
				t.Errorf("Allocate on a broken disk: got %v, %v", p, err)
			}
		}
		if err := a.ReleaseAll(t.Context(), "before"); !errors.Is(err, eio) {
			t.Errorf("ReleaseAll on a broken disk: got %v", err)
		}
		if got := a.Lookup("before", netip.Prefix{}); len(got) != 1 {
			t.Errorf("what was acknowledged before is gone: %v", got)
		}
		if got := a.Lookup("during1", netip.Prefix{}); len(got) != 0 {
			t.Errorf("what was refused is held: %v", got)
		}
		if s := a.Status(); !strings.Contains(s.DiskError, "input/output") {
			t.Errorf("status says %q of the disk", s.DiskError)
		}
		disk.fail(nil)
		p, err := a.Allocate(t.Context(), "after", netip.Prefix{})
		if err != nil || p.String() != "10.32.0.2/24" {
			t.Errorf("with the disk back: got %v, %v, want 10.32.0.2/24", p, err)
		}
		if s := a.Status(); s.DiskError != "" {
			t.Errorf("status still says %q", s.DiskError)
		}
	})
}

func TestStateFileOfOtherSettings(t *testing.T) {
	disk := &memory{}
	cfg := Config{Name: peerName(1), Range: netip.MustParsePrefix("10.32.0.0/24"), Store: disk, Network: plug{newWire(t), peerName(1)}}
	run := func(cfg Config) error {
		a, err := New(cfg)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- a.Run(ctx) }()
		_, err = a.Allocate(ctx, "c", netip.Prefix{})
		cancel()
		<-done
		return err
	}
	if err := run(cfg); err != nil {
		t.Fatal(err)
	}
	for _, edit := range []func(*Config){
		func(c *Config) { c.Range = netip.MustParsePrefix("10.33.0.0/24") },
		func(c *Config) { c.Name = peerName(2) },
	} {
		changed := cfg
		edit(&changed)
		if err := run(changed); !errors.Is(err, ErrChanged) {
			t.Errorf("got %v, want ErrChanged", err)
		}
	}
	disk.data[bucketHeld]["nonsense"] = []byte{}
	if err := run(cfg); err == nil {
		t.Error("nonsense in the state file was taken for addresses")
	}
	disk.fail(errors.New("injected"))
	if err := run(cfg); err == nil {
		t.Error("a state file that cannot be read was taken for empty")
	}
}

// TestRestart stops and starts allocators on a real state file.
func TestRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	want := make(map[string]netip.Prefix)
	for round := range 4 {
		s, err := store.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		a, err := New(Config{Name: peerName(1), Range: netip.MustParsePrefix("10.32.0.0/24"), Store: s, Network: plug{newWire(t), peerName(1)}, Grace: 300 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- a.Run(ctx) }()
		for owner, p := range want {
			if got := a.Lookup(owner, netip.Prefix{}); len(got) != 1 || got[0] != p {
				t.Errorf("round %d: %s has %v, want %v", round, owner, got, p)
			}
			if got, err := a.Allocate(ctx, owner, netip.Prefix{}); err != nil || got != p {
				t.Errorf("round %d: %s got %v, %v, want %v again", round, owner, got, err, p)
			}
		}
		for i := range 10 {
			owner := fmt.Sprintf("c%d.%d", round, i)
			p, err := a.Allocate(ctx, owner, netip.Prefix{})
			if err != nil {
				t.Fatal(err)
			}
			want[owner] = p
		}
		if err := a.ReleaseAll(ctx, fmt.Sprintf("c%d.0", round)); err != nil {
			t.Fatal(err)
		}
		delete(want, fmt.Sprintf("c%d.0", round))
		cancel()
		<-done
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	addrs := slices.Collect(maps.Values(want))
	slices.SortFunc(addrs, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	if n := len(slices.Compact(addrs)); n != len(want) {
		t.Errorf("%d addresses for %d owners", n, len(want))
	}
}

func TestConfig(t *testing.T) {
	good := Config{Name: peerName(1), Range: netip.MustParsePrefix("10.32.0.0/12")}
	if c, err := good.check(); err != nil || c.DefaultSubnet != good.Range {
		t.Errorf("got %+v, %v", c, err)
	}
	for name, edit := range map[string]func(*Config){
		"no name":       func(c *Config) { c.Name = mesh.PeerName{} },
		"host bits":     func(c *Config) { c.Range = netip.MustParsePrefix("10.32.0.1/12") },
		"tiny range":    func(c *Config) { c.Range = netip.MustParsePrefix("10.32.0.0/31") },
		"subnet beside": func(c *Config) { c.DefaultSubnet = netip.MustParsePrefix("10.0.0.0/16") },
		"subnet bits":   func(c *Config) { c.DefaultSubnet = netip.MustParsePrefix("10.32.0.1/16") },
		"empty seed":    func(c *Config) { c.Init.Mode = Seed },
	} {
		c := good
		edit(&c)
		if _, err := c.check(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestStopAnswersEverybody(t *testing.T) {
	defer goleak.VerifyNone(t)
	a, err := New(Config{Name: peerName(1), Range: netip.MustParsePrefix("10.32.0.0/24"), Init: Init{N: 3}, Store: &memory{}, Network: plug{newWire(t), peerName(1)}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- a.Run(ctx) }()
	got := make(chan error, 10)
	for i := range 10 {
		go func() {
			_, err := a.Allocate(context.Background(), fmt.Sprint(i), netip.Prefix{})
			got <- err
		}()
	}
	for len(a.Status().PendingAllocates) < 10 {
		// the calls come in on other goroutines
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	for range 10 {
		if err := <-got; !errors.Is(err, ErrStopped) {
			t.Errorf("got %v, want ErrStopped", err)
		}
	}
	if _, err := a.Allocate(context.Background(), "late", netip.Prefix{}); !errors.Is(err, ErrStopped) {
		t.Errorf("after Run: got %v, want ErrStopped", err)
	}
}

func FuzzMessage(f *testing.F) {
	m := func(m message) []byte {
		m.rng, m.cluster, m.life = netip.MustParsePrefix("10.32.0.0/24"), 1, 2
		return m.append(nil)
	}
	f.Add(m(message{kind: kindCompare, members: 3, items: []item{{digest: 4}}}))
	f.Add(m(message{kind: kindRequest, number: 1, lo: 0, hi: 256, flags: flagDemand}))
	f.Add(m(message{kind: kindGrant, number: 1, free: 5, rest: []byte{1}}))
	f.Add(m(message{kind: kindRefuse, number: 1, free: 5, reason: reasonTaken, text: "c"}))
	f.Add(m(message{kind: kindFacts, rest: []byte{1, 2}}))
	f.Add(m(message{kind: kindVote, rest: []byte{1, 2}}))
	f.Add(m(message{kind: kindNotice, old: 1, to: 2}))
	w := newWorld(1, func(string, ...any) {})
	w.rangep = netip.MustParsePrefix("10.32.0.0/24")
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseMessage(b)
		if err != nil {
			return
		}
		again, err := parseMessage(m.append(nil))
		if err != nil || again.kind != m.kind || again.number != m.number || !slices.Equal(again.items, m.items) || again.text != m.text || string(again.rest) != string(m.rest) {
			t.Fatalf("%+v, again %+v, %v", m, again, err)
		}
		n := newWorld(1, func(string, ...any) {})
		n.rangep = w.rangep
		node := n.addNode(Init{Mode: Consensus, N: 1})
		n.run(time.Second)
		n.allocate(node, "c", n.rangep)
		n.run(time.Second)
		node.step(func(c *core, now time.Time) { c.message(mesh.PeerName{7}, b, now) })
		n.run(time.Second)
	})
}

func benchAllocator(b *testing.B, live int, rng string) *Allocator {
	s, err := store.Open(filepath.Join(b.TempDir(), "state.db"))
	if err != nil {
		b.Fatal(err)
	}
	a, err := New(Config{Name: peerName(1), Range: netip.MustParsePrefix(rng), Store: s, Network: plug{&wire{}, peerName(1)}})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- a.Run(ctx) }()
	b.Cleanup(func() { cancel(); <-done; s.Close() })
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			for j := i; j < live; j += 64 {
				if _, err := a.Allocate(ctx, fmt.Sprintf("%064d", j), netip.Prefix{}); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return a
}

// BenchmarkAllocate allocates and frees one address, with its two synced writes, beside others that live.
func BenchmarkAllocate(b *testing.B) {
	for _, live := range []int{1000, 65_000} {
		b.Run(fmt.Sprint(live), func(b *testing.B) {
			a := benchAllocator(b, live, "10.32.0.0/12")
			var took []time.Duration
			i := 0
			for b.Loop() {
				i++
				owner := fmt.Sprintf("%064d", live+i)
				start := time.Now()
				if _, err := a.Allocate(b.Context(), owner, netip.Prefix{}); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(start))
				if err := a.ReleaseAll(b.Context(), owner); err != nil {
					b.Fatal(err)
				}
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Nanoseconds()), "p50-ns")
			b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds()), "p99-ns")
		})
	}
}

// BenchmarkAllocateConcurrent is how many allocations per second one peer sustains for some callers at once,
// each of which waits for its address to be on disk. With -benchtime 12s it shows whether that lasts.
func BenchmarkAllocateConcurrent(b *testing.B) {
	for _, callers := range []int{4, 16, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			a := benchAllocator(b, 1000, "10.0.0.0/8") // many seconds can use up a /12
			b.ResetTimer()                             // making the thousand is not part of it
			var next atomic.Int64
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
						if _, err := a.Allocate(b.Context(), fmt.Sprintf("more-%059d", i), netip.Prefix{}); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "allocations/s")
		})
	}
}
