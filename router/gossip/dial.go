package gossip

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"meshd/mesh"
	"meshd/router"
)

// How often dials are repeated: from dialFirst on, half as long again each time, each time varied by
// half, up to a limit that depends on what a link would be good for.
const (
	dialFirst = 2 * time.Second
	dialAlive = time.Minute // a link that lived so long starts the count anew

	capLost    = 10 * time.Second // a peer that cannot be reached at all
	capTarget  = 18 * time.Second // a target, which with the variation makes less than half a minute
	capRelayed = 4 * time.Second  // a peer reached by relay, while a direct link may well come (back)
	capHopeful = 10 * time.Minute // how long it may
	capLater   = time.Minute      // after that
	capRefused = 6 * time.Minute  // a peer that does not want us

	dialTimeout = 30 * time.Second // the tunnel reports each dial's end long before
	dialRate    = 10               // dials a second to peers that others tell of
	dialBurst   = 60
	maxKnown    = 4096 // peers whose addresses are remembered
	maxMet      = 256  // addresses handed from one run to the next
	maxAddrs    = 8    // addresses of one peer or target that are tried
)

// dialer decides whom to dial and when. It is pure: time comes as an argument, and what is to be done is
// returned.
type dialer struct {
	self      mesh.PeerName
	discovery bool
	limit     int // links; 0: any number
	port      uint16
	rng       *rand.Rand

	targets []*target
	old     []*target // addresses of an earlier run's peers, until they are met again
	addrs   map[netip.AddrPort]*attempt
	dialing map[netip.AddrPort]*attempt // those of addrs under way
	known   map[mesh.PeerName]*knownPeer
	linked  map[mesh.PeerName]netip.AddrPort
	credit  float64
	at      time.Time // of credit
	swept   time.Time
}

// retry is the timing of repeated dials.
type retry struct {
	wait time.Duration
	next time.Time
}

// target is what the operator gave, word for word.
type target struct {
	text      string
	host      string
	port      uint16
	addrs     []netip.AddrPort
	resolving bool
	err       error // of resolving
	retry     retry
}

// attempt is one address and what became of dialling it.
type attempt struct {
	peer    mesh.PeerName // who answered there last
	dialing bool
	since   time.Time
	worked  bool // there was a link by it
	refused bool
	itself  bool // it is this very peer
	err     error
}

// knownPeer is a peer that others tell of, or that we had a link with.
type knownPeer struct {
	addrs     []netip.AddrPort
	turn      int // the next address to try
	links     int // how many it has
	reachable bool
	hopeful   time.Time // a direct link looks possible until then
	retry     retry
	refused   bool
	met       bool      // there was a link
	told      time.Time // when others last told of it
}

// candidate is what the topology says of a peer that might be dialled.
type candidate struct {
	name      mesh.PeerName
	addrs     []netip.AddrPort
	reachable bool
	links     int
}

func newDialer(self mesh.PeerName, port uint16, limit int, discovery bool, rng *rand.Rand) *dialer {
	return &dialer{
		self: self, port: port, limit: limit, discovery: discovery, rng: rng, credit: dialBurst,
		addrs: map[netip.AddrPort]*attempt{}, dialing: map[netip.AddrPort]*attempt{},
		known: map[mesh.PeerName]*knownPeer{}, linked: map[mesh.PeerName]netip.AddrPort{},
	}
}

// vary is d, longer or shorter by up to a half.
func (d *dialer) vary(t time.Duration) time.Duration {
	return t/2 + time.Duration(d.rng.Int64N(int64(t)+1))
}

func (d *dialer) again(r *retry, limit time.Duration, now time.Time) {
	if r.wait == 0 {
		r.wait = dialFirst
	} else {
		r.wait = r.wait * 3 / 2
	}
	r.wait = min(r.wait, limit)
	r.next = now.Add(d.vary(r.wait))
}

