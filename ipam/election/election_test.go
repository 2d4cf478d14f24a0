package election

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"meshd/mesh"
)

func peer(n int) mesh.PeerName { return mesh.PeerName{5: byte(n)} }

// TestOneValue runs elections over a network that loses, doubles and reorders, with voters that crash
// and come back from what they had written, until somebody has decided; nobody may decide otherwise.
func TestOneValue(t *testing.T) {
	seeds := 2000
	if testing.Short() {
		seeds = 300
	}
	for seed := range seeds {
		rng := rand.New(rand.NewPCG(uint64(seed), 3))
		n := 1 + rng.IntN(7)
		quorum := n/2 + 1
		peers := make([]mesh.PeerName, n)
		for i := range peers {
			peers[i] = peer(i + 1)
		}
		voters := make(map[mesh.PeerName]*Voter)
		disks := make(map[mesh.PeerName][]byte)
		for _, p := range peers {
			voters[p] = New(p, true, p[:])
		}
		type packet struct {
			from mesh.PeerName
			Out
		}
		var net []packet
		var decided []byte
		did := func(p mesh.PeerName, outs []Out) {
			disks[p] = voters[p].State()
			for _, o := range outs {
				net = append(net, packet{p, o})
			}
			if d := voters[p].Decided(); d != nil {
				if decided != nil && string(decided) != string(d) {
					t.Fatalf("seed %d: decided %q and %q", seed, decided, d)
				}
				decided = d
			}
		}
		for step := range 3000 {
			p := peers[rng.IntN(n)]
			switch x := rng.IntN(100); {
			case x < 4 || len(net) == 0:
				did(p, voters[p].Start(peers, quorum, func(cards map[mesh.PeerName][]byte) []byte {
					return fmt.Appendf(nil, "%s at step %d with %d", p, step, len(cards))
				}))
			case x < 6:
				v := New(p, true, p[:])
				if err := v.Restore(disks[p]); disks[p] != nil && err != nil {
					t.Fatal(err)
				}
				voters[p] = v
			default:
				i := rng.IntN(len(net))
				m := net[i]
				if x < 90 {
					net = slices.Delete(net, i, i+1)
				}
				if x < 15 {
					continue // lost
				}
				msg, err := Parse(m.Msg.Append(nil))
				if err != nil {
					t.Fatal(err)
				}
				did(m.To, voters[m.To].Handle(m.from, msg))
			}
		}
		// Left in peace, it ends.
		for range 50 {
			net = net[:0]
			did(peers[0], voters[peers[0]].Start(peers, quorum, func(map[mesh.PeerName][]byte) []byte { return []byte("late") }))
			for len(net) > 0 {
				m := net[0]
				net = net[1:]
				did(m.To, voters[m.To].Handle(m.from, m.Msg))
			}
			if voters[peers[0]].Decided() != nil {
				break
			}
		}
		if voters[peers[0]].Decided() == nil {
			t.Fatalf("seed %d: nothing decided in peace", seed)
		}
	}
}

func TestObserverNeverVotes(t *testing.T) {
	o := New(peer(1), false, nil)
	if out := o.Handle(peer(2), Message{Kind: Prepare, Ballot: Ballot{1, peer(2)}}); len(out) != 0 {
		t.Errorf("an observer answered %+v", out)
	}
}

func TestMinorityDecidesNothing(t *testing.T) {
	a, b := New(peer(1), true, nil), New(peer(2), true, nil)
	value := func(map[mesh.PeerName][]byte) []byte { return []byte("v") }
	for _, o := range a.Start([]mesh.PeerName{peer(1), peer(2)}, 3, value) {
		for _, r := range b.Handle(peer(1), o.Msg) {
			a.Handle(peer(2), r.Msg)
		}
	}
	if a.Decided() != nil || a.Known() != 2 {
		t.Errorf("decided %q, known %d, want nothing and 2", a.Decided(), a.Known())
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Message{Kind: Promise, Ballot: Ballot{1, peer(1)}, Other: Ballot{1, peer(2)}, Card: []byte("card"), Value: []byte("value")}.Append(nil))
	f.Add(Message{Kind: Propose, Ballot: Ballot{9, peer(1)}, Value: make([]byte, MaxValue)}.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Parse(b)
		if err != nil {
			return
		}
		again, err := Parse(m.Append(nil))
		if err != nil {
			t.Fatal(err)
		}
		if diff := gocmp.Diff(m, again, cmpopts.EquateEmpty()); diff != "" {
			t.Fatal(diff)
		}
		New(peer(1), true, nil).Handle(peer(2), m)
	})
}
