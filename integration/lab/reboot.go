package lab

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// rebootScript takes from a host what a reboot takes: processes, runtime files, devices, rules, pins.
const rebootScript = `
kill -9 -1
grep -o ' /run/[^ ]*' /proc/1/mountinfo | sort -r | while read -r m; do [ "$m" = /run/netns ] || umount -l "$m" 2>/dev/null; done
grep -o ' /var/lib/docker/[^ ]*' /proc/1/mountinfo | sort -r | while read -r m; do umount -l "$m"; done
find /run/netns -mindepth 1 | while read -r m; do umount -l "$m" 2>/dev/null; rm -f "$m"; done
find /run -mindepth 1 ! -path /run/netns -delete
find /sys/fs/bpf -mindepth 1 -name '*.debug' -prune -o -mindepth 1 -print | sort -r | while read -r f; do rm -rf "$f"; done
for d in /sys/class/net/*; do
	d=${d##*/}
	case $d in lo|eth0) tc qdisc del dev "$d" clsact 2>/dev/null;; *) ip link del "$d" 2>/dev/null;; esac
done
nft flush ruleset
ip -4 rule flush; ip -4 rule add lookup main pref 32766; ip -4 rule add lookup default pref 32767
mkdir -p /run/lock /run/mount
true
`

// Reboot does to the host what cutting its power and booting it again does. Its files on disk stay;
// nothing is started again. Containers that were open in the lab are gone.
func (h *Host) Reboot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	h.mu.Lock()
	for _, c := range h.containers {
		c.forget()
	}
	h.containers, h.dockerd = nil, nil
	h.mu.Unlock()
	r, err := h.Run(ctx, "/bin/sh", "-c", rebootScript)
	if err == nil && (r.Exit != 0 || strings.TrimSpace(r.Stderr) != "") {
		err = fmt.Errorf("reboot %s: %s", h.Name, r)
	}
	return err
}
