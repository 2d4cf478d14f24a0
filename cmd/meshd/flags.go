package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
)

// defaultConfigFile is read when it exists and no other was named.
const defaultConfigFile = "/etc/meshd/meshd.conf"

// options are the values as given, before validate makes a Config of them.
type options struct {
	configFile string
	check      bool
	reset      bool
	version    bool
	help       bool

	host, name, nickname, passwordFile string
	port, vxlanPort, connLimit         int
	trustedSubnets                     string
	noDiscovery, resume                bool
	peers                              []string

	bridge, tap, vxlan, ifname, dockerBridge, nfTable string
	mtu                                               int
	noFastDP, noMasqLocal, noSpoofGuard               bool

	allocRange, defaultSubnet, allocInit string
	allocRangeGiven                      bool
	reclaimAfter                         time.Duration

	noDNS, allowRebind               bool
	domain, dnsListen, resolvConf    string
	dnsTTL                           int
	dnsFallback                      time.Duration
	dockerAPI                        string
	proxy, plugin                    bool
	proxyListen                      []string
	noDefaultIPAlloc, noRewriteHosts bool
	withoutDNS, noMulticastRoute     bool
	rewriteInspect, noDetectTLS      bool
	fromLabel, match, replacement    string
	tls, tlsVerify                   bool
	tlsFiles                         TLSFiles

	stateDir, runDir, pinDir, socket  string
	httpAddr, statusAddr, metricsAddr string
	httpTLS                           TLSFiles
	logLevel, logFormat               string
}

// commandFlags make sense on the command line only: neither the environment nor a file sets them.
var commandFlags = []string{"check", "config", "help", "reset", "version"}

// aliases are other spellings with the same meaning, those of Weave Net's scripts among them.
var aliases = map[string]string{
	"iprange":      "ipalloc-range",
	"weave-bridge": "bridge",
}

// ignored are options of Weave Net that change nothing here: accepted so that scripts go on working,
// with a line in the log. The value says whether they take an argument.
var ignored = map[string]bool{
	"bufsz":                true,
	"min-protocol-version": true,
	"no-bridged-fastdp":    false,
	"no-restart":           false,
	"pkt-debug":            false,
	"plugin-socket":        true,
	"plugin-mesh-socket":   true,
	"proc-path":            true,
	"profile":              true,
}

// unsupported are options of Weave Net whose meaning does not exist here; to ignore them would leave
// the user with something else than was asked for.
var unsupported = map[string]string{
	"awsvpc":              "there is no AWS VPC mode",
	"datapath":            "there is no Open vSwitch datapath; --bridge names the bridge",
	"db-prefix":           "the state file is named by --state-dir",
	"expect-npc":          "there is no network policy controller",
	"host-root":           "meshd runs on the host itself",
	"password":            "the command line is public on a host: use --password-file or the variable MESH_PASSWORD",
	"plugin-v2":           "there is no managed Docker plugin",
	"plugin-v2-multicast": "there is no managed Docker plugin",
	"token":               "there is no peer discovery service",
	"peer-discovery-url":  "there is no peer discovery service",
	"advertise-address":   "there is no peer discovery service",
}

