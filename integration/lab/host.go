package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Host is one machine of the lab.
type Host struct {
	Name  string     // host name, "h1"
	Num   int        // from 1
	Addr  netip.Addr // on the underlay, IPv4
	Addr6 netip.Addr // on the underlay, IPv6

	lab    *Lab
	space  *space
	cgroup string

	mu         sync.Mutex // guards what follows
	procs      map[*Proc]struct{}
	containers []*Container
	dockerd    *Proc
}

func (l *Lab) newHost(ctx context.Context, num int) (*Host, error) {
	h := &Host{
		Name: "h" + strconv.Itoa(num), Num: num, lab: l,
		Addr:   netip.AddrFrom4([4]byte{198, 18, byte(num), 2}),
		Addr6:  netip.MustParseAddr(fmt.Sprintf("fd98:%x::2", num)),
		cgroup: fmt.Sprintf("%s-h%d", l.id, num),
		procs:  map[*Proc]struct{}{},
	}
	scratch := filepath.Join(l.scratch, h.Name)
	if err := os.Mkdir(scratch, 0o700); err != nil {
		return nil, err
	}
	var err error
	h.space, err = newSpace(ctx, l.id+"-"+h.Name, []string{"net", "mnt", "pid", "uts", "ipc"}, hostScript, scratch, h.Name)
	if err != nil {
		return nil, err // what there is of a lab is closed, and half a host is not to be among it
	}
	return h, nil
}

func (h *Host) close() {
	h.mu.Lock()
	for _, c := range h.containers {
		c.forget()
	}
	h.mu.Unlock()
	h.space.close()
}

// Do runs fn on a thread inside the host: files and sockets that it opens are the host's. fn must be
// brief, and note that its own process id is not of the host: read /proc/1/net, not /proc/net.
func (h *Host) Do(fn func() error) error { return h.space.do(fn) }

// ReadFile reads a file as the host sees it.
func (h *Host) ReadFile(path string) (data []byte, err error) {
	err = h.Do(func() (err error) {
		data, err = os.ReadFile(path)
		return err
	})
	return data, err
}

// WriteFile writes a file of the host's, making its directory.
func (h *Host) WriteFile(path string, data []byte, mode os.FileMode) error {
	return h.Do(func() error {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		return os.WriteFile(path, data, mode)
	})
}

// Glob lists the host's files that match.
func (h *Host) Glob(pattern string) (names []string) {
	_ = h.Do(func() (err error) {
		names, err = filepath.Glob(pattern)
		return err
	})
	return names
}

// Result is what a finished program left.
type Result struct {
	Args   []string
	Stdout string
	Stderr string
	Exit   int // exit status, -1 if a signal ended it
}

func (r Result) String() string {
	return fmt.Sprintf("%s: exit %d\nstdout: %s\nstderr: %s", strings.Join(r.Args, " "), r.Exit, r.Stdout, r.Stderr)
}

// Proc is a program running in a host.
type Proc struct {
	Cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// Wait gives the program's error once it has ended.
func (p *Proc) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Running reports whether the program has not ended yet.
func (p *Proc) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Signal sends a signal to the program.
func (p *Proc) Signal(sig os.Signal) error { return p.Cmd.Process.Signal(sig) }

// Stop sends SIGTERM and, when the program has not ended after the grace time, SIGKILL.
func (p *Proc) Stop(grace time.Duration) error {
	_ = p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(grace):
	}
	_ = p.Signal(syscall.SIGKILL)
	<-p.done
	return fmt.Errorf("%s did not end within %v of SIGTERM", p.Cmd.Path, grace)
}

// Start starts a program in the host, after prepare (unless nil) had its way with the command. It runs
// until it ends by itself, ctx ends or the host is closed. A file given as its output is closed then.
func (h *Host) Start(ctx context.Context, prepare func(*exec.Cmd), args ...string) (*Proc, error) {
	return h.start(ctx, h.space.do, prepare, args)
}

