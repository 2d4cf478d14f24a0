// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Headers as they lie in a frame. Multi-byte fields are in network byte order.

#define ETH_IP4 be16(0x0800)
#define ETH_ARP be16(0x0806)
#define ETH_IP6 be16(0x86dd)
#define ETH_LLDP be16(0x88cc)
// Probes of the kernel path bear the two types that IEEE 802 sets aside for local experiments, and
// addresses of their own (probe_mac): containers may use the types among themselves.
#define ETH_PROBE be16(0x88b5)  // request, turned around by the far kernel
#define ETH_PROBED be16(0x88b6) // answer, read by meshd
#define LLC_SPANNING_TREE 0x42  // service access point of IEEE 802.1D

struct eth {
	__u8 dst[6];
	__u8 src[6];
	__u16 type;
} __attribute__((packed));

struct arp { // for Ethernet and IPv4, RFC 826
	__u16 hardware, protocol;
	__u8 hardware_len, protocol_len;
	__u16 op;
	__u8 sender_mac[6];
	__u32 sender;
	__u8 target_mac[6];
	__u32 target;
} __attribute__((packed));

struct ip4 { // RFC 791
	__u8 version_len;
	__u8 tos;
	__u16 len, id, fragment;
	__u8 ttl, protocol;
	__u16 checksum;
	__u32 src, dst;
} __attribute__((packed));

struct ip6 { // RFC 8200
	__u32 version_class_flow;
	__u16 len;
	__u8 next, hops;
	__u32 src[4], dst[4];
} __attribute__((packed));

struct udp {
	__u16 sport, dport, len, checksum;
} __attribute__((packed));

struct tcp { // RFC 9293
	__u16 sport, dport;
	__u32 seq, ack;
	__u8 offset, flags; // offset: of the data, in words, in the upper half
	__u16 window, checksum, urgent;
} __attribute__((packed));
#define TCP_ACK 0x10

struct vxlan { // RFC 7348
	__u32 flags, vni; // the VNI in the upper three bytes
} __attribute__((packed));
#define VXLAN_FLAGS be32(0x08000000) // a VNI, and nothing else

// A datagram of the tunnel from its Ethernet header on, with the frame in it.
struct tunnelled {
	struct eth eth;
	struct ip4 ip;
	struct udp udp;
	struct vxlan vxlan;
	struct eth inner;
	struct ip4 inner_ip;
} __attribute__((packed));
#define TUNNEL_HEADERS (sizeof(struct ip4) + sizeof(struct udp) + sizeof(struct vxlan) + sizeof(struct eth))

enum {
	PROTO_HOPOPTS = 0,
	PROTO_ICMP = 1,
	PROTO_TCP = 6,
	PROTO_UDP = 17,
	PROTO_ROUTING = 43,
	PROTO_FRAGMENT = 44,
	PROTO_ICMP6 = 58,
	PROTO_DESTOPTS = 60,

	ICMP_REDIRECT = 5,
	ICMP6_MLD_REPORT = 131,
	ICMP6_MLD_DONE = 132,
	ICMP6_ROUTER_ADVERT = 134,
	ICMP6_NEIGHBOUR_SOLICIT = 135,
	ICMP6_NEIGHBOUR_ADVERT = 136,
	ICMP6_REDIRECT = 137,
	ICMP6_MLD2_REPORT = 143,

	OPTION_SOURCE_MAC = 1, // of neighbour discovery, RFC 4861 section 4.6
	OPTION_TARGET_MAC = 2,
};

// A MAC address as a number: its first byte is the lowest one. Keys of the endpoints map are such.
inline_ __u64 read_mac(const __u8 *mac)
{
	return *(const __u32 *)mac | (__u64) * (const __u16 *)(mac + 4) << 32;
}

inline_ int is_group(const __u8 *mac)
{
	return mac[0] & 1;
}

// The address that probes to and from a short id bear: 02:6d:65:73:iH:iL, a locally administered one
// that no endpoint has.
inline_ __u64 probe_mac(__u32 id)
{
	return 0x73656d02 | (__u64)(id >> 8 & 0xff) << 32 | (__u64)(id & 0xff) << 40;
}

// Reads the id back; 0 if mac is no such address.
inline_ __u32 probe_id(__u64 mac)
{
	if ((__u32)mac != 0x73656d02)
		return 0;
	return (mac >> 32 & 0xff) << 8 | mac >> 40;
}

inline_ int is_probe(const struct eth *eth)
{
	return unlikely(eth->type == ETH_PROBE || eth->type == ETH_PROBED) && probe_id(read_mac(eth->dst));
}

inline_ int same6(const __u32 *a, const __u32 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

inline_ int zero6(const __u32 *a)
{
	return !(a[0] | a[1] | a[2] | a[3]);
}

// Makes the headers readable in place: those of a frame that came in pieces may lie elsewhere.
#define HEADERS 74 // Ethernet, IPv6 and 20 bytes more
inline_ void want_headers(struct __sk_buff *skb)
{
	__u32 here = skb->data_end - skb->data;

	if (unlikely(here < HEADERS && here < skb->len))
		bpf_skb_pull_data(skb, skb->len < HEADERS ? skb->len : HEADERS);
}

inline_ struct eth *frame_start(struct __sk_buff *skb)
{
	return (struct eth *)(__u64)skb->data;
}

inline_ void *frame_end(struct __sk_buff *skb)
{
	return (void *)(__u64)skb->data_end;
}
