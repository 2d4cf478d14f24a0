package mesh

import "fmt"

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

// Refusal is the error of a Merge that took in only some of a delta: what it returns as news is the rest.
// Who passed the rows on need not have made them up: it may know another bearer of the name.
type Refusal struct {
	Forged  int // rows that whom they are about has not signed
	Foreign int // rows signed with another key than the one that bears the name
	Unknown int // rows of peers whose key is not known yet
}

func (r *Refusal) Error() string {
	return fmt.Sprintf("rows refused: %d not signed by whom they are about, %d by another bearer of the name, %d of unknown peers",
		r.Forged, r.Foreign, r.Unknown)
}

// Err is r, or nil if nothing was refused.
func (r *Refusal) Err() error {
	if *r == (Refusal{}) {
		return nil
	}
	return r
}
