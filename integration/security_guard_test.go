package integration

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
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

// cast is who plays: containers that attack, their neighbours on 10.2.1.0/24, and strangers on 10.2.2.0/24.
type cast struct {
	attackers, victims, strangers []*member
	macs                          map[*member][]byte
	frames                        map[*member]*lab.Frames // of the attackers
}

// cast attaches so many of each, in turn on each host.
func (w *world) cast(attackers, victims, strangers int) *cast {
	w.t.Helper()
	c := &cast{macs: map[*member][]byte{}, frames: map[*member]*lab.Frames{}}
	for _, x := range []struct {
		kind    string
		n       int
		subnet  string
		members *[]*member
	}{{"a", attackers, "10.2.1.10", &c.attackers}, {"v", victims, "10.2.1.20", &c.victims}, {"s", strangers, "10.2.2.1", &c.strangers}} {
		for j := range x.n {
			m := w.netns(w.Hosts[j%len(w.Hosts)], fmt.Sprint(x.kind, j+1), fmt.Sprint(x.subnet, j+1, "/24"))
			c.macs[m] = w.mac(m)
			*x.members = append(*x.members, m)
		}
	}
	return c
}

// forgeries are what a container tries that is root in its own namespace.
func (c *cast) forgeries(a *member) (all []forgery) {
	var (
		macs      = c.macs
		own, mine = macs[a], a.addr
		everybody = bytes.Repeat([]byte{0xff}, 6)
		random    = []byte{2, 0x11, 0x22, 0x33, 0x44, 0x55}
		gateway   = netip.MustParseAddr("10.2.1.254")
		group6    = netip.MustParseAddr("ff02::1")
		own6      = linkLocal(own)
		padding   = make([]byte, 64)
	)
	add := func(name string, frame []byte) { all = append(all, forgery{name: a.Name + " " + name, frame: frame}) }
	for i := range len(c.victims) + 1 {
		other := c.victims[(i+1)%len(c.victims)]
		to := struct {
			name string
			mac  []byte
			addr netip.Addr
		}{"all", everybody, netip.MustParseAddr("10.2.1.255")}
		to6 := group6
		if i < len(c.victims) {
			v := c.victims[i]
			to.name, to.mac, to.addr, to6 = v.Name, macs[v], v.addr, linkLocal(macs[v])
		}
		say := udp(9, 9, []byte("hello"))
		as := func(kind string, frame []byte) { add(kind+">"+to.name, frame) }
		all = append(all, forgery{name: a.Name + " honest>" + to.name, frame: ether(to.mac, own, 0x800, ip4(mine, to.addr, 17, say)...), fine: true})
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
		as("DHCP offer from any port", ether(to.mac, own, 0x800, ip4(mine, to.addr, 17, udp(1067, 68, padding))...))
		as("DHCPv6 advertisement from any port", ether(to.mac, own, 0x86dd, ip6(own6, to6, 17, udp(1547, 546, padding))...))
		as("IEEE 802 ARP answer for neighbour", func() []byte {
			f := ether(to.mac, own, 0x806, arp(2, own, other.addr, to.mac, to.addr)...)
			f[15] = 6 // which the kernel takes for Ethernet
			return f
		}())
		as("advertisement for neighbour behind hop-by-hop", ether(to.mac, own, 0x86dd, ip6(own6, to6, 0, append([]byte{58, 0, 1, 4, 0, 0, 0, 0},
			icmp6(own6, to6, 136, slices.Concat([]byte{0x20, 0, 0, 0}, target.AsSlice(), []byte{2, 1}, own)...)...))...))
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
	add("Cisco's BPDU", ether([]byte{1, 0, 0x0c, 0xcc, 0xcc, 0xcd}, own, uint16(len(bpdu)), append([]byte{0xaa, 0xaa, 3, 0, 0, 0x0c, 1, 0x0b}, padding...)...))
	add("BPDU to all", ether(everybody, own, uint16(len(bpdu)), bpdu...))
	add("BPDU to one", ether(macs[c.victims[0]], own, uint16(len(bpdu)), bpdu...))
	add("LLDP to one", ether(macs[c.victims[1]], own, 0x88cc, padding...))
	for _, to := range c.strangers {
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
			all = append(all, forgery{name: a.Name + " " + kind + ">" + to.Name, frame: frame, apart: true})
		}
	}
	for i := range all {
		all[i].frame = tagged(all[i].frame, all[i].tag())
	}
	return all
}

