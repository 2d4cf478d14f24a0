// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// The maps: all that the programs know. meshd writes them, the programs read them and write only
// counters, stamps and the rate limiter. Go gets its own view of these structures generated from here;
// a change of any of them needs a new LayoutVersion in layout.go.

#define MAX_PEERS 4096       // short ids have 12 bits
#define MAX_ENDPOINTS 131072 // in the whole mesh
#define MAX_PORTS 4096       // on this host
#define MAX_ADDR4 16         // of one port
#define MAX_ADDR6 8
#define NET_WORDS 4          // 256 networks with ports on this host

// What this host is. One entry.
struct config {
	__u32 self;           // own short id; 0: none yet, no kernel path
	__u32 flags;          // CONFIG_*
	__u32 vxlan;          // interface indexes: mesh-vx,
	__u32 tap;            // mesh-tap, 0 if there is none,
	__u32 bridge;         // mesh,
	__u32 join;           // mesh-vx0, 0 if there is none
	__u32 port;           // UDP port of the tunnel, network byte order
	__u32 pad;
	__u64 group_interval; // ns per group frame that a port may send for ever
	__u64 group_burst;    // ns by which it may run ahead of that
};

enum {
	CONFIG_RELAY = 1, // forward frames from peers to peers
};

// A peer, by its short id.
struct peer {
	__u32 flags;   // PEER_*
	__u32 device;  // interface index: where its datagrams come in and go out; 0: not known, or not to be looked at there
	__u32 local;   // and the address of this host to which they come, IPv4, network byte order
	__u32 heard;   // when something of it last came through the host's IP stack, in units of 2^26 ns
	__u32 to[4];   // underlay address to send to: the peer's own, or that of the relay. IPv4: host byte order, in to[0]
	__u32 from[4]; // underlay address that its datagrams bear: its own, or that of the relay
	__u64 used;    // when a frame was last sent to it, ns, at most STAMP_EVERY late
	__u64 whole[2]; // when a superframe last came from it, of TCP and of others: as used
};

enum {
	PEER_KNOWN = 1,   // datagrams with its id are taken, probes to it are sent
	PEER_UP = 2,      // the kernel path to it is proven: frames are sent on it
	PEER_TO_V6 = 4,   // to[] is an IPv6 address
	PEER_FROM_V6 = 8, // from[] is
	PEER_RELAYED = 16, // no direct link: its frames may come from the address of any peer
};

struct underlay_key {
	__u32 addr[4]; // as peer.from
	__u32 v6;      // 0 or 1
};

// An endpoint: one attached interface somewhere in the mesh, by its MAC address. Its networks are bits
// that only this host gives a meaning: those with a port here are numbered, all others have no bit.
struct endpoint {
	__u16 peer;           // short id of the peer it is behind, own one included; 0: that peer has none
	__u16 flags;          // ENDPOINT_*
	__u32 ifindex;        // if local: interface that leads to it; 0: somewhere behind the bridge
	__u64 nets[NET_WORDS];
	__u64 used;           // when a frame was last sent to it, as peer.used
};

enum {
	ENDPOINT_LOCAL = 1,     // on this host
	ENDPOINT_VETH = 2,      // ifindex is the host end of a veth pair
	ENDPOINT_HOST = 4,      // it is the bridge itself: the host's own address
	ENDPOINT_ANNOUNCED = 8, // local, and the other peers have had time to hear of it
};

// A port: the host end of a container's veth pair, or a foreign interface on our bridge, by ifindex.
struct port {
	__u64 mac;            // of the interface inside, as read_mac() returns it; 0: nobody in particular
	__u64 nets[NET_WORDS];
	__u64 group_until;    // rate limiter: the time up to which group frames are used up, ns
	__u32 flags;          // PORT_*
	__u16 count4, count6; // addresses that follow
	__u32 addr4[MAX_ADDR4]; // network byte order
	__u32 mask4[MAX_ADDR4];
	__u32 addr6[MAX_ADDR6][4];
	__u32 mask6[MAX_ADDR6][4];
};

enum {
	PORT_EXEMPT = 1,    // joined on purpose (a VM, another bridge): may send as anybody
	PORT_ANNOUNCED = 2, // as ENDPOINT_ANNOUNCED
};

// Frames by what became of them. What comes before DROP_FIRST was carried, the rest dropped.
enum reason {
	TO_TUNNEL,   // from a port into the vxlan device
	TO_LOCAL,    // from a port straight to a port of this host
	TO_TAP,      // to a known endpoint, handed to the userspace path because the kernel path is not up
	TO_BRIDGE,   // broadcast, multicast or unknown, left to the bridge
	FROM_TUNNEL, // from the vxlan device to an endpoint of this host
	RELAYED,     // from the vxlan device out of it again
	PROBED,      // probes sent, turned around and received

