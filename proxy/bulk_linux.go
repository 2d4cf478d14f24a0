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
// docker cp had 0.7 of the throughput that it has without a proxy. Now it has what a loop of read and
// write in C has in our place, 0.9 and more.
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
