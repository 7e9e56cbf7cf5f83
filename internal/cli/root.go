package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"bauta.dev/bauta/internal/agent"
)

func newRoot(env Env) *cobra.Command {
	a := &app{Env: env}
	root := group("bauta", "Masquerade what leaves this node, with eBPF", `Bauta source-NATs the traffic of pods, containers and virtual machines that
leaves a Linux node. It translates in eBPF programs on the node's external
devices, or with enable-bpf-masquerade=false in rules of iptables, beside any CNI
or none.

Programs and rules stay and go on working when the agent is down; only
'bauta cleanup' takes them away. Every command that reads works with or without
an agent.`,
		a.newAgent(), a.newStatus(), a.newExplain(), a.newBPF(), a.newConfig(), a.newCleanup(), a.newDemo(), a.newVersion(), a.newCompletion())
	root.Example = `  bauta agent --pod-cidrs 10.0.0.0/16
  bauta status
  bauta explain --src 10.0.1.99 --dst 1.1.1.1
  bauta bpf nat list --pod 10.0.1.99`
	root.SilenceErrors = true
	root.SilenceUsage = true
	root.DisableAutoGenTag = true
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetUsageTemplate(strings.Replace(root.UsageTemplate(), "{{if .Runnable}}", "{{if and .Runnable (not .HasAvailableSubCommands)}}", 1))
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	root.SetFlagErrorFunc(flagError)
	root.SetHelpCommand(newHelp())

	flags := root.PersistentFlags()
	flags.StringVar(&a.bpfRoot, "bpf-root", agent.DefaultBPFRoot, "`directory` of the pinned BPF objects, on a bpffs")
	flags.StringVar(&a.runDir, "run-dir", agent.DefaultRunDir, "`directory` of agent.sock and policy.json")
	flags.BoolP("help", "h", false, "show help for the command")
	return root
}

// group is a command that only holds others; alone it shows its help.
func group(use, short, long string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use:   use,
		Short: short,
		Long:  long,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			return unknownCommand(c, args[0])
		},
		RunE:                       func(c *cobra.Command, _ []string) error { return c.Help() },
		SuggestionsMinimumDistance: 2,
	}
	c.AddCommand(commands...)
	return c
}

func unknownCommand(c *cobra.Command, name string) error {
	e := &usageError{msg: fmt.Sprintf("%s: unknown command %q", c.CommandPath(), name)}
	for _, s := range c.SuggestionsFor(name) {
		e.hints = append(e.hints, fmt.Sprintf("did you mean %s?", s))
	}
	e.hints = append(e.hints, c.CommandPath()+" --help lists the commands")
	return e
}

// newHelp is cobra's help command, but an unknown topic is an error.
func newHelp() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]...",
		Short: "Show help for a command",
		RunE: func(c *cobra.Command, args []string) error {
			topic, rest, err := c.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return unknownCommand(topic, rest[0])
			}
			topic.InitDefaultHelpFlag()
			return topic.Help()
		},
		DisableFlagsInUseLine: true,
	}
}

// noArgs refuses arguments after a command that takes none.
func noArgs(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	e := &usageError{msg: fmt.Sprintf("%s: unexpected argument %q", c.CommandPath(), args[0])}
	if slices.Contains([]string{"true", "false"}, strings.ToLower(args[0])) {
		e.hints = append(e.hints, "a switch takes its value with an equals sign: --OPTION="+args[0])
	}
	e.hints = append(e.hints, c.CommandPath()+" --help shows how to call it")
	return e
}

func flagError(c *cobra.Command, err error) error {
	e := &usageError{msg: c.CommandPath() + ": " + oneLine(err.Error())}
	switch err := err.(type) {
	case *pflag.NotExistError:
		name := err.GetSpecifiedName()
		if err.GetSpecifiedShortnames() != "" {
			e.msg = fmt.Sprintf("%s: unknown flag -%s", c.CommandPath(), name)
			break
		}
		e.msg = fmt.Sprintf("%s: unknown flag --%s", c.CommandPath(), name)
		var names []string
		c.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
		for _, s := range suggest(name, names) {
			e.hints = append(e.hints, fmt.Sprintf("did you mean --%s?", s))
		}
	case *pflag.ValueRequiredError:
		e.msg = fmt.Sprintf("%s: flag --%s: no value", c.CommandPath(), err.GetSpecifiedName())
		if err.GetSpecifiedShortnames() != "" {
			e.msg = fmt.Sprintf("%s: flag -%s: no value", c.CommandPath(), err.GetSpecifiedName())
		}
	case *pflag.InvalidValueError:
		e.msg = fmt.Sprintf("%s: flag --%s: %v", c.CommandPath(), err.GetFlag().Name, err.Unwrap())
	}
	e.hints = append(e.hints, c.CommandPath()+" --help lists the flags")
	return e
}

// suggest returns the names that word is a slip of. cobra has that search, but
// only for commands.
func suggest(word string, names []string) []string {
	c := &cobra.Command{SuggestionsMinimumDistance: 2}
	for _, name := range names {
		c.AddCommand(&cobra.Command{Use: name, Run: func(*cobra.Command, []string) {}})
	}
	return c.SuggestionsFor(word)
}
