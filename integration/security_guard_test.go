package integration

import (
	"bytes"
	"encoding/binary"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"meshd/integration/lab"
)

// What follows builds frames by hand, wrong ones included.

func ether(dst, src []byte, kind uint16, payload ...byte) []byte {
	f := append(append(append([]byte{}, dst...), src...), byte(kind>>8), byte(kind))
	return append(f, payload...)
}

func checksum(parts ...[]byte) uint16 {
	sum := uint32(0)
	for i, b := range bytes.Join(parts, nil) {
		sum += uint32(b) << (8 * (1 - i%2))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

func ip4(src, dst netip.Addr, proto byte, payload []byte) []byte {
	h := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, proto, 0, 0}
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
	h = append(append(h, src.AsSlice()...), dst.AsSlice()...)
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, payload...)
}

func udp(from, to uint16, payload []byte) []byte {
	h := binary.BigEndian.AppendUint16(nil, from)
	h = binary.BigEndian.AppendUint16(h, to)
	h = binary.BigEndian.AppendUint16(h, uint16(8+len(payload)))
	return append(append(h, 0, 0), payload...)
}

func ip6(src, dst netip.Addr, next byte, payload []byte) []byte {
	h := []byte{0x60, 0, 0, 0, byte(len(payload) >> 8), byte(len(payload)), next, 255}
	return append(append(append(h, src.AsSlice()...), dst.AsSlice()...), payload...)
}

func icmp6(src, dst netip.Addr, kind byte, rest ...byte) []byte {
	m := append([]byte{kind, 0, 0, 0}, rest...)
	sum := checksum(src.AsSlice(), dst.AsSlice(), []byte{0, 0, 0, byte(len(m)), 0, 0, 0, 58}, m)
	binary.BigEndian.PutUint16(m[2:], sum)
	return m
}

func arp(op byte, senderMAC []byte, sender netip.Addr, targetMAC []byte, target netip.Addr) []byte {
	return bytes.Join([][]byte{{0, 1, 8, 0, 6, 4, 0, op}, senderMAC, sender.AsSlice(), targetMAC, target.AsSlice()}, nil)
}

// linkLocal is the address that the kernel makes from a MAC.
func linkLocal(m []byte) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// forgery is a frame that must not reach some of the observers. Its name is put behind it, to know it by.
type forgery struct {
	name  string
	frame []byte
	apart bool // only what is on another subnet must not see it
	fine  bool // the neighbours have to see it
}

func (f forgery) tag() []byte { return []byte("@@" + f.name + "@@") }

// tagged puts the tag into the frame's innermost packet, as payload or as an option that nobody knows, so that
// lengths and checksums are right: a bridge with br_netfilter cuts off what stands behind an IP packet.
func tagged(frame, tag []byte) []byte {
	tag = append(tag, make([]byte, (14-len(tag)%8)%8)...) // with two bytes before it, of whole units of 8
	switch p := frame[14:]; binary.BigEndian.Uint16(frame[12:]) {
	case 0x800:
		p = append(p, tag...)
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		p[10], p[11] = 0, 0
		binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
		return append(frame[:14:14], p...)
	case 0x86dd:
		at, next := 40, p[6]
		for next == 0 || next == 44 || next == 60 { // each of 8 bytes here
			at, next = at+8, p[at]
		}
		if next == 58 {
			p = append(p, 253, byte(len(tag)+2)/8) // for experiments (RFC 4727)
		}
		p = append(p, tag...)
		if next == 58 {
			p[at+2], p[at+3] = 0, 0
			binary.BigEndian.PutUint16(p[at+2:], checksum(p[8:40], []byte{0, 0, 0, byte(len(p) - at), 0, 0, 0, 58}, p[at:]))
		}
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
		return append(frame[:14:14], p...)
	}
	return append(frame, tag...)
}

