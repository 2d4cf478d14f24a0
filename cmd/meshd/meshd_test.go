package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"meshd/ipam"
	"meshd/mesh"
	"meshd/router"
)

func variables(pairs ...string) environment {
	env := map[string]string{"MESH_CONFIG": os.DevNull} // this host's own file has no say
	for i := 0; i < len(pairs); i += 2 {
		env[pairs[i]] = pairs[i+1]
	}
	return func(name string) (string, bool) { v, ok := env[name]; return v, ok }
}

// configure is what run makes of a command line.
func configure(env environment, args ...string) (Config, error) {
	o, f, err := parse(args, env)
	if err != nil {
		return Config{}, err
	}
	c, err := validate(o, f, "host1")
	password, perr := readPassword(o, env)
	c.Underlay.Password = password
	return c, errors.Join(err, perr)
}

func TestDefaults(t *testing.T) {
	got, err := configure(variables())
	if err != nil {
		t.Fatal(err)
	}
	match := got.Docker.Proxy.HostnameMatch
	got.Docker.Proxy.HostnameMatch = nil
	want := Config{
		Underlay: UnderlayConfig{Port: 6783, VXLANPort: 6784, NickName: "host1", ConnLimit: 200},
		Overlay: OverlayConfig{Bridge: "mesh", TAP: "mesh-tap", VXLAN: "mesh-vx", Ifname: "ethmesh", DockerBridge: "docker0",
			NFTable: "mesh"},
		Addresses: AddressConfig{Range: netip.MustParsePrefix("10.32.0.0/12"), DefaultSubnet: netip.MustParsePrefix("10.32.0.0/12"), Peers: 1},
		DNS: DNSConfig{Domain: "mesh.internal.", Listen: netip.AddrPortFrom(netip.Addr{}, 53), TTL: time.Second,
			FallbackTimeout: 5 * time.Second, ResolvConf: "/etc/resolv.conf"},
		Docker: DockerConfig{API: "unix:///var/run/docker.sock", Proxy: ProxyConfig{On: true,
			Listen: []string{"unix:///run/meshd/docker.sock"}, HostnameReplacement: "$1"}},
		Control:  ControlConfig{Socket: "/run/meshd/meshd.sock", StatusAddr: "127.0.0.1:6782"},
		StateDir: "/var/lib/meshd", RunDir: "/run/meshd", PinDir: "/sys/fs/bpf/meshd",
		Log: LogConfig{Level: "info"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
	if match.String() != "(.*)" {
		t.Errorf("hostname-match: got %s", match)
	}
}

func TestOptions(t *testing.T) {
	seed := func(names ...string) (out []mesh.PeerName) {
		for _, n := range names {
			p, err := mesh.ParsePeerName(n)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, p)
		}
		return out
	}
	for _, c := range []struct {
		args string
		get  func(Config) any
		want any
	}{
		{"--port 7000", func(c Config) any { return []uint16{c.Underlay.Port, c.Underlay.VXLANPort} }, []uint16{7000, 7001}},
		{"--port 65535 --vxlan-port 4789", func(c Config) any { return c.Underlay.VXLANPort }, uint16(4789)},
		{"--host 192.0.2.1", func(c Config) any { return c.Underlay.Host.String() }, "192.0.2.1"},
		{"--host 0.0.0.0", func(c Config) any { return c.Underlay.Host.IsValid() }, false},
		{"--name ::1", func(c Config) any { return c.Underlay.Name.String() }, "00:00:00:00:00:01"},
		{"--trusted-subnets 10.0.0.0/8,192.168.0.0/16", func(c Config) any { return len(c.Underlay.TrustedSubnets) }, 2},
		{"--conn-limit=0", func(c Config) any { return c.Underlay.ConnLimit }, 0},
		{"host2 host3:99 host2 --no-discovery 192.0.2.1 2001:db8::1 [2001:db8::1]:6783", func(c Config) any { return c.Underlay.Peers },
			[]string{"host2", "host3:99", "192.0.2.1", "2001:db8::1", "[2001:db8::1]:6783"}},
		{"--peer host2 --peer host3 host4", func(c Config) any { return c.Underlay.Peers }, []string{"host2", "host3", "host4"}},
		{"a b", func(c Config) any { return c.Addresses.Peers }, 3},
		{"a --ipalloc-init consensus=5", func(c Config) any { return c.Addresses.Peers }, 5},
		{"--ipalloc-init seed=::1,::2", func(c Config) any { return c.Addresses.Seeds }, seed("::1", "::2")},
		{"--ipalloc-init observer", func(c Config) any { return c.Addresses.Init }, InitObserver},
		{"--iprange 10.2.0.0/16", func(c Config) any { return c.Addresses.Range.String() + fmt.Sprint(c.Addresses.RangeGiven) }, "10.2.0.0/16true"},
		{"--ipalloc-range 10.2.0.0/16 --ipalloc-default-subnet 10.2.3.0/24", func(c Config) any { return c.Addresses.DefaultSubnet.String() }, "10.2.3.0/24"},
		{"--ipalloc-range=", func(c Config) any { return c.Addresses.Range.IsValid() }, false},
		{"--weave-bridge br0", func(c Config) any { return []string{c.Overlay.Bridge, c.Overlay.TAP, c.Overlay.VXLAN} }, []string{"br0", "br0-tap", "br0-vx"}},
		{"--dns-domain Foo.Local --dns-ttl 30", func(c Config) any { return c.DNS.Domain + c.DNS.TTL.String() }, "foo.local.30s"},
		{"--dns-listen-address 192.0.2.1", func(c Config) any { return c.DNS.Listen.String() }, "192.0.2.1:53"},
		{"--dns-listen-address :5353", func(c Config) any { return c.DNS.Listen.String() }, "0.0.0.0:5353"},
		{"--docker-api=", func(c Config) any { return c.Docker.API + fmt.Sprint(c.Docker.Proxy.On) }, "false"},
		{"--docker-api /x/docker.sock", func(c Config) any { return c.Docker.API }, "unix:///x/docker.sock"},
		{"--proxy=false", func(c Config) any { return c.Docker.Proxy.On }, false},
		{"-H tcp://127.0.0.1:12375 -H unix:///x/y.sock -H :99", func(c Config) any { return c.Docker.Proxy.Listen },
			[]string{"tcp://127.0.0.1:12375", "unix:///x/y.sock", "tcp://0.0.0.0:99"}},
		{"--tlsverify --tlscacert /ca --tlscert /c --tlskey /k", func(c Config) any { return c.Docker.Proxy.TLSOn }, true},
		{"--plugin=false --no-restart --bufsz=8 --min-protocol-version 2", func(c Config) any { return c.Underlay.Port }, uint16(6783)},
		{"--run-dir /x/run", func(c Config) any { return c.Control.Socket + c.Docker.Proxy.Listen[0] }, "/x/run/meshd.sockunix:///x/run/docker.sock"},
		{"--http-addr 127.0.0.1:6784 --status-addr= --metrics-addr :6782", func(c Config) any { return c.Control.HTTPAddr + c.Control.StatusAddr + c.Control.MetricsAddr }, "127.0.0.1:67840.0.0.0:6782"},
		{"--http-addr 0.0.0.0:6784 --http-tlscacert /a --http-tlscert /b --http-tlskey /c", func(c Config) any { return c.Control.HTTPAddr }, "0.0.0.0:6784"},
		{"--log-level=WARNING --log-format json", func(c Config) any { return c.Log }, LogConfig{"warn", true}},
	} {
		cfg, err := configure(variables(), strings.Fields(c.args)...)
		if err != nil {
			t.Errorf("%s: %v", c.args, err)
			continue
		}
		if got := c.get(cfg); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: got %v, want %v", c.args, got, c.want)
		}
	}
}

