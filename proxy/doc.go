// Package proxy stands between Docker's clients and its daemon and puts the containers they start on the
// mesh. It listens like the daemon, forwards what it does not need byte for byte, hijacked streams
// included, and changes four calls: create (entrypoint, host name, DNS settings and a label that asks for
// addresses), start and restart (answered when the container is attached), and, on request, inspect. Streams,
// files and images have a connection of their own to the daemon each, and pass undecoded.
//
// Moving parts: one HTTP server per listening address, one transport to the daemon, no state. What a
// container is to be given is written on the container itself (LabelAddrs), so a proxy that is killed
// between create and start loses nothing.
//
// Invariant: a body that the proxy judges is the one that the daemon gets: it is decoded once, strictly,
// and encoded from what was decoded. What the daemon might read differently is refused.
package proxy
