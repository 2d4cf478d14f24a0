package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const prefix = "meshlab-"

// Requirements reports everything that a lab needs and this machine or user lacks.
func Requirements() error {
	if os.Geteuid() != 0 {
		return errors.New("hosts made of namespaces need root")
	}
	var missing []string
	for _, tool := range []string{"ip", "nft", "sysctl", "mount", "ss", "ping"} {
		if _, err := lookPath(tool); err != nil {
			missing = append(missing, tool)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("not installed: %s (Debian: apt-get install iproute2 nftables procps mount iputils-ping)", strings.Join(missing, ", "))
	}
	return nil
}

// lookPath finds a program in the PATH that the lab's programs get.
func lookPath(name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, dir := range filepath.SplitList(strings.TrimPrefix(environment(nil)[0], "PATH=")) {
		path := filepath.Join(dir, name)
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}

// makeScratch makes a lab's directory and holds a lock in it for as long as the owner lives.
func makeScratch() (dir string, lock *os.File, err error) {
	dir, err = os.MkdirTemp("", prefix)
	if err != nil {
		return "", nil, err
	}
	if lock, err = os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600); err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		return "", nil, errors.Join(fmt.Errorf("make %s: %w", dir, err), os.RemoveAll(dir))
	}
	return dir, lock, nil
}

// sweep removes what labs have left whose owners are dead. Their processes and namespaces went with
// them; directories and cgroups did not.
func sweep() error {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR, 0)
		if err != nil {
			if st, serr := os.Stat(dir); serr == nil && time.Since(st.ModTime()) > time.Minute {
				errs = append(errs, os.RemoveAll(dir)) // it died before it had a lock
			}
			continue
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			errs = append(errs, removeCgroups(filepath.Base(dir), 5*time.Second), os.RemoveAll(dir))
		}
		errs = append(errs, lock.Close())
	}
	return errors.Join(errs...)
}

// removeCgroups removes the cgroups of lab id, which Docker made and leaves behind, once they are empty.
func removeCgroups(id string, limit time.Duration) error {
	var dirs []string
	for _, pattern := range []string{"/sys/fs/cgroup/" + id + "*", "/sys/fs/cgroup/*/" + id + "*"} {
		roots, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, root := range roots {
			err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	sort.Sort(sort.Reverse(sort.StringSlice(dirs))) // children before parents
	end := time.Now().Add(limit)
	for _, dir := range dirs {
		for {
			err := unix.Rmdir(dir)
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				break
			}
			if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
				return &os.PathError{Op: "rmdir", Path: dir, Err: err}
			}
			unix.Poll(nil, 10) // killed processes leave their cgroup a moment later
		}
	}
	return nil
}

// namespaceUsers lists the processes that live in one of the namespaces.
func namespaceUsers(inodes map[uint64]string) []string {
	links, _ := filepath.Glob("/proc/[0-9]*/ns/*")
	var users []string
	for _, link := range links {
		var st unix.Stat_t
		if unix.Stat(link, &st) != nil {
			continue
		}
		if name, ok := inodes[st.Ino]; ok {
			pid := strings.Split(link, "/")[2]
			comm, _ := os.ReadFile("/proc/" + pid + "/comm")
			users = append(users, fmt.Sprintf("process %s (%s) in %s", pid, strings.TrimSpace(string(comm)), name))
		}
	}
	return users
}
