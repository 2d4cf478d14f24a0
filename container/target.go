package container

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"meshd/container/docker"
	"meshd/mesh"
)

// target is a namespace that somebody named, as it is now.
type target struct {
	owner  string
	text   string // pid:N or netns:PATH; empty for Docker's containers
	name   string // the container's
	path   string // of the namespace's file
	pid    int
	fqdn   string // the container's own, if it has a domain
	hosts  string // where Docker keeps the container's /etc/hosts
	docker bool
}

// nsOwner starts the owner ids of namespaces that are not Docker's: no digit of hexadecimal, so that
// they are told apart.
const nsOwner = "ns"

func ownerOf(what string) string {
	sum := sha256.Sum256([]byte(what))
	return nsOwner + hex.EncodeToString(sum[:31])
}

func isNamespaceOwner(owner string) bool { return strings.HasPrefix(owner, nsOwner) }

// find resolves what a user named: pid:N, netns:PATH, or a container's id or name. A namespace that is
// attached already keeps its owner, whatever it is called this time.
func (m *Manager) find(ctx context.Context, text string) (target, error) {
	if n, ok := strings.CutPrefix(text, "pid:"); ok {
		pid, err := strconv.ParseUint(n, 10, 31)
		if err != nil || pid == 0 {
			return target{}, fmt.Errorf("%q: want pid: and the number of a process", text)
		}
		t := target{text: text, pid: int(pid), path: fmt.Sprintf("%s/%d/ns/net", m.cfg.ProcPath, pid)}
		f, inode, err := m.openNamespace(t.path)
		if errors.Is(err, os.ErrNotExist) {
			return target{}, fmt.Errorf("%s: no such process", text)
		}
		if err != nil {
			return target{}, fmt.Errorf("%s: %w", text, err)
		}
		f.Close()
		if t.owner = m.ownerByInode(inode); t.owner == "" {
			t.owner = ownerOf(fmt.Sprintf("inode:%d:%s", inode, m.boot))
		}
		return t, nil
	}
	if path, ok := strings.CutPrefix(text, "netns:"); ok {
		if !filepath.IsAbs(path) {
			return target{}, fmt.Errorf("%q: want netns: and an absolute path", text)
		}
		path = filepath.Clean(path)
		t := target{text: "netns:" + path, path: path}
		f, inode, err := m.openNamespace(path)
		if err != nil {
			return target{}, fmt.Errorf("%s: %w", t.text, err)
		}
		f.Close()
		if t.owner = m.ownerByInode(inode); t.owner == "" {
			t.owner = ownerOf(t.text)
		}
		return t, nil
	}
	if m.cfg.Docker == nil {
		return target{}, fmt.Errorf("%q: containers by name need Docker, which is off; pid:N and netns:PATH work without", text)
	}
	c, err := m.cfg.Docker.Container(ctx, text)
	if err != nil {
		return target{}, err
	}
	return m.runningTarget(c)
}

// runningTarget checks that a container has a network of its own, and is there.
func (m *Manager) runningTarget(c docker.Container) (target, error) {
	name := strings.TrimPrefix(c.Name, "/")
	if name == "" {
		name = shortID(c.ID)
	}
	mode := c.HostConfig.NetworkMode
	switch other, shared := strings.CutPrefix(mode, "container:"); {
	case mode == "host":
		return target{}, fmt.Errorf("container %s uses the network of the host, which is not attached: see expose", name)
	case shared:
		return target{}, fmt.Errorf("container %s uses the network of container %s: attach that one", name, shortID(other))
	case c.State.Dead || !c.State.Running || c.State.Pid <= 0:
		return target{}, fmt.Errorf("container %s: %w", name, ErrNotRunning)
	}
	return target{
		docker: true, owner: c.ID, name: name, pid: c.State.Pid, fqdn: m.fqdn(c.Config.Hostname, c.Config.Domainname),
		path: fmt.Sprintf("%s/%d/ns/net", m.cfg.ProcPath, c.State.Pid), hosts: c.HostsPath,
	}, nil
}

