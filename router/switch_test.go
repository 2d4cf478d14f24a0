package router

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"meshd/mesh"
)

var (
	broadcast = mesh.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	me        = pn(1)
)

func mc(i int) mesh.MAC { return mesh.MAC{0x02, 0, 0, 0, byte(i >> 8), byte(i)} }

func ep(peer, mac int, addrs ...string) mesh.Endpoint {
	e := mesh.Endpoint{Peer: pn(peer), Owner: fmt.Sprint("c", mac), MAC: mc(mac)}
	for _, a := range addrs {
		e.Addrs = append(e.Addrs, netip.MustParsePrefix(a))
	}
	return e
}

func frame(dst, src mesh.MAC, kind uint16, payload ...byte) []byte {
	f := append(append(append([]byte{}, dst[:]...), src[:]...), byte(kind>>8), byte(kind))
	return append(f, payload...)
}

func arp(op uint16, dst, sha mesh.MAC, spa string, tha mesh.MAC, tpa string) []byte {
	f := frame(dst, sha, typeARP, 0, 1, 8, 0, 6, 4, byte(op>>8), byte(op))
	f = append4(append(f, sha[:]...), netip.MustParseAddr(spa))
	return append4(append(f, tha[:]...), netip.MustParseAddr(tpa))
}

// solicit builds a neighbour solicitation with gopacket, which knows nothing of our parser.
func solicit(t testing.TB, src mesh.MAC, from, target string, option bool) []byte {
	t.Helper()
	tip := netip.MustParseAddr(target).As16()
	dst := mesh.MAC{0x33, 0x33, 0xff, tip[13], tip[14], tip[15]}
	group := append(net.ParseIP("ff02::1:ff00:0")[:13], tip[13:]...)
	ip := &layers.IPv6{Version: 6, NextHeader: layers.IPProtocolICMPv6, HopLimit: 255, SrcIP: net.ParseIP(from), DstIP: group}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeNeighborSolicitation, 0)}
	icmp.SetNetworkLayerForChecksum(ip)
	ns := &layers.ICMPv6NeighborSolicitation{TargetAddress: tip[:]}
	if option {
		ns.Options = layers.ICMPv6Options{{Type: layers.ICMPv6OptSourceAddress, Data: src[:]}}
	}
	buf := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: src[:], DstMAC: dst[:], EthernetType: layers.EthernetTypeIPv6}, ip, icmp, ns)
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// testSwitch is peer 1 with endpoints 11 (10.2.1.1, fd00::1) and 12 (10.3.0.1), beside peers 2 (21 in
// 10.2.1.0/24), 3 (31 in 10.3.0.0/24), 4 (foreign ports), and 5 (unreachable, 51 in 10.2.1.0/24).
func testSwitch() *Switch {
	s := NewSwitch(me, t0)
	s.SetPeers([]PeerFlags{
		{Name: pn(2), Reachable: true}, {Name: pn(3), Reachable: true},
		{Name: pn(4), Reachable: true, Foreign: true}, {Name: pn(5)},
	})
	s.SetEndpoints([]mesh.Endpoint{
		ep(1, 11, "10.2.1.1/24", "fd00::1/64"), ep(1, 12, "10.3.0.1/24"),
		ep(2, 21, "10.2.1.2/24", "fd00::2/64"), ep(3, 31, "10.3.0.2/24"), ep(5, 51, "10.2.1.5/24"),
	})
	return s
}

func describe(d Decision) string {
	switch d.Verdict {
	case Drop:
		return "drop " + d.Reason.String()
	case Unicast:
		return fmt.Sprint("to ", d.Peer[5])
	case Flood:
		out := "flood"
		for _, p := range d.Peers {
			out += fmt.Sprint(" ", p[5])
		}
		return out
	case Deliver:
		return "deliver"
	}
	return "answer"
}

