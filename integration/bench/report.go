package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// columns are the figures of the table, in its order.
var columns = []string{tcp1There, tcp1Back, tcp4There, tcp4Back, cpuPerGB, daemonCPU, datagrams, rttIdle50, rttIdle99, rttLoaded, memoryEach}

// compared are those of them that ratios are made of.
var compared = []string{tcp1There, tcp1Back, tcp4There, tcp4Back, cpuPerGB, datagrams, rttIdle50, rttIdle99, rttLoaded}

func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	if len(s) == 0 {
		return 0
	}
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// tables writes medians with their spread, and ratios to the reference, as Markdown.
func (r results) tables() string {
	var b strings.Builder
	for _, x := range r {
		x.table(&b)
	}
	return b.String()
}

func (r *result) table(b *strings.Builder) {
	rounds := 0
	for _, n := range r.Networks {
		rounds = max(rounds, len(n.Values[tcp1There]))
	}
	fmt.Fprintf(b, "## %s\n\n%d rounds, %v each measurement, %d processors, %s. Median, and in brackets the lowest and the highest.\n",
		underlays[r.Underlay], rounds, r.Length, runtime.NumCPU(), runtime.Version())
	for _, m := range r.Missing {
		fmt.Fprintf(b, "Left out: %s.\n", m)
	}
	header(b, columns)
	for _, n := range r.Networks {
		fmt.Fprintf(b, "| %s |", n.Name)
		for _, c := range columns {
			if v := n.Values[c]; len(v) > 0 {
				fmt.Fprintf(b, " %.3g (%.3g–%.3g) |", median(v), slices.Min(v), slices.Max(v))
			} else {
				b.WriteString(" |")
			}
		}
		b.WriteString("\n")
	}
	if r.network(reference) != nil {
		fmt.Fprintf(b, "\nMedian of the ratios to %s, round by round.\n", reference)
		header(b, compared)
		for _, n := range r.Networks {
			fmt.Fprintf(b, "| %s |", n.Name)
			for _, c := range compared {
				fmt.Fprintf(b, " %.2f |", median(n.Ratios[c]))
			}
			b.WriteString("\n")
		}
	}
	b.WriteString("\n")
}

func header(b *strings.Builder, columns []string) {
	b.WriteString("\n| network |")
	for _, c := range columns {
		b.WriteString(" " + c + " |")
	}
	b.WriteString("\n|---|" + strings.Repeat("---:|", len(columns)) + "\n")
}

func ratios(v, ref []float64) (list []float64) {
	for i := range min(len(v), len(ref)) {
		if ref[i] > 0 {
			list = append(list, v[i]/ref[i])
		}
	}
	return list
}

const page = `# Benchmarks

Written by ` + "`make bench`" + ` on %s. All networks ran on one machine, in namespaces that a router between them joins, and took
turns, so the ratios tell more than the figures. Traffic and all daemons share the processors. "mesh kernel" is the kernel path,
"mesh userspace" the other one in clear, "mesh sealed" the same with a password, "relayed" through a third host, whose CPU is then
the daemon's. "daemon's CPU" is that of one daemon, with what the kernel does in its name.

![](benchmarks.svg)

`

// keep marks the part of the page that is written by hand and stays.
const keep = "<!-- below: by hand -->\n"

// write puts table and picture into a directory.
func write(o options, text string, all results) error {
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	text = fmt.Sprintf(page, time.Now().UTC().Format(time.DateOnly)) + text
	if o.gobench != "" {
		data, err := os.ReadFile(o.gobench)
		if err != nil {
			return err
		}
		text += goTable(string(data))
	}
	file := filepath.Join(o.out, "benchmarks.md")
	old, _ := os.ReadFile(file)
	if _, hand, ok := strings.Cut(string(old), keep); ok {
		text += keep + hand
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		return err
	}
	if len(all) == 0 {
		return nil
	}
	return os.WriteFile(filepath.Join(o.out, "benchmarks.svg"), []byte(picture(all[0].Networks)), 0o644)
}

// goTable makes a table of the output of go test -bench: control plane, name server and addresses among them. Of
// several runs of one benchmark the median counts.
func goTable(output string) string {
	var order []string
	runs := map[string][][]string{}
	pkg := ""
	for line := range strings.Lines(output) {
		f := strings.Fields(line)
		if len(f) == 2 && f[0] == "pkg:" {
			pkg = strings.TrimPrefix(f[1], "meshd/")
		}
		if len(f) < 4 || !strings.HasPrefix(f[0], "Benchmark") {
			continue
		}
		name := pkg + " " + strings.TrimPrefix(f[0], "Benchmark")
		if _, known := runs[name]; !known {
			order = append(order, name)
		}
		runs[name] = append(runs[name], f[2:])
	}
	var b strings.Builder
	b.WriteString("## The rooms by themselves\n\n| benchmark | median of its runs |\n|---|---|\n")
	for _, name := range order {
		list := runs[name]
		slices.SortFunc(list, func(x, y []string) int {
			var a, b float64
			_, _ = fmt.Sscan(x[0], &a)
			_, _ = fmt.Sscan(y[0], &b)
			return int(a*1000) - int(b*1000)
		})
		var parts []string
		for pair := range slices.Chunk(list[len(list)/2], 2) {
			parts = append(parts, strings.Join(pair, " "))
		}
		fmt.Fprintf(&b, "| %s | %s |\n", name, strings.Join(parts, ", "))
	}
	b.WriteString("\n")
	return b.String()
}

// picture draws bars of three figures.
func picture(nets []figures) string {
	const width, bar, label = 860, 16, 150
	charts := []string{tcp1There, tcp4There, datagrams, rttIdle50}
	space := (width - label) / len(charts)
	height := 50 + len(nets)*(bar+6)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", width, height)
	for i, n := range nets {
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", label-8, 42+i*(bar+6)+bar-4, n.Name)
	}
	for c, what := range charts {
		x := label + c*space
		fmt.Fprintf(&b, `<text x="%d" y="24" font-weight="bold">%s</text>`+"\n", x, what)
		most := 0.0
		for _, n := range nets {
			most = max(most, median(n.Values[what]))
		}
		for i, n := range nets {
			v := median(n.Values[what])
			fill := "#9aa5b1"
			if strings.HasPrefix(n.Name, "mesh") {
				fill = "#2b6cb0"
			}
			y := 42 + i*(bar+6)
			length := v / max(most, 1e-9) * float64(space-60)
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", x, y, length, bar, fill)
			fmt.Fprintf(&b, `<text x="%.1f" y="%d">%.3g</text>`+"\n", float64(x)+length+4, y+bar-4, v)
		}
	}
	b.WriteString("</svg>\n")
	return b.String()
}