func TestWrongOptions(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"--bogus", "unknown flag: --bogus"},
		{"--port 0", "--port: 0 is outside 1 to 65535"},
		{"--port 65536", "--port: 65536 is outside"},
		{"--port x", `--port: "x" is not a whole number`},
		{"--no-dns=maybe", `--no-dns: "maybe" is not true or false`},
		{"--dns-fallback-timeout 5", `--dns-fallback-timeout: "5" is not a duration such as 30s`},
		{"--port 65535", "--port: 65535 leaves no port after it"},
		{"--vxlan-port 6783", "--vxlan-port: 6783 is the port of the tunnel"},
		{"--host example.org", `--host: "example.org" is not an IP address`},
		{"--host 224.0.0.1", "--host: 224.0.0.1 is a multicast address"},
		{"--name xyz", "--name: peer name"},
		{"--name ::", "--name: peer name"},
		{"--nickname a\u00a0b", "--nickname:"},
		{"--nickname " + strings.Repeat("x", 65), "--nickname: 65 bytes are too many"},
		{"--conn-limit=-1", "--conn-limit: -1 is negative"},
		{"--trusted-subnets 10.0.0.1/8", "--trusted-subnets: 10.0.0.1/8 has bits set after the prefix; the network is 10.0.0.0/8"},
		{"--trusted-subnets x", `--trusted-subnets: "x" is not a CIDR`},
		{"host:0", `--peer: "host:0": "0" is not a port`},
		{"host:x", `"x" is not a port`},
		{"http://host", `is not a port`},
		{"ho/st", `--peer: "ho/st" is not a host name or address`},
		{"--peer=", `--peer: "" is not a host name`},
		{"[::1", "--peer:"},
		{"--resume host2", "--resume: takes the peers of the last run"},
		{"--bridge mesh/0", `--bridge: "mesh/0" is not a device name`},
		{"--bridge 0123456789abcde", "--tap: 0123456789abcde-tap is longer than the 15 bytes"},
		{"--bridge docker0", "--docker-bridge: docker0 is already the name given by --bridge"},
		{"--ifname=", `--ifname: "" is not a device name`},
		{"--nft-table a;b", "--nft-table:"},
		{"--mtu 100", "--mtu: 100 is outside"},
		{"--mtu 65536", "--mtu: 65536 is outside"},
		{"--ipalloc-range 10.32.0.1/12", "--ipalloc-range: 10.32.0.1/12 has bits set after the prefix; the network is 10.32.0.0/12"},
		{"--ipalloc-range 10.32.0.0/31", "--ipalloc-range: 10.32.0.0/31 is smaller than /30"},
		{"--ipalloc-range 0.0.0.0/0", "--ipalloc-range: 0.0.0.0/0 is larger than /4"},
		{"--ipalloc-range 224.0.0.0/8", "--ipalloc-range: 224.0.0.0/8 is not for hosts"},
		{"--ipalloc-range fd00::/64", "is not an IPv4 CIDR"},
		{"--ipalloc-range 10.32.0.0", "is not an IPv4 CIDR"},
		{"--ipalloc-default-subnet 10.64.0.0/16", "--ipalloc-default-subnet: 10.64.0.0/16 is not inside the range 10.32.0.0/12"},
		{"--ipalloc-default-subnet 10.0.0.0/8", "is not inside the range"},
		{"--ipalloc-range= --ipalloc-default-subnet 10.32.0.0/16", "allocation is turned off"},
		{"--ipalloc-init paxos", `--ipalloc-init: "paxos" is none of`},
		{"--ipalloc-init consensus=0", "the number of peers is 1 to 4096"},
		{"--ipalloc-init seed=", `"seed=" is none of`},
		{"--ipalloc-init seed=::1,::1", "is named twice"},
		{"--ipalloc-init observer=1", "is none of"},
		{"--ipalloc-reclaim-after=-1s", "is negative"},
		{"--dns-domain .", "--dns-domain:"},
		{"--dns-domain a..b", "--dns-domain:"},
		{"--dns-domain -a.b", "--dns-domain:"},
		{"--dns-domain " + strings.Repeat("a", 64), "--dns-domain:"},
		{"--dns-domain bücher.example", "--dns-domain:"},
		{"--dns-ttl=-1", "--dns-ttl: -1 is outside"},
		{"--dns-fallback-timeout 0", "--dns-fallback-timeout: 0s is outside"},
		{"--dns-listen-address host:53", "--dns-listen-address:"},
		{"--resolv-conf resolv.conf", "--resolv-conf: \"resolv.conf\" is not an absolute path"},
		{"--docker-api ftp://x:1", "--docker-api:"},
		{"--docker-api unix://x/y", "--docker-api:"},
		{"-H host", `--proxy-listen: "tcp://host" has no port`},
		{"-H /var/run/docker.sock", "--proxy-listen: unix:///var/run/docker.sock is Docker's own endpoint"},
		{"-H :12375 --tls", "--proxy-listen: tcp://0.0.0.0:12375: who reaches Docker's API is root"},
		{"-H tcp://192.0.2.1:12375 --no-detect-tls", "--proxy-listen: tcp://192.0.2.1:12375: who reaches"},
		{"--hostname-match (", "--hostname-match:"},
		{"--tlscert /c", "--tlscert: --tlscert and --tlskey belong together"},
		{"--tlsverify --tlscert /c --tlskey /k", "--tlsverify: needs --tlscacert"},
		{"--http-addr 0.0.0.0:6784", "--http-addr: 0.0.0.0:6784 is not a loopback address"},
		{"--http-addr host:6784", "--http-addr:"},
		{"--http-addr 127.0.0.1:1 --http-tlscert /a --http-tlskey /b", "belong together"},
		{"--http-addr 127.0.0.1:6782", "--status-addr: 127.0.0.1:6782 is already that of --http-addr"},
		{"--socket " + "/" + strings.Repeat("x", 108), "--socket: "},
		{"--state-dir /", "--state-dir: / is too high up"},
		{"--state-dir /var", "--state-dir: /var is too high up"},
		{"--run-dir run", "--run-dir: \"run\" is not an absolute path"},
		{"--log-level loud", "--log-level:"},
		{"--log-format xml", "--log-format:"},
		{"--plugin", "--plugin: the Docker network plugin is not in this version"},
		{"--awsvpc", "--awsvpc: there is no AWS VPC mode"},
		{"--expect-npc", "--expect-npc: "},
		{"--token=x", "--token: "},
		{"--password-file /nonexistent/file", "--password-file: open /nonexistent/file"},
	} {
		_, err := configure(variables(), strings.Split(c.args, " ")...)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", c.args, err, c.want)
		}
	}
	// All that is wrong is said at once.
	_, err := configure(variables(), "--port", "0", "--mtu", "1", "--name", "x")
	if err == nil || strings.Count(err.Error(), "\n") != 2 {
		t.Errorf("three mistakes: got %v", err)
	}
	// What should have stayed secret is not said again.
	_, err = configure(variables(), "--password=hunter2")
	if err == nil || !strings.Contains(err.Error(), "MESH_PASSWORD") || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("--password: got %v", err)
	}
}