func TestFromBridge(t *testing.T) {
	vm := mesh.MAC{0x52, 0x54, 0, 0, 0, 1}
	for _, c := range []struct {
		name  string
		frame []byte
		want  string
	}{
		{"runt", make([]byte, 13), "drop runt"},
		{"empty", nil, "drop runt"},
		{"group source", frame(mc(21), broadcast, 0x800), "drop source"},
		{"zero source", frame(mc(21), mesh.MAC{}, 0x800), "drop source"},
		{"spanning tree", frame(mesh.MAC{1, 0x80, 0xc2}, mc(11), 0x26), "drop link_control"},
		{"lldp", frame(mesh.MAC{1, 0x80, 0xc2, 0, 0, 0xe}, mc(11), 0x88cc), "drop link_control"},
		{"a group just above the control block", frame(mesh.MAC{1, 0x80, 0xc2, 0, 0, 0x10}, mc(11), 1), "flood 2 4"},
		{"announced", frame(mc(21), mc(11), 0x800), "to 2"},
		{"announced, from a VM", frame(mc(31), vm, 0x800), "to 3"},
		{"local", frame(mc(12), mc(11), 0x800), "drop local"},
		{"another subnet", frame(mc(31), mc(11), 0x800), "drop isolated"},
		{"another subnet, and back", frame(mc(21), mc(12), 0x88b5), "drop isolated"},
		{"question to another subnet", arp(1, mc(31), mc(11), "10.2.1.1", mesh.MAC{}, "10.3.0.2"), "drop isolated"},
		{"question as one of another subnet", arp(1, broadcast, mc(11), "10.3.0.9", mesh.MAC{}, "10.3.0.2"), "flood 2 4"},
		{"source of another peer", frame(mc(11), mc(21), 0x800), "drop moved"},
		{"broadcast stays in the subnet", frame(broadcast, mc(11), 0x800), "flood 2 4"},
		{"the other subnet", frame(broadcast, mc(12), 0x800), "flood 3 4"},
		{"broadcast of a VM", frame(broadcast, vm, 0x800), "flood 2 3 4"},
		{"unknown destination", frame(mc(99), mc(11), 0x800), "flood 2 4"},
		{"multicast", frame(mesh.MAC{1, 0, 0x5e, 0, 0, 1}, mc(12), 0x800), "flood 3 4"},
		{"other types", frame(broadcast, mc(11), 0x88b5), "flood 2 4"},
		{"request for a remote endpoint", arp(1, broadcast, mc(11), "10.2.1.1", mesh.MAC{}, "10.2.1.2"), "answer"},
		{"the same from a VM", arp(1, broadcast, vm, "10.2.1.77", mesh.MAC{}, "10.2.1.2"), "answer"},
		{"request for a local endpoint", arp(1, broadcast, mc(11), "10.2.1.1", mesh.MAC{}, "10.3.0.1"), "drop local"},
		{"request across subnets", arp(1, broadcast, mc(11), "10.2.1.1", mesh.MAC{}, "10.3.0.2"), "flood 2 4"},
		{"request for nobody known", arp(1, broadcast, mc(11), "10.2.1.1", mesh.MAC{}, "10.2.1.9"), "flood 2 4"},
		{"unicast request", arp(1, mc(21), mc(11), "10.2.1.1", mesh.MAC{}, "10.2.1.2"), "to 2"},
		{"probe", arp(1, broadcast, mc(11), "0.0.0.0", mesh.MAC{}, "10.2.1.2"), "flood 2 4"},
		{"gratuitous", arp(1, broadcast, mc(11), "10.2.1.1", mesh.MAC{}, "10.2.1.1"), "flood 2 4"},
		{"gratuitous reply", arp(2, broadcast, mc(11), "10.2.1.1", broadcast, "10.2.1.1"), "flood 2 4"},
		{"reply", arp(2, mc(21), mc(11), "10.2.1.1", mc(21), "10.2.1.2"), "to 2"},
		{"an address stolen", arp(2, mc(21), mc(11), "10.2.1.5", mc(21), "10.2.1.2"), "drop neighbour"},
		{"stolen by a VM", arp(1, broadcast, vm, "10.2.1.1", mesh.MAC{}, "10.2.1.1"), "drop neighbour"},
		{"truncated ARP", arp(1, broadcast, mc(11), "10.2.1.1", mesh.MAC{}, "10.2.1.2")[:40], "flood 2 4"},
		{"solicitation", solicit(t, mc(11), "fd00::1", "fd00::2", true), "answer"},
		{"solicitation for nobody", solicit(t, mc(11), "fd00::1", "fd00::9", true), "flood 2 4"},
		{"duplicate address detection", solicit(t, mc(11), "::", "fd00::2", false), "flood 2 4"},
		{"solicitation that says not from whom", solicit(t, mc(11), "fd00::1", "fd00::2", false), "flood 2 4"},
		{"solicitation with a stolen source", solicit(t, mc(12), "fd00::1", "fd00::2", true), "drop neighbour"},
	} {
		s := testSwitch()
		before := slices.Clone(c.frame)
		d := s.FromBridge(c.frame, make([]byte, 128), t0)
		if got := describe(d); got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
		if !bytes.Equal(before, c.frame) {
			t.Errorf("%s: the frame was changed", c.name)
		}
		if d.Verdict == Drop && s.Drops()[d.Reason.String()] != 1 {
			t.Errorf("%s: the drop is not counted: %v", c.name, s.Drops())
		}
	}
}

