package tunnel

import (
	"runtime"

	"golang.org/x/sys/cpu"
)

// haveAES reports whether the CPU has the instructions that make AES-GCM fast, and safe against cache
// timing.
func haveAES() bool {
	switch runtime.GOARCH {
	case "amd64":
		return cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ
	case "arm64":
		return cpu.ARM64.HasAES && cpu.ARM64.HasPMULL
	case "s390x":
		return cpu.S390X.HasAES && cpu.S390X.HasGHASH
	}
	return false
}
