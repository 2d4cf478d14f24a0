package container

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"meshd/container/docker"
	"meshd/mesh"
)

func TestAttach(t *testing.T) {
	w := newWorld(t)
	m := w.manager()
	web := w.start(1, 100, "web")
	for range 2 { // twice is once
		w.attach(m, "web", "", "10.32.0.1/28")
		w.wantPort(web, "10.32.0.1/28")
	}
	w.attach(m, web, "ip:10.2.1.1/24 net:10.3.0.0/24 net:default", "10.2.1.1/24 10.3.0.1/24 10.32.0.1/28")
	w.wantPort(web, "10.2.1.1/24 10.3.0.1/24 10.32.0.1/28")
	if got := w.announced[web].Names; !reflect.DeepEqual(got, []string{"web.mesh.internal."}) {
		t.Errorf("names are %v", got)
	}
	w.start(2, 101, "db")
	w.attach(m, "db", "fd00::1/64 10.2.1.2/24", "fd00::1/64 10.2.1.2/24")
	w.wantPort(id(2), "10.2.1.2/24 fd00::1/64")
	if w.ports[web].port.MAC == w.ports[id(2)].port.MAC || w.ports[web].port.MAC[0]&3 != 2 {
		t.Errorf("MAC addresses are %v and %v", w.ports[web].port.MAC, w.ports[id(2)].port.MAC)
	}
}

func TestAttachNames(t *testing.T) {
	w := newWorld(t)
	m := w.manager()
	for _, c := range []struct{ host, domain, want string }{
		{"web", "mesh.internal", "web.mesh.internal."}, {"Web.Mesh.Internal.", "", "web.mesh.internal."},
		{"a.b", "mesh.internal.", "a.b.mesh.internal."}, {"web", "", ""}, {"web", "example.com", ""}, {"mesh", "internal", ""},
		{"-web", "mesh.internal", ""}, {"w eb", "mesh.internal", ""}, {"", "mesh.internal", ""}, {"notmesh.internal", "", ""},
		{strings.Repeat("x", 64), "mesh.internal", ""}, {strings.Repeat("x.", 130), "mesh.internal", ""},
	} {
		if got := m.fqdn(c.host, c.domain); got != c.want {
			t.Errorf("%q %q: got %q, want %q", c.host, c.domain, got, c.want)
		}
	}
	web := w.start(1, 100, "web")
	if _, err := m.Attach(t.Context(), Request{Target: "web", WithoutDNS: true}); err != nil {
		t.Fatal(err)
	}
	if got := w.announced[web].Names; got != nil {
		t.Errorf("names are %v, want none", got)
	}
}

func TestAttachRefuses(t *testing.T) {
	w := newWorld(t)
	m := w.manager()
	set := func(i int, name string, change func(*docker.Container)) {
		c := w.containers[w.start(i, 100+i, name)]
		change(&c)
		w.containers[c.ID] = c
	}
	set(1, "host", func(c *docker.Container) { c.HostConfig.NetworkMode = "host" })
	set(2, "shared", func(c *docker.Container) { c.HostConfig.NetworkMode = "container:" + id(9) })
	set(3, "stopped", func(c *docker.Container) { c.State.Running = false })
	set(4, "restarting", func(c *docker.Container) { c.State.Pid = 0 })
	set(5, "web", func(*docker.Container) {})
	set(6, "vanished", func(*docker.Container) { os.RemoveAll(filepath.Join(w.proc, "106")) })
	w.remote = []mesh.Endpoint{{Peer: peerB, Owner: id(8), Addrs: prefixes("10.2.1.8/24")}}
	w.start(7, 107, "db")
	w.attach(m, "db", "10.2.1.7/24", "10.2.1.7/24")
	before := w.state()
	for _, c := range []struct{ target, addrs, want string }{
		{"host", "", "uses the network of the host"},
		{"shared", "", "uses the network of container 000000000000"},
		{"stopped", "", "container stopped: is not running"},
		{"restarting", "", "is not running"},
		{"vanished", "", "container vanished: is not running"},
		{"none", "", "no such container"},
		{"web", "none", "attaches nothing"},
		{"web", "10.2.1.7/24", "address 10.2.1.7 is in use by container db (000000000000)"},
		{"web", "10.2.1.8/24", "is in use by 000000000000 on peer 0b:00:00:00:00:00 (if that has gone for good: meshctl rmpeer 0b:00:00:00:00:00)"},
		{"db", "10.2.1.7/16", "has it as 10.2.1.7/24"},
		{"pid:x", "", "want pid:"}, {"pid:0", "", "want pid:"}, {"pid:-1", "", "want pid:"}, {"pid:99999", "", "no such process"},
		{"netns:relative", "", "absolute path"}, {"netns:/nonexistent", "", "no such file"},
	} {
		got, err := m.Attach(t.Context(), Request{Target: c.target, Addrs: specs(t, c.addrs)})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %s: got %v, %v, want %q", c.target, c.addrs, got, err, c.want)
		}
	}
	if _, err := m.Attach(t.Context(), Request{Target: "web", AddHosts: []string{"nonsense"}}); err == nil {
		t.Error("a bad host entry is accepted")
	}
	if after := w.state(); after != before {
		t.Errorf("refused calls left\n%s\nwas\n%s", after, before)
	}
	off := w.config()
	off.Docker = nil
	if m, err := New(off); err != nil {
		t.Fatal(err)
	} else if _, err := m.Attach(t.Context(), Request{Target: "web"}); err == nil || !strings.Contains(err.Error(), "Docker, which is off") {
		t.Errorf("without Docker: got %v", err)
	}
}

