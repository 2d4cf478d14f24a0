package ipam

import (
	"math/rand/v2"
	"testing"
	"time"
)

func TestUsedSetAgainstModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for range 20 {
		const size = 9000 // reaches into the third level
		u, model := newUsedSet(), make([]bool, size)
		fill := rng.IntN(3)
		for step := range 6000 {
			off := rng.IntN(size)
			if fill > 0 && step < 4500 {
				off = step * fill % size
			}
			if rng.IntN(4) > 0 {
				u.add(uint64(off))
				model[off] = true
			} else {
				u.remove(uint64(off))
				model[off] = false
			}
			if step%50 > 0 {
				continue
			}
			from := rng.IntN(size)
			to := from + 1 + rng.IntN(size-from)
			var free, used, count = -1, -1, 0
			for i := to - 1; i >= from; i-- {
				if model[i] {
					used = i
					count++
				} else {
					free = i
				}
			}
			if got, ok := u.nextFree(uint64(from), uint64(to)); ok != (free >= 0) || ok && int(got) != free {
				t.Fatalf("nextFree(%d, %d): got %d %v, want %d", from, to, got, ok, free)
			}
			if got, ok := u.nextUsed(uint64(from), uint64(to)); ok != (used >= 0) || ok && int(got) != used {
				t.Fatalf("nextUsed(%d, %d): got %d %v, want %d", from, to, got, ok, used)
			}
			if got := u.countIn(uint64(from), uint64(to)); int(got) != count {
				t.Fatalf("countIn(%d, %d): got %d, want %d", from, to, got, count)
			}
			covered := 0
			u.gaps(uint64(from), uint64(to), func(lo, hi uint64) {
				for i := lo; i < hi; i++ {
					if model[i] {
						t.Fatalf("gap [%d, %d) holds %d", lo, hi, i)
					}
					covered++
				}
			})
			if covered != to-from-count {
				t.Fatalf("gaps cover %d, want %d", covered, to-from-count)
			}
		}
	}
}

func TestUsedSetFarUp(t *testing.T) {
	u := newUsedSet()
	top := uint64(1) << 61
	for i := range uint64(64 * 64 * 2) {
		u.add(top + i)
	}
	if off, ok := u.nextFree(top, top*2); !ok || off != top+64*64*2 {
		t.Errorf("got %d %v", off-top, ok)
	}
	if _, ok := u.nextFree(top, top+100); ok {
		t.Error("found a free one where all are used")
	}
}

func TestLargestBlock(t *testing.T) {
	for _, c := range []struct{ lo, hi, limit, start, size uint64 }{
		{0, 256, 128, 128, 128}, {1, 255, 128, 128, 64}, {1, 256, 128, 128, 128}, {5, 6, 9, 5, 1},
		{5, 7, 2, 6, 1}, {6, 8, 2, 6, 2}, {0, 0, 4, 0, 0}, {3, 200, 0, 0, 0}, {0, 16, 3, 14, 2},
	} {
		if start, size := largestBlock(c.lo, c.hi, c.limit); start != c.start || size != c.size {
			t.Errorf("largestBlock(%d, %d, %d) = %d, %d, want %d, %d", c.lo, c.hi, c.limit, start, size, c.start, c.size)
		}
	}
}
