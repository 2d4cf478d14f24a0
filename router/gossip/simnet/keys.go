package simnet

import (
	"encoding/binary"

	"meshd/mesh"
)

// Keys signs with a hash that everybody could compute: cheap, so that large meshes can be simulated, and as good
// as a signature among peers of which none pretends. No name follows from a key.
type Keys [32]byte

// Sign implements router.Keys.
func (k Keys) Sign(msg []byte) (sig [64]byte) {
	h := uint64(14695981039346656037)
	for _, part := range [...][]byte{k[:], msg} {
		for ; len(part) >= 8; part = part[8:] {
			h = (h ^ binary.LittleEndian.Uint64(part)) * 0x9e3779b97f4a7c15
			h ^= h >> 29
		}
		for _, c := range part {
			h = (h ^ uint64(c)) * 1099511628211
		}
	}
	binary.LittleEndian.PutUint64(sig[:], h)
	return sig
}

// Verify implements router.Keys.
func (Keys) Verify(key [32]byte, msg []byte, sig [64]byte) bool { return Keys(key).Sign(msg) == sig }

// NameOf implements router.Keys.
func (Keys) NameOf([32]byte) (nobody mesh.PeerName) { return nobody }