func (h *Host) start(ctx context.Context, on func(func() error) error, prepare func(*exec.Cmd), args []string) (*Proc, error) {
	path, err := h.lookPath(args[0])
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args[1:]...)
	cmd.Env = environment(nil)
	if h.lab.bin != "" {
		cmd.Env[0] = strings.Replace(cmd.Env[0], "PATH=", "PATH="+h.lab.bin+":", 1)
	}
	cmd.Dir = "/"
	cmd.WaitDelay = 20 * time.Second // a starved machine reads late what a program has printed
	if prepare != nil {
		prepare(cmd)
	}
	p := &Proc{Cmd: cmd, done: make(chan struct{})}
	if err := on(cmd.Start); err != nil {
		return nil, fmt.Errorf("%s: start %s: %w", h.Name, args[0], err)
	}
	h.mu.Lock()
	h.procs[p] = struct{}{}
	h.mu.Unlock()
	// Waiting at once matters: process 1 of the host cannot end before its zombies are collected.
	go func() {
		p.err = cmd.Wait()
		if f, ok := cmd.Stdout.(*os.File); ok {
			_ = f.Close()
		}
		h.mu.Lock()
		delete(h.procs, p)
		h.mu.Unlock()
		close(p.done)
	}()
	return p, nil
}

func (h *Host) lookPath(name string) (string, error) {
	if h.lab.bin != "" && !strings.Contains(name, "/") {
		path := filepath.Join(h.lab.bin, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return lookPath(name)
}

// Run runs a program in the host and waits for it. The error is for programs that could not be run or
// did not end in time; a non-zero exit status is in the result.
func (h *Host) Run(ctx context.Context, args ...string) (Result, error) {
	return h.run(ctx, h.space.do, nil, args)
}

// RunWith is Run with a change to the command first, such as its input or environment.
func (h *Host) RunWith(ctx context.Context, prepare func(*exec.Cmd), args ...string) (Result, error) {
	return h.run(ctx, h.space.do, prepare, args)
}

func (h *Host) run(ctx context.Context, on func(func() error) error, prepare func(*exec.Cmd), args []string) (Result, error) {
	var stdout, stderr bytes.Buffer
	p, err := h.start(ctx, on, func(cmd *exec.Cmd) {
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if prepare != nil {
			prepare(cmd)
		}
	}, args)
	if err != nil {
		return Result{Args: args}, err
	}
	<-p.done
	r := Result{Args: args, Stdout: stdout.String(), Stderr: stderr.String(), Exit: p.Cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return r, fmt.Errorf("%s: %s: %w\n%s%s", h.Name, strings.Join(args, " "), ctx.Err(), r.Stdout, r.Stderr)
	case p.err != nil && !errors.As(p.err, &exit):
		return r, fmt.Errorf("%s: %s: %w", h.Name, strings.Join(args, " "), p.err)
	}
	return r, nil
}

// Out runs a program that has to succeed and gives its output without the last line end.
func (h *Host) Out(ctx context.Context, args ...string) (string, error) {
	r, err := h.Run(ctx, args...)
	if err == nil && r.Exit != 0 {
		err = fmt.Errorf("%s: %s", h.Name, r)
	}
	return strings.TrimRight(r.Stdout, "\n"), err
}

// Process is one entry of the host's process table.
type Process struct {
	PID  int    // as seen in the host
	Comm string // name, at most 15 bytes
	Args []string
}

// Processes lists what runs in the host, containers included, in order of PID. A process that has ended
// is among them, without arguments, until it is collected: before that it may still hold files and locks.
func (h *Host) Processes() (list []Process) {
	_ = h.Do(func() error {
		dirs, err := filepath.Glob("/proc/[0-9]*")
		for _, dir := range dirs {
			pid, _ := strconv.Atoi(filepath.Base(dir))
			comm, err := os.ReadFile(dir + "/comm")
			args, err2 := os.ReadFile(dir + "/cmdline")
			if err != nil || err2 != nil {
				continue
			}
			list = append(list, Process{PID: pid, Comm: strings.TrimSpace(string(comm)),
				Args: strings.Split(strings.TrimRight(string(args), "\x00"), "\x00")})
		}
		return err
	})
	slices.SortFunc(list, func(a, b Process) int { return a.PID - b.PID })
	return list
}

// PIDs gives the ids, as seen in the host, of the processes with that name.
func (h *Host) PIDs(comm string) (pids []int) {
	for _, p := range h.Processes() {
		if p.Comm == comm {
			pids = append(pids, p.PID)
		}
	}
	return pids
}

// Kill sends a signal to a process by its id in the host.
func (h *Host) Kill(ctx context.Context, pid int, sig syscall.Signal) error {
	_, err := h.Out(ctx, "/bin/sh", "-c", fmt.Sprintf("kill -%d %d", int(sig), pid))
	return err
}