func newFlags(o *options) *pflag.FlagSet {
	f := pflag.NewFlagSet("meshd", pflag.ContinueOnError)
	f.SortFlags = false
	f.Usage = func() {} // run prints it
	f.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if to, ok := aliases[name]; ok {
			name = to
		}
		return pflag.NormalizedName(name)
	})
	f.BoolVar(&o.help, "help", false, "print this and exit")
	f.BoolVar(&o.version, "version", false, "print the version and exit")
	f.BoolVar(&o.check, "check", false, "check the options, print them as a configuration file and exit; nothing is touched")
	f.BoolVar(&o.reset, "reset", false, "remove everything that meshd left on this host, its state included, and exit; meshd must not be running")
	f.StringVar(&o.configFile, "config", "", "`file` of lines \"name = value\"; "+defaultConfigFile+" is read when it exists")

	f.StringVar(&o.host, "host", "", "IP `address` to bind for the tunnel; empty means all")
	f.IntVar(&o.port, "port", 6783, "UDP and TCP port of the tunnel")
	f.IntVar(&o.vxlanPort, "vxlan-port", 0, "UDP port of the kernel path; 0 means --port plus 1")
	f.StringVar(&o.name, "name", "", "peer `name` as six bytes such as 7a:9f:eb:b6:0c:6e or ::1; empty means made from the peer's key")
	f.StringVar(&o.nickname, "nickname", "", "`name` shown to people; empty means the host name")
	f.StringVar(&o.passwordFile, "password-file", "", "`file` that holds the password; there is no option that takes the password itself, since the command line is public on a host")
	f.StringVar(&o.trustedSubnets, "trusted-subnets", "", "comma-separated `CIDRs`: frames to peers there may go unencrypted where the peer trusts us likewise")
	f.IntVar(&o.connLimit, "conn-limit", 200, "most connections to other peers; 0 means no limit")
	f.BoolVar(&o.noDiscovery, "no-discovery", false, "dial only the peers that were named, not those they know")
	f.BoolVar(&o.resume, "resume", false, "dial the peers of the last run; cannot be given with peers")
	f.StringArrayVar(&o.peers, "peer", nil, "`host[:port]` of a peer to dial, like the arguments after the options; repeatable")

	f.StringVar(&o.bridge, "bridge", "mesh", "`name` of the bridge")
	f.StringVar(&o.tap, "tap", "", "`name` of the TAP device; empty means that of the bridge and -tap")
	f.StringVar(&o.vxlan, "vxlan", "", "`name` of the vxlan device; empty means that of the bridge and -vx")
	f.StringVar(&o.ifname, "ifname", "ethmesh", "`name` of the interface in a container")
	f.StringVar(&o.dockerBridge, "docker-bridge", "docker0", "`name` of Docker's bridge")
	f.StringVar(&o.nfTable, "nft-table", "mesh", "`name` of the nftables table (family inet)")
	f.IntVar(&o.mtu, "mtu", 0, "overlay MTU in `bytes`; 0 means as much as the underlay carries")
	f.BoolVar(&o.noFastDP, "no-fastdp", false, "carry frames to other peers by the userspace path only")
	f.BoolVar(&o.noMasqLocal, "no-masq-local", false, "keep the source address of traffic from outside to containers of this host")
	f.BoolVar(&o.noSpoofGuard, "no-spoof-guard", false, "let containers send from MAC and IP addresses that are not theirs")

	f.StringVar(&o.allocRange, "ipalloc-range", "10.32.0.0/12", "IPv4 `CIDR` that addresses are allocated from, the same on all peers; empty turns allocation off")
	f.StringVar(&o.defaultSubnet, "ipalloc-default-subnet", "", "`CIDR` for containers that ask for no subnet; empty means the whole range")
	f.StringVar(&o.allocInit, "ipalloc-init", "consensus", "how the range is first divided: consensus[=number of peers], seed=name,name... or observer")
	f.DurationVar(&o.reclaimAfter, "ipalloc-reclaim-after", 0, "take over the addresses of a peer that was unreachable for this `duration`; 0 means only by \"meshctl rmpeer\"")

	f.BoolVar(&o.noDNS, "no-dns", false, "run no name server")
	f.StringVar(&o.domain, "dns-domain", "mesh.internal.", "`domain` of the containers' names")
	f.StringVar(&o.dnsListen, "dns-listen-address", "", "`[IP]:port` of the name server; empty means port 53 of Docker's bridge")
	f.IntVar(&o.dnsTTL, "dns-ttl", 1, "time to live of answers in `seconds`")
	f.DurationVar(&o.dnsFallback, "dns-fallback-timeout", 5*time.Second, "`duration` that a query to the host's own name servers may take")
	f.BoolVar(&o.allowRebind, "dns-allow-rebind", false, "pass on answers from outside that point to addresses of the mesh")
	f.StringVar(&o.resolvConf, "resolv-conf", "/etc/resolv.conf", "`file` that names the host's own name servers")

	f.StringVar(&o.dockerAPI, "docker-api", "", "Docker's `endpoint`, unix:///path or tcp://host:port; unset means DOCKER_HOST or the usual socket, and --docker-api= no Docker")
	f.BoolVar(&o.proxy, "proxy", true, "serve the Docker API proxy")
	f.BoolVar(&o.plugin, "plugin", false, "serve the Docker network plugin; not in this version")
	f.StringArrayVarP(&o.proxyListen, "proxy-listen", "H", nil, "`endpoint` of the proxy, unix:///path, tcp://host:port or :port; repeatable; none means docker.sock in the run directory")
	f.BoolVar(&o.noDefaultIPAlloc, "no-default-ipalloc", false, "proxy: attach only containers that have MESH_CIDR")
	f.BoolVar(&o.noRewriteHosts, "no-rewrite-hosts", false, "proxy: leave /etc/hosts of containers alone")
	f.BoolVar(&o.withoutDNS, "without-dns", false, "proxy: leave the name servers of containers alone")
	f.BoolVar(&o.noMulticastRoute, "no-multicast-route", false, "proxy: add no multicast route in containers")
	f.BoolVar(&o.rewriteInspect, "rewrite-inspect", false, "proxy: show mesh addresses in \"docker inspect\"")
	f.StringVar(&o.fromLabel, "hostname-from-label", "", "proxy: take a container's host name from this `label`")
	f.StringVar(&o.match, "hostname-match", "(.*)", "proxy: `regexp` applied to a container's name for its host name")
	f.StringVar(&o.replacement, "hostname-replacement", "$1", "proxy: `text` that replaces the match")
	f.BoolVar(&o.tls, "tls", false, "proxy: TLS on TCP endpoints; implied by --tlsverify")
	f.BoolVar(&o.tlsVerify, "tlsverify", false, "proxy: demand client certificates")
	f.StringVar(&o.tlsFiles.CACert, "tlscacert", "", "proxy: `file` of the CA that signs client certificates")
	f.StringVar(&o.tlsFiles.Cert, "tlscert", "", "proxy: `file` of the certificate")
	f.StringVar(&o.tlsFiles.Key, "tlskey", "", "proxy: `file` of the key")
	f.BoolVar(&o.noDetectTLS, "no-detect-tls", false, "proxy: do not take TLS files from dockerd's command line")

	f.StringVar(&o.stateDir, "state-dir", "/var/lib/meshd", "`directory` of the state that outlives a reboot")
	f.StringVar(&o.runDir, "run-dir", "/run/meshd", "`directory` of sockets and the pid file")
	f.StringVar(&o.pinDir, "pin-dir", "/sys/fs/bpf/meshd", "`directory` of pinned BPF objects")
	f.StringVar(&o.socket, "socket", "", "unix `socket` of the control API; empty means meshd.sock in the run directory")
	f.StringVar(&o.httpAddr, "http-addr", "", "`IP:port` that serves the control API as well: loopback only, unless the three --http-tls options are given; an absolute path is a second unix socket")
	f.StringVar(&o.httpTLS.CACert, "http-tlscacert", "", "`file` of the CA that signs the certificates of control clients")
	f.StringVar(&o.httpTLS.Cert, "http-tlscert", "", "`file` of the certificate of --http-addr")
	f.StringVar(&o.httpTLS.Key, "http-tlskey", "", "`file` of the key of --http-addr")
	f.StringVar(&o.statusAddr, "status-addr", "127.0.0.1:6782", "`IP:port` or socket path that serves status, report and metrics, read-only; empty means none")
	f.StringVar(&o.metricsAddr, "metrics-addr", "", "`IP:port` or socket path that serves metrics alone; empty means none beside --status-addr")
	f.StringVar(&o.logLevel, "log-level", "info", "least `level` logged: debug, info, warn or error")
	f.StringVar(&o.logFormat, "log-format", "text", "`format` of the log: text or json")

	for name, takesValue := range ignored {
		if takesValue {
			f.String(name, "", "ignored")
		} else {
			f.Bool(name, false, "ignored")
		}
		f.Lookup(name).Hidden = true
	}
	for name := range unsupported {
		f.String(name, "", "not supported")
		f.Lookup(name).Hidden = true
		f.Lookup(name).NoOptDefVal = "true"
	}
	return f
}