// parseTarget splits "host[:port]".
func parseTarget(text string, port uint16) (host string, p uint16, err error) {
	host = text
	if _, err := netip.ParseAddr(text); err != nil {
		if h, ps, err := net.SplitHostPort(text); err == nil {
			n, err := strconv.ParseUint(ps, 10, 16)
			if err != nil || n == 0 {
				return "", 0, fmt.Errorf("peer %q: bad port %q", text, ps)
			}
			host, port = h, uint16(n)
		}
	}
	bad := host == "" || len(host) > 253
	for _, c := range []byte(host) {
		bad = bad || c <= ' ' || c == '/' || c == '[' || c == ']' || c >= 0x7f
	}
	if a, err := netip.ParseAddr(host); err == nil {
		host = a.String()
	} else {
		bad = bad || strings.Contains(host, ":")
	}
	if bad {
		return "", 0, fmt.Errorf("peer %q: not an address or a host name", text)
	}
	return host, port, nil
}

var errTooManyTargets = errors.New("more than 1,024 targets")

// connect adds targets, which are dialled at once; replace drops all others. Nothing changes on an error.
func (d *dialer) connect(texts []string, replace bool) error {
	var fresh []*target
	for _, text := range texts {
		host, port, err := parseTarget(text, d.port)
		if err != nil {
			return err
		}
		fresh = append(fresh, &target{text: text, host: host, port: port})
	}
	keep := d.targets
	if replace {
		keep = slices.DeleteFunc(slices.Clone(keep), func(t *target) bool { return !slices.Contains(texts, t.text) })
	}
	for _, f := range fresh {
		i := slices.IndexFunc(keep, func(t *target) bool { return t.text == f.text })
		if i >= 0 {
			keep[i].retry = retry{} // asked for again: try now
			for _, a := range keep[i].addrs {
				if at := d.addrs[a]; at != nil && at.itself {
					delete(d.addrs, a)
				}
			}
			continue
		}
		keep = append(keep, f)
	}
	if len(keep) > 1024 {
		return errTooManyTargets
	}
	d.targets = keep
	return nil
}

// remember has addresses dialled at which an earlier run met peers.
func (d *dialer) remember(addrs []netip.AddrPort) {
	if !d.discovery {
		return
	}
	for _, a := range addrs[:min(len(addrs), maxMet)] {
		if dialable(a) {
			d.old = append(d.old, &target{host: a.Addr().String(), port: a.Port()})
		}
	}
}

// met lists, for every peer that there was a link to, the address that it was met at last: those linked
// now first, then others of this run, then what the earlier one left.
func (d *dialer) met() (out []netip.AddrPort) {
	names := sortedNames(d.known)
	for _, now := range [2]bool{true, false} {
		for _, name := range names {
			k := d.known[name]
			if _, linked := d.linked[name]; k.met && linked == now && len(k.addrs) > 0 {
				out = append(out, k.addrs[0])
			}
		}
	}
	for _, t := range d.old {
		out = append(out, netip.AddrPortFrom(netip.MustParseAddr(t.host), t.port))
	}
	return out[:min(len(out), maxMet)]
}

// forget drops targets by the very words that they were given with.
func (d *dialer) forget(texts []string) {
	d.targets = slices.DeleteFunc(d.targets, func(t *target) bool { return slices.Contains(texts, t.text) })
}

// resolved takes the outcome of looking up a target's host.
func (d *dialer) resolved(text string, addrs []netip.Addr, err error, now time.Time) {
	i := slices.IndexFunc(d.targets, func(t *target) bool { return t.text == text })
	if i < 0 {
		return
	}
	t := d.targets[i]
	t.resolving = false
	if err == nil && len(addrs) == 0 {
		err = errors.New("no address")
	}
	t.err = err
	if err != nil {
		return // addresses of an earlier success stay good for a try
	}
	t.addrs = nil
	for _, a := range addrs[:min(len(addrs), maxAddrs)] {
		t.addrs = append(t.addrs, netip.AddrPortFrom(a.Unmap(), t.port))
	}
}

