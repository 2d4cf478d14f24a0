// Package docker is a thin client for the few calls of Docker's API that the mesh makes itself: look at
// a container, list containers and networks, hear of starts and ends. It speaks the lower of its own and the
// daemon's API version, reads no more than it needs, and waits for no answer longer than a deadline.
package docker

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Errors that callers tell apart.
var (
	ErrNotFound    = errors.New("no such container")
	ErrUnavailable = errors.New("Docker does not answer")
	ErrVersion     = errors.New("no API version in common with Docker")
)

// Versions of the API that this client can speak.
var (
	oldest = version{1, 24} // Docker 1.12
	newest = version{1, 51} // Docker 28
)

const (
	maxBody    = 8 << 20 // bytes of an answer; an inspect has some 10 kB
	maxMessage = 4 << 10 // bytes of an error that are kept
	maxName    = 256     // bytes of a container's name
)

// Config says where Docker is.
type Config struct {
	Endpoint string        // unix:///path, /path, tcp://host:port; empty means unix:///var/run/docker.sock
	TLS      *tls.Config   // for tcp; nil means plain HTTP
	Timeout  time.Duration // for one call; zero means 10 s
	Log      *slog.Logger
}

// Client calls one Docker daemon. Its methods may be called concurrently.
type Client struct {
	endpoint string // for messages
	base     string
	timeout  time.Duration
	log      *slog.Logger
	http     *http.Client

	mu      sync.Mutex
	version version // agreed upon; zero until then
}

// New prepares a client and contacts nobody: Docker may come later.
func New(cfg Config) (*Client, error) {
	if cfg.Endpoint == "" {
		cfg.Endpoint = "unix:///var/run/docker.sock"
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	network, addr, err := ParseEndpoint(cfg.Endpoint)
	if err != nil {
		return nil, err
	}
	scheme, host := "http", addr
	if network == "unix" {
		host = "docker"
	} else if cfg.TLS != nil {
		scheme = "https"
	}
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	return &Client{
		endpoint: cfg.Endpoint, base: scheme + "://" + host, timeout: cfg.Timeout, log: cfg.Log,
		http: &http.Client{Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return dialer.DialContext(ctx, network, addr)
			},
			TLSClientConfig: cfg.TLS, MaxIdleConns: 4, IdleConnTimeout: time.Minute,
			MaxResponseHeaderBytes: 64 << 10, ResponseHeaderTimeout: cfg.Timeout, DisableCompression: true,
		}},
	}, nil
}

// ParseEndpoint splits what DOCKER_HOST may hold into what net.Dial takes.
func ParseEndpoint(s string) (network, addr string, err error) {
	if path, ok := strings.CutPrefix(s, "unix://"); ok || strings.HasPrefix(s, "/") {
		if !ok {
			path = s
		}
		if !strings.HasPrefix(path, "/") {
			return "", "", fmt.Errorf("Docker endpoint %q: the socket's path must be absolute", s)
		}
		return "unix", path, nil
	}
	if addr, ok := strings.CutPrefix(s, "tcp://"); ok {
		host, port, err := net.SplitHostPort(addr)
		if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 || host == "" {
			return "", "", fmt.Errorf("Docker endpoint %q: want tcp://host:port", s)
		}
		return "tcp", addr, nil
	}
	return "", "", fmt.Errorf("Docker endpoint %q: want unix:///path or tcp://host:port", s)
}

// Close drops idle connections.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// Container is what the mesh needs to know of a container.
type Container struct {
	ID         string `json:"Id"`
	Name       string // with a leading slash
	HostsPath  string
	State      State
	Config     Settings
	HostConfig HostConfig
}

// HostConfig is how a container sits on its host.
type HostConfig struct {
	NetworkMode string
	Binds       []string
	ExtraHosts  []string
}

// State is how a container is.
type State struct {
	Running bool
	Dead    bool
	Pid     int
}

