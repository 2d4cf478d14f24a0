package hostnet

import "net/netip"

// Route is one route of the host, as far as overlaps matter.
type Route struct {
	Dst    netip.Prefix
	Device string
}

// conflict is the first route that overlaps r. Default routes overlap with everything and do not count.
func conflict(r netip.Prefix, routes []Route) (Route, bool) {
	for _, route := range routes {
		if route.Dst.Bits() > 0 && route.Dst.Overlaps(r) {
			return route, true
		}
	}
	return Route{}, false
}

// Private ranges in the order in which to look for a free one (RFC 1918 3).
var privateRanges = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
}

// freeRange finds a private range that no route overlaps: as large as a /12 if there is one, at least a
// /16. It looks from the top, for people number from the bottom.
func freeRange(routes []Route) (netip.Prefix, bool) {
	for bits := 12; bits <= 16; bits++ {
		for _, private := range privateRanges {
			if private.Bits() > bits {
				continue
			}
			base := private.Addr().As4()
			for i := 1<<(bits-private.Bits()) - 1; i >= 0; i-- {
				high := uint32(base[0])<<24 | uint32(base[1])<<16 | uint32(i)<<(32-bits)
				p := netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(high >> 24), byte(high >> 16)}), bits)
				if _, taken := conflict(p, routes); !taken {
					return p, true
				}
			}
		}
	}
	return netip.Prefix{}, false
}
