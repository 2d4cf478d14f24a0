package control

import (
	"context"
	"net/netip"

	"meshd/mesh"
)

// The rooms as the server sees them. Every method may be called from several goroutines at once. A
// method with a context may wait for other peers and returns soon after the context is done; the
// others never block. An error's text is for the user, and says what is wrong with the request or
// whom it waits for.

// Reporter tells the state of everything.
type Reporter interface {
	Report() Report
}

// Peers is the list of targets.
type Peers interface {
	// Connect adds targets and dials them at once; with replace the list becomes exactly these.
	Connect(targets []string, replace bool) error
	// Forget drops targets by the text that was given to Connect.
	Forget(targets []string) error
}

// Addresses allocates. A zero subnet means the default one.
type Addresses interface {
	Allocate(ctx context.Context, owner string, subnet netip.Prefix) (netip.Prefix, error)
	Claim(ctx context.Context, owner string, addr netip.Prefix) error
	Release(ctx context.Context, owner string, addr netip.Addr) error
	ReleaseAll(ctx context.Context, owner string) error
	// Lookup returns what the owner holds in the subnet, or, for the zero one, everything it holds.
	Lookup(owner string, subnet netip.Prefix) []netip.Prefix
	// Owners returns what everybody on this host holds, by owner.
	Owners() map[string][]netip.Prefix
	DefaultSubnet() netip.Prefix
}

// Ring is the division of the range among peers.
type Ring interface {
	// Prime returns once the ring exists.
	Prime(ctx context.Context) error
	// RemovePeer takes over the space of a lost peer, named by its name or nickname, and returns how
	// many addresses that was: 0 for an unknown one.
	RemovePeer(ctx context.Context, peer string) (int, error)
	// Leave gives all space away.
	Leave(ctx context.Context) error
	// Repair merges the ring of another cluster into this one; the text says what must be renumbered.
	Repair(ctx context.Context) (string, error)
}

// Password is one of the mesh's passwords; ID does not reveal it.
type Password struct {
	ID    string
	InUse bool // to dial with; exactly one is
}

// Passwords are those that peers are accepted with.
type Passwords interface {
	Add(password string) (id string, err error) // may take a second
	Use(id string) error
	Remove(id string) error
	List() []Password
}

// NameRequest names addresses of a container, or of none (mesh.OwnerExtern).
type NameRequest struct {
	Container string
	Addrs     []netip.Addr // none: all that the container has
	FQDN      string       // Add: "" means the container's own; Remove: "" means all
}

// Names are the records made by hand.
type Names interface {
	Add(ctx context.Context, req NameRequest) error
	Remove(ctx context.Context, req NameRequest) error
	Domain() string
	// Server is where the name server listens.
	Server() netip.AddrPort
}

// AttachRequest asks for an interface in a container. Container is an id, a name, pid:N or netns:PATH.
type AttachRequest struct {
	Container        string
	Addresses        []mesh.AddrSpec // none: the default subnet
	WithoutDNS       bool
	RewriteHosts     bool
	AddHosts         []string // name:address, with RewriteHosts
	NoMulticastRoute bool
}

// DetachRequest takes addresses away, and the interface with the last one.
type DetachRequest struct {
	Container string
	Addresses []mesh.AddrSpec // none: the default subnet
}

// ExposeRequest gives the host an address on the bridge.
type ExposeRequest struct {
	Addresses         []mesh.AddrSpec // none: the default subnet
	FQDN              string          // "" for none
	WithoutMasquerade bool
}

// HideRequest takes the host's addresses back.
type HideRequest struct {
	Addresses []mesh.AddrSpec // none: the default subnet
}

// Changed says which addresses a request was about, as they now are or were until now.
type Changed struct {
	Addresses []netip.Prefix
	Warnings  []string // for people; the request was carried out
}

// Attached is one attached interface. ID is a container's or mesh.OwnerExpose.
type Attached struct {
	ID        string
	Name      string // the container's, if it has one
	MAC       mesh.MAC
	Addresses []netip.Prefix
}

// Exposure is this host on the bridge.
type Exposure interface {
	Expose(ctx context.Context, req ExposeRequest) (Changed, error)
	Hide(ctx context.Context, req HideRequest) (Changed, error)
}

// Attachments are containers on the bridge.
type Attachments interface {
	Attach(ctx context.Context, req AttachRequest) (Changed, error)
	Detach(ctx context.Context, req DetachRequest) (Changed, error)
	// List returns the given ones, or with no argument the host and all containers. What is not
	// attached is left out.
	List(ctx context.Context, containers []string) ([]Attached, error)
}

// Backends are the rooms behind the API. All but Reporter may be nil, which means that the feature is off.
type Backends struct {
	Reporter    Reporter
	Peers       Peers
	Passwords   Passwords
	Addresses   Addresses
	Ring        Ring
	Names       Names
	Attachments Attachments
	Exposure    Exposure
}
