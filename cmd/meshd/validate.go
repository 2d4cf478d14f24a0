package main

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/pflag"

	"meshd/mesh"
)

// validate checks every option and returns the Config, or all that is wrong at once. hostName is the
// default nickname. It touches nothing.
func validate(o *options, f *pflag.FlagSet, hostName string) (Config, error) {
	v := new(validator)
	c := Config{
		StateDir: v.dir("state-dir", o.stateDir),
		RunDir:   v.dir("run-dir", o.runDir),
		PinDir:   v.dir("pin-dir", o.pinDir),
	}
	for name, why := range unsupported {
		if f.Changed(name) {
			v.fail(name, errors.New(why))
		}
	}
	if o.plugin {
		v.fail("plugin", errors.New("the Docker network plugin is not in this version"))
	}
	c.Underlay = v.underlay(o, hostName)
	c.Overlay = v.overlay(o)
	c.Addresses = v.addresses(o, len(c.Underlay.Peers))
	c.DNS = v.dns(o)
	c.Docker = v.docker(o, c.RunDir)
	c.Control = v.control(o, c.RunDir)
	c.Log = v.log(o)
	return c, errors.Join(v.errs...)
}

// validator collects what is wrong, each with the name of its option.
type validator struct{ errs []error }

func (v *validator) fail(option string, err error) {
	v.errs = append(v.errs, fmt.Errorf("--%s: %w", option, err))
}

func (v *validator) underlay(o *options, hostName string) UnderlayConfig {
	u := UnderlayConfig{
		Port:        v.port("port", o.port),
		NickName:    o.nickname,
		ConnLimit:   o.connLimit,
		NoDiscovery: o.noDiscovery,
		Resume:      o.resume,
	}
	u.VXLANPort = u.Port + 1
	switch {
	case o.vxlanPort != 0:
		u.VXLANPort = v.port("vxlan-port", o.vxlanPort)
		if u.VXLANPort == u.Port {
			v.fail("vxlan-port", fmt.Errorf("%d is the port of the tunnel (--port)", u.Port))
		}
	case u.Port == 65535:
		v.fail("port", errors.New("65535 leaves no port after it for the kernel path; choose another or give --vxlan-port"))
	}
	if o.host != "" {
		var err error
		if u.Host, err = netip.ParseAddr(o.host); err != nil {
			v.fail("host", fmt.Errorf("%q is not an IP address", o.host))
		} else if u.Host.IsUnspecified() {
			u.Host = netip.Addr{}
		} else if u.Host.IsMulticast() {
			v.fail("host", fmt.Errorf("%s is a multicast address", u.Host))
		}
	}
	if o.name != "" {
		var err error
		if u.Name, err = mesh.ParsePeerName(o.name); err != nil {
			v.fail("name", err)
		}
	}
	if u.NickName == "" {
		u.NickName = hostName
	}
	if err := checkNickName(u.NickName); err != nil {
		v.fail("nickname", err)
	}
	if o.connLimit < 0 {
		v.fail("conn-limit", fmt.Errorf("%d is negative", o.connLimit))
	}
	u.TrustedSubnets = v.subnets("trusted-subnets", o.trustedSubnets)
	for _, p := range o.peers {
		if err := checkPeer(p); err != nil {
			v.fail("peer", err)
		} else if !slices.Contains(u.Peers, p) {
			u.Peers = append(u.Peers, p)
		}
	}
	if o.resume && len(o.peers) > 0 {
		v.fail("resume", errors.New("takes the peers of the last run, so no others can be given with it"))
	}
	return u
}

func checkNickName(s string) error {
	switch {
	case s == "":
		return errors.New("the host has no name; give one")
	case len(s) > 64:
		return fmt.Errorf("%d bytes are too many, at most 64", len(s))
	case !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }):
		return fmt.Errorf("%q has spaces or characters that cannot be printed", s)
	}
	return nil
}

// checkPeer accepts what can be a host with or without a port. Whether it resolves shows later: a
// target that does not is kept and tried again.
func checkPeer(s string) error {
	host := s
	if addr, err := netip.ParseAddr(s); err == nil && addr.Is6() {
		return nil
	}
	if i := strings.LastIndexByte(s, ':'); i >= 0 {
		host = s[:i]
		if n, err := strconv.ParseUint(s[i+1:], 10, 16); err != nil || n == 0 {
			return fmt.Errorf("%q: %q is not a port", s, s[i+1:])
		}
	}
	if inner, ok := strings.CutPrefix(host, "["); ok {
		addr, err := netip.ParseAddr(strings.TrimSuffix(inner, "]"))
		if err != nil || !addr.Is6() || !strings.HasSuffix(inner, "]") {
			return fmt.Errorf("%q is not an IPv6 address in brackets", s)
		}
		return nil
	}
	if host == "" || len(host) > 253 || strings.ContainsFunc(host, func(r rune) bool {
		return r > unicode.MaxASCII || !(unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("-._", r))
	}) {
		return fmt.Errorf("%q is not a host name or address", s)
	}
	return nil
}

