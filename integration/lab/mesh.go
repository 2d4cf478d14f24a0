package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"strings"
	"time"
)

// Report is the part of `meshctl report` that tests look at. It is declared here once more because
// what is tested is the JSON that users see.
type Report struct {
	Ready    bool
	Version  string
	Problems []string
	Router   struct {
		Name          string
		NickName      string
		Targets       []string
		Peers         []Peer
		Connections   []Connection
		UnicastRoutes []struct {
			Dest, Via string
			Hops      int
			Why       string
		}
		MACs     []struct{ Mac, Name string }
		Drops    map[string]uint64
		Offences []struct {
			Mac    string
			Reason string
			Frames uint64
		}
		Traffic []struct {
			Name                string
			BytesIn, BytesOut   uint64
			FramesIn, FramesOut uint64
		}
	}
	IPAM struct {
		Status           string
		DefaultSubnet    string
		RangeNumIPs      int
		ActiveIPs        int
		Entries          []RingEntry
		PendingClaims    []struct{ Address string }
		PendingAllocates []string
		Conflicts        []string
	}
	DNS struct {
		Domain  string
		Entries []struct{ Hostname, Address string }
	}
}

// RingEntry is one owner's share of the addresses.
type RingEntry struct {
	Size        int
	Nickname    string
	IsKnownPeer bool // it is in reach
	Version     uint64
}

// Peer is one member of the mesh.
type Peer struct {
	Name, NickName string
	Connections    []struct {
		Name        string
		Established bool
	}
}

// Connection is one connection or the attempt at one.
type Connection struct {
	Address, State, Overlay string
	Outbound, Encrypted     bool
	Peer, NickName          string
	MTU                     int
	Reason, Error           string
}

// Ctl runs meshctl on the host.
func (h *Host) Ctl(ctx context.Context, args ...string) (Result, error) {
	return h.Run(ctx, append([]string{"meshctl"}, args...)...)
}

// Must runs meshctl, which has to succeed, and gives what it printed without the last line end.
func (h *Host) Must(ctx context.Context, args ...string) (string, error) {
	return h.Out(ctx, append([]string{"meshctl"}, args...)...)
}

// Launch runs `meshctl launch`, which has to succeed and, as a clean launch does, to print nothing on
// standard error.
func (h *Host) Launch(ctx context.Context, args ...string) error {
	return h.LaunchWith(ctx, nil, args...)
}

// LaunchWith is Launch with variables ("NAME=value") in meshctl's environment.
func (h *Host) LaunchWith(ctx context.Context, env []string, args ...string) error {
	r, err := h.RunWith(ctx, func(c *exec.Cmd) { c.Env = append(c.Env, env...) }, append([]string{"meshctl", "launch"}, args...)...)
	switch {
	case err != nil:
	case r.Exit != 0:
		err = errors.New(r.String())
	case r.Stderr != "":
		err = fmt.Errorf("a clean launch has something to say: %s", r)
	}
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", h.Name, err, h.Log())
	}
	return nil
}

// Report asks the daemon for its state, as `meshctl report` does.
func (h *Host) Report(ctx context.Context) (r Report, err error) {
	body, err := h.Get(ctx, "/report")
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(body, &r); err != nil {
		return r, fmt.Errorf("report of %s: %w", h.Name, err)
	}
	return r, nil
}

// Get fetches a path from the daemon's control socket.
func (h *Host) Get(ctx context.Context, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return h.call(ctx, http.MethodGet, path, nil)
}

// Post sends JSON to a path of the daemon's control socket and reads the JSON that it answers. It takes the place of
// meshctl where thousands of processes would be what is measured.
func (h *Host) Post(ctx context.Context, path string, ask, answer any) error {
	body, err := json.Marshal(ask)
	if err != nil {
		return err
	}
	if body, err = h.call(ctx, http.MethodPost, path, body); err != nil {
		return err
	}
	if err := json.Unmarshal(body, answer); err != nil {
		return fmt.Errorf("%s: answer to %s: %w", h.Name, path, err)
	}
	return nil
}

// Refusal is an answer of the daemon other than success; when there is none at all, the error is another.
type Refusal struct {
	Code int // HTTP status
	Text string
}

func (r *Refusal) Error() string { return fmt.Sprintf("%d %s", r.Code, r.Text) }

func (h *Host) call(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return h.DialUnix(ctx, "/run/meshd/meshd.sock")
		}}}
	req, err := http.NewRequestWithContext(ctx, method, "http://meshd"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.Name, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err == nil && resp.StatusCode/100 != 2 {
		err = &Refusal{resp.StatusCode, strings.TrimSpace(string(answer))}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", h.Name, path, err)
	}
	return answer, nil
}

// Established gives the established connections, by nickname of the peer.
func (h *Host) Established(ctx context.Context) map[string]Connection {
	r, err := h.Report(ctx)
	if err != nil {
		return nil
	}
	got := map[string]Connection{}
	for _, c := range r.Router.Connections {
		if c.State == "established" {
			got[c.NickName] = c
		}
	}
	return got
}

// WaitMesh waits until every one of the hosts has an established direct connection to every other.
func WaitMesh(ctx context.Context, limit time.Duration, hosts ...*Host) (time.Duration, error) {
	start := time.Now()
	var missing string
	err := Until(ctx, limit, "a full mesh", func() bool {
		for _, h := range hosts {
			got := h.Established(ctx)
			for _, o := range hosts {
				if c, ok := got[o.Name]; o != h && (!ok || c.Overlay == "relay") {
					missing = fmt.Sprintf("%s has no direct connection to %s", h.Name, o.Name)
					return false
				}
			}
		}
		return true
	})
	if err != nil {
		err = fmt.Errorf("%w: %s", err, missing)
	}
	return time.Since(start), err
}

// Meshd gives the id of the host's meshd as seen in the host, 0 when none runs.
func (h *Host) Meshd() int {
	if pids := h.PIDs("meshd"); len(pids) > 0 {
		return pids[0]
	}
	return 0
}

// Log gives the end of the daemon's log.
func (h *Host) Log() string {
	var b strings.Builder
	for _, path := range h.Glob("/var/log/meshd*") {
		if data, err := h.ReadFile(path); err == nil {
			fmt.Fprintf(&b, "%s of %s:\n%s\n", path, h.Name, tail(data, 8000))
		}
	}
	return b.String()
}

// Attach attaches the container to the host's mesh and gives the addresses it got.
func (c *Container) Attach(ctx context.Context, addrs ...string) ([]netip.Addr, error) {
	out, err := c.Host.Must(ctx, append(append([]string{"attach"}, addrs...), c.Ref)...)
	if err != nil {
		return nil, err
	}
	var got []netip.Addr
	for field := range strings.FieldsSeq(out) {
		a, err := netip.ParseAddr(field)
		if err != nil {
			return nil, fmt.Errorf("%s: attach printed %q: %w", c.Host.Name, out, err)
		}
		got = append(got, a)
	}
	if len(got) == 0 {
		return nil, fmt.Errorf("%s: attach of %s printed no address: %q", c.Host.Name, c.Ref, out)
	}
	return got, nil
}
