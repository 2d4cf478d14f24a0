package container

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestEditHosts(t *testing.T) {
	names := []string{"web.mesh.internal", "web"}
	const rest = "127.0.0.1\tlocalhost\n10.1.1.1\tother # web\n"
	const docker = rest + "172.17.0.2\tweb.mesh.internal web\n"
	addrs := prefixes("10.32.0.1/12 10.2.1.1/24")
	once := editHosts(docker, names, addrs, []string{"10.9.9.9\tfar"})
	want := rest + "# mesh: begin\n# mesh: was 172.17.0.2\tweb.mesh.internal web\n" +
		"10.32.0.1\tweb.mesh.internal web\n10.2.1.1\tweb.mesh.internal web\n10.9.9.9\tfar\n# mesh: end\n"
	if once != want {
		t.Errorf("got\n%s\nwant\n%s", once, want)
	}
	if twice := editHosts(once, names, addrs, []string{"10.9.9.9\tfar"}); twice != want {
		t.Errorf("twice gives\n%s\nwant\n%s", twice, want)
	}
	if got := editHosts(once, names, nil, nil); got != docker {
		t.Errorf("undone it is\n%s\nwant\n%s", got, docker)
	}
	if got := editHosts("", names, addrs[:1], nil); got != "# mesh: begin\n10.32.0.1\tweb.mesh.internal web\n# mesh: end\n" {
		t.Errorf("empty file gives %q", got)
	}
}

func FuzzEditHosts(f *testing.F) {
	f.Add("127.0.0.1 localhost\n# mesh: begin\n1.2.3.4 web\n")
	f.Fuzz(func(t *testing.T, text string) {
		once := editHosts(text, []string{"web"}, prefixes("10.32.0.1/12"), nil)
		if twice := editHosts(once, []string{"web"}, prefixes("10.32.0.1/12"), nil); twice != once {
			t.Errorf("%q: twice gives %q, once %q", text, twice, once)
		}
	})
}

func TestRewriteHosts(t *testing.T) {
	w := newWorld(t)
	m := w.manager()
	w.start(1, 100, "web")
	path := filepath.Join(w.proc, "100/root/etc/hosts")
	for range 2 {
		if _, err := m.Attach(t.Context(), Request{Target: "web", Addrs: specs(t, "10.2.1.1/24 10.2.1.2/24"), RewriteHosts: true, AddHosts: []string{"far:fd00::9"}}); err != nil {
			t.Fatal(err)
		}
		got, _ := os.ReadFile(path)
		want := "127.0.0.1\tlocalhost\n# mesh: begin\n# mesh: was 172.17.0.2\tweb.mesh.internal web\n10.2.1.1\tweb.mesh.internal web\n10.2.1.2\tweb.mesh.internal web\nfd00::9\tfar\n# mesh: end\n"
		if string(got) != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
	}
	if _, err := m.Detach(t.Context(), "web", specs(t, "10.2.1.1/24")); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); strings.Contains(string(got), "10.2.1.1\t") || !strings.Contains(string(got), "10.2.1.2\tweb") {
		t.Errorf("after detach it is\n%s", got)
	}
}

// What fails or ends gives the container its own file back.
func TestHostsRestored(t *testing.T) {
	w := newWorld(t)
	m := w.manager()
	w.start(1, 100, "web")
	path := filepath.Join(w.proc, "100/root/etc/hosts")
	before, _ := os.ReadFile(path)
	w.failing("AttachPort", errDeliver)
	req := Request{Target: "web", Addrs: specs(t, "10.2.1.1/24"), RewriteHosts: true, AddHosts: []string{"far:fd00::9"}}
	if _, err := m.Attach(t.Context(), req); err == nil {
		t.Fatal("no error")
	}
	if after, _ := os.ReadFile(path); string(after) != string(before) {
		t.Errorf("a failure left\n%s", after)
	}
	w.failing("AttachPort", nil)
	if _, err := m.Attach(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Detach(t.Context(), "web", req.Addrs); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.ReadFile(path); string(after) != string(before) {
		t.Errorf("detach left\n%s", after)
	}
}

// A container may put anything where its hosts file is; nothing of the host is touched.
func TestOpenInside(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(outside, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		make func(etc string) error
		ok   bool
	}{
		{"file", func(etc string) error { return os.WriteFile(etc+"/hosts", nil, 0o600) }, true},
		{"link inside", func(etc string) error {
			os.WriteFile(etc+"/real", nil, 0o600)
			return os.Symlink("/etc/real", etc+"/hosts")
		}, true},
		{"absolute link outside", func(etc string) error { return os.Symlink(outside, etc+"/hosts") }, false},
		{"relative link outside", func(etc string) error {
			return os.Symlink("../../../../../../../../../.."+outside, etc+"/hosts")
		}, false},
		{"magic link", func(etc string) error { return os.Symlink("/proc/self/root"+outside, etc+"/hosts") }, false},
		{"fifo", func(etc string) error { return unix.Mkfifo(etc+"/hosts", 0o600) }, false},
		{"directory", func(etc string) error { return os.Mkdir(etc+"/hosts", 0o700) }, false},
		{"nothing", func(string) error { return nil }, false},
		{"giant", func(etc string) error { return os.WriteFile(etc+"/hosts", make([]byte, maxHosts+1), 0o600) }, false},
	} {
		dir := t.TempDir()
		if err := os.Mkdir(dir+"/etc", 0o700); err != nil {
			t.Fatal(err)
		}
		if err := c.make(dir + "/etc"); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = editFile(root, "etc/hosts", "", func(string) string { return "edited" })
		root.Close()
		if (err == nil) != c.ok {
			t.Errorf("%s: got %v", c.name, err)
		}
		if got, _ := os.ReadFile(outside); string(got) != "secret" {
			t.Fatalf("%s: the host's file became %q", c.name, got)
		}
	}
}
