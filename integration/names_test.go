package integration

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"meshd/integration/lab"
)

// ask asks a name server from inside a container.
func ask(ctx context.Context, c *lab.Container, network, server, name string, qtype uint16) (*dns.Msg, error) {
	conn, err := c.Dial(ctx, network, server)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return nil, err
	}
	dc := &dns.Conn{Conn: conn, UDPSize: 1232}
	if err := dc.WriteMsg(new(dns.Msg).SetQuestion(name, qtype)); err != nil {
		return nil, err
	}
	return dc.ReadMsg()
}

func (w *world) query(c *lab.Container, network, server, name string, qtype uint16) *dns.Msg {
	w.t.Helper()
	a, err := ask(w.ctx, c, network, server, name, qtype)
	w.try(err)
	return a
}

// addressesIn gives the addresses of an answer in their order.
func addressesIn(m *dns.Msg) (addrs []string) {
	for _, rr := range m.Answer {
		if a, ok := rr.(*dns.A); ok {
			addrs = append(addrs, a.A.String())
		}
	}
	return addrs
}

// addressesOf resolves a name to sorted addresses.
func (w *world) addressesOf(c *lab.Container, server, name string) (addrs []string) {
	w.t.Helper()
	return slices.Sorted(slices.Values(addressesIn(w.query(c, "udp", server, name, dns.TypeA))))
}

// waitName waits until a name resolves to exactly these addresses from inside a container.
func (w *world) waitName(c *lab.Container, server, name string, limit time.Duration, want ...string) time.Duration {
	w.t.Helper()
	return w.waitNames([]*lab.Container{c}, server, limit, map[string][]string{name: want})[0]
}

// waitNames waits until names resolve to exactly these sorted addresses from inside each of the containers, and
// says how long that took there.
func (w *world) waitNames(from []*lab.Container, server string, limit time.Duration, want map[string][]string) []time.Duration {
	w.t.Helper()
	start := time.Now()
	took := make([]time.Duration, len(from))
	var wg sync.WaitGroup
	for i, c := range from {
		wg.Go(func() {
			var wrong string
			err := lab.Until(w.ctx, 4*limit, "names to be right", func() bool {
				for name, addrs := range want {
					m, err := ask(w.ctx, c, "udp", server, name, dns.TypeA)
					if err != nil {
						wrong = err.Error()
						return false
					}
					if got := slices.Sorted(slices.Values(addressesIn(m))); !slices.Equal(got, addrs) {
						wrong = fmt.Sprintf("%s is %v, not %v", name, got, addrs)
						return false
					}
				}
				return true
			})
			took[i] = time.Since(start).Round(time.Millisecond)
			if err != nil {
				w.t.Errorf("on %s: %v: %s", c.Host.Name, err, wrong)
			} else if took[i] > limit {
				w.t.Errorf("on %s: %v took %v, want at most %v", c.Host.Name, want, took[i], limit)
			}
		})
	}
	wg.Wait()
	return took
}

// dockerDNS is where the name server listens for containers of a host with Docker's default bridge.
const dockerDNS = "172.17.0.1:53"

