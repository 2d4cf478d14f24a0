package main

import (
	"context"
	"strings"
	"time"

	"meshd/control"
)

// patience is after how long a call that waits for other peers says for whom.
const patience = 5 * time.Second

// sayWhy says once, if the call that follows takes long, what it waits for. Until stop has returned it may write.
func (a *app) sayWhy(ctx context.Context, c *control.Client) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-ctx.Done():
			return
		case <-time.After(a.patience):
		}
		r, err := c.Report(ctx)
		if err != nil || r.IPAM == nil {
			return
		}
		if why := strings.Join(r.IPAM.Waiting, "; "); why != "" {
			a.say("no answer yet: %s", why)
		}
	}()
	return func() { cancel(); <-done }
}
