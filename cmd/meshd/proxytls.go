package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// proxyTLS is what the proxy's TCP listeners use: the given files, or else those of the running dockerd,
// unless that is switched off. nil means none.
func proxyTLS(p ProxyConfig) (*tls.Config, error) {
	files, verify := p.TLS, p.TLSVerify
	if !p.TLSOn {
		if p.NoDetectTLS {
			return nil, nil
		}
		var found bool
		if files, verify, found = dockerdTLS("/proc"); !found {
			return nil, nil
		}
	}
	cert, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		return nil, fmt.Errorf("proxy: TLS: %w", err)
	}
	cfg := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	if !verify {
		return cfg, nil
	}
	pem, err := os.ReadFile(files.CACert)
	if err != nil {
		return nil, fmt.Errorf("proxy: TLS: %w", err)
	}
	cfg.ClientCAs = x509.NewCertPool()
	if !cfg.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("proxy: TLS: %s holds no certificate", files.CACert)
	}
	cfg.ClientAuth = tls.RequireAndVerifyClientCert
	return cfg, nil
}

// dockerdTLS reads the TLS options from the command line of this host's dockerd.
func dockerdTLS(proc string) (files TLSFiles, verify, found bool) {
	names, _ := filepath.Glob(filepath.Join(proc, "[0-9]*", "comm"))
	for _, name := range names {
		dir := filepath.Dir(name)
		if comm, err := os.ReadFile(name); err != nil || string(comm) != "dockerd\n" || !hostsRoot(proc, dir) {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil {
			continue
		}
		if files, verify, found = parseDockerdTLS(strings.Split(string(raw), "\x00")); found {
			return files, verify, true
		}
	}
	return TLSFiles{}, false, false
}

// hostsRoot reports whether root started a process, and not in a container: anybody can call his program dockerd,
// and who is let in here is root. What its files are called means something among our own mounts only.
func hostsRoot(proc, dir string) bool {
	ours, err := os.Readlink(filepath.Join(proc, "self", "ns", "mnt"))
	if err != nil {
		return false
	}
	theirs, err := os.Readlink(filepath.Join(dir, "ns", "mnt"))
	if err != nil || theirs != ours {
		return false
	}
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	return err == nil && strings.Contains("\n"+string(status), "\nUid:\t0\t0\t0\t0\n") // real, effective, saved, of files
}

// parseDockerdTLS finds --tls, --tlsverify and the files, which default to those in /root/.docker.
func parseDockerdTLS(args []string) (files TLSFiles, verify, found bool) {
	files = TLSFiles{CACert: "/root/.docker/ca.pem", Cert: "/root/.docker/cert.pem", Key: "/root/.docker/key.pem"}
	for i, arg := range args {
		name, value, given := strings.Cut(arg, "=")
		on := !given || value == "true"
		if !given && i+1 < len(args) {
			value = args[i+1]
		}
		switch strings.TrimLeft(name, "-") {
		case "tls":
			found = found || on
		case "tlsverify":
			verify = on
			found = found || on
		case "tlscacert":
			files.CACert = value
		case "tlscert":
			files.Cert = value
		case "tlskey":
			files.Key = value
		}
	}
	return files, verify, found
}
