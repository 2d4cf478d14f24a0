// Package mutate breaks the product on purpose, so that tests can be shown to notice.
package mutate

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Build makes the test binary of the package in the current directory with old, which file must hold exactly once,
// replaced by broken. Nothing in the source tree is changed.
func Build(t *testing.T, file, old, broken string) (binary string) {
	t.Helper()
	src, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(src), old); n != 1 {
		t.Fatalf("%s has %q %d times, want once", file, old, n)
	}
	dir := t.TempDir()
	changed := filepath.Join(dir, "broken.go")
	if err := os.WriteFile(changed, []byte(strings.Replace(string(src), old, broken, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	abs, err := filepath.Abs(file)
	if err != nil {
		t.Fatal(err)
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {abs: changed}})
	if err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(list, overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	binary = filepath.Join(dir, "broken.test")
	// Without vet, which would refuse what is wrong with a mutation rather than let a test find it.
	if out, err := exec.CommandContext(t.Context(), "go", "test", "-vet=off", "-c", "-overlay", list, "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return binary
}

// Caught runs a binary of Build, which has to fail in a test, and returns its output.
func Caught(t *testing.T, binary string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), binary, args...).CombinedOutput()
	if err == nil {
		t.Fatalf("not caught:\n%s", out)
	}
	if !strings.Contains(string(out), "--- FAIL") {
		t.Fatalf("it failed for another reason:\n%s", out)
	}
	return string(out)
}
