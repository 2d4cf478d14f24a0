package router

import (
	"errors"
	"slices"
	"testing"
	"time"

	"meshd/mesh"
)

// forge parses a delta, lets change alter its records and puts it together again, signed with key if that is given.
func forge(t *testing.T, delta []byte, key *[32]byte, change func(*record)) []byte {
	t.Helper()
	records, err := parseRecords(delta)
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	for _, r := range records {
		change(r)
		if key != nil {
			r.sig = testKeys(*key).Sign(r.signed())
		}
		out = appendRecord(out, r)
	}
	return out
}

func refusal(t *testing.T, err error) mesh.Refusal {
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

// Whatever a member says in another's name: nobody takes it in, nobody passes it on, and it is counted.
func TestForgedRecords(t *testing.T) {
	victim := newTopology(newPeer(1))
	victim.SetLinks([]PeerLink{linkTo(2, time.Millisecond), linkTo(3, time.Millisecond)})
	before := all(victim)
	victim.SetLinks([]PeerLink{linkTo(2, time.Millisecond)})
	now := all(victim)
	mallory := newPeer(66).Key
	later := func(r *record) { r.version += 1000 }

	for _, c := range []struct {
		what   string
		delta  []byte
		refuse mesh.Refusal
	}{
		{"a later version, signature kept", forge(t, now, nil, later), mesh.Refusal{Forged: 2}},
		{"the last incarnation, signature kept", forge(t, now, nil, func(r *record) { r.epoch.Incarnation = ^uint32(0) }), mesh.Refusal{Forged: 2}},
		{"another run, signature kept", forge(t, now, nil, func(r *record) { r.epoch.Incarnation++; r.epoch.Run = 5 }), mesh.Refusal{Forged: 2}},
		{"a byte of the body changed", forge(t, now, nil, func(r *record) { r.version++; r.body[len(r.body)-1] ^= 1 }), mesh.Refusal{Forged: 2}},
		{"signed by somebody else", forge(t, now, &mallory, later), mesh.Refusal{Forged: 2}},
		{"with somebody else's key in it", forge(t, now, &mallory, func(r *record) {
			if later(r); r.id.page == 0 {
				copy(r.body, mallory[:])
			}
		}), mesh.Refusal{Foreign: 1, Forged: 1}},
		{"page of another page", forge(t, now, nil, func(r *record) {
			if r.id.page != 0 {
				r.id.page = 9
			}
		}), mesh.Refusal{Forged: 1}},
		{"no signature", forge(t, now, nil, func(r *record) { later(r); r.sig = [64]byte{} }), mesh.Refusal{Forged: 2}},
		{"cut signature", forge(t, now, nil, func(r *record) { later(r); clear(r.sig[32:]) }), mesh.Refusal{Forged: 2}},
		{"what the victim said earlier", before, mesh.Refusal{}},
		{"what it says now", now, mesh.Refusal{}},
	} {
		t.Run(c.what, func(t *testing.T) {
			topo := newTopology(newPeer(2))
			topo.Reach(t0, Patience{0, time.Hour}, func(mesh.PeerName) bool { return true })
			merge(t, topo, now)
			want := items(topo)
			news, err := topo.Merge(pn(66), c.delta)
			if got := refusal(t, err); got != c.refuse {
				t.Errorf("got %+v, want %+v", got, c.refuse)
			}
			if news != nil {
				t.Errorf("passed on: %x", news)
			}
			if got := items(topo); len(got) != len(want) || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] {
				t.Error("the table has changed")
			}
			// The victim does not answer a forgery either: outbidding each would be a treadmill.
			if c.refuse != (mesh.Refusal{}) {
				if news, _ := victim.Merge(pn(66), c.delta); news != nil {
					t.Error("the victim answers")
				}
			}
		})
	}
}