// know takes in what the topology says. now and then is often enough.
func (d *dialer) know(all []candidate, now time.Time) {
	for _, c := range all {
		if c.name == d.self {
			continue
		}
		k := d.known[c.name]
		if k == nil {
			if len(c.addrs) == 0 || !d.makeRoom(now) {
				continue
			}
			k = &knownPeer{reachable: c.reachable, hopeful: now.Add(capHopeful), retry: retry{next: d.soon(c.name, now)}}
			d.known[c.name] = k
		}
		if c.reachable != k.reachable {
			k.reachable = c.reachable
			k.hopeful = now.Add(capHopeful)
			if _, linked := d.linked[c.name]; !linked {
				k.retry = retry{next: d.soon(c.name, now)}
			}
		}
		k.links, k.told = c.links, now
		for _, a := range c.addrs {
			k.add(a)
		}
	}
}

// restarted takes note that the run which a link leads to is over, as others tell: the link is dialled anew
// before it is found dead. It returns the address, if there is one to dial.
func (d *dialer) restarted(name mesh.PeerName, now time.Time) (addr netip.AddrPort, ok bool) {
	k := d.known[name]
	if k == nil || len(k.addrs) == 0 || now.Before(k.retry.next) {
		return addr, false
	}
	d.again(&k.retry, capRelayed, now)
	return k.addrs[0], true
}

// soon is when to dial a peer of whom there is news. The other end has heard of us just as well: the
// higher name waits a while, so that they do not cross.
func (d *dialer) soon(name mesh.PeerName, now time.Time) time.Time {
	if name.Compare(d.self) < 0 {
		return now.Add(d.vary(dialFirst / 2))
	}
	return now.Add(time.Duration(d.rng.Int64N(int64(dialFirst / 10))))
}

// makeRoom reports whether another peer may be remembered. When there are too many, those go of whom
// nothing was heard for a while.
func (d *dialer) makeRoom(now time.Time) bool {
	if len(d.known) < maxKnown {
		return true
	}
	if now.Sub(d.swept) < time.Second {
		return false
	}
	d.swept = now
	for name, k := range d.known {
		if _, linked := d.linked[name]; !linked && now.Sub(k.told) > capHopeful {
			delete(d.known, name)
		}
	}
	return len(d.known) < maxKnown
}

// add remembers an address; the newest are kept, and the first place is for the one that worked.
func (k *knownPeer) add(a netip.AddrPort) {
	if !dialable(a) || slices.Contains(k.addrs, a) {
		return
	}
	if len(k.addrs) == maxAddrs {
		k.addrs = slices.Delete(k.addrs, 1, 2)
	}
	k.addrs = append(k.addrs, a)
}

// dialable excludes what leads nowhere. An IPv6 link-local address needs a zone, which does not travel.
func dialable(a netip.AddrPort) bool {
	if a.Addr().Is6() && a.Addr().IsLinkLocalUnicast() && a.Addr().Zone() == "" {
		return false
	}
	return a.IsValid() && a.Port() != 0 && !a.Addr().IsUnspecified() && !a.Addr().IsMulticast()
}

// up notes a link.
func (d *dialer) up(l router.Link, now time.Time) {
	name := l.Peer.Name
	d.linked[name] = l.Addr
	k := d.known[name]
	if k == nil {
		k = &knownPeer{}
		d.makeRoom(now)
		d.known[name] = k // there are fewer links than room, so this one is let in anyhow
	}
	k.reachable, k.refused, k.met, k.told = true, false, true, now
	addr := l.Addr
	if !l.Outbound && l.Peer.Port != 0 {
		addr = netip.AddrPortFrom(l.Addr.Addr(), l.Peer.Port)
	}
	k.addrs = slices.DeleteFunc(k.addrs, func(a netip.AddrPort) bool { return a == addr })
	if dialable(addr) {
		k.addrs = slices.Insert(k.addrs, 0, addr)
		k.addrs = k.addrs[:min(len(k.addrs), maxAddrs)]
	}
	k.turn = 0
	at := d.attempt(l.Addr)
	at.peer, at.worked, at.refused, at.itself, at.err = name, true, false, false, nil
	d.ended(l.Addr)
	// Other dials to it end as the tunnel says.
}

