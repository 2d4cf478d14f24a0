package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// maxPassword is in bytes: more is surely a wrong file.
const maxPassword = 1024

// passwordVariables may hold the password; the first that is set counts.
var passwordVariables = []string{"MESH_PASSWORD", "WEAVE_PASSWORD"}

// credentialName is the name of the password among a systemd unit's credentials (LoadCredential=).
const credentialName = "meshd.password"

// readPassword returns the password, or "" when none was given: from --password-file, else from a
// variable, else from a systemd credential.
func readPassword(o *options, env environment) (string, error) {
	if o.passwordFile != "" {
		p, err := passwordFrom(o.passwordFile)
		if err != nil {
			return "", fmt.Errorf("--password-file: %w", err)
		}
		return p, nil
	}
	for _, name := range passwordVariables {
		if v, ok := env(name); ok && v != "" {
			if len(v) > maxPassword {
				return "", fmt.Errorf("%s: the password is longer than %d bytes", name, maxPassword)
			}
			return v, nil
		}
	}
	dir, ok := env("CREDENTIALS_DIRECTORY")
	if !ok {
		return "", nil
	}
	p, err := passwordFrom(filepath.Join(dir, credentialName))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	return p, err
}

// passwordFrom reads a file, or the pipe that "meshctl launch" names as /proc/self/fd/N. One line end at
// the end is dropped, for editors add it. An empty file is an error, never "no password".
func passwordFrom(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxPassword+3))
	if err != nil {
		return "", err
	}
	b = bytes.TrimSuffix(bytes.TrimSuffix(b, []byte("\n")), []byte("\r"))
	switch {
	case len(b) == 0:
		return "", fmt.Errorf("%s is empty: it must hold the password", path)
	case len(b) > maxPassword:
		return "", fmt.Errorf("%s holds more than %d bytes", path, maxPassword)
	}
	return string(b), nil
}

// scrubEnvironment removes variables from this process, and overwrites them where /proc/PID/environ
// shows them: the kernel reads that from the memory that the process was started with, which
// os.Unsetenv does not reach.
func scrubEnvironment(names ...string) error {
	found := false
	for _, n := range names {
		_, set := os.LookupEnv(n)
		found = found || set
		os.Unsetenv(n)
	}
	if !found {
		return nil
	}
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return err
	}
	start, err := envStart(string(stat))
	if err != nil {
		return err
	}
	block, err := os.ReadFile("/proc/self/environ")
	if err != nil {
		return err
	}
	mem, err := os.OpenFile("/proc/self/mem", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer mem.Close()
	offset := int64(0)
	for entry := range bytes.SplitSeq(block, []byte{0}) {
		name, value, _ := bytes.Cut(entry, []byte("="))
		if slices.Contains(names, string(name)) {
			blank := bytes.Repeat([]byte{'x'}, len(value))
			if _, err := mem.WriteAt(blank, start+offset+int64(len(name))+1); err != nil {
				return err
			}
		}
		offset += int64(len(entry)) + 1
	}
	return nil
}

// envStart is field 50 of /proc/PID/stat (proc(5)): the address of the environment.
func envStart(stat string) (int64, error) {
	// The second field is the program's name in brackets and may hold spaces and brackets itself.
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 48 {
		return 0, errors.New("/proc/self/stat is too short")
	}
	start, err := strconv.ParseInt(fields[47], 10, 64)
	if err == nil && start == 0 {
		err = errors.New("/proc/self/stat hides the environment's address")
	}
	return start, err
}
