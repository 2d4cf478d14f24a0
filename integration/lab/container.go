package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Container is a network namespace on a host, of a Docker container or by itself.
type Container struct {
	Host *Host
	Name string
	Ref  string // what `meshctl attach` takes: a container's name or "netns:/run/netns/NAME"
	ID   string // Docker's id, empty for a plain namespace

	netns *os.File
}

// Netns makes a plain network namespace on the host, a container without Docker.
func (h *Host) Netns(ctx context.Context, name string) (*Container, error) {
	if _, err := h.Out(ctx, "ip", "netns", "add", name); err != nil {
		return nil, err
	}
	path := "/run/netns/" + name
	c := &Container{Host: h, Name: name, Ref: "netns:" + path}
	if err := c.open(path); err != nil {
		return nil, err
	}
	_, err := c.Out(ctx, "ip", "link", "set", "lo", "up")
	return c, err
}

// Self gives the host's own network namespace in the form of a container.
func (h *Host) Self() (*Container, error) {
	c := &Container{Host: h, Name: h.Name, Ref: "pid:1"}
	return c, c.open("/proc/1/ns/net")
}

func (c *Container) open(path string) error {
	err := c.Host.Do(func() (err error) {
		c.netns, err = os.Open(path)
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: container %s: %w", c.Host.Name, c.Name, err)
	}
	c.Host.mu.Lock()
	c.Host.containers = append(c.Host.containers, c)
	c.Host.mu.Unlock()
	return nil
}

func (c *Container) forget() { _ = c.netns.Close() }

// Remove deletes the container or the namespace.
func (c *Container) Remove(ctx context.Context) error {
	c.forget()
	args := []string{"ip", "netns", "del", c.Name}
	if c.ID != "" {
		args = []string{"docker", "rm", "-f", c.ID}
	}
	_, err := c.Host.Out(ctx, args...)
	return err
}

// Do runs fn on a thread in the container's network namespace; sockets that it opens stay there.
func (c *Container) Do(fn func() error) error { return inNetns(int(c.netns.Fd()), fn) }

// Run runs one of the host's programs in the container's network namespace and waits for it.
func (c *Container) Run(ctx context.Context, args ...string) (Result, error) {
	return c.Host.run(ctx, c.onThread, nil, args)
}

// Out is Run for a program that has to succeed; it gives the output without the last line end.
func (c *Container) Out(ctx context.Context, args ...string) (string, error) {
	r, err := c.Run(ctx, args...)
	if err == nil && r.Exit != 0 {
		err = fmt.Errorf("%s: container %s: %s", c.Host.Name, c.Name, r)
	}
	return strings.TrimRight(r.Stdout, "\n"), err
}

// Start starts one of the host's programs in the container's network namespace.
func (c *Container) Start(ctx context.Context, prepare func(*exec.Cmd), args ...string) (*Proc, error) {
	return c.Host.start(ctx, c.onThread, prepare, args)
}

// onThread runs fn on the host's thread, moved into the container's network namespace meanwhile.
func (c *Container) onThread(fn func() error) error {
	return c.Host.space.do(func() error {
		if err := joinFD(int(c.netns.Fd()), "net"); err != nil {
			return err
		}
		err := fn()
		if back := join("/proc/1/ns/net", "net"); back != nil {
			// The thread is of no more use: whatever it did next would happen in the wrong place.
			panic(fmt.Sprintf("%s: return from container %s: %v", c.Host.Name, c.Name, back))
		}
		return err
	})
}

// Ping sends count pings of size payload bytes and returns how many answers came. Every ping waits at
// most a second for its answer.
func (c *Container) Ping(ctx context.Context, to netip.Addr, count, size int) (answers int, output string, err error) {
	r, err := c.Run(ctx, "ping", "-n", "-q", "-c", strconv.Itoa(count), "-i", "0.02", "-W", "1", "-s", strconv.Itoa(size), to.String())
	if err != nil {
		return 0, "", err
	}
	for line := range strings.Lines(r.Stdout) {
		if i := strings.Index(line, " received"); i > 0 {
			fields := strings.Fields(line[:i])
			answers, _ = strconv.Atoi(fields[len(fields)-1])
		}
	}
	return answers, r.Stdout + r.Stderr, nil
}

// WaitPing pings until the first answer, for at most limit, and gives the time it took.
func (c *Container) WaitPing(ctx context.Context, to netip.Addr, limit time.Duration) (time.Duration, error) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		// An ICMP error ends ping as an answer does, so it is asked again.
		r, err := c.Run(ctx, "ping", "-n", "-q", "-i", "0.02", "-w", strconv.Itoa(int(limit/time.Second)+1), "-c", "1", to.String())
		took := time.Since(start)
		if err == nil && r.Exit == 0 {
			return took, nil
		}
		if pause(ctx, 20) != nil {
			return took, fmt.Errorf("container %s has no answer from %v within %v: %v %s", c.Name, to, limit, err, r)
		}
	}
}

// Dial opens a connection from inside the container. The address has to be a literal.
func (c *Container) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = c.Do(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen opens a TCP listener inside the container.
func (c *Container) Listen(ctx context.Context, address string) (l net.Listener, err error) {
	err = c.Do(func() (err error) {
		l, err = (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		return err
	})
	return l, err
}

// ListenUDP opens a UDP socket inside the container.
func (c *Container) ListenUDP(ctx context.Context, address string) (conn *net.UDPConn, err error) {
	err = c.Do(func() error {
		pc, err := (&net.ListenConfig{Control: reuse}).ListenPacket(ctx, "udp", address)
		if err == nil {
			conn = pc.(*net.UDPConn)
		}
		return err
	})
	return conn, err
}

func reuse(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) {
		err = errors.Join(
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_BROADCAST, 1),
			// A receiver that the machine keeps waiting must not be taken for loss: more than net.core.rmem_max.
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUFFORCE, 8<<20))
	})
	return errors.Join(err, cerr)
}
