package fastdp

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"meshd/mesh"
)

const here = "192.0.2.5" // this host's address on the underlay

// joins tells under_in which datagrams are ours, and where superframes are made.
func (b *bench) joins() {
	b.t.Helper()
	var cfg bpfConfig
	if err := b.Config.Lookup(uint32(0), &cfg); err != nil {
		b.t.Fatal(err)
	}
	cfg.Port, cfg.Join = uint32(bigEndian16(6784)), 105
	b.put(b.Config, uint32(0), cfg)
	b.shortWay(nil)
}

// shortWay has peer 7's datagrams come by lo.
func (b *bench) shortWay(change func(*bpfPeer)) {
	v := peerValue(Peer{ID: upID, Addr: netip.MustParseAddr("192.0.2.7")}, netip.MustParseAddr("192.0.2.7"), true, false)
	v.Device, v.Local, v.Heard = lo, wireWords(netip.MustParseAddr(here))[0], heardNow()+1<<20 // for long
	if change != nil {
		change(&v)
	}
	b.put(b.Peers, uint32(upID), v)
}

func heardNow() uint32 { return uint32(monotonic() >> 26) } // HEARD_UNIT

// wrapped is a frame from peer 7 as the underlay brings it.
func wrapped(frame []byte) []byte {
	vx := binary.BigEndian.AppendUint32([]byte{8, 0, 0, 0}, vni(upID, selfID)<<8)
	return ether(mesh.MAC{}, unknown, 0x0800, ip4("192.0.2.7", here, 17, udp(40000, 6784, append(vx, frame...)...)...)...)
}

