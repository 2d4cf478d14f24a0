package tunnel

import (
	"bytes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// captured seals n numbered messages as one session would.
func captured(k *keys, n int) [][]byte {
	out := make([][]byte, n)
	var nonce [nonceLen]byte
	for i := range out {
		b := make([]byte, 64)
		b[dataHeaderLen] = kindMessage
		size := dataHeaderLen + 1 + copy(b[dataHeaderLen+1:], fmt.Sprintf("%08d", i))
		out[i] = b[:k.sealAt(b, size, uint64(i), &nonce)]
	}
	return out
}

// A captured session, reordered by up to 4,096 and without loss, arrives whole (C2). Then it is replayed a million
// times, in the window and behind it, after new keys, after the old ones are gone, and after a restart: nothing
// is delivered (C1).
func TestReplayMillion(t *testing.T) {
	r, other := testReceiver(t)
	tun, nd := r.t, r.t.cfg.Handler.(*node)
	from := origin{addr: netip.MustParseAddrPort("10.0.0.2:6783")}
	const n, width, seed = 40_960, 4096, 11
	all := captured(other, n)
	rng := rand.New(rand.NewPCG(seed, 0))
	order := make([][]byte, n)
	copy(order, all)
	for at := 0; at < n; at += width {
		part := order[at:min(n, at+width)]
		rng.Shuffle(len(part), func(i, j int) { part[i], part[j] = part[j], part[i] })
	}
	scratch := make([]byte, 64)
	feed := func(d []byte) { r.datagram(scratch[:copy(scratch, d)], from) }
	for _, d := range order {
		feed(d)
	}
	seen := map[string]bool{}
	for _, m := range nd.got() {
		seen[m] = true
	}
	if len(seen) != n || len(tun.Drops()) != 0 {
		t.Fatalf("seed %d: %d of %d messages arrived; drops %v", seed, len(seen), n, tun.Drops())
	}

	replayed := 0
	replay := func(when string, count int) {
		before := tun.Drops()
		for range count {
			d := all[rng.IntN(n)]
			if rng.IntN(2) == 0 {
				d = all[n-1-rng.IntN(replayWindow)]
			}
			feed(d)
		}
		replayed += count
		if got := nd.got(); len(got) != 0 {
			t.Errorf("%s: %d of %d replayed datagrams delivered", when, len(got), count)
		}
		dropped := uint64(0)
		for why, c := range tun.Drops() {
			dropped += c - before[why]
		}
		if dropped != uint64(count) {
			t.Errorf("%s: %d of %d are counted as dropped", when, dropped, count)
		}
		drain(tun)
	}
	replay("at once", 400_000)
	p, old := (*tun.peers.Load())[mesh.PeerName{2}], (*tun.indexes.Load())[11]
	fresh := func(own uint32, key byte) {
		k := newKeys(terms{own: own, other: 22, aes: true}, terms{own: 22, other: own, aes: true}, [32]byte{key}, [32]byte{key + 1})
		tun.addKeys(p, k, time.Now())
		k.confirmed.Store(true)
		p.send.Store(k)
	}
	fresh(33, 5)
	replay("after new keys", 200_000)
	tun.dropKeys(p, old)
	replay("after the old keys are gone", 200_000)

	r, _ = testReceiver(t)
	tun, nd = r.t, r.t.cfg.Handler.(*node)
	p = (*tun.peers.Load())[mesh.PeerName{2}]
	tun.dropKeys(p, (*tun.indexes.Load())[11])
	replay("after a restart", 100_000)
	fresh(11, 7) // by chance the same index
	replay("after a restart, with the index given anew", 100_000)
	t.Logf("%d replayed, 0 delivered", replayed)
}

// Forged datagrams are neither delivered nor kept: memory stays as it is (C3).
func TestForgedKeepNothing(t *testing.T) {
	r, other := testReceiver(t)
	nd := r.t.cfg.Handler.(*node)
	count := 300_000
	if os.Getenv("MESHD_LONG") != "" {
		count = 10_000_000
	}
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	good := captured(other, 1)[0]
	rng := rand.New(rand.NewPCG(12, 0))
	d := make([]byte, 1400)
	noise := func() []byte {
		for i := 0; i < len(d); i += 8 {
			binary.LittleEndian.PutUint64(d[i:], rng.Uint64())
		}
		return d[:1+rng.IntN(len(d))]
	}
	badTag := func() []byte {
		n := copy(d, good)
		binary.BigEndian.PutUint64(d[8:], rng.Uint64())
		d[n-1-rng.IntN(sealLen)] ^= byte(1 + rng.IntN(255))
		return d[:n]
	}
	before := heap()
	for kind, make := range map[string]func() []byte{"random": noise, "bad tag": badTag} {
		for i := range count {
			from := origin{addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{byte(i), byte(i >> 8), byte(i >> 16), 9}), 6783)}
			r.datagram(make(), from)
			if i%1000 == 0 {
				drain(r.t)
			}
		}
		if len(nd.got()) != 0 || len(r.t.cfg.Ports[0].(*memPort).frames()) != 0 {
			t.Errorf("%s: something was delivered", kind)
		}
	}
	if len(*r.t.peers.Load()) != 1 || len(*r.t.indexes.Load()) != 1 || len(r.t.control.half) != 0 {
		t.Error("the tables changed")
	}
	after := heap()
	t.Logf("%d forged of each kind; heap before %d, after %d", count, before, after)
	if after > before+1<<19 {
		t.Errorf("the heap grew by %d bytes", after-before)
	}
}

