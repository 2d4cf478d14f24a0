package mesh

// Channel is the first byte of every message between peers: which room it is for.
type Channel byte

const (
	ChanMember    Channel = 1 // memberlist packets
	ChanTopology  Channel = 2 // deltas of peers and links
	ChanRing      Channel = 3 // deltas of the address ring
	ChanNames     Channel = 4 // deltas of endpoints and names
	ChanAddresses Channel = 5 // requests for address space, from one peer to another
	ChanSync      Channel = 6 // digests of the replicated tables
	ChanBundle    Channel = 7 // several messages in one
)

// MaxMessage is the largest message between peers, in bytes with its channel: it fits a datagram on
// every path that the tunnel accepts.
const MaxMessage = 1200

// Item stands for one entry of a replicated table when two peers compare theirs. Key is a hash of what
// identifies the entry and Version one of its key and content: equal tables have equal sets of items.
type Item struct{ Key, Version uint64 }
