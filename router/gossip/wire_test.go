package gossip

import (
	"bytes"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"meshd/mesh"
	"meshd/router"
)

// fixedTable holds entries by key; the higher version wins.
type fixedTable map[uint64]uint64

func (t fixedTable) Items() (out []mesh.Item) {
	for k, v := range t {
		out = append(out, mesh.Item{Key: k, Version: mix(k ^ v)})
	}
	return out
}

func (t fixedTable) Encode(keys []uint64, limit int) (out [][]byte) {
	var b []byte
	for _, k := range keys {
		v, ok := t[k]
		if !ok {
			continue
		}
		if len(b)+16 > limit {
			out, b = append(out, b), nil
		}
		for i := range 8 {
			b = append(b, byte(k>>(56-8*i)))
		}
		for i := range 8 {
			b = append(b, byte(v>>(56-8*i)))
		}
	}
	return append(out, b)
}

func (t fixedTable) Merge(_ mesh.PeerName, b []byte) (news []byte, err error) {
	if len(b)%16 != 0 {
		return nil, fmt.Errorf("%d bytes", len(b))
	}
	for ; len(b) > 0; b = b[16:] {
		var k, v uint64
		for i := range 8 {
			k, v = k<<8|uint64(b[i]), v<<8|uint64(b[8+i])
		}
		if old, ok := t[k]; !ok || v > old {
			t[k] = v
			news = append(news, b[:16]...)
		}
	}
	return news, nil
}

// exchange runs one comparison that a begins with b, and returns how many messages it took.
func exchange(t testing.TB, a, b map[mesh.Channel]Table, salt uint64) (messages int) {
	type mail struct {
		to  int
		msg []byte
	}
	sides := [2]map[mesh.Channel]Table{a, b}
	queue := []mail{{1, rootsMessage(a, salt)}}
	for len(queue) > 0 {
		m := queue[0]
		queue = queue[1:]
		messages++
		if len(m.msg) > mesh.MaxMessage || m.msg[0] != byte(mesh.ChanSync) {
			t.Fatalf("message of %d bytes on channel %d", len(m.msg), m.msg[0])
		}
		out := answerSync(sides[m.to], m.msg[1:], maxSyncReply)
		if out.bad {
			t.Fatalf("message %x is taken for malformed", m.msg)
		}
		if len(out.replies) > maxSyncReply {
			t.Fatalf("%d replies to one message", len(out.replies))
		}
		if out.data != nil {
			if _, err := sides[m.to][out.ch].Merge(pn(1), out.data); err != nil {
				t.Fatal(err)
			}
		}
		for _, r := range out.replies {
			queue = append(queue, mail{1 - m.to, r})
		}
	}
	return messages
}

func TestSyncMakesTablesEqual(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
		a, b := fixedTable{}, fixedTable{}
		fill := func(n int, tables ...fixedTable) {
			for range n {
				k, v := rng.Uint64(), rng.Uint64()
				if rapid.Bool().Draw(t, "edge") {
					k = k<<56 | []uint64{0, 1<<56 - 1}[k>>63] // at the edges of parts
				}
				for _, x := range tables {
					x[k] = v
				}
			}
		}
		fill(rapid.IntRange(0, 400).Draw(t, "common"), a, b)
		fill(rapid.IntRange(0, 30).Draw(t, "only a"), a)
		fill(rapid.IntRange(0, 30).Draw(t, "only b"), b)
		for k := range a { // some in other versions
			if _, ok := b[k]; ok && rng.IntN(20) == 0 {
				b[k]++
			}
		}
		exchange(nil, map[mesh.Channel]Table{9: a}, map[mesh.Channel]Table{9: b, 8: fixedTable{}}, rng.Uint64())
		if fmt.Sprint(a) != fmt.Sprint(b) {
			t.Fatalf("tables differ after an exchange: %d and %d entries", len(a), len(b))
		}
	})
}

func TestSyncCost(t *testing.T) {
	a, b := fixedTable{}, fixedTable{}
	rng := rand.New(rand.NewPCG(1, 1))
	for range 20_000 {
		k, v := rng.Uint64(), rng.Uint64()
		a[k], b[k] = v, v
	}
	ta, tb := map[mesh.Channel]Table{9: a}, map[mesh.Channel]Table{9: b}
	if n := exchange(t, ta, tb, 1); n != 1 {
		t.Errorf("equal tables took %d messages", n)
	}
	a[1] = 1
	if n := exchange(t, ta, tb, 2); n > 6 {
		t.Errorf("one entry of 20,000 took %d messages", n)
	}
	rounds := 0
	for empty := (fixedTable{}); len(empty) != len(a); rounds++ {
		exchange(t, map[mesh.Channel]Table{9: empty}, ta, uint64(rounds))
		if rounds > 50 {
			t.Fatalf("a newcomer has %d of %d entries after %d exchanges", len(empty), len(a), rounds)
		}
	}
	t.Logf("a newcomer took %d exchanges for 20,001 entries", rounds)
}

