package lab

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Snapshot is what there is on a host, one line per object, "kind: object".
type Snapshot []string

// snapshotCommands print one object per line; what varies by itself is taken out by volatile.
var snapshotCommands = []struct {
	kind string
	args []string
}{
	{"link", []string{"ip", "-o", "link", "show"}},
	{"address", []string{"ip", "-o", "addr", "show"}},
	{"neighbour", []string{"ip", "neigh", "show", "nud", "permanent"}},
	{"fdb", []string{"bridge", "fdb", "show", "permanent"}},
	{"route", []string{"ip", "-4", "route", "show", "table", "all"}},
	{"route6", []string{"ip", "-6", "route", "show", "table", "all"}},
	{"rule", []string{"ip", "-4", "rule", "show"}},
	{"rule6", []string{"ip", "-6", "rule", "show"}},
	{"xfrm", []string{"ip", "xfrm", "state"}},
	{"socket", []string{"ss", "-Hlnptu"}},
	{"unix socket", []string{"ss", "-Hlnpx"}},
	{"netns", []string{"ip", "netns", "list"}},
}

var volatile = []*regexp.Regexp{
	regexp.MustCompile(`^\d+: `),               // interface index
	regexp.MustCompile(`@if\d+`),               // peer's index
	regexp.MustCompile(` link-netns(id)? \S+`), // numbered as they come
	regexp.MustCompile(` ?valid_lft \S+ preferred_lft \S+`),
	regexp.MustCompile(` expires \S+`),
	regexp.MustCompile(`pid=\d+,fd=\d+`),
	regexp.MustCompile(`\(id: \d+\)`),
	regexp.MustCompile(`counter packets \d+ bytes \d+ ?`),
	regexp.MustCompile(`\b(NO-CARRIER|LOWER_UP|M-DOWN),?`), // follow the peer
	regexp.MustCompile(` linkdown\b`),
	regexp.MustCompile(` state (UP|DOWN|UNKNOWN|LOWERLAYERDOWN)`),
	regexp.MustCompile(` \* \d+ `),                      // inode of a unix socket
	regexp.MustCompile(`\b(UNCONN|LISTEN) +\d+ +\d+\b`), // what waits in a socket
}

// Snapshot lists links, addresses, permanent neighbours, routes, rules, firewall rules, listening
// sockets, processes, namespaces, mounts, BPF objects and runtime files of the host. Two snapshots of
// an unchanged host are equal.
func (h *Host) Snapshot(ctx context.Context) (Snapshot, error) {
	var s Snapshot
	add := func(kind, line string) {
		for _, re := range volatile {
			line = re.ReplaceAllString(line, "")
		}
		if line = strings.Join(strings.Fields(line), " "); line != "" {
			s = append(s, kind+": "+line)
		}
	}
	for _, c := range snapshotCommands {
		out, err := h.Out(ctx, c.args...)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(out) {
			add(c.kind, line)
		}
	}
	nft, err := h.Out(ctx, "nft", "list", "ruleset")
	if err != nil {
		return nil, err
	}
	var path []string // of the table and chain that a line is in
	for line := range strings.Lines(nft) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasSuffix(line, "{"):
			path = append(path, strings.TrimSpace(strings.TrimSuffix(line, "{")))
			add("nft", strings.Join(path, " / "))
		case line == "}" && len(path) > 0:
			path = path[:len(path)-1]
		default:
			add("nft", strings.Join(path, " / ")+" / "+line)
		}
	}
	for _, p := range h.Processes() {
		if !slices.Contains([]string{"ip", "ss", "nft", "bridge"}, p.Comm) {
			add("process", strings.Join(p.Args, " "))
		}
	}
	err = h.Do(func() error {
		mounts, err := os.ReadFile("/proc/1/mountinfo")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); len(f) > 5 && !dockers(f[4]) && !strings.HasPrefix(f[4], "/tmp/") {
				add("mount", f[3]+" on "+f[4])
			}
		}
		for _, root := range []string{"/sys/fs/bpf", "/run", "/var/lib/meshd", "/var/lib/meshd-wait"} {
			err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
				if err == nil && path != root && !dockers(path) {
					add("file", path)
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		addBPF(add)
		return nil
	})
	slices.Sort(s)
	return s, err
}

// dockers reports whether a path is Docker's own business.
func dockers(path string) bool {
	for _, dir := range []string{"/run/docker", "/run/containerd", "/var/lib/docker"} {
		if path == dir || strings.HasPrefix(path, dir+"/") {
			return true
		}
	}
	return false
}

// addBPF lists the BPF objects that the host's processes hold open; the pinned ones are files.
func addBPF(add func(kind, line string)) {
	infos, _ := filepath.Glob("/proc/[0-9]*/fdinfo/*")
	for _, path := range infos {
		data, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(data)) {
			for _, key := range []string{"prog_id:", "map_id:", "link_id:"} {
				if strings.HasPrefix(line, key) {
					comm, _ := os.ReadFile(filepath.Join("/proc", strings.Split(path, "/")[2], "comm"))
					add("bpf", key+" held by "+strings.TrimSpace(string(comm)))
				}
			}
		}
	}
}

// Diff lists what is in one snapshot only: "+" in after, "-" in before.
func (before Snapshot) Diff(after Snapshot) []string {
	count := map[string]int{}
	for _, line := range before {
		count[line]--
	}
	for _, line := range after {
		count[line]++
	}
	var diff []string
	for _, line := range slices.Sorted(maps.Keys(count)) {
		for n := count[line]; n > 0; n-- {
			diff = append(diff, "+ "+line)
		}
		for n := count[line]; n < 0; n++ {
			diff = append(diff, "- "+line)
		}
	}
	return diff
}

// WaitSame takes snapshots until one equals s, for about five seconds, and reports the difference of the
// last one. What the kernel removes in the background gets the time for it.
func (h *Host) WaitSame(ctx context.Context, s Snapshot) error {
	var diff []string
	for try := range 25 {
		if try > 0 {
			if err := pause(ctx, 200); err != nil {
				return err
			}
		}
		now, err := h.Snapshot(ctx)
		if err != nil {
			return err
		}
		if diff = s.Diff(now); len(diff) == 0 {
			return nil
		}
	}
	return fmt.Errorf("%s is not as it was:\n%s", h.Name, strings.Join(diff, "\n"))
}
