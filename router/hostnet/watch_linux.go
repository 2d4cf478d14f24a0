package hostnet

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	netlinkconn "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// State is what a watcher of the bridge needs to know.
type State struct {
	Foreign []string // ports of the bridge that are not ours, sorted
	Missing []string // of bridge, TAP and ports, what is gone or no longer in its place, sorted
	Ports   []string // host ends of ours, sorted
	Docker  []string // Docker's own bridges, sorted
}

func (s State) equal(t State) bool {
	return slices.Equal(s.Foreign, t.Foreign) && slices.Equal(s.Missing, t.Missing) &&
		slices.Equal(s.Ports, t.Ports) && slices.Equal(s.Docker, t.Docker)
}

// State reads the state of the bridge now.
func (h *Host) State() (State, error) {
	all, err := h.links()
	if err != nil {
		return State{}, err
	}
	return h.judge(all), nil
}

// ForeignPorts lists the bridge's ports that are not ours: a VM's or another bridge's.
func (h *Host) ForeignPorts() ([]string, error) {
	s, err := h.State()
	return s.Foreign, err
}

// Burst is how long after a first change further ones are awaited, and retryWatch how long after a
// failure the socket is opened anew.
const (
	burst      = 50 * time.Millisecond
	retryWatch = 500 * time.Millisecond
)

// Watch calls f with the state of the bridge now and after each change, until ctx ends. Events only say
// that something changed; the state is always read anew, so that lost events (ENOBUFS) do no harm.
func (h *Host) Watch(ctx context.Context, f func(State)) error {
	var last State
	first := true
	report := func() {
		s, err := h.State()
		if err != nil {
			h.log.Warn("cannot read the state of the bridge", "err", err)
			return
		}
		if first || !s.equal(last) {
			first, last = false, s
			f(s)
		}
	}
	for ctx.Err() == nil {
		err := h.watchOnce(ctx, report)
		if ctx.Err() != nil {
			break
		}
		h.log.Debug("watch of devices starts anew", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(retryWatch):
		}
	}
	return ctx.Err()
}

func (h *Host) watchOnce(ctx context.Context, report func()) error {
	conn, err := netlinkconn.Dial(unix.NETLINK_ROUTE, &netlinkconn.Config{
		Groups: unix.RTMGRP_LINK, NetNS: int(h.ns.Fd()),
	})
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	for {
		report()
		if err := receive(conn, time.Time{}); err != nil {
			return err
		}
		for end := time.Now().Add(burst); ctx.Err() == nil; {
			if err := receive(conn, end); err != nil {
				break
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// receive waits for events; overrun is as good as an event.
func receive(conn *netlinkconn.Conn, deadline time.Time) error {
	if !deadline.IsZero() {
		if err := conn.SetReadDeadline(deadline); err != nil {
			return err
		}
		defer conn.SetReadDeadline(time.Time{})
	}
	_, err := conn.Receive()
	if errors.Is(err, unix.ENOBUFS) {
		return nil
	}
	return err
}
