package fastdp

import (
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"meshd/mesh"
)

var (
	// ErrNotSupported: this kernel or host cannot do it; the text says what is missing. The userspace
	// path serves alone.
	ErrNotSupported = errors.New("kernel path not supported")
	// ErrBusy: another meshd holds these pins.
	ErrBusy = errors.New("another meshd runs this kernel path")
	// ErrTooMany: a port has more addresses, this host more networks, or the mesh more endpoints, than the maps hold.
	ErrTooMany = errors.New("too many for the kernel path")
)

// Config is fixed for the life of a Datapath. The zero value of a field means its default.
type Config struct {
	Bridge string // default "mesh"; may be missing at first, its hooks follow when it appears
	TAP    string // default "mesh-tap"; likewise
	VXLAN  string // default "mesh-vx"; made here
	PinDir string // below a bpffs, which is mounted if absent; default "/sys/fs/bpf/meshd"

	Port uint16 // UDP port of the vxlan device, the same on all peers; default 6784
	MTU  int    // bytes of the largest overlay packet, the size of the probes; default 1410

	// GuardOnly guards the ports and carries frames between local ones, and neither sends nor accepts
	// anything by the tunnel: for a mesh whose frames must all be sealed.
	GuardOnly bool
	// NoGuard exempts every port (--no-spoof-guard).
	NoGuard bool
	// NoRelay drops what peers send to each other by way of this one.
	NoRelay bool

	GroupRate  int // broadcast and multicast frames a port may send per second; default 2000
	GroupBurst int // and ahead of that; default 4000

	// AnnounceDelay is how long the frames of a new local endpoint keep to the userspace path, because
	// other peers refuse senders that gossip has not told them of; default 2 s.
	AnnounceDelay time.Duration
	// SettleAfter bounds how long adopted peers and endpoints that nobody has named again are kept if
	// Settle is not called; default 60 s.
	SettleAfter time.Duration

	Log *slog.Logger // default slog.Default

	clsact bool // tests: do as on a kernel without tcx
	layout int  // tests: be another LayoutVersion
}

func (c Config) withDefaults() Config {
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&c.Bridge, "mesh")
	def(&c.TAP, "mesh-tap")
	def(&c.VXLAN, "mesh-vx")
	def(&c.PinDir, "/sys/fs/bpf/meshd")
	if c.Port == 0 {
		c.Port = 6784
	}
	if c.MTU == 0 {
		c.MTU = 1410
	}
	if c.GroupRate == 0 {
		c.GroupRate = 2000
	}
	if c.GroupBurst == 0 {
		c.GroupBurst = 4000
	}
	if c.AnnounceDelay == 0 {
		c.AnnounceDelay = 2 * time.Second
	}
	if c.SettleAfter == 0 {
		c.SettleAfter = time.Minute
	}
	if c.layout == 0 {
		c.layout = LayoutVersion
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c
}

// Peer is another meshd as the kernel path needs to know it.
type Peer struct {
	Name mesh.PeerName
	ID   mesh.ShortID  // 0: it has none, or its claim is in dispute
	Addr netip.Addr    // underlay address that its datagrams come from; invalid if there is no direct link
	Via  mesh.PeerName // the direct peer that leads to it; zero: itself
	// Refuse says why the kernel path must not be used with this peer ("encrypted"): nothing is sent to
	// it or accepted from it. Empty: it may be used.
	Refuse string
}

// Port is a local interface on the bridge.
type Port struct {
	Index  int            // of the host end
	MAC    mesh.MAC       // of the interface inside
	Addrs  []netip.Prefix // address and the length of its subnet
	Exempt bool           // foreign interface joined on purpose: not guarded
}

// PathStatus is the state of the kernel path to one peer.
type PathStatus struct {
	Peer   mesh.PeerName
	ID     mesh.ShortID
	Addr   netip.Addr    // where frames go: the peer's address or its relay's
	Via    mesh.PeerName // zero: direct
	Up     bool
	Reason string        // why it is not up; empty if it is
	RTT    time.Duration // of the last probe of full size
	Since  time.Time     // of the last change of Up
	Used   time.Duration // since the last frame sent to it; negative: none yet
}
