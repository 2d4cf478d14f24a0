package sim

import (
	"os"
	"strings"
	"testing"

	"meshd/sim/mutate"
)

// mutations break the product on purpose. The oracles must notice every one of them: this is how we know that
// they look. Those of the addresses are in ipam. Not in the list, because another part makes up for it before the half
// minute is over: a container that ended leaves no tombstone, a restarted peer begins at its first version again (an
// owner outbids what comes back in its name), an older row replaces a newer one, records of an earlier run count, lost
// peers are dialled as targets alone.
var mutations = []struct {
	name, file, old, new string
	runs                 string // what has to fail
}{
	{"tables are not compared", "../router/gossip/step.go", "\tif len(with) == 0 {\n", "\tif true {\n", "TestPartitions"},
	{"what comparisons bring is not taken in", "../router/gossip/node.go", "if out.data != nil {", "if false {", "TestPartitions"},
	{"links that ended stay published", "../router/gossip/links.go", "\tdelete(b.live, name)\n\tpast :=", "\tpast :=", "TestPartitions"},
	{"tombstones of others are not taken in", "../dns/records/merge.go", "case r != nil && compareRecords(e, r.rec) <= 0:", "case e.gone || r != nil && compareRecords(e, r.rec) <= 0:", "TestPartitions"},
	{"ways by which something came back are no longer dropped", "../router/routes.go", "if left <= 0 || links > left {", "if left <= -100 {", "TestKept"},
	{"a frame may come from anybody", "../router/switch.go", "if !sender.has(src) || src == s.self {", "if src == s.self {", "TestHistories"},
	{"endpoints that went stay in the switch", "../router/endpoints.go", "\tfor _, key := range gone {\n\t\tdrop(key)\n", "\tfor _, key := range gone[len(gone):] {\n\t\tdrop(key)\n", "TestHistories"},
}

// TestMutations builds each mutation with an overlay and runs simulations until one fails.
func TestMutations(t *testing.T) {
	if os.Getenv("MESHD_LONG") == "" {
		t.Skip("runs with MESHD_LONG=1 (make test-long)")
	}
	for _, m := range mutations {
		t.Run(m.name, func(t *testing.T) {
			args := []string{"-test.run", "^" + m.runs + "$", "-seeds", "12", "-test.failfast"}
			if m.runs == "TestPartitions" {
				args = append(args, "-hosts", "5", "-cut", "45s", "-seeds", "3")
			}
			out := mutate.Caught(t, mutate.Build(t, m.file, m.old, m.new), args...)
			lines := strings.Split(out, "\n")
			for i, line := range lines[:len(lines)-1] {
				if strings.Contains(line, "seed ") && strings.HasSuffix(line, ":") {
					t.Logf("caught: %s %s", strings.TrimSpace(line), strings.TrimSpace(lines[i+1]))
					break
				}
			}
		})
	}
}
