package tunnel

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hmac"
	"encoding/binary"
	"errors"
	"hash"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
)

// This file is a second implementation of docs/protocol.md, written from that page and from the Noise
// specification. It uses nothing of the package but the tunnel that it listens to.

// specNoise is the state of a Noise handshake with BLAKE2s and ChaChaPoly.
type specNoise struct {
	h, ck, k []byte
	n        uint64
}

func specHash(parts ...[]byte) []byte {
	h, _ := blake2s.New256(nil)
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

func specHKDF(ck, in []byte, n int) [][]byte {
	newHash := func() hash.Hash { h, _ := blake2s.New256(nil); return h }
	mac := func(key []byte, parts ...[]byte) []byte {
		m := hmac.New(newHash, key)
		for _, p := range parts {
			m.Write(p)
		}
		return m.Sum(nil)
	}
	temp := mac(ck, in)
	var out [][]byte
	var last []byte
	for i := range n {
		last = mac(temp, last, []byte{byte(i + 1)})
		out = append(out, last)
	}
	return out
}

func newSpecNoise() *specNoise {
	name := "Noise_XXpsk0_25519_ChaChaPoly_BLAKE2s"
	h := specHash([]byte(name)) // longer than 32 bytes, so it is hashed
	s := &specNoise{h: h, ck: h}
	s.mixHash([]byte("meshd tunnel 1"))
	return s
}

func (s *specNoise) mixHash(b []byte) { s.h = specHash(s.h, b) }

func (s *specNoise) mixKey(b []byte) {
	out := specHKDF(s.ck, b, 2)
	s.ck, s.k, s.n = out[0], out[1], 0
}

func (s *specNoise) mixPSK(psk []byte) {
	out := specHKDF(s.ck, psk, 3)
	s.ck = out[0]
	s.mixHash(out[1])
	s.k, s.n = out[2], 0
}

func (s *specNoise) nonce() []byte {
	n := make([]byte, 12)
	binary.LittleEndian.PutUint64(n[4:], s.n)
	s.n++
	return n
}

func (s *specNoise) open(b []byte) ([]byte, error) {
	a, _ := chacha20poly1305.New(s.k)
	out, err := a.Open(nil, s.nonce(), b, s.h)
	if err == nil {
		s.mixHash(b)
	}
	return out, err
}

func (s *specNoise) seal(b []byte) []byte {
	a, _ := chacha20poly1305.New(s.k)
	out := a.Seal(nil, s.nonce(), b, s.h)
	s.mixHash(out)
	return out
}

func specDH(private *ecdh.PrivateKey, public []byte) []byte {
	p, err := ecdh.X25519().NewPublicKey(public)
	if err != nil {
		panic(err)
	}
	out, err := private.ECDH(p)
	if err != nil {
		panic(err)
	}
	return out
}

func specMAC(key []byte, parts ...[]byte) []byte {
	h, _ := blake2s.New128(key)
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// specPeer is a responder as the page describes one.
type specPeer struct {
	psk         []byte
	static, eph *ecdh.PrivateKey
	s           *specNoise
	index       uint32
	other       uint32
	remoteKey   []byte
	up, down    []byte // data keys: initiator's, responder's
	aes         bool
}

func (p *specPeer) hello1(d []byte) (flags byte, err error) {
	if len(d) != 92 || d[0] != 1 || d[1] != 1 || d[2] != 0 || d[3] != 0 {
		return 0, errors.New("header")
	}
	macKey := specHash([]byte("meshd mac1 1"), p.psk)
	if !bytes.Equal(specMAC(macKey, d[:60]), d[60:76]) {
		return 0, errors.New("MAC 1")
	}
	if !bytes.Equal(d[76:], make([]byte, 16)) {
		return 0, errors.New("MAC 2 without a cookie")
	}
	p.other = binary.BigEndian.Uint32(d[4:])
	p.s = newSpecNoise()
	p.s.mixPSK(p.psk)
	p.s.mixHash(d[8:40])
	p.s.mixKey(d[8:40])
	offer, err := p.s.open(d[40:60])
	if err != nil {
		return 0, err
	}
	return offer[0], nil
}

func (p *specPeer) terms(flags byte, name []byte) []byte {
	b := []byte{flags, 0, 0, 0}
	b = binary.BigEndian.AppendUint32(b, p.index)
	b = binary.BigEndian.AppendUint32(b, p.other)
	b = append(b, 1, 2, 3, 4, 5, 6, 7, 8) // run id
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, 6783)
	return append(append(b, 1, 4), "spec"...)
}

func (p *specPeer) hello2(hello1 []byte, flags byte, name []byte) []byte {
	b := []byte{2, 1, 0, 0}
	b = binary.BigEndian.AppendUint32(b, p.index)
	b = binary.BigEndian.AppendUint32(b, p.other)
	re := hello1[8:40]
	e := p.eph.PublicKey().Bytes()
	b = append(b, e...)
	p.s.mixHash(e)
	p.s.mixKey(e)
	p.s.mixKey(specDH(p.eph, re))
	b = append(b, p.s.seal(p.static.PublicKey().Bytes())...)
	p.s.mixKey(specDH(p.static, re))
	b = append(b, p.s.seal(p.terms(flags, name))...)
	return append(b, specMAC(specHash([]byte("meshd mac1 1"), p.psk), b)...)
}

func (p *specPeer) hello3(d []byte) ([]byte, error) {
	if len(d) < 122 || d[0] != 3 || binary.BigEndian.Uint32(d[4:]) != p.other || binary.BigEndian.Uint32(d[8:]) != p.index {
		return nil, errors.New("header")
	}
	end := len(d) - 16
	if !bytes.Equal(specMAC(specHash([]byte("meshd mac1 1"), p.psk), d[:end]), d[end:]) {
		return nil, errors.New("MAC 1")
	}
	rs, err := p.s.open(d[12:60])
	if err != nil {
		return nil, err
	}
	p.remoteKey = rs
	p.s.mixKey(specDH(p.eph, rs))
	terms, err := p.s.open(d[60:end])
	if err != nil {
		return nil, err
	}
	out := specHKDF(p.s.ck, nil, 2)
	p.up, p.down = out[0], out[1]
	return terms, nil
}

func (p *specPeer) aead(key []byte) cipher.AEAD {
	if p.aes {
		block, _ := aes.NewCipher(key)
		a, _ := cipher.NewGCM(block)
		return a
	}
	a, _ := chacha20poly1305.New(key)
	return a
}

func (p *specPeer) data(d []byte) ([]byte, error) {
	if len(d) < 33 || d[0] != 0x10 || binary.BigEndian.Uint32(d[4:]) != p.index {
		return nil, errors.New("header")
	}
	nonce := append(make([]byte, 4), d[8:16]...)
	return p.aead(p.up).Open(nil, nonce, d[16:], d[:16])
}

func (p *specPeer) seal(counter uint64, body []byte) []byte {
	h := binary.BigEndian.AppendUint32([]byte{0x10, 0, 0, 0}, p.other)
	h = binary.BigEndian.AppendUint64(h, counter)
	nonce := append(make([]byte, 4), h[8:]...)
	return append(h, p.aead(p.down).Seal(nil, nonce, body, h)...)
}

// The product talks to the second implementation: handshake, probes, a message each way, frames, goodbye.
func TestIndependentImplementation(t *testing.T) {
	for _, aesToo := range []bool{true, false} {
		bubble(t, func(t *testing.T) []*node {
			n := newMemNet(1)
			password := "correct horse battery staple"
			a := startNode(t, n, 1, "10.0.0.1:6783", func(c *Config) { c.PSKs = []PSK{Stretch(password)} })
			x := n.conn("10.0.0.2:6783")
			key := func(b byte) *ecdh.PrivateKey {
				k, err := ecdh.X25519().NewPrivateKey(bytes.Repeat([]byte{b}, 32))
				if err != nil {
					t.Fatal(err)
				}
				return k
			}
			p := &specPeer{static: key(5), eph: key(6), index: 0xabcdef01}
			p.psk = argon2.IDKey([]byte(password), []byte("meshd password 1"), 3, 131072, 1, 32)
			name := specHash([]byte("meshd peer name 1"), p.static.PublicKey().Bytes())[:6]
			name[0] = name[0]&^1 | 2
			batch := []Datagrams{{Buf: make([]byte, 65535)}}
			var pending [][]byte
			next := func() []byte {
				for len(pending) == 0 {
					if _, err := x.ReadBatch(batch, true); err != nil {
						t.Fatal(err)
					}
					d := batch[0]
					size := d.Size
					if size == 0 {
						size = d.N
					}
					for b := bytes.Clone(d.Buf[:d.N]); len(b) > 0; b = b[min(size, len(b)):] {
						pending = append(pending, b[:min(size, len(b))])
					}
				}
				d := pending[0]
				pending = pending[1:]
				return d
			}
			send := func(d []byte) { x.Write(d, len(d), a.conn.addr, false) }

			a.tun.Dial(x.addr)
			hello1 := next()
			flags, err := p.hello1(hello1)
			if err != nil {
				t.Fatalf("hello1: %v", err)
			}
			p.aes = aesToo && flags&1 != 0
			choice := byte(0)
			if p.aes {
				choice = 1
			}
			send(p.hello2(hello1, choice, name))
			terms, err := p.hello3(next())
			if err != nil {
				t.Fatalf("hello3: %v", err)
			}
			want := a.tun.cfg
			if !bytes.Equal(p.remoteKey, want.Identity.Public[:]) || !bytes.Equal(terms[20:26], want.Hello.Name[:]) ||
				terms[0] != choice || binary.BigEndian.Uint64(terms[12:]) != uint64(want.Hello.Run) || string(terms[30:30+int(terms[29])]) != "hostb" {
				t.Errorf("terms: %x", terms)
			}
			counter := uint64(100)
			seal := func(body []byte) {
				send(p.seal(counter, body))
				counter++
			}
			seal([]byte{0x81, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0}) // a probe confirms the keys
			acked, messages, frames, probes := false, 0, 0, 0
			frame := frameSpec{partial: true, flags: tcpACK, payload: 3000, gso: 1000}.build()
			copy(frame[vnetLen:], name)
			seen := map[uint64]bool{}
			deadline := time.Now().Add(3 * time.Second)
			for step := 0; (messages == 0 || frames < 3) && time.Now().Before(deadline); {
				d := next()
				body, err := p.data(d)
				if err != nil {
					t.Fatalf("data: %v (%x)", err, d[:min(20, len(d))])
				}
				c := binary.BigEndian.Uint64(d[8:])
				if seen[c] {
					t.Errorf("counter %d twice", c)
				}
				seen[c] = true
				switch body[0] {
				case 0x81:
					probes++
					seal(append([]byte{0x82}, append(bytes.Clone(body[1:5]), byte(len(d)>>8), byte(len(d)))...))
				case 0x82:
					acked = binary.BigEndian.Uint32(body[1:]) == 9
				case 0x80:
					messages++
					if string(body[1:]) != "to the other" {
						t.Errorf("message %q", body[1:])
					}
				default:
					for len(body) > 0 {
						word := binary.BigEndian.Uint16(body)
						m := int(word & 0x3fff)
						if word&0x4000 == 0 || m != 14+40+1000 {
							t.Errorf("frame of %x", word)
						}
						frames++
						body = body[2+m:]
					}
				}
				if step == 0 && len(a.tun.Links()) == 1 {
					step = 1
					peer := a.tun.Links()[0].Peer.Name
					if !bytes.Equal(peer[:], name) || a.tun.Links()[0].Peer.NickName != "spec" {
						t.Errorf("peer %v", a.tun.Links()[0].Peer)
					}
					a.tun.Send(peer, []byte("to the other"))
					a.port.in <- frame
				}
			}
			if !acked || messages != 1 || frames != 3 || probes == 0 {
				t.Errorf("acked %v, %d messages, %d frames, %d probes", acked, messages, frames, probes)
			}
			seal(append([]byte{0x80}, "from the other"...))
			seal(append([]byte{0x84, 0, 1, 1, 2}, " parts"...))
			seal(append([]byte{0x84, 0, 1, 0, 2}, "\x80in"...))
			tiny := frameSpec{udp: true, payload: 10}.build()[vnetLen:]
			seal(append([]byte{0, byte(len(tiny))}, tiny...))
			wait(50 * time.Millisecond)
			if got := a.got(); len(got) != 2 || got[0] != "from the other" || got[1] != "in parts" {
				t.Errorf("messages %q", got)
			}
			if got := a.port.frames(); len(got) != 1 || !bytes.Equal(got[0][vnetLen:], tiny) {
				t.Errorf("%d frames", len(got))
			}
			seal(append([]byte{0x83, 2}, "bye"...))
			wait(50 * time.Millisecond)
			if len(a.tun.Links()) != 0 {
				t.Error("still linked")
			}
			return []*node{a}
		})
	}
}

// The cookie as the page has it.
func TestIndependentCookie(t *testing.T) {
	psk := PSK{7}
	s := newSecret(psk)
	in, err := newInitiator(testIdentity(t, 1), s, 0x01020304, offer{})
	if err != nil {
		t.Fatal(err)
	}
	var b baker
	from := origin{addr: netip.MustParseAddrPort("10.0.0.1:5")}
	now := time.Unix(1, 0)
	d := b.reply(&s, in.hello1, from, now)
	if len(d) != 64 || d[0] != 4 || d[1] != 1 || !bytes.Equal(d[4:8], []byte{1, 2, 3, 4}) {
		t.Fatalf("%x", d)
	}
	a, _ := chacha20poly1305.NewX(specHash([]byte("meshd cookie 1"), psk[:]))
	cookie, err := a.Open(nil, d[8:32], d[32:], in.hello1[60:76])
	if err != nil {
		t.Fatal(err)
	}
	again := append(bytes.Clone(in.hello1[:76]), specMAC(cookie, in.hello1[:76])...)
	if !b.proven(again, from, now.Add(119*time.Second)) || !b.proven(again, from, now.Add(200*time.Second)) {
		t.Error("cookie not accepted")
	}
	other := from
	other.addr = netip.MustParseAddrPort("10.0.0.1:6")
	if b.proven(again, other, now.Add(200*time.Second)) || b.proven(in.hello1, from, now) || b.proven(again, from, now.Add(500*time.Second)) {
		t.Error("cookie accepted for another address, not at all, or too late")
	}
	// The product's own reader agrees.
	got, ok := openCookie(&s, d, in.hello1)
	if !ok || !bytes.Equal(got[:], cookie) {
		t.Error("openCookie disagrees")
	}
}
