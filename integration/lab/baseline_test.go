package lab

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"meshd/integration/lab/probe"
)

func TestBaseline(t *testing.T) {
	l, ctx := newLab(t, 3)
	try(t, l.Baseline(ctx))
	var c []*Container
	var addr []netip.Addr
	for i, h := range l.Hosts {
		n, err := h.Netns(ctx, "c")
		try(t, err)
		p := netip.MustParsePrefix(fmt.Sprintf("10.3.1.%d/24", i+1))
		try(t, n.JoinBaseline(ctx, p))
		c, addr = append(c, n), append(addr, p.Addr())
	}
	for i := range c {
		_, err := c[i].WaitPing(ctx, addr[(i+1)%3], 5*time.Second)
		try(t, err)
	}
	stream := func() probe.Transfer {
		ln, err := c[1].Listen(ctx, netip.AddrPortFrom(addr[1], 0).String())
		try(t, err)
		defer ln.Close()
		got, err := probe.Stream(ctx, ln, func() (net.Conn, error) { return c[0].Dial(ctx, "tcp", ln.Addr().String()) }, 300<<20, 1)
		try(t, err)
		return got
	}
	t.Log("superframes whole: ", stream())
	try(t, l.CutToMTU(ctx, false))
	frames, err := l.Host(2).OpenFrames("eth0")
	try(t, err)
	defer frames.Close()
	largest := make(chan int, 1)
	go func() {
		most := 0
		frames.Collect(300*time.Millisecond, func(f []byte) bool { most = max(most, len(f)); return false })
		largest <- most
	}()
	t.Log("cut to MTU: ", stream())
	if n := <-largest; n > 1514 || n < 1400 {
		t.Errorf("the largest frame on the underlay has %d bytes", n)
	}
}
