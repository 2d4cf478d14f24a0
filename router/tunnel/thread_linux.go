package tunnel

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// frameSlice is what the scheduler is asked to give the threads of the frame path at a time, in nanoseconds.
// They work in short bursts, so a small share at once costs them nothing, and whoever asks for less gets
// it sooner: a frame does not wait until a busy program has used up its 3 ms.
const frameSlice = 100_000

// ownThread gives the calling goroutine a thread that is scheduled in short slices (Linux 6.12; older kernels
// keep to their own). The thread ends with the goroutine.
func ownThread() {
	runtime.LockOSThread()
	attr, err := unix.SchedGetAttr(0, 0)
	if err != nil || attr.Policy != unix.SCHED_NORMAL {
		return
	}
	attr.Runtime = frameSlice
	_ = unix.SchedSetAttr(0, attr, 0)
}
