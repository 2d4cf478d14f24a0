package fastdp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// FuzzGuard: whatever a container sends, what port_in lets out keeps the rules, as a second and simpler
// reading of the frame in Go sees them. Frames that no kernel would make (BPF_PROG_TEST_RUN refuses
// them) are skipped.
func FuzzGuard(f *testing.F) {
	for _, frame := range [][]byte{
		ether(near, mine, 0x0800, ip4("10.32.0.1", "10.32.0.2", 17, udp(68, 68)...)...),
		ether(far, mine, 0x0800, ip4("10.32.0.1", "10.32.0.3", 1, 5, 0, 0, 0, 0, 0, 0, 0)...),
		ether(all, mine, 0x0806, arp(1, mine, "10.32.0.1", mesh.MAC{}, "10.32.0.2")...),
		ether(near, mine, 0x86dd, ip6("fd00:1::1", "ff02::1", 58, neighbour(136, "fd00:1::1", 2, mine)...)...),
		ether(near, mine, 0x86dd, ip6("::", "ff02::16", 0, 58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0, 0, 0, 0, 1)...),
		ether(near, mine, 0x86dd, ip6(linkLocal, "ff02::1", 60, 44, 0, 0, 0, 0, 0, 0, 0, 58, 0, 0, 1, 0, 0, 0, 1, 134, 0, 0, 0, 0, 0, 0, 0)...),
		ether(near, mine, 0x86dd, ip6(linkLocal, "fe80::1", 17, udp(547, 546)...)...),
	} {
		f.Add(frame)
	}
	b := newBench(f)
	b.ready()
	b.put(b.Config, uint32(0), bpfConfig{Self: selfID, Vxlan: 100, Tap: 101, Bridge: 102, GroupBurst: 1 << 62})
	opts := skbContext{Ifindex: lo}
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) < 14 || len(frame) > 3000 {
			return
		}
		verdict, err := b.PortIn.Run(&ebpf.RunOptions{Data: frame, Context: opts})
		if errors.Is(err, unix.EINVAL) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if why := breach(frame); verdict != dropped && why != "" {
			t.Errorf("let out: %s: %x", why, frame)
		}
	})
}

// breach says which rule a frame from the port breaks.
func breach(f []byte) string {
	if mesh.MAC(f[6:12]) != mine {
		return "source MAC"
	}
	if f[0] == 1 && f[1] == 0x80 && f[2] == 0xc2 && f[3] == 0 && f[4] == 0 && f[5] < 16 || bytes.HasPrefix(f, []byte{1, 0, 0xc, 0xcc, 0xcc}) && (f[5] == 0xcc || f[5] == 0xcd) {
		return "link control"
	}
	p := f[14:]
	switch binary.BigEndian.Uint16(f[12:]) {
	case 0x0800:
		return breach4(p)
	case 0x0806:
		if len(p) < 28 || mesh.MAC(p[8:14]) != mine {
			return "ARP sender"
		}
		if s := netip.AddrFrom4([4]byte(p[14:18])).String(); s != "10.32.0.1" && s != "0.0.0.0" {
			return "ARP address"
		}
		return ""
	case 0x86dd:
		return breach6(p)
	case 0x8100, 0x88a8, 0x88cc:
		return "tag or LLDP"
	}
	return ""
}

func breach4(p []byte) string {
	if len(p) < 20 || p[0]>>4 != 4 {
		return "IPv4 header"
	}
	if netip.AddrFrom4([4]byte(p[12:16])).String() != "10.32.0.1" {
		return "IPv4 source"
	}
	l4 := int(p[0]&15) * 4
	if binary.BigEndian.Uint16(p[6:])&0x1fff != 0 || l4 < 20 {
		return ""
	}
	if p[9] == 17 && (len(p) < l4+4 || binary.BigEndian.Uint16(p[l4:]) == 67 || binary.BigEndian.Uint16(p[l4+2:]) == 68) {
		return "DHCP"
	}
	if p[9] == 1 && (len(p) < l4+1 || p[l4] == 5) {
		return "redirect"
	}
	return ""
}

