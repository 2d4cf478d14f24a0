package tunnel

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/crypto/blake2s"
)

// KeyRing is the passwords of a mesh, stretched: the first is used to dial, all are accepted. A password
// is changed without loss in three steps, each on every peer before the next one: add the new one, use
// it, remove the old one. Methods return a changed copy.
type KeyRing []PSK

// maxKeys bounds what each handshake of a stranger is tried against.
const maxKeys = 8

// Errors of KeyRing.
var (
	ErrOpenMesh = errors.New("this mesh has no password: the first one is given when meshd starts, on every peer")
	ErrNoKey    = errors.New("no such password")
)

// ID is how people tell PSKs apart: 8 hexadecimal digits from which nothing can be learnt that a recorded
// handshake would not tell as well, at the same cost per guess.
func (k PSK) ID() string {
	sum := blake2s.Sum256(append([]byte("meshd key id 1"), k[:]...))
	return hex.EncodeToString(sum[:4])
}

// Add accepts another password.
func (r KeyRing) Add(k PSK) (KeyRing, error) {
	switch {
	case len(r) == 0:
		return nil, ErrOpenMesh
	case k.IsZero():
		return nil, errors.New("the empty password is none")
	case slices.Contains(r, k):
		return nil, fmt.Errorf("the password %s is there already", k.ID())
	case len(r) == maxKeys:
		return nil, fmt.Errorf("there are %d passwords: remove one first", maxKeys)
	}
	return append(slices.Clone(r), k), nil
}

// Use makes a password the one that is dialled with.
func (r KeyRing) Use(id string) (KeyRing, error) {
	i, err := r.find(id)
	if err != nil {
		return nil, err
	}
	k := r[i]
	return slices.Insert(slices.Delete(slices.Clone(r), i, i+1), 0, k), nil
}

// Remove no longer accepts a password. The one that is dialled with stays.
func (r KeyRing) Remove(id string) (KeyRing, error) {
	i, err := r.find(id)
	if err != nil {
		return nil, err
	}
	if i == 0 {
		return nil, fmt.Errorf("the password %s is in use: use another one first", id)
	}
	return slices.Delete(slices.Clone(r), i, i+1), nil
}

func (r KeyRing) find(id string) (int, error) {
	if i := slices.IndexFunc(r, func(k PSK) bool { return k.ID() == id }); i >= 0 {
		return i, nil
	}
	return 0, fmt.Errorf("%q: %w; \"meshctl password list\" shows them", id, ErrNoKey)
}

// Bytes is what ParseKeyRing reads: version 1, then 32 bytes for each PSK. It is secret.
func (r KeyRing) Bytes() []byte {
	b := []byte{1}
	for _, k := range r {
		b = append(b, k[:]...)
	}
	return b
}

// ParseKeyRing reads what Bytes wrote.
func ParseKeyRing(b []byte) (KeyRing, error) {
	if len(b) < 1 || b[0] != 1 || (len(b)-1)%len(PSK{}) != 0 || len(b) == 1 || len(b)-1 > maxKeys*len(PSK{}) {
		return nil, errors.New("key ring: not of a kind that this version knows")
	}
	var r KeyRing
	for part := range slices.Chunk(b[1:], len(PSK{})) {
		k := PSK(part)
		if k.IsZero() || slices.Contains(r, k) {
			return nil, errors.New("key ring: an empty password, or one that stands twice")
		}
		r = append(r, k)
	}
	return r, nil
}
