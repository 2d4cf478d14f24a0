package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"

	"meshd/mesh"
	"meshd/router"
)

// The payloads of the three handshake messages. What a newer version appends is ignored.

// offer is the payload of the first: what the initiator can do. Only the PSK protects it.
//
//	0        1                 4
//	+--------+-----------------+
//	| flags  | reserved, 0     |   flags: 1 prefers AES
//	+--------+-----------------+
type offer struct {
	aes bool // the CPU has AES instructions
}

const offerLen = 4

func appendOffer(b []byte, o offer) []byte { return append(b, flag(o.aes, flagAES), 0, 0, 0) }

func parseOffer(b []byte) (o offer, err error) {
	if len(b) < offerLen {
		return o, errShort
	}
	return offer{aes: b[0]&flagAES != 0}, nil
}

// terms is the payload of the second and third: who speaks, and on what conditions.
//
//	0        1                 4                 8                 12
//	+--------+-----------------+-----------------+-----------------+
//	| flags  | reserved, 0     | own index       | other's index   |
//	+--------+-----------------+-----------------+-----------------+-----------------+
//	| run id                                                       |                 20
//	+-----------------+--------+--------+--------------------------+
//	| name                              | port   | protocol | n    |                 30
//	+-----------------------------------+--------+----------+------+
//	| nickname, n bytes ...
//
// flags: 1 the data is sealed with AES-256-GCM (in the second message; the third repeats it), 2 frames
// may go in clear as far as the speaker is concerned.
type terms struct {
	hello      router.Hello // Key is not in it: the handshake proves it
	own, other uint32       // indexes of this session at the speaker and at the listener
	aes        bool
	clear      bool
}

const (
	flagAES     = 1
	flagClear   = 2
	termsLen    = 1 + 3 + 4 + 4 + 8 + 6 + 2 + 1 + 1
	maxNickName = 64
)

var errShort = errors.New("too short")

func flag(on bool, bit byte) byte {
	if on {
		return bit
	}
	return 0
}

func appendTerms(b []byte, t terms) []byte {
	b = append(b, flag(t.aes, flagAES)|flag(t.clear, flagClear), 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, t.own)
	b = binary.BigEndian.AppendUint32(b, t.other)
	b = binary.BigEndian.AppendUint64(b, uint64(t.hello.Run))
	b = append(b, t.hello.Name[:]...)
	b = binary.BigEndian.AppendUint16(b, t.hello.Port)
	nick := t.hello.NickName[:min(len(t.hello.NickName), maxNickName)]
	b = append(b, t.hello.Protocol, byte(len(nick)))
	return append(b, nick...)
}

// parseTerms reads what appendTerms wrote; key is what the handshake proved.
func parseTerms(b []byte, key []byte) (t terms, err error) {
	if len(b) < termsLen || len(key) != len(t.hello.Key) {
		return t, errShort
	}
	t.aes, t.clear = b[0]&flagAES != 0, b[0]&flagClear != 0
	t.own, t.other = binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])
	n := int(b[29])
	if n > maxNickName || len(b) < termsLen+n {
		return t, fmt.Errorf("nickname of %d bytes in %d: %w", n, len(b), errShort)
	}
	t.hello = router.Hello{
		Name: mesh.PeerName(b[20:26]), Run: mesh.RunID(binary.BigEndian.Uint64(b[12:])), Key: [32]byte(key),
		NickName: printable(b[termsLen : termsLen+n]), Port: binary.BigEndian.Uint16(b[26:]), Protocol: b[28],
	}
	if t.hello.Name.IsZero() {
		return t, errors.New("the zero name names nobody")
	}
	return t, nil
}
