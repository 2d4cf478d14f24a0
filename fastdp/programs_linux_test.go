package fastdp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"meshd/mesh"
)

// These tests run the programs on crafted frames (BPF_PROG_TEST_RUN), before they meet a link. The device
// that the frames seem to come by is lo, index 1: the port.

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// What became of a frame, as the program says it.
const (
	passed     = 0
	dropped    = 2
	redirected = 7
)

// bench is the set of programs with maps of its own, nothing pinned or attached.
type bench struct {
	bpfObjects
	t         testing.TB
	reasons   []string
	tunnelled *ebpf.Program // vx_in behind a tunnel key; nil until needed
	keys      *ebpf.Map
}

func newBench(t testing.TB) *bench {
	needRoot(t)
	spec, err := loadBpf()
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t}
	if b.reasons, err = reasonNames(spec); err != nil {
		t.Fatal(err)
	}
	if err := spec.LoadAndAssign(&b.bpfObjects, nil); err != nil {
		t.Fatalf("load: %+v", err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func (b *bench) put(m *ebpf.Map, key, value any) {
	b.t.Helper()
	if err := m.Put(key, value); err != nil {
		b.t.Fatal(err)
	}
}

// skbContext is the part of struct __sk_buff that a test may set.
type skbContext struct {
	_              [9]uint32
	IngressIfindex uint32
	Ifindex        uint32
	_              [33]uint32
	GSOSize        uint32
	_              [3]uint32
}

// run reports what the program said and which counters moved.
func (b *bench) run(p *ebpf.Program, frame []byte, ctx skbContext) (verdict uint32, counted []string) {
	b.t.Helper()
	before := b.counts()
	verdict, err := p.Run(&ebpf.RunOptions{Data: frame, Context: ctx})
	if err != nil {
		b.t.Fatalf("run %v: %v", p, err)
	}
	for name, n := range b.counts() {
		if n != before[name] {
			counted = append(counted, name)
		}
	}
	slices.Sort(counted)
	return verdict, counted
}

func (b *bench) counts() map[string]uint64 {
	all := make(map[string]uint64)
	var perCPU []bpfCounter
	for i, name := range b.reasons {
		if err := b.bpfObjects.Counters.Lookup(uint32(i), &perCPU); err != nil {
			b.t.Fatal(err)
		}
		for _, c := range perCPU {
			all[name] += c.Frames
		}
	}
	return all
}

var (
	mine    = mesh.MAC{0x02, 0, 0, 0, 0, 0x01} // behind the port under test
	near    = mesh.MAC{0x02, 0, 0, 0, 0, 0x02} // on this host
	far     = mesh.MAC{0x02, 0, 0, 0, 0, 0x03} // on peer 7, path up
	slow    = mesh.MAC{0x02, 0, 0, 0, 0, 0x04} // on peer 8, path not up
	alien   = mesh.MAC{0x02, 0, 0, 0, 0, 0x05} // on peer 7, another network
	host    = mesh.MAC{0x02, 0, 0, 0, 0, 0x06} // the bridge itself
	unknown = mesh.MAC{0x02, 0, 0, 0, 0, 0xff}
	all     = mesh.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

const (
	selfID = 5
	upID   = 7
	downID = 8
	lo     = 1
)

// ready describes a small mesh: this host is peer 5 with a port and a neighbour, peers 7 and 8 elsewhere.
func (b *bench) ready() {
	b.put(b.Config, uint32(0), bpfConfig{Self: selfID, Flags: configRelay, Vxlan: 100, Tap: 101, Bridge: 102,
		GroupInterval: 1e6, GroupBurst: 1e9})
	var nets networks
	one := netip.MustParsePrefix("10.32.0.0/12")
	two := netip.MustParsePrefix("10.99.0.0/24")
	six := netip.MustParsePrefix("fd00:1::/64")
	nets.assign(map[netip.Prefix]bool{one: true, two: true, six: true}, false)
	n1, n2 := nets.of([]netip.Prefix{one}), nets.of([]netip.Prefix{two})
	b.port(Port{Index: lo, MAC: mine, Addrs: prefixes("10.32.0.1/12", "fd00:1::1/64")}, nets.of([]netip.Prefix{one, six}))
	for mac, e := range map[mesh.MAC]bpfEndpoint{
		mine:  {Peer: selfID, Flags: endpointLocal | endpointVeth | endpointAnnounced, Ifindex: lo, Nets: n1},
		near:  {Peer: selfID, Flags: endpointLocal | endpointVeth, Ifindex: 103, Nets: n1},
		host:  {Peer: selfID, Flags: endpointLocal | endpointHost | endpointAnnounced, Ifindex: 102, Nets: n1},
		far:   {Peer: upID, Nets: n1},
		slow:  {Peer: downID, Nets: n1},
		alien: {Peer: upID, Nets: n2},
	} {
		b.put(b.Endpoints, macKey(mac), e)
	}
	b.peer(Peer{ID: upID, Addr: netip.MustParseAddr("192.0.2.7")}, true)
	b.peer(Peer{ID: downID, Addr: netip.MustParseAddr("2001:db8::8")}, false)
}

func (b *bench) port(p Port, nets netset) {
	b.t.Helper()
	v, err := portValue(p, nets, true)
	if err != nil {
		b.t.Fatal(err)
	}
	b.put(b.Ports, uint32(p.Index), v)
}

func (b *bench) peer(p Peer, up bool) {
	b.put(b.Peers, uint32(p.ID), peerValue(p, p.Addr, up, false))
	b.put(b.Underlays, underlayKey(p.Addr), uint32(p.ID))
}

func prefixes(s ...string) (out []netip.Prefix) {
	for _, v := range s {
		out = append(out, netip.MustParsePrefix(v))
	}
	return out
}

type frameCase struct {
	name    string
	frame   []byte
	verdict uint32
	reason  string
}

const linkLocal = "fe80::ff:fe00:1" // of mine, EUI-64

func TestPortIn(t *testing.T) {
	b := newBench(t)
	b.ready()
	v4 := func(dst mesh.MAC, ip []byte) []byte { return ether(dst, mine, 0x0800, ip...) }
	v6 := func(ip []byte) []byte { return ether(near, mine, 0x86dd, ip...) }
	hidden := func(chain ...byte) []byte { // a router advertisement behind extension headers
		var body []byte
		for i := range chain {
			next := byte(58)
			if i+1 < len(chain) {
				next = chain[i+1]
			}
			body = append(body, next, 0, 0, 0, 0, 0, 0, 0)
		}
		return v6(ip6("fd00:1::1", "ff02::1", chain[0], append(body, 134, 0, 0, 0, 0, 0, 0, 0)...))
	}
	cases := []frameCase{
		{"to a peer", v4(far, ip4("10.32.0.1", "10.32.0.3", 6)), redirected, "to_tunnel"},
		{"to a peer by the userspace path", v4(slow, ip4("10.32.0.1", "10.32.0.4", 6)), redirected, "to_tap"},
		{"to a neighbour", v4(near, ip4("10.32.0.1", "10.32.0.2", 6)), redirected, "to_local"},
		{"to the host", v4(host, ip4("10.32.0.1", "10.32.0.6", 6)), passed, "to_bridge"},
		{"to somebody unknown", v4(unknown, ip4("10.32.0.1", "10.32.0.9", 6)), passed, "to_bridge"},
		{"broadcast", v4(all, ip4("10.32.0.1", "10.47.255.255", 17, udp(9, 9)...)), passed, "to_bridge"},
		{"IPv6", v6(ip6("fd00:1::1", "fd00:1::2", 6)), redirected, "to_local"},
		{"IPv6 from the link-local address", v6(ip6(linkLocal, "ff02::1", 58, 128, 0, 0, 0, 0, 0, 0, 0)), redirected, "to_local"},
		{"ARP request", ether(all, mine, 0x0806, arp(1, mine, "10.32.0.1", mesh.MAC{}, "10.32.0.2")...), passed, "to_bridge"},
		{"ARP probe for the own address", ether(all, mine, 0x0806, arp(1, mine, "0.0.0.0", mesh.MAC{}, "10.32.0.1")...), passed, "to_bridge"},
		{"fragment", v4(near, func() []byte { p := ip4("10.32.0.1", "10.32.0.2", 17, 0, 67); p[7] = 9; return p }()), redirected, "to_local"},
		{"echo in fragments", v6(ip6("fd00:1::1", "fd00:1::2", 44, 58, 0, 0, 1, 0, 0, 0, 1, 128, 0, 0, 0, 0, 0, 0, 0)), redirected, "to_local"},
		{"neighbour solicitation", v6(ip6("fd00:1::1", "ff02::1:ff00:2", 58, neighbour(135, "fd00:1::2", 1, mine)...)), redirected, "to_local"},
		{"duplicate address detection", v6(ip6("::", "ff02::1:ff00:1", 58, neighbour(135, linkLocal, 14, mesh.MAC{})...)), redirected, "to_local"},
		{"neighbour advertisement", v6(ip6("fd00:1::1", "fd00:1::2", 58, neighbour(136, "fd00:1::1", 2, mine)...)), redirected, "to_local"},
		{"listener report", v6(ip6("::", "ff02::16", 0, 58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0, 0, 0, 0, 1)), redirected, "to_local"},

		{"other ethertype", ether(near, mine, 0x88b7, 1, 2, 3), redirected, "to_local"},
		{"the type of probes, among containers", ether(far, mine, typeProbe, 1), redirected, "to_tunnel"},
		{"LLC", ether(all, mine, 0x0010, 0xaa, 0xaa, 3, 0, 0, 0), passed, "to_bridge"},

		{"runt ARP", ether(near, mine, 0x0806, 0, 1, 8), dropped, "drop_malformed"},
		{"IP version", v4(near, append([]byte{0x65}, ip4("10.32.0.1", "10.32.0.2", 6)[1:]...)), dropped, "drop_malformed"},
		{"IP header length", v4(near, append([]byte{0x44}, ip4("10.32.0.1", "10.32.0.2", 6)[1:]...)), dropped, "drop_malformed"},
		{"UDP cut short", v4(near, ip4("10.32.0.1", "10.32.0.2", 17, 0, 68)), dropped, "drop_malformed"},
		{"other source MAC", ether(near, far, 0x0800, ip4("10.32.0.1", "10.32.0.2", 6)...), dropped, "drop_source_mac"},
		{"VLAN tag", ether(near, mine, 0x8100, 0, 1, 8, 0, 0, 0), dropped, "drop_vlan"},
		{"two VLAN tags", ether(near, mine, 0x88a8, 0, 1, 8, 0, 0, 0), dropped, "drop_vlan"},
		{"BPDU", ether(mesh.MAC{1, 0x80, 0xc2, 0, 0, 0}, mine, 0x0026, 0x42, 0x42, 3, 0, 0), dropped, "drop_link_control"},
		{"pause frame", ether(mesh.MAC{1, 0x80, 0xc2, 0, 0, 1}, mine, 0x8808, 0, 1), dropped, "drop_link_control"},
		{"LLDP", ether(mesh.MAC{1, 0x80, 0xc2, 0, 0, 0xe}, mine, 0x88cc, 2, 7), dropped, "drop_link_control"},
		{"LLDP unicast", ether(near, mine, 0x88cc, 2, 7), dropped, "drop_link_control"},
		{"BPDU to another group", ether(mesh.MAC{1, 0, 0xc, 0xcc, 0xcc, 0xcd}, mine, 0x0026, 0x42, 0x42, 3, 0, 0), dropped, "drop_link_control"},
		{"Cisco's BPDU", ether(mesh.MAC{1, 0, 0xc, 0xcc, 0xcc, 0xcd}, mine, 0x0032, 0xaa, 0xaa, 3, 0, 0, 0xc, 1, 0xb), dropped, "drop_link_control"},
		{"Cisco's discovery", ether(mesh.MAC{1, 0, 0xc, 0xcc, 0xcc, 0xcc}, mine, 0x0032, 0xaa, 0xaa, 3, 0, 0, 0xc, 0x20, 0), dropped, "drop_link_control"},
		{"LLC cut short", ether(near, mine, 0x0026), dropped, "drop_malformed"},
		{"ARP in another's name", ether(all, mine, 0x0806, arp(1, mine, "10.32.0.2", mesh.MAC{}, "10.32.0.3")...), dropped, "drop_arp"},
		{"ARP reply in another's name", ether(near, mine, 0x0806, arp(2, mine, "10.32.0.3", near, "10.32.0.2")...), dropped, "drop_arp"},
		{"ARP with another's MAC", ether(near, mine, 0x0806, arp(2, far, "10.32.0.1", near, "10.32.0.2")...), dropped, "drop_arp"},
		{"ARP probe for another's address", ether(all, mine, 0x0806, arp(1, mine, "0.0.0.0", mesh.MAC{}, "10.32.0.2")...), dropped, "drop_arp"},
		{"ARP of other lengths", ether(all, mine, 0x0806, append([]byte{0, 1, 8, 0, 6, 16, 0, 1}, make([]byte, 20)...)...), dropped, "drop_arp"},
		{"another's IPv4 address", v4(near, ip4("10.32.0.2", "10.32.0.3", 6)), dropped, "drop_source_ip4"},
		{"DHCP client", v4(all, ip4("0.0.0.0", "255.255.255.255", 17, udp(68, 67)...)), dropped, "drop_source_ip4"},
		{"another's IPv6 address", v6(ip6("fd00:1::2", "fd00:1::3", 6)), dropped, "drop_source_ip6"},
		{"another's link-local address", v6(ip6("fe80::ff:fe00:2", "ff02::1", 58, 128, 0, 0, 0, 0, 0, 0, 0)), dropped, "drop_source_ip6"},
		{"no IPv6 source", v6(ip6("::", "fd00:1::2", 6)), dropped, "drop_source_ip6"},
		{"echo without a source", v6(ip6("::", "ff02::1", 58, 128, 0, 0, 0, 0, 0, 0, 0)), dropped, "drop_source_ip6"},
		{"neighbour advertisement for another", v6(ip6("fd00:1::1", "ff02::1", 58, neighbour(136, "fd00:1::2", 2, mine)...)), dropped, "drop_neighbour"},
		{"neighbour advertisement with another's MAC", v6(ip6("fd00:1::1", "ff02::1", 58, neighbour(136, "fd00:1::1", 2, far)...)), dropped, "drop_neighbour"},
		{"neighbour solicitation with another's MAC", v6(ip6("fd00:1::1", "ff02::1", 58, neighbour(135, "fd00:1::2", 1, far)...)), dropped, "drop_neighbour"},
		{"duplicate address detection for another", v6(ip6("::", "ff02::1:ff00:2", 58, neighbour(135, "fd00:1::2", 14, mesh.MAC{})...)), dropped, "drop_neighbour"},
		{"too many options", v6(ip6("fd00:1::1", "ff02::1", 58, append(neighbour(136, "fd00:1::1", 2, mine), bytes.Repeat([]byte{14, 1, 0, 0, 0, 0, 0, 0}, 8)...)...)), dropped, "drop_neighbour"},
		{"option of length 0", v6(ip6("fd00:1::1", "ff02::1", 58, append(neighbour(136, "fd00:1::1", 14, mine), make([]byte, 8)...)...)), dropped, "drop_malformed"},
		{"router advertisement", v6(ip6(linkLocal, "ff02::1", 58, 134, 0, 0, 0, 64, 0, 7, 8)), dropped, "drop_router"},
		{"the same behind one extension header", hidden(60), dropped, "drop_router"},
		{"behind four", hidden(0, 60, 43, 60), dropped, "drop_router"},
		{"behind five", hidden(0, 60, 43, 60, 60), dropped, "drop_extension"},
		{"in a first fragment", hidden(44), dropped, "drop_router"},
		{"ICMPv6 redirect", v6(ip6(linkLocal, "fd00:1::2", 58, 137, 0, 0, 0, 0, 0, 0, 0)), dropped, "drop_redirect"},
		{"ICMP redirect", v4(near, ip4("10.32.0.1", "10.32.0.2", 1, 5, 1, 0, 0, 0, 0, 0, 0)), dropped, "drop_redirect"},
		{"DHCP server", v4(near, ip4("10.32.0.1", "10.32.0.2", 17, udp(67, 68)...)), dropped, "drop_dhcp"},
		{"DHCPv6 server", v6(ip6(linkLocal, "fe80::1", 17, udp(547, 546)...)), dropped, "drop_dhcp"},
		{"DHCP server at any port", v4(near, ip4("10.32.0.1", "10.32.0.2", 17, udp(1067, 68)...)), dropped, "drop_dhcp"},
		{"DHCPv6 server at any port", v6(ip6(linkLocal, "fe80::1", 17, udp(1547, 546)...)), dropped, "drop_dhcp"},
		{"to a foreign network", v4(alien, ip4("10.32.0.1", "10.99.0.1", 6)), dropped, "drop_isolated"},
	}
	for _, c := range cases {
		verdict, counted := b.run(b.PortIn, c.frame, skbContext{Ifindex: lo})
		if verdict != c.verdict || fmt.Sprint(counted) != "["+c.reason+"]" {
			t.Errorf("%s: got %d %v, want %d %s", c.name, verdict, counted, c.verdict, c.reason)
		}
	}
	// Every drop is on the port's account too.
	var n uint64
	key := bpfOffenceKey{Ifindex: lo, Reason: bpfReasonDROP_LINK_CONTROL}
	if err := b.bpfObjects.Offences.Lookup(&key, &n); err != nil || n != 7 {
		t.Errorf("offences: got %d, %v, want 7", n, err)
	}
}

// Any bytes whatever: nothing may be passed on that does not bear the port's own MAC.
func TestPortInRunts(t *testing.T) {
	b := newBench(t)
	b.ready()
	whole := ether(near, mine, 0x86dd, ip6("fd00:1::1", "fd00:1::2", 0, 58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0, 0, 0, 0, 1)...)
	for n := 14 + 40; n < len(whole); n++ { // the kernel makes no test frame of less than an IP header

		verdict, counted := b.run(b.PortIn, whole[:n], skbContext{Ifindex: lo})
		if n < 14+40+16 && verdict != dropped {
			t.Errorf("%d bytes: got %d %v, want a drop", n, verdict, counted)
		}
	}
}

func TestPortUnknown(t *testing.T) {
	b := newBench(t)
	b.ready()
	if err := b.Ports.Delete(uint32(lo)); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*ebpf.Program{b.PortIn, b.PortOut} {
		if verdict, counted := b.run(p, ether(near, mine, 0x0800, ip4("10.32.0.1", "10.32.0.2", 6)...), skbContext{Ifindex: lo}); verdict != dropped || fmt.Sprint(counted) != "[drop_no_port]" {
			t.Errorf("%v: got %d %v, want a drop", p, verdict, counted)
		}
	}
}

func TestPortInNotAnnounced(t *testing.T) {
	b := newBench(t)
	b.ready()
	v, err := portValue(Port{MAC: mine, Addrs: prefixes("10.32.0.1/12")}, netset{7}, false)
	if err != nil {
		t.Fatal(err)
	}
	b.put(b.Ports, uint32(lo), v)
	frame := ether(far, mine, 0x0800, ip4("10.32.0.1", "10.32.0.3", 6)...)
	if verdict, counted := b.run(b.PortIn, frame, skbContext{Ifindex: lo}); verdict != redirected || fmt.Sprint(counted) != "[to_tap]" {
		t.Errorf("got %d %v, want the TAP", verdict, counted)
	}
}

func TestPortInExempt(t *testing.T) {
	b := newBench(t)
	b.ready()
	b.put(b.Ports, uint32(lo), bpfPort{Flags: portExempt})
	vm := mesh.MAC{0x02, 0, 0, 0, 0, 0x07} // an endpoint somewhere behind the bridge
	b.put(b.Endpoints, macKey(vm), bpfEndpoint{Peer: selfID, Flags: endpointLocal | endpointAnnounced, Nets: netset{1, 0, 0, 0}})
	for _, c := range []frameCase{
		{"somebody unknown", ether(near, unknown, 0x0800, ip4("10.32.0.77", "10.32.0.2", 6)...), passed, "to_bridge"},
		{"somebody announced", ether(far, vm, 0x0800, ip4("10.32.0.7", "10.32.0.3", 6)...), redirected, "to_tunnel"},
		{"somebody announced, foreign network", ether(alien, vm, 0x0800, ip4("10.32.0.7", "10.99.0.1", 6)...), dropped, "drop_isolated"},
		{"another peer's endpoint", ether(near, far, 0x0800, ip4("10.32.0.3", "10.32.0.2", 6)...), dropped, "drop_looped"},
		{"a container of this host", ether(all, near, 0x0806, arp(1, near, "10.32.0.2", mesh.MAC{}, "10.32.0.1")...), dropped, "drop_looped"},
		{"BPDU", ether(mesh.MAC{1, 0x80, 0xc2, 0, 0, 0}, unknown, 0x0026, 0x42, 0x42, 3, 0, 0), passed, "to_bridge"},
	} {
		if verdict, counted := b.run(b.PortIn, c.frame, skbContext{Ifindex: lo}); verdict != c.verdict || fmt.Sprint(counted) != "["+c.reason+"]" {
			t.Errorf("%s: got %d %v, want %d %s", c.name, verdict, counted, c.verdict, c.reason)
		}
	}
}

func TestGroupRate(t *testing.T) {
	b := newBench(t)
	b.ready()
	const burst = 50
	b.put(b.Config, uint32(0), bpfConfig{Self: selfID, GroupInterval: 1e9, GroupBurst: burst * 1e9})
	frame := ether(all, mine, 0x0806, arp(1, mine, "10.32.0.1", mesh.MAC{}, "10.32.0.2")...)
	passes := 0
	for range 3 * burst {
		if verdict, _ := b.run(b.PortIn, frame, skbContext{Ifindex: lo}); verdict == passed {
			passes++
		}
	}
	if passes < burst || passes > burst+5 {
		t.Errorf("of %d group frames at once %d passed, want the burst of %d", 3*burst, passes, burst)
	}
	if n := b.counts()["drop_rate"]; n != uint64(3*burst-passes) {
		t.Errorf("got %d counted, want %d", n, 3*burst-passes)
	}
	// Unicast goes on.
	if verdict, _ := b.run(b.PortIn, ether(near, mine, 0x0800, ip4("10.32.0.1", "10.32.0.2", 6)...), skbContext{Ifindex: lo}); verdict != redirected {
		t.Errorf("unicast in a storm: got %d", verdict)
	}
}

func TestPortOut(t *testing.T) {
	b := newBench(t)
	b.ready()
	for _, c := range []frameCase{
		{"from a neighbour", ether(mine, near, 0x0800, ip4("10.32.0.2", "10.32.0.1", 6)...), passed, ""},
		{"broadcast from a neighbour", ether(all, near, 0x0806, arp(1, near, "10.32.0.2", mesh.MAC{}, "10.32.0.1")...), passed, ""},
		{"unknown sender in the network", ether(mine, unknown, 0x0800, ip4("10.33.0.9", "10.32.0.1", 6)...), passed, ""},
		{"ARP of such", ether(all, unknown, 0x0806, arp(1, unknown, "10.33.0.9", mesh.MAC{}, "10.32.0.1")...), passed, ""},
		{"IPv6 of such", ether(mine, unknown, 0x86dd, ip6("fd00:1::9", "fd00:1::1", 6)...), passed, ""},
		{"link-local", ether(mine, unknown, 0x86dd, ip6("fe80::9", "fd00:1::1", 6)...), passed, ""},
		{"for another MAC", ether(near, far, 0x0800, ip4("10.32.0.3", "10.32.0.2", 6)...), dropped, "drop_out_addressee"},
		{"from a foreign network", ether(mine, alien, 0x0800, ip4("10.32.0.3", "10.32.0.1", 6)...), dropped, "drop_out_isolated"},
		{"broadcast from there", ether(all, alien, 0x0806, arp(1, alien, "10.99.0.1", mesh.MAC{}, "10.32.0.1")...), dropped, "drop_out_isolated"},
		{"unknown sender elsewhere", ether(mine, unknown, 0x0800, ip4("10.99.0.9", "10.32.0.1", 6)...), dropped, "drop_out_isolated"},
		{"IPv6 of such", ether(mine, unknown, 0x86dd, ip6("fd00:2::9", "fd00:1::1", 6)...), dropped, "drop_out_isolated"},
		{"not IP", ether(all, unknown, 0x0026, 0x42, 0x42, 3, 0, 0), dropped, "drop_out_isolated"},
	} {
		verdict, counted := b.run(b.PortOut, c.frame, skbContext{Ifindex: lo})
		if got := fmt.Sprint(counted); verdict != c.verdict || got != "["+c.reason+"]" {
			t.Errorf("%s: got %d %v, want %d %s", c.name, verdict, got, c.verdict, c.reason)
		}
	}
}

func TestBridgeOut(t *testing.T) {
	b := newBench(t)
	b.ready()
	probe := appendProbe(nil, selfID, upID, 1, small, 1410)
	for _, c := range []struct {
		frameCase
		ctx skbContext
	}{
		{frameCase{"the host to a peer", ether(far, host, 0x0800, ip4("10.32.0.6", "10.32.0.3", 6)...), redirected, "to_tunnel"}, skbContext{}},
		{frameCase{"to a peer whose path is not up", ether(slow, host, 0x0800, ip4("10.32.0.6", "10.32.0.4", 6)...), passed, ""}, skbContext{}},
		{frameCase{"to a foreign network", ether(alien, host, 0x0800, ip4("10.32.0.6", "10.99.0.1", 6)...), passed, ""}, skbContext{}},
		{frameCase{"from somebody unknown", ether(far, unknown, 0x0800, ip4("10.32.0.9", "10.32.0.3", 6)...), passed, ""}, skbContext{}},
		{frameCase{"not yet announced", ether(far, near, 0x0800, ip4("10.32.0.2", "10.32.0.3", 6)...), passed, ""}, skbContext{}},
		{frameCase{"to a container here", ether(near, host, 0x0800, ip4("10.32.0.6", "10.32.0.2", 6)...), passed, ""}, skbContext{}},
		{frameCase{"broadcast", ether(all, host, 0x0800, ip4("10.32.0.6", "255.255.255.255", 6)...), passed, ""}, skbContext{}},
		{frameCase{"probe", probe, redirected, "probed"}, skbContext{}},
		{frameCase{"probe to nobody", appendProbe(nil, selfID, 9, 1, small, 1410), dropped, "drop_probe"}, skbContext{}},
		{frameCase{"probe from a port", probe, dropped, "drop_probe"}, skbContext{IngressIfindex: lo}},
	} {
		c.ctx.Ifindex = lo
		verdict, counted := b.run(b.BridgeOut, c.frame, c.ctx)
		if got := fmt.Sprint(counted); verdict != c.verdict || got != "["+c.reason+"]" {
			t.Errorf("%s: got %d %v, want %d %s", c.name, verdict, got, c.verdict, c.reason)
		}
	}
	// On the bridge device itself, known addresses go to the TAP without flooding.
	b.put(b.Config, uint32(0), bpfConfig{Self: selfID, Vxlan: 100, Tap: 101, Bridge: lo})
	if verdict, counted := b.run(b.BridgeOut, ether(slow, host, 0x0800, ip4("10.32.0.6", "10.32.0.4", 6)...), skbContext{Ifindex: lo}); verdict != redirected || fmt.Sprint(counted) != "[to_tap]" {
		t.Errorf("bridge to a slow peer: got %d %v", verdict, counted)
	}
}

// outer is the tunnel key of a received frame.
type outer struct {
	vni  uint32
	from netip.Addr
	ttl  byte
}

func vni(src, dst mesh.ShortID) uint32 { return uint32(src)<<12 | uint32(dst) }

// received makes frames for vx_in seem to have come through the tunnel as o says, until it is called again. A
// key that is set has the address it came from as its local one.
func (b *bench) received(o outer) *ebpf.Program {
	if b.tunnelled == nil {
		b.wrapVxIn()
	}
	key := make([]byte, keySize+4) // struct bpf_tunnel_key, and the flags to set it with
	binary.NativeEndian.PutUint32(key, o.vni)
	key[21] = o.ttl
	for i, w := range underlayWords(o.from) {
		binary.NativeEndian.PutUint32(key[28+4*i:], w)
	}
	if o.from.Is6() {
		key[keySize] = 1
	}
	if err := b.keys.Put(uint32(0), key); err != nil {
		b.t.Fatal(err)
	}
	return b.tunnelled
}

const keySize = 44

func (b *bench) wrapVxIn() {
	b.t.Helper()
	progs, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err == nil {
		b.keys, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: keySize + 4, MaxEntries: 1})
	}
	if err != nil {
		b.t.Fatal(err)
	}
	b.put(progs, uint32(0), b.VxIn)
	b.tunnelled, err = ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, b.keys.FD()), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -4), asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.R0), asm.Mov.Imm(asm.R3, keySize), asm.LoadMem(asm.R4, asm.R0, keySize, asm.Word),
		asm.FnSkbSetTunnelKey.Call(),
		asm.Mov.Reg(asm.R1, asm.R6), asm.LoadMapPtr(asm.R2, progs.FD()), asm.Mov.Imm(asm.R3, 0), asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, 99).WithSymbol("out"), asm.Return(),
	}})
	if err != nil {
		b.t.Fatalf("%+v", err)
	}
	b.t.Cleanup(func() { b.tunnelled.Close(); b.keys.Close(); progs.Close() })
}

