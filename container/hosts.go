package container

import (
	"net/netip"
	"slices"
	"strings"
)

// Marks of our lines in a container's /etc/hosts.
const (
	hostsBegin = "# mesh: begin"
	hostsEnd   = "# mesh: end"
	hostsWas   = "# mesh: was " // before a line of Docker's that ours stand for
)

// editHosts puts lines for the addresses of names, and further lines, into the text of a hosts file, in
// place of those that an earlier edit put there. Docker's own line for a name is set aside meanwhile,
// because the first line with a name counts; all others stay. With nothing to put in, the file is as before us.
func editHosts(text string, names []string, addrs []netip.Prefix, further []string) string {
	var lines, was []string
	ours := false
	for line := range strings.SplitSeq(strings.TrimRight(text, "\n"), "\n") {
		switch original, set := strings.CutPrefix(line, hostsWas); {
		case line == hostsBegin:
			ours = true
		case line == hostsEnd:
			ours = false
		case ours && set:
			lines = append(lines, original)
		case !ours:
			lines = append(lines, line)
		}
	}
	if len(names) > 0 && len(addrs) > 0 {
		lines = slices.DeleteFunc(lines, func(line string) bool {
			if namesHost(line, names) {
				was = append(was, hostsWas+line)
				return true
			}
			return false
		})
		for _, a := range addrs {
			was = append(was, a.Addr().String()+"\t"+strings.Join(names, " "))
		}
	}
	if block := append(was, further...); len(block) > 0 {
		lines = append(append(append(lines, hostsBegin), block...), hostsEnd)
	}
	return strings.TrimLeft(strings.Join(lines, "\n")+"\n", "\n")
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
