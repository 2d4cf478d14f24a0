package gossip

import (
	"time"

	"meshd/mesh"
)

// Preload takes in the links that wait, in a node that does not run yet and knows nobody, and returns what it would
// tell of itself.
func (n *Node) Preload(now time.Time) (deltas [][]byte) {
	for _, ev := range n.links {
		n.onLink(ev, now)
	}
	n.links = nil
	clear(n.state.again) // there is nothing to ask for
	n.publish(now)
	n.spread = spreader{}
	var keys []uint64
	for _, it := range n.topology.Items() {
		keys = append(keys, it.Key)
	}
	return n.topology.Encode(keys, mesh.MaxMessage)
}
