package dns

import (
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Access is what a client may have.
type Access uint8

const (
	Refuse Access = iota // nothing
	Names                // names of the mesh, and no packet leaves the host for it
	Full                 // forwarded questions too
)

// Interfaces decides by the interface that a query came in on. Loopback serves the host itself. A bridge of
// ours or of Docker's serves the containers on it if the source is an address of that bridge's subnets, so
// that a spoofed one gets nothing. All other interfaces, the host's uplinks above all, get nothing.
type Interfaces struct {
	bridges  []string
	isolated func(bridge string) bool

	known atomic.Pointer[map[int]hostInterface]

	look   sync.Mutex // one look at a time; guards looked
	looked time.Time
}

type hostInterface struct {
	bridge   string // its name if it is a bridge that is served
	loopback bool
	subnets  []netip.Prefix
}

// Looking at the interfaces costs about a millisecond, and what makes us look may be hostile.
const lookEvery = 250 * time.Millisecond

// NewInterfaces serves the named bridges beside Docker's: docker0, docker_gwbridge and br-<twelve digits>.
// isolated, which may be nil, tells of a bridge whose containers have no business outside: they get names
// of the mesh only (CVE-2024-29018 is what happens otherwise). It is asked with every query that comes by a
// bridge and must not block.
func NewInterfaces(bridges []string, isolated func(bridge string) bool) *Interfaces {
	if isolated == nil {
		isolated = func(string) bool { return false }
	}
	return &Interfaces{bridges: bridges, isolated: isolated}
}

func (i *Interfaces) serves(name string) bool {
	for _, b := range i.bridges {
		if name == b {
			return true
		}
	}
	if id, is := strings.CutPrefix(name, "br-"); is {
		return len(id) == 12 && strings.Trim(id, "0123456789abcdef") == ""
	}
	return name == "docker0" || name == "docker_gwbridge"
}

// Access says what a query from src that came in on interface index may have. Index 0 means that the
// interface is unknown but that the source is proven, as it is for a TCP connection.
func (i *Interfaces) Access(src netip.Addr, index int) Access {
	src = src.Unmap()
	a, sure := i.judge(src, index)
	if !sure {
		i.refresh()
		a, _ = i.judge(src, index)
	}
	return a
}

// judge is sure unless a newer look at the interfaces may say otherwise.
func (i *Interfaces) judge(src netip.Addr, index int) (a Access, sure bool) {
	known := i.known.Load()
	if known == nil {
		return Refuse, false
	}
	if index != 0 {
		h, found := (*known)[index]
		if !found {
			return Refuse, false
		}
		return i.judgeBy(h, src)
	}
	best := Refuse
	for _, h := range *known {
		// A proven source on loopback is one of the host's own addresses.
		if a, _ := i.judgeBy(h, src); a > best && (!h.loopback || src.IsLoopback()) {
			best = a
		} else if h.owns(src) {
			best = Full
		}
	}
	return best, best != Refuse
}

func (i *Interfaces) judgeBy(h hostInterface, src netip.Addr) (Access, bool) {
	if h.loopback {
		return Full, true
	}
	if h.bridge == "" {
		return Refuse, true
	}
	for _, p := range h.subnets {
		if !p.Contains(src) {
			continue
		}
		if i.isolated(h.bridge) {
			return Names, true
		}
		return Full, true
	}
	return Refuse, false
}

func (h *hostInterface) owns(src netip.Addr) bool {
	for _, p := range h.subnets {
		if p.Addr() == src {
			return true
		}
	}
	return false
}

// refresh reads the interfaces again unless that was done a moment ago. A look that is under way is
// waited for.
func (i *Interfaces) refresh() {
	i.look.Lock()
	defer i.look.Unlock()
	if now := time.Now(); i.looked.IsZero() || now.Sub(i.looked) >= lookEvery {
		i.looked = now
		_ = i.refreshLocked() // what was known before still counts
	}
}

// refreshLocked reads the host's interfaces.
func (i *Interfaces) refreshLocked() error {
	all, err := net.Interfaces()
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	known := make(map[int]hostInterface, len(all))
	for _, ifc := range all {
		h := hostInterface{loopback: ifc.Flags&net.FlagLoopback != 0}
		// Somebody may name a network card like a bridge.
		if drv, err := unix.IoctlGetEthtoolDrvinfo(fd, ifc.Name); err == nil && i.serves(ifc.Name) && unix.ByteSliceToString(drv.Driver[:]) == "bridge" {
			h.bridge = ifc.Name
		}
		addrs, err := ifc.Addrs()
		if err != nil {
			continue // it went meanwhile
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				h.subnets = append(h.subnets, p)
			}
		}
		known[ifc.Index] = h
	}
	i.known.Store(&known)
	return nil
}
