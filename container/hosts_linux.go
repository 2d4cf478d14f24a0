package container

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const maxHosts = 1 << 20 // bytes of a hosts file that we touch

// writeHosts edits /etc/hosts of the container of r.
func (m *Manager) writeHosts(r record) error {
	root, err := os.OpenFile(fmt.Sprintf("%s/%d/root", m.cfg.ProcPath, r.Pid), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	// The root is that process's; only now is it known to be the right process.
	ns, err := m.reopen(r)
	if err != nil {
		return fmt.Errorf("process %d: %w", r.Pid, err)
	}
	ns.Close()
	names, err := hostNames(root, r.Names)
	if err != nil {
		return err
	}
	var further []string
	addrs := r.held()
	for _, h := range r.AddHosts {
		if len(addrs) == 0 {
			break // it is detached, and gets its own file back
		}
		host, addr, err := parseAddHost(h)
		if err != nil {
			return err
		}
		further = append(further, addr.String()+"\t"+host)
	}
	return editFile(root, "etc/hosts", r.HostsPath, func(text string) string {
		return editHosts(text, names, addrs, further)
	})
}

// hostNames lists what a container calls itself: its names on the mesh, their first labels, and what its
// /etc/hostname says.
func hostNames(root *os.File, fqdns []string) (names []string, err error) {
	add := func(n string) {
		for _, have := range names {
			if strings.EqualFold(have, n) {
				return
			}
		}
		if n != "" && len(n) <= 253 && !strings.ContainsAny(n, " \t\r\n#") {
			names = append(names, n)
		}
	}
	for _, n := range fqdns {
		add(strings.TrimSuffix(n, "."))
		short, _, _ := strings.Cut(n, ".")
		add(short)
	}
	f, err := openInside(root, "etc/hostname", unix.O_RDONLY)
	if err != nil {
		return names, nil // an image need not have one
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 1024))
	if err != nil {
		return nil, err
	}
	name := strings.TrimSpace(string(text))
	add(name)
	if short, _, ok := strings.Cut(name, "."); ok {
		add(short)
	}
	return names, nil
}

// editFile changes a file below root in place, for Docker mounts it and it cannot be replaced. Where it is
// mounted read-only it is changed at its origin, if that is indeed the same file.
func editFile(root *os.File, path, origin string, edit func(string) string) error {
	f, err := openInside(root, path, unix.O_RDWR)
	if errors.Is(err, unix.EROFS) && origin != "" {
		f, err = openOrigin(root, path, origin)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	old, err := io.ReadAll(io.LimitReader(f, maxHosts+1))
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	if len(old) > maxHosts {
		return fmt.Errorf("%s has more than %d bytes", path, maxHosts)
	}
	text := edit(string(old))
	if text == string(old) {
		return nil
	}
	if _, err := f.WriteAt([]byte(text), 0); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := f.Truncate(int64(len(text))); err != nil {
		return fmt.Errorf("truncate %s: %w", path, err)
	}
	return nil
}

// openInside opens a regular file below root, which belongs to a container: no link leads out of it
// (RESOLVE_IN_ROOT, Linux 5.6), and nothing but a regular file is opened, for a fifo or a device could
// hold or harm us.
func openInside(root *os.File, path string, flags int) (*os.File, error) {
	fd, err := unix.Openat2(int(root.Fd()), path, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, fmt.Errorf("open %s in %s: %w", path, root.Name(), err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("look at %s in %s: %w", path, root.Name(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%s in %s is not a regular file", path, root.Name())
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s in %s: %w", path, root.Name(), err)
	}
	return f, nil
}

func openOrigin(root *os.File, path, origin string) (*os.File, error) {
	inside, err := openInside(root, path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer inside.Close()
	f, err := os.OpenFile(origin, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	a, err := inside.Stat()
	b, err2 := f.Stat()
	if err := errors.Join(err, err2); err != nil || !os.SameFile(a, b) {
		f.Close()
		return nil, fmt.Errorf("%s in %s is read-only, and not the file %s: %w", path, root.Name(), origin, errors.Join(err, unix.EROFS))
	}
	return f, nil
}
