package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"meshd/mesh"
	"meshd/router"
	"meshd/router/tunnel"
	"meshd/store"
)

// Keys of the bucket that holds what meshd itself remembers.
const (
	bucketSelf = "meshd"
	keyPrivate = "private-key" // 32 bytes: see tunnel.Identity
	keyTargets = "targets"     // JSON array of strings
	keyShortID = "short-id"    // 2 bytes, big endian
	keyMet     = "met"         // JSON array of addresses with port
)

// ownState is what these values need of the store.
type ownState interface {
	Get(bucket, key string) ([]byte, error)
	Put(bucket string, kv map[string][]byte) error
}

var _ ownState = (*store.Store)(nil)

// identity loads the peer's key, or makes it at the first start. A key that is there but unreadable is an
// error: a new one would make this a stranger to its own addresses.
func identity(s ownState) (tunnel.Identity, error) {
	raw, err := s.Get(bucketSelf, keyPrivate)
	if err != nil {
		return tunnel.Identity{}, fmt.Errorf("load the peer's key: %w", err)
	}
	if raw != nil {
		id, err := tunnel.ParseIdentity(raw)
		if err != nil {
			return tunnel.Identity{}, fmt.Errorf("the peer's key in the state file: %w", err)
		}
		return id, nil
	}
	id, err := tunnel.NewIdentity()
	if err != nil {
		return tunnel.Identity{}, err
	}
	if err := s.Put(bucketSelf, map[string][]byte{keyPrivate: id.Bytes()}); err != nil {
		return tunnel.Identity{}, fmt.Errorf("store the peer's key: %w", err)
	}
	return id, nil
}

// rowKeys are what the table of endpoints and names needs to sign and verify its rows.
type rowKeys struct {
	tunnel.Identity
	topology *router.Topology
}

func (k rowKeys) Key(peer mesh.PeerName) ([32]byte, bool) { return k.topology.KeyOf(peer) }

func (k rowKeys) Bearer(key [32]byte) mesh.PeerName { return k.topology.Bearer(key) }

// newRunID tells this run from every other one. crypto/rand never fails (Go 1.24).
func newRunID() mesh.RunID {
	var b [8]byte
	rand.Read(b[:])
	return mesh.RunID(binary.BigEndian.Uint64(b[:]))
}

func loadTargets(s ownState) ([]string, error) {
	raw, err := s.Get(bucketSelf, keyTargets)
	if err != nil || raw == nil {
		return nil, err
	}
	var targets []string
	if err := json.Unmarshal(raw, &targets); err != nil {
		return nil, fmt.Errorf("the targets in the state file: %w", err)
	}
	return targets, nil
}

func saveTargets(s ownState, targets []string) error {
	raw, err := json.Marshal(targets)
	if err != nil {
		return err
	}
	return s.Put(bucketSelf, map[string][]byte{keyTargets: raw})
}

// loadMet returns where an earlier run met peers.
func loadMet(s ownState) ([]netip.AddrPort, error) {
	raw, err := s.Get(bucketSelf, keyMet)
	if err != nil || raw == nil {
		return nil, err
	}
	var met []netip.AddrPort
	if err := json.Unmarshal(raw, &met); err != nil {
		return nil, fmt.Errorf("the peers in the state file: %w", err)
	}
	return met, nil
}

func saveMet(s ownState, met []netip.AddrPort) error {
	raw, err := json.Marshal(met)
	if err != nil {
		return err
	}
	return s.Put(bucketSelf, map[string][]byte{keyMet: raw})
}

// loadShortID returns the short id of the last run, so that the kernel path's state fits it; zero if none.
func loadShortID(s ownState) (mesh.ShortID, error) {
	raw, err := s.Get(bucketSelf, keyShortID)
	if err != nil || len(raw) != 2 {
		return 0, err
	}
	return mesh.ShortID(binary.BigEndian.Uint16(raw)) & mesh.MaxShortID, nil
}

func saveShortID(s ownState, id mesh.ShortID) error {
	return s.Put(bucketSelf, map[string][]byte{keyShortID: binary.BigEndian.AppendUint16(nil, uint16(id))})
}

// ended tells a room's failure from its end by ctx, which every Run may report as it likes.
func ended(ctx context.Context, room string, err error) error {
	if err == nil || ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return nil
	}
	return fmt.Errorf("%s: %w", room, err)
}
