package hostnet

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

const (
	portIDLen     = 8                             // characters of the id in the name of a host end
	maxPortPrefix = unix.IFNAMSIZ - 1 - portIDLen // bytes
	maxOwner      = 255 - len(aliasPrefix)        // an alias has at most 255 bytes (IFALIASZ)
	carrierWait   = time.Second                   // for the pair to carry frames, normally a millisecond
)

// HostEnd is the name of the bridge's end of the port of owner.
func (h *Host) HostEnd(owner string) string {
	sum := sha256.Sum256([]byte(owner))
	return h.cfg.PortPrefix + hex.EncodeToString(sum[:portIDLen/2])
}

// AttachPort makes sure that the namespace ns has the port p: a veth pair with p's MAC address, one end
// on the bridge, the other inside with p's addresses (others that it has stay), the bridge's MTU, and
// the multicast route. The neighbours are told. What an earlier, unfinished call left is completed.
func (h *Host) AttachPort(ns *os.File, p mesh.Port) error {
	if err := h.attachPort(ns, p); err != nil {
		return fmt.Errorf("attach %s in %s: %w", h.cfg.Inside, ns.Name(), err)
	}
	return nil
}

func (h *Host) attachPort(ns *os.File, p mesh.Port) error {
	if p.Owner == "" || len(p.Owner) > maxOwner {
		return fmt.Errorf("owner %q: must have 1 to %d bytes", p.Owner, maxOwner)
	}
	if p.MAC.IsZero() || p.MAC.IsMulticast() {
		return fmt.Errorf("%v is no MAC address for an interface", p.MAC)
	}
	if sameFile(ns, h.ns) {
		return ErrHostNetwork
	}
	br, err := h.bridge()
	if err != nil {
		return err
	}
	inside, err := handleIn(ns)
	if err != nil {
		return err
	}
	defer inside.Close()
	host, err := h.ensurePair(ns, inside, br, p)
	if err != nil {
		return err
	}
	if host.Alias == "" {
		if err := h.nl.LinkSetAlias(host, aliasPrefix+p.Owner); err != nil {
			return fmt.Errorf("set alias of %s: %w", host.Name, err)
		}
	}
	if h.cfg.Guard != nil {
		p.HostEnd, p.Index = host.Name, host.Index
		if err := h.cfg.Guard(p); err != nil {
			return fmt.Errorf("guard %s, which --no-spoof-guard does without: %w", host.Name, err)
		}
	}
	end, err := inside.LinkByIndex(host.ParentIndex)
	if err != nil {
		return fmt.Errorf("look up the inner end of %s: %w", host.Name, err)
	}
	if err := inNamespace(ns, func() error { return dress(inside, end, br.MTU, p) }); err != nil {
		return err
	}
	// The inner end gets carrier only now, which is what the container's process waits for.
	if err := h.plug(host, br); err != nil {
		return err
	}
	// Either end takes it in by itself, and what is sent on one that has not yet is lost.
	if err := errors.Join(awaitCarrier(h.nl, host), awaitCarrier(inside, end)); err != nil {
		return err
	}
	h.portsChanged()
	return inNamespace(ns, func() error { return announce(end.Attrs().Index, p.MAC, p.Addrs) })
}

