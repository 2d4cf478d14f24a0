package tunnel

import (
	"crypto/hmac"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/flynn/noise"
	"golang.org/x/crypto/blake2s"

	"meshd/router"
)

// The handshake is Noise_XXpsk0_25519_ChaChaPoly_BLAKE2s (Noise specification, revision 34):
//
//	-> psk, e          hello1, payload offer
//	<- e, ee, s, es    hello2, payload terms
//	-> s, se           hello3, payload terms
//
// Around each message a header names the session at both ends, and a MAC keyed by the PSK lets a listener
// turn strangers away for the price of one hash:
//
//	0        1        2        4                 8                 12
//	+--------+--------+--------+-----------------+-----------------+
//	| type   | version| 0      | own index       | other's index   |   (hello1: no other's index)
//	+--------+--------+--------+-----------------+-----------------+
//	| Noise message ...                                            |
//	+--------------------------------------------------------------+
//	| MAC 1, 16 bytes: BLAKE2s-128 keyed, over all before it       |
//	+--------------------------------------------------------------+
//	| MAC 2, 16 bytes, hello1 only: keyed by the cookie, or zeros  |
//	+--------------------------------------------------------------+
const (
	hello1HeaderLen = 8
	helloHeaderLen  = 12
	macLen          = 16
	hello1Len       = hello1HeaderLen + 32 + offerLen + sealLen + 2*macLen
	hello2Len       = helloHeaderLen + 32 + 32 + sealLen + termsLen + sealLen + macLen // and the nickname
	hello3Len       = helloHeaderLen + 32 + sealLen + termsLen + sealLen + macLen
	maxHelloLen     = 512 // room for what newer versions append
)

var (
	suite    = noise.NewCipherSuite(noise.DH25519, noise.CipherChaChaPoly, noise.HashBLAKE2s)
	prologue = []byte("meshd tunnel 1")

	errHandshake = errors.New("handshake does not authenticate")
	errIndex     = errors.New("handshake for another session")
)

func newNoise(id Identity, psk PSK, initiator bool) (*noise.HandshakeState, error) {
	return noise.NewHandshakeState(noise.Config{
		CipherSuite: suite, Pattern: noise.HandshakeXX, Initiator: initiator, Prologue: prologue,
		PresharedKey: psk[:], PresharedKeyPlacement: 0, StaticKeypair: id.noiseKey(),
	})
}

// mac is BLAKE2s-128 keyed with key.
func mac(key, data []byte) (out [macLen]byte) {
	h, err := blake2s.New128(key)
	if err != nil {
		panic(err) // only for a key longer than 32 bytes
	}
	h.Write(data)
	h.Sum(out[:0])
	return out
}

func macEqual(a [macLen]byte, b []byte) bool { return hmac.Equal(a[:], b) }

// checkMAC1 finds the secret whose MAC a handshake datagram bears: nil if none.
func checkMAC1(secrets []secret, datagram []byte) *secret {
	end := len(datagram) - macLen
	if datagram[0] == typeHello1 {
		end -= macLen
	}
	for i := range secrets {
		if macEqual(mac(secrets[i].mac1[:], datagram[:end]), datagram[end:end+macLen]) {
			return &secrets[i]
		}
	}
	return nil
}

// checkHello says whether b can be a handshake datagram at all: type, version and length.
func checkHello(b []byte) bool {
	if len(b) < hello3Len && (len(b) < hello1Len || b[0] != typeHello1) || len(b) > maxHelloLen || b[1] != wireVersion {
		return false
	}
	return b[0] == typeHello1 || b[0] == typeHello2 && len(b) >= hello2Len || b[0] == typeHello3
}

// initiator is one handshake that this peer began.
type initiator struct {
	noise  *noise.HandshakeState
	secret secret
	index  uint32 // of the session here
	hello1 []byte // to be sent, and sent again: the last macLen bytes are MAC 2
}

func newInitiator(id Identity, s secret, index uint32, o offer) (*initiator, error) {
	hs, err := newNoise(id, s.psk, true)
	if err != nil {
		return nil, err
	}
	b := binary.BigEndian.AppendUint32([]byte{typeHello1, wireVersion, 0, 0}, index)
	if b, _, _, err = hs.WriteMessage(b, appendOffer(nil, o)); err != nil {
		return nil, err
	}
	m := mac(s.mac1[:], b)
	b = append(append(b, m[:]...), make([]byte, macLen)...)
	return &initiator{hs, s, index, b}, nil
}

// setCookie fills MAC 2 of hello1.
func (i *initiator) setCookie(cookie [macLen]byte) {
	end := len(i.hello1) - macLen
	m := mac(cookie[:], i.hello1[:end])
	copy(i.hello1[end:], m[:])
}

