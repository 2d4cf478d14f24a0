package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"meshd/control"
)

// Exit codes. Scripts rely on them.
const (
	exitOK          = 0
	exitFailed      = 1   // refused or failed; the reason is on standard error
	exitRunning     = 3   // launch: meshd runs already
	exitOff         = 4   // the feature is off, or there is no such thing
	exitProblems    = 5   // status --strict: something does not work as it should
	exitUnreachable = 7   // no daemon answers
	exitTimeout     = 28  // the daemon did not answer in time
	exitInterrupted = 130 // by a signal
)

// globalFlags go with every command.
type globalFlags struct {
	socket  string
	timeout time.Duration
	local   bool
}

// extraCommands make commands that live in files of their own; such a file adds its function in init.
var extraCommands []func() *cobra.Command

// exitError ends the program with a code. An empty text prints nothing.
type exitError struct {
	code int
	text string
}

func (e *exitError) Error() string { return e.text }

func failed(format string, args ...any) error {
	return &exitError{exitFailed, fmt.Sprintf(format, args...)}
}

// usageError is a command line that makes no sense: the usage is printed after it.
type usageError struct {
	cmd  *cobra.Command
	text string
}

func (e *usageError) Error() string { return e.text }

// run carries out one command line and returns the exit code.
func (a *app) run(ctx context.Context, args []string) int {
	root := a.rootCommand()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	usage, exit, answer := new(usageError), new(exitError), new(control.Error)
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage):
		if usage.text != "" {
			a.say("%s", usage.text)
		}
		fmt.Fprint(a.stderr, usage.cmd.UsageString())
		return exitFailed
	case errors.As(err, &exit):
		if exit.text != "" {
			a.say("%s", exit.text)
		}
		return exit.code
	case errors.As(err, &answer):
		fmt.Fprintln(a.stderr, answer.Text)
		if control.IsOff(err) {
			return exitOff
		}
		return exitFailed
	case errors.Is(err, control.ErrUnreachable):
		return a.unreachable(err)
	case errors.Is(err, context.Canceled):
		return exitInterrupted
	case errors.Is(err, context.DeadlineExceeded):
		a.say("meshd gave no answer in time")
		return exitTimeout
	}
	a.say("%v", err)
	return exitFailed
}

// say writes one line for people.
func (a *app) say(format string, args ...any) {
	fmt.Fprintf(a.stderr, "meshctl: "+format+"\n", args...)
}

// unreachable says why no daemon answers, as far as can be seen from here.
func (a *app) unreachable(err error) int {
	pid, _ := control.RunningPID(a.pidFile())
	switch {
	case pid != 0:
		a.say("meshd runs (pid %d) but does not answer on %s: %v", pid, a.addr(), err)
	case errors.Is(err, os.ErrPermission):
		a.say("%v; only root may control meshd", err)
	case filepath.IsAbs(a.addr()):
		a.say(`meshd is not running; "meshctl launch" starts it`)
	default:
		a.say("%v", err)
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return exitTimeout
	}
	return exitUnreachable
}

// lookup returns the variable MESH_name, else WEAVE_name, else "".
func (a *app) lookup(name string) string {
	for _, prefix := range []string{"MESH_", "WEAVE_"} {
		if v, ok := a.env(prefix + name); ok && v != "" {
			return v
		}
	}
	return ""
}

const defaultRunDir = "/run/meshd"

// addr is where the control API is: a socket's path or host:port.
func (a *app) addr() string {
	if a.flags.socket != "" {
		return a.flags.socket
	}
	if s := a.lookup("SOCKET"); s != "" {
		return s
	}
	if s := a.lookup("HTTP_ADDR"); s != "" {
		return s
	}
	return filepath.Join(a.runDir(), "meshd.sock")
}

func (a *app) runDir() string {
	if s := a.lookup("RUN_DIR"); s != "" {
		return s
	}
	socket := a.flags.socket
	if socket == "" {
		socket = a.lookup("SOCKET")
	}
	if filepath.IsAbs(socket) {
		return filepath.Dir(socket)
	}
	return defaultRunDir
}

