package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"meshd/control"
	"meshd/mesh"
)

// daemon stands in for meshd: it writes down what it was asked.
type daemon struct {
	report control.Report
	server netip.AddrPort
	primed chan struct{}   // what Prime waits for, if not nil
	both   *sync.WaitGroup // what RemovePeer waits for, if not nil

	mu    sync.Mutex
	calls []string
	err   error
}

func (d *daemon) call(format string, args ...any) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, fmt.Sprintf(format, args...))
	return d.err
}

func (d *daemon) Report() control.Report { return d.report }

func (d *daemon) Connect(targets []string, replace bool) error {
	if slices.Contains(targets, "bad..name") {
		return errors.New(`"bad..name" cannot be resolved`)
	}
	return d.call("connect %v %v", targets, replace)
}
func (d *daemon) Forget(targets []string) error { return d.call("forget %v", targets) }

func (d *daemon) Prime(ctx context.Context) error {
	if d.primed != nil {
		<-d.primed
	}
	if deadline, ok := ctx.Deadline(); ok {
		return d.call("prime for %s", time.Until(deadline).Round(time.Second))
	}
	return d.call("prime")
}
func (d *daemon) Leave(context.Context) error { return d.call("leave") }
func (d *daemon) RemovePeer(_ context.Context, peer string) (int, error) {
	if peer == "broken" {
		return 0, errors.New("the disk is full")
	}
	if d.both != nil { // who was removed first is taken over when the other one is not waited for any more
		d.both.Done()
		d.both.Wait()
	}
	return len(peer), d.call("rmpeer %s", peer)
}
func (d *daemon) Repair(context.Context) (string, error) {
	return "renumber c1: 10.32.0.1\n", d.call("repair")
}

// passwords are those of a daemon; Names has methods of the same names.
type passwords struct{ d *daemon }

func (p passwords) Add(password string) (string, error) {
	return "0a0b0c0d", p.d.call("password add %s", password)
}
func (p passwords) Use(id string) error    { return p.d.call("password use %s", id) }
func (p passwords) Remove(id string) error { return p.d.call("password remove %s", id) }
func (p passwords) List() []control.Password {
	return []control.Password{{ID: "0a0b0c0d", InUse: true}, {ID: "01020304"}}
}

func (d *daemon) Add(_ context.Context, r control.NameRequest) error {
	return d.call("add %s %v %q", r.Container, r.Addrs, r.FQDN)
}
func (d *daemon) Remove(_ context.Context, r control.NameRequest) error {
	return d.call("remove %s %v %q", r.Container, r.Addrs, r.FQDN)
}
func (d *daemon) Domain() string         { return "mesh.internal." }
func (d *daemon) Server() netip.AddrPort { return d.server }

var twoAddrs = control.Changed{Addresses: []netip.Prefix{netip.MustParsePrefix("10.2.1.1/24"), netip.MustParsePrefix("10.32.0.1/12")}}

func (d *daemon) Attach(_ context.Context, r control.AttachRequest) (control.Changed, error) {
	c := twoAddrs
	if r.Container == "odd" {
		c.Warnings = []string{"10.2.1.0/24 overlaps a route of this host"}
	}
	return c, d.call("attach %+v", r)
}
func (d *daemon) Detach(_ context.Context, r control.DetachRequest) (control.Changed, error) {
	return twoAddrs, d.call("detach %+v", r)
}
func (d *daemon) Expose(_ context.Context, r control.ExposeRequest) (control.Changed, error) {
	return twoAddrs, d.call("expose %+v", r)
}
func (d *daemon) Hide(_ context.Context, r control.HideRequest) (control.Changed, error) {
	return control.Changed{}, d.call("hide %+v", r)
}
func (d *daemon) List(_ context.Context, containers []string) ([]control.Attached, error) {
	return []control.Attached{
		{ID: mesh.OwnerExpose, MAC: mesh.MAC{2, 0, 0, 0, 0, 1}},
		{ID: "eebd81120ee4a0c2b9", MAC: mesh.MAC{2, 0, 0, 0, 0, 2}, Addresses: twoAddrs.Addresses},
	}, d.call("ps %v", containers)
}

