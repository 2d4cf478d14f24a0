package proxy

import (
	"cmp"
	"net"
	"net/http"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// bound keeps clients from taking all the descriptors of the process: each connection has another one behind it and
// at most two pipes between them (bulk), and what attaches containers needs some. Beyond max a request is refused, and
// beyond max and a quarter a connection.
type bound struct {
	max  int64
	open atomic.Int64
}

// mostConns is how many connections the proxy has where descriptors are no matter.
const mostConns = 10000

func newBound(limit int64) *bound {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		files.Cur = 8 * mostConns
	}
	return &bound{max: cmp.Or(limit, int64(min(files.Cur/8, mostConns)))}
}

func (b *bound) full() bool { return b.open.Load() > b.max }

// connState is for http.Server. Of a connection that is hijacked it hears no more: see hijacked.
func (b *bound) connState(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		if b.open.Add(1) > b.max+b.max/4 {
			c.Close()
		}
	case http.StateClosed:
		b.open.Add(-1)
	}
}

// hijacked says that a connection which was hijacked is closed.
func (b *bound) hijacked() { b.open.Add(-1) }
