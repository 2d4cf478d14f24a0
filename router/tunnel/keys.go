package tunnel

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
)

// Ages and counts of a pair of keys.
const (
	rekeyAge       = 2 * time.Minute    // the initiator makes new ones
	rekeyLate      = 20 * time.Second   // after that the responder does, if the initiator did not
	deadAge        = 3 * time.Minute    // nothing is sealed or opened any more
	rekeyCount     = 1 << 60            // datagrams
	deadCount      = ^uint64(0) - 1<<13 // no counter from here on is ever used
	switchHold     = 5 * time.Second    // see preferred
	maxKeysPerPeer = 4                  // previous, current, and two of crossing handshakes
)

var errCounter = errors.New("counter used up")

// keys are one session's worth of secrets in both directions, made by one handshake.
type keys struct {
	local, remote uint32 // receiver index here and there
	seal, open    cipher.AEAD
	sendTag       [8]byte // goes into clear datagrams
	recvTag       [8]byte
	aes           bool
	clear         bool // both ends allow frames in clear
	initiator     bool // this peer began the handshake
	psk           PSK  // with which it was made
	created       time.Time
	peer          *peer // set before the keys are published

	counter   atomic.Uint64 // next to use
	confirmed atomic.Bool   // the other end has sealed something with these keys

	mu     sync.Mutex // guards window; taken by one receiver, two only while a peer moves between sockets
	window replay
}

// newKeys makes the data keys of a finished handshake.
func newKeys(ours, theirs terms, send, recv [32]byte) *keys {
	return &keys{
		local: ours.own, remote: theirs.own, aes: ours.aes, clear: ours.clear && theirs.clear,
		seal: newAEAD(send, ours.aes), open: newAEAD(recv, ours.aes),
		sendTag: clearTag(send), recvTag: clearTag(recv),
	}
}

func newAEAD(key [32]byte, useAES bool) cipher.AEAD {
	if useAES {
		block, err := aes.NewCipher(key[:])
		if err != nil {
			panic(err) // only for a key of the wrong length
		}
		gcm, err := cipher.NewGCM(block)
		if err != nil {
			panic(err)
		}
		return gcm
	}
	aead, err := chacha20poly1305.New(key[:])
	if err != nil {
		panic(err)
	}
	return aead
}

// clearTag is what a clear datagram of that direction bears in place of a counter.
func clearTag(key [32]byte) [8]byte {
	h, err := blake2s.New256(key[:])
	if err != nil {
		panic(err)
	}
	h.Write([]byte("meshd clear tag 1"))
	return [8]byte(h.Sum(nil))
}

// reserve takes n counters and returns the first. Looking before adding keeps the counter from ever
// wrapping, however often it is asked after the end: each of the few concurrent callers can
// overshoot by one batch, and deadCount leaves room for a hundred.
func (k *keys) reserve(n int) (uint64, error) {
	if k.counter.Load() >= deadCount-uint64(n) {
		return 0, errCounter
	}
	return k.counter.Add(uint64(n)) - uint64(n), nil
}

// nonce of both ciphers: four zero bytes, then the counter, big endian.
const nonceLen = 12

func putNonce(b *[nonceLen]byte, counter uint64) {
	binary.BigEndian.PutUint64(b[4:], counter)
}

// openAt opens a data datagram in place and returns its body. nonce is scratch. newest says that
// no later counter came before.
func (k *keys) openAt(datagram []byte, nonce *[nonceLen]byte) (body []byte, newest bool, why drop) {
	counter := binary.BigEndian.Uint64(datagram[8:])
	k.mu.Lock()
	fresh := k.window.fresh(counter)
	k.mu.Unlock()
	if !fresh {
		return nil, false, dropReplay
	}
	putNonce(nonce, counter)
	body, err := k.open.Open(datagram[dataHeaderLen:dataHeaderLen], nonce[:], datagram[dataHeaderLen:], datagram[:dataHeaderLen])
	if err != nil {
		return nil, false, dropForged
	}
	k.mu.Lock()
	ok, newest := k.window.accept(counter)
	k.mu.Unlock()
	if !ok {
		return nil, false, dropReplay
	}
	return body, newest, dropNone
}

// sealAt seals b[dataHeaderLen:n] in place as datagram number counter and returns its length. b needs
// sealLen bytes of room behind n.
func (k *keys) sealAt(b []byte, n int, counter uint64, nonce *[nonceLen]byte) int {
	putDataHeader(b, typeData, k.remote, counter)
	putNonce(nonce, counter)
	out := k.seal.Seal(b[dataHeaderLen:dataHeaderLen], nonce[:], b[dataHeaderLen:n], b[:dataHeaderLen])
	return dataHeaderLen + len(out)
}

// dead reports that nothing may be sealed or opened with k any more.
func (k *keys) dead(now time.Time) bool {
	return now.Sub(k.created) >= deadAge || k.counter.Load() >= deadCount-1024
}

// due reports that k wants a successor, for which it has to be that old.
func (k *keys) due(now time.Time, old time.Duration) bool {
	age := now.Sub(k.created)
	return k.initiator && age >= old || age >= old+rekeyLate || k.counter.Load() >= rekeyCount
}

// preferred says which of two pairs to send with, the current one or a newly confirmed one. Normally the
// new one; when two handshakes crossed, both ends must settle on the same: that of the peer with the
// lower name.
func preferred(current, fresh *keys, lower bool) *keys {
	if current == nil || fresh.created.Sub(current.created) > switchHold || current.initiator == fresh.initiator {
		return fresh
	}
	if fresh.initiator == lower {
		return fresh
	}
	return current
}
