package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"meshd/store"
)

func TestRemedy(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	at := taken.Addr().(*net.TCPAddr).AddrPort()
	_, inUse := net.Listen("tcp", at.String())
	_, notHere := net.Listen("tcp", "192.0.2.1:0")
	if !errors.Is(inUse, syscall.EADDRINUSE) || !errors.Is(notHere, syscall.EADDRNOTAVAIL) {
		t.Fatalf("got %v, %v", inUse, notHere)
	}
	cfg := Config{StateDir: "/var/lib/meshd", Control: ControlConfig{StatusAddr: "127.0.0.1:6782"}}
	cfg.Underlay.Port, cfg.Underlay.Host = 6783, netip.MustParseAddr("192.0.2.1")
	port, status := cfg, cfg
	port.Underlay.Port = at.Port()
	status.Control.StatusAddr = at.String()
	for _, c := range []struct {
		err  error
		cfg  Config
		want string
	}{
		{inUse, port, "--port chooses another"},
		{inUse, port, fmt.Sprintf("address already in use: tcp %v is held by ", at)},
		{inUse, status, "--status-addr chooses another"},
		{inUse, cfg, inUse.Error()},
		{notHere, cfg, "--host: this host has no address 192.0.2.1"},
		{store.ErrLocked, cfg, "--state-dir"},
		{store.ErrNewer, cfg, "start that one again"},
		{store.ErrCorrupt, cfg, "meshctl reset --force"},
		{&fs.PathError{Op: "mkdir", Path: "/var/lib", Err: syscall.EROFS}, cfg, "; --state-dir chooses another place"},
		{&fs.PathError{Op: "open", Path: "/var/lib/meshd/meshd.db", Err: syscall.EACCES}, cfg, "; --state-dir chooses another place"},
		{&fs.PathError{Op: "open", Path: "/var/lib/meshd2", Err: syscall.EACCES}, cfg, "open /var/lib/meshd2: permission denied"},
		{errors.New("anything else"), cfg, "anything else"},
	} {
		got := remedy(fmt.Errorf("start: %w", c.err), c.cfg).Error()
		if !strings.Contains(got, c.want) || got == "start: "+c.err.Error() && !strings.HasSuffix(got, c.want) {
			t.Errorf("%v: got %q, want %q", c.err, got, c.want)
		}
	}
}
