package tunnel

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"testing"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The first vector of RFC 8032 section 7.1, whose key has sign 0, and the same key in Curve25519's form.
func TestSignatureVector(t *testing.T) {
	id, err := ParseIdentity(unhex(t, "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := id.Public[:], unhex(t, "d85e07ec22b0ad881537c2f44d662d1a143cf830c57aca4305d85c7a90f6b62e"); !bytes.Equal(got, want) {
		t.Errorf("public key %x, want %x", got, want)
	}
	if got, ok := edwards(id.Public); !ok || !bytes.Equal(got[:], unhex(t, "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")) {
		t.Errorf("edwards form %x", got)
	}
	sig := id.Sign(nil)
	if want := unhex(t, "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"); !bytes.Equal(sig[:], want) {
		t.Errorf("signature %x, want %x", sig, want)
	}
	if !id.Verify(id.Public, nil, sig) {
		t.Error("its own signature does not hold")
	}
}

// Every seed makes an identity whose two public forms say the same, half of them after a step or more.
func TestIdentityForms(t *testing.T) {
	stepped := 0
	for i := range 200 {
		seed := [32]byte{byte(i), 9}
		id, err := ParseIdentity(seed[:])
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(id.Bytes(), seed[:]) {
			stepped++
		}
		want := ed25519.NewKeyFromSeed(id.Bytes()).Public().(ed25519.PublicKey)
		if got, ok := edwards(id.Public); !ok || !bytes.Equal(got[:], want) || got[31]&0x80 != 0 {
			t.Fatalf("seed %d: %x, want %x", i, got, want)
		}
		msg := []byte{byte(i)}
		sig := id.Sign(msg)
		if !id.Verify(id.Public, msg, sig) {
			t.Fatalf("seed %d: its own signature does not hold", i)
		}
		for bit := range 512 {
			bad := sig
			if bad[bit/8] ^= 1 << (bit % 8); bit%37 == 0 && id.Verify(id.Public, msg, bad) {
				t.Fatalf("seed %d: bit %d of the signature does not matter", i, bit)
			}
		}
	}
	if stepped < 60 || stepped > 140 {
		t.Errorf("%d of 200 seeds were stepped", stepped)
	}
	// Keys that are none, or of small order: no panic, and nothing holds.
	id, _ := NewIdentity()
	for _, key := range [][32]byte{{}, {1}, [32]byte(bytes.Repeat([]byte{0xff}, 32)), [32]byte(append([]byte{0xec}, append(bytes.Repeat([]byte{0xff}, 30), 0x7f)...))} {
		if id.Verify(key, []byte("x"), id.Sign([]byte("x"))) {
			t.Errorf("key %x verifies what it has not signed", key)
		}
	}
}

func BenchmarkSign(b *testing.B) {
	id, _ := NewIdentity()
	msg := make([]byte, 150)
	b.ReportAllocs()
	for b.Loop() {
		id.Sign(msg)
	}
}

func BenchmarkVerify(b *testing.B) {
	id, _ := NewIdentity()
	msg := make([]byte, 150)
	sig := id.Sign(msg)
	b.ReportAllocs()
	for b.Loop() {
		if !id.Verify(id.Public, msg, sig) {
			b.Fatal("does not hold")
		}
	}
}