// Only single packets of a proven peer, for a container here and right in every respect, take the short way.
func TestUnderIn(t *testing.T) {
	b := newBench(t)
	b.ready()
	b.joins()
	inner := func(proto byte) []byte {
		return ether(mine, far, 0x0800, ip4("10.32.0.3", "10.32.0.1", proto, make([]byte, 40)...)...)
	}
	ack := ether(mine, far, 0x0800, ip4("10.32.0.3", "10.32.0.1", 6, append([]byte{12: 0x50, 13: 0x10}, make([]byte, 6)...)...)...)
	at := func(offset int, v ...byte) func([]byte) []byte {
		return func(f []byte) []byte { copy(f[offset:], v); return f }
	}
	const outerIP, outerUDP, vx, in = 14, 34, 42, 50
	for _, c := range []struct {
		name   string
		frame  []byte
		change func([]byte) []byte
		peer   func(*bpfPeer)
		ctx    skbContext
		taken  bool
		// delivered at once, instead of being joined first
		counted bool
	}{
		{name: "datagram", frame: inner(17), taken: true, counted: true},
		{name: "segment", frame: inner(6), taken: true},
		{name: "superframe", frame: inner(6), ctx: skbContext{GSOSize: 10}},
		{name: "after a superframe", frame: inner(6), peer: func(p *bpfPeer) { p.Whole[0] = monotonic() }},
		{name: "long after it", frame: inner(6), peer: func(p *bpfPeer) { p.Whole[0] = monotonic() - uint64(11*time.Second) }, taken: true},
		{name: "acknowledgement after a superframe", frame: ack, peer: func(p *bpfPeer) { p.Whole[0] = monotonic() }, taken: true, counted: true},
		{name: "acknowledgement of who leaves", frame: ack, change: at(in+14+20+13, 0x11), peer: func(p *bpfPeer) { p.Whole[0] = monotonic() }},
		{name: "after one of others", frame: inner(6), peer: func(p *bpfPeer) { p.Whole[1] = monotonic() }, taken: true},
		{name: "nothing let in lately", frame: inner(17), peer: func(p *bpfPeer) { p.Heard = heardNow() - 20 }},
		{name: "something let in", frame: inner(17), peer: func(p *bpfPeer) { p.Heard = heardNow() - 10 }, taken: true, counted: true},
		{name: "path not proven", frame: inner(17), peer: func(p *bpfPeer) { p.Flags = peerKnown }},
		{name: "other device", frame: inner(17), peer: func(p *bpfPeer) { p.Device = 99 }},
		{name: "other address of this host", frame: inner(17), peer: func(p *bpfPeer) { p.Local++ }},
		{name: "from elsewhere", frame: inner(17), change: at(outerIP+12, 192, 0, 2, 8)},
		{name: "from a peer that is not known", frame: inner(17), change: at(vx+4, 0, 0x90, selfID)},
		{name: "for another peer", frame: inner(17), change: at(vx+6, 9)},
		{name: "reserved byte", frame: inner(17), change: at(vx+7, 1)},
		{name: "reserved flag", frame: inner(17), change: at(vx, 0x88)},
		{name: "other port", frame: inner(17), change: at(outerUDP+2, 0, 53)},
		{name: "checksum to be verified", frame: inner(17), change: at(outerUDP+6, 1)},
		{name: "congestion to be told", frame: inner(17), change: at(outerIP+1, 3)},
		{name: "fragment", frame: inner(17), change: at(outerIP+6, 0x20)},
		{name: "options", frame: inner(17), change: at(outerIP, 0x46)},
		{name: "IP length", frame: inner(17), change: at(outerIP+2, 0, 90)},
		{name: "UDP length", frame: inner(17), change: at(outerUDP+4, 0, 91)},
		{name: "for another host's MAC", frame: inner(17), change: at(0, 2, 2, 2, 2, 2, 2)},
		{name: "sender is another peer's", frame: inner(17), change: at(in+6, slow[:]...)},
		{name: "sender of this host", frame: inner(6), change: at(in+6, near[:]...)},
		{name: "sender unknown", frame: inner(17), change: at(in+6, unknown[:]...)},
		{name: "sender of another network", frame: inner(17), change: at(in+6, alien[:]...)},
		{name: "for nobody here", frame: inner(17), change: at(in, slow[:]...)},
		{name: "for the host itself", frame: inner(17), change: at(in, host[:]...)},
		{name: "broadcast", frame: inner(17), change: at(in, all[:]...)},
		{name: "IPv6", frame: inner(17), change: at(in+12, 0x86, 0xdd)},
	} {
		b.shortWay(c.peer)
		frame := wrapped(c.frame)
		if c.change != nil {
			frame = c.change(frame)
		}
		out := make([]byte, len(frame)+256)
		c.ctx.Ifindex = lo
		opts := &ebpf.RunOptions{Data: frame, DataOut: out, Context: c.ctx}
		before := b.counts()["from_tunnel"]
		verdict, err := b.UnderIn.Run(opts)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		want, left := uint32(passed), frame
		if c.taken {
			want, left = redirected, c.frame
		}
		if verdict != want || !bytes.Equal(opts.DataOut, left) {
			t.Errorf("%s: got %d and %x, want %d and %x", c.name, verdict, opts.DataOut, want, left)
		}
		if got := b.counts()["from_tunnel"] > before; got != c.counted {
			t.Errorf("%s: delivered at once: %v, want %v", c.name, got, c.counted)
		}
		if c.ctx.GSOSize == 0 {
			continue
		}
		var v bpfPeer
		if err := b.Peers.Lookup(uint32(upID), &v); err != nil || v.Whole[0] == 0 || v.Whole[1] != 0 {
			t.Errorf("%s: %v, %v, want it remembered", c.name, v.Whole, err)
		}
	}
	// Frames for another peer are sent on by the relay, which leaves probes to the host's IP stack.
	next := Peer{ID: 9, Addr: netip.MustParseAddr("192.0.2.9")}
	probe := wrapped(appendProbe(nil, upID, 9, 1, full, 1410))
	probe[vx+6] = 9
	for _, c := range []struct {
		name   string
		change func(p *bpfPeer)
		frame  []byte
		ttl    byte
		taken  bool
	}{
		{name: "relayed", ttl: 255, taken: true},
		{name: "second relay", ttl: 191, taken: true},
		{name: "third relay", ttl: 127},
		{name: "no path onward", ttl: 255, change: func(p *bpfPeer) { p.Flags = peerKnown }},
		{name: "onward by IPv6", ttl: 255, change: func(p *bpfPeer) { p.Flags |= peerToV6 }},
		{name: "no device onward", ttl: 255, change: func(p *bpfPeer) { p.Device = 0 }},
		{name: "probe", ttl: 255, frame: probe},
	} {
		b.shortWay(nil)
		v := peerValue(next, next.Addr, true, false)
		v.Device, v.Local = lo, wireWords(netip.MustParseAddr("192.0.2.6"))[0]
		if c.change != nil {
			c.change(&v)
		}
		b.put(b.Peers, uint32(9), v)
		frame := c.frame
		if frame == nil {
			frame = at(vx+6, 9)(wrapped(inner(6)))
		}
		frame[outerIP+8] = c.ttl
		want := bytes.Clone(frame)
		if c.taken {
			want[outerIP+8] -= 64
			copy(want[outerIP+12:], []byte{192, 0, 2, 6, 192, 0, 2, 9})
			sum := uint32(0)
			for i := 0; i < 20; i += 2 {
				sum += uint32(binary.BigEndian.Uint16(want[outerIP+i:]))
			}
			sum = sum&0xffff + sum>>16
			binary.BigEndian.PutUint16(want[outerIP+10:], ^uint16(sum+sum>>16))
		}
		opts := &ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256), Context: skbContext{Ifindex: lo}}
		verdict, err := b.UnderIn.Run(opts)
		if err != nil || (verdict == redirected) != c.taken || !bytes.Equal(opts.DataOut, want) {
			t.Errorf("%s: got %d, %v\n%x, want\n%x", c.name, verdict, err, opts.DataOut, want)
		}
	}
	for n := range 100 { // cut anywhere
		if frame := wrapped(inner(17)); n >= 34 {
			if verdict, err := b.UnderIn.Run(&ebpf.RunOptions{Data: frame[:n], Context: skbContext{Ifindex: lo}}); err != nil || verdict != passed {
				t.Errorf("%d bytes: got %d, %v", n, verdict, err)
			}
		}
	}
	for _, c := range []frameCase{
		{"joined", inner(6), redirected, "from_tunnel"},
		{"for nobody here", at(0, slow[:]...)(inner(6)), dropped, "drop_vx_unknown"},
		{"of another network", at(6, alien[:]...)(inner(6)), dropped, "drop_vx_isolated"},
		{"what the kernel says on any device", at(0, 0x33, 0x33, 0, 0, 0, 0x16)(inner(58)), dropped, ""},
	} {
		if verdict, counted := b.run(b.JoinedIn, c.frame, skbContext{Ifindex: lo}); verdict != c.verdict || fmt.Sprint(counted) != "["+c.reason+"]" {
			t.Errorf("%s: got %d %v, want %d %s", c.name, verdict, counted, c.verdict, c.reason)
		}
	}
}

