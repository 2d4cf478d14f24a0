package sim

import (
	"syscall"
	"time"
)

// realTime is the processor time that this process has used: in a bubble the clock is not real, this one is.
func realTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
