package integration

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"meshd/integration/lab"
)

// sniffer reads all that crosses the underlay and looks for bytes that must not be seen there.
type sniffer struct {
	needles map[string][]byte // what they are; fixed once it runs
	frames  atomic.Uint64
	hellos  atomic.Uint64 // first messages of handshakes

	mu    sync.Mutex // guards what follows
	stage string
	found map[string]int // by stage and needle
	first map[string]string
}

// sniff listens on the underlay interfaces of hosts until the test ends.
func (w *world) sniff(needles map[string][]byte, hosts ...*lab.Host) *sniffer {
	w.t.Helper()
	s := &sniffer{needles: maps.Clone(needles), found: map[string]int{}, first: map[string]string{}}
	ctx, cancel := context.WithCancel(w.ctx)
	var running sync.WaitGroup
	w.t.Cleanup(func() { cancel(); running.Wait() })
	for _, h := range hosts {
		f, err := h.OpenFrames("eth0")
		w.try(err)
		running.Go(func() {
			defer f.Close()
			for ctx.Err() == nil {
				f.Collect(200*time.Millisecond, func(frame []byte) bool { s.look(h, frame); return false })
			}
		})
	}
	return s
}

func (s *sniffer) look(h *lab.Host, frame []byte) {
	s.frames.Add(1)
	if len(frame) > 42 && frame[12] == 8 && frame[23] == 17 && frame[36] == 6783>>8 && frame[37] == 6783&0xff && frame[42] == 1 {
		s.hellos.Add(1)
	}
	for what, needle := range s.needles {
		if !bytes.Contains(frame, needle) {
			continue
		}
		s.mu.Lock()
		key := s.stage + ": " + what
		if s.found[key]++; s.first[key] == "" {
			s.first[key] = h.Name + " " + hex.EncodeToString(frame[:min(len(frame), 120)])
		}
		s.mu.Unlock()
	}
}

// at names what happens from now on.
func (s *sniffer) at(stage string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stage = stage
}

// seen lists what was found, a line for each stage and needle.
func (s *sniffer) seen() (lines []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(s.found)) {
		lines = append(lines, fmt.Sprintf("%s: %d frames, the first on %s", key, s.found[key], s.first[key]))
	}
	return lines
}

// talker has one container send a text to another without end, in datagrams, broadcasts and a TCP stream.
type talker struct {
	text     []byte
	arrived  atomic.Uint64 // datagrams with the text
	streamed atomic.Uint64 // bytes of TCP
}

func (w *world) talk(text string, from, to *member) *talker {
	w.t.Helper()
	k := &talker{text: []byte(text)}
	ctx, cancel := context.WithCancel(w.ctx)
	var running sync.WaitGroup
	w.t.Cleanup(func() { cancel(); running.Wait() })
	src, err := from.ListenUDP(w.ctx, netip.AddrPortFrom(from.addr, 0).String())
	w.try(err)
	dst, err := to.ListenUDP(w.ctx, netip.AddrPortFrom(to.addr, 7100).String())
	w.try(err)
	listener, err := to.Listen(w.ctx, netip.AddrPortFrom(to.addr, 7101).String())
	w.try(err)
	context.AfterFunc(ctx, func() { _, _, _ = src.Close(), dst.Close(), listener.Close() })
	message := bytes.Repeat(k.text, 1+1000/len(k.text))
	running.Go(func() {
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for n := 0; ctx.Err() == nil; n++ {
			<-tick.C
			to := netip.AddrPortFrom(to.addr, 7100)
			if n%8 == 0 {
				to = netip.MustParseAddrPort("10.2.1.255:7100")
			}
			_, _ = src.WriteToUDPAddrPort(message, to)
		}
	})
	running.Go(func() {
		buf := make([]byte, 65536)
		for {
			n, err := dst.Read(buf)
			if ctx.Err() != nil {
				return
			}
			if err == nil && bytes.Contains(buf[:n], k.text) {
				k.arrived.Add(1)
			}
		}
	})
	running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer conn.Close()
				defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
				buf := make([]byte, 1<<16)
				for {
					n, err := conn.Read(buf)
					k.streamed.Add(uint64(n))
					if err != nil {
						return
					}
				}
			})
		}
	})
	running.Go(func() {
		for ctx.Err() == nil {
			k.stream(ctx, from, to)
		}
	})
	return k
}

