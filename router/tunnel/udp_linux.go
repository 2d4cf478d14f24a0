package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// udpConn is a UDP socket with segmentation offload in both directions (UDP_SEGMENT, Linux 4.18; UDP_GRO,
// Linux 5.0), as far as the kernel has it, which is found out by trying.
//
// It stays away from the runtime's poller: there every datagram that leaves the machine would wake a thread,
// because the socket has room again. The reader waits in recvmmsg itself, so a datagram that comes
// costs one wake-up and one system call.
type udpConn struct {
	file   *os.File // blocking, and counts who uses the descriptor
	raw    syscall.RawConn
	closed atomic.Bool
	v6     bool // the socket is AF_INET6 and takes IPv4 as mapped addresses
	local  netip.AddrPort
	log    *slog.Logger
	gso    atomic.Bool // off for good once the kernel refused it
	gro    bool

	scoutMu        sync.Mutex // guards what the scouts are connected to
	scout4, scout6 *os.File   // for PathMTU
	// Owned by the reader.
	msgs  []mmsg
	iovs  []unix.Iovec
	names []unix.RawSockaddrInet6
	ctrl  [][groControl]byte
	got   int
	rerr  error
	flags uintptr // of recvmmsg
	read  func(fd uintptr)
}

// mmsg is struct mmsghdr of recvmmsg(2).
type mmsg struct {
	hdr unix.Msghdr
	n   uint32
}

const (
	groControl = 64      // bytes: room for the UDP_GRO message, which is 20
	socketBuf  = 8 << 20 // bytes each way; forced if we are root, else as much as the system allows
)

// ListenUDP opens the socket. A wildcard IPv6 address takes IPv4 as well; on a host without IPv6 it
// falls back to IPv4.
func ListenUDP(addr netip.AddrPort, log *slog.Logger) (Conn, error) {
	c, err := listenUDP(addr)
	if err != nil && addr.Addr() == netip.IPv6Unspecified() && errors.Is(err, unix.EAFNOSUPPORT) {
		c, err = listenUDP(netip.AddrPortFrom(netip.IPv4Unspecified(), addr.Port()))
	}
	if err != nil {
		return nil, err
	}
	c.log = log
	return c, nil
}

func listenUDP(addr netip.AddrPort) (*udpConn, error) {
	var lc net.ListenConfig
	pc, err := lc.ListenPacket(context.Background(), network("udp", addr), addr.String())
	if err != nil {
		return nil, err
	}
	conn := pc.(*net.UDPConn)
	local := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	c := &udpConn{local: netip.AddrPortFrom(local.Addr().Unmap(), local.Port())}
	c.file, err = withoutPoller(conn)
	if err = errors.Join(err, conn.Close()); err != nil {
		return nil, err
	}
	if c.raw, err = c.file.SyscallConn(); err != nil {
		return nil, err
	}
	var sockErr error
	if err := c.raw.Control(func(fd uintptr) { sockErr = c.setup(int(fd)) }); err != nil || sockErr != nil {
		return nil, errors.Join(err, sockErr, c.file.Close())
	}
	c.read = c.recvmmsg
	c.scout4, c.scout6 = openScout(unix.AF_INET), openScout(unix.AF_INET6)
	return c, nil
}

// withoutPoller gives another descriptor of conn's socket, which is made blocking.
func withoutPoller(conn *net.UDPConn) (file *os.File, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := raw.Control(func(fd uintptr) {
		var dup int
		if dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return
		}
		if err = unix.SetNonblock(dup, false); err != nil {
			unix.Close(dup)
			return
		}
		file = os.NewFile(uintptr(dup), "udp")
	})
	return file, errors.Join(cerr, err)
}

func (c *udpConn) setup(fd int) error {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return fmt.Errorf("socket domain: %w", err)
	}
	c.v6 = domain == unix.AF_INET6
	for _, o := range [][2]int{{unix.SO_RCVBUFFORCE, unix.SO_RCVBUF}, {unix.SO_SNDBUFFORCE, unix.SO_SNDBUF}} {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, o[0], socketBuf) != nil {
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, o[1], socketBuf) // as much as there is
		}
	}
	// Don't fragment, and do not believe ICMP: we probe. IP_PMTUDISC_PROBE still refuses what is larger
	// than the interface's MTU, with EMSGSIZE.
	err4 := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
	err6 := err4
	if c.v6 {
		err6 = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)
	}
	if err6 != nil {
		return fmt.Errorf("don't-fragment: %w", err6)
	}
	_, err = unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
	c.gso.Store(err == nil)
	c.gro = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
	return nil
}

func (c *udpConn) LocalAddr() netip.AddrPort { return c.local }

