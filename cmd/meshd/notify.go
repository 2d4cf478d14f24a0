package main

import (
	"context"
	"log/slog"
	"net"
	"os"
	"strconv"
	"time"
)

// notifier tells systemd how we are, by datagrams to $NOTIFY_SOCKET (sd_notify(3)). Without that
// variable it does nothing.
type notifier struct {
	socket   string
	interval time.Duration // of watchdog messages; 0: systemd does not ask for them
	log      *slog.Logger
	ready    chan func(context.Context) error
}

// newNotifier reads and removes the variables, so that no child speaks in our name.
func newNotifier(env environment, log *slog.Logger) *notifier {
	n := &notifier{log: log, ready: make(chan func(context.Context) error, 1)}
	n.socket, _ = env("NOTIFY_SOCKET")
	pid, _ := env("WATCHDOG_PID")
	if usec, ok := env("WATCHDOG_USEC"); ok && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		if v, err := strconv.ParseInt(usec, 10, 64); err == nil && v > 0 {
			n.interval = time.Duration(v) * time.Microsecond / 2
		}
	}
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"} {
		os.Unsetenv(name)
	}
	return n
}

// Ready says that the daemon serves. From then on systemd's watchdog is fed for as long as healthy,
// which must return within its context's time, returns nil. Call it once.
func (n *notifier) Ready(healthy func(context.Context) error) {
	n.send("READY=1")
	n.ready <- healthy
}

// Run feeds the watchdog until ctx is done.
func (n *notifier) Run(ctx context.Context) error {
	var healthy func(context.Context) error
	select {
	case healthy = <-n.ready:
	case <-ctx.Done():
		return nil
	}
	defer n.send("STOPPING=1")
	if n.interval == 0 || n.socket == "" {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(n.interval)
	defer tick.Stop()
	for {
		check, cancel := context.WithTimeout(ctx, n.interval/2)
		err := healthy(check)
		cancel()
		if err == nil {
			n.send("WATCHDOG=1")
		} else if ctx.Err() == nil {
			n.log.Error("not healthy, the watchdog is not fed", "err", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (n *notifier) send(message string) {
	if n.socket == "" {
		return
	}
	name := n.socket
	if name[0] == '@' { // abstract socket
		name = "\x00" + name[1:]
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		n.log.Warn("cannot notify systemd", "err", err)
		return
	}
	defer c.Close()
	if _, err := c.Write([]byte(message)); err != nil {
		n.log.Warn("cannot notify systemd", "err", err)
	}
}