// readHello2 learns who answered. After an error the handshake cannot go on, except after errHandshake
// and errIndex, where the datagram was not the answer.
func (i *initiator) readHello2(datagram []byte) (terms, error) {
	own, other := binary.BigEndian.Uint32(datagram[4:]), binary.BigEndian.Uint32(datagram[8:])
	if other != i.index {
		return terms{}, errIndex
	}
	payload, _, _, err := i.noise.ReadMessage(nil, datagram[helloHeaderLen:len(datagram)-macLen])
	if err != nil {
		return terms{}, fmt.Errorf("%w: %w", errHandshake, err)
	}
	t, err := parseTerms(payload, i.noise.PeerStatic())
	if err == nil && (t.own != own || t.other != other) {
		err = errors.New("indexes inside and outside differ")
	}
	return t, err
}

// writeHello3 ends the handshake: ours are the terms of this peer, theirs those of hello2.
func (i *initiator) writeHello3(ours, theirs terms) (datagram []byte, k *keys, err error) {
	ours.own, ours.other, ours.aes = i.index, theirs.own, theirs.aes
	b := helloHeader(typeHello3, ours)
	b, up, down, err := i.noise.WriteMessage(b, appendTerms(nil, ours))
	if err != nil {
		return nil, nil, err
	}
	m := mac(i.secret.mac1[:], b)
	k = newKeys(ours, theirs, up.UnsafeKey(), down.UnsafeKey())
	k.initiator = true
	k.psk = i.secret.psk
	return append(b, m[:]...), k, nil
}

// responder is one handshake that another peer began.
type responder struct {
	noise  *noise.HandshakeState
	secret secret
	hello1 [sha]byte // what it answers to, without MAC 2
	hello2 []byte
	ours   terms
}

const sha = 32

// hello1ID tells one hello1 from another, whatever its MAC 2.
func hello1ID(datagram []byte) [sha]byte { return blake2s.Sum256(datagram[:len(datagram)-macLen]) }

// newResponder answers a hello1 whose MAC 1 is that of s. ours are this peer's terms; own index given,
// other's and cipher follow from the message.
func newResponder(id Identity, s secret, datagram []byte, ours terms) (*responder, error) {
	hs, err := newNoise(id, s.psk, false)
	if err != nil {
		return nil, err
	}
	payload, _, _, err := hs.ReadMessage(nil, datagram[hello1HeaderLen:len(datagram)-2*macLen])
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errHandshake, err)
	}
	o, err := parseOffer(payload)
	if err != nil {
		return nil, err
	}
	ours.other = binary.BigEndian.Uint32(datagram[4:])
	ours.aes = ours.aes && o.aes
	b := helloHeader(typeHello2, ours)
	if b, _, _, err = hs.WriteMessage(b, appendTerms(nil, ours)); err != nil {
		return nil, err
	}
	m := mac(s.mac1[:], b)
	return &responder{hs, s, hello1ID(datagram), append(b, m[:]...), ours}, nil
}

// readHello3 ends the handshake. After errHandshake and errIndex the real hello3 may still come.
func (r *responder) readHello3(datagram []byte) (theirs terms, k *keys, err error) {
	own, other := binary.BigEndian.Uint32(datagram[4:]), binary.BigEndian.Uint32(datagram[8:])
	if own != r.ours.other || other != r.ours.own {
		return theirs, nil, errIndex
	}
	payload, up, down, err := r.noise.ReadMessage(nil, datagram[helloHeaderLen:len(datagram)-macLen])
	if err != nil {
		return theirs, nil, fmt.Errorf("%w: %w", errHandshake, err)
	}
	if theirs, err = parseTerms(payload, r.noise.PeerStatic()); err != nil {
		return theirs, nil, err
	}
	if theirs.own != own || theirs.other != other || theirs.aes != r.ours.aes {
		return theirs, nil, errors.New("terms inside and outside differ")
	}
	k = newKeys(r.ours, theirs, down.UnsafeKey(), up.UnsafeKey())
	k.psk = r.secret.psk
	return theirs, k, nil
}

func helloHeader(typ byte, ours terms) []byte {
	b := []byte{typ, wireVersion, 0, 0}
	b = binary.BigEndian.AppendUint32(b, ours.own)
	return binary.BigEndian.AppendUint32(b, ours.other)
}

// sameHost reports whether two hellos come from the same process.
func sameHost(a, b router.Hello) bool {
	return a.Run == b.Run && a.Name == b.Name && a.Key == b.Key
}
