package dns

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// Datagrams read and written by one system call. Under load they come in bunches, and then this saves
	// most of the calls.
	batchSize = 32

	// Bytes of a request. A longer one has more in it than a question and gets no answer.
	maxRequest = 2048

	controlSpace = 64 // for one IP_PKTINFO or IPV6_PKTINFO
)

// mmsghdr is struct mmsghdr of recvmmsg(2), 64 bytes where pointers have eight.
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

// udpLoop reads one socket and answers what it can at once.
type udpLoop struct {
	worker
	conn *net.UDPConn
	raw  syscall.RawConn
	any  bool // bound to an unspecified address: answers must name the one that was asked

	in, out       [batchSize]mmsghdr
	inVec, outVec [batchSize]unix.Iovec
	names         [batchSize]unix.RawSockaddrInet6 // large enough for IPv4 too
	control       [batchSize][controlSpace]byte
	inBuf         [batchSize][maxRequest]byte
	outBuf        [batchSize][]byte

	n         int // read or written by the last call
	errno     syscall.Errno
	todo, end int // answers that send is to write
}

func newUDPLoop(s *Server, conn *net.UDPConn, any bool) (*udpLoop, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	l := &udpLoop{worker: newWorker(s, s.newCounters()), conn: conn, raw: raw, any: any}
	for i := range batchSize {
		l.outBuf[i] = make([]byte, 0, s.cfg.UDPSize)
		l.inVec[i].Base = &l.inBuf[i][0]
		l.inVec[i].SetLen(maxRequest)
		h := &l.in[i].hdr
		h.Iov, h.Name, h.Control = &l.inVec[i], (*byte)(unsafe.Pointer(&l.names[i])), &l.control[i][0]
		h.SetIovlen(1)
		l.out[i].hdr.Iov = &l.outVec[i]
		l.out[i].hdr.SetIovlen(1)
	}
	return l, nil
}

// run ends when the socket is closed.
func (l *udpLoop) run(ctx context.Context) {
	receive, send := l.receive, l.send // one closure each, not one per call
	for {
		for i := range batchSize {
			l.in[i].hdr.Namelen = unix.SizeofSockaddrInet6
			l.in[i].hdr.SetControllen(controlSpace)
		}
		if err := l.raw.Read(receive); err != nil {
			return
		}
		if l.errno != 0 {
			// Errors of single answers (ECONNREFUSED by ICMP) and lack of memory end no server.
			if l.errno == unix.EBADF {
				return
			}
			continue
		}
		got := l.n
		k := 0
		for i := range got {
			if l.handle(ctx, i, k) {
				k++
			}
		}
		for l.todo, l.end = 0, k; l.todo < l.end; {
			if err := l.raw.Write(send); err != nil {
				return
			}
			if l.errno != 0 {
				l.todo++ // the first of them cannot be sent; the others may
				l.count.unsent.Add(1)
			}
			l.todo += l.n
		}
	}
}

// receive and send never block (MSG_DONTWAIT), so they bypass the Go scheduler's bookkeeping of system
// calls. With it the scheduler's monitor took the processor away from every batch, which cost a tenth of
// all time. A batch is short enough not to delay the garbage collector's pauses by more than 100 µs.
func (l *udpLoop) receive(fd uintptr) bool {
	n, _, errno := syscall.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&l.in[0])), batchSize, unix.MSG_DONTWAIT, 0, 0)
	l.n, l.errno = int(n), errno
	return errno != unix.EAGAIN && errno != unix.EINTR
}

func (l *udpLoop) send(fd uintptr) bool {
	n, _, errno := syscall.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&l.out[l.todo])), uintptr(l.end-l.todo), unix.MSG_DONTWAIT, 0, 0)
	l.n, l.errno = int(n), errno
	if errno != 0 {
		l.n = 0
	}
	return errno != unix.EAGAIN && errno != unix.EINTR
}

