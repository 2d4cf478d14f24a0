// Command meshctl steers meshd: one subcommand is one call of the control API and one printed answer.
// Only the answer goes to standard output. launch, stop and reset also start and end the daemon.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// version is set by the linker.
var version = "unreleased"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	a := &app{env: os.LookupEnv, stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, patience: patience}
	code := a.run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

// app is one run of the program: what it reads and where it writes.
type app struct {
	env    func(name string) (value string, ok bool)
	stdin  io.Reader
	stdout io.Writer
	stderr io.Writer

	patience time.Duration // how long calls wait for other peers before they say so

	flags globalFlags // set while the command line is parsed
}
