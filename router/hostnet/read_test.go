package hostnet

import (
	"bytes"
	"errors"
	"os"
	"testing"
)

func TestTryRead(t *testing.T) {
	for _, header := range []bool{true, false} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		in, out := testQueue(t, r, header), testQueue(t, w, header)
		defer out.Close()
		buf := bytes.Repeat([]byte{0xff}, 100)
		if n, err := in.TryRead(buf); n != 0 || err != nil {
			t.Errorf("nothing there: %d, %v", n, err)
		}
		frame := append(make([]byte, VNetHdrLen), "0123456789abcdef"...)
		step := func() {
			if _, err := out.Write(frame); err != nil {
				t.Fatal(err)
			}
			if n, err := in.TryRead(buf); err != nil || !bytes.Equal(buf[:n], frame) {
				t.Fatalf("header %v: %q, %v, want %q", header, buf[:n], err, frame)
			}
		}
		step()
		if n := testing.AllocsPerRun(100, step); n != 0 {
			t.Errorf("header %v: %v allocations", header, n)
		}
		in.Close()
		if _, err := in.TryRead(buf); !errors.Is(err, os.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	}
}
