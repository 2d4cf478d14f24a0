package hostnet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
)

// An accept in our table cannot undo a drop in somebody else's: where Docker, or a policy, makes the
// FORWARD chain of iptables drop, our accepts go there as well, into a chain of our own that DOCKER-USER
// (or FORWARD itself) jumps to, in the backend that does the dropping and in no other.
const (
	iptChain    = "MESH-FORWARD"
	iptTime     = 5 * time.Second // for one call
	iptWaitLock = "2"             // seconds to wait for others' xtables lock
)

// iptables keeps these rules for both families. It is owned by the holder of Firewall.apply.
type iptables struct {
	host *Host
	both bool           // said already that both backends drop
	in   map[bool]place // by IPv6 or not: where our rules were put
}

// place is one of the four filter tables there may be.
type place struct {
	tool   string // iptables-nft and the like
	parent string // the chain that jumps to ours
}

// filter is what matters of a filter table.
type filter struct {
	drops  bool     // FORWARD drops by policy or rule
	docker bool     // DOCKER-USER is there
	jumps  []string // chains that jump to ours
	ours   []string // rules of our chain; nil if there is none
}

func (t *iptables) legacy() bool {
	for _, p := range t.in {
		if strings.HasSuffix(p.tool, "-legacy") {
			return true
		}
	}
	return false
}

// apply makes the rules be where they are needed, and nowhere else.
func (t *iptables) apply(w wish) error {
	if t.in == nil {
		t.in = map[bool]place{}
	}
	return errors.Join(t.applyFamily(w, false), t.applyFamily(w, true))
}

func (t *iptables) applyFamily(w wish, six bool) error {
	tables := map[string]filter{}
	for _, tool := range t.tools(six) {
		f, err := t.read(tool)
		if err != nil {
			return err
		}
		tables[tool] = f
	}
	at, needed := t.choose(tables, six)
	for tool, f := range tables {
		if needed && tool == at.tool {
			if err := t.fill(at, f, iptRules(w, six)); err != nil {
				return err
			}
		} else if err := t.clear(tool, f); err != nil {
			return err
		}
	}
	if needed {
		t.in[six] = at
	} else {
		delete(t.in, six)
	}
	return nil
}

// tools are the programs for those backends whose filter table exists; asking would create it.
func (t *iptables) tools(six bool) (tools []string) {
	name, family, names := "iptables", nftables.TableFamilyIPv4, "ip_tables_names"
	if six {
		name, family, names = "ip6tables", nftables.TableFamilyIPv6, "ip6_tables_names"
	}
	c, err := nftables.New(nftables.WithNetNSFd(int(t.host.ns.Fd())))
	if err == nil {
		if found, err := c.ListTableOfFamily("filter", family); err == nil && found != nil {
			tools = append(tools, name+"-nft")
		}
	}
	inNamespace(t.host.ns, func() error {
		b, err := os.ReadFile("/proc/thread-self/net/" + names)
		if err == nil && slices.Contains(strings.Fields(string(b)), "filter") {
			tools = append(tools, name+"-legacy")
		}
		return nil
	})
	return slices.DeleteFunc(tools, func(tool string) bool {
		_, err := exec.LookPath(tool)
		if err != nil {
			t.host.log.Debug("a filter table exists and its tool does not", "tool", tool)
		}
		return err != nil
	})
}

// choose finds the table that needs our rules: one that drops, with DOCKER-USER before one without.
func (t *iptables) choose(tables map[string]filter, six bool) (at place, needed bool) {
	best := 0
	for _, tool := range []string{"iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"} {
		f, ok := tables[tool]
		score := 0
		if f.docker {
			score++
		}
		if f.drops {
			score += 2
		}
		if !ok || score == 0 {
			continue
		}
		if best >= 2 && score >= 2 && !t.both {
			t.both = true
			t.host.log.Warn("both backends of iptables drop forwarded packets; only one is opened for the mesh", "opened", at.tool, "other", tool)
		}
		if score > best {
			best = score
			at = place{tool: tool, parent: "FORWARD"}
			if f.docker {
				at.parent = "DOCKER-USER"
			}
		}
	}
	return at, best > 0
}

// read looks at one filter table.
func (t *iptables) read(tool string) (filter, error) {
	text, err := t.run(tool, "", "-S")
	if err != nil {
		return filter{}, err
	}
	return parseFilter(text), nil
}

