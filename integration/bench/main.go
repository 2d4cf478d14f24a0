// Command bench measures the mesh beside what else carries frames between hosts: a bare veth pair, host
// routing, a Linux bridge with vxlan, and the tunnels that Debian offers. All run in namespaces of one
// machine and take turns, so what counts are the ratios in one run, not the figures themselves.
//
// It needs root and the binaries of the product (-bin).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"meshd/integration/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	bin, out string
	rounds   int
	length   time.Duration // of one measurement
	only     string
	underlay string
	profile  string
	measure  string
	results  string
	gobench  string
}

func run(ctx context.Context, args []string) error {
	var o options
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.StringVar(&o.bin, "bin", "bin", "`directory` of meshctl and meshd")
	f.StringVar(&o.out, "out", "", "`directory` for benchmarks.md and its picture; empty prints only")
	f.StringVar(&o.results, "results", "", "`file` to which the figures are added; what it holds already counts as well")
	f.StringVar(&o.gobench, "gobench", "", "`file` with the output of go test -bench, for the page")
	f.IntVar(&o.rounds, "rounds", 5, "`number` of turns that each network gets; 0 only writes the page")
	f.DurationVar(&o.length, "length", 2*time.Second, "`duration` of each measurement")
	f.StringVar(&o.only, "only", "", "comma-separated `names` of networks; empty means all")
	f.StringVar(&o.underlay, "underlay", wire, "`kind` of underlay: wire, bare wire or whole")
	f.StringVar(&o.profile, "profile", "", "`directory` for CPU profiles of the whole machine, one of each kind of measurement and network (needs perf)")
	f.StringVar(&o.measure, "measure", "tcp,datagrams,rtt", "comma-separated `kinds` of measurements")
	if err := f.Parse(args); err != nil {
		return err
	}
	if _, known := underlays[o.underlay]; !known {
		return fmt.Errorf("-underlay %s: there is wire, bare wire and whole", o.underlay)
	}
	all, err := readResults(o.results)
	if err != nil {
		return err
	}
	if o.rounds > 0 {
		r, err := measureAll(ctx, o)
		if err != nil {
			return err
		}
		all.add(r)
		if err := all.save(o.results); err != nil {
			return err
		}
	}
	text := all.tables()
	fmt.Print("\n", text)
	if o.out != "" {
		return write(o, text, all)
	}
	return nil
}

// measureAll builds the networks and gives each its turns.
func measureAll(ctx context.Context, o options) (*result, error) {
	if err := lab.Requirements(); err != nil {
		return nil, err
	}
	// So that the runtime leaves threads alone that wait in system calls.
	runtime.GOMAXPROCS(runtime.NumCPU() + 6)
	r := newResult(o)
	var nets []*network
	defer func() {
		for _, n := range nets {
			if err := n.lab.Close(); err != nil {
				fmt.Fprintln(os.Stderr, "bench:", n.name, err)
			}
		}
	}()
	for _, c := range candidates {
		if o.only != "" && !slices.Contains(strings.Split(o.only, ","), c.name) {
			continue
		}
		n, err := c.build(ctx, o)
		var missing *missingError
		switch {
		case errors.As(err, &missing):
			fmt.Printf("%s is left out: %v\n", c.name, err)
			r.Missing = append(r.Missing, fmt.Sprintf("%s: %v", c.name, missing))
			continue
		case err != nil:
			return nil, fmt.Errorf("%s: %w", c.name, err)
		}
		nets = append(nets, n)
		fmt.Printf("%s is up\n", c.name)
	}
	if len(nets) == 0 {
		return nil, errors.New("there is nothing to measure")
	}
	for round := range o.rounds {
		for i := range nets {
			n := nets[(i+round)%len(nets)] // whoever comes after whom changes, too
			if err := n.measure(ctx, o); err != nil {
				return nil, fmt.Errorf("%s: %w", n.name, err)
			}
			fmt.Printf("round %d of %d: %s\n", round+1, o.rounds, n.last())
		}
	}
	for _, n := range nets {
		r.Networks = append(r.Networks, figures{Name: n.name, Values: n.results})
	}
	r.compare()
	return r, nil
}