// recorder is an AEAD that remembers every nonce it has sealed with.
type recorder struct {
	cipher.AEAD
	t *testing.T

	mu   sync.Mutex // guards used
	used map[[nonceLen]byte]bool
}

func (r *recorder) Seal(dst, nonce, plain, data []byte) []byte {
	n := [nonceLen]byte(nonce)
	r.mu.Lock()
	if r.used[n] {
		r.t.Errorf("nonce %x used twice", n)
	}
	if binary.BigEndian.Uint64(n[4:]) >= deadCount {
		r.t.Errorf("nonce %x is beyond the limit", n)
	}
	r.used[n] = true
	r.mu.Unlock()
	return r.AEAD.Seal(dst, nonce, plain, data)
}

// Queues that seal at once, up to the limits of the counter: no nonce twice, and none beyond (C5).
func TestNoNonceTwice(t *testing.T) {
	for _, start := range []uint64{1<<32 - 10, rekeyCount - 10, deadCount - 5000, ^uint64(0) - 1<<13 - 10} {
		k := newKeys(terms{own: 1, other: 2, aes: true}, terms{own: 2, other: 1, aes: true}, [32]byte{1}, [32]byte{2})
		rec := &recorder{AEAD: k.seal, t: t, used: map[[nonceLen]byte]bool{}}
		k.seal = rec
		k.counter.Store(start)
		var queues sync.WaitGroup
		for q := range 4 {
			queues.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(q), start))
				b := make([]byte, 64)
				var nonce [nonceLen]byte
				for range 2000 {
					n := 1 + rng.IntN(64)
					first, err := k.reserve(n)
					if err != nil {
						continue
					}
					for i := range n {
						k.sealAt(b, dataHeaderLen+8, first+uint64(i), &nonce)
					}
				}
			})
		}
		queues.Wait()
		if start >= rekeyCount-10 && !k.due(k.created, rekeyAge) {
			t.Errorf("start %d: no new keys are wanted after %d datagrams", start, len(rec.used))
		}
		if start > deadCount-8000 && !k.dead(k.created) {
			t.Errorf("start %d: still alive after %d datagrams", start, len(rec.used))
		}
	}
}

// The time of day means nothing: peers whose clocks say 1970, 2038 and after shake hands, also with cookies (C7).
func TestAnyClock(t *testing.T) {
	s := newSecret(pskOne)
	for _, year := range []int{1970, 2000, 2038, 2106, 2500} {
		now := time.Date(year, 1, 19, 3, 14, 7, 0, time.UTC)
		in, err := newInitiator(testIdentity(t, 1), s, 1, offer{})
		if err != nil {
			t.Fatal(err)
		}
		from := origin{addr: netip.MustParseAddrPort("10.0.0.1:6783")}
		var g guard
		ok, cookie := g.admit(&s, in.hello1, from, now)
		for range 2 * busyRate {
			ok, cookie = g.admit(&s, in.hello1, from, now)
		}
		if ok || cookie == nil {
			t.Fatalf("%d: under load without a cookie: %v", year, ok)
		}
		value, taken := openCookie(&s, cookie, in.hello1)
		end := len(in.hello1) - macLen
		m := mac(value[:], in.hello1[:end])
		copy(in.hello1[end:], m[:])
		if ok, _ := g.admit(&s, in.hello1, from, now.Add(time.Second)); !ok || !taken {
			t.Errorf("%d: with its cookie it is turned away", year)
		}
		// The other end's clock was set back meanwhile, by an hour and to 1970.
		for _, then := range []time.Time{now.Add(-time.Hour), time.Unix(0, 0)} {
			if ok, again := g.admit(&s, in.hello1, from, then); !ok && again == nil {
				t.Errorf("%d: at %v it is met with silence", year, then)
			}
		}
	}
}

