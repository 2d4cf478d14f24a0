package container

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"meshd/mesh"
)

// TestHistories plays random lives of containers, Docker and meshd, and wants at the end what was acknowledged:
// who is attached has its addresses and MAC, who is gone has nothing.
func TestHistories(t *testing.T) {
	seeds := 100
	if testing.Short() {
		seeds = 20
	}
	base := uint64(time.Now().UnixNano())
	for i := range seeds {
		seed := base + uint64(i)
		synctest.Test(t, func(t *testing.T) {
			h := newHistory(t, seed)
			for range 60 {
				h.step()
				if t.Failed() {
					break
				}
			}
			h.finish()
		})
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

type life struct {
	id, name  string
	number    int
	alive     bool
	destroyed bool
	want      []netip.Prefix // acknowledged
	mac       mesh.MAC
}

type history struct {
	*world
	rnd   *rand.Rand
	m     *Manager
	stop  func()
	lives []*life
	gone  []string // ids of containers that were destroyed
	log   []string

	pid, number int // the last ones given
}

func newHistory(t *testing.T, seed uint64) *history {
	h := &history{world: newWorld(t), rnd: rand.New(rand.NewPCG(seed, 1)), pid: 100, number: 4}
	h.m = h.manager()
	h.stop = h.run(h.m)
	for i := range 4 {
		h.lives = append(h.lives, &life{id: id(i + 1), name: fmt.Sprint("c", i), number: i + 1, destroyed: true})
	}
	return h
}

func (h *history) note(format string, args ...any) {
	h.log = append(h.log, fmt.Sprintf(format, args...))
}

func (h *history) step() {
	l := h.lives[h.rnd.IntN(len(h.lives))]
	switch h.rnd.IntN(12) {
	case 0, 1, 2:
		if !l.alive {
			h.note("start %s", l.name)
			h.pid++
			h.start(l.number, h.pid, l.name)
			l.alive, l.destroyed = true, false
		}
	case 3:
		if l.alive {
			h.note("die %s", l.name)
			h.die(l.id)
			l.alive = false
		}
	case 4:
		if !l.destroyed {
			h.note("destroy %s", l.name)
			h.destroy(l.id)
			h.gone = append(h.gone, l.id)
			h.number++ // no id comes twice
			l.number, l.id = h.number, id(h.number)
			l.alive, l.destroyed, l.want, l.mac = false, true, nil, mesh.MAC{}
		}
	case 5, 6, 7:
		a := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 2, l.name[1], byte(1 + h.rnd.IntN(4))}), 24)
		_, err := h.m.Attach(h.t.Context(), Request{Target: l.name, Addrs: []mesh.AddrSpec{{Kind: mesh.AddrExact, Prefix: a}}})
		h.note("attach %s %v: %v", l.name, a, err)
		if ok := l.alive && !h.away && h.fail["AttachPort"] == nil && h.fail["Put"] == nil; ok != (err == nil) {
			h.t.Errorf("attach %s: got %v, want success: %v", l.name, err, ok)
		}
		if err == nil && !slices.Contains(l.want, a) {
			l.want = append(l.want, a)
		}
	case 8:
		if len(l.want) > 0 && h.fail["Put"] == nil {
			a := l.want[h.rnd.IntN(len(l.want))]
			_, err := h.m.Detach(h.t.Context(), l.id, []mesh.AddrSpec{{Kind: mesh.AddrExact, Prefix: a}})
			h.note("detach %s %v: %v", l.name, a, err)
			if err != nil {
				h.t.Errorf("detach %s %v: %v", l.name, a, err)
			}
			if l.want = slices.DeleteFunc(l.want, func(p netip.Prefix) bool { return p == a }); len(l.want) == 0 {
				l.mac = mesh.MAC{}
			}
		}
	case 9:
		h.note("meshd restarts")
		h.stop()
		h.mu.Lock()
		clear(h.announced)
		for len(h.events) > 0 {
			<-h.events
		}
		h.mu.Unlock()
		h.m = h.manager()
		h.stop = h.run(h.m)
	case 10:
		h.note("dockerd away: %v", !h.away)
		h.dockerd(h.away)
	case 11:
		method := []string{"AttachPort", "Put"}[h.rnd.IntN(2)]
		var err error
		if h.fail[method] == nil {
			err = errDeliver
		}
		h.note("%s fails: %v", method, err)
		h.failing(method, err)
		if err == nil {
			time.Sleep(2 * lastRetry) // what failed meanwhile is done by then
		}
	}
	if h.rnd.IntN(3) == 0 {
		d := time.Duration(h.rnd.IntN(50)) * time.Second
		h.note("%v pass", d)
		time.Sleep(d)
	}
	synctest.Wait()
	for _, l := range h.lives {
		h.mu.Lock()
		mac := h.ports[l.id].port.MAC
		h.mu.Unlock()
		if len(l.want) == 0 || mac.IsZero() {
			continue
		}
		if !l.mac.IsZero() && l.mac != mac {
			h.t.Errorf("MAC of %s became %v, was %v", l.name, mac, l.mac)
		}
		l.mac = mac
	}
}

// finish lets everything work again, and compares.
func (h *history) finish() {
	h.failing("AttachPort", nil)
	h.failing("Put", nil)
	if h.away {
		h.dockerd(true)
	}
	time.Sleep(5 * time.Minute)
	synctest.Wait()
	for _, id := range h.gone {
		h.wantNothing(id, false)
	}
	for _, l := range h.lives {
		slices.SortFunc(l.want, netip.Prefix.Compare)
		if l.alive && len(l.want) > 0 {
			words := ""
			for _, a := range l.want {
				words += a.String() + " "
			}
			h.wantPort(l.id, words)
		} else {
			h.wantNothing(l.id, len(l.want) > 0)
		}
	}
	h.stop()
	if h.t.Failed() {
		for _, line := range h.log {
			h.t.Log(line)
		}
	}
}
