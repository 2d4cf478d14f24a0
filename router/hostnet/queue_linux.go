package hostnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
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
//
// It stays away from the runtime's poller, which takes two more thread switches per frame: the reader waits
// in poll itself. Only Close and replace wake it beside frames, by an eventfd.
type Queue struct {
	header bool // the kernel reads and writes the header; else Read makes one up and Write obeys it

	dev    atomic.Pointer[descriptor] // another one once the device was made anew
	wake   *descriptor
	closed atomic.Bool

	in reading // owned by the reader
}

// descriptor counts who uses a file, so that it is closed when nobody does.
type descriptor struct {
	file *os.File
	raw  syscall.RawConn
}

func newDescriptor(file *os.File) (*descriptor, error) {
	raw, err := file.SyscallConn()
	return &descriptor{file, raw}, err
}

func newQueue(file *os.File, header bool) (*Queue, error) {
	q := &Queue{header: header}
	dev, err := newDescriptor(file)
	if err != nil {
		return nil, err
	}
	q.dev.Store(dev)
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	if q.wake, err = newDescriptor(os.NewFile(uintptr(event), "wake")); err != nil {
		return nil, err
	}
	q.in.init(q)
	return q, nil
}

// replace goes on with another's descriptor. A read that waits at the old one goes over to it.
func (q *Queue) replace(with *Queue) {
	old := q.dev.Swap(with.dev.Load())
	_ = old.file.Close()
	_ = with.wake.file.Close()
	if q.closed.Load() {
		_ = q.dev.Load().file.Close()
	}
	q.wakeReader()
}

func (q *Queue) wakeReader() {
	_, _ = q.wake.file.Write([]byte{1, 0, 0, 0, 0, 0, 0, 1}) // a number that is not zero in either byte order
}

// Write hands one frame to the bridge. Without virtio headers in the kernel it completes a checksum that
// the header leaves open, in buf itself.
func (q *Queue) Write(buf []byte) (int, error) {
	if q.header {
		return q.dev.Load().file.Write(buf)
	}
	frame, err := finishFrame(buf)
	if err != nil {
		return 0, err
	}
	if _, err := q.dev.Load().file.Write(frame); err != nil {
		return 0, err
	}
	return len(buf), nil
}

// Close ends reads and writes that wait. It may be called twice.
func (q *Queue) Close() error {
	if q.closed.Swap(true) {
		return nil
	}
	q.wakeReader()
	err := errors.Join(q.dev.Load().file.Close(), q.wake.file.Close())
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
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