// ensurePair finds the veth pair of p, or makes it. A pair that leads elsewhere belongs to a namespace
// that is being torn down, as after a container's restart, and gives way.
func (h *Host) ensurePair(ns *os.File, inside *netlink.Handle, br *netlink.Bridge, p mesh.Port) (*netlink.Veth, error) {
	name := h.HostEnd(p.Owner)
	host, err := h.hostEnd(name, p.Owner)
	if err != nil {
		return nil, err
	}
	if host != nil {
		id, err := h.nl.GetNetNsIdByFd(int(ns.Fd()))
		if err == nil && id >= 0 && id == host.NetNsID {
			return host, nil
		}
		if err := h.nl.LinkDel(host); err != nil && !errors.Is(err, unix.ENODEV) {
			return nil, fmt.Errorf("remove %s, which leads to another namespace: %w", name, err)
		}
	}
	if old, err := inside.LinkByName(h.cfg.Inside); err == nil {
		if l, err := h.named(name, aliasPrefix+p.Owner); l != nil || err != nil {
			if err != nil {
				return nil, err
			}
			return h.hostEnd(name, p.Owner)
		}
		return nil, fmt.Errorf("an interface %s, a %s, exists there already and is not this port's", h.cfg.Inside, kind(old))
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, br.MTU
	err = h.nl.LinkAdd(&netlink.Veth{
		LinkAttrs: attrs, PeerName: h.cfg.Inside, PeerHardwareAddr: p.MAC[:],
		PeerMTU: uint32(br.MTU), PeerNamespace: netlink.NsFd(ns.Fd()),
	})
	if err != nil {
		return nil, fmt.Errorf("create veth %s: %w", name, err)
	}
	host, err = h.hostEnd(name, p.Owner)
	if err == nil && host == nil {
		err = fmt.Errorf("veth %s vanished while it was made", name)
	}
	return host, err
}

// hostEnd finds a port's end on the host; nil if there is none.
func (h *Host) hostEnd(name, owner string) (*netlink.Veth, error) {
	l, err := h.link(name)
	if l == nil || err != nil {
		return nil, err
	}
	veth, ok := l.(*netlink.Veth)
	if !ok {
		return nil, wrongKind(l, "a veth", "remove it")
	}
	if veth.Alias != "" && veth.Alias != aliasPrefix+owner {
		return nil, fmt.Errorf("device %s exists and belongs to %q", name, veth.Alias)
	}
	return veth, nil
}

// dress gives the inner end all that it needs and sets it up; it has no carrier yet unless the port was
// there before. The calling thread is inside.
func dress(inside *netlink.Handle, end netlink.Link, mtu int, p mesh.Port) error {
	attrs := end.Attrs()
	if macOf(attrs.HardwareAddr) != p.MAC {
		if err := inside.LinkSetHardwareAddr(end, p.MAC[:]); err != nil {
			return fmt.Errorf("set MAC address of %s: %w", attrs.Name, err)
		}
	}
	if attrs.MTU != mtu {
		if err := inside.LinkSetMTU(end, mtu); err != nil {
			return fmt.Errorf("set MTU of %s to %d: %w", attrs.Name, mtu, err)
		}
	}
	if n := superframe(mtu); int(attrs.GSOMaxSegs) != n {
		if err := inside.LinkSetGSOMaxSegs(end, n); err != nil {
			return fmt.Errorf("set segments per superframe of %s to %d: %w", attrs.Name, n, err)
		}
	}
	if err := setSysctls(attrs.Name, ourDevice); err != nil {
		return err
	}
	have, err := addrsOf(inside, end)
	if err != nil {
		return err
	}
	for _, a := range p.Addrs {
		if slices.Contains(have, a) {
			continue
		}
		if a.Addr().Is6() { // Docker turns IPv6 off in containers without an IPv6 network
			if err := setSysctl("0", "ipv6", "conf", attrs.Name, "disable_ipv6"); err != nil {
				return err
			}
		}
		if err := addAddr(inside, end, a); err != nil {
			return fmt.Errorf("%s: %w", attrs.Name, err)
		}
	}
	if err := inside.LinkSetUp(end); err != nil {
		return fmt.Errorf("set %s up: %w", attrs.Name, err)
	}
	if err := awaitLocal6(inside, p.Addrs); err != nil {
		return err
	}
	if p.NoMulticastRoute {
		return nil
	}
	route := &netlink.Route{
		LinkIndex: attrs.Index, Scope: netlink.SCOPE_LINK,
		Dst: &net.IPNet{IP: net.IPv4(224, 0, 0, 0).To4(), Mask: net.CIDRMask(4, 32)},
	}
	if err := inside.RouteAdd(route); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add the multicast route to %s: %w", attrs.Name, err)
	}
	return nil
}

// superframe is how many segments a container should put into one superframe: as many as the userspace path
// sends in one system call, a UDP payload of 65,507 bytes. A superframe that does not quite fit would
// cost a second call for its last few segments, and everything behind it the same: a wake-up, a read, a
// superframe, an acknowledgement.
func superframe(mtu int) int {
	const around = 64 // bytes at most: Ethernet header, length, seal, data and relay headers
	return max(1, min(64, 65507/(mtu+around)))
}

