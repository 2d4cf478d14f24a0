package records

import "meshd/mesh"

// Keys signs this peer's rows and checks those of others. Its methods never block, may take some ten
// microseconds, and are called with the table's lock held.
type Keys interface {
	Sign(msg []byte) [64]byte // with this peer's key
	Verify(key [32]byte, msg []byte, sig [64]byte) bool
	Key(peer mesh.PeerName) (key [32]byte, ok bool) // of this peer too
	Bearer(key [32]byte) mesh.PeerName              // whose key it is
}

// noKeys signs nothing and believes nothing.
type noKeys struct{}

func (noKeys) Sign([]byte) (sig [64]byte)                { return sig }
func (noKeys) Verify([32]byte, []byte, [64]byte) bool    { return false }
func (noKeys) Key(mesh.PeerName) (key [32]byte, ok bool) { return [32]byte{31: 1}, true }
func (noKeys) Bearer([32]byte) (nobody mesh.PeerName)    { return nobody }

// sealLocked signs a row of ours, which has its final content.
func (t *Table) sealLocked(rec record) {
	s := rec.seal()
	s.body = rec.appendRest(rec.appendKey(nil))
	t.signing = signed(t.signing[:0], rec)
	s.sig = t.keys.Sign(t.signing)
}

// genuineLocked reports whether the holder of a key has signed a row, and counts it if not.
func (t *Table) genuineLocked(key [32]byte, rec record) bool {
	t.signing = signed(t.signing[:0], rec)
	if !t.keys.Verify(key, t.signing, rec.seal().sig) {
		t.refusal.Forged++
		return false
	}
	return true
}

// bindLocked notes the key by which the rows of a peer are judged. When the name has another bearer than
// before, the rows of the former one are dropped.
func (t *Table) bindLocked(name mesh.PeerName, p *peer, key [32]byte) {
	if key != p.key && p.key != ([32]byte{}) && name != t.self {
		t.dropPeerLocked(p)
	}
	p.key = key
}
