package router

import (
	"math/rand/v2"
	"sync/atomic"
	"time"

	"meshd/mesh"
)

// macAge is how long a learned address is believed without a frame from it.
const macAge = 10 * time.Minute

// fdb is the table of addresses learned from frames: who is behind which MAC. It has a fixed size, takes
// no lock and allocates nothing: a slot is one word with the address and its owner, and one with the time
// of the last frame. When the slots that an address may take are all in use it is not learned, and
// frames to it are flooded: flooding the table costs the flooder's victims nothing but that.
type fdb struct {
	seed  uint64
	full  atomic.Uint64 // addresses that found no slot
	slots [fdbSets * fdbWays]fdbSlot
}

const (
	fdbSets = 2048
	fdbWays = 8
)

type fdbSlot struct {
	key  atomic.Uint64 // address << 16 | owner; 0: free
	seen atomic.Uint32 // seconds since the switch began
}

// owner is a number for a peer, or ownerBridge.
type owner uint16

const (
	noOwner     owner = iota
	ownerBridge       // our own bridge
	firstOwner        // first number for a peer
)

func newFDB() *fdb { return &fdb{seed: rand.Uint64()} }

func macBits(m mesh.MAC) uint64 {
	return uint64(m[0])<<40 | uint64(m[1])<<32 | uint64(m[2])<<24 | uint64(m[3])<<16 | uint64(m[4])<<8 | uint64(m[5])
}

func bitsMAC(v uint64) mesh.MAC {
	return mesh.MAC{byte(v >> 40), byte(v >> 32), byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}
}

func (f *fdb) set(mac uint64) []fdbSlot {
	i := mix64(mac^f.seed) % fdbSets * fdbWays
	return f.slots[i : i+fdbWays]
}

func expired(seen, now uint32) bool { return now > seen && now-seen > uint32(macAge/time.Second) }

// learn notes that a frame from mac came from who. now is in seconds.
func (f *fdb) learn(mac mesh.MAC, who owner, now uint32) {
	bits := macBits(mac)
	key := bits<<16 | uint64(who)
	set := f.set(bits)
	free := -1
	for i := range set {
		k := set[i].key.Load()
		if k>>16 == bits {
			if k != key && !set[i].key.CompareAndSwap(k, key) {
				return // another queue was quicker; the next frame will tell
			}
			if set[i].seen.Load() != now {
				set[i].seen.Store(now)
			}
			return
		}
		if free < 0 && (k == 0 || expired(set[i].seen.Load(), now)) {
			free = i
		}
	}
	if free < 0 {
		f.full.Add(1)
		return
	}
	k := set[free].key.Load()
	if k == 0 || expired(set[free].seen.Load(), now) {
		set[free].seen.Store(now)
		set[free].key.CompareAndSwap(k, key)
	}
}

// lookup returns who was last seen behind mac, or noOwner.
func (f *fdb) lookup(mac mesh.MAC, now uint32) owner {
	bits := macBits(mac)
	set := f.set(bits)
	for i := range set {
		k := set[i].key.Load()
		if k>>16 == bits {
			if expired(set[i].seen.Load(), now) {
				return noOwner
			}
			return owner(k)
		}
	}
	return noOwner
}

// forget frees every slot that drop asks for.
func (f *fdb) forget(drop func(mac mesh.MAC, who owner, seen uint32) bool) {
	for i := range f.slots {
		s := &f.slots[i]
		if k := s.key.Load(); k != 0 && drop(bitsMAC(k>>16), owner(k), s.seen.Load()) {
			s.key.CompareAndSwap(k, 0)
		}
	}
}

// each calls f with every slot in use.
func (f *fdb) each(visit func(mac mesh.MAC, who owner, seen uint32)) {
	f.forget(func(mac mesh.MAC, who owner, seen uint32) bool {
		visit(mac, who, seen)
		return false
	})
}