// everything is a daemon with all features, and some problems.
func everything(t *testing.T) *daemon {
	name, err := mesh.ParsePeerName("::1")
	if err != nil {
		t.Fatal(err)
	}
	return &daemon{server: netip.MustParseAddrPort("172.17.0.1:53"), report: control.Report{
		Ready: true, Version: "1.2.3", Problems: []string{"the kernel path is not in use: no vxlan"},
		Router: &control.Router{Name: name, NickName: "host1", Targets: []string{"host2", "host3"}},
		IPAM:   &control.IPAM{Status: control.IPAMReady, DefaultSubnet: "10.32.0.0/12"},
		DNS: &control.DNS{Domain: "mesh.internal.", Entries: []control.DNSEntry{
			{Hostname: "web.mesh.internal.", Address: "10.32.0.1", ContainerID: "c1"},
			{Hostname: "web.mesh.internal.", Address: "10.32.0.2", ContainerID: "c2"},
			{Hostname: "web.mesh.internal.", Address: "10.32.0.2", ContainerID: "c3"},
		}},
		Proxy: &control.Proxy{Addresses: []string{"unix:///run/meshd/docker.sock"}},
	}}
}

// serve runs the API of d until the test ends, and returns the path of its socket.
func serve(t *testing.T, d *daemon, bare bool) string {
	t.Helper()
	back := control.Backends{Reporter: d}
	if !bare {
		back = control.Backends{Reporter: d, Peers: d, Ring: d, Names: d, Attachments: d, Exposure: d, Passwords: passwords{d}}
	}
	path := filepath.Join(t.TempDir(), "meshd.sock")
	s, err := control.Listen(control.Config{Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Socket: path}, back)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path
}

// ctl runs one command line.
func ctl(t *testing.T, env map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	a := &app{stdin: strings.NewReader("from stdin\n"), stdout: &out, stderr: &errs, patience: time.Minute, env: func(name string) (string, bool) { v, ok := env[name]; return v, ok }}
	code = a.run(t.Context(), args)
	return code, out.String(), errs.String()
}

