package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"meshd/mesh"
	"meshd/proxy/wait"
)

// maxHostname is the longest host name the kernel takes (HOST_NAME_MAX), in bytes.
const maxHostname = 64

// create gives a container that belongs on the mesh what it needs to start there.
func (p *Proxy) create(w http.ResponseWriter, r *http.Request, version string) {
	body, err := readBody(w, r)
	if err == nil && len(bytes.TrimSpace(body)) > 0 { // without one the daemon has its own words for it
		body, err = p.rewriteCreate(r.Context(), body, version, r.URL.Query().Get("name"))
	}
	if err != nil {
		p.refuseFor(w, r, err)
		return
	}
	replaceBody(r, body)
	p.backend.forward(w, r)
}

func replaceBody(r *http.Request, body []byte) {
	r.Body = io.NopCloser(bytes.NewReader(body))
	r.ContentLength = int64(len(body))
	r.TransferEncoding = nil
	r.Header.Del("Content-Length")
}

// rewriteCreate returns the body of a create request as it is to be, for a container called name.
func (p *Proxy) rewriteCreate(ctx context.Context, body []byte, version, name string) ([]byte, error) {
	req, err := parseObject(body)
	if err != nil {
		return nil, fmt.Errorf("the request body: %w", err)
	}
	if err := refuseStray(req); err != nil {
		return nil, err
	}
	host, err := req.child("HostConfig")
	if err != nil {
		return nil, err
	}
	labels, err := stringMap(req, "Labels")
	if err != nil {
		return nil, err
	}
	found, err := p.image(ctx, req, version)
	if err != nil {
		return nil, err
	}
	var img image
	if found != nil {
		img = *found
	}
	var env []string
	if _, err := req.get("Env", &env); err != nil {
		return nil, err
	}
	addrs, wanted, err := p.wanted(append(img.Env, env...), host)
	if err != nil {
		return nil, err
	}
	if !wanted {
		return p.leave(req, labels, img)
	}
	labels[LabelAddrs] = addrs
	steps := []func() error{
		func() error { return req.set("Labels", labels) },
		func() error { return p.setEntrypoint(req, host, found) },
		func() error { return p.setNames(ctx, req, host, labels, version, name) },
		func() error { return req.set("HostConfig", host) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return req.encode(), nil
}

// leave returns the request for a container that stays off the mesh: as it came, but for what an image made
// of a container of ours brings along.
func (p *Proxy) leave(req *object, labels map[string]string, img image) ([]byte, error) {
	// The label decides at start, so that none may come from the user either.
	_, given := labels[LabelAddrs]
	if _, inherited := img.Labels[LabelAddrs]; given || inherited {
		labels[LabelAddrs] = mesh.AddrSpec{Kind: mesh.AddrNone}.String()
		if err := req.set("Labels", labels); err != nil {
			return nil, err
		}
	}
	if !waits(img.Entrypoint) || req.has("Entrypoint") {
		return req.encode(), nil
	}
	entry, cmd, err := command(req, img)
	if err != nil {
		return nil, err
	}
	if len(entry) == 0 {
		entry = words{""} // or the daemon would take the image's
	}
	if err := errors.Join(req.set("Entrypoint", entry), req.set("Cmd", cmd)); err != nil {
		return nil, err
	}
	return req.encode(), nil
}

// strayNames are the members of HostConfig that a daemon up to Docker 20.10 also takes from the outer object
// when there is no HostConfig in it (moby runconfig/config_unix.go), as clients of 2014 wrote them.
var strayNames = strings.Fields(`Binds ContainerIDFile LogConfig NetworkMode PortBindings RestartPolicy AutoRemove
	VolumeDriver VolumesFrom CapAdd CapDrop CgroupnsMode Dns DnsOptions DnsSearch ExtraHosts GroupAdd IpcMode Cgroup Links
	OomScoreAdj PidMode Privileged PublishAllPorts ReadonlyRootfs SecurityOpt StorageOpt Tmpfs UTSMode UsernsMode ShmSize
	Sysctls Runtime Isolation Mounts MaskedPaths ReadonlyPaths Init Capabilities`)

// refuseStray refuses a request whose outer object has what belongs into its HostConfig, and no HostConfig:
// daemons differ in how they read it, and adding a HostConfig would change it for all.
func refuseStray(req *object) error {
	if req.has("HostConfig") {
		return nil
	}
	for _, name := range strayNames {
		if req.has(name) {
			return fmt.Errorf("the member %q belongs into HostConfig, which is missing", name)
		}
	}
	return nil
}

// wanted decides from its environment and network mode whether a container belongs on the mesh, and with
// which addresses. A malformed list is an error now, before the container exists.
func (p *Proxy) wanted(env []string, host *object) (addrs string, ok bool, err error) {
	var mode string
	if _, err := host.get("NetworkMode", &mode); err != nil {
		return "", false, err
	}
	vars := map[string]string{}
	for _, entry := range env { // a later one counts, and one without a value removes, as in the container
		if name, value, set := strings.Cut(entry, "="); set {
			vars[name] = value
		} else {
			delete(vars, name)
		}
	}
	variable := "MESH_CIDR"
	value, asked := vars[variable]
	if !asked {
		variable = "WEAVE_CIDR"
		value, asked = vars[variable]
	}
	specs, err := mesh.ParseAddrSpecs(value)
	for _, s := range specs {
		if r := p.cfg.Range; s.Kind == mesh.AddrSubnet && r.IsValid() && (!r.Contains(s.Prefix.Addr()) || s.Prefix.Bits() < r.Bits()) {
			err = fmt.Errorf("address %q: lies outside the range %v, from which addresses are given", s, r)
		}
	}
	if err != nil {
		return "", false, fmt.Errorf("%s=%q: %w", variable, shown(value), err)
	}
	switch {
	case len(specs) == 1 && specs[0].Kind == mesh.AddrNone:
		return "", false, nil
	case mode == "host" || strings.HasPrefix(mode, "container:"):
		return "", false, nil // no network namespace of its own
	case networkMode(mode).isUsers():
		return value, asked, nil // only on demand
	}
	return value, asked || !p.cfg.NoDefaultIPAlloc, nil
}

// shown is what an error quotes of a value.
func shown(value string) string {
	const most = 200 // bytes
	if len(value) <= most {
		return value
	}
	return value[:most] + "..."
}

// image is what a container inherits.
type image struct {
	Entrypoint, Cmd words
	Env             []string
	Labels          map[string]string
}

// words is a command: an array, or a string that stands for an array of one.
type words []string

func (w *words) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*w = words{one}
		if string(b) == "null" {
			*w = nil
		}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(w))
}

