package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"strings"

	"meshd/mesh"
	"meshd/proxy/wait"
)

// maxHostname is the longest host name the kernel takes (HOST_NAME_MAX), in bytes.
const maxHostname = 64

// create gives a container that belongs on the mesh what it needs to start there.
func (p *Proxy) create(w http.ResponseWriter, r *http.Request, version string) {
	body, err := readBody(w, r)
	if err != nil {
		refuse(w, http.StatusRequestEntityTooLarge, "%v", err)
		return
	}
	if len(bytes.TrimSpace(body)) > 0 { // without one the daemon has its own words for it
		body, err = p.rewriteCreate(r.Context(), body, version, r.URL.Query().Get("name"))
		if err != nil {
			refuse(w, http.StatusBadRequest, "meshd: %v", err)
			return
		}
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	r.ContentLength = int64(len(body))
	r.TransferEncoding = nil
	r.Header.Del("Content-Length")
	p.backend.forward(w, r)
}

// rewriteCreate returns the body of a create request as it is to be, for a container called name.
func (p *Proxy) rewriteCreate(ctx context.Context, body []byte, version, name string) ([]byte, error) {
	req, err := parseObject(body)
	if err != nil {
		return nil, fmt.Errorf("the request body: %w", err)
	}
	host, err := req.child("HostConfig")
	if err != nil {
		return nil, err
	}
	labels, err := stringMap(req, "Labels")
	if err != nil {
		return nil, err
	}
	img, err := p.image(ctx, req, version)
	if err != nil {
		return nil, err
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
		// The label decides at start: none may come from the user or from an image made of a container of ours.
		_, given := labels[LabelAddrs]
		if _, inherited := img.Labels[LabelAddrs]; given || inherited {
			labels[LabelAddrs] = mesh.AddrSpec{Kind: mesh.AddrNone}.String()
			if err := req.set("Labels", labels); err != nil {
				return nil, err
			}
		}
		return req.encode(), nil
	}
	labels[LabelAddrs] = addrs
	steps := []func() error{
		func() error { return req.set("Labels", labels) },
		func() error { return p.setEntrypoint(req, host, img) },
		func() error { return p.setNames(req, host, labels, name) },
		func() error { return req.set("HostConfig", host) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return req.encode(), nil
}

// wanted decides from its environment and network mode whether a container belongs on the mesh, and with
// which addresses. A malformed list is an error now, before the container exists.
func (p *Proxy) wanted(env []string, host *object) (addrs string, ok bool, err error) {
	var mode string
	if _, err := host.get("NetworkMode", &mode); err != nil {
		return "", false, err
	}
	variable, value := "", ""
	for _, entry := range env { // a later one counts, as in the container
		name, v, set := strings.Cut(entry, "=")
		if set && (name == "MESH_CIDR" || name == "WEAVE_CIDR" && variable != "MESH_CIDR") {
			variable, value = name, v
		}
	}
	specs, err := mesh.ParseAddrSpecs(value)
	if err != nil {
		return "", false, fmt.Errorf("%s=%q: %w", variable, value, err)
	}
	if len(specs) == 1 && specs[0].Kind == mesh.AddrNone {
		return "", false, nil
	}
	switch {
	case mode == "host" || strings.HasPrefix(mode, "container:"):
		return "", false, nil // no network namespace of its own
	case mode == "" || mode == "default" || mode == "bridge" || mode == "none":
		return value, variable != "" || !p.cfg.NoDefaultIPAlloc, nil
	default: // a network of the user's: only on demand
		return value, variable != "", nil
	}
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

// image asks the daemon for the image of a create request. One that is missing, or not named, is the
// daemon's to refuse: then the zero value is returned and the request goes on.
func (p *Proxy) image(ctx context.Context, req *object, version string) (image, error) {
	var name string
	if _, err := req.get("Image", &name); err != nil {
		return image{}, err
	}
	if name == "" {
		return image{}, nil
	}
	// A name has slashes, which stay; what could leave the path or begin a query does not.
	path := version + "/images/" + strings.ReplaceAll(url.PathEscape(name), "%2F", "/") + "/json"
	code, body, err := p.backend.call(ctx, http.MethodGet, path)
	if err != nil {
		return image{}, fmt.Errorf("inspect image %q: %w", name, err)
	}
	if code != http.StatusOK {
		return image{}, nil
	}
	var doc struct{ Config *image }
	if err := json.Unmarshal(body, &doc); err != nil {
		return image{}, fmt.Errorf("inspect image %q: %w", name, err)
	}
	if doc.Config == nil {
		return image{}, nil
	}
	return *doc.Config, nil
}

// setEntrypoint puts the waiter before the command, merged from request and image as the daemon does
// (moby daemon/commit.go, merge): an entrypoint of the request's own drops the image's command.
func (p *Proxy) setEntrypoint(req, host *object, img image) error {
	var entry, cmd words
	own, err := req.get("Entrypoint", &entry)
	if err != nil {
		return err
	}
	if _, err := req.get("Cmd", &cmd); err != nil {
		return err
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
	if len(entry) > 0 && entry[0] == wait.Path { // the image was made of a container of ours
		entry = entry[min(2, len(entry)):]
	}
	if len(entry)+len(cmd) == 0 {
		return nil // "No command specified" is the daemon's to say
	}
	if err := wait.Install(p.cfg.WaitDir); err != nil {
		p.log.Warn("a container starts without waiting for its interface", "err", err)
		return nil
	}
	if err := req.set("Entrypoint", append(words{wait.Path, p.cfg.Ifname}, entry...)); err != nil {
		return err
	}
	if err := req.set("Cmd", append(words{}, cmd...)); err != nil {
		return err
	}
	var binds []string
	if _, err := host.get("Binds", &binds); err != nil {
		return err
	}
	return host.set("Binds", append(binds, p.cfg.WaitDir+":"+wait.Mount+":ro"))
}

var hostnamePattern = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?$`)

// setNames gives the container a host name in the domain, unless the user chose one, and our name server.
func (p *Proxy) setNames(req, host *object, labels map[string]string, name string) error {
	server := p.nameServer()
	if !server.IsValid() {
		return nil
	}
	var hostname, uts string
	if _, err := req.get("Hostname", &hostname); err != nil {
		return err
	}
	if _, err := host.get("UTSMode", &uts); err != nil {
		return err
	}
	domain := strings.TrimSuffix(p.cfg.DNSDomain, ".")
	derived := false
	if hostname == "" && uts == "" {
		if v, ok := labels[p.cfg.HostnameFromLabel]; ok && p.cfg.HostnameFromLabel != "" {
			name = v
		}
		name = p.cfg.HostnameMatch.ReplaceAllString(strings.TrimPrefix(name, "/"), p.cfg.HostnameReplacement)
		// Docker allows names that are no host names, such as a_b: they get none.
		if len(name) <= maxHostname && hostnamePattern.MatchString(name) {
			derived = true
			if err := req.set("Hostname", name); err != nil {
				return err
			}
			if err := req.set("Domainname", domain); err != nil {
				return err
			}
		}
	}
	var servers, search []string
	if _, err := host.get("Dns", &servers); err != nil {
		return err
	}
	if _, err := host.get("DnsSearch", &search); err != nil {
		return err
	}
	if err := host.set("Dns", append(servers, server.String())); err != nil {
		return err
	}
	if len(search) > 0 {
		return nil
	}
	if derived { // the resolver then searches the container's own domain (resolv.conf(5))
		return host.set("DnsSearch", []string{"."})
	}
	return host.set("DnsSearch", []string{domain})
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
