package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

var shells = []string{"bash", "zsh", "fish", "powershell"}

func (a *app) newCompletion() *cobra.Command {
	return &cobra.Command{
		Use:   "completion SHELL",
		Short: "Print a completion script for a shell",
		Long:  "Print a completion script for a shell: bash, zsh, fish or powershell.",
		Example: `  source <(bauta completion bash)
  bauta completion zsh > "${fpath[1]}/_bauta"
  bauta completion fish > ~/.config/fish/completions/bauta.fish`,
		ValidArgs: shells,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return &usageError{msg: c.CommandPath() + ": no shell", hints: []string{"name one of " + strings.Join(shells, ", ")}}
			}
			return noArgs(c, args[1:])
		},
		RunE: func(c *cobra.Command, args []string) error {
			root := c.Root()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.Stdout, true)
			case "zsh":
				return root.GenZshCompletion(a.Stdout)
			case "fish":
				return root.GenFishCompletion(a.Stdout, true)
			case "powershell":
				return root.GenPowerShellCompletionWithDesc(a.Stdout)
			}
			return &usageError{msg: fmt.Sprintf("%s: unknown shell %q", c.CommandPath(), args[0]), hints: []string{"name one of " + strings.Join(shells, ", ")}}
		},
	}
}
