package meshd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestNoWallClock keeps the wall clock out of decisions: a host whose clock is set, by an hour or by a year,
// notices nothing. Times are compared by their monotonic readings, which none of these keeps.
func TestNoWallClock(t *testing.T) {
	for _, dir := range []string{"container", "control", "dns", "fastdp", "ipam", "mesh", "proxy", "router", "store", "cmd/meshd"} {
		err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for i, line := range strings.Split(string(text), "\n") {
				if strings.HasPrefix(path, "container/docker/") {
					continue // asks Docker for events since a time of Docker's own
				}
				for _, way := range []string{".Unix()", ".UnixNano()", ".UnixMilli()", ".UnixMicro()", "time.Unix(", "time.UnixMilli(", ".Round(0)", "time.Parse("} {
					if strings.Contains(line, way) {
						t.Errorf("%s:%d: %s loses the monotonic reading", path, i+1, way)
					}
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