func TestFromPeer(t *testing.T) {
	vm := mesh.MAC{0x52, 0x54, 0, 0, 0, 1}
	for _, c := range []struct {
		name  string
		from  int
		frame []byte
		want  string
	}{
		{"runt", 2, make([]byte, 5), "drop runt"},
		{"group source", 2, frame(mc(11), broadcast, 1), "drop source"},
		{"control", 2, frame(mesh.MAC{1, 0x80, 0xc2}, mc(21), 1), "drop link_control"},
		{"Cisco's control", 2, frame(mesh.MAC{1, 0, 0xc, 0xcc, 0xcc, 0xcd}, mc(21), 1), "drop link_control"},
		{"for us", 2, frame(mc(11), mc(21), 0x800), "deliver"},
		{"broadcast", 2, frame(broadcast, mc(21), 0x800), "deliver"},
		{"from a VM there", 4, frame(mc(11), vm, 0x800), "deliver"},
		{"for somebody unknown", 2, frame(mc(99), mc(21), 0x800), "deliver"},
		{"for another peer", 2, frame(mc(31), mc(21), 0x800), "drop local"},
		{"from another subnet", 3, frame(mc(11), mc(31), 0x800), "drop isolated"},
		{"from another subnet, other types", 2, frame(mc(12), mc(21), 0x88b5), "drop isolated"},
		{"with our endpoint's source", 2, frame(mc(12), mc(11), 0x800), "drop forged_source"},
		{"with a third's source", 2, frame(mc(11), mc(31), 0x800), "drop forged_source"},
		{"from a peer that nobody knows", 9, frame(mc(11), vm, 0x800), "deliver"},
		{"who has its own address", 2, arp(2, mc(11), mc(21), "10.2.1.2", mc(11), "10.2.1.1"), "deliver"},
		{"who announces it with another MAC", 2, arp(1, broadcast, vm, "10.2.1.2", mesh.MAC{}, "10.2.1.2"), "deliver"},
		{"who takes what belonged to one out of reach", 2, arp(1, broadcast, mc(21), "10.2.1.5", mesh.MAC{}, "10.2.1.5"), "deliver"},
		{"who asks whether ours is taken", 2, arp(1, broadcast, mc(21), "0.0.0.0", mesh.MAC{}, "10.2.1.1"), "deliver"},
		{"who says that ours is with it", 2, arp(2, broadcast, mc(21), "10.2.1.1", mesh.MAC{}, "10.2.1.1"), "drop neighbour"},
		{"who says that a third's is with it", 2, arp(2, mc(11), mc(21), "10.3.0.2", mc(11), "10.2.1.1"), "drop neighbour"},
		{"who asks as a third", 2, arp(1, mc(11), mc(21), "10.3.0.2", mesh.MAC{}, "10.2.1.1"), "drop neighbour"},
		{"who says so with a VM's MAC", 4, arp(2, mc(11), vm, "10.2.1.2", mc(11), "10.2.1.1"), "drop neighbour"},
		{"who asks as a third by IPv6", 4, solicit(t, vm, "fd00::2", "fd00::1", true), "drop neighbour"},
	} {
		s := testSwitch()
		if got := describe(s.FromPeer(c.frame, pn(c.from), t0)); got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
	}
}

// Forms of ARP and neighbour discovery that the kernel takes and that are not the usual ones say nothing of others either.
func TestOddNeighbours(t *testing.T) {
	mac := mc(21)
	claim := func(options ...mesh.MAC) []byte { // an advertisement for fd00::1, which is at mc(11)
		target := netip.MustParseAddr("fd00::1")
		f := frame(mc(12), mac, typeIPv6, 0x60, 0, 0, 0, 0, byte(ndLength+8*len(options)), protoICMP6, 255)
		f = append16(append16(f, netip.MustParseAddr("fd00::2")), netip.MustParseAddr("fd00::1"))
		f = append16(append(f, neighbourAdvert, 0, 0, 0, advertOverride, 0, 0, 0), target)
		for _, m := range options {
			f = append(append(f, optionTarget, 1), m[:]...)
		}
		return f
	}
	behind := func(f []byte, headers ...byte) []byte {
		f = slices.Clone(f)
		for _, kind := range headers {
			at := etherHeader + ip6Header
			next := f[etherHeader+6]
			f[etherHeader+6], f[etherHeader+5] = kind, f[etherHeader+5]+8
			f = slices.Insert(f, at, next, 0, 1, 4, 0, 0, 0, 0)
		}
		return f
	}
	odd := arp(2, mc(12), mac, "10.2.1.1", mc(12), "10.2.1.9")
	odd[etherHeader+1] = 6
	for name, f := range map[string][]byte{
		"IEEE 802 ARP": odd, "plain": claim(mac), "the right MAC second": claim(mac, mc(11)), "the right MAC first": claim(mc(11), mac),
		"behind hop-by-hop options": behind(claim(mac), protoHopByHop), "behind a routing header": behind(claim(mac), protoRouting),
		"behind three": behind(claim(mac), protoDestOpts, protoRouting, protoHopByHop),
	} {
		s := testSwitch()
		if got := describe(s.FromPeer(f, pn(2), t0)); got != "drop neighbour" {
			t.Errorf("%s, from a peer: %s", name, got)
		}
		s.SetEndpoints([]mesh.Endpoint{ep(1, 21, "10.2.1.2/24", "fd00::2/64"), ep(2, 11, "10.2.1.1/24", "fd00::1/64")})
		if got := describe(s.FromBridge(f, nil, t0)); got != "drop neighbour" {
			t.Errorf("%s, from the bridge: %s", name, got)
		}
	}
}

