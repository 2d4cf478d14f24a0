package hostnet

import (
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// root skips a test that needs root for those who are not.
func root(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// newNamespace makes an empty network namespace that lives as long as the test.
func newNamespace(t *testing.T) *os.File {
	t.Helper()
	root(t)
	type result struct {
		f   *os.File
		err error
	}
	made := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread dies with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			made <- result{nil, err}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		made <- result{f, err}
	}()
	r := <-made
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { r.f.Close() })
	run(t, r.f, "ip link set lo up")
	return r.f
}

// newHost opens a namespace of its own as a host with a bridge.
func newHost(t *testing.T) (*Host, *os.File) {
	t.Helper()
	ns := newNamespace(t)
	h := openHost(t, ns, Config{})
	if _, err := h.EnsureBridge(BridgeSpec{MTU: 1400, MAC: mesh.MAC{2, 0, 0, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	return h, ns
}

func openHost(t *testing.T, ns *os.File, cfg Config) *Host {
	t.Helper()
	var h *Host
	cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	err := inNamespace(ns, func() (err error) {
		h, err = Open(cfg)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

// try runs a command inside a namespace.
func try(ns *os.File, command string) (string, error) {
	var out []byte
	err := inNamespace(ns, func() (err error) {
		words := strings.Fields(command)
		out, err = exec.Command(words[0], words[1:]...).CombinedOutput()
		return err
	})
	return string(out), err
}

func run(t *testing.T, ns *os.File, command string) string {
	t.Helper()
	out, err := try(ns, command)
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return out
}

// wantLinks checks that a namespace has these devices and no others beside lo.
func wantLinks(t *testing.T, ns *os.File, want ...string) {
	t.Helper()
	nl, err := handleIn(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	all, err := nl.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range all {
		if l.Attrs().Name != "lo" {
			got = append(got, l.Attrs().Name)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("devices are %v, want %v", got, want)
	}
}

// dump is the whole state of a namespace as text, without counters and timers.
func dump(t *testing.T, ns *os.File) string {
	t.Helper()
	all := run(t, ns, "ip -d link") + run(t, ns, "ip -o addr") + run(t, ns, "ip route show table all") +
		run(t, ns, "ip -6 route show table all") + run(t, ns, "bridge -d link")
	all = timers.ReplaceAllString(all, "")
	return strings.ReplaceAll(all, " tentative", "")
}

var timers = regexp.MustCompile(`[a-z_]+_timer +[0-9.]+ `)

// changes lists the lines that differ between two dumps.
func changes(before, after string) string {
	var out strings.Builder
	was, is := strings.Split(before, "\n"), strings.Split(after, "\n")
	for _, line := range was {
		if !slices.Contains(is, line) {
			out.WriteString("- " + line + "\n")
		}
	}
	for _, line := range is {
		if !slices.Contains(was, line) {
			out.WriteString("+ " + line + "\n")
		}
	}
	return out.String()
}

// eventually waits until f says yes, for at most 5 s.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(5 * time.Second)
	for !f() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("still not: %s", what)
		}
	}
}

func prefixes(words ...string) (out []netip.Prefix) {
	for _, w := range words {
		out = append(out, netip.MustParsePrefix(w))
	}
	return out
}

// addBridge makes a device that is not ours.
func addBridge(t *testing.T, h *Host, name string) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := h.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		t.Fatal(err)
	}
}
