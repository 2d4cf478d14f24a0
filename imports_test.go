package meshd

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// The rooms of the house, which know nothing of each other: cmd/meshd passes them what they need.
// A room is a directory with all that is below it, unless a longer entry takes that out.
var rooms = []string{
	"meshd/container", "meshd/control", "meshd/dns", "meshd/fastdp", "meshd/integration", "meshd/ipam", "meshd/mesh",
	"meshd/proxy", "meshd/router", "meshd/router/gossip", "meshd/router/hostnet", "meshd/router/tunnel", "meshd/sim", "meshd/store",
	"meshd/cmd/meshctl", "meshd/cmd/meshd",
}

// mayImport lists, for a room, the other rooms that it may import. Every room may import mesh.
var mayImport = map[string][]string{
	"meshd/router/gossip":  {"meshd/router"},
	"meshd/router/hostnet": {"meshd/router"},
	"meshd/router/tunnel":  {"meshd/router"},
	"meshd/fastdp":         {"meshd/router"},
	"meshd/cmd/meshctl":    {"meshd/control", "meshd/integration"}, // integration for the demo
	"meshd/cmd/meshd":      rooms,
	"meshd/integration":    {}, // knows the product by its commands alone
}

// pure packages import the standard library and mesh only, so that they build and test anywhere and
// whole clusters of them run in a simulation.
var pure = []string{"meshd/mesh", "meshd/router", "meshd/ipam/ring", "meshd/ipam/election", "meshd/dns/records"}

// homes are the rooms that may import a large dependency, so that its ways stay in one place. Tests may
// use any.
var homes = map[string][]string{
	"github.com/hashicorp/memberlist":   {"meshd/router/gossip"},
	"github.com/vishvananda/netlink":    {"meshd/router/hostnet", "meshd/fastdp"},
	"github.com/vishvananda/netns":      {"meshd/router/hostnet", "meshd/fastdp"},
	"github.com/google/nftables":        {"meshd/router/hostnet"},
	"github.com/songgao/water":          {"meshd/router/hostnet"},
	"github.com/cilium/ebpf":            {"meshd/fastdp"},
	"github.com/miekg/dns":              {"meshd/dns"},
	"go.etcd.io/bbolt":                  {"meshd/store"},
	"github.com/flynn/noise":            {"meshd/router/tunnel"},
	"github.com/prometheus":             {"meshd/control"},
	"github.com/spf13/cobra":            {"meshd/cmd/meshctl"},
	"github.com/spf13/pflag":            {"meshd/cmd/meshd", "meshd/cmd/meshctl"},
	"github.com/anishathalye/porcupine": {},
	"github.com/google/go-cmp":          {},
	"go.uber.org/goleak":                {},
	"pgregory.net/rapid":                {},
}

type listed struct {
	ImportPath string
	Imports    []string
	Deps       []string
	Standard   bool
}

// list asks the go command; test files do not count.
func list(t *testing.T, args ...string) []listed {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Imports,Deps,Standard"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.Bytes())
	}
	var all []listed
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// under reports whether a package is dir or below it.
func under(pkg, dir string) bool { return pkg == dir || strings.HasPrefix(pkg, dir+"/") }

// roomOf is the longest entry of rooms that the package is under.
func roomOf(pkg string) string {
	room := ""
	for _, r := range rooms {
		if under(pkg, r) && len(r) > len(room) {
			room = r
		}
	}
	return room
}

func TestImportDirections(t *testing.T) {
	for _, p := range list(t, "./...") {
		room := roomOf(p.ImportPath)
		if room == "" {
			if len(p.Imports) > 0 {
				t.Errorf("%s is in no room; add it to the list", p.ImportPath)
			}
			continue
		}
		for _, i := range p.Imports {
			if other := roomOf(i); under(i, "meshd") && other != room && other != "meshd/mesh" && !slices.Contains(mayImport[room], other) {
				t.Errorf("%s imports %s: rooms do not know each other", p.ImportPath, i)
			}
			for dep, allowed := range homes {
				if under(i, dep) && !slices.Contains(allowed, room) {
					t.Errorf("%s imports %s, whose home is %v", p.ImportPath, i, allowed)
				}
			}
		}
	}
}

func TestPurePackages(t *testing.T) {
	standard := map[string]bool{}
	for _, p := range list(t, "std") {
		standard[p.ImportPath] = true
	}
	found := map[string]bool{}
	for _, p := range list(t, "./...") {
		if !slices.Contains(pure, p.ImportPath) {
			continue
		}
		found[p.ImportPath] = true
		for _, d := range p.Deps {
			if d != "meshd/mesh" && !standard[d] {
				t.Errorf("%s needs %s, which is not of the standard library", p.ImportPath, d)
			}
		}
	}
	for _, name := range pure {
		if !found[name] {
			t.Errorf("there is no package %s", name)
		}
	}
}
