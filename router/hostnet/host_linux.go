package hostnet

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// Config names the devices. The zero value means the product's names.
type Config struct {
	Bridge       string // default "mesh"
	TAP          string // default "mesh-tap"
	VXLAN        string // the kernel path's device, default "mesh-vx"; here only to tell it from foreign ports
	Inside       string // interface in a container, default "ethmesh"
	PortPrefix   string // start of its host end's name, default "vmesh", at most 7 bytes
	DockerBridge string // Docker's default bridge, default "docker0"
	Table        string // nftables table of the family inet, default "mesh"
	// Guard keeps a port to its MAC address and its addresses. It is called before the port joins the bridge and before it
	// has further addresses, so that no frame goes out unguarded; an error ends the attach. nil: ports are not guarded.
	Guard func(mesh.Port) error
	Log   *slog.Logger
}

// aliasPrefix marks devices of ours: "meshd:" and the owner of a port, or the name that the device had.
const aliasPrefix = "meshd:"

// Errors that callers tell apart.
var (
	ErrNoTun       = errors.New("no usable /dev/net/tun")
	ErrHostNetwork = errors.New("shares the network of the host")
	ErrNoBridge    = errors.New("the mesh bridge does not exist")
)

// Host is this host's network. Its methods may be called concurrently, except that calls about one port
// must not overlap.
type Host struct {
	cfg    Config
	log    *slog.Logger
	ports  chan struct{}    // capacity 1; a token when addresses of ports changed
	ns     *os.File         // the host's network namespace
	nl     *netlink.Handle  // requests in it
	strict *nl.SocketHandle // a socket in it with strict checking, which dumps by namespace id need (Linux 4.20)
}