// sendCounter counts what is sent to each peer.
type sendCounter struct {
	nullUnderlay
	to map[mesh.PeerName]int
}

func (c sendCounter) Send(to mesh.PeerName, _ []byte) error { c.to[to]++; return nil }

// Three hundred newcomers ask one peer for everything. When answers ran out, a few once had them all, and some knew
// nobody for seconds.
func TestSyncShares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ask := itemsMessages(9, 7, 0, ^uint64(0), nil)[0][1:]
		table := fixedTable{}
		for k := range uint64(5_000) {
			table[k<<50] = 1
		}
		for _, peers := range []int{2, 300} {
			out := sendCounter{to: map[mesh.PeerName]int{}}
			n := New(Config{Self: router.Peer{Name: pn(1), Run: 1, Port: 6783}, Seed: 1}, out)
			n.AddTable(9, table)
			rng := rand.New(rand.NewPCG(1, 2))
			for range 200 {
				for _, p := range rng.Perm(peers) {
					if rng.IntN(20) == 0 {
						n.handleSync(pn(2+p), ask)
					}
				}
				time.Sleep(10 * time.Millisecond)
			}
			least, most := out.to[pn(2)], 0
			for p := range peers {
				least, most = min(least, out.to[pn(2+p)]), max(most, out.to[pn(2+p)])
			}
			t.Logf("of %d who ask for two seconds one gets %d messages, another %d", peers, least, most)
			if want := map[int]int{2: 200, 300: 1}[peers]; least < want {
				t.Errorf("of %d who ask for two seconds one got %d messages, want %d", peers, least, want)
			}
		}
	})
}

func FuzzSync(f *testing.F) {
	a := fixedTable{1: 1, 1 << 60: 2}
	tables := map[mesh.Channel]Table{9: a}
	f.Add(rootsMessage(tables, 7)[1:])
	for _, m := range answerSync(map[mesh.Channel]Table{9: fixedTable{5: 5}}, rootsMessage(tables, 7)[1:], maxSyncReply).replies {
		f.Add(m[1:])
		for _, m := range answerSync(tables, m[1:], maxSyncReply).replies {
			f.Add(m[1:])
		}
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		most := len(in) % (maxSyncReply + 1)
		out := answerSync(map[mesh.Channel]Table{9: fixedTable{1: 1, 5: 9, 1 << 60: 2}, mesh.ChanTopology: router.NewTopology(router.Peer{Name: pn(1)}, nil)}, in, most)
		if len(out.replies) > most {
			t.Fatalf("got %d replies, want %d at most", len(out.replies), most)
		}
		for _, r := range out.replies {
			if len(r) > mesh.MaxMessage {
				t.Errorf("reply of %d bytes", len(r))
			}
		}
	})
}

func TestSpread(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	var peers []mesh.PeerName
	for i := range 50 {
		peers = append(peers, pn(i+2))
	}
	var s spreader
	for i := range 100 {
		s.add(mesh.ChanNames, bytes.Repeat([]byte{byte(i)}, 10+5*i), pn(2+i%3))
	}
	told := map[byte]int{}
	now := t0
	for round := 0; len(s.queue) > 0; round++ {
		if round > 3*spreadRounds {
			t.Fatalf("still %d rumours", len(s.queue))
		}
		perPeer := map[mesh.PeerName]int{}
		for _, l := range s.round(now, peers, rng) {
			if len(l.msg) > mesh.MaxMessage {
				t.Fatalf("message of %d bytes", len(l.msg))
			}
			perPeer[l.to]++
			parts := []part{{mesh.Channel(l.msg[0]), l.msg[1:]}}
			if parts[0].ch == mesh.ChanBundle {
				var ok bool
				if parts, ok = parseBundle(l.msg[1:]); !ok {
					t.Fatal("a bundle does not parse")
				}
			}
			for _, p := range parts {
				i := p.body[0]
				told[i]++
				if p.ch != mesh.ChanNames || len(p.body) != 10+5*int(i) {
					t.Errorf("rumour %d arrives as %d bytes on channel %d", i, len(p.body), p.ch)
				}
				if l.to == pn(2+int(i)%3) {
					t.Errorf("rumour %d goes back to who told it", i)
				}
			}
		}
		if len(perPeer) > spreadFanout {
			t.Errorf("%d peers told in one round", len(perPeer))
		}
		for p, n := range perPeer {
			if n > spreadBudget {
				t.Errorf("%v got %d messages in one round", p, n)
			}
		}
		if s.due(now) {
			t.Error("due again at once")
		}
		now = now.Add(spreadInterval)
	}
	for i := range 100 {
		if n := told[byte(i)]; n < spreadRounds*spreadFanout-2 || n > 2*spreadRounds*spreadFanout {
			t.Errorf("rumour %d was told %d times", i, n)
		}
	}
	for range 2 * spreadQueue {
		s.add(mesh.ChanNames, []byte{1, 2}, pn(1))
	}
	if len(s.queue) != spreadQueue || s.dropped != spreadQueue {
		t.Errorf("%d rumours held, %d dropped", len(s.queue), s.dropped)
	}
	if out := s.round(now, nil, rng); len(out) != 0 || len(s.queue) != 0 {
		t.Errorf("with nobody to tell: %d messages, %d rumours kept", len(out), len(s.queue))
	}
}