// L6: who sends to addresses that nobody knows, which go to everybody, is limited; others are not, nor is what goes to known ones.
func TestUnknownStorm(t *testing.T) {
	s := testSwitch()
	flooded := 0
	const perSecond = 200_000
	for i := range 3 * perSecond {
		now := t0.Add(time.Duration(i) * time.Second / perSecond)
		d := s.FromBridge(frame(mesh.MAC{2, 9, 9, byte(i >> 16), byte(i >> 8), byte(i)}, mc(11), 0x800), nil, now)
		if d.Verdict == Flood {
			flooded++
		}
		if i%1000 != 0 {
			continue
		}
		for what, f := range map[string][]byte{
			"flood 3 4": frame(mesh.MAC{2, 9}, mc(12), 0x800), "to 2": frame(mc(21), mc(11), 0x800), "flood 2 4": frame(broadcast, mc(11), 0x800),
		} {
			if got := describe(s.FromBridge(f, nil, now)); got != what {
				t.Fatalf("during the storm: %s, want %s", got, what)
			}
		}
	}
	if most := unknownBurst + 3*unknownPerSecond + 1; flooded > most || flooded < most*9/10 {
		t.Errorf("%d frames to unknown addresses went to everybody in 3 s, want %d", flooded, most)
	}
	if n := s.Drops()["rate"]; n != uint64(3*perSecond-flooded) {
		t.Errorf("%d drops counted, want %d", n, 3*perSecond-flooded)
	}
}

func TestAnswers(t *testing.T) {
	s := testSwitch()
	d := s.FromBridge(arp(1, broadcast, mc(11), "10.2.1.1", mesh.MAC{}, "10.2.1.2"), make([]byte, 128), t0)
	if want := arp(2, mc(11), mc(21), "10.2.1.2", mc(11), "10.2.1.1"); !bytes.Equal(d.Reply, want) {
		t.Errorf("got %x, want %x", d.Reply, want)
	}

	d = s.FromBridge(solicit(t, mc(11), "fd00::1", "fd00::2", true), make([]byte, 128), t0)
	p := gopacket.NewPacket(d.Reply, layers.LayerTypeEthernet, gopacket.Default)
	na, ok := p.Layer(layers.LayerTypeICMPv6NeighborAdvertisement).(*layers.ICMPv6NeighborAdvertisement)
	if !ok || !na.TargetAddress.Equal(net.ParseIP("fd00::2")) || na.Flags != advertSolicited|advertOverride {
		t.Fatalf("got %v", p)
	}
	mac := mc(21)
	if len(na.Options) != 1 || !bytes.Equal(na.Options[0].Data, mac[:]) {
		t.Errorf("got options %v", na.Options)
	}
	// The checksum is right if summing everything again gives the same.
	ip := p.Layer(layers.LayerTypeIPv6).(*layers.IPv6)
	icmp := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6)
	sum := icmp.Checksum
	icmp.SetNetworkLayerForChecksum(ip)
	buf := gopacket.NewSerializeBuffer()
	rest := &layers.ICMPv6NeighborAdvertisement{Flags: na.Flags, TargetAddress: na.TargetAddress, Options: na.Options}
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{ComputeChecksums: true}, icmp, rest); err != nil {
		t.Fatal(err)
	}
	if icmp.Checksum != sum {
		t.Errorf("got checksum %04x, want %04x", sum, icmp.Checksum)
	}

	if d := s.FromBridge(arp(1, broadcast, mc(11), "10.2.1.1", mesh.MAC{}, "10.2.1.2"), make([]byte, 0, 20), t0); d.Verdict != Flood {
		t.Errorf("without room for an answer: got %s, want a flood", describe(d))
	}
}

