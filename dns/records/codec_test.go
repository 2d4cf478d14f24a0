package records

import (
	"bytes"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"meshd/mesh"
)

// randomRecord draws from few peers, owners and names, so that keys and versions meet.
func randomRecord(r *rand.Rand) record {
	peer := mesh.PeerName{5: byte(1 + r.IntN(3))}
	ver := version{gen: uint64(1+r.IntN(3)) << 32, seq: uint64(r.IntN(8))}
	owner := []string{"c1", strings.Repeat("0f", 32), mesh.OwnerExpose}[r.IntN(3)]
	switch r.IntN(8) {
	case 0:
		return &floor{peer: peer, ver: ver}
	case 1, 2, 3:
		h := &handmade{
			addr:  []netip.Addr{netip.MustParseAddr("10.32.0.7"), netip.MustParseAddr("fd00::7")}[r.IntN(2)],
			owner: []string{owner, mesh.OwnerExtern}[r.IntN(2)],
			name:  []string{"db.mesh.internal.", "x.db.mesh.internal."}[r.IntN(2)],
			clock: uint64(r.IntN(6)), key: keyOf(peer), gone: r.IntN(2) == 0,
		}
		if h.gone {
			h.age = time.Duration(r.IntN(500)) * time.Minute
		}
		return h
	}
	e := &endpoint{peer: peer, mac: mesh.MAC{2, 5: byte(r.IntN(2))}, owner: owner, part: uint8(r.IntN(2)), ver: ver, gone: r.IntN(3) == 0}
	if e.gone {
		return e
	}
	e.parts = e.part + 1
	for i := range r.IntN(3) {
		e.addrs = append(e.addrs, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 32, byte(i), byte(r.IntN(4))}), 12))
	}
	if r.IntN(2) == 0 {
		e.addrs = append(e.addrs, netip.MustParsePrefix("fd00::1/64"))
	}
	for i := range r.IntN(3) {
		e.names = append(e.names, string(rune('a'+i))+".mesh.internal.")
	}
	return e
}

func encodeAll(recs ...record) []byte {
	b := []byte{deltaVersion}
	for _, rec := range recs {
		b = appendSigned(b, rec)
	}
	return b
}

func TestCodecRoundTrip(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for range 100_000 {
		in := []record{randomRecord(r), randomRecord(r)}
		out, err := parseDelta(encodeAll(in...))
		if err != nil || !reflect.DeepEqual(in, out) {
			t.Fatalf("seed %d: got %+v, %v, want %+v", seed, out, err, in)
		}
	}
}

// The form on the wire is fixed: peers of other builds read it.
func TestCodecGolden(t *testing.T) {
	peer := mesh.PeerName{0x7a, 0x9f, 0xeb, 0xb6, 0x0c, 0x6e}
	key := "\x07z\x9f\xeb\xb6\x0cn" + strings.Repeat("\x00", 25)
	for _, c := range []struct {
		rec              record
		head, rest, body string // rest: what stands between signature and body
	}{
		{&floor{peer: peer, ver: version{gen: 2<<32 | 9, seq: 300}},
			"\x02\x01\xd0\x00", "", "z\x9f\xeb\xb6\x0cn\x00\x00\x00\x02\x00\x00\x00\x09\xac\x02"},
		{&endpoint{peer: peer, mac: mesh.MAC{2, 1}, owner: "c1", ver: version{gen: 1 << 32, seq: 1}, parts: 1,
			addrs: []netip.Prefix{netip.MustParsePrefix("10.32.0.1/12")}, names: []string{"w.m."}},
			"\x02\x02\xe7\x00", "", "z\x9f\xeb\xb6\x0cn\x02\x01\x00\x00\x00\x00\x00\x02c1" +
				"\x00\x00\x00\x01\x00\x00\x00\x00\x01\x00\x01\x01\x0c\x0a\x20\x00\x01\x01\x04w.m."},
		{&handmade{addr: netip.MustParseAddr("10.0.0.1"), owner: "x", name: "a.m.", clock: 5, key: keyOf(peer), gone: true, age: 3 * time.Minute},
			"\x02\x03\xef\x00", "\x03", "\x04\x0a\x00\x00\x01\x01x\x04a.m.\x05" + key + "\x01"},
	} {
		sig := testKeys(peer).Sign([]byte("meshd names 2" + c.head[1:2] + c.body))
		if got, want := string(encodeAll(c.rec)), c.head+string(sig[:])+c.rest+c.body; got != want {
			t.Errorf("%+v\n got %q\nwant %q", c.rec, got, want)
		}
	}
}

