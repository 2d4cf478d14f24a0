package integration

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"meshd/integration/lab"
)

// TestLocalUser is S5 and A: what an unprivileged user of the host gets to see and do, and where the password is.
func TestLocalUser(t *testing.T) {
	w := newWorld(t, 2, 60*time.Second)
	h1, h2 := w.Host(1), w.Host(2)
	password := []string{"MESH_PASSWORD=" + secret}
	w.launchWith(h1, password, "--status-addr", "127.0.0.1:6782", "--http-addr", "127.0.0.1:6785")
	w.launchWith(h2, password, h1.Addr.String())
	c1 := w.netns(h1, "c1", "10.2.1.1/24")
	_, err := lab.WaitMesh(w.ctx, 10*time.Second, h1, h2)
	w.try(err)
	w.changePassword("second-"+secret, h1, h2)
	pid := strconv.Itoa(h1.Meshd())

	t.Run("Refused", func(t *testing.T) {
		w := w.in(t)
		for _, what := range []string{
			"meshctl status", "meshctl stop", "meshctl password list", "meshctl attach 10.2.1.9/24 netns:/run/netns/c1",
			"meshctl --socket /run/meshd/docker.sock status",
			"cat /proc/" + pid + "/environ", "cat /proc/" + pid + "/mem", "ls /proc/" + pid + "/fd", "cat /proc/" + pid + "/maps",
			"ls /var/lib/meshd", "cat /var/lib/meshd/meshd.db", "ls /sys/fs/bpf/meshd/v1", "kill -9 " + pid,
			"echo x > /run/meshd/x", "rm -f /run/meshd/meshd.sock && ! test -e /run/meshd/meshd.sock", "echo x > /var/lib/meshd-wait/x",
		} {
			r, err := h1.Run(w.ctx, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/bin/sh", "-c", what)
			w.try(err)
			if r.Exit == 0 {
				t.Errorf("nobody may: %s", r)
			}
			if strings.Contains(r.Stdout+r.Stderr, secret) {
				t.Errorf("shows the password: %s", r)
			}
		}
		if strconv.Itoa(h1.Meshd()) != pid {
			t.Error("meshd is gone")
		}
	})
	t.Run("Secret", func(t *testing.T) {
		w := w.in(t)
		texts := map[string]string{"log": h1.Log()}
		for _, args := range [][]string{{"report"}, {"status"}, {"status", "connections"}, {"password", "list"}, {"ps"}} {
			out, err := h1.Must(w.ctx, args...)
			w.try(err)
			texts[strings.Join(args, " ")] = out
		}
		for _, path := range []string{"/metrics", "/report"} {
			body, err := h1.Get(w.ctx, path)
			w.try(err)
			texts[path] = string(body)
		}
		for _, p := range h1.Processes() {
			environ, _ := h1.ReadFile(fmt.Sprintf("/proc/%d/environ", p.PID))
			texts["argv and environ of "+p.Comm] += strings.Join(p.Args, " ") + string(environ)
		}
		w.try(h1.Do(func() error {
			for _, root := range []string{"/var/lib/meshd", "/run", "/var/lib/meshd-wait", "/var/log", "/etc/meshd"} {
				_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
					if err == nil && d.Type().IsRegular() {
						data, _ := os.ReadFile(path)
						texts[path] = string(data)
					}
					return nil
				})
			}
			return nil
		}))
		for what, text := range texts {
			if strings.Contains(text, secret) {
				t.Errorf("%s holds the password", what)
			}
		}
		t.Logf("looked at %d texts", len(texts))
	})
	t.Run("Modes", func(t *testing.T) {
		w := w.in(t)
		w.try(h1.Do(func() error {
			for _, root := range []string{"/var/lib/meshd", "/run/meshd", "/sys/fs/bpf/meshd"} {
				err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
					if err != nil {
						return err
					}
					info, err := d.Info()
					if err != nil {
						return err
					}
					allowed := fs.FileMode(0o600)
					switch {
					case d.IsDir() && root == "/run/meshd":
						allowed = 0o755 // the sockets in it have modes of their own
					case d.IsDir():
						allowed = 0o700
					case strings.HasSuffix(path, "docker.sock"):
						allowed = 0o660 // as Docker's own
					case strings.HasSuffix(path, ".pid"):
						allowed = 0o644
					}
					if extra := info.Mode().Perm() &^ allowed; extra != 0 {
						t.Errorf("%s has mode %v, want at most %v", path, info.Mode(), allowed)
					}
					return nil
				})
				if err != nil {
					return err
				}
			}
			return nil
		}))
	})
	t.Run("Capabilities", func(t *testing.T) {
		w := w.in(t)
		status, err := h1.ReadFile("/proc/" + pid + "/status")
		w.try(err)
		// capabilities(7): CHOWN 0, DAC_OVERRIDE 1, DAC_READ_SEARCH 2, FOWNER 3, NET_BIND_SERVICE 10, NET_ADMIN 12,
		// NET_RAW 13, SYS_PTRACE 19, SYS_ADMIN 21, SYS_RESOURCE 24, PERFMON 38, BPF 39.
		const most = 1<<0 | 1<<1 | 1<<2 | 1<<3 | 1<<10 | 1<<12 | 1<<13 | 1<<19 | 1<<21 | 1<<24 | 1<<38 | 1<<39
		for line := range strings.Lines(string(status)) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
			allowed, ok := map[string]uint64{"CapInh": 0, "CapPrm": most, "CapEff": most, "CapBnd": most, "CapAmb": 0}[name]
			if !ok {
				continue
			}
			have, err := strconv.ParseUint(value, 16, 64)
			w.try(err)
			if have&^allowed != 0 {
				t.Errorf("%s is %x, want at most %x", name, have, allowed)
			}
		}
	})
	t.Run("TCP", func(t *testing.T) {
		w := w.in(t)
		for _, x := range []struct {
			addr, method, path, header, value string
			want                              int
		}{
			{"127.0.0.1:6782", "GET", "/report", "", "", 200},
			{"127.0.0.1:6782", "GET", "/report", "Host", "evil.example", 403},
			{"127.0.0.1:6782", "GET", "/report", "Origin", "http://evil.example", 403},
			{"127.0.0.1:6782", "GET", "/debug/pprof/", "", "", 404},
			{"127.0.0.1:6782", "GET", "/debug/pprof/heap", "", "", 404},
			{"127.0.0.1:6785", "GET", "/debug/pprof/heap", "", "", 404},
			{"127.0.0.1:6785", "GET", "/report", "Host", "evil.example:6785", 403},
			{"127.0.0.1:6785", "POST", "/stop", "Origin", "null", 403},
			{"127.0.0.1:6785", "POST", "/stop", "Sec-Fetch-Site", "same-site", 403},
		} {
			code, body := w.request(h1, x.addr, x.method, x.path, x.header, x.value)
			if code != x.want {
				t.Errorf("%s %s on %s with %s %s: %d %q, want %d", x.method, x.path, x.addr, x.header, x.value, code, body, x.want)
			}
		}
		for _, method := range []string{"POST", "PUT", "DELETE", "PATCH"} {
			for _, path := range []string{"/report", "/stop", "/connect", "/peer", "/password", "/attach"} {
				if code, body := w.request(h1, "127.0.0.1:6782", method, path, "", ""); code < 400 {
					t.Errorf("%s %s on the status port: %d %q", method, path, code, body)
				}
			}
		}
	})
	w.containerReaches(h1, h2, c1)
}

