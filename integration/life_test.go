package integration

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"meshd/integration/lab"
)

// ifindexes tells which devices a host's mesh consists of: a device made anew has another index.
func (w *world) ifindexes(h *lab.Host, c *member) string {
	w.t.Helper()
	inHost, err := h.Out(w.ctx, "/bin/sh", "-c", "for d in mesh mesh-tap; do echo $d $(cat /sys/class/net/$d/ifindex); done; "+
		"ls /sys/class/net | grep vmesh")
	w.try(err)
	inContainer, err := c.Out(w.ctx, "/bin/sh", "-c", "ip -o -4 addr show dev ethmesh; ip -o link show dev ethmesh | sed 's/.*link.ether//'")
	w.try(err)
	return inHost + "\n" + inContainer
}

// TestKill ends one meshd with SIGKILL, while the containers of all hosts talk.
func TestKill(t *testing.T) {
	w := newWorld(t, 3, 90*time.Second)
	h1, h3 := w.Host(1), w.Host(3)
	w.mesh()
	c1 := w.netns(h1, "c1", "10.2.1.1/24")
	c2 := w.netns(w.Host(2), "c2", "10.2.1.2/24")
	c3 := w.netns(h3, "c3", "10.2.1.3/24")
	for _, c := range []*member{c2, c3} {
		_, err := c1.WaitPing(w.ctx, c.addr, 5*time.Second)
		w.try(err)
	}
	devices := w.ifindexes(h3, c3)
	others := w.watch(c1, c2, time.Millisecond)
	w.try(h3.Kill(w.ctx, h3.Meshd(), syscall.SIGKILL))
	w.try(lab.Until(w.ctx, 5*time.Second, "meshd to end", func() bool { return h3.Meshd() == 0 }))

	// The others forget the way to it: the figure is 3 s by the keepalive of links.
	start := time.Now()
	w.try(lab.Until(w.ctx, 15*time.Second, "h1 to notice", func() bool { return h1.Established(w.ctx)["h3"].State == "" && w.route(h1, h3) == "" }))
	w.within("routes to the dead peer withdrawn", time.Since(start), 3*time.Second)
	if got := w.ifindexes(h3, c3); got != devices {
		t.Errorf("without meshd the devices are\n%s\nand were\n%s", got, devices)
	}

	start = time.Now()
	w.launch(h3, h1.Addr.String())
	_, err := c1.WaitPing(w.ctx, c3.addr, 10*time.Second)
	w.try(err)
	w.within("traffic after the restart", time.Since(start), 2*time.Second)
	if got := w.ifindexes(h3, c3); got != devices {
		t.Errorf("after the restart the devices are\n%s\nand were\n%s", got, devices)
	}
	if out, err := h3.Must(w.ctx, "ps"); err != nil || !strings.Contains(out, "10.2.1.3/24") {
		t.Errorf("after the restart ps says: %v %q", err, out)
	}
	_, err = lab.WaitMesh(w.ctx, 5*time.Second, w.Hosts...)
	w.try(err)
	w.pings(c3, c2, 5, 10000)
	r := w.end(others)
	t.Log("between the others: ", r)
	if r.Lost+r.Duplicated+r.SendErrors > 0 {
		t.Errorf("traffic between the others: %v, want nothing lost", r)
	}
}

// TestRestartWithFrames stops and starts one meshd in good order under traffic to its own container.
func TestRestartWithFrames(t *testing.T) {
	w := newWorld(t, 2, time.Minute)
	w.mesh()
	c1 := w.netns(w.Host(1), "c1", "10.2.1.1/24")
	c2 := w.netns(w.Host(2), "c2", "10.2.1.2/24")
	_, err := c1.WaitPing(w.ctx, c2.addr, 5*time.Second)
	w.try(err)
	p := w.watch(c1, c2, time.Millisecond)
	_, err = w.Host(2).Must(w.ctx, "stop")
	w.try(err)
	w.try(lab.Until(w.ctx, time.Second, "meshd to be gone after stop", func() bool { return w.Host(2).Meshd() == 0 }))
	start := time.Now()
	w.launch(w.Host(2), "--resume")
	_, err = c1.WaitPing(w.ctx, c2.addr, 10*time.Second)
	w.try(err)
	w.within("traffic after stop and launch", time.Since(start), 2*time.Second)
	t.Log(w.end(p))
}

