package tunnel

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
)

// frameSpec describes a frame for a test.
type frameSpec struct {
	v6, udp, partial, df bool
	vlan                 int // tags
	options              int // bytes of TCP options, a multiple of 4
	flags                byte
	seq                  uint32
	payload              int
	gso                  int // 0: no superframe
	srcPort              uint16
}

// build makes a buffer as a port would deliver it.
func (s frameSpec) build() []byte {
	b := make([]byte, vnetLen, maxFrame)
	b = append(b, 2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1)
	for range s.vlan {
		b = append(b, 0x81, 0, 0, 7)
	}
	l4len := udpHeaderLen
	if !s.udp {
		l4len = 20 + s.options
	}
	proto := byte(protoTCP)
	if s.udp {
		proto = protoUDP
	}
	if s.v6 {
		b = append(b, 0x86, 0xdd)
		b = append(b, 0x60, 1, 2, 3)
		b = binary.BigEndian.AppendUint16(b, uint16(l4len+s.payload))
		b = append(b, proto, 64)
		b = append(b, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
		b = append(b, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2)
	} else {
		b = append(b, 8, 0)
		b = append(b, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(20+l4len+s.payload))
		b = append(b, 0x12, 0x34, 0, 0, 64, proto, 0, 0, 10, 32, 0, 1, 10, 32, 0, 2)
		if s.df {
			b[len(b)-14] = 0x40
		}
	}
	port := s.srcPort
	if port == 0 {
		port = 40000
	}
	b = binary.BigEndian.AppendUint16(b, port)
	b = append(b, 0x14, 0x51)
	if s.udp {
		b = binary.BigEndian.AppendUint16(b, uint16(udpHeaderLen+s.payload))
		b = append(b, 0, 0)
	} else {
		b = binary.BigEndian.AppendUint32(b, s.seq)
		b = binary.BigEndian.AppendUint32(b, 77)
		b = append(b, byte(5+s.options/4)<<4, s.flags, 1, 0, 0, 0, 0, 0)
		for i := range s.options {
			b = append(b, [...]byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}[i%12])
		}
	}
	for i := range s.payload {
		b = append(b, byte(i*7+i>>8))
	}
	frame := b[vnetLen:]
	p, ok := parsePacket(frame)
	if !ok || p.proto != proto {
		panic("test frame does not parse")
	}
	if !s.v6 {
		p.fixIPv4(frame)
	}
	var h vnetHeader
	if s.partial {
		p.setPartial(frame, len(frame))
		h = vnetHeader{flags: vnetNeedsCsum, csumStart: uint16(p.l4), csumOffset: uint16(p.checksumAt() - p.l4)}
	} else {
		p.setChecksum(frame, len(frame))
	}
	if s.gso > 0 {
		h.gsoSize, h.headerLen = uint16(s.gso), uint16(p.payload)
		switch {
		case s.udp:
			h.gso = gsoUDP
		case s.v6:
			h.gso = gsoTCPv6
		default:
			h.gso = gsoTCPv4
		}
	}
	putVnet(b, h)
	return b
}

// complete returns frame with its checksum finished.
func complete(frame []byte, partial bool) []byte {
	out := append([]byte(nil), frame...)
	if partial {
		p, _ := parsePacket(out)
		at := p.checksumAt()
		c := ^fold(sum(out[p.l4:p.end], 0))
		if c == 0 && p.proto == protoUDP {
			c = 0xffff
		}
		binary.BigEndian.PutUint16(out[at:], c)
	}
	return out
}

// verify lets gopacket, an independent decoder, judge a complete frame: headers, lengths, checksums.
func verify(t *testing.T, frame []byte) (payload []byte, tcp *layers.TCP) {
	t.Helper()
	pk := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	if e := pk.ErrorLayer(); e != nil {
		t.Fatalf("gopacket: %v", e.Error())
	}
	opts := gopacket.SerializeOptions{ComputeChecksums: true, FixLengths: true}
	buf := gopacket.NewSerializeBuffer()
	var out []gopacket.SerializableLayer
	for _, l := range pk.Layers() {
		switch l := l.(type) {
		case *layers.TCP:
			l.SetNetworkLayerForChecksum(pk.NetworkLayer())
			tcp, payload = l, l.Payload
			out = append(out, l)
		case *layers.UDP:
			l.SetNetworkLayerForChecksum(pk.NetworkLayer())
			payload = l.Payload
			out = append(out, l, gopacket.Payload(l.Payload))
			goto done
		case gopacket.SerializableLayer:
			out = append(out, l)
		}
	}
done:
	if err := gopacket.SerializeLayers(buf, opts, out...); err != nil {
		t.Fatalf("gopacket: %v", err)
	}
	if got := buf.Bytes(); !bytes.Equal(got[:min(len(got), len(frame))], frame) {
		t.Fatalf("gopacket would write it otherwise:\n%x\n%x", frame[:min(90, len(frame))], got[:min(90, len(got))])
	}
	return payload, tcp
}

