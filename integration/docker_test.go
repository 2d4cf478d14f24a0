package integration

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"meshd/integration/lab"
	"meshd/integration/lab/probe"
)

// TestDockerHosts is the main job: containers of two real dockerds on one Ethernet.
func TestDockerHosts(t *testing.T) {
	limit := 2 * time.Minute
	if long() {
		limit = 15 * time.Minute
	}
	w := newWorld(t, 2, limit)
	h1, h2 := w.Host(1), w.Host(2)
	w.docker(h1, h2)
	w.launch(h1)
	w.launch(h2)
	c1 := w.container(h1, "c1", "10.2.1.1/24")
	c2 := w.container(h2, "c2", "10.2.1.2/24")

	start := time.Now()
	_, err := h2.Must(w.ctx, "connect", h1.Addr.String())
	w.try(err)
	_, err = c1.WaitPing(w.ctx, c2.addr, 10*time.Second)
	w.try(err)
	w.within("first ping after connect", time.Since(start), 2*time.Second)

	if r, err := c2.Exec(w.ctx, "ping", "-c", "3", "-W", "1", c1.addr.String()); err != nil || r.Exit != 0 {
		t.Errorf("ping from inside the container: %v %s", err, r)
	}
	t.Run("Ping10kB", func(t *testing.T) {
		w := w.in(t)
		w.pings(c1, c2, 20, 10000)
		w.pings(c2, c1, 20, 10000)
	})
	t.Run("TCP", func(t *testing.T) {
		bytes := int64(1 << 30)
		if long() {
			bytes *= 10
		}
		w := w.in(t)
		t.Log("c1 to c2: ", w.stream(c1, c2, bytes, limit))
		t.Log("c2 to c1: ", w.stream(c2, c1, 64<<20, time.Minute))
	})
	t.Run("PS", func(t *testing.T) {
		w := w.in(t)
		out, err := h1.Must(w.ctx, "ps")
		w.try(err)
		found := false
		for line := range strings.Lines(out) {
			f := strings.Fields(line)
			if len(f) == 3 && f[0] == c1.ID[:12] && f[2] == "10.2.1.1/24" {
				found = true
			}
		}
		if !found {
			t.Errorf("ps shows no line of c1: %q", out)
		}
		if one, err := h1.Must(w.ctx, "ps", "c1"); err != nil || strings.Count(one, "\n") != 0 || !strings.HasPrefix(one, c1.ID[:12]) {
			t.Errorf("ps c1: %v %q", err, one)
		}
	})
	t.Run("AttachTwiceIsOnce", func(t *testing.T) {
		w := w.in(t)
		got, err := c1.Attach(w.ctx, "ip:10.2.1.1/24")
		if err != nil || len(got) != 1 || got[0] != c1.addr {
			t.Errorf("second attach: %v %v", got, err)
		}
		out, err := c1.Out(w.ctx, "ip", "-o", "-4", "addr", "show", "dev", "ethmesh")
		if err != nil || strings.Count(out, "inet ") != 1 {
			t.Errorf("addresses after attaching twice: %v %q", err, out)
		}
	})
	t.Run("SeveralAddresses", func(t *testing.T) {
		w := w.in(t)
		got, err := c1.Attach(w.ctx, "10.2.2.1/24", "ip:10.2.3.1/24")
		w.try(err)
		if len(got) != 2 || got[0] != netip.MustParseAddr("10.2.2.1") || got[1] != netip.MustParseAddr("10.2.3.1") {
			t.Errorf("attach printed %v", got)
		}
		_, err = c2.Attach(w.ctx, "10.2.2.2/24")
		w.try(err)
		w.pings(&member{c1.Container, c1.addr}, &member{c2.Container, netip.MustParseAddr("10.2.2.2")}, 3, 56)
		for _, c := range []*member{c1, c2} {
			args := []string{"detach", "10.2.2.1/24", "10.2.3.1/24", c.Ref}
			if c == c2 {
				args = []string{"detach", "10.2.2.2/24", c.Ref}
			}
			if out, err := c.Host.Must(w.ctx, args...); err != nil || !strings.HasPrefix(out, "10.2.2.") {
				t.Errorf("detach: %v %q", err, out)
			}
		}
		w.pings(c1, c2, 3, 56)
	})
	t.Run("DetachOfWhatIsNotThere", func(t *testing.T) {
		w := w.in(t)
		r, err := h1.Ctl(w.ctx, "detach", "10.2.9.9/24", "c1")
		w.try(err)
		if r.Stdout != "" || r.Stderr == "" {
			t.Errorf("%s: want word of it on standard error and no address", r)
		}
		w.pings(c1, c2, 3, 56)
	})
	t.Run("ContainerThatIsNotRunning", func(t *testing.T) {
		w := w.in(t)
		_, err := h1.Out(w.ctx, "docker", "create", "--name", "idle", lab.Image, "true")
		w.try(err)
		w.refused(h1, 1, []string{"idle", "not running"}, "attach", "10.2.1.50/24", "idle")
		_, err = h1.Out(w.ctx, "docker", "rm", "idle")
		w.try(err)
		w.refused(h1, 1, []string{"nobody"}, "attach", "10.2.1.50/24", "nobody")
	})
	t.Run("ContainerOnHostNetwork", func(t *testing.T) {
		w := w.in(t)
		before, err := h1.Snapshot(w.ctx)
		w.try(err)
		c, err := h1.Docker(w.ctx, "hostly", "--network", "host")
		w.try(err)
		w.refused(h1, 1, []string{"hostly", "host"}, "attach", "10.2.1.50/24", "hostly")
		w.try(c.Remove(w.ctx))
		w.try(h1.WaitSame(w.ctx, before))
	})
	t.Run("AddressInUse", func(t *testing.T) {
		w := w.in(t)
		c, err := h1.Docker(w.ctx, "second")
		w.try(err)
		defer func() { w.try(c.Remove(context.WithoutCancel(w.ctx))) }()
		w.refused(h1, 1, []string{"10.2.1.1"}, "attach", "10.2.1.1/24", "second")
		w.refused(h1, 1, []string{"10.2.1.2"}, "attach", "10.2.1.2/24", "second") // it is on the other host
		if out, err := h1.Must(w.ctx, "ps", "second"); err != nil || out != "" {
			t.Errorf("ps of a container that was refused: %v %q", err, out)
		}
		if r, err := c.Run(w.ctx, "ip", "link", "show", "ethmesh"); err != nil || r.Exit == 0 {
			t.Errorf("a refused container has an interface: %v %s", err, r)
		}
		w.pings(c1, c2, 3, 56)
	})
}