func breach6(p []byte) string {
	if len(p) < 40 || p[0]>>4 != 6 {
		return "IPv6 header"
	}
	own := func(b []byte) bool {
		a := netip.AddrFrom16([16]byte(b)).String()
		return a == "fd00:1::1" || a == linkLocal
	}
	unspecified := netip.AddrFrom16([16]byte(p[8:24])).IsUnspecified()
	if !unspecified && !own(p[8:24]) {
		return "IPv6 source"
	}
	next, p := p[6], p[40:]
	for {
		switch next {
		case 0, 43, 60:
			if len(p) < 8 || len(p) < (int(p[1])+1)*8 {
				return "" // nothing behind it
			}
			next, p = p[0], p[(int(p[1])+1)*8:]
			continue
		case 44:
			if len(p) < 8 || binary.BigEndian.Uint16(p[2:])&0xfff8 != 0 {
				return ""
			}
			next, p = p[0], p[8:]
			continue
		case 17:
			if len(p) >= 4 && (binary.BigEndian.Uint16(p) == 547 || binary.BigEndian.Uint16(p[2:]) == 546) {
				return "DHCPv6"
			}
		case 58:
			return breachICMP6(p, own, unspecified)
		}
		return ""
	}
}

func breachICMP6(p []byte, own func([]byte) bool, unspecified bool) string {
	if len(p) < 1 {
		return ""
	}
	switch p[0] {
	case 134:
		return "router advertisement"
	case 137:
		return "redirect"
	case 135, 136:
		if len(p) < 24 {
			return "neighbour discovery cut short"
		}
		if (p[0] == 136 || unspecified) && !own(p[8:24]) {
			return "neighbour target"
		}
		for o := p[24:]; len(o) >= 8; {
			if (o[0] == 1 || o[0] == 2) && mesh.MAC(o[2:8]) != mine {
				return "neighbour's MAC"
			}
			if o[1] == 0 || len(o) < int(o[1])*8 {
				break
			}
			o = o[int(o[1])*8:]
		}
	}
	return ""
}

// FuzzVxIn: what comes out of the tunnel, under whatever ids and from whatever address, passes only if both
// belong to one peer, and to its endpoints.
func FuzzVxIn(f *testing.F) {
	p7, p8 := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::8")
	data := ether(mine, far, 0x0800, ip4("10.32.0.3", "10.32.0.1", 6)...)
	f.Add(data, vni(upID, selfID), p7.AsSlice(), byte(255))
	f.Add(ether(mine, slow, 0x0800), vni(downID, selfID), p8.AsSlice(), byte(255))
	f.Add(ether(host, alien, 0x0800), vni(upID, selfID), p7.AsSlice(), byte(255))
	f.Add(data, vni(downID, upID), p8.AsSlice(), byte(255))
	f.Add(data, vni(upID, selfID), netip.MustParseAddr("c000:207::").AsSlice(), byte(64))
	f.Add(appendProbe(nil, upID, selfID, 1, full, 1410), vni(upID, selfID), p7.AsSlice(), byte(255))
	b := newBench(f)
	b.ready()
	b.wrapVxIn()
	of := map[mesh.ShortID]struct {
		addr netip.Addr
		macs []mesh.MAC
	}{upID: {p7, []mesh.MAC{far}}, downID: {p8, []mesh.MAC{slow}}} // alien shares no network with anybody here
	here := []mesh.MAC{mine, near, host}
	f.Fuzz(func(t *testing.T, frame []byte, ids uint32, from []byte, ttl byte) {
		addr, ok := netip.AddrFromSlice(from)
		if !ok || len(frame) < 14 || len(frame) > 3000 {
			return
		}
		verdict, err := b.received(outer{ids, addr, ttl}).Run(&ebpf.RunOptions{Data: frame, Context: skbContext{Ifindex: lo}})
		if errors.Is(err, unix.EINVAL) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if verdict == dropped {
			return
		}
		peer, known := of[mesh.ShortID(ids>>12&0xfff)]
		to := mesh.ShortID(ids & 0xfff)
		dst, src := mesh.MAC(frame), mesh.MAC(frame[6:])
		probe := frame[12] == 0x88 && (frame[13] == 0xb5 || frame[13] == 0xb6) && frame[0]&1 == 0 && !slices.Contains(here, dst)
		switch {
		case !known || peer.addr != addr:
			t.Errorf("ids %#x from %v pass", ids, addr)
		case to != selfID && to != upID:
			t.Errorf("for peer %d", to)
		case to == selfID && !probe && (!slices.Contains(here, dst) || !slices.Contains(peer.macs, src)):
			t.Errorf("let in from %#x: %x", ids, frame)
		}
	})
}