	DROP_NO_PORT,         // program attached, port not described: closed
	DROP_MALFORMED,       // too short for what it says it is
	DROP_SOURCE_MAC,      // not the port's own
	DROP_VLAN,            // tagged: the guard does not look inside
	DROP_LINK_CONTROL,    // BPDU, LLDP and other frames to 01:80:c2:00:00:0x (IEEE 802.1D 7.12.6)
	DROP_ARP,             // sender is not the port's own
	DROP_SOURCE_IP4,      // source address is not the port's own
	DROP_SOURCE_IP6,
	DROP_NEIGHBOUR,       // neighbour discovery in somebody else's name (RFC 4861)
	DROP_ROUTER,          // router advertisement
	DROP_REDIRECT,        // ICMP redirect
	DROP_DHCP,            // answers of a DHCP server
	DROP_EXTENSION,       // chain of IPv6 extension headers that hides what it carries (RFC 7113)
	DROP_RATE,            // too many group frames
	DROP_LOOPED,          // on a foreign interface, from a sender that is elsewhere: it came round a second link
	DROP_ISOLATED,        // to an endpoint that shares no network with the port
	DROP_OUT_ADDRESSEE,   // unicast on its way to a port, for another MAC
	DROP_OUT_ISOLATED,    // on its way to a port, from somebody who shares no network with it

	DROP_VX_PLAIN,     // no tunnel key: did not come through the tunnel
	DROP_VX_SOURCE_ID, // source id is no peer's, or our own
	DROP_VX_ADDRESS,   // outer source address is not that peer's
	DROP_VX_DEST_ID,   // for another peer that we cannot relay to
	DROP_VX_HOPS,      // relayed too often
	DROP_VX_MALFORMED, // runt, or VLAN tag
	DROP_VX_MAC,       // inner source MAC is not an endpoint of that peer
	DROP_VX_GROUP,     // broadcast and multicast come by the userspace path only
	DROP_VX_UNKNOWN,   // for nobody on this host
	DROP_VX_ISOLATED,  // source and destination share no network
	DROP_PROBE,        // probe that no meshd made
	DROP_TUNNEL_KEY,   // the kernel refused the tunnel key

	REASONS,
};
#define DROP_FIRST DROP_NO_PORT

// What a bit of nets[] stands for. Only meshd reads it, after a restart.
struct network {
	__u32 addr[4]; // IPv4 in addr[0]; network byte order
	__u16 length;  // of the prefix; 0: bit not in use
	__u16 v6;
};

struct counter {
	__u64 frames; // a superframe counts once
	__u64 bytes;
};

struct offence_key {
	__u32 ifindex;
	enum reason reason;
};

struct {
	UINT(type, MAP_ARRAY);
	UINT(max_entries, 1);
	TYPE(key, __u32);
	TYPE(value, struct config);
} config SEC(".maps");

struct {
	UINT(type, MAP_ARRAY);
	UINT(max_entries, MAX_PEERS);
	TYPE(key, __u32);
	TYPE(value, struct peer);
} peers SEC(".maps");

// Underlay addresses of peers; the value is the short id. Asked only about relayed frames.
struct {
	UINT(type, MAP_HASH);
	UINT(max_entries, 2 * MAX_PEERS);
	UINT(map_flags, NO_PREALLOC);
	TYPE(key, struct underlay_key);
	TYPE(value, __u32);
} underlays SEC(".maps");

struct {
	UINT(type, MAP_HASH);
	UINT(max_entries, MAX_ENDPOINTS);
	UINT(map_flags, NO_PREALLOC);
	TYPE(key, __u64);
	TYPE(value, struct endpoint);
} endpoints SEC(".maps");

struct {
	UINT(type, MAP_HASH);
	UINT(max_entries, MAX_PORTS);
	UINT(map_flags, NO_PREALLOC);
	TYPE(key, __u32);
	TYPE(value, struct port);
} ports SEC(".maps");

struct {
	UINT(type, MAP_ARRAY);
	UINT(max_entries, NET_WORDS * 64);
	TYPE(key, __u32);
	TYPE(value, struct network);
} networks SEC(".maps");

struct {
	UINT(type, MAP_PERCPU_ARRAY);
	UINT(max_entries, REASONS);
	TYPE(key, __u32);
	TYPE(value, struct counter);
} counters SEC(".maps");

// Who did what is dropped at a port: the value counts frames.
struct {
	UINT(type, MAP_LRU_HASH);
	UINT(max_entries, 4096);
	TYPE(key, struct offence_key);
	TYPE(value, __u64);
} offences SEC(".maps");
