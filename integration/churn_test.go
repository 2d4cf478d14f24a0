package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"meshd/integration/lab"
)

// churn is containers that come and go on all hosts, while meshd is killed.
type churn struct {
	*world
	flags  []string // of every launch
	specs  []string // what addresses are asked for: one of each of two subnets
	guests []*guest
	left   atomic.Int64 // operations to do
	until  time.Time    // or, if this is set, how long

	// still is held for reading by whoever asks meshd for something, so that all containers can be looked at while
	// none changes but by what meshd does by itself.
	still sync.RWMutex

	attaches, detaches, deaths, cut, late atomic.Int64
	kills, scans, seen                    int
}

// guest is one container, used by one goroutine at a time.
type guest struct {
	*lab.Container
	name   string         // without the number of its life
	life   int            // how many there were before under other names
	specs  []string       // it is attached with
	acked  []netip.Prefix // that an attach acknowledged, and no detach; sorted
	broken bool           // it could not be made
	open   bool           // an operation is under way: what it has is not known
}

// TestContainersComeAndGo is I7: containers are attached and detached on all hosts, end, and come back, without
// anybody choosing an address, while one meshd after the other is killed at any moment. No address is ever held twice,
// what was acknowledged stays, and in the end every address of the range can be had again.
func TestContainersComeAndGo(t *testing.T) {
	hosts, each, rng, subnets := 4, 8, "10.32.0.0/26", []string{"10.32.0.0/27", "10.32.0.32/27"}
	if long() {
		hosts, each, rng, subnets = 8, 16, "10.32.0.0/24", []string{"10.32.0.0/25", "10.32.0.128/25"}
	}
	w := newWorld(t, hosts, scaled(100*time.Second, 80*time.Minute))
	random := seeded(t)
	c := &churn{world: w, flags: []string{"--ipalloc-range", rng, "--ipalloc-default-subnet", subnets[0]}, specs: []string{"net:default", "net:" + subnets[1]}}
	w.mesh(c.flags...)
	empty := make([]lab.Snapshot, hosts)
	var g errgroup.Group
	c.guests = make([]*guest, hosts*each)
	for i, h := range w.Hosts {
		g.Go(func() (err error) {
			if empty[i], err = h.Snapshot(w.ctx); err != nil {
				return err
			}
			for j := range each {
				gu := &guest{name: fmt.Sprintf("c%d", j)}
				if gu.Container, err = h.Netns(w.ctx, gu.name); err != nil {
					return err
				}
				c.guests[i*each+j] = gu
			}
			return nil
		})
	}
	w.try(g.Wait())

	start := time.Now()
	c.left.Store(12_000)
	if !long() {
		c.until = start.Add(4 * time.Second)
	}
	c.run(random, each)
	took := time.Since(start)
	t.Logf("%v: %d attaches, %d detaches, %d ends of containers, %d kills of meshd; %d calls were cut off, %d too late; all looked at %d times, %d addresses",
		took.Round(time.Second), c.attaches.Load(), c.detaches.Load(), c.deaths.Load(), c.kills, c.cut.Load(), c.late.Load(), c.scans, c.seen)
	if c.kills == 0 || c.detaches.Load() == 0 || c.seen == 0 {
		t.Error("the run was too quiet to mean something")
	}
	_, err := lab.WaitMesh(w.ctx, scaled(30*time.Second, 5*time.Minute), w.Hosts...)
	w.try(err)
	c.scan()
	c.detachAll()

	// Every address can be had, once: there are two containers more than a subnet has addresses.
	for k, spec := range c.specs {
		var full atomic.Int64
		c.all(func(_ context.Context, gu *guest) error {
			got, err := c.ask(gu, "/attach", []string{spec})
			if refused(err, "no free address") {
				full.Add(1)
				return nil
			}
			gu.specs, gu.acked = append(slices.Clone(gu.specs), spec), append(gu.acked, got...)
			slices.SortFunc(gu.acked, netip.Prefix.Compare)
			return err
		})
		subnet := netip.MustParsePrefix(subnets[k])
		if usable := 1<<(32-subnet.Bits()) - 2; len(c.guests)-int(full.Load()) != usable {
			t.Errorf("%d containers got an address in %v, want %d", len(c.guests)-int(full.Load()), subnet, usable)
		}
	}
	c.scan()
	c.detachAll()

	for i, h := range w.Hosts {
		g.Go(func() error {
			for _, gu := range c.guests[i*each : (i+1)*each] {
				if err := gu.Remove(w.ctx); err != nil {
					return err
				}
			}
			var diff []string
			err := lab.Until(w.ctx, scaled(20*time.Second, 5*time.Minute), h.Name+" to be as it was without containers", func() bool {
				now, err := h.Snapshot(w.ctx)
				diff = slices.DeleteFunc(empty[i].Diff(now), func(line string) bool {
					// meshd was started again, and what the bridge has learnt goes in five minutes.
					kind, _, _ := strings.Cut(line[2:], ":")
					return kind == "process" || kind == "unix socket" || kind == "fdb"
				})
				return err == nil && len(diff) == 0
			})
			if err != nil {
				err = fmt.Errorf("%w:\n%s", err, strings.Join(diff, "\n"))
			}
			return err
		})
	}
	w.try(g.Wait())
}

