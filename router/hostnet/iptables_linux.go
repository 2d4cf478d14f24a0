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
	"unsafe"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// An accept in our table cannot undo a drop in somebody else's: where Docker, or a policy, makes the
// FORWARD chain of iptables drop, our accepts go there as well, into a chain of our own that DOCKER-USER
// (or FORWARD itself) jumps to, in the backend that does the dropping and in no other. The same goes for
// the INPUT chain and the name server, which containers ask on Docker's bridge.
const (
	iptTime     = 5 * time.Second // for one call
	iptWaitLock = "2"             // seconds to wait for others' xtables lock
)

// hook is one chain of the kernel's that may drop what is ours.
type hook struct {
	chain string
	user  string // a chain that is meant for others' rules, used in its place if it is there
	ours  string
	rules func(w wish, six bool) []string // as `iptables -S` prints them
}

var hooks = []hook{
	{"FORWARD", "DOCKER-USER", "MESH-FORWARD", forwardRules},
	{"INPUT", "", "MESH-INPUT", inputRules},
}

// iptables keeps these rules for both families. It is owned by the holder of Firewall.apply.
type iptables struct {
	host *Host
	both bool            // said already that both backends drop
	in   map[string]bool // tools by which rules of ours were put somewhere
}

// filter is what matters of a filter table.
type filter struct {
	drops map[string]bool     // by chain: it drops by policy or rule
	rules map[string][]string // by chain, for those that exist beside the kernel's own
	jumps map[string][]string // by chain of ours or for users: the chains that jump to it
}

func (t *iptables) legacy() bool {
	return t.in["iptables-legacy"] || t.in["ip6tables-legacy"]
}

