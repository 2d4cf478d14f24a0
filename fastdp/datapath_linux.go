package fastdp

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

const (
	tickEvery      = 50 * time.Millisecond
	usedEveryRead  = 250 * time.Millisecond // how often the peers' stamps are read
	reconcileEvery = 500 * time.Millisecond
	inUseFor       = time.Second
	relayedFor     = 10 * time.Second // after a peer became direct, frames may still come by relays
)

// Datapath is the kernel path of this host. Its methods may be called from any goroutine; each says what
// should be, and the difference to what is goes into the maps before it returns. mu is held across those
// system calls: it orders the changes, and no frame ever waits for it.
type Datapath struct {
	cfg   Config
	log   *slog.Logger
	lock  *os.File
	obj   *objects
	hooks *hooks

	mu        sync.Mutex
	closed    bool
	opened    time.Time
	settled   bool
	faults    map[string]string // what went wrong last in each thing done; entries go when it works
	rounds    int               // of reconcile
	self      mesh.PeerName
	selfID    mesh.ShortID // as SetSelf said last
	told      []Peer       // as SetPeers said last
	peers     map[mesh.PeerName]*peerState
	byID      map[mesh.ShortID]*peerState
	endpoints map[mesh.MAC]mesh.Endpoint
	announced map[mesh.MAC]time.Time // local endpoints: since when others are being told
	ports     map[int]Port
	veth      map[int]bool // ports that are veth pairs
	whole     map[int]bool // ports that AttachPort has finished
	nets      networks
	prober    *prober
	routes    *os.File // says when routes change
	joined    int      // index of the device that joined_in runs on
	stampsAt  time.Time
	kernel    mirror
}

// mirror is what the maps hold, stamps aside.
type mirror struct {
	config    bpfConfig
	peers     [maxPeers]bpfPeer
	underlays map[bpfUnderlayKey]uint32
	endpoints map[uint64]bpfEndpoint
	ports     map[uint32]bpfPort
	networks  [maxNetworks]netip.Prefix
}

type peerState struct {
	Peer                    // as it is in force
	told         Peer       // as SetPeers said last
	to           netip.Addr // where frames go; invalid: nowhere
	path         *path
	refused      string    // why there is no path at all
	relayedUntil time.Time // its frames may come from other peers' addresses
	used         uint64    // the kernel's stamp, ns of CLOCK_MONOTONIC
	device       int       // by which its datagrams come in; 0: not known
	local        netip.Addr
	routedFor    netip.Addr // and for which address of the peer that was found out,
	routedAt     time.Time  // when
}

// Open loads the programs and attaches those of the bridge, the TAP and the vxlan device. What an earlier
// meshd left pinned is adopted as it is and goes on without a gap; call Settle when peers, endpoints and
// ports are told again. The error wraps ErrNotSupported if this kernel or host cannot do it, and ErrBusy
// if another meshd does it already.
func Open(cfg Config) (*Datapath, error) {
	cfg = cfg.withDefaults()
	lock, err := preparePinDir(cfg.PinDir)
	if err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENODEV) {
			err = fmt.Errorf("%w: no bpffs: %w", ErrNotSupported, err)
		}
		return nil, fmt.Errorf("kernel path: %w", err)
	}
	d := &Datapath{
		cfg: cfg, log: cfg.Log, lock: lock, opened: time.Now(),
		peers:     make(map[mesh.PeerName]*peerState),
		endpoints: make(map[mesh.MAC]mesh.Endpoint),
		announced: make(map[mesh.MAC]time.Time),
		ports:     make(map[int]Port),
		veth:      make(map[int]bool),
		whole:     make(map[int]bool),
		faults:    make(map[string]string),
	}
	if err := d.open(); err != nil {
		d.Close()
		return nil, fmt.Errorf("kernel path: %w", err)
	}
	return d, nil
}

