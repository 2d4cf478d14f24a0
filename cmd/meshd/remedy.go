package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"strings"
	"syscall"

	"meshd/dns"
	"meshd/store"
)

// remedy says of what kept meshd from starting also what a person can do about it, where that can be known.
func remedy(err error, cfg Config) error {
	op, path := new(net.OpError), new(fs.PathError)
	switch {
	case errors.Is(err, store.ErrLocked):
		return fmt.Errorf("%w; a second meshd needs its own --state-dir", err)
	case errors.Is(err, store.ErrNewer):
		return fmt.Errorf("%w; start that one again, or begin anew with \"meshctl reset --force\"", err)
	case errors.Is(err, store.ErrCorrupt):
		return fmt.Errorf("%w; put a copy back, or begin anew with \"meshctl reset --force\" and free its addresses with \"meshctl rmpeer\" on another host", err)
	case errors.As(err, &path) && related(path.Path, cfg.StateDir):
		return fmt.Errorf("%w; --state-dir chooses another place", err)
	case errors.As(err, &op) && op.Addr != nil:
		if addr, perr := netip.ParseAddrPort(op.Addr.String()); perr == nil {
			return listenRemedy(err, strings.TrimRight(op.Net, "46"), addr, cfg)
		}
	}
	return err
}

// related reports whether a path is the directory, in it, or above it.
func related(path, dir string) bool {
	return strings.HasPrefix(path+"/", dir+"/") || strings.HasPrefix(dir+"/", path+"/")
}

// listenRemedy is about an address that meshd cannot listen on.
func listenRemedy(err error, network string, addr netip.AddrPort, cfg Config) error {
	option := ""
	for name, at := range map[string]string{
		"--status-addr": cfg.Control.StatusAddr, "--metrics-addr": cfg.Control.MetricsAddr, "--http-addr": cfg.Control.HTTPAddr,
	} {
		if is, err := netip.ParseAddrPort(at); err == nil && is == addr {
			option = name
		}
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		if option == "" && addr.Port() == cfg.Underlay.Port {
			option = "--port"
		}
		holder := dns.HeldBy(network, addr)
		if option == "" || holder == "" {
			return err
		}
		return fmt.Errorf("address already in use: %s %v is held by %s; %s chooses another", network, addr, holder, option)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		if option == "" && addr.Addr() == cfg.Underlay.Host {
			option = "--host"
		}
		if option != "" {
			return fmt.Errorf("%s: this host has no address %v", option, addr.Addr())
		}
	}
	return err
}
