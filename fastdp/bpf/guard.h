// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// The port guard: what a container may say. Each function returns 0, or the reason to drop the frame.
// The rule is the same everywhere: a container speaks in its own name only, and not as a router, a
// switch or a DHCP server.

inline_ int owns4(const struct port *port, __u32 addr)
{
	for (int i = 0; i < MAX_ADDR4; i++) {
		if (i >= port->count4)
			break;
		if (port->addr4[i] == addr)
			return 1;
	}
	return 0;
}

// The link-local address that the kernel makes from the MAC (RFC 4291 appendix A) is always its own.
inline_ int is_eui64(const struct port *port, const __u32 *addr)
{
	const __u8 *m = (const __u8 *)&port->mac, *a = (const __u8 *)addr;

	return a[0] == 0xfe && a[1] == 0x80 && !a[2] && !a[3] && !addr[1] &&
	       a[8] == (m[0] ^ 2) && a[9] == m[1] && a[10] == m[2] && a[11] == 0xff &&
	       a[12] == 0xfe && a[13] == m[3] && a[14] == m[4] && a[15] == m[5];
}

// addr is a copy on the stack or in a map: it is read by word and by byte.
static __attribute__((noinline)) int owns6(const struct port *port, const __u32 *addr)
{
	if (!port || !addr)
		return 0;
	for (int i = 0; i < MAX_ADDR6; i++) {
		if (i >= port->count6)
			break;
		if (same6(port->addr6[i], addr))
			return 1;
	}
	return is_eui64(port, addr);
}

inline_ int guard_arp(const struct port *port, const struct arp *a, void *end)
{
	if ((void *)(a + 1) > end)
		return DROP_MALFORMED;
	if (a->hardware != be16(1) || a->protocol != ETH_IP4 || a->hardware_len != 6 || a->protocol_len != 4)
		return DROP_ARP;
	if (read_mac(a->sender_mac) != port->mac)
		return DROP_ARP;
	if (owns4(port, a->sender))
		return 0;
	// A probe for a duplicate of its own address bears no sender (RFC 5227 section 2.1.1).
	if (!a->sender && a->op == be16(1) && owns4(port, a->target))
		return 0;
	return DROP_ARP;
}

// What is from a DHCP server, or for a client: clients do not look at the port that it comes from.
inline_ int is_dhcp(const struct udp *udp, __u16 server, __u16 client)
{
	return udp->sport == server || udp->dport == client ? DROP_DHCP : 0;
}

// Groups that switches speak in: 01:80:c2:00:00:0x (IEEE 802.1D 7.12.6), and Cisco's for the same, 01:00:0c:cc:cc:cc and :cd.
inline_ int is_link_control(__u64 mac)
{
	return (mac & 0xf0ffffffffffULL) == 0xc28001ULL || (mac & 0xfeffffffffffULL) == 0xcccccc0c0001ULL;
}

inline_ int guard_ip4(const struct port *port, const struct ip4 *ip, void *end)
{
	__u32 len;

	if ((void *)(ip + 1) > end)
		return DROP_MALFORMED;
	len = (ip->version_len & 15) * 4;
	if (ip->version_len >> 4 != 4 || len < sizeof(*ip))
		return DROP_MALFORMED;
	if (!owns4(port, ip->src))
		return DROP_SOURCE_IP4;
	if (ip->protocol != PROTO_UDP && ip->protocol != PROTO_ICMP)
		return 0;
	if (ip->fragment & be16(0x1fff))
		return 0; // not a first fragment: the first one is judged
	struct udp *l4 = (void *)ip + len;
	if ((void *)(l4 + 1) > end)
		return DROP_MALFORMED;
	if (ip->protocol == PROTO_ICMP)
		return *(__u8 *)l4 == ICMP_REDIRECT ? DROP_REDIRECT : 0;
	return is_dhcp(l4, be16(67), be16(68));
}

