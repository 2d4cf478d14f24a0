package hostnet

import (
	"net"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
)

// judge reads off a list of all devices what concerns the mesh.
func (h *Host) judge(all []netlink.Link) (s State) {
	bridge := 0
	for _, l := range all {
		if _, ok := l.(*netlink.Bridge); ok && l.Attrs().Name == h.cfg.Bridge {
			bridge = l.Attrs().Index
		}
	}
	tap := false
	for _, l := range all {
		a := l.Attrs()
		veth, isVeth := l.(*netlink.Veth)
		switch {
		case isVeth && h.isPort(veth):
			s.Ports = append(s.Ports, a.Name)
			// A port that is down is being made: it comes up when it is on the bridge.
			if bridge == 0 || a.MasterIndex != bridge && a.Flags&net.FlagUp != 0 {
				s.Missing = append(s.Missing, a.Name)
			}
		case h.isDockerBridge(l):
			s.Docker = append(s.Docker, a.Name)
		case bridge == 0 || a.MasterIndex != bridge:
		case a.Name == h.cfg.TAP:
			tap = true
		case a.Name != h.cfg.VXLAN:
			s.Foreign = append(s.Foreign, a.Name)
		}
	}
	if bridge == 0 {
		s.Missing = append(s.Missing, h.cfg.Bridge)
	}
	if !tap {
		s.Missing = append(s.Missing, h.cfg.TAP)
	}
	slices.Sort(s.Missing)
	slices.Sort(s.Ports)
	slices.Sort(s.Docker)
	slices.Sort(s.Foreign)
	return s
}

// isDockerBridge recognises docker0 and the bridges of Docker's other networks: br- and 12 hex digits.
func (h *Host) isDockerBridge(l netlink.Link) bool {
	if _, ok := l.(*netlink.Bridge); !ok {
		return false
	}
	name := l.Attrs().Name
	id, ok := strings.CutPrefix(name, "br-")
	return name == h.cfg.DockerBridge || ok && len(id) == 12 && strings.Trim(id, "0123456789abcdef") == ""
}
