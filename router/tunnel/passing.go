package tunnel

import "net/netip"

// passing collects relayed datagrams that arrived one by one and go to the same neighbour, so that one
// system call sends them all. Whoever fills it flushes it when nothing more is at hand. One goroutine owns it.
type passing struct {
	t     *Tunnel
	buf   []byte // datagrams of size bytes each but the last
	size  int
	count int
	to    netip.AddrPort
}

// add takes datagrams of size bytes each but the last, which may be shorter: at most maxSegments. The memory is
// the caller's again after the call.
func (p *passing) add(datagrams []byte, size int, to netip.AddrPort) {
	n := (len(datagrams) + size - 1) / size
	if p.count > 0 && (p.to != to || size > p.size || len(p.buf)%p.size != 0 ||
		size < p.size && n > 1 || p.count+n > maxSegments || len(p.buf)+len(datagrams) > maxBatch) {
		p.flush()
	}
	if n > 1 && p.count == 0 { // the kernel has collected them already
		p.t.writeFrames(datagrams, size, to)
		return
	}
	if p.buf == nil {
		p.buf = make([]byte, 0, maxBatch)
	}
	if p.count == 0 {
		p.size, p.to = size, to
	}
	p.buf = append(p.buf, datagrams...)
	p.count += n
}

func (p *passing) flush() {
	if p.count > 0 {
		p.t.writeFrames(p.buf, p.size, p.to)
	}
	p.buf, p.count = p.buf[:0], 0
}
