package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"meshd/integration/lab"
)

// end is one side of a measured network.
type end struct {
	*lab.Container
	addr netip.Addr
}

// network is one candidate, up and running in a lab of its own.
type network struct {
	name    string
	lab     *lab.Lab
	a, b    end
	daemons []daemon // whose memory is reported
	results map[string][]float64
	order   []string // of the results' names
}

type daemon struct {
	host *lab.Host
	comm string
}

// missingError is a candidate that cannot be measured here.
type missingError struct{ what string }

func (e *missingError) Error() string { return e.what }

type candidate struct {
	name  string
	hosts int
	setup func(ctx context.Context, n *network) error
}

// Names of the candidates that ratios are made with.
const (
	reference = "bridge+vxlan"
)

var candidates = []candidate{
	{"veth", 1, setupVeth},
	{"routing", 2, setupRouting},
	{reference, 2, setupVXLAN},
	{"mesh kernel", 2, meshSetup("kernel", nil)},
	{"mesh userspace", 2, meshSetup("userspace", nil, "--no-fastdp")},
	{"mesh sealed", 2, meshSetup("userspace", []string{"MESH_PASSWORD=bench"}, "--no-fastdp")},
	{"mesh relayed", 3, meshSetup("relay", nil, "--no-fastdp", "--no-discovery")},
	{"mesh relayed sealed", 3, meshSetup("relay", []string{"MESH_PASSWORD=bench"}, "--no-fastdp", "--no-discovery")},
	{"wireguard-go", 2, setupWireGuard},
	{"nebula", 2, setupNebula},
	{"tinc", 2, setupTinc},
	{"n2n", 3, setupN2N},
}

func (c candidate) build(ctx context.Context, o options) (_ *network, err error) {
	bin, err := filepath.Abs(o.bin)
	if err != nil {
		return nil, err
	}
	n := &network{name: c.name, results: map[string][]float64{}}
	if n.lab, err = lab.New(ctx, lab.Config{Hosts: c.hosts, Bin: bin}); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if o.underlay != whole {
		err = n.lab.CutToMTU(ctx, o.underlay == wire)
	}
	if err == nil {
		err = c.setup(ctx, n)
	}
	if err == nil && c.name == "veth" && o.underlay != whole {
		for _, x := range []end{n.a, n.b} {
			if err == nil {
				_, err = x.Out(ctx, lab.CutArgs("net0", o.underlay == wire)...)
			}
		}
	}
	if err == nil {
		_, err = n.a.WaitPing(ctx, n.b.addr, 20*time.Second)
	}
	if err != nil {
		for _, h := range n.lab.Hosts {
			err = fmt.Errorf("%w%s", err, h.Log())
		}
		return nil, errors.Join(err, n.lab.Close())
	}
	return n, nil
}

func setupVeth(ctx context.Context, n *network) error {
	h := n.lab.Host(1)
	for i, x := range []*end{&n.a, &n.b} {
		c, err := h.Netns(ctx, fmt.Sprintf("c%d", i+1))
		if err != nil {
			return err
		}
		*x = end{c, netip.AddrFrom4([4]byte{10, 3, 1, byte(i + 1)})}
	}
	if _, err := h.Out(ctx, "ip", "link", "add", "net0", "netns", "c1", "type", "veth", "peer", "name", "net0", "netns", "c2"); err != nil {
		return err
	}
	for _, x := range []end{n.a, n.b} {
		for _, args := range [][]string{{"addr", "add", x.addr.String() + "/24", "dev", "net0"}, {"link", "set", "net0", "up"}} {
			if _, err := x.Out(ctx, append([]string{"ip"}, args...)...); err != nil {
				return err
			}
		}
	}
	return nil
}

// hostEnds measures between the hosts themselves; their addresses are those given.
func (n *network) hostEnds(a, b *lab.Host, addrA, addrB netip.Addr) error {
	ca, err := a.Self()
	if err != nil {
		return err
	}
	cb, err := b.Self()
	n.a, n.b = end{ca, addrA}, end{cb, addrB}
	return err
}

func setupRouting(_ context.Context, n *network) error {
	a, b := n.lab.Host(1), n.lab.Host(2)
	return n.hostEnds(a, b, a.Addr, b.Addr)
}

func setupVXLAN(ctx context.Context, n *network) error {
	if err := n.lab.Baseline(ctx); err != nil {
		return err
	}
	for i, x := range []*end{&n.a, &n.b} {
		c, err := n.lab.Host(i+1).Netns(ctx, "c")
		if err != nil {
			return err
		}
		addr := netip.AddrFrom4([4]byte{10, 3, 1, byte(i + 1)})
		if err := c.JoinBaseline(ctx, netip.PrefixFrom(addr, 24)); err != nil {
			return err
		}
		*x = end{c, addr}
	}
	return nil
}

