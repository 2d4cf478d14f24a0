package fastdp

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// Run probes the paths and repairs what was removed, until ctx is done. Forwarding does not depend on it.
func (d *Datapath) Run(ctx context.Context) error {
	ticker := time.NewTicker(tickEvery)
	defer ticker.Stop()
	var readers sync.WaitGroup
	defer readers.Wait()
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.closeProber()
	}()
	var reconciled time.Time
	for {
		now := time.Now()
		if now.Sub(reconciled) >= reconcileEvery {
			reconciled = now
			d.reconcile()
			if p := d.renewProber(); p != nil {
				readers.Go(func() { d.receiveLoop(p) })
			}
		}
		d.tick(now)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

// Leave is called before the userspace path stops: frames of new endpoints go into the tunnel at once, for most peers
// know of them by now and nobody else would carry them.
func (d *Datapath) Leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed {
		d.cfg.AnnounceDelay = 0
		d.note("endpoints", d.applyEndpoints(time.Now()))
	}
}

// renewProber opens the probe sockets if the devices are there and the sockets are not theirs yet.
func (d *Datapath) renewProber() *prober {
	d.mu.Lock()
	defer d.mu.Unlock()
	bridge, vxlan := int(d.kernel.config.Bridge), int(d.kernel.config.Vxlan)
	if d.closed || bridge == 0 || vxlan == 0 {
		d.closeProber()
		return nil
	}
	if p := d.prober; p != nil && p.bridge == bridge && p.vxlan == vxlan {
		return nil
	}
	d.closeProber()
	p, err := openProber(bridge, vxlan)
	if err != nil {
		d.note("probe", err)
		return nil
	}
	d.note("probe", nil)
	d.prober = p
	return p
}

func (d *Datapath) closeProber() {
	if d.prober != nil {
		d.prober.close()
		d.prober = nil
	}
}

func (d *Datapath) receiveLoop(p *prober) {
	buf := make([]byte, 1<<16)
	for {
		n, err := p.receive(buf)
		if errors.Is(err, unix.ENETDOWN) {
			continue // the device went down; reconcile sets it up or closes this socket
		}
		if err != nil {
			return
		}
		if from, nonce, size, ok := parseProbe(buf[:n], d.cfg.MTU); ok {
			d.answered(time.Now(), from, nonce, size)
		}
	}
}

func (d *Datapath) answered(now time.Time, from mesh.ShortID, nonce uint64, size probeSize) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.byID[from]
	if d.closed || s == nil || s.path == nil || !s.path.answer(now, nonce, size) {
		return
	}
	d.log.Info("kernel path up", "peer", s.Name, "underlay", s.to, "rtt", s.path.rtt)
	d.note("peers", d.applyPeers(now))
}

// tick sends the probes that are due and applies what time has changed.
func (d *Datapath) tick(now time.Time) {
	d.mu.Lock()
	prober := d.prober
	frames := d.tickLocked(now)
	d.mu.Unlock()
	if prober == nil {
		return
	}
	for _, f := range frames {
		// What cannot be sent is not answered, and that is what the path goes by.
		_ = prober.send(f)
	}
}

func (d *Datapath) tickLocked(now time.Time) (frames [][]byte) {
	if d.closed {
		return nil
	}
	if !d.settled && now.Sub(d.opened) > d.cfg.SettleAfter {
		d.note("settle", d.settleLocked())
	}
	if now.Sub(d.stampsAt) > usedEveryRead {
		d.stampsAt = now
		d.readStamps()
	}
	mono := monotonic()
	self := mesh.ShortID(d.kernel.config.Self)
	changed := false
	for _, s := range d.peers {
		if s.path == nil || self == 0 {
			continue
		}
		wasUp := s.path.state == up
		inUse := s.used != 0 && mono-s.used < uint64(inUseFor)
		for _, size := range s.path.tick(now, inUse) {
			nonce := newNonce()
			s.path.sent(now, nonce, size)
			frames = append(frames, appendProbe(nil, self, s.ID, nonce, size, d.cfg.MTU))
		}
		if wasUp && s.path.state != up {
			changed = true
			d.log.Info("kernel path down, frames go by the userspace path", "peer", s.Name, "underlay", s.to)
		}
	}
	if changed {
		d.note("peers", d.setPeers(d.told, now)) // perhaps there is another way to them by now
	}
	if d.announcementsDue(now) {
		d.note("endpoints", d.applyEndpoints(now))
	}
	return frames
}

func monotonic() uint64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return uint64(ts.Nano())
}

// readStamps reads when frames were last sent to each peer.
func (d *Datapath) readStamps() {
	for _, s := range d.peers {
		if s.path == nil || s.path.state != up {
			continue
		}
		var v bpfPeer
		if err := d.obj.Peers.Lookup(uint32(s.ID), &v); err == nil {
			s.used = v.Used
		}
	}
}

// note keeps an error of the loop for the status, and logs it when it is new.
func (d *Datapath) note(doing string, err error) {
	if err == nil {
		delete(d.faults, doing)
		return
	}
	if d.faults[doing] != err.Error() {
		d.faults[doing] = err.Error()
		d.log.Error("kernel path", "doing", doing, "err", err)
	}
}

// fault is all that is wrong, for people; empty: nothing.
func (d *Datapath) fault() string {
	return strings.Join(slices.Sorted(maps.Values(d.faults)), "; ")
}