// cutAll returns the pieces for a path with that room.
func cutAll(t *testing.T, buf []byte, room int) (pieces [][]byte, partial bool) {
	t.Helper()
	var c cutter
	if !c.load(buf) {
		t.Fatal("load refused the frame")
	}
	switch pl := c.plan(room); pl {
	case planWhole:
		return [][]byte{append([]byte(nil), c.frame...)}, c.partial
	case planCut:
		for n := c.pieceLen(); n > 0; n = c.pieceLen() {
			if n > room {
				t.Fatalf("piece of %d bytes for room of %d", n, room)
			}
			piece := make([]byte, n)
			c.next(piece)
			pieces = append(pieces, piece)
		}
		return pieces, c.partial
	default:
		t.Fatalf("plan %d", pl)
	}
	return nil, false
}

func TestCutTCP(t *testing.T) {
	for _, s := range []frameSpec{
		{partial: true, flags: tcpACK | tcpPSH, seq: 1000, payload: 60000, gso: 1370},
		{partial: true, flags: tcpACK | tcpFIN | tcpCWR, seq: 0xffffff00, payload: 20001, gso: 1358, options: 12},
		{partial: true, flags: tcpACK, payload: 1370 * 3, gso: 1370, v6: true},
		{partial: true, flags: tcpACK | tcpPSH, payload: 5000, gso: 1000, v6: true, vlan: 2, options: 12},
		{partial: true, flags: tcpACK, payload: 100, gso: 1370},
		{flags: tcpACK | tcpPSH, payload: 3000, seq: 5}, // no superframe, checksum complete
		{flags: tcpACK | tcpPSH, payload: 3000, seq: 5, v6: true},
	} {
		for _, room := range []int{1424, 1000, 400} {
			buf := s.build()
			want := append([]byte(nil), buf[len(buf)-s.payload:]...)
			pieces, partial := cutAll(t, buf, room)
			if partial != s.partial {
				t.Errorf("%+v: partial %v", s, partial)
			}
			var got []byte
			seq := s.seq
			for i, p := range pieces {
				payload, tcp := verify(t, complete(p, partial))
				if tcp.Seq != seq {
					t.Errorf("%+v, room %d, piece %d: sequence %d, want %d", s, room, i, tcp.Seq, seq)
				}
				last := i == len(pieces)-1
				if tcp.FIN != (last && s.flags&tcpFIN != 0) || tcp.PSH != (last && s.flags&tcpPSH != 0) || tcp.CWR != (i == 0 && s.flags&tcpCWR != 0) {
					t.Errorf("%+v, room %d, piece %d: flags %v %v %v", s, room, i, tcp.FIN, tcp.PSH, tcp.CWR)
				}
				seq += uint32(len(payload))
				got = append(got, payload...)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%+v, room %d: payload differs, %d bytes of %d", s, room, len(got), len(want))
			}
		}
	}
}

func TestCutUDP(t *testing.T) {
	for _, s := range []frameSpec{
		{udp: true, partial: true, payload: 10 * 100, gso: 100},
		{udp: true, partial: true, payload: 10*1200 + 7, gso: 1200, v6: true},
	} {
		buf := s.build()
		want := append([]byte(nil), buf[len(buf)-s.payload:]...)
		pieces, partial := cutAll(t, buf, 1424)
		if n := (s.payload + s.gso - 1) / s.gso; len(pieces) != n {
			t.Errorf("%d pieces, want %d", len(pieces), n)
		}
		var got []byte
		for _, p := range pieces {
			payload, _ := verify(t, complete(p, partial))
			got = append(got, payload...)
		}
		if !bytes.Equal(got, want) {
			t.Error("payload differs")
		}
	}
}

