package hostnet

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tryRead is a read that does not wait. It is made once, for a closure per frame would be an allocation.
type tryRead struct {
	file *os.File // that raw belongs to
	raw  syscall.RawConn
	buf  []byte
	n    int
	err  error
	f    func(fd uintptr) bool
}

// TryRead is Read without waiting: 0, nil when no frame is there, os.ErrClosed after Close. Only the goroutine that calls Read may
// call it.
func (q *Queue) TryRead(buf []byte) (int, error) {
	t := &q.try
	if file := q.file.Load(); t.file != file {
		raw, err := file.SyscallConn()
		if err != nil {
			return 0, err
		}
		t.file, t.raw, t.f = file, raw, t.read
	}
	at := 0
	if !q.header {
		at = VNetHdrLen
	}
	if len(buf) <= at {
		return 0, nil
	}
	t.buf, t.n, t.err = buf[at:], 0, nil
	err := t.raw.Read(t.f)
	t.buf = nil
	if err != nil && q.file.Load() != t.file {
		return 0, nil // the next Read sees the device that was made anew
	}
	if err != nil {
		return 0, os.ErrClosed // the only reason why a read that never waits is not tried
	}
	if t.err != nil || t.n == 0 {
		return 0, t.err
	}
	clear(buf[:at])
	return t.n + at, nil
}

func (t *tryRead) read(fd uintptr) bool {
	for {
		n, _, errno := unix.Syscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&t.buf[0])), uintptr(len(t.buf)))
		switch errno {
		case 0:
			t.n = int(n)
		case unix.EINTR:
			continue
		case unix.EAGAIN:
		default:
			t.err = errno
		}
		return true // never wait
	}
}
