package main

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"meshd/control"
	"meshd/fastdp"
	"meshd/ipam"
	"meshd/mesh"
	"meshd/router"
	"meshd/router/gossip"
	"meshd/router/tunnel"
)

// Report implements control.Reporter: what each room says, in the words of the API.
func (h *house) Report() control.Report {
	r := control.Report{Ready: true, Version: version}
	st := h.gossip.Status()
	if st.Conflict != "" {
		r.Problems = append(r.Problems, st.Conflict)
	}
	for _, x := range st.Refusals {
		r.Problems = append(r.Problems, fmt.Sprintf("peer %v(%s) has passed on %d entries that those they are about did not sign: "+
			"it lies, or two hosts have one name", x.From, nickOf(st, x.From), x.Forged+x.Foreign))
	}
	if h.kernel.off != "" && h.kernel.dp.Load() == nil {
		r.Problems = append(r.Problems, "no kernel path: "+h.kernel.off)
	}
	if fault := h.kernel.fault(); fault != "" {
		r.Problems = append(r.Problems, "the kernel path lacks something: "+fault)
	}
	if h.passwords.odd != "" {
		r.Problems = append(r.Problems, h.passwords.odd)
	}
	kernel := h.kernel.status()
	r.Router = h.routerReport(st, kernel)
	if h.cfg.Addresses.Range.IsValid() {
		r.IPAM = h.ipamReport(st, &r.Problems)
	}
	if h.names != nil {
		s := h.names.Status()
		if s.Problem != "" {
			r.Problems = append(r.Problems, s.Problem)
		}
		r.DNS = &control.DNS{
			Domain: h.cfg.DNS.Domain, Upstream: s.Upstream, TTL: int(h.cfg.DNS.TTL.Seconds()),
		}
		if at := h.names.Addr(); at.IsValid() {
			r.DNS.Address = at.String()
		}
		for _, e := range h.records.Entries() {
			r.DNS.Entries = append(r.DNS.Entries, control.DNSEntry{
				Hostname: e.Name, Origin: e.Origin, ContainerID: e.Owner, Address: e.Addr.String(), Version: e.Version,
			})
		}
	}
	if h.proxy != nil {
		r.Proxy = &control.Proxy{Addresses: h.proxy.Addresses()}
	}
	return r
}

func (h *house) ipamReport(st gossip.Status, problems *[]string) *control.IPAM {
	s := h.addresses.Status()
	r := &control.IPAM{
		Status: s.State, Range: s.Range.String(), RangeNumIPs: 1 << (s.Range.Addr().BitLen() - s.Range.Bits()),
		ActiveIPs: s.Active, DefaultSubnet: s.Default.String(), Cluster: s.Cluster, PendingAllocates: s.PendingAllocates,
	}
	if s.State == ipam.StateConsensus {
		r.Paxos = &control.Paxos{Elector: h.cfg.Addresses.Init == InitConsensus, KnownNodes: s.Known, Quorum: s.Quorum}
	}
	if s.Why != "" {
		r.Waiting = append(r.Waiting, s.Why)
	}
	for _, addr := range s.PendingClaims {
		r.PendingClaims = append(r.PendingClaims, control.PendingClaim{Address: addr})
	}
	for _, e := range s.Entries {
		r.Entries = append(r.Entries, control.RingEntry{
			Size: int(e.Owned), Peer: e.Peer, Nickname: nickOf(st, e.Peer), IsKnownPeer: e.Reachable, Version: uint64(e.Life),
		})
	}
	for _, c := range s.Collisions {
		r.Conflicts = append(r.Conflicts, collisionText(c, h.containers.Called))
	}
	for _, x := range s.Strangers {
		r.Conflicts = append(r.Conflicts, strangerText(x, nickOf(st, x.Peer), s))
	}
	if s.DiskError != "" {
		*problems = append(*problems, "addresses cannot be stored: "+s.DiskError)
	}
	*problems = append(*problems, r.Conflicts...)
	return r
}