// Whatever fails, and wherever, all is as before.
func TestAttachUndoes(t *testing.T) {
	for _, attached := range []bool{false, true} {
		for _, method := range []string{"Claim", "Allocate", "AttachPort", "AttachPort half way", "Put", "Container"} {
			t.Run(fmt.Sprintf("%s attached=%v", method, attached), func(t *testing.T) {
				w := newWorld(t)
				m := w.manager()
				web := w.start(1, 100, "web")
				if attached {
					w.attach(m, "web", "10.2.1.1/24", "10.2.1.1/24")
				}
				before := w.state()
				w.failing(method, errDeliver)
				if got, err := m.Attach(t.Context(), Request{Target: "web", Addrs: specs(t, "10.2.1.1/24 10.4.1.1/24 net:default")}); !errors.Is(err, errDeliver) {
					t.Errorf("got %v, %v", got, err)
				}
				w.failing(method, nil)
				if after := w.state(); after != before {
					t.Errorf("left\n%s\nwas\n%s", after, before)
				}
				w.attach(m, "web", "10.4.1.1/24", "10.4.1.1/24")
				if !attached {
					w.wantPort(web, "10.4.1.1/24")
				}
			})
		}
	}
}

func TestAttachGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		m := w.manager()
		web := w.start(1, 100, "web")
		w.block = make(chan struct{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := m.Attach(ctx, Request{Target: "web"}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		w.wantNothing(web, false)
	})
}

// An address that turned out to be another peer's, or was lost to it, goes when the container is attached again and gets
// one in its place.
func TestRenumber(t *testing.T) {
	t.Run("Collided", func(t *testing.T) {
		testRenumber(t, func(w *world, a netip.Addr) { w.rivals[a] = true })
	})
	t.Run("Lost", func(t *testing.T) {
		testRenumber(t, func(w *world, a netip.Addr) { w.owned[a] = "somebody else" })
	})
}

func testRenumber(t *testing.T, take func(*world, netip.Addr)) {
	w := newWorld(t)
	m := w.manager()
	web := w.start(1, 100, "web")
	w.attach(m, "web", "10.2.1.1/24 net:default", "10.2.1.1/24 10.32.0.1/28")
	if _, err := m.Expose(t.Context(), ExposeRequest{}); err != nil {
		t.Fatal(err)
	}
	w.wantPort(web, "10.2.1.1/24 10.32.0.1/28")
	take(w, netip.MustParseAddr("10.32.0.1"))
	take(w, netip.MustParseAddr("10.32.0.2"))
	w.attach(m, "web", "net:default", "10.32.0.3/28")
	w.wantPort(web, "10.2.1.1/24 10.32.0.3/28")
	got, err := m.Expose(t.Context(), ExposeRequest{})
	if err != nil || !reflect.DeepEqual(got.Addresses, prefixes("10.32.0.4/28")) || !reflect.DeepEqual(w.bridge, prefixes("10.32.0.4/28")) || len(w.rules) != 1 {
		t.Errorf("exposed again: %v, %v, bridge %v, rules %v", got, err, w.bridge, w.rules)
	}
	if got, want := m.Called(web), "web"; got != want {
		t.Errorf("called %q, want %q", got, want)
	}
	// What is in place of nothing stands beside the others.
	w.attach(m, "web", "10.2.1.2/24", "10.2.1.2/24")
	w.wantPort(web, "10.2.1.1/24 10.2.1.2/24 10.32.0.3/28")
}

