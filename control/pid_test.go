package control

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPIDFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), PIDFile)
	if pid, err := RunningPID(path); pid != 0 || err != nil {
		t.Errorf("no file: got %d, %v", pid, err)
	}
	// One that a dead daemon left behind names a process that may be anybody's by now.
	if err := os.WriteFile(path, []byte("1234567\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if pid, err := RunningPID(path); pid != 0 || err != nil {
		t.Errorf("left behind: got %d, %v", pid, err)
	}
	lock, err := LockPID(path)
	if err != nil {
		t.Fatal(err)
	}
	if pid, err := RunningPID(path); pid != os.Getpid() || err != nil {
		t.Errorf("locked: got %d, %v, want %d", pid, err, os.Getpid())
	}
	if _, err := LockPID(path); !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), path) {
		t.Errorf("second lock: got %v", err)
	}
	// To ask does not disturb.
	if pid, _ := RunningPID(path); pid != os.Getpid() {
		t.Errorf("after the second lock: got %d", pid)
	}
	lock.Close()
	if pid, err := RunningPID(path); pid != 0 || err != nil {
		t.Errorf("closed: got %d, %v", pid, err)
	}
	if lock, err = LockPID(path); err != nil {
		t.Errorf("lock again: %v", err)
	} else {
		lock.Close()
	}
}
