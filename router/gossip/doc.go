// Package gossip keeps the peers of a mesh together. It owns the control loop: it dials the targets and
// the peers that others tell of, keeps the topology and the routes made of it, spreads changes of the
// replicated tables, repairs them by comparing digests, and tells the other rooms who is alive, suspect
// or gone.
//
//   - dialer decides whom to dial and when (pure, time as an argument);
//   - linkBook decides what is published about our links (pure);
//   - spreader passes changes on to a few peers at a time;
//   - syncer compares tables in three steps of datagrams;
//   - members runs memberlist over the tunnel: who is a member, and a second opinion on who has failed.
//
// Invariant: nothing that a peer sends, however odd, makes the loop wait, grow without bound or panic;
// and a peer to whom we have a live link is never suspected because of what others say.
package gossip