// stream sends the text in large pieces, so that they cross the bridge as superframes, until it breaks.
func (k *talker) stream(ctx context.Context, from, to *member) {
	dialling, cancel := context.WithTimeout(ctx, time.Second)
	conn, err := from.Dial(dialling, "tcp", netip.AddrPortFrom(to.addr, 7101).String())
	cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	if err != nil {
		<-tick.C
		return
	}
	defer conn.Close()
	block := bytes.Repeat(k.text, 1+60000/len(k.text))
	for ctx.Err() == nil {
		<-tick.C
		_ = conn.SetWriteDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Write(block); err != nil {
			return
		}
	}
}

// waitHeard waits until the text arrives both ways of talking.
func (w *world) waitHeard(what string, talkers ...*talker) {
	w.t.Helper()
	for _, k := range talkers {
		d, s := k.arrived.Load(), k.streamed.Load()
		err := lab.Until(w.ctx, 15*time.Second, "the text to arrive: "+what, func() bool {
			return k.arrived.Load() > d+20 && k.streamed.Load() > s+1<<17
		})
		if err != nil {
			w.t.Errorf("%v: %d datagrams, %d bytes", err, k.arrived.Load()-d, k.streamed.Load()-s)
		}
	}
}

// mac gives the container's address on the mesh.
func (w *world) mac(c *member) net.HardwareAddr {
	w.t.Helper()
	f, err := c.OpenFrames("ethmesh")
	w.try(err)
	defer f.Close()
	return f.MAC
}

// gone waits until a host's meshd has ended.
func (w *world) gone(h *lab.Host, sig syscall.Signal) {
	w.t.Helper()
	w.try(h.Kill(w.ctx, h.Meshd(), sig))
	w.try(lab.Until(w.ctx, 10*time.Second, "meshd to end", func() bool { return h.Meshd() == 0 }))
}