func TestVxIn(t *testing.T) {
	b := newBench(t)
	b.ready()
	// Peer 9 has no direct link: peer 7 relays for it.
	relayed := mesh.MAC{0x02, 0, 0, 0, 0, 0x09}
	b.put(b.Endpoints, macKey(relayed), bpfEndpoint{Peer: 9, Nets: netset{7}})
	b.put(b.Peers, uint32(9), peerValue(Peer{ID: 9, Via: mesh.PeerName{7}}, netip.MustParseAddr("192.0.2.7"), true, true))

	p7, p8 := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::8")
	ok7 := outer{vni(upID, selfID), p7, 255}
	data := func(dst, src mesh.MAC) []byte { return ether(dst, src, 0x0800, ip4("10.32.0.3", "10.32.0.1", 6)...) }
	request := func(from mesh.ShortID) []byte { return appendProbe(nil, from, selfID, 1, full, 1410) }
	answer := request(upID)
	answer[13] = 0xb6
	for _, c := range []struct {
		frameCase
		outer
	}{
		{frameCase{"to a container", data(mine, far), redirected, "from_tunnel"}, ok7},
		{frameCase{"to the host", data(host, far), redirected, "from_tunnel"}, ok7},
		{frameCase{"over IPv6", data(mine, slow), redirected, "from_tunnel"}, outer{vni(downID, selfID), p8, 255}},
		{frameCase{"by a relay", data(mine, relayed), redirected, "from_tunnel"}, outer{vni(9, selfID), p7, 191}},
		{frameCase{"to relay", data(slow, far), redirected, "relayed"}, outer{vni(upID, 9), p7, 255}},
		{frameCase{"probe", request(upID), redirected, "probed"}, ok7},
		{frameCase{"answer to a probe", answer, passed, "probed"}, ok7},

		{frameCase{"nobody's id", data(mine, far), dropped, "drop_vx_source_id"}, outer{vni(11, selfID), p7, 255}},
		{frameCase{"own id", data(mine, far), dropped, "drop_vx_source_id"}, outer{vni(selfID, selfID), p7, 255}},
		{frameCase{"id 0", data(mine, far), dropped, "drop_vx_source_id"}, outer{vni(0, selfID), p7, 255}},
		{frameCase{"stranger", data(mine, far), dropped, "drop_vx_address"}, outer{vni(upID, selfID), netip.MustParseAddr("192.0.2.66"), 255}},
		{frameCase{"stranger over IPv6", data(mine, slow), dropped, "drop_vx_address"}, outer{vni(downID, selfID), netip.MustParseAddr("2001:db8::66"), 255}},
		{frameCase{"IPv6 address of the same words", data(mine, far), dropped, "drop_vx_address"}, outer{vni(upID, selfID), netip.MustParseAddr("c000:207::"), 255}},
		{frameCase{"one peer with another's id", data(mine, slow), dropped, "drop_vx_address"}, outer{vni(downID, selfID), p7, 255}},
		{frameCase{"for nobody", data(mine, far), dropped, "drop_vx_dest_id"}, outer{vni(upID, 11), p7, 255}},
		{frameCase{"for a peer whose path is not up", data(mine, far), dropped, "drop_vx_dest_id"}, outer{vni(upID, downID), p7, 255}},
		{frameCase{"relayed too often", data(slow, far), dropped, "drop_vx_hops"}, outer{vni(upID, 9), p7, 127}},
		{frameCase{"another peer's endpoint", data(mine, slow), dropped, "drop_vx_mac"}, ok7},
		{frameCase{"an endpoint of ours", data(mine, near), dropped, "drop_vx_mac"}, ok7},
		{frameCase{"unknown sender", data(mine, unknown), dropped, "drop_vx_mac"}, ok7},
		{frameCase{"broadcast", data(all, far), dropped, "drop_vx_group"}, ok7},
		{frameCase{"for an endpoint elsewhere", data(slow, far), dropped, "drop_vx_unknown"}, ok7},
		{frameCase{"for somebody unknown", data(unknown, far), dropped, "drop_vx_unknown"}, ok7},
		{frameCase{"from a foreign network", data(mine, alien), dropped, "drop_vx_isolated"}, ok7},
		{frameCase{"the type of probes, between containers", ether(mine, far, typeProbe, 1), redirected, "from_tunnel"}, ok7},
		{frameCase{"probe for another's id", func() []byte { p := request(upID); p[5]++; return p }(), dropped, "drop_probe"}, ok7},
		{frameCase{"probe with another's id inside", request(downID), dropped, "drop_probe"}, ok7},
	} {
		verdict, counted := b.run(b.received(c.outer), c.frame, skbContext{Ifindex: lo})
		if got := fmt.Sprint(counted); verdict != c.verdict || got != "["+c.reason+"]" {
			t.Errorf("%s: got %d %v, want %d %s", c.name, verdict, got, c.verdict, c.reason)
		}
	}
	if verdict, counted := b.run(b.VxIn, data(mine, far), skbContext{Ifindex: lo}); verdict != dropped || fmt.Sprint(counted) != "[drop_vx_plain]" {
		t.Errorf("without a tunnel key: got %d %v", verdict, counted)
	}
	b.put(b.Config, uint32(0), bpfConfig{Self: selfID, Vxlan: 100})
	if verdict, counted := b.run(b.received(outer{vni(upID, 9), p7, 255}), data(slow, far), skbContext{Ifindex: lo}); verdict != dropped || fmt.Sprint(counted) != "[drop_vx_dest_id]" {
		t.Errorf("relaying off: got %d %v", verdict, counted)
	}
}

// The kernel turns a probe around whole: addresses swapped, type changed, the rest as it was.
func TestProbeTurnedAround(t *testing.T) {
	b := newBench(t)
	b.ready()
	in := appendProbe(nil, upID, selfID, 0xfeedface, full, 1410)
	out := make([]byte, len(in)+256)
	opts := &ebpf.RunOptions{Data: in, DataOut: out, Context: skbContext{Ifindex: lo}}
	if verdict, err := b.received(outer{vni(upID, selfID), netip.MustParseAddr("192.0.2.7"), 255}).Run(opts); err != nil || verdict != redirected {
		t.Fatalf("got %d, %v", verdict, err)
	}
	from, nonce, size, ok := parseProbe(opts.DataOut, 1410)
	if !ok || from != selfID || nonce != 0xfeedface || size != full || len(opts.DataOut) != len(in) {
		t.Errorf("got from %d, nonce %x, size %d, %v, %d bytes", from, nonce, size, ok, len(opts.DataOut))
	}
}
