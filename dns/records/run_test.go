package records

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"meshd/mesh"
)

// The first change goes out at once, those after it in bunches; the store is written once a second, and
// at the end.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		table, err := Open(Config{Self: peerN(1), Keys: testKeys(peerN(1)), Domain: "mesh.internal.", Store: store, Now: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex // guards sent
		var sent []time.Duration
		taken := func() []time.Duration {
			mu.Lock()
			defer mu.Unlock()
			out := sent
			sent = nil
			return out
		}
		start := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- table.Run(ctx, 1100, func([]byte) {
				mu.Lock()
				defer mu.Unlock()
				sent = append(sent, time.Since(start))
			})
		}()
		for i := range 100 {
			table.Announce(endpointN(i))
			time.Sleep(time.Millisecond)
		}
		synctest.Wait()
		if at := slices.Compact(taken()); len(at) < 5 || len(at) > 7 || at[0] != 0 {
			t.Errorf("100 changes in 100 ms were sent at %v", at)
		}
		puts, _ := store.counts()
		for i := range 50 {
			h := &handmade{addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), owner: mesh.OwnerExtern, name: "x.mesh.internal.", clock: 1, key: keyOf(peerN(2))}
			if _, err := table.Merge(peerN(2), encodeAll(h)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(1100 * time.Millisecond)
		synctest.Wait()
		if now, n := store.counts(); now-puts != 1 || n != 51 {
			t.Errorf("%d writes of %d records, want one of 51", now-puts, n)
		}
		taken()
		time.Sleep(settleAfter)
		synctest.Wait()
		if s, at := table.Stats(), taken(); !s.Settled || len(at) != 1 {
			t.Errorf("got %+v and deltas at %v, want to be settled", s, at)
		}
		store.mu.Lock()
		store.fail = errors.New("disk full")
		store.mu.Unlock()
		h := &handmade{addr: netip.MustParseAddr("10.0.0.1"), owner: mesh.OwnerExtern, name: "y.mesh.internal.", clock: 2, key: keyOf(peerN(2))}
		if _, err := table.Merge(peerN(2), encodeAll(h)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		store.mu.Lock()
		store.fail = nil
		store.mu.Unlock()
		time.Sleep(1100 * time.Millisecond)
		synctest.Wait()
		if _, n := store.counts(); n != 52 {
			t.Errorf("%d records after the store recovered, want 52", n)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestLookup(t *testing.T) {
	table := openTest(t, 1, nil)
	table.Announce(endpointN(1, "web.mesh.internal."))
	for _, name := range []string{"web", "WEB.mesh.internal", "web.mesh.internal."} {
		if got, err := table.Lookup(name); err != nil || len(got) != 1 || got[0].String() != "10.32.0.1" {
			t.Errorf("Lookup(%q) = %v, %v", name, got, err)
		}
	}
	if got, err := table.Lookup("no"); err != nil || got != nil {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := table.Lookup("web.example.org"); !errors.Is(err, ErrDomain) {
		t.Errorf("got %v, want %v", err, ErrDomain)
	}
}