func (v *validator) overlay(o *options) OverlayConfig {
	c := OverlayConfig{
		Bridge:       o.bridge,
		TAP:          o.tap,
		VXLAN:        o.vxlan,
		Ifname:       o.ifname,
		DockerBridge: o.dockerBridge,
		NFTable:      o.nfTable,
		MTU:          o.mtu,
		NoFastDP:     o.noFastDP,
		NoMasqLocal:  o.noMasqLocal,
		NoSpoofGuard: o.noSpoofGuard,
	}
	if c.TAP == "" {
		c.TAP = c.Bridge + "-tap"
	}
	if c.VXLAN == "" {
		c.VXLAN = c.Bridge + "-vx"
	}
	seen := map[string]string{}
	for _, d := range []struct{ option, name string }{
		{"bridge", c.Bridge}, {"tap", c.TAP}, {"vxlan", c.VXLAN}, {"docker-bridge", c.DockerBridge},
	} {
		v.device(d.option, d.name)
		if other, ok := seen[d.name]; ok {
			v.fail(d.option, fmt.Errorf("%s is already the name given by --%s", d.name, other))
		}
		seen[d.name] = d.option
	}
	v.device("ifname", c.Ifname)
	if c.NFTable == "" || strings.ContainsFunc(c.NFTable, func(r rune) bool {
		return r > unicode.MaxASCII || !(unicode.IsLetter(r) || unicode.IsDigit(r) || r == '_' || r == '-')
	}) {
		v.fail("nft-table", fmt.Errorf("%q is not a name of letters, digits, - and _", c.NFTable))
	}
	// 576 is what every IPv4 host must accept (RFC 791), 65535 the largest packet.
	if c.MTU != 0 && (c.MTU < 576 || c.MTU > 65535) {
		v.fail("mtu", fmt.Errorf("%d is outside 576 to 65535", c.MTU))
	}
	return c
}

// device checks a network device's name as Linux does (dev_valid_name, IFNAMSIZ 16 with its final zero).
func (v *validator) device(option, name string) {
	switch {
	case name == "" || name == "." || name == "..":
		v.fail(option, fmt.Errorf("%q is not a device name", name))
	case len(name) > 15:
		v.fail(option, fmt.Errorf("%s is longer than the 15 bytes that a device name may have", name))
	case strings.ContainsFunc(name, func(r rune) bool { return r == '/' || r == ':' || unicode.IsSpace(r) || !unicode.IsPrint(r) }):
		v.fail(option, fmt.Errorf("%q is not a device name", name))
	}
}

func (v *validator) addresses(o *options, targets int) AddressConfig {
	c := AddressConfig{RangeGiven: o.allocRangeGiven, ReclaimAfter: o.reclaimAfter}
	if o.reclaimAfter < 0 {
		v.fail("ipalloc-reclaim-after", fmt.Errorf("%s is negative", o.reclaimAfter))
	}
	v.init(&c, o.allocInit, targets)
	if o.allocRange == "" {
		if o.defaultSubnet != "" {
			v.fail("ipalloc-default-subnet", errors.New("allocation is turned off by an empty --ipalloc-range"))
		}
		return c
	}
	c.Range = v.allocatable("ipalloc-range", o.allocRange)
	c.DefaultSubnet = c.Range
	if o.defaultSubnet != "" {
		c.DefaultSubnet = v.allocatable("ipalloc-default-subnet", o.defaultSubnet)
		if c.Range.IsValid() && c.DefaultSubnet.IsValid() &&
			(c.DefaultSubnet.Bits() < c.Range.Bits() || !c.Range.Contains(c.DefaultSubnet.Addr())) {
			v.fail("ipalloc-default-subnet", fmt.Errorf("%s is not inside the range %s", c.DefaultSubnet, c.Range))
		}
	}
	return c
}