func FuzzBundle(f *testing.F) {
	f.Add([]byte{4, 0, 1, 9, 2, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		parts, ok := parseBundle(in)
		if !ok {
			return
		}
		n := 0
		for _, p := range parts {
			n += bundleHeader + len(p.body)
		}
		if n != len(in) {
			t.Errorf("parts of %d bytes in %d", n, len(in))
		}
	})
}

func TestMemberAddresses(t *testing.T) {
	p := mesh.PeerName{0x7a, 0x9f, 0xeb, 0xb6, 0x0c, 0x6e}
	if q, ok := peerOfAddr(memberAddr(p)); !ok || q != p {
		t.Errorf("%s stands for %v, %v", memberAddr(p), q, ok)
	}
	for _, bad := range []string{"", "10.0.0.1:6783", "[fd00::1]:6783", "[fd6d:6573:6864::]:6783", "fd6d:6573:6864::1"} {
		if q, ok := peerOfAddr(bad); ok {
			t.Errorf("%q stands for %v", bad, q)
		}
	}
	if _, ok := peerOfNode("::1"); ok {
		t.Error("a short form passes for a node's name: two names for one peer")
	}
}

func str(s string) []byte { return append([]byte{0xa0 | byte(len(s))}, s...) }

func fieldMap(kv ...[]byte) []byte {
	return append([]byte{0x80 | byte(len(kv)/2)}, bytes.Join(kv, nil)...)
}

