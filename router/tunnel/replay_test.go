package tunnel

import (
	"math/rand/v2"
	"testing"
)

func TestReplayEdges(t *testing.T) {
	var r replay
	for i, c := range []struct {
		counter    uint64
		ok, newest bool
	}{
		{0, true, true}, {0, false, false}, {1, true, true}, {5, true, true}, {3, true, false}, {3, false, false},
		{5 + replayWindow, true, true}, {5, false, false}, {6, true, false}, {6, false, false}, {7, true, false},
		{1 << 40, true, true}, {7, false, false}, {1<<40 - replayWindow, false, false}, {1<<40 - replayWindow + 1, true, false},
		{^uint64(0), false, false}, {^uint64(0) - 1, true, true}, {^uint64(0) - 1, false, false},
	} {
		if ok, newest := r.accept(c.counter); ok != c.ok || newest != c.newest {
			t.Errorf("step %d, counter %d: got %v, %v, want %v, %v", i, c.counter, ok, newest, c.ok, c.newest)
		}
	}
}

// Against a model that remembers everything.
func TestReplayModel(t *testing.T) {
	const seed = 7
	rng := rand.New(rand.NewPCG(seed, 0))
	var r replay
	seen := map[uint64]bool{}
	var top uint64
	for i := range 400_000 {
		var c uint64
		switch rng.IntN(20) {
		case 0:
			c = top + rng.Uint64N(40_000)
		case 1, 2, 3, 4:
			c = top - min(top, rng.Uint64N(replayWindow+200))
		default:
			c = top + rng.Uint64N(3)
		}
		want := !seen[c] && (c+replayWindow > top || len(seen) == 0)
		if got, _ := r.accept(c); got != want {
			t.Fatalf("seed %d, step %d: counter %d, newest %d: got %v, want %v", seed, i, c, top, got, want)
		}
		if want {
			seen[c] = true
			top = max(top, c)
		}
	}
}

// Shuffled within 4,096 nothing is lost and nothing passes twice.
func TestReplayReorder(t *testing.T) {
	const seed, n, width = 3, 200_000, 4096
	rng := rand.New(rand.NewPCG(seed, 0))
	order := make([]uint64, n)
	for i := range order {
		order[i] = uint64(i)
	}
	for at := 0; at < n; at += width {
		part := order[at:min(n, at+width)]
		rng.Shuffle(len(part), func(i, j int) { part[i], part[j] = part[j], part[i] })
	}
	var r replay
	for _, c := range order {
		if ok, _ := r.accept(c); !ok {
			t.Fatalf("seed %d: counter %d dropped, newest %d", seed, c, r.next-1)
		}
	}
	for _, c := range order {
		if ok, _ := r.accept(c); ok {
			t.Fatalf("seed %d: counter %d accepted twice", seed, c)
		}
	}
}
