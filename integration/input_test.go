package integration

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"meshd/integration/lab"
)

// reason waits until the host's status says something about another host's address that holds a word.
func (w *world) reason(h *lab.Host, about *lab.Host, words ...string) {
	w.t.Helper()
	var status string
	err := lab.Until(w.ctx, 10*time.Second, h.Name+" to say why", func() bool {
		r, err := h.Report(w.ctx)
		if err != nil {
			return false
		}
		status = ""
		for _, c := range r.Router.Connections {
			if strings.HasPrefix(c.Address, about.Addr.String()+":") {
				status += c.State + " " + c.Error + "\n"
			}
		}
		for _, p := range r.Problems {
			status += p + "\n"
		}
		status += h.Log()
		for _, word := range words {
			if strings.Contains(strings.ToLower(status), word) {
				return true
			}
		}
		return false
	})
	if err != nil {
		w.t.Errorf("%v: none of %q in %s", err, words, status)
	}
}

const secret, wrongSecret = "correct-horse-battery", "wrong-horse-battery"

// TestPassword has one peer with the wrong password and one without.
func TestPassword(t *testing.T) {
	w := newWorld(t, 4, 90*time.Second)
	h1, right, wrong, none := w.Host(1), w.Host(2), w.Host(3), w.Host(4)
	w.launchWith(h1, []string{"MESH_PASSWORD=" + secret})
	w.launchWith(wrong, []string{"MESH_PASSWORD=" + wrongSecret}, h1.Addr.String())
	w.launchWith(none, nil, h1.Addr.String())
	w.launchWith(right, []string{"MESH_PASSWORD=" + secret}, h1.Addr.String())
	_, err := lab.WaitMesh(w.ctx, 10*time.Second, h1, right)
	w.try(err)
	if c := h1.Established(w.ctx)["h2"]; !c.Encrypted {
		t.Errorf("the connection is not encrypted: %+v", c)
	} else if !strings.Contains(c.Reason, "password") {
		t.Errorf("the reason for the userspace path is given as %q", c.Reason)
	}
	c1 := w.netns(h1, "c1", "10.2.1.1/24")
	c2 := w.netns(right, "c2", "10.2.1.2/24")
	c3 := w.netns(wrong, "c3", "10.2.1.3/24")
	c4 := w.netns(none, "c4", "10.2.1.4/24")
	_, err = c1.WaitPing(w.ctx, c2.addr, 5*time.Second)
	w.try(err)
	for _, c := range []*member{c3, c4} {
		if n, _, err := c.Ping(w.ctx, c1.addr, 5, 56); err != nil || n > 0 {
			t.Errorf("%s, which has not the password, got %d answers, %v", c.Host.Name, n, err)
		}
	}
	for _, h := range []*lab.Host{wrong, none} {
		w.reason(h, h1, "password")
		if got := h.Established(w.ctx); len(got) > 0 {
			t.Errorf("%s got in: %v", h.Name, got)
		}
	}
	w.reason(h1, wrong, "password")

	// What crosses the underlay shows nothing of what the containers say, nor do the refused get any of it.
	t.Run("NoCleartext", func(t *testing.T) {
		w := w.in(t)
		marker := []byte("meshd-cleartext-marker-0123456789")
		counts := make(chan [2]int, 3)
		for _, h := range []*lab.Host{h1, wrong, none} {
			f, err := h.OpenFrames("eth0")
			w.try(err)
			defer f.Close()
			go func() {
				all := 0
				clear := f.Collect(2*time.Second, func(frame []byte) bool { all++; return bytes.Contains(frame, marker) })
				counts <- [2]int{all, clear}
			}()
		}
		conn, err := c1.ListenUDP(w.ctx, netip.AddrPortFrom(c1.addr, 0).String())
		w.try(err)
		defer conn.Close()
		for _, dst := range []string{"10.2.1.2:7000", "10.2.1.255:7000", "10.2.1.3:7000", "10.2.1.4:7000"} {
			for range 20 {
				_, err := conn.WriteToUDPAddrPort(marker, netip.MustParseAddrPort(dst))
				w.try(err)
			}
		}
		frames := 0
		for range 3 {
			got := <-counts
			frames += got[0]
			if got[1] > 0 {
				t.Errorf("%d frames on the underlay show the text", got[1])
			}
		}
		if frames < 20 {
			t.Errorf("only %d frames were seen on the underlay at all", frames)
		}
	})
	t.Run("SecretIsNowhere", func(t *testing.T) {
		w := w.in(t)
		report, err := right.Must(w.ctx, "report")
		w.try(err)
		status, err := right.Must(w.ctx, "status")
		w.try(err)
		pid := right.Meshd()
		cmdline, err := right.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		w.try(err)
		environ, err := right.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		w.try(err)
		for what, text := range map[string]string{"report": report, "status": status, "log": right.Log(), "argv": string(cmdline), "environ": string(environ)} {
			if strings.Contains(text, secret) {
				t.Errorf("%s holds the password: %q", what, text)
			}
		}
	})
}

