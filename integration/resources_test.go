package integration

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"meshd/integration/lab"
)

// TestFewDescriptors is R1: a meshd that may open 256 files has connections held open at all that listens. What it
// serves goes on, what is new is refused in words or waits, and afterwards all is as before.
func TestFewDescriptors(t *testing.T) {
	w := newWorld(t, 2, 90*time.Second)
	h1, h2 := w.Host(1), w.Host(2)
	w.launch(h1)
	w.planReset(h2)
	r, err := h2.Run(w.ctx, "prlimit", "--nofile=256:256", "meshctl", "launch", h1.Addr.String())
	w.try(err)
	if r.Exit != 0 {
		t.Fatal(r)
	}
	_, err = lab.WaitMesh(w.ctx, 15*time.Second, h1, h2)
	w.try(err)
	c1, c2 := w.netns(h1, "c1", "10.2.1.1/24"), w.netns(h2, "c2", "10.2.1.2/24")
	late, err := h2.Netns(w.ctx, "late")
	w.try(err)
	t.Cleanup(func() { w.try(late.Remove(context.Background())) })
	_, err = c1.WaitPing(w.ctx, c2.addr, 5*time.Second)
	w.try(err)
	pid := h2.Meshd()
	open := func() int { return len(h2.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))) }
	before := open()
	p := w.watch(c1, c2, time.Millisecond)

	var held []net.Conn
	t.Cleanup(func() {
		for _, c := range held {
			c.Close()
		}
	})
	hold := func(what string, dial func() (net.Conn, error)) {
		n := 0
		for range 400 {
			c, err := dial()
			if err != nil {
				break
			}
			held = append(held, c)
			n++
		}
		t.Logf("%d connections to %s; %d descriptors", n, what, open())
	}
	hold("the control socket", func() (net.Conn, error) { return h2.DialUnix(w.ctx, "/run/meshd/meshd.sock") })
	hold("the port of the mesh", func() (c net.Conn, err error) {
		err = h1.Do(func() error {
			c, err = net.DialTimeout("tcp", h2.Addr.String()+":6783", time.Second)
			return err
		})
		return c, err
	})
	hold("metrics", func() (c net.Conn, err error) {
		err = h2.Do(func() error {
			c, err = net.DialTimeout("tcp", "127.0.0.1:6782", time.Second)
			return err
		})
		return c, err
	})
	most := open()
	if _, err := late.Attach(w.ctx, "10.2.1.3/24"); err != nil && !strings.Contains(err.Error(), "too many open files") && !strings.Contains(err.Error(), "within") {
		t.Errorf("a container cannot be attached, and that is not told in words: %v", err)
	}
	w.rest(3 * time.Second)
	w.pings(c1, c2, 5, 56)
	for _, c := range held {
		c.Close()
	}
	held = nil
	w.try(lab.Until(w.ctx, 15*time.Second, "a container to be attached again", func() bool {
		_, err := late.Attach(w.ctx, "10.2.1.3/24")
		return err == nil
	}))
	_, err = lab.WaitMesh(w.ctx, 15*time.Second, h1, h2)
	w.try(err)
	if h2.Meshd() != pid {
		t.Error("meshd died of it")
	}
	if r := w.end(p); r.Lost+r.Duplicated > 0 {
		t.Errorf("meanwhile between containers: %v", r)
	}
	w.try(lab.Until(w.ctx, 20*time.Second, "the descriptors to be given back", func() bool { return open() <= before+8 }))
	t.Logf("%d descriptors before, %d at most, %d after", before, most, open())
}

// TestSmallMemory is R1: in a cgroup of 64 MiB meshd serves. With a password it needs 128 MiB more while it starts,
// and where they are not to be had meshctl says so.
func TestSmallMemory(t *testing.T) {
	for _, password := range []string{"", secret} {
		t.Run(fmt.Sprintf("password=%t", password != ""), func(t *testing.T) {
			w := newWorld(t, 2, 90*time.Second)
			h1, h2 := w.Host(1), w.Host(2)
			var env []string
			if password != "" {
				env = []string{"MESH_PASSWORD=" + password}
			}
			w.launchWith(h1, env)
			name := fmt.Sprintf("meshd-small-%d", os.Getpid())
			dir, limit := "/sys/fs/cgroup/memory/"+name, "memory.limit_in_bytes"
			if _, err := os.Stat("/sys/fs/cgroup/memory"); err != nil {
				dir, limit = "/sys/fs/cgroup/"+name, "memory.max"
			}
			w.try(os.Mkdir(dir, 0o755))
			t.Cleanup(func() { w.try(os.Remove(dir)) })
			w.try(os.WriteFile(dir+"/"+limit, []byte("67108864"), 0o644))
			w.planReset(h2)
			script := fmt.Sprintf("echo $$ > %s/cgroup.procs && exec env %s meshctl launch %v", dir, strings.Join(env, " "), h1.Addr)
			r, err := h2.Run(w.ctx, "sh", "-c", script)
			w.try(err)
			if password != "" && (r.Exit == 0 || !strings.Contains(r.Stderr, "with a password 192 MiB")) {
				t.Errorf("too little memory, and that is not told in words: %s", r)
			}
			if password != "" {
				w.try(os.WriteFile(dir+"/"+limit, []byte("201326592"), 0o644))
				r, err = h2.Run(w.ctx, "sh", "-c", script)
				w.try(err)
			}
			if r.Exit != 0 {
				t.Fatal(r)
			}
			_, err = lab.WaitMesh(w.ctx, 15*time.Second, h1, h2)
			w.try(err)
			pid := h2.Meshd()
			if group, err := h2.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid)); err != nil || !strings.Contains(string(group), name) {
				t.Fatalf("meshd is not in the cgroup: %s %v", group, err)
			}
			c1, c2 := w.netns(h1, "c1", "10.2.1.1/24"), w.netns(h2, "c2", "10.2.1.2/24")
			_, err = c1.WaitPing(w.ctx, c2.addr, 5*time.Second)
			w.try(err)
			for _, way := range [][2]*member{{c1, c2}, {c2, c1}} {
				w.stream(way[0], way[1], 20<<20, 30*time.Second)
			}
			if h2.Meshd() != pid {
				t.Error("meshd died of it")
			}
			t.Logf("at most %d MiB resident", w.meshdMemory(h2)>>20)
		})
	}
}
