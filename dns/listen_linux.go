package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// PortTakenError says who holds the address that the name server is to listen on.
type PortTakenError struct {
	Addr   netip.AddrPort
	Holder string
}

func (e *PortTakenError) Error() string {
	return fmt.Sprintf("name server: %s is held by %s; choose another address with --dns-listen-address, or do without names with --no-dns",
		e.Addr, e.Holder)
}

func (e *PortTakenError) Unwrap() error { return syscall.EADDRINUSE }

// listener is the set of sockets on one address.
type listener struct {
	addr netip.AddrPort
	udp  []*net.UDPConn
	tcp  net.Listener
	done sync.WaitGroup
}

// bind opens one TCP and several UDP sockets. IP_FREEBIND lets it succeed before the address exists, so
// that nobody has to wait for Docker to make its bridge.
func bind(addr netip.AddrPort, sockets int) (*listener, error) {
	l := &listener{}
	family := "" // both, for [::]
	if addr.Addr().Is4() {
		family = "4"
	}
	// TCP goes without SO_REUSEPORT: it tells us of another meshd, which would share our UDP port silently.
	tcp, err := (&net.ListenConfig{Control: control(freebind), KeepAlive: -1}).Listen(context.Background(), "tcp"+family, addr.String())
	if err != nil {
		return nil, bindError(addr, err)
	}
	l.tcp = tcp
	l.addr = netip.AddrPortFrom(addr.Addr(), tcp.Addr().(*net.TCPAddr).AddrPort().Port())
	// And so does a first UDP socket, of a resolver that does not listen by TCP.
	probe, err := (&net.ListenConfig{Control: control(freebind)}).ListenPacket(context.Background(), "udp"+family, l.addr.String())
	if err != nil {
		return nil, errors.Join(bindError(addr, err), l.close())
	}
	if err := probe.Close(); err != nil {
		return nil, errors.Join(err, l.close())
	}
	for range sockets {
		c, err := (&net.ListenConfig{Control: control(freebind, shared)}).ListenPacket(context.Background(), "udp"+family, l.addr.String())
		if err != nil {
			return nil, errors.Join(bindError(addr, err), l.close())
		}
		l.udp = append(l.udp, c.(*net.UDPConn))
	}
	return l, nil
}

func (l *listener) close() error {
	var errs []error
	if l.tcp != nil {
		errs = append(errs, l.tcp.Close())
	}
	for _, c := range l.udp {
		errs = append(errs, c.Close())
	}
	l.done.Wait()
	return errors.Join(errs...)
}

func bindError(addr netip.AddrPort, err error) error {
	if !errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("name server: %w", err)
	}
	who := "another process"
	if h, found := findHolder("/proc", "", addr); found {
		who = h.String()
	}
	return &PortTakenError{Addr: addr, Holder: who}
}

func control(options ...func(network string, fd int) error) func(network, _ string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		var err error
		errc := c.Control(func(fd uintptr) {
			for _, set := range options {
				err = errors.Join(err, set(network, int(fd)))
			}
		})
		return errors.Join(err, errc)
	}
}

// IP_FREEBIND serves IPv6 sockets too (net/ipv6/af_inet6.c asks inet_can_nonlocal_bind).
func freebind(_ string, fd int) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_FREEBIND, 1)
}

// receiveBuffer holds some 10,000 small queries, a tenth of a second of a flood; the kernel's default holds
// 200 of them.
const receiveBuffer = 8 << 20

// shared sets up one of several UDP sockets: the kernel spreads clients over them, and tells us the
// interface that a datagram came in on.
func shared(network string, fd int) error {
	// Root may exceed net.core.rmem_max; what cannot be had is not worth failing for.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	if network == "udp6" { // it tells of IPv4 datagrams too, in mapped form
		return errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1))
	}
	return errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1))
}

// socketCount leaves half of the processors to the tunnel, whatever a container sends us: one reading
// goroutine answers some 200,000 queries a second.
func socketCount() int { return max(1, min(runtime.GOMAXPROCS(0)/2, 8)) }

// bridgeAddress returns the IPv4 address of a bridge, or else its IPv6 address.
func bridgeAddress(name string) (netip.Addr, error) {
	addrs, err := mesh.DeviceAddrs(name)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("bridge %w", err)
	}
	if i := slices.IndexFunc(addrs, netip.Addr.Is4); i >= 0 {
		return addrs[i], nil
	}
	if i := slices.IndexFunc(addrs, func(a netip.Addr) bool { return !a.IsLinkLocalUnicast() }); i >= 0 {
		return addrs[i], nil
	}
	return netip.Addr{}, fmt.Errorf("bridge %s has no address", name)
}
