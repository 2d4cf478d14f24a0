package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"meshd/control"
)

func (a *app) stopCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "stop",
		Short: "Stop meshd",
		Long: `Stops meshd and waits for its end. Containers keep their interfaces and addresses, and where the
kernel path is in use traffic goes on; "meshctl launch" takes everything up again.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if now, _ := a.env("DOCKER_HOST"); now != "" {
				if proxy, err := a.proxyAddr(cmd); err == nil && proxy == now {
					a.say("warning: DOCKER_HOST still points at the proxy; eval $(meshctl env --restore) changes that")
				}
			}
			stopped, err := a.stop(cmd.Context(), a.pidFile())
			if err == nil && !stopped {
				a.say("meshd is not running")
			}
			return err
		},
	}
}

// stop ends the daemon and waits until it is gone. It reports whether there was one.
func (a *app) stop(ctx context.Context, pidFile string) (bool, error) {
	pid, err := control.RunningPID(pidFile)
	if err != nil || pid == 0 {
		return false, err
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return true, fmt.Errorf("stop meshd (pid %d): %w", pid, err)
	}
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		now, err := control.RunningPID(pidFile)
		if err != nil || now != pid { // gone, or already started anew by somebody
			return true, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return true, failed("meshd (pid %d) did not end within %s", pid, stopTimeout)
			}
			return true, ctx.Err()
		}
	}
}

func (a *app) resetCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "reset [--force]",
		Short: "Leave the mesh and remove everything of it from this host",
		Long: `Gives this peer's addresses to another peer, stops meshd and removes its devices, rules, pinned
programs and state. When meshd ran here before but does not run now, its addresses cannot be given
away and the others keep them reserved until "meshctl rmpeer"; then --force is needed.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.reset(cmd.Context(), force) },
	}
	cmd.Flags().BoolVar(&force, "force", false, "also when addresses cannot be given away")
	return cmd
}

func (a *app) reset(ctx context.Context, force bool) error {
	if os.Geteuid() != 0 {
		return failed("reset must be run as root")
	}
	meshd, err := daemonProgram()
	if err != nil {
		return err
	}
	args, err := a.launchedWith()
	if err != nil {
		return err
	}
	settings, err := a.checkDaemon(ctx, meshd, slices.Concat([]string{"--reset"}, args))
	if err != nil {
		return err
	}
	runDir := settings["run-dir"]
	pidFile := filepath.Join(runDir, control.PIDFile)
	a.flags.socket = settings.socket()
	pid, err := control.RunningPID(pidFile)
	if err != nil {
		return err
	}
	if pid == 0 && !force {
		if _, err := os.Stat(settings["state-dir"]); err == nil {
			return failed("meshd is not running, so its addresses cannot be given to another peer; launch it first, or use --force")
		}
	}
	if pid != 0 {
		if err := a.leave(ctx, force); err != nil {
			return err
		}
		if _, err := a.stop(ctx, pidFile); err != nil {
			return err
		}
	}
	clean := exec.CommandContext(ctx, meshd, slices.Concat([]string{"--reset"}, args)...)
	clean.Stderr = a.stderr
	if err := clean.Run(); err != nil {
		return failed("reset is not complete: %v", err)
	}
	return removeRunDir(runDir)
}

// removeRunDir removes our files from the run directory, and the directory if nothing else is there.
func removeRunDir(dir string) error {
	for _, name := range []string{launchFile, control.PIDFile, "meshd.sock", "docker.sock"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		return err
	}
	return nil
}

// leave gives the addresses away, before the daemon is stopped.
func (a *app) leave(ctx context.Context, force bool) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	err = c.Leave(ctx)
	if err == nil || control.IsOff(err) {
		return nil
	}
	if force {
		a.say("warning: the addresses of this peer were not given away: %v", err)
		return nil
	}
	return fmt.Errorf("the addresses of this peer were not given away (--force goes on all the same): %w", err)
}

// launchedWith are the arguments of the last launch, without peers' effect: reset needs to know which
// devices and directories meshd was told to use. None when it was not launched by us.
func (a *app) launchedWith() ([]string, error) {
	path := filepath.Join(a.runDir(), launchFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var args []string
	if err := json.Unmarshal(b, &args); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return args, nil
}