// forgeries are what a container tries that is root in its own namespace.
func forgeries(a, v1, v2, s1, s2 *member, macs map[*member][]byte) (all []forgery) {
	var (
		own, mine = macs[a], a.addr
		everybody = bytes.Repeat([]byte{0xff}, 6)
		random    = []byte{2, 0x11, 0x22, 0x33, 0x44, 0x55}
		gateway   = netip.MustParseAddr("10.2.1.254")
		group6    = netip.MustParseAddr("ff02::1")
		own6      = linkLocal(own)
		padding   = make([]byte, 64)
	)
	add := func(name string, frame []byte) { all = append(all, forgery{name: name, frame: frame}) }
	for _, to := range []struct {
		name string
		mac  []byte
		addr netip.Addr
	}{{"v1", macs[v1], v1.addr}, {"v2", macs[v2], v2.addr}, {"all", everybody, netip.MustParseAddr("10.2.1.255")}} {
		say := udp(9, 9, []byte("hello"))
		other := map[string]*member{"v1": v2, "v2": v1, "all": v1}[to.name]
		to6 := group6
		if to.name != "all" {
			to6 = linkLocal(to.mac)
		}
		as := func(kind string, frame []byte) { add(kind+">"+to.name, frame) }
		all = append(all, forgery{name: "honest>" + to.name, frame: ether(to.mac, own, 0x800, ip4(mine, to.addr, 17, say)...), fine: true})
		as("random MAC", ether(to.mac, random, 0x800, ip4(mine, to.addr, 17, say)...))
		as("neighbour's MAC", ether(to.mac, macs[other], 0x800, ip4(other.addr, to.addr, 17, say)...))
		as("neighbour's IP", ether(to.mac, own, 0x800, ip4(other.addr, to.addr, 17, say)...))
		as("gateway's IP", ether(to.mac, own, 0x800, ip4(gateway, to.addr, 17, say)...))
		as("IP from outside", ether(to.mac, own, 0x800, ip4(netip.MustParseAddr("192.0.2.1"), to.addr, 17, say)...))
		as("fragment with neighbour's IP", func() []byte {
			f := ether(to.mac, own, 0x800, ip4(other.addr, to.addr, 17, say)...)
			f[14+7] = 100
			return f
		}())
		as("ARP answer for neighbour", ether(to.mac, own, 0x806, arp(2, own, other.addr, to.mac, to.addr)...))
		as("ARP answer for gateway", ether(to.mac, own, 0x806, arp(2, own, gateway, to.mac, to.addr)...))
		as("ARP question as neighbour", ether(to.mac, own, 0x806, arp(1, own, other.addr, make([]byte, 6), to.addr)...))
		as("ARP with another MAC inside", ether(to.mac, own, 0x806, arp(2, random, mine, to.mac, to.addr)...))
		as("ARP of another length", ether(to.mac, own, 0x806, append([]byte{0, 1, 8, 0, 8, 4, 0, 2}, padding...)...))
		as("IPv6 of neighbour", ether(to.mac, own, 0x86dd, ip6(linkLocal(macs[other]), to6, 17, say)...))
		as("IPv6 of nobody", ether(to.mac, own, 0x86dd, ip6(netip.IPv6Unspecified(), to6, 17, say)...))
		target := linkLocal(macs[other])
		as("advertisement for neighbour", ether(to.mac, own, 0x86dd, ip6(own6, to6, 58,
			icmp6(own6, to6, 136, slices.Concat([]byte{0x20, 0, 0, 0}, target.AsSlice(), []byte{2, 1}, own)...))...))
		as("solicitation with another MAC inside", ether(to.mac, own, 0x86dd, ip6(own6, to6, 58,
			icmp6(own6, to6, 135, slices.Concat([]byte{0, 0, 0, 0}, target.AsSlice(), []byte{1, 1}, random)...))...))
		prefix := append([]byte{3, 4, 64, 0xc0, 0, 0, 255, 255, 0, 0, 255, 255, 0, 0, 0, 0}, netip.MustParseAddr("2001:db8:bad::").AsSlice()...)
		advert := icmp6(own6, to6, 134, append([]byte{64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}, prefix...)...)
		as("router advertisement", ether(to.mac, own, 0x86dd, ip6(own6, to6, 58, advert)...))
		as("router advertisement behind hop-by-hop", ether(to.mac, own, 0x86dd, ip6(own6, to6, 0, append([]byte{58, 0, 1, 4, 0, 0, 0, 0}, advert...))...))
		as("router advertisement in a fragment", ether(to.mac, own, 0x86dd, ip6(own6, to6, 44, append([]byte{58, 0, 0, 0, 1, 2, 3, 4}, advert...))...))
		as("router advertisement behind two", ether(to.mac, own, 0x86dd, ip6(own6, to6, 60, append([]byte{44, 0, 1, 4, 0, 0, 0, 0, 58, 0, 0, 0, 1, 2, 3, 4}, advert...))...))
		as("redirect6", ether(to.mac, own, 0x86dd, ip6(own6, to6, 58, icmp6(own6, to6, 137, make([]byte, 36)...))...))
		as("redirect", ether(to.mac, own, 0x800, ip4(mine, to.addr, 1, append([]byte{5, 1, 0, 0, 10, 2, 1, 1}, padding...))...))
		as("DHCP offer", ether(to.mac, own, 0x800, ip4(mine, to.addr, 17, udp(67, 68, padding))...))
		as("DHCPv6 advertisement", ether(to.mac, own, 0x86dd, ip6(own6, to6, 17, udp(547, 546, padding))...))
		as("tagged", ether(to.mac, own, 0x8100, append([]byte{0, 5, 8, 0}, ip4(mine, to.addr, 17, say)...)...))
		as("tagged with 0", ether(to.mac, own, 0x8100, append([]byte{0, 0, 8, 0}, ip4(other.addr, to.addr, 17, say)...)...))
		as("tagged twice", ether(to.mac, own, 0x88a8, append([]byte{0, 5, 0x81, 0, 0, 6, 8, 0}, ip4(mine, to.addr, 17, say)...)...))
	}
	bpdu := append([]byte{0x42, 0x42, 3, 0, 0, 0, 0, 0}, padding...)
	for last, kind := range map[byte]string{0: "BPDU", 1: "pause", 2: "LACP", 3: "EAPOL", 0xe: "LLDP"} {
		dst := []byte{1, 0x80, 0xc2, 0, 0, last}
		frame := map[byte][]byte{
			0: ether(dst, own, uint16(len(bpdu)), bpdu...), 1: ether(dst, own, 0x8808, append([]byte{0, 1, 255, 255}, padding...)...),
			2: ether(dst, own, 0x8809, padding...), 3: ether(dst, own, 0x888e, padding...), 0xe: ether(dst, own, 0x88cc, padding...),
		}[last]
		add(kind, frame)
	}
	add("BPDU to all", ether(everybody, own, uint16(len(bpdu)), bpdu...))
	add("BPDU to v1", ether(macs[v1], own, uint16(len(bpdu)), bpdu...))
	add("LLDP to v2", ether(macs[v2], own, 0x88cc, padding...))
	for name, to := range map[string]*member{"s1": s1, "s2": s2} {
		foreign := netip.AddrFrom4([4]byte{10, 2, 2, 99})
		for kind, frame := range map[string][]byte{
			"across":                     ether(macs[to], own, 0x800, ip4(mine, to.addr, 17, udp(9, 9, padding))...),
			"across with its subnet":     ether(macs[to], own, 0x800, ip4(foreign, to.addr, 17, udp(9, 9, padding))...),
			"ARP across":                 ether(everybody, own, 0x806, arp(1, own, mine, make([]byte, 6), to.addr)...),
			"ARP across with its subnet": ether(everybody, own, 0x806, arp(1, own, foreign, make([]byte, 6), to.addr)...),
			"broadcast across":           ether(everybody, own, 0x800, ip4(mine, netip.MustParseAddr("255.255.255.255"), 17, udp(9, 9, padding))...),
			"IPv6 across":                ether(macs[to], own, 0x86dd, ip6(own6, linkLocal(macs[to]), 17, udp(9, 9, padding))...),
			"IPv6 group across":          ether([]byte{0x33, 0x33, 0, 0, 0, 1}, own, 0x86dd, ip6(own6, group6, 17, udp(9, 9, padding))...),
			"unknown protocol across":    ether(macs[to], own, 0x9999, padding...),
			"unknown protocol to all":    ether(everybody, own, 0x9999, padding...),
		} {
			all = append(all, forgery{name: kind + ">" + name, frame: frame, apart: true})
		}
	}
	for i := range all {
		all[i].frame = tagged(all[i].frame, all[i].tag())
	}
	return all
}