// down notes the end of a link that had lived for so long.
func (d *dialer) down(name mesh.PeerName, lived time.Duration, err error, now time.Time) {
	addr, ok := d.linked[name]
	if !ok {
		return
	}
	delete(d.linked, name)
	if at := d.addrs[addr]; at != nil {
		at.err = err
	}
	k := d.known[name]
	if k == nil {
		return
	}
	if lived >= dialAlive {
		k.retry.wait = 0
	}
	k.hopeful = now.Add(capHopeful)
	k.retry.next = d.soon(name, now)
	for _, t := range d.targets {
		if slices.Contains(t.addrs, addr) && lived >= dialAlive {
			t.retry = retry{next: k.retry.next}
		}
	}
}

// failed notes a dial that came to nothing. who is set as far as it became known.
func (d *dialer) failed(addr netip.AddrPort, who router.Hello, err error, now time.Time) {
	at := d.addrs[addr]
	if at == nil || !at.dialing {
		return
	}
	at.err = err
	d.ended(addr)
	if who.Name.IsZero() {
		return
	}
	at.peer = who.Name
	if _, linked := d.linked[who.Name]; linked {
		at.err = nil // a link to it by another address
		return
	}
	if k := d.known[who.Name]; k != nil {
		k.refused = true
	}
	at.refused = true
}

// itself notes that an address is our own: it is not dialled again.
func (d *dialer) itself(addr netip.AddrPort, err error) {
	at := d.attempt(addr)
	at.itself, at.err, at.peer = true, err, d.self
	d.ended(addr)
	for _, k := range d.known {
		k.addrs = slices.DeleteFunc(k.addrs, func(a netip.AddrPort) bool { return a == addr })
	}
}

// ended notes that no dial of an address is under way any more.
func (d *dialer) ended(addr netip.AddrPort) {
	if at := d.dialing[addr]; at != nil {
		at.dialing = false
		delete(d.dialing, addr)
	}
}

func (d *dialer) attempt(addr netip.AddrPort) *attempt {
	at := d.addrs[addr]
	if at == nil {
		if len(d.addrs) >= 2*maxKnown {
			for a, old := range d.addrs {
				if !old.dialing && !d.wanted(a) {
					delete(d.addrs, a)
				}
			}
		}
		at = &attempt{}
		d.addrs[addr] = at
	}
	return at
}

func (d *dialer) wanted(a netip.AddrPort) bool {
	return slices.ContainsFunc(d.targets, func(t *target) bool { return slices.Contains(t.addrs, a) })
}