// plug makes the host end a port of the bridge.
func (h *Host) plug(host *netlink.Veth, br *netlink.Bridge) error {
	if host.MTU != br.MTU {
		if err := h.nl.LinkSetMTU(host, br.MTU); err != nil {
			return fmt.Errorf("set MTU of %s to %d: %w", host.Name, br.MTU, err)
		}
	}
	if err := h.enslave(host, br); err != nil {
		return err
	}
	// No hairpin, which Weave had on: it would give a container its own broadcasts back, and a bridge inside a
	// container would learn its machines on the wrong side. What we translate is routed, and needs none.
	return nil
}

// enslave makes l an up and silent port of the bridge.
func (h *Host) enslave(l netlink.Link, br *netlink.Bridge) error {
	name := l.Attrs().Name
	if err := inNamespace(h.ns, func() error { return setSysctls(name, silentDevice) }); err != nil {
		return err
	}
	if l.Attrs().MasterIndex != br.Index {
		if err := h.nl.LinkSetMaster(l, br); err != nil {
			return fmt.Errorf("attach %s to bridge %s: %w", name, br.Name, err)
		}
	}
	if err := h.nl.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// portsChanged tells the firewall that ports have other addresses.
func (h *Host) portsChanged() {
	select {
	case h.ports <- struct{}{}:
	default: // told already
	}
}

// awaitCarrier waits until a device carries frames, which the kernel sees to soon after both of its ends are
// up. If that does not come, something else set one down, and that is not for us to judge.
func awaitCarrier(nl *netlink.Handle, dev netlink.Link) error {
	for start := time.Now(); time.Since(start) < carrierWait; time.Sleep(time.Millisecond) {
		now, err := nl.LinkByIndex(dev.Attrs().Index)
		if err != nil {
			return fmt.Errorf("look up %s: %w", dev.Attrs().Name, err)
		}
		if now.Attrs().OperState == netlink.OperUp {
			break
		}
	}
	return nil
}

// awaitLocal6 waits until the kernel takes packets for the IPv6 addresses, which it arranges for in the
// background even without duplicate detection.
func awaitLocal6(inside *netlink.Handle, addrs []netip.Prefix) error {
	start := time.Now()
	for _, a := range addrs {
		for a.Addr().Is6() && time.Since(start) < carrierWait {
			routes, err := inside.RouteGet(a.Addr().AsSlice())
			if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
				break
			}
			if err != nil && !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EHOSTUNREACH) {
				return fmt.Errorf("look up the route to %v: %w", a.Addr(), err)
			}
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}

// RemoveAddrs takes addresses from the port of owner inside ns; those that are not there are no error.
func (h *Host) RemoveAddrs(ns *os.File, owner string, addrs []netip.Prefix) error {
	host, err := h.hostEnd(h.HostEnd(owner), owner)
	if host == nil || err != nil {
		return err
	}
	if id, err := h.nl.GetNetNsIdByFd(int(ns.Fd())); err != nil || id != host.NetNsID {
		return nil // the port is in a namespace that is gone for us
	}
	inside, err := handleIn(ns)
	if err != nil {
		return err
	}
	defer inside.Close()
	end, err := inside.LinkByIndex(host.ParentIndex)
	if err != nil {
		return fmt.Errorf("look up the inner end of %s: %w", host.Name, err)
	}
	for _, a := range addrs {
		if err := delAddr(inside, end, a); err != nil {
			return fmt.Errorf("%s in %s: %w", end.Attrs().Name, ns.Name(), err)
		}
	}
	h.portsChanged()
	return nil
}

// DetachPort removes the port of owner; that it is not there is no error.
func (h *Host) DetachPort(owner string) error {
	host, err := h.hostEnd(h.HostEnd(owner), owner)
	if host == nil || err != nil {
		return err
	}
	if err := h.nl.LinkDel(host); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove %s: %w", host.Name, err)
	}
	return nil
}

