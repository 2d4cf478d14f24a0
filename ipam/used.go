package ipam

import "math/bits"

// usedSet is a set of offsets that finds the lowest one missing in a step per level of a tree with 64
// children per node. Level 0 has a bit per offset; a bit of level n+1 says that the 64 bits of level n
// below it are all set. Words without a bit set are not stored, so that memory follows the number of
// offsets and not the size of the range.
type usedSet struct {
	levels [11]map[uint64]uint64 // 11 levels of 6 bits cover 64 bits
	count  int
}

func newUsedSet() *usedSet {
	u := &usedSet{}
	for i := range u.levels {
		u.levels[i] = make(map[uint64]uint64)
	}
	return u
}

func (u *usedSet) has(off uint64) bool { return u.levels[0][off/64]&(1<<(off%64)) != 0 }

func (u *usedSet) add(off uint64) {
	if u.has(off) {
		return
	}
	u.count++
	for i := range u.levels {
		word := u.levels[i][off/64] | 1<<(off%64)
		u.levels[i][off/64] = word
		if word != ^uint64(0) {
			return
		}
		off /= 64
	}
}

func (u *usedSet) remove(off uint64) {
	if !u.has(off) {
		return
	}
	u.count--
	for i := range u.levels {
		was := u.levels[i][off/64]
		if word := was &^ (1 << (off % 64)); word == 0 {
			delete(u.levels[i], off/64)
		} else {
			u.levels[i][off/64] = word
		}
		if was != ^uint64(0) {
			return // the bit above was not set
		}
		off /= 64
	}
}

// nextFree returns the lowest offset in [from, to) that is not in the set.
func (u *usedSet) nextFree(from, to uint64) (uint64, bool) {
	if from >= to {
		return 0, false
	}
	level, pos := 0, from
	for {
		// Look for a clear bit at pos or after it in its word, then in the words to the right, one level up.
		free := ^u.levels[level][pos/64] >> (pos % 64)
		if free != 0 {
			pos += uint64(bits.TrailingZeros64(free))
			break
		}
		pos = pos/64 + 1
		if level++; level == len(u.levels) || pos > (to-1)>>(6*level) {
			return 0, false
		}
	}
	for ; level > 0; level-- { // the word below has a clear bit
		pos *= 64
		pos += uint64(bits.TrailingZeros64(^u.levels[level-1][pos/64]))
	}
	return pos, pos < to
}

// countIn is how many offsets in [from, to) are in the set.
func (u *usedSet) countIn(from, to uint64) uint64 {
	if from >= to {
		return 0
	}
	n := 0
	if words := (to-1)/64 - from/64 + 1; words <= uint64(len(u.levels[0])) {
		for w := from / 64; w <= (to-1)/64; w++ {
			n += bits.OnesCount64(u.levels[0][w] & mask(w, from, to))
		}
		return uint64(n)
	}
	for w, word := range u.levels[0] {
		n += bits.OnesCount64(word & mask(w, from, to))
	}
	return uint64(n)
}

// mask has the bits of word w that stand for offsets in [from, to).
func mask(w, from, to uint64) uint64 {
	m := ^uint64(0)
	lo, hi := w*64, w*64+64
	if hi <= from || lo >= to {
		return 0
	}
	if from > lo {
		m &= ^uint64(0) << (from - lo)
	}
	if to < hi {
		m &= ^uint64(0) >> (hi - to)
	}
	return m
}

// nextUsed returns the lowest offset in [from, to) that is in the set.
func (u *usedSet) nextUsed(from, to uint64) (uint64, bool) {
	if from >= to {
		return 0, false
	}
	first, last := from/64, (to-1)/64
	if last-first < uint64(len(u.levels[0])) {
		for w := first; w <= last; w++ {
			if word := u.levels[0][w] & mask(w, from, to); word != 0 {
				return w*64 + uint64(bits.TrailingZeros64(word)), true
			}
		}
		return 0, false
	}
	best, found := uint64(0), false
	for w, word := range u.levels[0] {
		if word &= mask(w, from, to); word != 0 && (!found || w < best/64) {
			best, found = w*64+uint64(bits.TrailingZeros64(word)), true
		}
	}
	return best, found
}

// gaps calls yield for the runs of free offsets in [from, to), in order.
func (u *usedSet) gaps(from, to uint64, yield func(lo, hi uint64)) {
	for from < to {
		lo, ok := u.nextFree(from, to)
		if !ok {
			return
		}
		hi, ok := u.nextUsed(lo, to)
		if !ok {
			hi = to
		}
		yield(lo, hi)
		from = hi
	}
}

// largestBlock returns the largest block in [lo, hi) whose size is a power of two, at most limit, and
// whose start is a multiple of it; of several the highest.
func largestBlock(lo, hi, limit uint64) (start, size uint64) {
	if lo >= hi || limit == 0 {
		return 0, 0
	}
	for size = 1 << (bits.Len64(min(limit, hi-lo)) - 1); size > 0; size /= 2 {
		if start = (hi - size) &^ (size - 1); hi >= size && start >= lo {
			return start, size
		}
	}
	return 0, 0
}
