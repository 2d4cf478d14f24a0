package fastdp

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// preparePinDir makes dir on a bpffs, mounting one if need be, and takes the lock that keeps a second
// meshd out. The lock goes with the returned file.
func preparePinDir(dir string) (*os.File, error) {
	mount := filepath.Dir(dir)
	if strings.HasPrefix(dir, "/sys/fs/bpf/") {
		mount = "/sys/fs/bpf"
	}
	if err := ensureBPFFS(mount); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", dir, ErrBusy)
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

func ensureBPFFS(mount string) error {
	on, err := isBPFFS(mount)
	if on {
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = os.MkdirAll(mount, 0o700)
	}
	if err != nil {
		return err
	}
	if err := unix.Mount("bpf", mount, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount bpffs on %s: %w", mount, err)
	}
	return nil
}

func isBPFFS(dir string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return st.Type == unix.BPF_FS_MAGIC, nil
}
