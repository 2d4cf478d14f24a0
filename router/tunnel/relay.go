package tunnel

import (
	"time"

	"meshd/mesh"
)

// relayPath is what is measured end to end on the way by a relay. It lives while that way is used.
type relayPath struct {
	track
	via mesh.PeerName
}

const relayIdle = 10 * time.Second // without traffic: no probes

// relayInUse reports whether p is reached by a relay at present, and was written to or heard of lately.
func (t *Tunnel) relayInUse(p *peer, now time.Time) bool {
	if p.send.Load() == nil || time.Duration(t.since(now)-p.used.Load()) >= relayIdle {
		return false
	}
	r, ok := t.routeTo(p.name)
	return ok && r.relayed
}

// tickRelay probes the way by relay to a peer while it is used; false when it is not any more. Unlike a
// link it starts with the size that the first hop carries: the way is in use already.
func (t *Tunnel) tickRelay(p *peer, now time.Time) bool {
	k := p.send.Load()
	if k == nil || !t.relayInUse(p, now) {
		return false
	}
	via, _, _ := t.cfg.Router.Way(p.name)
	q := (*t.peers.Load())[via]
	if q == nil {
		return false
	}
	first := q.direct.Load()
	if first == nil {
		return false
	}
	ceiling := first.mtu - relayHeaderLen
	if p.relay == nil || p.relay.via != via {
		p.relay = &relayPath{via: via}
		p.relay.out = make(map[uint32]sentProbe)
		p.relay.mtu.start(ceiling, ceiling, now)
	}
	r := p.relay
	r.mtu.setCeiling(ceiling, now)
	if p.big.Swap(false) {
		r.busy = now
	}
	sizes := r.mtu.tick(now, r.rtt.timeout(), now.Sub(r.busy) < busyFor, t.epoch.Add(time.Duration(p.heard.Load())))
	to := origin{relayed: true, src: p.name}
	if now.Sub(r.lastProbe) >= heartbeatEvery || r.mtu.verifies > 1 {
		t.sendProbe(p, &r.track, k, to, 0, now)
	}
	for _, size := range sizes {
		t.sendProbe(p, &r.track, k, to, size, now)
	}
	t.publishRelay(p)
	return true
}

// hopsOf is what the header of a datagram says whose sender counts so many links.
func hopsOf(links int) byte { return byte(min(max(links, 1), maxHops)) }

func (t *Tunnel) publishRelay(p *peer) {
	r := p.relay
	d := path{via: r.via, mtu: r.mtu.mtu, rtt: r.rtt.smooth}
	if old := p.relayed.Load(); old == nil || *old != d {
		p.relayed.Store(&d)
	}
}