func TestDetach(t *testing.T) {
	w := newWorld(t)
	m := w.manager()
	web := w.start(1, 100, "web")
	detach := func(target, addrs, want string) {
		t.Helper()
		got, err := m.Detach(t.Context(), target, specs(t, addrs))
		if want == "" {
			if !errors.Is(err, ErrNotAttached) {
				t.Errorf("detach %s %s: got %v, %v, want ErrNotAttached", target, addrs, got, err)
			}
			return
		}
		if err != nil || !reflect.DeepEqual(got.Addresses, prefixes(want)) {
			t.Errorf("detach %s %s: got %v, %v, want %s", target, addrs, got, err, want)
		}
	}
	detach("web", "", "")
	w.attach(m, "web", "net:default 10.2.1.1/24 net:10.3.0.0/24 fd00::1/64", "10.32.0.1/28 10.2.1.1/24 10.3.0.1/24 fd00::1/64")
	w.block = make(chan struct{}) // detach does not allocate
	detach("web", "10.9.9.9/24", "")
	detach("web", "net:10.9.9.0/24", "")
	detach("web", "", "10.32.0.1/28")
	w.wantPort(web, "10.2.1.1/24 10.3.0.1/24 fd00::1/64")
	detach("web", "", "")
	detach(web[:60], "net:10.3.0.0/24", "10.3.0.1/24")
	w.away = true // nor need it Docker
	detach("/web", "ip:10.2.1.1/24", "10.2.1.1/24")
	w.wantPort(web, "fd00::1/64")
	detach(web, "ip:fd00::1/64", "fd00::1/64")
	w.wantNothing(web, false)
	w.away = false
	detach("web", "", "")
	detach(mesh.OwnerExpose, "", "")

	w.noIPAM = true
	w.attach(m, "web", "10.2.1.1/24 10.2.1.2/24", "10.2.1.1/24 10.2.1.2/24")
	detach("web", "", "10.2.1.1/24 10.2.1.2/24")
	w.wantNothing(web, false)
}

func TestNamespaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.away = true
		w.process(100)
		w.process(200)
		m := w.manager()
		stop := w.run(m)
		path := filepath.Join(w.proc, "200/ns/net")
		w.attach(m, "pid:100", "10.2.1.1/24", "10.2.1.1/24")
		w.attach(m, "netns:"+path, "10.2.1.2/24", "10.2.1.2/24")
		// One namespace by its other name.
		w.attach(m, "pid:200", "10.2.1.3/24", "10.2.1.3/24")
		list, err := m.List(t.Context(), nil)
		if err != nil || len(list) != 3 || list[0].ID != mesh.OwnerExpose {
			t.Fatalf("list is %+v, %v", list, err)
		}
		if got, _ := m.List(t.Context(), []string{"netns:" + path}); len(got) != 1 || !reflect.DeepEqual(got[0].Addresses, prefixes("10.2.1.2/24 10.2.1.3/24")) {
			t.Errorf("list by path is %+v", got)
		}
		one, _ := m.List(t.Context(), []string{"pid:100"})
		// The process ends, and after the grace time its address is free.
		synctest.Wait()
		w.mu.Lock()
		w.dieLocked(100)
		w.mu.Unlock()
		time.Sleep(11 * time.Second)
		synctest.Wait()
		if _, ok := w.announced[one[0].ID]; ok {
			t.Error("still announced")
		}
		time.Sleep(31 * time.Second)
		synctest.Wait()
		w.wantNothing(one[0].ID, false)
		// A restart of meshd, and the namespace made anew under its path.
		stop()
		two, _ := m.List(t.Context(), []string{"netns:" + path})
		w.mu.Lock()
		w.dieLocked(200)
		w.mu.Unlock()
		w.process(200)
		stop = w.run(w.manager())
		synctest.Wait()
		w.wantPort(two[0].ID, "10.2.1.2/24 10.2.1.3/24")
		if got := w.ports[two[0].ID].port.MAC; got != two[0].MAC {
			t.Errorf("MAC is %v, was %v", got, two[0].MAC)
		}
		stop()
	})
}

func TestContainerRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		m := w.manager()
		stop := w.run(m)
		defer stop()
		web := w.start(1, 100, "web")
		w.attach(m, "web", "net:default 10.2.1.1/24", "10.32.0.1/28 10.2.1.1/24")
		mac := w.ports[web].port.MAC
		for i, pause := range []time.Duration{0, 10 * time.Second, 29 * time.Second, 31 * time.Second, time.Hour} {
			w.die(web)
			synctest.Wait()
			if _, ok := w.announced[web]; ok {
				t.Error("its names outlive it")
			}
			time.Sleep(pause)
			synctest.Wait()
			if held := len(w.Lookup(web, subnet)) > 0; held != (pause < 30*time.Second) {
				t.Errorf("after %v the address is held: %v", pause, held)
			}
			w.start(1, 101+i, "web")
			synctest.Wait()
			w.wantPort(web, "10.2.1.1/24 10.32.0.1/28")
			if got := w.ports[web].port.MAC; got != mac {
				t.Errorf("MAC is %v, was %v", got, mac)
			}
		}
		// Another takes the allocated address meanwhile: it comes back with the next one.
		w.die(web)
		time.Sleep(31 * time.Second)
		synctest.Wait()
		w.start(2, 200, "other")
		w.attach(m, "other", "", "10.32.0.1/28")
		w.start(1, 110, "web")
		synctest.Wait()
		w.wantPort(web, "10.2.1.1/24 10.32.0.2/28")
		// Attach finds what it had.
		w.attach(m, "web", "", "10.32.0.2/28")

		w.destroy(web)
		synctest.Wait()
		w.wantNothing(web, false)
	})
}