// handle answers request i with answer k, and reports whether there is one now.
func (l *udpLoop) handle(ctx context.Context, i, k int) bool {
	in := &l.in[i]
	src := sourceOf(&l.names[i])
	if in.hdr.Flags&unix.MSG_TRUNC != 0 || !src.IsValid() {
		l.count.dropped.Add(1)
		return false
	}
	msg := l.inBuf[i][:in.len]
	oob := l.control[i][:in.hdr.Controllen]
	access := l.srv.access(src.Addr(), interfaceOf(oob))
	answer, later := l.answerNow(l.outBuf[k], msg, access, l.srv.cfg.UDPSize, false)
	if later {
		if l.any {
			oob = replyControl(slices.Clone(oob))
		} else {
			oob = nil
		}
		l.later(ctx, slices.Clone(msg), src, oob)
		return false
	}
	if answer == nil {
		return false
	}
	l.outBuf[k] = answer
	out := &l.out[k].hdr
	l.outVec[k].Base = &answer[0]
	l.outVec[k].SetLen(len(answer))
	out.Name, out.Namelen = (*byte)(unsafe.Pointer(&l.names[i])), in.hdr.Namelen
	out.Control = nil
	out.SetControllen(0)
	if l.any && len(oob) > 0 {
		replyControl(oob)
		out.Control = &oob[0]
		out.SetControllen(len(oob))
	}
	return true
}

// later forwards a question on a goroutine of its own, of which there are only so many.
func (l *udpLoop) later(ctx context.Context, msg []byte, src netip.AddrPort, oob []byte) {
	s, conn, who := l.srv, l.conn, src.Addr().Unmap()
	if !s.forward.waiting.enter(who) {
		l.count.overload.Add(1)
		return
	}
	s.forwarding.Add(1)
	go func() { // ends with the question or ctx; Server.Run waits for it
		defer s.forwarding.Done()
		defer s.forward.waiting.leave(who)
		var q query
		if q.parse(msg) != ok {
			return
		}
		answer := s.forward.resolve(ctx, &q, min(q.size, s.cfg.UDPSize))
		if _, _, err := conn.WriteMsgUDPAddrPort(answer, oob, src); err != nil {
			s.count.unsent.Add(1)
		}
	}()
}

func sourceOf(name *unix.RawSockaddrInet6) netip.AddrPort {
	switch name.Family {
	case unix.AF_INET:
		four := (*unix.RawSockaddrInet4)(unsafe.Pointer(name))
		return netip.AddrPortFrom(netip.AddrFrom4(four.Addr), swapped(four.Port))
	case unix.AF_INET6:
		a := netip.AddrFrom16(name.Addr)
		if name.Scope_id != 0 && a.IsLinkLocalUnicast() {
			a = a.WithZone(strconv.Itoa(int(name.Scope_id)))
		}
		return netip.AddrPortFrom(a, swapped(name.Port))
	}
	return netip.AddrPort{}
}

// swapped reads a port that is in network byte order in memory.
func swapped(p uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], p)
	return binary.BigEndian.Uint16(b[:])
}

// packetInfo finds the data of IP_PKTINFO or IPV6_PKTINFO among control messages.
func packetInfo(oob []byte) (data []byte, six bool) {
	const header = unix.SizeofCmsghdr
	for len(oob) >= header {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
		if h.Len < header || h.Len > uint64(len(oob)) {
			break
		}
		data := oob[header:h.Len]
		switch {
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			return data, false
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			return data, true
		}
		oob = oob[min(uint64(len(oob)), (h.Len+7)&^7):]
	}
	return nil, false
}

func interfaceOf(oob []byte) int {
	data, six := packetInfo(oob)
	switch {
	case data == nil:
		return -1
	case six:
		return int((*unix.Inet6Pktinfo)(unsafe.Pointer(&data[0])).Ifindex)
	}
	return int((*unix.Inet4Pktinfo)(unsafe.Pointer(&data[0])).Ifindex)
}

// replyControl turns what came with a request into what its answer needs: the same local address, but
// the way back is the routing table's choice, except to neighbours by link-local address.
func replyControl(oob []byte) []byte {
	data, six := packetInfo(oob)
	switch {
	case data == nil:
	case !six:
		(*unix.Inet4Pktinfo)(unsafe.Pointer(&data[0])).Ifindex = 0
	default:
		if info := (*unix.Inet6Pktinfo)(unsafe.Pointer(&data[0])); !netip.AddrFrom16(info.Addr).IsLinkLocalUnicast() {
			info.Ifindex = 0
		}
	}
	return oob
}