// step returns the addresses to dial and the targets whose hosts to look up.
func (d *dialer) step(now time.Time) (dial []netip.AddrPort, resolve []*target) {
	d.credit = min(d.credit+dialRate*now.Sub(d.at).Seconds(), dialBurst)
	d.at = now
	for addr, at := range d.dialing {
		if now.Sub(at.since) > dialTimeout {
			at.err = errors.New("no outcome")
			d.ended(addr)
		}
	}
	start := func(addr netip.AddrPort) bool {
		at := d.attempt(addr)
		if at.dialing || at.itself {
			return false
		}
		if _, linked := d.linked[at.peer]; linked && !at.peer.IsZero() {
			return false
		}
		at.dialing, at.since = true, now
		d.dialing[addr] = at
		dial = append(dial, addr)
		return true
	}

	d.old = slices.DeleteFunc(d.old, d.established)
	for i, t := range slices.Concat(d.targets, d.old) {
		if t.resolving || now.Before(t.retry.next) || d.established(t) {
			continue
		}
		if i >= len(d.targets) {
			if d.credit < 1 || d.limit > 0 && len(d.linked) >= d.limit {
				break
			}
			d.credit--
		}
		if ip, err := netip.ParseAddr(t.host); err == nil {
			t.addrs = []netip.AddrPort{netip.AddrPortFrom(ip.Unmap(), t.port)}
		} else {
			// Looked up anew before each try; this try goes to what the last look-up found.
			t.resolving = true
			resolve = append(resolve, t)
			if t.err == nil && len(t.addrs) == 0 {
				t.retry.next = now // as soon as the answer is there
				continue
			}
		}
		limit := capTarget
		if i >= len(d.targets) && len(d.linked) > 0 {
			limit = capRefused // others tell of those that are left
		}
		for _, a := range t.addrs {
			start(a)
			if at := d.addrs[a]; at.refused || at.itself {
				limit = capRefused
			}
		}
		d.again(&t.retry, limit, now)
	}

	if !d.discovery || d.limit > 0 && len(d.linked)+len(d.dialing) >= d.limit {
		return dial, resolve
	}
	var due []mesh.PeerName
	for name, k := range d.known {
		if _, linked := d.linked[name]; linked || len(k.addrs) == 0 || now.Before(k.retry.next) {
			continue
		}
		if d.limit > 0 && k.reachable && k.links >= d.limit {
			continue
		}
		due = append(due, name)
	}
	slices.SortFunc(due, mesh.PeerName.Compare)
	d.rng.Shuffle(len(due), func(i, j int) { due[i], due[j] = due[j], due[i] })
	slices.SortStableFunc(due, func(a, b mesh.PeerName) int { return d.known[a].retry.next.Compare(d.known[b].retry.next) })
	for _, name := range due {
		if d.credit < 1 || d.limit > 0 && len(d.linked)+len(d.dialing) >= d.limit {
			break
		}
		k := d.known[name]
		for range min(2, len(k.addrs)) {
			if start(k.addrs[k.turn%len(k.addrs)]) {
				d.credit--
			}
			k.turn++
		}
		d.again(&k.retry, k.cap(now), now)
	}
	return dial, resolve
}

func (k *knownPeer) cap(now time.Time) time.Duration {
	switch {
	case k.refused:
		return capRefused
	case !k.reachable:
		return capLost
	case now.Before(k.hopeful):
		return capRelayed
	}
	return capLater
}

func (d *dialer) established(t *target) bool {
	return slices.ContainsFunc(t.addrs, func(a netip.AddrPort) bool {
		at := d.addrs[a]
		if at == nil || at.peer.IsZero() {
			return false
		}
		_, linked := d.linked[at.peer]
		return linked
	})
}

// targetTexts lists the targets as they were given.
func (d *dialer) targetTexts() []string {
	out := make([]string, len(d.targets))
	for i, t := range d.targets {
		out[i] = t.text
	}
	return out
}

// attempts lists the connections that are none (yet): the targets' and those under way.
func (d *dialer) attempts() (out []Connection) {
	listed := map[netip.AddrPort]bool{}
	add := func(addr netip.AddrPort, next time.Time, text string) {
		at := d.addrs[addr]
		if at == nil || listed[addr] {
			return
		}
		listed[addr] = true
		if _, linked := d.linked[at.peer]; linked && !at.peer.IsZero() {
			return
		}
		c := Connection{Address: addr.String(), Target: text, Outbound: true, Peer: at.peer, NextTry: next, State: StateFailed}
		switch {
		case at.dialing && at.err == nil && !at.worked:
			c.State, c.NextTry = StateConnecting, time.Time{}
		case at.dialing:
			c.State, c.NextTry = StateRetrying, time.Time{}
		case at.itself:
			c.NextTry = time.Time{}
		}
		if at.err != nil {
			c.Error = at.err.Error()
		}
		out = append(out, c)
	}
	for _, t := range d.targets {
		if t.err != nil || len(t.addrs) == 0 {
			c := Connection{Address: t.text, Target: t.text, Outbound: true, State: StateConnecting}
			if t.err != nil {
				c.State, c.Error, c.NextTry = StateFailed, t.err.Error(), t.retry.next
			}
			out = append(out, c)
		}
		for _, a := range t.addrs {
			add(a, t.retry.next, t.text)
		}
	}
	for name, k := range d.known {
		if _, linked := d.linked[name]; linked {
			continue
		}
		for _, a := range k.addrs {
			add(a, k.retry.next, "")
		}
	}
	return out
}
