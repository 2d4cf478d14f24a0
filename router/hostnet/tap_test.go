package hostnet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpenTAP(t *testing.T) {
	h, ns := newHost(t)
	for range 2 { // a restart finds the device and opens it anew
		tap, err := h.OpenTAP(2)
		if err != nil {
			t.Fatal(err)
		}
		if len(tap.Queues()) != 2 || !tap.Offload.VNetHdr || !tap.Offload.Checksum || !tap.Offload.TSO {
			t.Errorf("got %d queues, %+v", len(tap.Queues()), tap.Offload)
		}
		if got := run(t, ns, "ip -d link show mesh-tap"); !strings.Contains(got, "master mesh") || !strings.Contains(got, "mtu 1400") ||
			!strings.Contains(got, "multi_queue") || !strings.Contains(got, "persist on") {
			t.Error(got)
		}
		if _, err := openHost(t, ns, Config{}).OpenTAP(1); err == nil || !strings.Contains(err.Error(), "in use by another process") {
			t.Errorf("second user: got %v", err)
		}
		// A reader that waits ends with Close.
		ended := make(chan error, 1)
		q := tap.Queues()[0]
		go func() {
			buf := make([]byte, 70000)
			for {
				if _, err := q.Read(buf); err != nil {
					ended <- err
					return
				}
			}
		}()
		for range 2 {
			if err := tap.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := <-ended; !errors.Is(err, os.ErrClosed) {
			t.Errorf("Read after Close: got %v, want os.ErrClosed", err)
		}
		wantLinks(t, ns, "mesh", "mesh-tap")
	}
	for _, n := range []int{0, -1, 257} {
		if _, err := h.OpenTAP(n); err == nil {
			t.Errorf("%d queues are accepted", n)
		}
	}
}

// A frame written to the TAP reaches the bridge's other ports, and theirs come out of it.
func TestTAPFrames(t *testing.T) {
	h, _ := newHost(t)
	ns := newNamespace(t)
	tap, err := h.OpenTAP(1)
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	p := testPort(1, "10.2.1.1/24")
	if err := h.AttachPort(ns, p); err != nil {
		t.Fatal(err)
	}
	q := tap.Queues()[0]
	remote := testPort(2).MAC
	// Who has 10.2.1.1? Tell 10.2.1.2.
	ask := appendGratuitousARP(make([]byte, VNetHdrLen), remote, netip.MustParseAddr("10.2.1.2"))
	copy(ask[VNetHdrLen+38:], []byte{10, 2, 1, 1})
	if n, err := q.Write(ask); n != len(ask) || err != nil {
		t.Fatalf("Write: %d, %v", n, err)
	}
	buf := make([]byte, 70000)
	for {
		n, err := q.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		f := buf[VNetHdrLen:n]
		if len(f) >= 42 && binary.BigEndian.Uint16(f[12:]) == etherTypeARP && f[21] == 2 {
			if !bytes.Equal(f[:6], remote[:]) || !bytes.Equal(f[6:12], p.MAC[:]) || !bytes.Equal(f[28:32], []byte{10, 2, 1, 1}) {
				t.Errorf("answer is % x", f)
			}
			return
		}
	}
}

func TestNoTun(t *testing.T) {
	h, ns := newHost(t)
	defer func(old string) { tunDevice = old }(tunDevice)
	for path, want := range map[string]string{
		t.TempDir() + "/tun": "it is missing",
		t.TempDir():          "is a directory",
	} {
		tunDevice = path
		if _, err := h.OpenTAP(1); !errors.Is(err, ErrNoTun) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want ErrNoTun with %q", path, err, want)
		}
	}
	wantLinks(t, ns, "mesh")
}