func TestCommands(t *testing.T) {
	d := everything(t)
	env := map[string]string{"MESH_SOCKET": serve(t, d, false)}
	const usage = "<usage>" // standard error holds the usage after what comes before
	for _, c := range []struct {
		line   string
		code   int
		stdout string
		stderr string
		call   string
	}{
		{"connect host2 host3:6783", 0, "", "", "connect [host2 host3:6783] false"},
		{"connect --replace host2", 0, "", "", "connect [host2] true"},
		{"connect --replace", 0, "", "", "connect [] true"},
		{"connect", 1, "", "meshctl: connect needs a peer\n" + usage, ""},
		{"connect bad..name", 1, "", "\"bad..name\" cannot be resolved\n", ""},
		{"connect --bogus x", 1, "", "meshctl: unknown flag: --bogus\n" + usage, ""},
		{"forget host2", 0, "", "", "forget [host2]"},
		{"forget", 1, "", "meshctl: forget needs a peer, as it was given\n" + usage, ""},
		{"prime", 0, "", "", "prime"},
		{"prime --timeout 30s", 0, "", "", "prime for 30s"},
		{"--timeout 30s prime", 0, "", "", "prime for 30s"},
		{"--local prime", 0, "", "", "prime"},
		{"prime x", 1, "", "meshctl: prime takes no arguments, and \"x\" is one\n" + usage, ""},
		{"rmpeer ab abc", 0, "2 IPs taken over from ab\n3 IPs taken over from abc\n", "", "rmpeer ab; rmpeer abc"},
		{"rmpeer broken abc", 1, "3 IPs taken over from abc\n", "meshctl: broken: the disk is full\n", "rmpeer abc"},
		{"rmpeer", 1, "", "meshctl: rmpeer needs a name or nickname\n" + usage, ""},
		{"password list", 0, "* 0a0b0c0d\n  01020304\n", "", ""},
		{"password add", 0, "0a0b0c0d\n", "", "password add from stdin"},
		{"password add /dev/null", 1, "", "meshctl: /dev/null: the first line must hold a password of 1 to 1024 bytes\n", ""},
		{"password use 01020304", 0, "", "", "password use 01020304"},
		{"password remove 01020304", 0, "", "", "password remove 01020304"},
		{"password change", 1, "", "meshctl: password list, add, use or remove\n" + usage, ""},
		{"ipam repair", 0, "renumber c1: 10.32.0.1\n", "", "repair"},
		{"ipam", 1, "", "meshctl: ipam has one form, ipam repair\n" + usage, ""},

		{"attach c1", 0, "10.2.1.1 10.32.0.1\n", "",
			"attach {Container:c1 Addresses:[] WithoutDNS:false RewriteHosts:false AddHosts:[] NoMulticastRoute:false}"},
		{"attach 10.2.1.1/24 net:default ip:10.2.2.1/24 net:10.2.3.0/24 --without-dns --rewrite-hosts --add-host a:1.2.3.4 --add-host b:::1 --no-multicast-route c1",
			0, "10.2.1.1 10.32.0.1\n", "",
			"attach {Container:c1 Addresses:[ip:10.2.1.1/24 net:default ip:10.2.2.1/24 net:10.2.3.0/24] WithoutDNS:true RewriteHosts:true AddHosts:[a:1.2.3.4 b:::1] NoMulticastRoute:true}"},
		{"attach --without-dns c1", 0, "10.2.1.1 10.32.0.1\n", "",
			"attach {Container:c1 Addresses:[] WithoutDNS:true RewriteHosts:false AddHosts:[] NoMulticastRoute:false}"},
		{"attach odd", 0, "10.2.1.1 10.32.0.1\n", "meshctl: warning: 10.2.1.0/24 overlaps a route of this host\n",
			"attach {Container:odd Addresses:[] WithoutDNS:false RewriteHosts:false AddHosts:[] NoMulticastRoute:false}"},
		{"attach", 1, "", "meshctl: attach needs a container\n" + usage, ""},
		{"attach 10.2.1.1/24", 1, "", "meshctl: the last argument is the container, and \"10.2.1.1/24\" is an address\n" + usage, ""},
		{"attach 10.2.1.0/24 c1", 1, "", "meshctl: attach: address \"10.2.1.0/24\": is the network address of 10.2.1.0/24\n", ""},
		{"attach none c1", 1, "", "meshctl: attach: \"none\" is for MESH_CIDR only\n", ""},
		{"attach --add-host x c1", 1, "", "meshctl: --add-host: \"x\" is not name:address\n" + usage, ""},
		{"detach 10.2.1.1/24 c1", 0, "10.2.1.1 10.32.0.1\n", "", "detach {Container:c1 Addresses:[ip:10.2.1.1/24]}"},
		{"detach", 1, "", "meshctl: detach needs a container\n" + usage, ""},
		{"expose", 0, "10.2.1.1 10.32.0.1\n", "", "expose {Addresses:[] FQDN: WithoutMasquerade:false}"},
		{"expose net:default -h h.mesh.internal --without-masquerade", 0, "10.2.1.1 10.32.0.1\n", "",
			"expose {Addresses:[net:default] FQDN:h.mesh.internal WithoutMasquerade:true}"},
		{"expose x", 1, "", "meshctl: expose: address \"x\": the length of the subnet is missing, such as /24\n", ""},
		{"hide 10.2.1.1/24", 0, "", "", "hide {Addresses:[ip:10.2.1.1/24]}"},
		{"ps c1 c2", 0, "mesh:expose 02:00:00:00:00:01\neebd81120ee4 02:00:00:00:00:02 10.2.1.1/24 10.32.0.1/12\n", "", "ps [c1 c2]"},

		{"dns-add 10.2.1.1 c1 -h x.mesh.internal", 0, "", "", `add c1 [10.2.1.1] "x.mesh.internal"`},
		{"dns-add c1", 0, "", "", `add c1 [] ""`},
		{"dns-add 10.2.1.1 10.2.1.2 -h x", 0, "", "", `add mesh:extern [10.2.1.1 10.2.1.2] "x"`},
		{"dns-add 10.2.1.1", 1, "", "meshctl: without a container, -h is needed\n" + usage, ""},
		{"dns-add", 1, "", "meshctl: dns-add needs addresses or a container\n" + usage, ""},
		{"dns-add c1 10.2.1.1", 1, "", "meshctl: \"c1\" is not an IP address, and the container comes last\n" + usage, ""},
		{"dns-remove 10.2.1.1", 0, "", "", `remove mesh:extern [10.2.1.1] ""`},
		{"dns-remove 10.2.1.1 c1 -h x", 0, "", "", `remove c1 [10.2.1.1] "x"`},
		{"dns-lookup web", 0, "10.32.0.1\n10.32.0.2\n", "", ""},
		{"dns-lookup nowhere", 0, "", "", ""},
		{"dns-lookup", 1, "", "meshctl: dns-lookup takes one name, and 0 were given\n" + usage, ""},
		{"dns-args", 0, "--dns=172.17.0.1 --dns-search=mesh.internal.", "", ""},
		{"dns-args whatever", 0, "--dns=172.17.0.1 --dns-search=mesh.internal.", "", ""},

		{"env", 0, "export DOCKER_HOST=unix:///run/meshd/docker.sock ORIG_DOCKER_HOST=\n", "", ""},
		{"env --restore", 1, "", "meshctl: there is nothing to restore: eval $(meshctl env) was not run in this shell\n", ""},
		{"config", 0, "-H=unix:///run/meshd/docker.sock\n", "", ""},

		{"status targets", 0, "host2\nhost3\n", "", ""},
		{"status nonsense", 1, "", "meshctl: there is no status \"nonsense\"\n" + usage, ""},
		{"status targets peers", 1, "", "meshctl: status takes one word at most\n" + usage, ""},
		{"report -f {{.Router.NickName}}", 0, "host1", "", ""},
		{"report -f {{json.Router.Targets}}", 1, "", "meshctl: template: report:1:2: executing \"report\" at <json>: wrong number of args for json: want 1 got 0\n", ""},
		{"report x", 1, "", "meshctl: report takes no arguments, and \"x\" is one\n" + usage, ""},
		{"version", 0, "meshctl unreleased\nmeshd 1.2.3\n", "", ""},
		{"setup", 0, "", "meshctl: nothing to set up: meshd needs no images\n", ""},

		{"", 1, "", usage, ""},
		{"frobnicate", 1, "", "meshctl: there is no command \"frobnicate\"\n" + usage, ""},
		{"--bogus", 1, "", "meshctl: unknown flag: --bogus\n" + usage, ""},
		{"help frobnicate", 1, "", "meshctl: there is no command \"frobnicate\"\n" + usage, ""},
		{"run -ti busybox", 1, "", "meshctl: there is no run any more; use \"docker run\" after  eval $(meshctl env)\n", ""},
		{"start c1", 1, "", "meshctl: there is no start any more; use \"docker start\" after  eval $(meshctl env)\n", ""},
		{"restart c1", 1, "", "meshctl: there is no restart any more; use \"docker restart\" after  eval $(meshctl env)\n", ""},
		{"launch-router --x", 1, "", "meshctl: there is no launch-router any more; use \"meshctl launch\"\n", ""},
		{"launch-proxy", 1, "", "meshctl: there is no launch-proxy any more; use \"meshctl launch\"\n", ""},
		{"launch-plugin", 1, "", "meshctl: there is no launch-plugin any more; use \"meshctl launch\"\n", ""},
		{"stop-router", 1, "", "meshctl: there is no stop-router any more; use \"meshctl stop\"\n", ""},
		{"stop-proxy", 1, "", "meshctl: there is no stop-proxy any more; use \"meshctl stop\"\n", ""},
		{"stop-plugin", 1, "", "meshctl: there is no stop-plugin any more; use \"meshctl stop\"\n", ""},
		{"launch --password", 1, "", "meshctl: --password needs a value\n" + usage, ""},
		{"launch --timeout soon", 1, "", "meshctl: --timeout: \"soon\" is not a duration such as 30s\n" + usage, ""},
		{"launch --password= x", 1, "", "meshctl: --password is empty\n" + usage, ""},
	} {
		d.mu.Lock()
		d.calls = nil
		d.mu.Unlock()
		code, stdout, stderr := ctl(t, env, strings.Fields(c.line)...)
		if want, ok := strings.CutSuffix(c.stderr, usage); ok {
			said, rest, found := strings.Cut(stderr, "Usage:\n")
			if !found || said != want || rest == "" {
				t.Errorf("meshctl %s: got stderr %q, want %q and the usage", c.line, stderr, want)
			}
		} else if stderr != c.stderr {
			t.Errorf("meshctl %s: got stderr %q, want %q", c.line, stderr, c.stderr)
		}
		if code != c.code || stdout != c.stdout {
			t.Errorf("meshctl %s: got exit %d, stdout %q, want %d, %q", c.line, code, stdout, c.code, c.stdout)
		}
		slices.Sort(d.calls) // rmpeer makes several at once
		if got := strings.Join(d.calls, "; "); got != c.call {
			t.Errorf("meshctl %s: got calls %q, want %q", c.line, got, c.call)
		}
	}
}