// On an underlay that cuts superframes, segments are joined in the veth pair and none is lost or turned
// round; where superframes come whole, nothing takes that way.
func TestShortWay(t *testing.T) {
	for _, cut := range []bool{true, false} {
		t.Run(fmt.Sprintf("cut=%v", cut), func(t *testing.T) {
			l := newLab(t)
			a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
			if cut {
				l.cutToMTU(false)
			}
			a.knows(b)
			b.knows(a)
			l.startAll()
			tcx := l.hosts[1].look().Status.Hooks == "tcx"
			if eventually(3*time.Second, func() bool { return strings.Contains(l.tree(l.hosts[1]), "under_in") }) != tcx {
				t.Fatalf("hook on the underlay: want %v\n%s", tcx, l.tree(l.hosts[1]))
			}
			there := l.stream(a, b, time.Millisecond)
			rate := l.tcp(a, b, 4)
			if r := there.stop(); r.Got == 0 || r.Twice > 0 || r.Late > 0 {
				t.Errorf("datagrams beside: %v", r)
			}
			in, out := 0, l.packets(l.hosts[1], "mesh-vx")
			if tcx {
				in = l.packets(l.hosts[1], "mesh-vx1")
			}
			t.Logf("%.1f Gbit/s; %d packets by mesh-vx1, %d by mesh-vx", rate, in, out)
			if few, many := out, in; tcx && cut && few > many/100 || !cut && in > out/10 {
				t.Errorf("cut %v: %d packets by mesh-vx1, %d by mesh-vx", cut, in, out)
			}
			for _, h := range l.hosts {
				h.drops("drop_out_isolated", "drop_vx_source_id") // what IPv6 says by itself; probes to who is not told yet
			}
		})
	}
}

