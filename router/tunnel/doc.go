// Package tunnel is the UDP underlay between peers: end-to-end sessions, the links and relays that carry
// them, and the pump that moves Ethernet frames between the local bridge and the other peers.
//
// Moving parts. One goroutine (controlLoop) owns handshakes, links, timers and everything that changes
// slowly. One goroutine per socket (receiver) opens datagrams and writes frames to the port; one per TAP
// queue (pump) reads frames, cuts them to datagrams and seals them. The last two read what the first one
// publishes through atomic pointers, so a frame meets no lock that another core wants.
//
// The wire format is docs/protocol.md.
//
// Invariant: with a password nothing leaves in clear. What cannot be sealed is dropped and counted.
package tunnel