// FuzzUnderIn: of what the underlay brings, only a whole frame of a proven peer takes the short way, and comes out
// as it went in. All else is left as it is to the host.
func FuzzUnderIn(f *testing.F) {
	for _, proto := range []byte{6, 17} {
		f.Add(wrapped(ether(mine, far, 0x0800, ip4("10.32.0.3", "10.32.0.1", proto, make([]byte, 40)...)...)))
	}
	ack := ether(near, far, 0x0800, ip4("10.32.0.3", "10.32.0.2", 6, append([]byte{12: 0x50, 13: 0x10}, make([]byte, 6)...)...)...)
	f.Add(wrapped(ack))
	f.Add(wrapped(ether(mine, slow, 0x86dd)))
	b := newBench(f)
	b.ready()
	b.joins()
	out := make([]byte, 4096)
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) < 14 || len(frame) > 3000 {
			return
		}
		opts := &ebpf.RunOptions{Data: frame, DataOut: out, Context: skbContext{Ifindex: lo}}
		verdict, err := b.UnderIn.Run(opts)
		if errors.Is(err, unix.EINVAL) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if verdict == passed {
			if !bytes.Equal(opts.DataOut, frame) {
				t.Errorf("%x is left as %x", frame, opts.DataOut)
			}
			return
		}
		const head = 14 + 20 + 8 + 8 // before the inner frame
		if verdict != redirected || len(frame) < head+34 || !bytes.Equal(opts.DataOut, frame[head:]) {
			t.Fatalf("%x: got %d and %x", frame, verdict, opts.DataOut)
		}
		right := wrapped(nil)
		for _, same := range [][2]int{{12, 15}, {23, 24}, {26, 34}, {36, 38}, {40, 50}} { // types, protocol, addresses, port, checksum, VXLAN
			if !bytes.Equal(frame[same[0]:same[1]], right[same[0]:same[1]]) {
				t.Errorf("taken, though bytes %d to %d are wrong: %x", same[0], same[1], frame)
			}
		}
		if mesh.MAC(frame[head+6:]) != far && mesh.MAC(frame[head+6:]) != alien || frame[head]&1 != 0 {
			t.Errorf("a frame of somebody else is taken: %x", frame)
		}
		if dst := mesh.MAC(frame[head:]); frame[head+14+9] != 6 && dst != mine && dst != near {
			t.Errorf("a frame for nobody here is taken: %x", frame)
		}
		if frame[head+14+9] == 6 { // and what was joined is judged behind the veth pair
			verdict, err := b.JoinedIn.Run(&ebpf.RunOptions{Data: frame[head:], Context: skbContext{Ifindex: lo}})
			dst := mesh.MAC(frame[head:])
			if err == nil && verdict != dropped && (mesh.MAC(frame[head+6:]) != far || dst != mine && dst != near && dst != host) {
				t.Errorf("a joined frame is let in: %x", frame)
			}
		}
	})
}
