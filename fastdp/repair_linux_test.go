package fastdp

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// What somebody removes by hand comes back, and frames stop for less than 2 s.
func TestRepair(t *testing.T) {
	for _, c := range []struct {
		name   string
		clsact bool
		breaks func(t *testing.T, l *lab, h *labHost, c *labContainer)
	}{
		{"vxlan device", false, func(t *testing.T, l *lab, h *labHost, c *labContainer) { l.ip("h1", "link del mesh-vx") }},
		{"vxlan device down", false, func(t *testing.T, l *lab, h *labHost, c *labContainer) { l.ip("h1", "link set mesh-vx down") }},
		{"pins", false, func(t *testing.T, l *lab, h *labHost, c *labContainer) {
			if err := os.RemoveAll(h.cfg.PinDir); err != nil {
				t.Fatal(err)
			}
		}},
		{"links", false, func(t *testing.T, l *lab, h *labHost, c *labContainer) {
			for _, k := range []string{"port_in", "port_out", "vx_in", "bridge_out"} {
				pins, err := filepath.Glob(filepath.Join(h.cfg.PinDir, "links", k+"-*"))
				if err != nil || len(pins) == 0 {
					t.Fatalf("%s: %v, %v", k, pins, err)
				}
				for _, pin := range pins {
					p, err := link.LoadPinnedLink(pin, nil)
					if err != nil {
						t.Fatal(err)
					}
					defer p.Close()
					if err := p.(interface{ Detach() error }).Detach(); err != nil {
						t.Fatal(err)
					}
				}
			}
		}},
		{"clsact", true, func(t *testing.T, l *lab, h *labHost, c *labContainer) {
			for _, dev := range []string{c.veth, "mesh-vx", "mesh", "mesh-tap"} {
				l.run("nsenter", "--net=/run/netns/"+h.ns, "tc", "qdisc", "del", "dev", dev, "clsact")
			}
		}},
		{"config", false, func(t *testing.T, l *lab, h *labHost, c *labContainer) {
			change(t, h, bpfMapConfig, uint32(0), new(bpfConfig))
		}},
		{"peer", false, func(t *testing.T, l *lab, h *labHost, c *labContainer) {
			change(t, h, bpfMapPeers, uint32(l.hosts[1].id()), new(bpfPeer))
		}},
		{"endpoints", false, func(t *testing.T, l *lab, h *labHost, c *labContainer) {
			change(t, h, bpfMapEndpoints, macKey(c.port.MAC), nil)
			change(t, h, bpfMapEndpoints, macKey(l.hosts[1].cts[0].port.MAC), nil)
		}},
		{"port", false, func(t *testing.T, l *lab, h *labHost, c *labContainer) {
			change(t, h, bpfMapPorts, uint32(c.port.Index), nil)
		}},
		{"TAP", false, func(t *testing.T, l *lab, h *labHost, c *labContainer) {
			l.ip("h1", "link del mesh-tap")
			l.ip("h1", "tuntap add mesh-tap mode tap")
			l.ip("h1", "link set mesh-tap mtu 1410 master mesh up")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			l.clsact = c.clsact
			a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
			a.knows(b)
			b.knows(a)
			l.startAll()
			h := l.hosts[0]
			before := l.tree(h)
			there, back := l.stream(a, b, time.Millisecond), l.stream(b, a, time.Millisecond)
			<-time.After(100 * time.Millisecond)
			c.breaks(t, l, h, a)
			if !eventually(2*time.Second, func() bool { return shape(l.tree(h)) == shape(before) && h.look().Status.Fault == "" }) {
				t.Errorf("not repaired: %+v\nis\n%swas\n%s", h.look().Status, shape(l.tree(h)), shape(before))
			}
			l.allUp(5 * time.Second)
			sofar := h.nonZero()["to_tunnel"]
			if !eventually(2*time.Second, func() bool { return h.nonZero()["to_tunnel"] > sofar+50 }) {
				t.Error("no frames by the tunnel afterwards")
			}
			for _, r := range []tally{there.stop(), back.stop()} {
				if t.Log(r); r.Gap > 2*time.Second || r.Got == 0 {
					t.Errorf("%v: want no gap of 2 s", r)
				}
			}
		})
	}
}

