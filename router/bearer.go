package router

import (
	"time"

	"meshd/mesh"
)

// Keys signs this peer's records and checks those of others. Its methods take some ten microseconds, hold no
// lock and may be called from any goroutine.
type Keys interface {
	Sign(msg []byte) [64]byte // with this peer's key
	Verify(key [32]byte, msg []byte, sig [64]byte) bool
	NameOf(key [32]byte) mesh.PeerName // the name that follows from a key
}

// noKeys signs nothing and believes nothing.
type noKeys struct{}

func (noKeys) Sign([]byte) (sig [64]byte)             { return sig }
func (noKeys) Verify([32]byte, []byte, [64]byte) bool { return false }
func (noKeys) NameOf([32]byte) (nobody mesh.PeerName) { return nobody }

// nameHold is how long a chosen name stays with its bearer after that was last reached. It covers a restart;
// a host that was made anew waits so long for its old name.
const nameHold = 10 * time.Second

// bears says whether a key may bear a name, of whose bearer e knows.
//
// A name that follows from a key belongs to that key: nobody else's claim counts, and one that came first
// gives way. A name that was chosen (--name) belongs to who is met first, in a handshake of our own or by a
// record, as long as that peer is reached and for nameHold.
func (t *Topology) bears(e *entry, name mesh.PeerName, key [32]byte) bool {
	known, ok := e.key()
	if !ok || known == key {
		return true
	}
	if name == t.self || t.keys.NameOf(known) == name {
		return false
	}
	if t.keys.NameOf(key) == name {
		return true
	}
	return !e.linked && !e.away.IsZero() && t.now.Sub(e.away) >= nameHold
}

// rival notes who has told us of another bearer of the name. Rows are verified before they are passed on, so that
// peer has met one, or made it up.
func (e *entry) rival(from mesh.PeerName, now time.Time) {
	if _, again := e.rivals[from]; !again && len(e.rivals) >= maxRivals {
		return
	}
	if e.rivals == nil {
		e.rivals = map[mesh.PeerName]time.Time{}
	}
	e.rivals[from] = now
}

const (
	maxRivals = 256         // of one name
	rivalAge  = time.Minute // peers that differ compare what they know much more often
)

// rivalledLocked reports whether all who have a link to that name mean another bearer by it: then the one that is
// known here is not reached, although somebody of its name is. Otherwise who comes to a mesh between a host's end
// and its being made anew would take the new one for an impostor for good.
func (t *Topology) rivalledLocked(name mesh.PeerName, e *entry) bool {
	for from, at := range e.rivals {
		if t.now.Sub(at) > rivalAge {
			delete(e.rivals, from)
		}
	}
	if len(e.rivals) == 0 {
		return false
	}
	for from, p := range t.peers {
		if _, means := e.rivals[from]; means || from == name || !p.down.IsZero() {
			continue
		}
		for _, page := range p.pages {
			for l, rest := cutLink(page.body); l != nil; l, rest = cutLink(rest) {
				if l.to() == name {
					return false
				}
			}
		}
	}
	return true
}

// key is whose word counts for a peer.
func (e *entry) key() (key [32]byte, ok bool) {
	switch {
	case e == nil:
		return key, false
	case e.base != nil:
		return e.base.peer.Key, true
	}
	return e.proven, e.linked
}

// genuineLocked reports whether a record was signed by the bearer of its name, and counts it if not.
func (t *Topology) genuineLocked(r *record, refused *mesh.Refusal) bool {
	e := t.peers[r.id.peer]
	key, known := e.key()
	switch {
	case r.id.page == 0 && !t.bears(e, r.id.peer, r.peer.Key):
		refused.Foreign++
		return false
	case r.id.page == 0:
		key = r.peer.Key
	case !known:
		refused.Unknown++
		return false
	}
	if !t.keys.Verify(key, r.signed(), r.sig) {
		refused.Forged++
		return false
	}
	return true
}

// Linked notes that a peer has proven its key in a handshake and that there is a live link to it, or no
// longer. Other records of the name that are known are forgotten, unless it follows from their key.
func (t *Topology) Linked(name mesh.PeerName, key [32]byte, up bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !up {
		if e := t.peers[name]; e != nil {
			e.linked = false
		}
		return
	}
	e := t.entryLocked(name)
	switch {
	case e == nil || name == t.self:
	case e.base != nil && e.base.peer.Key != key && t.keys.NameOf(e.base.peer.Key) == name:
	default:
		if e.base != nil && e.base.peer.Key != key {
			t.dropLocked(e)
		}
		e.linked, e.proven = true, key
	}
}

// MayBear reports whether a key may bear a name, by what is known here.
func (t *Topology) MayBear(name mesh.PeerName, key [32]byte) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.bears(t.peers[name], name, key)
}

// KeyOf returns the key that bears a name.
func (t *Topology) KeyOf(name mesh.PeerName) (key [32]byte, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.peers[name].key()
}

// Bearer returns the name that a key bears: the one of the peer that has it, or that which follows from it.
func (t *Topology) Bearer(key [32]byte) mesh.PeerName {
	t.mu.Lock()
	defer t.mu.Unlock()
	for name, e := range t.peers {
		if e.base != nil && e.base.peer.Key == key {
			return name
		}
	}
	return t.keys.NameOf(key)
}