// What is cut and joined again is what it was.
func TestJoinUndoesCut(t *testing.T) {
	for _, s := range []frameSpec{
		{partial: true, flags: tcpACK, seq: 1000, payload: 60000, gso: 1370},
		{partial: true, flags: tcpACK | tcpPSH, seq: 0xffffff00, payload: 64000, gso: 1358, options: 12, df: true},
		{partial: true, flags: tcpACK, payload: 1350 * 3, gso: 1350, v6: true},
		{udp: true, partial: true, payload: 40 * 100, gso: 100},
		{udp: true, partial: true, payload: 10*1200 + 7, gso: 1200, v6: true},
	} {
		buf := s.build()
		want := append([]byte(nil), buf...)
		pieces, partial := cutAll(t, buf, 1424)
		var out [][]byte
		j := newJoiner(func(b []byte) { out = append(out, append([]byte(nil), b...)) }, true, true)
		for _, p := range pieces {
			if !j.add(append(make([]byte, vnetLen), p...), partial) {
				t.Fatal("add refused a piece")
			}
		}
		j.flush()
		if len(out) != 1 || !bytes.Equal(out[0], want) {
			t.Errorf("%+v: %d frames, first differs: %v", s, len(out), !bytes.Equal(out[0], want))
		}
	}
}

// Flows that are mixed are kept apart and in order; what may not be joined is not.
func TestJoinMixed(t *testing.T) {
	var out [][]byte
	j := newJoiner(func(b []byte) { out = append(out, append([]byte(nil), b...)) }, true, true)
	add := func(s frameSpec) { j.add(s.build(), s.partial) }
	seg := func(port uint16, n int, flags byte, size int) frameSpec {
		return frameSpec{partial: true, flags: flags, seq: uint32(n * 100), payload: size, srcPort: port}
	}
	for i := range 5 {
		for port := range uint16(12) {
			add(seg(40000+port, i, tcpACK, 100))
		}
	}
	j.flush()
	// Twelve flows on eight slots: all there, each in order.
	next := map[uint16]uint32{}
	for _, b := range out {
		p, _ := parsePacket(b[vnetLen:])
		f := b[vnetLen:]
		port, seq := binary.BigEndian.Uint16(f[p.l4:]), binary.BigEndian.Uint32(f[p.l4+4:])
		if seq != next[port] {
			t.Errorf("port %d: sequence %d, want %d", port, seq, next[port])
		}
		next[port] = seq + uint32(p.end-p.payload)
	}
	for port, n := range next {
		if n != 500 {
			t.Errorf("port %d: %d bytes", port, n)
		}
	}
	for _, c := range []struct {
		name  string
		specs []frameSpec
		want  int
	}{
		{"gap", []frameSpec{seg(1, 0, tcpACK, 100), seg(1, 2, tcpACK, 100)}, 2},
		{"push ends", []frameSpec{seg(1, 0, tcpACK, 100), seg(1, 1, tcpACK|tcpPSH, 100), seg(1, 2, tcpACK, 100)}, 2},
		{"short ends", []frameSpec{seg(1, 0, tcpACK, 100), {partial: true, flags: tcpACK, seq: 100, payload: 50, srcPort: 1}, {partial: true, flags: tcpACK, seq: 150, payload: 50, srcPort: 1}}, 2},
		{"longer", []frameSpec{{partial: true, flags: tcpACK, payload: 50, srcPort: 1}, {partial: true, flags: tcpACK, seq: 50, payload: 100, srcPort: 1}}, 2},
		{"FIN", []frameSpec{seg(1, 0, tcpACK, 100), seg(1, 1, tcpACK|tcpFIN, 100)}, 2},
		{"options", []frameSpec{seg(1, 0, tcpACK, 100), {partial: true, flags: tcpACK, seq: 100, payload: 100, srcPort: 1, options: 12}}, 2},
		{"complete checksum", []frameSpec{seg(1, 0, tcpACK, 100), {flags: tcpACK, seq: 100, payload: 100, srcPort: 1}, seg(1, 2, tcpACK, 100)}, 3},
		{"empty ACK between", []frameSpec{seg(1, 0, tcpACK, 100), seg(1, 1, tcpACK, 0), seg(1, 1, tcpACK, 100)}, 3},
		{"all", []frameSpec{seg(1, 0, tcpACK, 100), seg(1, 1, tcpACK, 100), seg(1, 2, tcpACK, 100)}, 1},
	} {
		out = nil
		for _, s := range c.specs {
			add(s)
		}
		j.flush()
		if len(out) != c.want {
			t.Errorf("%s: %d frames, want %d", c.name, len(out), c.want)
		}
	}
	if j.add((frameSpec{udp: true, payload: 10}).build()[:vnetLen+20], true) {
		t.Error("a runt with a partial checksum is taken")
	}
}