// The proxy attaches at the very moment when the event of the start comes.
func TestAttachMeetsRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		m := w.manager()
		stop := w.run(m)
		defer stop()
		web := w.start(1, 100, "web")
		w.attach(m, "web", "", "10.32.0.1/28")
		w.die(web)
		time.Sleep(time.Minute)
		synctest.Wait()
		w.start(2, 200, "other")
		w.attach(m, "other", "", "10.32.0.1/28")
		w.start(1, 101, "web")
		w.attach(m, "web", "", "10.32.0.2/28")
		synctest.Wait()
		w.wantPort(web, "10.32.0.2/28")
	})
}

func TestManagerRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		m := w.manager()
		stop := w.run(m)
		stays, dies, goes, moves := w.start(1, 100, "stays"), w.start(2, 200, "dies"), w.start(3, 300, "goes"), w.start(4, 400, "moves")
		for i, name := range []string{"stays", "dies", "goes", "moves"} {
			w.attach(m, name, "", fmt.Sprintf("10.32.0.%d/28", i+1))
		}
		if _, err := m.Expose(t.Context(), ExposeRequest{FQDN: "host.mesh.internal"}); err != nil {
			t.Fatal(err)
		}
		stop()
		// Everything happens while nobody looks, and Docker is away when meshd comes back.
		w.die(dies)
		w.destroy(goes)
		w.die(moves)
		w.start(4, 401, "moves")
		clear(w.announced)
		w.bridge = nil
		clear(w.rules)
		for len(w.events) > 0 {
			<-w.events
		}
		w.away = true

		stop = w.run(w.manager())
		defer func() { stop() }()
		synctest.Wait()
		w.wantPort(stays, "10.32.0.1/28")
		if !reflect.DeepEqual(w.bridge, prefixes("10.32.0.5/28")) || !w.rules[w.bridge[0]] || w.announced[mesh.OwnerExpose].Names[0] != "host.mesh.internal." {
			t.Errorf("exposed again is %v %v %v", w.bridge, w.rules, w.announced[mesh.OwnerExpose])
		}
		// Nobody is judged before Docker can be asked.
		time.Sleep(time.Hour)
		synctest.Wait()
		if w.owned[prefixes("10.32.0.2/28")[0].Addr()] != dies {
			t.Error("an address was given up without asking Docker")
		}
		w.dockerd(true)
		synctest.Wait()
		w.wantPort(moves, "10.32.0.4/28")
		w.wantNothing(goes, false)
		time.Sleep(31 * time.Second)
		synctest.Wait()
		w.wantNothing(dies, true)
		w.wantPort(stays, "10.32.0.1/28")
		// dockerd's restart changes nothing.
		before := w.state()
		w.dockerd(false)
		time.Sleep(time.Hour)
		w.dockerd(true)
		synctest.Wait()
		if after := w.state(); after != before {
			t.Errorf("dockerd's restart made\n%s\nof\n%s", after, before)
		}
	})
}

// A crash at each write of the store leaves nothing behind that the next run does not deal with.
func TestCrashes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, addrs := range []string{"net:default", "10.2.1.1/24", "net:10.3.0.0/24"} {
			for writes := 1; writes <= 2; writes++ {
				w := newWorld(t)
				web := w.start(1, 100, "web")
				// What is on disk after so many writes, and what the allocator gave.
				crash := crashingStore{w, writes}
				cfg := w.config()
				cfg.Store = &crash
				m, err := New(cfg)
				if err != nil {
					t.Fatal(err)
				}
				m.Attach(t.Context(), Request{Target: "web", Addrs: specs(t, addrs)})
				if writes == 1 {
					// The crash came before the undoing, too.
					if _, err := m.acquire(t.Context(), &record{Owner: web}, specs(t, addrs)[0]); err != nil {
						t.Fatal(err)
					}
				}
				clear(w.announced)
				stop := w.run(w.manager())
				synctest.Wait()
				if writes == 1 {
					w.wantNothing(web, false)
				} else {
					w.wantPort(web, w.Lookup(web, w.ports[web].port.Addrs[0].Masked())[0].String())
				}
				stop()
			}
		}
	})
}

