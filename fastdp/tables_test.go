package fastdp

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"pgregory.net/rapid"

	"meshd/mesh"
)

// Whatever comes and goes, two networks never have one number, a number that is given up rests for one
// round, and what stays keeps its number.
func TestNetworkNumbers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var n networks
		for range rapid.IntRange(1, 30).Draw(t, "rounds") {
			wanted := make(map[netip.Prefix]bool)
			for _, i := range rapid.SliceOfN(rapid.IntRange(0, 400), 0, 300).Draw(t, "networks") {
				wanted[netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)] = true
			}
			before := n.at
			numbers := make(map[netip.Prefix]int)
			for p, i := range n.number {
				numbers[p] = i
			}
			keep := rapid.Bool().Draw(t, "keep")
			_, left := n.assign(wanted, keep)
			for p, i := range n.number {
				if n.at[i] != p {
					t.Fatalf("number %d is %v, want %v", i, n.at[i], p)
				}
				if had, ok := numbers[p]; ok && had != i {
					t.Fatalf("%v had number %d and has %d", p, had, i)
				}
				if before[i].IsValid() && before[i] != p {
					t.Fatalf("number %d went from %v to %v at once", i, before[i], p)
				}
				if !keep && !wanted[p] {
					t.Fatalf("%v is still numbered", p)
				}
			}
			missing := 0
			for p := range wanted {
				if _, ok := n.number[p]; !ok {
					missing++
				}
			}
			if missing != len(left) {
				t.Fatalf("%d wanted without a number, %d reported", missing, len(left))
			}
			for range 1 {
				if _, again := n.assign(wanted, false); len(wanted) <= maxNetworks && len(again) != 0 {
					t.Fatalf("%d of %d networks find no number", len(again), len(wanted))
				}
			}
		}
	})
}

func TestPortValue(t *testing.T) {
	var many []netip.Prefix
	for i := range maxAddr4 + 1 {
		many = append(many, netip.MustParsePrefix(fmt.Sprintf("10.0.%d.1/24", i)))
	}
	if _, err := portValue(Port{Addrs: many}, netset{}, false); !errors.Is(err, ErrTooMany) {
		t.Errorf("too many addresses: %v", err)
	}
	v, err := portValue(Port{MAC: mesh.MAC{2, 0, 0, 0, 0, 9}, Addrs: append(many[:maxAddr4], netip.MustParsePrefix("fd00::5/48"))}, netset{}, true)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range many[:maxAddr4] {
		if got := valueAddr([4]uint32{v.Addr4[i]}, [4]uint32{v.Mask4[i]}, false); got != want {
			t.Errorf("address %d: got %v, want %v", i, got, want)
		}
	}
	if got := valueAddr(v.Addr6[0], v.Mask6[0], true); got.String() != "fd00::5/48" || v.Count6 != 1 {
		t.Errorf("got %v", got)
	}
	if keyMAC(v.Mac) != (mesh.MAC{2, 0, 0, 0, 0, 9}) || v.Flags != portAnnounced {
		t.Errorf("got %v, flags %d", keyMAC(v.Mac), v.Flags)
	}
	for _, bad := range []netip.Prefix{{}, netip.MustParsePrefix("10.0.0.1/0"), netip.MustParsePrefix("::ffff:10.0.0.1/120")} {
		if err := validPrefixes([]netip.Prefix{bad}); err == nil {
			t.Errorf("%v passes", bad)
		}
	}
}

func TestPeerValue(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")
	for _, c := range []struct {
		name string
		p    Peer
		to   netip.Addr
		want uint32
	}{
		{"direct", Peer{ID: 7, Addr: v4}, v4, peerKnown | peerUp},
		{"IPv4 in IPv6", Peer{ID: 7, Addr: netip.AddrFrom16(v4.As16())}, netip.AddrFrom16(v4.As16()), peerKnown | peerUp},
		{"IPv6", Peer{ID: 7, Addr: v6}, v6, peerKnown | peerUp | peerToV6 | peerFromV6},
		{"by a relay of the other family", Peer{ID: 7, Addr: v6}, v4, peerKnown | peerUp | peerFromV6},
		{"refused", Peer{ID: 7, Addr: v4, Refuse: "encrypted"}, v4, 0},
		{"no id", Peer{Addr: v4}, v4, 0},
		{"no address", Peer{ID: 7}, netip.Addr{}, 0},
	} {
		if got := peerValue(c.p, c.to, true, false); got.Flags != c.want {
			t.Errorf("%s: flags %d, want %d", c.name, got.Flags, c.want)
		}
	}
	for _, a := range []netip.Addr{v4, v6} {
		if got := underlayAddr(underlayWords(a), a.Is6()); got != a {
			t.Errorf("got %v, want %v", got, a)
		}
	}
}

// Endpoints of other hosts are as many as anybody in the mesh likes: they leave room for this host's, and those that are known stay.
func TestCrowdOut(t *testing.T) {
	want, have := map[uint64]bpfEndpoint{}, map[uint64]bpfEndpoint{}
	for i := range uint64(100) {
		v := bpfEndpoint{Peer: 2}
		if i < 10 {
			v = bpfEndpoint{Peer: 1, Flags: endpointLocal}
		} else if i < 50 {
			have[i] = v
		}
		want[i] = v
	}
	if out := crowdOut(want, have, 90); out != 0 || len(want) != 100 {
		t.Errorf("%d of 90 went, %d are left", out, len(want))
	}
	if out := crowdOut(want, have, 60); out != 30 || len(want) != 70 {
		t.Errorf("%d went to leave 60, %d are left of all", out, len(want))
	}
	for i := range uint64(50) {
		if _, ok := want[i]; !ok {
			t.Errorf("%d went, of this host or known before", i)
		}
	}
	if out := crowdOut(want, have, 20); out != 40 || len(want) != 30 {
		t.Errorf("%d went to leave 20, %d are left of all", out, len(want))
	}
	for i := range uint64(10) {
		if _, ok := want[i]; !ok {
			t.Errorf("%d of this host went", i)
		}
	}
}
