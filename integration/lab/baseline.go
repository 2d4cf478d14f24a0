package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
)

// Names of the devices of a Baseline.
const (
	baselineBridge = "base"
	baselineVXLAN  = "base-vx"
)

// Baseline builds what Docker's overlay and flannel build, to compare with: on every host a plain Linux
// bridge with a vxlan port whose forwarding table is filled by hand.
func (l *Lab) Baseline(ctx context.Context) error {
	for _, h := range l.Hosts {
		var script strings.Builder
		fmt.Fprintf(&script, "link add %s type bridge\nlink set %s up\n", baselineBridge, baselineBridge)
		fmt.Fprintf(&script, "link add %s type vxlan id 99 local %v dstport 4789 nolearning udp6zerocsumrx\n", baselineVXLAN, h.Addr)
		fmt.Fprintf(&script, "link set %s master %s mtu 1450 up\n", baselineVXLAN, baselineBridge)
		if err := h.batch(ctx, "ip", script.String()); err != nil {
			return err
		}
		script.Reset()
		for _, o := range l.Hosts {
			if o != h {
				fmt.Fprintf(&script, "fdb append 00:00:00:00:00:00 dev %s dst %v\n", baselineVXLAN, o.Addr)
			}
		}
		if err := h.batch(ctx, "bridge", script.String()); err != nil {
			return err
		}
	}
	return nil
}

// JoinBaseline gives the container an interface "net0" on its host's baseline bridge and tells the
// other hosts where it is.
func (c *Container) JoinBaseline(ctx context.Context, addr netip.Prefix) error {
	if c.ID != "" {
		return errors.New("only a plain namespace can join the baseline")
	}
	a := addr.Addr().As4()
	port := fmt.Sprintf("bp%d-%d", a[2], a[3])
	mac := fmt.Sprintf("02:b0:%02x:%02x:%02x:%02x", a[0], a[1], a[2], a[3])
	err := c.Host.batch(ctx, "ip", fmt.Sprintf("link add %s type veth peer name net0 address %s mtu 1450 netns %s\nlink set %s master %s mtu 1450 up\n",
		port, mac, c.Name, port, baselineBridge))
	if err != nil {
		return err
	}
	for _, o := range c.Host.lab.Hosts {
		if o == c.Host {
			continue
		}
		if err := o.batch(ctx, "bridge", fmt.Sprintf("fdb replace %s dev %s dst %v static\nfdb replace %s dev %s master static\n",
			mac, baselineVXLAN, c.Host.Addr, mac, baselineVXLAN)); err != nil {
			return err
		}
	}
	for _, args := range [][]string{{"addr", "add", addr.String(), "dev", "net0"}, {"link", "set", "net0", "up"}} {
		if _, err := c.Out(ctx, append([]string{"ip"}, args...)...); err != nil {
			return err
		}
	}
	return nil
}

// batch runs a script of ip or bridge commands on the host.
func (h *Host) batch(ctx context.Context, tool, script string) error {
	r, err := h.RunWith(ctx, func(c *exec.Cmd) { c.Stdin = strings.NewReader(script) }, tool, "-batch", "-")
	if err == nil && r.Exit != 0 {
		err = fmt.Errorf("%s: %s\n%s", h.Name, r, script)
	}
	return err
}

// CutToMTU makes every link of the underlay carry packets of MTU size only, as a wire does; without it
// superframes cross the underlay whole. What is cut is cut by the kernel at the last moment, as for a
// network card without segmentation offload. With gro the receiving ends join packets again that belong
// together, as the drivers of network cards do by default; those of veth devices do not.
func (l *Lab) CutToMTU(ctx context.Context, gro bool) error {
	for _, h := range l.Hosts {
		args := CutArgs("eth0", gro)
		if _, err := h.Out(ctx, args...); err != nil {
			return err
		}
		args[2] = h.Name
		if err := l.inRouter(ctx, "", args...); err != nil {
			return err
		}
	}
	return nil
}

// CutArgs is the command that makes a veth device send packets of MTU size only, and join received ones or not.
func CutArgs(device string, gro bool) []string {
	return []string{"ethtool", "-K", device, "tx-tcp-segmentation", "off", "tx-tcp6-segmentation", "off", "tx-tcp-ecn-segmentation", "off",
		"tx-tcp-mangleid-segmentation", "off", "tx-udp-segmentation", "off", "tx-udp_tnl-segmentation", "off", "tx-udp_tnl-csum-segmentation", "off",
		"rx-gro", map[bool]string{true: "on", false: "off"}[gro]}
}
