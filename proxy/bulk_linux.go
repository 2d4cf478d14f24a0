package proxy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// lingerTime is how long a client may take to close after the daemon has.
const lingerTime = time.Second

const (
	pipeSize = 256 << 10 // bytes; more than a unix socket holds (net.core.wmem_default)
	// yieldAfter is less than the time after which the runtime's watcher takes a goroutine for one that has to be
	// stopped (runtime.retake).
	yieldAfter = 8 * time.Millisecond
)

// bulkPath is where files and images go in and out.
var bulkPath = regexp.MustCompile(`^(/v[0-9.]+)?/(containers/.+/(archive|export)|images/(.+/)?get|images/load|images/create|build)$`)

// bulk passes a request on as the only one of its connection: behind the head nothing is decoded, neither
// there nor back, and the daemon closes when it has answered.
func (b *backend) bulk(w http.ResponseWriter, r *http.Request) {
	up, err := b.dial(b.run)
	if err != nil {
		b.unreachable(w, r, err)
		return
	}
	defer up.Close()
	down, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		b.unreachable(w, r, err)
		return
	}
	defer b.conns.hijacked()
	defer down.Close()
	if err := writeRequestHead(up, r); err != nil {
		return
	}
	daemon, client := ownThread(up), ownThread(down)
	defer daemon.Close()
	defer client.Close()
	defer context.AfterFunc(b.run, func() { cut(daemon); cut(client) })()
	sent, received := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(sent)
		workInBatches()
		copyHalf(daemon, client, rw.Reader)
		io.Copy(io.Discard, struct{ io.Reader }{client}) // what comes after a refusal
	}()
	go func() {
		defer close(received)
		workInBatches()
		copyHalf(client, daemon, bufio.NewReader(daemon))
	}()
	<-received
	defer time.AfterFunc(lingerTime, func() { cut(client) }).Stop()
	<-sent
}

// blocking is a stream socket of which reads and writes block their thread.
type blocking struct{ *os.File }

func (b blocking) CloseWrite() error { return b.shutdown(unix.SHUT_WR) }

func (b blocking) shutdown(how int) (err error) {
	raw, err := b.SyscallConn()
	if err != nil {
		return err
	}
	if gone := raw.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), how) }); gone != nil {
		return gone
	}
	return err
}

// ownThread takes a connection away from the runtime's poller; one that is no plain socket stays as it is. Three
// programs on two processors are in each other's way: by the poller each piece woke several threads here, and
// docker cp had 0.7 of the throughput that it has without a proxy.
func ownThread(c net.Conn) io.ReadWriteCloser {
	s, ok := c.(syscall.Conn)
	if !ok {
		return c
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return c
	}
	dup := -1
	raw.Control(func(fd uintptr) { dup, _ = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if dup < 0 {
		return c
	}
	if err := unix.SetNonblock(dup, false); err != nil {
		unix.Close(dup)
		return c
	}
	c.Close() // and with it the poller's interest
	return blocking{os.NewFile(uintptr(dup), "bulk")}
}

// passOn has what src brings go to dst within the kernel, as the pages that it came in, until src ends or one of them
// fails. It reports false, and has moved nothing, where that cannot be.
//
// A goroutine that is always in some system call never passes the scheduler. After 10 ms the runtime's watcher takes its
// processor away, in each call again, and for that wakes thousands of times a second, in the way of those who copy.
func passOn(dst io.Writer, src io.Reader) bool {
	to, ok := dst.(blocking)
	from, also := src.(blocking)
	var pipe [2]int
	if !ok || !also || unix.Pipe2(pipe[:], unix.O_CLOEXEC) != nil {
		return false
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	unix.FcntlInt(uintptr(pipe[1]), unix.F_SETPIPE_SZ, pipeSize) // else it holds less
	yielded := time.Now()
	for {
		if now := time.Now(); now.Sub(yielded) > yieldAfter {
			runtime.Gosched()
			yielded = now
		}
		n, err := splice(int(from.Fd()), pipe[1], pipeSize)
		if n <= 0 || err != nil {
			return true
		}
		for n > 0 {
			sent, err := splice(pipe[0], int(to.Fd()), n)
			if sent <= 0 || err != nil {
				return true
			}
			n -= sent
		}
	}
}

// splice is splice(2). It blocks until something has come, and gives what is there.
func splice(from, to, most int) (int, error) {
	for {
		if n, err := unix.Splice(from, nil, to, nil, most, 0); err != unix.EINTR {
			return int(n), err
		}
	}
}

// cut ends both directions of a connection and every call that waits for one.
func cut(c io.Closer) {
	if b, ok := c.(blocking); ok {
		b.shutdown(unix.SHUT_RDWR)
		return
	}
	c.Close()
}

// workInBatches gives the goroutine a thread of its own, which ends with it and which does not push others aside
// whenever there is something to copy: frames are in a hurry, files are not.
func workInBatches() {
	runtime.LockOSThread()
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_BATCH}, 0) // else it is only slower
}

// writeRequestHead writes request line and headers, with those that net/http keeps apart, for a connection
// that ends with the answer. The body follows as the client frames it.
func writeRequestHead(w io.Writer, r *http.Request) error {
	h := r.Header.Clone()
	h.Set("Connection", "close")
	if len(r.TransferEncoding) > 0 {
		h.Set("Transfer-Encoding", strings.Join(r.TransferEncoding, ", "))
	} else if r.ContentLength > 0 {
		h.Set("Content-Length", strconv.FormatInt(r.ContentLength, 10))
	} else if h.Del("Content-Length"); r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.Set("Content-Length", "0")
	}
	buf := bufio.NewWriter(w)
	fmt.Fprintf(buf, "%s %s %s\r\nHost: %s\r\n", r.Method, r.RequestURI, r.Proto, r.Host)
	h.Write(buf)
	buf.WriteString("\r\n")
	return buf.Flush()
}
