package hostnet

import (
	"fmt"

	"github.com/vishvananda/netlink"
)

// Check tells what would stand in the way of EnsureBridge and OpenTAP, and changes nothing.
func (h *Host) Check() error {
	if err := tunUsable(); err != nil {
		return fmt.Errorf("TAP %s: %w", h.cfg.TAP, err)
	}
	br, err := h.link(h.cfg.Bridge)
	if err != nil {
		return err
	}
	if _, ok := br.(*netlink.Bridge); br != nil && !ok {
		return fmt.Errorf("bridge %s: %w", h.cfg.Bridge, wrongKind(br, "a bridge", otherBridge))
	}
	tap, err := h.link(h.cfg.TAP)
	if err != nil || tap == nil {
		return err
	}
	if _, err := checkTAP(tap); err != nil {
		return fmt.Errorf("TAP %s: %w", h.cfg.TAP, err)
	}
	return nil
}