// image asks the daemon for the image of a create request. nil means that there is none, which the daemon has
// its own words for; a client that reads them pulls the image and comes again.
func (p *Proxy) image(ctx context.Context, req *object, version string) (*image, error) {
	var name string
	if _, err := req.get("Image", &name); err != nil || name == "" {
		return nil, err
	}
	// A name has slashes, which stay; what could leave the path or begin a query does not.
	path := version + "/images/" + strings.ReplaceAll(url.PathEscape(name), "%2F", "/") + "/json"
	r, err := p.backend.call(ctx, http.MethodGet, path)
	if err != nil {
		return nil, fmt.Errorf("inspect image %q: %w", name, err)
	}
	if r.code != http.StatusOK {
		return nil, nil
	}
	doc := struct{ Config *image }{&image{}}
	if err := json.Unmarshal(r.body, &doc); err != nil {
		return nil, fmt.Errorf("inspect image %q: %w", name, err)
	}
	if doc.Config == nil { // null
		doc.Config = &image{}
	}
	return doc.Config, nil
}

// waits reports whether an entrypoint is one of ours, as in an image made of a container of ours.
func waits(entry words) bool { return len(entry) > 0 && entry[0] == wait.Path }

// command merges entrypoint and command from request and image as the daemon does (moby daemon/commit.go,
// merge): an entrypoint of the request's own drops the image's command. The waiter is not part of it.
func command(req *object, img image) (entry, cmd words, err error) {
	own, err := req.get("Entrypoint", &entry)
	if err != nil {
		return nil, nil, err
	}
	if _, err := req.get("Cmd", &cmd); err != nil {
		return nil, nil, err
	}
	if len(entry) == 0 {
		if len(cmd) == 0 {
			cmd = img.Cmd
		}
		if !own {
			entry = img.Entrypoint
		}
	}
	if len(entry) == 1 && entry[0] == "" {
		entry = nil // --entrypoint "" clears the image's
	}
	if waits(entry) {
		entry = entry[min(2, len(entry)):]
	}
	return entry, append(words{}, cmd...), nil
}

// setEntrypoint puts the waiter before the command. Without an image there is nothing to start; should it come
// before the daemon looks, its own entrypoint counts and nobody waits.
func (p *Proxy) setEntrypoint(req, host *object, img *image) error {
	if img == nil {
		return nil
	}
	entry, cmd, err := command(req, *img)
	if err != nil {
		return err
	}
	if len(entry)+len(cmd) == 0 {
		return nil // "No command specified" is the daemon's to say
	}
	if err := wait.Install(p.cfg.WaitDir); err != nil {
		p.log.Warn("a container starts without waiting for its interface", "err", err)
		return nil
	}
	entry = append(words{wait.Path, p.cfg.Ifname}, entry...)
	if err := errors.Join(req.set("Entrypoint", entry), req.set("Cmd", cmd)); err != nil {
		return err
	}
	return p.addWaiter(host)
}

