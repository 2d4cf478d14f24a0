package control

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"meshd/mesh"
)

// The texts of "meshctl status". Scripts take them apart by label and column, so their shapes are
// fixed: those of Weave Net, with the names of this program's own parts.

// statusText returns the text of a sub-status, "" for the summary. ok is false when there is no such
// sub-status; found is false when its feature is off.
func (r *Report) statusText(sub string) (text string, found, ok bool) {
	switch sub {
	case "":
		return r.summaryText(), true, true
	case "targets", "connections", "peers":
		if r.Router == nil {
			return "", false, true
		}
	case "dns":
		if r.DNS == nil {
			return "", false, true
		}
		return r.DNS.text(), true, true
	case "ipam":
		if r.IPAM == nil {
			return "", false, true
		}
		return r.ipamText(), true, true
	default:
		return "", false, false
	}
	switch sub {
	case "targets":
		return lines(r.Router.Targets), true, true
	case "connections":
		return r.Router.connectionsText(), true, true
	}
	return r.Router.peersText(), true, true
}

// StatusWords are the sub-statuses that exist.
var StatusWords = []string{"targets", "connections", "peers", "dns", "ipam"}

func lines(of []string) string {
	var b strings.Builder
	for _, s := range of {
		b.WriteString(s)
		b.WriteByte('\n')
	}
	return b.String()
}

// block writes "label: value" lines with the labels right-aligned.
type block struct{ bytes.Buffer }

func (b *block) line(label, format string, args ...any) {
	fmt.Fprintf(b, "%15s: %s\n", label, fmt.Sprintf(format, args...))
}

func (r *Report) summaryText() string {
	b := new(block)
	b.line("Version", "%s (version check update disabled)", r.Version)
	for _, p := range r.Problems {
		b.line("Problem", "%s", p)
	}
	if r.Router != nil {
		b.WriteByte('\n')
		r.Router.summary(b)
	}
	if r.IPAM != nil {
		b.WriteByte('\n')
		r.IPAM.summary(b)
	}
	if r.DNS != nil {
		b.WriteByte('\n')
		b.line("Service", "dns")
		b.line("Domain", "%s", r.DNS.Domain)
		b.line("Upstream", "%s", orNone(strings.Join(r.DNS.Upstream, ", ")))
		b.line("TTL", "%d", r.DNS.TTL)
		b.line("Entries", "%d", len(r.DNS.live()))
	}
	if r.Proxy != nil {
		b.WriteByte('\n')
		b.line("Service", "proxy")
		b.line("Address", "%s", strings.Join(r.Proxy.Addresses, ", "))
	}
	if r.Plugin != nil {
		b.WriteByte('\n')
		b.line("Service", "plugin")
		b.line("DriverName", "%s", r.Plugin.DriverName)
	}
	return b.String()
}

func orNone(s string) string { return cmp.Or(s, "none") }

func (r *Router) summary(b *block) {
	b.line("Service", "router")
	b.line("Protocol", "%s %d..%d", r.Protocol, r.ProtocolMinVersion, r.ProtocolMaxVersion)
	b.line("Name", "%s", peerText(r.Name, r.NickName))
	b.line("Encryption", "%s", onOff(r.Encryption))
	b.line("PeerDiscovery", "%s", onOff(r.PeerDiscovery))
	b.line("Targets", "%d", len(r.Targets))
	b.line("Connections", "%s", r.countConnections())
	b.line("Peers", "%s", r.countPeers())
	b.line("TrustedSubnets", "%s", orNone(strings.Join(r.TrustedSubnets, ", ")))
	for _, line := range r.offenders() {
		b.line("Caught", "%s", line)
	}
	for _, c := range r.Clashes {
		var also []string
		for _, p := range c.Peers[min(1, len(c.Peers)):] {
			also = append(also, r.peer(p))
		}
		if len(also) > 0 {
			b.line("Clash", "%s of %s is announced by %s too", c.Address, r.peer(c.Peers[0]), strings.Join(also, ", "))
		}
	}
}

// peer names a peer with its nickname where that is known.
func (r *Router) peer(name mesh.PeerName) string {
	for _, p := range r.Peers {
		if p.Name == name {
			return peerText(name, p.NickName)
		}
	}
	return name.String()
}

// offenders has a line for each port that sent what it may not, the worst first.
func (r *Router) offenders() []string {
	type port struct {
		name    string
		frames  uint64
		reasons []string
	}
	var ports []*port
	byMAC := map[mesh.MAC]*port{}
	for _, o := range r.Offences {
		p := byMAC[o.Mac]
		if p == nil {
			p = &port{name: cmp.Or(shortID(o.ContainerID), o.Mac.String())}
			byMAC[o.Mac], ports = p, append(ports, p)
		}
		p.frames += o.Frames
		p.reasons = append(p.reasons, fmt.Sprintf("%s %d", o.Reason, o.Frames))
	}
	slices.SortStableFunc(ports, func(a, b *port) int { return cmp.Compare(b.frames, a.frames) })
	var out []string
	for _, p := range ports {
		out = append(out, fmt.Sprintf("%s, %d frames (%s)", p.name, p.frames, strings.Join(p.reasons, ", ")))
	}
	return out
}

