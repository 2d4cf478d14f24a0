// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// The kernel path. Three places see every frame of the mesh on this host:
//
//	          container                                        container
//	             | veth                                           | veth
//	  port_in v  |  ^ port_out                          port_in v |  ^ port_out
//	         vmesh1 -------------- bridge "mesh" -------------- vmesh2
//	             |                  v bridge_out |                ^
//	             |               (host's own)    | mesh-tap       | bpf_redirect_peer
//	             |                  v bridge_out v userspace path |
//	             +---- redirect ----> mesh-vx (vxlan) ------------+
//	                                  ^ vx_in: from the underlay
//	                                  ^ under_in: before the host's IP stack
//
// port_in     what a container sends. Guard, then: known destination here: straight into its veth;
//             known destination on a peer whose kernel path is up: tunnel key, out of mesh-vx; known
//             destination on any other peer: mesh-tap; the rest: the bridge.
// port_out    what the bridge sends to a container: only frames for it, from its networks.
// bridge_out  what leaves the bridge device (the host's own frames) and the TAP (frames of interfaces
//             that are not ours): known destinations on peers whose path is up go into mesh-vx.
// vx_in       what arrives in the tunnel. Checked, then delivered, relayed, or answered if a probe.
// under_in    what arrives on the underlay. Frames for other peers are sent on as they are, but for addresses and hops;
//             single packets to containers here are unpacked and delivered at once,
//             TCP segments with data by way of mesh-vx0 and mesh-vx1, a veth pair in which the kernel joins them to superframes.
//             All else, and whatever is not quite right, is left to the host's IP stack and vx_in. And everything
//             is, if nothing of that peer came through there lately: so the host's firewall is obeyed.
// joined_in   what comes out of that pair.
//
// VNI = source short id << 12 | destination short id. Frames that were delivered from the tunnel never
// enter it again, relays excepted, and those count down the outer TTL: nothing loops.
//
// All state is in the maps; the programs go on with what is there when meshd is not.

#include "kernel.h"
#include "maps.h"
#include "packet.h"
#include "guard.h"

// Outer TTL: a sender starts at 255, and each relay takes 64 away, so that the routers of the underlay
// (fewer than 64 between two peers) are not mistaken for relays. Two relays pass, a third one drops.
#define TTL_START 255
#define TTL_RELAY 64
#define TTL_LEAST 128

#define WHOLE_FOR 10000000000LL // ns
#define HEARD_UNIT 26 // bits: 67 ms
#define HEARD_FOR 16  // of them
#define STAMP_EVERY 100000000ULL // ns; a stamp dirties a cache line that all CPUs read

inline_ struct counter *count(struct __sk_buff *skb, enum reason reason)
{
	__u32 which = reason;
	struct counter *c = bpf_map_lookup_elem(&counters, &which);

	if (c) {
		c->frames++;
		c->bytes += skb->len;
	}
	return c;
}

inline_ int drop(struct __sk_buff *skb, enum reason reason)
{
	count(skb, reason);
	return TC_DROP;
}

// A drop that the operator wants to see a name for.
static __attribute__((noinline)) int drop_port(struct __sk_buff *skb, enum reason reason)
{
	struct offence_key key = { .ifindex = skb->ifindex, .reason = reason };
	__u64 one = 1, *n = bpf_map_lookup_elem(&offences, &key);

	if (n)
		(*n)++;
	else
		bpf_map_update_elem(&offences, &key, &one, 0);
	return drop(skb, reason);
}

inline_ struct config *configuration(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&config, &zero);
}

inline_ struct peer *find_peer(__u32 id)
{
	return bpf_map_lookup_elem(&peers, &id);
}

inline_ struct endpoint *find_endpoint(__u64 mac)
{
	return bpf_map_lookup_elem(&endpoints, &mac);
}

inline_ void stamp(__u64 *used, __u64 now)
{
	if (unlikely(now - *used > STAMP_EVERY))
		*used = now;
}