// change writes into a pinned map, as bpftool does, or deletes from it.
func change(t *testing.T, h *labHost, name string, key, value any) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(layoutDir(h.cfg.PinDir, LayoutVersion), name), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if value == nil {
		err = m.Delete(key)
	} else {
		err = m.Put(key, value)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// What an earlier meshd, another version or somebody else left behind is used, replaced or refused with its name.
func TestLeftovers(t *testing.T) {
	junk := func(t *testing.T, path string, size uint32) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: size, MaxEntries: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		if err := m.Pin(path); err != nil {
			t.Fatal(err)
		}
	}
	l := newLab(t)
	a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
	a.knows(b)
	b.knows(a)
	dir := l.hosts[0].cfg.PinDir
	junk(t, layoutDir(dir, LayoutVersion)+"-new/"+bpfMapConfig, 48)       // somebody died half way
	junk(t, filepath.Join(layoutDir(dir, LayoutVersion), bpfMapPeers), 8) // another build
	junk(t, filepath.Join(layoutDir(dir, 1), bpfMapConfig), 4)            // too old to describe itself
	junk(t, filepath.Join(layoutDir(dir, 99), bpfMapEndpoints), 4)        // too new
	junk(t, filepath.Join(dir, "links", "port_in-99999"), 4)              // of a device that has gone
	l.ip("h1", "link add mesh-vx type vxlan id 7 dstport 4789 dev eth0")  // not as it should be
	l.startAll()
	there := l.stream(a, b, time.Millisecond)
	if !eventually(5*time.Second, func() bool { return l.hosts[1].nonZero()["from_tunnel"] > 100 }) {
		t.Error("no frames by the tunnel")
	}
	if r := there.stop(); r.Got != r.Sent || r.Twice > 0 {
		t.Error(r)
	}
	want := fmt.Sprintf("links\nv%d\n", LayoutVersion)
	if got := l.run("ls", dir); got != want {
		t.Errorf("left: %q, want %q", got, want)
	}
	if got := l.run("ls", filepath.Join(dir, "links")); strings.Contains(got, "99999") {
		t.Errorf("left: %s", got)
	}
	// Something that is no map at all is not ours to remove.
	third := l.host()
	path := filepath.Join(layoutDir(third.cfg.PinDir, LayoutVersion), bpfMapConfig)
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := third.start(); err == nil || !strings.Contains(err.Error(), bpfMapConfig) {
		t.Errorf("a directory in place of a map: got %v", err)
	}
}

// A bpffs is mounted where there is none. Without the right to, or to use bpf(2), as under lockdown or in a
// container, the kernel path is refused as such, and nothing is left.
func TestHostRefuses(t *testing.T) {
	l := newLab(t)
	a, b := l.host().container("10.32.0.1/12"), l.host().container("10.32.0.2/12")
	a.knows(b)
	b.knows(a)
	dir := filepath.Join(t.TempDir(), "bpf")
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	l.hosts[0].cfg.PinDir = filepath.Join(dir, "meshd")
	l.startAll()
	if on, err := isBPFFS(dir); !on || err != nil {
		t.Errorf("no bpffs is mounted: %v", err)
	}
	before := l.run("nsenter", "--net=/run/netns/"+l.hosts[1].ns, "ip", "-br", "link")
	for _, c := range []struct{ lacks, dir, says string }{
		{"-sys_admin", filepath.Join(t.TempDir(), "none", "meshd"), "no bpffs"},
		{"-sys_admin,-bpf,-perfmon", l.hosts[1].cfg.PinDir + "2", "bpf(2) not permitted"},
	} {
		h := *l.hosts[1]
		h.cfg.PinDir, h.as = c.dir, []string{"setpriv", "--inh-caps=-all", "--bounding-set=" + c.lacks}
		err := h.start()
		if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), ErrNotSupported.Error()) {
			t.Errorf("without %s: got %v, want %q", c.lacks, err, c.says)
		}
	}
	if after := l.run("nsenter", "--net=/run/netns/"+l.hosts[1].ns, "ip", "-br", "link"); after != before {
		t.Errorf("left\n%s\nwas\n%s", after, before)
	}
}

// tree is everything of ours that there is on a host.
func (l *lab) tree(h *labHost) string {
	l.t.Helper()
	var out strings.Builder
	filepath.Walk(h.cfg.PinDir, func(path string, info os.FileInfo, err error) error {
		if err == nil {
			out.WriteString(strings.TrimPrefix(path, h.cfg.PinDir) + "\n")
		}
		return nil
	})
	in := func(args ...string) {
		out.WriteString(l.run(append([]string{"nsenter", "--net=/run/netns/" + h.ns}, args...)...))
	}
	in("ip", "-br", "link", "show", "type", "vxlan")
	in("sh", "-c", "ip -br link show type veth | grep -o '^mesh-vx[^ ]* *[A-Z]*'; true")
	devices := []string{"mesh", "mesh-tap", "eth0"}
	for _, c := range h.cts {
		devices = append(devices, c.veth)
	}
	for _, dev := range devices {
		in("sh", "-c", "for d in ingress egress; do tc filter show dev "+dev+" $d | grep -o 'bpf.*handle 0x1 [a-z_]*'; done; true")
	}
	for _, c := range h.cts {
		in("bridge", "-d", "link", "show", "dev", c.veth)
		in("sh", "-c", "bridge fdb show dev "+c.veth+" | grep static | sort")
	}
	return out.String()
}

