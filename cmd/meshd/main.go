// Command meshd is the daemon that joins this host to a mesh. It turns flags, environment and file
// into a Config, builds the rooms, hands each its neighbours, runs them under one errgroup and waits:
// there is no logic of its own here.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"meshd/control"
)

// version is set by the linker.
var version = "unreleased"

// Exit codes.
const (
	exitOK      = 0
	exitFailed  = 1 // could not start or stopped by a failure
	exitRunning = 3 // another meshd runs here
	// The options are wrong, and starting again with the same ones is no use: sysexits(3). Not 2, with
	// which Go ends a program that panicked, and which must be started again.
	exitUsage = 64
)

func main() {
	os.Exit(run(os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}

func run(args []string, env environment, stdout, stderr io.Writer) int {
	o, flags, err := parse(args, env)
	switch {
	case errors.Is(err, pflag.ErrHelp) || err == nil && o.help:
		printUsage(stderr, flags)
		return exitOK
	case err != nil:
		return usageError(stderr, err)
	case o.version:
		fmt.Fprintln(stdout, "meshd", version)
		return exitOK
	}
	hostName, _ := os.Hostname()
	cfg, err := validate(o, flags, hostName)
	if !o.reset { // which needs none, and the file may be gone by then
		password, perr := readPassword(o, env)
		err = errors.Join(err, perr)
		cfg.Underlay.Password = password
	}
	if err != nil {
		return usageError(stderr, err)
	}
	if o.check {
		printOptions(stdout, flags)
		return exitOK
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(stderr, "meshd: must be run as root")
		return exitFailed
	}
	log := newLogger(stderr, cfg.Log)
	if err := os.Chdir("/"); err != nil { // hold no directory that somebody wants to unmount
		log.Warn("cannot leave the working directory", "err", err)
	}
	if err := scrubEnvironment(passwordVariables...); err != nil {
		log.Warn("the password stays visible to root in this process's environment", "err", err)
	}
	if err := os.MkdirAll(cfg.RunDir, 0o755); err != nil {
		fmt.Fprintf(stderr, "meshd: --run-dir: %v\n", err)
		return exitFailed
	}
	lock, err := control.LockPID(filepath.Join(cfg.RunDir, control.PIDFile))
	if err != nil {
		fmt.Fprintln(stderr, "meshd:", err)
		if errors.Is(err, control.ErrRunning) {
			return exitRunning
		}
		return exitFailed
	}
	defer lock.Close()
	if o.reset {
		if err := resetHost(cfg, log); err != nil {
			fmt.Fprintln(stderr, "meshd: reset:", err)
			return exitFailed
		}
		return exitOK
	}
	logOptions(log, flags)
	// The goroutines of the frame path, a reader of each queue and of the socket, wait in system calls, each with
	// one of the runtime's processors in hand. Were none left beside, the runtime would take theirs away every
	// 20 µs, and each frame had to wait for two more thread switches until it got one again.
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + tapQueues() + 2)
	askScheduler()
	if err := runUntilSignal(cfg, env, log); err != nil {
		log.Error("stopped", "err", remedy(err, cfg))
		return exitFailed
	}
	log.Info("stopped")
	return exitOK
}

// runUntilSignal runs the daemon. The first SIGINT or SIGTERM stops it in good order, the second at once.
func runUntilSignal(cfg Config, env environment, log *slog.Logger) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	notify := newNotifier(env, log)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return serve(ctx, cfg, log, notify) })
	g.Go(func() error { return notify.Run(ctx) })
	return g.Wait()
}

func newLogger(w io.Writer, cfg LogConfig) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.Level)); err != nil {
		level = slog.LevelInfo // unreachable: validate has checked it
	}
	opts := &slog.HandlerOptions{Level: level}
	if cfg.JSON {
		return slog.New(limitLog(slog.NewJSONHandler(w, opts)))
	}
	return slog.New(limitLog(slog.NewTextHandler(w, opts)))
}

// logOptions logs the options that differ from what they are by themselves. None of them is a secret.
func logOptions(log *slog.Logger, flags *pflag.FlagSet) {
	var attrs []any
	var idle []string
	flags.VisitAll(func(f *pflag.Flag) {
		switch {
		case f.Hidden && f.Changed:
			idle = append(idle, "--"+f.Name)
		case !f.Hidden && !slices.Contains(commandFlags, f.Name) && f.Value.String() != f.DefValue:
			attrs = append(attrs, slog.String(f.Name, f.Value.String()))
		}
	})
	log.Info("starting", "version", version, "pid", os.Getpid(), slog.Group("options", attrs...))
	if len(idle) > 0 {
		log.Warn("options that have no effect here", "options", strings.Join(idle, " "))
	}
}

// printOptions writes every option with its value in force, as a configuration file.
func printOptions(w io.Writer, flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || slices.Contains(commandFlags, f.Name) {
			return
		}
		values := []string{f.Value.String()}
		if list, ok := f.Value.(pflag.SliceValue); ok {
			values = list.GetSlice()
		}
		for _, v := range values {
			fmt.Fprintf(w, "%s = %s\n", f.Name, v)
		}
	})
}

func printUsage(w io.Writer, flags *pflag.FlagSet) {
	fmt.Fprintf(w, `Usage: meshd [options] [peer[:port]...]

Joins this host to a mesh and serves it until a signal ends it. "meshctl launch" starts meshd in the
background; systemd starts it from meshd.service. Each option can also be given as a variable, MESH_
and its name in capitals with _ for -, or as a line "name = value" of the configuration file; the
command line counts before the environment, and that before the file.

%s`, flags.FlagUsagesWrapped(100))
}

func usageError(w io.Writer, err error) int {
	for line := range strings.SplitSeq(err.Error(), "\n") {
		fmt.Fprintln(w, "meshd:", line)
	}
	fmt.Fprintln(w, `meshd: "meshd --help" lists the options`)
	return exitUsage
}