inline_ void stamp_both(struct endpoint *to, struct peer *peer)
{
	__u64 now = bpf_ktime_get_coarse_ns();

	stamp(&to->used, now);
	stamp(&peer->used, now);
}

// Into the vxlan device, towards where frames for this peer go.
inline_ int into_tunnel(struct __sk_buff *skb, const struct peer *to, __u32 vxlan, __u32 vni, __u8 ttl, enum reason reason)
{
	struct bpf_tunnel_key key = { .tunnel_id = vni, .tunnel_ttl = ttl };
	__u64 flags = TUNNEL_ZERO_CSUM | TUNNEL_DONT_FRAGMENT;

	if (unlikely(to->flags & PEER_TO_V6)) {
		key.remote_ipv6[0] = to->to[0];
		key.remote_ipv6[1] = to->to[1];
		key.remote_ipv6[2] = to->to[2];
		key.remote_ipv6[3] = to->to[3];
		flags = TUNNEL_IPV6; // RFC 8200 wants the outer checksum
	} else {
		key.remote_ipv4 = to->to[0];
	}
	if (unlikely(bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags)))
		return drop(skb, DROP_TUNNEL_KEY);
	count(skb, reason);
	return bpf_redirect(vxlan, 0);
}

// To an endpoint of this host, past the bridge.
inline_ int deliver(struct __sk_buff *skb, const struct endpoint *to, const struct config *cfg, enum reason reason)
{
	count(skb, reason);
	if (likely(to->flags & ENDPOINT_VETH)) {
		// The device that it came in by took it for somebody else's.
		bpf_skb_change_type(skb, PACKET_HOST);
		return bpf_redirect_peer(to->ifindex, 0);
	}
	if (to->flags & ENDPOINT_HOST) {
		bpf_skb_change_type(skb, PACKET_HOST);
		return bpf_redirect(cfg->bridge, REDIRECT_INGRESS);
	}
	if (to->ifindex)
		return bpf_redirect(to->ifindex, 0);
	return bpf_redirect(cfg->tap, REDIRECT_INGRESS);
}

inline_ int to_tap(struct __sk_buff *skb, const struct config *cfg)
{
	if (!cfg->tap)
		return TC_PASS;
	count(skb, TO_TAP);
	return bpf_redirect(cfg->tap, 0);
}

SEC("tc/port_in")
int port_in(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct port *port = bpf_map_lookup_elem(&ports, &ifindex);
	struct config *cfg = configuration();
	const __u64 *nets;
	__u32 announced;
	int reason;

	if (unlikely(!port || !cfg))
		return drop_port(skb, DROP_NO_PORT);
	want_headers(skb);
	struct eth *eth = frame_start(skb);
	void *end = frame_end(skb);
	if (unlikely((void *)(eth + 1) > end))
		return drop_port(skb, DROP_MALFORMED);
	__u64 dst = read_mac(eth->dst), src = read_mac(eth->src);

	if (likely(!(port->flags & PORT_EXEMPT))) {
		reason = guard(skb, port, eth, end);
		if (unlikely(reason))
			return drop_port(skb, reason);
		if (unlikely(dst & 1) && !may_flood(port, cfg))
			return drop_port(skb, DROP_RATE);
		nets = port->nets;
		announced = port->flags & PORT_ANNOUNCED;
	} else {
		// Behind a foreign interface may be anybody: only a sender that other peers know of can
		// use the kernel path.
		struct endpoint *from = find_endpoint(src);
		if (!from || skb->vlan_present)
			goto bridge;
		if (!(from->flags & ENDPOINT_LOCAL) || (from->ifindex && from->ifindex != ifindex)) {
			// A container whose guard is off may pose as another; a whole network does not.
			if (!port->mac)
				return drop_port(skb, DROP_LOOPED);
			goto bridge;
		}
		nets = from->nets;
		announced = from->flags & ENDPOINT_ANNOUNCED;
	}
	if (dst & 1)
		goto bridge;
	struct endpoint *to = find_endpoint(dst);
	if (!to)
		goto bridge;
	if (unlikely(!share_network(nets, to->nets)))
		return drop_port(skb, DROP_ISOLATED);
	if (to->flags & ENDPOINT_LOCAL) {
		if (to->flags & ENDPOINT_HOST || to->ifindex == ifindex || !to->ifindex)
			goto bridge;
		stamp(&to->used, bpf_ktime_get_coarse_ns());
		return deliver(skb, to, cfg, TO_LOCAL);
	}
	struct peer *peer = find_peer(to->peer);
	if (likely(peer && peer->flags & PEER_UP && announced)) {
		stamp_both(to, peer);
		return into_tunnel(skb, peer, cfg->vxlan, cfg->self << 12 | to->peer, TTL_START, TO_TUNNEL);
	}
	return to_tap(skb, cfg);
bridge:
	count(skb, TO_BRIDGE);
	return TC_PASS;
}

