package fastdp

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The short way in (under_in in bpf/fastdp.c): single packets, and all for other peers, are taken before the host's
// IP stack sees them. It needs tcx, and it is never missed: what it does not take goes by the vxlan device.

const (
	routeEvery    = 10 * time.Second // a peer's route is looked at again after so long, or when the kernel says that some changed,
	routesAtATime = 256              // and for at most so many peers in one round; it takes 20 µs each
)

// openRoutes is a socket on which the kernel says that devices, IPv4 addresses, routes or rules changed.
func openRoutes() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	groups := uint32(0)
	for _, g := range []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE} {
		groups |= 1 << (g - 1)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	return os.NewFile(uintptr(fd), "routes"), nil
}

// routesChanged reports whether the kernel has said so since the last call.
func (d *Datapath) routesChanged() (changed bool) {
	raw, err := d.routes.SyscallConn()
	if err != nil {
		return false
	}
	var buf [1 << 13]byte
	_ = raw.Read(func(fd uintptr) bool {
		for {
			_, _, err := unix.Recvfrom(int(fd), buf[:], 0)
			if err != nil && err != unix.ENOBUFS { // of ENOBUFS: more changed than there was room to say
				return true
			}
			changed = true
		}
	})
	return changed
}

// joinNames are the ends of the veth pair: frames go into the first and come out of the second, joined.
func joinNames(vxlan string) (in, out string) { return vxlan + "0", vxlan + "1" }

// reconcileShortWay keeps the hooks and devices of the short way as they should be.
func (d *Datapath) reconcileShortWay(now time.Time) error {
	join := 0
	var errs []error
	if d.shortWay() {
		var out int
		var err error
		if join, out, err = ensureJoin(d.cfg.VXLAN); err == nil {
			_, err = d.hooks.ensure(hook{bpfProgJoinedIn, out}, d.obj.JoinedIn)
		}
		if err != nil {
			join = 0
		}
		d.joined = out
		errs = append(errs, err)
	}
	moved := d.lookAtRoutes(now)
	errs = append(errs, d.hookUnderlay())
	c := d.kernel.config
	c.Join, c.Port = uint32(join), uint32(bigEndian16(d.cfg.Port))
	errs = append(errs, d.applyConfig(c))
	if moved {
		errs = append(errs, d.applyPeers(now))
	}
	return errors.Join(errs...)
}

