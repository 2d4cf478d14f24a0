package main

import (
	"errors"
	"log/slog"
	"os"

	"meshd/fastdp"
	"meshd/router/hostnet"
)

// resetHost removes what meshd leaves on a host when it stops: devices, pinned programs and the state.
func resetHost(cfg Config, log *slog.Logger) error {
	var errs []error
	errs = append(errs, resetKernelPath(fastdp.Config{
		Bridge: cfg.Overlay.Bridge, TAP: cfg.Overlay.TAP, VXLAN: cfg.Overlay.VXLAN, PinDir: cfg.PinDir, Log: log,
	}))
	host, err := hostnet.Open(hostConfig(cfg, log))
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	errs = append(errs, host.Reset(), host.Close())
	return errors.Join(append(errs, os.RemoveAll(cfg.StateDir))...)
}