// environment looks up variables; a test passes its own.
type environment func(name string) (value string, ok bool)

// parse merges command line, environment and file, in this order of precedence, and checks the
// result. It reads files but changes nothing.
func parse(args []string, env environment) (*options, *pflag.FlagSet, error) {
	o := new(options)
	f := newFlags(o)
	if err := f.Parse(args); err != nil {
		return o, f, plain(err)
	}
	if f.NArg() > 0 {
		o.peers = append(o.peers, f.Args()...)
		f.Lookup("peer").Changed = true
	}
	if o.help || o.version {
		return o, f, nil
	}
	if err := fromEnvironment(f, env); err != nil {
		return o, f, err
	}
	if err := fromFile(o, f, env); err != nil {
		return o, f, err
	}
	if !f.Changed("docker-api") {
		o.dockerAPI = "unix:///var/run/docker.sock"
		if v, ok := env("DOCKER_HOST"); ok && v != "" {
			o.dockerAPI = v
		}
	}
	o.allocRangeGiven = f.Changed("ipalloc-range")
	return o, f, nil
}

// fromEnvironment sets what the command line left open from MESH_X_Y for --x-y, else from WEAVE_X_Y.
// An empty variable counts as unset.
func fromEnvironment(f *pflag.FlagSet, env environment) error {
	var errs []error
	f.VisitAll(func(fl *pflag.Flag) {
		if fl.Changed || fl.Hidden || slices.Contains(commandFlags, fl.Name) {
			return
		}
		upper := strings.ToUpper(strings.ReplaceAll(fl.Name, "-", "_"))
		for _, name := range []string{"MESH_" + upper, "WEAVE_" + upper} {
			v, ok := env(name)
			if !ok || v == "" {
				continue
			}
			values := []string{v}
			if fl.Value.Type() == "stringArray" {
				values = strings.Fields(v)
			}
			for _, v := range values {
				if err := setFlag(f, fl, v); err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", name, err))
				}
			}
			return
		}
	})
	return errors.Join(errs...)
}