func (d *Datapath) open() (err error) {
	if d.obj, err = openObjects(d.cfg.PinDir, d.cfg.layout); err != nil {
		return err
	}
	if d.obj.lost != nil {
		d.log.Warn("kernel path begins anew, the state of another version could not be read", "err", d.obj.lost)
	}
	if d.hooks, err = openHooks(d.cfg.PinDir, d.cfg.clsact); err != nil {
		return err
	}
	if d.routes, err = openRoutes(); err != nil {
		return err
	}
	if err := d.readKernel(); err != nil {
		return err
	}
	d.adoptPorts()
	if d.cfg.GuardOnly {
		if err := errors.Join(removeVXLAN(d.cfg.VXLAN), removeJoin(d.cfg.VXLAN)); err != nil {
			return err
		}
	}
	if err := d.applyPeers(time.Now()); err != nil {
		return err
	}
	if err := d.reconcileLocked(); err != nil {
		if !d.obj.adopted {
			d.removeLocked()
		}
		return err
	}
	return d.dropOtherLayouts()
}

// Close lets go of everything and leaves it working: frames go on as they did. It may be called twice.
func (d *Datapath) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.closeLocked()
}

func (d *Datapath) closeLocked() error {
	if d.closed {
		return nil
	}
	d.closed = true
	d.closeProber()
	if d.hooks != nil {
		d.hooks.close()
	}
	var err error
	if d.obj != nil {
		err = d.obj.Close()
	}
	if d.routes != nil {
		err = errors.Join(err, d.routes.Close())
	}
	return errors.Join(err, d.lock.Close())
}

// Remove closes and takes away every trace: programs, maps, pins and the vxlan device.
func (d *Datapath) Remove() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	err := d.removeLocked()
	return errors.Join(err, d.closeLocked())
}

func (d *Datapath) removeLocked() error {
	var more []hook
	for index, p := range d.ports {
		more = append(more, hook{bpfProgPortIn, index}, hook{bpfProgPortOut, index})
		if !p.Exempt {
			unsettle(index, p.MAC)
		}
	}
	c := d.kernel.config
	for _, index := range []uint32{c.Bridge, c.Tap} {
		if index != 0 {
			more = append(more, hook{bpfProgBridgeOut, int(index)})
		}
	}
	if c.Vxlan != 0 {
		more = append(more, hook{bpfProgVxIn, int(c.Vxlan)})
	}
	return errors.Join(d.hooks.removeAll(more), removeVXLAN(d.cfg.VXLAN), removeJoin(d.cfg.VXLAN), removePins(d.cfg.PinDir))
}

func removePins(dir string) error {
	entries, err := filepath.Glob(filepath.Join(dir, "v*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range append(entries, filepath.Join(dir, "links"), dir) {
		errs = append(errs, os.RemoveAll(e))
	}
	return errors.Join(errs...)
}

// Remove takes away every trace that a meshd with this configuration left, without one running.
func Remove(cfg Config) error {
	cfg = cfg.withDefaults()
	if _, err := os.Stat(cfg.PinDir); errors.Is(err, fs.ErrNotExist) {
		return errors.Join(removeVXLAN(cfg.VXLAN), removeJoin(cfg.VXLAN))
	}
	lock, err := preparePinDir(cfg.PinDir)
	if err != nil {
		return fmt.Errorf("remove kernel path: %w", err)
	}
	defer lock.Close()
	h := &hooks{dir: filepath.Join(cfg.PinDir, "links")}
	var more []hook
	if m, err := ebpf.LoadPinnedMap(filepath.Join(layoutDir(cfg.PinDir, cfg.layout), bpfMapPorts), nil); err == nil {
		var index uint32
		var v bpfPort
		for it := m.Iterate(); it.Next(&index, &v); {
			more = append(more, hook{bpfProgPortIn, int(index)}, hook{bpfProgPortOut, int(index)})
			unsettle(int(index), keyMAC(v.Mac))
		}
		m.Close()
	}
	for _, name := range []string{cfg.Bridge, cfg.TAP} {
		if index := indexOf(name); index != 0 {
			more = append(more, hook{bpfProgBridgeOut, index})
		}
	}
	return errors.Join(h.removeAll(more), removeVXLAN(cfg.VXLAN), removeJoin(cfg.VXLAN), removePins(cfg.PinDir))
}
