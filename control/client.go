package control

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"time"
)

// connectTimeout is how long a daemon may take to accept a connection.
const connectTimeout = 3 * time.Second

// answerTimeout is how long a daemon may take to answer what waits for nobody.
const answerTimeout = 15 * time.Second

// maxAnswer bounds what a client reads, in bytes: a report of a thousand peers and a hundred thousand
// names fits.
const maxAnswer = 64 << 20

// ErrUnreachable is wrapped by every error that means that no daemon answered.
var ErrUnreachable = errors.New("cannot reach meshd")

// noAnswer is a daemon that says nothing for so long.
type noAnswer time.Duration

func (n noAnswer) Error() string        { return fmt.Sprintf("no answer in %v", time.Duration(n)) }
func (n noAnswer) Timeout() bool        { return true }
func (n noAnswer) Temporary() bool      { return true }
func (n noAnswer) Is(target error) bool { return target == context.DeadlineExceeded }

// Error is an answer of the daemon other than success.
type Error struct {
	Code int // HTTP status
	Text string
}

func (e *Error) Error() string { return e.Text }

// IsOff reports whether err is the daemon's answer that a feature is off or a thing is not there.
func IsOff(err error) bool {
	e := new(Error)
	return errors.As(err, &e) && e.Code == http.StatusNotFound
}

// ClientConfig says how to reach a daemon.
type ClientConfig struct {
	Addr              string // absolute path of a unix socket, or host:port
	CACert, Cert, Key string // files for TLS with host:port; all or none
	// Timeout is how long the daemon may wait for other peers before it answers with an error that says
	// for whom it waited; 0: as long as it takes.
	Timeout time.Duration
}

// Client calls the control API. Methods that may have to wait for other peers wait as long as their context lets them.
type Client struct {
	http    *http.Client
	base    string
	timeout time.Duration
	answer  time.Duration // answerTimeout
}

// NewClient returns a client; it connects at the first call.
func NewClient(cfg ClientConfig) (*Client, error) {
	dial := &net.Dialer{Timeout: connectTimeout}
	tr := &http.Transport{DisableKeepAlives: true}
	c := &Client{http: &http.Client{Transport: tr}, base: "http://" + cfg.Addr, timeout: cfg.Timeout, answer: answerTimeout}
	switch {
	case filepath.IsAbs(cfg.Addr):
		c.base = "http://localhost"
		tr.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dial.DialContext(ctx, "unix", cfg.Addr)
		}
		return c, nil
	case cfg.Cert != "":
		cert, err := tls.LoadX509KeyPair(cfg.Cert, cfg.Key)
		if err != nil {
			return nil, err
		}
		pool, err := certPool(cfg.CACert)
		if err != nil {
			return nil, err
		}
		tr.TLSClientConfig = &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, MinVersion: tls.VersionTLS13}
		c.base = "https://" + cfg.Addr
	}
	tr.DialContext = dial.DialContext
	return c, nil
}

// call sends a request and returns the body of the answer; an answer other than 2xx is an *Error.
func (c *Client) call(ctx context.Context, method, path string, query url.Values, body io.Reader, contentType string) ([]byte, error) {
	u := c.base + path
	if c.timeout > 0 {
		if query == nil {
			query = url.Values{}
		}
		query.Set("timeout", c.timeout.String())
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout+connectTimeout)
		defer cancel()
	}
	caller := ctx
	if method == http.MethodGet && path != "/ring" { // which waits for other peers
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.answer)
		defer cancel()
	}
	if len(query) > 0 {
		u += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, body)
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if caller.Err() != nil {
			return nil, caller.Err()
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnreachable, noAnswer(c.answer))
		}
		var inner *url.Error
		if errors.As(err, &inner) {
			err = inner.Err
		}
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("answer of meshd: %w", err)
	}
	if resp.StatusCode/100 != 2 {
		return nil, &Error{resp.StatusCode, strings.TrimSuffix(string(b), "\n")}
	}
	return b, nil
}

func (c *Client) text(ctx context.Context, method, path string, query url.Values) (string, error) {
	b, err := c.call(ctx, method, path, query, nil, "")
	return string(b), err
}

func (c *Client) json(ctx context.Context, method, path string, query url.Values, ask, answer any) error {
	var body io.Reader
	contentType := ""
	if ask != nil {
		b, err := json.Marshal(ask)
		if err != nil {
			return err
		}
		body, contentType = bytes.NewReader(b), "application/json"
	}
	b, err := c.call(ctx, method, path, query, body, contentType)
	if err != nil || answer == nil {
		return err
	}
	if err := json.Unmarshal(b, answer); err != nil {
		return fmt.Errorf("answer of meshd: %w", err)
	}
	return nil
}

// segment escapes one part of a path, slashes included.
func segment(s string) string { return "/" + url.PathEscape(s) }

// Status returns the text of a sub-status, "" for the summary.
func (c *Client) Status(ctx context.Context, sub string) (string, error) {
	path := "/status"
	if sub != "" {
		path += segment(sub)
	}
	return c.text(ctx, http.MethodGet, path, nil)
}

// Report returns everything that is known.
func (c *Client) Report(ctx context.Context) (*Report, error) {
	r := new(Report)
	return r, c.json(ctx, http.MethodGet, "/report", nil, nil, r)
}

// ReportJSON returns the report as the daemon wrote it.
func (c *Client) ReportJSON(ctx context.Context) (string, error) {
	return c.text(ctx, http.MethodGet, "/report", nil)
}