// TestGarbage sends what is no datagram of ours to the port.
func TestGarbage(t *testing.T) {
	w := newWorld(t, 3, time.Minute)
	h1, h2, attacker := w.Host(1), w.Host(2), w.Host(3)
	w.launch(h1)
	w.launch(h2, h1.Addr.String())
	_, err := lab.WaitMesh(w.ctx, 10*time.Second, h1, h2)
	w.try(err)
	c1 := w.netns(h1, "c1", "10.2.1.1/24")
	c2 := w.netns(h2, "c2", "10.2.1.2/24")
	_, err = c1.WaitPing(w.ctx, c2.addr, 5*time.Second)
	w.try(err)
	drops := func() (sum uint64) {
		r, err := h1.Report(w.ctx)
		w.try(err)
		for _, n := range r.Router.Drops {
			sum += n
		}
		return sum
	}
	before, pid := drops(), h1.Meshd()
	p := w.watch(c1, c2, time.Millisecond)
	const count = 20000
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var conn net.Conn
	w.try(attacker.Do(func() (err error) {
		conn, err = net.Dial("udp", netip.AddrPortFrom(h1.Addr, 6783).String())
		return err
	}))
	defer conn.Close()
	sent := 0
	for i := range count {
		msg := make([]byte, random.IntN(1473))
		for j := range msg {
			msg[j] = byte(random.Uint32())
		}
		if len(msg) > 16 && i%2 == 0 { // half of them look like ours
			msg[0] = byte(random.IntN(16))
			binary.BigEndian.PutUint32(msg[4:], random.Uint32N(4))
		}
		if _, err := conn.Write(msg); err == nil {
			sent++
		}
		if i%200 == 199 {
			w.rest(time.Millisecond) // 200,000 a second at most, so that the socket's buffer holds them
		}
	}
	err = lab.Until(w.ctx, 5*time.Second, "the drops to be counted", func() bool { return drops()-before >= uint64(sent)*9/10 })
	if err != nil {
		t.Errorf("%v: %d datagrams of garbage, %d drops", err, sent, drops()-before)
	}
	r := w.end(p)
	t.Logf("%d datagrams of garbage, %d drops; meanwhile between containers: %v", sent, drops()-before, r)
	if h1.Meshd() != pid {
		t.Error("meshd did not survive")
	}
	w.pings(c1, c2, 5, 56)

	// The same for the TCP port: it must close the connection by itself and go on.
	var tcp net.Conn
	w.try(attacker.Do(func() (err error) {
		tcp, err = net.Dial("tcp", netip.AddrPortFrom(h1.Addr, 6783).String())
		return err
	}))
	defer tcp.Close()
	_, _ = tcp.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
	w.try(tcp.SetReadDeadline(time.Now().Add(15 * time.Second)))
	if n, err := tcp.Read(make([]byte, 100)); err == nil || n > 0 || strings.Contains(err.Error(), "timeout") {
		t.Errorf("a stranger on TCP gets %d bytes, %v; want the connection closed", n, err)
	}
	w.pings(c1, c2, 5, 56)
}

