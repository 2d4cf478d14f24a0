package tunnel

import (
	"bytes"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// Whatever one read delivers, nothing of it gets through to a handler, a port or the tables.
func FuzzDatagram(f *testing.F) {
	good := make([]byte, 200)
	putDataHeader(good, typeData, 11, 5)
	f.Add(good[:60], 0, false)
	putDataHeader(good, typeClear, 11, 5)
	f.Add(good[:60], 30, true)
	putRelayHeader(good, 3, mesh.PeerName{2}, mesh.PeerName{3})
	f.Add(good[:100], 50, true)
	f.Add(newFlood(f, pskOne).next(), 0, false)
	f.Fuzz(func(t *testing.T, b []byte, size int, known bool) {
		if len(b) > readBuffer {
			return
		}
		r, _ := testReceiver(t)
		tun := r.t
		from := netip.MustParseAddrPort("10.0.0.2:6783")
		if known {
			tun.setNeighbours(func(m map[netip.AddrPort]*peer) { m[from] = (*tun.peers.Load())[mesh.PeerName{2}] })
		}
		r.datagrams(&Datagrams{Buf: b, N: len(b), Size: size, Addr: from})
		r.join.flush()
		drain(tun)
		if n := len(tun.cfg.Ports[0].(*memPort).frames()); n != 0 {
			t.Errorf("%d frames delivered", n)
		}
		if len(*tun.peers.Load()) != 1 || len(*tun.indexes.Load()) != 1 {
			t.Error("tables changed")
		}
	})
}

// drain lets controlLoop's part deal with what the receiver has queued.
func drain(tun *Tunnel) {
	now := time.Now()
	for {
		select {
		case ev := <-tun.events:
			tun.handle(ev, now)
		case ev := <-tun.hellos:
			tun.handle(ev, now)
		default:
			tun.tick(now)
			return
		}
	}
}

// What a peer with the right keys seals may be anything: it never panics.
func FuzzBody(f *testing.F) {
	f.Add(appendProbe(nil, probe{1, 2, 3}, 50))
	f.Add(appendAck(nil, ack{1, 2}))
	f.Add(appendClose(nil, closeSession, "bye"))
	f.Add(appendPart(nil, part{1, 0, 2, []byte("x")}))
	f.Add([]byte{kindMessage, 1, 2})
	frame := frameSpec{partial: true, flags: tcpACK, payload: 20}.build()[vnetLen:]
	f.Add(append([]byte{framePartial >> 8, byte(len(frame))}, frame...))
	f.Fuzz(func(t *testing.T, body []byte) {
		if len(body) == 0 || len(body) > maxDatagram {
			return
		}
		r, other := testReceiver(t)
		b := make([]byte, dataHeaderLen+len(body)+sealLen)
		for counter := range uint64(3) {
			copy(b[dataHeaderLen:], body)
			n := other.sealAt(b, dataHeaderLen+len(body), counter, &r.nonce)
			r.datagram(b[:n], origin{addr: netip.MustParseAddrPort("10.0.0.2:6783"), relayed: counter == 2, src: mesh.PeerName{2}})
			r.join.flush()
			drain(r.t)
		}
	})
}

// Each handshake message replaced by anything: no panic, and no session unless it is what was sent.
func FuzzHandshake(f *testing.F) {
	s := newSecret(pskOne)
	f.Add([]byte{typeHello1, 1}, byte(0), 3, byte(1))
	f.Add([]byte{typeHello2, 1}, byte(1), 20, byte(1))
	f.Add([]byte{typeHello3, 1}, byte(2), 60, byte(1))
	f.Fuzz(func(t *testing.T, other []byte, which byte, at int, flip byte) {
		// The fuzzer may put its own bytes in place of a message, or flip a bit of it. MAC 1 is made right
		// then, for it guards against those who do not have the password, not against the rest.
		change := func(n byte, b []byte) []byte {
			if which%3 != n {
				return b
			}
			if at >= 0 && at < len(b) {
				b = bytes.Clone(b)
				b[at] ^= flip
			} else {
				b = bytes.Clone(other)
			}
			if !checkHello(b) {
				return nil
			}
			end := len(b) - macLen
			if b[0] == typeHello1 {
				end -= macLen
			}
			m := mac(s.mac1[:], b[:end])
			copy(b[end:], m[:])
			return b
		}
		idA, idB := testIdentity(t, 1), testIdentity(t, 2)
		in, err := newInitiator(idA, s, 1, offer{aes: true})
		if err != nil {
			t.Fatal(err)
		}
		m1 := change(0, in.hello1)
		if m1 == nil || m1[0] != typeHello1 {
			return
		}
		re, err := newResponder(idB, s, m1, terms{hello: router.Hello{Name: idB.Name()}, own: 2, aes: true})
		if err != nil {
			return
		}
		m2 := change(1, re.hello2)
		if m2 == nil || m2[0] != typeHello2 {
			return
		}
		theirs, err := in.readHello2(m2)
		if err != nil {
			return
		}
		m3, ka, err := in.writeHello3(terms{hello: router.Hello{Name: idA.Name()}}, theirs)
		if err != nil {
			t.Fatal(err)
		}
		if m3 = change(2, m3); m3 == nil || m3[0] != typeHello3 {
			return
		}
		who, kb, err := re.readHello3(m3)
		if err != nil {
			return
		}
		if who.hello.Key != idA.Public || theirs.hello.Key != idB.Public || ka.local != kb.remote || ka.aes != kb.aes {
			t.Error("a session with somebody else, or of two minds")
		}
		b := make([]byte, 100)
		var nonce [nonceLen]byte
		n := ka.sealAt(b, 50, 0, &nonce)
		if _, _, why := kb.openAt(b[:n], &nonce); why != dropNone {
			t.Error("the keys differ")
		}
	})
}

func FuzzCookie(f *testing.F) {
	s := newSecret(pskOne)
	in, err := newInitiator(testIdentity(f, 1), s, 1, offer{})
	if err != nil {
		f.Fatal(err)
	}
	var b baker
	good := b.reply(&s, in.hello1, origin{addr: netip.MustParseAddrPort("10.0.0.1:1")}, time.Unix(1, 0))
	f.Add(good)
	f.Add(good[:20])
	f.Fuzz(func(t *testing.T, d []byte) {
		if _, ok := openCookie(&s, d, in.hello1); ok && !bytes.Equal(d[cookieHeaderLen:cookieLen], good[cookieHeaderLen:]) {
			t.Error("a forged cookie is taken")
		}
	})
}

// What parses is written and read again as the same.
func FuzzTerms(f *testing.F) {
	f.Add(appendTerms(nil, terms{hello: router.Hello{Name: mesh.PeerName{1}, NickName: "host", Port: 6783, Run: 5}, own: 1, other: 2, aes: true, clear: true}))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := parseTerms(b, make([]byte, 32))
		if err != nil {
			return
		}
		if len(v.hello.NickName) > maxNickName { // a byte that was no UTF-8 became a longer mark
			return
		}
		w, err := parseTerms(appendTerms(nil, v), make([]byte, 32))
		if err != nil || !reflect.DeepEqual(v, w) {
			t.Errorf("got %+v, %v, want %+v", w, err, v)
		}
	})
}

func TestStretchCost(t *testing.T) {
	start := time.Now()
	a := Stretch("password")
	if took := time.Since(start); took < 90*time.Millisecond {
		t.Errorf("one guess costs only %v", took)
	}
	if a != Stretch("password") || a == Stretch("passwore") || a.IsZero() || !Stretch("").IsZero() {
		t.Error("not a function of the password")
	}
}

func TestIdentity(t *testing.T) {
	id, err := NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParseIdentity(id.Bytes())
	if err != nil || again != id || again.Name() != id.Name() || id.Name()[0]&3 != 2 {
		t.Errorf("%v %v %v", id, again, err)
	}
	if _, err := ParseIdentity([]byte("short")); err == nil {
		t.Error("a short key is taken")
	}
	for _, s := range []string{id.String(), id.GoString(), PSK{0xab}.String(), PSK{0xab}.GoString()} {
		if bytes.Contains([]byte(s), []byte("ab")) && s[0] == '(' {
			t.Errorf("a secret in %q", s)
		}
	}
}
