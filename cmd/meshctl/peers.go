package main

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/spf13/cobra"

	"meshd/control"
)

func (a *app) connectCommand() *cobra.Command {
	var replace bool
	cmd := &cobra.Command{
		Use:   "connect [--replace] <peer>...",
		Short: "Add peers to dial",
		Long: `Adds peers, each HOST or HOST:PORT, to those that meshd dials, and dials them at once. A peer that
does not answer is tried again until "meshctl forget".`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 && !replace { // an empty list can be asked for with --replace only
				return errors.New("connect needs a peer")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.Connect(cmd.Context(), args, replace)
		},
	}
	cmd.Flags().BoolVar(&replace, "replace", false, "dial exactly these, and none that were given before")
	return cmd
}

func (a *app) forgetCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "forget <peer>...",
		Short: "Stop dialling peers",
		Long: `Drops peers from those that meshd dials. Each is written exactly as it was given to launch or
connect; "meshctl status targets" lists them. Connections that exist go on.`,
		Args: atLeastOne("peer, as it was given"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.Forget(cmd.Context(), args)
		},
	}
}

func (a *app) rmpeerCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rmpeer <name|nickname>...",
		Short: "Take over the addresses of peers that are gone for good",
		Long: `Takes over the address space of peers that have gone and will not come back, each by its name or
nickname, and prints how many addresses that was: 0 for a peer that is unknown or this one. Addresses
outside the range that its containers had can be used again as well. If several have gone, name all of
them: all who are not removed are asked what they know.`,
		Args: atLeastOne("name or nickname"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			defer a.sayWhy(cmd.Context(), c)()
			// All at once: of several that have gone, each is waited for until it is known that it will not come back.
			texts, errs := make([]string, len(args)), make([]error, len(args))
			var wg sync.WaitGroup
			for i, peer := range args {
				wg.Go(func() { texts[i], errs[i] = c.RemovePeer(cmd.Context(), peer) })
			}
			wg.Wait()
			code := exitOK
			for i, err := range errs {
				if errors.Is(err, control.ErrUnreachable) || cmd.Context().Err() != nil {
					return err
				}
				if err != nil {
					a.say("%s: %v", args[i], err)
					code = exitFailed
					continue
				}
				fmt.Fprint(a.stdout, texts[i])
			}
			if code != exitOK {
				return &exitError{code: code}
			}
			return nil
		},
	}
}

func (a *app) primeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "prime",
		Short: "Wait until addresses can be allocated",
		Long:  `Returns once the peers have agreed on how the address range is divided.`,
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			defer a.sayWhy(cmd.Context(), c)()
			return c.Prime(cmd.Context())
		},
	}
}

func (a *app) ipamCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ipam repair",
		Short: "Merge two clusters that divided the same range on their own",
		Long: `Merges the address ring of another cluster, which this one has met and set aside, into this
one's, and prints which containers must be given other addresses, and the command for each. If nobody
in reach knows who owns a part of the range, as "status" then says, this peer takes that part. What was
done is printed; where there is nothing to repair, that is no failure.`,
		ValidArgs: []string{"repair"},
		Args: func(_ *cobra.Command, args []string) error {
			if !slices.Equal(args, []string{"repair"}) {
				return errors.New("ipam has one form, ipam repair")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			stop := a.sayWhy(cmd.Context(), c)
			text, err := c.Repair(cmd.Context())
			stop()
			if err == nil {
				fmt.Fprint(a.stdout, text)
			}
			return err
		},
	}
	return cmd
}
