package tunnel

// replayWindow is how far behind the newest counter a datagram may come, in datagrams.
const replayWindow = 8192

const replayWords = 256 // 16,384 bits: a power of two above replayWindow, and room to clear words ahead

// replay remembers which counters have been seen (RFC 6479: a ring of words, cleared as the front moves).
// The zero value has seen none.
type replay struct {
	next  uint64 // newest counter + 1; 0: none yet
	words [replayWords]uint64
}

// fresh reports whether counter may still be accepted, without marking it: asked before the datagram
// is opened, so that a replay costs no decryption.
func (r *replay) fresh(counter uint64) bool {
	if counter >= r.next {
		return counter != ^uint64(0)
	}
	if r.next-counter > replayWindow {
		return false
	}
	return r.words[counter/64%replayWords]&(1<<(counter%64)) == 0
}

// accept marks counter, which must have been authenticated, and reports whether it was fresh; newest
// says whether it is ahead of all before.
func (r *replay) accept(counter uint64) (ok, newest bool) {
	if !r.fresh(counter) {
		return false, false
	}
	if counter >= r.next {
		newest = true
		from, to := uint64(0), counter/64
		if r.next > 0 {
			from = (r.next-1)/64 + 1
		}
		if to >= replayWords && from < to-replayWords+1 {
			from = to - replayWords + 1
		}
		for w := from; w <= to; w++ {
			r.words[w%replayWords] = 0
		}
		r.next = counter + 1
	}
	r.words[counter/64%replayWords] |= 1 << (counter % 64)
	return true, newest
}
