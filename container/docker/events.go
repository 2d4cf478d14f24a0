package docker

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"time"
)

// EventKind says what happened.
type EventKind uint8

const (
	Connected EventKind = iota + 1 // Docker answers: events follow, and what happened before is to be looked up
	Started                        // a container started
	Died                           // a container's process ended
	Destroyed                      // a container was removed
)

// Event is about a container, by its full id; Connected is about Docker.
type Event struct {
	Kind EventKind
	ID   string
}

const (
	maxEvent   = 1 << 20                // bytes of one event
	firstRetry = 200 * time.Millisecond // doubled after each failure
	lastRetry  = 5 * time.Second
	lookBack   = 2 * time.Second // Docker answers a moment before it listens, so events may be told twice
)

// Watch calls f with events until ctx ends, and waits for Docker whenever it is away. An event may come
// twice or late: whoever hears it looks at the container itself. f must not block for long.
func (c *Client) Watch(ctx context.Context, f func(Event)) error {
	retry := firstRetry
	for quiet := false; ; {
		err := c.watchOnce(ctx, func(e Event) {
			if e.Kind == Connected {
				retry, quiet = firstRetry, false
			}
			f(e)
		})
		c.forget()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !quiet {
			c.log.Info("waiting for Docker", "err", err)
			quiet = true
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(retry):
		}
		retry = min(2*retry, lastRetry)
	}
}

func (c *Client) watchOnce(ctx context.Context, f func(Event)) error {
	query := url.Values{
		"filters": {`{"type":["container"],"event":["start","die","destroy"]}`},
		"since":   {strconv.FormatInt(time.Now().Add(-lookBack).Unix(), 10)},
	}
	resp, err := c.call(ctx, "/events", query)
	if err != nil {
		return fmt.Errorf("events: %w", err)
	}
	defer resp.Body.Close()
	f(Event{Kind: Connected})
	return readEvents(resp.Body, f)
}

// readEvents reads a stream of JSON documents, one a line.
func readEvents(r io.Reader, f func(Event)) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 4096), maxEvent)
	for lines.Scan() {
		if e, ok := parseEvent(lines.Bytes()); ok {
			f(e)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("events: %w", err)
	}
	return errors.New("events: Docker ended the stream")
}

// parseEvent reads one event; false if it is none that matters.
func parseEvent(line []byte) (Event, bool) {
	var doc struct {
		Type, Action string
		Actor        struct{ ID string }
	}
	if json.Unmarshal(line, &doc) != nil || doc.Type != "container" || doc.Actor.ID == "" || len(doc.Actor.ID) > maxName {
		return Event{}, false
	}
	kinds := map[string]EventKind{"start": Started, "die": Died, "destroy": Destroyed}
	kind, ok := kinds[doc.Action]
	return Event{Kind: kind, ID: doc.Actor.ID}, ok
}