func TestLearning(t *testing.T) {
	s := testSwitch()
	vm, other := mesh.MAC{0x52, 0x54, 0, 0, 0, 1}, mesh.MAC{0x52, 0x54, 0, 0, 0, 2}
	to := func(now time.Time) string { return describe(s.FromBridge(frame(vm, other, 0x800), nil, now)) }
	if got := to(t0); got != "flood 2 3 4" {
		t.Errorf("unknown: got %s", got)
	}
	s.FromPeer(frame(broadcast, vm, 1), pn(4), t0)
	if got := to(t0.Add(9 * time.Minute)); got != "to 4" {
		t.Errorf("learned: got %s", got)
	}
	s.FromPeer(frame(broadcast, vm, 1), pn(3), t0.Add(9*time.Minute))
	if got := to(t0.Add(18 * time.Minute)); got != "to 3" {
		t.Errorf("moved: got %s", got)
	}
	if got := to(t0.Add(20 * time.Minute)); got != "flood 2 3 4" {
		t.Errorf("aged: got %s", got)
	}
	now := t0.Add(30 * time.Minute)
	s.FromBridge(frame(broadcast, vm, 1), nil, now)
	if got := to(now); got != "drop local" {
		t.Errorf("moved to our bridge: got %s", got)
	}
	if !s.Foreign(now) {
		t.Error("a VM on our bridge is not seen as foreign")
	}
	s.FromPeer(frame(broadcast, vm, 1), pn(4), now)
	s.SetPeers([]PeerFlags{{Name: pn(7), Reachable: true}})
	if got := to(now); got != "flood 7" {
		t.Errorf("its peer is gone: got %s", got)
	}
	s.FromPeer(frame(broadcast, vm, 1), pn(7), now)
	s.UpdateEndpoints([]mesh.Endpoint{{Peer: pn(7), Owner: "x", MAC: vm}}, nil)
	if got := describe(s.FromPeer(frame(broadcast, vm, 1), pn(8), now)); got != "drop forged_source" {
		t.Errorf("announced after it was learned: got %s", got)
	}
	s.Expire(now.Add(time.Hour))
	for _, m := range s.MACs() {
		if m.Learned {
			t.Errorf("still learned after an hour: %v", m)
		}
	}
}

func TestEndpointMoves(t *testing.T) {
	s := testSwitch()
	old, moved := ep(2, 21, "10.2.1.2/24"), ep(3, 21, "10.2.1.2/24")
	s.UpdateEndpoints([]mesh.Endpoint{moved}, nil)
	for _, from := range []int{2, 3} {
		if got := describe(s.FromPeer(frame(broadcast, mc(21), 1), pn(from), t0)); got != "deliver" {
			t.Errorf("both announce it: from %d got %s", from, got)
		}
	}
	s.UpdateEndpoints(nil, []mesh.Endpoint{old})
	if got := describe(s.FromPeer(frame(broadcast, mc(21), 1), pn(2), t0)); got != "drop forged_source" {
		t.Errorf("from where it was: got %s", got)
	}
	if got := describe(s.FromBridge(frame(mc(21), mc(11), 1), nil, t0)); got != "to 3" {
		t.Errorf("got %s, want its new place", got)
	}
	if got := describe(s.FromBridge(frame(broadcast, mc(11), 1), nil, t0)); got != "flood 3 4" {
		t.Errorf("got %s, want peer 3 in the flood and 2 out of it", got)
	}
	s.UpdateEndpoints([]mesh.Endpoint{ep(1, 21, "10.2.1.2/24")}, []mesh.Endpoint{moved})
	if got := describe(s.FromBridge(frame(mc(51), mc(21), 1), nil, t0)); got != "to 5" {
		t.Errorf("on our bridge now: got %s", got)
	}
	s.SetEndpoints(nil)
	if got := s.MACs(); len(got) != 0 {
		t.Errorf("nothing announced, got %v", got)
	}
	if got := describe(s.FromBridge(frame(broadcast, mc(11), 1), nil, t0)); got != "flood 2 3 4" {
		t.Errorf("a sender that is no endpoint any more: got %s", got)
	}
}

func TestEndpointWithoutAddress(t *testing.T) {
	s := testSwitch()
	s.UpdateEndpoints([]mesh.Endpoint{ep(3, 32), ep(1, 13)}, nil)
	if got := describe(s.FromBridge(frame(broadcast, mc(11), 1), nil, t0)); got != "flood 2 4" {
		t.Errorf("got %s: an endpoint without an address is in no subnet", got)
	}
	if got := describe(s.FromBridge(frame(mc(32), mc(13), 1), nil, t0)); got != "drop isolated" {
		t.Errorf("between two without an address: got %s", got)
	}
	s.SetPeers(nil)
	if got := describe(s.FromBridge(frame(broadcast, mc(11), 1), nil, t0)); got != "drop no_peer" {
		t.Errorf("alone: got %s", got)
	}
}

