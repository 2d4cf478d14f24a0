package main

import (
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"meshd/integration/lab/demo"
)

func init() { extraCommands = append(extraCommands, demoCommand) }

func demoCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Show a mesh of three hosts on this machine and remove it again",
		Long: `Makes three hosts out of namespaces, launches a mesh on them, attaches containers and lets them talk;
then it cuts a link and mends it. It needs root, iproute2 and nftables, takes less than a minute, touches
neither this machine's network nor a meshd that runs on it, and removes everything, also after it was
interrupted.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			self, err := os.Executable()
			if err == nil {
				self, err = filepath.EvalSymlinks(self)
			}
			if err != nil {
				return err
			}
			return demo.Run(cmd.Context(), demo.Config{Out: cmd.OutOrStdout(), Bin: filepath.Dir(self)})
		},
	}
}
