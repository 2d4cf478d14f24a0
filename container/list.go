package container

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"meshd/mesh"
)

// Attached is one interface as `ps` shows it.
type Attached struct {
	ID        string // container id or the like, or mesh.OwnerExpose
	Name      string // the container's, if it is known
	MAC       mesh.MAC
	Addresses []netip.Prefix
}

// List returns the given ones, or with none given the host (even without an address) and all that is
// attached now. What is not attached is left out.
func (m *Manager) List(ctx context.Context, targets []string) ([]Attached, error) {
	ports, err := m.cfg.Network.Ports()
	if err != nil {
		return nil, err
	}
	byOwner := map[string]Attached{}
	for _, p := range ports {
		r, ok := m.record(p.Owner)
		if !ok {
			continue
		}
		a := Attached{ID: p.Owner, Name: r.Name, MAC: p.MAC, Addresses: p.Addrs}
		if a.MAC.IsZero() {
			a.MAC, a.Addresses = r.MAC, r.held()
		}
		byOwner[p.Owner] = a
	}
	if mac, addrs, err := m.cfg.Bridge.Bridge(); err == nil {
		byOwner[mesh.OwnerExpose] = Attached{ID: mesh.OwnerExpose, MAC: mac, Addresses: addrs}
	}
	var out []Attached
	if len(targets) == 0 {
		for _, a := range byOwner {
			out = append(out, a)
		}
		slices.SortFunc(out, func(a, b Attached) int {
			// The host first: its id sorts after hexadecimal ones.
			if (a.ID == mesh.OwnerExpose) != (b.ID == mesh.OwnerExpose) {
				if a.ID == mesh.OwnerExpose {
					return -1
				}
				return 1
			}
			return strings.Compare(a.ID, b.ID)
		})
		return out, nil
	}
	for _, text := range targets {
		owner := text
		if text != mesh.OwnerExpose {
			if owner, err = m.locate(ctx, text); err != nil {
				continue
			}
		}
		if a, ok := byOwner[owner]; ok {
			out = append(out, a)
		}
	}
	return out, nil
}

// Ports lists the attached ports for those who guard them: with the MAC address and the addresses that were
// given to them, whatever the container has made of that since.
func (m *Manager) Ports() ([]mesh.Port, error) {
	ports, err := m.cfg.Network.Ports()
	if err != nil {
		return nil, err
	}
	var out []mesh.Port
	for _, p := range ports {
		if r, ok := m.record(p.Owner); ok {
			p.MAC, p.Addrs, p.NoMulticastRoute = r.MAC, r.held(), r.NoMulticastRoute
			out = append(out, p)
		}
	}
	return out, nil
}

// Info is what is known of one target, attached or not.
type Info struct {
	Owner     string
	FQDN      string         // the container's own name in the domain; "" if it has none
	Addresses []netip.Prefix // that it has on the mesh
}

// Lookup finds out about a target, for those who name it or its addresses.
func (m *Manager) Lookup(ctx context.Context, text string) (Info, error) {
	if text == mesh.OwnerExpose {
		r, _ := m.record(text)
		return Info{Owner: text, Addresses: r.held()}, nil
	}
	owner, err := m.locate(ctx, text)
	if err != nil {
		return Info{}, err
	}
	info := Info{Owner: owner}
	if r, ok := m.record(owner); ok {
		info.Addresses = r.held()
		if len(r.Names) > 0 {
			info.FQDN = r.Names[0]
		}
		return info, nil
	}
	if m.cfg.Docker != nil && !isNamespaceOwner(owner) {
		c, err := m.cfg.Docker.Container(ctx, owner)
		if err != nil {
			return Info{}, fmt.Errorf("look at %s: %w", text, err)
		}
		info.FQDN = m.fqdn(c.Config.Hostname, c.Config.Domainname)
	}
	return info, nil
}
