package ipam

import (
	"cmp"
	"os"
	"strings"
	"testing"

	"meshd/sim/mutate"
)

// mutations break the allocator on purpose. The simulation must notice every one of them: this is how we
// know that it looks. Not in the list, because random runs hardly ever get there: that frozen addresses stay
// (TestGrantTakeoverFence in package ring looks at that).
var mutations = []struct {
	name, file, old, new string
	test                 string // that has to fail; empty: TestSimulation
}{
	{"takeovers do not raise the epoch", "ring/ring.go", "rise := uint32(1)\n", "rise := uint32(0)\n", ""},
	{"the epoch does not count in merges", "ring/merge.go", "cmp.Or(cmp.Compare(a.epoch, b.epoch), ", "cmp.Or(", ""},
	{"a failed write counts as done", "core.go", "func (c *core) settle(err error) []effect {\n", "func (c *core) settle(err error) []effect {\n\terr = nil\n", ""},
	{"a takeover waits for nobody", "loss.go", "if names, _ := c.missing(id); len(names) > 0 {", "if names, _ := c.missing(id); len(names) > 1000 {", ""},
	{"every remover takes", "loss.go", "if c.winner(id) != c.me || !c.serving", "if !c.serving", ""},
	{"a fenced peer goes on", "members.go", "case m.Fenced():", "case m.Fenced() && false:", ""},
	{"a restarted peer does not compare first", "members.go", "case missing > 0 || c.ring.Unowned() > 0:\n\t\treturn\n\tcase c.founded ||", "case true ||", ""},
	{"what runs is given to who asks for it", "space.go", "case h != nil:\n", "case h != nil && false:\n", ""},
	{"blocks with used addresses are given away", "space.go", "c.holds.used.gaps(max(lo, s.lo), min(hi, s.hi), func(a, b uint64) {", "func(from, to uint64, f func(a, b uint64)) {\n\t\t\tif from < to {\n\t\t\t\tf(from, to)\n\t\t\t}\n\t\t}(max(lo, s.lo), min(hi, s.hi), func(a, b uint64) {", ""},
	{"space is granted before it is on disk", "core.go", "if c.write != nil {\n\t\tc.setMeta(metaWrite, c.write.delta.Append(nil))\n\t} else", "if false {\n\t} else", ""},
	{"the network's own address is handed out", "calls.go", "return lo + 1, hi", "return lo, hi", ""},
	{"counting again drops what the list lacks", "calls.go", " && !c.liveKnown {", " {", ""},
	{"a new life serves though members in reach have not recorded it", "members.go", "case missing > 0 || c", "case missing > 1000 || c", "TestServesWhenRecorded"},
	{"all who are told to repair take the gaps", "repair.go", "c.peers[name].fills && ", "false && ", "TestRepairOnTwoAtOnce"},
	{"whoever answers need not see the same gaps", "members.go", "mine, gaps := false, c.filling == 0\n", "mine, gaps := false, true\n", "TestRepairUnheard"},
	{"an old state file is not compared first", "members.go", "case missing > 0 || c.ring.Unowned() > 0:\n\t\treturn\n\tcase c.founded ||", "case true ||", "TestRestoredBackup"},
}

// TestMutations builds each mutation with an overlay and runs the simulation until it fails.
func TestMutations(t *testing.T) {
	if os.Getenv("MESHD_LONG") == "" {
		t.Skip("runs with MESHD_LONG=1 (make test-long)")
	}
	for _, m := range mutations {
		t.Run(m.name, func(t *testing.T) {
			test := cmp.Or(m.test, "TestSimulation")
			binary := mutate.Build(t, m.file, m.old, m.new)
			out := mutate.Caught(t, binary, "-test.run", "^"+test+"$", "-sim.seeds", "200", "-sim.stop", "1")
			for line := range strings.Lines(out) {
				if strings.Contains(line, "seed") {
					t.Logf("caught: %s", strings.TrimSpace(line))
					break
				}
			}
		})
	}
}
