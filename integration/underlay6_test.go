package integration

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"meshd/integration/lab"
)

// openRaw6 is openRaw for IPv6: header and source address are the sender's own.
func openRaw6(do func(func() error) error) (r raw, err error) {
	err = do(func() (err error) {
		r.fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	return r, err
}

func (r raw) send6(packet []byte) error {
	return unix.Sendto(r.fd, packet, 0, &unix.SockaddrInet6{Addr: [16]byte(packet[24:40])})
}

// vxlan6 is vxlan on an IPv6 underlay, where UDP must have its checksum.
func vxlan6(from, to netip.Addr, source, destination uint32, frame []byte) []byte {
	h := []byte{8, 0, 0, 0, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(h[4:], (source<<12|destination)<<8)
	u := udp(40000, 6784, append(h, frame...))
	sum := checksum(from.AsSlice(), to.AsSlice(), binary.BigEndian.AppendUint32(nil, uint32(len(u))), []byte{0, 0, 0, 17}, u)
	binary.BigEndian.PutUint16(u[6:], sum)
	return ip6(from, to, 17, u)
}

// TestIPv6Underlay is a mesh of hosts that have no IPv4 address: joining, traffic by both paths, relaying, and V1,
// V3 and V4 against the kernel path.
func TestIPv6Underlay(t *testing.T) {
	for _, x := range []struct {
		name string
		env  []string
	}{{"Open", nil}, {"Sealed", []string{"MESH_PASSWORD=" + secret}}} {
		t.Run(x.name, func(t *testing.T) {
			w := newWorld(t, 3, 80*time.Second)
			h1, h2, h3 := w.Host(1), w.Host(2), w.Host(3)
			for i, h := range w.Hosts {
				_, err := h.Out(w.ctx, "ip", "-4", "addr", "flush", "dev", "eth0")
				w.try(err)
				if i == 0 {
					w.launchWith(h, x.env)
				} else {
					w.launchWith(h, x.env, h1.Addr6.String())
				}
			}
			took, err := lab.WaitMesh(w.ctx, 15*time.Second, w.Hosts...)
			w.try(err)
			w.within("join", took, 5*time.Second)
			for peer, link := range h1.Established(w.ctx) {
				if a, err := netip.ParseAddrPort(link.Address); err != nil || !a.Addr().Is6() {
					t.Errorf("the link to %s is by %s", peer, link.Address)
				}
			}
			c1, c2 := w.netns(h1, "c1", "10.2.1.1/24"), w.netns(h2, "c2", "10.2.1.2/24")
			also := w.netns(h2, "also", "10.2.1.3/24")
			_, err = c1.WaitPing(w.ctx, c2.addr, 10*time.Second)
			w.try(err)
			if x.env == nil {
				w.waitOverlay(h1, h2, "kernel", 15*time.Second)
			}
			w.pings(c1, c2, 10, 56)
			w.pings(c2, c1, 10, 5000)
			if moved := w.stream(c1, c2, 20<<20, 20*time.Second); moved.Bytes != 20<<20 {
				t.Errorf("%d bytes arrived", moved.Bytes)
			}

			w.rest(2 * time.Second)
			id1, id2 := w.shortID(h1), w.shortID(h2)
			m1, m2, mAlso := w.mac(c1), w.mac(c2), w.mac(also)
			const text = "forged-vxlan-datagram"
			arrived := w.counter(c2, text)
			frame := func(dst, src []byte) []byte {
				return ether(dst, src, 0x800, ip4(c1.addr, c2.addr, 17, udp(9, 9, []byte(text)))...)
			}
			stranger, err := openRaw6(h3.Do)
			w.try(err)
			defer stranger.close()
			const count = 50
			for _, v := range []struct {
				what   string
				packet []byte
				passes bool
			}{
				{"V1, address of nobody", vxlan6(netip.MustParseAddr("fd98:3::66"), h2.Addr6, id1, id2, frame(m2, m1)), false},
				// Not even this leaves h3, whose kernel path did not send it.
				{"V1, another peer's address", vxlan6(h3.Addr6, h2.Addr6, id1, id2, frame(m2, m1)), false},
				{"V4, source id of nobody", vxlan6(h1.Addr6, h2.Addr6, id1^0x111, id2, frame(m2, m1)), false},
				{"V4, destination id of nobody", vxlan6(h1.Addr6, h2.Addr6, id1, id2^0x111, frame(m2, m1)), false},
				{"V4, MAC of a local container", vxlan6(h1.Addr6, h2.Addr6, id1, id2, frame(m2, mAlso)), false},
				{"V4, unknown MAC", vxlan6(h1.Addr6, h2.Addr6, id1, id2, frame(m2, []byte{2, 1, 2, 3, 4, 5})), false},
				// Without a password nothing else tells a datagram from the peer's own: ARCHITECTURE.md says so.
				{"V3, all as the peer's", vxlan6(h1.Addr6, h2.Addr6, id1, id2, frame(m2, m1)), x.env == nil},
			} {
				before, drops, sent := arrived.Load(), w.dropped(h2), uint64(0)
				for range count {
					if stranger.send6(v.packet) == nil {
						sent++
					}
				}
				w.rest(150 * time.Millisecond)
				got := arrived.Load() - before
				t.Logf("%s: %d delivered, %d counted as dropped", v.what, got, w.dropped(h2)-drops)
				if got > 0 != v.passes {
					t.Errorf("%s: %d of %d delivered", v.what, got, count)
				}
				if !v.passes && x.env == nil && w.dropped(h2)-drops < sent {
					t.Errorf("%s: only %d of %d are counted", v.what, w.dropped(h2)-drops, sent)
				}
			}

			w.try(w.Cut(w.ctx, h1, h2))
			start := time.Now()
			w.waitRoute(h1, h2, h3, 15*time.Second)
			w.waitRoute(h2, h1, h3, 15*time.Second)
			_, err = c1.WaitPing(w.ctx, c2.addr, 5*time.Second)
			w.try(err)
			t.Log(fmt.Sprint("relayed after ", time.Since(start).Round(time.Millisecond)))
			w.pings(c1, c2, 10, 5000)
			w.try(w.HealAll(w.ctx))
			w.waitRoute(h1, h2, h2, 15*time.Second)
			w.pings(c2, c1, 10, 56)
		})
	}
}
