package fastdp

import (
	"testing"
	"time"
)

func TestTwoHosts(t *testing.T) {
	for _, c := range []struct {
		name       string
		v6, clsact bool
	}{{"IPv4", false, false}, {"IPv6", true, false}, {"clsact", false, true}} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			l.v6, l.clsact = c.v6, c.clsact
			a, b := l.host().container("10.32.0.1/12", "fd00:1::1/64"), l.host().container("10.32.0.2/12", "fd00:1::2/64")
			a.knows(b)
			b.knows(a)
			l.startAll()
			r := l.stream(a, b, 100*time.Microsecond)
			back := l.stream(b, a, 100*time.Microsecond)
			<-time.After(time.Second)
			if got, other := r.stop(), back.stop(); got.Sent == 0 || got.Got != got.Sent || other.Got != other.Sent {
				t.Errorf("%v; back: %v; %v", got, other, l.hosts[1].nonZero())
			}
			for _, h := range l.hosts {
				h.drops("drop_out_isolated", "drop_source_ip6")
				t.Log(h.nonZero())
			}
		})
	}
}
