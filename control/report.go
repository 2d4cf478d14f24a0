package control

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"meshd/mesh"
)

// Report is everything that is known about the daemon at one moment. Its JSON keys are the fields'
// names, which scripts use in "meshctl report -f". A part whose feature is off is nil.
type Report struct {
	Ready        bool
	Version      string
	VersionCheck VersionCheck
	Problems     []string // what does not work as it should, each a sentence for people
	Router       *Router
	IPAM         *IPAM
	DNS          *DNS
	Proxy        *Proxy
	Plugin       *Plugin
}

// VersionCheck is always off: meshd tells nobody that it runs. The keys are there for scripts.
type VersionCheck struct {
	Enabled    bool
	Success    bool
	NewVersion string
}

// Router is the state of peers, connections and frames.
type Router struct {
	Protocol           string // "mesh"
	ProtocolMinVersion int
	ProtocolMaxVersion int
	Encryption         bool // a password is set
	PeerDiscovery      bool
	Name               mesh.PeerName
	NickName           string
	Port               uint16
	Peers              []Peer // this one included, sorted by name
	UnicastRoutes      []UnicastRoute
	BroadcastRoutes    []BroadcastRoute
	Connections        []Connection
	TerminationCount   uint64 // connections that have ended since the start
	Targets            []string
	OverlayDiagnostics map[string]string // by overlay: what it can do here, or why it cannot
	TrustedSubnets     []string
	Interface          string // the device that frames come from
	MACs               []MACEntry
	Drops              map[string]uint64 // frames and datagrams dropped, by reason
	Offences           []Offence         // what the port guard caught, by container and reason
	Clashes            []Clash           // addresses that more than one peer announces
	Traffic            []PeerTraffic
	Flows              int // entries of the kernel path's tables
}

// Clash is a MAC or IP address that more than one peer announces.
type Clash struct {
	Address string
	Peers   []mesh.PeerName // the first is whom frames go to
}

// Offence counts the frames of one port that the port guard dropped for one reason.
type Offence struct {
	ContainerID string // "" while it is being attached or detached
	Mac         mesh.MAC
	Reason      string
	Frames      uint64
}

// Peer is a member of the mesh and its links as it tells them.
type Peer struct {
	Name        mesh.PeerName
	NickName    string
	UID         mesh.RunID
	ShortID     mesh.ShortID
	Version     uint64
	Connections []PeerConnection
}

// PeerConnection is a link of some peer.
type PeerConnection struct {
	Name        mesh.PeerName
	NickName    string
	Address     string
	Outbound    bool
	Established bool
}

// UnicastRoute says by whom a peer is reached; Via is Dest itself when it is a neighbour.
type UnicastRoute struct {
	Dest, Via mesh.PeerName
	Hops      int
	Why       string // why this way, and not directly
}

// BroadcastRoute says to whom frames for everybody go when they come from Source.
type BroadcastRoute struct {
	Source mesh.PeerName
	Via    []mesh.PeerName
}

// States of a Connection.
const (
	ConnEstablished = "established"
	ConnPending     = "pending"    // authenticated, not yet proven both ways
	ConnConnecting  = "connecting" // the first dial is on its way
	ConnRetrying    = "retrying"   // another dial is on its way
	ConnFailed      = "failed"     // waiting for the next dial
)

// Overlays of a Connection.
const (
	OverlayKernel    = "kernel"
	OverlayUserspace = "userspace"
	OverlayRelay     = "relay"
)

// Connection is one of this peer's own, or the attempt at one. Info and Attrs are made by the server
// from the fields before them.
type Connection struct {
	Address   string // "" for a peer that is reached only by relay
	Outbound  bool
	State     string
	Encrypted bool
	Overlay   string
	Peer      mesh.PeerName // zero until it is known
	NickName  string
	MTU       int           // bytes; 0: unknown
	RTT       time.Duration // 0: unknown
	Reason    string        // why not the kernel path
	Error     string        // of the last dial
	NextTry   time.Time     // of a failed one
	Info      string
	Attrs     map[string]any
}

