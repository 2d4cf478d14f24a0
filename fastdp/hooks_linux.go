package fastdp

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// hook is a program at one side of one interface.
type hook struct {
	program string // its name in bpf/fastdp.c
	ifindex int
}

func (h hook) ingress() bool { return h.program != bpfProgPortOut && h.program != bpfProgBridgeOut }

// attachType: tcx runs before clsact, and its links are pinned.
func (h hook) attachType() ebpf.AttachType {
	if h.ingress() {
		return ebpf.AttachTCXIngress
	}
	return ebpf.AttachTCXEgress
}

// hooks attaches programs. With tcx each hook is a link, pinned as <PinDir>/links/<program>-<ifindex>;
// with clsact it is a filter, which lives as long as its interface.
type hooks struct {
	dir    string
	clsact bool // kernel before 6.6
	links  map[hook]link.Link
}

func openHooks(pinDir string, clsact bool) (*hooks, error) {
	h := &hooks{dir: filepath.Join(pinDir, "links"), clsact: clsact, links: make(map[hook]link.Link)}
	return h, os.MkdirAll(h.dir, 0o700)
}

func (h *hooks) pinOf(k hook) string {
	return filepath.Join(h.dir, k.program+"-"+strconv.Itoa(k.ifindex))
}

// pinned are the hooks that have pins, of this meshd or an earlier one.
func (h *hooks) pinned() (found []hook) {
	entries, _ := os.ReadDir(h.dir)
	for _, e := range entries {
		program, index, _ := strings.Cut(e.Name(), "-")
		if n, err := strconv.Atoi(index); err == nil {
			found = append(found, hook{program, n})
		}
	}
	return found
}

// ensure brings about that the program runs at the hook, and nothing older in its place. A program that
// already runs there is replaced without a frame in between. changed: it was not so before.
func (h *hooks) ensure(k hook, prog *ebpf.Program) (changed bool, err error) {
	if !h.clsact {
		changed, err = h.ensureLink(k, prog)
		if !errors.Is(err, ebpf.ErrNotSupported) {
			return changed, err
		}
		h.clsact = true
	}
	return h.ensureFilter(k, prog)
}

func (h *hooks) ensureLink(k hook, prog *ebpf.Program) (changed bool, err error) {
	l := h.links[k]
	if l == nil {
		if l, err = link.LoadPinnedLink(h.pinOf(k), nil); err == nil {
			h.links[k] = l
		}
	}
	if l != nil {
		id, err := programID(prog)
		if err != nil {
			return false, err
		}
		if info, err := l.Info(); err == nil && info.TCX() != nil && info.TCX().Ifindex == uint32(k.ifindex) {
			if info.Program != id {
				if err := l.Update(prog); err != nil {
					return false, fmt.Errorf("replace %s: %w", k.program, err)
				}
				changed = true
			}
			return changed, h.pinLink(k, l)
		}
		// Detached by hand, or its interface has gone and another one got the index.
		h.forget(k)
	}
	if l, err = link.AttachTCX(link.TCXOptions{Interface: k.ifindex, Program: prog, Attach: k.attachType()}); err != nil {
		return false, fmt.Errorf("attach %s: %w", k.program, err)
	}
	h.links[k] = l
	return true, h.pinLink(k, l)
}

func (h *hooks) pinLink(k hook, l link.Link) error {
	if _, err := os.Lstat(h.pinOf(k)); err == nil {
		return nil
	}
	if err := os.MkdirAll(h.dir, 0o700); err != nil {
		return err
	}
	// Through a descriptor that knows of no pin: one that does believes that it is still there.
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("pin %s: %w", k.program, err)
	}
	fresh, err := link.NewFromID(info.ID)
	if err != nil {
		return fmt.Errorf("pin %s: %w", k.program, err)
	}
	defer fresh.Close()
	if err := fresh.Pin(h.pinOf(k)); err != nil {
		return fmt.Errorf("pin %s: %w", k.program, err)
	}
	return nil
}

func programID(p *ebpf.Program) (ebpf.ProgramID, error) {
	info, err := p.Info()
	if err != nil {
		return 0, err
	}
	id, _ := info.ID()
	return id, nil
}

// forget drops the pin and the descriptor; the kernel detaches a link that nobody holds.
func (h *hooks) forget(k hook) {
	if l := h.links[k]; l != nil {
		l.Close()
		delete(h.links, k)
	}
	os.Remove(h.pinOf(k))
}

// remove detaches. An interface that has gone is no error.
func (h *hooks) remove(k hook) error {
	h.forget(k)
	if h.clsact {
		return removeFilter(k)
	}
	return nil
}

// removeAll detaches every hook that has a pin, and those given.
func (h *hooks) removeAll(more []hook) error {
	var errs []error
	for _, k := range append(h.pinned(), more...) {
		h.forget(k)
		errs = append(errs, removeFilter(k))
	}
	if err := os.Remove(h.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (h *hooks) close() {
	for _, l := range h.links {
		l.Close()
	}
	clear(h.links)
}

// The number under which our clsact filters are known on an interface.
const (
	filterPriority = 0x6d65
	filterHandle   = 1
)

func filterParent(k hook) uint32 {
	if k.ingress() {
		return netlink.HANDLE_MIN_INGRESS
	}
	return netlink.HANDLE_MIN_EGRESS
}

func clsactOf(ifindex int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
}

func (h *hooks) ensureFilter(k hook, prog *ebpf.Program) (changed bool, err error) {
	id, err := programID(prog)
	if err != nil {
		return false, err
	}
	if f := findFilter(k); f != nil && f.Id == int(id) {
		return false, nil
	}
	if err := netlink.QdiscAdd(clsactOf(k.ifindex)); err != nil && !errors.Is(err, unix.EEXIST) {
		return false, fmt.Errorf("attach %s: clsact: %w", k.program, err)
	}
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: k.ifindex, Parent: filterParent(k), Handle: filterHandle,
			Protocol: unix.ETH_P_ALL, Priority: filterPriority},
		Fd: prog.FD(), Name: k.program, DirectAction: true,
	}
	if err := netlink.FilterReplace(f); err != nil {
		return false, fmt.Errorf("attach %s: filter: %w", k.program, err)
	}
	return true, nil
}

func findFilter(k hook) *netlink.BpfFilter {
	l, err := netlink.LinkByIndex(k.ifindex)
	if err != nil {
		return nil
	}
	filters, err := netlink.FilterList(l, filterParent(k))
	if err != nil {
		return nil
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Priority == filterPriority {
			return b
		}
	}
	return nil
}

// removeFilter takes the filter away, and the qdisc when it was the last one.
func removeFilter(k hook) error {
	f := findFilter(k)
	if f == nil {
		return nil
	}
	if err := netlink.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("detach %s: %w", k.program, err)
	}
	l, err := netlink.LinkByIndex(k.ifindex)
	if err != nil {
		return nil
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		if rest, err := netlink.FilterList(l, parent); err != nil || len(rest) > 0 {
			return nil
		}
	}
	if err := netlink.QdiscDel(clsactOf(k.ifindex)); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("detach %s: clsact: %w", k.program, err)
	}
	return nil
}

// runs reports whether a program of ours, of whatever version, is in force at the hook.
func (h *hooks) runs(k hook) bool {
	if l, err := link.LoadPinnedLink(h.pinOf(k), nil); err == nil {
		defer l.Close()
		info, err := l.Info()
		return err == nil && info.TCX() != nil && info.TCX().Ifindex == uint32(k.ifindex)
	}
	return findFilter(k) != nil
}
