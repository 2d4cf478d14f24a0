package tunnel

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"net/netip"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"meshd/mesh"
)

// A cookie proves that the sender of a hello1 receives at the address it sends from. It is asked for only
// under load, so that a flood from invented addresses costs no Diffie-Hellman.
//
//	0        1        2        4                 8                        32
//	+--------+--------+--------+-----------------+------------------------+-------------------+
//	| type   | version| 0      | receiver index  | nonce, 24 bytes        | cookie 16, tag 16 |
//	+--------+--------+--------+-----------------+------------------------+-------------------+
//
// Sealed with XChaCha20-Poly1305 under a key of the PSK; the additional data is MAC 1 of the hello1.
const (
	cookieHeaderLen = 8
	cookieLen       = cookieHeaderLen + chacha20poly1305.NonceSizeX + macLen + chacha20poly1305.Overhead
	cookieAge       = 2 * time.Minute // a secret serves that long, and its cookies as long again
)

// baker makes and checks cookies. Not safe for concurrent use.
type baker struct {
	current, previous cipher.Block
	changed           time.Time
	nonce             [chacha20poly1305.NonceSizeX]byte // of the last cookie: a random start, and a count
}

func (b *baker) rotate(now time.Time) {
	if !b.changed.IsZero() && now.Sub(b.changed) < cookieAge {
		return
	}
	b.previous = b.current
	if b.changed.IsZero() || now.Sub(b.changed) >= 2*cookieAge {
		b.previous = newOven()
	}
	b.current, b.changed = newOven(), now
	fill(b.nonce[:])
}

func newOven() cipher.Block {
	var key [32]byte
	fill(key[:])
	block, err := aes.NewCipher(key[:])
	if err != nil {
		panic(err) // only for a key of another length
	}
	return block
}

func fill(b []byte) {
	if _, err := rand.Read(b); err != nil {
		panic(err) // crypto/rand.Read does not fail (Go 1.24)
	}
}

// bake is a CBC-MAC: all messages have the same length, so it is a PRF, and the cheapest that there is.
func bake(oven cipher.Block, from origin) (cookie [macLen]byte) {
	var where [macLen]byte
	binary.BigEndian.PutUint16(where[:], from.addr.Port())
	if from.relayed {
		where[2] = 1
		copy(where[3:], from.src[:])
	}
	cookie = from.addr.Addr().As16()
	oven.Encrypt(cookie[:], cookie[:])
	subtle.XORBytes(cookie[:], cookie[:], where[:])
	oven.Encrypt(cookie[:], cookie[:])
	return cookie
}

// proven reports whether the MAC 2 of a hello1 was made with a cookie for that origin.
func (b *baker) proven(hello1 []byte, from origin, now time.Time) bool {
	end := len(hello1) - macLen
	if [macLen]byte(hello1[end:]) == ([macLen]byte{}) {
		return false // as everybody begins: most of a flood
	}
	b.rotate(now)
	for _, oven := range []cipher.Block{b.current, b.previous} {
		cookie := bake(oven, from)
		if macEqual(mac(cookie[:], hello1[:end]), hello1[end:]) {
			return true
		}
	}
	return false
}

// reply makes the datagram that hands a cookie to the sender of a hello1 that bears the MAC of s.
func (b *baker) reply(s *secret, hello1 []byte, from origin, now time.Time) []byte {
	b.rotate(now)
	count := b.nonce[len(b.nonce)-8:]
	binary.BigEndian.PutUint64(count, binary.BigEndian.Uint64(count)+1)
	out := make([]byte, 0, cookieLen)
	out = append(out, typeCookie, wireVersion, 0, 0)
	out = append(out, hello1[4:8]...)
	out = append(out, b.nonce[:]...)
	cookie := bake(b.current, from)
	return s.cookie.Seal(out, b.nonce[:], cookie[:], hello1[len(hello1)-2*macLen:len(hello1)-macLen])
}

// openCookie reads a cookie datagram that answers hello1.
func openCookie(s *secret, datagram, hello1 []byte) (cookie [macLen]byte, ok bool) {
	if len(datagram) < cookieLen || datagram[0] != typeCookie || datagram[1] != wireVersion {
		return cookie, false
	}
	sealed := datagram[cookieHeaderLen+chacha20poly1305.NonceSizeX : cookieLen]
	out, err := s.cookie.Open(nil, datagram[cookieHeaderLen:cookieHeaderLen+chacha20poly1305.NonceSizeX], sealed,
		hello1[len(hello1)-2*macLen:len(hello1)-macLen])
	if err != nil {
		return cookie, false
	}
	return [macLen]byte(out), true
}

// origin is where a datagram came from: an underlay address, or by a relay from a peer.
type origin struct {
	addr    netip.AddrPort // of the relay if relayed
	relayed bool
	src     mesh.PeerName // claimed original sender, if relayed
}
