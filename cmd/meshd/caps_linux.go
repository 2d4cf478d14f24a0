package main

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kept are the capabilities that a running meshd uses; all others are given up for good, by this process
// and by whatever it executes.
var kept = []int{
	unix.CAP_NET_ADMIN,        // devices, addresses, firewall, TAP
	unix.CAP_NET_RAW,          // packet sockets: gratuitous ARP, kernel path probes
	unix.CAP_NET_BIND_SERVICE, // port 53, when Docker's bridge appears later
	unix.CAP_SYS_ADMIN,        // network namespaces of containers (setns), pinned BPF objects
	unix.CAP_BPF,              // the kernel path (Linux 5.8; SYS_ADMIN before)
	unix.CAP_PERFMON,
	unix.CAP_SYS_RESOURCE, // memory of BPF maps on kernels that count it by rlimit (before 5.11)
	unix.CAP_SYS_PTRACE,   // /proc/PID/ns and /proc/PID/root of containers
	unix.CAP_DAC_OVERRIDE, // files of containers that are not root's: /etc/hosts
	unix.CAP_DAC_READ_SEARCH,
	unix.CAP_CHOWN, // the proxy's socket gets the owner of Docker's
	unix.CAP_FOWNER,
}

// keepCapabilities gives up all capabilities but keep, on every thread, and takes them out of the bounding
// set, so that no program run from here gets them back (capabilities(7)). With cgo, threads of C could not
// be reached: errors.ErrUnsupported.
func keepCapabilities(keep []int) error {
	last, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		return fmt.Errorf("give up capabilities: %w", err)
	}
	highest, err := strconv.Atoi(strings.TrimSpace(string(last)))
	if err != nil {
		return fmt.Errorf("give up capabilities: %w", err)
	}
	var mask uint64
	for _, c := range keep {
		mask |= 1 << c
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&header, &have[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for c := 0; c <= highest; c++ {
		if mask&(1<<c) != 0 {
			continue
		}
		if _, _, e := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0); e != 0 {
			return fmt.Errorf("drop capability %d from the bounding set: %w", c, e)
		}
	}
	for i := range have {
		part := uint32(mask >> (32 * i))
		have[i].Effective &= part
		have[i].Permitted &= part
		have[i].Inheritable = 0
	}
	_, _, e := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&have[0])), 0)
	runtime.KeepAlive(&header)
	runtime.KeepAlive(&have)
	if e != 0 {
		return fmt.Errorf("give up capabilities: %w", e)
	}
	return nil
}
