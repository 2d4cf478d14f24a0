package tunnel

import (
	"errors"
	"net/netip"
)

// Conn is the UDP socket. ReadBatch blocks and belongs to one goroutine; the rest may be called by many.
// After Close every call returns net.ErrClosed.
type Conn interface {
	// ReadBatch fills N, Size and Addr of as many datagrams as are there. With wait it waits for one, else
	// it may return 0.
	ReadBatch(batch []Datagrams, wait bool) (int, error)
	// Write sends b cut into datagrams of size bytes, the last one shorter or equal, in one call where
	// the system can: at most maxSegments datagrams and maxBatch bytes. With wait it blocks while
	// the socket buffer is full, else it returns errFull.
	Write(b []byte, size int, to netip.AddrPort, wait bool) error
	// PathMTU is the MTU in bytes of IP packet of the interface that leads to an address, 0 unknown.
	PathMTU(to netip.Addr) int
	LocalAddr() netip.AddrPort
	Close() error
}

// Datagrams is what one read delivers: N bytes of datagrams from one address, each of Size bytes but the
// last, which may be shorter. Size 0 means a single one.
type Datagrams struct {
	Buf  []byte
	N    int
	Size int
	Addr netip.AddrPort
}

const (
	maxSegments = 64    // UDP_MAX_SEGMENTS of kernels before 6.9
	maxBatch    = 65507 // bytes of the largest UDP payload
)

var (
	errFull     = errors.New("socket buffer full")
	errTooLarge = errors.New("datagram larger than the interface's MTU")
)

// dropOf sorts an error of Conn.Write.
func dropOf(err error) drop {
	switch {
	case errors.Is(err, errFull):
		return dropFull
	case errors.Is(err, errTooLarge):
		return dropSize
	}
	return dropSend
}