// run has containers come and go until enough have, with two at a time on each host.
func (c *churn) run(random *rand.Rand, each int) {
	const atOnce = 2
	g, ctx := errgroup.WithContext(c.ctx)
	for i := range len(c.guests) / each * atOnce {
		mine, r := c.guests[i*each/atOnce:(i+1)*each/atOnce], rand.New(rand.NewPCG(random.Uint64(), uint64(i)))
		g.Go(func() error {
			for c.left.Add(-1) >= 0 && (c.until.IsZero() || time.Now().Before(c.until)) {
				gu := mine[r.IntN(len(mine))]
				if err := c.step(ctx, r, gu); err != nil {
					if ctx.Err() == nil { // at once: a look at all may come before the others have ended
						c.t.Errorf("%s of %s: %v", gu.Name, gu.Host.Name, err)
					}
					return err
				}
			}
			return nil
		})
	}
	done := make(chan struct{})
	var err error
	go func() { err = g.Wait(); close(done) }()
	pause := func(d time.Duration) bool {
		select {
		case <-done:
			return false
		case <-time.After(d):
			return true
		}
	}
	for pause(time.Duration(200+random.IntN(scaled(600, 3000))) * time.Millisecond) {
		h := c.Hosts[random.IntN(len(c.Hosts))]
		c.try(h.Kill(c.ctx, h.Meshd(), syscall.SIGKILL))
		c.try(lab.Until(c.ctx, scaled(5*time.Second, 5*time.Minute), "meshd to end", func() bool { return h.Meshd() == 0 }))
		pause(time.Duration(random.IntN(scaled(100, 1000))) * time.Millisecond)
		c.launch(h, append(c.flags[:len(c.flags):len(c.flags)], "--resume", "--timeout", "10m")...)
		if c.kills++; c.kills%2 == 0 {
			c.scan()
		}
		if c.kills%20 == 0 {
			c.t.Logf("%d kills, %d operations left", c.kills, c.left.Load())
		}
	}
	<-done
	c.try(err)
}

