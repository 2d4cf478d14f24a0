package tunnel

import "time"

// rtt is a smoothed round-trip time (RFC 6298 2).
type rtt struct {
	smooth, variance time.Duration
}

func (r *rtt) add(sample time.Duration) {
	if r.smooth == 0 {
		r.smooth, r.variance = sample, sample/2
		return
	}
	r.variance += ((r.smooth - sample).Abs() - r.variance) / 4
	r.smooth += (sample - r.smooth) / 8
}

// timeout is how long to wait for the answer to a probe: between 100 ms and 1 s.
func (r *rtt) timeout() time.Duration {
	if r.smooth == 0 {
		return 300 * time.Millisecond
	}
	return min(max(r.smooth+4*r.variance, 100*time.Millisecond), time.Second)
}
