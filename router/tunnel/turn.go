package tunnel

import (
	"runtime"
	"time"
)

// turn lets the runtime see that a goroutine which never parks, for it waits in system calls, is not one that
// runs and runs. After 10 ms without a turn of its scheduler the runtime sends the thread signals, and looks every
// 20 µs whether it is in a system call, to take its processor away (retake in Go's runtime/proc.go).
type turn struct{ last time.Time }

const turnEvery = 4 * time.Millisecond

func (t *turn) take(now time.Time) {
	if now.Sub(t.last) >= turnEvery {
		t.last = now
		runtime.Gosched()
	}
}
