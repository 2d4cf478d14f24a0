package hostnet

import (
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Underlay is what this host's way to other hosts can carry.
type Underlay struct {
	Device string
	MTU    int  // bytes of an IP packet
	IPv6   bool // its packets are IPv6: there is no IPv4
}

// Underlay looks for the device of the default route, IPv4 before IPv6. Without one it takes the device
// with the smallest MTU among those that are up and have an address of more than link scope.
func (h *Host) Underlay() (Underlay, error) {
	all, err := h.links()
	if err != nil {
		return Underlay{}, err
	}
	byIndex := map[int]netlink.Link{}
	for _, l := range all {
		byIndex[l.Attrs().Index] = l
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := h.nl.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return Underlay{}, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if l := byIndex[r.LinkIndex]; l != nil && (r.Dst == nil || r.Dst.IP.IsUnspecified()) {
				return Underlay{Device: l.Attrs().Name, MTU: l.Attrs().MTU, IPv6: family == unix.AF_INET6}, nil
			}
		}
	}
	found := Underlay{MTU: 1500}
	for _, l := range all {
		a := l.Attrs()
		if a.RawFlags&unix.IFF_UP == 0 || a.RawFlags&unix.IFF_LOOPBACK != 0 || strings.HasPrefix(a.Alias, aliasPrefix) ||
			a.Name == h.cfg.Bridge || a.Name == h.cfg.DockerBridge || found.Device != "" && a.MTU >= found.MTU {
			continue
		}
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			addrs, err := h.nl.AddrList(l, family)
			if err != nil || len(addrs) == 0 || addrs[0].Scope >= unix.RT_SCOPE_LINK {
				continue
			}
			found = Underlay{Device: a.Name, MTU: a.MTU, IPv6: family == unix.AF_INET6}
			break
		}
	}
	return found, nil
}