// observe counts the tagged frames that arrive at a container, by name of the forgery.
func (w *world) observe(c *lab.Container, ifname string, limit time.Duration) func() map[string]int {
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

// pace calls f n times, so many times a second.
func (w *world) pace(n, perSecond int, f func(i int)) {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	start := time.Now()
	for i := 0; i < n && w.ctx.Err() == nil; <-tick.C {
		for due := min(n, int(time.Since(start).Seconds()*float64(perSecond))); i < due; i++ {
			f(i)
		}
	}
}

// TestContainersPretendFromTheStart has a container send in another's name from the moment when its interface is there: the guard
// has to be there before.
func TestContainersPretendFromTheStart(t *testing.T) {
	for name, options := range map[string][]string{"Kernel": nil, "Nftables": {"--pin-dir", "/sys/kernel/none/meshd"}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, time.Minute)
			h := w.Host(1)
			w.launch(h, options...)
			victim := w.netns(h, "victim", "10.2.1.1/24")
			limit := 3 * time.Second
			seen := w.observe(victim.Container, "ethmesh", limit)
			ctx, cancel := context.WithTimeout(w.ctx, limit)
			defer cancel()
			sent := 0
			for i := range 5 {
				c, err := h.Netns(w.ctx, fmt.Sprintf("liar%d", i))
				w.try(err)
				attached := make(chan struct{})
				var liar sync.WaitGroup
				liar.Go(func() {
					var f *lab.Frames
					for ctx.Err() == nil && f == nil {
						f, _ = c.OpenFrames("ethmesh")
					}
					if f == nil {
						return
					}
					defer f.Close()
					lie := tagged(ether(bytes.Repeat([]byte{0xff}, 6), []byte{2, 0, 0, 0, 0, 9}, 0x88b5), []byte("@@lie@@"))
					var until time.Time
					for ctx.Err() == nil && (until.IsZero() || time.Now().Before(until)) {
						select {
						case <-attached:
							if until.IsZero() {
								until = time.Now().Add(100 * time.Millisecond)
							}
						default:
						}
						if f.Send(lie) == nil {
							sent++
						}
					}
				})
				_, err = c.Attach(w.ctx, fmt.Sprintf("10.2.1.%d/24", i+2))
				close(attached)
				liar.Wait()
				w.try(err)
				w.try(c.Remove(w.ctx))
			}
			if n := seen()["lie"]; n > 0 || sent < 100 {
				t.Errorf("%d of %d frames in another's name arrived, want none of hundreds", n, sent)
			}
		})
	}
}

// TestContainersPretend is L1, L2, L3, L7 and L9: a container with every capability in its namespace, or in the long run
// eight on four hosts at a time, speak in others' names, as a router, a switch and a DHCP server, and to other subnets, on each
// kind of path. Where nftables stands in for the kernel path it keeps containers to their own names, but neither keeps subnets
// apart from somebody who leaves IP aside or is on the same bridge, nor limits broadcasts: ARCHITECTURE.md says so.
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
			w := newWorld(t, scaled(2, 4), scaled(time.Minute, 10*time.Minute))
			for i, h := range w.Hosts {
				options := x.options[:len(x.options):len(x.options)]
				if i > 0 {
					options = append(options, w.Host(1).Addr.String())
				}
				w.launchWith(h, x.env, options...)
			}
			c := w.cast(scaled(1, 8), scaled(2, 8), scaled(2, 4))
			for i, v := range c.victims {
				for _, m := range slices.Concat(c.attackers, c.victims[:i]) {
					_, err := m.WaitPing(w.ctx, v.addr, 10*time.Second)
					w.try(err)
				}
				// One who would believe a router.
				_, err := v.Out(w.ctx, "/bin/sh", "-c", "echo 2 > /proc/sys/net/ipv6/conf/ethmesh/accept_ra; echo 1 > /proc/sys/net/ipv4/conf/ethmesh/arp_accept")
				w.try(err)
			}
			believed := func() string {
				out := ""
				for _, m := range c.victims {
					o, err := m.Out(w.ctx, "/bin/sh", "-c", "ip neigh show dev ethmesh | sed 's/ [A-Z]* *$//; s/ router//' | sort; ip -6 route show; ip -4 route show")
					w.try(err)
					out += o + "\n"
				}
				return out
			}
			before := believed()

			const repeats = 3
			observers, subnet := map[string]func() map[string]int{}, map[string]int{}
			limit := scaled(4*time.Second, 12*time.Second)
			for i, group := range [][]*member{c.victims, c.strangers} {
				for _, m := range group {
					observers[m.Name], subnet[m.Name] = w.observe(m.Container, "ethmesh", limit), i+1
				}
			}
			for _, h := range w.Hosts {
				self, err := h.Self()
				w.try(err)
				observers[h.Name] = w.observe(self, "mesh", limit)
			}
			var all []forgery
			var sending sync.WaitGroup
			for _, a := range c.attackers {
				f, err := a.OpenFrames("ethmesh")
				w.try(err)
				defer f.Close()
				c.frames[a] = f
				own := c.forgeries(a)
				all = append(all, own...)
				sending.Go(func() {
					for range repeats {
						w.pace(len(own), 1000, func(i int) { // broadcasts are limited
							if err := f.Send(own[i].frame); err != nil {
								t.Errorf("%s: %v", own[i].name, err)
							}
						})
					}
				})
			}
			sending.Wait()
			seen := map[string]map[string]int{}
			for name, wait := range observers {
				seen[name] = wait()
			}
			for _, f := range all {
				for _, name := range slices.Sorted(maps.Keys(seen)) {
					n := seen[name][f.name]
					to := f.name[strings.IndexByte(f.name, '>')+1:]
					switch apart := subnet[name] == 2; {
					case f.fine && (to == name || to == "all" && subnet[name] == 1) && n < repeats-1:
						t.Errorf("%s was seen %d times at %s: the test shows nothing", f.name, n, name)
					case !f.fine && !f.apart && n > 0, (f.fine || f.apart) && apart && inKernel && n > 0:
						t.Errorf("%s reached %s %d times", f.name, name, n)
					}
				}
			}
			if after := believed(); after != before {
				t.Errorf("neighbours and routes of the victims were\n%s\nand are\n%s", before, after)
			}
			t.Logf("%d kinds of frames from %d containers, %d times each", len(all), len(c.attackers), repeats)
			if inKernel {
				w.accused(c)
			}
			w.spoof(c, inKernel)
			w.flood(c, inKernel, x.name == "Kernel")
		})
	}
}

