package hostnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// BridgeSpec is the bridge as it should be.
type BridgeSpec struct {
	MTU int      // bytes of the largest packet inside the mesh; zero leaves what is there, or 1500
	MAC mesh.MAC // zero leaves what is there, or takes a random one
}

// maxLearned is how many MAC addresses the bridge learns, as many as the router: where senders are not guarded, here
// or on another host, somebody may make up any number. What it does not learn it floods. Linux before 6.7 knows no
// such limit.
const maxLearned = 16384

// EnsureBridge makes or adopts the bridge and returns its MAC address. A bridge made by others under
// this name is used, but Reset leaves it.
func (h *Host) EnsureBridge(want BridgeSpec) (mesh.MAC, error) {
	mac, err := h.ensureBridge(want)
	if err != nil {
		return mac, fmt.Errorf("bridge %s: %w", h.cfg.Bridge, err)
	}
	return mac, nil
}

func (h *Host) ensureBridge(want BridgeSpec) (mac mesh.MAC, err error) {
	l, err := h.named(h.cfg.Bridge, aliasPrefix+h.cfg.Bridge)
	if err != nil {
		return mac, err
	}
	off := false
	if l == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = h.cfg.Bridge, want.MTU
		if !want.MAC.IsZero() {
			attrs.HardwareAddr = want.MAC[:]
		}
		// Without a querier snooping would still prune what a remote peer asked for.
		err := h.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off})
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return mac, fmt.Errorf("create: %w", err)
		}
		if l, err = h.link(h.cfg.Bridge); err != nil {
			return mac, err
		}
		if l == nil {
			return mac, errors.New("vanished while it was made")
		}
		// The host says nothing on the mesh before it is exposed there.
		if err := inNamespace(h.ns, func() error { return setSysctls(h.cfg.Bridge, silentDevice) }); err != nil {
			return mac, err
		}
	}
	br, ok := l.(*netlink.Bridge)
	if !ok {
		return mac, wrongKind(l, "a bridge", otherBridge)
	}
	if br.Alias == "" {
		ours, err := h.looksOurs(br)
		if err != nil {
			return mac, err
		}
		if ours {
			// A bridge takes its address from its ports, and another one with each of them, until it is given one.
			if want.MAC.IsZero() {
				want.MAC = macOf(br.HardwareAddr)
			}
			if err := h.nl.LinkSetHardwareAddr(br, want.MAC[:]); err != nil {
				return mac, fmt.Errorf("set MAC address: %w", err)
			}
			br.HardwareAddr = want.MAC[:]
			if err := h.nl.LinkSetAlias(br, aliasPrefix+br.Name); err != nil {
				return mac, fmt.Errorf("set alias: %w", err)
			}
			br.Alias = aliasPrefix + br.Name
		}
	}
	if !want.MAC.IsZero() && macOf(br.HardwareAddr) != want.MAC {
		if err := h.nl.LinkSetHardwareAddr(br, want.MAC[:]); err != nil {
			return mac, fmt.Errorf("set MAC address: %w", err)
		}
		br.HardwareAddr = want.MAC[:]
	}
	if want.MTU != 0 && br.MTU != want.MTU {
		if err := h.nl.LinkSetMTU(br, want.MTU); err != nil {
			return mac, fmt.Errorf("set MTU to %d: %w", want.MTU, err)
		}
	}
	if br.MulticastSnooping != nil && *br.MulticastSnooping {
		err := h.nl.LinkModify(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: br.Name, TxQLen: -1}, MulticastSnooping: &off})
		if err != nil {
			return mac, fmt.Errorf("turn multicast snooping off: %w", err)
		}
	}
	if br.Alias == aliasPrefix+br.Name {
		if err := h.limitLearning(br); err != nil {
			return mac, fmt.Errorf("limit what it learns: %w", err)
		}
	}
	err = inNamespace(h.ns, func() error {
		if err := setSysctls(br.Name, ourDevice); err != nil {
			return err
		}
		// The host routes for exposed subnets; telling containers of a shorter way would be wrong.
		return setSysctl("0", "ipv4", "conf", br.Name, "send_redirects")
	})
	if err != nil {
		return mac, err
	}
	if err := h.nl.LinkSetUp(br); err != nil {
		return mac, fmt.Errorf("set up: %w", err)
	}
	return macOf(br.HardwareAddr), nil
}

