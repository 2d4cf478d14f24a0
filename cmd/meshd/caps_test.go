//go:build !cgo

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const capsHelper = "MESHD_TEST_CAPS"

// Giving up capabilities cannot be undone, so it happens in a process of its own: this test's binary.
func TestKeepCapabilities(t *testing.T) {
	if os.Getenv(capsHelper) != "" {
		if err := keepCapabilities(kept); err != nil {
			t.Fatal(err)
		}
		tasks, _ := filepath.Glob("/proc/self/task/*/status")
		for _, task := range tasks {
			status, err := os.ReadFile(task)
			if err != nil {
				continue // a thread that has ended
			}
			for line := range strings.SplitSeq(string(status), "\n") {
				if strings.HasPrefix(line, "Cap") {
					fmt.Println(line)
				}
			}
		}
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestKeepCapabilities$")
	cmd.Env = append(os.Environ(), capsHelper+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var mask uint64
	for _, c := range kept {
		mask |= 1 << c
	}
	lines := 0
	for line := range strings.SplitSeq(string(out), "\n") {
		name, value, ok := strings.Cut(line, ":\t")
		if !ok || !strings.HasPrefix(name, "Cap") {
			continue
		}
		lines++
		var have uint64
		if _, err := fmt.Sscanf(value, "%x", &have); err != nil || have&^mask != 0 {
			t.Errorf("got %s, want nothing beyond %016x", line, mask)
		}
		if name == "CapEff" && have&(1<<unix.CAP_NET_ADMIN) == 0 {
			t.Errorf("got %s, want CAP_NET_ADMIN in it", line)
		}
	}
	if lines < 5 {
		t.Errorf("no capabilities in %q", out)
	}
}