func onOff(on bool) string {
	if on {
		return "enabled"
	}
	return "disabled"
}

func (r *Router) countConnections() string {
	count := map[string]int{}
	for _, c := range r.Connections {
		count[c.State]++
	}
	var parts []string
	for _, state := range []string{ConnEstablished, ConnPending, ConnRetrying, ConnFailed, ConnConnecting} {
		if count[state] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", count[state], state))
		}
	}
	if parts == nil {
		return "0"
	}
	return fmt.Sprintf("%d (%s)", len(r.Connections), strings.Join(parts, ", "))
}

func (r *Router) countPeers() string {
	established, pending := 0, 0
	for _, p := range r.Peers {
		for _, c := range p.Connections {
			if c.Established {
				established++
			} else {
				pending++
			}
		}
	}
	var parts []string
	if established > 0 {
		parts = append(parts, fmt.Sprintf("%d established", established))
	}
	if pending > 0 {
		parts = append(parts, fmt.Sprintf("%d pending", pending))
	}
	if parts == nil {
		return fmt.Sprint(len(r.Peers))
	}
	return fmt.Sprintf("%d (with %s connections)", len(r.Peers), strings.Join(parts, ", "))
}

func arrow(outbound bool) string {
	if outbound {
		return "->"
	}
	return "<-"
}

func (r *Router) connectionsText() string {
	var b strings.Builder
	for _, c := range r.Connections {
		line := fmt.Sprintf("%s %-21s %-11s %s", arrow(c.Outbound), cmp.Or(c.Address, "-"), c.State, c.Info)
		b.WriteString(strings.TrimRight(line, " "))
		b.WriteByte('\n')
	}
	return b.String()
}

func (r *Router) peersText() string {
	var b strings.Builder
	for _, p := range r.Peers {
		fmt.Fprintln(&b, peerText(p.Name, p.NickName))
		for _, c := range p.Connections {
			state := ConnPending
			if c.Established {
				state = ConnEstablished
			}
			fmt.Fprintf(&b, "   %s %-21s %-37s %s\n", arrow(c.Outbound), cmp.Or(c.Address, "-"), peerText(c.Name, c.NickName), state)
		}
	}
	return b.String()
}

// live are the entries that have not been removed.
func (d *DNS) live() []DNSEntry {
	return slices.DeleteFunc(slices.Clone(d.Entries), func(e DNSEntry) bool { return e.Tombstone != 0 })
}

func (d *DNS) text() string {
	var b strings.Builder
	for _, e := range d.live() {
		name := strings.TrimSuffix(e.Hostname, "."+d.Domain)
		fmt.Fprintf(&b, "%-12s %-15s %-12s %s\n", name, e.Address, shortID(e.ContainerID), e.Origin)
	}
	return b.String()
}

// shortID is the form that Docker prints: the first twelve characters.
func shortID(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

func (i *IPAM) summary(b *block) {
	b.line("Service", "ipam")
	switch {
	case i.Status == IPAMConsensus && i.Paxos != nil:
		b.line("Status", "%s (quorum: %d, known: %d)", i.Status, i.Paxos.Quorum, i.Paxos.KnownNodes)
	default:
		b.line("Status", "%s", i.Status)
	}
	for _, w := range i.Waiting {
		b.line("Waiting", "%s", w)
	}
	for _, c := range i.Conflicts {
		b.line("Conflict", "%s", c)
	}
	b.line("Range", "%s", i.Range)
	b.line("DefaultSubnet", "%s", i.DefaultSubnet)
}

// ipamText is one line per owner of address space, this peer's first.
func (r *Report) ipamText() string {
	type share struct {
		nick  string
		size  int
		known bool
	}
	shares := map[mesh.PeerName]*share{}
	total := 0
	for _, e := range r.IPAM.Entries {
		s := shares[e.Peer]
		if s == nil {
			s = &share{nick: e.Nickname, known: e.IsKnownPeer}
			shares[e.Peer] = s
		}
		s.size += e.Size
		total += e.Size
	}
	if total == 0 {
		return ""
	}
	own, isOwn := mesh.PeerName{}, func(mesh.PeerName) bool { return false }
	if r.Router != nil {
		own = r.Router.Name
		isOwn = func(p mesh.PeerName) bool { return p == own }
	}
	names := slices.SortedFunc(maps.Keys(shares), func(a, b mesh.PeerName) int {
		if isOwn(a) != isOwn(b) {
			if isOwn(a) {
				return -1
			}
			return 1
		}
		return a.Compare(b)
	})
	var b strings.Builder
	for _, p := range names {
		s := shares[p]
		end := ""
		switch {
		case isOwn(p):
			end = fmt.Sprintf(" (%d active)", r.IPAM.ActiveIPs)
		case !s.known:
			end = " - unreachable!"
		}
		percent := float64(s.size) * 100 / float64(total)
		fmt.Fprintf(&b, "%-37s %8d IPs (%04.1f%% of total)%s\n", peerText(p, s.nick), s.size, percent, end)
	}
	return b.String()
}
