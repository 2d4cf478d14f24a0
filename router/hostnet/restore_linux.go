package hostnet

import (
	"errors"
	"net"

	"github.com/vishvananda/netlink"
)

// Restore puts back what State.Missing tells of: it makes the bridge if somebody removed it, gives devices
// their names back, and puts the TAP and the ports onto it again. A TAP that is gone is for ReopenTAP.
func (h *Host) Restore(want BridgeSpec) error {
	if _, err := h.EnsureBridge(want); err != nil {
		return err
	}
	br, err := h.bridge()
	if err != nil {
		return err
	}
	if _, err := h.named(h.cfg.TAP, aliasPrefix+h.cfg.TAP); err != nil {
		return err
	}
	all, err := h.links()
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range all {
		veth, isVeth := l.(*netlink.Veth)
		_, isTAP := l.(*netlink.Tuntap)
		port := isVeth && h.isPort(veth) && veth.Flags&net.FlagUp != 0 // or it is being made
		if !port && !(isTAP && l.Attrs().Name == h.cfg.TAP) || l.Attrs().MasterIndex == br.Index {
			continue
		}
		if err := h.enslave(l, br); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
