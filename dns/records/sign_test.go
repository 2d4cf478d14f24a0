package records

import (
	"bytes"
	"errors"
	"net/netip"
	"testing"
	"time"

	"meshd/mesh"
)

func refusalOf(t *testing.T, err error) mesh.Refusal {
	t.Helper()
	var r *mesh.Refusal
	if err != nil && !errors.As(err, &r) {
		t.Fatal(err)
	}
	if r == nil {
		return mesh.Refusal{}
	}
	return *r
}

// Whatever a member says in another's name is neither taken in nor passed on, and counted.
func TestForgedRows(t *testing.T) {
	victim := openTest(t, 1, nil)
	ep := endpointN(1, "web.mesh.internal.")
	victim.Announce(ep)
	earlier := victim.Drain(1100)[0]
	ep.Names = []string{"api.mesh.internal."}
	victim.Announce(ep)
	if err := victim.AddName("", "hand.mesh.internal.", []netip.Addr{netip.MustParseAddr("192.0.2.1")}); err != nil {
		t.Fatal(err)
	}
	victim.Settle()
	present := victim.Drain(1100)[0]

	// forge alters each row and signs it with mallory's key, or leaves the signature.
	forge := func(resign bool, change func(record)) []byte {
		recs, err := parseDelta(present)
		if err != nil {
			t.Fatal(err)
		}
		out := []byte{deltaVersion}
		for _, rec := range recs {
			change(rec)
			rec.seal().body = rec.appendRest(rec.appendKey(nil))
			if resign {
				rec.seal().sig = testKeys(peerN(66)).Sign(signed(nil, rec))
			}
			out = appendRow(out, rec)
		}
		return out
	}
	later := func(rec record) {
		switch rec := rec.(type) {
		case *floor:
			rec.ver.gen += 1 << 32
		case *endpoint:
			rec.ver.seq++
		case *handmade:
			rec.clock++
		}
	}
	cut := bytes.Clone(present)
	clear(cut[1+rowHeader+32 : 1+rowHeader+64])
	for _, c := range []struct {
		what   string
		delta  []byte
		forged int
	}{
		{"a later version, signature kept", forge(false, later), 3},
		{"signed by somebody else", forge(true, later), 3},
		{"withdrawn", forge(false, func(rec record) {
			later(rec)
			if e, ok := rec.(*endpoint); ok {
				e.gone, e.addrs, e.names, e.parts = true, nil, nil, 0
			}
		}), 3},
		{"another address", forge(false, func(rec record) {
			later(rec)
			if e, ok := rec.(*endpoint); ok {
				e.addrs = []netip.Prefix{netip.MustParsePrefix("10.32.6.6/12")}
			}
		}), 3},
		{"another MAC", forge(true, func(rec record) {
			if e, ok := rec.(*endpoint); ok {
				e.mac[5] = 66
			}
		}), 1},
		{"another peer's, signature kept", forge(false, func(rec record) {
			switch rec := rec.(type) {
			case *floor:
				rec.peer = peerN(3)
			case *endpoint:
				rec.peer = peerN(3)
			case *handmade:
				later(rec)
				rec.key = keyOf(peerN(3))
			}
		}), 3},
		{"what the victim said earlier", earlier, 0},
		{"what it says now", present, 0},
	} {
		t.Run(c.what, func(t *testing.T) {
			table := openTest(t, 2, nil)
			if _, err := table.Merge(peerN(1), present); err != nil {
				t.Fatal(err)
			}
			want := sortedItems(table)
			news, err := table.Merge(peerN(66), c.delta)
			if got := refusalOf(t, err); got != (mesh.Refusal{Forged: c.forged}) {
				t.Errorf("got %+v, want %d forged", got, c.forged)
			}
			if news != nil {
				t.Errorf("passed on: %x", news)
			}
			for i, it := range sortedItems(table) {
				if i >= len(want) || it != want[i] {
					t.Fatal("the table has changed")
				}
			}
			gen := victim.gen
			victim.Merge(peerN(66), c.delta)
			victim.Expire(t0.Add(time.Minute))
			if victim.gen != gen {
				t.Error("the victim goes along with a forged version")
			}
		})
	}
	fresh := openTest(t, 2, nil)
	if _, err := fresh.Merge(peerN(66), cut); refusalOf(t, err).Forged != 1 {
		t.Errorf("a cut signature: got %v", err)
	}
}

// A hand-made name shows who made it, by key, and a member's own is its own whatever it calls itself.
func TestHandmadeOrigin(t *testing.T) {
	a, b := openTest(t, 1, nil), openTest(t, 2, nil)
	if err := a.AddName("", "hand.mesh.internal.", []netip.Addr{netip.MustParseAddr("192.0.2.1")}); err != nil {
		t.Fatal(err)
	}
	exchange(t, a, b)
	if got := b.Entries(); len(got) != 1 || got[0].Origin != peerN(1) {
		t.Errorf("got %+v", got)
	}
}

// changingKeys know some peers, and for some another key than at first.
type changingKeys struct {
	testKeys
	keys  map[mesh.PeerName][32]byte
	count *int
}

func (k changingKeys) Key(p mesh.PeerName) (key [32]byte, ok bool) {
	key, ok = k.keys[p]
	return key, ok
}

func (k changingKeys) Verify(key [32]byte, msg []byte, sig [64]byte) bool {
	*k.count++
	return k.testKeys.Verify(key, msg, sig)
}

