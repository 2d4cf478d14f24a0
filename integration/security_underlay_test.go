package integration

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"meshd/integration/lab"
)

// raw sends IPv4 packets with whatever source address from a host or container.
type raw struct{ fd int }

func openRaw(do func(func() error) error) (r raw, err error) {
	err = do(func() (err error) {
		r.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	return r, err
}

func (r raw) send(packet []byte) error {
	return unix.Sendto(r.fd, packet, 0, &unix.SockaddrInet4{Addr: [4]byte(packet[16:20])})
}

func (r raw) close() { _ = unix.Close(r.fd) }

// vxlan is the datagram by which one peer sends a frame to another on the kernel path.
func vxlan(from, to netip.Addr, flags byte, source, destination uint32, frame []byte) []byte {
	h := []byte{flags, 0, 0, 0, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(h[4:], (source<<12|destination)<<8)
	return ip4(from, to, 17, udp(40000, 6784, append(h, frame...)))
}

// shortID gives the number that a host has in the ids of the kernel path.
func (w *world) shortID(h *lab.Host) uint32 {
	w.t.Helper()
	body, err := h.Get(w.ctx, "/report")
	w.try(err)
	var r struct {
		Router struct {
			Name  string
			Peers []struct {
				Name    string
				ShortID uint32
			}
		}
	}
	w.try(json.Unmarshal(body, &r))
	for _, p := range r.Router.Peers {
		if p.Name == r.Router.Name {
			return p.ShortID
		}
	}
	w.t.Fatalf("%s does not tell its short id: %s", h.Name, body)
	return 0
}

// counter counts the frames with a text that reach a container.
func (w *world) counter(c *member, text string) *atomic.Uint64 {
	w.t.Helper()
	f, err := c.OpenFrames("ethmesh")
	w.try(err)
	n := &atomic.Uint64{}
	ctx, cancel := context.WithCancel(w.ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer f.Close()
		for ctx.Err() == nil {
			f.Collect(100*time.Millisecond, func(frame []byte) bool {
				if bytes.Contains(frame, []byte(text)) {
					n.Add(1)
				}
				return true
			})
		}
	}()
	w.t.Cleanup(func() { cancel(); <-done })
	return n
}

// dockerLike gives a container a second interface, behind a bridge docker0 whose traffic is masqueraded as
// Docker does it.
func (w *world) dockerLike(h *lab.Host, c *member) {
	w.t.Helper()
	_, err := h.Out(w.ctx, "/bin/sh", "-ec", `
ip link add docker0 up type bridge
ip addr add 172.17.0.1/16 dev docker0
ip link add dock0 type veth peer name eth0 netns `+c.Name+`
ip link set dock0 master docker0 up
echo 1 > /proc/sys/net/ipv4/ip_forward
nft 'table ip likedocker { chain post { type nat hook postrouting priority 100; ip saddr 172.17.0.0/16 oifname != "docker0" masquerade; }; }'`)
	w.try(err)
	w.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_, _ = h.Out(ctx, "/bin/sh", "-c", "ip link del docker0; ip link del dock0; nft delete table ip likedocker; echo 0 > /proc/sys/net/ipv4/ip_forward")
	})
	_, err = c.Out(w.ctx, "/bin/sh", "-ec", "ip addr add 172.17.0.2/16 dev eth0; ip link set eth0 up; ip route add default via 172.17.0.1")
	w.try(err)
}

// TestForgedVXLAN is V1 to V4: datagrams of the kernel path from a neighbour on the underlay, under its own
// and under a peer's address, and from a container that is root.
func TestForgedVXLAN(t *testing.T) {
	for _, x := range []struct {
		name string
		env  []string
	}{{"Open", nil}, {"Sealed", []string{"MESH_PASSWORD=" + secret}}} {
		t.Run(x.name, func(t *testing.T) {
			w := newWorld(t, 3, 60*time.Second)
			h1, h2, h3 := w.Host(1), w.Host(2), w.Host(3)
			w.launchWith(h1, x.env)
			w.launchWith(h2, x.env, h1.Addr.String())
			c1, c2 := w.netns(h1, "c1", "10.2.1.1/24"), w.netns(h2, "c2", "10.2.1.2/24")
			also := w.netns(h2, "also", "10.2.1.3/24")
			w.dockerLike(h1, c1)
			_, err := c1.WaitPing(w.ctx, c2.addr, 10*time.Second)
			w.try(err)
			if x.env == nil {
				w.waitOverlay(h1, h2, "kernel", 15*time.Second)
			}
			w.rest(3 * time.Second) // what is new is told to all, docker0 to the firewall
			id1, id2 := w.shortID(h1), w.shortID(h2)
			m1, m2, mAlso := w.mac(c1), w.mac(c2), w.mac(also)
			const text = "forged-vxlan-datagram"
			arrived := w.counter(c2, text)
			frame := func(dst, src []byte) []byte {
				return ether(dst, src, 0x800, ip4(c1.addr, c2.addr, 17, udp(9, 9, []byte(text)))...)
			}
			good := frame(m2, m1)
			stranger, err := openRaw(h3.Do)
			w.try(err)
			defer stranger.close()
			inside, err := openRaw(c1.Do)
			w.try(err)
			defer inside.close()
			docked := netip.MustParseAddr("172.17.0.2")
			const count = 50
			for _, v := range []struct {
				what   string
				by     raw
				packet []byte
				passes bool
			}{
				{"V1, stranger's address", stranger, vxlan(h3.Addr, h2.Addr, 8, id1, id2, good), false},
				{"V2, container to another host", inside, vxlan(docked, h2.Addr, 8, id1, id2, good), false},
				{"V2, container to its host, as a peer", inside, vxlan(h2.Addr, h1.Addr, 8, id2, id1, good), false},
				{"V2, container to its host's bridge", inside, vxlan(docked, netip.MustParseAddr("172.17.0.1"), 8, id2, id1, good), false},
				{"V2, container to another host, as the peer", inside, vxlan(h1.Addr, h2.Addr, 8, id1, id2, good), false},
				{"V4, source id of nobody", stranger, vxlan(h1.Addr, h2.Addr, 8, id1^0x111, id2, good), false},
				{"V4, source id of the receiver", stranger, vxlan(h1.Addr, h2.Addr, 8, id2, id2, good), false},
				{"V4, source id 0", stranger, vxlan(h1.Addr, h2.Addr, 8, 0, id2, good), false},
				{"V4, destination id of nobody", stranger, vxlan(h1.Addr, h2.Addr, 8, id1, id2^0x111, good), false},
				{"V4, reserved flags", stranger, vxlan(h1.Addr, h2.Addr, 0xff, id1, id2, good), false},
				{"V4, no id flag", stranger, vxlan(h1.Addr, h2.Addr, 0, id1, id2, good), false},
				{"V4, MAC of a local container", stranger, vxlan(h1.Addr, h2.Addr, 8, id1, id2, frame(m2, mAlso)), false},
				{"V4, MAC of the receiver", stranger, vxlan(h1.Addr, h2.Addr, 8, id1, id2, frame(m2, m2)), false},
				{"V4, unknown MAC", stranger, vxlan(h1.Addr, h2.Addr, 8, id1, id2, frame(m2, []byte{2, 1, 2, 3, 4, 5})), false},
				{"V4, broadcast", stranger, vxlan(h1.Addr, h2.Addr, 8, id1, id2, frame(bytes.Repeat([]byte{255}, 6), m1)), false},
				{"V4, nested", stranger, vxlan(h1.Addr, h2.Addr, 8, id1, id2,
					ether(m2, []byte{2, 1, 2, 3, 4, 5}, 0x800, vxlan(h1.Addr, h2.Addr, 8, id1, id2, good)...)), false},
				{"V4, cut short", stranger, vxlan(h1.Addr, h2.Addr, 8, id1, id2, good[:10]), false},
				{"V4, empty", stranger, vxlan(h1.Addr, h2.Addr, 8, id1, id2, nil), false},
				// Without a password nothing else tells a datagram from the peer's own: ARCHITECTURE.md says so.
				{"V3, all as the peer's", stranger, vxlan(h1.Addr, h2.Addr, 8, id1, id2, good), x.env == nil},
			} {
				before, drops := arrived.Load(), w.dropped(h2)
				for range count {
					_ = v.by.send(v.packet) // a container may be refused
				}
				w.rest(150 * time.Millisecond)
				got := arrived.Load() - before
				t.Logf("%s: %d delivered, %d counted as dropped", v.what, got, w.dropped(h2)-drops)
				if got > 0 != v.passes {
					t.Errorf("%s: %d of %d delivered", v.what, got, count)
				}
				if v.what[:2] == "V1" && x.env == nil && w.dropped(h2)-drops < count {
					t.Errorf("%s: only %d of %d are counted", v.what, w.dropped(h2)-drops, count)
				}
			}
			w.pings(c1, c2, 5, 56)
		})
	}
}

// TestReplay is C1: datagrams of a sealed session are recorded and sent again, by their sender's address and
// another one, at once, after a change of keys and after a restart.
func TestReplay(t *testing.T) {
	w := newWorld(t, 3, 80*time.Second)
	h1, h2, h3 := w.Host(1), w.Host(2), w.Host(3)
	password := []string{"MESH_PASSWORD=" + secret}
	w.launchWith(h1, password)
	recorded := [][]byte{}
	tap, err := h2.OpenFrames("eth0")
	w.try(err)
	defer tap.Close()
	w.launchWith(h2, password, h1.Addr.String())
	c1, c2 := w.netns(h1, "c1", "10.2.1.1/24"), w.netns(h2, "c2", "10.2.1.2/24")
	_, err = c1.WaitPing(w.ctx, c2.addr, 10*time.Second)
	w.try(err)
	const text = "datagram-to-be-replayed"
	arrived := w.counter(c2, text)
	conn, err := c1.ListenUDP(w.ctx, netip.AddrPortFrom(c1.addr, 0).String())
	w.try(err)
	defer conn.Close()
	count := scaled(5000, 50000)
	done := make(chan struct{})
	go func() {
		defer close(done)
		pace := time.NewTicker(time.Millisecond)
		defer pace.Stop()
		for i := range count {
			_, _ = conn.WriteToUDPAddrPort(append([]byte(text), make([]byte, 100)...), netip.AddrPortFrom(c2.addr, 9))
			if i%50 == 49 {
				<-pace.C
			}
		}
	}()
	kinds := map[byte]int{}
	tap.Collect(2*time.Second, func(frame []byte) bool {
		ours := len(frame) > 42 && frame[12] == 8 && frame[13] == 0 && frame[14] == 0x45 && frame[23] == 17 &&
			netip.AddrFrom4([4]byte(frame[26:30])) == h1.Addr && binary.BigEndian.Uint16(frame[36:]) == 6783
		if ours {
			kinds[frame[42]]++
			recorded = append(recorded, bytes.Clone(frame[14:]))
		}
		return ours
	})
	<-done
	w.rest(300 * time.Millisecond)
	t.Logf("recorded %d datagrams, by type %v; %d frames arrived", len(recorded), kinds, arrived.Load())
	if kinds[0x10] < count/100 || arrived.Load() == 0 {
		t.Fatal("there is nothing to replay")
	}
	attacker, err := openRaw(h3.Do)
	w.try(err)
	defer attacker.close()
	replay := func(when string) {
		before := arrived.Load()
		sent, dropsBefore := 0, w.dropped(h2)
		for _, spoofed := range []bool{true, false} {
			for i, p := range recorded {
				p = bytes.Clone(p)
				if !spoofed {
					a := h3.Addr.As4()
					copy(p[12:], a[:])
				}
				p[26], p[27] = 0, 0 // without the UDP checksum, which covers the address
				if attacker.send(p) == nil {
					sent++
				}
				if i%100 == 99 {
					w.rest(time.Millisecond)
				}
			}
		}
		w.rest(300 * time.Millisecond)
		t.Logf("%s: %d replayed, %d frames delivered, %d dropped", when, sent, arrived.Load()-before, w.dropped(h2)-dropsBefore)
		if got := arrived.Load() - before; got > 0 || sent == 0 {
			t.Errorf("%s: %d of %d replayed datagrams delivered frames", when, got, sent)
		}
		w.pings(c1, c2, 20, 56) // and they have not moved the link elsewhere
		w.pings(c2, c1, 20, 56)
	}
	replay("at once")
	w.changePassword("second-"+secret, h1, h2)
	replay("after a change of keys")
	w.gone(h2, 9)
	w.launchWith(h2, []string{"MESH_PASSWORD=second-" + secret}, h1.Addr.String())
	_, err = c1.WaitPing(w.ctx, c2.addr, 10*time.Second)
	w.try(err)
	replay("after a restart")
	if got := h1.Established(w.ctx)["h2"].Address; got != netip.AddrPortFrom(h2.Addr, 6783).String() {
		t.Errorf("h1 now sends to %s", got)
	}
}

// TestHandshakeFlood is C4: first messages of handshakes from made-up addresses, half of them garbage and half
// recorded from a true peer, while that peer joins; once, or a hundred times in the long run, where one join in a
// hundred may take longer.
func TestHandshakeFlood(t *testing.T) {
	runs := scaled(1, 100)
	w := newWorld(t, 3, time.Duration(runs)*10*time.Second+50*time.Second)
	h1, h2, h3 := w.Host(1), w.Host(2), w.Host(3)
	password := []string{"MESH_PASSWORD=" + secret}
	w.launchWith(h1, password)
	tap, err := h1.OpenFrames("eth0")
	w.try(err)
	defer tap.Close()
	w.launchWith(h2, password, h1.Addr.String())
	_, err = lab.WaitMesh(w.ctx, 10*time.Second, h1, h2)
	w.try(err)
	var hello []byte
	tap.Collect(time.Second, func(frame []byte) bool {
		if len(frame) > 42+92-1 && frame[23] == 17 && frame[42] == 1 && binary.BigEndian.Uint16(frame[36:]) == 6783 &&
			netip.AddrFrom4([4]byte(frame[26:30])) == h2.Addr && hello == nil {
			hello = bytes.Clone(frame[14:])
		}
		return hello != nil
	})
	if hello == nil {
		t.Fatal("no first message of a handshake was seen")
	}
	w.gone(h2, 9)
	attacker, err := openRaw(h3.Do)
	w.try(err)
	defer attacker.close()
	ctx, cancel := context.WithCancel(w.ctx)
	defer cancel()
	var sent atomic.Uint64
	done := make(chan struct{})
	go func() {
		defer close(done)
		p := bytes.Clone(hello)
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for i := uint32(0); ctx.Err() == nil; {
			<-tick.C
			for range 120 { // 60,000 a second, of which 50,000 come about
				i++
				copy(p, hello)
				binary.BigEndian.PutUint32(p[12:], 0x2c000000|i*2654435761>>8) // 44.0.0.0/8 and above
				p[26], p[27] = 0, 0
				if i%2 == 0 {
					p[40] ^= byte(i)
				}
				if attacker.send(p) == nil {
					sent.Add(1)
				}
			}
		}
	}()
	start, busy := time.Now(), w.usage(h1).cpu
	var took []time.Duration
	for run := range runs {
		if run > 0 {
			w.gone(h2, 9)
		}
		w.launchWith(h2, password, h1.Addr.String())
		launched := time.Now()
		_, err = lab.WaitMesh(w.ctx, 20*time.Second, h1, h2)
		w.try(err)
		took = append(took, time.Since(launched))
	}
	rate := float64(sent.Load()) / time.Since(start).Seconds()
	cores := (w.usage(h1).cpu - busy).Seconds() / time.Since(start).Seconds()
	cancel()
	<-done
	slices.Sort(took)
	at := func(percent int) time.Duration { return took[(runs-1)*percent/100].Round(time.Millisecond) }
	t.Logf("%.0f handshakes a second; %d joins, after %v at best, %v, %v, %v and %v in 50, 90, 99 and all of a hundred",
		rate, runs, at(0), at(50), at(90), at(99), at(100))
	t.Logf("meanwhile meshd took %.2f cores", cores)
	if cores >= 1 {
		t.Errorf("the flood costs %.2f cores", cores)
	}
	w.within("join during the flood", took[runs-1-runs/100], 5*time.Second)
	r, err := h1.Report(w.ctx)
	w.try(err)
	t.Log("dropped: ", r.Router.Drops)
	if n := len(r.Router.Connections); n > 20 {
		t.Errorf("the flood left %d connections", n)
	}
}
