package main

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	// timeSlice is what the scheduler is asked to give each thread at a time, in nanoseconds. The frame path works
	// in short bursts, so little at once costs it nothing, and whoever asks for less gets it sooner: a frame
	// does not wait until a busy program has used up its 3 ms.
	timeSlice = 100_000
	// niceness makes three shares of the processors out of one: what all containers wait for does not get as
	// little as each of them.
	niceness = -5
)

// askScheduler sets both for all threads; later ones inherit them. Slices need Linux 6.12; older kernels take
// no notice. A niceness that somebody chose, with nice(1) or systemd, stays.
func askScheduler() {
	chosen := false
	threads, _ := os.ReadDir("/proc/self/task")
	for _, t := range threads {
		tid, _ := strconv.Atoi(t.Name())
		attr, err := unix.SchedGetAttr(tid, 0)
		if err != nil || attr.Policy != unix.SCHED_NORMAL {
			continue
		}
		attr.Runtime = timeSlice
		if attr.Nice == 0 {
			attr.Nice = niceness
		} else {
			chosen = true
		}
		_ = unix.SchedSetAttr(tid, attr, 0)
	}
	// Where sessions share the processors, and threads only within theirs (sched(7), "The autogroup feature"),
	// the session has a niceness of its own. One that began elsewhere, with a shell, is not changed.
	if session, err := unix.Getsid(0); err == nil && session == os.Getpid() && !chosen {
		_ = os.WriteFile("/proc/self/autogroup", []byte(strconv.Itoa(niceness)), 0)
	}
}
