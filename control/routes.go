package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"meshd/mesh"
)

// httpError is an answer other than success, with the text for the user.
type httpError struct {
	code int
	text string
}

func (e *httpError) Error() string { return e.text }

func bad(format string, args ...any) error {
	return &httpError{http.StatusBadRequest, fmt.Sprintf(format, args...)}
}

func off(feature string) error {
	return &httpError{http.StatusNotFound, feature + " is turned off"}
}

// endpoint answers one kind of request: nil means 204 No Content, a string is text and anything else
// JSON.
type endpoint func(r *http.Request) (any, error)

// ServeHTTP carries e out, within the time of the query parameter "timeout" if there is one. Errors
// of the rooms are the user's to read: 400, or 504 when the time was over.
func (e endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	if text := r.URL.Query().Get("timeout"); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil || d <= 0 {
			http.Error(w, fmt.Sprintf("timeout %q is not a duration such as 30s", text), http.StatusBadRequest)
			return
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
		r = r.WithContext(ctx)
	}
	answer, err := e(r)
	if err == nil {
		reply(w, answer)
		return
	}
	code := http.StatusBadRequest
	known := new(httpError)
	switch {
	case errors.As(err, &known):
		code = known.code
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() != nil:
		code = http.StatusGatewayTimeout
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		code = http.StatusServiceUnavailable // the daemon stops, or there is nobody left to read this
	}
	http.Error(w, err.Error(), code)
}

func reply(w http.ResponseWriter, answer any) {
	switch a := answer.(type) {
	case nil:
		w.WriteHeader(http.StatusNoContent)
	case string:
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = io.WriteString(w, a)
	default:
		b, err := json.MarshalIndent(a, "", "    ")
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(append(b, '\n'))
	}
}

// decode reads a JSON body into v, strictly: an option that we do not know would otherwise be lost
// without a word.
func decode(r *http.Request, v any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return bad("request: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return bad("request: more than one JSON value")
	}
	return nil
}

func (s *Server) readOnly(mux *http.ServeMux, templates bool) {
	mux.Handle("GET /status", endpoint(s.status))
	mux.Handle("GET /status/{sub}", endpoint(s.status))
	mux.Handle("GET /report", endpoint(func(r *http.Request) (any, error) {
		format := r.URL.Query().Get("format")
		report := s.report()
		if format == "" {
			return report, nil
		}
		if !templates { // a template may loop as long as it likes
			return nil, bad("templates are not served here")
		}
		text, err := report.Format(format)
		if err != nil {
			return nil, bad("%v", err)
		}
		return text, nil
	}))
	mux.Handle("GET /metrics", s.metricsHandler())
}

func (s *Server) statusHandler() http.Handler {
	mux := http.NewServeMux()
	s.readOnly(mux, false)
	return mux
}