func strangerText(x ipam.Stranger, nick string, own ipam.Status) string {
	if x.Range.IsValid() && x.Range != own.Range {
		return fmt.Sprintf("peer %v(%s) has the range %v, this one %v: restart one with the other's --ipalloc-range", x.Peer, nick, x.Range, own.Range)
	}
	return fmt.Sprintf("peer %v(%s) belongs to the cluster %s, this one to %s: \"meshctl ipam repair\" merges their addresses", x.Peer, nick, x.Cluster, own.Cluster)
}

func (h *house) routerReport(st gossip.Status, kernel map[mesh.PeerName]fastdp.PathStatus) *control.Router {
	u := h.cfg.Underlay
	nick := map[mesh.PeerName]string{}
	for _, p := range st.Peers {
		nick[p.Name] = p.NickName
	}
	r := &control.Router{
		Protocol: "mesh", ProtocolMinVersion: router.Protocol, ProtocolMaxVersion: router.Protocol,
		Encryption: h.passwords.any(), PeerDiscovery: !u.NoDiscovery,
		Name: h.self, NickName: u.NickName, Port: u.Port,
		TerminationCount: st.Ended, Targets: st.Targets, Interface: h.tap.Name,
		OverlayDiagnostics: map[string]string{
			control.OverlayKernel:    cmp.Or(h.kernel.off, h.kernel.fault(), "ready"),
			control.OverlayUserspace: cmp.Or(h.tap.Offload.Missing, "ready"),
		},
		Drops: h.drops(st), Offences: h.offences(),
	}
	for _, c := range h.switcher.Clashes() {
		r.Clashes = append(r.Clashes, control.Clash{Address: c.What, Peers: c.Peers})
	}
	for _, p := range u.TrustedSubnets {
		r.TrustedSubnets = append(r.TrustedSubnets, p.String())
	}
	for _, p := range st.Peers {
		if p.State == router.Alive { // of the others, "status ipam" shows those that matter
			r.Peers = append(r.Peers, peerReport(p, st.Peers, nick))
		}
	}
	for _, route := range st.Routes {
		r.UnicastRoutes = append(r.UnicastRoutes, control.UnicastRoute{Dest: route.Dst, Via: route.Via, Hops: route.Hops, Why: route.Why})
	}
	sessions := map[mesh.PeerName]tunnel.Status{}
	for _, s := range h.tunnel.Sessions() {
		sessions[s.Peer.Name] = s
		r.Traffic = append(r.Traffic, control.PeerTraffic{
			Name: s.Peer.Name, NickName: s.Peer.NickName,
			BytesIn: s.BytesIn, BytesOut: s.BytesOut, FramesIn: s.FramesIn, FramesOut: s.FramesOut,
		})
	}
	r.Connections = h.connections(st, sessions, kernel)
	for _, m := range h.switcher.MACs() {
		r.MACs = append(r.MACs, control.MACEntry{Mac: m.MAC, Name: m.Peer, NickName: nick[m.Peer], LastSeen: m.Seen})
	}
	return r
}

func peerReport(p router.PeerView, all []router.PeerView, nick map[mesh.PeerName]string) control.Peer {
	out := control.Peer{Name: p.Name, NickName: p.NickName, UID: p.Run, ShortID: p.ShortID, Version: uint64(p.Incarnation)}
	for _, l := range p.Links {
		out.Connections = append(out.Connections, control.PeerConnection{
			Name: l.To, NickName: nick[l.To], Address: l.Addr.String(), Outbound: l.Outbound,
			Established: slices.ContainsFunc(all, func(q router.PeerView) bool {
				return q.Name == l.To && slices.ContainsFunc(q.Links, func(m router.PeerLink) bool { return m.To == p.Name })
			}),
		})
	}
	return out
}