// A delta is taken in but for what is forged, whatever the order.
func TestForgedAmongGenuine(t *testing.T) {
	a, b, to := newTopology(newPeer(1)), newTopology(newPeer(3)), newTopology(newPeer(2))
	a.SetLinks([]PeerLink{linkTo(2, time.Millisecond)})
	records, err := parseRecords(all(a))
	if err != nil {
		t.Fatal(err)
	}
	delta := appendRecord(nil, records[1]) // the page before the base that it needs
	delta = append(delta, forge(t, all(b), nil, func(r *record) { r.version++ })...)
	delta = appendRecord(delta, records[0])
	news, err := to.Merge(pn(66), delta)
	if got := refusal(t, err); got != (mesh.Refusal{Forged: 1}) {
		t.Errorf("got %+v", got)
	}
	if len(news) != len(all(a)) {
		t.Errorf("%d bytes of news, want %d", len(news), len(all(a)))
	}
	// A page alone waits for its peer's key.
	other := newTopology(newPeer(4))
	if _, err = other.Merge(pn(66), appendRecord(nil, records[1])); refusal(t, err) != (mesh.Refusal{Unknown: 1}) && records[1].id.page != 0 {
		t.Errorf("got %v", err)
	}
}

// countingKeys count verifications.
type countingKeys struct {
	testKeys
	n *int
}

func (k countingKeys) Verify(key [32]byte, msg []byte, sig [64]byte) bool {
	*k.n++
	return k.testKeys.Verify(key, msg, sig)
}

func TestVerifiedOnce(t *testing.T) {
	n := 0
	a, b := newTopology(newPeer(1)), NewTopology(newPeer(2), countingKeys{testKeys(newPeer(2).Key), &n})
	a.SetLinks([]PeerLink{linkTo(2, time.Millisecond)})
	old := all(a)
	a.SetLinks(nil)
	for range 10 {
		merge(t, b, all(a), old)
		merge(t, b, all(b)) // its own word comes back all the time
	}
	if n != 2 {
		t.Errorf("%d verifications of 2 records", n)
	}
}

// Who bears a name: its own key if it follows from one, else who was met first.
func TestBearers(t *testing.T) {
	named := func(name mesh.PeerName, key [32]byte) *Topology {
		p := newPeer(1)
		p.Name, p.Key = name, key
		topo := newTopology(p)
		topo.SetLinks([]PeerLink{linkTo(2, time.Millisecond)})
		return topo
	}
	own, thief := [32]byte{2, 7, 7, 7, 7, 7, 31: 1}, [32]byte{6, 6, 6, 31: 6}
	follows, chosen := mesh.PeerName(own[:6]), mesh.PeerName{2, 0, 0, 0, 9, 9}
	has := func(topo *Topology, name mesh.PeerName, key [32]byte) {
		t.Helper()
		if got, _ := topo.KeyOf(name); got != key {
			t.Errorf("%v belongs to %x, want %x", name, got[:3], key[:3])
		}
	}
	reach := func(topo *Topology, after time.Duration, up bool) {
		topo.Reach(t0.Add(after), Patience{time.Second, time.Hour}, func(mesh.PeerName) bool { return up })
	}

	// A name that follows from its key is nobody else's, not even for who comes first, and not while the peer is away.
	topo := newTopology(newPeer(3))
	merge(t, topo, all(named(follows, thief)))
	merge(t, topo, all(named(follows, own)))
	has(topo, follows, own)
	reach(topo, 0, false)
	reach(topo, 30*time.Minute, false)
	if _, err := topo.Merge(pn(9), all(named(follows, thief))); refusal(t, err).Foreign != 1 {
		t.Errorf("got %v", err)
	}
	has(topo, follows, own)
	topo.Linked(follows, thief, true)
	has(topo, follows, own)

	// A chosen one stays with who came first as long as that peer is reached, and a little longer.
	topo = newTopology(newPeer(3))
	reach(topo, 0, true)
	merge(t, topo, all(named(chosen, own)))
	for _, c := range []struct {
		after time.Duration
		up    bool
	}{{time.Second, true}, {time.Hour, true}, {time.Hour + time.Second, false}, {time.Hour + nameHold, false}} {
		reach(topo, c.after, c.up)
		if _, err := topo.Merge(pn(9), all(named(chosen, thief))); refusal(t, err).Foreign != 1 {
			t.Errorf("after %v: got %v", c.after, err)
		}
		has(topo, chosen, own)
	}
	reach(topo, time.Hour+time.Second+nameHold, false)
	merge(t, topo, all(named(chosen, thief)))
	has(topo, chosen, thief)
	if got := topo.Bearer(thief); got != chosen {
		t.Errorf("the key belongs to %v, want %v", got, chosen)
	}
	if got := topo.Bearer(own); got != follows {
		t.Errorf("the key belongs to %v, want %v", got, follows)
	}

	// A handshake of our own is worth more than what somebody said before.
	topo = newTopology(newPeer(3))
	merge(t, topo, all(named(chosen, thief)))
	topo.Linked(chosen, own, true)
	has(topo, chosen, own)
	if _, err := topo.Merge(pn(9), all(named(chosen, thief))); refusal(t, err).Foreign != 1 {
		t.Errorf("got %v", err)
	}
	merge(t, topo, all(named(chosen, own)))
	has(topo, chosen, own)

	// Our own name is ours, whoever signs with whatever key.
	self := named(chosen, own)
	if news, err := self.Merge(pn(9), all(named(chosen, thief))); news != nil || refusal(t, err).Foreign != 1 {
		t.Errorf("got %x, %v", news, err)
	}
	if _, rival := self.Rival(); rival {
		t.Error("gives way to another key")
	}
}

