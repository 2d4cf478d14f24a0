package tunnel

import (
	"encoding/binary"
	"hash/maphash"
)

// backlog holds what was read from a port and not sent yet. Superframes wait in it, and frames of their flows
// behind them; everything else goes ahead. A lone frame then waits for the one superframe that is being sent, not
// for all that a busy connection has put before it. When it is full, frames stay in the port, whose queue the
// kernel bounds. One goroutine owns it.
type backlog struct {
	seed    maphash.Seed
	waiting []waiting // oldest first
	free    [][]byte  // last used last, so that few buffers stay in the processor's cache
}

type waiting struct {
	buf  []byte // virtio header and frame
	flow uint64
}

const maxBacklog = 128 // superframes of up to 64 KiB; more than TCP has on its way by default (tcp_rmem)

func newBacklog() *backlog {
	return &backlog{seed: maphash.MakeSeed(), waiting: make([]waiting, 0, maxBacklog)}
}

// buffer is one to read into.
func (b *backlog) buffer() []byte {
	if n := len(b.free); n > 0 {
		buf := b.free[n-1]
		b.free = b.free[:n-1]
		return buf
	}
	return make([]byte, maxFrame)
}

// release takes a buffer back.
func (b *backlog) release(buf []byte) { b.free = append(b.free, buf[:maxFrame]) }

// ahead reports whether what is in buf may be sent before all that waits.
func (b *backlog) ahead(buf []byte) bool {
	if len(buf) < vnetLen+etherLen {
		return true // nothing that anybody waits for
	}
	if parseVnet(buf).gso != gsoNone {
		return false
	}
	if len(b.waiting) == 0 {
		return true
	}
	flow := b.flow(buf[vnetLen:])
	for i := range b.waiting {
		if b.waiting[i].flow == flow {
			return false
		}
	}
	return true
}

// full reports that nothing more may be read before something was sent.
func (b *backlog) full() bool { return len(b.waiting) >= maxBacklog }

// add lets buf wait.
func (b *backlog) add(buf []byte) {
	b.waiting = append(b.waiting, waiting{buf, b.flow(buf[vnetLen:])})
}

// next is the oldest that waits, nil if nothing does.
func (b *backlog) next() []byte {
	if len(b.waiting) == 0 {
		return nil
	}
	buf := b.waiting[0].buf
	n := copy(b.waiting, b.waiting[1:])
	b.waiting[n] = waiting{}
	b.waiting = b.waiting[:n]
	return buf
}

// flow is the same number for all frames that must stay in order: those of a TCP connection or of a pair of UDP
// ports, of two IP addresses for other protocols and for fragments, else of two MAC addresses.
func (b *backlog) flow(frame []byte) uint64 {
	p, ok := parsePacket(frame)
	if !ok {
		return maphash.Bytes(b.seed, frame[:12])
	}
	var key [37]byte
	n := copy(key[:], frame[p.l3+12:p.l3+20])
	if p.v6 {
		n = copy(key[:], frame[p.l3+8:p.l3+40])
	}
	key[n] = p.proto
	if p.proto != 0 {
		binary.BigEndian.PutUint32(key[n+1:], binary.BigEndian.Uint32(frame[p.l4:]))
	}
	return maphash.Bytes(b.seed, key[:])
}