// Connect adds targets, or with replace makes these the only ones.
func (c *Client) Connect(ctx context.Context, targets []string, replace bool) error {
	form := url.Values{"peer": targets}
	if replace {
		form.Set("replace", "true")
	}
	return c.form(ctx, "/connect", form)
}

// Forget drops targets.
func (c *Client) Forget(ctx context.Context, targets []string) error {
	return c.form(ctx, "/forget", url.Values{"peer": targets})
}

func (c *Client) form(ctx context.Context, path string, form url.Values) error {
	_, err := c.call(ctx, http.MethodPost, path, nil, strings.NewReader(form.Encode()), "application/x-www-form-urlencoded")
	return err
}

// Passwords lists the mesh's passwords, the one in use first.
func (c *Client) Passwords(ctx context.Context) (list []Password, err error) {
	err = c.json(ctx, http.MethodGet, "/password", nil, nil, &list)
	return list, err
}

// AddPassword has peers with that password accepted too, and returns its id.
func (c *Client) AddPassword(ctx context.Context, password string) (id string, err error) {
	body, err := json.Marshal(struct{ Password string }{password})
	if err != nil {
		return "", err
	}
	b, err := c.call(ctx, http.MethodPost, "/password", nil, bytes.NewReader(body), "application/json")
	return strings.TrimSpace(string(b)), err
}

// UsePassword has meshd dial with a password that it accepts already.
func (c *Client) UsePassword(ctx context.Context, id string) error {
	_, err := c.text(ctx, http.MethodPost, "/password"+segment(id)+"/use", nil)
	return err
}

// RemovePassword has peers with that password refused.
func (c *Client) RemovePassword(ctx context.Context, id string) error {
	_, err := c.text(ctx, http.MethodDelete, "/password"+segment(id), nil)
	return err
}

// Prime waits until the address ring exists.
func (c *Client) Prime(ctx context.Context) error {
	_, err := c.text(ctx, http.MethodGet, "/ring", nil)
	return err
}

// Repair merges the ring of another cluster into this one.
func (c *Client) Repair(ctx context.Context) (string, error) {
	return c.text(ctx, http.MethodPost, "/ring/repair", nil)
}

// Leave gives this peer's address space away.
func (c *Client) Leave(ctx context.Context) error {
	_, err := c.text(ctx, http.MethodDelete, "/peer", nil)
	return err
}

// RemovePeer takes over the address space of a lost peer; the text says how much that was.
func (c *Client) RemovePeer(ctx context.Context, peer string) (string, error) {
	return c.text(ctx, http.MethodDelete, "/peer"+segment(peer), nil)
}

// Attach attaches a container.
func (c *Client) Attach(ctx context.Context, req AttachRequest) (Changed, error) {
	return c.change(ctx, "/attach", req)
}

// Detach takes addresses from a container.
func (c *Client) Detach(ctx context.Context, req DetachRequest) (Changed, error) {
	return c.change(ctx, "/detach", req)
}

// Expose gives the host addresses.
func (c *Client) Expose(ctx context.Context, req ExposeRequest) (Changed, error) {
	return c.change(ctx, "/expose", req)
}

// Hide takes the host's addresses back.
func (c *Client) Hide(ctx context.Context, req HideRequest) (Changed, error) {
	return c.change(ctx, "/hide", req)
}

func (c *Client) change(ctx context.Context, path string, req any) (Changed, error) {
	var out Changed
	err := c.json(ctx, http.MethodPost, path, nil, req, &out)
	return out, err
}

// List returns attached interfaces: of the given containers, or of the host and all containers.
func (c *Client) List(ctx context.Context, containers []string) ([]Attached, error) {
	var out []Attached
	err := c.json(ctx, http.MethodGet, "/ps", url.Values{"container": containers}, nil, &out)
	return out, err
}

// AddName adds a record made by hand.
func (c *Client) AddName(ctx context.Context, req NameRequest) error {
	return c.name(ctx, http.MethodPut, req)
}

// RemoveName removes records made by hand.
func (c *Client) RemoveName(ctx context.Context, req NameRequest) error {
	return c.name(ctx, http.MethodDelete, req)
}

func (c *Client) name(ctx context.Context, method string, req NameRequest) error {
	query := url.Values{}
	for _, a := range req.Addrs {
		query.Add("ip", a.String())
	}
	if req.FQDN != "" {
		query.Set("fqdn", req.FQDN)
	}
	_, err := c.text(ctx, method, "/name"+segment(req.Container), query)
	return err
}

// LookupName returns the live records of a name, with or without the domain.
func (c *Client) LookupName(ctx context.Context, name string) ([]DNSEntry, error) {
	var out []DNSEntry
	err := c.json(ctx, http.MethodGet, "/name", url.Values{"fqdn": {name}}, nil, &out)
	return out, err
}

// DNS returns the domain and the address of the name server.
func (c *Client) DNS(ctx context.Context) (domain string, server netip.Addr, err error) {
	if domain, err = c.text(ctx, http.MethodGet, "/domain", nil); err != nil {
		return "", netip.Addr{}, err
	}
	text, err := c.text(ctx, http.MethodGet, "/dns-address", nil)
	if err != nil {
		return "", netip.Addr{}, err
	}
	if text != "" {
		server, err = netip.ParseAddr(text)
	}
	return domain, server, err
}

// ProxyAddrs returns the endpoints of the Docker proxy.
func (c *Client) ProxyAddrs(ctx context.Context) ([]string, error) {
	text, err := c.text(ctx, http.MethodGet, "/proxyaddrs", nil)
	return strings.Fields(text), err
}