// crashingStore takes so many writes, and no more.
type crashingStore struct {
	*world
	left int
}

func (c *crashingStore) Put(bucket string, kv map[string][]byte) error {
	if c.left == 0 {
		return errDeliver
	}
	c.left--
	return c.world.Put(bucket, kv)
}

// A call that comes before Run waits until what the kernel has was counted: else that could be counted which the call
// is just taking away.
func TestCallBeforeCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		m := w.manager()
		web := w.start(1, 100, "web")
		w.attach(m, "web", "", "10.32.0.1/28")
		reclaimed := 0
		cfg := w.config()
		cfg.Reclaim = func(live map[string][]netip.Prefix) { reclaimed = len(live) }
		m, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := m.Attach(short, Request{Target: "web"}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("attached before the count: %v", err)
		}
		done := make(chan error, 1)
		go func() {
			_, err := m.Detach(t.Context(), "web", nil)
			done <- err
		}()
		synctest.Wait()
		if len(done) > 0 || w.ports[web].port.Owner == "" {
			t.Error("detached before the count")
		}
		defer w.run(m)()
		if err := <-done; err != nil || reclaimed != 1 {
			t.Errorf("detach: %v; %d were counted, want 1", err, reclaimed)
		}
		synctest.Wait()
		w.wantNothing(web, false)
	})
}

// An address that cannot be taken from a namespace is not given to others. A port that was found in the kernel has no
// name to open its namespace by; an attach gives it one.
func TestDetachOfWhatCannotBeOpened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		m := w.manager()
		w.process(200)
		target := "netns:" + filepath.Join(w.proc, "200/ns/net")
		w.attach(m, target, "net:default", "10.32.0.1/28")
		clear(w.stored)
		stop := w.run(w.manager())
		synctest.Wait() // it makes a record of what it finds
		stop()
		m = w.manager()
		owner := m.all()[0].Owner
		w.attach(m, target, "10.2.1.1/24", "10.2.1.1/24")
		w.wantPort(owner, "10.2.1.1/24 10.32.0.1/28")
		if _, err := m.Detach(t.Context(), target, specs(t, "10.2.1.1/24")); err != nil {
			t.Error(err)
		}
		w.wantPort(owner, "10.32.0.1/28")

		w.attach(m, target, "10.2.1.1/24", "10.2.1.1/24")
		os.RemoveAll(filepath.Join(w.proc, "200")) // somebody holds it open
		if _, err := m.Detach(t.Context(), target, specs(t, "10.2.1.1/24")); err == nil || !strings.Contains(err.Error(), "detach all") {
			t.Errorf("detach of one address where it cannot be removed: %v", err)
		}
		w.wantPort(owner, "10.2.1.1/24 10.32.0.1/28")
		if _, err := m.Detach(t.Context(), target, specs(t, "10.2.1.1/24 net:default")); err != nil {
			t.Errorf("detach of all: %v", err)
		}
		w.wantNothing(owner, false)
	})
}

// The state file is lost; the kernel remembers.
func TestStoreLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		m := w.manager()
		web := w.start(1, 100, "web")
		w.process(200)
		w.attach(m, "web", "net:default 10.2.1.1/24", "10.32.0.1/28 10.2.1.1/24")
		w.attach(m, "pid:200", "", "10.32.0.2/28")
		list, _ := m.List(t.Context(), []string{"pid:200"})
		clear(w.stored)
		clear(w.owned)
		clear(w.announced)
		reclaimed := 0
		cfg := w.config()
		cfg.Reclaim = func(live map[string][]netip.Prefix) { reclaimed = len(live) }
		m, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		stop := w.run(m)
		defer stop()
		synctest.Wait()
		if reclaimed != 2 {
			t.Errorf("%d owners to reclaim for, want 2", reclaimed)
		}
		w.wantPort(web, "10.2.1.1/24 10.32.0.1/28")
		if w.announced[web].Names == nil {
			t.Error("its name is not back")
		}
		if _, ok := w.announced[list[0].ID]; !ok {
			t.Error("the process's port is not announced")
		}
		w.destroy(web)
		w.mu.Lock()
		w.dieLocked(200)
		w.mu.Unlock()
		time.Sleep(time.Minute)
		synctest.Wait()
		w.wantNothing(web, false)
		w.wantNothing(list[0].ID, false)
	})
}

