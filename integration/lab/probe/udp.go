// Package probe measures what a network does to traffic: numbered datagrams at a fixed interval, counted
// one by one, and streams compared by checksum. It works on connections, wherever they were opened.
package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"
)

// Datagrams is a run of numbered datagrams from one socket to another.
type Datagrams struct {
	Interval time.Duration // between two datagrams
	Size     int           // bytes of payload, at least 16
	Linger   time.Duration // how long stragglers are waited for after the last was sent; 0: 500 ms
}

// Report is what became of a run.
type Report struct {
	Sent       int
	Received   int // different ones
	Lost       int
	Duplicated int
	Reordered  int           // arrived after one with a higher number
	MaxGap     time.Duration // longest time between two arrivals, the first counted from the first sending
	MaxDelay   time.Duration // longest way of one datagram
	SendErrors int           // refused by the sending socket, counted as sent and lost
	LateSends  int           // sent over 5 ms after their time: the machine was busy, gaps may be its fault
}

func (r Report) String() string {
	return fmt.Sprintf("sent %d, lost %d, duplicated %d, reordered %d, longest gap %v, longest delay %v, send errors %d, late sends %d",
		r.Sent, r.Lost, r.Duplicated, r.Reordered, r.MaxGap.Round(10*time.Microsecond), r.MaxDelay.Round(10*time.Microsecond), r.SendErrors, r.LateSends)
}

const magic = 0x6d657368

// Run sends from one socket to another until ctx ends and reports when the last stragglers are in.
// Both sockets are the caller's and stay open.
func (d Datagrams) Run(ctx context.Context, from, to *net.UDPConn, dst netip.AddrPort) (Report, error) {
	if d.Size < 16 {
		d.Size = 16
	}
	if d.Linger == 0 {
		d.Linger = 500 * time.Millisecond
	}
	start := time.Now()
	type arrival struct {
		at   time.Duration
		seq  uint32
		sent time.Duration
	}
	arrivals := make(chan []arrival, 1)
	if err := to.SetReadDeadline(time.Time{}); err != nil {
		return Report{}, err
	}
	go func() {
		var got []arrival
		buf := make([]byte, 65536)
		for {
			n, err := to.Read(buf)
			now := time.Since(start)
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
				break
			}
			if err != nil || n < 16 || binary.BigEndian.Uint32(buf) != magic {
				continue // an ICMP error for an earlier datagram, or a stranger's
			}
			got = append(got, arrival{now, binary.BigEndian.Uint32(buf[4:]), time.Duration(binary.BigEndian.Uint64(buf[8:]))})
		}
		arrivals <- got
	}()

	var r Report
	msg := make([]byte, d.Size)
	binary.BigEndian.PutUint32(msg, magic)
	for ctx.Err() == nil {
		due := time.Duration(r.Sent) * d.Interval
		for left := due - time.Since(start); left > 0; left = due - time.Since(start) {
			if left > 200*time.Microsecond {
				timer := time.NewTimer(left - 100*time.Microsecond)
				select {
				case <-timer.C:
				case <-ctx.Done():
					timer.Stop()
				}
				if ctx.Err() != nil {
					break
				}
			} else {
				runtime.Gosched()
			}
		}
		if ctx.Err() != nil {
			break
		}
		now := time.Since(start)
		if now-due > 5*time.Millisecond {
			r.LateSends++
		}
		binary.BigEndian.PutUint32(msg[4:], uint32(r.Sent))
		binary.BigEndian.PutUint64(msg[8:], uint64(now))
		if _, err := from.WriteToUDPAddrPort(msg, dst); err != nil {
			r.SendErrors++
		}
		r.Sent++
	}
	if err := to.SetReadDeadline(time.Now().Add(d.Linger)); err != nil {
		return r, err
	}
	seen := make([]bool, r.Sent)
	highest, last := -1, time.Duration(0)
	for _, a := range <-arrivals {
		seq := int(a.seq)
		if seq >= r.Sent {
			return r, fmt.Errorf("datagram %d arrived, but only %d were sent", seq, r.Sent)
		}
		r.MaxGap, last = max(r.MaxGap, a.at-last), a.at
		r.MaxDelay = max(r.MaxDelay, a.at-a.sent)
		switch {
		case seen[seq]:
			r.Duplicated++
			continue
		case seq < highest:
			r.Reordered++
		}
		highest = max(highest, seq)
		seen[seq] = true
		r.Received++
	}
	r.Lost = r.Sent - r.Received
	return r, nil
}
