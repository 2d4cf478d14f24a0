package tunnel

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"time"
)

// batch collects frames into datagrams and datagrams into sends. Small frames for one peer share a
// datagram, datagrams of one size share a system call. Nothing waits: whoever fills a batch flushes
// it when it has nothing more at hand. One goroutine owns it.
type batch struct {
	t   *Tunnel
	out []byte

	base, n int // finished datagrams are out[base:n]
	size    int // of each but the last
	count   int
	ended   bool // the last one is shorter: nothing may follow

	r     route // of everything in the batch
	open  bool  // a datagram is being filled, from n
	fill  int   // its end
	at    int   // where its latest frame begins
	nonce [nonceLen]byte
}

const batchSlack = relayHeaderLen + maxDatagram

func newBatch(t *Tunnel) *batch { return &batch{t: t, out: make([]byte, maxBatch+batchSlack)} }

// room is the largest frame that r carries.
func (r *route) room() int { return r.mtu - bodyOverhead }

func (r *route) prefix() int {
	if r.relayed {
		return relayHeaderLen
	}
	return 0
}

// frame makes room for a frame of n bytes on its way over r, which must be filled before the next call;
// n is at most r.room(). partial says that its transport checksum is that of the pseudo header.
func (b *batch) frame(r *route, n int, partial bool) []byte {
	if b.open && (b.r != *r || b.fill+frameLenLen+n+sealLen > b.n+r.prefix()+r.mtu) {
		b.close()
	}
	if !b.open {
		if b.count > 0 && (b.r != *r || b.ended || b.count >= maxSegments || b.n+r.prefix()+r.mtu > maxBatch) {
			b.flush()
		}
		b.r, b.open = *r, true
		b.fill = b.n + r.prefix() + dataHeaderLen
	}
	word := uint16(n)
	if partial {
		word |= framePartial
	}
	binary.BigEndian.PutUint16(b.out[b.fill:], word)
	b.at = b.fill + frameLenLen
	b.fill = b.at + n
	s := &r.peer.stats
	s.framesOut.Add(1)
	s.bytesOut.Add(uint64(n))
	return b.out[b.at:b.fill:b.fill]
}

// close seals the datagram that is being filled.
func (b *batch) close() {
	b.open = false
	start := b.n + b.r.prefix()
	end := b.fill
	if b.r.clear {
		d := b.out[start:]
		putDataHeader(d, typeClear, b.r.keys.remote, 0)
		copy(d[8:16], b.r.keys.sendTag[:])
	} else {
		counter, err := b.r.keys.reserve(1)
		if err != nil {
			b.t.drops.add(dropCounter)
			return
		}
		end = start + b.r.keys.sealAt(b.out[start:], b.fill-start, counter, &b.nonce)
	}
	if b.r.relayed {
		putRelayHeader(b.out[b.n:], b.r.hops, b.r.peer.name, b.t.name)
	}
	length := end - b.n
	switch {
	case b.count == 0:
		b.size = length
	case length > b.size || b.n-b.base+length > maxBatch:
		b.write()
		b.base, b.count, b.size, b.ended = b.n, 0, length, false
	}
	b.ended = length < b.size
	b.n = end
	b.count++
	if b.base > 0 && b.n+batchSlack > len(b.out) {
		b.flush()
	}
}

// flush sends everything.
func (b *batch) flush() {
	if b.open {
		b.close()
	}
	if b.count > 0 {
		b.write()
	}
	b.base, b.n, b.count, b.ended = 0, 0, 0, false
}

// write sends the finished datagrams.
func (b *batch) write() {
	if b.n == b.base {
		return
	}
	b.t.writeFrames(b.out[b.base:b.n], b.size, b.r.to)
}

// writeFrames sends datagrams that hold frames, waiting for room in the socket buffer.
func (t *Tunnel) writeFrames(datagrams []byte, size int, to netip.AddrPort) {
	err := t.conn.Write(datagrams, size, to, true)
	if err == nil {
		return
	}
	why := dropOf(err)
	t.drops.add(why)
	if why != dropSize && !errors.Is(err, net.ErrClosed) && t.noisy.take(time.Now()) {
		t.log.Warn("frames not sent", "underlay", to, "err", err)
	}
	if why == dropSize {
		if p := (*t.neigh.Load())[to]; p != nil {
			t.post(event{kind: eventTooBig, peer: p, size: size, from: origin{addr: to}})
		}
	}
}