// apply makes the rules be where they are needed, and nowhere else.
func (t *iptables) apply(w wish) error {
	t.in = map[string]bool{}
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
	var errs []error
	for _, h := range hooks {
		rules := h.rules(w, six)
		at := ""
		if len(rules) > 0 {
			at = t.choose(tables, h)
		}
		for tool, f := range tables {
			if tool != at {
				errs = append(errs, t.clear(tool, f, h))
				continue
			}
			t.in[tool] = true
			errs = append(errs, t.fill(tool, f, h, rules))
		}
	}
	return errors.Join(errs...)
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

// choose finds the tool for the table that needs our rules for a hook: one that drops, with a chain for users
// before one without; "" if none does.
func (t *iptables) choose(tables map[string]filter, h hook) (at string) {
	best := 0
	for _, tool := range []string{"iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"} {
		f := tables[tool]
		score := 0
		if f.rules[h.user] != nil {
			score++
		}
		if f.drops[h.chain] {
			score += 2
		}
		if best >= 2 && score >= 2 && !t.both {
			t.both = true
			t.host.log.Warn("both backends of iptables drop packets; only one is opened for the mesh", "opened", at, "other", tool)
		}
		if score > best {
			best, at = score, tool
		}
	}
	return at
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
func parseFilter(text string) filter {
	f := filter{drops: map[string]bool{}, rules: map[string][]string{}, jumps: map[string][]string{}}
	for line := range strings.SplitSeq(text, "\n") {
		words := strings.Fields(line)
		if len(words) < 2 {
			continue
		}
		target := ""
		if i := slices.Index(words, "-j"); i >= 0 && i+1 < len(words) {
			target = words[i+1]
		}
		switch chain := words[1]; words[0] {
		case "-P":
			f.drops[chain] = len(words) > 2 && words[2] != "ACCEPT"
		case "-N":
			f.rules[chain] = []string{}
		case "-A":
			if rules, ok := f.rules[chain]; ok {
				f.rules[chain] = append(rules, strings.Join(words, " "))
			}
			if strings.HasPrefix(target, "MESH-") || target == "DOCKER-USER" {
				f.jumps[target] = append(f.jumps[target], chain)
			}
			f.drops[chain] = f.drops[chain] || target == "DROP" || target == "REJECT"
		}
	}
	return f
}

// forwardRules let through what crosses the bridge, which counts as forwarded where br_netfilter is loaded, and
// exposed subnets. Docker's bridges stay Docker's to judge.
func forwardRules(w wish, six bool) (rules []string) {
	add := func(format string, args ...any) {
		rules = append(rules, "-A MESH-FORWARD "+fmt.Sprintf(format, args...))
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

// inputRules let Docker's containers ask the name server.
func inputRules(w wish, six bool) (rules []string) {
	if w.dns == 0 || six {
		return nil
	}
	for _, d := range w.docker {
		for _, proto := range []string{"udp", "tcp"} {
			rules = append(rules, fmt.Sprintf("-A MESH-INPUT -i %s -p %s -m %s --dport %d -j ACCEPT", d, proto, proto, w.dns))
		}
	}
	return rules
}

// fill makes our chain in one table have these rules and its parent jump to it, in one transaction.
func (t *iptables) fill(tool string, f filter, h hook, rules []string) error {
	parent := h.chain
	if f.rules[h.user] != nil && slices.Contains(f.jumps[h.user], h.chain) { // a flush leaves the chain, and no way to it
		parent = h.user
	}
	if slices.Equal(f.rules[h.ours], rules) && slices.Equal(f.jumps[h.ours], []string{parent}) {
		return nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "*filter\n:%s - [0:0]\n", h.ours)
	for _, r := range rules {
		fmt.Fprintln(&b, r)
	}
	for _, chain := range f.jumps[h.ours] {
		fmt.Fprintf(&b, "-D %s -j %s\n", chain, h.ours)
	}
	fmt.Fprintf(&b, "-I %s 1 -j %s\nCOMMIT\n", parent, h.ours)
	_, err := t.run(tool+"-restore", b.String(), "--noflush")
	return err
}

// clear removes our chain from one table.
func (t *iptables) clear(tool string, f filter, h hook) error {
	if f.rules[h.ours] == nil && f.jumps[h.ours] == nil {
		return nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "*filter\n:%s - [0:0]\n", h.ours)
	for _, chain := range f.jumps[h.ours] {
		fmt.Fprintf(&b, "-D %s -j %s\n", chain, h.ours)
	}
	fmt.Fprintf(&b, "-X %s\nCOMMIT\n", h.ours)
	_, err := t.run(tool+"-restore", b.String(), "--noflush")
	return err
}

func (t *iptables) remove() error {
	var errs []error
	for _, six := range []bool{false, true} {
		for _, tool := range t.tools(six) {
			f, err := t.read(tool)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			for _, h := range hooks {
				errs = append(errs, t.clear(tool, f, h))
			}
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

// layout is what the kernel says of the legacy filter tables: how many entries they have, how many bytes, and
// where chains begin and end. It changes with nearly every change of rules, and asking takes no other program.
func (t *iptables) layout() (all [2][84]byte) {
	const getInfo = 64 // IPT_SO_GET_INFO and IP6T_SO_GET_INFO: struct ipt_getinfo, which begins with the table's name
	inNamespace(t.host.ns, func() error {
		for i, f := range []struct{ family, level int }{{unix.AF_INET, unix.IPPROTO_IP}, {unix.AF_INET6, unix.IPPROTO_IPV6}} {
			names, err := os.ReadFile("/proc/thread-self/net/" + []string{"ip_tables_names", "ip6_tables_names"}[i])
			if err != nil || !slices.Contains(strings.Fields(string(names)), "filter") {
				continue // asking would make it
			}
			fd, err := unix.Socket(f.family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
			if err != nil {
				continue
			}
			copy(all[i][:], "filter")
			size := uint32(len(all[i]))
			unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(f.level), getInfo,
				uintptr(unsafe.Pointer(&all[i][0])), uintptr(unsafe.Pointer(&size)), 0) // what it does not say, iptables -S does every 5 s
			unix.Close(fd)
		}
		return nil
	})
	return all
}