func TestStatusAndReport(t *testing.T) {
	d := everything(t)
	env := map[string]string{"MESH_SOCKET": serve(t, d, false)}
	code, stdout, stderr := ctl(t, env, "status")
	if code != 0 || stderr != "" || !strings.HasPrefix(stdout, "\n        Version: 1.2.3 (") || !strings.HasSuffix(stdout, "\n\n") {
		t.Errorf("status: got %d %q %q", code, stdout, stderr)
	}
	if code, _, _ = ctl(t, env, "status", "--strict"); code != exitProblems {
		t.Errorf("status --strict with a problem: got exit %d", code)
	}
	code, stdout, _ = ctl(t, env, "report")
	if code != 0 || !strings.HasPrefix(stdout, "{\n    \"Ready\": true,\n") || !strings.HasSuffix(stdout, "}\n") {
		t.Errorf("report: got %d %q", code, stdout)
	}
	d.report.Problems = nil
	if code, _, _ = ctl(t, env, "status", "--strict"); code != 0 {
		t.Errorf("status --strict without a problem: got exit %d", code)
	}
	d.report.Ready = false
	if code, stdout, stderr = ctl(t, env, "status"); code != 1 || stdout != "" || stderr != "meshd is starting\n" {
		t.Errorf("status while starting: got %d %q %q", code, stdout, stderr)
	}
}