// connections lists links and dials, and behind them the peers that are reached by others only.
func (h *house) connections(st gossip.Status, sessions map[mesh.PeerName]tunnel.Status, kernel map[mesh.PeerName]fastdp.PathStatus) []control.Connection {
	var out []control.Connection
	linked := map[mesh.PeerName]bool{}
	routes := map[mesh.PeerName]router.Route{}
	for _, r := range st.Routes {
		routes[r.Dst] = r
	}
	for _, c := range st.Connections {
		line := control.Connection{
			Address: c.Address, Outbound: c.Outbound, State: c.State, Peer: c.Peer, NickName: c.NickName,
			RTT: c.RTT, Error: c.Error, NextTry: c.NextTry,
		}
		if c.State == gossip.StateEstablished || c.State == gossip.StatePending {
			linked[c.Peer] = true
			h.describe(&line, routes[c.Peer], sessions[c.Peer], kernel)
		}
		out = append(out, line)
	}
	for _, r := range st.Routes {
		if r.Dst == h.self || linked[r.Dst] {
			continue
		}
		s := sessions[r.Dst]
		line := control.Connection{State: control.ConnEstablished, Peer: r.Dst, NickName: nickOf(st, r.Dst), RTT: r.RTT}
		if s.Addr.IsValid() {
			line.Address = s.Addr.String()
		}
		h.describe(&line, r, s, kernel)
		out = append(out, line)
	}
	return out
}

// describe says by which path frames for a peer go, and why by no better one.
func (h *house) describe(line *control.Connection, route router.Route, s tunnel.Status, kernel map[mesh.PeerName]fastdp.PathStatus) {
	line.Encrypted = h.passwords.any()
	if s.Session {
		line.Encrypted = s.Sealed
	}
	line.MTU = h.mtu
	line.Overlay = control.OverlayUserspace
	why := cmp.Or(h.kernel.off, "the peer has offered no kernel path")
	if k, ok := kernel[line.Peer]; ok && h.kernel.off == "" {
		if k.Up {
			line.Overlay, why = control.OverlayKernel, ""
		} else {
			why = k.Reason
		}
	}
	if route.Via != line.Peer && !route.Via.IsZero() {
		if line.Overlay == control.OverlayUserspace {
			line.Overlay = control.OverlayRelay
		}
		why = fmt.Sprintf("via %v: %s", route.Via, cmp.Or(route.Why, s.Why))
	}
	line.Reason = why
}

func nickOf(st gossip.Status, name mesh.PeerName) string {
	for _, p := range st.Peers {
		if p.Name == name {
			return p.NickName
		}
	}
	return ""
}

// drops adds up what the rooms dropped, each reason with its room before it.
func (h *house) drops(st gossip.Status) map[string]uint64 {
	out := map[string]uint64{}
	add := func(room string, counts map[string]uint64) {
		for reason, n := range counts {
			if n > 0 {
				out[room+"_"+reason] = n
			}
		}
	}
	add("switch", h.switcher.Drops())
	add("tunnel", h.tunnel.Drops())
	gossiped := maps.Clone(st.Counters)
	for _, traffic := range []string{"sent", "sent_bytes", "received", "received_bytes"} {
		delete(gossiped, traffic)
	}
	add("gossip", gossiped)
	if dp := h.kernel.dp.Load(); dp != nil {
		if counters, err := dp.Counters(); err == nil {
			for reason, c := range counters {
				if strings.HasPrefix(reason, "drop_") && c.Frames > 0 {
					out["kernel_"+strings.TrimPrefix(reason, "drop_")] = c.Frames
				}
			}
		}
	}
	return out
}

// offences says whom the port guard caught at what.
func (h *house) offences() []control.Offence {
	dp := h.kernel.dp.Load()
	if dp == nil {
		return nil
	}
	owner := map[mesh.MAC]string{}
	for _, e := range h.records.Endpoints() {
		if e.Peer == h.self {
			owner[e.MAC] = e.Owner
		}
	}
	var out []control.Offence
	for _, o := range dp.Offences() {
		if o.MAC.IsZero() {
			continue // the port is gone
		}
		out = append(out, control.Offence{
			ContainerID: owner[o.MAC], Mac: o.MAC, Reason: strings.TrimPrefix(o.Reason, "drop_"), Frames: o.Frames,
		})
	}
	return out
}

func listenAddr(u UnderlayConfig) netip.AddrPort {
	if u.Host.IsValid() {
		return netip.AddrPortFrom(u.Host, u.Port)
	}
	return netip.AddrPortFrom(netip.IPv6Unspecified(), u.Port)
}

func ranges(a AddressConfig) []netip.Prefix {
	if !a.Range.IsValid() {
		return nil
	}
	return []netip.Prefix{a.Range}
}
