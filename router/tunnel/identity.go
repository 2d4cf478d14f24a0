package tunnel

import (
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"math/big"
	"slices"

	"github.com/flynn/noise"
	"golang.org/x/crypto/blake2s"

	"meshd/mesh"
)

// Identity is a peer's key, made once and kept in the state file. It is one point of one curve in two forms:
// the Curve25519 key of the handshakes (RFC 7748), and the Ed25519 key that signs what the peer writes into
// the replicated tables (RFC 8032). Sharing a key between the two is sound (E. Thormarker, "On using the
// same key pair for Ed25519 and an X25519 based KEM", 2021); the messages signed are told apart by their
// first bytes.
type Identity struct {
	seed    [32]byte
	private [32]byte // Curve25519
	signer  [ed25519.PrivateKeySize]byte
	Public  [32]byte // Curve25519; edwards has its other form
}

// NewIdentity makes a random one.
func NewIdentity() (Identity, error) {
	var seed [32]byte
	if _, err := rand.Read(seed[:]); err != nil {
		return Identity{}, fmt.Errorf("make an identity: %w", err)
	}
	return ParseIdentity(seed[:])
}

// ParseIdentity reads the 32 bytes that Bytes returned. Any others make an identity too.
func ParseIdentity(seed []byte) (Identity, error) {
	if len(seed) != ed25519.SeedSize {
		return Identity{}, fmt.Errorf("identity: %d bytes, want %d", len(seed), ed25519.SeedSize)
	}
	id := Identity{seed: [32]byte(seed)}
	for {
		id.signer = [ed25519.PrivateKeySize]byte(ed25519.NewKeyFromSeed(id.seed[:]))
		if id.signer[63]&0x80 == 0 {
			break
		}
		id.seed = sha256.Sum256(id.seed[:]) // Curve25519 has no place for the sign: only keys with sign 0 are used
	}
	scalar := sha512.Sum512(id.seed[:]) // RFC 8032 section 5.1.5
	key, err := ecdh.X25519().NewPrivateKey(scalar[:32])
	if err != nil {
		return Identity{}, fmt.Errorf("identity: %w", err)
	}
	id.private, id.Public = [32]byte(scalar[:32]), [32]byte(key.PublicKey().Bytes())
	return id, nil
}

// Sign signs a message, which must begin in a way of its own for every use.
func (id Identity) Sign(msg []byte) [64]byte { return [64]byte(ed25519.Sign(id.signer[:], msg)) }

// Verify reports whether the holder of a public key, in its Curve25519 form, has signed a message.
func (Identity) Verify(public [32]byte, msg []byte, sig [64]byte) bool {
	key, ok := edwards(public)
	return ok && ed25519.Verify(key[:], msg, sig[:])
}

var (
	one        = big.NewInt(1)
	fieldPrime = new(big.Int).Sub(new(big.Int).Lsh(one, 255), big.NewInt(19))
)

// edwards turns a Curve25519 public key u into the Ed25519 key of sign 0: y = (u-1)/(u+1), RFC 7748 section 4.1.
func edwards(public [32]byte) (out [32]byte, ok bool) {
	slices.Reverse(public[:])
	u := new(big.Int).SetBytes(public[:])
	y := new(big.Int).Sub(u, one)
	if u.Add(u, one).ModInverse(u, fieldPrime) == nil {
		return out, false
	}
	y.Mul(y, u).Mod(y, fieldPrime).FillBytes(out[:])
	slices.Reverse(out[:])
	return out, true
}

// Bytes is what the private key is made from, for the state file. It belongs in no log and no report.
func (id Identity) Bytes() []byte { return append([]byte(nil), id.seed[:]...) }

// String shows the public half only.
func (id Identity) String() string { return fmt.Sprintf("%x", id.Public[:8]) }

// GoString keeps the private half out of %#v as well.
func (id Identity) GoString() string { return "tunnel.Identity(" + id.String() + ")" }

// Name is the peer name that follows from the key: 48 bits of its hash, in the form of a locally
// administered unicast MAC address.
func (id Identity) Name() mesh.PeerName { return NameOf(id.Public) }

// NameOf is the default name of the peer with that public key.
func (Identity) NameOf(public [32]byte) mesh.PeerName { return NameOf(public) }

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
