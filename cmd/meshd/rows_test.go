package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"meshd/dns/records"
	"meshd/mesh"
	"meshd/router"
	"meshd/router/tunnel"
)

// An independent reader of signed rows, from docs/gossip.md and the drawings above the codecs: it shares no code with
// the rooms, and knows the signer's key from its seed alone.
func TestSignedRowsAsWritten(t *testing.T) {
	id, err := tunnel.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	public := ed25519.NewKeyFromSeed(id.Bytes()).Public().(ed25519.PublicKey)
	topology := router.NewTopology(router.Peer{Name: id.Name(), Run: 7, Key: id.Public, NickName: "host", Port: 6783}, id)
	delta := bytes.Join(append(
		topology.Update(func(p *router.Peer) { p.MTU = 1400 }),
		topology.SetLinks([]router.PeerLink{{To: mesh.PeerName{2}, Addr: netip.MustParseAddrPort("192.0.2.1:6783"), MTU: 1400}})...), nil)
	pages := 0
	for ; len(delta) > 0; pages++ {
		n := int(binary.BigEndian.Uint16(delta))
		head, sig, body := delta[:25], delta[25:89], delta[89:89+n]
		if mesh.PeerName(head[2:8]) != id.Name() || binary.BigEndian.Uint64(head[13:]) != 7 || int(head[8]) != pages {
			t.Errorf("header %x", head)
		}
		if head[8] == 0 && !bytes.Equal(body[:32], id.Public[:]) {
			t.Errorf("key %x", body[:32])
		}
		if !ed25519.Verify(public, append(append([]byte("meshd topology 1"), head...), body...), sig) {
			t.Errorf("page %d: the signature does not hold", head[8])
		}
		delta = delta[89+n:]
	}
	if pages != 2 {
		t.Errorf("%d pages", pages)
	}

	table, err := records.Open(records.Config{Self: id.Name(), Run: 9, Keys: rowKeys{id, topology}, Domain: "mesh.internal.", Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	table.Announce(mesh.Endpoint{Owner: "c1", MAC: mesh.MAC{2, 1}, Addrs: []netip.Prefix{netip.MustParsePrefix("10.32.0.1/12")}})
	if err := table.AddName("", "hand.mesh.internal", []netip.Addr{netip.MustParseAddr("192.0.2.1")}); err != nil {
		t.Fatal(err)
	}
	table.Settle()
	kinds := map[byte]int{}
	for _, d := range table.Drain(1199) {
		if d[0] != 2 {
			t.Fatalf("version %d", d[0])
		}
		for d = d[1:]; len(d) > 0; {
			kind := d[0]
			size, n := binary.Uvarint(d[1:])
			row := d[1+n : 1+n+int(size)]
			d = d[1+n+int(size):]
			sig, body := row[:64], row[64:]
			if kind == 3 {
				_, n := binary.Uvarint(body) // age
				body = body[n:]
				if !bytes.Contains(body, id.Public[:]) {
					t.Error("a name without its writer's key")
				}
			} else if mesh.PeerName(body[:6]) != id.Name() {
				t.Errorf("kind %d of peer %x", kind, body[:6])
			}
			if !ed25519.Verify(public, append(append([]byte("meshd names 2"), kind), body...), sig) {
				t.Errorf("kind %d: the signature does not hold", kind)
			}
			kinds[kind]++
		}
	}
	if len(kinds) != 3 {
		t.Errorf("got kinds %v", kinds)
	}
}
