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
var columns = []string{tcp1There, tcp1Back, tcp4There, tcp4Back, cpuPerGB, datagrams, rttIdle50, rttIdle99, rttLoaded, memoryEach}

func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	if len(s) == 0 {
		return 0
	}
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// table writes medians with their spread, and ratios to the reference, as Markdown.
func table(nets []*network, o options) string {
	var b strings.Builder
	underlay := "packets of MTU size on the underlay, as on a wire"
	if o.whole {
		underlay = "superframes cross the underlay whole"
	}
	fmt.Fprintf(&b, "%d rounds, %v each measurement, %d processors, %s; %s.\n\n", o.rounds, o.length, runtime.NumCPU(), runtime.Version(), underlay)
	b.WriteString("Median, and in brackets the lowest and the highest.\n\n| network |")
	for _, c := range columns {
		b.WriteString(" " + c + " |")
	}
	b.WriteString("\n|---|" + strings.Repeat("---:|", len(columns)) + "\n")
	var ref *network
	for _, n := range nets {
		if n.name == reference {
			ref = n
		}
		b.WriteString("| " + n.name + " |")
		for _, c := range columns {
			v := n.results[c]
			if len(v) == 0 {
				b.WriteString(" |")
				continue
			}
			fmt.Fprintf(&b, " %.3g (%.3g–%.3g) |", median(v), slices.Min(v), slices.Max(v))
		}
		b.WriteString("\n")
	}
	if ref == nil {
		return b.String()
	}
	fmt.Fprintf(&b, "\nMedian of the ratios to %s, round by round.\n\n| network |", reference)
	for _, c := range columns[:len(columns)-1] {
		b.WriteString(" " + c + " |")
	}
	b.WriteString("\n|---|" + strings.Repeat("---:|", len(columns)-1) + "\n")
	for _, n := range nets {
		b.WriteString("| " + n.name + " |")
		for _, c := range columns[:len(columns)-1] {
			var ratios []float64
			for i, v := range n.results[c] {
				if i < len(ref.results[c]) && ref.results[c][i] > 0 {
					ratios = append(ratios, v/ref.results[c][i])
				}
			}
			fmt.Fprintf(&b, " %.2f |", median(ratios))
		}
		b.WriteString("\n")
	}
	return b.String()
}

// write puts table and picture into a directory.
func write(dir, text string, nets []*network) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	page := "# Benchmarks\n\nWritten by `make bench` on " + time.Now().UTC().Format(time.DateOnly) +
		". All networks ran on one machine and took turns, so the ratios tell more than the figures.\n\n![](benchmarks.svg)\n\n" + text
	if err := os.WriteFile(filepath.Join(dir, "benchmarks.md"), []byte(page), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "benchmarks.svg"), []byte(picture(nets)), 0o644)
}

// picture draws bars of three figures.
func picture(nets []*network) string {
	const width, bar, label = 860, 16, 150
	charts := []string{tcp1There, datagrams, rttIdle50}
	space := (width - label) / len(charts)
	height := 50 + len(nets)*(bar+6)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", width, height)
	for i, n := range nets {
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", label-8, 42+i*(bar+6)+bar-4, n.name)
	}
	for c, what := range charts {
		x := label + c*space
		fmt.Fprintf(&b, `<text x="%d" y="24" font-weight="bold">%s</text>`+"\n", x, what)
		most := 0.0
		for _, n := range nets {
			most = max(most, median(n.results[what]))
		}
		for i, n := range nets {
			v := median(n.results[what])
			fill := "#9aa5b1"
			if strings.HasPrefix(n.name, "mesh") {
				fill = "#2b6cb0"
			}
			y := 42 + i*(bar+6)
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", x, y, v/most*float64(space-80), bar, fill)
			fmt.Fprintf(&b, `<text x="%.1f" y="%d">%.3g</text>`+"\n", float64(x)+v/most*float64(space-80)+4, y+bar-4, v)
		}
	}
	b.WriteString("</svg>\n")
	return b.String()
}
