// Package demo shows the mesh on one machine: three hosts made of namespaces, containers that talk
// across them, and what happens when a link between two hosts is cut.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"meshd/integration/lab"
	"meshd/integration/lab/probe"
)

// Config says what to show and where to print it.
type Config struct {
	Out   io.Writer
	Bin   string // directory of meshctl and meshd
	Bytes int64  // size of each transfer; 0: 200 MB
}

// limit bounds the whole demonstration.
const limit = 58 * time.Second

// Run shows everything once and removes it. It fails if anything that it shows fails.
func Run(ctx context.Context, cfg Config) (err error) {
	if cfg.Bytes == 0 {
		cfg.Bytes = 200 << 20
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	start := time.Now()
	d := &demo{out: cfg.Out, bytes: cfg.Bytes}
	d.say("Three hosts, each with its own network, processes and files, on a routed underlay:\n")
	d.picture("---------------", "this machine")
	if d.lab, err = lab.New(ctx, lab.Config{Hosts: 3, Bin: cfg.Bin}); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			for _, h := range d.lab.Hosts {
				d.say("%s", h.Log())
			}
		}
		if cerr := d.lab.Close(); cerr != nil {
			err = errors.Join(err, cerr)
			return
		}
		if err == nil {
			d.say("Everything is removed. That took %v in all.", time.Since(start).Round(100*time.Millisecond))
		}
	}()
	for _, step := range []func(context.Context) error{d.launch, d.attach, d.names, d.talk, d.cut, d.heal, d.stop} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

type demo struct {
	out        io.Writer
	bytes      int64
	lab        *lab.Lab
	containers []*lab.Container // one on each host
	addrs      []netip.Addr     // theirs
}

var containerNames = []string{"web", "db", "app"}

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

// picture draws the hosts, with the link between h1 and h2 as given: 15 characters.
func (d *demo) picture(link12, comment string) {
	d.say(`
    h1 198.18.1.2 %s h2 198.18.2.2      %s
        [web]      \                 /      [db]
                    \               /
                     \             /
                      h3 198.18.3.2
                          [app]
`, link12, comment)
}

// meshctl runs a command on a host and prints both it and its answer.
func (d *demo) meshctl(ctx context.Context, h *lab.Host, args ...string) (string, error) {
	d.say("  %s# meshctl %s", h.Name, strings.Join(args, " "))
	out, err := h.Must(ctx, args...)
	for line := range strings.Lines(out) {
		if line = strings.TrimRight(line, "\n "); line != "" {
			d.say("      %s", line)
		}
	}
	return out, err
}

func (d *demo) launch(ctx context.Context) error {
	d.say("Launch: each host needs to know one other, and they find the rest.")
	start := time.Now()
	for i, h := range d.lab.Hosts {
		args := []string{"launch", "--dns-listen-address", "127.0.0.1:53"}
		if i > 0 {
			args = append(args, d.lab.Host(1).Addr.String())
		}
		if _, err := d.meshctl(ctx, h, args...); err != nil {
			return err
		}
	}
	if _, err := lab.WaitMesh(ctx, 10*time.Second, d.lab.Hosts...); err != nil {
		return err
	}
	d.say("  All three are connected to each other, %v after the first command.\n", time.Since(start).Round(time.Millisecond))
	_, err := d.meshctl(ctx, d.lab.Host(3), "status", "connections")
	return err
}

func (d *demo) attach(ctx context.Context) error {
	d.say("\nContainers: a network namespace on each host; a Docker container is attached in the same way.")
	for i, h := range d.lab.Hosts {
		c, err := h.Netns(ctx, containerNames[i])
		if err != nil {
			return err
		}
		d.say("  %s# meshctl attach %s", h.Name, c.Ref)
		addrs, err := c.Attach(ctx)
		if err != nil {
			return err
		}
		d.say("      %v", addrs[0])
		d.containers = append(d.containers, c)
		d.addrs = append(d.addrs, addrs[0])
	}
	return nil
}

func (d *demo) names(ctx context.Context) error {
	d.say("\nNames: given on one host, known on all.")
	for i, h := range d.lab.Hosts {
		if _, err := d.meshctl(ctx, h, "dns-add", d.addrs[i].String(), "-h", containerNames[i]+".mesh.internal"); err != nil {
			return err
		}
	}
	h, found := d.lab.Host(1), ""
	err := lab.Until(ctx, 5*time.Second, "h1 to know the name of h3's container", func() bool {
		r, err := h.Ctl(ctx, "dns-lookup", "app")
		found = strings.TrimSpace(r.Stdout)
		return err == nil && found == d.addrs[2].String()
	})
	if err != nil {
		return err
	}
	d.say("  h1# meshctl dns-lookup app\n      %s", found)
	return nil
}

func (d *demo) talk(ctx context.Context) error {
	d.say("\nTraffic between the containers:")
	for _, pair := range [][2]int{{0, 1}, {1, 2}, {2, 0}} {
		if err := d.ping(ctx, pair[0], pair[1]); err != nil {
			return err
		}
	}
	return d.transfer(ctx, 0, 1)
}