SEC("tc/port_out")
int port_out(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct port *port = bpf_map_lookup_elem(&ports, &ifindex);

	if (unlikely(!port))
		return drop_port(skb, DROP_NO_PORT);
	if (port->flags & PORT_EXEMPT)
		return TC_PASS;
	want_headers(skb);
	struct eth *eth = frame_start(skb);
	if ((void *)(eth + 1) > frame_end(skb))
		return drop_port(skb, DROP_MALFORMED);
	__u64 dst = read_mac(eth->dst);
	if (skb->vlan_present)
		return drop_port(skb, DROP_VLAN);
	if (!(dst & 1) && dst != port->mac)
		return drop_port(skb, DROP_OUT_ADDRESSEE);
	struct endpoint *from = find_endpoint(read_mac(eth->src));
	if (from ? share_network(from->nets, port->nets) : in_networks(skb, port))
		return TC_PASS;
	return drop_port(skb, DROP_OUT_ISOLATED);
}

// A probe that meshd sends: it names the peer in its destination address.
inline_ int send_probe(struct __sk_buff *skb, const struct config *cfg, const struct eth *eth)
{
	__u32 id = probe_id(read_mac(eth->dst));
	struct peer *peer = find_peer(id);

	if (skb->ingress_ifindex || !cfg->self || !id || !peer || !(peer->flags & PEER_KNOWN))
		return drop(skb, DROP_PROBE);
	return into_tunnel(skb, peer, cfg->vxlan, cfg->self << 12 | id, TTL_START, PROBED);
}

SEC("tc/bridge_out")
int bridge_out(struct __sk_buff *skb)
{
	struct config *cfg = configuration();

	if (unlikely(!cfg))
		return TC_PASS;
	want_headers(skb);
	struct eth *eth = frame_start(skb);
	if ((void *)(eth + 1) > frame_end(skb))
		return TC_PASS;
	if (is_probe(eth))
		return send_probe(skb, cfg, eth);
	if (skb->vlan_present || is_group(eth->dst))
		return TC_PASS;
	struct endpoint *to = find_endpoint(read_mac(eth->dst));
	if (!to || to->flags & ENDPOINT_LOCAL)
		return TC_PASS;
	struct endpoint *from = find_endpoint(read_mac(eth->src));
	struct peer *peer = find_peer(to->peer);
	if (from && from->flags & ENDPOINT_ANNOUNCED && share_network(from->nets, to->nets) &&
	    peer && peer->flags & PEER_UP) {
		stamp_both(to, peer);
		return into_tunnel(skb, peer, cfg->vxlan, cfg->self << 12 | to->peer, TTL_START, TO_TUNNEL);
	}
	// On the bridge device a known address need not be flooded to all ports to find the TAP.
	if (skb->ifindex == cfg->bridge)
		return to_tap(skb, cfg);
	return TC_PASS;
}

