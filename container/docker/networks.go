package docker

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"sync/atomic"
	"time"
)

// Networks knows which of Docker's bridges belong to networks without a way out ("docker network create
// --internal").
type Networks struct {
	client *Client
	known  atomic.Pointer[map[string]bool] // by bridge: is it internal? That never changes
	ask    chan struct{}
}

// NewNetworks asks nobody yet.
func NewNetworks(c *Client) *Networks {
	n := &Networks{client: c, ask: make(chan struct{}, 1)}
	n.known.Store(&map[string]bool{})
	return n
}

// Isolated reports whether a bridge's containers have no business outside. It does not wait for Docker: a
// bridge that is named as Docker names those of users' networks counts as isolated until Docker was asked,
// which Isolated sees to.
func (n *Networks) Isolated(bridge string) bool {
	if !strings.HasPrefix(bridge, "br-") {
		return false
	}
	internal, known := (*n.known.Load())[bridge]
	if known {
		return internal
	}
	select {
	case n.ask <- struct{}{}:
	default:
	}
	return true
}

// askEvery is the shortest time from one question to the next: what makes us ask may be hostile.
const askEvery = time.Second

// Run asks Docker when there is something to ask, until ctx ends.
func (n *Networks) Run(ctx context.Context) error {
	for {
		select {
		case <-n.ask:
		case <-ctx.Done():
			return ctx.Err()
		}
		if known, err := n.client.bridges(ctx); err != nil {
			n.client.log.Debug("Docker's networks are not known", "err", err)
		} else {
			n.known.Store(&known)
		}
		select {
		case <-time.After(askEvery):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// bridges lists the bridges of Docker's networks, and which of them are internal.
func (c *Client) bridges(ctx context.Context) (map[string]bool, error) {
	filters, err := json.Marshal(map[string][]string{"driver": {"bridge"}})
	if err != nil {
		return nil, err
	}
	var list []struct {
		ID       string `json:"Id"`
		Internal bool
		Options  map[string]string
	}
	if err := c.get(ctx, "/networks", url.Values{"filters": {string(filters)}}, &list); err != nil {
		return nil, fmt.Errorf("list networks: %w", err)
	}
	known := map[string]bool{}
	for _, net := range list {
		if name := net.Options["com.docker.network.bridge.name"]; name != "" {
			known[name] = net.Internal
		} else if len(net.ID) >= 12 {
			known["br-"+net.ID[:12]] = net.Internal
		}
	}
	return known, nil
}
