package mesh

import "net/netip"

// Port is one interface of the mesh inside a container or another network namespace, as it should be
// or, from a listing, as it is. Owner identifies it, and the name of its host end derives from that.
type Port struct {
	Owner            string         // container id or the like; at most 200 bytes
	MAC              MAC            // of the interface inside
	Addrs            []netip.Prefix // address and the length of its subnet
	NoMulticastRoute bool           // leave out 224.0.0.0/4
	HostEnd          string         // in a listing: the interface on the bridge
	Index            int            // in a listing: that interface's index
}