// accused wants everything that the attackers did to be counted, and nobody but them to be named.
func (w *world) accused(c *cast) {
	w.t.Helper()
	here := map[*lab.Host]int{}
	for _, a := range c.attackers {
		here[a.Host]++
		caught := map[string]uint64{}
		r, err := a.Host.Report(w.ctx)
		w.try(err)
		for _, reason := range []string{"arp", "dhcp", "isolated", "link_control", "neighbour", "redirect", "router",
			"source_ip4", "source_ip6", "source_mac", "vlan"} {
			if r.Router.Drops["kernel_"+reason] == 0 {
				w.t.Errorf("%s: nothing is counted as %s: %v", a.Host.Name, reason, r.Router.Drops)
			}
		}
		for _, o := range r.Router.Offences {
			if o.Mac == net.HardwareAddr(c.macs[a]).String() {
				caught[o.Reason] += o.Frames
			}
			if !slices.ContainsFunc(c.attackers, func(a *member) bool { return o.Mac == net.HardwareAddr(c.macs[a]).String() }) {
				w.t.Errorf("an innocent container was caught: %+v", o)
			}
		}
		if caught["arp"] == 0 || caught["source_ip4"] == 0 {
			w.t.Errorf("%s was caught at %v only", a.Name, caught)
		}
	}
	for _, h := range w.Hosts {
		if out, err := h.Must(w.ctx, "status"); err != nil || strings.Count(out, "Caught: ") != here[h] {
			w.t.Errorf("%s: the status does not name the %d that pretend: %v\n%s", h.Name, here[h], err, out)
		}
	}
}

