package tunnel

import (
	"crypto/rand"
	"encoding/binary"
	"net/netip"
	"time"

	"golang.org/x/crypto/blake2s"
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
	current, previous [32]byte
	changed           time.Time
}

func (b *baker) rotate(now time.Time) {
	if !b.changed.IsZero() && now.Sub(b.changed) < cookieAge {
		return
	}
	b.previous = b.current
	if b.changed.IsZero() || now.Sub(b.changed) >= 2*cookieAge {
		fill(b.previous[:])
	}
	fill(b.current[:])
	b.changed = now
}

func fill(b []byte) {
	if _, err := rand.Read(b); err != nil {
		panic(err) // crypto/rand.Read does not fail (Go 1.24)
	}
}

func bake(secret [32]byte, from origin) [macLen]byte {
	h, err := blake2s.New128(secret[:])
	if err != nil {
		panic(err)
	}
	addr := from.addr.Addr().As16()
	h.Write(addr[:])
	h.Write(binary.BigEndian.AppendUint16(nil, from.addr.Port()))
	if from.relayed {
		h.Write(from.src[:])
	}
	return [macLen]byte(h.Sum(nil))
}

// proven reports whether the MAC 2 of a hello1 was made with a cookie for that origin.
func (b *baker) proven(hello1 []byte, from origin, now time.Time) bool {
	b.rotate(now)
	end := len(hello1) - macLen
	for _, secret := range [][32]byte{b.current, b.previous} {
		cookie := bake(secret, from)
		if macEqual(mac(cookie[:], hello1[:end]), hello1[end:]) {
			return true
		}
	}
	return false
}

// reply makes the datagram that hands a cookie to the sender of a hello1 that bears the MAC of s.
func (b *baker) reply(s *secret, hello1 []byte, from origin, now time.Time) []byte {
	b.rotate(now)
	out := make([]byte, 0, cookieLen)
	out = append(out, typeCookie, wireVersion, 0, 0)
	out = append(out, hello1[4:8]...)
	var nonce [chacha20poly1305.NonceSizeX]byte
	fill(nonce[:])
	out = append(out, nonce[:]...)
	cookie := bake(b.current, from)
	aead, err := chacha20poly1305.NewX(s.cookie[:])
	if err != nil {
		panic(err)
	}
	return aead.Seal(out, nonce[:], cookie[:], hello1[len(hello1)-2*macLen:len(hello1)-macLen])
}

// openCookie reads a cookie datagram that answers hello1.
func openCookie(s *secret, datagram, hello1 []byte) (cookie [macLen]byte, ok bool) {
	if len(datagram) < cookieLen || datagram[0] != typeCookie || datagram[1] != wireVersion {
		return cookie, false
	}
	aead, err := chacha20poly1305.NewX(s.cookie[:])
	if err != nil {
		panic(err)
	}
	sealed := datagram[cookieHeaderLen+chacha20poly1305.NonceSizeX : cookieLen]
	out, err := aead.Open(nil, datagram[cookieHeaderLen:cookieHeaderLen+chacha20poly1305.NonceSizeX], sealed,
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
