package integration

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"meshd/integration/lab"
)

// query asks a name server from inside a container.
func (w *world) query(c *lab.Container, network, server, name string, qtype uint16) *dns.Msg {
	w.t.Helper()
	conn, err := c.Dial(w.ctx, network, server)
	w.try(err)
	defer conn.Close()
	w.try(conn.SetDeadline(time.Now().Add(5 * time.Second)))
	dc := &dns.Conn{Conn: conn, UDPSize: 1232}
	q := new(dns.Msg).SetQuestion(name, qtype)
	w.try(dc.WriteMsg(q))
	a, err := dc.ReadMsg()
	w.try(err)
	return a
}

// addressesOf resolves a name to sorted addresses.
func (w *world) addressesOf(c *lab.Container, server, name string) (addrs []string) {
	w.t.Helper()
	for _, rr := range w.query(c, "udp", server, name, dns.TypeA).Answer {
		if a, ok := rr.(*dns.A); ok {
			addrs = append(addrs, a.A.String())
		}
	}
	slices.Sort(addrs)
	return addrs
}

// waitName waits until a name resolves to exactly these addresses from inside a container.
func (w *world) waitName(c *lab.Container, server, name string, limit time.Duration, want ...string) time.Duration {
	w.t.Helper()
	start := time.Now()
	var got []string
	err := lab.Until(w.ctx, 4*limit, name+" to be "+strings.Join(want, " "), func() bool {
		got = w.addressesOf(c, server, name)
		return slices.Equal(got, want)
	})
	if err != nil {
		w.t.Errorf("on %s: %v: it is %v", c.Host.Name, err, got)
	}
	took := time.Since(start)
	if took > limit {
		w.t.Errorf("on %s: %s took %v, want at most %v", c.Host.Name, name, took, limit)
	}
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
	t.Run("DeathAndReturn", func(t *testing.T) {
		w := w.in(t)
		db, watcher := members[1], members[0].Container
		for range scaled(2, 5) {
			_, err := db.Host.Out(w.ctx, "docker", "kill", db.ID)
			w.try(err)
			took := w.waitName(watcher, dockerDNS, "db.mesh.internal.", 2*time.Second)
			t.Logf("name gone on another host after %v", took)
			_, err = db.Host.Out(w.ctx, "docker", "start", db.ID)
			w.try(err)
			took = w.waitName(watcher, dockerDNS, "db.mesh.internal.", 4*time.Second, db.addr.String())
			t.Logf("and back after %v", took)
			again, err := db.Host.Adopt(w.ctx, db.Name, db.ID)
			w.try(err)
			took, err = members[0].WaitPing(w.ctx, db.addr, 5*time.Second)
			w.try(err)
			w.within("ping of a container that came back", took, time.Second)
			w.pings(members[0], &member{again, db.addr}, 3, 56)
		}
	})
	t.Run("PartitionHeals", func(t *testing.T) {
		w := w.in(t)
		w.try(w.CutOff(w.ctx, w.Host(3)))
		_, err := w.Host(1).Must(w.ctx, "dns-add", "10.2.1.77", "-h", "during.mesh.internal")
		w.try(err)
		_, err = w.Host(2).Must(w.ctx, "dns-remove", "-h", "pool.mesh.internal", "10.2.1.1", "10.2.1.2")
		w.try(err)
		w.rest(5 * time.Second)
		w.try(w.HealAll(w.ctx))
		_, err = lab.WaitMesh(w.ctx, 30*time.Second, w.Hosts...)
		w.try(err)
		w.waitName(members[2].Container, dockerDNS, "during.mesh.internal.", 2*time.Second, "10.2.1.77")
		w.waitName(members[2].Container, dockerDNS, "pool.mesh.internal.", 2*time.Second)
	})
	t.Run("PeerGone", func(t *testing.T) {
		w := w.in(t)
		_, err := w.Host(3).Must(w.ctx, "reset")
		w.try(err)
		w.waitName(members[0].Container, dockerDNS, "app.mesh.internal.", 5*time.Second)
	})
}

// TestNamesOutside has the name server pass on what is not its own, and refuse strangers.
func TestNamesOutside(t *testing.T) {
	w := newWorld(t, 2, time.Minute)
	h, other := w.Host(1), w.Host(2)
	// The other host plays the upstream name server.
	var upstream *dns.Server
	w.try(other.Do(func() error {
		upstream = &dns.Server{Addr: other.Addr.String() + ":53", Net: "udp", Handler: dns.HandlerFunc(func(rw dns.ResponseWriter, q *dns.Msg) {
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
	w.launch(h)
	c, err := h.Docker(w.ctx, "c1")
	w.try(err)
	defer func() { w.try(c.Remove(context.Background())) }()
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