// Containers that the proxy made and Docker started, with nobody there to attach them.
func TestWanted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		label := func(i, pid int, name, value string) string {
			id := w.start(i, pid, name)
			w.mu.Lock()
			defer w.mu.Unlock()
			c := w.containers[id]
			c.Config.Labels = map[string]string{"l": value}
			w.containers[id] = c
			return id
		}
		early, off := label(1, 100, "early", "10.2.1.1/24"), label(2, 200, "off", "none")
		w.start(3, 300, "plain")
		cfg := w.config()
		cfg.WantedLabel = "l"
		cfg.Wanted = func(c docker.Container) (Request, bool) {
			value, ok := c.Config.Labels["l"]
			return Request{Addrs: specs(t, value)}, ok
		}
		m, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		stop := w.run(m)
		defer stop()
		synctest.Wait()
		w.wantPort(early, "10.2.1.1/24")
		w.wantNothing(off, false)
		w.wantNothing(id(3), false)
		late := label(4, 400, "late", "")
		w.tell(docker.Started, late)
		synctest.Wait()
		w.wantPort(late, "10.32.0.1/28")
		// What cannot be attached now is later.
		w.failing("Claim", errDeliver)
		poor := label(5, 500, "poor", "10.2.1.5/24")
		w.tell(docker.Started, poor)
		synctest.Wait()
		w.wantNothing(poor, false)
		w.failing("Claim", nil)
		time.Sleep(lastRetry)
		synctest.Wait()
		w.wantPort(poor, "10.2.1.5/24")
		// Docker tells of starts and then has no answer for a while, with the stream of events as it was.
		w.die(late)
		synctest.Wait()
		w.mu.Lock()
		w.away = true
		w.mu.Unlock()
		slow := label(6, 600, "slow", "10.2.1.6/24")
		label(4, 401, "late", "")
		w.events <- docker.Event{Kind: docker.Started, ID: slow}
		w.events <- docker.Event{Kind: docker.Started, ID: late}
		synctest.Wait()
		w.wantNothing(slow, false)
		w.mu.Lock()
		w.away = false
		w.mu.Unlock()
		time.Sleep(lookAgain)
		synctest.Wait()
		w.wantPort(slow, "10.2.1.6/24")
		w.wantPort(late, "10.32.0.1/28")
	})
}

// Somebody removes a port under us.
func TestPortVanishes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		m := w.manager()
		stop := w.run(m)
		defer stop()
		web := w.start(1, 100, "web")
		w.attach(m, "web", "", "10.32.0.1/28")
		w.DetachPort(web)
		time.Sleep(11 * time.Second)
		synctest.Wait()
		w.wantPort(web, "10.32.0.1/28")
	})
}

// Getting addresses back fails for a while.
func TestRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		m := w.manager()
		stop := w.run(m)
		defer stop()
		web := w.start(1, 100, "web")
		w.attach(m, "web", "", "10.32.0.1/28")
		w.die(web)
		time.Sleep(time.Minute)
		synctest.Wait()
		w.failing("Claim", errDeliver)
		w.block = make(chan struct{})
		w.start(1, 101, "web")
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		// It can be detached all the same, though that waits for the attempt under way.
		other := w.start(2, 200, "other")
		w.failing("Claim", nil)
		w.attach(m, "other", "10.2.1.1/24", "10.2.1.1/24")
		w.wantPort(other, "10.2.1.1/24")
		close(w.block)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		w.wantPort(web, "10.32.0.1/28")
	})
}

