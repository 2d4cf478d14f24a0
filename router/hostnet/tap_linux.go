package hostnet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/songgao/water"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tunDevice is where TAP devices come from; a variable for the test of its absence.
var tunDevice = "/dev/net/tun"

// Offload says what a TAP takes and gives beyond plain frames. Missing says what this kernel refused and why.
type Offload struct {
	VNetHdr  bool   // real virtio headers; without them they are made up and none of the rest is true
	Checksum bool   // checksums may be left to the reader (TUN_F_CSUM)
	TSO      bool   // TCP superframes, both families, with ECN
	USO      bool   // UDP superframes, both families (Linux 6.2)
	Missing  string // empty when nothing is missing
}

// TAP is the device through which frames pass between the bridge and meshd.
type TAP struct {
	Name    string
	Index   int
	Offload Offload
	queues  []*Queue
}

// Queues are the TAP's queues; each may be read by one goroutine and written by any.
func (t *TAP) Queues() []*Queue { return t.queues }

// Close closes the queues; the device and its place on the bridge stay, so that a restart finds them.
func (t *TAP) Close() error {
	var errs []error
	for _, q := range t.queues {
		errs = append(errs, q.Close())
	}
	return errors.Join(errs...)
}

// OpenTAP makes or adopts the persistent multi-queue TAP device on the bridge, with the bridge's MTU,
// and opens so many queues of it. It is an error if another process has queues open.
func (h *Host) OpenTAP(queues int) (*TAP, error) {
	t, err := h.openTAP(queues)
	if err != nil {
		return nil, fmt.Errorf("TAP %s: %w", h.cfg.TAP, err)
	}
	return t, nil
}

// ReopenTAP makes the device anew if somebody removed it, which takes the descriptors of its queues with it.
// The queues stay the same: what failed at them meanwhile works again. It is for one goroutine at a time.
func (h *Host) ReopenTAP(t *TAP) error {
	l, err := h.link(h.cfg.TAP)
	if err != nil {
		return fmt.Errorf("TAP %s: %w", h.cfg.TAP, err)
	}
	if l != nil && l.Attrs().Index == t.Index {
		return nil
	}
	fresh, err := h.OpenTAP(len(t.queues))
	if err != nil {
		return err
	}
	for i, q := range t.queues {
		q.replace(fresh.queues[i])
	}
	t.Index = fresh.Index
	return nil
}

func (h *Host) openTAP(queues int) (*TAP, error) {
	if queues < 1 || queues > 256 { // MAX_TAP_QUEUES
		return nil, fmt.Errorf("%d queues: must be 1 to 256", queues)
	}
	br, err := h.bridge()
	if err != nil {
		return nil, err
	}
	dev, err := h.ensureTAP()
	if err != nil {
		return nil, err
	}
	if dev.MTU != br.MTU {
		if err := h.nl.LinkSetMTU(dev, br.MTU); err != nil {
			return nil, fmt.Errorf("set MTU to %d: %w", br.MTU, err)
		}
	}
	if dev.Alias == "" {
		if err := h.nl.LinkSetAlias(dev, aliasPrefix+dev.Name); err != nil {
			return nil, fmt.Errorf("set alias: %w", err)
		}
	}
	t := &TAP{Name: dev.Name, Index: dev.Index}
	err = inNamespace(h.ns, func() error {
		for range queues {
			q, offload, err := openQueue(dev.Name)
			if err != nil {
				return fmt.Errorf("open queue %d of %d: %w", len(t.queues)+1, queues, err)
			}
			t.queues, t.Offload = append(t.queues, q), offload
		}
		return nil
	})
	if err == nil {
		err = h.enslave(dev, br)
	}
	if err == nil {
		err = awaitCarrier(h.nl, dev)
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	if t.Offload.Missing != "" {
		h.log.Info("TAP without some offloads", "missing", t.Offload.Missing)
	}
	return t, nil
}

// ensureTAP makes the device, or checks the one that exists.
func (h *Host) ensureTAP() (*netlink.Tuntap, error) {
	l, err := h.link(h.cfg.TAP)
	if err != nil {
		return nil, err
	}
	if l == nil {
		if err := h.createTAP(); err != nil {
			return nil, err
		}
		if l, err = h.link(h.cfg.TAP); err != nil {
			return nil, err
		}
		if l == nil {
			return nil, errors.New("vanished while it was made")
		}
	}
	return checkTAP(l)
}

// checkTAP tells a TAP that can be ours from everything else.
func checkTAP(l netlink.Link) (*netlink.Tuntap, error) {
	dev, ok := l.(*netlink.Tuntap)
	switch {
	case !ok || dev.Mode != netlink.TUNTAP_MODE_TAP:
		return nil, wrongKind(l, "a TAP", otherTAP)
	case dev.Flags&netlink.TUNTAP_MULTI_QUEUE == 0:
		return nil, fmt.Errorf("device %s exists and is a TAP with a single queue: %s", dev.Name, otherTAP)
	case dev.NonPersist || dev.Queues+dev.DisabledQueues > 0:
		return nil, fmt.Errorf("device %s is in use by another process", dev.Name)
	}
	return dev, nil
}

// createTAP has water make the persistent device. It cannot ask for virtio headers; TUNSETIFF takes that
// flag whenever a queue is opened, so the queue that comes with the making is closed again.
func (h *Host) createTAP() error {
	if err := tunUsable(); err != nil {
		return err
	}
	return inNamespace(h.ns, func() error {
		dev, err := water.New(water.Config{
			DeviceType: water.TAP,
			PlatformSpecificParams: water.PlatformSpecificParams{
				Name: h.cfg.TAP, Persist: true, MultiQueue: true,
			},
		})
		if err != nil {
			return fmt.Errorf("create: %w", err)
		}
		return dev.Close()
	})
}

// tunUsable tells why there is no TAP to be had on this host, as an ErrNoTun.
func tunUsable() error {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		return unix.Close(fd)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: it is missing; load the module tun, or give the container --device %s", ErrNoTun, tunDevice)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: the kernel has no tun driver; load the module tun", ErrNoTun)
	}
	return fmt.Errorf("%w: %w", ErrNoTun, err)
}