// 10,000 attempts with a wrong password from four addresses: no answer, no state, few lines in the log (M1). With
// the right one a source is served ten times a second once there are many.
func TestWrongPassword(t *testing.T) {
	r, _ := testReceiver(t)
	f := newFlood(t, pskTwo)
	addrs := [4]netip.AddrPort{}
	for i := range addrs {
		addrs[i] = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 9, byte(i)}), 6783)
	}
	for i := range 10_000 {
		r.now = r.now.Add(100 * time.Microsecond)
		r.datagram(f.next(), origin{addr: addrs[i%4]})
	}
	if n := r.t.Drops()["mac"]; n != 10_000 || len(r.t.hellos) != 0 || len(r.t.events) != 0 {
		t.Errorf("%d turned away, %d handshakes and %d events waiting", n, len(r.t.hellos), len(r.t.events))
	}
	const seconds = 20
	for addr, n := range serve(newFlood(t, pskOne), seconds*500, 2*time.Millisecond, r.now, addrs[:]) {
		if n > seconds*sourceRate+sourceBurst+busyRate {
			t.Errorf("%v was served %d times in %d s", addr, n, seconds)
		}
	}
}

// serve has hellos from addresses in turn come to a guard, pause apart, each again with the cookie that it is handed,
// and returns how many of each were let through.
func serve(f *flood, hellos int, pause time.Duration, now time.Time, addrs []netip.AddrPort) map[netip.AddrPort]int {
	served := map[netip.AddrPort]int{}
	var g guard
	for i := range hellos {
		from := origin{addr: addrs[i%len(addrs)]}
		hello := f.next()
		ok, cookie := g.admit(&f.s, hello, from, now)
		if cookie != nil {
			value, _ := openCookie(&f.s, cookie, hello)
			end := len(hello) - macLen
			m := mac(value[:], hello[:end])
			copy(hello[end:], m[:])
			ok, _ = g.admit(&f.s, hello, from, now)
		}
		if ok {
			served[from.addr]++
		}
		now = now.Add(pause)
	}
	return served
}

// A hundred hosts behind one NAT join at once: they do not wait for each other. Nor can one address, with as many
// ports as it likes, have more than a part of what is served.
func TestManyBehindOneAddress(t *testing.T) {
	behind := func(n int) (out []netip.AddrPort) {
		for port := range n {
			out = append(out, netip.AddrPortFrom(netip.MustParseAddr("203.0.113.7"), uint16(20_000+port)))
		}
		return out
	}
	f := newFlood(t, pskOne)
	if got := len(serve(f, 140, time.Millisecond, time.Unix(100, 0), behind(140))); got < 140 {
		t.Errorf("of 140 hosts %d are served at once", got)
	}
	all := 0
	for _, n := range serve(f, 10_000, time.Millisecond, time.Unix(100, 0), behind(10_000)) {
		all += n
	}
	if all > 11*netRate+busyRate {
		t.Errorf("10,000 hellos of one address in 10 s: %d are served", all)
	}
}

// What authenticates is compared in constant time (C10): nothing compares byte slices otherwise, but tests and the
// joiner, which looks at headers of frames that are open already.
func TestConstantTime(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	set := token.NewFileSet()
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") || name == "join.go" {
			continue
		}
		f, err := parser.ParseFile(set, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			s, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if x, ok := s.X.(*ast.Ident); ok && x.Name == "bytes" && (s.Sel.Name == "Equal" || s.Sel.Name == "Compare") {
				t.Errorf("%v: bytes.%s takes a time that depends on the bytes", set.Position(n.Pos()), s.Sel.Name)
			}
			return true
		})
	}
}