func TestExpose(t *testing.T) {
	w := newWorld(t)
	m := w.manager()
	for range 2 {
		got, err := m.Expose(t.Context(), ExposeRequest{})
		if err != nil || !reflect.DeepEqual(got.Addresses, prefixes("10.32.0.1/28")) {
			t.Fatalf("got %v, %v", got, err)
		}
	}
	got, err := m.Expose(t.Context(), ExposeRequest{Addrs: specs(t, "10.2.1.100/24 net:10.3.0.0/24"), FQDN: "Host.mesh.internal", WithoutMasquerade: true})
	if err != nil || !reflect.DeepEqual(got.Addresses, prefixes("10.2.1.100/24 10.3.0.1/24")) {
		t.Fatalf("got %v, %v", got, err)
	}
	if got, err = m.Expose(t.Context(), ExposeRequest{FQDN: "host.example.com"}); err != nil || len(got.Warnings) != 1 {
		t.Errorf("name outside the domain: got %v, %v", got, err)
	}
	if _, err = m.Expose(t.Context(), ExposeRequest{FQDN: "gate.mesh.internal"}); err != nil {
		t.Fatal(err)
	}
	e := w.announced[mesh.OwnerExpose]
	if !reflect.DeepEqual(e.Names, []string{"gate.mesh.internal.", "host.mesh.internal."}) || e.MAC != (mesh.MAC{2, 0xb}) || len(e.Addrs) != 3 {
		t.Errorf("announced is %+v", e)
	}
	want := map[string]bool{"10.32.0.1/28": true, "10.2.1.100/24": false, "10.3.0.1/24": false}
	rules := map[string]bool{}
	for p, masquerade := range w.rules {
		rules[p.String()] = masquerade
	}
	if got := w.manager().Exposed(); !maps.Equal(got, w.rules) {
		t.Errorf("a restart knows of %v, want %v", got, w.rules)
	}
	if !maps.Equal(rules, want) {
		t.Errorf("rules are %v, want %v", rules, want)
	}
	web := w.start(1, 100, "web")
	if _, err := m.Attach(t.Context(), Request{Target: web, Addrs: specs(t, "10.2.1.100/24")}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "by the exposed host") {
		t.Errorf("address of the host: got %v", err)
	}
	before := w.state()
	for _, method := range []string{"Claim", "AddBridgeAddrs", "Expose", "Put", "Bridge"} {
		w.failing(method, errDeliver)
		if _, err := m.Expose(t.Context(), ExposeRequest{Addrs: specs(t, "10.4.0.1/24")}); !errors.Is(err, errDeliver) {
			t.Errorf("%s: got %v", method, err)
		}
		w.failing(method, nil)
		if after := w.state(); after != before {
			t.Errorf("%s: left\n%s\nwas\n%s", method, after, before)
		}
	}
	for addrs, want := range map[string]string{"": "10.32.0.1/28", "10.2.1.100/24 net:10.3.0.0/24": "10.2.1.100/24 10.3.0.1/24"} {
		for i := range 2 {
			got, err := m.Hide(t.Context(), specs(t, addrs))
			if i == 1 {
				want = ""
			}
			if err != nil || !reflect.DeepEqual(got.Addresses, prefixes(want)) {
				t.Errorf("hide %s: got %v, %v, want %s", addrs, got, err, want)
			}
		}
	}
	w.wantNothing(mesh.OwnerExpose, false)
	if len(w.bridge) > 0 || len(w.rules) > 0 {
		t.Errorf("left are %v %v", w.bridge, w.rules)
	}
}

// What the host lost while meshd was away leaves bridge and firewall, when it gets something else.
func TestExposedElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		if _, err := w.manager().Expose(t.Context(), ExposeRequest{}); err != nil {
			t.Fatal(err)
		}
		w.owned[netip.MustParseAddr("10.32.0.1")] = "somebody else"
		m := w.manager()
		stop := w.run(m)
		defer func() { stop() }()
		synctest.Wait()
		want := prefixes("10.32.0.2/28")
		if !reflect.DeepEqual(w.bridge, want) || !maps.Equal(w.rules, map[netip.Prefix]bool{want[0]: true}) || w.owned[netip.MustParseAddr("10.32.0.1")] != "somebody else" {
			t.Errorf("bridge %v, rules %v, owned %v", w.bridge, w.rules, w.owned)
		}
	})
}

