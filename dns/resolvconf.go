package dns

import (
	"bytes"
	"context"
	"crypto/sha256"
	"net"
	"net/netip"
	"os"
	"time"

	miekg "github.com/miekg/dns"
)

const (
	resolvPort    = 53 // resolv.conf knows no other
	maxUpstreams  = 8
	reloadEvery   = 2 * time.Second
	maxResolvConf = 1 << 20
)

// parseResolvConf returns the servers of a resolv.conf(5) in order. Those for which own says that they are
// this server are left out, or every question would go round in circles.
func parseResolvConf(text []byte, own func(netip.AddrPort) bool) (servers []netip.AddrPort) {
	if len(text) > maxResolvConf {
		text = text[:maxResolvConf]
	}
	conf, err := miekg.ClientConfigFromReader(bytes.NewReader(text))
	if err != nil {
		return nil
	}
	seen := make(map[netip.AddrPort]bool)
	for _, s := range conf.Servers {
		addr, err := netip.ParseAddr(s)
		if err != nil {
			continue
		}
		server := netip.AddrPortFrom(addr.Unmap(), resolvPort)
		if seen[server] || own(server) || len(servers) == maxUpstreams {
			continue
		}
		seen[server] = true
		servers = append(servers, server)
	}
	return servers
}

// reloadLoop keeps the upstream servers what resolv.conf says. The file may be replaced, rewritten, or a
// link to a file that is; so its content is compared, and that every two seconds.
func (s *Server) reloadLoop(ctx context.Context) {
	if s.cfg.ResolvConf == "" {
		return
	}
	var last [sha256.Size]byte
	var missing bool
	tick := time.NewTicker(reloadEvery)
	defer tick.Stop()
	for {
		text, err := os.ReadFile(s.cfg.ResolvConf)
		switch {
		case err != nil:
			// It may be about to be replaced: the servers that it named stay.
			if !missing {
				s.log.Warn("upstream name servers are not known anew", "err", err)
			}
		default:
			// The listener's address counts too: it decides which server is this one.
			sum := sha256.Sum256(append(text, s.Addr().String()...))
			if sum != last {
				last = sum
				servers := parseResolvConf(text, s.isSelf)
				s.forward.setServers(servers)
				s.log.Info("upstream name servers", "servers", servers)
			}
		}
		missing = err != nil
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// isSelf reports whether a server is this one.
func (s *Server) isSelf(server netip.AddrPort) bool {
	own := s.Addr()
	if server.Port() != own.Port() {
		return false
	}
	if !own.Addr().IsUnspecified() {
		return server.Addr() == own.Addr()
	}
	if server.Addr().IsUnspecified() || server.Addr().IsLoopback() {
		return true
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Unmap() == server.Addr() {
			return true
		}
	}
	return false
}