// Settings are those that it was made with.
type Settings struct {
	Hostname   string
	Domainname string
	Labels     map[string]string
}

// Container looks at a container by id, start of id, or name.
func (c *Client) Container(ctx context.Context, name string) (Container, error) {
	var out Container
	path, err := namePath("/containers/", name, "/json")
	if err == nil {
		err = c.get(ctx, path, nil, &out)
	}
	if err == nil && out.ID == "" {
		err = errors.New("Docker's answer has no id")
	}
	if err != nil {
		return out, fmt.Errorf("container %s: %w", name, err)
	}
	return out, nil
}

// Running lists the ids of running containers that have a label.
func (c *Client) Running(ctx context.Context, label string) (ids []string, err error) {
	filters, err := json.Marshal(map[string][]string{"label": {label}, "status": {"running"}})
	if err != nil {
		return nil, err
	}
	var list []struct {
		ID string `json:"Id"`
	}
	if err := c.get(ctx, "/containers/json", url.Values{"filters": {string(filters)}}, &list); err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	for _, one := range list {
		ids = append(ids, one.ID)
	}
	return ids, nil
}

// get asks for one document, within the deadline.
func (c *Client) get(ctx context.Context, path string, query url.Values, out any) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	resp, err := c.call(ctx, path, query)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := decode(resp.Body, out); err != nil {
		return fmt.Errorf("Docker's answer: %w", err)
	}
	return nil
}

// namePath puts a name into a path, so that it cannot lead elsewhere.
func namePath(before, name, after string) (string, error) {
	name = strings.TrimPrefix(name, "/")
	if name == "" || len(name) > maxName {
		return "", errors.New("not a name")
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." || part == ".." {
			return "", errors.New("not a name")
		}
	}
	return before + (&url.URL{Path: name}).EscapedPath() + after, nil
}

// call asks for something in the agreed API version; a refusal is an error. When Docker refuses the version, as after
// an exchange of the daemon, it agrees anew and tries once more.
func (c *Client) call(ctx context.Context, path string, query url.Values) (*http.Response, error) {
	for again := true; ; again = false {
		v, err := c.negotiate(ctx)
		if err != nil {
			return nil, err
		}
		target := "/v" + v.String() + path
		if len(query) > 0 {
			target += "?" + query.Encode()
		}
		resp, err := c.do(ctx, target)
		if err != nil {
			return nil, err
		}
		if err = statusError(resp); err == nil {
			return resp, nil
		}
		resp.Body.Close()
		if !again || resp.StatusCode != http.StatusBadRequest || !strings.Contains(err.Error(), "version") {
			return nil, err
		}
		c.forget()
	}
}

func (c *Client) do(ctx context.Context, target string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+target, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ue := (*url.Error)(nil); errors.As(err, &ue) {
			err = ue.Err // the URL says nothing that the endpoint does not
		}
		return nil, fmt.Errorf("%w at %s: %w", ErrUnavailable, c.endpoint, err)
	}
	return resp, nil
}

// statusError turns a refusal into an error with Docker's own words.
func statusError(resp *http.Response) error {
	if resp.StatusCode < 400 {
		return nil
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxMessage))
	var refusal struct{ Message string }
	text := strings.TrimSpace(string(body))
	if json.Unmarshal(body, &refusal) == nil && refusal.Message != "" {
		text = refusal.Message
	}
	if text == "" {
		text = resp.Status
	}
	if resp.StatusCode == http.StatusNotFound {
		return fmt.Errorf("%w: Docker says: %s", ErrNotFound, text)
	}
	return fmt.Errorf("Docker says: %s", text)
}

// decode reads one bounded JSON document. One that does not come to its end in time is no answer.
func decode(r io.Reader, out any) error {
	body, err := io.ReadAll(io.LimitReader(r, maxBody+1))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if len(body) > maxBody {
		return fmt.Errorf("longer than %d bytes", maxBody)
	}
	return json.Unmarshal(body, out)
}
