package integration

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestDemo runs the demonstration twice, the first time killed half-way.
func TestDemo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	run := func(ctx context.Context, kill bool) string {
		t.Helper()
		cmd := exec.CommandContext(ctx, filepath.Join(binaries, "meshctl"), "demo")
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		cmd.WaitDelay = 5 * time.Second
		if kill {
			cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGKILL) }
		}
		err := cmd.Run()
		if kill != (err != nil) {
			t.Errorf("killed: %v, ended with %v:\n%s", kill, err, out.String())
		}
		return out.String()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	run(ctx, true)
	cancel()
	start := time.Now()
	out := run(t.Context(), false)
	t.Log(out)
	if took := time.Since(start); took > time.Minute {
		t.Errorf("the demonstration took %v", took)
	}
	for _, sign := range []string{"10 of 10 answered", "checksum right", "through h3", "The direct way is taken back", "Everything is removed"} {
		if !strings.Contains(out, sign) {
			t.Errorf("the demonstration shows no %q", sign)
		}
	}
}
