package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"meshd/control"
)

const (
	readyTimeout = time.Minute      // from the start until the daemon serves, unless --timeout says otherwise
	stopTimeout  = 30 * time.Second // from SIGTERM to the end of the process
	pollInterval = 20 * time.Millisecond
)

// defaultLog is where a daemon in the background writes. With another run directory, where several
// hosts may share the machine's /var, it is in that directory.
const defaultLog = "/var/log/meshd.log"

// launchFile, in the run directory, keeps the options of the last launch for reset. There is no
// password among them.
const launchFile = "launch.json"

func (a *app) launchCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "launch [--foreground] [--log-file <file>] [--timeout <duration>] [--password <password>] [<meshd option>...] [<peer>...]",
		Short: "Start meshd and join peers",
		Long: `Starts meshd in the background, waits until it serves and prints its process id. All options but
those above are meshd's own; "meshd --help" lists them. Peers are HOST or HOST:PORT.

  --foreground     become meshd instead of starting it
  --log-file FILE  where meshd writes its log (` + defaultLog + `, or meshd.log in another run directory)
  --timeout D      how long to wait until meshd serves (1m)
  --password P     the password that all peers share. Other users of this host can see it while launch
                   runs; the variable MESH_PASSWORD and --password-file FILE keep it to you

meshd is started again after a failure or a reboot by systemd if meshd.service is enabled, not by launch;
--no-restart is accepted for old scripts. Exit codes: 1 when meshd does not start, 3 when it runs already.`,
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, arg := range args {
				if arg == "--help" || arg == "-h" {
					return cmd.Help()
				}
			}
			l, err := parseLaunch(args)
			if err != nil {
				return &usageError{cmd, err.Error()}
			}
			return a.launch(cmd.Context(), l)
		},
	}
}

// launchOptions are what launch keeps to itself, and what it passes on.
type launchOptions struct {
	foreground bool
	logFile    string
	password   string
	timeout    time.Duration // until the daemon serves
	daemon     []string      // arguments of meshd
}

func parseLaunch(args []string) (launchOptions, error) {
	l := launchOptions{timeout: readyTimeout}
	for i := 0; i < len(args); i++ {
		name, value, hasValue := strings.Cut(args[i], "=")
		switch name {
		case "--local":
			continue
		case "--foreground":
			l.foreground = !hasValue || value == "true"
			continue
		case "--password", "-password", "--log-file", "--timeout":
		case "--":
			l.daemon = append(l.daemon, args[i:]...)
			return l, nil
		default:
			l.daemon = append(l.daemon, args[i])
			continue
		}
		if !hasValue {
			if i++; i == len(args) {
				return l, fmt.Errorf("%s needs a value", name)
			}
			value = args[i]
		}
		if value == "" {
			return l, fmt.Errorf("%s is empty", name)
		}
		switch name {
		case "--log-file":
			l.logFile = value
		case "--timeout":
			d, err := time.ParseDuration(value)
			if err != nil || d <= 0 {
				return l, fmt.Errorf("--timeout: %q is not a duration such as 30s", value)
			}
			l.timeout = d
		default:
			l.password = value
		}
	}
	return l, nil
}

// daemonSettings are the values in force of meshd's options, as "meshd --check" prints them.
type daemonSettings map[string]string

func (s daemonSettings) socket() string {
	if s["socket"] != "" {
		return s["socket"]
	}
	return filepath.Join(s["run-dir"], "meshd.sock")
}

