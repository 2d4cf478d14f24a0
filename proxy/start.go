package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"meshd/mesh"
)

// start passes start or restart on and answers when the container is attached: its own process runs only
// then, for the waiter holds it. A container that cannot be attached is stopped and the reason reported.
func (p *Proxy) start(w http.ResponseWriter, r *http.Request, version, name string) {
	c, err := p.container(r.Context(), version, name)
	if err != nil {
		p.refuseFor(w, r, err)
		return
	}
	value, ours := c.Config.Labels[LabelAddrs]
	specs, err := mesh.ParseAddrSpecs(value)
	if !ours || len(specs) == 1 && specs[0].Kind == mesh.AddrNone {
		p.backend.forward(w, r)
		return
	}
	if err != nil {
		refuse(w, http.StatusInternalServerError, "meshd: container %s: label %s: %v", name, LabelAddrs, err)
		return
	}
	if bodyOfOldClients(r) {
		body, err := readBody(w, r)
		if err == nil {
			body, err = p.rewriteStart(body, &c)
		}
		if err != nil {
			p.refuseFor(w, r, fmt.Errorf("settings at start: %w", err))
			return
		}
		replaceBody(r, body)
	}
	answer := &heldResponse{ResponseWriter: w}
	p.backend.forward(answer, r)
	if answer.code != http.StatusNoContent {
		answer.release()
		return
	}
	// The container runs, so what is begun is ended, also when the client has gone.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), attachTimeout)
	defer cancel()
	defer context.AfterFunc(p.backend.run, cancel)()
	err = p.attach(ctx, Request{
		Container:        c.ID,
		Addrs:            specs,
		RewriteHosts:     !p.cfg.NoRewriteHosts && !c.HostConfig.NetworkMode.isUsers(),
		AddHosts:         c.HostConfig.ExtraHosts,
		WithoutDNS:       !p.nameServer().IsValid(),
		NoMulticastRoute: p.cfg.NoMulticastRoute,
	})
	if err == nil {
		answer.release()
		return
	}
	if p.backend.run.Err() != nil {
		panic(http.ErrAbortHandler) // whoever runs next attaches it; the client must not read an empty 200
	}
	if errors.Is(err, ErrEnded) {
		answer.release() // it did start
		return
	}
	p.log.Warn("a container cannot be attached and is stopped", "container", c.ID, "err", err)
	stop, cancelStop := context.WithTimeout(p.backend.run, attachTimeout)
	defer cancelStop()
	killed, kerr := p.backend.call(stop, http.MethodPost, version+"/containers/"+url.PathEscape(c.ID)+"/kill")
	if kerr == nil && killed.code >= 400 && killed.code != http.StatusConflict && killed.code != http.StatusNotFound {
		kerr = fmt.Errorf("Docker says: %.300s", killed.body) // the two say that it does not run any more
	}
	if kerr != nil {
		p.log.Warn("cannot stop the container", "container", c.ID, "err", kerr)
	}
	refuse(w, http.StatusInternalServerError, "meshd: container %s: %v", name, err)
}

// attach asks again while the daemon does not answer: it has just started the container, so it is busy or comes back.
func (p *Proxy) attach(ctx context.Context, req Request) error {
	again := time.NewTicker(attachAgain)
	defer again.Stop()
	for {
		err := p.containers.Attach(ctx, req)
		if !errors.Is(err, ErrAway) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-again.C:
		}
	}
}

// bodyOfOldClients reports whether the request brings a HostConfig, as API versions before 1.24 allow. The
// daemon draws the line at the same length (moby api/server/router/container, postContainersStart).
func bodyOfOldClients(r *http.Request) bool {
	return r.ContentLength > 7 || r.ContentLength < 0
}

// rewriteStart gives settings that replace those of create what create had given those, and notes them in c. Newer
// versions of the API refuse such settings; that is left to the daemon.
func (p *Proxy) rewriteStart(body []byte, c *container) ([]byte, error) {
	host, err := parseObject(body)
	if err != nil {
		return nil, err
	}
	var mode string
	if _, err := host.get("NetworkMode", &mode); err != nil {
		return nil, err
	}
	if mode == "host" || strings.HasPrefix(mode, "container:") {
		return nil, fmt.Errorf("with network mode %q the container has no network of its own, as it had at create", mode)
	}
	if slices.Contains(c.HostConfig.Binds, p.waiterBind()) {
		if err := p.addWaiter(host); err != nil {
			return nil, err
		}
	}
	c.HostConfig.NetworkMode, c.HostConfig.ExtraHosts = networkMode(mode), nil
	if _, err := host.get("ExtraHosts", &c.HostConfig.ExtraHosts); err != nil {
		return nil, err
	}
	if err := p.setServers(host); err != nil {
		return nil, err
	}
	return host.encode(), nil
}

// container is the part of an inspect answer that the proxy reads.
type container struct {
	ID     string `json:"Id"`
	Config struct{ Labels map[string]string }
	// HostConfig as the daemon keeps it, after create.
	HostConfig struct {
		NetworkMode networkMode
		ExtraHosts  []string
		Binds       []string
	}
}

type networkMode string

// isUsers reports whether the network is one that the user made. Docker writes /etc/hosts there whenever
// another container joins, and has names of its own.
func (m networkMode) isUsers() bool {
	switch m {
	case "", "default", "bridge", "none":
		return false
	}
	return true
}

// container inspects one. An unknown one is the zero value: the daemon says so itself.
func (p *Proxy) container(ctx context.Context, version, name string) (container, error) {
	r, err := p.backend.call(ctx, http.MethodGet, version+"/containers/"+url.PathEscape(name)+"/json")
	if err != nil {
		return container{}, fmt.Errorf("inspect container %s: %w", name, err)
	}
	var c container
	if r.code != http.StatusOK {
		return c, nil
	}
	if err := json.Unmarshal(r.body, &c); err != nil {
		return c, fmt.Errorf("inspect container %s: %w", name, err)
	}
	return c, nil
}

// heldResponse keeps an answer without a body back until release; one with a body passes at once.
type heldResponse struct {
	http.ResponseWriter
	code int
	sent bool
}

func (h *heldResponse) WriteHeader(code int) {
	if code < http.StatusOK { // informational, others follow
		h.ResponseWriter.WriteHeader(code)
		return
	}
	if h.code = code; code != http.StatusNoContent {
		h.release()
	}
}

func (h *heldResponse) Write(b []byte) (int, error) {
	if h.code == 0 {
		h.code = http.StatusOK
	}
	h.release()
	return h.ResponseWriter.Write(b)
}

// Flush does nothing while the answer is held.
func (h *heldResponse) Flush() {
	if f, ok := h.ResponseWriter.(http.Flusher); ok && h.sent {
		f.Flush()
	}
}

func (h *heldResponse) release() {
	if h.sent || h.code == 0 {
		return
	}
	h.sent = true
	h.ResponseWriter.WriteHeader(h.code)
}
