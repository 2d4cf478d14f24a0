package integration

import (
	"slices"
	"strings"
	"testing"
	"time"

	"meshd/integration/lab"
)

// TestProxyUserNamespace has a dockerd whose containers' root is nobody on the host.
func TestProxyUserNamespace(t *testing.T) {
	w := newWorld(t, 1, 2*time.Minute)
	h := w.Host(1)
	w.try(h.WriteFile("/etc/subuid", []byte("nobody:100000:65536\n"), 0o644))
	w.try(h.WriteFile("/etc/subgid", []byte("nobody:100000:65536\nnogroup:100000:65536\n"), 0o644))
	w.try(h.StartDocker(w.ctx, "--userns-remap=nobody:nogroup"))
	w.images(h)
	_, err := h.Out(w.ctx, "docker", "run", "--rm", lab.Image, "true")
	w.try(err)
	w.mesh()
	const look = "cat /proc/self/uid_map; ip -o -4 addr show dev ethmesh; cat /etc/hosts; nslookup stays.mesh.internal"
	w.proxied(h, "stays")
	for _, options := range []string{"", "--read-only", "--user 1000:1000", "--network none", "--read-only --cap-drop ALL --security-opt no-new-privileges", "--userns host"} {
		args := slices.Concat([]string{"run", "--rm", "--name", "mapped"}, strings.Fields(options), []string{lab.Image, "sh", "-c", look})
		r := w.dockerAt(h, proxySocket, "", args...)
		mapped := strings.Contains(r.Stdout, "100000")
		if len(meshAddrs(r.Stdout)) != 1 || !strings.Contains(r.Stdout, "\tmapped.mesh.internal") || mapped == (options == "--userns host") ||
			(r.Exit != 0) != (options == "--network none") { // from there the name server is not to be reached
			t.Errorf("%q: %s", options, r)
		}
	}
	if r := w.dockerAt(h, proxySocket, "", "run", "--rm", "--read-only", "scratch", "hello"); r.Stdout != "hello\n" {
		t.Errorf("an image with nothing but a program: %s", r)
	}
	w.proxyDocker(h, "run", "-d", "--name", "healthy", "healthy")
	w.try(lab.Until(w.ctx, 15*time.Second, "a healthy container", func() bool {
		return w.proxyDocker(h, "inspect", "-f", "{{.State.Health.Status}}", "healthy") == "healthy"
	}))
	w.proxyDocker(h, "restart", "-t", "0", "healthy")
	w.proxyDocker(h, "exec", "healthy", "ip", "link", "show", "dev", "ethmesh")
	w.proxyDocker(h, "rm", "-f", "healthy")
}
