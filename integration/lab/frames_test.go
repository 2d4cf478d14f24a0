package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"meshd/integration/lab/probe"
)

// TestFramesAndGroups checks the instruments on a plain bridge, of which the outcome is known.
func TestFramesAndGroups(t *testing.T) {
	l, ctx := newLab(t, 1)
	h := l.Host(1)
	script := "link add br0 type bridge\nlink set br0 up\n"
	var c [2]*Container
	for i := range c {
		name := fmt.Sprintf("c%d", i+1)
		var err error
		c[i], err = h.Netns(ctx, name)
		try(t, err)
		script += fmt.Sprintf("link add %s type veth peer name net0 netns %s\nlink set %s master br0 up\n", name, name, name)
	}
	r, err := h.RunWith(ctx, func(c *exec.Cmd) { c.Stdin = strings.NewReader(script) }, "ip", "-batch", "-")
	if err != nil || r.Exit != 0 {
		t.Fatal(err, r)
	}
	for i := range c {
		for _, args := range [][]string{{"addr", "add", fmt.Sprintf("10.2.1.%d/24", i+1), "dev", "net0"}, {"link", "set", "net0", "up"}, {"route", "add", "224.0.0.0/4", "dev", "net0"}} {
			_, err := c[i].Out(ctx, append([]string{"ip"}, args...)...)
			try(t, err)
		}
	}
	_, err = c[0].WaitPing(ctx, netip.MustParseAddr("10.2.1.2"), 5*time.Second)
	try(t, err)
	if n, out, err := c[0].Ping(ctx, netip.MustParseAddr("10.2.1.2"), 5, 10000); n != 5 || err != nil {
		t.Errorf("%d of 5 pings, %v: %s", n, err, out)
	}
	for _, dst := range []string{"10.2.1.2:7000", "10.2.1.255:7000", "255.255.255.255:7000", "239.1.2.3:7000"} {
		from, err := c[0].ListenUDP(ctx, "10.2.1.1:0")
		try(t, err)
		to, err := c[1].ListenGroup(ctx, netip.MustParseAddrPort(dst), "net0")
		try(t, err)
		rctx, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		r, err := probe.Datagrams{Interval: 100 * time.Microsecond, Linger: 100 * time.Millisecond}.Run(rctx, from, to, netip.MustParseAddrPort(dst))
		cancel()
		try(t, err)
		t.Logf("%s: %v", dst, r)
		if r.Lost != 0 || r.Duplicated != 0 || r.Reordered != 0 || r.Sent < 500 {
			t.Errorf("%s: %v", dst, r)
		}
		try(t, from.Close())
		try(t, to.Close())
	}
	src, err := c[0].OpenFrames("net0")
	try(t, err)
	defer src.Close()
	dst, err := c[1].OpenFrames("net0")
	try(t, err)
	defer dst.Close()
	for _, tail := range []string{"\x88\xb5experiment", "\x81\x00\x00\x2a\x88\xb5tagged", "\x00\x10\xaa\xaa\x03llc"} {
		frame := append(append(append([]byte(nil), dst.MAC...), src.MAC...), tail...)
		frame = append(frame, make([]byte, 60-len(frame))...)
		try(t, src.Send(frame))
		if n := dst.Collect(100*time.Millisecond, func(f []byte) bool { return string(f) == string(frame) }); n != 1 {
			t.Errorf("%q: %d frames arrived, want 1", tail, n)
		}
	}
	ln, err := c[1].Listen(ctx, "10.2.1.2:0")
	try(t, err)
	defer ln.Close()
	got, err := probe.Stream(ctx, ln, func() (net.Conn, error) { return c[0].Dial(ctx, "tcp", ln.Addr().String()) }, 500<<20, 1)
	try(t, err)
	t.Log(got)

	// A stream whose way is cut ends with its context and says how far it came.
	ln2, err := c[1].Listen(ctx, "10.2.1.2:0")
	try(t, err)
	defer ln2.Close()
	rctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	go func() {
		time.AfterFunc(100*time.Millisecond, func() { _, _ = h.Out(ctx, "ip", "link", "set", "c1", "down") })
	}()
	if got, err := probe.Stream(rctx, ln2, func() (net.Conn, error) { return c[0].Dial(rctx, "tcp", ln2.Addr().String()) }, 1<<40, 1); err == nil {
		t.Errorf("a stream over a cut ended well: %v", got)
	} else {
		t.Log(err)
	}
}