func (h *Host) limitLearning(br *netlink.Bridge) error {
	req := h.strictRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(br.Index)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated(br.Type()))
	info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(unix.IFLA_BR_FDB_MAX_LEARNED, nl.Uint32Attr(maxLearned))
	req.AddData(msg)
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// looksOurs tells a bridge that an earlier run made, and had no time to mark, from somebody else's: that
// one has addresses or ports of its own.
func (h *Host) looksOurs(br *netlink.Bridge) (bool, error) {
	addrs, err := h.nl.AddrList(br, unix.AF_INET)
	if err != nil {
		return false, fmt.Errorf("list addresses: %w", err)
	}
	foreign, err := h.ForeignPorts()
	return len(addrs) == 0 && len(foreign) == 0, err
}

// bridge finds the bridge or says that it is missing.
func (h *Host) bridge() (*netlink.Bridge, error) {
	l, err := h.link(h.cfg.Bridge)
	if err != nil {
		return nil, err
	}
	if l == nil {
		return nil, fmt.Errorf("%s: %w", h.cfg.Bridge, ErrNoBridge)
	}
	br, ok := l.(*netlink.Bridge)
	if !ok {
		return nil, wrongKind(l, "a bridge", otherBridge)
	}
	return br, nil
}

// AddBridgeAddrs gives the host addresses on the bridge and tells the neighbours. Those that are there
// already stay; the neighbours are told again.
func (h *Host) AddBridgeAddrs(addrs ...netip.Prefix) error {
	br, err := h.bridge()
	if err != nil {
		return err
	}
	have, err := addrsOf(h.nl, br)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if slices.Contains(have, a) {
			continue
		}
		if a.Addr().Is6() {
			err := inNamespace(h.ns, func() error { return setSysctl("0", "ipv6", "conf", br.Name, "disable_ipv6") })
			if err != nil {
				return err
			}
		}
		if err := addAddr(h.nl, br, a); err != nil {
			return fmt.Errorf("bridge %s: %w", br.Name, err)
		}
	}
	return inNamespace(h.ns, func() error { return announce(br.Index, macOf(br.HardwareAddr), addrs) })
}

// RemoveBridgeAddrs takes addresses from the bridge; those that are not there are no error.
func (h *Host) RemoveBridgeAddrs(addrs ...netip.Prefix) error {
	br, err := h.bridge()
	if errors.Is(err, ErrNoBridge) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if err := delAddr(h.nl, br, a); err != nil {
			return fmt.Errorf("bridge %s: %w", br.Name, err)
		}
	}
	return nil
}

// Bridge reports the bridge's MAC address and the addresses that the host has on it.
func (h *Host) Bridge() (mesh.MAC, []netip.Prefix, error) {
	br, err := h.bridge()
	if err != nil {
		return mesh.MAC{}, nil, err
	}
	addrs, err := addrsOf(h.nl, br)
	return macOf(br.HardwareAddr), addrs, err
}

// addrsOf lists the addresses of a device, without the link-local ones that IPv6 makes.
func addrsOf(nl *netlink.Handle, l netlink.Link) (out []netip.Prefix, err error) {
	var all []netlink.Addr
	for range 5 {
		all, err = nl.AddrList(l, unix.AF_UNSPEC)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
	}
	for _, a := range all {
		p, ok := prefixOf(a.IPNet)
		if ok && !(p.Addr().Is6() && p.Addr().IsLinkLocalUnicast()) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out, nil
}

func addAddr(nl *netlink.Handle, l netlink.Link, a netip.Prefix) error {
	addr := &netlink.Addr{IPNet: ipNet(a)}
	if a.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD // unique by allocation, and usable at once
	}
	if err := nl.AddrAdd(l, addr); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address %v: %w", a, err)
	}
	return nil
}

func delAddr(nl *netlink.Handle, l netlink.Link, a netip.Prefix) error {
	err := nl.AddrDel(l, &netlink.Addr{IPNet: ipNet(a)})
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("remove address %v: %w", a, err)
	}
	return nil
}
