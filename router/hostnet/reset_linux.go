package hostnet

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Reset removes every device of ours, ports, TAP, vxlan device and bridge, each only if it is of our kind,
// and the firewall's rules. It carries on after errors, and may be repeated.
func (h *Host) Reset() error {
	all, err := h.links()
	if err != nil {
		return err
	}
	errs := []error{h.NewFirewall(FirewallConfig{}).Remove()}
	for _, l := range all {
		if !h.isOurs(l) {
			continue
		}
		if err := h.nl.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("remove %s: %w", l.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

func (h *Host) isOurs(l netlink.Link) bool {
	name, marked := l.Attrs().Name, strings.HasPrefix(l.Attrs().Alias, aliasPrefix)
	switch dev := l.(type) {
	case *netlink.Veth:
		return h.isPort(dev)
	case *netlink.Tuntap:
		return name == h.cfg.TAP && dev.Mode == netlink.TUNTAP_MODE_TAP
	case *netlink.Vxlan:
		return name == h.cfg.VXLAN
	case *netlink.Bridge:
		return name == h.cfg.Bridge && marked
	}
	return false
}
