// Package router decides: which peers exist and how they are linked (Topology), by whom each is reached
// (Routes), and what happens to a frame (Switch). It is pure: no I/O, no goroutine, and no clock, for
// the time comes as an argument. The tunnel moves the frames and the gossip room carries the topology.
//
// Invariant: what came from the tunnel never goes back to the tunnel (split horizon), so there is no
// loop to break and no spanning tree.
package router
