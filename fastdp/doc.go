// Package fastdp is the kernel path: frames between endpoints whose peers reach each other by UDP port
// 6784 never leave the kernel. BPF programs on the containers' host veths, on the bridge, on the TAP and
// on an external vxlan device forward them by maps that this package fills; everything else is left to
// the bridge and the userspace path. The same programs guard each port (bpf/guard.h): a container sends
// from its own MAC and addresses only, and exchanges frames only with endpoints of its own networks.
//
// The parts: bpf/fastdp.c decides per frame. tables.go turns peers, endpoints and ports into map values,
// path.go decides per peer whether the kernel path is used, both without touching the system. objects,
// hooks and device put programs, maps and devices in place, adopt what an earlier meshd left and repair
// what somebody removed; probe sends the probes. Datapath holds it together.
//
// Invariant: a frame is sent on the kernel path only while probes of full size prove it both ways, and
// one is accepted from it only if outer source address, source id and inner source MAC belong to one
// peer. The programs, maps and links are pinned: forwarding goes on while no meshd runs.
//
// Oldest kernel: 6.1. tcx (6.6) is used where there is one, and with it the short way in; clsact elsewhere. No kernel BTF
// is needed. kernels/run.sh shows it.
package fastdp
