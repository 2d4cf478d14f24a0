package integration

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"meshd/integration/lab"
)

// madeUp is L5: it sends a frame to a container from each of n MACs that nobody has, so many a second at most. No
// table of any host may have more than room entries more, no meshd may grow by more than 5 MB.
func (w *world) madeUp(f *lab.Frames, from netip.Addr, to *member, n, rate, room int) {
	w.t.Helper()
	bridges := func(h *lab.Host) int {
		out, err := h.Out(w.ctx, "bridge", "fdb", "show", "br", "mesh")
		w.try(err)
		return strings.Count(out, "\n")
	}
	switches := func(h *lab.Host) int {
		r, err := h.Report(w.ctx)
		w.try(err)
		return len(r.Router.MACs)
	}
	bridge, known, resident := map[*lab.Host]int{}, map[*lab.Host]int{}, map[*lab.Host]int{}
	for _, h := range w.Hosts {
		bridge[h], known[h], resident[h] = bridges(h), switches(h), w.usage(h).rss
	}
	limited := room < learned || kernelSince(w, 6, 7) // before that no bridge can be told
	victim := w.mac(to)
	start, unsent := time.Now(), 0
	for i := range n {
		src := []byte{2, 0xf0, byte(i >> 24), byte(i >> 16), byte(i >> 8), byte(i)}
		if err := f.Send(ether(victim, src, 0x800, ip4(from, to.addr, 17, udp(9, 9, nil))...)); err != nil {
			unsent++ // its own queue is full
		}
		if ahead := time.Duration(i)*time.Second/time.Duration(rate) - time.Since(start); ahead > time.Millisecond {
			w.rest(ahead)
		}
	}
	took := time.Since(start)
	for _, h := range w.Hosts {
		grown := float64(w.usage(h).rss-resident[h]) / 1024 // before a report of many addresses is asked for
		b, s := bridges(h)-bridge[h], switches(h)-known[h]
		w.t.Logf("%d made-up MACs in %v (%d not sent): meshd on %s grew by %.1f MB, its bridge learned %d, its switch %d",
			n, took.Round(time.Millisecond), unsent, h.Name, grown, b, s)
		if grown > 5 {
			w.t.Errorf("meshd on %s has grown by %.1f MB", h.Name, grown)
		}
		if b > room && limited || s > room {
			w.t.Errorf("%s: %d more in the bridge, %d more in meshd; want %d at most", h.Name, b, s, room)
		}
	}
	if unsent > n/10 {
		w.t.Errorf("%d of %d frames were not sent: this proves little", unsent, n)
	}
}

// kernelSince reports whether this kernel is of that version or a later one.
func kernelSince(w *world, major, minor int) bool {
	w.t.Helper()
	var x, y int
	text, err := os.ReadFile("/proc/sys/kernel/osrelease")
	w.try(err)
	_, err = fmt.Sscanf(string(text), "%d.%d", &x, &y)
	w.try(err)
	return x > major || x == major && y >= minor
}

// learned is how many MACs a bridge, and a meshd, learns at most.
const learned = 16384

