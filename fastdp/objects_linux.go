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
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// objects are the programs and maps of this meshd. The maps are pinned in <PinDir>/v<LayoutVersion>/;
// programs live by their hooks.
type objects struct {
	bpfObjects
	dir     string // the maps' pins
	adopted bool   // the maps were there, or were filled from those of another version
	lost    error  // why not all of those could be read
	reasons []string
}

func (o *objects) maps() map[string]*ebpf.Map {
	return map[string]*ebpf.Map{
		bpfMapConfig: o.Config, bpfMapPeers: o.Peers, bpfMapUnderlays: o.Underlays, bpfMapEndpoints: o.Endpoints,
		bpfMapPorts: o.Ports, bpfMapNetworks: o.Networks, bpfMapCounters: o.Counters, bpfMapOffences: o.Offences,
	}
}

func layoutDir(pinDir string, version int) string {
	return filepath.Join(pinDir, "v"+strconv.Itoa(version))
}

// layouts are the versions that have pins.
func layouts(pinDir string) (versions []int, err error) {
	entries, err := os.ReadDir(pinDir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if n, err := strconv.Atoi(strings.TrimPrefix(e.Name(), "v")); err == nil && e.Name()[0] == 'v' {
			versions = append(versions, n)
		}
	}
	return versions, nil
}

// openObjects loads the programs on the maps that are pinned, or on new ones. New maps take over what
// those of another layout hold, and get their final name only when they are complete: a meshd that dies
// in between leaves the old ones in force.
func openObjects(pinDir string, version int) (o *objects, err error) {
	spec, err := loadBpf()
	if err != nil {
		return nil, fmt.Errorf("embedded objects: %w", err)
	}
	o = &objects{dir: layoutDir(pinDir, version)}
	loaded := o // what to close: returning an error sets o to nil
	if o.reasons, err = reasonNames(spec); err != nil {
		return nil, err
	}
	pinned := make(map[string]*ebpf.Map)
	defer func() {
		for _, m := range pinned {
			m.Close() // the collection holds its own descriptors
		}
	}()
	unfinished := o.dir + "-new" // bpffs takes no dots
	if err := os.RemoveAll(unfinished); err != nil {
		return nil, err
	}
	for name, ms := range spec.Maps {
		m, err := ebpf.LoadPinnedMap(filepath.Join(o.dir, name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("pinned map %s: %w", name, err)
		}
		if err := ms.Compatible(m); err != nil {
			m.Close()
			if err := os.Remove(filepath.Join(o.dir, name)); err != nil {
				return nil, err
			}
			continue // counters of another build; the layout of the others is in the version
		}
		pinned[name] = m
	}
	if err := spec.LoadAndAssign(&o.bpfObjects, &ebpf.CollectionOptions{MapReplacements: pinned}); err != nil {
		return nil, explainLoad(err)
	}
	defer func() {
		if err != nil {
			loaded.Close()
		}
	}()
	o.adopted = pinned[bpfMapConfig] != nil
	if len(pinned) == len(spec.Maps) {
		return o, nil
	}
	dir := o.dir
	if len(pinned) == 0 {
		if err := os.RemoveAll(o.dir); err != nil {
			return nil, err
		}
		dir = unfinished
		o.adopted, o.lost = o.migrate(pinDir, version)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := o.pin(dir); err != nil {
		return nil, err
	}
	if dir != o.dir {
		if err := os.Rename(dir, o.dir); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// pin puts back the pins that are missing in dir.
func (o *objects) pin(dir string) error {
	for name, m := range o.maps() {
		path := filepath.Join(dir, name)
		if _, err := os.Lstat(path); err == nil {
			continue
		}
		// Through a second descriptor: a map that believes itself pinned elsewhere would be moved.
		c, err := m.Clone()
		if err != nil {
			return err
		}
		if err = c.Pin(path); errors.Is(err, unix.EEXIST) {
			err = nil
		}
		c.Close()
		if err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	return nil
}

// explainLoad names what keeps the kernel from taking maps and programs.
func explainLoad(err error) error {
	why := "programs refused"
	switch {
	case errors.Is(err, unix.EPERM):
		why = "bpf(2) not permitted: kernel lockdown, a container's seccomp filter, or missing CAP_BPF and CAP_NET_ADMIN"
	case errors.Is(err, unix.ENOSYS):
		why = "kernel built without CONFIG_BPF_SYSCALL"
	case errors.Is(err, ebpf.ErrNotSupported):
		why = "kernel older than 6.1"
	}
	return fmt.Errorf("%w: %s: %w", ErrNotSupported, why, err)
}

// reasonNames are the names of enum reason, in lower case, by value.
func reasonNames(spec *ebpf.CollectionSpec) ([]string, error) {
	var e *btf.Enum
	if err := spec.Types.TypeByName("reason", &e); err != nil {
		return nil, fmt.Errorf("embedded objects: %w", err)
	}
	names := make([]string, bpfReasonREASONS)
	for _, v := range e.Values {
		if v.Value < uint64(len(names)) {
			names[v.Value] = strings.ToLower(v.Name)
		}
	}
	return names, nil
}

// repairPins puts the directories and pins back that somebody removed, and the lock with them.
func (d *Datapath) repairPins() error {
	locked, err := d.lock.Stat()
	if err != nil {
		return err
	}
	if now, err := os.Stat(d.cfg.PinDir); err != nil || !os.SameFile(now, locked) {
		lock, err := preparePinDir(d.cfg.PinDir)
		if err != nil {
			return err
		}
		d.lock.Close()
		d.lock = lock
	}
	if err := os.MkdirAll(d.obj.dir, 0o700); err != nil {
		return err
	}
	return d.obj.pin(d.obj.dir)
}
