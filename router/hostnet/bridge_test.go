package hostnet

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"meshd/mesh"
)

func TestEnsureBridge(t *testing.T) {
	ns := newNamespace(t)
	h := openHost(t, ns, Config{})
	mac := mesh.MAC{2, 0, 0, 0, 0, 9}
	var before string
	for i := range 2 {
		got, err := h.EnsureBridge(BridgeSpec{MTU: 1410, MAC: mac})
		if err != nil {
			t.Fatal(err)
		}
		if got != mac {
			t.Errorf("MAC is %v, want %v", got, mac)
		}
		now := dump(t, ns)
		if i == 0 {
			before = now
		} else if diff := changes(before, now); diff != "" {
			t.Errorf("the second time changed\n%s", diff)
		}
	}
	if !strings.Contains(before, "mtu 1410") || !strings.Contains(before, "mcast_snooping 0") {
		t.Error(before)
	}
	// A restart adopts, and may change.
	if got, err := openHost(t, ns, Config{}).EnsureBridge(BridgeSpec{}); err != nil || got != mac {
		t.Errorf("restart: got %v, %v, want %v", got, err, mac)
	}
	mac[5]++
	if got, err := h.EnsureBridge(BridgeSpec{MAC: mac, MTU: 1300}); err != nil || got != mac {
		t.Errorf("change: got %v, %v, want %v", got, err, mac)
	}
	if err := h.Reset(); err != nil {
		t.Fatal(err)
	}
	wantLinks(t, ns)
}

// The bridge's address does not follow its ports.
func TestBridgeKeepsMAC(t *testing.T) {
	ns := newNamespace(t)
	h := openHost(t, ns, Config{})
	mac, err := h.EnsureBridge(BridgeSpec{})
	if err != nil {
		t.Fatal(err)
	}
	run(t, ns, "ip link add low type veth peer name far")
	run(t, ns, "ip link set low address 00:00:00:00:00:02")
	run(t, ns, "ip link set low master mesh")
	if now, _, err := h.Bridge(); err != nil || now != mac {
		t.Errorf("MAC is %v, %v, was %v", now, err, mac)
	}
}

func TestBridgeOfOthers(t *testing.T) {
	ns := newNamespace(t)
	h := openHost(t, ns, Config{Bridge: "br0"})
	addBridge(t, h, "br0")
	run(t, ns, "ip addr add 192.168.7.1/24 dev br0")
	if _, err := h.EnsureBridge(BridgeSpec{}); err != nil {
		t.Fatal(err)
	}
	tap, err := h.OpenTAP(1)
	if err != nil {
		t.Fatal(err)
	}
	tap.Close()
	if err := h.Reset(); err != nil {
		t.Fatal(err)
	}
	wantLinks(t, ns, "br0")
}

func TestWrongKinds(t *testing.T) {
	ns := newNamespace(t)
	h := openHost(t, ns, Config{})
	run(t, ns, "ip link add mesh type veth peer name other")
	if _, err := h.EnsureBridge(BridgeSpec{}); err == nil || !strings.Contains(err.Error(), "device mesh exists and is a veth, not a bridge") {
		t.Errorf("got %v", err)
	}
	run(t, ns, "ip link del mesh")
	if _, err := h.EnsureBridge(BridgeSpec{}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ add, del, want string }{
		{"ip link add mesh-tap type veth peer name other", "ip link del mesh-tap", "device mesh-tap exists and is a veth, not a TAP"},
		{"ip tuntap add mesh-tap mode tun multi_queue", "ip tuntap del mesh-tap mode tun multi_queue", "not a TAP"},
		{"ip tuntap add mesh-tap mode tap", "ip tuntap del mesh-tap mode tap", "single queue"},
	} {
		run(t, ns, c.add)
		if _, err := h.OpenTAP(1); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", c.add, err, c.want)
		}
		run(t, ns, c.del)
	}
	wantLinks(t, ns, "mesh")
}

func TestConfigNames(t *testing.T) {
	for _, cfg := range []Config{
		{Bridge: "with blank"}, {TAP: "sixteen-bytes-xx"}, {Inside: "a/b"}, {PortPrefix: "toolongg"}, {VXLAN: "a:b"}, {DockerBridge: ".."},
	} {
		if h, err := Open(cfg); err == nil {
			h.Close()
			t.Errorf("%+v is accepted", cfg)
		}
	}
}