// Of two peers that have gone, each is waited for until it is removed as well.
func TestSeveralAreRemovedAtOnce(t *testing.T) {
	d := everything(t)
	d.both = new(sync.WaitGroup)
	d.both.Add(2)
	env := map[string]string{"MESH_SOCKET": serve(t, d, false)}
	if code, stdout, stderr := ctl(t, env, "rmpeer", "host2", "h3"); code != 0 || stdout != "5 IPs taken over from host2\n2 IPs taken over from h3\n" || stderr != "" {
		t.Errorf("got exit %d, %q, %q", code, stdout, stderr)
	}
}

// heard is told of what is written.
type heard func(string)

func (h heard) Write(b []byte) (int, error) { h(string(b)); return len(b), nil }

// A call that waits for other peers says for whom, and then goes on.
func TestWaitingIsSaid(t *testing.T) {
	d := everything(t)
	d.primed = make(chan struct{})
	d.report.IPAM.Waiting = []string{"awaiting consensus (quorum: 2, known: 1)"}
	socket := serve(t, d, false)
	var said []string
	a := &app{
		stdout: heard(func(s string) { t.Errorf("standard output got %q", s) }),
		stderr: heard(func(s string) { said = append(said, s); close(d.primed) }), patience: time.Millisecond,
		env: func(name string) (string, bool) { return socket, name == "MESH_SOCKET" },
	}
	if code := a.run(t.Context(), []string{"prime"}); code != 0 || len(said) != 1 || said[0] != "meshctl: no answer yet: awaiting consensus (quorum: 2, known: 1)\n" {
		t.Errorf("got exit %d, %q", code, said)
	}
}

// A name server that waits for Docker's bridge has no address that could be given to a container.
func TestDNSArgsWithoutBridge(t *testing.T) {
	d := everything(t)
	d.server = netip.AddrPort{}
	env := map[string]string{"MESH_SOCKET": serve(t, d, false)}
	if code, stdout, stderr := ctl(t, env, "dns-args"); code != 0 || stdout != "--dns-search=mesh.internal." || stderr != "" {
		t.Errorf("got exit %d, %q, %q", code, stdout, stderr)
	}
}

func TestHelp(t *testing.T) {
	root := (&app{}).rootCommand()
	var lines [][]string
	for _, c := range root.Commands() {
		if c.Hidden || c.Name() == "completion" {
			continue
		}
		lines = append(lines, []string{"help", c.Name()}, []string{c.Name(), "--help"})
		if c.Short == "" || c.Long == "" && c.Name() != "help" && c.Name() != "demo" {
			t.Errorf("%s explains nothing", c.Name())
		}
	}
	for _, line := range append(lines, []string{"help"}, []string{"--help"}, []string{"-h"}) {
		code, stdout, stderr := ctl(t, nil, line...)
		if code != 0 || stdout != "" || !strings.Contains(stderr, "Usage:\n") {
			t.Errorf("%v: got exit %d, stdout %q, stderr %q", line, code, stdout, stderr)
		}
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if code, stdout, stderr := ctl(t, nil, "completion", shell); code != 0 || !strings.Contains(stdout, "meshctl") || stderr != "" {
			t.Errorf("%s: got exit %d, %d bytes, %q", shell, code, len(stdout), stderr)
		}
	}
}

