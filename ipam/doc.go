// Package ipam gives containers addresses. Each peer owns parts of one range (package ring), hands out
// addresses of its own parts without asking anybody, and gets more space from other peers before it runs
// out. The core (core.go) is a state machine without goroutines, disk or network, driven by Run or by the
// simulation in the tests; allocator.go is what other rooms call.
//
// # Why no address is handed out twice
//
// An address belongs to the peer that owns it in the ring; only that peer hands it out, and only after
// the allocation is in its synced state file. So the question is whether two peers can both act as owner
// of one address. Write (e, n) for epoch and count of an address's stamp.
//
// Grants. The owner at (e, n) writes (e, n+1) naming the new owner. The grant is on its disk before it is
// in its own ring, and in its ring before it is sent or shown to the gossip room (core.write,
// Config.Store); from the write on it no longer hands the addresses out. So per address and epoch there
// is a chain of owners, each made by the one before, and every view is a prefix of it: merging by the
// higher stamp can be late but not wrong.
//   - Killed after the write, before sending: the grant is in the state file, the receiver gets it by
//     gossip after the restart. Killed before: nobody has heard of it.
//   - Lost grant message: the gossip delta or the comparing of tables brings it. Doubled or late grant: it
//     is merged by stamp, so an old one does nothing. Doubled request: the same grant is sent again.
//   - Failed write that may have reached the disk: it is undone in memory, nothing is sent, and the next
//     write corrects the keys before anything else is acknowledged.
//   - Receiver killed before it wrote the grant: it is in the giver's file and comes again. The receiver
//     writes new space before, or in the same transaction as, the first allocation out of it.
//
// Takeovers. A removal (rmpeer, ReclaimAfter, or a peer that finds a former life of its own) does not
// take anything by itself. It fences a life X: a fact that merges by union and is never withdrawn. Who
// declared it then asks every active member, until for each of them the last answer says: X is fenced
// here, on disk; this is the digest of what X owns in my view; and of the members I know. Only if both
// equal our own for all members at once, the first of those who fenced X writes (e+1, n, itself) for
// all that X owns. Why this is right:
//   - What X gave away before is known: the receiver is an active member (then its view was compared; if
//     it differed, it sent what it knows and we merged it), or is itself fenced. From its answer on, a
//     member's view of X's addresses is frozen within the epoch (core.frozen), so that its answer stays
//     true: a late grant of X, or of somebody X gave to, no longer changes it and is not used.
//   - What X still gives away later, as a ghost that is cut off, bears epoch e and loses everywhere to e+1.
//   - Two removals at once, on two peers: each member answered both, and told both of each other before
//     (the fences are part of the members' digest). At the time when all answers agree, both know all who
//     fenced X, and the first of them takes, the other waits (a later life of X's own peer comes before
//     all others: X's containers may still run there). If the first is itself fenced, the next one
//     takes; should the first have finished unheard, its writes are beaten by a higher epoch (Takeover
//     adds one for each fenced colleague).
//   - A member that is away is waited for. Its answer cannot be done without: it may hold the only copy of
//     a grant of X. The operator sees whom the removal waits for, and may remove that one as well.
//
// The fenced one. When a peer finds its life fenced, it stops at once, takes a new life (a new random
// number, on disk first) and joins as a new member without space. Its live containers keep running; it
// asks the present owner for each address (chase). It gets it unless it was given out meanwhile; then both
// sides are named in log and Status, and the container's next Allocate renumbers it. Until the fenced one
// can hear of it, the same address may be in use twice: that is what removing a peer that still runs
// means, and why RemovePeer refuses peers that are alive.
//
// New members. Before a peer uses space under a new life, every member that is alive must have recorded
// it, on disk, and it must know all members and fences that they know (attach). Every later removal asks
// one of those witnesses, and so comes to know the new one. The limit: if all members that knew of a new
// one are lost and removed while it is cut off from those who remain, they cannot know that it exists, and
// take over what it was given. No protocol can exclude this without stopping new peers whenever any
// member is away (a lone survivor must be able to go on, and it cannot know what only the dead knew). When
// they meet, the later epoch wins, and the loser is treated like a fenced one: re-claim, or collision.
// What cannot happen is that an owner is nobody's member: to hear of a segment is to hear that its owner is a
// member (ring.Merge). And a peer whose view has gaps hands out nothing and takes nothing over, for it has
// not heard of whoever owns them; if nobody who has is left, `repair` fills them (repair.go).
//
// Restart. The state file is what was acknowledged, so a restarted peer may be behind but is not wrong,
// unless it was removed meanwhile or the file is an old copy. Both show in other members' views; so it
// hands out nothing before all members, or after the grace time those that are alive, have compared their
// view of its addresses with its own. A change of its own addresses that it did not write means an old
// copy: it treats its life as lost (compareSpace), as it does when the state file is gone and the ring
// names another life of it. The old life is then removed like any other, by the new one. With
// Config.WaitForLive nothing is handed out before the host's running containers were counted (Reclaim).
// The limit: with an old copy, and all who know better out of reach for longer than the grace time, it hands
// out again what it had given away since; once they meet, the others keep it.
//
// # Clusters
//
// The ring is founded once (package election, or by the seed). Its random id is in every delta and
// message; what bears another id or another range is not merged, but reported on both sides. repair.go
// says how two clusters become one. The limit: voters that have lost their state forget that they voted,
// and if those who know the ring are out of reach, enough of them found another one.
package ipam