// Whatever comes by TCP, before and after the handshake: no panic, and nothing is taken for a peer's.
func FuzzStream(f *testing.F) {
	f.Add([]byte{0, 3, 1, 2, 3}, false)
	f.Add([]byte{0xff, 0xff, 1}, true)
	f.Add(append([]byte{0, 60}, make([]byte, 60)...), false)
	n := newMemNet(1)
	nd := &node{routes: &fixedRoutes{}}
	tun, err := New(Config{Identity: testIdentity(f, 1), Conn: n.conn("10.0.0.1:1"), Router: nd.routes, Handler: nd, PSKs: []PSK{pskOne}})
	if err != nil {
		f.Fatal(err)
	}
	hs1, _ := newNoise(testIdentity(f, 1), PSK{}, true)
	hs2, _ := newNoise(testIdentity(f, 2), PSK{}, false)
	m, _, _, _ := hs1.WriteMessage(nil, nil)
	_, _, _, _ = hs2.ReadMessage(nil, m)
	m, _, _, _ = hs2.WriteMessage(nil, nil)
	_, _, _, _ = hs1.ReadMessage(nil, m)
	_, up, _, err := hs1.WriteMessage(nil, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, in []byte, opened bool) {
		c := &replayedConn{Reader: bytes.NewReader(in)}
		if opened {
			s := &stream{Conn: c, open: up}
			if got, err := s.Read(make([]byte, 100)); err == nil && got > 0 {
				t.Errorf("read %d bytes that nobody sealed", got)
			}
			return
		}
		if _, err := tun.acceptStream(t.Context(), c); err == nil {
			t.Error("a stranger has a stream")
		}
		c = &replayedConn{Reader: bytes.NewReader(in)}
		p := &peer{name: mesh.PeerName{2}}
		p.info.Store(&peerInfo{hello: router.Hello{Name: p.name}})
		if _, err := tun.openStream(c, p); err == nil {
			t.Error("a stranger is taken for the peer")
		}
	})
}

// replayedConn says what it is told to, and hears nothing.
type replayedConn struct {
	net.Conn
	*bytes.Reader
}

func (c *replayedConn) Read(b []byte) (int, error)      { return c.Reader.Read(b) }
func (c *replayedConn) Write(b []byte) (int, error)     { return len(b), nil }
func (c *replayedConn) Close() error                    { return nil }
func (c *replayedConn) SetDeadline(time.Time) error     { return nil }
func (c *replayedConn) SetReadDeadline(time.Time) error { return nil }

// R4: a hundred members send a hundred thousand parts of frames that never become whole, of any size. What is held of them
// all together stays far below 4 MB, and a frame in parts still gets through from each.
func TestUnfinishedParts(t *testing.T) {
	r, _ := testReceiver(t)
	port := r.t.cfg.Ports[0].(*memPort)
	const peers, parts = 100, 100_000
	var sessions []*keys
	for i := range uint32(peers) {
		ours, theirs := terms{own: 100 + i, other: 900 + i, aes: true}, terms{own: 900 + i, other: 100 + i, aes: true}
		p := &peer{name: mesh.PeerName{3, byte(i)}}
		p.info.Store(&peerInfo{hello: router.Hello{Name: p.name}})
		r.t.setPeers(func(m map[mesh.PeerName]*peer) { m[p.name] = p })
		k := newKeys(ours, theirs, [32]byte{1, byte(i)}, [32]byte{2, byte(i)})
		r.t.addKeys(p, k, time.Now())
		k.confirmed.Store(true)
		sessions = append(sessions, newKeys(theirs, ours, [32]byte{2, byte(i)}, [32]byte{1, byte(i)}))
	}
	var nonce [nonceLen]byte
	counters := make([]uint64, peers)
	d := make([]byte, 1<<16)
	send := func(i int, p part) {
		n := dataHeaderLen + len(appendPart(d[dataHeaderLen:dataHeaderLen], p))
		r.datagram(d[:sessions[i].sealAt(d, n, counters[i], &nonce)], origin{addr: netip.MustParseAddrPort("10.0.0.9:6783")})
		counters[i]++
	}
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	rng := rand.New(rand.NewPCG(4, 0))
	piece := make([]byte, 60_000)
	before, most := heap(), uint64(0)
	for i := range parts {
		size := 1 + rng.IntN(600)
		if i%3 == 0 {
			size = 1 + rng.IntN(len(piece))
		}
		send(i%peers, part{id: uint16(rng.IntN(1 << 16)), index: byte(rng.IntN(2)), count: maxParts, piece: piece[:size]})
		if i%(parts/10) == parts/10-1 {
			most = max(most, heap())
		}
		if i%1000 == 0 {
			drain(r.t)
		}
	}
	t.Logf("%d parts of %d members hold %d kB", parts, peers, (int64(most)-int64(before))/1000)
	if most > before+1<<20 {
		t.Errorf("%d bytes are held, limit 1 MB", most-before)
	}
	if got := port.frames(); len(got) != 0 {
		t.Fatalf("%d frames were delivered", len(got))
	}
	frame := make([]byte, 1000)
	copy(frame, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5})
	body := append(binary.BigEndian.AppendUint16(nil, uint16(len(frame))), frame...)
	for i := range peers {
		send(i, part{id: 7, index: 1, count: 2, piece: body[600:]})
		send(i, part{id: 7, index: 0, count: 2, piece: body[:600]})
	}
	if got := port.frames(); len(got) != peers {
		t.Errorf("%d of %d whole frames were delivered; drops %v", len(got), peers, r.t.Drops())
	}
}