// TestNoCleartext keeps sniffers on the underlay of a mesh with a password through all that happens to it.
// Neither what containers say nor their MAC addresses nor names may be seen.
func TestNoCleartext(t *testing.T) {
	w := newWorld(t, 3, scaled(2*time.Minute, 6*time.Minute))
	h1, h2, h3 := w.Host(1), w.Host(2), w.Host(3)
	password := []string{"MESH_PASSWORD=" + secret}
	needles := map[string][]byte{
		"payload": []byte("meshd-cleartext-marker-0123456789"), "name": []byte("well-kept-name"),
		"password": []byte(secret), "second password": []byte("second-" + secret),
	}
	w.launchWith(h1, password)
	w.launchWith(h2, password, h1.Addr.String())
	w.launchWith(h3, password, h1.Addr.String())
	_, err := lab.WaitMesh(w.ctx, 15*time.Second, w.Hosts...)
	w.try(err)
	c1 := w.netns(h1, "c1", "10.2.1.1/24")
	c2 := w.netns(h2, "c2", "10.2.1.2/24")
	c3 := w.netns(h3, "c3", "10.2.1.3/24")
	for _, c := range []*member{c1, c2, c3} {
		needles["MAC of "+c.Name] = w.mac(c)
	}
	s := w.sniff(needles, w.Hosts...)
	s.at("attach")
	text := string(needles["payload"])
	there, back := w.talk(text, c1, c2), w.talk(text, c2, c1)
	_, err = h1.Must(w.ctx, "dns-add", "10.2.1.1", "-h", "well-kept-name.mesh.internal")
	w.try(err)
	w.waitHeard("attached", there, back)
	late := w.netns(h3, "late", "10.2.1.4/24")
	w.pings(late, c1, 3, 56)

	s.at("path change")
	w.try(w.Cut(w.ctx, h1, h2))
	w.waitRoute(h1, h2, h3, 15*time.Second)
	w.waitRoute(h2, h1, h3, 15*time.Second)
	w.waitHeard("by relay", there, back)
	w.try(w.HealAll(w.ctx))
	w.waitRoute(h1, h2, h2, 15*time.Second)
	w.waitHeard("direct again", there, back)

	s.at("password change")
	p1, p2 := w.watch(c1, c2, time.Millisecond), w.watch(c2, c1, time.Millisecond)
	w.changePassword("second-"+secret, w.Hosts...)
	r1, r2 := w.end(p1), w.end(p2)
	t.Log("while the password changed: ", r1)
	t.Log("and back: ", r2)
	if r1.Lost+r1.Duplicated+r2.Lost+r2.Duplicated > 0 {
		t.Error("the change of the password lost or doubled datagrams")
	}
	w.waitHeard("with the new password", there, back)

	if long() {
		s.at("renewed by age")
		before := s.hellos.Load()
		w.try(lab.Until(w.ctx, 150*time.Second, "keys two minutes old to be renewed", func() bool { return s.hellos.Load() > before }))
		w.rest(25 * time.Second) // for all of them
		t.Logf("%d handshakes by age", s.hellos.Load()-before)
		w.waitHeard("with renewed keys", there, back)
	}

	s.at("killed and launched")
	w.gone(h2, syscall.SIGKILL)
	w.rest(300 * time.Millisecond)
	w.launchWith(h2, []string{"MESH_PASSWORD=second-" + secret}, h1.Addr.String())
	w.waitHeard("after the restart", there, back)

	for _, x := range []struct{ what, script string }{
		{"without pins", "rm -rf /sys/fs/bpf/meshd"},
		{"without programs", `for d in $(ls /sys/class/net); do tc filter del dev $d ingress; tc filter del dev $d egress; tc qdisc del dev $d clsact; done 2>/dev/null`},
		{"without nft table", "nft flush ruleset"},
		{"without TAP", "ip link del mesh-tap"},
		{"without bridge", "ip link del mesh"},
		{"without the container's veth", "ip link del $(cd /sys/class/net && echo vmesh*)"},
		{"without vxlan device", "ip link del mesh-vx || ip link add mesh-vx up type vxlan external dstport 6784"},
	} {
		s.at(x.what)
		_, err := h1.Out(w.ctx, "/bin/sh", "-c", x.script+"; true")
		w.try(err)
		w.waitHeard(x.what, there, back)
	}

	s.at("peer lost")
	before := w.dropped(h1)
	w.gone(h2, syscall.SIGKILL)
	w.try(lab.Until(w.ctx, 10*time.Second, "h1 to notice", func() bool { return w.route(h1, h2) == "" }))
	w.rest(500 * time.Millisecond)
	if after := w.dropped(h1); after <= before {
		t.Errorf("what could not be sealed for a lost peer is not counted: %d drops before, %d after", before, after)
	}

	for _, line := range s.seen() {
		t.Error(line)
	}
	t.Logf("%d frames seen on the underlay, with none of %d texts", s.frames.Load(), len(needles))
	if s.frames.Load() < 10000 {
		t.Error("hardly anything was seen: this proves nothing")
	}
}

// dropped adds up what a host has dropped for any reason.
func (w *world) dropped(h *lab.Host) (sum uint64) {
	w.t.Helper()
	r, err := h.Report(w.ctx)
	w.try(err)
	for _, n := range r.Router.Drops {
		sum += n
	}
	return sum
}

