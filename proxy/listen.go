package proxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"meshd/mesh"
)

// splitEndpoint reads unix:///path, tcp://host:port and :port.
func splitEndpoint(s string) (network, addr string, err error) {
	switch scheme, rest, ok := strings.Cut(s, "://"); {
	case ok && scheme == "unix":
		if !filepath.IsAbs(rest) {
			return "", "", errors.New("a unix socket is given by its absolute path")
		}
		return "unix", rest, nil
	case ok && scheme == "tcp":
		s = rest
	case ok:
		return "", "", fmt.Errorf("%s:// is neither unix:// nor tcp://", scheme)
	}
	if _, _, err := net.SplitHostPort(s); err != nil {
		return "", "", errors.New("neither unix:///path nor tcp://host:port")
	}
	return "tcp", s, nil
}

// listen opens one listening address. A unix socket gets the owner and mode of Docker's own, so that those
// who may use the one may use the other.
func listen(endpoint string, cfg Config) (net.Listener, error) {
	network, addr, err := splitEndpoint(endpoint)
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", endpoint, err)
	}
	if network == "unix" {
		l, err := listenUnix(addr, strings.TrimPrefix(cfg.Docker, "unix://"))
		if err != nil {
			return nil, fmt.Errorf("listen on %s: %w", addr, err)
		}
		return l, nil
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen on tcp %s: %w", addr, err)
	}
	// TLS that asks for no certificate, such as dockerd's with --tls alone, hides what is said but lets all in.
	guarded := cfg.TLS != nil && cfg.TLS.ClientAuth == tls.RequireAndVerifyClientCert
	if !guarded && !l.Addr().(*net.TCPAddr).IP.IsLoopback() {
		l.Close()
		return nil, fmt.Errorf("listen on tcp %s: who reaches Docker's API is root on this host: give --tlsverify with certificates, or a loopback address", addr)
	}
	if cfg.TLS != nil {
		return tls.NewListener(l, cfg.TLS), nil
	}
	return l, nil
}

func listenUnix(path, like string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	// When the daemon is away its socket would pass for a stale one of ours.
	if resolve(path) == resolve(like) {
		return nil, errors.New("that is Docker's own socket")
	}
	if err := mesh.ClearSocket(path); err != nil {
		return nil, fmt.Errorf("%w; -H chooses another path", err)
	}
	// Nobody may connect before the owner and mode are right.
	old := syscall.Umask(0o177)
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, err
	}
	uid, gid, mode := 0, 0, fs.FileMode(0o600)
	if st, err := os.Stat(like); err == nil {
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			uid, gid, mode = int(sys.Uid), int(sys.Gid), st.Mode().Perm()&0o660
		}
	}
	if err := errors.Join(os.Chown(path, uid, gid), os.Chmod(path, mode)); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// resolve gives a socket's path without symbolic links on the way to it.
func resolve(path string) string {
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return path
	}
	return filepath.Join(dir, filepath.Base(path))
}