// request sends one HTTP request from the host itself.
func (w *world) request(h *lab.Host, addr, method, path, header, value string) (code int, body string) {
	w.t.Helper()
	var conn net.Conn
	w.try(h.Do(func() (err error) {
		conn, err = net.DialTimeout("tcp", addr, 2*time.Second)
		return err
	}))
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	host, extra := addr, ""
	if header == "Host" {
		host = value
	} else if header != "" {
		extra = header + ": " + value + "\r\n"
	}
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: %s\r\n%sContent-Length: 0\r\nConnection: close\r\n\r\n", method, path, host, extra)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	w.try(err)
	defer resp.Body.Close()
	text := make([]byte, 200)
	n, _ := resp.Body.Read(text)
	return resp.StatusCode, string(text[:n])
}

// containerReaches wants the ports of meshd closed to a container, at every address that the host has for it,
// and the loopback ports to a neighbour.
func (w *world) containerReaches(h1, h2 *lab.Host, c *member) {
	w.t.Helper()
	w.dockerLike(h1, c)
	_, err := h1.Must(w.ctx, "expose", "10.2.1.254/24")
	w.try(err)
	w.rest(2 * time.Second) // the firewall sees docker0
	for _, to := range []string{"10.2.1.254", "172.17.0.1", h1.Addr.String()} {
		addr := netip.MustParseAddr(to)
		for _, port := range []uint16{6782, 6783, 6785} {
			ctx, cancel := context.WithTimeout(w.ctx, 300*time.Millisecond)
			conn, err := c.Dial(ctx, "tcp", netip.AddrPortFrom(addr, port).String())
			cancel()
			if err == nil {
				conn.Close()
				w.t.Errorf("a container reaches TCP port %d at %v", port, addr)
			}
		}
		before := w.dropped(h1)
		for _, port := range []uint16{6783, 6784} {
			conn, err := c.Dial(w.ctx, "udp", netip.AddrPortFrom(addr, port).String())
			w.try(err)
			for range 50 {
				_, _ = conn.Write([]byte("garbage that meshd would count"))
			}
			_ = conn.Close()
		}
		w.rest(100 * time.Millisecond)
		if n := w.dropped(h1) - before; n >= 25 {
			w.t.Errorf("a container reaches the tunnel's ports at %v: %d datagrams counted", addr, n)
		}
	}
	// By way of a route of its own to the host's loopback, and a neighbour on the underlay likewise.
	for _, x := range []struct {
		what string
		run  func(context.Context, ...string) (lab.Result, error)
		via  string
	}{{"container", c.Run, "172.17.0.1"}, {"neighbour", h2.Run, h1.Addr.String()}} {
		// h2 is not on one link with h1 here, so that its route goes by the router, which drops it as well.
		r, err := x.run(w.ctx, "/bin/sh", "-c", "busybox wget -T 1 -q -O - http://"+x.via+":6782/report")
		w.try(err)
		if r.Exit == 0 {
			w.t.Errorf("%s gets the report: %s", x.what, r)
		}
	}
}
