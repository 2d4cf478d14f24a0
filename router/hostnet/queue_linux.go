package hostnet

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"sync/atomic"
)

// VNetHdrLen is the size of struct virtio_net_hdr, which starts every buffer of a Queue:
//
//	0 flags (1: checksum left to the receiver)   1 gso_type (0: no superframe)
//	2 hdr_len   4 gso_size   6 csum_start   8 csum_offset     each 2 bytes in host order
const VNetHdrLen = 10

const vnetNeedsCsum = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM

// ErrNoOffload: a superframe was written to a TAP without virtio headers.
var ErrNoOffload = errors.New("this TAP takes no superframes")

// Queue is one queue of the TAP. Read and Write move whole frames behind a VNetHdrLen header.
type Queue struct {
	header bool // the kernel reads and writes the header; else Read makes one up and Write obeys it

	file   atomic.Pointer[os.File] // another one once the device was made anew
	closed atomic.Bool

	try tryRead // owned by the reader
}

func newQueue(file *os.File, header bool) *Queue {
	q := &Queue{header: header}
	q.file.Store(file)
	return q
}

// replace goes on with another descriptor. A read that waits at the old one goes over to it.
func (q *Queue) replace(file *os.File) {
	_ = q.file.Swap(file).Close()
	if q.closed.Load() {
		_ = file.Close()
	}
}

// read is one read, at whichever descriptor is the queue's.
func (q *Queue) read(buf []byte) (int, error) {
	for {
		file := q.file.Load()
		if n, err := file.Read(buf); err == nil || q.file.Load() == file {
			return n, err
		}
	}
}

// Read waits for one frame. It returns os.ErrClosed after Close.
func (q *Queue) Read(buf []byte) (int, error) {
	if q.header {
		return q.read(buf)
	}
	if len(buf) < VNetHdrLen {
		return 0, io.ErrShortBuffer
	}
	n, err := q.read(buf[VNetHdrLen:])
	clear(buf[:VNetHdrLen])
	if n > 0 {
		n += VNetHdrLen
	}
	return n, err
}

// Write hands one frame to the bridge. Without virtio headers in the kernel it completes a checksum that
// the header leaves open, in buf itself.
func (q *Queue) Write(buf []byte) (int, error) {
	if q.header {
		return q.file.Load().Write(buf)
	}
	frame, err := finishFrame(buf)
	if err != nil {
		return 0, err
	}
	if _, err := q.file.Load().Write(frame); err != nil {
		return 0, err
	}
	return len(buf), nil
}

// Close ends reads and writes that wait. It may be called twice.
func (q *Queue) Close() error {
	q.closed.Store(true)
	if err := q.file.Load().Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// finishFrame does for buf what its header asks of hardware, and returns the frame alone.
func finishFrame(buf []byte) ([]byte, error) {
	if len(buf) < VNetHdrLen {
		return nil, io.ErrUnexpectedEOF
	}
	hdr, frame := buf[:VNetHdrLen], buf[VNetHdrLen:]
	if hdr[1] != 0 {
		return nil, ErrNoOffload
	}
	if hdr[0]&vnetNeedsCsum != 0 {
		start := int(binary.NativeEndian.Uint16(hdr[6:]))
		at := start + int(binary.NativeEndian.Uint16(hdr[8:]))
		if at+2 > len(frame) {
			return nil, io.ErrUnexpectedEOF
		}
		sum := sum16(0, frame[start:]) // the field holds the pseudo header's sum already
		if sum == 0 {
			sum = 0xffff // RFC 768: zero would mean none
		}
		binary.BigEndian.PutUint16(frame[at:], sum)
	}
	return frame, nil
}