// allocatable is an IPv4 prefix of at least four addresses, without host bits.
func (v *validator) allocatable(option, text string) netip.Prefix {
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil || !p.Addr().Is4():
		v.fail(option, fmt.Errorf("%q is not an IPv4 CIDR such as 10.32.0.0/12", text))
	case p.Bits() > 30:
		v.fail(option, fmt.Errorf("%s is smaller than /30", text))
	case p.Bits() < 4:
		v.fail(option, fmt.Errorf("%s is larger than /4", text))
	case p != p.Masked():
		v.fail(option, fmt.Errorf("%s has bits set after the prefix; the network is %s", text, p.Masked()))
	case p.Addr().IsMulticast() || p.Addr().IsLoopback() || p.Addr().IsUnspecified():
		v.fail(option, fmt.Errorf("%s is not for hosts", text))
	default:
		return p
	}
	return netip.Prefix{}
}

func (v *validator) init(c *AddressConfig, text string, targets int) {
	kind, arg, hasArg := strings.Cut(text, "=")
	switch {
	case kind == "consensus" && !hasArg:
		c.Peers = targets + 1
	case kind == "consensus":
		n, err := strconv.Atoi(arg)
		if err != nil || n < 1 || n > 4096 {
			v.fail("ipalloc-init", fmt.Errorf("%q: the number of peers is 1 to 4096", text))
		}
		c.Peers = n
	case kind == "observer" && !hasArg:
		c.Init = InitObserver
	case kind == "seed" && arg != "":
		c.Init = InitSeed
		for s := range strings.SplitSeq(arg, ",") {
			name, err := mesh.ParsePeerName(s)
			if err != nil {
				v.fail("ipalloc-init", err)
			} else if slices.Contains(c.Seeds, name) {
				v.fail("ipalloc-init", fmt.Errorf("%s is named twice", name))
			}
			c.Seeds = append(c.Seeds, name)
		}
	default:
		v.fail("ipalloc-init", fmt.Errorf("%q is none of consensus, consensus=NUMBER, seed=NAME,NAME... and observer", text))
	}
}

func (v *validator) dns(o *options) DNSConfig {
	c := DNSConfig{
		Off:             o.noDNS,
		Listen:          netip.AddrPortFrom(netip.Addr{}, 53),
		TTL:             time.Duration(o.dnsTTL) * time.Second,
		FallbackTimeout: o.dnsFallback,
		AllowRebind:     o.allowRebind,
		ResolvConf:      v.path("resolv-conf", o.resolvConf),
	}
	var err error
	if c.Domain, err = parseDomain(o.domain); err != nil {
		v.fail("dns-domain", err)
	}
	if o.dnsTTL < 0 || o.dnsTTL > 86400 {
		v.fail("dns-ttl", fmt.Errorf("%d is outside 0 to 86400 seconds", o.dnsTTL))
	}
	if o.dnsFallback <= 0 || o.dnsFallback > time.Minute {
		v.fail("dns-fallback-timeout", fmt.Errorf("%s is outside 0s to 1m", o.dnsFallback))
	}
	if o.dnsListen != "" {
		if c.Listen, err = parseListen(o.dnsListen); err != nil {
			v.fail("dns-listen-address", err)
		}
	}
	return c
}

// parseDomain returns s in lower case with its final dot (RFC 1035 2.3.4: labels of 1 to 63 bytes,
// 255 in all with the length bytes; room is left here for a container's name in front).
func parseDomain(s string) (string, error) {
	d := strings.ToLower(strings.TrimSuffix(s, "."))
	if d == "" || len(d) > 180 {
		return "", fmt.Errorf("%q is not a domain of 1 to 180 bytes", s)
	}
	for label := range strings.SplitSeq(d, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' ||
			strings.ContainsFunc(label, func(r rune) bool {
				return r > unicode.MaxASCII || !(unicode.IsLower(r) || unicode.IsDigit(r) || r == '-' || r == '_')
			}) {
			return "", fmt.Errorf("%q: label %q is not 1 to 63 letters, digits and hyphens", s, label)
		}
	}
	return d + ".", nil
}

// parseListen reads IP:port, :port or IP alone, whose port is 53.
func parseListen(s string) (netip.AddrPort, error) {
	if addr, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(addr, 53), nil
	}
	if port, ok := strings.CutPrefix(s, ":"); ok {
		if n, err := strconv.ParseUint(port, 10, 16); err == nil && n > 0 {
			return netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(n)), nil
		}
	}
	if ap, err := netip.ParseAddrPort(s); err == nil && ap.Port() > 0 {
		return ap, nil
	}
	return netip.AddrPort{}, fmt.Errorf("%q is not IP:port", s)
}