// Whether the outer source address is one that this peer's frames come from.
inline_ int known_source(const struct peer *peer, const struct bpf_tunnel_key *key, int v6)
{
	struct underlay_key from = { .v6 = v6 };

	if (!v6) {
		if (likely(!(peer->flags & PEER_FROM_V6) && peer->from[0] == key->remote_ipv4))
			return 1;
		from.addr[0] = key->remote_ipv4;
	} else {
		if (peer->flags & PEER_FROM_V6 && same6(peer->from, key->remote_ipv6))
			return 1;
		from.addr[0] = key->remote_ipv6[0];
		from.addr[1] = key->remote_ipv6[1];
		from.addr[2] = key->remote_ipv6[2];
		from.addr[3] = key->remote_ipv6[3];
	}
	return peer->flags & PEER_RELAYED && bpf_map_lookup_elem(&underlays, &from);
}

// A checked frame from one peer to another: out again, if that one is reached from here.
inline_ int relay(struct __sk_buff *skb, const struct config *cfg, const struct bpf_tunnel_key *key)
{
	struct peer *to = find_peer(key->tunnel_id & 0xfff);

	if (!(cfg->flags & CONFIG_RELAY) || !to || !(to->flags & PEER_UP))
		return drop(skb, DROP_VX_DEST_ID);
	if (key->tunnel_ttl < TTL_LEAST)
		return drop(skb, DROP_VX_HOPS);
	stamp(&to->used, bpf_ktime_get_coarse_ns());
	return into_tunnel(skb, to, skb->ifindex, key->tunnel_id, key->tunnel_ttl - TTL_RELAY, RELAYED);
}

// A probe from a peer whose ids and address fit. A request goes back as it came, with the same size, so
// that the answer proves both directions; it needs no meshd here.
inline_ int probed(struct __sk_buff *skb, const struct config *cfg, const struct peer *from, __u32 id, const struct eth *eth)
{
	struct eth back;
	__u64 self = probe_mac(cfg->self), peer = probe_mac(id);

	if (read_mac(eth->src) != peer || read_mac(eth->dst) != self)
		return drop(skb, DROP_PROBE);
	if (eth->type == ETH_PROBED) {
		count(skb, PROBED);
		return TC_PASS; // to meshd's packet socket on this device; nobody else listens
	}
	__builtin_memcpy(back.dst, &peer, sizeof(back.dst));
	__builtin_memcpy(back.src, &self, sizeof(back.src));
	back.type = ETH_PROBED;
	if (bpf_skb_store_bytes(skb, 0, &back, sizeof(back), 0))
		return drop(skb, DROP_PROBE);
	return into_tunnel(skb, from, skb->ifindex, cfg->self << 12 | id, TTL_START, PROBED);
}

// A frame from the tunnel whose sender is known to be who it says.
inline_ int to_endpoint(struct __sk_buff *skb, const struct config *cfg, const struct eth *eth, const struct endpoint *from)
{
	struct endpoint *to = find_endpoint(read_mac(eth->dst));

	if (unlikely(!from || !to || !(to->flags & ENDPOINT_LOCAL)))
		return drop(skb, DROP_VX_UNKNOWN);
	if (unlikely(!share_network(from->nets, to->nets)))
		return drop(skb, DROP_VX_ISOLATED);
	return deliver(skb, to, cfg, FROM_TUNNEL);
}

inline_ __u32 heard_now(void)
{
	return bpf_ktime_get_coarse_ns() >> HEARD_UNIT;
}

inline_ void stamp_heard(struct peer *peer)
{
	__u32 now = heard_now();

	if (unlikely(peer->heard != now))
		peer->heard = now;
}

// Whether the host's firewall, which under_in goes past, lets this peer's datagrams in: some came through it a
// moment ago, be it probes. So a port that somebody closes is closed at once, also while no meshd runs.
inline_ int is_let_in(const struct peer *peer)
{
	return (int)(heard_now() - peer->heard) < HEARD_FOR;
}

