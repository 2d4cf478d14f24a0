package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"meshd/control"
	"meshd/mesh"
)

// addressHelp explains the words that attach, detach, expose and hide take.
const addressHelp = `An address is one of
  10.2.1.1/24, ip:10.2.1.1/24   that address
  net:10.2.1.0/24               a free address of that subnet
  net:default                   a free address of the default subnet, which is also meant by none at all`

func (a *app) attachCommand() *cobra.Command {
	var req control.AttachRequest
	cmd := &cobra.Command{
		Use:   "attach [<address>...] <container>",
		Short: "Give a container an interface on the mesh",
		Long: `Gives a container an interface on the mesh with the given addresses and prints them. The container
is an id, a name, pid:N or netns:PATH. Attaching again adds addresses: to give it another address
instead, attach it with that one and then detach it from the former one. Only an address that is another
container's as well, as "status" says after two clusters met, goes by itself when an address of its subnet
is asked for.

` + addressHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			specs, container, err := addressesAndContainer(cmd, args)
			if err != nil {
				return err
			}
			req.Addresses, req.Container = specs, container
			for _, h := range req.AddHosts {
				if err := control.CheckAddHost(h); err != nil {
					return &usageError{cmd, "--add-host: " + err.Error()}
				}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			stop := a.sayWhy(cmd.Context(), c)
			changed, err := c.Attach(cmd.Context(), req)
			stop()
			return a.printChanged(changed, err)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&req.WithoutDNS, "without-dns", false, "give the container no name in the mesh")
	f.BoolVar(&req.RewriteHosts, "rewrite-hosts", false, "write the mesh address into the container's /etc/hosts")
	f.StringArrayVar(&req.AddHosts, "add-host", nil, "with --rewrite-hosts: another line, as `name:address`; repeatable")
	f.BoolVar(&req.NoMulticastRoute, "no-multicast-route", false, "add no multicast route in the container")
	return cmd
}

func (a *app) detachCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "detach [<address>...] <container>",
		Short: "Take a container's addresses on the mesh away",
		Long: `Takes addresses from a container, and its interface with the last one, and prints them. It allocates
nothing and waits for nobody.

` + addressHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			specs, container, err := addressesAndContainer(cmd, args)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.printChanged(c.Detach(cmd.Context(), control.DetachRequest{Container: container, Addresses: specs}))
		},
	}
}

func (a *app) exposeCommand() *cobra.Command {
	var req control.ExposeRequest
	cmd := &cobra.Command{
		Use:   "expose [<address>...] [-h <fqdn>] [--without-masquerade]",
		Short: "Give this host an address on the mesh",
		Long: `Gives this host an address on the mesh and prints it, so that host and containers reach each other
and containers reach the outside. Exposing again with another -h adds a name.

` + addressHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if req.Addresses, err = addresses(cmd, args); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			stop := a.sayWhy(cmd.Context(), c)
			changed, err := c.Expose(cmd.Context(), req)
			stop()
			return a.printChanged(changed, err)
		},
	}
	hostNameFlag(cmd, &req.FQDN, "name of this host in the mesh, as a `fqdn`")
	cmd.Flags().BoolVar(&req.WithoutMasquerade, "without-masquerade", false, "leave source addresses as they are")
	return cmd
}

func (a *app) hideCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "hide [<address>...]",
		Short: "Take this host's address on the mesh back",
		Long:  "Undoes expose and prints the addresses.\n\n" + addressHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			specs, err := addresses(cmd, args)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.printChanged(c.Hide(cmd.Context(), control.HideRequest{Addresses: specs}))
		},
	}
}

func (a *app) psCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ps [<container>...]",
		Short: "List the interfaces on the mesh",
		Long: `Prints a line for each container on the mesh, or for those given: id, MAC address, addresses. The id
` + mesh.OwnerExpose + ` is this host itself.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.List(cmd.Context(), args)
			if err != nil {
				return err
			}
			for _, e := range list {
				fmt.Fprintln(a.stdout, psLine(e))
			}
			return nil
		},
	}
}

func psLine(e control.Attached) string {
	id := e.ID
	if id != mesh.OwnerExpose && len(id) > 12 && !strings.Contains(id, ":") {
		id = id[:12]
	}
	words := []string{id, e.MAC.String()}
	for _, p := range e.Addresses {
		words = append(words, p.String())
	}
	return strings.Join(words, " ")
}

// addressesAndContainer splits the arguments of attach and detach: the last is the container.
func addressesAndContainer(cmd *cobra.Command, args []string) ([]mesh.AddrSpec, string, error) {
	if len(args) == 0 {
		return nil, "", &usageError{cmd, cmd.Name() + " needs a container"}
	}
	last := len(args) - 1
	specs, err := addresses(cmd, args[:last])
	if err != nil {
		return nil, "", err
	}
	if _, err := mesh.ParseAddrSpec(args[last]); err == nil {
		return nil, "", &usageError{cmd, fmt.Sprintf("the last argument is the container, and %q is an address", args[last])}
	}
	return specs, args[last], nil
}

func addresses(cmd *cobra.Command, args []string) ([]mesh.AddrSpec, error) {
	var specs []mesh.AddrSpec
	for _, word := range args {
		spec, err := mesh.ParseAddrSpec(word)
		if err == nil && spec.Kind == mesh.AddrNone {
			err = errors.New(`"none" is for MESH_CIDR only`)
		}
		if err != nil {
			return nil, failed("%s: %v", cmd.Name(), err)
		}
		specs = append(specs, spec)
	}
	return specs, nil
}

// printChanged prints the addresses without the lengths of their subnets, on one line.
func (a *app) printChanged(c control.Changed, err error) error {
	if err != nil {
		return err
	}
	for _, w := range c.Warnings {
		a.say("warning: %s", w)
	}
	if len(c.Addresses) > 0 {
		fmt.Fprintln(a.stdout, joinAddrs(c.Addresses))
	}
	return nil
}

func joinAddrs(of []netip.Prefix) string {
	words := make([]string, len(of))
	for i, p := range of {
		words[i] = p.Addr().String()
	}
	return strings.Join(words, " ")
}
