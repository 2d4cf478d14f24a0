package container

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"meshd/mesh"
	"meshd/router/hostnet"
)

var (
	_ Network  = (*hostnet.Host)(nil)
	_ Bridge   = (*hostnet.Host)(nil)
	_ Firewall = (*hostnet.Firewall)(nil)
)

// realWorld has the kernel in place of maps: a host's namespace with a bridge, and processes in theirs.
type realWorld struct {
	*world
	t    *testing.T
	ns   *os.File
	host *hostnet.Host
	fw   *hostnet.Firewall
}

func newRealWorld(t *testing.T) *realWorld {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	r := &realWorld{world: newWorld(t), t: t, ns: newNamespace(t)}
	r.in(func() error {
		var err error
		r.host, err = hostnet.Open(hostnet.Config{Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
		return err
	})
	t.Cleanup(func() { r.host.Close() })
	if _, err := r.host.EnsureBridge(hostnet.BridgeSpec{MTU: 1400}); err != nil {
		t.Fatal(err)
	}
	r.fw = r.host.NewFirewall(hostnet.FirewallConfig{})
	return r
}

func (r *realWorld) manager() *Manager {
	r.t.Helper()
	cfg := r.config()
	cfg.Network, cfg.Bridge, cfg.Firewall, cfg.Docker = r.host, r.host, r.fw, nil
	cfg.OpenNamespace, cfg.ProcPath, cfg.Grace = hostnet.OpenNamespace, "/proc", time.Second
	m, err := New(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	return m
}

// newNamespace makes an empty network namespace.
func newNamespace(t *testing.T) *os.File {
	t.Helper()
	made := make(chan *os.File, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends here
		if unix.Unshare(unix.CLONE_NEWNET) == nil {
			if f, err := os.Open("/proc/thread-self/ns/net"); err == nil {
				made <- f
			}
		}
		close(made)
	}()
	f := <-made
	if f == nil {
		t.Fatal("cannot make a namespace")
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// in runs f in the host's namespace.
func (r *realWorld) in(f func() error) {
	r.t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(r.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	if err := <-done; err != nil {
		r.t.Fatal(err)
	}
}

// process starts one with a network of its own, and returns its id and its end.
func (r *realWorld) process() (pid int, end func()) {
	r.t.Helper()
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	ended := false
	end = func() {
		if !ended {
			ended = true
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
	r.t.Cleanup(end)
	return cmd.Process.Pid, end
}

// inside runs a command in the namespace of a process.
func inside(pid int, command string) (string, error) {
	out, err := exec.Command("nsenter", append([]string{"-t", fmt.Sprint(pid), "-n"}, strings.Fields(command)...)...).CombinedOutput()
	return string(out), err
}

func (r *realWorld) wantPing(pid int, to string) {
	r.t.Helper()
	if out, err := inside(pid, "ping -c 1 -W 2 "+to); err != nil {
		r.t.Errorf("ping %s: %v\n%s", to, err, out)
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(10 * time.Second)
	for !f() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("still not: %s", what)
		}
	}
}

func TestRealAttach(t *testing.T) {
	r := newRealWorld(t)
	m := r.manager()
	stop := r.run(m)
	a, endA := r.process()
	b, endB := r.process()
	one, two := fmt.Sprint("pid:", a), fmt.Sprint("pid:", b)
	for range 2 {
		r.attach(m, one, "net:default 10.2.1.1/24", "10.32.0.1/28 10.2.1.1/24")
		r.attach(m, two, "10.2.1.2/24 net:default", "10.2.1.2/24 10.32.0.2/28")
	}
	r.wantPing(a, "10.2.1.2")
	r.wantPing(b, "10.32.0.1")
	if _, err := m.Expose(t.Context(), ExposeRequest{}); err != nil {
		t.Fatal(err)
	}
	r.wantPing(a, "10.32.0.3")
	list, err := m.List(t.Context(), nil)
	if err != nil || len(list) != 3 || !reflect.DeepEqual(list[0].Addresses, prefixes("10.32.0.3/28")) {
		t.Fatalf("list is %+v, %v", list, err)
	}

	// A restart finds everything; nothing is disturbed.
	before, _ := inside(a, "ip -d addr show ethmesh")
	stop()
	m = r.manager()
	stop = r.run(m)
	r.wantPing(a, "10.2.1.2")
	if after, _ := inside(a, "ip -d addr show ethmesh"); after != before {
		t.Errorf("a restart changed\n%s\nto\n%s", before, after)
	}
	if again, err := m.List(t.Context(), nil); err != nil || !reflect.DeepEqual(again, list) {
		t.Errorf("after a restart the list is %+v, %v, want %+v", again, err, list)
	}

	// Half the addresses, then the rest.
	if _, err := m.Detach(t.Context(), one, specs(t, "10.2.1.1/24")); err != nil {
		t.Fatal(err)
	}
	if out, _ := inside(a, "ip -br addr show ethmesh"); strings.Contains(out, "10.2.1.1") || !strings.Contains(out, "10.32.0.1/28") {
		t.Errorf("inside is %s", out)
	}
	if _, err := m.Detach(t.Context(), one, nil); err != nil {
		t.Fatal(err)
	}
	if out, err := inside(a, "ip link show ethmesh"); err == nil {
		t.Errorf("inside is %s", out)
	}
	// A process that ends leaves nothing.
	endB()
	eventually(t, "its addresses are free", func() bool {
		m.Recheck()
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.owned) == 1
	})
	if _, err := m.Hide(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	stop()
	endA()
	if len(r.owned) > 0 || len(r.stored) > 0 || len(r.announced) > 0 {
		t.Errorf("left are %v, %v, %v", r.owned, r.stored, r.announced)
	}
	if err := r.host.Reset(); err != nil {
		t.Fatal(err)
	}
	r.in(func() error {
		out, err := exec.Command("sh", "-c", "ip -br link; nft list ruleset").CombinedOutput()
		if words := strings.Fields(string(out)); err != nil || len(words) == 0 || words[0] != "lo" || strings.Contains(string(out), "mesh") {
			t.Errorf("left on the host: %s, %v", out, err)
		}
		return nil
	})
}

// A namespace with a path of its own outlives processes, and may be made anew.
func TestRealNamespacePath(t *testing.T) {
	r := newRealWorld(t)
	m := r.manager()
	defer r.run(m)()
	path := filepath.Join(t.TempDir(), "net")
	mount := func() {
		t.Helper()
		f := newNamespace(t)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), path, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	umount := func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
	mount()
	defer umount()
	r.attach(m, "netns:"+path, "10.2.1.1/24", "10.2.1.1/24")
	list, err := m.List(t.Context(), []string{"netns:" + path})
	if err != nil || len(list) != 1 {
		t.Fatalf("list is %+v, %v", list, err)
	}
	umount()
	mount()
	eventually(t, "attached again", func() bool {
		m.Recheck()
		now, err := m.List(t.Context(), []string{"netns:" + path})
		return err == nil && reflect.DeepEqual(now, list)
	})
	if e := r.Endpoints(); len(e) != 1 || e[0].MAC != list[0].MAC || e[0].Owner == mesh.OwnerExpose {
		t.Errorf("announced is %+v", e)
	}
}

// The host's own network is refused, and nothing remains of the attempt.
func TestRealHostNetwork(t *testing.T) {
	r := newRealWorld(t)
	m := r.manager()
	before := r.state()
	cmd := exec.Command("sleep", "60")
	r.in(cmd.Start)
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	_, err := m.Attach(t.Context(), Request{Target: fmt.Sprint("pid:", cmd.Process.Pid)})
	if err == nil || !strings.Contains(err.Error(), "shares the network of the host") {
		t.Errorf("got %v", err)
	}
	if after := r.state(); after != before {
		t.Errorf("left\n%s\nwas\n%s", after, before)
	}
}