func (d *demo) ping(ctx context.Context, from, to int) error {
	const count = 10
	got, out, err := d.containers[from].Ping(ctx, d.addrs[to], count, 56)
	if err == nil && got != count { // a busy machine is given a second chance
		got, out, err = d.containers[from].Ping(ctx, d.addrs[to], count, 56)
	}
	if err == nil && got != count {
		err = fmt.Errorf("%d of %d pings from %s to %s were answered:\n%s", got, count, containerNames[from], containerNames[to], out)
	}
	if err != nil {
		return err
	}
	times := "?"
	if _, after, ok := strings.Cut(out, "min/avg/max/mdev = "); ok {
		times = strings.Split(after, "/")[1]
	}
	d.say("  ping   %3s -> %-3s  %d of %d answered, %s ms on average", containerNames[from], containerNames[to], got, count, times)
	return nil
}

func (d *demo) transfer(ctx context.Context, from, to int) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	listener, err := d.containers[to].Listen(ctx, netip.AddrPortFrom(d.addrs[to], 5001).String())
	if err != nil {
		return err
	}
	defer listener.Close()
	t, err := probe.Stream(ctx, listener, func() (net.Conn, error) {
		return d.containers[from].Dial(ctx, "tcp", listener.Addr().String())
	}, d.bytes, 1)
	if err != nil {
		return err
	}
	d.say("  stream %3s -> %-3s  %d MB in %v, %.2f Gbit/s, checksum right", containerNames[from], containerNames[to],
		t.Bytes>>20, t.Time.Round(time.Millisecond), float64(t.Bytes)*8/float64(t.Time.Nanoseconds()))
	return nil
}

// watch sends a numbered datagram every millisecond from web to db while what happens.
func (d *demo) watch(ctx context.Context, what func(context.Context) error) error {
	from, err := d.containers[0].ListenUDP(ctx, netip.AddrPortFrom(d.addrs[0], 0).String())
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := d.containers[1].ListenUDP(ctx, netip.AddrPortFrom(d.addrs[1], 5002).String())
	if err != nil {
		return err
	}
	defer to.Close()
	pctx, stop := context.WithCancel(ctx)
	defer stop()
	var report probe.Report
	done := make(chan error, 1)
	go func() {
		var err error
		report, err = probe.Datagrams{Interval: time.Millisecond, Size: 100}.Run(pctx, from, to, netip.AddrPortFrom(d.addrs[1], 5002))
		done <- err
	}()
	err = what(ctx)
	stop()
	if err = errors.Join(err, <-done); err != nil {
		return err
	}
	d.say("  A datagram every millisecond, web -> db: %d sent, %d lost, longest silence %v.",
		report.Sent, report.Lost, report.MaxGap.Round(time.Millisecond))
	return nil
}

// route waits until h1 reaches h2 in the given way and says how long that took.
func (d *demo) route(ctx context.Context, relayed bool) (time.Duration, error) {
	start := time.Now()
	what := "h1 to reach h2 directly"
	if relayed {
		what = "h1 to reach h2 through h3"
	}
	err := lab.Until(ctx, 15*time.Second, what, func() bool {
		r, err := d.lab.Host(1).Report(ctx)
		if err != nil {
			return false
		}
		names := map[string]string{}
		for _, p := range r.Router.Peers {
			names[p.Name] = p.NickName
		}
		for _, route := range r.Router.UnicastRoutes {
			if names[route.Dest] == "h2" {
				return relayed == (names[route.Via] == "h3")
			}
		}
		return false
	})
	return time.Since(start), err
}

func (d *demo) cut(ctx context.Context) error {
	d.say("\nNow the underlay between h1 and h2 is cut.")
	d.picture("-----  X  -----", "cut")
	err := d.watch(ctx, func(ctx context.Context) error {
		if err := d.lab.Cut(ctx, d.lab.Host(1), d.lab.Host(2)); err != nil {
			return err
		}
		if _, err := d.containers[0].WaitPing(ctx, d.addrs[1], 10*time.Second); err != nil {
			return err
		}
		took, err := d.route(ctx, true)
		if err == nil {
			d.say("  h1 reaches h2 through h3, %v after db answered again.", took.Round(time.Millisecond))
		}
		return err
	})
	if err != nil {
		return err
	}
	if _, err := d.meshctl(ctx, d.lab.Host(1), "status", "connections"); err != nil {
		return err
	}
	if err := d.ping(ctx, 0, 1); err != nil {
		return err
	}
	return d.transfer(ctx, 0, 1)
}

func (d *demo) heal(ctx context.Context) error {
	d.say("\nThe cut is mended.")
	d.picture("---------------", "whole again")
	return d.watch(ctx, func(ctx context.Context) error {
		if err := d.lab.Heal(ctx, d.lab.Host(1), d.lab.Host(2)); err != nil {
			return err
		}
		took, err := d.route(ctx, false)
		if err == nil {
			d.say("  The direct way is taken back after %v.", took.Round(time.Millisecond))
		}
		return err
	})
}

func (d *demo) stop(ctx context.Context) error {
	d.say("\nEnd: reset removes what meshd made on a host.")
	for _, h := range d.lab.Hosts {
		if _, err := d.meshctl(ctx, h, "reset"); err != nil {
			return err
		}
	}
	d.say("")
	return nil
}
