package hostnet

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Overlap is a route of the host that an address range of the mesh would hide, and a range that is free.
type Overlap struct {
	Range netip.Prefix
	Route Route
	Free  netip.Prefix // not valid if no private range is free
}

func (o *Overlap) Error() string {
	s := fmt.Sprintf("address range %v overlaps with the route %v on %s", o.Range, o.Route.Dst, o.Route.Device)
	if o.Free.IsValid() {
		s += fmt.Sprintf("; %v is free", o.Free)
	}
	return s
}

// CheckOverlap looks for a route of the host that overlaps r, and returns it as an *Overlap. Routes over
// the mesh bridge do not count.
func (h *Host) CheckOverlap(r netip.Prefix) error {
	routes, err := h.routes()
	if err != nil {
		return err
	}
	hit, ok := conflict(r, routes)
	if !ok {
		return nil
	}
	o := &Overlap{Range: r, Route: hit}
	o.Free, _ = freeRange(routes)
	return o
}

// routes lists the host's main routes except those over the mesh bridge.
func (h *Host) routes() ([]Route, error) {
	names := map[int]string{}
	all, err := h.links()
	if err != nil {
		return nil, err
	}
	for _, l := range all {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	var list []netlink.Route
	for range 5 {
		list, err = h.nl.RouteList(nil, unix.AF_UNSPEC)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var routes []Route
	for _, r := range list {
		dst, ok := prefixOf(r.Dst)
		if !ok || names[r.LinkIndex] == h.cfg.Bridge {
			continue
		}
		routes = append(routes, Route{Dst: dst, Device: names[r.LinkIndex]})
	}
	return routes, nil
}