// observe counts the tagged frames that arrive at a container, by name of the forgery.
func (w *world) observe(c *lab.Container, ifname string, all []forgery, limit time.Duration) func() map[string]int {
	w.t.Helper()
	f, err := c.OpenFrames(ifname)
	w.try(err)
	seen := map[string]int{}
	var done sync.WaitGroup
	done.Go(func() {
		defer f.Close()
		f.Collect(limit, func(frame []byte) bool {
			i := bytes.Index(frame, []byte("@@"))
			if i < 0 {
				return false
			}
			if j := bytes.Index(frame[i+2:], []byte("@@")); j >= 0 {
				seen[string(frame[i+2:i+2+j])]++
			}
			return true
		})
	})
	return func() map[string]int { done.Wait(); return seen }
}

// TestContainersPretend is L1, L2, L3, L7 and L9: a container with every capability in its namespace speaks
// in others' names, as a router, a switch and a DHCP server, and to other subnets, on each kind of path. Where
// nftables stands in for the kernel path it keeps containers to their own names, but neither keeps subnets apart
// from somebody who leaves IP aside or is on the same bridge, nor limits broadcasts: ARCHITECTURE.md says so.
func TestContainersPretend(t *testing.T) {
	for _, x := range []struct {
		name    string
		env     []string
		options []string
	}{
		{"Kernel", nil, nil},
		{"Sealed", []string{"MESH_PASSWORD=" + secret}, nil},
		{"Userspace", nil, []string{"--no-fastdp"}},
		{"Nftables", nil, []string{"--pin-dir", "/sys/kernel/none/meshd"}}, // where nothing can be pinned
	} {
		t.Run(x.name, func(t *testing.T) {
			inKernel := x.name != "Nftables"
			w := newWorld(t, 2, scaled(time.Minute, 2*time.Minute))
			h1, h2 := w.Host(1), w.Host(2)
			w.launchWith(h1, x.env, x.options...)
			w.launchWith(h2, x.env, append(x.options[:len(x.options):len(x.options)], h1.Addr.String())...)
			a := w.netns(h1, "attacker", "10.2.1.1/24")
			v1, v2 := w.netns(h1, "v1", "10.2.1.2/24"), w.netns(h2, "v2", "10.2.1.3/24")
			s1, s2 := w.netns(h1, "s1", "10.2.2.1/24"), w.netns(h2, "s2", "10.2.2.2/24")
			macs := map[*member][]byte{}
			for _, m := range []*member{a, v1, v2, s1, s2} {
				macs[m] = w.mac(m)
			}
			for _, m := range []*member{v1, v2} {
				_, err := a.WaitPing(w.ctx, m.addr, 10*time.Second)
				w.try(err)
				// Those who would believe a router.
				_, err = m.Out(w.ctx, "/bin/sh", "-c", "echo 2 > /proc/sys/net/ipv6/conf/ethmesh/accept_ra; echo 1 > /proc/sys/net/ipv4/conf/ethmesh/arp_accept")
				w.try(err)
			}
			_, err := v1.WaitPing(w.ctx, v2.addr, 10*time.Second)
			w.try(err)
			w.rest(2 * time.Second) // the guard looks after ports once a second where nftables does it
			believed := func() string {
				out := ""
				for _, m := range []*member{v1, v2} {
					o, err := m.Out(w.ctx, "/bin/sh", "-c", "ip neigh show dev ethmesh | sed 's/ [A-Z]* *$//; s/ router//' | sort; ip -6 route show; ip -4 route show")
					w.try(err)
					out += o + "\n"
				}
				return out
			}
			before := believed()

			all := forgeries(a, v1, v2, s1, s2, macs)
			const repeats = 3
			limit := 4 * time.Second
			observers := map[string]func() map[string]int{}
			self, err := h1.Self()
			w.try(err)
			for name, m := range map[string]*lab.Container{"v1": v1.Container, "v2": v2.Container, "s1": s1.Container, "s2": s2.Container} {
				observers[name] = w.observe(m, "ethmesh", all, limit)
			}
			observers["host"] = w.observe(self, "mesh", all, limit)
			f, err := a.OpenFrames("ethmesh")
			w.try(err)
			defer f.Close()
			for range repeats {
				for _, x := range all {
					if err := f.Send(x.frame); err != nil {
						t.Errorf("%s: %v", x.name, err)
					}
					w.rest(time.Millisecond) // broadcasts are limited
				}
			}
			seen := map[string]map[string]int{}
			for name, wait := range observers {
				seen[name] = wait()
			}
			for _, f := range all {
				for _, name := range slices.Sorted(maps.Keys(seen)) {
					n := seen[name][f.name]
					to := f.name[strings.IndexByte(f.name, '>')+1:]
					switch apart := name == "s1" || name == "s2"; {
					case f.fine && (to == name || to == "all" && (name == "v1" || name == "v2")) && n < repeats-1:
						t.Errorf("%s was seen %d times at %s: the test shows nothing", f.name, n, name)
					case !f.fine && !f.apart && n > 0, (f.fine || f.apart) && apart && inKernel && n > 0:
						t.Errorf("%s reached %s %d times", f.name, name, n)
					}
				}
			}
			if after := believed(); after != before {
				t.Errorf("neighbours and routes of the victims were\n%s\nand are\n%s", before, after)
			}
			t.Logf("%d kinds of frames, %d times each", len(all), repeats)
			if inKernel {
				r, err := h1.Report(w.ctx)
				w.try(err)
				for _, reason := range []string{"arp", "dhcp", "isolated", "link_control", "neighbour", "redirect", "router",
					"source_ip4", "source_ip6", "source_mac", "vlan"} {
					if r.Router.Drops["kernel_"+reason] == 0 {
						t.Errorf("nothing is counted as %s: %v", reason, r.Router.Drops)
					}
				}
				caught := map[string]uint64{}
				for _, o := range r.Router.Offences {
					switch o.Mac {
					case net.HardwareAddr(macs[a]).String():
						caught[o.Reason] += o.Frames
					default:
						t.Errorf("an innocent container was caught: %+v", o)
					}
				}
				if caught["arp"] == 0 || caught["source_ip4"] == 0 {
					t.Errorf("the attacker was caught at %v only", caught)
				}
				if out, err := h1.Must(w.ctx, "status"); err != nil || strings.Count(out, "Caught: ") != 1 {
					t.Errorf("the status does not name the one that pretends: %v\n%s", err, out)
				}
			}
			w.spoof(h1, a, v1, v2, f, macs, inKernel)
			w.flood(h1, h2, a, v1, v2, f, inKernel)
		})
	}
}