func TestSetOffload(t *testing.T) {
	const all = tunCsum | tunTSO4 | tunTSO6 | tunTSOECN | tunUSO4 | tunUSO6
	for _, c := range []struct {
		kernel  int
		want    Offload
		missing int
	}{
		{all, Offload{Checksum: true, TSO: true, USO: true}, 0},
		{all &^ (tunUSO4 | tunUSO6), Offload{Checksum: true, TSO: true}, 1},
		{tunCsum, Offload{Checksum: true}, 2},
		{0, Offload{}, 3},
		{-1, Offload{}, 4},
	} {
		var got Offload
		setOffload(func(bits int) error {
			if c.kernel < 0 || bits&^c.kernel != 0 {
				return unix.EINVAL
			}
			return nil
		}, &got)
		if n := strings.Count(got.Missing, "(invalid argument)"); n != c.missing {
			t.Errorf("kernel %#x: missing %q, want %d", c.kernel, got.Missing, c.missing)
		}
		got.Missing = ""
		if got != c.want {
			t.Errorf("kernel %#x: got %+v, want %+v", c.kernel, got, c.want)
		}
	}
}

func testQueue(t *testing.T, file *os.File, header bool) *Queue {
	t.Helper()
	q, err := newQueue(file, header)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// Without virtio headers in the kernel the queue makes them up and completes checksums.
func TestQueueWithoutHeader(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	in, out := testQueue(t, r, false), testQueue(t, w, false)
	defer in.Close()
	defer out.Close()
	frame := append(make([]byte, VNetHdrLen), "0123456789abcdef"...)
	if n, err := out.Write(frame); n != len(frame) || err != nil {
		t.Fatalf("Write: %d, %v", n, err)
	}
	buf := bytes.Repeat([]byte{0xff}, 100)
	if n, err := in.Read(buf); err != nil || !bytes.Equal(buf[:n], frame) {
		t.Errorf("Read: %q, %v, want %q", buf[:n], err, frame)
	}
	if _, err := in.Read(buf[:9]); !errors.Is(err, io.ErrShortBuffer) {
		t.Errorf("short buffer: got %v", err)
	}
	gso := append([]byte{0, 1, 0, 0, 0, 0, 0, 0, 0, 0}, "frame"...)
	if _, err := out.Write(gso); !errors.Is(err, ErrNoOffload) {
		t.Errorf("superframe: got %v, want ErrNoOffload", err)
	}
	if _, err := out.Write(gso[:5]); err == nil {
		t.Error("a buffer without a header is accepted")
	}
}

func TestFinishFrame(t *testing.T) {
	// An IPv6 neighbour advertisement has a known checksum to come back to.
	full := appendNeighbourAdvertisement(make([]byte, VNetHdrLen), testPort(1).MAC, netip.MustParseAddr("fd00::1"))
	const start = etherLen + ipv6Len
	at := VNetHdrLen + start + 2
	want := bytes.Clone(full)
	// Leave the pseudo header's sum in the field, as the kernel does.
	clear(full[at : at+2])
	binary.BigEndian.PutUint16(full[at:], ^sum16(naLen+58, full[VNetHdrLen+22:VNetHdrLen+54]))
	full[0] = vnetNeedsCsum
	binary.NativeEndian.PutUint16(full[6:], start)
	binary.NativeEndian.PutUint16(full[8:], 2)
	got, err := finishFrame(full)
	if err != nil || !bytes.Equal(got, want[VNetHdrLen:]) {
		t.Errorf("got % x, %v\nwant % x", got, err, want[VNetHdrLen:])
	}
	binary.NativeEndian.PutUint16(full[6:], 0xffff)
	if _, err := finishFrame(full); err == nil {
		t.Error("a checksum beyond the frame is accepted")
	}
}

func FuzzFinishFrame(f *testing.F) {
	f.Add([]byte{})
	f.Add(append([]byte{1, 0, 0, 0, 0, 0, 2, 0, 4, 0}, "a frame of some bytes"...))
	f.Fuzz(func(t *testing.T, b []byte) {
		frame, err := finishFrame(b)
		if err == nil && len(frame) != len(b)-VNetHdrLen {
			t.Error(fmt.Sprint(len(frame), len(b)))
		}
	})
}
