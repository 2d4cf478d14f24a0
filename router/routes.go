package router

import (
	"cmp"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"meshd/mesh"
)

// A link weighs its round trip plus hopPenalty: a relay costs a third host's bandwidth and round trips
// are measured on busy hosts, so it must save that much. dampPenalty makes a link that flaps the last
// choice, for everybody.
const (
	hopPenalty  = 50 * time.Millisecond
	dampPenalty = 10 * time.Second
)

// Route is how one peer is reached from here.
type Route struct {
	Dst, Via mesh.PeerName // Via == Dst: by a link of our own
	Hops     int           // links on the way
	RTT      time.Duration // sum of theirs
	Why      string        // why not directly; empty if directly
}

// Routes is an immutable snapshot of all routes from one peer.
//
// Every peer computes shortest paths over the same table with weights that both ends of a link agree on
// (the smaller of their round trips, for load only makes them longer) and that are positive. The rest of a shortest path is one itself and
// does not pass through where it started, so it uses only links that everybody counts: the next peer is
// strictly nearer to the destination in its own reckoning, and no datagram goes round in circles. All
// damping is therefore in what is published about a link and none in the choice between routes.
type Routes struct {
	self  mesh.PeerName
	order []mesh.PeerName // of all that can be reached
	to    map[mesh.PeerName]Route
}

// NextHop returns the peer to hand a datagram for dst to. It is safe on a nil Routes.
func (r *Routes) NextHop(dst mesh.PeerName) (via mesh.PeerName, ok bool) {
	if r == nil {
		return mesh.PeerName{}, false
	}
	route, ok := r.to[dst]
	return route.Via, ok
}

// Way is NextHop with the number of links on the way.
func (r *Routes) Way(dst mesh.PeerName) (via mesh.PeerName, links int, ok bool) {
	if r == nil {
		return mesh.PeerName{}, 0, false
	}
	route, ok := r.to[dst]
	return route.Via, route.Hops, ok
}

// Onward says what becomes of a datagram that a relay with a way of so many links takes on, when its header
// allows left more: the number for the next header, or ok false if it has to be dropped.
//
// Who sends a datagram allows the links of its own way and one more, and every relay no more than that by its
// own reckoning. A datagram that comes by the same relay again, two or more links later, has too few left for
// the way that this relay counts: while views differ it takes one link more than its sender thought, or it
// is dropped, and never goes round.
func Onward(left, links int) (next int, ok bool) {
	if left <= 0 || links > left {
		return 0, false
	}
	return min(left-1, links), true
}

// Route returns the way to dst.
func (r *Routes) Route(dst mesh.PeerName) (Route, bool) {
	if r == nil {
		return Route{}, false
	}
	route, ok := r.to[dst]
	return route, ok
}

// All returns every route, by destination.
func (r *Routes) All() []Route {
	if r == nil {
		return nil
	}
	out := make([]Route, len(r.order))
	for i, dst := range r.order {
		out[i] = r.to[dst]
	}
	return out
}

// Reachable returns all peers that can be reached, by name. Nobody may change it.
func (r *Routes) Reachable() []mesh.PeerName {
	if r == nil {
		return nil
	}
	return r.order
}

// LiveRoutes holds the routes of the moment. The zero value knows none.
type LiveRoutes struct{ p atomic.Pointer[Routes] }

// NextHop returns the peer to hand a datagram for dst to; it takes no lock and allocates nothing.
func (l *LiveRoutes) NextHop(dst mesh.PeerName) (via mesh.PeerName, ok bool) {
	return l.p.Load().NextHop(dst)
}

// Way is NextHop with the number of links on the way.
func (l *LiveRoutes) Way(dst mesh.PeerName) (via mesh.PeerName, links int, ok bool) {
	return l.p.Load().Way(dst)
}

// Load returns the snapshot of the moment, which may be nil.
func (l *LiveRoutes) Load() *Routes { return l.p.Load() }

// Store swaps the snapshot.
func (l *LiveRoutes) Store(r *Routes) { l.p.Store(r) }

// edge is a link in the graph, seen from one end.
type edge struct {
	to     int
	rtt    time.Duration
	damped bool
	lone   bool // the far end does not report it
}

func (e edge) weight() time.Duration {
	if e.damped {
		return e.rtt + hopPenalty + dampPenalty
	}
	return e.rtt + hopPenalty
}

// graph is the topology with peers numbered by name.
type graph struct {
	self  int
	names []mesh.PeerName
	edges [][]edge // as both ends agree on them; of each peer, by number
}