// changePassword makes all hosts use a new password, and forget the others.
func (w *world) changePassword(password string, hosts ...*lab.Host) {
	w.t.Helper()
	old := w.addPassword(password, hosts...)
	w.rest(500 * time.Millisecond)
	w.removePasswords(old)
	w.rest(500 * time.Millisecond)
}

// addPassword makes all hosts use a new password, and returns the others that they know.
func (w *world) addPassword(password string, hosts ...*lab.Host) map[*lab.Host][]string {
	w.t.Helper()
	lists, ids := make([]string, len(hosts)), make([]string, len(hosts))
	var adding, using errgroup.Group
	adding.SetLimit(2) // each takes 128 MiB for a moment
	for i, h := range hosts {
		adding.Go(func() (err error) {
			if lists[i], err = h.Must(w.ctx, "password", "list"); err != nil {
				return err
			}
			r, err := h.RunWith(w.ctx, func(c *exec.Cmd) { c.Stdin = strings.NewReader(password + "\n") }, "meshctl", "password", "add")
			if err == nil && r.Exit != 0 {
				err = errors.New(r.String())
			}
			ids[i] = strings.TrimSpace(r.Stdout)
			return err
		})
	}
	w.try(adding.Wait())
	old := map[*lab.Host][]string{}
	for i, h := range hosts {
		for line := range strings.Lines(lists[i]) {
			old[h] = append(old[h], strings.Trim(line, "* \n"))
		}
		using.Go(func() error {
			_, err := h.Must(w.ctx, "password", "use", ids[i])
			return err
		})
	}
	w.try(using.Wait())
	return old
}

func (w *world) removePasswords(old map[*lab.Host][]string) {
	w.t.Helper()
	var g errgroup.Group
	for h, ids := range old {
		g.Go(func() error {
			for _, id := range ids {
				if _, err := h.Must(w.ctx, "password", "remove", id); err != nil {
					return err
				}
			}
			return nil
		})
	}
	w.try(g.Wait())
}

// TestPasswordRotations is M8: the password of a mesh is changed again and again while containers on all hosts but
// one talk in a ring, and that one dies and comes back in the middle of it. At the end neither the first password nor
// the last but one lets anybody in, and the last one does.
func TestPasswordRotations(t *testing.T) {
	hosts, rotations := scaled(4, 16), scaled(2, 50)
	w := newWorld(t, hosts+1, time.Duration(hosts)*5*time.Second+time.Duration(rotations)*20*time.Second)
	all, stranger := w.Hosts[:hosts], w.Host(hosts+1)
	h1, mortal := all[0], all[hosts-1]
	password := []string{"MESH_PASSWORD=" + secret}
	var members []*member
	for i, h := range all {
		if i == 0 {
			w.launchWith(h, password)
		} else {
			w.launchWith(h, password, h1.Addr.String())
		}
	}
	_, err := lab.WaitMesh(w.ctx, 30*time.Second, all...)
	w.try(err)
	for i, h := range all[:hosts-1] {
		members = append(members, w.netns(h, fmt.Sprintf("c%d", i+1), fmt.Sprintf("10.2.1.%d/24", i+1)))
	}
	next := func(i int) *member { return members[(i+1)%len(members)] }
	var talks []*watched
	for i, c := range members {
		_, err := c.WaitPing(w.ctx, next(i).addr, 10*time.Second)
		w.try(err)
	}
	for i, c := range members {
		talks = append(talks, w.watch(c, next(i), 5*time.Millisecond))
	}
	start, joins, worst := time.Now(), 0, time.Duration(0)
	nth := func(r int) string { return fmt.Sprintf("rotation-%d", r) }
	for r := range rotations {
		old := w.addPassword(nth(r), all...)
		if r%5 == 1 {
			w.gone(mortal, syscall.SIGKILL)
			w.launchWith(mortal, nil, "--resume") // its ring is on disk
			took, err := lab.WaitMesh(w.ctx, 20*time.Second, all...)
			w.try(err)
			joins, worst = joins+1, max(worst, took)
		}
		w.rest(500 * time.Millisecond)
		w.removePasswords(old)
	}
	t.Logf("%d rotations on %d hosts in %v, %d joins meanwhile", rotations, hosts, time.Since(start).Round(time.Second), joins)
	w.within("who knows the new password to join", worst, 10*time.Second)
	w.rest(11 * time.Second) // what was made with the last but one ends
	sent, lost := uint64(0), false
	for i, p := range talks {
		r := w.end(p)
		sent += uint64(r.Sent)
		if r.Lost+r.Duplicated > 0 {
			t.Errorf("%s to %s: %v", members[i].Name, next(i).Name, r)
			lost = true
		}
	}
	t.Logf("%d datagrams, some lost: %v", sent, lost)
	for _, old := range []string{secret, nth(rotations - 2)} {
		w.launchWith(stranger, []string{"MESH_PASSWORD=" + old}, h1.Addr.String())
		w.rest(3 * time.Second)
		if got := stranger.Established(w.ctx); len(got) > 0 {
			t.Errorf("with the password %q it still gets in: %v", old, got)
		}
		if _, in := h1.Established(w.ctx)[stranger.Name]; in {
			t.Errorf("h1 has taken in a host with the password %q", old)
		}
		w.gone(stranger, syscall.SIGKILL)
	}
	w.launchWith(stranger, []string{"MESH_PASSWORD=" + nth(rotations-1)}, h1.Addr.String())
	took, err := lab.WaitMesh(w.ctx, 20*time.Second, w.Hosts...)
	w.try(err)
	w.within("a new host with the last password to join", took, 10*time.Second)
}

