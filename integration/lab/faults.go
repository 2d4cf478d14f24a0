package lab

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// flow is the datagrams from one host to another.
type flow struct{ from, to *Host }

// fault is what the router does to a flow.
type fault struct {
	cut   bool
	lossy float64 // share of packets dropped, 0 to 1
	icmp  bool    // ICMP and ICMPv6 are dropped, and so the router's own errors
	ports map[string]bool
}

// change edits the faults of flows and loads the router's whole rule set in one transaction.
func (l *Lab) change(ctx context.Context, flows []flow, edit func(*fault)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range flows {
		if l.faults[f] == nil {
			l.faults[f] = &fault{ports: map[string]bool{}}
		}
		edit(l.faults[f])
	}
	return l.inRouter(ctx, ruleset(l.faults), "nft", "-f", "-")
}

func both(a, b *Host) []flow { return []flow{{a, b}, {b, a}} }

// Cut drops everything between two hosts, both ways.
func (l *Lab) Cut(ctx context.Context, a, b *Host) error {
	return l.change(ctx, both(a, b), func(f *fault) { f.cut = true })
}

// CutOneWay drops everything that one host sends to another.
func (l *Lab) CutOneWay(ctx context.Context, from, to *Host) error {
	return l.change(ctx, []flow{{from, to}}, func(f *fault) { f.cut = true })
}

// CutOff drops everything between a host and all the others.
func (l *Lab) CutOff(ctx context.Context, h *Host) error {
	var flows []flow
	for _, o := range l.Hosts {
		if o != h {
			flows = append(flows, both(h, o)...)
		}
	}
	return l.change(ctx, flows, func(f *fault) { f.cut = true })
}

// Split drops everything between the hosts of one group and those of the other.
func (l *Lab) Split(ctx context.Context, left, right []*Host) error {
	var flows []flow
	for _, a := range left {
		for _, b := range right {
			flows = append(flows, both(a, b)...)
		}
	}
	return l.change(ctx, flows, func(f *fault) { f.cut = true })
}

// Loss drops that share (0 to 1) of the packets between two hosts, each way, at random.
func (l *Lab) Loss(ctx context.Context, a, b *Host, share float64) error {
	return l.change(ctx, both(a, b), func(f *fault) { f.lossy = share })
}

// BlockPort drops what goes to a port ("udp" or "tcp") of either host from the other.
func (l *Lab) BlockPort(ctx context.Context, a, b *Host, proto string, port int) error {
	return l.change(ctx, both(a, b), func(f *fault) { f.ports[fmt.Sprintf("%s dport %d", proto, port)] = true })
}

// BlockICMP drops ICMP between two hosts and the errors that the router would send to them.
func (l *Lab) BlockICMP(ctx context.Context, a, b *Host) error {
	return l.change(ctx, both(a, b), func(f *fault) { f.icmp = true })
}

// Heal ends all faults between two hosts, but not a changed MTU.
func (l *Lab) Heal(ctx context.Context, a, b *Host) error {
	return l.change(ctx, both(a, b), func(f *fault) { *f = fault{ports: map[string]bool{}} })
}

// HealAll ends all faults between all hosts, but not changed MTUs.
func (l *Lab) HealAll(ctx context.Context) error {
	l.mu.Lock()
	flows := slices.Collect(maps.Keys(l.faults))
	l.mu.Unlock()
	return l.change(ctx, flows, func(f *fault) { *f = fault{ports: map[string]bool{}} })
}

// SetMTU lets the router pass packets of at most mtu bytes between two hosts, each way; 0 ends that.
// Larger ones are answered with ICMP, unless that is blocked. The hosts' interfaces stay as they are.
func (l *Lab) SetMTU(ctx context.Context, a, b *Host, mtu int) error {
	var script strings.Builder
	for _, f := range both(a, b) {
		table := 10000 + 256*f.from.Num + f.to.Num
		for _, v := range []struct {
			family, from, to string
		}{{"-4", f.from.Addr.String(), f.to.Addr.String()}, {"-6", f.from.Addr6.String(), f.to.Addr6.String()}} {
			fmt.Fprintf(&script, "ip %s rule del pref 900 from %s to %s lookup %d 2>/dev/null; ", v.family, v.from, v.to, table)
			if mtu > 0 {
				fmt.Fprintf(&script, "ip %s route replace table %d %s dev %s mtu lock %d && ", v.family, table, v.to, f.to.Name, mtu)
				fmt.Fprintf(&script, "ip %s rule add pref 900 from %s to %s lookup %d || exit 1; ", v.family, v.from, v.to, table)
			}
		}
	}
	return l.inRouter(ctx, "", "/bin/sh", "-c", script.String()+"true")
}

// ruleset writes the faults as an nftables script that replaces the one before.
func ruleset(faults map[flow]*fault) string {
	var forward, output strings.Builder
	order := slices.SortedFunc(maps.Keys(faults), func(a, b flow) int {
		return 1000*(a.from.Num-b.from.Num) + a.to.Num - b.to.Num
	})
	for _, f := range order {
		// A shaped flow crosses the router twice but is judged once: the second time it does not come
		// from the host's device.
		match := fmt.Sprintf("iifname %q ip daddr %v", f.from.Name, f.to.Addr)
		match6 := fmt.Sprintf("iifname %q ip6 daddr %v", f.from.Name, f.to.Addr6)
		rule := func(what string) {
			fmt.Fprintf(&forward, "    %s %s drop\n    %s %s drop\n", match, what, match6, what)
		}
		x := faults[f]
		if x.cut {
			rule("")
		}
		if x.lossy > 0 {
			rule(fmt.Sprintf("numgen random mod 100000 < %d", int(x.lossy*100000)))
		}
		if x.icmp {
			rule("meta l4proto { icmp, ipv6-icmp }")
			fmt.Fprintf(&output, "    oifname %q icmp type { destination-unreachable, time-exceeded } drop\n", f.from.Name)
			fmt.Fprintf(&output, "    oifname %q icmpv6 type { destination-unreachable, packet-too-big, time-exceeded } drop\n", f.from.Name)
		}
		for _, p := range slices.Sorted(maps.Keys(x.ports)) {
			rule(p)
		}
	}
	return "add table inet lab\ndelete table inet lab\ntable inet lab {\n" +
		"  chain forward {\n    type filter hook forward priority 0; policy accept;\n" + forward.String() + "  }\n" +
		"  chain output {\n    type filter hook output priority 0; policy accept;\n" + output.String() + "  }\n}\n"
}