// addWaiter mounts the waiter.
func (p *Proxy) addWaiter(host *object) error {
	var binds []string
	if _, err := host.get("Binds", &binds); err != nil {
		return err
	}
	if slices.Contains(binds, p.waiterBind()) { // another proxy of ours was there before
		return nil
	}
	return host.set("Binds", append(binds, p.waiterBind()))
}

func (p *Proxy) waiterBind() string { return p.cfg.WaitDir + ":" + wait.Mount + ":ro" }

// hostnamePattern is what becomes a host name: RFC 1123 2.1, and the underscore that people use.
var hostnamePattern = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9._-]*[a-zA-Z0-9])?$`)

// setNames gives the container a host name in the domain, unless the user chose one, and our name server.
func (p *Proxy) setNames(ctx context.Context, req, host *object, labels map[string]string, version, name string) error {
	if !p.nameServer().IsValid() {
		return nil
	}
	var hostname, uts, users string
	if _, err := req.get("Hostname", &hostname); err != nil {
		return err
	}
	if _, err := host.get("UTSMode", &uts); err != nil {
		return err
	}
	if _, err := host.get("UsernsMode", &users); err != nil {
		return err
	}
	domain := strings.TrimSuffix(p.cfg.DNSDomain, ".")
	if hostname == "" && uts == "" {
		if v, ok := labels[p.cfg.HostnameFromLabel]; ok && p.cfg.HostnameFromLabel != "" {
			name = v
		}
		name = p.cfg.HostnameMatch.ReplaceAllString(strings.TrimPrefix(name, "/"), p.cfg.HostnameReplacement)
		if users != "host" && p.remaps(ctx, version) {
			// There Docker cannot set a domain name (runc: kernel.domainname: permission denied).
			name, domain = name+"."+domain, ""
		}
		if len(name) <= maxHostname && hostnamePattern.MatchString(name) {
			if err := errors.Join(req.set("Hostname", name), req.set("Domainname", domain)); err != nil {
				return err
			}
		}
	}
	return p.setServers(host)
}

// setServers adds our name server and, unless the user gave a list, our domain to search in.
func (p *Proxy) setServers(host *object) error {
	server := p.nameServer()
	if !server.IsValid() {
		return nil
	}
	var servers []string
	if _, err := host.get("Dns", &servers); err != nil {
		return err
	}
	if !slices.Contains(servers, server.String()) {
		servers = append(servers, server.String())
	}
	if err := host.set("Dns", servers); err != nil {
		return err
	}
	var search []string
	if _, err := host.get("DnsSearch", &search); err != nil || len(search) > 0 {
		return err
	}
	return host.set("DnsSearch", []string{strings.TrimSuffix(p.cfg.DNSDomain, ".")})
}

// remapsFor is how long the daemon's word on user namespaces counts; it changes with a restart only.
const remapsFor = 10 * time.Second

// remaps reports whether the daemon gives containers a user namespace of their own.
func (p *Proxy) remaps(ctx context.Context, version string) bool {
	p.remap.Lock()
	defer p.remap.Unlock()
	if time.Since(p.remapAsked) < remapsFor {
		return p.remapped
	}
	r, err := p.backend.call(ctx, http.MethodGet, version+"/info")
	if err != nil || r.code != http.StatusOK {
		return false // the create will not do better
	}
	var info struct{ SecurityOptions []string }
	_ = json.Unmarshal(r.body, &info) // an old daemon has something else there, and no such namespaces
	p.remapAsked = time.Now()
	p.remapped = slices.ContainsFunc(info.SecurityOptions, func(o string) bool {
		o = strings.TrimPrefix(o, "name=") // since API version 1.25
		return o == "userns" || o == "rootless"
	})
	return p.remapped
}

// stringMap decodes a member that is an object of strings; an absent one is empty.
func stringMap(o *object, name string) (map[string]string, error) {
	m := map[string]string{}
	if _, err := o.get(name, &m); err != nil {
		return nil, err
	}
	return m, nil
}

// nameServer is what containers are given; invalid: nothing.
func (p *Proxy) nameServer() netip.Addr {
	if p.cfg.DNS == nil {
		return netip.Addr{}
	}
	return p.cfg.DNS().Addr()
}
