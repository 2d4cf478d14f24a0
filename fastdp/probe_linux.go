package fastdp

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// prober sends probes by the bridge device, where bridge_out gives them their tunnel key, and receives
// the answers that vx_in passed up the vxlan device.
type prober struct {
	out *os.File // packet socket that receives nothing
	in  *os.File // packet socket on the vxlan device

	bridge, vxlan int // interface indexes
}

func bigEndian16(v uint16) uint16 { return v<<8 | v>>8 }

func openProber(bridge, vxlan int) (*prober, error) {
	out, err := packetSocket(0, bridge)
	if err != nil {
		return nil, fmt.Errorf("probe socket: %w", err)
	}
	in, err := packetSocket(typeProbed, vxlan)
	if err != nil {
		out.Close()
		return nil, fmt.Errorf("probe socket: %w", err)
	}
	return &prober{out: out, in: in, bridge: bridge, vxlan: vxlan}, nil
}

func packetSocket(etherType uint16, index int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	addr := &unix.SockaddrLinklayer{Protocol: bigEndian16(etherType), Ifindex: index}
	if err := unix.Bind(fd, addr); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "probe"), nil
}

func (p *prober) send(frame []byte) error {
	_, err := p.out.Write(frame)
	return err
}

// receive blocks; after close it returns an error.
func (p *prober) receive(buf []byte) (int, error) { return p.in.Read(buf) }

func (p *prober) close() {
	p.out.Close()
	p.in.Close()
}