// parseFilter reads what `iptables -S` prints.
func parseFilter(text string) (f filter) {
	for line := range strings.SplitSeq(text, "\n") {
		words := strings.Fields(line)
		if len(words) < 2 {
			continue
		}
		target := ""
		if i := slices.Index(words, "-j"); i >= 0 && i+1 < len(words) {
			target = words[i+1]
		}
		switch verb, chain := words[0], words[1]; {
		case verb == "-P" && chain == "FORWARD":
			f.drops = f.drops || len(words) > 2 && words[2] != "ACCEPT"
		case verb == "-N" && chain == "DOCKER-USER":
			f.docker = true
		case verb == "-N" && chain == iptChain:
			f.ours = []string{}
		case verb == "-A" && chain == iptChain:
			f.ours = append(f.ours, strings.Join(words, " "))
		case verb == "-A" && target == iptChain:
			f.jumps = append(f.jumps, chain)
		case verb == "-A" && chain == "FORWARD" && (target == "DROP" || target == "REJECT"):
			f.drops = true
		}
	}
	return f
}

// iptRules are the rules of our chain, as `iptables -S` prints them. Frames that cross the bridge count as
// forwarded where br_netfilter is loaded. Docker's bridges stay Docker's to judge.
func iptRules(w wish, six bool) (rules []string) {
	add := func(format string, args ...any) {
		rules = append(rules, "-A "+iptChain+" "+fmt.Sprintf(format, args...))
	}
	add("-i %s -o %s -j ACCEPT", w.bridge, w.bridge)
	exposed := slices.DeleteFunc(slices.Clone(w.exposed), func(p netip.Prefix) bool { return p.Addr().Is6() != six })
	if len(exposed) == 0 {
		return rules
	}
	add("-o %s -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", w.bridge)
	for _, d := range w.docker {
		add("-i %s -o %s -j RETURN", d, w.bridge)
		add("-i %s -o %s -j RETURN", w.bridge, d)
	}
	for _, p := range exposed {
		add("-d %v -o %s -j ACCEPT", p, w.bridge)
		add("-s %v -i %s -j ACCEPT", p, w.bridge)
	}
	return rules
}

// fill makes our chain in one table have these rules and its parent jump to it, in one transaction.
func (t *iptables) fill(at place, f filter, rules []string) error {
	if slices.Equal(f.ours, rules) && slices.Equal(f.jumps, []string{at.parent}) {
		return nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "*filter\n:%s - [0:0]\n", iptChain)
	for _, r := range rules {
		fmt.Fprintln(&b, r)
	}
	for _, chain := range f.jumps {
		fmt.Fprintf(&b, "-D %s -j %s\n", chain, iptChain)
	}
	fmt.Fprintf(&b, "-I %s 1 -j %s\nCOMMIT\n", at.parent, iptChain)
	_, err := t.run(at.tool+"-restore", b.String(), "--noflush")
	return err
}

// clear removes our chain from one table.
func (t *iptables) clear(tool string, f filter) error {
	if f.ours == nil && f.jumps == nil {
		return nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "*filter\n:%s - [0:0]\n", iptChain)
	for _, chain := range f.jumps {
		fmt.Fprintf(&b, "-D %s -j %s\n", chain, iptChain)
	}
	fmt.Fprintf(&b, "-X %s\nCOMMIT\n", iptChain)
	_, err := t.run(tool+"-restore", b.String(), "--noflush")
	return err
}

func (t *iptables) remove() error {
	var errs []error
	for _, six := range []bool{false, true} {
		for _, tool := range t.tools(six) {
			f, err := t.read(tool)
			if err == nil {
				err = t.clear(tool, f)
			}
			errs = append(errs, err)
		}
	}
	t.in = nil
	return errors.Join(errs...)
}

// run calls one of the tools in the host's namespace.
func (t *iptables) run(tool, input string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), iptTime)
	defer cancel()
	var stdout, stderr strings.Builder
	err := inNamespace(t.host.ns, func() error {
		cmd := exec.CommandContext(ctx, tool, append([]string{"-w", iptWaitLock}, args...)...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &stdout, &stderr
		return cmd.Run()
	})
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", tool, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}