func TestPrecedence(t *testing.T) {
	file := filepath.Join(t.TempDir(), "meshd.conf")
	if err := os.WriteFile(file, []byte("mtu = 1001\nport = 1002\nnickname = \"file\"\nno-dns = yes\npeer = a\npeer = b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := configure(variables("MESH_CONFIG", file, "MESH_PORT", "2002", "WEAVE_PORT", "3002", "WEAVE_MTU", "3003", "MESH_NICKNAME", "",
		"WEAVE_NO_FASTDP", "1", "MESH_TRUSTED_SUBNETS", "10.0.0.0/8", "DOCKER_HOST", "tcp://192.0.2.1:2375"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Underlay.Port != 2002 || c.Overlay.MTU != 3003 || c.Underlay.NickName != "file" || !c.DNS.Off || !c.Overlay.NoFastDP ||
		!slices.Equal(c.Underlay.Peers, []string{"a", "b"}) || len(c.Underlay.TrustedSubnets) != 1 || c.Docker.API != "tcp://192.0.2.1:2375" {
		t.Errorf("got %+v", c)
	}
	if c, err = configure(variables("MESH_PEER", "c d"), "--config", file, "--mtu", "1400"); err != nil || c.Overlay.MTU != 1400 ||
		!slices.Equal(c.Underlay.Peers, []string{"c", "d"}) {
		t.Errorf("got %v, %+v", err, c)
	}
	if c, err = configure(variables("MESH_PEER", "c d"), "--config", file, "e"); err != nil || !slices.Equal(c.Underlay.Peers, []string{"e"}) {
		t.Errorf("got %v, %+v", err, c.Underlay)
	}
	if _, err = configure(variables("MESH_NO_DNS", "maybe")); err == nil || !strings.Contains(err.Error(), "MESH_NO_DNS") {
		t.Errorf("got %v", err)
	}
	if _, err = configure(variables("MESH_CHECK", "1", "MESH_RESET", "1")); err != nil {
		t.Errorf("got %v", err)
	}
}

func TestConfigurationFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "meshd.conf")
	for _, c := range []struct{ text, want string }{
		{"bogus = 1", `:1: there is no option "bogus"`},
		{"\n# x\nport 5", "line 3: want name = value"},
		{"= 5", "line 1: want name = value"},
		{"port = x", ":1: port: "},
		{"mtu = 1400\nmtu = 1401", `:2: "mtu" is set twice`},
		{"check = true", `there is no option "check"`},
		{"config = /x", `there is no option "config"`},
		{`nickname = "x`, "the quotes do not match"},
		{`nickname = "x"y"`, "the quotes do not match"},
		{"no-dns = perhaps", "is neither true nor false"},
		{"password = hunter2", "--password: "},
		{strings.Repeat("peer = a\n", maxSettings+1), "more than 1000 settings"},
	} {
		if err := os.WriteFile(file, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := configure(variables(), "--config", file); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: got %v, want %q", c.text, err, c.want)
		}
	}
	if _, err := configure(variables(), "--config", filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that does not exist: got %v", err)
	}
	if err := os.WriteFile(file, []byte("  ipalloc-init = seed=::1,::2  \nipalloc-range =\n\tno-dns=on\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := configure(variables(), "--config", file)
	if err != nil || len(c.Addresses.Seeds) != 2 || c.Addresses.Range.IsValid() || !c.DNS.Off {
		t.Errorf("got %v, %+v", err, c)
	}
}

// The shipped file says what holds without it: every line works when its # is taken away, and those
// that show a default show the one that is in force.
func TestExampleFile(t *testing.T) {
	b, err := os.ReadFile("../../packaging/meshd.conf")
	if err != nil {
		t.Fatal(err)
	}
	if settings, err := readSettings(bytes.NewReader(b)); err != nil || len(settings) > 0 {
		t.Errorf("as shipped it sets %v, %v", settings, err)
	}
	uncommented := strings.ReplaceAll("\n"+string(b), "\n#", "\n")
	var kept []string
	for line := range strings.Lines(uncommented) {
		if name, _, ok := strings.Cut(line, "="); ok && !strings.Contains(strings.TrimSpace(name), " ") {
			kept = append(kept, strings.Replace(line, "/etc/meshd/password", os.DevNull, 1))
		}
	}
	if len(kept) < 10 {
		t.Fatalf("only %d settings found", len(kept))
	}
	file := filepath.Join(t.TempDir(), "meshd.conf")
	text := strings.Join(slices.DeleteFunc(kept, func(s string) bool { return strings.HasPrefix(s, "password-file") }), "")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := configure(variables(), "--config", file)
	if err != nil {
		t.Fatal(err)
	}
	want, err := configure(variables())
	if err != nil {
		t.Fatal(err)
	}
	want.Underlay.Peers, want.Addresses.Peers, want.Addresses.RangeGiven = got.Underlay.Peers, 3, true
	got.Docker.Proxy.HostnameMatch, want.Docker.Proxy.HostnameMatch = nil, nil
	if diff := cmp.Diff(fmt.Sprintf("%+v", want), fmt.Sprintf("%+v", got)); diff != "" {
		t.Errorf("the example shows other defaults (-want +got):\n%s", diff)
	}
}

func FuzzReadSettings(f *testing.F) {
	f.Add([]byte("a = b\n# c\nd=\"e\"\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		settings, err := readSettings(bytes.NewReader(b))
		if err != nil {
			return
		}
		for _, s := range settings {
			again, err := readSettings(strings.NewReader(s.name + " = \"" + s.value + "\""))
			if strings.Contains(s.value, `"`) {
				continue
			}
			if err != nil || len(again) != 1 || again[0].name != s.name || again[0].value != s.value {
				t.Errorf("%q = %q: got %v, %v", s.name, s.value, again, err)
			}
		}
	})
}

func FuzzOptions(f *testing.F) {
	f.Add("--port 1 host2 --ipalloc-init seed=::1")
	f.Add("-H :1 --dns-domain a.b --trusted-subnets 10.0.0.0/8,")
	f.Fuzz(func(t *testing.T, line string) {
		if strings.Contains(line, "config") || strings.Contains(line, "password-file") {
			return // would read files
		}
		_, _ = configure(variables(), strings.Fields(line)...)
	})
}

func TestPassword(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	credential := file(credentialName, "credential\n")
	for _, c := range []struct {
		env  environment
		args []string
		want string
	}{
		{variables(), nil, ""},
		{variables("MESH_PASSWORD", "mesh", "WEAVE_PASSWORD", "weave"), nil, "mesh"},
		{variables("MESH_PASSWORD", "", "WEAVE_PASSWORD", "weave"), nil, "weave"},
		{variables("MESH_PASSWORD", "mesh"), []string{"--password-file", file("unix", " pass word \n")}, " pass word "},
		{variables(), []string{"--password-file", file("dos", "pass\r\n")}, "pass"},
		{variables("MESH_PASSWORD_FILE", file("plain", "pass")), nil, "pass"},
		{variables("CREDENTIALS_DIRECTORY", filepath.Dir(credential)), nil, "credential"},
		{variables("CREDENTIALS_DIRECTORY", filepath.Dir(credential), "MESH_PASSWORD", "mesh"), nil, "mesh"},
		{variables("CREDENTIALS_DIRECTORY", t.TempDir()), nil, ""},
	} {
		cfg, err := configure(c.env, c.args...)
		if err != nil || cfg.Underlay.Password != c.want {
			t.Errorf("%v: got %q, %v, want %q", c.args, cfg.Underlay.Password, err, c.want)
		}
	}
	for _, c := range []struct {
		env  environment
		args []string
	}{
		{variables(), []string{"--password-file", file("empty", "\n")}},
		{variables(), []string{"--password-file", file("long", strings.Repeat("x", maxPassword+1))}},
		{variables("MESH_PASSWORD", strings.Repeat("x", maxPassword+1)), nil},
		{variables(), []string{"--password-file", dir}},
	} {
		if cfg, err := configure(c.env, c.args...); err == nil {
			t.Errorf("%v: got %q, want an error", c.args, cfg.Underlay.Password)
		}
	}
}

// A process that was started with a password in its environment does not show it afterwards.
func TestScrubEnvironment(t *testing.T) {
	const secret = "known-password-in-this-test"
	if os.Getenv("MESHD_TEST_SCRUB") != "" {
		if err := scrubEnvironment(passwordVariables...); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile("/proc/self/environ")
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := os.LookupEnv("MESH_PASSWORD"); ok || bytes.Contains(b, []byte(secret)) {
			t.Errorf("still there:\n%s", b)
		}
		if !bytes.Contains(b, []byte("MESHD_TEST_OTHER=kept")) {
			t.Errorf("others were harmed:\n%s", b)
		}
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestScrubEnvironment$")
	cmd.Env = append(os.Environ(), "MESH_PASSWORD="+secret, "MESHD_TEST_SCRUB=1", "WEAVE_PASSWORD="+secret, "MESHD_TEST_OTHER=kept")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestEnvStart(t *testing.T) {
	// A program may be called anything.
	stat := "12 (a) b) S " + strings.Join(slices.Repeat([]string{"7"}, 46), " ") + " 4711 0 0"
	if got, err := envStart(stat); got != 4711 || err != nil {
		t.Errorf("got %d, %v, want 4711", got, err)
	}
	for _, bad := range []string{"", "1 (x) S", strings.Replace(stat, "4711", "0", 1), strings.Replace(stat, "4711", "x", 1)} {
		if got, err := envStart(bad); err == nil {
			t.Errorf("%q: got %d", bad, got)
		}
	}
}

func TestCheckTouchesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	var out, errs bytes.Buffer
	if code := run([]string{"--check", "--run-dir", dir, "--peer", "host2"}, variables("MESH_PASSWORD", "hunter2"), &out, &errs); code != exitOK {
		t.Errorf("got exit %d, %s", code, errs.String())
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the run directory was made: %v", err)
	}
	if strings.Contains(out.String()+errs.String(), "hunter2") {
		t.Error("the password was printed")
	}
	// What it prints is a configuration file that means the same.
	file := filepath.Join(t.TempDir(), "meshd.conf")
	if err := os.WriteFile(file, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := configure(variables(), "--config", file)
	if err != nil || c.RunDir != dir || !slices.Equal(c.Underlay.Peers, []string{"host2"}) {
		t.Errorf("got %v, %+v", err, c)
	}
}

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		args   string
		code   int
		stdout string
		stderr string
	}{
		{"--help", exitOK, "", "Usage: meshd [options]"},
		{"-h", exitOK, "", "Usage: meshd [options]"},
		{"--version", exitOK, "meshd unreleased\n", ""},
		{"--port 0", exitUsage, "", "meshd: --port: 0 is outside 1 to 65535\nmeshd: \"meshd --help\" lists the options\n"},
		{"--bogus", exitUsage, "", "meshd: unknown flag: --bogus\n"},
	} {
		var out, errs bytes.Buffer
		code := run(strings.Fields(c.args), variables(), &out, &errs)
		if code != c.code || out.String() != c.stdout || !strings.HasPrefix(errs.String(), c.stderr) {
			t.Errorf("%s: got exit %d, %q, %q", c.args, code, out.String(), errs.String())
		}
	}
}

func TestLogHasOptionsAndNoSecrets(t *testing.T) {
	env := variables("MESH_PASSWORD", "hunter2")
	_, f, err := parse([]string{"--mtu", "1400", "--port", "6783", "--bufsz", "8", "--peer", "host1"}, env)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	logOptions(newLogger(&b, LogConfig{Level: "info"}), f)
	for want, is := range map[string]bool{
		" options.peer=[host1] ": true, " options.mtu=1400 ": true, "options=--bufsz": true,
		"options.port": false, "options.bridge": false, "options.config": false, // as they are by themselves
	} {
		if strings.Contains(b.String(), want) != is {
			t.Errorf("%q: want %v in %s", want, is, b.String())
		}
	}
	if strings.Contains(b.String(), "hunter2") {
		t.Errorf("the password is in %s", b.String())
	}
}

func TestMeant(t *testing.T) {
	peer := func(n byte, nick string, state router.PeerState) router.PeerView {
		return router.PeerView{Peer: router.Peer{Name: mesh.PeerName{n}, NickName: nick}, State: state}
	}
	self, all := mesh.PeerName{1}, []router.PeerView{
		peer(1, "host1", router.Alive), peer(2, "host2", router.Suspect), peer(3, "host2", router.Alive), peer(4, "host3", router.Alive),
		peer(5, "host1", router.Suspect), peer(6, "host2", router.Suspect),
	}
	for said, want := range map[string][]mesh.PeerName{
		"host2": {{2}, {6}}, "host1": {{5}}, "host3": {{4}}, "host4": nil, "03:00:00:00:00:00": {{3}}, "09:00:00:00:00:00": {{9}},
	} {
		if got := meant(said, self, all); !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", said, got, want)
		}
	}
}

func TestRepairText(t *testing.T) {
	called := func(owner string) string { return "called " + owner }
	for _, c := range []struct {
		done ipam.Repaired
		want string
	}{
		{ipam.Repaired{}, "nothing to repair: all addresses of the range have an owner, and no peer in reach belongs to another cluster\n"},
		{ipam.Repaired{Filled: true}, "the addresses that nobody owned are another peer's meanwhile\n"},
		{ipam.Repaired{Filled: true, Taken: 56}, "this peer took 56 addresses that nobody in reach knew the owner of\n"},
		{ipam.Repaired{Merged: true, Collisions: []ipam.Collision{
			{Holding: ipam.Holding{Owner: "c1", Addr: netip.MustParsePrefix("10.32.0.1/24")}, With: "0a:00:00:00:00:00"},
			{Holding: ipam.Holding{Owner: mesh.OwnerExpose, Addr: netip.MustParsePrefix("10.32.1.1/24")}, With: "web"},
		}}, "the two clusters are one; \"meshctl status\" of each host names the addresses that are there twice\n" +
			"10.32.0.1/24 of called c1 is also held by 0a:00:00:00:00:00; another one in its place: meshctl attach net:10.32.0.0/24 called c1\n" +
			"10.32.1.1/24 of called mesh:expose is also held by web; another one in its place: meshctl expose net:10.32.1.0/24\n"},
	} {
		if got := repairText(c.done, called); got != c.want {
			t.Errorf("%+v: got %q, want %q", c.done, got, c.want)
		}
	}
}

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	read := func() string {
		b := make([]byte, 100)
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	n := newNotifier(variables("NOTIFY_SOCKET", path, "WATCHDOG_USEC", "20000"), slog.New(slog.NewTextHandler(t.Output(), nil)))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	sick := make(chan error, 1)
	sick <- errors.New("a room does not answer") // the first check fails, so nothing is sent for it
	n.Ready(func(context.Context) error {
		select {
		case err := <-sick:
			return err
		default:
			return nil
		}
	})
	if got := []string{read(), read(), read()}; !slices.Equal(got, []string{"READY=1", "WATCHDOG=1", "WATCHDOG=1"}) {
		t.Errorf("got %q", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	for got := read(); got != "STOPPING=1"; got = read() {
		if got != "WATCHDOG=1" {
			t.Fatalf("got %q", got)
		}
	}
	// Without systemd it is silent.
	silent := newNotifier(variables(), slog.New(slog.DiscardHandler))
	silent.Ready(nil)
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if err := silent.Run(ctx); err != nil {
		t.Error(err)
	}
}

var update = flag.Bool("update", false, "rewrite the generated part of docs/meshd.md")

// The reference holds every option, after a mark that ends what was written by hand.
func TestDocumentedOptions(t *testing.T) {
	const path, mark = "../../docs/meshd.md", "<!-- generated: go test ./cmd/meshd -update -->\n"
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	written, generated, ok := strings.Cut(string(b), mark)
	if !ok {
		t.Fatalf("%s has no line %q", path, mark)
	}
	var want strings.Builder
	want.WriteString("\n| option | default | meaning |\n|---|---|---|\n")
	newFlags(new(options)).VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		value, usage := pflag.UnquoteUsage(f)
		name := "`--" + f.Name
		if f.Shorthand != "" {
			name = "`-" + f.Shorthand + "`, " + name
		}
		if value != "" {
			name += " " + strings.ToUpper(value)
		}
		def := f.DefValue
		if def != "" && def != "false" && def != "[]" && f.Name != "help" {
			def = "`" + def + "`"
		} else {
			def = ""
		}
		fmt.Fprintf(&want, "| %s` | %s | %s |\n", name, def, strings.ReplaceAll(usage, "|", "\\|"))
	})
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

// Whose TLS files the proxy takes by itself: those of the host's dockerd, not of whoever calls himself so. In a
// container, or as another user, that would open Docker to certificates of his own.
func TestDockerdTLS(t *testing.T) {
	const root, user, setuid = "0\t0\t0\t0", "1000\t1000\t1000\t1000", "1000\t0\t0\t0"
	for _, c := range []struct {
		name, comm, mounts, uids, line string
		found, verify                  bool
	}{
		{"dockerd", "dockerd", "mnt:[1]", root, "dockerd\x00--tlsverify\x00--tlscacert=/ca", true, true},
		{"dockerd without", "dockerd", "mnt:[1]", root, "dockerd", false, false},
		{"without verifying", "dockerd", "mnt:[1]", root, "dockerd\x00--tls\x00--tlscacert\x00/ca", true, false},
		{"another program", "docker", "mnt:[1]", root, "dockerd\x00--tlsverify", false, false},
		{"in a container", "dockerd", "mnt:[2]", root, "dockerd\x00--tlsverify\x00--tlscacert=/ca", false, false},
		{"another user's", "dockerd", "mnt:[1]", user, "dockerd\x00--tlsverify\x00--tlscacert=/ca", false, false},
		{"by setuid", "dockerd", "mnt:[1]", setuid, "dockerd\x00--tlsverify\x00--tlscacert=/ca", false, false},
	} {
		proc := t.TempDir()
		for path, content := range map[string]string{"7/comm": c.comm + "\n", "7/cmdline": c.line, "7/status": "Name:\t" + c.comm + "\nUid:\t" + c.uids + "\nGid:\t0\n"} {
			path = filepath.Join(proc, path)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		for dir, to := range map[string]string{"self/ns": "mnt:[1]", "7/ns": c.mounts} {
			dir = filepath.Join(proc, dir)
			if err := errors.Join(os.MkdirAll(dir, 0o755), os.Symlink(to, filepath.Join(dir, "mnt"))); err != nil {
				t.Fatal(err)
			}
		}
		files, verify, found := dockerdTLS(proc)
		if found != c.found || verify != c.verify || found && files.CACert != "/ca" {
			t.Errorf("%s: got %+v, verify %v, found %v", c.name, files, verify, found)
		}
	}
}