// What is off says so, with the exit code for it, and prints nothing on standard output.
func TestFeaturesThatAreOff(t *testing.T) {
	env := map[string]string{"MESH_SOCKET": serve(t, &daemon{report: control.Report{Ready: true}}, true)}
	for _, line := range []string{"prime", "attach c1", "detach c1", "expose", "hide", "ps", "dns-add c1", "dns-remove c1", "dns-lookup x",
		"status ipam", "status dns", "connect x", "forget x", "ipam repair"} {
		code, stdout, stderr := ctl(t, env, strings.Fields(line)...)
		if code != exitOff || stdout != "" || !strings.HasSuffix(stderr, "is turned off\n") {
			t.Errorf("%s: got exit %d, stdout %q, stderr %q", line, code, stdout, stderr)
		}
	}
	for _, c := range []struct {
		line string
		code int
	}{{"dns-args", 0}, {"env", 0}, {"config", 1}, {"rmpeer x", 1}} {
		code, stdout, _ := ctl(t, env, strings.Fields(c.line)...)
		if code != c.code || stdout != "" {
			t.Errorf("%s: got exit %d, stdout %q, want %d and nothing", c.line, code, stdout, c.code)
		}
	}
}

func TestWithoutADaemon(t *testing.T) {
	dir := t.TempDir()
	env := map[string]string{"MESH_SOCKET": filepath.Join(dir, "meshd.sock")}
	const notRunning = "meshctl: meshd is not running; \"meshctl launch\" starts it\n"
	for _, line := range []string{"status", "status ipam", "report", "connect x", "forget x", "prime", "attach c1", "detach c1", "expose",
		"hide", "ps", "dns-add c1", "dns-remove c1", "dns-lookup x", "rmpeer x"} {
		code, stdout, stderr := ctl(t, env, strings.Fields(line)...)
		if code != exitUnreachable || stdout != "" || stderr != notRunning {
			t.Errorf("%s: got exit %d, stdout %q, stderr %q", line, code, stdout, stderr)
		}
	}
	if code, stdout, stderr := ctl(t, env, "stop"); code != 0 || stdout != "" || stderr != "meshctl: meshd is not running\n" {
		t.Errorf("stop: got exit %d, %q, %q", code, stdout, stderr)
	}
	if code, stdout, stderr := ctl(t, env, "env"); code != 0 || stdout+stderr != "" {
		t.Errorf("env: got exit %d, %q, %q", code, stdout, stderr)
	}
	if code, stdout, stderr := ctl(t, env, "config"); code != 1 || stdout+stderr != "" {
		t.Errorf("config: got exit %d, %q, %q", code, stdout, stderr)
	}
	env["DOCKER_BRIDGE"] = "lo"
	if code, stdout, _ := ctl(t, env, "dns-args"); code != 0 || stdout != "--dns=127.0.0.1 --dns-search=mesh.internal." {
		t.Errorf("dns-args: got exit %d, %q", code, stdout)
	}
	if code, stdout, _ := ctl(t, env, "docker-bridge-ip"); code != 0 || stdout != "127.0.0.1\n" {
		t.Errorf("docker-bridge-ip: got exit %d, %q", code, stdout)
	}
	env["DOCKER_BRIDGE"] = "none-such"
	if code, stdout, _ := ctl(t, env, "dns-args"); code != 0 || stdout != "--dns-search=mesh.internal." {
		t.Errorf("dns-args without a bridge: got exit %d, %q", code, stdout)
	}
	if code, stdout, stderr := ctl(t, env, "docker-bridge-ip"); code != 1 || stdout != "" || !strings.HasPrefix(stderr, "meshctl: none-such: ") {
		t.Errorf("docker-bridge-ip without a bridge: got exit %d, %q, %q", code, stdout, stderr)
	}
	// A daemon that holds its pid file and does not answer is something else.
	lock, err := control.LockPID(filepath.Join(dir, control.PIDFile))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if code, _, stderr := ctl(t, env, "status"); code != exitUnreachable || !strings.HasPrefix(stderr, fmt.Sprintf("meshctl: meshd runs (pid %d) but does not answer", os.Getpid())) {
		t.Errorf("status of a daemon that hangs: got exit %d, %q", code, stderr)
	}
}