SEC("tc/vx_in")
int vx_in(struct __sk_buff *skb)
{
	struct bpf_tunnel_key key;
	struct config *cfg = configuration();
	int v6 = 0;

	if (unlikely(!cfg))
		return TC_DROP;
	if (unlikely(bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0))) {
		if (bpf_skb_get_tunnel_key(skb, &key, sizeof(key), TUNNEL_IPV6))
			return drop(skb, DROP_VX_PLAIN);
		v6 = 1;
	}
	__u32 id = key.tunnel_id >> 12 & 0xfff;
	struct peer *peer = find_peer(id); // our own id and 0 are never known
	if (unlikely(!peer || !(peer->flags & PEER_KNOWN)))
		return drop(skb, DROP_VX_SOURCE_ID);
	if (unlikely(!known_source(peer, &key, v6)))
		return drop(skb, DROP_VX_ADDRESS);
	stamp_heard(peer);
	if ((key.tunnel_id & 0xfff) != cfg->self)
		return relay(skb, cfg, &key);

	want_headers(skb);
	struct eth *eth = frame_start(skb);
	if (unlikely((void *)(eth + 1) > frame_end(skb) || skb->vlan_present))
		return drop(skb, DROP_VX_MALFORMED);
	if (is_probe(eth))
		return probed(skb, cfg, peer, id, eth);
	struct endpoint *from = find_endpoint(read_mac(eth->src));
	if (unlikely(!from || from->peer != id))
		return drop(skb, DROP_VX_MAC);
	if (unlikely(is_group(eth->dst)))
		return drop(skb, DROP_VX_GROUP);
	return to_endpoint(skb, cfg, eth, from);
}

// Whether superframes came from this peer lately: its network card or ours joins segments, or nothing cuts them.
// They go the long way, and what belongs to the same flows must not overtake them.
inline_ int sends_whole(const __u64 *whole)
{
	return *whole && (long long)(bpf_ktime_get_coarse_ns() - *whole) < WHOLE_FOR;
}

// A segment that only acknowledges: there is nothing to join it to, and it may overtake data.
inline_ int is_bare_ack(const struct tunnelled *t, const void *end)
{
	const struct tcp *tcp = (void *)(t + 1);

	return (void *)(tcp + 1) <= end && t->inner_ip.version_len == 0x45 && tcp->flags == TCP_ACK &&
	       be16(t->inner_ip.len) == sizeof(t->inner_ip) + (tcp->offset >> 4) * 4;
}

// The header has no options. Its checksum is that of RFC 791.
inline_ void set_checksum(struct ip4 *ip)
{
	const __u16 *words = (void *)ip;
	__u32 sum = 0;

	ip->checksum = 0;
#pragma unroll
	for (int i = 0; i < sizeof(*ip) / sizeof(*words); i++)
		sum += words[i];
	sum = (sum & 0xffff) + (sum >> 16);
	ip->checksum = ~(sum + (sum >> 16));
}

// A datagram from one peer to another: out again as it is, superframes whole, to the next address. There is no outer
// UDP checksum, and one that covers the outer IP header stays right if that one's own is.
inline_ int relay_short(struct __sk_buff *skb, const struct config *cfg, const struct tunnelled *t, const struct peer *from, __u32 id)
{
	struct peer *to = find_peer(id);
	struct ip4 ip = t->ip;

	if (!(cfg->flags & CONFIG_RELAY) || !to || to == from || (to->flags & (PEER_UP | PEER_TO_V6)) != PEER_UP || !to->device ||
	    ip.ttl < TTL_LEAST || is_probe(&t->inner) || !is_let_in(from))
		return TC_PASS;
	ip.ttl -= TTL_RELAY;
	ip.src = to->local;
	ip.dst = be32(to->to[0]);
	set_checksum(&ip);
	stamp(&to->used, bpf_ktime_get_coarse_ns());
	if (bpf_skb_store_bytes(skb, sizeof(struct eth), &ip, sizeof(ip), 0))
		return drop(skb, DROP_VX_MALFORMED);
	count(skb, RELAYED);
	return bpf_redirect_neigh(to->device, 0, 0, 0);
}

