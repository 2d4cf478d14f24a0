package main

import (
	"context"
	"log/slog"
	"os"

	"meshd/control"
)

// serve builds the rooms, runs them until ctx is done and returns the first failure.
func serve(ctx context.Context, cfg Config, log *slog.Logger, notify *notifier) error {
	api, err := control.Listen(controlConfig(cfg.Control, log), control.Backends{Reporter: state{}})
	if err != nil {
		return err
	}
	notify.Ready(func(context.Context) error { return nil })
	return api.Run(ctx)
}

func controlConfig(c ControlConfig, log *slog.Logger) control.Config {
	return control.Config{
		Log:         log,
		Socket:      c.Socket,
		HTTPAddr:    c.HTTPAddr,
		CACert:      c.TLS.CACert,
		Cert:        c.TLS.Cert,
		Key:         c.TLS.Key,
		StatusAddr:  c.StatusAddr,
		MetricsAddr: c.MetricsAddr,
	}
}

// state reports what the rooms say.
type state struct{}

func (state) Report() control.Report {
	return control.Report{Ready: true, Version: version}
}

// resetHost removes what meshd leaves on a host when it stops.
func resetHost(cfg Config, log *slog.Logger) error {
	return os.RemoveAll(cfg.StateDir)
}