func TestCodecRefuses(t *testing.T) {
	good := encodeAll(&handmade{addr: netip.MustParseAddr("10.0.0.1"), owner: "x", name: "a.m.", clock: 5, key: keyOf(mesh.PeerName{1})})
	if _, err := parseDelta(good); err != nil {
		t.Fatal(err)
	}
	for n := range len(good) {
		if recs, err := parseDelta(good[:n]); err == nil && n != 1 {
			t.Errorf("the first %d bytes: got %v, want an error", n, recs)
		}
	}
	later := append(bytes.Clone(good), 99, 3, 1, 2, 3) // a kind to come
	if recs, err := parseDelta(later); err != nil || len(recs) != 1 {
		t.Errorf("unknown kind: got %v, %v", recs, err)
	}
	for what, rec := range map[string]record{
		"upper case":       &handmade{addr: netip.MustParseAddr("10.0.0.1"), owner: "x", name: "A.m.", key: keyOf(mesh.PeerName{1})},
		"no owner":         &handmade{addr: netip.MustParseAddr("10.0.0.1"), name: "a.m.", key: keyOf(mesh.PeerName{1})},
		"no writer":        &handmade{addr: netip.MustParseAddr("10.0.0.1"), owner: "x", name: "a.m."},
		"mapped address":   &handmade{addr: netip.MustParseAddr("::ffff:10.0.0.1"), owner: "x", name: "a.m.", key: keyOf(mesh.PeerName{1})},
		"generation":       &floor{peer: mesh.PeerName{1}, ver: version{gen: maxGen}},
		"group MAC":        &endpoint{peer: mesh.PeerName{1}, mac: mesh.MAC{1}, owner: "x", gone: true},
		"part beyond":      &endpoint{peer: mesh.PeerName{1}, owner: "x", part: 1, parts: 1},
		"unsorted names":   &endpoint{peer: mesh.PeerName{1}, owner: "x", parts: 1, names: []string{"b.m.", "a.m."}},
		"control in owner": &endpoint{peer: mesh.PeerName{1}, owner: "x\n", gone: true},
	} {
		if _, err := parseDelta(encodeAll(rec)); err == nil {
			t.Errorf("%s: want an error", what)
		}
	}
}

func FuzzDelta(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		f.Add(encodeAll(randomRecord(r), randomRecord(r)))
	}
	f.Add(encodeAll(&floor{peer: peerN(9), ver: version{gen: 0x3030303030303030}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		recs, err := parseDelta(b)
		if err != nil {
			return
		}
		raw := []byte{deltaVersion}
		for _, rec := range recs {
			raw = appendRow(raw, rec)
		}
		again, err := parseDelta(raw)
		if err != nil || !reflect.DeepEqual(recs, again) {
			t.Fatalf("got %+v, %v, want %+v", again, err, recs)
		}
		table := openTest(t, 9, nil)
		var refused *mesh.Refusal
		if news, err := table.Merge(mesh.PeerName{1}, b); err != nil && !errors.As(err, &refused) || refused != nil && len(news) >= len(b) {
			t.Fatal(err)
		}
		b = encodeAll(recs...) // as the fuzzer will not find signatures; without what was appended
		for range 2 {          // a floor of ours from a life that we do not know is taken once we are above it
			if _, err := table.Merge(mesh.PeerName{1}, b); err != nil {
				t.Fatal(err)
			}
		}
		if news, _ := table.Merge(mesh.PeerName{1}, b); news != nil {
			t.Fatalf("once more: got %q as news", news)
		}
		before := table.Items()
		for _, delta := range table.Encode(keysOf(before), 1100) {
			if news, err := table.Merge(mesh.PeerName{1}, delta); news != nil || err != nil {
				t.Fatalf("own rows came back as news: %q, %v", news, err)
			}
		}
	})
}

func keysOf(items []mesh.Item) []uint64 {
	keys := make([]uint64, len(items))
	for i, it := range items {
		keys[i] = it.Key
	}
	slices.Sort(keys)
	return keys
}

// What is on disk may be anything: it is loaded, or said to be damaged, and what was loaded comes back the same.
func FuzzLoad(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		rec := randomRecord(r)
		f.Add(storePrefix+"k", encodeAll(rec)[1:])
		f.Add(generationKey, appendVersion(nil, version{gen: 5}))
		f.Add("old", encodeAll(rec)[1:])
	}
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		table, err := Open(Config{Self: peerN(9), Keys: testKeys(peerN(9)), Domain: "mesh.internal.",
			Store: &memStore{kv: map[string][]byte{key: value}}, Now: t0, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			if key != generationKey {
				t.Fatal(err)
			}
			return
		}
		items := table.Items()
		for _, delta := range table.Encode(keysOf(items), 1100) {
			if _, err := parseDelta(delta); err != nil {
				t.Fatal(err)
			}
		}
	})
}