func (d *Datapath) hookUnderlay() error {
	var errs []error
	for index := range d.underlayDevices() {
		if _, err := d.hooks.ensure(hook{bpfProgUnderIn, index}, d.obj.UnderIn); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// shortWay reports whether there is to be one: where nothing comes by the tunnel it has nothing to do.
func (d *Datapath) shortWay() bool {
	return !d.cfg.GuardOnly && !d.hooks.clsact && d.kernel.config.Vxlan != 0
}

// underlayDevices are those by which datagrams of peers come in.
func (d *Datapath) underlayDevices() map[int]bool {
	devices := make(map[int]bool)
	for _, s := range d.peers {
		if s.device != 0 && d.shortWay() {
			devices[s.device] = true
		}
	}
	return devices
}

// lookAtRoutes asks the kernel by which device and from which address it sends to peers, or to their relays: there
// their datagrams should come in. moved: some peer's has changed.
func (d *Datapath) lookAtRoutes(now time.Time) (moved bool) {
	if d.routesChanged() {
		for _, s := range d.peers {
			s.routedAt = time.Time{}
		}
	}
	asked := 0
	ethernet := make(map[int]bool)
	for _, s := range d.peers {
		if s.path == nil || asked == routesAtATime {
			continue
		}
		addr := s.Addr
		if !s.Via.IsZero() {
			addr = s.to
		}
		if s.routedFor == addr && now.Sub(s.routedAt) < routeEvery {
			continue
		}
		asked++
		s.routedFor, s.routedAt = addr, now
		device, local := routeTo(addr)
		if device != 0 {
			if _, ok := ethernet[device]; !ok {
				ethernet[device] = isEthernet(device)
			}
			if !ethernet[device] || device == int(d.kernel.config.Bridge) || device == int(d.kernel.config.Tap) {
				device = 0
			}
		}
		if device == 0 {
			local = netip.Addr{}
		}
		moved = moved || device != s.device || local != s.local
		s.device, s.local = device, local
	}
	return moved
}

// routeTo is zero for what has no route, and for IPv6, which goes the long way.
func routeTo(to netip.Addr) (device int, local netip.Addr) {
	if !to.Is4() {
		return 0, local
	}
	routes, err := netlink.RouteGet(to.AsSlice())
	if err != nil || len(routes) == 0 {
		return 0, local
	}
	local, ok := netip.AddrFromSlice(routes[0].Src.To4())
	if !ok {
		return 0, local
	}
	return routes[0].LinkIndex, local
}

func isEthernet(index int) bool {
	l, err := netlink.LinkByIndex(index)
	return err == nil && l.Attrs().EncapType == "ether" && l.Attrs().Flags&net.FlagLoopback == 0
}

// ensureJoin makes the veth pair, or keeps the one that is there, and sets it up. Its second end joins what
// comes in like a network card (NAPI and GRO, for veth since 5.13), if the first one cuts superframes.
func ensureJoin(vxlan string) (in, out int, err error) {
	nameIn, nameOut := joinNames(vxlan)
	first, err := netlink.LinkByName(nameIn)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		attrs := netlink.NewLinkAttrs()
		// A queue for each processor: what one took from the underlay it joins itself.
		queues := runtime.NumCPU()
		if n, err := ebpf.PossibleCPU(); err == nil {
			queues = n
		}
		attrs.Name, attrs.MTU, attrs.NumTxQueues, attrs.NumRxQueues = nameIn, 65535, queues, queues
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: nameOut, PeerMTU: 65535,
			PeerNumTxQueues: uint32(queues), PeerNumRxQueues: uint32(queues)}); err != nil {
			return 0, 0, fmt.Errorf("veth pair %s: %w", nameIn, err)
		}
		first, err = netlink.LinkByName(nameIn)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("veth pair %s: %w", nameIn, err)
	}
	second, err := netlink.LinkByName(nameOut)
	if err != nil {
		return 0, 0, fmt.Errorf("veth pair %s: %w", nameOut, err)
	}
	if first.Type() != "veth" || second.Type() != "veth" || first.Attrs().ParentIndex != second.Attrs().Index {
		return 0, 0, fmt.Errorf("%s and %s are no veth pair", nameIn, nameOut)
	}
	for _, l := range []netlink.Link{first, second} {
		if l.Attrs().Flags&net.FlagUp != 0 {
			continue
		}
		_ = netlink.LinkSetIP6AddrGenMode(l, 1) // none; a host without IPv6 refuses and needs none of it
		if err := errors.Join(ethtool(nameIn, unix.ETHTOOL_STSO, 0), ethtool(nameOut, unix.ETHTOOL_SGRO, 1)); err != nil {
			return 0, 0, fmt.Errorf("veth pair %s: offloads: %w", nameIn, err)
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return 0, 0, fmt.Errorf("%s: set up: %w", l.Attrs().Name, err)
		}
	}
	return first.Attrs().Index, second.Attrs().Index, nil
}

func removeJoin(vxlan string) error {
	name, _ := joinNames(vxlan)
	l, err := netlink.LinkByName(name)
	if err != nil || l.Type() != "veth" {
		return nil
	}
	if err := netlink.LinkDel(l); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// ethtool sets one feature of a device (linux/ethtool.h, struct ethtool_value).
func ethtool(device string, command, value uint32) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	order := &struct{ command, value uint32 }{command, value}
	var request struct { // struct ifreq
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(request.name[:unix.IFNAMSIZ-1], device)
	request.data = unsafe.Pointer(order)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	runtime.KeepAlive(order)
	if errno != 0 {
		return os.NewSyscallError("ethtool", errno)
	}
	return nil
}