// spoof is L1: 1,000 times a second, for a second or in the long run a minute, each attacker says of neighbours and of the
// gateway that they are where it is, by ARP and ND, to one victim and to all. The victims' tables are looked at all the
// while.
func (w *world) spoof(c *cast, counted bool) {
	w.t.Helper()
	h1 := w.Host(1)
	_, err := h1.Must(w.ctx, "expose", "10.2.1.254/24")
	w.try(err)
	bridge, err := h1.ReadFile("/sys/class/net/mesh/address")
	w.try(err)
	at, err := net.ParseMAC(strings.TrimSpace(string(bridge)))
	w.try(err)
	gateway := &member{addr: netip.MustParseAddr("10.2.1.254")}
	c.macs[gateway] = at
	defer delete(c.macs, gateway)
	owner := map[string]string{} // of addresses: the only MAC that may be theirs
	for m, mac := range c.macs {
		owner[m.addr.String()], owner[linkLocal(mac).String()] = net.HardwareAddr(mac).String(), net.HardwareAddr(mac).String()
	}
	for i, v := range c.victims {
		_, err := v.WaitPing(w.ctx, gateway.addr, 5*time.Second)
		w.try(err)
		w.pings(v, c.victims[(i+1)%len(c.victims)], 1, 56)
	}
	caught := func(a *member) (n uint64) {
		r, err := a.Host.Report(w.ctx)
		w.try(err)
		for _, o := range r.Router.Offences {
			if (o.Reason == "arp" || o.Reason == "neighbour") && o.Mac == net.HardwareAddr(c.macs[a]).String() {
				n += o.Frames
			}
		}
		return n
	}
	length := scaled(time.Second, time.Minute)
	before, count := make([]uint64, len(c.attackers)), int(length.Milliseconds())
	var lying sync.WaitGroup
	for i, a := range c.attackers {
		before[i] = caught(a)
		own, own6 := c.macs[a], linkLocal(c.macs[a])
		var lies [][]byte
		for _, victim := range c.victims {
			for _, of := range append(c.victims[:len(c.victims):len(c.victims)], gateway) {
				if of == victim {
					continue
				}
				mac := c.macs[victim]
				for _, dst := range [][]byte{mac, bytes.Repeat([]byte{0xff}, 6)} {
					lies = append(lies, ether(dst, own, 0x806, arp(2, own, of.addr, mac, victim.addr)...),
						ether(dst, own, 0x806, arp(1, own, of.addr, make([]byte, 6), of.addr)...))
				}
				target := linkLocal(c.macs[of])
				lies = append(lies, ether(mac, own, 0x86dd, ip6(own6, linkLocal(mac), 58,
					icmp6(own6, linkLocal(mac), 136, slices.Concat([]byte{0x20, 0, 0, 0}, target.AsSlice(), []byte{2, 1}, own)...))...))
			}
		}
		lying.Go(func() {
			w.pace(count, 1000, func(n int) { _ = c.frames[a].Send(lies[n%len(lies)]) })
		})
	}
	done := make(chan struct{})
	go func() { lying.Wait(); close(done) }()
	looks := 0
	look := func() {
		for _, victim := range c.victims {
			out, err := victim.Out(w.ctx, "ip", "neigh", "show", "dev", "ethmesh")
			w.try(err)
			for line := range strings.Lines(out) {
				f := strings.Fields(line)
				at := slices.Index(f, "lladdr")
				if at < 1 || at+1 == len(f) {
					continue
				}
				want, known := owner[f[0]]
				if lies := slices.ContainsFunc(c.attackers, func(a *member) bool { return net.HardwareAddr(c.macs[a]).String() == f[at+1] }); known && f[at+1] != want || !known && lies {
					w.t.Errorf("%s believes: %s", victim.Name, line)
				}
			}
		}
		looks++
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
	for i, a := range c.attackers {
		n := caught(a) - before[i]
		w.t.Logf("%s: %d lies about neighbours in %v, %d counted; %d looks at the victims' tables", a.Name, count, length, n, looks)
		if counted && n < uint64(count) {
			w.t.Errorf("of %d lies %d are on the account of %s", count, n, a.Name)
		}
	}
	_, err = h1.Must(w.ctx, "hide", "10.2.1.254/24")
	w.try(err)
}

// flood is L5, L6 and L9: many MACs, many broadcasts, and frames of all sizes. apart says that frames between others do not go
// through meshd's queues.
func (w *world) flood(c *cast, limited, apart bool) {
	w.t.Helper()
	pids := map[*lab.Host]int{}
	for _, h := range w.Hosts {
		pids[h] = h.Meshd()
	}
	next := func(i int) *member { return c.victims[(i+1)%len(c.victims)] }
	others := make([]*watched, len(c.victims))
	for i, v := range c.victims {
		others[i] = w.watch(v, next(i), 2*time.Millisecond)
	}
	var makers []maker
	for i, a := range c.attackers {
		makers = append(makers, maker{c.frames[a], a.addr, next(i)})
	}
	w.madeUp(makers, scaled(20_000, 1_000_000), 1<<30, 2)

	// All at a time they share the processors, so that none comes to its limit, and each alone comes far beyond.
	w.storm(c, limited, c.attackers...)
	if len(c.attackers) > 1 {
		for _, a := range c.attackers {
			w.storm(c, limited, a)
		}
	}
	for _, o := range others {
		o.stop() // all wait for stragglers at a time
	}
	for i, o := range others {
		r := w.end(o)
		w.t.Logf("meanwhile from %s to %s: %v", c.victims[i].Name, next(i).Name, r)
		if limited && r.Lost > r.Sent/10 || r.Duplicated > 0 {
			w.t.Errorf("the others kept %d of %d", r.Received, r.Sent)
		}
	}
	w.strays(c, apart)
	for i, a := range c.attackers {
		f, victim := c.frames[a], c.macs[next(i)]
		_, _ = a.Out(w.ctx, "ip", "link", "set", "ethmesh", "mtu", "65535")
		for n := 14; n < 65535; n += 1 + n/9 {
			for _, kind := range []uint16{0x800, 0x86dd, 0x806, 0x9999, 20} {
				_ = f.Send(ether(victim, f.MAC, kind, make([]byte, n-14)...))
				_ = f.Send(ether(victim, f.MAC, kind, bytes.Repeat([]byte{0xff}, n-14)...))
			}
		}
	}
	for _, h := range w.Hosts {
		if h.Meshd() != pids[h] {
			w.t.Errorf("meshd on %s did not survive", h.Name)
		}
	}
	v1, v2 := c.victims[0], c.victims[1]
	_, err := v1.WaitPing(w.ctx, v2.addr, 5*time.Second) // what was queued is gone
	w.try(err)
	w.pings(v1, v2, 5, 56)
	w.pings(v2, v1, 5, 5000)
}

// storm has containers broadcast as fast as they can for a second.
func (w *world) storm(c *cast, limited bool, from ...*member) {
	w.t.Helper()
	const text = "storm-of-broadcasts"
	arrived := make([]int, len(c.victims))
	var counting, storming sync.WaitGroup
	for i, v := range c.victims {
		f, err := v.OpenFrames("ethmesh")
		w.try(err)
		defer f.Close()
		counting.Go(func() {
			arrived[i] = f.Collect(1500*time.Millisecond, func(frame []byte) bool { return bytes.Contains(frame, []byte(text)) })
		})
	}
	var sent atomic.Int64
	for _, a := range from {
		f := c.frames[a]
		storm := ether(bytes.Repeat([]byte{0xff}, 6), f.MAC, 0x800, ip4(a.addr, netip.MustParseAddr("10.2.1.255"), 17, udp(9, 9, []byte(text)))...)
		storming.Go(func() {
			for end := time.Now().Add(time.Second); time.Now().Before(end); sent.Add(1) {
				_ = f.Send(storm)
			}
		})
	}
	storming.Wait()
	counting.Wait()
	w.t.Logf("%d broadcasts in a second from %d containers, %d arrived at each victim", sent.Load(), len(from), arrived)
	if most := 8000 * len(from); limited && slices.Max(arrived) > most { // 2,000 a second from each after the first 4,000
		w.t.Errorf("of %d broadcasts %d arrived: not limited", sent.Load(), slices.Max(arrived))
	}
}

// strays has each attacker in turn send to addresses that nobody has, as fast as it can. Its host passes them on
// to each of the others no faster than broadcasts. Who shares meshd's queues with them on that host may wait and lose.
func (w *world) strays(c *cast, apart bool) {
	w.t.Helper()
	length := scaled(300*time.Millisecond, time.Second)
	for i, a := range c.attackers {
		from, to := c.victims[i], c.victims[(i+1)%len(c.victims)]
		other := w.watch(from, to, 2*time.Millisecond)
		const text = "nobody-is-there"
		arrived := map[string]int{}
		var mu sync.Mutex
		var counting sync.WaitGroup
		for _, h := range w.Hosts {
			if h == a.Host {
				continue
			}
			f, err := h.OpenFrames("mesh-tap")
			w.try(err)
			defer f.Close()
			counting.Go(func() {
				n := f.Collect(length+300*time.Millisecond, func(frame []byte) bool { return bytes.Contains(frame, []byte(text)) })
				mu.Lock()
				defer mu.Unlock()
				arrived[h.Name] = n
			})
		}
		f, sent := c.frames[a], 0
		frame := ether([]byte{2, 0xf1, 0, 0, 0, 0}, f.MAC, 0x800, ip4(a.addr, netip.MustParseAddr("10.2.1.99"), 17, udp(9, 9, []byte(text)))...)
		for end := time.Now().Add(length); time.Now().Before(end); sent++ {
			binary.BigEndian.PutUint32(frame[2:], uint32(sent))
			_ = f.Send(frame)
		}
		other.stop()
		counting.Wait()
		r := w.end(other)
		w.t.Logf("%d frames to unknown addresses in %v from %s, arrived: %v; meanwhile from %s to %s: %v", sent, length, a.Name, arrived, from.Name, to.Name, r)
		if apart && r.Lost > r.Sent/10 || r.Duplicated > 0 {
			w.t.Errorf("the others kept %d of %d", r.Received, r.Sent)
		}
		for h, n := range arrived {
			if n > 8000 || n == 0 { // 2,000 a second after the first 4,000
				w.t.Errorf("of %d frames to unknown addresses %d arrived at %s", sent, n, h)
			}
		}
	}
}
