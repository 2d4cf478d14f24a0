// Package dns answers the names of the mesh and forwards all others to the host's own name servers.
//
// A datagram takes this way: udp.go reads a batch of them, access.go says by interface and source who may
// ask, query.go takes the question apart by hand, answer.go answers names of the mesh from package records
// without allocating or locking, and cache.go those of the outside that are known. Only what is left gets
// a goroutine: forward.go asks the upstream servers that resolvconf.go found. TCP (tcp.go) shares all of
// it. Messages that come from upstream are taken apart by miekg/dns.
//
// Invariant: a name in the domain is never asked outside, and who is not allowed gets no more bytes than
// it sent.
package dns
