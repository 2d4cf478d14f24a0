package hostnet

import (
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// reading is what a Queue's reader needs. Its closures are made once, for one per frame would be an allocation.
type reading struct {
	q      *Queue
	dev    *descriptor
	buf    []byte
	n      int
	err    error
	wake   uintptr
	fds    [2]unix.PollFd
	read   func(fd uintptr)
	onWake func(fd uintptr)
	onDev  func(fd uintptr)
}

func (r *reading) init(q *Queue) {
	r.q, r.read, r.onWake, r.onDev = q, r.readDev, r.waitWake, r.waitDev
}

// Read waits for one frame. It returns os.ErrClosed after Close.
func (q *Queue) Read(buf []byte) (int, error) {
	for {
		n, err := q.TryRead(buf)
		if n > 0 || err != nil {
			return n, err
		}
		if q.wake.raw.Control(q.in.onWake) != nil {
			return 0, os.ErrClosed
		}
	}
}

// TryRead is Read without waiting: 0, nil when no frame is there, os.ErrClosed after Close. Only the goroutine
// that calls Read may call it.
func (q *Queue) TryRead(buf []byte) (int, error) {
	at := 0
	if !q.header {
		at = VNetHdrLen
	}
	if len(buf) <= at {
		return 0, io.ErrShortBuffer
	}
	r := &q.in
	r.dev, r.buf, r.n, r.err = q.dev.Load(), buf[at:], 0, nil
	err := r.dev.raw.Control(r.read)
	r.buf = nil
	switch {
	case q.closed.Load():
		return 0, os.ErrClosed
	case q.dev.Load() != r.dev:
		return 0, nil // the device was made anew
	case err != nil:
		return 0, err
	case r.err != nil || r.n == 0:
		return 0, r.err
	}
	clear(buf[:at])
	return r.n + at, nil
}

func (r *reading) readDev(fd uintptr) {
	for {
		n, _, errno := unix.Syscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&r.buf[0])), uintptr(len(r.buf)))
		switch errno {
		case 0:
			r.n = int(n)
		case unix.EINTR:
			continue
		case unix.EAGAIN:
		default:
			r.err = errno
		}
		return
	}
}

// waitWake, with the eventfd in hand, waits for the device or the event.
func (r *reading) waitWake(fd uintptr) {
	r.wake = fd
	_ = r.q.dev.Load().raw.Control(r.onDev) // fails if it has just been replaced: then it is tried again
}

func (r *reading) waitDev(fd uintptr) {
	r.fds = [2]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(r.wake), Events: unix.POLLIN}}
	_, _ = unix.Poll(r.fds[:], -1)
	if r.fds[1].Revents != 0 && !r.q.closed.Load() {
		var event [8]byte
		_, _ = unix.Read(int(r.wake), event[:]) // only the reader takes it, so it does not wait
	}
}