// setFlag sets a flag from outside the command line, where switches are also written yes, no, on and off.
func setFlag(f *pflag.FlagSet, fl *pflag.Flag, value string) error {
	if fl.Value.Type() == "bool" {
		switch strings.ToLower(value) {
		case "yes", "on", "y":
			value = "true"
		case "no", "off", "n":
			value = "false"
		}
		if _, err := strconv.ParseBool(value); err != nil {
			return fmt.Errorf("%q is neither true nor false", value)
		}
	}
	return plain(f.Set(fl.Name, value))
}

// plain says in words what pflag says of a value that cannot be read.
func plain(err error) error {
	bad := new(pflag.InvalidValueError)
	if !errors.As(err, &bad) {
		return err
	}
	kind := map[string]string{"int": "a whole number", "bool": "true or false", "duration": "a duration such as 30s"}[bad.GetFlag().Value.Type()]
	if kind == "" {
		return err
	}
	return fmt.Errorf("--%s: %q is not %s", bad.GetFlag().Name, bad.GetValue(), kind)
}

func fromFile(o *options, f *pflag.FlagSet, env environment) error {
	path := o.configFile
	if path == "" {
		if v, ok := env("MESH_CONFIG"); ok {
			path = v
		}
	}
	named := path != ""
	if !named {
		path = defaultConfigFile
	}
	file, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) && !named {
		return nil
	}
	if err != nil {
		return fmt.Errorf("configuration file: %w", err)
	}
	defer file.Close()
	settings, err := readSettings(file)
	if err != nil {
		return fmt.Errorf("configuration file %s: %w", path, err)
	}
	before := map[string]bool{}
	f.VisitAll(func(fl *pflag.Flag) { before[fl.Name] = fl.Changed })
	for _, s := range settings {
		fl := f.Lookup(s.name)
		if fl == nil || slices.Contains(commandFlags, s.name) {
			return fmt.Errorf("configuration file %s:%d: there is no option %q", path, s.line, s.name)
		}
		if before[fl.Name] {
			continue
		}
		if fl.Changed && fl.Value.Type() != "stringArray" {
			return fmt.Errorf("configuration file %s:%d: %q is set twice", path, s.line, s.name)
		}
		if err := setFlag(f, fl, s.value); err != nil {
			return fmt.Errorf("configuration file %s:%d: %s: %w", path, s.line, s.name, err)
		}
	}
	return nil
}