// shape leaves out the numbers that differ from one making to the next.
func shape(tree string) string {
	var lines []string
	for _, line := range strings.Split(tree, "\n") {
		for _, k := range []string{"/links/vx_in-", "/links/bridge_out-", "/links/joined_in-"} {
			if strings.HasPrefix(line, k) {
				line = k
			}
		}
		if i := strings.Index(line, "@NONE"); i >= 0 || strings.Contains(line, "mesh-vx  ") {
			line = "mesh-vx"
		}
		if i := strings.Index(line, ") "); i >= 0 && strings.Contains(line, "(") {
			line = line[:strings.Index(line, "(")] + strings.Fields(line[i+2:])[0]
			if f := strings.Fields(tree); len(f) == 0 {
				continue
			}
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

// Remove leaves the host as it was, with meshd running or not.
func TestRemove(t *testing.T) {
	for _, clsact := range []bool{false, true} {
		for _, running := range []bool{true, false} {
			l := newLab(t)
			l.clsact = clsact
			h := l.host()
			h.container("10.32.0.1/12", "fd00:1::1/64")
			before := l.tree(h)
			l.startAll()
			if l.tree(h) == before {
				t.Fatal("nothing was made")
			}
			if running {
				h.tell(order{Op: "remove"})
			} else {
				h.kill()
				h.cfg.Config.clsact = clsact
				inNetns(t, h.ns, func() error { return Remove(h.cfg.Config) })
			}
			if now := l.tree(h); now != before {
				t.Errorf("clsact %v, running %v: left\n%s\nwas\n%s", clsact, running, now, before)
			}
			if out := l.run("nsenter", "--net=/run/netns/"+h.ns, "tc", "qdisc", "show"); strings.Contains(out, "clsact") {
				t.Errorf("qdiscs left: %s", out)
			}
		}
	}
}

// Applying everything twice changes nothing.
func TestTwice(t *testing.T) {
	l := newLab(t)
	a := l.host().container("10.32.0.1/12")
	l.host().container("10.32.0.2/12")
	l.startAll()
	h := l.hosts[0]
	before := l.tree(h)
	h.brief(nil)
	if now := l.tree(h); now != before {
		t.Errorf("is\n%s\nwas\n%s", now, before)
	}
	// A port that goes by itself is forgotten, and one detached leaves nothing.
	b := h.container("10.32.0.5/12")
	h.tell(order{Op: "attach", Port: b.port})
	l.ip("h1", "link del "+a.veth)
	h.cts = h.cts[1:]
	if !eventually(2*time.Second, func() bool { return h.look().Status.Ports == 1 }) {
		t.Errorf("ports: %+v", h.look().Ports)
	}
	h.tell(order{Op: "detach", Index: b.port.Index})
	h.tell(order{Op: "detach", Index: b.port.Index})
	if s := h.look().Status; s.Ports != 0 || s.Fault != "" {
		t.Errorf("after detaching: %+v", s)
	}
	if now := l.tree(h); strings.Contains(now, "port_") {
		t.Errorf("left:\n%s", now)
	}
}

func TestRefusals(t *testing.T) {
	l := newLab(t)
	h := l.host()
	if err := h.start(); err != nil {
		t.Fatal(err)
	}
	second := *h
	if err := second.start(); err == nil || !strings.Contains(err.Error(), ErrBusy.Error()) {
		t.Errorf("a second meshd: got %v, want %v", err, ErrBusy)
	}
	// The UDP port is taken by somebody else's device: the ports are guarded, the paths say why they are not
	// up, and are once it is free.
	other := l.host()
	other.container("10.32.0.2/12")
	l.ip("h2", "link add vxlan0 type vxlan id 5 dstport 6784 dev eth0 local 192.0.2.2 remote 192.0.2.9")
	l.ip("h2", "link set vxlan0 up")
	if err := other.start(); err != nil {
		t.Fatal(err)
	}
	other.brief(nil)
	h.brief(nil)
	if p := other.look().Paths[0]; p.Up || !strings.Contains(p.Reason, "6784 is taken") {
		t.Errorf("port taken: %+v", p)
	}
	if s := other.look().Status; s.Ports != 1 {
		t.Errorf("port taken: %+v", s)
	}
	l.ip("h2", "link del vxlan0")
	l.allUp(20 * time.Second)
	// A device of another kind has our name.
	third := l.host()
	l.ip("h3", "link add mesh-vx type bridge")
	if err := third.start(); err != nil {
		t.Fatal(err)
	}
	if f := third.look().Status.Fault; !strings.Contains(f, "type bridge") {
		t.Errorf("name taken: got %q", f)
	}
}