// Close may be called twice.
func (c *udpConn) Close() error {
	for _, s := range []*os.File{c.scout4, c.scout6} {
		if s != nil {
			s.Close()
		}
	}
	if c.closed.Swap(true) {
		return nil
	}
	// This wakes the reader, though on a socket without a peer it returns ENOTCONN. The descriptor goes when
	// nobody uses it any more.
	c.raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	return c.file.Close()
}

// ReadBatch implements Conn with recvmmsg(2).
func (c *udpConn) ReadBatch(batch []Datagrams, wait bool) (int, error) {
	if len(c.msgs) < len(batch) {
		c.msgs = make([]mmsg, len(batch))
		c.iovs = make([]unix.Iovec, len(batch))
		c.names = make([]unix.RawSockaddrInet6, len(batch))
		c.ctrl = make([][groControl]byte, len(batch))
	}
	for i := range batch {
		c.iovs[i].Base = &batch[i].Buf[0]
		c.iovs[i].SetLen(len(batch[i].Buf))
		h := &c.msgs[i].hdr
		h.Name = (*byte)(unsafe.Pointer(&c.names[i]))
		h.Namelen = unix.SizeofSockaddrInet6
		h.Iov = &c.iovs[i]
		h.SetIovlen(1)
		h.Control = &c.ctrl[i][0]
		h.SetControllen(groControl)
		h.Flags = 0
	}
	c.msgs = c.msgs[:len(batch)]
	c.flags = unix.MSG_DONTWAIT
	if wait {
		c.flags = unix.MSG_WAITFORONE
	}
	if err := c.raw.Control(c.read); err != nil || c.closed.Load() {
		return 0, net.ErrClosed
	}
	if c.rerr != nil {
		return 0, c.rerr
	}
	for i := range c.got {
		d, h := &batch[i], &c.msgs[i].hdr
		d.N = int(c.msgs[i].n)
		d.Addr = addrOf(&c.names[i])
		d.Size = groSize(c.ctrl[i][:min(int(h.Controllen), groControl)])
	}
	return c.got, nil
}

// recvmmsg takes what is there.
func (c *udpConn) recvmmsg(fd uintptr) {
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&c.msgs[0])), uintptr(len(c.msgs)), c.flags, 0, 0)
		if errno == unix.EINTR && !c.closed.Load() {
			continue
		}
		if errno == unix.EAGAIN {
			n, errno = 0, 0
		}
		c.got, c.rerr = int(n), nil
		if errno != 0 {
			c.got, c.rerr = 0, errno
		}
		return
	}
}

func addrOf(sa *unix.RawSockaddrInet6) netip.AddrPort {
	if sa.Family == unix.AF_INET {
		sa4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom4(sa4.Addr), port(sa4.Port))
	}
	addr := netip.AddrFrom16(sa.Addr).Unmap()
	if sa.Scope_id != 0 && addr.Is6() {
		addr = addr.WithZone(zoneOf(sa.Scope_id))
	}
	return netip.AddrPortFrom(addr, port(sa.Port))
}

// port converts from network byte order as it lies in a sockaddr.
func port(p uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], p)
	return binary.BigEndian.Uint16(b[:])
}

// groSize finds the size of the datagrams that UDP_GRO joined, 0 if it joined none.
func groSize(ctrl []byte) int {
	for len(ctrl) >= unix.CmsgLen(4) {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&ctrl[0]))
		if int(h.Len) < unix.CmsgLen(0) || int(h.Len) > len(ctrl) {
			return 0
		}
		if h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && int(h.Len) >= unix.CmsgLen(4) {
			return int(binary.NativeEndian.Uint32(ctrl[unix.CmsgLen(0):]))
		}
		next := unix.CmsgSpace(int(h.Len) - unix.CmsgLen(0))
		if next > len(ctrl) {
			return 0
		}
		ctrl = ctrl[next:]
	}
	return 0
}

