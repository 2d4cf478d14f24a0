package main

import (
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"meshd/mesh"
	"meshd/router/tunnel"
)

// What follows reads bytes that others wrote: the state file, /proc, the environment.

type memoryState map[string][]byte

func (m memoryState) Get(_, key string) ([]byte, error) { return m[key], nil }

func (m memoryState) Put(_ string, kv map[string][]byte) error {
	maps.Copy(m, kv)
	return nil
}

// What is on disk may be anything: it is refused, or it is what was kept and is kept again as it is.
func FuzzState(f *testing.F) {
	keys := []string{keyPrivate, keyTargets, keyMet, keyShortID}
	for i, value := range []string{strings.Repeat("k", 32), `["host2","10.0.0.1:6783",""]`, `["10.0.0.1:6783","[fe80::1%eth0]:1",""]`, "\x0f\xff"} {
		f.Add(i, []byte(value))
	}
	f.Add(1, []byte(`null`))
	f.Add(2, []byte(`{"a":1}`))
	f.Fuzz(func(t *testing.T, which int, value []byte) {
		key := keys[uint(which)%uint(len(keys))]
		state := memoryState{key: value}
		switch key {
		case keyPrivate:
			id, err := identity(state)
			if err != nil {
				return
			}
			if again, err := identity(memoryState{key: id.Bytes()}); err != nil || again != id || (id.Public == [32]byte{}) {
				t.Errorf("%x: kept as %x it is another: %v", value, id.Bytes(), err)
			}
		case keyTargets:
			targets, err := loadTargets(state)
			if err != nil {
				return
			}
			if err := saveTargets(state, targets); err != nil {
				t.Fatal(err)
			}
			if again, err := loadTargets(state); err != nil || !slices.Equal(again, targets) {
				t.Errorf("%q: %q, %v, want %q", value, again, err, targets)
			}
		case keyMet:
			met, err := loadMet(state)
			if err != nil {
				return
			}
			if err := saveMet(state, met); err != nil {
				t.Fatal(err)
			}
			if again, err := loadMet(state); err != nil || !slices.Equal(again, met) {
				t.Errorf("%q: %v, %v, want %v", value, again, err, met)
			}
		case keyShortID:
			id, err := loadShortID(state)
			if err != nil || id > mesh.MaxShortID {
				t.Errorf("%x: %v, %v", value, id, err)
			}
		}
	})
}

// The environment, /proc/PID/stat and the command line of whatever calls itself dockerd.
func FuzzSurroundings(f *testing.F) {
	f.Add("5 (a) b) S"+strings.Repeat(" 1", 49), "dockerd\x00--tlsverify\x00--tlscacert=/a\x00--tlskey\x00b", "20000000", "1")
	f.Add("", "--tls=false\x00-tls=true", "-1", "")
	f.Fuzz(func(t *testing.T, stat, args, usec, pid string) {
		if start, err := envStart(stat); err == nil && start == 0 {
			t.Errorf("%q: the environment is at 0", stat)
		}
		files, verify, found := parseDockerdTLS(strings.Split(args, "\x00"))
		if verify && !found && !strings.Contains(args, "tlsverify") || (files == TLSFiles{}) && found && !strings.Contains(args, "tlscacert") {
			t.Errorf("%q: %+v %v %v", args, files, verify, found)
		}
		if n := newNotifier(variables("WATCHDOG_USEC", usec, "WATCHDOG_PID", pid), slog.New(slog.DiscardHandler)); n.interval < 0 {
			t.Errorf("WATCHDOG_USEC=%q: fed every %v", usec, n.interval)
		}
	})
}

// What a peer remembers of itself is one and the same after a restart.
func TestStateComesBack(t *testing.T) {
	state := memoryState{}
	id, err := identity(state)
	if err != nil {
		t.Fatal(err)
	}
	again, err := identity(state)
	if err != nil || !reflect.DeepEqual(id, again) || id == (tunnel.Identity{}) {
		t.Errorf("after a restart it is another peer: %v, %v", again.Name(), err)
	}
}