func TestJoinSteadyStateDoesNotAllocate(t *testing.T) {
	j := newJoiner(func([]byte) {}, true, true)
	var bufs [][]byte
	for i := range 40 {
		bufs = append(bufs, frameSpec{partial: true, flags: tcpACK, seq: uint32(i * 1370), payload: 1370}.build())
	}
	allocs := testing.AllocsPerRun(100, func() {
		for _, b := range bufs {
			j.add(b, true)
		}
		j.flush()
	})
	if allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

func TestFragment(t *testing.T) {
	s := frameSpec{udp: true, payload: 3000}
	frame := s.build()[vnetLen:]
	p, _ := parsePacket(frame)
	var parts [][]byte
	if !fragmentIPv4(frame, p, 700, func(n int) []byte {
		parts = append(parts, make([]byte, n))
		return parts[len(parts)-1]
	}) {
		t.Fatal("not fragmented")
	}
	body := make([]byte, 3008)
	for i, f := range parts {
		if len(f) > 700 {
			t.Errorf("fragment of %d bytes", len(f))
		}
		q, ok := parsePacket(f)
		if !ok || !q.fragment || sum(f[q.l3:q.l4], 0)%0xffff != 0 {
			t.Errorf("fragment %d does not parse", i)
		}
		word := binary.BigEndian.Uint16(f[q.l3+6:])
		if more := word&0x2000 != 0; more != (i < len(parts)-1) {
			t.Errorf("fragment %d: more fragments %v", i, more)
		}
		copy(body[int(word&0x1fff)*8:], f[q.l4:q.end])
	}
	if !bytes.Equal(body, frame[p.l4:p.end]) {
		t.Error("the pieces do not make the whole")
	}
	if fragmentIPv4(frame, p, 40, func(n int) []byte { return make([]byte, n) }) {
		t.Error("fragmented for a room of 40")
	}
}

func TestPlans(t *testing.T) {
	big := frameSpec{udp: true, payload: 1382, partial: true} // a packet of 1,410 bytes
	bigDF, big6 := big, big
	bigDF.df, big6.v6 = true, true
	multicast := func(b []byte) []byte { b[vnetLen] |= 1; return b }
	for _, c := range []struct {
		name string
		buf  []byte
		room int
		want plan
	}{
		{"fits", big.build(), 1424, planWhole},
		{"IPv4", big.build(), 1423, planFragment},
		{"IPv4 with DF", bigDF.build(), 1423, planTooBig},
		{"IPv6", big6.build(), 1423, planTooBig},
		{"IPv6 of the smallest MTU", frameSpec{udp: true, v6: true, payload: 1280 - 48}.build(), 1000, planParts},
		{"multicast", multicast(big.build()), 1000, planFragment},
		{"superframe of large datagrams", frameSpec{udp: true, payload: 5000, gso: 1382, partial: true}.build(), 1000, planFragment},
		{"SYN", frameSpec{flags: tcpSYN, payload: 2000, df: true}.build(), 1000, planTooBig},
		{"no room", frameSpec{flags: tcpACK, payload: 2000, df: true}.build(), 60, planNoFit},
	} {
		var k cutter
		if !k.load(c.buf) {
			t.Errorf("%s: load", c.name)
			continue
		}
		if got := k.plan(c.room); got != c.want {
			t.Errorf("%s: plan %d, want %d", c.name, got, c.want)
		}
	}
	var k cutter
	other := make([]byte, vnetLen+1400)
	other[vnetLen+12] = 0x99
	if !k.load(other) || k.plan(1000) != planNoFit {
		t.Error("a frame of an unknown type that does not fit")
	}
	for name, change := range map[string]func(b []byte) []byte{
		"runt":                    func(b []byte) []byte { return b[:vnetLen+10] },
		"GSO without size":        func(b []byte) []byte { putVnet(b, vnetHeader{gso: gsoTCPv4}); return b },
		"wrong family":            func(b []byte) []byte { putVnet(b, vnetHeader{gso: gsoTCPv6, gsoSize: 100}); return b },
		"wrong protocol":          func(b []byte) []byte { putVnet(b, vnetHeader{gso: gsoUDP, gsoSize: 100}); return b },
		"unknown kind":            func(b []byte) []byte { putVnet(b, vnetHeader{gso: 3, gsoSize: 100}); return b },
		"checksum behind the end": func(b []byte) []byte { putVnet(b, vnetHeader{flags: vnetNeedsCsum, csumStart: 65000}); return b },
		"superframe, odd checksum": func(b []byte) []byte {
			putVnet(b, vnetHeader{flags: vnetNeedsCsum, csumStart: 20, gso: gsoTCPv4, gsoSize: 9})
			return b
		},
		"superframe, length of IP 0": func(b []byte) []byte { b[vnetLen+16], b[vnetLen+17] = 0, 0; return b },
	} {
		if k.load(change(frameSpec{flags: tcpACK, payload: 2000, gso: 500, partial: true}.build())) {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestTooBig(t *testing.T) {
	for _, s := range []frameSpec{{udp: true, payload: 1382, df: true}, {udp: true, payload: 1362, v6: true}, {udp: true, payload: 1000, v6: true, vlan: 1}} {
		frame := s.build()[vnetLen:]
		p, _ := parsePacket(frame)
		dst := make([]byte, maxTooBig)
		n := tooBig(dst, frame, p, 1300)
		pk := gopacket.NewPacket(dst[:n], layers.LayerTypeEthernet, gopacket.Default)
		if e := pk.ErrorLayer(); e != nil {
			t.Fatal(e.Error())
		}
		if s.v6 {
			ip, icmp := pk.Layer(layers.LayerTypeIPv6).(*layers.IPv6), pk.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6)
			if ip.DstIP.String() != "fd00::1" || icmp.TypeCode.Type() != layers.ICMPv6TypePacketTooBig || binary.BigEndian.Uint32(icmp.Payload) != 1300 {
				t.Errorf("%v %v", ip, icmp.TypeCode)
			}
			q, _ := parsePacket(dst[:n])
			if c := fold(sum(dst[q.l4:n], sum(dst[q.l3+8:q.l3+40], uint64(protoICMPv6)+uint64(n-q.l4)))); c != 0xffff {
				t.Errorf("checksum: %x", c)
			}
			continue
		}
		ip, icmp := pk.Layer(layers.LayerTypeIPv4).(*layers.IPv4), pk.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4)
		if ip.DstIP.String() != "10.32.0.1" || icmp.TypeCode != layers.CreateICMPv4TypeCode(3, 4) || icmp.Seq != 1300 {
			t.Errorf("%v %v", ip, icmp)
		}
		if c := fold(sum(icmp.LayerContents(), sum(icmp.Payload, 0))); c != 0xffff {
			t.Errorf("checksum: %x", c)
		}
		// Nobody is told about an error message, or in the name of a group.
		if m := tooBig(make([]byte, maxTooBig), dst[:n], mustParse(dst[:n]), 500); m != 0 {
			t.Error("an error about an error")
		}
	}
	b := frameSpec{udp: true, payload: 1382, df: true}.build()[vnetLen:]
	b[30] = 239
	if n := tooBig(make([]byte, maxTooBig), b, mustParse(b), 500); n != 0 {
		t.Error("an error about multicast")
	}
}

func mustParse(frame []byte) packet {
	p, _ := parsePacket(frame)
	return p
}

func TestClampMSS(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, partial := range []bool{false, true} {
			buf := frameSpec{v6: v6, partial: partial, flags: tcpSYN, options: 8}.build()
			p := mustParse(buf[vnetLen:])
			copy(buf[vnetLen+p.l4+20:], []byte{1, 1, 2, 4, 0x05, 0x5a, 1, 0}) // MSS 1370
			if !partial {
				p.setChecksum(buf[vnetLen:], p.end)
			}
			var c cutter
			c.load(buf)
			c.clampMSS(1000)
			want := uint16(1000 - 40)
			if v6 {
				want -= 20
			}
			if got := binary.BigEndian.Uint16(c.frame[p.l4+24:]); got != want {
				t.Errorf("MSS %d, want %d", got, want)
			}
			verify(t, complete(c.frame, partial))
			c.clampMSS(1400)
			if got := binary.BigEndian.Uint16(c.frame[p.l4+24:]); got != want {
				t.Errorf("MSS raised to %d", got)
			}
		}
	}
}

func TestSumAgainstTheObvious(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for n := range 300 {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
			if n%3 == 0 {
				b[i] = 0xff
			}
		}
		var want uint64 = 12345
		for i := 0; i < n; i += 2 {
			w := uint64(b[i]) << 8
			if i+1 < n {
				w |= uint64(b[i+1])
			}
			want += w
		}
		if got := fold(sum(b, 12345)); got != fold(want) {
			t.Errorf("%d bytes: %x, want %x", n, got, fold(want))
		}
	}
}

