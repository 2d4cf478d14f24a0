// Package container puts containers, and any other network namespace, on the mesh. It is the one way in
// for the command line, the proxy and the plugin: it finds the namespace, gets addresses, has the host
// network make the port, announces it, and remembers it, so that a container that starts again gets the
// same port again. What it has in hand for the host itself (expose) is one more such record.
//
// Invariant: an address is acknowledged only when record, allocator and kernel have it; a call that
// fails half way takes back what it did; one that is killed half way is completed or taken back by the
// next run, because the record is written before anything else is done.
package container

import (
	"context"
	"net/netip"
	"os"

	"meshd/container/docker"
	"meshd/mesh"
)

// Network makes ports. No method waits for anything but the kernel. Calls about one port do not overlap.
type Network interface {
	// AttachPort makes the port p in ns be there with at least these addresses.
	AttachPort(ns *os.File, p mesh.Port) error
	RemoveAddrs(ns *os.File, owner string, addrs []netip.Prefix) error
	// DetachPort removes a port; that it is not there is no error.
	DetachPort(owner string) error
	// Ports lists what the kernel has.
	Ports() ([]mesh.Port, error)
}

// Bridge is the host's own place on the mesh; it waits for nothing but the kernel.
type Bridge interface {
	AddBridgeAddrs(addrs ...netip.Prefix) error
	RemoveBridgeAddrs(addrs ...netip.Prefix) error
	Bridge() (mesh.MAC, []netip.Prefix, error)
}

// Firewall lets exposed subnets through. It keeps its own rules alive.
type Firewall interface {
	// Expose lets traffic to and from the subnet of p through the host, masqueraded if wanted.
	Expose(p netip.Prefix, masquerade bool) error
	Hide(p netip.Prefix) error
}

// Allocator hands out addresses. Allocate and Claim may wait for other peers until ctx ends; the others
// never wait for the network. All may be repeated.
type Allocator interface {
	Allocate(ctx context.Context, owner string, subnet netip.Prefix) (netip.Prefix, error)
	Claim(ctx context.Context, owner string, addr netip.Prefix) error
	Lookup(owner string, subnet netip.Prefix) []netip.Prefix
	Release(ctx context.Context, owner string, addr netip.Addr) error
	ReleaseAll(ctx context.Context, owner string) error
	DefaultSubnet() netip.Prefix
}

// Announcer tells the other peers what is attached here; it never waits.
type Announcer interface {
	Announce(mesh.Endpoint)
	Withdraw(owner string, mac mesh.MAC)
	Endpoints() []mesh.Endpoint
}

// Store keeps records across restarts. Put is one synced transaction; a nil value deletes.
type Store interface {
	All(bucket string) (map[string][]byte, error)
	Put(bucket string, kv map[string][]byte) error
}

// Docker looks at containers and tells of their starts and ends.
type Docker interface {
	Container(ctx context.Context, name string) (docker.Container, error)
	// Running lists the ids of running containers that have a label.
	Running(ctx context.Context, label string) ([]string, error)
	// Watch runs until ctx ends, also while Docker is away.
	Watch(ctx context.Context, f func(docker.Event)) error
}

var _ Docker = (*docker.Client)(nil)