// meshSetup launches the product with options and wants the given overlay between the ends, which are on
// the first and the last host. With three hosts all have the second as their only target.
func meshSetup(overlay string, env []string, options ...string) func(context.Context, *network) error {
	return func(ctx context.Context, n *network) error {
		last := n.lab.Hosts[len(n.lab.Hosts)-1]
		middle := n.lab.Host(2)
		for _, h := range n.lab.Hosts {
			args := options[:len(options):len(options)]
			if h != middle {
				args = append(args, middle.Addr.String())
			}
			if err := h.LaunchWith(ctx, env, args...); err != nil {
				return err
			}
			n.daemons = append(n.daemons, daemon{h, "meshd"})
		}
		for i, x := range []*end{&n.a, &n.b} {
			h := []*lab.Host{n.lab.Host(1), last}[i]
			c, err := h.Netns(ctx, "c")
			if err != nil {
				return err
			}
			addr := netip.AddrFrom4([4]byte{10, 2, 1, byte(i + 1)})
			if _, err := c.Attach(ctx, addr.String()+"/24"); err != nil {
				return err
			}
			*x = end{c, addr}
		}
		if overlay == "relay" {
			return nil
		}
		err := lab.Until(ctx, 40*time.Second, "the path to be "+overlay, func() bool {
			return n.lab.Host(1).Established(ctx)[last.Name].Overlay == overlay
		})
		if err != nil && overlay == "kernel" {
			return &missingError{fmt.Sprintf("%v: %s", err, n.lab.Host(1).Established(ctx)[last.Name].Reason)}
		}
		return err
	}
}

// need reports programs that are not installed.
func need(packages string, programs ...string) error {
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			return &missingError{p + " is not installed (Debian: apt-get install " + packages + ")"}
		}
	}
	return nil
}

// Addresses of the ends inside the tunnels that join hosts.
var tunnelA, tunnelB = netip.MustParseAddr("10.4.1.1"), netip.MustParseAddr("10.4.1.2")

func setupWireGuard(ctx context.Context, n *network) error {
	if err := need("wireguard-go wireguard-tools", "wireguard-go", "wg"); err != nil {
		return err
	}
	var private, public [2]string
	for i := range private {
		out, err := exec.CommandContext(ctx, "wg", "genkey").Output()
		if err != nil {
			return err
		}
		private[i] = strings.TrimSpace(string(out))
		cmd := exec.CommandContext(ctx, "wg", "pubkey")
		cmd.Stdin = strings.NewReader(private[i])
		if out, err = cmd.Output(); err != nil {
			return err
		}
		public[i] = strings.TrimSpace(string(out))
	}
	for i, h := range n.lab.Hosts {
		o := n.lab.Hosts[1-i]
		conf := fmt.Sprintf("[Interface]\nPrivateKey = %s\nListenPort = 51820\n[Peer]\nPublicKey = %s\nAllowedIPs = 10.4.1.0/24\nEndpoint = %v:51820\n",
			private[i], public[1-i], o.Addr)
		if err := h.WriteFile("/etc/wg0.conf", []byte(conf), 0o600); err != nil {
			return err
		}
		script := fmt.Sprintf("wireguard-go wg0 >/dev/null 2>&1 && wg setconf wg0 /etc/wg0.conf && ip addr add %v/24 dev wg0 && ip link set wg0 mtu 1420 up",
			[]netip.Addr{tunnelA, tunnelB}[i])
		if _, err := h.Out(ctx, "/bin/sh", "-c", script); err != nil {
			return err
		}
		n.daemons = append(n.daemons, daemon{h, "wireguard-go"})
	}
	return n.hostEnds(n.lab.Host(1), n.lab.Host(2), tunnelA, tunnelB)
}