// TestBroadcastAndOtherFrames sends what is not unicast IP among containers on three hosts.
func TestBroadcastAndOtherFrames(t *testing.T) {
	w := newWorld(t, 3, time.Minute)
	w.mesh()
	a := w.netns(w.Host(1), "a", "10.2.1.1/24")
	same := w.netns(w.Host(1), "same", "10.2.1.2/24")
	b := w.netns(w.Host(2), "b", "10.2.1.3/24")
	c := w.netns(w.Host(3), "c", "10.2.1.4/24")
	for _, to := range []*member{same, b, c} {
		_, err := a.WaitPing(w.ctx, to.addr, 5*time.Second)
		w.try(err)
	}

	for _, x := range []struct{ name, dst string }{
		{"Broadcast", "10.2.1.255:7000"}, {"LimitedBroadcast", "255.255.255.255:7000"}, {"Multicast", "239.1.2.3:7000"},
	} {
		t.Run(x.name, func(t *testing.T) {
			w := w.in(t)
			dst := netip.MustParseAddrPort(x.dst)
			for _, to := range []*member{same, b, c} {
				from, err := a.ListenUDP(w.ctx, netip.AddrPortFrom(a.addr, 0).String())
				w.try(err)
				in, err := to.ListenGroup(w.ctx, dst, "ethmesh")
				w.try(err)
				ctx, cancel := context.WithTimeout(w.ctx, 500*time.Millisecond)
				r, err := probe.Datagrams{Interval: 5 * time.Millisecond, Linger: 300 * time.Millisecond}.Run(ctx, from, in, dst)
				cancel()
				w.try(err)
				w.try(from.Close())
				w.try(in.Close())
				if r.Lost != 0 || r.Duplicated != 0 || r.Sent < 20 {
					t.Errorf("%s: %v, want each once", to.Name, r)
				}
			}
		})
	}

	// The guard of container ports passes every EtherType from the port's own MAC address; a tag, which may
	// hide a forged address, passes only where the guard is off.
	for _, x := range []struct {
		name string
		tail []byte // EtherType and what follows the addresses
	}{
		{"LocalExperimental1", append([]byte{0x88, 0xb5}, "meshd other ethertype"...)},
		{"LocalExperimental2", append([]byte{0x88, 0xb6}, "meshd other ethertype"...)},
		{"OUIExtended", append([]byte{0x88, 0xb7}, "meshd other ethertype"...)},
		{"LLC", append([]byte{0x00, 0x10, 0xaa, 0xaa, 0x03}, "meshd 802.3..."...)},
	} {
		t.Run("Ethertype"+x.name, func(t *testing.T) { w.in(t).passes(x.tail, a, b, c) })
	}
}

// TestTaggedFramesWithoutGuard passes VLAN tags between containers where the guard of ports is off.
func TestTaggedFramesWithoutGuard(t *testing.T) {
	w := newWorld(t, 2, time.Minute)
	w.mesh("--no-spoof-guard")
	a := w.netns(w.Host(1), "a", "10.2.1.1/24")
	b := w.netns(w.Host(2), "b", "10.2.1.2/24")
	_, err := a.WaitPing(w.ctx, b.addr, 5*time.Second)
	w.try(err)
	w.passes(append([]byte{0x81, 0x00, 0x00, 0x2a, 0x88, 0xb7}, "meshd tagged"...), a, b)
	w.passes(append([]byte{0x88, 0xb7}, "meshd other ethertype"...), b, a)
}

// passes sends a frame, broadcast and to each of the others, and wants one copy there, unchanged. tail is
// the frame after its addresses.
func (w *world) passes(tail []byte, from *member, to ...*member) {
	w.t.Helper()
	src, err := from.OpenFrames("ethmesh")
	w.try(err)
	defer src.Close()
	for _, m := range to {
		in, err := m.OpenFrames("ethmesh")
		w.try(err)
		for _, dst := range [][]byte{{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, in.MAC} {
			frame := append(append(append([]byte(nil), dst...), src.MAC...), tail...)
			frame = append(frame, make([]byte, max(0, 60-len(frame)))...)
			w.try(src.Send(frame))
			got := in.Collect(300*time.Millisecond, func(f []byte) bool { return string(f) == string(frame) })
			if got != 1 {
				w.t.Errorf("to %s at %x: %d copies of %x arrived unchanged, want 1", m.Name, dst, got, tail[:4])
			}
		}
		w.try(in.Close())
	}
}
