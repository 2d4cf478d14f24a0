package tunnel

import (
	"net"
	"strconv"
	"sync"
)

var sendPool = sync.Pool{New: func() any { return newSendArgs() }}

// zoneOf writes an interface index as the zone of a link-local address. The number does as well as the name,
// and needs no look-up per datagram.
func zoneOf(scope uint32) string { return strconv.FormatUint(uint64(scope), 10) }

// scopeOf reads a zone, number or name.
func scopeOf(zone string) uint32 {
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n)
	}
	if i, err := net.InterfaceByName(zone); err == nil {
		return uint32(i.Index)
	}
	return 0
}