// TestRestartOnKernelPath is P6: meshd is stopped, killed and started again, on both hosts by turns, while 10,000
// datagrams a second cross the kernel path each way. Some restarts follow so soon that nothing is settled, and one
// comes before a new container's frames have left the userspace path.
func TestRestartOnKernelPath(t *testing.T) {
	w := newWorld(t, 2, scaled(90*time.Second, 10*time.Minute))
	h1, h2 := w.Host(1), w.Host(2)
	w.mesh()
	c1 := w.netns(h1, "c1", "10.2.1.1/24")
	c2 := w.netns(h2, "c2", "10.2.1.2/24")
	_, err := c1.WaitPing(w.ctx, c2.addr, 5*time.Second)
	w.try(err)
	w.waitOverlay(h1, h2, "kernel", 30*time.Second)
	w.rest(2 * time.Second) // flows are established
	there, back := w.watch(c1, c2, 100*time.Microsecond), w.watch(c2, c1, 100*time.Microsecond)
	settle := []time.Duration{1500 * time.Millisecond, 200 * time.Millisecond, 3 * time.Second, 700 * time.Millisecond}
	for i := range scaled(5, 25) {
		h := w.Host(2 - i%2)
		if i%5 == 4 {
			w.try(h.Kill(w.ctx, h.Meshd(), syscall.SIGKILL))
			w.try(lab.Until(w.ctx, 5*time.Second, "meshd to end", func() bool { return h.Meshd() == 0 }))
		} else {
			_, err := h.Must(w.ctx, "stop")
			w.try(err)
		}
		w.rest(300 * time.Millisecond)
		w.launch(h, "--resume")
		w.rest(settle[i%len(settle)])
	}
	w.waitOverlay(h1, h2, "kernel", 30*time.Second)
	newcomer := w.netns(h2, "newcomer", "10.2.1.3/24")
	_, err = newcomer.WaitPing(w.ctx, c1.addr, 5*time.Second)
	w.try(err)
	fresh := w.watch(newcomer, c1, time.Millisecond)
	w.rest(200 * time.Millisecond)
	_, err = h2.Must(w.ctx, "stop")
	w.try(err)
	w.rest(time.Second)
	w.launch(h2, "--resume")
	w.waitOverlay(h1, h2, "kernel", 30*time.Second)
	for name, p := range map[string]*watched{"there": there, "back": back, "newcomer": fresh} {
		r := w.end(p)
		t.Logf("%s: %v", name, r)
		// What the userspace path has in hand when meshd ends is lost; that meshd is away for a second costs nothing.
		if most := map[string]int{"newcomer": 300}[name]; r.Lost > most || r.Duplicated > 0 {
			t.Errorf("%s: %d lost, %d duplicated", name, r.Lost, r.Duplicated)
		}
	}
}

// TestJoinTen starts ten peers at once and wants a full mesh.
func TestJoinTen(t *testing.T) {
	w := newWorld(t, 10, time.Minute)
	for _, h := range w.Hosts {
		w.planReset(h)
	}
	start := time.Now()
	var wg sync.WaitGroup
	errs := make([]error, len(w.Hosts))
	for i, h := range w.Hosts {
		wg.Go(func() {
			var args []string
			if i > 0 {
				args = []string{w.Host(1).Addr.String()}
			}
			errs[i] = h.Launch(w.ctx, args...)
		})
	}
	wg.Wait()
	for _, err := range errs {
		w.try(err)
	}
	launched := time.Since(start)
	_, err := lab.WaitMesh(w.ctx, 20*time.Second, w.Hosts...)
	w.try(err)
	t.Logf("all launched after %v", launched)
	w.within("ten peers to full mesh", time.Since(start), 5*time.Second)
	for _, h := range w.Hosts {
		r, err := h.Report(w.ctx)
		w.try(err)
		if len(r.Router.Peers) != 10 {
			t.Errorf("%s knows %d peers", h.Name, len(r.Router.Peers))
		}
	}
}

// usage is what one meshd has used so far.
type usage struct {
	rss     int // KiB
	cpu     time.Duration
	in, out uint64 // bytes on the underlay
}

func (w *world) usage(h *lab.Host) (u usage) {
	w.t.Helper()
	pid := h.Meshd()
	status, err := h.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	w.try(err)
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); f[0] == "VmRSS:" {
			u.rss, _ = strconv.Atoi(f[1])
		}
	}
	stat, err := h.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	w.try(err)
	f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	u.cpu = time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100 everywhere
	for path, v := range map[string]*uint64{"rx_bytes": &u.in, "tx_bytes": &u.out} {
		data, err := h.ReadFile("/sys/class/net/eth0/statistics/" + path)
		w.try(err)
		*v, _ = strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	}
	return u
}