// openQueue opens a queue of an existing device with virtio headers and the most offloads that it takes.
func openQueue(name string) (*Queue, Offload, error) {
	var o Offload
	if err := tunUsable(); err != nil {
		return nil, o, err
	}
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, o, fmt.Errorf("%w: %w", ErrNoTun, err)
	}
	const flags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_MULTI_QUEUE
	o.VNetHdr = true
	if err := setIff(fd, name, flags|unix.IFF_VNET_HDR); errors.Is(err, unix.EINVAL) {
		o.VNetHdr = false
		if err := setIff(fd, name, flags); err != nil {
			unix.Close(fd)
			return nil, o, fmt.Errorf("TUNSETIFF: %w", err)
		}
		o.Missing = "virtio headers"
	} else if err != nil {
		unix.Close(fd)
		return nil, o, fmt.Errorf("TUNSETIFF: %w", err)
	}
	if o.VNetHdr {
		setOffload(func(bits int) error { return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, bits) }, &o)
	}
	// A file that is blocking when it is made stays away from Go's poller.
	err = unix.SetNonblock(fd, false)
	file := os.NewFile(uintptr(fd), tunDevice)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	var q *Queue
	if err == nil {
		q, err = newQueue(file, o.VNetHdr)
	}
	if err != nil {
		return nil, o, errors.Join(err, file.Close())
	}
	return q, o, nil
}

func setIff(fd int, name string, flags uint16) error {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(flags)
	return unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
}

// Offload bits of TUNSETOFFLOAD (linux/if_tun.h).
const (
	tunCsum   = 0x01
	tunTSO4   = 0x02
	tunTSO6   = 0x04
	tunTSOECN = 0x08
	tunUSO4   = 0x20
	tunUSO6   = 0x40
)

// setOffload tries ever fewer offloads until the kernel agrees, and writes down which.
func setOffload(try func(bits int) error, o *Offload) {
	const tso = tunCsum | tunTSO4 | tunTSO6 | tunTSOECN
	var missing []string
	for _, step := range []struct {
		bits    int
		without string
		granted Offload
	}{
		{tso | tunUSO4 | tunUSO6, "UDP segmentation", Offload{Checksum: true, TSO: true, USO: true}},
		{tso, "TCP segmentation", Offload{Checksum: true, TSO: true}},
		{tunCsum, "checksums", Offload{Checksum: true}},
		{0, "offload settings", Offload{}},
	} {
		err := try(step.bits)
		if err == nil {
			o.Checksum, o.TSO, o.USO = step.granted.Checksum, step.granted.TSO, step.granted.USO
			break
		}
		missing = append(missing, fmt.Sprintf("%s (%v)", step.without, err))
	}
	o.Missing = strings.Join(missing, ", ")
}
