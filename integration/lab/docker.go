package lab

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// Image is the name of the image that StartDocker imports: a static busybox.
const Image = "lab"

// DockerRequirements reports what is missing for StartDocker.
func DockerRequirements() error {
	var missing []string
	for _, tool := range []string{"dockerd", "docker", "containerd", "runc", "iptables", "busybox"} {
		if _, err := lookPath(tool); err != nil {
			missing = append(missing, tool)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("not installed: %s (Debian: apt-get install docker.io iptables busybox-static)", strings.Join(missing, ", "))
	}
	_, err := busyboxImage()
	return err
}

// StartDocker starts the host's dockerd and imports the image. Calling it after StopDocker starts a
// dockerd that finds what the one before left.
func (h *Host) StartDocker(ctx context.Context, options ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	driver := "overlay2"
	if fs, _ := os.ReadFile("/proc/filesystems"); !bytes.Contains(fs, []byte("\toverlay\n")) {
		driver = "vfs"
	}
	// The program has to outlive this call, so it does not get this call's context.
	args := []string{"dockerd", "--tls=false", "--storage-driver=" + driver, "--exec-opt=native.cgroupdriver=cgroupfs", "--cgroup-parent=/" + h.cgroup}
	p, err := h.Start(context.WithoutCancel(ctx), logTo(h, "/var/log/dockerd.log"), append(args, options...)...)
	if err != nil {
		return err
	}
	h.mu.Lock()
	h.dockerd = p
	h.mu.Unlock()
	err = Until(ctx, 30*time.Second, "dockerd on "+h.Name, func() bool { return !p.Running() || h.dockerAnswers(ctx) })
	if err == nil && !p.Running() {
		err = fmt.Errorf("dockerd on %s ended: %w", h.Name, p.err)
	}
	if err == nil {
		err = h.importImage(ctx)
	}
	if err != nil {
		log, _ := h.ReadFile("/var/log/dockerd.log")
		return fmt.Errorf("%w\n%s", err, tail(log, 4000))
	}
	return nil
}

// StopDocker ends the host's dockerd as an operator would, or by SIGKILL. Its containers then live on
// or not, as Docker does it.
func (h *Host) StopDocker(kill bool) error {
	h.mu.Lock()
	p := h.dockerd
	h.mu.Unlock()
	if p == nil {
		return errors.New(h.Name + " has no dockerd")
	}
	if kill {
		_ = p.Signal(os.Kill)
		<-p.done
		return nil
	}
	return p.Stop(20 * time.Second)
}

func (h *Host) dockerAnswers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return h.DialUnix(ctx, "/run/docker.sock") }}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker/_ping", nil)
	if err != nil {
		return false
	}
	resp, err := client.Do(req)
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// DialUnix connects to a unix socket of the host's.
func (h *Host) DialUnix(ctx context.Context, path string) (conn net.Conn, err error) {
	err = h.Do(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, "unix", path)
		return err
	})
	return conn, err
}

func (h *Host) importImage(ctx context.Context) error {
	if r, err := h.Run(ctx, "docker", "image", "inspect", Image); err != nil || r.Exit == 0 {
		return err
	}
	image, err := busyboxImage()
	if err != nil {
		return err
	}
	r, err := h.RunWith(ctx, func(c *exec.Cmd) { c.Stdin = bytes.NewReader(image) }, "docker", "import", "-", Image)
	if err == nil && r.Exit != 0 {
		err = errors.New(r.String())
	}
	return err
}

// Docker runs a container from the busybox image in the background, sleeping unless a command is given
// after the options ("--", then the command).
func (h *Host) Docker(ctx context.Context, name string, options ...string) (*Container, error) {
	command := []string{"sleep", "1000000"}
	for i, o := range options {
		if o == "--" {
			options, command = options[:i], options[i+1:]
			break
		}
	}
	args := append([]string{"docker", "run", "-d", "--stop-timeout", "1", "--name", name}, options...)
	id, err := h.Out(ctx, append(append(args, Image), command...)...)
	if err != nil {
		return nil, err
	}
	return h.Adopt(ctx, name, id)
}

// Adopt takes a running Docker container, however it was started.
func (h *Host) Adopt(ctx context.Context, name, id string) (*Container, error) {
	pid, err := h.Out(ctx, "docker", "inspect", "-f", "{{.State.Pid}}", id)
	if err != nil {
		return nil, err
	}
	n, err := strconv.Atoi(pid)
	if err != nil || n == 0 {
		return nil, fmt.Errorf("%s: container %s has process %q", h.Name, name, pid)
	}
	c := &Container{Host: h, Name: name, Ref: name, ID: id}
	return c, c.open("/proc/" + pid + "/ns/net")
}

// Exec runs a program of the container's own image inside it, by docker exec.
func (c *Container) Exec(ctx context.Context, args ...string) (Result, error) {
	return c.Host.Run(ctx, append([]string{"docker", "exec", c.ID}, args...)...)
}

// busyboxImage packs a root file system with the machine's static busybox.
func busyboxImage() ([]byte, error) {
	path, err := lookPath("busybox")
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if f, err := elf.NewFile(bytes.NewReader(data)); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	} else if libs, _ := f.ImportedLibraries(); len(libs) > 0 {
		return nil, fmt.Errorf("%s is not static (Debian: apt-get install busybox-static)", path)
	}
	list, err := exec.Command(path, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list: %w", path, err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	add := func(h tar.Header, body []byte) {
		h.Size = int64(len(body))
		if err == nil {
			err = w.WriteHeader(&h)
		}
		if err == nil {
			_, err = io.Copy(w, bytes.NewReader(body))
		}
	}
	for _, dir := range []string{"bin/", "etc/", "proc/", "sys/", "dev/", "tmp/", "root/", "var/", "run/"} {
		add(tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	}
	add(tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755}, data)
	for name := range strings.FieldsSeq(string(list)) {
		if name != "busybox" {
			add(tar.Header{Name: "bin/" + name, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
		}
	}
	add(tar.Header{Name: "etc/passwd", Typeflag: tar.TypeReg, Mode: 0o644}, []byte("root:x:0:0::/root:/bin/sh\n"))
	add(tar.Header{Name: "etc/group", Typeflag: tar.TypeReg, Mode: 0o644}, []byte("root:x:0:\n"))
	if err == nil {
		err = w.Close()
	}
	return out.Bytes(), err
}

// logTo sends a program's output to a file of the host's, appending.
func logTo(h *Host, path string) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) {
		_ = h.Do(func() error {
			f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
			if err == nil {
				cmd.Stdout, cmd.Stderr = f, f
			}
			return err
		})
	}
}

// tail gives the last n bytes of b.
func tail(b []byte, n int) []byte {
	if len(b) > n {
		return append([]byte("…"), b[len(b)-n:]...)
	}
	return b
}
