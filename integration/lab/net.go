package lab

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// wire joins every host to the router by a veth pair: eth0 in the host, its name in the router.
func (l *Lab) wire(ctx context.Context) error {
	var router strings.Builder
	for _, h := range l.Hosts {
		fmt.Fprintf(&router, "link add %s type veth peer name eth0 netns %d\n", h.Name, h.space.keeper.Process.Pid)
		// The kernel gives link-local addresses at a moment of its own, so they are given by hand.
		fmt.Fprintf(&router, "link set %s addrgenmode none\n", h.Name)
		fmt.Fprintf(&router, "addr add fe80::1/64 dev %s nodad\n", h.Name)
		fmt.Fprintf(&router, "addr add 198.18.%d.1/24 dev %s\n", h.Num, h.Name)
		fmt.Fprintf(&router, "addr add fd98:%x::1/64 dev %s nodad\n", h.Num, h.Name)
		fmt.Fprintf(&router, "link set %s up\n", h.Name)
	}
	if err := l.inRouter(ctx, router.String(), "ip", "-batch", "-"); err != nil {
		return err
	}
	for _, h := range l.Hosts {
		script := fmt.Sprintf("link set eth0 addrgenmode none\naddr add fe80::2/64 dev eth0 nodad\naddr add %v/24 dev eth0\naddr add %v/64 dev eth0 nodad\nlink set eth0 up\n"+
			"route add default via 198.18.%d.1\nroute add default via fd98:%x::1\n", h.Addr, h.Addr6, h.Num, h.Num)
		if err := h.batch(ctx, "ip", script); err != nil {
			return err
		}
	}
	for _, h := range l.Hosts {
		if err := h.waitIPv6(ctx); err != nil {
			return err
		}
	}
	return nil
}

// waitIPv6 waits for the local routes of the host's IPv6 addresses: the kernel makes them in the background.
func (h *Host) waitIPv6(ctx context.Context) error {
	want := []string{fmt.Sprintf("%x 80 ", h.Addr6.As16()), "fe800000000000000000000000000002 80 "}
	return Until(ctx, 5*time.Second, "IPv6 on "+h.Name, func() bool {
		routes, err := h.ReadFile("/proc/1/net/ipv6_route")
		return err == nil && strings.Contains(string(routes), want[0]) && strings.Contains(string(routes), want[1])
	})
}

// inRouter runs a program in the router's network namespace with the given input.
func (l *Lab) inRouter(ctx context.Context, input string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	path, err := lookPath(args[0])
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, path, args[1:]...)
	cmd.Env = environment(nil)
	cmd.Stdin = strings.NewReader(input)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := l.router.do(cmd.Start); err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("router: %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(out.String()))
	}
	return nil
}

// RouteTo has the router send a foreign prefix to one of the hosts, as a gateway with a static route.
func (l *Lab) RouteTo(ctx context.Context, prefix string, h *Host) error {
	return l.inRouter(ctx, "", "ip", "route", "replace", prefix, "via", h.Addr.String())
}
