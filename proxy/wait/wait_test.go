package wait

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// installed gives the program in a directory of its own.
func installed(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := Install(dir); errors.Is(err, ErrNotSupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, filepath.Base(Path))
}

// The loopback interface is up in every place where tests run.
func TestBecomesTheCommand(t *testing.T) {
	wait := installed(t)
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"runs": 0o755, "text": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho ran \"$@\"\n"), mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		env, args string
		exit      int
		out       string
	}{
		{"PATH=/bin:/usr/bin", "lo sh -c echo\t$0\t$A a", 0, "a b"},
		{"PATH=" + dir + ":/bin:/usr/bin", "lo runs x", 0, "ran x"},
		{"PATH=/nowhere::" + dir, "lo runs", 0, "ran"},
		{"X=y", "lo true", 0, ""}, // the usual directories without PATH
		{"PATH=/bin", "lo " + dir + "/runs y", 0, "ran y"},
		{"PATH=/bin:/usr/bin", "lo sh -c exit\t7", 7, ""},
		{"PATH=" + dir, "lo nothing", 127, "executable file not found in $PATH"},
		{"PATH=", "lo nothing", 127, "executable file not found in $PATH"},
		{"PATH=" + dir, "lo text", 126, "permission denied"},
		{"PATH=/bin", "lo " + dir + "/text", 126, "permission denied"},
		{"PATH=/bin", "lo " + dir + "/none", 127, "no such file"},
		{"PATH=/bin", "lo " + dir + "/text/none", 127, "no such file"},
		{"PATH=/bin", "lo " + dir, 126, "permission denied"},
		{"PATH=" + strings.Repeat("/x", 5000) + ":" + dir, "lo runs", 0, "ran"},
		{"PATH=/bin", "lo " + strings.Repeat("n", 5000), 127, "executable file not found"},
		{"PATH=/bin", "lo", 125, "usage"},
		{"PATH=/bin", "", 125, "usage"},
	} {
		var args []string
		for _, a := range strings.Split(c.args, " ") {
			if a != "" {
				args = append(args, strings.ReplaceAll(a, "\t", " "))
			}
		}
		cmd := exec.Command(wait, args...)
		cmd.Env = []string{"A=b", c.env}
		out, err := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != c.exit || !strings.Contains(string(out), c.out) {
			t.Errorf("%.100s wait %.100s: exit %d, %.200q, %v; want %d, %q", c.env, c.args, code, out, err, c.exit, c.out)
		}
	}
}

// While it waits it can be ended, and what it becomes has the signals that it was given.
func TestSignals(t *testing.T) {
	wait := installed(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT} {
		cmd := exec.Command(wait, "no-such-if0", "true")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case <-done:
		case <-time.After(5 * time.Second):
			cmd.Process.Kill()
			t.Fatalf("%v does not end it", sig)
		}
		// It may be hit before it has blocked the signal, and then dies of it.
		ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if !ws.Signaled() && ws.ExitStatus() != 128+int(sig) {
			t.Errorf("%v: exit status %d", sig, ws.ExitStatus())
		}
	}
	out, err := exec.Command(wait, "lo", "sh", "-c", "grep SigBlk /proc/self/status").Output()
	if err != nil || strings.TrimSpace(string(out)) != "SigBlk:\t0000000000000000" {
		t.Errorf("the command starts with %q, %v", out, err)
	}
}

func TestInstall(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep", "wait")
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	for range 2 {
		if err := Install(dir); err != nil {
			t.Fatal(err)
		}
		if !Installed(dir) {
			t.Fatal("not installed")
		}
	}
	path := filepath.Join(dir, filepath.Base(Path))
	before, _ := os.Stat(path)
	if err := os.WriteFile(path, []byte("damaged"), 0o755); err != nil {
		t.Fatal(err)
	}
	if Installed(dir) {
		t.Error("a damaged one counts as installed")
	}
	if err := Install(dir); err != nil || !Installed(dir) {
		t.Errorf("a damaged one stays: %v", err)
	}
	// It is another file: who runs the old one is not disturbed.
	if after, err := os.Stat(path); err != nil || os.SameFile(before, after) || after.Mode().Perm() != 0o755 {
		t.Errorf("%v %v", after.Mode(), err)
	}
	if files, _ := filepath.Glob(dir + "/.wait*"); len(files) > 0 {
		t.Errorf("left %v", files)
	}
}
