// Package records is the replicated table of endpoints and names: which interface is on which peer, with
// which MAC, addresses and names, and which names people added by hand. Every peer holds all of it; the
// gossip room carries the deltas and compares digests. The switch reads the MACs from it and the DNS
// server the names. Standard library only.
//
// A table is made of three kinds of rows:
//
//   - an endpoint, written by its own peer only, with a version {generation, sequence} that this peer
//     counts up at every change. A withdrawn endpoint is a row without content, a tombstone;
//   - a floor, one per peer: everything of that peer at or below this version is dead. A peer that
//     restarts takes a new generation and raises its floor to it, which ends what its former run announced
//     and did not repeat. It also re-issues its oldest live rows now and then and raises the floor past
//     its tombstones. So these tombstones need no age: a floor keeps what was deleted dead for ever,
//     however long the partition, and their number stays below that of the live endpoints;
//   - a name made by hand, which any peer may add and remove: the last writer wins by a Lamport clock.
//     These rows are on disk. Their tombstones are kept for TombstoneAge of running time.
//
// Every row is signed by its writer; what others make up is not taken in (see Keys).
//
// No wall clock takes part. Invariant: merging is a join (commutative, associative, idempotent), for rows
// are only ever replaced by larger versions and a floor only rises.
//
// Writers take one lock. Readers of names and addresses take none: the index is a set of small immutable
// maps behind atomic pointers.
package records