func TestWatch(t *testing.T) {
	h, ns := newHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	states := make(chan State, 100)
	done := make(chan error, 1)
	go func() { done <- h.Watch(ctx, func(s State) { states <- s }) }()
	next := func(what string, ok func(State) bool) {
		t.Helper()
		deadline := time.After(5 * time.Second)
		for {
			select {
			case s := <-states:
				if ok(s) {
					return
				}
			case <-deadline:
				t.Fatalf("no report of %s", what)
			}
		}
	}
	next("the missing TAP", func(s State) bool { return slices.Equal(s.Missing, []string{"mesh-tap"}) && s.Foreign == nil })
	tap, err := h.OpenTAP(1)
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	next("the TAP", func(s State) bool { return s.Missing == nil })
	run(t, ns, "ip link add vm1 type veth peer name vm1-far")
	run(t, ns, "ip link set vm1 master mesh")
	next("a foreign port", func(s State) bool { return slices.Equal(s.Foreign, []string{"vm1"}) })
	addBridge(t, h, "br-0123456789ab")
	addBridge(t, h, "docker0")
	addBridge(t, h, "br-lan")
	next("Docker's bridges", func(s State) bool { return slices.Equal(s.Docker, []string{"br-0123456789ab", "docker0"}) })
	inside := newNamespace(t)
	if err := h.AttachPort(inside, testPort(1)); err != nil {
		t.Fatal(err)
	}
	next("a port of ours", func(s State) bool { return len(s.Ports) == 1 && len(s.Foreign) == 1 })
	// More changes than fit the socket's buffer.
	for range 300 {
		for _, c := range []string{"vm1", "vm1-far"} {
			l, err := h.nl.LinkByName(c)
			if err != nil {
				t.Fatal(err)
			}
			h.nl.LinkSetUp(l)
			h.nl.LinkSetDown(l)
		}
	}
	run(t, ns, "ip link del vm1")
	next("the foreign port gone", func(s State) bool { return s.Foreign == nil })
	run(t, ns, "ip link set mesh-tap nomaster")
	next("the TAP off the bridge", func(s State) bool { return slices.Equal(s.Missing, []string{"mesh-tap"}) })
	run(t, ns, "ip link del mesh")
	next("the missing bridge", func(s State) bool { return slices.Contains(s.Missing, "mesh") })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Watch ended with %v", err)
	}
}

func TestCheckOverlap(t *testing.T) {
	h, ns := newHost(t)
	want := func(r, route, free string) {
		t.Helper()
		err := h.CheckOverlap(prefixes(r)[0])
		var o *Overlap
		if route == "" {
			if err != nil {
				t.Errorf("%s: %v", r, err)
			}
			return
		}
		if !errors.As(err, &o) || o.Route.Dst.String() != route || o.Free.String() != free {
			t.Errorf("%s: got %v, want a conflict with %s and %s free", r, err, route, free)
		}
	}
	want("10.32.0.0/12", "", "")
	run(t, ns, "ip link add out type veth peer name far")
	run(t, ns, "ip link set out up")
	run(t, ns, "ip addr add 10.33.1.1/24 dev out")
	run(t, ns, "ip route add default via 10.33.1.2")
	want("10.32.0.0/12", "10.33.1.0/24", "10.240.0.0/12")
	want("10.48.0.0/12", "", "")
	want("0.0.0.0/1", "10.33.1.0/24", "10.240.0.0/12")
	// Routes over our bridge are ours.
	if err := h.AddBridgeAddrs(prefixes("10.64.0.1/12")...); err != nil {
		t.Fatal(err)
	}
	want("10.64.0.0/12", "", "")
	want("fd00::/64", "", "")
	run(t, ns, "ip route add 10.0.0.0/8 dev out")
	want("10.64.0.0/12", "10.0.0.0/8", "172.16.0.0/12")
}

func TestFreeRange(t *testing.T) {
	for _, c := range []struct{ routes, want string }{
		{"", "10.240.0.0/12"},
		{"0.0.0.0/0", "10.240.0.0/12"},
		{"10.0.0.0/8", "172.16.0.0/12"},
		{"10.0.0.0/8 172.16.5.0/24", "172.24.0.0/13"},
		{"10.0.0.0/8 172.16.0.0/12", "192.168.0.0/16"},
		{"10.0.0.0/8 172.16.0.0/12 192.168.1.0/24", "invalid Prefix"},
		{"10.240.0.1/32 10.224.0.0/12", "10.208.0.0/12"},
	} {
		var routes []Route
		for _, p := range prefixes(strings.Fields(c.routes)...) {
			routes = append(routes, Route{Dst: p})
		}
		if got, _ := freeRange(routes); got.String() != c.want {
			t.Errorf("with %q: got %v, want %s", c.routes, got, c.want)
		}
	}
}