func FuzzCut(f *testing.F) {
	for _, s := range []frameSpec{
		{partial: true, flags: tcpACK, payload: 5000, gso: 1370}, {udp: true, partial: true, payload: 3000, gso: 700, v6: true},
		{udp: true, payload: 1400}, {flags: tcpSYN, options: 12, vlan: 1},
	} {
		f.Add(s.build(), 1000)
	}
	f.Fuzz(func(t *testing.T, buf []byte, room int) {
		if room > maxDatagram {
			return
		}
		var c cutter
		if !c.load(append([]byte(nil), buf...)) {
			return
		}
		c.clampMSS(room)
		switch c.plan(room) {
		case planCut:
			total := 0
			for n := c.pieceLen(); n > 0; n = c.pieceLen() {
				if n > room {
					t.Fatalf("piece of %d for room of %d", n, room)
				}
				b := make([]byte, n)
				c.next(b)
				total += n - c.p.payload
			}
			if total != c.p.end-c.p.payload {
				t.Fatalf("%d bytes of payload became %d", c.p.end-c.p.payload, total)
			}
		case planWhole:
			if len(c.frame) > room {
				t.Fatal("too large")
			}
		case planTooBig:
			tooBig(make([]byte, maxTooBig), c.frame, c.p, room)
		case planFragment:
			if c.h.gso != gsoNone {
				for n := c.pieceLen(); n > 0; n = c.pieceLen() {
					c.next(make([]byte, n))
				}
				return
			}
			fragmentIPv4(c.frame, c.p, room, func(n int) []byte {
				if n > room {
					t.Fatalf("fragment of %d for room of %d", n, room)
				}
				return make([]byte, n)
			})
		}
	})
}