// open opens the namespace of a target and makes sure that it is still that target's: a process id may
// have passed on to another process meanwhile.
func (m *Manager) open(ctx context.Context, t target) (ns *os.File, inode uint64, err error) {
	ns, inode, err = m.openNamespace(t.path)
	if err != nil {
		if t.docker && errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("container %s: %w", t.name, ErrNotRunning)
		}
		return nil, 0, err
	}
	if !t.docker {
		return ns, inode, nil
	}
	c, err := m.cfg.Docker.Container(ctx, t.owner)
	if err == nil && (!c.State.Running || c.State.Pid != t.pid) {
		err = fmt.Errorf("container %s: %w", t.name, ErrNotRunning)
	}
	if err != nil {
		ns.Close()
		return nil, 0, err
	}
	return ns, inode, nil
}

func (m *Manager) openNamespace(path string) (*os.File, uint64, error) {
	f, err := m.cfg.OpenNamespace(path)
	if err != nil {
		return nil, 0, err
	}
	inode, err := inodeOf(f)
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, inode, nil
}

func inodeOf(f *os.File) (uint64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, fmt.Errorf("%s has no inode", f.Name())
	}
	return st.Ino, nil
}

// reopen opens the namespace where a record was last seen, if it is still the same.
func (m *Manager) reopen(r record) (*os.File, error) {
	path := fmt.Sprintf("%s/%d/ns/net", m.cfg.ProcPath, r.Pid)
	if p, ok := strings.CutPrefix(r.Target, "netns:"); ok {
		path = p
	} else if r.Pid == 0 || r.Boot != m.boot {
		return nil, os.ErrNotExist
	}
	f, inode, err := m.openNamespace(path)
	if err != nil {
		return nil, err
	}
	if inode != r.Inode || r.Boot != m.boot {
		f.Close()
		return nil, os.ErrNotExist
	}
	return f, nil
}

// ownerByInode finds who is attached in a namespace; "" if nobody. The kernel gives the inode of a namespace
// that has ended to the next one, so a match alone says nothing.
func (m *Manager) ownerByInode(inode uint64) string {
	for _, r := range m.all() {
		if r.Inode == inode && r.Boot == m.boot && len(r.Holds) > 0 && !m.isDead(r.Owner) && m.there(r) {
			return r.Owner
		}
	}
	return ""
}

// there reports whether the namespace of a record still is.
func (m *Manager) there(r record) bool {
	if ns, err := m.reopen(r); err == nil {
		ns.Close()
		return true
	}
	if !isNamespaceOwner(r.Owner) {
		return false
	}
	// Others may live in it without the process or path that named it: the port tells.
	has, err := m.hasPort(r.Owner)
	return has && err == nil
}

func (m *Manager) hasPort(owner string) (bool, error) {
	ports, err := m.cfg.Network.Ports()
	return slices.ContainsFunc(ports, func(p mesh.Port) bool { return p.Owner == owner }), err
}

// locate finds the owner of what a user named. Docker is asked about names, for containers are renamed; while
// it is away, the name that was last seen and the start of an id will do.
func (m *Manager) locate(ctx context.Context, text string) (owner string, err error) {
	if path, ok := strings.CutPrefix(text, "netns:"); ok {
		text = "netns:" + filepath.Clean(path)
	}
	name := strings.TrimPrefix(text, "/")
	named, started := "", []string{}
	for _, r := range m.all() {
		switch {
		case r.Owner == text, r.Target != "" && r.Target == text:
			return r.Owner, nil
		case r.Name != "" && r.Name == name:
			named = r.Owner
		case text != "" && strings.HasPrefix(r.Owner, text) && r.Owner != mesh.OwnerExpose:
			started = append(started, r.Owner)
		}
	}
	if strings.HasPrefix(text, "pid:") || strings.HasPrefix(text, "netns:") {
		t, err := m.find(ctx, text)
		return t.owner, err
	}
	err = fmt.Errorf("%q: %w", text, ErrNotAttached)
	if m.cfg.Docker != nil {
		c, derr := m.cfg.Docker.Container(ctx, text)
		if derr == nil {
			return c.ID, nil
		}
		if err = derr; errors.Is(derr, docker.ErrNotFound) {
			named = "" // whoever had the name has it no longer
		}
	}
	switch {
	case named != "":
		return named, nil
	case len(started) == 1:
		return started[0], nil
	}
	return "", err
}