// TestNamesAcrossDockerHosts has containers find each other on three hosts with dockerds.
func TestNamesAcrossDockerHosts(t *testing.T) {
	w := newWorld(t, 3, 2*time.Minute)
	w.docker(w.Hosts...)
	w.mesh()
	var members []*member
	for i, h := range w.Hosts {
		name := []string{"web", "db", "app"}[i]
		addr := netip.AddrFrom4([4]byte{10, 2, 1, byte(i + 1)})
		c, err := h.Docker(w.ctx, name, "--hostname", name+".mesh.internal", "--dns", "172.17.0.1", "--dns-search", "mesh.internal")
		w.try(err)
		members = append(members, w.member(c, addr.String()+"/24"))
	}
	t.Run("EveryNameEverywhere", func(t *testing.T) {
		w := w.in(t)
		for _, c := range members {
			for _, other := range members {
				w.waitName(c.Container, dockerDNS, other.Name+".mesh.internal.", 2*time.Second, other.addr.String())
			}
		}
		r, err := members[2].Exec(w.ctx, "nslookup", "web.mesh.internal")
		if err != nil || r.Exit != 0 || !strings.Contains(r.Stdout, "10.2.1.1") {
			t.Errorf("nslookup in a container: %v %s", err, r)
		}
	})
	t.Run("Types", func(t *testing.T) {
		w := w.in(t)
		for _, c := range []struct {
			name   string
			qtype  uint16
			rcode  int
			answer string
		}{
			{"web.mesh.internal.", dns.TypeAAAA, dns.RcodeSuccess, ""},
			{"web.mesh.internal.", dns.TypeMX, dns.RcodeSuccess, ""},
			{"WEB.mesh.INTERNAL.", dns.TypeA, dns.RcodeSuccess, "10.2.1.1"},
			{"web.", dns.TypeA, dns.RcodeSuccess, "10.2.1.1"},
			{"nobody.mesh.internal.", dns.TypeA, dns.RcodeNameError, ""},
			{"1.1.2.10.in-addr.arpa.", dns.TypePTR, dns.RcodeSuccess, "web.mesh.internal."},
		} {
			for _, network := range []string{"udp", "tcp"} {
				a := w.query(members[1].Container, network, dockerDNS, c.name, c.qtype)
				text := ""
				for _, rr := range a.Answer {
					text += rr.String()
				}
				if a.Rcode != c.rcode || (c.answer == "") != (text == "") || !strings.Contains(text, c.answer) {
					t.Errorf("%s %s over %s: %s %q, want %s %q", c.name, dns.TypeToString[c.qtype], network,
						dns.RcodeToString[a.Rcode], text, dns.RcodeToString[c.rcode], c.answer)
				}
				if len(a.Question) != 1 || a.Question[0].Name != c.name {
					t.Errorf("%s: the question came back as %v", c.name, a.Question)
				}
			}
		}
	})
	t.Run("DNSAdd", func(t *testing.T) {
		w := w.in(t)
		h := w.Host(2)
		for _, addr := range []string{"10.2.1.1", "10.2.1.2", "10.9.9.9"} {
			_, err := h.Must(w.ctx, "dns-add", addr, "-h", "pool.mesh.internal")
			w.try(err)
		}
		w.waitName(members[0].Container, dockerDNS, "pool.mesh.internal.", 2*time.Second, "10.2.1.1", "10.2.1.2", "10.9.9.9")
		out, err := w.Host(3).Must(w.ctx, "dns-lookup", "pool")
		if err != nil || len(strings.Fields(out)) != 3 {
			t.Errorf("dns-lookup: %v %q", err, out)
		}
		_, err = h.Must(w.ctx, "dns-remove", "10.9.9.9", "-h", "pool.mesh.internal")
		w.try(err)
		w.waitName(members[2].Container, dockerDNS, "pool.mesh.internal.", 2*time.Second, "10.2.1.1", "10.2.1.2")
		w.refused(h, 1, []string{"mesh.internal"}, "dns-add", "10.2.1.1", "-h", "pool.example.com")
		out, err = h.Must(w.ctx, "dns-args")
		if err != nil || !strings.HasPrefix(out, "--dns=172.17.0.1 --dns-search=mesh.internal") {
			t.Errorf("dns-args: %v %q", err, out)
		}
	})
	outer := w // for containers that outlive a subtest
	everywhere := []*lab.Container{members[0].Container, members[1].Container, members[2].Container}
	t.Run("DeathAndReturn", func(t *testing.T) {
		w := w.in(t)
		app := members[2]
		outer.another(app, "db2", "10.2.1.22/24", "db") // one of two that bear the name
		for round := range 5 {
			start := time.Now()
			_, err := app.Host.Out(w.ctx, "docker", "kill", "db2")
			w.try(err)
			killed := time.Since(start)
			gone := w.waitNames(everywhere, dockerDNS, 2*time.Second, map[string][]string{"db.mesh.internal.": {"10.2.1.2"}})
			_, err = app.Host.Out(w.ctx, "docker", "start", "db2")
			w.try(err)
			back := w.waitNames(everywhere, dockerDNS, 2*time.Second, map[string][]string{"db.mesh.internal.": {"10.2.1.2", "10.2.1.22"}})
			t.Logf("round %d: docker kill took %v; from its end the name was gone after %v, and back %v after docker start", round+1, killed.Round(time.Millisecond), gone, back)
		}
		again, err := app.Host.Adopt(w.ctx, "db2", "db2")
		w.try(err)
		twin := &member{again, netip.MustParseAddr("10.2.1.22")}
		took, err := members[0].WaitPing(w.ctx, twin.addr, 5*time.Second)
		w.try(err)
		w.within("ping of a container that came back", took, time.Second)
		w.pings(members[0], twin, 3, 56)
	})
	t.Run("PartitionHeals", func(t *testing.T) {
		w := w.in(t)
		h1, h2, h3 := w.Host(1), w.Host(2), w.Host(3)
		w.try(w.CutOff(w.ctx, h3))
		start := time.Now()
		// The name db has a holder on either side: what a peer that is not to be reached holds comes last.
		last := func(c *lab.Container, want string) bool {
			for range 10 {
				m, err := ask(w.ctx, c, "udp", dockerDNS, "db.mesh.internal.", dns.TypeA)
				if err != nil {
					return false
				}
				if got := addressesIn(m); len(got) != 2 || got[1] != want {
					return false
				}
			}
			return true
		}
		w.try(lab.Until(w.ctx, 20*time.Second, "the suspected peers' addresses to come last", func() bool {
			return last(everywhere[0], "10.2.1.22") && last(everywhere[2], "10.2.1.2")
		}))
		t.Logf("addresses of suspected peers come last after %v", time.Since(start).Round(time.Millisecond))
		for _, c := range []struct {
			host *lab.Host
			args []string
		}{
			{h1, []string{"meshctl", "dns-add", "10.2.1.77", "-h", "during.mesh.internal"}},
			{h3, []string{"meshctl", "dns-add", "10.2.1.78", "-h", "during.mesh.internal"}},
			{h2, []string{"meshctl", "dns-remove", "-h", "pool.mesh.internal", "10.2.1.1", "10.2.1.2"}},
			{h3, []string{"meshctl", "dns-add", "10.2.1.3", "-h", "pool.mesh.internal"}},
			{h2, []string{"docker", "kill", "db"}},
			{h3, []string{"docker", "kill", "db2"}},
		} {
			_, err := c.host.Out(w.ctx, c.args...)
			w.try(err)
		}
		outer.another(members[2], "late", "10.2.1.33/24", "late")
		w.waitName(everywhere[2], dockerDNS, "web.mesh.internal.", 2*time.Second, "10.2.1.1")
		w.waitName(everywhere[0], dockerDNS, "app.mesh.internal.", 2*time.Second, "10.2.1.3")
		w.try(w.HealAll(w.ctx))
		took, err := lab.WaitMesh(w.ctx, 30*time.Second, w.Hosts...)
		w.try(err)
		// The container db has died: who still asks is on the other two hosts.
		right := w.waitNames([]*lab.Container{everywhere[0], everywhere[2]}, dockerDNS, 2*time.Second, map[string][]string{
			"web.mesh.internal.": {"10.2.1.1"}, "app.mesh.internal.": {"10.2.1.3"}, "late.mesh.internal.": {"10.2.1.33"}, "db.mesh.internal.": nil,
			"during.mesh.internal.": {"10.2.1.77", "10.2.1.78"}, "pool.mesh.internal.": {"10.2.1.3"},
		})
		t.Logf("the mesh was whole %v after the cut was mended, and names right %v later", took.Round(time.Millisecond), right)
	})
	t.Run("PeerGone", func(t *testing.T) {
		w := w.in(t)
		_, err := w.Host(3).Must(w.ctx, "reset")
		w.try(err)
		w.waitName(members[0].Container, dockerDNS, "app.mesh.internal.", 5*time.Second)
	})
}