// An ICMPv6 message at offset off. Read by copies: behind extension headers it may lie anywhere.
// from is the packet's source, already known to be the port's own or unspecified.
static __attribute__((noinline)) int guard_icmp6(struct __sk_buff *skb, const struct port *port, __u32 off, int unspecified)
{
	struct {
		__u8 type, code;
		__u16 checksum;
		__u32 flags;
		__u32 target[4];
	} m = {};
	__u8 room[12] __attribute__((aligned(8))), *option = room + 2; // the MAC in it at an even word

	if (!port || bpf_skb_load_bytes(skb, off, &m, 8))
		return DROP_MALFORMED;
	switch (m.type) {
	case ICMP6_ROUTER_ADVERT:
		return DROP_ROUTER;
	case ICMP6_REDIRECT:
		return DROP_REDIRECT;
	case ICMP6_MLD_REPORT:
	case ICMP6_MLD_DONE:
	case ICMP6_MLD2_REPORT:
		return 0; // may come from the unspecified address (RFC 3590)
	case ICMP6_NEIGHBOUR_SOLICIT:
	case ICMP6_NEIGHBOUR_ADVERT:
		break;
	default:
		return unspecified ? DROP_SOURCE_IP6 : 0;
	}
	if (bpf_skb_load_bytes(skb, off, &m, sizeof(m)))
		return DROP_MALFORMED;
	// It asks about anybody, but answers, and tests for duplicates, only for itself.
	if ((m.type == ICMP6_NEIGHBOUR_ADVERT || unspecified) && !owns6(port, m.target))
		return DROP_NEIGHBOUR;
	off += sizeof(m);
	for (int i = 0; i < 4; i++) {
		if (off >= skb->len)
			return 0;
		if (bpf_skb_load_bytes(skb, off, option, 8) || !option[1])
			return DROP_MALFORMED;
		if ((option[0] == OPTION_SOURCE_MAC || option[0] == OPTION_TARGET_MAC) && read_mac(option + 2) != port->mac)
			return DROP_NEIGHBOUR;
		off += option[1] * 8;
	}
	return off < skb->len ? DROP_NEIGHBOUR : 0;
}

// Extension headers, at most four: then what they carry.
static __attribute__((noinline)) int guard_extensions(struct __sk_buff *skb, const struct port *port, __u8 next, int unspecified)
{
	__u32 off = sizeof(struct eth) + sizeof(struct ip6);
	__u8 h[8];

	if (!port)
		return DROP_MALFORMED;
	for (int i = 0; i < 5; i++) {
		switch (next) {
		case PROTO_ICMP6:
			return guard_icmp6(skb, port, off, unspecified);
		case PROTO_UDP:
			if (bpf_skb_load_bytes(skb, off, h, 8))
				return DROP_MALFORMED;
			return is_dhcp((struct udp *)h, be16(547), be16(546));
		case PROTO_HOPOPTS:
		case PROTO_ROUTING:
		case PROTO_DESTOPTS:
			if (bpf_skb_load_bytes(skb, off, h, 8))
				return DROP_MALFORMED;
			off += (h[1] + 1) * 8;
			break;
		case PROTO_FRAGMENT:
			if (bpf_skb_load_bytes(skb, off, h, 8))
				return DROP_MALFORMED;
			if (h[2] | (h[3] & 0xf8))
				return 0; // not a first fragment: the first one is judged
			off += 8;
			break;
		default:
			return 0;
		}
		next = h[0];
	}
	return DROP_EXTENSION;
}

inline_ int guard_ip6(struct __sk_buff *skb, const struct port *port, const struct ip6 *ip, void *end)
{
	__u32 src[4];
	int unspecified;
	__u8 next;

	if ((void *)(ip + 1) > end)
		return DROP_MALFORMED;
	src[0] = ip->src[0];
	src[1] = ip->src[1];
	src[2] = ip->src[2];
	src[3] = ip->src[3];
	next = ip->next;
	if (*(__u8 *)ip >> 4 != 6)
		return DROP_MALFORMED;
	unspecified = zero6(src);
	if (!unspecified && !owns6(port, src))
		return DROP_SOURCE_IP6;
	switch (next) {
	case PROTO_ICMP6:
	case PROTO_UDP:
	case PROTO_HOPOPTS:
	case PROTO_ROUTING:
	case PROTO_DESTOPTS:
	case PROTO_FRAGMENT: {
		int reason = guard_extensions(skb, port, next, unspecified);
		if (reason)
			return reason;
		// Nothing but neighbour discovery and MLD may lack a source; those were let through as such.
		if (unspecified && next != PROTO_ICMP6 && next != PROTO_HOPOPTS)
			return DROP_SOURCE_IP6;
		return 0;
	}
	}
	return unspecified ? DROP_SOURCE_IP6 : 0;
}