func (a *app) launch(ctx context.Context, l launchOptions) error {
	if l.password == "" {
		l.password = a.lookup("PASSWORD")
	}
	meshd, err := daemonProgram()
	if err != nil {
		return err
	}
	settings, err := a.checkDaemon(ctx, meshd, l.daemon)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return failed("launch must be run as root")
	}
	runDir := settings["run-dir"]
	pid, err := control.RunningPID(filepath.Join(runDir, control.PIDFile))
	if err != nil {
		return fmt.Errorf("--run-dir: %w", err)
	}
	if pid != 0 {
		return &exitError{exitRunning, fmt.Sprintf("meshd is already running (pid %d)", pid)}
	}
	a.flags.socket = settings.socket()
	client, err := a.client()
	if err != nil {
		return err
	}
	if answers(ctx, client) {
		return failed("already running: something answers on %s", a.flags.socket)
	}
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return fmt.Errorf("--run-dir: %w", err)
	}
	args := slices.Clone(l.daemon)
	if err := saveLaunch(runDir, args); err != nil {
		return err
	}
	if l.foreground {
		return become(meshd, args, l.password, a.environ())
	}
	if l.logFile == "" {
		l.logFile = defaultLog
		if runDir != defaultRunDir {
			l.logFile = filepath.Join(runDir, "meshd.log")
		}
	}
	return a.startAndWait(ctx, meshd, args, l, client)
}

// daemonProgram is meshd beside this program, else in the path.
func daemonProgram() (string, error) {
	if self, err := os.Executable(); err == nil {
		if self, err = filepath.EvalSymlinks(self); err == nil {
			beside := filepath.Join(filepath.Dir(self), "meshd")
			if info, err := os.Stat(beside); err == nil && info.Mode().IsRegular() {
				return beside, nil
			}
		}
	}
	path, err := exec.LookPath("meshd")
	if err != nil {
		return "", failed("the program meshd is neither beside meshctl nor in the path")
	}
	return filepath.Abs(path)
}

func (a *app) daemonVersion(ctx context.Context) (string, error) {
	meshd, err := daemonProgram()
	if err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, meshd, "--version").Output()
	return strings.TrimSpace(string(out)), err
}

// checkDaemon lets meshd judge its own options before anything is started.
func (a *app) checkDaemon(ctx context.Context, meshd string, args []string) (daemonSettings, error) {
	cmd := exec.CommandContext(ctx, meshd, append([]string{"--check"}, args...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, a.stderr
	if err := cmd.Run(); err != nil {
		if exit := new(exec.ExitError); errors.As(err, &exit) {
			return nil, &exitError{code: exitFailed} // meshd has said why
		}
		return nil, err
	}
	settings := daemonSettings{}
	for line := range strings.Lines(out.String()) {
		if name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " = "); ok {
			settings[name] = value
		}
	}
	if settings["run-dir"] == "" {
		return nil, failed("%s does not say where it would run; is it of another version?", meshd)
	}
	return settings, nil
}

func answers(ctx context.Context, client *control.Client) bool {
	_, err := client.Status(ctx, "")
	return !errors.Is(err, control.ErrUnreachable)
}

func saveLaunch(runDir string, args []string) error {
	b, err := json.Marshal(args)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(runDir, launchFile), b, 0o600)
}

// environ is the environment for meshd: without passwords, which are readable in /proc.
func (a *app) environ() []string {
	return slices.DeleteFunc(os.Environ(), func(s string) bool {
		return strings.HasPrefix(s, "MESH_PASSWORD=") || strings.HasPrefix(s, "WEAVE_PASSWORD=")
	})
}

// passwordPipe returns the reading end of a pipe that holds the password. It is shorter than any pipe
// can hold, so nobody waits.
func passwordPipe(password string) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	_, err = io.WriteString(w, password)
	if err = errors.Join(err, w.Close()); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// become replaces this process by meshd.
func become(meshd string, args []string, password string, environ []string) error {
	argv := []string{"meshd"}
	if password != "" {
		r, err := passwordPipe(password)
		if err != nil {
			return err
		}
		fd, err := syscall.Dup(int(r.Fd())) // a copy that outlives exec
		if err != nil {
			return err
		}
		argv = append(argv, fmt.Sprintf("--password-file=/proc/self/fd/%d", fd))
	}
	return fmt.Errorf("%s: %w", meshd, syscall.Exec(meshd, append(argv, args...), environ))
}