// another runs one more container on m's host, with this host name in the domain, and attaches it.
func (w *world) another(m *member, name, addr, hostname string) {
	w.t.Helper()
	c, err := m.Host.Docker(w.ctx, name, "--hostname", hostname+".mesh.internal")
	w.try(err)
	w.member(c, addr)
}

// TestNamesOutside has the name server pass on what is not its own, and refuse strangers.
func TestNamesOutside(t *testing.T) {
	w := newWorld(t, 2, time.Minute)
	h, other := w.Host(1), w.Host(2)
	// The other host plays the upstream name server.
	var upstream *dns.Server
	var asked atomic.Int32
	w.try(other.Do(func() error {
		upstream = &dns.Server{Addr: other.Addr.String() + ":53", Net: "udp", Handler: dns.HandlerFunc(func(rw dns.ResponseWriter, q *dns.Msg) {
			asked.Add(1)
			a := new(dns.Msg).SetReply(q)
			rr, err := dns.NewRR(q.Question[0].Name + " 60 IN A 203.0.113.5")
			if err == nil {
				a.Answer = append(a.Answer, rr)
			}
			_ = rw.WriteMsg(a)
		})}
		started := make(chan struct{})
		upstream.NotifyStartedFunc = func() { close(started) }
		pc, err := net.ListenPacket("udp", upstream.Addr)
		if err != nil {
			return err
		}
		upstream.PacketConn = pc
		go func() { _ = upstream.ActivateAndServe() }()
		<-started
		return nil
	}))
	defer func() { w.try(upstream.ShutdownContext(context.Background())) }()
	w.try(h.WriteFile("/etc/resolv.conf", []byte("nameserver 198.18.250.250\nnameserver "+other.Addr.String()+"\n"), 0o644))
	w.docker(h)
	gateways := map[string]string{} // of users' networks
	boxes := map[string]*lab.Container{}
	for _, name := range []string{"open", "closed"} {
		args := []string{"docker", "network", "create", name}
		if name == "closed" {
			args = append(args, "--internal")
		}
		_, err := h.Out(w.ctx, args...)
		w.try(err)
		_, err = h.Out(w.ctx, "docker", "run", "--rm", "--network", name, lab.Image, "true") // its bridge is as it stays
		w.try(err)
		gateways[name], err = h.Out(w.ctx, "docker", "network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", name)
		w.try(err)
	}
	w.launch(h, "--dns-listen-address", ":53") // so that networks without a way to Docker's bridge find it too
	c, err := h.Docker(w.ctx, "c1")
	w.try(err)
	defer func() { w.try(c.Remove(context.Background())) }()
	_, err = h.Must(w.ctx, "dns-add", "10.2.1.1", "-h", "pool.mesh.internal")
	w.try(err)
	for name := range gateways {
		box, err := h.Docker(w.ctx, name, "--network", name)
		w.try(err)
		defer func() { w.try(box.Remove(context.Background())) }()
		boxes[name] = box
		if got := w.addressesOf(box, gateways[name]+":53", "pool.mesh.internal."); !slices.Equal(got, []string{"10.2.1.1"}) {
			t.Errorf("from network %s a name of the mesh is %v", name, got)
		}
	}
	w.waitName(boxes["open"], gateways["open"]+":53", "www.example.org.", 3*time.Second, "203.0.113.5") // first Docker is asked what kind of network that is
	before := asked.Load()
	for _, network := range []string{"udp", "tcp"} {
		for _, name := range []string{"www.example.net.", "www.example.org."} { // unknown, and known by now
			if a := w.query(boxes["closed"], network, gateways["closed"]+":53", name, dns.TypeA); a.Rcode != dns.RcodeRefused {
				t.Errorf("an isolated container that asks for an outside name by %s gets %v", network, a)
			}
		}
	}
	if n := asked.Load() - before; n != 0 {
		t.Errorf("the upstream name server was asked %d times for an isolated container", n)
	}
	start := time.Now()
	if got := w.addressesOf(c, dockerDNS, "www.example.com."); !slices.Equal(got, []string{"203.0.113.5"}) {
		t.Errorf("an outside name is %v", got)
	}
	w.within("outside name with a dead first server", time.Since(start), 500*time.Millisecond)
	for _, server := range []string{h.Addr.String() + ":53"} {
		self, err := other.Self()
		w.try(err)
		conn, err := self.Dial(w.ctx, "udp", server)
		w.try(err)
		w.try(conn.SetDeadline(time.Now().Add(500 * time.Millisecond)))
		dc := &dns.Conn{Conn: conn}
		_ = dc.WriteMsg(new(dns.Msg).SetQuestion("c1.mesh.internal.", dns.TypeA))
		if a, err := dc.ReadMsg(); err == nil && a.Rcode != dns.RcodeRefused {
			t.Errorf("a stranger on the underlay gets an answer: %v", a)
		}
		w.try(conn.Close())
	}
}