// Endpoints hear each other if a subnet of theirs is the same, to its length: the kernel path compares alike.
func TestIsolation(t *testing.T) {
	s := testSwitch()
	s.UpdateEndpoints([]mesh.Endpoint{
		ep(1, 14, "10.2.1.14/24", "10.3.0.14/24"), ep(2, 24, "10.2.0.24/16"), ep(3, 34, "10.2.1.34/25"), ep(3, 35, "fd00::35/64"),
	}, nil)
	for _, c := range []struct {
		dst, src, peer int
		want           string
	}{
		{21, 14, 2, "to 2"}, {31, 14, 3, "to 3"}, {24, 11, 2, "drop isolated"}, {24, 14, 2, "drop isolated"},
		{34, 11, 3, "drop isolated"}, {35, 11, 3, "to 3"}, {35, 12, 3, "drop isolated"},
	} {
		if got := describe(s.FromBridge(frame(mc(c.dst), mc(c.src), 0x800), nil, t0)); got != c.want {
			t.Errorf("%d to %d: got %s, want %s", c.src, c.dst, got, c.want)
		}
		want := "deliver"
		if c.want == "drop isolated" {
			want = c.want
		}
		if got := describe(s.FromPeer(frame(mc(c.src), mc(c.dst), 0x800), pn(c.peer), t0)); got != want {
			t.Errorf("%d back to %d: got %s, want %s", c.dst, c.src, got, want)
		}
	}
	for mac, want := range map[int]string{11: "flood 2 3 4", 12: "flood 3 4", 14: "flood 2 3 4"} {
		if got := describe(s.FromBridge(frame(broadcast, mc(mac), 0x88b5), nil, t0)); got != want {
			t.Errorf("broadcast of %d: got %s, want %s", mac, got, want)
		}
	}
	// An address less, and the subnet is left at once.
	s.UpdateEndpoints([]mesh.Endpoint{ep(1, 14, "10.2.1.14/24")}, nil)
	if got := describe(s.FromBridge(frame(mc(31), mc(14), 0x800), nil, t0)); got != "drop isolated" {
		t.Errorf("a subnet that was left: got %s", got)
	}
}

// A million forged sources, here and at a peer: the table keeps its size, no memory is taken, announced endpoints
// stay, and unknown ones still flow (L5).
func TestMACFlood(t *testing.T) {
	s := testSwitch()
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	f := frame(broadcast, mesh.MAC{0x0a}, 0x800)
	for i := range 1_000_000 {
		f[7], f[8], f[9] = byte(i>>16), byte(i>>8), byte(i)
		s.FromBridge(f, nil, t0)
		f[9]++
		s.FromPeer(f, pn(3), t0)
	}
	more := heap() - before
	t.Logf("a million addresses take %d bytes", more)
	if more > 5<<20 {
		t.Errorf("a million addresses take %.1f MB, want at most 5", float64(more)/(1<<20))
	}
	if n := len(s.MACs()); n > fdbSets*fdbWays+5 {
		t.Errorf("%d addresses known", n)
	}
	if s.Drops()["fdb_full"] == 0 {
		t.Error("nothing is said of addresses that found no room")
	}
	if got := describe(s.FromBridge(frame(mc(21), mc(11), 1), nil, t0)); got != "to 2" {
		t.Errorf("announced: got %s", got)
	}
	if got := describe(s.FromPeer(frame(mc(11), mesh.MAC{0x52, 1}, 1), pn(4), t0)); got != "deliver" {
		t.Errorf("from an address that found no room: got %s", got)
	}
	s.Expire(t0.Add(11 * time.Minute))
	if n := len(s.MACs()); n != 5 {
		t.Errorf("%d addresses known after ageing, want the 5 announced", n)
	}
}

func TestFramePathDoesNotAllocate(t *testing.T) {
	s := testSwitch()
	scratch := make([]byte, 128)
	vm := mesh.MAC{0x52, 0x54, 0, 0, 0, 1}
	for name, f := range map[string][]byte{
		"unicast": frame(mc(21), mc(11), 0x800), "flood": frame(broadcast, mc(11), 0x800),
		"isolated": frame(mc(31), mc(11), 0x800),
		"learn":    frame(mc(99), vm, 0x800), "drop": frame(mc(21), broadcast, 0x800),
		"arp": arp(1, broadcast, mc(11), "10.2.1.1", mesh.MAC{}, "10.2.1.2"),
		"nd":  solicit(t, mc(11), "fd00::1", "fd00::2", true),
	} {
		if n := testing.AllocsPerRun(100, func() { s.FromBridge(f, scratch, t0) }); n != 0 {
			t.Errorf("FromBridge, %s: %v allocations", name, n)
		}
		if n := testing.AllocsPerRun(100, func() { s.FromPeer(f, pn(2), t0) }); n != 0 {
			t.Errorf("FromPeer, %s: %v allocations", name, n)
		}
	}
}