// spoof is L1: 1,000 times a second, for a second or in the long run a minute, the attacker says of a neighbour and of the
// gateway that they are where it is, by ARP and ND, to one victim and to all. The victims' tables are looked at all the
// while.
func (w *world) spoof(h1 *lab.Host, a, v1, v2 *member, f *lab.Frames, macs map[*member][]byte, counted bool) {
	w.t.Helper()
	_, err := h1.Must(w.ctx, "expose", "10.2.1.254/24")
	w.try(err)
	gateway := &member{addr: netip.MustParseAddr("10.2.1.254")}
	bridge, err := h1.ReadFile("/sys/class/net/mesh/address")
	w.try(err)
	at, err := net.ParseMAC(strings.TrimSpace(string(bridge)))
	w.try(err)
	known := map[*member]string{v1: net.HardwareAddr(macs[v1]).String(), v2: net.HardwareAddr(macs[v2]).String(), gateway: at.String()}
	for _, v := range []*member{v1, v2} {
		_, err := v.WaitPing(w.ctx, gateway.addr, 5*time.Second)
		w.try(err)
	}
	w.pings(v1, v2, 1, 56)
	caught := func() (n uint64) {
		r, err := h1.Report(w.ctx)
		w.try(err)
		for _, o := range r.Router.Offences {
			if o.Reason == "arp" || o.Reason == "neighbour" {
				n += o.Frames
			}
		}
		return n
	}
	own, own6 := macs[a], linkLocal(macs[a])
	var lies [][]byte
	for _, victim := range []*member{v1, v2} {
		for _, of := range []*member{v1, v2, gateway} {
			if of == victim {
				continue
			}
			for _, dst := range [][]byte{macs[victim], bytes.Repeat([]byte{0xff}, 6)} {
				lies = append(lies, ether(dst, own, 0x806, arp(2, own, of.addr, macs[victim], victim.addr)...),
					ether(dst, own, 0x806, arp(1, own, of.addr, make([]byte, 6), of.addr)...))
			}
			mac, err := net.ParseMAC(known[of])
			w.try(err)
			target := linkLocal(mac)
			lies = append(lies, ether(macs[victim], own, 0x86dd, ip6(own6, linkLocal(macs[victim]), 58,
				icmp6(own6, linkLocal(macs[victim]), 136, slices.Concat([]byte{0x20, 0, 0, 0}, target.AsSlice(), []byte{2, 1}, own)...))...))
		}
	}
	before, looks, sent := caught(), 0, 0
	length := scaled(time.Second, time.Minute)
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for start := time.Now(); time.Since(start) < length; <-tick.C {
			for due := int(time.Since(start) / time.Millisecond); sent < due; sent++ {
				_ = f.Send(lies[sent%len(lies)])
			}
		}
	}()
	look := func() {
		for _, victim := range []*member{v1, v2} {
			out, err := victim.Out(w.ctx, "ip", "neigh", "show", "dev", "ethmesh")
			w.try(err)
			for line := range strings.Lines(out) {
				for of, mac := range known {
					if strings.HasPrefix(line, of.addr.String()+" ") && strings.Contains(line, "lladdr") && !strings.Contains(line, mac) {
						w.t.Errorf("%s believes: %s", victim.Name, line)
					}
				}
				if strings.Contains(line, net.HardwareAddr(own).String()) && !strings.HasPrefix(line, a.addr.String()+" ") && !strings.HasPrefix(line, own6.String()+" ") {
					w.t.Errorf("%s believes the attacker: %s", victim.Name, line)
				}
			}
			looks++
		}
	}
	for running := true; running && !w.t.Failed(); {
		look()
		select {
		case <-done:
			running = false
		case <-time.After(50 * time.Millisecond):
		}
	}
	<-done
	look()
	w.t.Logf("%d lies about neighbours in %v, %d looks at the victims' tables; %d counted", sent, length, looks, caught()-before)
	if n := caught() - before; counted && n < uint64(sent) {
		w.t.Errorf("of %d lies %d are on the attacker's account", sent, n)
	}
	_, err = h1.Must(w.ctx, "hide", "10.2.1.254/24")
	w.try(err)
}

