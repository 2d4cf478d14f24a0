package tunnel

import (
	"crypto/ecdh"
	"crypto/rand"
	"fmt"

	"github.com/flynn/noise"
	"golang.org/x/crypto/blake2s"

	"meshd/mesh"
)

// Identity is a peer's static Curve25519 key pair, made once and kept in the state file.
type Identity struct {
	private [32]byte
	Public  [32]byte
}

// NewIdentity makes a random one.
func NewIdentity() (Identity, error) {
	var private [32]byte
	if _, err := rand.Read(private[:]); err != nil {
		return Identity{}, fmt.Errorf("make an identity: %w", err)
	}
	return ParseIdentity(private[:])
}

// ParseIdentity reads the 32 bytes that Bytes returned.
func ParseIdentity(private []byte) (Identity, error) {
	key, err := ecdh.X25519().NewPrivateKey(private)
	if err != nil {
		return Identity{}, fmt.Errorf("identity: %w", err)
	}
	return Identity{[32]byte(private), [32]byte(key.PublicKey().Bytes())}, nil
}

// Bytes is the private key, for the state file. It belongs in no log and no report.
func (id Identity) Bytes() []byte { return append([]byte(nil), id.private[:]...) }

// String shows the public half only.
func (id Identity) String() string { return fmt.Sprintf("%x", id.Public[:8]) }

// GoString keeps the private half out of %#v as well.
func (id Identity) GoString() string { return "tunnel.Identity(" + id.String() + ")" }

// Name is the peer name that follows from the key: 48 bits of its hash, in the form of a locally
// administered unicast MAC address.
func (id Identity) Name() mesh.PeerName { return NameOf(id.Public) }

// NameOf is the default name of the peer with that public key.
func NameOf(public [32]byte) mesh.PeerName {
	sum := blake2s.Sum256(append([]byte("meshd peer name 1"), public[:]...))
	name := mesh.PeerName(sum[:6])
	name[0] = name[0]&^1 | 2
	return name
}

func (id Identity) noiseKey() noise.DHKey {
	return noise.DHKey{Private: id.private[:], Public: id.Public[:]}
}