func TestEnv(t *testing.T) {
	d := everything(t)
	socket := serve(t, d, false)
	for _, c := range []struct {
		proxy string
		env   map[string]string
		line  string
		want  string
	}{
		{"unix:///s", nil, "env", "export DOCKER_HOST=unix:///s ORIG_DOCKER_HOST=\n"},
		{"unix:///s", map[string]string{"DOCKER_HOST": "tcp://h:2375"}, "env", "export DOCKER_HOST=unix:///s ORIG_DOCKER_HOST=tcp://h:2375\n"},
		{"unix:///s", map[string]string{"DOCKER_HOST": "unix:///s", "ORIG_DOCKER_HOST": "tcp://h:2375"}, "env",
			"export DOCKER_HOST=unix:///s ORIG_DOCKER_HOST=tcp://h:2375\n"},
		{"unix:///s", map[string]string{"DOCKER_HOST": "it's; odd"}, "env", `export DOCKER_HOST=unix:///s ORIG_DOCKER_HOST='it'\''s; odd'` + "\n"},
		{"unix:///s", map[string]string{"ORIG_DOCKER_HOST": "tcp://h:2375"}, "env --restore", "DOCKER_HOST=tcp://h:2375\n"},
		{"unix:///s", map[string]string{"ORIG_DOCKER_HOST": ""}, "env --restore", "DOCKER_HOST=\n"},
		{"tcp://0.0.0.0:12375", nil, "config", "-H=tcp://127.0.0.1:12375\n"},
		{"tcp://[::]:12375", nil, "config", "-H=tcp://127.0.0.1:12375\n"},
		{"tcp://0.0.0.0:12375", map[string]string{"DOCKER_HOST": "tcp://remote:2375"}, "config", "-H=tcp://remote:12375\n"},
		{"tcp://0.0.0.0:12375", map[string]string{"PROXY_HOST": "p", "DOCKER_HOST": "tcp://remote:2375"}, "config", "-H=tcp://p:12375\n"},
		{"tcp://192.0.2.1:12375", nil, "config", "-H=tcp://192.0.2.1:12375\n"},
	} {
		d.report.Proxy = &control.Proxy{Addresses: []string{c.proxy, "tcp://other:1"}}
		env := map[string]string{"MESH_SOCKET": socket}
		maps.Copy(env, c.env)
		if code, stdout, stderr := ctl(t, env, strings.Fields(c.line)...); code != 0 || stdout != c.want || stderr != "" {
			t.Errorf("%s with %v: got exit %d, %q, %q, want %q", c.line, c.env, code, stdout, stderr, c.want)
		}
	}
}

func TestWhereTheDaemonIs(t *testing.T) {
	for _, c := range []struct {
		env       map[string]string
		socket    string
		addr, pid string
	}{
		{nil, "", "/run/meshd/meshd.sock", "/run/meshd/meshd.pid"},
		{nil, "/x/s", "/x/s", "/x/meshd.pid"},
		{map[string]string{"MESH_SOCKET": "/y/s"}, "", "/y/s", "/y/meshd.pid"},
		{map[string]string{"MESH_SOCKET": "/y/s"}, "/x/s", "/x/s", "/x/meshd.pid"},
		{map[string]string{"MESH_RUN_DIR": "/z"}, "", "/z/meshd.sock", "/z/meshd.pid"},
		{map[string]string{"MESH_HTTP_ADDR": "127.0.0.1:6784"}, "", "127.0.0.1:6784", "/run/meshd/meshd.pid"},
		{map[string]string{"WEAVE_HTTP_ADDR": "127.0.0.1:6784"}, "", "127.0.0.1:6784", "/run/meshd/meshd.pid"},
		{map[string]string{"WEAVE_HTTP_ADDR": "127.0.0.1:1", "MESH_HTTP_ADDR": "127.0.0.1:2"}, "", "127.0.0.1:2", "/run/meshd/meshd.pid"},
	} {
		a := &app{env: func(name string) (string, bool) { v, ok := c.env[name]; return v, ok }}
		a.flags.socket = c.socket
		if a.addr() != c.addr || a.pidFile() != c.pid {
			t.Errorf("%v, --socket %q: got %s, %s, want %s, %s", c.env, c.socket, a.addr(), a.pidFile(), c.addr, c.pid)
		}
	}
}

