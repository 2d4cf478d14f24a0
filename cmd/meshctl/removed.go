package main

import "github.com/spf13/cobra"

// removed are commands of old versions of Weave Net, with what to do instead.
var removed = []struct{ name, instead string }{
	{"run", `use "docker run" after  eval $(meshctl env)`},
	{"start", `use "docker start" after  eval $(meshctl env)`},
	{"restart", `use "docker restart" after  eval $(meshctl env)`},
	{"launch-router", `use "meshctl launch"`},
	{"launch-proxy", `use "meshctl launch"`},
	{"launch-plugin", `use "meshctl launch"`},
	{"stop-router", `use "meshctl stop"`},
	{"stop-proxy", `use "meshctl stop"`},
	{"stop-plugin", `use "meshctl stop"`},
}

func (a *app) removedCommands() []*cobra.Command {
	var out []*cobra.Command
	for _, r := range removed {
		out = append(out, &cobra.Command{
			Use:                r.name,
			Hidden:             true,
			DisableFlagParsing: true,
			RunE: func(*cobra.Command, []string) error {
				return failed("there is no %s any more; %s", r.name, r.instead)
			},
		})
	}
	return out
}

func (a *app) setupCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "setup",
		Short: "Do nothing: there is nothing to fetch",
		Long:  `Exists for old scripts. meshd is two programs without images, so there is nothing to prepare.`,
		Args:  noArgs,
		RunE: func(*cobra.Command, []string) error {
			a.say("nothing to set up: meshd needs no images")
			return nil
		},
	}
}