// startAndWait starts meshd in the background and returns when it serves, or ends it.
func (a *app) startAndWait(ctx context.Context, meshd string, args []string, l launchOptions, client *control.Client) error {
	logFile, err := os.OpenFile(l.logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return fmt.Errorf("--log-file: %w", err)
	}
	defer logFile.Close()
	logStart, err := logFile.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	cmd := exec.Command(meshd)
	if l.password != "" {
		r, err := passwordPipe(l.password)
		if err != nil {
			return err
		}
		defer r.Close()
		cmd.ExtraFiles = []*os.File{r}
		cmd.Args = append(cmd.Args, "--password-file=/proc/self/fd/3") // ExtraFiles start at 3; /dev/fd is not everywhere
	}
	cmd.Args = append(cmd.Args, args...)
	cmd.Env = a.environ()
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	err = waitReady(ctx, client, ended, l.timeout)
	if err == nil {
		fmt.Fprintln(a.stdout, cmd.Process.Pid)
		return nil
	}
	if !errors.Is(err, errEnded) {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(stopTimeout):
			_ = cmd.Process.Kill()
			<-ended
		}
	}
	lines := lastErrors(l.logFile, logStart)
	if code := cmd.ProcessState.ExitCode(); code == exitRunning {
		return &exitError{exitRunning, "meshd is already running"}
	}
	// The cause comes first, in words; what else was logged, after it.
	if cause := causeOf(lines); cause != "" && errors.Is(err, errEnded) {
		err, lines = fmt.Errorf("meshd did not start: %s", cause), nil
	}
	if s, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && errors.Is(err, errEnded) && s.Signal() == syscall.SIGKILL {
		err = errors.New("meshd was killed before it was ready, as the kernel does where memory is short: it needs 64 MiB, with a password 192 MiB")
	}
	a.say("%v", err)
	for _, line := range lines {
		fmt.Fprintln(a.stderr, line)
	}
	return failed("its log is %s", l.logFile)
}

var errEnded = errors.New("meshd ended before it was ready")

// waitReady returns nil when the daemon serves.
func waitReady(ctx context.Context, client *control.Client, ended <-chan error, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	last := errors.New("it gave no answer")
	for {
		_, err := client.Status(ctx, "")
		if err == nil {
			return nil
		}
		if !errors.Is(err, control.ErrUnreachable) && ctx.Err() == nil {
			last = err
		}
		select {
		case <-ended:
			return errEnded
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return errors.New("interrupted, meshd was stopped again")
			}
			return fmt.Errorf("meshd was not ready after %s and was stopped again: %w", limit, last)
		case <-tick.C:
		}
	}
}

// lastErrors returns what explains a failure: the last lines that the log got since start, those that
// are errors if there are any.
func lastErrors(path string, start int64) []string {
	const most, tail = 10, 64 << 10
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	if end, err := f.Seek(0, io.SeekEnd); err == nil && end-start > tail {
		start = end - tail
	}
	b, err := io.ReadAll(io.NewSectionReader(f, start, tail))
	if err != nil {
		return nil
	}
	if len(bytes.TrimSpace(b)) == 0 {
		return nil
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	wanted := slices.DeleteFunc(slices.Clone(all), func(s string) bool {
		return strings.Contains(s, "level=INFO") || strings.Contains(s, "level=DEBUG") || strings.Contains(s, "level=WARN") ||
			strings.Contains(s, `"level":"INFO"`) || strings.Contains(s, `"level":"DEBUG"`) || strings.Contains(s, `"level":"WARN"`)
	})
	if len(wanted) == 0 {
		wanted = all
	}
	return wanted[max(0, len(wanted)-most):]
}

// causeOf is what meshd says of its end in the last of these lines of its log, on one line; "" if it says nothing there.
func causeOf(lines []string) string {
	if len(lines) == 0 {
		return ""
	}
	last := lines[len(lines)-1]
	var j struct{ Msg, Err string }
	if json.Unmarshal([]byte(last), &j) != nil {
		if said, ok := strings.CutPrefix(last, "meshd: "); ok {
			return said
		}
		_, value, found := strings.Cut(last, " msg=stopped err=")
		if !found {
			return ""
		}
		j.Msg, j.Err = "stopped", value
		if quoted, err := strconv.Unquote(value); err == nil {
			j.Err = quoted
		}
	}
	if j.Msg != "stopped" {
		return ""
	}
	return strings.ReplaceAll(j.Err, "\n", "; ")
}
