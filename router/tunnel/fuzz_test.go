package tunnel

import (
	"bytes"
	"errors"
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
	from := netip.MustParseAddrPort("10.0.0.2:6783")
	r, _ := testReceiver(f)
	tun := r.t
	tun.conn = nullConn{tun.conn}
	f.Fuzz(func(t *testing.T, b []byte, size int, known bool) {
		if len(b) > readBuffer {
			return
		}
		tun.setNeighbours(func(m map[netip.AddrPort]*peer) {
			if delete(m, from); known {
				m[from] = (*tun.peers.Load())[mesh.PeerName{2}]
			}
		})
		r.now = time.Now()
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
	var r *receiver
	var other *keys
	counter := uint64(0)
	f.Fuzz(func(t *testing.T, body []byte) {
		if len(body) == 0 || len(body) > maxDatagram {
			return
		}
		if r == nil || len(*r.t.indexes.Load()) != 1 { // the first time, or the session was closed
			r, other = testReceiver(t)
			r.t.conn = nullConn{r.t.conn}
		}
		b := make([]byte, dataHeaderLen+len(body)+sealLen)
		for way := range 3 {
			copy(b[dataHeaderLen:], body)
			n := other.sealAt(b, dataHeaderLen+len(body), counter, &r.nonce)
			counter++
			r.datagram(b[:n], origin{addr: netip.MustParseAddrPort("10.0.0.2:6783"), relayed: way == 2, src: mesh.PeerName{2}})
			r.join.flush()
			drain(r.t)
		}
		r.t.cfg.Ports[0].(*memPort).frames()
		r.t.cfg.Handler.(*node).got()
	})
}

// Each handshake message replaced by anything: no panic, and no session unless it is what was sent. What failed
// does not spoil what comes, so both ends are made anew only when a message was taken.
func FuzzHandshake(f *testing.F) {
	s := newSecret(pskOne)
	f.Add([]byte{typeHello1, 1}, byte(0), 3, byte(1))
	f.Add([]byte{typeHello2, 1}, byte(1), 20, byte(1))
	f.Add([]byte{typeHello3, 1}, byte(2), 60, byte(1))
	f.Add([]byte{}, byte(2), 60, byte(0))
	idA, idB := testIdentity(f, 1), testIdentity(f, 2)
	ours := func(id Identity, index uint32) terms {
		return terms{hello: router.Hello{Name: id.Name()}, own: index, aes: true}
	}
	begin := func(t testing.TB) (*initiator, *responder) {
		in, err := newInitiator(idA, s, 1, offer{aes: true})
		if err != nil {
			t.Fatal(err)
		}
		re, err := newResponder(idB, s, in.hello1, ours(idB, 2))
		if err != nil {
			t.Fatal(err)
		}
		return in, re
	}
	// One pair waits for the second message, another for the third.
	in2, re2 := begin(f)
	in3, re3 := begin(f)
	theirs3, err := in3.readHello2(re3.hello2)
	if err != nil {
		f.Fatal(err)
	}
	hello3, keys3, err := in3.writeHello3(ours(idA, 1), theirs3)
	if err != nil {
		f.Fatal(err)
	}
	again := func(err error) bool { return errors.Is(err, errHandshake) || errors.Is(err, errIndex) }
	f.Fuzz(func(t *testing.T, other []byte, which byte, at int, flip byte) {
		// The fuzzer may put its own bytes in place of a message, or flip a bit of it. MAC 1 is made right
		// then, for it guards against those who do not have the password, not against the rest.
		sent := [][]byte{in2.hello1, re2.hello2, hello3}[which%3]
		b := bytes.Clone(sent)
		if at >= 0 && at < len(b) {
			b[at] ^= flip
		} else {
			b = bytes.Clone(other)
		}
		if !checkHello(b) || b[0] != which%3+typeHello1 {
			return
		}
		end := len(b) - macLen
		if b[0] == typeHello1 {
			end -= macLen
		}
		m := mac(s.mac1[:], b[:end])
		copy(b[end:], m[:])
		same := len(b) == len(sent) && bytes.Equal(b[4:end], sent[4:end])
		var err error
		switch b[0] {
		case typeHello1:
			// Of a first message the index and the flags are anybody's who has the password.
			_, err = newResponder(idB, s, b, ours(idB, 2))
			same = len(b) == len(sent) && bytes.Equal(b[hello1HeaderLen:end], sent[hello1HeaderLen:end])
		case typeHello2:
			var theirs terms
			theirs, err = in2.readHello2(b)
			if err == nil && theirs.hello.Key != idB.Public {
				t.Error("somebody else answers")
			}
			if !again(err) {
				in2, re2 = begin(t)
			}
		case typeHello3:
			var who terms
			var k *keys
			who, k, err = re3.readHello3(b)
			if err == nil {
				if who.hello.Key != idA.Public || keys3.local != k.remote || keys3.aes != k.aes {
					t.Error("a session with somebody else, or of two minds")
				}
				d := make([]byte, 100)
				var nonce [nonceLen]byte
				n := keys3.sealAt(d, 50, 0, &nonce)
				if _, _, why := k.openAt(d[:n], &nonce); why != dropNone {
					t.Error("the keys differ")
				}
			}
			if !again(err) {
				in3, re3 = begin(t)
				if theirs3, err = in3.readHello2(re3.hello2); err == nil {
					hello3, keys3, err = in3.writeHello3(ours(idA, 1), theirs3)
				}
				if err != nil {
					t.Fatal(err)
				}
				return
			}
		}
		if err == nil && !same {
			t.Errorf("taken, though it is not what was sent: %x", b)
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