// graph copies what the search needs, so that it runs without the lock.
func (t *Topology) graph() *graph {
	t.mu.Lock()
	type node struct {
		name  mesh.PeerName
		pages []*record
	}
	nodes, count := make([]node, 0, len(t.peers)), 0
	var pages []*record
	for name, e := range t.peers {
		if e.base == nil {
			continue
		}
		first := len(pages)
		for _, p := range e.pages {
			if p.epoch == e.base.epoch {
				pages = append(pages, p)
				count += len(p.body) / (1 + linkBody4)
			}
		}
		nodes = append(nodes, node{name, pages[first:len(pages):len(pages)]})
	}
	for _, page := range t.links {
		for _, l := range page { // a neighbour is reached before we have heard what it says of itself
			if e := t.peers[l.To]; e == nil || e.base == nil {
				nodes = append(nodes, node{name: l.To})
			}
		}
	}
	t.mu.Unlock()

	slices.SortFunc(nodes, func(a, b node) int { return a.name.Compare(b.name) })
	g := &graph{names: make([]mesh.PeerName, len(nodes)), edges: make([][]edge, len(nodes))}
	index := make(map[mesh.PeerName]int, len(nodes))
	for i, n := range nodes {
		g.names[i] = n.name
		index[n.name] = i
	}
	g.self = index[t.self]
	edges := make([]edge, 0, count)
	for i, n := range nodes {
		first := len(edges)
		for _, page := range n.pages {
			for l, rest := cutLink(page.body); l != nil; l, rest = cutLink(rest) {
				if to, ok := index[l.to()]; ok {
					edges = append(edges, edge{to: to, rtt: l.rtt(), damped: l.damped()})
				}
			}
		}
		own := edges[first:len(edges):len(edges)]
		slices.SortFunc(own, func(a, b edge) int { return cmp.Or(a.to-b.to, cmp.Compare(a.rtt, b.rtt)) })
		g.edges[i] = slices.CompactFunc(own, func(a, b edge) bool { return a.to == b.to })
	}
	g.agree()
	return g
}

// agree has both ends of every link mean the same by it: the smaller round trip, and unsteady if either says so.
func (g *graph) agree() {
	next := make([]int, len(g.edges)) // of each peer, its first link to nobody below a
	for a := range g.edges {
		for i := range g.edges[a] {
			e := &g.edges[a][i]
			far := g.edges[e.to]
			for next[e.to] < len(far) && far[next[e.to]].to < a {
				next[e.to]++
			}
			if k := next[e.to]; k == len(far) || far[k].to != a {
				e.lone = true
			} else {
				e.rtt, e.damped = min(e.rtt, far[k].rtt), e.damped || far[k].damped
			}
		}
	}
}

// Routes computes the ways to all peers.
func (t *Topology) Routes() *Routes { return t.graph().routes() }

const unreached = time.Duration(1<<63 - 1)

func (g *graph) routes() *Routes {
	n := len(g.names)
	dist := make([]time.Duration, n)
	first := make([]int, n)
	hops := make([]int, n)
	rtt := make([]time.Duration, n)
	done := make([]bool, n)
	for i := range dist {
		dist[i] = unreached
	}
	dist[g.self] = 0
	queue := heap{{node: g.self}}
	for len(queue) > 0 {
		top := queue.pop()
		at := top.node
		if done[at] {
			continue
		}
		done[at] = true
		for _, e := range g.edges[at] {
			if done[e.to] || e.lone && at != g.self {
				continue
			}
			d, via := dist[at]+e.weight(), first[at]
			if at == g.self {
				via = e.to
			}
			// Between equals fewer hops and then the lower name, so that routes do not depend on order.
			if d > dist[e.to] || d == dist[e.to] && cmp.Or(hops[at]+1-hops[e.to], via-first[e.to]) >= 0 {
				continue
			}
			dist[e.to], first[e.to], hops[e.to], rtt[e.to] = d, via, hops[at]+1, rtt[at]+e.rtt
			queue.push(item{d, e.to})
		}
	}
	r := &Routes{self: g.names[g.self], to: make(map[mesh.PeerName]Route, n)}
	for i, name := range g.names {
		if i == g.self || dist[i] == unreached {
			continue
		}
		route := Route{Dst: name, Via: g.names[first[i]], Hops: hops[i], RTT: rtt[i]}
		if route.Via != name {
			route.Why = g.why(i, rtt[i])
		}
		r.to[name] = route
		r.order = append(r.order, name)
	}
	return r
}

func (g *graph) why(dst int, relayed time.Duration) string {
	own := g.edges[g.self]
	i, ok := slices.BinarySearchFunc(own, dst, func(e edge, dst int) int { return e.to - dst })
	switch {
	case !ok:
		return "no direct link"
	case own[i].damped:
		return "direct link is unsteady"
	}
	return fmt.Sprintf("relay takes %v, direct link %v", relayed.Round(time.Millisecond), own[i].rtt.Round(time.Millisecond))
}

// heap is a binary heap of nodes by distance.
type (
	item struct {
		dist time.Duration
		node int
	}
	heap []item
)

func (h *heap) push(x item) {
	*h = append(*h, x)
	s := *h
	for i := len(s) - 1; i > 0; {
		parent := (i - 1) / 2
		if s[parent].dist <= s[i].dist {
			return
		}
		s[parent], s[i] = s[i], s[parent]
		i = parent
	}
}

func (h *heap) pop() item {
	s := *h
	top, last := s[0], len(s)-1
	s[0] = s[last]
	s = s[:last]
	*h = s
	for i := 0; ; {
		child := 2*i + 1
		if child >= last {
			return top
		}
		if child+1 < last && s[child+1].dist < s[child].dist {
			child++
		}
		if s[i].dist <= s[child].dist {
			return top
		}
		s[i], s[child] = s[child], s[i]
		i = child
	}
}
