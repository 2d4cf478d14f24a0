package control

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// PIDFile is the name of the pid file in the run directory.
const PIDFile = "meshd.pid"

// ErrRunning is wrapped by the error of LockPID when another process holds the file.
var ErrRunning = errors.New("already running")

// LockPID writes our pid to path and keeps a lock on it that ends with the process, however it ends:
// so nobody takes a file that was left behind for a running daemon. Closing the file gives it up.
func LockPID(path string) (io.Closer, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	// An open file description lock (fcntl(2)): unlike those of flock it can be asked about without
	// taking it, and unlike POSIX ones it is not lost when the process closes another handle of the file.
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		defer f.Close()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return nil, fmt.Errorf("%w (pid %d holds %s)", ErrRunning, readPID(f), path)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// RunningPID returns the pid of the process that holds the lock on path, or 0 when none does.
func RunningPID(path string) (int, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock); err != nil {
		return 0, fmt.Errorf("lock of %s: %w", path, err)
	}
	if lock.Type == unix.F_UNLCK {
		return 0, nil
	}
	pid := readPID(f)
	if pid == 0 {
		return 0, fmt.Errorf("%s is locked and holds no pid", path)
	}
	return pid, nil
}

func readPID(f *os.File) int {
	b := make([]byte, 32)
	n, _ := f.ReadAt(b, 0)
	pid, err := strconv.Atoi(string(bytes.TrimSpace(b[:n])))
	if err != nil || pid < 1 {
		return 0
	}
	return pid
}
