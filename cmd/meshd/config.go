package main

import (
	"net/netip"
	"regexp"
	"time"

	"meshd/mesh"
)

// Config is everything that was asked for, parsed and checked. Rooms get their own Config made from
// parts of it and never see flags, files or the environment.
type Config struct {
	Underlay  UnderlayConfig
	Overlay   OverlayConfig
	Addresses AddressConfig
	DNS       DNSConfig
	Docker    DockerConfig
	Control   ControlConfig

	StateDir string // directory of the state file, absolute
	RunDir   string // directory of sockets and the pid file, absolute; gone after a reboot
	PinDir   string // directory on a BPF file system, absolute
	Log      LogConfig
}

// UnderlayConfig says who we are to other peers and how they are reached.
type UnderlayConfig struct {
	Host           netip.Addr     // address to bind; invalid means all
	Port           uint16         // UDP and TCP; vxlan uses VXLANPort
	VXLANPort      uint16         // UDP, Port+1 unless given
	Name           mesh.PeerName  // zero: derived from the peer's key
	NickName       string         // 1 to 64 bytes
	Password       string         // empty: none. Never logged or reported
	TrustedSubnets []netip.Prefix // frames to peers in these may go unencrypted, if the peer agrees
	ConnLimit      int            // most connections; 0: no limit
	NoDiscovery    bool           // dial only Peers
	Resume         bool           // take the targets from the state file; Peers is empty then
	Peers          []string       // as given: HOST or HOST:PORT
}

// OverlayConfig is the bridge and the path of frames.
type OverlayConfig struct {
	Bridge       string // names of devices, at most 15 bytes each and all different
	TAP          string
	VXLAN        string
	Ifname       string // interface in a container
	DockerBridge string
	NFTable      string // table in family inet
	MTU          int    // bytes of an overlay IP packet; 0: from the underlay's
	NoFastDP     bool   // userspace path only
	NoMasqLocal  bool   // keep the source address of traffic to local containers
	NoSpoofGuard bool   // let containers send from addresses that are not theirs
}

// InitMode is how the address ring comes into being.
type InitMode uint8

const (
	InitConsensus InitMode = iota // Paxos among Quorum peers
	InitSeed                      // split among Seeds, no agreement needed
	InitObserver                  // wait for others, never vote
)

// AddressConfig is for ipam.
type AddressConfig struct {
	Range         netip.Prefix // IPv4 without host bits; invalid: allocation is off
	RangeGiven    bool         // chosen by the user: an overlap with a host route warns instead of refusing
	DefaultSubnet netip.Prefix // lies in Range; equal to Range unless given
	Init          InitMode
	Peers         int             // InitConsensus: number of peers at the founding, this one included
	Seeds         []mesh.PeerName // InitSeed
	ReclaimAfter  time.Duration   // take over a lost peer's space by itself after this; 0: never
}

// DNSConfig is for dns. Records are replicated even when the server is off.
type DNSConfig struct {
	Off             bool
	Domain          string         // lower case, with the final dot
	Listen          netip.AddrPort // address invalid: the Docker bridge's. Port is always set
	TTL             time.Duration  // whole seconds
	FallbackTimeout time.Duration  // for an upstream server
	AllowRebind     bool           // pass on answers from outside that point into the mesh
	ResolvConf      string         // file that names the upstream servers
}

// DockerConfig is for the container room and the proxy.
type DockerConfig struct {
	API   string // unix:///path or tcp://host:port; empty: no Docker
	Proxy ProxyConfig
}

// ProxyConfig is for the Docker API proxy.
type ProxyConfig struct {
	On                  bool
	Listen              []string // unix:///path or tcp://host:port; empty: RunDir/docker.sock
	NoDefaultIPAlloc    bool
	NoRewriteHosts      bool
	NoDNS               bool // --without-dns
	NoMulticastRoute    bool
	RewriteInspect      bool
	HostnameFromLabel   string
	HostnameMatch       *regexp.Regexp
	HostnameReplacement string
	TLS                 TLSFiles
	TLSOn               bool // --tls or --tlsverify
	TLSVerify           bool // demand client certificates
	NoDetectTLS         bool
}

// TLSFiles are absolute paths; empty ones were not given.
type TLSFiles struct{ CACert, Cert, Key string }

// ControlConfig is where the control API listens.
type ControlConfig struct {
	Socket     string   // unix socket, absolute
	HTTPAddr   string   // "" or IP:port, loopback unless TLS is complete; or the absolute path of a second socket
	TLS        TLSFiles // with HTTPAddr; complete or empty
	StatusAddr string   // "" or IP:port or the absolute path of a socket: read-only
	// MetricsAddr has the same forms; "" when StatusAddr serves them alone.
	MetricsAddr string
}

// LogConfig is for the log on standard error.
type LogConfig struct {
	Level string // debug, info, warn or error
	JSON  bool
}