// TestRefusedLaunch has the reasons for which meshd cannot start. Each is told, and nothing is left.
func TestRefusedLaunch(t *testing.T) {
	w := newWorld(t, 1, 90*time.Second)
	h := w.Host(1)
	before, err := h.Snapshot(w.ctx)
	w.try(err)
	// refused sets something in the way, wants launch to say each of the words and to leave nothing.
	refused := func(name string, set func() (undo func() error, err error), words ...string) {
		t.Run(name, func(t *testing.T) {
			w := w.in(t)
			undo, err := set()
			w.try(err)
			defer func() { w.try(undo()) }()
			with, err := h.Snapshot(w.ctx)
			w.try(err)
			if r := w.refused(h, 1, words, "launch"); !strings.HasPrefix(r.Stderr, "meshctl: meshd did not start: ") {
				t.Errorf("%s: want the cause first", r)
			}
			if err := lab.Until(w.ctx, time.Second, "meshd to be gone", func() bool { return h.Meshd() == 0 }); err != nil {
				t.Error(err)
				_, _ = h.Ctl(w.ctx, "reset", "--force")
			}
			ignoreState := func(s lab.Snapshot) (out lab.Snapshot) {
				for _, line := range s {
					// A key made at a first start that failed may stay; what runs or is in the kernel may not.
					if !strings.HasPrefix(line, "file: /var/lib/meshd") && !strings.HasPrefix(line, "file: /run/meshd") {
						out = append(out, line)
					}
				}
				return out
			}
			after, err := h.Snapshot(w.ctx)
			w.try(err)
			if diff := ignoreState(with).Diff(ignoreState(after)); len(diff) > 0 {
				t.Errorf("the refused launch left:\n%s", strings.Join(diff, "\n"))
			}
		})
	}
	listener := func(open func() (io.Closer, error)) func() (func() error, error) {
		return func() (undo func() error, err error) {
			err = h.Do(func() error {
				l, err := open()
				if err == nil {
					undo = l.Close
				}
				return err
			})
			return undo, err
		}
	}
	command := func(set, undo string) func() (func() error, error) {
		run := func(line string) error {
			_, err := h.Out(w.ctx, "/bin/sh", "-c", line)
			return err
		}
		return func() (func() error, error) { return func() error { return run(undo) }, run(set) }
	}
	refused("UDPPortTaken", listener(func() (io.Closer, error) { return net.ListenPacket("udp", ":6783") }), "6783", "in use", "held by", "--port")
	refused("TCPPortTaken", listener(func() (io.Closer, error) { return net.Listen("tcp", ":6783") }), "6783", "in use", "held by", "--port")
	refused("StatusPortTaken", listener(func() (io.Closer, error) { return net.Listen("tcp", "127.0.0.1:6782") }), "6782", "held by", "--status-addr")
	refused("StateDamaged", command("mkdir -p /var/lib/meshd && mv /var/lib/meshd/meshd.db /run/ && echo x > /var/lib/meshd/meshd.db", "mv /run/meshd.db /var/lib/meshd/"),
		"/var/lib/meshd/meshd.db", "damaged", "reset --force")
	refused("NoTUN", command("mount -t tmpfs none /dev/net", "umount /dev/net"), "/dev/net/tun")
	refused("BridgeOfWrongKind", command("ip link add mesh type vxlan id 7 dstport 4790 local 198.18.1.2", "ip link del mesh"), "mesh", "vxlan", "--bridge")
	refused("TAPOfWrongKind", command("ip link add mesh-tap type bridge", "ip link del mesh-tap"), "mesh-tap", "bridge", "--tap")
	refused("NameServersPortTaken", func() (func() error, error) {
		_, err := h.Out(w.ctx, "/bin/sh", "-c", "ip link add docker0 type bridge && ip addr add 172.17.0.1/16 dev docker0 && ip link set docker0 up")
		if err != nil {
			return nil, err
		}
		p, err := h.Start(w.ctx, nil, "busybox", "nc", "-l", "-p", "53")
		if err != nil {
			return nil, err
		}
		undo := func() error {
			_, err := h.Out(w.ctx, "ip", "link", "del", "docker0")
			return errors.Join(err, p.Stop(time.Second))
		}
		return undo, lab.Until(w.ctx, 5*time.Second, "port 53 to be taken", func() bool {
			r, err := h.Run(w.ctx, "ss", "-Hltn", "sport = 53")
			return err == nil && r.Stdout != ""
		})
	}, "172.17.0.1:53", "busybox", "pid", "--dns-listen-address", "--no-dns")
	t.Run("NotRoot", func(t *testing.T) {
		w := w.in(t)
		r, err := h.Run(w.ctx, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", w.copyOfMeshctl(), "launch")
		w.try(err)
		if r.Exit != 1 || !strings.Contains(r.Stderr, "root") || r.Stdout != "" {
			t.Errorf("%s: want exit 1 and a word of root", r)
		}
	})
	t.Run("BadOptions", func(t *testing.T) {
		w := w.in(t)
		for _, args := range [][]string{
			{"launch", "--port", "70000"}, {"launch", "--name", "nonsense"}, {"launch", "--ipalloc-range", "10.0.0.0/33"},
			{"launch", "--mtu", "8"}, {"launch", "--no-such-option"}, {"launch", "--resume", "10.0.0.1"},
		} {
			r, err := h.Ctl(w.ctx, args...)
			w.try(err)
			if r.Exit == 0 || r.Stderr == "" || r.Stdout != "" {
				t.Errorf("%s: want a refusal", r)
			}
		}
	})
	_, err = h.Ctl(w.ctx, "reset", "--force")
	w.try(err)
	w.try(h.WaitSame(w.ctx, before))
}

// copyOfMeshctl gives a path of meshctl that any user may run, with meshd beside it.
func (w *world) copyOfMeshctl() string {
	w.t.Helper()
	_, err := w.Host(1).Out(w.ctx, "/bin/sh", "-c", "mkdir -p /etc/bin && cp "+binaries+"/mesh* /etc/bin && chmod -R 755 /etc/bin")
	w.try(err)
	return "/etc/bin/meshctl"
}

// TestBadAddresses tries addresses that nobody can have.
func TestBadAddresses(t *testing.T) {
	w := newWorld(t, 1, time.Minute)
	h := w.Host(1)
	w.launch(h)
	c, err := h.Netns(w.ctx, "c1")
	w.try(err)
	t.Cleanup(func() { w.try(c.Remove(context.Background())) })
	before, err := h.Snapshot(w.ctx)
	w.try(err)
	for _, addr := range []string{
		"10.2.1", "10.2.1.1", "300.2.1.1/24", "10.2.1.1/33", "10.2.1.1/", "/24", "10.2.1.1/-1", "ip:", "ip:10.2.1.1", "net:10.2.1.0", "net:",
		"10.2.1.0/24",   // the network's own
		"10.2.1.255/24", // its broadcast
		"224.1.1.1/24", "127.0.0.1/8", "0.0.0.0/0", "10.2.1.1/24,10.2.1.2/24",
	} {
		r := w.refused(h, 1, nil, "attach", addr, c.Ref)
		if r.Stderr == "" {
			t.Errorf("%s: no message", r)
		}
	}
	w.refused(h, 1, []string{"/run/netns/nosuch"}, "attach", "10.2.1.1/24", "netns:/run/netns/nosuch")
	w.refused(h, 1, []string{"/etc/passwd"}, "attach", "10.2.1.1/24", "netns:/etc/passwd")
	w.refused(h, 1, []string{"999999"}, "attach", "10.2.1.1/24", "pid:999999")
	w.refused(h, 1, []string{"host"}, "attach", "10.2.1.1/24", "pid:1") // the host's own network
	w.try(h.WaitSame(w.ctx, before))

	// By process id, and one address for two containers.
	p, err := c.Start(w.ctx, nil, "sleep", "1000")
	w.try(err)
	defer func() { _ = p.Stop(time.Second) }()
	pids := h.PIDs("sleep")
	ref := fmt.Sprintf("pid:%d", pids[len(pids)-1])
	out, err := h.Must(w.ctx, "attach", "10.2.1.1/24", ref)
	if err != nil || out != "10.2.1.1" {
		t.Errorf("attach to %s: %v %q", ref, err, out)
	}
	other, err := h.Netns(w.ctx, "c2")
	w.try(err)
	t.Cleanup(func() { w.try(other.Remove(context.Background())) })
	w.refused(h, 1, []string{"10.2.1.1"}, "attach", "10.2.1.1/24", other.Ref)
	if out, err := h.Must(w.ctx, "detach", "10.2.1.1/24", ref); err != nil || out != "10.2.1.1" {
		t.Errorf("detach: %v %q", err, out)
	}
	if _, err := other.Attach(w.ctx, "10.2.1.1/24"); err != nil {
		t.Errorf("an address that was given back: %v", err)
	}
}

// TestTargets connects to what is not there.
func TestTargets(t *testing.T) {
	w := newWorld(t, 2, time.Minute)
	h1, h2 := w.Host(1), w.Host(2)
	w.launch(h1)
	bogus := []string{"no-such-host.invalid", "198.18.250.9", h1.Addr.String(), "198.18.2.2:9"}
	for _, target := range bogus {
		if out, err := h1.Must(w.ctx, "connect", target); err != nil || out != "" {
			t.Errorf("connect %s: %v %q", target, err, out)
		}
	}
	out, err := h1.Must(w.ctx, "status", "targets")
	w.try(err)
	for _, target := range bogus {
		if !strings.Contains("\n"+out+"\n", "\n"+target+"\n") {
			t.Errorf("status targets has no line %q: %q", target, out)
		}
	}
	w.try(lab.Until(w.ctx, 20*time.Second, "each target to be seen as tried", func() bool {
		out, err = h1.Must(w.ctx, "status", "connections")
		return err == nil && strings.Contains(out, "no-such-host.invalid") && strings.Contains(out, "198.18.250.9:6783") &&
			strings.Contains(out, "198.18.2.2:9") && strings.Contains(out, h1.Addr.String()+":6783")
	}))
	t.Log(out)
	for line := range strings.Lines(out) {
		if strings.Contains(line, "established") {
			t.Errorf("a connection to nobody: %s", line)
		}
	}
	for _, bad := range []string{"", "host:port", "host:0", "host:70000", "a b", "http://x"} {
		r, err := h1.Ctl(w.ctx, "connect", bad)
		w.try(err)
		if r.Exit != 1 || r.Stderr == "" {
			t.Errorf("connect %q: %s, want a refusal", bad, r)
		}
	}
	// A target that comes up later is found by the retries.
	_, err = h1.Must(w.ctx, append([]string{"forget"}, bogus...)...)
	w.try(err)
	_, err = h1.Must(w.ctx, "connect", "--replace", h2.Addr.String())
	w.try(err)
	if out, err := h1.Must(w.ctx, "status", "targets"); err != nil || out != h2.Addr.String() {
		t.Errorf("targets after --replace: %v %q", err, out)
	}
	w.launch(h2)
	_, err = lab.WaitMesh(w.ctx, 15*time.Second, h1, h2)
	w.try(err)
}

// TestCommandContract has the exit codes and streams that scripts rely on.
func TestCommandContract(t *testing.T) {
	w := newWorld(t, 1, time.Minute)
	h := w.Host(1)
	// stdout and stderr: "" empty, "*" something, else a part of it.
	expect := func(exit int, stdout, stderr string, args ...string) lab.Result {
		t.Helper()
		r, err := h.Ctl(w.ctx, args...)
		w.try(err)
		bad := r.Exit != exit
		for _, x := range []struct{ got, want string }{{r.Stdout, stdout}, {r.Stderr, stderr}} {
			switch x.want {
			case "":
				bad = bad || x.got != ""
			case "*":
				bad = bad || x.got == ""
			default:
				bad = bad || !strings.Contains(x.got, x.want)
			}
		}
		if bad {
			t.Errorf("%s\nwant exit %d, stdout %q, stderr %q", r, exit, stdout, stderr)
		}
		return r
	}
	expect(1, "", "*")
	expect(1, "", "nonsense", "nonsense")
	expect(0, "", "*", "help")
	expect(0, "", "*", "--help")
	expect(0, "", "*", "attach", "--help")
	const unreachable = 7 // as curl has it
	expect(unreachable, "", "not running", "status")
	expect(unreachable, "", "not running", "report")
	expect(unreachable, "", "not running", "attach", "10.2.1.1/24", "nobody")
	expect(1, "", "*", "connect")
	expect(0, "", "*", "stop")
	expect(0, "*", "", "version")
	expect(0, "", "", "env")
	expect(1, "", "*", "env", "--restore")
	for _, removed := range []string{"run", "start", "restart", "launch-router", "launch-proxy", "launch-plugin", "stop-router", "stop-proxy", "stop-plugin"} {
		expect(1, "", "*", removed)
	}
	w.launch(h)
	expect(3, "", "running", "launch")
	r := expect(0, "\n", "", "status")
	if !strings.HasPrefix(r.Stdout, "\n") || !strings.HasSuffix(r.Stdout, "\n\n") {
		t.Errorf("plain status is not between blank lines: %q", r.Stdout)
	}
	for _, label := range []string{"Version", "Name", "Peers", "DefaultSubnet", "Domain"} {
		n := 0
		for line := range strings.Lines(r.Stdout) {
			if strings.HasPrefix(strings.TrimLeft(line, " "), label+": ") {
				n++
			}
		}
		if n != 1 && !(label == "Domain" && n == 0) {
			t.Errorf("status has %d lines %q", n, label)
		}
	}
	expect(1, "", "nonsense", "status", "nonsense")
	expect(0, "h1", "", "status", "peers")
	expect(0, "", "", "status", "targets")
	expect(0, "\n    \"Router\"", "", "report")
	expect(0, "h1", "", "report", "-f", "{{.Router.NickName}}")
	expect(1, "", "*", "report", "-f", "{{.Broken")
	expect(0, "mesh:expose", "", "ps")
	expect(0, "", "", "ps", "nobody")
	expect(0, "", "", "stop")
	expect(0, "", "*", "stop")
	expect(unreachable, "", "not running", "status")
}

// TestForeground runs meshd in the foreground, as systemd does.
func TestForeground(t *testing.T) {
	w := newWorld(t, 1, 30*time.Second)
	h := w.Host(1)
	w.planReset(h)
	var log bytes.Buffer
	p, err := h.Start(w.ctx, func(c *exec.Cmd) { c.Stdout, c.Stderr = &log, &log }, "meshctl", "launch", "--foreground")
	w.try(err)
	err = lab.Until(w.ctx, 10*time.Second, "the daemon to be ready", func() bool {
		r, err := h.Ctl(w.ctx, "status")
		return err == nil && r.Exit == 0
	})
	if err == nil {
		err = p.Stop(5 * time.Second)
	}
	if err == nil {
		err = p.Wait(w.ctx)
	}
	if err != nil {
		t.Errorf("%v\n%s", err, log.String())
	}
	w.try(lab.Until(w.ctx, time.Second, "meshd to be gone", func() bool { return h.Meshd() == 0 }))
}