func TestCheckMember(t *testing.T) {
	node, other := pn(2).String(), pn(3).String()
	ping := append([]byte{memberPing}, fieldMap(str("SeqNo"), []byte{7}, str("Node"), str(other),
		str("SourceAddr"), str(string(memberIP(pn(2)))), str("SourcePort"), []byte{0xcd, 0x1a, 0x7f}, str("SourceNode"), str(node))...)
	suspect := append([]byte{memberSuspect}, fieldMap(str("Incarnation"), []byte{1}, str("Node"), str(other), str("From"), str(node))...)
	alive := appendAlive(nil, pn(4), 5)
	compound := func(parts ...[]byte) []byte {
		b := []byte{memberCompound, byte(len(parts))}
		for _, p := range parts {
			b = append(b, byte(len(p)>>8), byte(len(p)))
		}
		return append(b, bytes.Join(parts, nil)...)
	}
	for _, c := range []struct {
		name string
		msg  []byte
		want bool
	}{
		{"ping", ping, true},
		{"suspect", suspect, true},
		{"alive", alive, true},
		{"alive for the last time", appendAlive(nil, pn(4), 1<<31-1), true},
		{"dead so that it cannot deny", append([]byte{memberDead}, fieldMap(str("Incarnation"), []byte{0xce, 0x40, 0, 0, 0}, str("Node"), str(other), str("From"), str(node))...), false},
		{"compound", compound(ping, alive, suspect), true},
		{"empty compound", compound(), true},
		{"nothing", nil, false},
		{"one byte", []byte{memberPing}, false},
		{"compound of compounds", compound(compound(ping)), false},
		{"compound cut short", compound(ping, alive)[:40], false},
		{"compressed", []byte{9, 0x80}, false},
		{"encrypted", []byte{10, 0x80}, false},
		{"labelled", []byte{244, 1, 'x'}, false},
		{"user message", []byte{8, 1, 2, 3}, false},
		{"push-pull", []byte{6, 0x80}, false},
		{"wrong checksum", append([]byte{memberCRC, 1, 2, 3, 4}, ping...), false},
		{"answer to a third", append([]byte{memberPing}, fieldMap(str("Node"), str(other), str("SourceAddr"), str(string(memberIP(pn(9)))), str("SourceNode"), str(pn(9).String()))...), false},
		{"node that is no name", append([]byte{memberSuspect}, fieldMap(str("Node"), str("x"), str("From"), str(node))...), false},
		{"huge name", append([]byte{memberSuspect}, fieldMap(str("Node"), append([]byte{0xda, 0xff, 0xff}, make([]byte, 1000)...))...), false},
		{"negative number", append([]byte{memberSuspect}, fieldMap(str("Incarnation"), []byte{0xff}, str("Node"), str(other), str("From"), str(node))...), false},
		{"nested map", append([]byte{memberSuspect}, fieldMap(str("Node"), []byte{0x80})...), false},
		{"something behind", append(slices.Clone(suspect), 0), false},
		{"absurd incarnation", append([]byte{memberSuspect}, fieldMap(str("Incarnation"), []byte{0xce, 0xff, 0xff, 0xff, 0xff}, str("Node"), str(other), str("From"), str(node))...), false},
	} {
		if _, got := checkMember(pn(2), c.msg, func(claim) bool { return true }); got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
	asked := claim{}
	checkMember(pn(2), suspect, func(c claim) bool { asked = c; return true })
	if asked != (claim{memberSuspect, pn(3), 1}) {
		t.Errorf("got claim %+v", asked)
	}
	for _, c := range []struct{ in, want []byte }{
		{suspect, nil}, {compound(suspect, suspect), nil}, {compound(suspect, ping, suspect), compound(ping)}, {compound(ping), compound(ping)},
	} {
		got, ok := checkMember(pn(2), c.in, func(claim) bool { return false })
		if !ok || !bytes.Equal(got, c.want) {
			t.Errorf("of %x with claims that are not believed is left %x (%v), want %x", c.in, got, ok, c.want)
		}
	}
}

func TestLinkedPeersAreNotDead(t *testing.T) {
	m := newMembers(pn(1), nil, slog.New(slog.DiscardHandler))
	death := claim{memberDead, pn(2), 9}
	m.setDirect(pn(2), true)
	if m.accept(death) {
		t.Error("the death of a linked peer is believed")
	}
	m.setDirect(pn(2), false)
	if !m.accept(death) {
		t.Error("the death of a peer without a link is not believed")
	}
	introduced := func(want uint32) {
		t.Helper()
		m.introduce(pn(2))
		var heard claim
		checkMember(pn(2), (<-m.packets).Buf, func(c claim) bool { heard = c; return true })
		if heard != (claim{memberAlive, pn(2), want}) {
			t.Errorf("introduced as %+v, want incarnation %d", heard, want)
		}
	}
	introduced(9) // memberlist has not met it
	m.dead[pn(2)] = time.Time{}
	introduced(10)
	introduced(11) // if that did not help
}

func FuzzCheckMember(f *testing.F) {
	f.Add(appendAlive(nil, pn(4), 5))
	f.Add([]byte{memberCompound, 1, 0, 2, 0, 0x80})
	f.Fuzz(func(t *testing.T, in []byte) {
		claims := 0
		left, ok := checkMember(pn(2), in, func(c claim) bool {
			claims++
			if c.peer.IsZero() {
				t.Error("a claim about nobody")
			}
			return claims%2 == 1
		})
		if again, good := checkMember(pn(2), left, func(claim) bool { return true }); ok && len(left) > 0 && (!good || !bytes.Equal(again, left)) {
			t.Errorf("of %x is left %x, which is not well-formed", in, left)
		}
	})
}

// Whatever a peer sends, the node takes it or counts it.
func FuzzMessage(f *testing.F) {
	n := New(Config{Self: router.Peer{Name: pn(1), Run: 1, Port: 6783}, Seed: 1}, nullUnderlay{})
	n.AddTable(mesh.ChanNames, fixedTable{})
	n.Handle(mesh.ChanAddresses, func(mesh.PeerName, []byte) {})
	for ch := range 9 {
		f.Add([]byte{byte(ch), 1, 2, 3})
	}
	f.Add(rootsMessage(n.tables, 1))
	f.Fuzz(func(t *testing.T, in []byte) {
		n.Message(pn(2), in)
		for len(n.inbox) > 0 {
			n.handle(<-n.inbox)
		}
		for len(n.members.packets) > 0 {
			<-n.members.packets
		}
		n.publish(time.Time{})
		if len(n.spread.queue) > spreadQueue {
			t.Errorf("%d rumours", len(n.spread.queue))
		}
	})
}
