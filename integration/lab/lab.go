package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Config says what lab to build.
type Config struct {
	Hosts int    // number of hosts, 1 to 200; they are named h1, h2, …
	Bin   string // directory of meshctl and meshd, put first in every host's PATH; empty: none
}

// Lab is a set of hosts and the router between them.
type Lab struct {
	Hosts []*Host

	id      string // unique among live labs; names the scratch directory and the cgroups
	scratch string
	lock    *os.File
	bin     string
	router  *space

	mu     sync.Mutex // guards what follows
	faults map[flow]*fault
	shaper *shaper
	closed bool
}

// New builds a lab. Whatever labs of dead owners have left is removed first.
func New(ctx context.Context, cfg Config) (_ *Lab, err error) {
	if cfg.Hosts < 1 || cfg.Hosts > 200 {
		return nil, fmt.Errorf("a lab has 1 to 200 hosts, not %d", cfg.Hosts)
	}
	if err := Requirements(); err != nil {
		return nil, err
	}
	if err := sweep(); err != nil {
		return nil, err
	}
	l := &Lab{bin: cfg.Bin, faults: map[flow]*fault{}}
	if l.scratch, l.lock, err = makeScratch(); err != nil {
		return nil, err
	}
	l.id = filepath.Base(l.scratch)
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()

	// The router is a network namespace alone: its commands see the machine's processes and files.
	const router = `sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0 ` +
		`net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0 && ip link set lo up && echo ready && exec sleep 2147483647`
	if l.router, err = newSpace(ctx, l.id+"-router", []string{"net"}, router); err != nil {
		return nil, err
	}
	l.Hosts = make([]*Host, cfg.Hosts)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range l.Hosts {
		g.Go(func() (err error) {
			l.Hosts[i], err = l.newHost(gctx, i+1)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return l, l.wire(ctx)
}

// Host gives host number n, counted from 1.
func (l *Lab) Host(n int) *Host { return l.Hosts[n-1] }

// Close ends all processes of the lab, removes what it made and reports what outlived it, which is
// nothing unless the kernel or the lab is at fault. It may be called twice.
func (l *Lab) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	shaper := l.shaper
	l.mu.Unlock()

	if shaper != nil {
		shaper.close()
	}
	inodes := map[uint64]string{}
	note := func(s *space) {
		for kind, ino := range s.inodes {
			inodes[ino] = s.name + "'s " + kind + " namespace"
		}
	}
	var wg sync.WaitGroup
	for _, h := range l.Hosts {
		if h == nil {
			continue
		}
		note(h.space)
		wg.Go(h.close)
	}
	wg.Wait()
	if l.router != nil {
		note(l.router)
		l.router.close()
	}
	var errs []error
	if len(inodes) > 0 {
		errs = append(errs, waitUnused(inodes, 5*time.Second))
	}
	errs = append(errs, removeCgroups(l.id, 5*time.Second))
	if l.scratch != "" {
		errs = append(errs, os.RemoveAll(l.scratch), l.lock.Close())
	}
	return errors.Join(errs...)
}

// waitUnused waits until no process is in one of the namespaces any more, and names those that are.
func waitUnused(inodes map[uint64]string, limit time.Duration) error {
	var users []string
	err := Until(context.Background(), limit, "the lab's namespaces to be empty", func() bool {
		users = namespaceUsers(inodes)
		return len(users) == 0
	})
	if err != nil {
		return fmt.Errorf("%w: %s", err, strings.Join(users, ", "))
	}
	return nil
}

// Until asks ok every 10 ms, up to the limit, and returns an error that says what was waited for.
func Until(ctx context.Context, limit time.Duration, what string, ok func() bool) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	end := time.NewTimer(limit)
	defer end.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-end.C:
			return fmt.Errorf("waited %v for %s", limit, what)
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, ctx.Err())
		}
	}
	return nil
}

// pause waits between two tries.
func pause(ctx context.Context, milliseconds int) error {
	select {
	case <-time.After(time.Duration(milliseconds) * time.Millisecond):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