// What a full page costs to take in, less the signature.
func BenchmarkMergePage(b *testing.B) {
	a := newTopology(newPeer(1))
	links := make([]PeerLink, linksPerPage)
	for i := range links {
		links[i] = linkTo(i+2, time.Millisecond)
	}
	a.SetLinks(links)
	delta := all(a)
	b.ReportAllocs()
	for b.Loop() {
		to := newTopology(newPeer(2))
		if _, err := to.Merge(pn(1), delta); err != nil {
			b.Fatal(err)
		}
	}
}

// A host under a chosen name was made anew, and others have taken it in, before somebody who only heard of the old one
// came to the mesh. That one takes it in too, once the old one is away for long enough; but not on the word of a
// peer while another still has a link to the old one.
func TestNewBearerMetByOthers(t *testing.T) {
	const name = 9
	chosen := func(key int) Peer {
		p := newPeer(name)
		p.Key, p.Run = newPeer(key).Key, mesh.RunID(key)
		return p
	}
	old, anew := newTopology(chosen(70)), newTopology(chosen(71))
	for _, c := range []struct {
		what  string
		links []int // who has a link to that name
		tells int   // who tells of the new bearer
		taken bool
	}{
		{"by its only neighbour", []int{3}, 3, true},
		{"by one of two", []int{3, 4}, 3, false},
		{"by somebody else", []int{3}, 4, false},
	} {
		topo := newTopology(newPeer(2))
		merge(t, topo, all(old))
		for _, n := range []int{3, 4} {
			x := newTopology(newPeer(n))
			var links []PeerLink
			if slices.Contains(c.links, n) {
				links = []PeerLink{linkTo(name, time.Millisecond)}
			}
			x.SetLinks(append(links, linkTo(2, time.Millisecond)))
			merge(t, topo, all(x))
		}
		for s := range 13 {
			now := t0.Add(time.Duration(s) * time.Second)
			topo.Reach(now, Patience{0, time.Hour}, func(mesh.PeerName) bool { return true })
			if _, err := topo.Merge(pn(c.tells), all(anew)); s < 10 && refusal(t, err).Foreign != 1 {
				t.Errorf("%s: after %d s: %v", c.what, s, err)
			}
		}
		if got, _ := topo.KeyOf(pn(name)); (got == chosen(71).Key) != c.taken {
			t.Errorf("%s: the key is %x", c.what, got)
		}
	}
}