// step does one thing with one container.
func (c *churn) step(ctx context.Context, r *rand.Rand, gu *guest) error {
	c.mark(gu, true)
	switch x := r.IntN(20); {
	case len(gu.acked) == 0:
		gu.specs = [][]string{c.specs[:1], c.specs[:1], c.specs[1:], c.specs}[r.IntN(4)]
		c.attaches.Add(1)
		got, err := c.insist(ctx, gu, "/attach")
		if err != nil {
			return err
		}
		gu.acked = got
	case x < 4: // once more, or it ends and comes back while its addresses are kept: they are the same
		if x < 2 {
			if err := c.reborn(gu); err != nil {
				return err
			}
		}
		got, err := c.insist(ctx, gu, "/attach")
		if err != nil {
			return err
		}
		if !slices.Equal(got, gu.acked) {
			return fmt.Errorf("%s of %s had %v and got %v", gu.Name, gu.Host.Name, gu.acked, got)
		}
	case x == 4 && long(): // it ends without a word, and another comes
		gu.life++
		gu.acked = nil
		if err := c.reborn(gu); err != nil {
			return err
		}
	default:
		c.detaches.Add(1)
		if _, err := c.insist(ctx, gu, "/detach"); err != nil {
			return err
		}
		gu.acked = nil
	}
	c.mark(gu, false)
	return nil
}

func (c *churn) mark(gu *guest, open bool) {
	c.still.RLock()
	defer c.still.RUnlock()
	gu.open = open
}

// reborn ends a container and makes the next one in its place.
func (c *churn) reborn(gu *guest) error {
	c.still.RLock()
	defer c.still.RUnlock()
	c.deaths.Add(1)
	gu.broken = true
	if err := gu.Remove(c.ctx); err != nil {
		return err
	}
	name := gu.name
	if gu.life > 0 {
		name = fmt.Sprintf("%s.%d", gu.name, gu.life)
	}
	next, err := gu.Host.Netns(c.ctx, name)
	if err == nil {
		gu.Container, gu.broken = next, false
	}
	return err
}

// ask has meshd attach or detach a container, once.
func (c *churn) ask(gu *guest, path string, specs []string) ([]netip.Prefix, error) {
	c.still.RLock()
	defer c.still.RUnlock()
	ctx, cancel := context.WithTimeout(c.ctx, time.Minute)
	defer cancel()
	var answer struct{ Addresses []netip.Prefix }
	err := gu.Host.Post(ctx, path+"?timeout=20s", map[string]any{"Container": gu.Ref, "Addresses": specs}, &answer)
	slices.SortFunc(answer.Addresses, netip.Prefix.Compare)
	return answer.Addresses, err
}

func refused(err error, text string) bool {
	r := new(lab.Refusal)
	return errors.As(err, &r) && strings.Contains(r.Text, text)
}

// insist asks again while meshd is killed under the request, or is not there.
func (c *churn) insist(ctx context.Context, gu *guest, path string) (got []netip.Prefix, err error) {
	tries := 0
	uerr := lab.Until(ctx, scaled(30*time.Second, 5*time.Minute), path+" on "+gu.Host.Name, func() bool {
		got, err = c.ask(gu, path, gu.specs)
		tries++
		r := new(lab.Refusal)
		switch {
		case err == nil:
			return true
		case path == "/detach" && tries > 1 && refused(err, "is not attached") && !refused(err, "it has"):
			err = nil // the first time, unheard
			return true
		case !errors.As(err, &r):
			c.cut.Add(1)
			return false
		case r.Code == http.StatusGatewayTimeout, refused(err, "no free address"), r.Code == http.StatusServiceUnavailable:
			c.late.Add(1) // or those that have ended have the last ones, for 30 s
			return false
		}
		return true
	})
	if uerr != nil {
		err = fmt.Errorf("%w: %w", uerr, err)
	}
	if err == nil && path == "/attach" && len(got) != len(gu.specs) {
		err = fmt.Errorf("%s of %s: asked for %v, got %v", gu.Name, gu.Host.Name, gu.specs, got)
	}
	return got, err
}

// all does something with all containers, a few at a time.
func (c *churn) all(do func(context.Context, *guest) error) {
	c.t.Helper()
	g, ctx := errgroup.WithContext(c.ctx)
	g.SetLimit(2 * len(c.Hosts))
	order := rand.New(rand.NewPCG(1, 1)).Perm(len(c.guests))
	for _, i := range order {
		g.Go(func() error { return do(ctx, c.guests[i]) })
	}
	c.try(g.Wait())
}

