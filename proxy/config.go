package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"net/netip"
	"regexp"

	"meshd/mesh"
)

// LabelAddrs is the label by which create tells start, and whoever attaches after a restart, that the
// container belongs on the mesh. Its value is the address list, in mesh.ParseAddrSpecs' grammar; empty
// means the default subnet.
const LabelAddrs = "meshd.addresses"

// Config is what the proxy is built from. Listen and Docker are necessary.
type Config struct {
	Listen []string    // unix:///absolute/path, tcp://host:port or :port
	Docker string      // the daemon: unix:///path or tcp://host:port
	TLS    *tls.Config // on tcp listeners; nil: none, and then only loopback addresses are listened on
	// ClientTLS is used towards a daemon on tcp; nil: none.
	ClientTLS *tls.Config

	// WaitDir is the host directory that holds the waiter (wait.Install) and is mounted into containers;
	// Ifname is the interface waited for.
	WaitDir string
	Ifname  string

	Range netip.Prefix // what addresses are given from: a subnet that is asked for lies in it; zero: not known

	NoDefaultIPAlloc bool // attach only containers that ask, with MESH_CIDR or WEAVE_CIDR
	NoRewriteHosts   bool // leave /etc/hosts to Docker
	NoMulticastRoute bool
	RewriteInspect   bool // show the mesh's address in place of Docker's

	// DNS is the name server that containers are given, which may not be known yet when the proxy starts;
	// DNSDomain is its domain ("mesh.internal."). nil, or an invalid address, leaves their resolver
	// settings alone.
	DNS       func() netip.AddrPort
	DNSDomain string

	maxConns int64 // connections of clients; zero: an eighth of what the process may open

	HostnameFromLabel   string         // take the host name from this label where a container has it
	HostnameMatch       *regexp.Regexp // nil: everything
	HostnameReplacement string         // "$1" style; "" with a nil match: the name itself
}

// Request asks for a running container to be attached.
type Request struct {
	Container        string // id
	Addrs            []mesh.AddrSpec
	RewriteHosts     bool
	AddHosts         []string // name:address, as in docker run --add-host
	WithoutDNS       bool
	NoMulticastRoute bool
}

// Errors of Attach that the proxy tells apart.
var (
	ErrEnded = errors.New("the container has ended")        // before it was attached
	ErrAway  = errors.New("the Docker daemon is not there") // or does not answer in time
)

// Containers is what the proxy needs of the room that attaches. Both may wait, for Docker or for an
// address, and end with ctx.
type Containers interface {
	// Attach gives a container its interface and addresses; a repetition changes nothing. ErrEnded means that
	// the container does not run any more, ErrAway that a later attempt may do.
	Attach(ctx context.Context, req Request) error
	// Interface is the attached interface of a container; ok is false when it has none.
	Interface(container string) (mac mesh.MAC, addrs []netip.Prefix, ok bool)
}
