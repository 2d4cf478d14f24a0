package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Bounds on TCP clients. One that drips bytes loses its place after tcpMessage, an idle one after tcpIdle.
const (
	tcpClients    = 512
	tcpPerSource  = 32
	tcpIdle       = 10 * time.Second
	tcpMessage    = 5 * time.Second // for the rest of a request, and for taking an answer
	tcpPerRequest = 1000            // requests by one connection
)

// acceptLoop ends when ln is closed, and then closes its clients' connections and waits for them.
func (s *Server) acceptLoop(ctx context.Context, ln net.Listener) {
	ctx, cancel := context.WithCancel(ctx)
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel()
	for {
		conn, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return
		}
		if err != nil {
			// Descriptors have run out, most likely. The queue waits in the kernel.
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		src := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		access := s.access(src, 0)
		if access == Refuse || !s.clients.enter(src) {
			s.count.refused.Add(1)
			conn.Close()
			continue
		}
		clients.Go(func() { // ends with its connection
			defer s.clients.leave(src)
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			defer stop()
			defer conn.Close()
			s.serveTCP(ctx, conn, src, access)
		})
	}
}

// serveTCP answers one request after another (RFC 7766) until the client leaves or is too slow.
func (s *Server) serveTCP(ctx context.Context, conn net.Conn, src netip.Addr, access Access) {
	w := newWorker(s, &s.count)
	in, out := make([]byte, maxRequest), make([]byte, 0, 2+maxRequest)
	for range tcpPerRequest {
		var size [2]byte
		if conn.SetReadDeadline(time.Now().Add(tcpIdle)) != nil {
			return
		}
		if _, err := io.ReadFull(conn, size[:]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint16(size[:]))
		if n < headerLen || n > maxRequest || conn.SetReadDeadline(time.Now().Add(tcpMessage)) != nil {
			return
		}
		if _, err := io.ReadFull(conn, in[:n]); err != nil {
			return
		}
		// The answer is built behind room for its length.
		answer, later := w.answerNow(out[2:2], in[:n], access, maxMessage, true)
		if later {
			if !s.forward.waiting.enter(src) {
				s.count.overload.Add(1)
				return
			}
			answer = s.forward.resolve(ctx, &w.q, maxMessage)
			s.forward.waiting.leave(src)
		}
		if answer == nil {
			return
		}
		out = append(out[:0], byte(len(answer)>>8), byte(len(answer)))
		out = append(out, answer...)
		if conn.SetWriteDeadline(time.Now().Add(tcpMessage)) != nil {
			return
		}
		if _, err := conn.Write(out); err != nil {
			return
		}
	}
}