// TestMadeUpMACs is L5 where addresses are learned: a container whose guard is off, a foreign network on the bridge, and
// for comparison a guarded container. While it makes up MACs nothing between others is lost, but for 1 % where they share
// meshd's queues with it; it gets to see none of it, and afterwards who comes new is reached.
func TestMadeUpMACs(t *testing.T) {
	type variant struct {
		name    string
		options []string
		foreign bool
		room    int
	}
	variants := []variant{{"Foreign", nil, true, learned}}
	if long() {
		variants = append(variants, variant{"Unguarded", []string{"--no-spoof-guard"}, false, learned},
			variant{"Userspace", []string{"--no-spoof-guard", "--no-fastdp"}, false, learned}, variant{"Guarded", nil, false, 2})
	}
	for _, x := range variants {
		t.Run(x.name, func(t *testing.T) {
			w := newWorld(t, 2, scaled(time.Minute, 4*time.Minute))
			h1, h2 := w.Host(1), w.Host(2)
			w.mesh(x.options...)
			var a *member
			ifname := "ethmesh"
			if x.foreign {
				a, ifname = w.foreign(h1, "vm", "10.2.1.1/24"), "eth0"
			} else {
				a = w.netns(h1, "attacker", "10.2.1.1/24")
			}
			v1, v2, v3 := w.netns(h1, "v1", "10.2.1.2/24"), w.netns(h2, "v2", "10.2.1.3/24"), w.netns(h1, "v3", "10.2.1.4/24")
			for _, from := range []*member{a, v1, v3} {
				_, err := from.WaitPing(w.ctx, v2.addr, 10*time.Second)
				w.try(err)
			}
			w.rest(3 * time.Second) // until the kernel carries what it can
			f, err := a.OpenFrames(ifname)
			w.try(err)
			defer f.Close()
			spy, err := a.OpenFrames(ifname)
			w.try(err)
			defer spy.Close()
			ctx, cancel := context.WithCancel(w.ctx)
			defer cancel()
			macs := [][]byte{w.mac(v1), w.mac(v2), w.mac(v3)}
			overheard := 0
			var spying sync.WaitGroup
			spying.Go(func() {
				for ctx.Err() == nil {
					overheard += spy.Collect(100*time.Millisecond, func(frame []byte) bool {
						for _, m := range macs {
							if bytes.Equal(frame[:6], m) && !bytes.Equal(frame[6:12], f.MAC) && !bytes.Equal(frame[6:8], []byte{2, 0xf0}) {
								return true
							}
						}
						return false
					})
				}
			})
			here, there := w.watch(v1, v3, time.Millisecond), w.watch(v1, v2, time.Millisecond)
			w.madeUp(f, a.addr, v2, scaled(40_000, 1_000_000), 25_000, x.room)
			for what, p := range map[string]*watched{"on the same host": here, "from host to host": there} {
				r := w.end(p)
				t.Logf("meanwhile %s: %v", what, r)
				most := 0
				if x.name == "Userspace" {
					most = r.Sent / 100
				}
				if r.Lost > most || r.Duplicated > 0 {
					t.Errorf("of others' datagrams %s %d were lost and %d doubled", what, r.Lost, r.Duplicated)
				}
			}
			cancel()
			spying.Wait()
			t.Logf("of others' frames the attacker saw %d", overheard)
			if overheard > 0 {
				t.Errorf("the attacker saw %d frames from one victim to another", overheard)
			}
			late := w.netns(h1, "late", "10.2.1.5/24")
			_, err = v2.WaitPing(w.ctx, late.addr, 5*time.Second)
			w.try(err)
			w.pings(a, v2, 5, 56)
			w.pings(late, v1, 5, 56)
		})
	}
}

// foreign joins a namespace to the mesh bridge behind meshd's back, as a VM would be.
func (w *world) foreign(h *lab.Host, name, addr string) *member {
	w.t.Helper()
	vm, err := h.Netns(w.ctx, name)
	w.try(err)
	r, err := h.RunWith(w.ctx, func(c *exec.Cmd) {
		c.Stdin = strings.NewReader("link add " + name + "0 type veth peer name eth0 netns " + name + "\nlink set " + name + "0 master mesh up\n")
	}, "ip", "-batch", "-")
	if err != nil || r.Exit != 0 {
		w.t.Fatalf("%v %s", err, r)
	}
	w.t.Cleanup(func() {
		_, err := h.Out(context.Background(), "ip", "link", "del", name+"0")
		w.try(err)
		w.try(vm.Remove(context.Background()))
	})
	mtu, err := h.Out(w.ctx, "cat", "/sys/class/net/mesh/mtu")
	w.try(err)
	for _, args := range [][]string{{"addr", "add", addr, "dev", "eth0"}, {"link", "set", "eth0", "mtu", mtu, "up"}} {
		_, err = vm.Out(w.ctx, append([]string{"ip"}, args...)...)
		w.try(err)
	}
	return &member{vm, netip.MustParsePrefix(addr).Addr()}
}