// controlHandler is the whole API. Profiles tell what is in memory, so they are served to root only.
func (s *Server) controlHandler(profiles bool) http.Handler {
	mux := http.NewServeMux()
	s.readOnly(mux, true)
	if profiles {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	s.peerRoutes(mux)
	s.passwordRoutes(mux)
	s.addressRoutes(mux)
	s.nameRoutes(mux)
	s.attachRoutes(mux)
	return mux
}

func (s *Server) report() *Report {
	r := s.back.Reporter.Report()
	r.complete()
	return &r
}

func (s *Server) status(r *http.Request) (any, error) {
	report := s.report()
	sub := r.PathValue("sub")
	text, found, ok := report.statusText(sub)
	switch {
	case !ok:
		return nil, bad("there is no status %q; it is one of %s", sub, strings.Join(StatusWords, ", "))
	case sub == "" && !report.Ready:
		return nil, &httpError{http.StatusServiceUnavailable, "meshd is starting"}
	case !found:
		return nil, off(sub)
	}
	return text, nil
}

func (s *Server) peerRoutes(mux *http.ServeMux) {
	peers := func(r *http.Request) ([]string, error) {
		if err := r.ParseForm(); err != nil {
			return nil, bad("request: %v", err)
		}
		if s.back.Peers == nil {
			return nil, off("the router")
		}
		return r.Form["peer"], nil
	}
	mux.Handle("POST /connect", endpoint(func(r *http.Request) (any, error) {
		targets, err := peers(r)
		if err != nil {
			return nil, err
		}
		return nil, s.back.Peers.Connect(targets, r.Form.Get("replace") == "true")
	}))
	mux.Handle("POST /forget", endpoint(func(r *http.Request) (any, error) {
		targets, err := peers(r)
		if err != nil {
			return nil, err
		}
		return nil, s.back.Peers.Forget(targets)
	}))
}

func (s *Server) passwordRoutes(mux *http.ServeMux) {
	route := func(pattern string, do func(p Passwords, r *http.Request) (any, error)) {
		mux.Handle(pattern, endpoint(func(r *http.Request) (any, error) {
			if s.back.Passwords == nil {
				return nil, off("encryption")
			}
			return do(s.back.Passwords, r)
		}))
	}
	route("GET /password", func(p Passwords, _ *http.Request) (any, error) {
		return append([]Password{}, p.List()...), nil
	})
	route("POST /password", func(p Passwords, r *http.Request) (any, error) {
		var req struct{ Password string }
		if err := decode(r, &req); err != nil {
			return nil, err
		}
		id, err := p.Add(req.Password)
		return id + "\n", err
	})
	route("POST /password/{id}/use", func(p Passwords, r *http.Request) (any, error) {
		return nil, p.Use(r.PathValue("id"))
	})
	route("DELETE /password/{id}", func(p Passwords, r *http.Request) (any, error) {
		return nil, p.Remove(r.PathValue("id"))
	})
}

func (s *Server) addressRoutes(mux *http.ServeMux) {
	ring := func(do func(r *http.Request) (any, error)) http.Handler {
		return endpoint(func(r *http.Request) (any, error) {
			if s.back.Ring == nil {
				return nil, off("address allocation")
			}
			return do(r)
		})
	}
	mux.Handle("GET /ring", ring(func(r *http.Request) (any, error) {
		return nil, s.back.Ring.Prime(r.Context())
	}))
	mux.Handle("POST /ring/repair", ring(func(r *http.Request) (any, error) {
		return textOrError(s.back.Ring.Repair(r.Context()))
	}))
	mux.Handle("DELETE /peer", ring(func(r *http.Request) (any, error) {
		return nil, s.back.Ring.Leave(r.Context())
	}))
	mux.Handle("DELETE /peer/{id}", ring(func(r *http.Request) (any, error) {
		id := r.PathValue("id")
		n, err := s.back.Ring.RemovePeer(r.Context(), id)
		return fmt.Sprintf("%d IPs taken over from %s\n", n, id), err
	}))

	ip := func(do func(r *http.Request, owner string) (any, error)) http.Handler {
		return endpoint(func(r *http.Request) (any, error) {
			if s.back.Addresses == nil {
				return nil, off("address allocation")
			}
			return do(r, r.PathValue("id"))
		})
	}
	mux.Handle("GET /ipinfo/defaultsubnet", ip(func(*http.Request, string) (any, error) {
		return s.back.Addresses.DefaultSubnet().String(), nil
	}))
	mux.Handle("GET /ipinfo/tracker", ip(func(*http.Request, string) (any, error) {
		return "", nil // what would mirror the ring to a cloud's routes; there is none here
	}))
	mux.Handle("GET /ip", ip(func(*http.Request, string) (any, error) { return s.back.Addresses.Owners(), nil }))
	lookup := ip(func(r *http.Request, owner string) (any, error) {
		subnet, err := pathPrefix(r, false)
		if err != nil {
			return nil, err
		}
		held := s.back.Addresses.Lookup(owner, subnet)
		if len(held) == 0 {
			return nil, &httpError{http.StatusNotFound, owner + " has no address there"}
		}
		return joinPrefixes(held), nil
	})
	mux.Handle("GET /ip/{id}", lookup)
	mux.Handle("GET /ip/{id}/{ip}/{len}", lookup)
	allocate := ip(func(r *http.Request, owner string) (any, error) {
		subnet, err := pathPrefix(r, true)
		if err != nil {
			return nil, err
		}
		got, err := s.back.Addresses.Allocate(r.Context(), owner, subnet)
		return got.String(), err
	})
	mux.Handle("POST /ip/{id}", allocate)
	mux.Handle("POST /ip/{id}/{ip}/{len}", allocate)
	mux.Handle("PUT /ip/{id}/{ip}/{len}", ip(func(r *http.Request, owner string) (any, error) {
		addr, err := pathPrefix(r, false)
		if err != nil {
			return nil, err
		}
		return nil, s.back.Addresses.Claim(r.Context(), owner, addr)
	}))
	mux.Handle("DELETE /ip/{id}", ip(func(r *http.Request, owner string) (any, error) {
		return nil, s.back.Addresses.ReleaseAll(r.Context(), owner)
	}))
	release := ip(func(r *http.Request, owner string) (any, error) {
		addr, err := netip.ParseAddr(r.PathValue("ip"))
		if err != nil {
			return nil, bad("%q is not an IP address", r.PathValue("ip"))
		}
		return nil, s.back.Addresses.Release(r.Context(), owner, addr)
	})
	mux.Handle("DELETE /ip/{id}/{ip}", release)
	mux.Handle("DELETE /ip/{id}/{ip}/{len}", release)
}

// pathPrefix reads {ip}/{len}; both absent is the zero prefix. A subnet has no host bits.
func pathPrefix(r *http.Request, subnet bool) (netip.Prefix, error) {
	if r.PathValue("ip") == "" {
		return netip.Prefix{}, nil
	}
	text := r.PathValue("ip") + "/" + r.PathValue("len")
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return p, bad("%q is not a CIDR", text)
	}
	if err := mesh.CheckSubnet(p); err != nil {
		return p, bad("%s: %v", text, err)
	}
	if subnet && p != p.Masked() {
		return p, bad("%s has bits set after the prefix; the network is %s", text, p.Masked())
	}
	return p, nil
}