func openWith(t *testing.T, n int, keys Keys) *Table {
	t.Helper()
	table, err := Open(Config{Self: peerN(n), Keys: keys, Domain: "mesh.internal.", Now: t0})
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// Rows of a peer wait for its key; hand-made names do not, and need no living peer. Each is verified once.
func TestRowsWaitForTheKey(t *testing.T) {
	n := 0
	keys := changingKeys{testKeys(peerN(2)), map[mesh.PeerName][32]byte{peerN(2): keyOf(peerN(2))}, &n}
	a, b := openTest(t, 1, nil), openWith(t, 2, keys)
	a.Announce(endpointN(1, "web.mesh.internal."))
	if err := a.AddName("", "hand.mesh.internal.", []netip.Addr{netip.MustParseAddr("192.0.2.1")}); err != nil {
		t.Fatal(err)
	}
	delta := a.Drain(1100)[0]
	news, err := b.Merge(peerN(1), delta)
	if got := refusalOf(t, err); got != (mesh.Refusal{Unknown: 1}) || news == nil || len(b.peers) != 1 {
		t.Errorf("got %+v, %d bytes of news, %d peers", got, len(news), len(b.peers))
	}
	wantAddrs(t, b, "web.mesh.internal.")
	wantAddrs(t, b, "hand.mesh.internal.", "192.0.2.1")
	keys.keys[peerN(1)] = keyOf(peerN(1))
	for range 10 {
		if _, err := b.Merge(peerN(1), delta); err != nil {
			t.Fatal(err)
		}
	}
	wantAddrs(t, b, "web.mesh.internal.", "10.32.0.1")
	if n != 2 {
		t.Errorf("%d verifications of 2 rows", n)
	}
	b.SetPeerState(peerN(1), Gone)
	delete(keys.keys, peerN(1))
	c := openWith(t, 3, changingKeys{testKeys(peerN(3)), map[mesh.PeerName][32]byte{peerN(3): keyOf(peerN(3))}, &n})
	exchange(t, b, c)
	wantAddrs(t, c, "hand.mesh.internal.", "192.0.2.1")
}

// A host made anew under its chosen name has another key: what the former bearer said is over.
func TestNameWithAnotherBearer(t *testing.T) {
	n := 0
	keys := changingKeys{testKeys(peerN(2)), map[mesh.PeerName][32]byte{peerN(1): keyOf(peerN(1)), peerN(2): keyOf(peerN(2))}, &n}
	a, b := openTest(t, 1, nil), openWith(t, 2, keys)
	for i := range 5 {
		a.Announce(endpointN(i, "old.mesh.internal."))
	}
	a.Settle()
	exchange(t, a, b)

	other := keyOf(peerN(77))
	anew, err := Open(Config{Self: peerN(1), Keys: bornAgain{testKeys(peerN(77)), other}, Domain: "mesh.internal.", Now: t0})
	if err != nil {
		t.Fatal(err)
	}
	anew.gen = 1 // lower than all that is known
	anew.Announce(endpointN(9, "new.mesh.internal."))
	anew.Settle()
	deltas := anew.Drain(1100)
	if _, err := b.Merge(peerN(1), deltas[0]); err != nil && refusalOf(t, err).Forged == 0 {
		t.Error(err)
	}
	wantAddrs(t, b, "new.mesh.internal.")
	keys.keys[peerN(1)] = other
	for _, d := range deltas {
		if _, err := b.Merge(peerN(1), d); err != nil {
			t.Fatal(err)
		}
	}
	wantAddrs(t, b, "old.mesh.internal.")
	wantAddrs(t, b, "new.mesh.internal.", "10.32.0.9")
	checkIndex(t, b)
}

type bornAgain struct {
	testKeys
	own [32]byte
}

func (k bornAgain) Key(mesh.PeerName) ([32]byte, bool) { return k.own, true }

// Rows of a peer whose key is offered to nobody any more are not offered either, but stay and come back.
func TestHiddenPeer(t *testing.T) {
	a, b := openTest(t, 1, nil), openTest(t, 2, nil)
	a.Announce(endpointN(1, "web.mesh.internal."))
	a.Settle()
	exchange(t, a, b)
	b.SetPeerState(peerN(1), Alive)
	b.SetPeerState(peerN(1), Suspect)
	offered := func() int { return len(b.Items()) - 1 } // but its own floor
	b.Expire(t0.Add(hideAfter))
	if got := offered(); got != 2 {
		t.Errorf("%d rows are offered, want 2", got)
	}
	b.Expire(t0.Add(hideAfter + time.Second))
	if got := offered(); got != 0 {
		t.Errorf("%d rows are offered, want none", got)
	}
	wantAddrs(t, b, "web.mesh.internal.", "10.32.0.1")
	if got := len(b.Entries()); got != 1 {
		t.Errorf("%d entries, want 1", got)
	}
	a.Announce(endpointN(2, "late.mesh.internal."))
	exchange(t, a, b)
	wantAddrs(t, b, "late.mesh.internal.", "10.32.0.2")
	if got := offered(); got != 0 {
		t.Errorf("%d rows are offered, want none", got)
	}
	b.SetPeerState(peerN(1), Alive)
	if got := offered(); got != 3 {
		t.Errorf("%d rows are offered, want 3", got)
	}
	checkIndex(t, b)
}
