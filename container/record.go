package container

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"meshd/mesh"
)

// bucket of the state file, with a record for each owner as JSON.
const bucket = "attachments"

// record is what is remembered of one attached container, namespace, or the exposed host.
type record struct {
	Owner  string
	Target string   `json:",omitempty"` // pid:N or netns:PATH; empty for Docker's containers
	Name   string   `json:",omitempty"` // the container's, for people and for look-ups
	MAC    mesh.MAC // kept, so that neighbours see the same machine after a restart
	Holds  []hold
	Names  []string `json:",omitempty"` // fully qualified, in the domain

	WithoutDNS       bool     `json:",omitempty"`
	NoMulticastRoute bool     `json:",omitempty"`
	RewriteHosts     bool     `json:",omitempty"`
	AddHosts         []string `json:",omitempty"`

	// Where the namespace was last seen.
	Pid       int    `json:",omitempty"`
	HostsPath string `json:",omitempty"` // of Docker's file that is the container's /etc/hosts
	Inode     uint64 `json:",omitempty"`
	Boot      string `json:",omitempty"`
}

// hold is one address of a record.
type hold struct {
	Spec       string       // what was asked for, in the address grammar
	Addr       netip.Prefix // what came of it; not valid until it is known
	Held       bool         // the allocator has it for us
	Masquerade bool         `json:",omitempty"` // of an exposed one
}

func (r record) clone() record {
	r.Holds = slices.Clone(r.Holds)
	r.Names = slices.Clone(r.Names)
	r.AddHosts = slices.Clone(r.AddHosts)
	return r
}

// held lists the addresses that are ours now, in the order in which they came.
func (r record) held() (out []netip.Prefix) {
	for _, h := range r.Holds {
		if h.Held {
			out = append(out, h.Addr)
		}
	}
	return out
}

// pending is r before addresses for specs are asked for: what a crash leaves on disk.
func (r record) pending(specs []mesh.AddrSpec) record {
	r = r.clone()
	for _, s := range specs {
		r.Holds = append(r.Holds, hold{Spec: s.String()})
	}
	return r
}

// has finds the hold of an address.
func (r record) has(a netip.Addr) int {
	return slices.IndexFunc(r.Holds, func(h hold) bool { return h.Addr.IsValid() && h.Addr.Addr() == a })
}

// label is how people know it.
func (r record) label() string {
	switch {
	case r.Owner == mesh.OwnerExpose:
		return "the exposed host"
	case r.Target != "":
		return r.Target
	case r.Name != "":
		return fmt.Sprintf("container %s (%s)", r.Name, shortID(r.Owner))
	}
	return "container " + shortID(r.Owner)
}

// Called is what commands call an owner by.
func (m *Manager) Called(owner string) string {
	r, _ := m.record(owner)
	switch {
	case owner == mesh.OwnerExpose:
		return owner
	case r.Target != "":
		return r.Target
	case r.Name != "":
		return r.Name
	}
	return shortID(owner)
}

func shortID(owner string) string { return owner[:min(len(owner), 12)] }

func (r record) marshal() ([]byte, error) { return json.Marshal(r) }

// parseRecord reads what marshal wrote.
func parseRecord(b []byte) (r record, err error) {
	if err := json.Unmarshal(b, &r); err != nil {
		return r, err
	}
	if r.Owner == "" || r.MAC.IsMulticast() {
		return r, errors.New("owner or MAC address missing")
	}
	for _, h := range r.Holds {
		if _, err := mesh.ParseAddrSpec(h.Spec); err != nil {
			return r, err
		}
		if h.Held && !h.Addr.IsValid() {
			return r, errors.New("an address is held and not known")
		}
	}
	return r, nil
}
