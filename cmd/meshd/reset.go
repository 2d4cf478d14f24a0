package main

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"

	"meshd/fastdp"
	"meshd/proxy/wait"
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
	return errors.Join(append(errs, removeOurs(cfg.StateDir, stateFile), removeOurs(waitDir(cfg), filepath.Base(wait.Path)))...)
}

// removeOurs removes files of ours from a directory, and the directory if nobody else has anything there.
func removeOurs(dir string, names ...string) error {
	var errs []error
	for _, name := range names {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// waitDir is what containers see of this host: the program that they run first. It lies outside the state
// directory, which only root may enter, and survives a reboot as the containers do.
func waitDir(cfg Config) string { return cfg.StateDir + "-wait" }