// Open prepares to work in the network namespace of the calling thread. It changes nothing.
func Open(cfg Config) (*Host, error) {
	for _, d := range []struct {
		field *string
		name  string
	}{
		{&cfg.Bridge, "mesh"}, {&cfg.TAP, "mesh-tap"}, {&cfg.VXLAN, "mesh-vx"},
		{&cfg.Inside, "ethmesh"}, {&cfg.PortPrefix, "vmesh"}, {&cfg.DockerBridge, "docker0"},
	} {
		if *d.field == "" {
			*d.field = d.name
		}
		if err := checkIfName(*d.field); err != nil {
			return nil, err
		}
	}
	if cfg.Table == "" {
		cfg.Table = "mesh"
	}
	if len(cfg.PortPrefix) > maxPortPrefix {
		return nil, fmt.Errorf("prefix %q of port names: longer than %d bytes", cfg.PortPrefix, maxPortPrefix)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	h := &Host{cfg: cfg, log: cfg.Log, ports: make(chan struct{}, 1)}
	var err error
	if h.ns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, fmt.Errorf("open the host's network namespace: %w", err)
	}
	if h.nl, err = handleIn(h.ns); err != nil {
		h.Close()
		return nil, err
	}
	if h.strict, err = strictSocket(h.ns); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// handleIn makes a handle for requests in the namespace ns.
func handleIn(ns *os.File) (handle *netlink.Handle, err error) {
	err = inNamespace(ns, func() error {
		handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	return handle, nil
}

func strictSocket(ns *os.File) (*nl.SocketHandle, error) {
	var s *nl.NetlinkSocket
	err := inNamespace(ns, func() (err error) {
		if s, err = nl.GetNetlinkSocketAt(-1, -1, unix.NETLINK_ROUTE); err != nil {
			return err
		}
		// A kernel without it refuses the requests that want it, and Ports says less.
		_ = unix.SetsockoptInt(s.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	return &nl.SocketHandle{Socket: s}, nil
}

// Close releases handles; devices stay. It may be called twice.
func (h *Host) Close() error {
	if h.nl != nil {
		h.nl.Close()
		h.nl = nil
	}
	if h.strict != nil {
		h.strict.Close()
		h.strict = nil
	}
	return h.ns.Close()
}

// checkIfName applies the kernel's rules for interface names (dev_valid_name).
func checkIfName(s string) error {
	bad := s == "" || len(s) >= unix.IFNAMSIZ || s == "." || s == ".."
	for _, c := range []byte(s) {
		bad = bad || c <= ' ' || c == '/' || c == ':' || c >= 0x7f
	}
	if bad {
		return fmt.Errorf("%q is no name for a network device: 1 to 15 printing characters without / and :", s)
	}
	return nil
}

// inNamespace runs f on a thread of its own inside ns and waits for it. If the way back fails, the
// thread ends with its goroutine, so that nobody else ever runs in the wrong namespace.
func inNamespace(ns *os.File, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		back, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer back.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("enter network namespace %s: %w", ns.Name(), err)
			return
		}
		err = f()
		if unix.Setns(int(back.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// OpenNamespace opens the file of a network namespace, such as /proc/PID/ns/net, and checks that it is one.
func OpenNamespace(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a fifo must not hold us
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE) // Linux 4.11
	if err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, fmt.Errorf("%s is not a network namespace", path)
	}
	return f, nil
}

// sameFile reports whether two open files are one namespace.
func sameFile(a, b *os.File) bool {
	x, err := a.Stat()
	if err != nil {
		return false
	}
	y, err := b.Stat()
	return err == nil && os.SameFile(x, y)
}

// setSysctl writes a value below /proc/sys/net in the calling thread's namespace, unless it is there.
func setSysctl(value string, path ...string) error {
	name := "/proc/sys/net"
	for _, p := range path {
		name += "/" + p
	}
	if old, err := os.ReadFile(name); err == nil && string(old) == value+"\n" {
		return nil
	}
	if err := os.WriteFile(name, []byte(value), 0); err != nil {
		return fmt.Errorf("set %s to %s: %w", name, value, err)
	}
	return nil
}

// setSysctls writes several values for one device, passing over those that this kernel lacks.
func setSysctls(dev string, values []sysctl) error {
	for _, s := range values {
		err := setSysctl(s.value, s.family, s.group, dev, s.name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

type sysctl struct{ family, group, name, value string }

// ourDevice applies to every interface that carries mesh addresses. Neighbours move between hosts, so
// stale entries are found out quickly: reachable for 5 s, then one probe after 2 s. A question that
// nobody answers is repeated after 250 ms and not after 1 s, for 3 s as ever: who spoke before its
// neighbour was known here, because a peer was just joining, goes on at once when it is. Router
// advertisements and redirects from containers are never believed. Deleting an address must not take
// the other addresses of its subnet with it.
var ourDevice = []sysctl{
	{"ipv4", "neigh", "base_reachable_time_ms", "5000"},
	{"ipv4", "neigh", "delay_first_probe_time", "2"},
	{"ipv4", "neigh", "ucast_solicit", "1"},
	{"ipv4", "neigh", "retrans_time_ms", "250"},
	{"ipv4", "neigh", "mcast_solicit", "12"},
	{"ipv6", "neigh", "base_reachable_time_ms", "5000"},
	{"ipv6", "neigh", "delay_first_probe_time", "2"},
	{"ipv6", "neigh", "ucast_solicit", "1"},
	{"ipv6", "neigh", "retrans_time_ms", "250"},
	{"ipv6", "neigh", "mcast_solicit", "12"},
	{"ipv4", "conf", "promote_secondaries", "1"},
	{"ipv4", "conf", "accept_redirects", "0"},
	{"ipv6", "conf", "accept_redirects", "0"},
	{"ipv6", "conf", "accept_ra", "0"},
}

// silentDevice applies to bridge ports: the host itself never speaks on them.
var silentDevice = []sysctl{{"ipv6", "conf", "disable_ipv6", "1"}}

// link finds a device of the host by name; nil if there is none.
func (h *Host) link(name string) (netlink.Link, error) {
	l, err := h.nl.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up device %s: %w", name, err)
	}
	return l, nil
}

// named finds a device of ours that bears the alias, and gives it its name back if somebody has renamed it;
// nil if there is none.
func (h *Host) named(name, alias string) (netlink.Link, error) {
	l, err := h.link(name)
	if l != nil || err != nil {
		return l, err
	}
	all, err := h.links()
	if err != nil {
		return nil, err
	}
	for _, l := range all {
		if l.Attrs().Alias != alias {
			continue
		}
		h.log.Warn("somebody renamed a device of ours; naming it back", "device", l.Attrs().Name, "name", name)
		if err := h.rename(l, name); err != nil {
			return nil, err
		}
		return h.link(name)
	}
	return nil, nil
}

// rename gives a device another name, if need be while it is down, which kernels before 6.2 insist on.
func (h *Host) rename(l netlink.Link, name string) error {
	err := h.nl.LinkSetName(l, name)
	if errors.Is(err, unix.EBUSY) {
		if err = h.nl.LinkSetDown(l); err == nil {
			err = errors.Join(h.nl.LinkSetName(l, name), h.nl.LinkSetUp(l))
		}
	}
	if err != nil {
		return fmt.Errorf("rename %s to %s: %w", l.Attrs().Name, name, err)
	}
	return nil
}

// links lists the host's devices, again if the kernel says that they changed meanwhile.
func (h *Host) links() (all []netlink.Link, err error) {
	for range 5 {
		all, err = h.nl.LinkList()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	return all, nil
}

// What to do about a device that is in the way.
const (
	otherBridge = "remove it, or choose another name with --bridge"
	otherTAP    = "remove it, or choose another name with --tap"
)

// wrongKind is the error for a device of others under a name of ours.
func wrongKind(l netlink.Link, want, remedy string) error {
	return fmt.Errorf("device %s exists and is a %s, not %s: %s", l.Attrs().Name, kind(l), want, remedy)
}

func kind(l netlink.Link) string {
	if t := l.Type(); t != "" {
		return t
	}
	return "device of unknown kind"
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || bits == 0 {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a.Unmap(), ones), true
}

func macOf(hw net.HardwareAddr) (m mesh.MAC) {
	if len(hw) == len(m) {
		copy(m[:], hw)
	}
	return m
}