SEC("tc/under_in")
int under_in(struct __sk_buff *skb)
{
	struct tunnelled *t = (void *)(__u64)skb->data;
	struct eth inner;

	if ((void *)(t + 1) > frame_end(skb) || t->eth.type != ETH_IP4 || t->ip.version_len != 0x45 || t->ip.protocol != PROTO_UDP)
		return TC_PASS;
	struct config *cfg = configuration();
	if (!cfg || t->udp.dport != cfg->port)
		return TC_PASS;
	if (t->ip.fragment & be16(0x3fff) || (t->ip.tos & 3) == 3 || t->udp.checksum || t->vxlan.flags != VXLAN_FLAGS ||
	    skb->vlan_present || skb->pkt_type != PACKET_HOST)
		return TC_PASS;
	__u32 vni = be32(t->vxlan.vni), id = vni >> 20;
	struct peer *peer = find_peer(id);
	if ((vni & 0xff) || !peer || (peer->flags & (PEER_KNOWN | PEER_UP | PEER_FROM_V6)) != (PEER_KNOWN | PEER_UP) ||
	    peer->device != skb->ifindex || peer->from[0] != be32(t->ip.src) || peer->local != t->ip.dst)
		return TC_PASS;
	if ((vni >> 8 & 0xfff) != cfg->self)
		return relay_short(skb, cfg, t, peer, vni >> 8 & 0xfff);
	if (t->inner.type != ETH_IP4 || is_group(t->inner.dst))
		return TC_PASS;
	int other = t->inner_ip.protocol != PROTO_TCP, alone = other || is_bare_ack(t, frame_end(skb));
	if (skb->gso_size) {
		stamp(&peer->whole[other], bpf_ktime_get_coarse_ns());
		return TC_PASS;
	}
	if (unlikely(!is_let_in(peer)))
		return TC_PASS;
	__u32 len = be16(t->ip.len);
	if (skb->len != sizeof(struct eth) + len || be16(t->udp.len) != len - sizeof(struct ip4))
		return TC_PASS;
	struct endpoint *from = find_endpoint(read_mac(t->inner.src));
	if (!from || from->peer != id)
		return TC_PASS;
	struct endpoint *to = 0;
	if (alone) {
		to = find_endpoint(read_mac(t->inner.dst));
		if (!to || (to->flags & (ENDPOINT_LOCAL | ENDPOINT_VETH)) != (ENDPOINT_LOCAL | ENDPOINT_VETH) ||
		    !share_network(from->nets, to->nets))
			return TC_PASS;
	} else if (!cfg->join) {
		return TC_PASS; // joined_in looks at the destination
	}
	if ((other || !alone) && sends_whole(&peer->whole[other]))
		return TC_PASS;
	inner = t->inner;
	// It takes what lies behind the outer Ethernet header, which then is where the inner one was.
	if (bpf_skb_adjust_room(skb, -(int)TUNNEL_HEADERS, ROOM_MAC, 0))
		return TC_PASS;
	if (bpf_skb_store_bytes(skb, 0, &inner, sizeof(inner), 0))
		return drop(skb, DROP_VX_MALFORMED);
	if (!to) {
		skb->queue_mapping = bpf_get_smp_processor_id() + 1; // queues there are chosen as received on
		return bpf_redirect(cfg->join, 0);
	}
	return deliver(skb, to, cfg, FROM_TUNNEL);
}

// Nobody else puts frames in there, but for what the kernel says of itself on any device.
SEC("tc/joined_in")
int joined_in(struct __sk_buff *skb)
{
	struct config *cfg = configuration();
	struct eth *eth = frame_start(skb);

	if (!cfg || (void *)(eth + 1) > frame_end(skb) || is_group(eth->dst))
		return TC_DROP;
	return to_endpoint(skb, cfg, eth, find_endpoint(read_mac(eth->src)));
}

char terms[] SEC("license") = "GPL"; // what the kernel is told; it knows no word for the other choice