// Frames one after the other, each with a length before it: whatever they are, no byte of payload
// appears or is lost.
func FuzzJoin(f *testing.F) {
	var seed []byte
	for i := range 4 {
		b := frameSpec{partial: true, flags: tcpACK, seq: uint32(i * 100), payload: 100}.build()[vnetLen:]
		seed = append(binary.BigEndian.AppendUint16(seed, uint16(len(b))|framePartial), b...)
		b = frameSpec{udp: true, partial: true, payload: 100}.build()[vnetLen:]
		seed = append(binary.BigEndian.AppendUint16(seed, uint16(len(b))|framePartial), b...)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, in []byte) {
		payload := func(frame []byte) int {
			if p, ok := parsePacket(frame); ok && p.proto != 0 {
				return p.end - p.payload
			}
			return 0
		}
		taken, written := 0, 0
		j := newJoiner(func(b []byte) {
			if h := parseVnet(b); h.flags&vnetNeedsCsum != 0 && int(h.csumStart)+int(h.csumOffset)+2 > len(b)-vnetLen {
				t.Fatal("checksum behind the end")
			}
			written += payload(b[vnetLen:])
		}, true, true)
		for len(in) >= 2 {
			word := binary.BigEndian.Uint16(in)
			n := min(int(word&frameLenMask), len(in)-2)
			buf := append(make([]byte, vnetLen), in[2:2+n]...)
			in = in[2+n:]
			if j.add(buf, word&framePartial != 0) {
				taken += payload(buf[vnetLen:])
			}
		}
		j.flush()
		if taken != written {
			t.Fatalf("%d bytes of payload in, %d out", taken, written)
		}
	})
}
