package fastdp

import (
	"slices"
	"strings"
	"time"

	"meshd/mesh"
)

// Counter counts frames, a superframe once, and their bytes.
type Counter struct {
	Frames uint64 `json:"frames"`
	Bytes  uint64 `json:"bytes"`
}

// Counters are the frames by what became of them: names that begin with "drop_" are reasons of drops, the
// others ways that frames took (bpf/maps.h, enum reason). They outlive meshd.
func (d *Datapath) Counters() (map[string]Counter, error) {
	all := make(map[string]Counter, len(d.obj.reasons))
	var perCPU []bpfCounter
	for i, name := range d.obj.reasons {
		if err := d.obj.Counters.Lookup(uint32(i), &perCPU); err != nil {
			return nil, err
		}
		var sum Counter
		for _, c := range perCPU {
			sum.Frames += c.Frames
			sum.Bytes += c.Bytes
		}
		all[name] = sum
	}
	return all, nil
}

// Offence says how often a port did something that its guard forbids.
type Offence struct {
	Index  int // of the port's interface
	MAC    mesh.MAC
	Reason string
	Frames uint64
}

// Offences are ordered by port and reason. The oldest are forgotten beyond 4,096.
func (d *Datapath) Offences() []Offence {
	var all []Offence
	var k bpfOffenceKey
	var n uint64
	for it := d.obj.Offences.Iterate(); it.Next(&k, &n); {
		// What is kept from going out by a port is not its own doing.
		if int(k.Reason) < len(d.obj.reasons) && !strings.HasPrefix(d.obj.reasons[k.Reason], "drop_out_") {
			all = append(all, Offence{Index: int(k.Ifindex), Reason: d.obj.reasons[k.Reason], Frames: n})
		}
	}
	d.mu.Lock()
	for i := range all {
		all[i].MAC = d.ports[all[i].Index].MAC
	}
	d.mu.Unlock()
	slices.SortFunc(all, func(a, b Offence) int {
		if a.Index != b.Index {
			return a.Index - b.Index
		}
		return strings.Compare(a.Reason, b.Reason)
	})
	return all
}

// LastUsed says how long ago the kernel path sent a frame to each endpoint that it ever did.
func (d *Datapath) LastUsed() map[mesh.MAC]time.Duration {
	ages := make(map[mesh.MAC]time.Duration)
	now := monotonic()
	var mac uint64
	var v bpfEndpoint
	for it := d.obj.Endpoints.Iterate(); it.Next(&mac, &v); {
		if v.Used != 0 {
			ages[keyMAC(mac)] = time.Duration(max(int64(now-v.Used), 0))
		}
	}
	return ages
}

// Paths is the state of the kernel path to each peer, by name.
func (d *Datapath) Paths() []PathStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	mono := monotonic()
	all := make([]PathStatus, 0, len(d.peers))
	for _, s := range d.peers {
		st := PathStatus{Peer: s.Name, ID: s.ID, Addr: s.to, Via: s.Via, Reason: s.refused, Used: -1}
		if s.used != 0 {
			st.Used = time.Duration(mono - s.used)
		}
		if s.path != nil {
			st.Up, st.RTT, st.Since = s.path.state == up, s.path.rtt, s.path.since
			st.Reason = s.path.reason(d.cfg.Port)
			switch {
			case st.Up:
			case d.cfg.GuardOnly:
				st.Reason = "frames must be sealed"
			case d.kernel.config.Self == 0:
				st.Reason = "this peer has no short id yet"
			case len(d.faults) > 0:
				st.Reason = d.fault()
			}
		}
		all = append(all, st)
	}
	slices.SortFunc(all, func(a, b PathStatus) int { return a.Peer.Compare(b.Peer) })
	return all
}

// Status is what the kernel path is on this host.
type Status struct {
	Hooks     string // "tcx" or "clsact"
	Adopted   bool   // state of an earlier meshd was taken over
	Settled   bool   // and what nobody named again has gone
	Fault     string // what could not be repaired; empty: all well
	Peers     int    // known to the kernel
	PeersUp   int
	Endpoints int
	Ports     int
	Networks  int
	Memory    uint64 // bytes of the maps, as the kernel accounts them
}

// Fault is what could not be repaired, for people; empty: all well.
func (d *Datapath) Fault() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.fault()
}

// Status also says what the maps cost.
func (d *Datapath) Status() Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := Status{Hooks: "tcx", Adopted: d.obj.adopted, Settled: d.settled, Fault: d.fault(),
		Endpoints: len(d.kernel.endpoints), Ports: len(d.kernel.ports), Networks: len(d.nets.number)}
	if d.hooks.clsact {
		s.Hooks = "clsact"
	}
	for _, p := range d.kernel.peers {
		if p.Flags&peerKnown != 0 {
			s.Peers++
		}
		if p.Flags&peerUp != 0 {
			s.PeersUp++
		}
	}
	if d.closed {
		return s
	}
	for _, m := range d.obj.maps() {
		if info, err := m.Info(); err == nil {
			n, _ := info.Memlock()
			s.Memory += n
		}
	}
	return s
}
