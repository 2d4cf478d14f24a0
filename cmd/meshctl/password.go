package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"meshd/control"
)

func (a *app) passwordCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "password list | add [<file>] | use <id> | remove <id>",
		Short: "Change the password of the mesh without interruption",
		Long: `Changes which passwords this peer uses. Each step is done on every peer before the next one:

  meshctl password add new.txt    accept a second password; prints its id. Without a file it is
                                  read from standard input, one line
  meshctl password use ID         dial with that one
  meshctl password remove OLD     no longer accept the old one

list prints the ids, with "*" before the one in use. From the first change on these passwords count, and
no longer the one given at launch. A mesh without a password gets its first one by launching every peer
with it.`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case len(args) == 1 && args[0] == "list", len(args) == 2 && (args[0] == "use" || args[0] == "remove"),
				(len(args) == 1 || len(args) == 2) && args[0] == "add":
				return nil
			}
			return fmt.Errorf("password list, add, use or remove")
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			switch args[0] {
			case "use":
				return c.UsePassword(ctx, args[1])
			case "remove":
				return c.RemovePassword(ctx, args[1])
			case "list":
				list, err := c.Passwords(ctx)
				if err != nil {
					return err
				}
				if len(list) == 0 {
					a.say("there is no password, and nothing is encrypted")
				}
				a.printPasswords(list)
				return nil
			}
			password, err := a.newPassword(args[1:])
			if err != nil {
				return err
			}
			id, err := c.AddPassword(ctx, password)
			if err == nil {
				fmt.Fprintln(a.stdout, id)
			}
			return err
		},
	}
}

func (a *app) printPasswords(list []control.Password) {
	for _, p := range list {
		mark := " "
		if p.InUse {
			mark = "*"
		}
		fmt.Fprintln(a.stdout, mark, p.ID)
	}
}

// maxPassword is in bytes, as meshd has it.
const maxPassword = 1024

// newPassword reads one line, from the file given or else from standard input.
func (a *app) newPassword(file []string) (string, error) {
	in, from := a.stdin, "standard input"
	if len(file) == 1 {
		f, err := os.Open(file[0])
		if err != nil {
			return "", err
		}
		defer f.Close()
		in, from = f, file[0]
	}
	line, err := bufio.NewReader(io.LimitReader(in, maxPassword+2)).ReadString('\n')
	if err != nil && err != io.EOF {
		return "", fmt.Errorf("read the password from %s: %w", from, err)
	}
	line = strings.TrimSuffix(strings.TrimSuffix(line, "\n"), "\r")
	if line == "" || len(line) > maxPassword {
		return "", failed("%s: the first line must hold a password of 1 to %d bytes", from, maxPassword)
	}
	return line, nil
}
