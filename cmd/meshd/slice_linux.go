package main

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// timeSlice is what the scheduler is asked to give each thread at a time, in nanoseconds. The frame path works
// in short bursts, so little at once costs it nothing, and whoever asks for less gets it sooner: a frame
// does not wait until a busy program has used up its 3 ms.
const timeSlice = 100_000

// askForShortSlices sets it for all threads; later ones inherit it. It needs Linux 6.12; older kernels take no
// notice.
func askForShortSlices() {
	threads, _ := os.ReadDir("/proc/self/task")
	for _, t := range threads {
		tid, _ := strconv.Atoi(t.Name())
		attr, err := unix.SchedGetAttr(tid, 0)
		if err != nil || attr.Policy != unix.SCHED_NORMAL {
			continue
		}
		attr.Runtime = timeSlice
		_ = unix.SchedSetAttr(tid, attr, 0)
	}
}
