// Package hostnet keeps this host's part of the mesh in the kernel: the bridge, the TAP device through
// which frames reach meshd, the veth pair of every attached container, addresses on the bridge, and the
// firewall. Callers state what should be; the package reads what is and applies the difference, so that
// every function may be repeated, also after a crash half way, and a restart adopts what it finds.
//
// Objects are recognised by name and by an alias that starts with "meshd:". Devices of others are never
// changed: one of them under a name of ours is an error that names it.
//
// The host's namespace is that of the thread which calls Open. Work inside another namespace happens on
// a locked thread of its own.
package hostnet