func joinPrefixes(of []netip.Prefix) string {
	words := make([]string, len(of))
	for i, p := range of {
		words[i] = p.String()
	}
	return strings.Join(words, " ")
}

func textOrError(text string, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return text, nil
}

func (s *Server) nameRoutes(mux *http.ServeMux) {
	names := func(do func(r *http.Request) (any, error)) http.Handler {
		return endpoint(func(r *http.Request) (any, error) {
			if s.back.Names == nil {
				return nil, off("dns")
			}
			return do(r)
		})
	}
	mux.Handle("GET /domain", names(func(*http.Request) (any, error) { return s.back.Names.Domain(), nil }))
	mux.Handle("GET /dns-address", names(func(*http.Request) (any, error) {
		if server := s.back.Names.Server(); server.IsValid() {
			return server.Addr().String(), nil
		}
		return "", nil // it does not know yet where it will listen
	}))
	mux.Handle("GET /dns-address-port", names(func(*http.Request) (any, error) {
		if server := s.back.Names.Server(); server.IsValid() {
			return server.String(), nil
		}
		return "", nil
	}))
	list := names(func(r *http.Request) (any, error) {
		report := s.report()
		if report.DNS == nil {
			return nil, off("dns")
		}
		return report.DNS.matching(r.PathValue("container"), r.URL.Query().Get("fqdn")), nil
	})
	mux.Handle("GET /name", list)
	mux.Handle("GET /name/{container}", list)
	change := func(add bool) http.Handler {
		return names(func(r *http.Request) (any, error) {
			req, err := nameRequest(r)
			if err != nil {
				return nil, err
			}
			if add {
				return nil, s.back.Names.Add(r.Context(), req)
			}
			return nil, s.back.Names.Remove(r.Context(), req)
		})
	}
	mux.Handle("PUT /name/{container}", change(true))
	mux.Handle("PUT /name/{container}/{ip}", change(true))
	mux.Handle("DELETE /name/{container}", change(false))
	mux.Handle("DELETE /name/{container}/{ip}", change(false))
}

// nameRequest reads the container from the path, the addresses from the path and the query parameters
// "ip", and the name from "fqdn".
func nameRequest(r *http.Request) (NameRequest, error) {
	req := NameRequest{Container: r.PathValue("container"), FQDN: r.URL.Query().Get("fqdn")}
	words := r.URL.Query()["ip"]
	if ip := r.PathValue("ip"); ip != "" {
		words = append(words, ip)
	}
	for _, w := range words {
		addr, err := netip.ParseAddr(w)
		if err != nil {
			return req, bad("%q is not an IP address", w)
		}
		req.Addrs = append(req.Addrs, addr)
	}
	if req.Container == mesh.OwnerExtern && (len(req.Addrs) == 0 || r.Method == http.MethodPut && req.FQDN == "") {
		return req, bad("without a container, addresses and a name are needed")
	}
	return req, nil
}