// packets is how many a device has received.
func (l *lab) packets(h *labHost, dev string) int {
	l.t.Helper()
	var link []struct {
		Stats64 struct {
			Rx struct{ Packets int }
		}
	}
	if err := json.Unmarshal([]byte(l.ip(fmt.Sprintf("h%d", h.n), "-j -s link show "+dev)), &link); err != nil || len(link) != 1 {
		l.t.Fatalf("counters of %s: %v", dev, err)
	}
	return link[0].Stats64.Rx.Packets
}

// The devices and hooks of the short way come back, and until they do frames go the long way.
func TestShortWayRepaired(t *testing.T) {
	for _, c := range []string{"link del mesh-vx0", "link set mesh-vx1 down", "link set mesh-vx0 down"} {
		l := newLab(t)
		a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
		l.cutToMTU(false)
		a.knows(b)
		b.knows(a)
		l.startAll()
		h := l.hosts[1]
		before := l.tree(h)
		l.tcp(a, b, 1)
		l.ip("h2", c)
		if !eventually(2*time.Second, func() bool { return shape(l.tree(h)) == shape(before) && h.look().Status.Fault == "" }) {
			t.Errorf("%s: not repaired: %+v\nis\n%swas\n%s", c, h.look().Status, shape(l.tree(h)), shape(before))
		}
		sofar := l.packets(h, "mesh-vx1")
		if l.tcp(a, b, 1); l.packets(h, "mesh-vx1") < sofar+100 {
			t.Errorf("%s: segments do not go by mesh-vx1", c)
		}
	}
}

// Who closes the tunnel's port in the host's firewall is obeyed, although the short way goes past it: with meshd
// running, when the probes fail, and without, since what comes the short way must have company on the long one.
func TestFirewall(t *testing.T) {
	for _, running := range []bool{true, false} {
		t.Run(fmt.Sprintf("running=%v", running), func(t *testing.T) {
			l := newLab(t)
			a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
			for _, c := range []*labContainer{a, b} {
				l.run("nsenter", "--net=/run/netns/"+c.ns, "sysctl", "-qw", "net.ipv6.conf.ethmesh.disable_ipv6=1")
			}
			a.knows(b)
			b.knows(a)
			l.startAll()
			quiet(a, b)
			r := l.stream(a, b, time.Millisecond)
			flows := func() bool {
				n := b.received()
				return eventually(2*time.Second, func() bool { return b.received() > n+100 })
			}
			if !flows() {
				t.Fatal("nothing arrives")
			}
			h := l.hosts[1]
			short := h.look().Status.Hooks == "tcx"
			if !running {
				for _, h := range l.hosts {
					h.kill()
				}
			}
			long, all := l.packets(h, "mesh-vx"), b.received()
			if !flows() {
				t.Error("nothing arrives")
			}
			if long, all = l.packets(h, "mesh-vx")-long, b.received()-all; short && long > all/5 {
				t.Errorf("%d of %d frames did not take the short way", long, all)
			}
			nft := func(command string) { l.run("nsenter", "--net=/run/netns/"+h.ns, "nft", command) }
			nft("add table inet x; add chain inet x in { type filter hook input priority 0; }; add rule inet x in udp dport 6784 drop")
			begun, last, n := time.Now(), time.Now(), b.received()
			eventually(5*time.Second, func() bool {
				if now := b.received(); now != n {
					n, last = now, time.Now()
				}
				return time.Since(last) > 2*time.Second
			})
			took := last.Sub(begun)
			if t.Logf("closed after %v", took); took > 2*time.Second && !slowMachine {
				t.Errorf("frames arrive for %v after the port is closed, want 2 s", took)
			}
			nft("delete table inet x")
			if running {
				l.allUp(30 * time.Second)
			}
			if !flows() {
				t.Error("nothing arrives once it is open again")
			}
			r.stop()
		})
	}
}