func setupNebula(ctx context.Context, n *network) error {
	if err := need("nebula", "nebula", "nebula-cert"); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-nebula-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	cert := func(args ...string) error {
		cmd := exec.CommandContext(ctx, "nebula-cert", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nebula-cert: %w: %s", err, out)
		}
		return nil
	}
	if err := cert("ca", "-name", "bench"); err != nil {
		return err
	}
	for i, h := range n.lab.Hosts {
		if err := cert("sign", "-name", h.Name, "-ip", []netip.Addr{tunnelA, tunnelB}[i].String()+"/24"); err != nil {
			return err
		}
		for from, to := range map[string]string{"ca.crt": "ca.crt", h.Name + ".crt": "host.crt", h.Name + ".key": "host.key"} {
			data, err := os.ReadFile(filepath.Join(dir, from))
			if err == nil {
				err = h.WriteFile("/etc/nebula/"+to, data, 0o600)
			}
			if err != nil {
				return err
			}
		}
		// JSON is YAML, too.
		conf, err := json.Marshal(map[string]any{
			"pki":             map[string]string{"ca": "/etc/nebula/ca.crt", "cert": "/etc/nebula/host.crt", "key": "/etc/nebula/host.key"},
			"static_host_map": map[string][]string{tunnelA.String(): {n.lab.Host(1).Addr.String() + ":4242"}, tunnelB.String(): {n.lab.Host(2).Addr.String() + ":4242"}},
			"lighthouse":      map[string]any{"am_lighthouse": false},
			"listen":          map[string]any{"host": "0.0.0.0", "port": 4242, "batch": 64},
			"cipher":          "aes",
			"tun":             map[string]any{"dev": "nebula1", "mtu": 1420, "tx_queue": 5000},
			"firewall": map[string]any{"outbound": []map[string]string{{"port": "any", "proto": "any", "host": "any"}},
				"inbound": []map[string]string{{"port": "any", "proto": "any", "host": "any"}}},
		})
		if err != nil {
			return err
		}
		if err := h.WriteFile("/etc/nebula/config.yml", conf, 0o600); err != nil {
			return err
		}
		if _, err := h.Start(context.WithoutCancel(ctx), nil, "nebula", "-config", "/etc/nebula/config.yml"); err != nil {
			return err
		}
		n.daemons = append(n.daemons, daemon{h, "nebula"})
	}
	return n.hostEnds(n.lab.Host(1), n.lab.Host(2), tunnelA, tunnelB)
}

func setupTinc(ctx context.Context, n *network) error {
	if err := need("tinc", "tincd"); err != nil {
		return err
	}
	public := map[string]string{}
	for i, h := range n.lab.Hosts {
		conf := "Name = " + h.Name + "\nMode = switch\nDeviceType = tap\nInterface = tinc0\nAddressFamily = ipv4\n"
		if i == 1 {
			conf += "ConnectTo = h1\n"
		}
		for path, text := range map[string]string{"tinc.conf": conf, "hosts/" + h.Name: "Address = " + h.Addr.String() + "\n",
			"tinc-up": fmt.Sprintf("#!/bin/sh\nip addr add %v/24 dev tinc0\nip link set tinc0 mtu 1400 up\n", []netip.Addr{tunnelA, tunnelB}[i])} {
			if err := h.WriteFile("/etc/tinc/b/"+path, []byte(text), 0o700); err != nil {
				return err
			}
		}
		if _, err := h.Out(ctx, "/bin/sh", "-c", "mkdir -p /var/run && tincd -n b -K2048 </dev/null"); err != nil {
			return err
		}
		data, err := h.ReadFile("/etc/tinc/b/hosts/" + h.Name)
		if err != nil {
			return err
		}
		public[h.Name] = string(data)
	}
	for _, h := range n.lab.Hosts {
		for name, text := range public {
			if err := h.WriteFile("/etc/tinc/b/hosts/"+name, []byte(text), 0o600); err != nil {
				return err
			}
		}
		if _, err := h.Start(context.WithoutCancel(ctx), nil, "tincd", "-n", "b", "-D"); err != nil {
			return err
		}
		n.daemons = append(n.daemons, daemon{h, "tincd"})
	}
	return n.hostEnds(n.lab.Host(1), n.lab.Host(2), tunnelA, tunnelB)
}

// setupN2N has the supernode on the third host; the edges find each other's address there.
func setupN2N(ctx context.Context, n *network) error {
	if err := need("n2n", "edge", "supernode"); err != nil {
		return err
	}
	if _, err := n.lab.Host(3).Start(context.WithoutCancel(ctx), nil, "supernode", "-l", "7654"); err != nil {
		return err
	}
	for i, h := range n.lab.Hosts[:2] {
		_, err := h.Start(context.WithoutCancel(ctx), nil, "edge", "-f", "-d", "n2n0", "-a", []netip.Addr{tunnelA, tunnelB}[i].String(),
			"-c", "bench", "-k", "bench", "-l", n.lab.Host(3).Addr.String()+":7654", "-M", "1400")
		if err != nil {
			return err
		}
		n.daemons = append(n.daemons, daemon{h, "edge"})
	}
	return n.hostEnds(n.lab.Host(1), n.lab.Host(2), tunnelA, tunnelB)
}
