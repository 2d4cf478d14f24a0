package mesh

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// DeviceAddrs lists the addresses of a network device of this host.
func DeviceAddrs(name string) ([]netip.Addr, error) {
	dev, err := net.InterfaceByName(name)
	var addrs []net.Addr
	if err == nil {
		addrs, err = dev.Addrs()
	}
	if err != nil {
		if op := new(net.OpError); errors.As(err, &op) {
			err = op.Err // without "route ip+net", which tells nobody anything
		}
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	var out []netip.Addr
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p.Addr())
		}
	}
	return out, nil
}