// Write implements Conn with sendmsg(2) and UDP_SEGMENT, or one call per datagram without it.
func (c *udpConn) Write(b []byte, size int, to netip.AddrPort, wait bool) error {
	if size >= len(b) {
		return c.send(b, 0, to, wait)
	}
	if c.gso.Load() {
		err := c.send(b, size, to, wait)
		if !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) {
			return err
		}
		// EIO: the device cannot compute the checksum (Linux 5.x and some drivers). EINVAL is also what
		// kernels before 6.5 say instead of EMSGSIZE, so one datagram decides which it was.
		if one := c.send(b[:size], 0, to, wait); one != nil {
			return one
		}
		if c.gso.CompareAndSwap(true, false) {
			c.log.Warn("kernel refuses UDP segmentation; sending datagrams one by one", "err", err)
		}
		b = b[size:]
	}
	for len(b) > 0 {
		n := min(size, len(b))
		if err := c.send(b[:n], 0, to, wait); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// sendArgs is what one sendmsg needs; from a pool, for a pointer handed to the kernel must be on the heap.
type sendArgs struct {
	conn *udpConn
	hdr  unix.Msghdr
	iov  unix.Iovec
	name unix.RawSockaddrInet6
	ctrl [24]byte // CmsgSpace(2)
	wait [1]unix.PollFd
	poll bool // wait for room
	err  error
	f    func(fd uintptr)
}

func newSendArgs() *sendArgs {
	a := new(sendArgs)
	a.f = a.sendmsg
	return a
}

func (c *udpConn) send(b []byte, segment int, to netip.AddrPort, wait bool) error {
	a := sendPool.Get().(*sendArgs)
	defer sendPool.Put(a)
	a.conn, a.poll, a.err = c, wait, nil
	n, err := c.sockaddr(&a.name, to)
	if err != nil {
		return err
	}
	a.iov.Base = &b[0]
	a.iov.SetLen(len(b))
	a.hdr = unix.Msghdr{Name: (*byte)(unsafe.Pointer(&a.name)), Namelen: n, Iov: &a.iov}
	a.hdr.SetIovlen(1)
	if segment > 0 {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&a.ctrl[0]))
		h.Level, h.Type = unix.IPPROTO_UDP, unix.UDP_SEGMENT
		h.SetLen(unix.CmsgLen(2))
		binary.NativeEndian.PutUint16(a.ctrl[unix.CmsgLen(0):], uint16(segment))
		a.hdr.Control = &a.ctrl[0]
		a.hdr.SetControllen(unix.CmsgSpace(2))
	}
	err = c.raw.Control(a.f)
	a.conn, a.iov.Base = nil, nil
	if err != nil {
		return net.ErrClosed
	}
	return a.err
}

const sendWait = 100 // ms, after which a closed socket is noticed by who waits for room

func (a *sendArgs) sendmsg(fd uintptr) {
	for {
		_, _, errno := unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&a.hdr)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch {
		case errno == 0:
			a.err = nil
		case a.conn.closed.Load():
			a.err = net.ErrClosed
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN && a.poll:
			a.wait[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT}
			unix.Poll(a.wait[:], sendWait)
			continue
		case errno == unix.EAGAIN || errno == unix.ENOBUFS:
			a.err = errFull
		case errno == unix.EMSGSIZE:
			a.err = errTooLarge
		default:
			a.err = errno
		}
		return
	}
}

func (c *udpConn) sockaddr(sa *unix.RawSockaddrInet6, to netip.AddrPort) (uint32, error) {
	addr := to.Addr()
	var p [2]byte
	binary.BigEndian.PutUint16(p[:], to.Port())
	if !c.v6 {
		if addr = addr.Unmap(); !addr.Is4() {
			return 0, fmt.Errorf("send to %v: %w", to, unix.EAFNOSUPPORT)
		}
		sa4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		*sa4 = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: binary.NativeEndian.Uint16(p[:]), Addr: addr.As4()}
		return unix.SizeofSockaddrInet4, nil
	}
	*sa = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: binary.NativeEndian.Uint16(p[:]), Addr: addr.As16()}
	if z := addr.Zone(); z != "" {
		sa.Scope_id = scopeOf(z)
	}
	return unix.SizeofSockaddrInet6, nil
}

// PathMTU asks the kernel which interface leads to an address, by connecting a socket that sends nothing.
func (c *udpConn) PathMTU(to netip.Addr) int {
	to = to.Unmap()
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: DefaultPort, Addr: to.As16(), ZoneId: scopeOf(to.Zone())}
	s := c.scout6
	level, opt := unix.IPPROTO_IPV6, unix.IPV6_MTU
	if to.Is4() {
		s, level, opt = c.scout4, unix.IPPROTO_IP, unix.IP_MTU
		sa = &unix.SockaddrInet4{Port: DefaultPort, Addr: to.As4()}
	}
	if s == nil {
		return 0
	}
	c.scoutMu.Lock()
	defer c.scoutMu.Unlock()
	raw, err := s.SyscallConn()
	if err != nil {
		return 0
	}
	mtu := 0
	raw.Control(func(fd uintptr) {
		if unix.Connect(int(fd), sa) == nil {
			mtu, err = unix.GetsockoptInt(int(fd), level, opt)
		}
	})
	if err != nil {
		return 0
	}
	return mtu
}

// openScout makes a socket for PathMTU, nil if the system lacks the address family. It stays open so
// that it belongs to the network namespace in which the tunnel was started.
func openScout(domain int) *os.File {
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	if domain == unix.AF_INET {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
	} else {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)
	}
	if err != nil {
		unix.Close(fd)
		return nil
	}
	return os.NewFile(uintptr(fd), "scout")
}
