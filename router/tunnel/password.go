package tunnel

import (
	"crypto/cipher"
	"crypto/subtle"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
)

// PSK is a password after stretching: the pre-shared key of the Noise handshake. The zero value stands
// for "no password".
type PSK [32]byte

// Cost of one guess at a password: argon2id (RFC 9106), 128 MiB, 3 passes, 1 lane. On the 2 cores this was
// written on one guess takes 0.2 to 0.3 s; it must never be below 90 ms. The salt is fixed because
// peers that have nothing in common but the password must arrive at the same key.
const (
	stretchSalt   = "meshd password 1"
	stretchPasses = 3
	stretchMemory = 128 << 10 // KiB
	stretchLanes  = 1
)

// Stretch turns a password into a PSK; the empty password into the zero PSK. It is slow on purpose and
// uses 128 MiB while it runs: call it once at start.
func Stretch(password string) PSK {
	if password == "" {
		return PSK{}
	}
	return PSK(argon2.IDKey([]byte(password), []byte(stretchSalt), stretchPasses, stretchMemory, stretchLanes, 32))
}

// IsZero reports, in constant time, whether k stands for no password.
func (k PSK) IsZero() bool {
	var zero PSK
	return subtle.ConstantTimeCompare(k[:], zero[:]) == 1
}

// String hides the key.
func (k PSK) String() string { return "(hidden)" }

// GoString hides the key.
func (k PSK) GoString() string { return "tunnel.PSK(hidden)" }

// secret is a PSK with the keys that guard the handshake's outside derived from it.
type secret struct {
	psk    PSK
	mac1   [32]byte    // key of the first MAC of every handshake datagram
	cookie cipher.AEAD // that cookies are sealed with
}

func newSecret(psk PSK) secret {
	derive := func(label string) [32]byte {
		return blake2s.Sum256(append([]byte(label), psk[:]...))
	}
	key := derive("meshd cookie 1")
	cookie, err := chacha20poly1305.NewX(key[:])
	if err != nil {
		panic(err) // only for a key of another length
	}
	return secret{psk, derive("meshd mac1 1"), cookie}
}

// newSecrets makes the key ring: all are accepted, the first is the one we dial with. It is never empty,
// and "no password" is not in it beside a password.
func newSecrets(psks []PSK) []secret {
	var out []secret
	for _, k := range psks {
		if !k.IsZero() {
			out = append(out, newSecret(k))
		}
	}
	if len(out) == 0 {
		out = append(out, newSecret(PSK{}))
	}
	return out
}