func TestParseLaunch(t *testing.T) {
	for _, c := range []struct {
		in   string
		want launchOptions
	}{
		{"host2 host3", launchOptions{daemon: []string{"host2", "host3"}}},
		{"--password secret host2", launchOptions{password: "secret", daemon: []string{"host2"}}},
		{"--password=sec=ret --mtu 1400", launchOptions{password: "sec=ret", daemon: []string{"--mtu", "1400"}}},
		{"--foreground --log-file /l --no-restart --local -H tcp://x:1", launchOptions{foreground: true, logFile: "/l", daemon: []string{"--no-restart", "-H", "tcp://x:1"}}},
		{"--timeout 5s a", launchOptions{timeout: 5 * time.Second, daemon: []string{"a"}}},
		{"-- --password x", launchOptions{daemon: []string{"--", "--password", "x"}}},
	} {
		if c.want.timeout == 0 {
			c.want.timeout = time.Minute
		}
		got, err := parseLaunch(strings.Fields(c.in))
		if err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", c.want) {
			t.Errorf("%s: got %+v, %v, want %+v", c.in, got, err, c.want)
		}
	}
}

func TestLastErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	before := "level=ERROR msg=old\n"
	for _, c := range []struct{ log, want string }{
		{"", ""},
		{"level=INFO msg=a\nlevel=ERROR msg=b\nlevel=WARN msg=c\n", "level=ERROR msg=b"},
		{"level=INFO msg=a\n", "level=INFO msg=a"},
		{`{"level":"INFO"}` + "\n" + `{"level":"ERROR"}` + "\n", `{"level":"ERROR"}`},
		{"panic: oh\n\ngoroutine 1\n", "panic: oh\n\ngoroutine 1"},
		{strings.Repeat("level=ERROR\n", 50), strings.TrimSuffix(strings.Repeat("level=ERROR\n", 10), "\n")},
	} {
		if err := os.WriteFile(path, []byte(before+c.log), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(lastErrors(path, int64(len(before))), "\n"); got != c.want {
			t.Errorf("%q: got %q, want %q", c.log, got, c.want)
		}
	}
}

func TestCauseOf(t *testing.T) {
	for _, c := range []struct{ last, want string }{
		{`time=x level=ERROR msg=stopped err="listen on \"x\": taken\nand more"`, `listen on "x": taken; and more`},
		{`time=x level=ERROR msg=stopped err=short`, "short"},
		{`{"level":"ERROR","msg":"stopped","err":"listen on \"x\": taken"}`, `listen on "x": taken`},
		{"meshd: must be run as root", "must be run as root"},
		{`{"level":"ERROR","msg":"other","err":"x"}`, ""},
		{"level=ERROR msg=other err=x", ""},
		{"goroutine 1 [running]:", ""},
	} {
		if got := causeOf([]string{"level=ERROR msg=stopped err=before", c.last}); got != c.want {
			t.Errorf("%s: got %q, want %q", c.last, got, c.want)
		}
	}
	if got := causeOf(nil); got != "" {
		t.Errorf("nothing logged: got %q", got)
	}
}

var update = flag.Bool("update", false, "rewrite the generated part of docs/meshctl.md")

// The reference holds what every command says of itself, after a mark that ends what was written by hand.
func TestDocumentedCommands(t *testing.T) {
	const path, mark = "../../docs/meshctl.md", "<!-- generated: go test ./cmd/meshctl -update -->\n"
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	written, generated, ok := strings.Cut(string(b), mark)
	if !ok {
		t.Fatalf("%s has no line %q", path, mark)
	}
	var want strings.Builder
	for _, c := range (&app{}).rootCommand().Commands() {
		if c.Hidden || c.Name() == "completion" {
			continue
		}
		c.InitDefaultHelpFlag()
		text, _, _ := strings.Cut(helpText(c), "\nGlobal Flags:\n")
		fmt.Fprintf(&want, "\n### %s\n\n```\n%s\n```\n", c.Name(), strings.TrimSpace(text))
	}
	if *update {
		if err := os.WriteFile(path, []byte(written+mark+want.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want.String(), generated); diff != "" {
		t.Errorf("%s is out of date; run this test with -update (-want +got):\n%s", path, diff)
	}
}
