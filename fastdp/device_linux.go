package fastdp

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// ensureVXLAN makes the vxlan device, or keeps the one that is there if it is what it should be, and sets
// it up. It is external (each frame brings its own addresses and VNI), learns nothing and has no address.
func ensureVXLAN(name string, port uint16, mtu int) (index int, err error) {
	have, err := netlink.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if err != nil && !errors.As(err, &missing) {
		return 0, fmt.Errorf("vxlan device %s: %w", name, err)
	}
	if have != nil {
		v, ok := have.(*netlink.Vxlan)
		if !ok {
			return 0, fmt.Errorf("vxlan device %s: the name is taken by a device of type %s", name, have.Type())
		}
		if !v.FlowBased || v.Port != int(port) || v.Learning {
			if err := netlink.LinkDel(have); err != nil {
				return 0, fmt.Errorf("vxlan device %s: remove the old one: %w", name, err)
			}
			have = nil
		}
	}
	if have == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		v := &netlink.Vxlan{LinkAttrs: attrs, FlowBased: true, Port: int(port), UDP6ZeroCSumRx: true}
		if err := netlink.LinkAdd(v); err != nil {
			if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
				return 0, fmt.Errorf("%w: kernel without external vxlan devices: %w", ErrNotSupported, err)
			}
			return 0, fmt.Errorf("vxlan device %s: %w", name, err)
		}
		if have, err = netlink.LinkByName(name); err != nil {
			return 0, fmt.Errorf("vxlan device %s: %w", name, err)
		}
		// No addresses, no router solicitations; a host without IPv6 refuses and needs none of it.
		_ = netlink.LinkSetIP6AddrGenMode(have, nl.IN6_ADDR_GEN_MODE_NONE)
	}
	if have.Attrs().MTU != mtu {
		if err := netlink.LinkSetMTU(have, mtu); err != nil {
			return 0, fmt.Errorf("vxlan device %s: MTU %d: %w", name, mtu, err)
		}
	}
	if have.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(have); err != nil {
			if errors.Is(err, unix.EADDRINUSE) {
				return 0, fmt.Errorf("%w: UDP port %d is taken by another program or vxlan device: %w", ErrNotSupported, port, err)
			}
			return 0, fmt.Errorf("vxlan device %s: set up: %w", name, err)
		}
	}
	return have.Attrs().Index, nil
}

func removeVXLAN(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil || l.Type() != "vxlan" {
		return nil
	}
	if err := netlink.LinkDel(l); err != nil {
		return fmt.Errorf("remove vxlan device %s: %w", name, err)
	}
	return nil
}

// indexOf is 0 for a device that does not exist.
func indexOf(name string) int {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return 0
	}
	return l.Attrs().Index
}

// isVeth reports whether bpf_redirect_peer can deliver by this interface.
func isVeth(index int) (veth bool, err error) {
	l, err := netlink.LinkByIndex(index)
	if err != nil {
		return false, err
	}
	return l.Type() == "veth", nil
}

// settleInBridge tells the bridge what it cannot learn from frames that go past it: the MAC behind a port
// is fixed, and no unknown unicast is to be flooded there. A port that is not on a bridge is left alone.
func settleInBridge(index int, mac mesh.MAC) error {
	l, err := netlink.LinkByIndex(index)
	if err != nil {
		return err
	}
	if l.Attrs().MasterIndex == 0 {
		return nil
	}
	if err := netlink.LinkSetLearning(l, false); err != nil {
		return fmt.Errorf("bridge port %s: learning off: %w", l.Attrs().Name, err)
	}
	if err := netlink.LinkSetFlood(l, false); err != nil {
		return fmt.Errorf("bridge port %s: flooding off: %w", l.Attrs().Name, err)
	}
	if err := netlink.NeighSet(fdbEntry(index, mac)); err != nil {
		return fmt.Errorf("bridge port %s: forwarding entry: %w", l.Attrs().Name, err)
	}
	return nil
}

// unsettle undoes settleInBridge, as far as the port still exists.
func unsettle(index int, mac mesh.MAC) {
	_ = netlink.NeighDel(fdbEntry(index, mac))
	if l, err := netlink.LinkByIndex(index); err == nil && l.Attrs().MasterIndex != 0 {
		_ = netlink.LinkSetLearning(l, true)
		_ = netlink.LinkSetFlood(l, true)
	}
}

func fdbEntry(index int, mac mesh.MAC) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER,
		State: netlink.NUD_NOARP, HardwareAddr: net.HardwareAddr(mac[:])}
}

func indexGone(index int) bool {
	_, err := netlink.LinkByIndex(index)
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing)
}
