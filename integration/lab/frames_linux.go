package lab

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Frames is a raw socket on one interface of a container or host.
type Frames struct {
	MAC []byte // of the interface
	fd  int
}

// OpenFrames opens a raw socket on an interface inside the container.
func (c *Container) OpenFrames(ifname string) (f *Frames, err error) {
	err = c.Do(func() (err error) {
		f, err = openFrames(ifname)
		return err
	})
	return f, err
}

// OpenFrames opens a raw socket on an interface of the host.
func (h *Host) OpenFrames(ifname string) (f *Frames, err error) {
	err = h.Do(func() (err error) {
		f, err = openFrames(ifname)
		return err
	})
	return f, err
}

func openFrames(ifname string) (*Frames, error) {
	ifi, err := net.InterfaceByName(ifname)
	if err != nil {
		return nil, err
	}
	all := uint16(unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all))
	if err != nil {
		return nil, err
	}
	one := func(err error) error {
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
		}
		if err == nil {
			// The kernel takes the VLAN tag out of the frame; this tells where it went.
			err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1)
		}
		return err
	}(unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifi.Index}))
	if one != nil {
		unix.Close(fd)
		return nil, one
	}
	return &Frames{MAC: ifi.HardwareAddr, fd: fd}, nil
}

// Send sends a frame as it is.
func (f *Frames) Send(frame []byte) error {
	_, err := unix.Write(f.fd, frame)
	return err
}

// Collect reads frames that arrive at or leave the interface for a time and counts those that match.
// Frames that this socket sent are not among them.
func (f *Frames) Collect(limit time.Duration, match func(frame []byte) bool) (count int) {
	buf, oob := make([]byte, 65536), make([]byte, 256)
	for end := time.Now().Add(limit); ; {
		left := time.Until(end)
		if left <= 0 {
			return count
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(f.fd), Events: unix.POLLIN}}, int(left/time.Millisecond)+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return count
		}
		if n < 1 {
			continue
		}
		n, oobn, _, _, err := unix.Recvmsg(f.fd, buf, oob, 0)
		if err == nil && match(untagged(buf[:n], oob[:oobn])) {
			count++
		}
	}
}

// untagged puts the VLAN tag that the kernel took out back into the frame (packet(7), PACKET_AUXDATA).
func untagged(frame, oob []byte) []byte {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(frame) < 14 {
		return frame
	}
	for _, m := range messages {
		// struct tpacket_auxdata: status, len, snaplen (4 bytes each), mac, net, vlan_tci, vlan_tpid (2 each)
		if m.Header.Level != unix.SOL_PACKET || m.Header.Type != unix.PACKET_AUXDATA || len(m.Data) < 20 {
			continue
		}
		if m.Data[0]&unix.TP_STATUS_VLAN_VALID == 0 {
			continue
		}
		out := append([]byte(nil), frame[:12]...)
		out = append(out, m.Data[19], m.Data[18], m.Data[17], m.Data[16]) // the machine is little-endian
		return append(out, frame[12:]...)
	}
	return frame
}

// Close closes the socket.
func (f *Frames) Close() error { return unix.Close(f.fd) }

// ListenGroup opens a UDP socket for what is sent to the given group or broadcast address.
func (c *Container) ListenGroup(ctx context.Context, group netip.AddrPort, ifname string) (conn *net.UDPConn, err error) {
	if !group.Addr().IsMulticast() {
		return c.ListenUDP(ctx, netip.AddrPortFrom(netip.IPv4Unspecified(), group.Port()).String())
	}
	err = c.Do(func() error {
		ifi, err := net.InterfaceByName(ifname)
		if err == nil {
			conn, err = net.ListenMulticastUDP("udp4", ifi, net.UDPAddrFromAddrPort(group))
		}
		return err
	})
	return conn, err
}
