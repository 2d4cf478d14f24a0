package hostnet

import (
	"errors"
	"fmt"
	"net"
	"os"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

func testPort(i int, addrs ...string) mesh.Port {
	return mesh.Port{
		Owner: fmt.Sprintf("%064x", i), MAC: mesh.MAC{2, 1, 0, 0, byte(i >> 8), byte(i)}, Addrs: prefixes(addrs...),
	}
}

func TestAttachPort(t *testing.T) {
	h, hostNS := newHost(t)
	ns := newNamespace(t)
	p := testPort(1, "10.2.1.1/24", "10.2.2.1/24", "fd00::1/64")
	if err := h.AttachPort(ns, p); err != nil {
		t.Fatal(err)
	}
	wantLinks(t, hostNS, "mesh", h.HostEnd(p.Owner))
	wantLinks(t, ns, "ethmesh")
	// What the kernel does in the background is done when the link-local address is routed, too.
	settled := func() bool {
		return strings.Contains(run(t, ns, "ip -6 route show table local"), "local fe80") && strings.Contains(run(t, hostNS, "ip link show mesh"), "state UP")
	}
	eventually(t, "settled", settled)
	before, beforeHost := dump(t, ns), dump(t, hostNS)
	for _, want := range []string{"mtu 1400", p.MAC.String(), "10.2.1.1/24", "10.2.2.1/24", "fd00::1/64", "224.0.0.0/4 dev ethmesh", "state UP"} {
		if !strings.Contains(before, want) {
			t.Errorf("inside lacks %q:\n%s", want, before)
		}
	}
	for _, want := range []string{"hairpin off", "master mesh", "alias meshd:" + p.Owner} {
		if !strings.Contains(beforeHost, want) {
			t.Errorf("host lacks %q:\n%s", want, beforeHost)
		}
	}
	for path, want := range map[string]string{
		"ipv4/neigh/ethmesh/base_reachable_time_ms": "5000",
		"ipv4/neigh/ethmesh/delay_first_probe_time": "2",
		"ipv6/neigh/ethmesh/ucast_solicit":          "1",
		"ipv6/conf/ethmesh/accept_ra":               "0",
	} {
		if got := strings.TrimSpace(run(t, ns, "cat /proc/sys/net/"+path)); got != want {
			t.Errorf("%s is %s, want %s", path, got, want)
		}
	}
	if got := run(t, ns, "ip -d link show ethmesh"); !strings.Contains(got, "gso_max_segs 44 ") {
		t.Errorf("superframes are not as long as one send: %s", got)
	}
	if err := h.AttachPort(ns, p); err != nil {
		t.Fatalf("again: %v", err)
	}
	if diff := changes(before, dump(t, ns)); diff != "" {
		t.Errorf("attaching again changed the inside:\n%s", diff)
	}
	if diff := changes(beforeHost, dump(t, hostNS)); diff != "" {
		t.Errorf("attaching again changed the host:\n%s", diff)
	}

	list, err := h.Ports()
	if err != nil {
		t.Fatal(err)
	}
	want := p
	want.HostEnd, want.Index = h.HostEnd(p.Owner), list[0].Index
	if len(list) != 1 || !reflect.DeepEqual(list[0], want) {
		t.Errorf("ports are %+v, want %+v", list, want)
	}

	if err := h.RemoveAddrs(ns, p.Owner, prefixes("10.2.1.1/24", "10.9.9.9/24")); err != nil {
		t.Fatal(err)
	}
	if list, _ = h.Ports(); !reflect.DeepEqual(list[0].Addrs, prefixes("10.2.2.1/24", "fd00::1/64")) {
		t.Errorf("after removal the port has %v", list[0].Addrs)
	}
	for range 2 {
		if err := h.DetachPort(p.Owner); err != nil {
			t.Fatal(err)
		}
		wantLinks(t, ns)
		wantLinks(t, hostNS, "mesh")
	}
}

// Two addresses of one subnet: the kernel would take the second away with the first.
// A superframe with everything around it fits one send of the userspace path.
func TestSuperframe(t *testing.T) {
	for mtu, want := range map[int]int{576: 64, 1400: 44, 1410: 44, 8900: 7, 40000: 1, 65535: 1} {
		got := superframe(mtu)
		if got != want || got > 1 && got*(mtu+64) > 65507 {
			t.Errorf("MTU %d: %d segments, want %d", mtu, got, want)
		}
	}
}

func TestRemoveFirstOfSubnet(t *testing.T) {
	h, _ := newHost(t)
	ns := newNamespace(t)
	p := testPort(1, "10.2.1.1/24", "10.2.1.2/24")
	if err := h.AttachPort(ns, p); err != nil {
		t.Fatal(err)
	}
	if err := h.RemoveAddrs(ns, p.Owner, prefixes("10.2.1.1/24")); err != nil {
		t.Fatal(err)
	}
	list, err := h.Ports()
	if err != nil || !reflect.DeepEqual(list[0].Addrs, prefixes("10.2.1.2/24")) {
		t.Errorf("got %+v, %v, want 10.2.1.2/24 left", list, err)
	}
}

func TestPortsTalk(t *testing.T) {
	h, hostNS := newHost(t)
	a, b := newNamespace(t), newNamespace(t)
	if err := h.AttachPort(a, testPort(1, "10.2.1.1/24", "fd00::1/64")); err != nil {
		t.Fatal(err)
	}
	if err := h.AttachPort(b, testPort(2, "10.2.1.2/24", "fd00::2/64")); err != nil {
		t.Fatal(err)
	}
	run(t, a, "ping -c 1 -W 2 -s 10000 10.2.1.2")
	run(t, a, "ping -c 1 -W 2 -s 10000 fd00::2")
	for range 2 {
		if err := h.AddBridgeAddrs(prefixes("10.2.1.100/24", "fd00::100/64")...); err != nil {
			t.Fatal(err)
		}
		run(t, hostNS, "ping -c 1 -W 2 10.2.1.2")
		run(t, hostNS, "ping -c 1 -W 2 fd00::2")
	}
	if _, addrs, err := h.Bridge(); err != nil || !reflect.DeepEqual(addrs, prefixes("10.2.1.100/24", "fd00::100/64")) {
		t.Errorf("bridge has %v, %v", addrs, err)
	}
	for range 2 {
		if err := h.RemoveBridgeAddrs(prefixes("10.2.1.100/24", "fd00::100/64")...); err != nil {
			t.Fatal(err)
		}
	}
	if _, addrs, err := h.Bridge(); err != nil || len(addrs) != 0 {
		t.Errorf("bridge still has %v, %v", addrs, err)
	}
}

// A broadcast arrives once at everybody else and not at its sender; frames of any Ethertype do.
func TestBroadcastOnce(t *testing.T) {
	h, _ := newHost(t)
	a, b := newNamespace(t), newNamespace(t)
	const kind = 0x88b5 // IEEE 802 local experimental
	sockets := map[*os.File]int{}
	index := map[*os.File]int{}
	for i, ns := range []*os.File{a, b} {
		if err := h.AttachPort(ns, testPort(i+1, fmt.Sprintf("10.2.1.%d/24", i+1))); err != nil {
			t.Fatal(err)
		}
		err := inNamespace(ns, func() (err error) {
			dev, err := net.InterfaceByName("ethmesh")
			if err != nil {
				return err
			}
			index[ns] = dev.Index
			sockets[ns], err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK, int(kind>>8|kind&0xff<<8))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(sockets[ns])
	}
	mac := testPort(1).MAC
	for _, n := range []byte{1, 2} {
		frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, append(mac[:], kind>>8, kind&0xff, n)...)
		if err := unix.Sendto(sockets[a], frame, 0, &unix.SockaddrLinklayer{Ifindex: index[a]}); err != nil {
			t.Fatal(err)
		}
	}
	// Those for the sender itself would have arrived before the second did at b.
	got := map[*os.File][]byte{}
	read := func(ns *os.File) {
		buf := make([]byte, 100)
		for {
			n, from, err := unix.Recvfrom(sockets[ns], buf, 0)
			if err != nil {
				return
			}
			if from.(*unix.SockaddrLinklayer).Pkttype != unix.PACKET_OUTGOING {
				got[ns] = append(got[ns], buf[14:min(n, 15)]...)
			}
		}
	}
	eventually(t, "both frames arrived", func() bool { read(b); return len(got[b]) >= 2 })
	read(a)
	if string(got[b]) != "\x01\x02" || len(got[a]) > 0 {
		t.Errorf("the other got %v and the sender %v, want [1 2] and none", got[b], got[a])
	}
}

// The container whose address another had a moment ago is reached at once.
func TestAttachTellsNeighbours(t *testing.T) {
	h, _ := newHost(t)
	a, b, c := newNamespace(t), newNamespace(t), newNamespace(t)
	for i, ns := range []*os.File{a, b} {
		addr := fmt.Sprintf("10.2.1.%d/24", i+1)
		if err := h.AttachPort(ns, testPort(i+1, addr, fmt.Sprintf("fd00::%d/64", i+1))); err != nil {
			t.Fatal(err)
		}
	}
	run(t, a, "ping -c 1 -W 2 10.2.1.2")
	run(t, a, "ping -c 1 -W 2 fd00::2")
	if err := h.DetachPort(testPort(2).Owner); err != nil {
		t.Fatal(err)
	}
	if err := h.AttachPort(c, testPort(3, "10.2.1.2/24", "fd00::2/64")); err != nil {
		t.Fatal(err)
	}
	want := testPort(3).MAC.String()
	for _, addr := range []string{"10.2.1.2", "fd00::2"} {
		eventually(t, addr+" moved to "+want, func() bool {
			return strings.Contains(run(t, a, "ip neigh show to "+addr), want)
		})
	}
}

func TestAttachMany(t *testing.T) {
	h, hostNS := newHost(t)
	ns := newNamespace(t)
	for i := range 100 {
		p := testPort(i+1, "10.2.1.1/24")
		if err := h.AttachPort(ns, p); err != nil {
			t.Fatal(err)
		}
		if err := h.DetachPort(p.Owner); err != nil {
			t.Fatal(err)
		}
	}
	wantLinks(t, hostNS, "mesh")
	wantLinks(t, ns)
	var all sync.WaitGroup
	for i := range 16 {
		ns := newNamespace(t)
		all.Go(func() {
			for range 3 {
				if err := h.AttachPort(ns, testPort(i, fmt.Sprintf("10.2.1.%d/24", i+1))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	list, err := h.Ports()
	if err != nil || len(list) != 16 {
		t.Errorf("%d ports, %v, want 16", len(list), err)
	}
	if err := h.Reset(); err != nil {
		t.Fatal(err)
	}
	wantLinks(t, hostNS)
}

// A namespace may be replaced (container restart) while the old one still exists.
func TestAttachToNewNamespace(t *testing.T) {
	h, _ := newHost(t)
	old, ns := newNamespace(t), newNamespace(t)
	p := testPort(1, "10.2.1.1/24")
	for _, n := range []*os.File{old, ns} {
		if err := h.AttachPort(n, p); err != nil {
			t.Fatal(err)
		}
	}
	wantLinks(t, old)
	wantLinks(t, ns, "ethmesh")
}

// Whatever point an attach was killed at, the next one completes it.
func TestAttachHalfWay(t *testing.T) {
	h, hostNS := newHost(t)
	p := testPort(1, "10.2.1.1/24", "fd00::1/64")
	name := h.HostEnd(p.Owner)
	pair := func(t *testing.T, ns *os.File) *netlink.Veth {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		v := &netlink.Veth{LinkAttrs: attrs, PeerName: "ethmesh", PeerHardwareAddr: p.MAC[:], PeerNamespace: netlink.NsFd(ns.Fd())}
		if err := h.nl.LinkAdd(v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	var want string
	for _, c := range []struct {
		name string
		left func(t *testing.T, ns *os.File)
	}{
		{"nothing", func(*testing.T, *os.File) {}},
		{"pair", func(t *testing.T, ns *os.File) { pair(t, ns) }},
		{"pair and an address", func(t *testing.T, ns *os.File) {
			pair(t, ns)
			run(t, ns, "ip addr add 10.2.1.1/24 dev ethmesh")
		}},
		{"marked pair", func(t *testing.T, ns *os.File) { h.nl.LinkSetAlias(pair(t, ns), aliasPrefix+p.Owner) }},
		{"on the bridge", func(t *testing.T, ns *os.File) {
			pair(t, ns)
			run(t, hostNS, "ip link set "+name+" master mesh up")
		}},
		{"all but up", func(t *testing.T, ns *os.File) {
			if err := h.AttachPort(ns, p); err != nil {
				t.Fatal(err)
			}
			run(t, ns, "ip link set ethmesh down")
		}},
		{"other MAC and MTU", func(t *testing.T, ns *os.File) {
			pair(t, ns)
			run(t, ns, "ip link set ethmesh address 02:00:00:00:00:77 mtu 1000")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns := newNamespace(t)
			c.left(t, ns)
			if err := h.AttachPort(ns, p); err != nil {
				t.Fatal(err)
			}
			got := run(t, ns, "ip -br addr") + run(t, ns, "ip route") + run(t, ns, "ip -br link")
			// Names of peers carry the index that the pair happened to get.
			got = stripPeerIndex(got)
			if want == "" {
				want = got
			}
			if got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			run(t, hostNS, "bridge -d link show dev "+name)
			if err := h.DetachPort(p.Owner); err != nil {
				t.Fatal(err)
			}
		})
	}
	wantLinks(t, hostNS, "mesh")
}

func stripPeerIndex(s string) string {
	var out strings.Builder
	for word := range strings.FieldsSeq(s) {
		name, _, _ := strings.Cut(word, "@")
		if strings.HasPrefix(name, "fe80") {
			continue // tentative or not yet there
		}
		out.WriteString(name + " ")
	}
	return out.String()
}

// A port is guarded before it can send, and is not plugged in where it cannot be.
func TestGuardComesFirst(t *testing.T) {
	h, _ := newHost(t)
	p, ns := testPort(1, "10.2.1.1/24"), newNamespace(t)
	refuse := errors.New("not now")
	var fault error
	h.cfg.Guard = func(got mesh.Port) error {
		l, err := h.nl.LinkByIndex(got.Index)
		if err != nil || l.Attrs().Name != got.HostEnd || l.Attrs().Alias != aliasPrefix+p.Owner || l.Attrs().MasterIndex != 0 || l.Attrs().Flags&net.FlagUp != 0 {
			t.Errorf("asked to guard %+v, which is %+v, %v", got, l, err)
		}
		if got.MAC != p.MAC || !reflect.DeepEqual(got.Addrs, p.Addrs) {
			t.Errorf("guard of %+v, want %+v", got, p)
		}
		return fault
	}
	fault = refuse
	if err := h.AttachPort(ns, p); !errors.Is(err, refuse) {
		t.Fatalf("attached without a guard: %v", err)
	}
	if l, err := h.nl.LinkByName(h.HostEnd(p.Owner)); err == nil && l.Attrs().MasterIndex != 0 {
		t.Errorf("an unguarded port is on the bridge: %+v", l)
	}
	fault = nil
	if err := h.AttachPort(ns, p); err != nil {
		t.Fatal(err)
	}
}

func TestAttachRefuses(t *testing.T) {
	h, hostNS := newHost(t)
	ns := newNamespace(t)
	good := testPort(1, "10.2.1.1/24")

	if err := h.AttachPort(hostNS, good); !errors.Is(err, ErrHostNetwork) {
		t.Errorf("host's own namespace: got %v, want ErrHostNetwork", err)
	}
	for _, p := range []mesh.Port{
		{MAC: good.MAC}, {Owner: strings.Repeat("x", 251), MAC: good.MAC},
		{Owner: "a"}, {Owner: "a", MAC: mesh.MAC{1, 2, 3, 4, 5, 6}},
	} {
		if err := h.AttachPort(ns, p); err == nil {
			t.Errorf("%+v is accepted", p)
		}
	}
	run(t, ns, "ip link add ethmesh type bridge")
	if err := h.AttachPort(ns, good); err == nil || !strings.Contains(err.Error(), "an interface ethmesh, a bridge, exists there already") {
		t.Errorf("foreign ethmesh: got %v", err)
	}
	run(t, ns, "ip link del ethmesh")
	addBridge(t, h, h.HostEnd(good.Owner))
	if err := h.AttachPort(ns, good); err == nil || !strings.Contains(err.Error(), "is a bridge, not a veth") {
		t.Errorf("foreign host end: got %v", err)
	}
	run(t, hostNS, "ip link del "+h.HostEnd(good.Owner))
	run(t, hostNS, "ip link del mesh")
	if err := h.AttachPort(ns, good); !errors.Is(err, ErrNoBridge) {
		t.Errorf("no bridge: got %v, want ErrNoBridge", err)
	}
	if _, err := h.OpenTAP(1); !errors.Is(err, ErrNoBridge) {
		t.Errorf("TAP without bridge: got %v, want ErrNoBridge", err)
	}
	wantLinks(t, ns)
	wantLinks(t, hostNS)
}

func TestAttachWithoutIPv6(t *testing.T) {
	h, _ := newHost(t)
	ns := newNamespace(t)
	run(t, ns, "sysctl -q -w net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1")
	if err := h.AttachPort(ns, testPort(1, "10.2.1.1/24")); err != nil {
		t.Fatal(err)
	}
	if got := run(t, ns, "ip -6 -br addr"); strings.TrimSpace(got) != "" {
		t.Errorf("IPv6 was turned on unasked: %s", got)
	}
	if err := h.AttachPort(ns, testPort(1, "fd00::1/64")); err != nil {
		t.Fatal(err)
	}
	if got := run(t, ns, "ip -6 -br addr"); !strings.Contains(got, "fd00::1/64") {
		t.Errorf("IPv6 address is missing: %s", got)
	}
}

func TestNoMulticastRoute(t *testing.T) {
	h, _ := newHost(t)
	ns := newNamespace(t)
	p := testPort(1, "10.2.1.1/24")
	p.NoMulticastRoute = true
	if err := h.AttachPort(ns, p); err != nil {
		t.Fatal(err)
	}
	if got := run(t, ns, "ip route"); strings.Contains(got, "224.0.0.0") {
		t.Errorf("routes are\n%s", got)
	}
}

func TestMTUChange(t *testing.T) {
	h, hostNS := newHost(t)
	ns := newNamespace(t)
	p := testPort(1, "10.2.1.1/24")
	for _, mtu := range []int{1400, 1200, 8900} {
		if _, err := h.EnsureBridge(BridgeSpec{MTU: mtu}); err != nil {
			t.Fatal(err)
		}
		tap, err := h.OpenTAP(1)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.AttachPort(ns, p); err != nil {
			t.Fatal(err)
		}
		tap.Close()
		want := fmt.Sprintf("mtu %d ", mtu)
		for _, dev := range []string{"mesh", "mesh-tap", h.HostEnd(p.Owner)} {
			if got := run(t, hostNS, "ip link show "+dev); !strings.Contains(got, want) {
				t.Errorf("want %s: %s", want, got)
			}
		}
		if got := run(t, ns, "ip link show ethmesh"); !strings.Contains(got, want) {
			t.Errorf("want %s: %s", want, got)
		}
	}
}

func TestOpenNamespace(t *testing.T) {
	root(t)
	fifo := t.TempDir() + "/fifo"
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/nonexistent", "/etc/passwd", "/proc/self/ns/uts", "/", "/dev/null", fifo} {
		if f, err := OpenNamespace(path); err == nil {
			f.Close()
			t.Errorf("%s passes for a network namespace", path)
		}
	}
	f, err := OpenNamespace("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}