// flood is L5, L6 and L9: many MACs, many broadcasts, and frames of all sizes.
func (w *world) flood(h1, h2 *lab.Host, a, v1, v2 *member, f *lab.Frames, limited bool) {
	w.t.Helper()
	pid, victim := h1.Meshd(), w.mac(v2)
	others := w.watch(v1, v2, 2*time.Millisecond)
	w.madeUp(f, a.addr, v2, scaled(20_000, 1_000_000), 1<<30, 2)
	count, err := v2.OpenFrames("ethmesh")
	w.try(err)
	defer count.Close()
	const text = "storm-of-broadcasts"
	arrived := make(chan int, 1)
	go func() {
		arrived <- count.Collect(1500*time.Millisecond, func(frame []byte) bool { return bytes.Contains(frame, []byte(text)) })
	}()
	storm := ether(bytes.Repeat([]byte{0xff}, 6), f.MAC, 0x800, ip4(a.addr, netip.MustParseAddr("10.2.1.255"), 17, udp(9, 9, []byte(text)))...)
	sent := 0
	for end := time.Now().Add(time.Second); time.Now().Before(end); sent++ {
		_ = f.Send(storm)
	}
	got := <-arrived
	w.t.Logf("%d broadcasts in a second, %d arrived", sent, got)
	if got > 8000 && limited { // 2,000 a second after the first 4,000
		w.t.Errorf("of %d broadcasts %d arrived: not limited", sent, got)
	}
	r := w.end(others)
	w.t.Log("meanwhile between others: ", r)
	if limited && r.Lost > r.Sent/10 || r.Duplicated > 0 {
		w.t.Errorf("the others kept %d of %d", r.Received, r.Sent)
	}
	_, _ = a.Out(w.ctx, "ip", "link", "set", "ethmesh", "mtu", "65535")
	for n := 14; n < 65535; n += 1 + n/9 {
		for _, kind := range []uint16{0x800, 0x86dd, 0x806, 0x9999, 20} {
			_ = f.Send(ether(victim, f.MAC, kind, make([]byte, n-14)...))
			_ = f.Send(ether(victim, f.MAC, kind, bytes.Repeat([]byte{0xff}, n-14)...))
		}
	}
	if h1.Meshd() != pid {
		w.t.Error("meshd did not survive frames of odd sizes")
	}
	_, err = v1.WaitPing(w.ctx, v2.addr, 5*time.Second) // what was queued is gone
	w.try(err)
	w.pings(v1, v2, 5, 56)
	w.pings(v2, v1, 5, 5000)
}