// TestPasswordOnOldKernelPath gives a mesh whose kernel path is at work its first password. What the kernel
// was told before must not go on in clear, whatever else the new meshd is told.
func TestPasswordOnOldKernelPath(t *testing.T) {
	w := newWorld(t, 2, 80*time.Second)
	h1, h2 := w.Host(1), w.Host(2)
	w.mesh()
	c1 := w.netns(h1, "c1", "10.2.1.1/24")
	c2 := w.netns(h2, "c2", "10.2.1.2/24")
	const text = "meshd-cleartext-marker-0123456789"
	s := w.sniff(map[string][]byte{"payload": []byte(text)}, w.Hosts...)
	s.at("open")
	there, back := w.talk(text, c1, c2), w.talk(text, c2, c1)
	w.waitOverlay(h1, h2, "kernel", 15*time.Second)
	w.waitHeard("open", there, back)
	if len(s.seen()) == 0 {
		t.Fatal("a mesh without a password shows nothing: the sniffer does not work")
	}
	w.rest(3 * time.Second) // until the kernel carries the containers' frames by itself
	for _, options := range [][]string{{"--no-fastdp"}, nil} {
		for _, h := range w.Hosts {
			w.gone(h, syscall.SIGKILL)
		}
		s.at("killed")
		w.waitHeard("by the kernel alone", there, back)
		for _, h := range w.Hosts {
			w.launchWith(h, []string{"MESH_PASSWORD=" + secret}, append(options[:len(options):len(options)], h1.Addr.String())...)
		}
		s.at(fmt.Sprint("sealed ", options))
		w.waitHeard(fmt.Sprint("sealed ", options), there, back)
		for _, line := range s.seen() {
			if strings.HasPrefix(line, "sealed") {
				t.Error(line)
			}
		}
		if options == nil {
			break
		}
		s.at("open once more")
		for _, h := range w.Hosts {
			w.gone(h, syscall.SIGKILL)
		}
		for _, h := range w.Hosts {
			w.launch(h, h1.Addr.String())
		}
		w.waitOverlay(h1, h2, "kernel", 15*time.Second)
		w.rest(3 * time.Second)
	}
}
