// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// What these programs need of the kernel's stable interface: types, constants, the helper functions by
// number, and how a map is declared for the loader. It is kept here, instead of including linux/bpf.h
// and libbpf's headers, so that clang alone generates the objects. Layouts and numbers are those of
// include/uapi/linux/bpf.h, which never change once released.

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;

#define SEC(name) __attribute__((section(name), used))
#define inline_ static inline __attribute__((always_inline))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

// Map declarations: the loader reads these members' types from BTF.
#define UINT(name, val) int(*name)[val]
#define TYPE(name, val) typeof(val) *name

enum {
	MAP_HASH = 1,
	MAP_ARRAY = 2,
	MAP_PERCPU_ARRAY = 6,
	MAP_LRU_HASH = 9,
	NO_PREALLOC = 1, // map flag: an element's memory is taken when it is added
};

// What a tc program says about a frame.
enum {
	TC_PASS = 0, // on with it: up the stack, into the bridge, out of the device
	TC_DROP = 2,
};

// The context of a tc program. The kernel turns each access into one of the real sk_buff.
struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_proto;
	__u32 priority;
	__u32 ingress_ifindex; // where the frame came in; 0: made on this host
	__u32 ifindex;         // the device that this program is attached to
	__u32 tc_index;
	__u32 cb[5];
	__u32 hash;
	__u32 tc_classid;
	__u32 data;     // first byte of the frame that may be read
	__u32 data_end; // and the byte after the last one
	__u32 napi_id, family, remote_ip4, local_ip4, remote_ip6[4], local_ip6[4], remote_port, local_port, data_meta;
	__u64 flow_keys, tstamp;
	__u32 wire_len, gso_segs;
	__u64 sk;
	__u32 gso_size; // of a superframe: bytes of payload in each packet of it; else 0. Since 5.7
};

// Outer addresses and ids of a tunnelled frame. IPv4 addresses are in host byte order, IPv6 ones as on
// the wire. local_* since 6.0: this size is why older kernels refuse.
struct bpf_tunnel_key {
	__u32 tunnel_id; // the VNI
	union {
		__u32 remote_ipv4;
		__u32 remote_ipv6[4];
	};
	__u8 tunnel_tos;
	__u8 tunnel_ttl;
	__u16 tunnel_flags;
	__u32 tunnel_label;
	union {
		__u32 local_ipv4;
		__u32 local_ipv6[4];
	};
};

enum {
	TUNNEL_IPV6 = 1 << 0,          // get and set: the outer packet is IPv6
	TUNNEL_ZERO_CSUM = 1 << 1,     // set: no outer UDP checksum
	TUNNEL_DONT_FRAGMENT = 1 << 2, // set: DF on the outer IPv4 packet
	REDIRECT_INGRESS = 1 << 0,     // bpf_redirect: as if the device had received the frame
	PACKET_HOST = 0,               // packet type: for this host
	ROOM_MAC = 1,                  // bpf_skb_adjust_room: right behind the Ethernet header
};

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value, __u64 flags) = (void *)2;
static __u64 (*const bpf_ktime_get_ns)(void) = (void *)5;
static __u32 (*const bpf_get_smp_processor_id)(void) = (void *)8;
static long (*const bpf_skb_store_bytes)(struct __sk_buff *skb, __u32 offset, const void *from, __u32 len, __u64 flags) = (void *)9;
static long (*const bpf_skb_get_tunnel_key)(struct __sk_buff *skb, struct bpf_tunnel_key *key, __u32 size, __u64 flags) = (void *)20;
static long (*const bpf_skb_set_tunnel_key)(struct __sk_buff *skb, struct bpf_tunnel_key *key, __u32 size, __u64 flags) = (void *)21;
static long (*const bpf_redirect)(__u32 ifindex, __u64 flags) = (void *)23;
static long (*const bpf_skb_load_bytes)(const struct __sk_buff *skb, __u32 offset, void *to, __u32 len) = (void *)26;
static long (*const bpf_skb_change_type)(struct __sk_buff *skb, __u32 type) = (void *)32;
static long (*const bpf_skb_pull_data)(struct __sk_buff *skb, __u32 len) = (void *)39;
static long (*const bpf_skb_adjust_room)(struct __sk_buff *skb, int bytes, __u32 mode, __u64 flags) = (void *)50;
static long (*const bpf_redirect_neigh)(__u32 ifindex, void *params, int size, __u64 flags) = (void *)152; // since 5.10
static long (*const bpf_redirect_peer)(__u32 ifindex, __u64 flags) = (void *)155;  // since 5.10
static __u64 (*const bpf_ktime_get_coarse_ns)(void) = (void *)160;                 // since 5.11

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the layouts of MAC keys are written for little-endian machines"
#endif
#define be16(x) __builtin_bswap16(x)
#define be32(x) __builtin_bswap32(x)
