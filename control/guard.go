package control

import (
	"bytes"
	"container/list"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"
)

type syscallConn = syscall.RawConn

// guard stands before every handler: it refuses browsers, bounds the request and reads its body
// before the handler runs, so that a slow client holds nothing but its own connection.
func (s *Server) guard(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// No web page has business here. A browser sends Origin with every request that changes
		// something, and Sec-Fetch-Site with all.
		if site := r.Header.Get("Sec-Fetch-Site"); r.Header.Get("Origin") != "" || site != "" && site != "none" {
			http.Error(w, "requests from web pages are refused", http.StatusForbidden)
			return
		}
		rc := http.NewResponseController(w)
		_ = rc.SetReadDeadline(time.Now().Add(bodyTimeout))
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			code := http.StatusBadRequest
			if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
				code = http.StatusRequestEntityTooLarge
			}
			http.Error(w, "request body: "+err.Error(), code)
			return
		}
		// From here on the server watches for the client hanging up, without a time limit.
		_ = rc.SetReadDeadline(time.Time{})
		r.Body = io.NopCloser(bytes.NewReader(body))
		h.ServeHTTP(&deadlineWriter{w, rc}, r)
	})
}

// deadlineWriter gives the client a limited time to take each part of the answer.
type deadlineWriter struct {
	http.ResponseWriter
	rc *http.ResponseController
}

func (w *deadlineWriter) Write(p []byte) (int, error) {
	_ = w.rc.SetWriteDeadline(time.Now().Add(writeTimeout))
	return w.ResponseWriter.Write(p)
}

func (w *deadlineWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// localHost admits only requests that were meant for a loopback address by number or for localhost:
// a name that an attacker's DNS server points at 127.0.0.1 is neither.
func localHost(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if name, _, err := net.SplitHostPort(host); err == nil {
			host = name
		}
		addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
		if !strings.EqualFold(host, "localhost") && (err != nil || !addr.IsLoopback()) {
			http.Error(w, "the Host header names neither a loopback address nor localhost", http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// connBound keeps at most max connections: when one more comes, the one that has been waiting longest
// without being inside a handler is cut. So idle or slow clients in any number keep nobody out.
type connBound struct {
	max int

	mu      sync.Mutex
	waiting *list.List // of *boundConn, the longest waiting first
	busy    map[*boundConn]bool
}

type boundConn struct {
	conn net.Conn
	at   *list.Element // in waiting; nil while busy
}

type boundConnKey struct{}

func newConnBound(limit int) *connBound {
	return &connBound{max: limit, waiting: list.New(), busy: map[*boundConn]bool{}}
}

// connContext is called once for each accepted connection.
func (b *connBound) connContext(ctx context.Context, c net.Conn) context.Context {
	bc := &boundConn{conn: c}
	b.mu.Lock()
	bc.at = b.waiting.PushBack(bc)
	var cut *boundConn
	if b.waiting.Len()+len(b.busy) > b.max {
		cut = b.waiting.Front().Value.(*boundConn)
		b.waiting.Remove(cut.at)
		cut.at = nil
	}
	b.mu.Unlock()
	if cut != nil {
		cut.conn.Close()
	}
	return context.WithValue(ctx, boundConnKey{}, bc)
}

// connState forgets connections that have ended. They are found by a scan: there are at most max.
func (b *connBound) connState(c net.Conn, state http.ConnState) {
	if state != http.StateClosed && state != http.StateHijacked {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for e := b.waiting.Front(); e != nil; e = e.Next() {
		if e.Value.(*boundConn).conn == c {
			b.waiting.Remove(e)
			return
		}
	}
	for bc := range b.busy {
		if bc.conn == c {
			delete(b.busy, bc)
			return
		}
	}
}

// mark keeps a connection from being cut while its request is served.
func (b *connBound) mark(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		bc, ok := r.Context().Value(boundConnKey{}).(*boundConn)
		if !ok {
			h.ServeHTTP(w, r)
			return
		}
		b.mu.Lock()
		if bc.at != nil {
			b.waiting.Remove(bc.at)
			bc.at = nil
		}
		b.busy[bc] = true
		b.mu.Unlock()
		defer func() {
			b.mu.Lock()
			if b.busy[bc] { // not closed meanwhile
				delete(b.busy, bc)
				bc.at = b.waiting.PushBack(bc)
			}
			b.mu.Unlock()
		}()
		h.ServeHTTP(w, r)
	})
}