func (a *app) pidFile() string { return filepath.Join(a.runDir(), control.PIDFile) }

func (a *app) client() (*control.Client, error) {
	return control.NewClient(control.ClientConfig{
		Addr:    a.addr(),
		CACert:  a.lookup("HTTP_TLSCACERT"),
		Cert:    a.lookup("CLIENT_TLSCERT"),
		Key:     a.lookup("CLIENT_TLSKEY"),
		Timeout: a.flags.timeout,
	})
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "meshctl",
		Short:         "Control the mesh that this host's containers are on",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return &usageError{cmd, fmt.Sprintf("there is no command %q", args[0])}
			}
			return &usageError{cmd, ""}
		},
	}
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetHelpFunc(func(cmd *cobra.Command, _ []string) { fmt.Fprint(a.stderr, helpText(cmd)) })
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return &usageError{cmd, err.Error()} })
	f := root.PersistentFlags()
	f.StringVar(&a.flags.socket, "socket", "", "`address` of meshd's control API: a unix socket's path or host:port (variable MESH_SOCKET; "+defaultRunDir+"/meshd.sock)")
	f.DurationVar(&a.flags.timeout, "timeout", 0, "how long meshd may wait for other peers, such as `30s`; 0 means as long as it takes")
	f.BoolVar(&a.flags.local, "local", false, "accepted for old scripts")
	_ = f.MarkHidden("local")

	root.AddCommand(
		a.launchCommand(), a.stopCommand(), a.resetCommand(),
		a.connectCommand(), a.forgetCommand(), a.rmpeerCommand(), a.primeCommand(), a.ipamCommand(), a.passwordCommand(),
		a.attachCommand(), a.detachCommand(), a.exposeCommand(), a.hideCommand(), a.psCommand(),
		a.dnsAddCommand(), a.dnsRemoveCommand(), a.dnsLookupCommand(), a.dnsArgsCommand(),
		a.envCommand(), a.configCommand(), a.bridgeIPCommand(),
		a.statusCommand(), a.reportCommand(), a.versionCommand(), a.setupCommand(),
	)
	root.AddCommand(a.removedCommands()...)
	for _, make := range extraCommands {
		root.AddCommand(make())
	}
	root.SetHelpCommand(a.helpCommand(root))
	for _, cmd := range root.Commands() {
		wrapArgs(cmd)
	}
	return root
}

// wrapArgs turns complaints about arguments into usage errors.
func wrapArgs(cmd *cobra.Command) {
	check := cmd.Args
	if check == nil {
		check = cobra.ArbitraryArgs
	}
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		err := check(cmd, args)
		if usage := new(usageError); err != nil && !errors.As(err, &usage) {
			return &usageError{cmd, err.Error()}
		}
		return err
	}
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%s takes no arguments, and %q is one", cmd.Name(), args[0])
	}
	return nil
}

func atLeastOne(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return fmt.Errorf("%s needs a %s", cmd.Name(), what)
		}
		return nil
	}
}

func exactlyOne(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("%s takes one %s, and %d were given", cmd.Name(), what, len(args))
		}
		return nil
	}
}

func helpText(cmd *cobra.Command) string {
	text := cmd.Long
	if text == "" {
		text = cmd.Short
	}
	return strings.TrimSpace(text) + "\n\n" + cmd.UsageString()
}

func (a *app) helpCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:   "help [command]",
		Short: "Print what a command does and takes",
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return &usageError{root, fmt.Sprintf("there is no command %q", strings.Join(args, " "))}
			}
			return cmd.Help()
		},
	}
}

// hostNameFlag defines -h for a name, as Weave Net's commands have it; --help loses its short form.
func hostNameFlag(cmd *cobra.Command, into *string, usage string) {
	cmd.Flags().Bool("help", false, "print this")
	cmd.Flags().StringVarP(into, "hostname", "h", "", usage)
}