// Ports lists the ports in the kernel, whoever made them, sorted by owner. A port that a crash left
// without its mark has an empty owner; one whose namespace cannot be read lacks MAC and addresses.
func (h *Host) Ports() ([]mesh.Port, error) {
	all, err := h.links()
	if err != nil {
		return nil, err
	}
	var ports []mesh.Port
	for _, l := range all {
		veth, ok := l.(*netlink.Veth)
		if !ok || !h.isPort(veth) {
			continue
		}
		owner, _ := strings.CutPrefix(veth.Alias, aliasPrefix)
		p := mesh.Port{Owner: owner, HostEnd: veth.Name, Index: veth.Index}
		if veth.NetNsID >= 0 {
			if p.MAC, p.Addrs, err = h.peek(veth.NetNsID, veth.ParentIndex); err != nil {
				h.log.Debug("cannot look into the namespace of a port", "port", veth.Name, "err", err)
			}
		}
		ports = append(ports, p)
	}
	slices.SortFunc(ports, func(a, b mesh.Port) int { return strings.Compare(a.Owner, b.Owner) })
	return ports, nil
}

// isPort recognises a host end of ours by its name and alias.
func (h *Host) isPort(veth *netlink.Veth) bool {
	id, ok := strings.CutPrefix(veth.Name, h.cfg.PortPrefix)
	if !ok || len(id) != portIDLen {
		return false
	}
	if _, err := hex.DecodeString(id); err != nil {
		return false
	}
	return veth.Alias == "" || strings.HasPrefix(veth.Alias, aliasPrefix)
}

// Attributes that ask about another namespace by its id (Linux 4.16 and 4.20).
const (
	iflaTargetNetnsid = 46
	ifaTargetNetnsid  = 10
)

// peek reads the MAC address and the addresses of a device in the namespace with the id nsid.
func (h *Host) peek(nsid, index int) (mac mesh.MAC, addrs []netip.Prefix, err error) {
	id := nl.NewRtAttr(iflaTargetNetnsid, nl.Uint32Attr(uint32(nsid)))
	req := h.strictRequest(unix.RTM_GETLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	req.AddData(id)
	replies, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return mac, nil, err
	}
	for _, r := range replies {
		if len(r) < unix.SizeofIfInfomsg {
			continue
		}
		attrs, err := nl.ParseRouteAttr(r[unix.SizeofIfInfomsg:])
		if err != nil {
			return mac, nil, err
		}
		for _, a := range attrs {
			if a.Attr.Type == unix.IFLA_ADDRESS {
				mac = macOf(a.Value)
			}
		}
	}
	req = h.strictRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
	ifa := nl.NewIfAddrmsg(unix.AF_UNSPEC)
	ifa.Index = uint32(index)
	req.AddData(ifa)
	req.AddData(nl.NewRtAttr(ifaTargetNetnsid, nl.Uint32Attr(uint32(nsid))))
	replies, err = req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWADDR)
	if err != nil {
		return mac, nil, err
	}
	for _, r := range replies {
		if p, ok := parseAddr(r, index); ok {
			addrs = append(addrs, p)
		}
	}
	slices.SortFunc(addrs, netip.Prefix.Compare)
	return mac, addrs, nil
}

func (h *Host) strictRequest(kind, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(kind, flags)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: h.strict}
	return req
}

// parseAddr reads an RTM_NEWADDR message about the device index.
func parseAddr(b []byte, index int) (p netip.Prefix, ok bool) {
	if len(b) < unix.SizeofIfAddrmsg {
		return p, false
	}
	msg := nl.DeserializeIfAddrmsg(b)
	if int(msg.Index) != index {
		return p, false
	}
	attrs, err := nl.ParseRouteAttr(b[unix.SizeofIfAddrmsg:])
	if err != nil {
		return p, false
	}
	for _, a := range attrs {
		local := a.Attr.Type == unix.IFA_LOCAL || a.Attr.Type == unix.IFA_ADDRESS && msg.Family == unix.AF_INET6
		if addr, good := netip.AddrFromSlice(a.Value); local && good {
			p = netip.PrefixFrom(addr, int(msg.Prefixlen))
		}
	}
	return p, p.IsValid() && !(p.Addr().Is6() && p.Addr().IsLinkLocalUnicast())
}