// MACEntry is one known MAC address and where it is.
type MACEntry struct {
	Mac      mesh.MAC
	Name     mesh.PeerName
	NickName string
	LastSeen time.Time // zero: told by its peer, does not age
}

// PeerTraffic counts overlay frames exchanged with a peer, end to end.
type PeerTraffic struct {
	Name                mesh.PeerName
	NickName            string
	BytesIn, BytesOut   uint64
	FramesIn, FramesOut uint64
}

// Values of IPAM.Status. Waiting and consensus name in Waiting whom they wait for.
const (
	IPAMIdle        = "idle"
	IPAMConsensus   = "awaiting consensus"
	IPAMPriming     = "priming"
	IPAMWaiting     = "waiting for IP(s)"
	IPAMUnreachable = "all ranges owned by unreachable peers"
	IPAMReady       = "ready"
)

// IPAM is the state of address allocation.
type IPAM struct {
	Status           string
	Paxos            *Paxos // nil once the ring exists
	Range            string // CIDR
	RangeNumIPs      int
	ActiveIPs        int
	DefaultSubnet    string
	Entries          []RingEntry // by token; empty before the ring exists
	PendingClaims    []PendingClaim
	PendingAllocates []string // owners
	Waiting          []string // whom the pending ones wait for, and why
	Cluster          string   // id made with the ring
	Conflicts        []string // what was found wrong in the ring and set aside
}

// Paxos is the state of the agreement on the first division of the range.
type Paxos struct {
	Elector    bool
	KnownNodes int
	Quorum     int
}

// RingEntry is one range of the ring.
type RingEntry struct {
	Token       string // first address
	Size        int    // addresses
	Peer        mesh.PeerName
	Nickname    string
	IsKnownPeer bool // the owner is reachable
	Version     uint64
}

// PendingClaim is a claim of a given address that waits for another peer.
type PendingClaim struct {
	Ident   string
	Address string
}

// DNS is the state of the name server.
type DNS struct {
	Domain   string
	Upstream []string
	Address  string
	TTL      int // seconds
	Entries  []DNSEntry
}

// DNSEntry is one name and address. Tombstone is when it was removed, as seconds since 1970, or 0.
type DNSEntry struct {
	Hostname    string
	Origin      mesh.PeerName
	ContainerID string
	Address     string
	Version     uint64
	Tombstone   int64
}

// Proxy is the Docker API proxy.
type Proxy struct {
	Addresses []string // unix:///path or tcp://host:port, as a Docker client takes them
}

// Plugin is the Docker network plugin.
type Plugin struct {
	DriverName string
}

// complete sets what is derived from other fields.
func (r *Report) complete() {
	if r.Router == nil {
		return
	}
	for i := range r.Router.Connections {
		c := &r.Router.Connections[i]
		if c.State == ConnEstablished || c.State == ConnPending {
			c.Attrs = map[string]any{"name": c.Overlay, "encrypted": c.Encrypted}
			if c.MTU > 0 {
				c.Attrs["mtu"] = c.MTU
			}
		}
		c.Info = c.info()
	}
}

// info is the last part of the connection's line. The attributes run together without a separator:
// that is how scripts have learnt to take them apart.
func (c *Connection) info() string {
	if c.State != ConnEstablished && c.State != ConnPending {
		if c.Error != "" && !c.NextTry.IsZero() {
			return c.Error + ", retry: " + c.NextTry.Format(time.RFC3339)
		}
		return c.Error
	}
	sealed := "unencrypted"
	if c.Encrypted {
		sealed = "encrypted"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%-11s %-9s %s ", sealed, c.Overlay, peerText(c.Peer, c.NickName))
	for _, key := range slices.Sorted(maps.Keys(c.Attrs)) {
		if key != "name" {
			fmt.Fprintf(&b, "%s=%v", key, c.Attrs[key])
		}
	}
	if c.Reason != "" {
		fmt.Fprintf(&b, " (%s)", c.Reason)
	}
	return strings.TrimRight(b.String(), " ")
}

func peerText(name mesh.PeerName, nick string) string {
	return fmt.Sprintf("%s(%s)", name, nick)
}
