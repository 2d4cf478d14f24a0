package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"meshd/control"
)

func (a *app) statusCommand() *cobra.Command {
	var strict bool
	cmd := &cobra.Command{
		Use:       "status [" + strings.Join(control.StatusWords, "|") + "]",
		Short:     "Print how the mesh is",
		Long:      `Prints a summary, or one part in full. It fails while meshd is starting.`,
		ValidArgs: control.StatusWords,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return errors.New("status takes one word at most")
			}
			if len(args) == 1 && !slices.Contains(control.StatusWords, args[0]) {
				return fmt.Errorf("there is no status %q", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if len(args) == 1 {
				text, err := c.Status(cmd.Context(), args[0])
				fmt.Fprint(a.stdout, text)
				return err
			}
			text, err := c.Status(cmd.Context(), "")
			if err != nil {
				return err
			}
			fmt.Fprintf(a.stdout, "\n%s\n", text)
			if !strict {
				return nil
			}
			report, err := c.Report(cmd.Context())
			if err == nil && len(report.Problems) > 0 {
				err = &exitError{code: exitProblems}
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&strict, "strict", false, fmt.Sprintf("exit with %d when there is a problem, such as no kernel path", exitProblems))
	return cmd
}

func (a *app) reportCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "report [-f <template>]",
		Short: "Print everything that is known, as JSON or by a template",
		Long: `Prints everything that meshd knows as JSON, or what a Go template makes of it, for example
  meshctl report -f '{{.Router.Name}}'
  meshctl report -f '{{range .DNS.Entries}}{{.Hostname}} {{.Address}}{{"\n"}}{{end}}'
The function json writes a part as JSON: '{{json .Router.Peers}}'.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if format == "" {
				text, err := c.ReportJSON(cmd.Context())
				fmt.Fprint(a.stdout, text)
				return err
			}
			report, err := c.Report(cmd.Context())
			if err != nil {
				return err
			}
			text, err := report.Format(format)
			if err != nil {
				return err
			}
			fmt.Fprint(a.stdout, text)
			return nil
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", "Go `template`")
	return cmd
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the versions of meshctl and meshd",
		Long:  `Prints the version of meshctl, and that of the running daemon or else of the meshd program.`,
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			fmt.Fprintln(a.stdout, "meshctl", version)
			c, err := a.client()
			if err != nil {
				return err
			}
			report, err := c.Report(cmd.Context())
			if err == nil {
				fmt.Fprintln(a.stdout, "meshd", report.Version)
				return nil
			}
			line, err := a.daemonVersion(cmd.Context())
			if err != nil {
				return failed("the version of meshd is unknown: %v", err)
			}
			fmt.Fprintln(a.stdout, line)
			return nil
		},
	}
}