// Tables change while frames pass: for the race detector, and no frame may go where it never should.
func TestSwitchWhileTablesChange(t *testing.T) {
	s := testSwitch()
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for k := range 4 {
		wg.Go(func() {
			scratch := make([]byte, 128)
			vm := mesh.MAC{0x52, 0x54, 0, 0, 0, byte(k)}
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				now := t0.Add(time.Duration(i) * time.Millisecond)
				vm[4] = byte(i)
				for _, f := range [][]byte{frame(mc(21), mc(11), 0x800), frame(broadcast, vm, 0x800), arp(1, broadcast, mc(11), "10.2.1.1", mesh.MAC{}, "10.2.1.2")} {
					if d := s.FromBridge(f, scratch, now); d.Verdict == Deliver || d.Verdict == Unicast && d.Peer == me {
						t.Errorf("%+v", d)
					}
				}
				if d := s.FromPeer(frame(mc(11), vm, 1), pn(4), now); d.Verdict != Deliver {
					t.Errorf("%+v", d)
				}
			}
		})
	}
	moving := ep(2, 21, "10.2.1.2/24", "fd00::2/64")
	for i := range 100 {
		s.UpdateEndpoints(nil, []mesh.Endpoint{moving})
		s.SetPeers([]PeerFlags{{Name: pn(2), Reachable: true}, {Name: pn(4), Reachable: i%2 == 0}, {Name: pn(10 + i), Reachable: true}})
		s.UpdateEndpoints([]mesh.Endpoint{moving}, nil)
		s.Expire(t0.Add(time.Duration(i) * time.Minute))
		s.MACs()
	}
	close(stop)
	wg.Wait()
}

// What our parser makes of a packet must be what gopacket makes of it. gopacket may panic on hostile
// frames; such ones are only shown to ours.
func FuzzNeighbour(f *testing.F) {
	f.Add(arp(1, broadcast, mc(11), "10.2.1.1", mesh.MAC{}, "10.2.1.2"))
	f.Add(arp(2, mc(21), mc(11), "10.2.1.1", mc(21), "10.2.1.2"))
	f.Add(solicit(f, mc(11), "fd00::1", "fd00::2", true))
	f.Add(solicit(f, mc(11), "::", "fd00::2", false))
	f.Fuzz(func(t *testing.T, in []byte) {
		_, _, kind, ok := parseEther(in)
		if !ok {
			return
		}
		n, ok := parseNeighbour(kind, in[etherHeader:])
		if !ok {
			return
		}
		p, fine := parsed(in)
		if !fine {
			return
		}
		if a, is := p.Layer(layers.LayerTypeARP).(*layers.ARP); is {
			if string(a.SourceHwAddress) != string(n.mac[:]) || string(a.SourceProtAddress) != string(n.sender.AsSlice()) ||
				string(a.DstProtAddress) != string(n.target.AsSlice()) || (a.Operation == layers.ARPRequest) != n.request {
				t.Errorf("got %+v, gopacket %+v", n, a)
			}
		}
		if ns, is := p.Layer(layers.LayerTypeICMPv6NeighborSolicitation).(*layers.ICMPv6NeighborSolicitation); is {
			ip := p.Layer(layers.LayerTypeIPv6).(*layers.IPv6)
			if string(ns.TargetAddress) != string(n.target.AsSlice()) || string(ip.SrcIP) != string(n.sender.AsSlice()) || !n.request {
				t.Errorf("got %+v, gopacket %+v", n, ns)
			}
		}
		if n.request && n.target.Is4() == n.sender.Is4() {
			answer := appendAnswer(nil, mc(1), &n, mc(2))
			_, _, kind, _ := parseEther(answer)
			back, ok := parseNeighbour(kind, answer[etherHeader:])
			if !ok || back.request || back.claims() != n.target || back.mac != mc(2) && n.target.Is4() {
				t.Errorf("%+v is answered with %+v", n, back)
			}
		}
	})
}

func parsed(in []byte) (p gopacket.Packet, ok bool) {
	defer func() { ok = recover() == nil && p != nil && p.ErrorLayer() == nil }()
	return gopacket.NewPacket(in, layers.LayerTypeEthernet, gopacket.Default), true
}

func FuzzSwitch(f *testing.F) {
	f.Add([]byte{}, []byte{1})
	f.Add(frame(mc(21), mc(11), 0x800), frame(broadcast, mc(31), 0x806))
	f.Add(solicit(f, mc(11), "fd00::1", "fd00::2", true), make([]byte, 65535))
	s := testSwitch()
	scratch := make([]byte, 128)
	f.Fuzz(func(t *testing.T, a, b []byte) {
		for _, in := range [][]byte{a, b} {
			if d := s.FromBridge(in, scratch, t0); d.Verdict == Deliver || d.Verdict == Unicast && d.Peer == me {
				t.Errorf("a frame from the bridge goes back to it: %+v", d)
			}
			if d := s.FromPeer(in, pn(2), t0); d.Verdict != Deliver && d.Verdict != Drop {
				t.Errorf("a frame from the tunnel goes back to it: %+v", d)
			}
		}
	})
}

