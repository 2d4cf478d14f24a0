package ipam

import (
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// What is on disk may be anything: a peer refuses it in words, or starts, hands out an address, and starts again from
// what it has written since.
func FuzzState(f *testing.F) {
	rng := netip.MustParsePrefix("10.32.0.0/24")
	buckets := []string{bucketMeta, bucketRing, bucketHeld}
	first := newWorld(1, func(string, ...any) {})
	first.rangep = rng
	one := first.addNode(Init{Mode: Consensus, N: 1})
	first.run(time.Second)
	first.allocate(one, "c", rng)
	first.run(time.Second)
	for i, bucket := range buckets {
		for _, key := range slices.Sorted(maps.Keys(one.disk[bucket])) {
			f.Add(i, key, one.disk[bucket][key])
		}
	}
	f.Add(0, metaElection, make([]byte, 40))
	f.Add(0, metaLeft, []byte{1})
	f.Add(0, metaAcked+"0100000000010000000a", []byte{})
	f.Add(0, metaPast+"00000000000000ff", putU64(7))
	f.Add(2, "10.32.0.9/24 other", []byte{})
	f.Add(2, "10.2.1.1/24 outside", []byte{})
	f.Fuzz(func(t *testing.T, which int, key string, value []byte) {
		w := newWorld(1, func(string, ...any) {})
		w.rangep = rng
		n := &node{w: w, name: one.name, init: one.init, disk: copyDisk(one.disk), conts: map[string]*container{}}
		w.nodes, w.by[n.name] = []*node{n}, n
		bucket := buckets[uint(which)%uint(len(buckets))]
		if n.disk[bucket] == nil {
			n.disk[bucket] = map[string][]byte{}
		}
		n.disk[bucket][key] = value
		n.start()
		if w.err != nil {
			return // it says what is wrong and does not start
		}
		w.run(time.Second)
		w.allocate(n, "d", rng)
		w.run(time.Second)
		if w.err != nil {
			t.Fatalf("%s %q = %x: %v", bucket, key, value, w.err)
		}
		n.kill()
		n.start()
		if w.err != nil {
			t.Fatalf("%s %q = %x: taken, and refused at the next start: %v", bucket, key, value, w.err)
		}
		w.run(time.Second)
	})
}