// scan looks at all containers, while nobody asks for anything: no address is there twice, and who was acknowledged
// addresses has those and no others.
func (c *churn) scan() {
	c.t.Helper()
	c.still.Lock()
	defer c.still.Unlock()
	c.scans++
	has := make([][]netip.Prefix, len(c.guests))
	read := func(i int) (err error) {
		has[i], err = overlayAddrs(c.guests[i].Container)
		slices.SortFunc(has[i], netip.Prefix.Compare)
		return err
	}
	holder := map[netip.Addr]int{}
	for i, gu := range c.guests {
		if gu.broken {
			continue
		}
		c.try(read(i))
		if !gu.open && !slices.Equal(has[i], gu.acked) {
			c.t.Errorf("%s of %s has %v, acknowledged are %v", gu.Name, gu.Host.Name, has[i], gu.acked)
		}
		for _, a := range has[i] {
			c.seen++
			j, taken := holder[a.Addr()]
			holder[a.Addr()] = i
			if !taken {
				continue
			}
			// meshd may just have moved it by itself, between two containers that wait for their answers.
			c.try(errors.Join(read(i), read(j)))
			if slices.Contains(has[i], a) && slices.Contains(has[j], a) {
				o := c.guests[j]
				c.t.Errorf("%v is held by %s of %s and by %s of %s", a, gu.Name, gu.Host.Name, o.Name, o.Host.Name)
			}
		}
	}
}

// detachAll detaches every container, and waits until the hosts agree that every address is somebody's to give, and
// that nobody has any. The addresses of those that ended without a word are kept for 30 s.
func (c *churn) detachAll() {
	c.t.Helper()
	c.all(func(ctx context.Context, gu *guest) error {
		var err error
		if len(gu.acked) > 0 {
			_, err = c.insist(ctx, gu, "/detach")
		}
		gu.acked, gu.specs = nil, nil
		return err
	})
	c.scan()
	var why string
	start := time.Now()
	err := lab.Until(c.ctx, scaled(15*time.Second, 5*time.Minute), "all addresses to be free", func() bool {
		why = c.notFree()
		return why == ""
	})
	if err != nil {
		c.t.Errorf("%v: %s", err, why)
	}
	c.t.Logf("all addresses free %v after the last detach", time.Since(start).Round(time.Millisecond))
}

// notFree says what is missing for every address to be free, or "".
func (c *churn) notFree() string {
	var first string
	for _, h := range c.Hosts {
		var held map[string][]string
		r, err := h.Report(c.ctx)
		if err == nil {
			var body []byte
			if body, err = h.Get(c.ctx, "/ip"); err == nil {
				err = json.Unmarshal(body, &held)
			}
		}
		if err != nil {
			return err.Error()
		}
		sum := 0
		for _, e := range r.IPAM.Entries {
			sum += e.Size
			if !e.IsKnownPeer {
				return fmt.Sprintf("%s sees %d addresses of %s, which is out of reach", h.Name, e.Size, e.Nickname)
			}
		}
		slices.SortFunc(r.IPAM.Entries, func(a, b lab.RingEntry) int { return strings.Compare(a.Nickname, b.Nickname) })
		text := fmt.Sprint(r.IPAM.Entries)
		switch i := r.IPAM; {
		case len(held) > 0 || i.ActiveIPs > 0:
			return fmt.Sprintf("%s holds %d addresses, for %v", h.Name, i.ActiveIPs, held)
		case sum != i.RangeNumIPs:
			return fmt.Sprintf("%s sees owners of %d addresses of %d", h.Name, sum, i.RangeNumIPs)
		case len(i.PendingClaims)+len(i.PendingAllocates)+len(i.Conflicts) > 0:
			return fmt.Sprintf("%s waits for %v, %v, sees %v", h.Name, i.PendingClaims, i.PendingAllocates, i.Conflicts)
		case first != "" && text != first:
			return fmt.Sprintf("%s sees %s, others %s", h.Name, text, first)
		}
		first = text
	}
	return ""
}
