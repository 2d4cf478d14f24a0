// Package wait holds the program that containers run first: it waits for their interface and then becomes
// the program that they are for. It is C without a library, built for each processor by generate.sh, so it
// costs a container two kilobytes and nothing of its image.
package wait

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

//go:generate ./generate.sh

// Mount is where containers see the directory of Install, and Path the program in it.
const (
	Mount = "/.meshd"
	Path  = Mount + "/wait"
)

// ErrNotSupported says that the program does not exist for this processor.
var ErrNotSupported = errors.New("no waiter for this processor")

// Install makes sure that dir, readable by every user, holds the program. It is replaced by renaming, so
// that a container that starts meanwhile sees the old or the new one.
func Install(dir string) error {
	if len(program) == 0 {
		return ErrNotSupported
	}
	if err := install(dir); err != nil {
		return fmt.Errorf("install the waiter in %s: %w", dir, err)
	}
	return nil
}

func install(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil { // whatever the umask is
		return err
	}
	path := filepath.Join(dir, filepath.Base(Path))
	if Installed(dir) {
		return nil
	}
	f, err := os.CreateTemp(dir, ".wait-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once renamed
	_, werr := f.Write(program)
	if err := errors.Join(werr, f.Chmod(0o755), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// Installed reports whether dir holds the program of this version, executable by everybody.
func Installed(dir string) bool {
	path := filepath.Join(dir, filepath.Base(Path))
	have, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(have, program) || len(program) == 0 {
		return false
	}
	st, err := os.Stat(path)
	return err == nil && st.Mode().Perm()&0o555 == 0o555
}
