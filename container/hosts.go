package container

import (
	"net/netip"
	"strings"
)

// Marks around our lines in a container's /etc/hosts.
const (
	hostsBegin = "# mesh: begin"
	hostsEnd   = "# mesh: end"
)

// editHosts puts lines for the addresses of host, and further lines, into the text of a hosts file, in
// place of those that an earlier edit put there. Docker's own line for the host goes, because the first
// line with a name counts; all others stay.
func editHosts(text string, names []string, addrs []netip.Prefix, further []string) string {
	var out []string
	ours := false
	for line := range strings.SplitSeq(strings.TrimRight(text, "\n"), "\n") {
		switch {
		case line == hostsBegin:
			ours = true
		case line == hostsEnd:
			ours = false
		case ours, len(addrs) > 0 && namesHost(line, names):
		default:
			out = append(out, line)
		}
	}
	if len(out) == 1 && out[0] == "" {
		out = nil
	}
	out = append(out, hostsBegin)
	if len(names) > 0 {
		for _, a := range addrs {
			out = append(out, a.Addr().String()+"\t"+strings.Join(names, " "))
		}
	}
	out = append(out, further...)
	return strings.Join(append(out, hostsEnd), "\n") + "\n"
}

// namesHost reports whether a line gives an address to one of names.
func namesHost(line string, names []string) bool {
	line, _, _ = strings.Cut(line, "#")
	fields := strings.Fields(line)
	for i, f := range fields {
		for _, n := range names {
			if i > 0 && strings.EqualFold(f, n) {
				return true
			}
		}
	}
	return false
}
