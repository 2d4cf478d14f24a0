package main

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"meshd/control"
)

func (a *app) envCommand() *cobra.Command {
	var restore bool
	cmd := &cobra.Command{
		Use:   "env [--restore]",
		Short: "Print the shell command that points Docker at the proxy",
		Long: `Prints a command for the shell: after  eval $(meshctl env)  the Docker client talks to meshd's proxy,
which puts containers on the mesh as they start, and after  eval $(meshctl env --restore)  to Docker
itself again. Nothing is printed when meshd or its proxy does not run.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			now, _ := a.env("DOCKER_HOST")
			before, saved := a.env("ORIG_DOCKER_HOST")
			if restore {
				if !saved {
					return failed("there is nothing to restore: eval $(meshctl env) was not run in this shell")
				}
				fmt.Fprintf(a.stdout, "DOCKER_HOST=%s\n", shellWord(before))
				return nil
			}
			proxy, err := a.proxyAddr(cmd)
			if err != nil || proxy == "" {
				return err
			}
			if now == proxy && saved { // already done: keep what there is to restore
				now = before
			}
			fmt.Fprintf(a.stdout, "export DOCKER_HOST=%s ORIG_DOCKER_HOST=%s\n", shellWord(proxy), shellWord(now))
			return nil
		},
	}
	cmd.Flags().BoolVar(&restore, "restore", false, "print the command that undoes it")
	return cmd
}

func (a *app) configCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "config",
		Short: "Print the option that points the Docker client at the proxy",
		Long:  `Prints -H and the proxy's address, for  docker $(meshctl config) run ...  Prints nothing and fails when the proxy does not run.`,
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			proxy, err := a.proxyAddr(cmd)
			if err != nil {
				return err
			}
			if proxy == "" {
				return &exitError{code: exitFailed}
			}
			fmt.Fprintf(a.stdout, "-H=%s\n", proxy)
			return nil
		},
	}
}

// proxyAddr is the first address of the proxy as a client on this machine uses it, or "" when the
// daemon or its proxy does not run.
func (a *app) proxyAddr(cmd *cobra.Command) (string, error) {
	c, err := a.client()
	if err != nil {
		return "", err
	}
	addrs, err := c.ProxyAddrs(cmd.Context())
	if control.IsOff(err) || errors.Is(err, control.ErrUnreachable) || err == nil && len(addrs) == 0 {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return a.reachable(addrs[0]), nil
}

// reachable replaces the unspecified address by that of the host on which Docker is.
func (a *app) reachable(endpoint string) string {
	rest, ok := strings.CutPrefix(endpoint, "tcp://")
	if !ok {
		return endpoint
	}
	host, port, err := net.SplitHostPort(rest)
	if err != nil || !net.ParseIP(host).IsUnspecified() {
		return endpoint
	}
	host = "127.0.0.1"
	if v, ok := a.env("PROXY_HOST"); ok && v != "" {
		host = v
	} else if v, ok := a.env("DOCKER_HOST"); ok {
		if u, err := url.Parse(v); err == nil && u.Scheme == "tcp" && u.Hostname() != "" {
			host = u.Hostname()
		}
	}
	return "tcp://" + net.JoinHostPort(host, port)
}

// shellWord quotes s for a shell where that is needed.
func shellWord(s string) string {
	plain := strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/:.,_-@%+=[]", r))
	}) < 0
	if plain {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