func (v *validator) docker(o *options, runDir string) DockerConfig {
	c := DockerConfig{API: o.dockerAPI, Proxy: ProxyConfig{
		On:                  o.proxy && o.dockerAPI != "",
		NoDefaultIPAlloc:    o.noDefaultIPAlloc,
		NoRewriteHosts:      o.noRewriteHosts,
		NoDNS:               o.withoutDNS,
		NoMulticastRoute:    o.noMulticastRoute,
		RewriteInspect:      o.rewriteInspect,
		HostnameFromLabel:   o.fromLabel,
		HostnameReplacement: o.replacement,
		TLSOn:               o.tls || o.tlsVerify,
		TLSVerify:           o.tlsVerify,
		NoDetectTLS:         o.noDetectTLS,
	}}
	var err error
	if c.API != "" {
		if c.API, err = parseEndpoint(o.dockerAPI); err != nil {
			v.fail("docker-api", err)
		}
	}
	p := &c.Proxy
	if p.HostnameMatch, err = regexp.Compile(o.match); err != nil {
		v.fail("hostname-match", err)
	}
	for _, text := range o.proxyListen {
		e, err := parseEndpoint(text)
		if err != nil {
			v.fail("proxy-listen", err)
		} else if !slices.Contains(p.Listen, e) {
			p.Listen = append(p.Listen, e)
		}
	}
	if len(p.Listen) == 0 {
		p.Listen = []string{"unix://" + filepath.Join(runDir, "docker.sock")}
	}
	if p.On && slices.Contains(p.Listen, c.API) {
		v.fail("proxy-listen", fmt.Errorf("%s is Docker's own endpoint (--docker-api)", c.API))
	}
	p.TLS = v.tlsFiles("tls", o.tlsFiles)
	if p.TLSVerify && p.TLS.CACert == "" && p.TLS.Cert != "" {
		v.fail("tlsverify", errors.New("needs --tlscacert"))
	}
	for _, e := range p.Listen {
		// Without --no-detect-tls the files of dockerd may still come to help; the proxy looks when it listens.
		if !p.TLSVerify && (p.TLSOn || p.NoDetectTLS) && !local(e) {
			v.fail("proxy-listen", fmt.Errorf("%s: who reaches Docker's API is root on this host: give --tlsverify with certificates, or a loopback address", e))
		}
	}
	return c
}

// local reports whether an endpoint can be reached from this host only.
func local(endpoint string) bool {
	host, ok := strings.CutPrefix(endpoint, "tcp://")
	if !ok {
		return true
	}
	ap, err := netip.ParseAddrPort(host)
	return err == nil && ap.Addr().IsLoopback()
}

// parseEndpoint reads unix:///path, /path, tcp://host:port, host:port and :port.
func parseEndpoint(s string) (string, error) {
	if filepath.IsAbs(s) {
		s = "unix://" + s
	} else if !strings.Contains(s, "://") {
		s = "tcp://" + s
	}
	u, err := url.Parse(s)
	if err != nil {
		return "", fmt.Errorf("%q is not an endpoint such as unix:///path or tcp://host:port", s)
	}
	switch u.Scheme {
	case "unix":
		if u.Host != "" || !filepath.IsAbs(u.Path) || filepath.Clean(u.Path) == "/" {
			return "", fmt.Errorf("%q: the path of a unix socket is absolute, as in unix:///run/docker.sock", s)
		}
		return "unix://" + filepath.Clean(u.Path), nil
	case "tcp", "http", "https":
		host, port := u.Hostname(), u.Port()
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return "", fmt.Errorf("%q has no port", s)
		}
		if u.Path != "" && u.Path != "/" {
			return "", fmt.Errorf("%q has a path", s)
		}
		if host == "" {
			host = "0.0.0.0"
		}
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		return "tcp://" + host + ":" + port, nil
	}
	return "", fmt.Errorf("%q: the scheme is unix or tcp", s)
}

