// Package lab builds whole hosts out of namespaces, so that the real binaries run with their default
// paths beside each other on one machine. It uses iproute2, nftables and Docker as a person would, by
// their commands, and imports none of the product's rooms.
//
// A Host is its own network, mount, process, host-name and IPC namespace: fresh /proc, /sys and
// /sys/fs/bpf (the cgroup tree bound back), own /run, and /etc and /var that take writes without showing
// them to the machine. Every host hangs on one Router by a veth pair; faults (cuts, loss, MTU, blocked
// ports) are nftables rules and link settings on that router, and delay or reordering is a userspace
// link (Shape).
//
// Invariant: a lab leaves nothing. Process 1 of every host dies with the thread that made it, a host's
// processes die with its process 1, and everything in the kernel hangs on those, so even kill -9 of the
// lab's owner frees all but empty cgroup and scratch directories; those are swept by the next lab. No
// object is ever made in the machine's own network namespace.
package lab