// matching are the live entries of a container, by any prefix of its id, and of a name, with or
// without the domain. Empty matches all.
func (d *DNS) matching(container, name string) []DNSEntry {
	out := []DNSEntry{}
	for _, e := range d.live() {
		if strings.HasPrefix(e.ContainerID, container) && (name == "" || d.sameName(e.Hostname, name)) {
			out = append(out, e)
		}
	}
	return out
}

func (d *DNS) sameName(full, name string) bool {
	name = strings.TrimSuffix(name, ".") + "."
	return strings.EqualFold(full, name) || strings.EqualFold(full, name+d.Domain)
}

func (s *Server) attachRoutes(mux *http.ServeMux) {
	mux.Handle("GET /proxyaddrs", endpoint(func(*http.Request) (any, error) {
		report := s.report()
		if report.Proxy == nil {
			return nil, off("the Docker proxy")
		}
		return lines(report.Proxy.Addresses), nil
	}))
	mux.Handle("GET /ps", endpoint(func(r *http.Request) (any, error) {
		if s.back.Attachments == nil {
			return nil, off("attaching")
		}
		list, err := s.back.Attachments.List(r.Context(), r.URL.Query()["container"])
		if list == nil {
			list = []Attached{}
		}
		return list, err
	}))
	mux.Handle("POST /attach", endpoint(func(r *http.Request) (any, error) {
		var req AttachRequest
		if err := decode(r, &req); err != nil {
			return nil, err
		}
		if s.back.Attachments == nil {
			return nil, off("attaching")
		}
		if err := checkAttach(req); err != nil {
			return nil, err
		}
		return answered(s.back.Attachments.Attach(r.Context(), req))
	}))
	mux.Handle("POST /detach", endpoint(func(r *http.Request) (any, error) {
		var req DetachRequest
		if err := decode(r, &req); err != nil {
			return nil, err
		}
		if s.back.Attachments == nil {
			return nil, off("attaching")
		}
		if req.Container == "" {
			return nil, bad("a container is needed")
		}
		return answered(s.back.Attachments.Detach(r.Context(), req))
	}))
	mux.Handle("POST /expose", endpoint(func(r *http.Request) (any, error) {
		var req ExposeRequest
		if err := decode(r, &req); err != nil {
			return nil, err
		}
		if s.back.Exposure == nil {
			return nil, off("exposing")
		}
		return answered(s.back.Exposure.Expose(r.Context(), req))
	}))
	mux.Handle("POST /expose/{ip}/{len}", endpoint(func(r *http.Request) (any, error) {
		p, err := pathPrefix(r, false)
		if err != nil {
			return nil, err
		}
		skip := r.URL.Query().Get("skipNAT")
		skipNAT, err := strconv.ParseBool(skip)
		if skip != "" && err != nil {
			return nil, bad("skipNAT %q is neither true nor false", skip)
		}
		if s.back.Exposure == nil {
			return nil, off("exposing")
		}
		_, err = s.back.Exposure.Expose(r.Context(), ExposeRequest{
			Addresses:         []mesh.AddrSpec{{Kind: mesh.AddrExact, Prefix: p}},
			WithoutMasquerade: skipNAT,
		})
		return nil, err
	}))
	mux.Handle("POST /hide", endpoint(func(r *http.Request) (any, error) {
		var req HideRequest
		if err := decode(r, &req); err != nil {
			return nil, err
		}
		if s.back.Exposure == nil {
			return nil, off("exposing")
		}
		return answered(s.back.Exposure.Hide(r.Context(), req))
	}))
}

func checkAttach(req AttachRequest) error {
	if req.Container == "" {
		return bad("a container is needed")
	}
	for _, h := range req.AddHosts {
		if err := CheckAddHost(h); err != nil {
			return bad("%v", err)
		}
	}
	return nil
}

// CheckAddHost reports what is wrong with name:address, if anything.
func CheckAddHost(s string) error {
	name, addr, ok := strings.Cut(s, ":")
	if _, err := netip.ParseAddr(addr); !ok || name == "" || strings.ContainsAny(name, " \t\r\n#") || err != nil {
		return fmt.Errorf("%q is not name:address", s)
	}
	return nil
}

func answered(c Changed, err error) (any, error) {
	if c.Addresses == nil {
		c.Addresses = []netip.Prefix{}
	}
	return c, err
}