func (v *validator) control(o *options, runDir string) ControlConfig {
	c := ControlConfig{Socket: filepath.Join(runDir, "meshd.sock")}
	if o.socket != "" {
		c.Socket = v.path("socket", o.socket)
	}
	if len(c.Socket) > maxSocketPath {
		v.fail("socket", fmt.Errorf("%s is longer than the %d bytes that a socket's path may have", c.Socket, maxSocketPath))
	}
	c.TLS = v.tlsFiles("http-tls", o.httpTLS)
	if c.TLS != (TLSFiles{}) && (c.TLS.CACert == "" || c.TLS.Cert == "") {
		v.fail("http-tlscacert", errors.New("--http-tlscacert, --http-tlscert and --http-tlskey belong together"))
	}
	c.HTTPAddr = v.listener("http-addr", o.httpAddr)
	if ap, err := netip.ParseAddrPort(c.HTTPAddr); err == nil && !ap.Addr().IsLoopback() && c.TLS == (TLSFiles{}) {
		v.fail("http-addr", fmt.Errorf("%s is not a loopback address: anyone who reaches it would control this host; give --http-tlscacert, --http-tlscert and --http-tlskey, or use the unix socket", c.HTTPAddr))
	}
	c.StatusAddr = v.listener("status-addr", o.statusAddr)
	c.MetricsAddr = v.listener("metrics-addr", o.metricsAddr)
	used := map[string]string{c.Socket: "socket"}
	for _, l := range []struct{ option, addr string }{
		{"http-addr", c.HTTPAddr}, {"status-addr", c.StatusAddr}, {"metrics-addr", c.MetricsAddr},
	} {
		if other, ok := used[l.addr]; ok && l.addr != "" {
			v.fail(l.option, fmt.Errorf("%s is already that of --%s", l.addr, other))
		}
		used[l.addr] = l.option
	}
	return c
}

// maxSocketPath is what sun_path holds with its final zero (unix(7)).
const maxSocketPath = 107

// listener accepts "", IP:port and an absolute path.
func (v *validator) listener(option, s string) string {
	if s == "" {
		return ""
	}
	if filepath.IsAbs(s) {
		if len(s) > maxSocketPath {
			v.fail(option, fmt.Errorf("%s is longer than the %d bytes that a socket's path may have", s, maxSocketPath))
		}
		return filepath.Clean(s)
	}
	if port, ok := strings.CutPrefix(s, ":"); ok {
		s = "0.0.0.0:" + port
	}
	if port, ok := strings.CutPrefix(s, "localhost:"); ok {
		s = "127.0.0.1:" + port
	}
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		v.fail(option, fmt.Errorf("%q is neither IP:port nor the absolute path of a socket", s))
		return ""
	}
	return ap.String()
}

func (v *validator) log(o *options) LogConfig {
	c := LogConfig{Level: strings.ToLower(o.logLevel), JSON: o.logFormat == "json"}
	switch c.Level {
	case "warning":
		c.Level = "warn"
	case "debug", "info", "warn", "error":
	default:
		v.fail("log-level", fmt.Errorf("%q is none of debug, info, warn and error", o.logLevel))
	}
	if o.logFormat != "text" && o.logFormat != "json" {
		v.fail("log-format", fmt.Errorf("%q is neither text nor json", o.logFormat))
	}
	return c
}

func (v *validator) port(option string, n int) uint16 {
	if n < 1 || n > 65535 {
		v.fail(option, fmt.Errorf("%d is outside 1 to 65535", n))
		return 0
	}
	return uint16(n)
}

func (v *validator) subnets(option, text string) []netip.Prefix {
	var out []netip.Prefix
	for s := range strings.SplitSeq(text, ",") {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		p, err := netip.ParsePrefix(s)
		if err != nil {
			v.fail(option, fmt.Errorf("%q is not a CIDR", s))
		} else if p != p.Masked() {
			v.fail(option, fmt.Errorf("%s has bits set after the prefix; the network is %s", s, p.Masked()))
		} else {
			out = append(out, p)
		}
	}
	return out
}

func (v *validator) path(option, s string) string {
	if !filepath.IsAbs(s) {
		v.fail(option, fmt.Errorf("%q is not an absolute path", s))
	}
	return filepath.Clean(s)
}

// dir is a directory of our own, so never one of the system's roots.
func (v *validator) dir(option, s string) string {
	s = v.path(option, s)
	if filepath.Dir(s) == "/" {
		v.fail(option, fmt.Errorf("%s is too high up to be meshd's own", s))
	}
	return s
}

func (v *validator) tlsFiles(prefix string, t TLSFiles) TLSFiles {
	for _, p := range []struct {
		option string
		path   *string
	}{{"cacert", &t.CACert}, {"cert", &t.Cert}, {"key", &t.Key}} {
		if *p.path != "" {
			*p.path = v.path(prefix+p.option, *p.path)
		}
	}
	if (t.Cert == "") != (t.Key == "") {
		v.fail(prefix+"cert", fmt.Errorf("--%scert and --%skey belong together", prefix, prefix))
	}
	return t
}
