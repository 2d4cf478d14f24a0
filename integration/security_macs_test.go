package integration

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"meshd/integration/lab"
)

// maker sends frames to a container with an IP address and MACs that it makes up.
type maker struct {
	*lab.Frames
	from netip.Addr
	to   *member
}

// madeUp is L5: the makers together send a frame from each of n MACs that nobody has, so many a second at most. No
// table of any host may have more than room entries more, no meshd may grow by more than 5 MB.
func (w *world) madeUp(makers []maker, n, rate, room int) {
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
	start := time.Now()
	var unsent atomic.Int64
	var making sync.WaitGroup
	for id, m := range makers {
		victim := w.mac(m.to)
		making.Go(func() {
			w.pace(n/len(makers), rate/len(makers), func(i int) {
				src := []byte{2, 0xf0, byte(id), byte(i >> 16), byte(i >> 8), byte(i)}
				if err := m.Send(ether(victim, src, 0x800, ip4(m.from, m.to.addr, 17, udp(9, 9, nil))...)); err != nil {
					unsent.Add(1) // its own queue is full
				}
			})
		})
	}
	making.Wait()
	took := time.Since(start)
	for _, h := range w.Hosts {
		grown := float64(w.usage(h).rss-resident[h]) / 1024 // before a report of many addresses is asked for
		b, s := bridges(h)-bridge[h], switches(h)-known[h]
		w.t.Logf("%d made-up MACs in %v (%d not sent): meshd on %s grew by %.1f MB, its bridge learned %d, its switch %d",
			n, took.Round(time.Millisecond), unsent.Load(), h.Name, grown, b, s)
		if grown > 5 {
			w.t.Errorf("meshd on %s has grown by %.1f MB", h.Name, grown)
		}
		if b > room && limited || s > room {
			w.t.Errorf("%s: %d more in the bridge, %d more in meshd; want %d at most", h.Name, b, s, room)
		}
	}
	if unsent.Load() > int64(n/10) {
		w.t.Errorf("%d of %d frames were not sent: this proves little", unsent.Load(), n)
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
			w := newWorld(t, scaled(2, 4), scaled(time.Minute, 6*time.Minute))
			w.mesh(x.options...)
			hosts := len(w.Hosts)
			c := w.cast(0, scaled(3, 8), 0)
			ifname := "ethmesh"
			for i := range scaled(1, 8) {
				h, name, addr := w.Hosts[i%hosts], fmt.Sprint("a", i+1), fmt.Sprintf("10.2.1.10%d/24", i+1)
				if x.foreign {
					ifname = "eth0"
					c.attackers = append(c.attackers, w.foreign(h, name, addr))
				} else {
					c.attackers = append(c.attackers, w.netns(h, name, addr))
				}
			}
			next := func(i int) *member { return c.victims[(i+1)%hosts] } // on the next host
			for i, m := range append(c.attackers, c.victims...) {
				for _, to := range []*member{next(i), c.victims[1]} {
					if m != to {
						_, err := m.WaitPing(w.ctx, to.addr, 10*time.Second)
						w.try(err)
					}
				}
			}
			w.rest(3 * time.Second) // until the kernel carries what it can
			ctx, cancel := context.WithCancel(w.ctx)
			defer cancel()
			var makers []maker
			var overheard atomic.Int64
			var spying sync.WaitGroup
			for i, a := range c.attackers {
				f, err := a.OpenFrames(ifname)
				w.try(err)
				defer f.Close()
				spy, err := a.OpenFrames(ifname)
				w.try(err)
				makers = append(makers, maker{f, a.addr, next(i)})
				c.macs[a] = f.MAC
				spying.Go(func() {
					defer spy.Close()
					for ctx.Err() == nil {
						n := spy.Collect(100*time.Millisecond, func(frame []byte) bool {
							return slices.ContainsFunc(c.victims, func(v *member) bool {
								return bytes.Equal(frame[:6], c.macs[v])
							}) && slices.ContainsFunc(c.victims, func(v *member) bool { return bytes.Equal(frame[6:12], c.macs[v]) })
						})
						overheard.Add(int64(n))
					}
				})
			}
			watches := map[string]*watched{}
			for i, v := range c.victims {
				watches[v.Name+" to "+next(i).Name+" on another host"] = w.watch(v, next(i), time.Millisecond)
				if i+hosts < len(c.victims) {
					to := c.victims[i+hosts]
					watches[v.Name+" to "+to.Name+" on the same host"] = w.watch(v, to, time.Millisecond)
				}
			}
			w.madeUp(makers, scaled(40_000, 1_000_000), 25_000, x.room)
			for what, p := range watches {
				r := w.end(p)
				t.Logf("meanwhile from %s: %v", what, r)
				most := 0
				if x.name == "Userspace" {
					most = r.Sent / 100
				}
				if r.Lost > most || r.Duplicated > 0 {
					t.Errorf("of the datagrams from %s %d were lost and %d doubled", what, r.Lost, r.Duplicated)
				}
			}
			cancel()
			spying.Wait()
			t.Logf("of others' frames the attackers saw %d", overheard.Load())
			if overheard.Load() > 0 {
				t.Errorf("the attackers saw %d frames from one victim to another", overheard.Load())
			}
			late := w.netns(w.Host(1), "late", "10.2.1.50/24")
			_, err := c.victims[1].WaitPing(w.ctx, late.addr, 5*time.Second)
			w.try(err)
			w.pings(c.attackers[0], c.victims[1], 5, 56)
			w.pings(late, c.victims[0], 5, 56)
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