func BenchmarkSwitch(b *testing.B) {
	s := NewSwitch(me, t0)
	var eps []mesh.Endpoint
	var peers []PeerFlags
	for i := range 20_000 {
		eps = append(eps, ep(i%1000+1, i+100, fmt.Sprintf("10.%d.%d.%d/12", 32+i>>16, i>>8&255, i&255)))
	}
	for i := range 1000 {
		peers = append(peers, PeerFlags{Name: pn(i + 1), Reachable: true})
	}
	s.SetPeers(peers)
	s.SetEndpoints(eps)
	local := eps[0].MAC
	b.Run("unicast", func(b *testing.B) {
		f := frame(eps[7].MAC, local, 0x800)
		for b.Loop() {
			s.FromBridge(f, nil, t0)
		}
	})
	b.Run("deliver", func(b *testing.B) {
		f := frame(local, eps[7].MAC, 0x800)
		for b.Loop() {
			s.FromPeer(f, eps[7].Peer, t0)
		}
	})
	b.Run("learned", func(b *testing.B) {
		vm, f := mesh.MAC{0x52, 1}, frame(mesh.MAC{0x52, 1}, mesh.MAC{0x52, 2}, 0x800)
		s.FromPeer(frame(broadcast, vm, 1), pn(9), t0)
		for b.Loop() {
			s.FromBridge(f, nil, t0)
		}
	})
	b.Run("arp", func(b *testing.B) {
		scratch := make([]byte, 128)
		f := arp(1, broadcast, local, "10.32.0.0", mesh.MAC{}, "10.32.0.7")
		for b.Loop() {
			s.FromBridge(f, scratch, t0)
		}
	})
	b.Run("announce", func(b *testing.B) {
		e := ep(5, 60_000, "10.33.0.1/12")
		for b.Loop() {
			s.UpdateEndpoints([]mesh.Endpoint{e}, nil)
			s.UpdateEndpoints(nil, []mesh.Endpoint{e})
		}
	})
}

// Two peers announce the same: who was first keeps it, also over a time when it cannot be reached, until it is
// withdrawn. Both may send meanwhile, and the clash is named.
func TestClash(t *testing.T) {
	peers := func(reachable ...int) (out []PeerFlags) {
		for _, n := range reachable {
			out = append(out, PeerFlags{Name: pn(n), Reachable: true})
		}
		return out
	}
	asks := func(s *Switch) string {
		d := s.FromBridge(arp(1, broadcast, mc(11), "10.2.1.1", mesh.MAC{}, "10.2.1.2"), make([]byte, 0, 128), t0)
		if d.Verdict != Answer {
			return describe(d)
		}
		return fmt.Sprintf("%x", d.Reply[11])
	}
	goes := func(s *Switch) string { return describe(s.FromBridge(frame(mc(21), mc(11), 0x800), nil, t0)) }
	check := func(s *Switch, when, to, answer string, clashes int) {
		t.Helper()
		if got := goes(s); got != to {
			t.Errorf("%s: frames go %s, want %s", when, got, to)
		}
		if got := asks(s); got != answer {
			t.Errorf("%s: the address is %s, want %s", when, got, answer)
		}
		if got := s.Clashes(); len(got) != clashes {
			t.Errorf("%s: clashes %+v, want %d", when, got, clashes)
		}
	}
	s := NewSwitch(me, t0)
	s.SetPeers(peers(3, 4))
	s.UpdateEndpoints([]mesh.Endpoint{ep(1, 11, "10.2.1.1/24")}, nil)
	s.UpdateEndpoints([]mesh.Endpoint{ep(4, 21, "10.2.1.2/24")}, nil)
	check(s, "alone", "to 4", "15", 0)
	s.UpdateEndpoints([]mesh.Endpoint{ep(3, 21, "10.2.1.9/24"), ep(3, 22, "10.2.1.2/24")}, nil)
	check(s, "a lower name announces it too", "to 4", "15", 2)
	if got := s.Clashes()[0]; got.What != mc(21).String() || !slices.Equal(got.Peers, []mesh.PeerName{pn(4), pn(3)}) {
		t.Errorf("clash %+v", got)
	}
	s.UpdateEndpoints([]mesh.Endpoint{ep(4, 21, "10.2.1.2/24", "fd00::9/64")}, nil)
	check(s, "the first one gets another address", "to 4", "15", 2)
	s.SetPeers(peers(3))
	check(s, "the first one is away", "to 3", "16", 0)
	s.SetPeers(peers(3, 4))
	check(s, "and back", "to 4", "15", 2)
	for _, n := range []int{3, 4} {
		if got := describe(s.FromPeer(frame(mc(11), mc(21), 0x800), pn(n), t0)); got != "deliver" {
			t.Errorf("from peer %d: %s", n, got)
		}
	}
	s.UpdateEndpoints(nil, []mesh.Endpoint{ep(4, 21)})
	check(s, "withdrawn", "to 3", "16", 0)
	s.UpdateEndpoints([]mesh.Endpoint{ep(1, 21, "10.2.1.2/24")}, nil)
	if got := goes(s); got != "drop local" {
		t.Errorf("an endpoint of this peer: frames go %s", got)
	}
}