func TestOverlapWarns(t *testing.T) {
	w := newWorld(t)
	cfg := w.config()
	cfg.CheckOverlap = func(netip.Prefix) error { return errDeliver }
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	w.start(1, 100, "web")
	got, err := m.Attach(t.Context(), Request{Target: "web", Addrs: specs(t, "net:default 10.2.1.1/24")})
	if err != nil || !reflect.DeepEqual(got.Warnings, []string{errDeliver.Error()}) {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestListAndLookup(t *testing.T) {
	w := newWorld(t)
	m := w.manager()
	list, err := m.List(t.Context(), nil)
	if err != nil || len(list) != 1 || list[0].ID != mesh.OwnerExpose || list[0].MAC.IsZero() {
		t.Errorf("empty list is %+v, %v", list, err)
	}
	web := w.start(1, 100, "web")
	if info, err := m.Lookup(t.Context(), "web"); err != nil || info.FQDN != "web.mesh.internal." || info.Owner != web || info.Addresses != nil {
		t.Errorf("not attached: %+v, %v", info, err)
	}
	w.attach(m, "web", "", "10.32.0.1/28")
	if info, err := m.Lookup(t.Context(), "web"); err != nil || !reflect.DeepEqual(info.Addresses, prefixes("10.32.0.1/28")) {
		t.Errorf("attached: %+v, %v", info, err)
	}
	w.start(2, 200, "plain")
	for target, want := range map[string]int{"web": 1, web[:64]: 1, "plain": 0, "none": 0, mesh.OwnerExpose: 1} {
		if list, err := m.List(t.Context(), []string{target}); err != nil || len(list) != want {
			t.Errorf("%s: %+v, %v, want %d", target, list, err, want)
		}
	}
}

// A container is renamed and another takes the name: what is said of the name is about the other.
func TestRenamed(t *testing.T) {
	w := newWorld(t)
	m := w.manager()
	first := w.start(1, 100, "web")
	w.attach(m, "web", "10.2.1.1/24", "10.2.1.1/24")
	c := w.containers[first]
	c.Name = "/old"
	w.containers[first] = c
	if _, err := m.Detach(t.Context(), "web", nil); !errors.Is(err, docker.ErrNotFound) {
		t.Errorf("nobody has the name: got %v", err)
	}
	second := w.start(2, 200, "web")
	if _, err := m.Detach(t.Context(), "web", specs(t, "10.2.1.1/24")); !errors.Is(err, ErrNotAttached) {
		t.Errorf("the other has the name: got %v", err)
	}
	w.attach(m, "web", "10.2.1.2/24", "10.2.1.2/24")
	if list, err := m.List(t.Context(), []string{"old", "web"}); err != nil || len(list) != 2 || list[0].ID != first || list[1].ID != second {
		t.Errorf("list is %+v, %v", list, err)
	}
}

// What a container makes of its interface is not what it may send from.
func TestPortsAreAsGiven(t *testing.T) {
	w := newWorld(t)
	m := w.manager()
	web := w.start(1, 100, "web")
	w.attach(m, "web", "10.2.1.1/24", "10.2.1.1/24")
	want := w.ports[web].port
	p := w.ports[web]
	p.port.MAC, p.port.Addrs = mesh.MAC{2, 6, 6, 6}, prefixes("10.2.1.1/24 10.2.1.99/24")
	w.ports[web] = p
	if got, err := m.Ports(); err != nil || len(got) != 1 || !reflect.DeepEqual(got[0], want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

// Many callers and events about few containers, for the race detector.
func TestConcurrency(t *testing.T) {
	w := newWorld(t)
	m := w.manager()
	stop := w.run(m)
	var all sync.WaitGroup
	for i := range 4 {
		w.start(i, 100+i, fmt.Sprint("c", i))
		for j := range 4 {
			all.Go(func() {
				for range 20 {
					name := fmt.Sprint("c", i)
					m.Attach(t.Context(), Request{Target: name, Addrs: specs(t, fmt.Sprintf("10.2.%d.%d/24 net:default", i, j+1))})
					m.List(t.Context(), nil)
					m.Detach(t.Context(), name, specs(t, fmt.Sprintf("10.2.%d.%d/24", i, j+1)))
					m.Recheck()
				}
			})
		}
	}
	all.Wait()
	for i := range 4 {
		if _, err := m.Detach(t.Context(), fmt.Sprint("c", i), nil); err != nil {
			t.Error(err)
		}
	}
	stop()
	for i := range 4 {
		w.wantNothing(id(i), false)
	}
	if len(m.locks) > 0 {
		t.Errorf("%d locks are left", len(m.locks))
	}
}

func TestUnreadableRecords(t *testing.T) {
	for _, value := range []string{"", "{}", "[]", `{"Owner":"a"}`, `{"Owner":"x","MAC":"01:00:00:00:00:01"}`, `{"Owner":"x","MAC":"02:00:00:00:00:01","Holds":[{"Spec":"?"}]}`, `{"Owner":"x","MAC":"02:00:00:00:00:01","Holds":[{"Spec":"none","Held":true}]}`} {
		w := newWorld(t)
		w.stored["x"] = []byte(value)
		if _, err := New(w.config()); err == nil || strings.Contains(err.Error(), "%!") {
			t.Errorf("%s: %v", value, err)
		}
	}
}

func FuzzParseRecord(f *testing.F) {
	f.Add([]byte(`{"Owner":"x","MAC":"02:00:00:00:00:01","Holds":[{"Spec":"net:default","Addr":"10.32.0.1/28","Held":true}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRecord(b)
		if err != nil {
			return
		}
		text, err := r.marshal()
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseRecord(text)
		if err != nil || !reflect.DeepEqual(again.Holds, r.Holds) && len(r.Holds) > 0 {
			t.Errorf("%s parses to %+v, %v, want %+v", text, again, err, r)
		}
	})
}

func FuzzParseAddHost(f *testing.F) {
	f.Add("a:10.0.0.1")
	f.Add("a:fe80::1%eth0")
	f.Add(":")
	f.Fuzz(func(t *testing.T, s string) {
		host, a, err := parseAddHost(s)
		if err == nil && (host == "" || !a.IsValid() || strings.ContainsAny(host, "\n #")) {
			t.Errorf("%q: %q %v", s, host, a)
		}
	})
}
