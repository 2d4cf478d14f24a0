package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/spf13/cobra"

	"meshd/control"
	"meshd/mesh"
)

// defaultDomain is that of a daemon that was not told otherwise.
const defaultDomain = "mesh.internal."

func (a *app) dnsAddCommand() *cobra.Command {
	var fqdn string
	cmd := &cobra.Command{
		Use:   "dns-add [<ip>...] <container> [-h <fqdn>] | <ip>... -h <fqdn>",
		Short: "Add names by hand",
		Long: `Names addresses. Without addresses all those of the container are meant, without -h the container's
own name. Without a container the addresses may be anyone's; they and -h are needed then.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := nameRequest(cmd, args, fqdn)
			if err != nil {
				return err
			}
			if req.Container == mesh.OwnerExtern && fqdn == "" {
				return &usageError{cmd, "without a container, -h is needed"}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.AddName(cmd.Context(), req)
		},
	}
	hostNameFlag(cmd, &fqdn, "the name, a `fqdn` in the mesh's domain")
	return cmd
}

func (a *app) dnsRemoveCommand() *cobra.Command {
	var fqdn string
	cmd := &cobra.Command{
		Use:   "dns-remove [<ip>...] <container> [-h <fqdn>] | <ip>... [-h <fqdn>]",
		Short: "Remove names that were added by hand",
		Long:  `Removes names of addresses: the one given by -h, or all. Without addresses all those of the container are meant.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := nameRequest(cmd, args, fqdn)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.RemoveName(cmd.Context(), req)
		},
	}
	hostNameFlag(cmd, &fqdn, "the name, a `fqdn` in the mesh's domain")
	return cmd
}

// nameRequest reads addresses and then, perhaps, a container.
func nameRequest(cmd *cobra.Command, args []string, fqdn string) (control.NameRequest, error) {
	req := control.NameRequest{Container: mesh.OwnerExtern, FQDN: fqdn}
	for i, arg := range args {
		addr, err := netip.ParseAddr(arg)
		switch {
		case err == nil:
			req.Addrs = append(req.Addrs, addr)
		case i == len(args)-1:
			req.Container = arg
		default:
			return req, &usageError{cmd, fmt.Sprintf("%q is not an IP address, and the container comes last", arg)}
		}
	}
	if len(args) == 0 {
		return req, &usageError{cmd, cmd.Name() + " needs addresses or a container"}
	}
	return req, nil
}

func (a *app) dnsLookupCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "dns-lookup <name>",
		Short: "Print the addresses of a name",
		Long:  `Prints the addresses of a name, with or without the mesh's domain, one per line, or nothing.`,
		Args:  exactlyOne("name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			entries, err := c.LookupName(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			seen := map[string]bool{}
			for _, e := range entries {
				if !seen[e.Address] {
					fmt.Fprintln(a.stdout, e.Address)
				}
				seen[e.Address] = true
			}
			return nil
		},
	}
}

func (a *app) dnsArgsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "dns-args",
		Short: "Print the options that make \"docker run\" use the mesh's names",
		Long: `Prints --dns and --dns-search for "docker run", without a line end; nothing when the name server is
off. Without a daemon, what a daemon with no options would use is printed; --dns-search alone as long as
Docker's bridge, on which the name server listens, is not there.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			domain, server, err := c.DNS(cmd.Context())
			switch {
			case control.IsOff(err):
				return nil
			case errors.Is(err, control.ErrUnreachable):
				domain = defaultDomain
				server, _ = bridgeIP(a.dockerBridge())
			case err != nil:
				return err
			}
			if !server.IsValid() {
				fmt.Fprintf(a.stdout, "--dns-search=%s", domain)
				return nil
			}
			fmt.Fprintf(a.stdout, "--dns=%s --dns-search=%s", server, domain)
			return nil
		},
	}
}

func (a *app) dockerBridge() string {
	if v, ok := a.env("DOCKER_BRIDGE"); ok && v != "" {
		return v
	}
	if v := a.lookup("DOCKER_BRIDGE"); v != "" {
		return v
	}
	return "docker0"
}

// bridgeIP is the first IPv4 address of a device.
func bridgeIP(device string) (netip.Addr, error) {
	addrs, err := mesh.DeviceAddrs(device)
	if err != nil {
		return netip.Addr{}, err
	}
	if i := slices.IndexFunc(addrs, netip.Addr.Is4); i >= 0 {
		return addrs[i], nil
	}
	return netip.Addr{}, fmt.Errorf("%s has no IPv4 address", device)
}

func (a *app) bridgeIPCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "docker-bridge-ip",
		Short: "Print the address of Docker's bridge",
		Long:  `Prints the IPv4 address of Docker's bridge, docker0 or the one that the variable DOCKER_BRIDGE names.`,
		Args:  noArgs,
		RunE: func(*cobra.Command, []string) error {
			ip, err := bridgeIP(a.dockerBridge())
			if err == nil {
				fmt.Fprintln(a.stdout, ip)
			}
			return err
		},
	}
}
