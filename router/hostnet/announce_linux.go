package hostnet

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// announce sends, on the device index of the calling thread's namespace, a gratuitous ARP or an
// unsolicited neighbour advertisement for each address.
func announce(index int, mac mesh.MAC, addrs []netip.Prefix) error {
	if len(addrs) == 0 {
		return nil
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0) // protocol 0: receives nothing
	if err != nil {
		return fmt.Errorf("announce addresses: %w", err)
	}
	defer unix.Close(fd)
	for _, a := range addrs {
		var frame []byte
		if a.Addr().Is4() {
			frame = appendGratuitousARP(nil, mac, a.Addr())
		} else {
			frame = appendNeighbourAdvertisement(nil, mac, a.Addr())
		}
		err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: index})
		// Without carrier (no port on the bridge yet) or in the midst of a burst, there is nobody to
		// tell or the neighbours find out by themselves.
		if err != nil && !errors.Is(err, unix.ENETDOWN) && !errors.Is(err, unix.ENOBUFS) {
			return fmt.Errorf("announce %v: %w", a.Addr(), err)
		}
	}
	return nil
}
