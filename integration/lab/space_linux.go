package lab

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed host.sh
var hostScript string

// space is a set of namespaces, kept by one sleeping process (the keeper) and entered by one thread.
type space struct {
	name   string
	keeper *exec.Cmd
	inodes map[string]uint64 // namespace kind → inode of those that are this space's own
	calls  chan func()
	stop   func()
	gone   chan struct{} // closed when the thread has ended
}

var namespaceFlags = map[string]int{
	"net": unix.CLONE_NEWNET, "mnt": unix.CLONE_NEWNS, "pid": unix.CLONE_NEWPID,
	"uts": unix.CLONE_NEWUTS, "ipc": unix.CLONE_NEWIPC,
}

// newSpace starts a keeper in new namespaces of the given kinds and waits until its script is ready.
// The keeper gets SIGKILL when this process or the space's thread ends, whichever way.
func newSpace(ctx context.Context, name string, kinds []string, script string, args ...string) (*space, error) {
	s := &space{name: name, calls: make(chan func()), gone: make(chan struct{}), inodes: map[string]uint64{}}
	quit := make(chan struct{})
	s.stop = sync.OnceFunc(func() { close(quit) })
	ready := make(chan error, 1)
	onThread(func() {
		defer close(s.gone)
		err := s.startKeeper(kinds, script, args)
		if err == nil {
			err = s.enter(kinds)
		}
		ready <- err
		if err == nil {
			s.serve(quit)
		}
		if s.keeper != nil {
			// A waited-for process 1 means that the kernel has ended all processes of the namespace.
			_ = s.keeper.Process.Kill()
			_ = s.keeper.Wait()
		}
	})
	select {
	case err := <-ready:
		if err != nil {
			<-s.gone
			return nil, fmt.Errorf("make namespaces of %s: %w", name, err)
		}
		return s, nil
	case <-ctx.Done():
		s.stop()
		return nil, fmt.Errorf("make namespaces of %s: %w", name, ctx.Err())
	}
}

func (s *space) startKeeper(kinds []string, script string, args []string) error {
	var flags uintptr
	for _, k := range kinds {
		flags |= uintptr(namespaceFlags[k])
	}
	cmd := exec.Command("/bin/sh", append([]string{"-c", script, "meshlab-" + s.name}, args...)...)
	cmd.Env = environment(nil)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL, Setpgid: true}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	s.keeper = cmd
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != "ready" {
		_ = cmd.Process.Kill()
		werr := cmd.Wait()
		s.keeper = nil
		return fmt.Errorf("set up (%v, %v): %s", err, werr, strings.TrimSpace(stderr.String()))
	}
	return nil
}

// enter moves the calling thread into the keeper's namespaces. Its children are then born in the
// process namespace too, while the thread itself stays where it was.
func (s *space) enter(kinds []string) error {
	var order []string // the mount namespace last: the paths of the others are the machine's
	for _, k := range kinds {
		if k != "mnt" {
			order = append(order, k)
		}
	}
	if len(order) < len(kinds) {
		order = append(order, "mnt")
	}
	for _, k := range order {
		path := fmt.Sprintf("/proc/%d/ns/%s", s.keeper.Process.Pid, k)
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return &os.PathError{Op: "stat", Path: path, Err: err}
		}
		s.inodes[k] = st.Ino
		if err := join(path, k); err != nil {
			return err
		}
	}
	return nil
}

// join moves the calling thread, which must be locked to its goroutine, into the namespace at path.
func join(path, kind string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	return joinFD(fd, kind)
}

func joinFD(fd int, kind string) error {
	if kind == "mnt" {
		if err := unix.Unshare(unix.CLONE_FS); err != nil { // root and working directory are the process's else
			return fmt.Errorf("unshare root directory: %w", err)
		}
	}
	if err := unix.Setns(fd, namespaceFlags[kind]); err != nil {
		return fmt.Errorf("enter %s namespace: %w", kind, err)
	}
	return nil
}

func (s *space) serve(quit <-chan struct{}) {
	for {
		select {
		case fn := <-s.calls:
			fn()
		case <-quit:
			return
		}
	}
}

var errClosed = errors.New("the host is closed")

// do runs fn on the space's thread and waits for it. fn must be brief: processes are started there, but
// waited for elsewhere.
func (s *space) do(fn func() error) error {
	done := make(chan error, 1)
	select {
	case s.calls <- func() { done <- fn() }:
		return <-done
	case <-s.gone:
		return fmt.Errorf("%s: %w", s.name, errClosed)
	}
}

// inNetns runs fn on a thread of its own inside the network namespace that fd stands for. The thread
// ends with fn, so fn must start no process that is to outlive it.
func inNetns(fd int, fn func() error) error {
	done := make(chan error, 1)
	onThread(func() {
		if err := joinFD(fd, "net"); err != nil {
			done <- err
			return
		}
		done <- fn()
	})
	return <-done
}

// onThread starts fn on a thread that nobody else uses and that ends with fn.
func onThread(fn func()) {
	go func() {
		runtime.LockOSThread() // never unlocked, so the thread ends with the goroutine
		if unix.Gettid() != unix.Getpid() {
			fn()
			return
		}
		// The main thread never ends and would keep the namespaces. It stays locked here until another
		// thread has taken the work.
		taken := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(taken)
			fn()
		}()
		<-taken
		runtime.UnlockOSThread()
	}()
}

// close ends every process in the space and waits until they are gone.
func (s *space) close() {
	s.stop()
	<-s.gone
}

// environment is what programs in the lab get: nothing of the caller's but what finds programs.
func environment(extra []string) []string {
	path := os.Getenv("PATH")
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if !strings.Contains(":"+path+":", ":"+dir+":") {
			path += ":" + dir
		}
	}
	return append([]string{"PATH=" + path, "HOME=/root", "LC_ALL=C"}, extra...)
}