inline_ int guard(struct __sk_buff *skb, const struct port *port, const struct eth *eth, void *end)
{
	if (read_mac(eth->src) != port->mac)
		return DROP_SOURCE_MAC;
	if (skb->vlan_present || eth->type == be16(0x8100) || eth->type == be16(0x88a8))
		return DROP_VLAN;
	if (unlikely(is_link_control(read_mac(eth->dst))))
		return DROP_LINK_CONTROL;
	switch (eth->type) {
	case ETH_IP4:
		return guard_ip4(port, (void *)(eth + 1), end);
	case ETH_IP6:
		return guard_ip6(skb, port, (void *)(eth + 1), end);
	case ETH_ARP:
		return guard_arp(port, (void *)(eth + 1), end);
	case ETH_LLDP:
		return DROP_LINK_CONTROL;
	}
	// Other protocols have no addresses that we know of. Below 0x600 it is a length, and an LLC header
	// follows: of the spanning tree, whatever group it is sent to, or of something harmless.
	if (be16(eth->type) < 0x600) {
		__u8 *sap = (__u8 *)(eth + 1);
		if ((void *)(sap + 1) > end)
			return DROP_MALFORMED;
		if (*sap == LLC_SPANNING_TREE)
			return DROP_LINK_CONTROL;
	}
	return 0;
}

// Whether a port may send one more frame to a group. The limiter is GCRA: group_until runs ahead of the
// clock by one interval per frame, at most by the burst. Two CPUs at once may let one frame too many
// through; that is cheaper than a lock.
inline_ int may_flood(struct port *port, const struct config *cfg)
{
	__u64 now = bpf_ktime_get_ns(), until = port->group_until;

	if (until < now)
		until = now;
	if (until - now > cfg->group_burst)
		return 0;
	port->group_until = until + cfg->group_interval;
	return 1;
}

inline_ int share_network(const __u64 *a, const __u64 *b)
{
	return ((a[0] & b[0]) | (a[1] & b[1]) | (a[2] & b[2]) | (a[3] & b[3])) != 0;
}

// Whether the IP source of a frame that nobody known sent lies in a network of the port it is for. Link-local
// IPv6 sources do, if the port has IPv6.
static __attribute__((noinline)) int in_networks(struct __sk_buff *skb, const struct port *port)
{
	struct eth eth;
	__u32 src[4];

	if (!port || bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return 0;
	switch (eth.type) {
	case ETH_IP4:
		if (bpf_skb_load_bytes(skb, 14 + 12, src, 4))
			return 0;
		break;
	case ETH_ARP:
		if (bpf_skb_load_bytes(skb, 14 + 14, src, 4))
			return 0;
		break;
	case ETH_IP6:
		if (bpf_skb_load_bytes(skb, 14 + 8, src, 16))
			return 0;
		if ((src[0] & be32(0xffc00000)) == be32(0xfe800000))
			return port->count6 > 0;
		for (int i = 0; i < MAX_ADDR6; i++) {
			const __u32 *m = port->mask6[i], *a = port->addr6[i];
			if (i >= port->count6)
				break;
			if (!((src[0] ^ a[0]) & m[0]) && !((src[1] ^ a[1]) & m[1]) &&
			    !((src[2] ^ a[2]) & m[2]) && !((src[3] ^ a[3]) & m[3]))
				return 1;
		}
		return 0;
	default:
		return 0;
	}
	for (int i = 0; i < MAX_ADDR4; i++) {
		if (i >= port->count4)
			break;
		if (!((src[0] ^ port->addr4[i]) & port->mask4[i]))
			return 1;
	}
	return 0;
}