// TestIdleCost reports what a peer costs when nothing happens, in meshes of 2, 10 and 25.
func TestIdleCost(t *testing.T) {
	window := 5 * time.Second
	if long() {
		window = time.Minute
	}
	w := newWorld(t, 25, 3*window+3*time.Minute)
	running := 0
	for _, size := range []int{2, 10, 25} {
		for ; running < size; running++ {
			var args []string
			if running > 0 {
				args = []string{w.Host(1).Addr.String()}
			}
			w.launch(w.Hosts[running], args...)
		}
		took, err := lab.WaitMesh(w.ctx, 60*time.Second, w.Hosts[:size]...)
		w.try(err)
		t.Logf("%d peers: full mesh %v after the last launch", size, took.Round(time.Millisecond))
		w.rest(3 * time.Second) // what joining set in motion comes to rest
		before := make([]usage, size)
		for i := range size {
			before[i] = w.usage(w.Hosts[i])
		}
		start := time.Now()
		w.rest(window)
		var rss int
		var cpu time.Duration
		var in, out uint64
		for i := range size {
			u := w.usage(w.Hosts[i])
			rss += u.rss
			cpu += u.cpu - before[i].cpu
			in += u.in - before[i].in
			out += u.out - before[i].out
		}
		took = time.Since(start)
		n, seconds := float64(size), took.Seconds()
		t.Logf("%d peers, idle, each: %.1f MiB RSS, %.2f %% of a CPU, %.0f B/s in, %.0f B/s out",
			size, float64(rss)/n/1024, 100*cpu.Seconds()/n/seconds, float64(in)/n/seconds, float64(out)/n/seconds)
		if mib := float64(rss) / n / 1024; mib > 64 {
			t.Errorf("%.1f MiB each, want less than 64", mib)
		}
		if load := 100 * cpu.Seconds() / n / seconds; load > 5 {
			t.Errorf("%.2f %% of a CPU each, want less than 5", load)
		}
	}
}

// TestMemoryUnderLoad has one peer exchange sealed TCP with nine others at once, both ways, as fast as it goes.
func TestMemoryUnderLoad(t *testing.T) {
	const peers, limit = 10, 60 << 10 // KiB
	bytes := int64(20 << 20)
	if long() {
		bytes = 500 << 20
	}
	w := newWorld(t, peers, 3*time.Minute)
	members := make([]*member, peers)
	for i, h := range w.Hosts {
		var target []string
		if i > 0 {
			target = []string{w.Host(1).Addr.String()}
		}
		w.launchWith(h, []string{"MESH_PASSWORD=" + secret}, append([]string{"--no-fastdp"}, target...)...)
		members[i] = w.netns(h, "c", fmt.Sprintf("10.2.1.%d/24", i+1))
	}
	_, err := lab.WaitMesh(w.ctx, 30*time.Second, w.Hosts...)
	w.try(err)
	idle := w.usage(w.Host(1)).rss
	var wg sync.WaitGroup
	for _, m := range members[1:] {
		wg.Go(func() { w.stream(members[0], m, bytes, time.Minute) })
		wg.Go(func() { w.stream(m, members[0], bytes, time.Minute) })
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	most, samples := make([]int, peers), 0
	for loaded := true; loaded; samples++ {
		select {
		case <-done:
			loaded = false
		case <-time.After(20 * time.Millisecond):
		}
		for i, h := range w.Hosts {
			most[i] = max(most[i], w.usage(h).rss)
		}
	}
	t.Logf("resident in %d samples, MiB at most: the peer of all %.1f (idle %.1f), the others %.1f", samples,
		float64(most[0])/1024, float64(idle)/1024, float64(slices.Max(most[1:]))/1024)
	if m := slices.Max(most); m > limit {
		t.Errorf("%.1f MiB, want at most %d", float64(m)/1024, limit>>10)
	}
}

// rest lets time pass in which nothing is done: it is what is measured.
func (w *world) rest(d time.Duration) {
	select {
	case <-time.After(d):
	case <-w.ctx.Done():
		w.t.Fatal(w.ctx.Err())
	}
}
