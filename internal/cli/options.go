package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"bauta.dev/bauta/internal/config"
)

// optionFlags are the flags made of config.Options. Values stay text: config
// parses them, whatever source they are from.
type optionFlags struct {
	groups []optionGroup
	values map[string]*optionValue // by flag name
}

type optionGroup struct {
	name  string
	flags *pflag.FlagSet
}

func newOptionFlags() *optionFlags {
	o := &optionFlags{values: make(map[string]*optionValue)}
	for _, opt := range config.Options() {
		o.add(opt.Group, opt.Name, opt.Kind, optionUsage(opt), false)
		for _, alias := range opt.Aliases {
			o.add(opt.Group, alias.Name, alias.Kind, alias.Usage, true)
		}
	}
	return o
}

// optionUsage is what the option does, its values and its default.
func optionUsage(opt config.Option) string {
	var notes []string
	if n := len(opt.Values); n > 0 {
		notes = append(notes, strings.Join(opt.Values[:n-1], ", ")+" or "+opt.Values[n-1])
	}
	if opt.Default != "" {
		notes = append(notes, "default "+opt.Default)
	}
	if len(notes) == 0 {
		return opt.Usage
	}
	return fmt.Sprintf("%s (%s)", opt.Usage, strings.Join(notes, "; "))
}

func (o *optionFlags) add(groupName, name string, kind config.Kind, usage string, hidden bool) {
	i := slices.IndexFunc(o.groups, func(g optionGroup) bool { return g.name == groupName })
	if i < 0 {
		i = len(o.groups)
		o.groups = append(o.groups, optionGroup{groupName, pflag.NewFlagSet(groupName, pflag.ContinueOnError)})
		o.groups[i].flags.SortFlags = false
	}
	v := &optionValue{kind: kind}
	o.values[name] = v
	f := o.groups[i].flags.VarPF(v, name, "", usage)
	f.Hidden = hidden
	if kind == config.Bool {
		f.NoOptDefVal = "true"
	}
}

// register adds the flags to c, whose help then shows them by group.
func (o *optionFlags) register(c *cobra.Command) {
	c.Flags().SortFlags = false
	for _, g := range o.groups {
		c.Flags().AddFlagSet(g.flags)
	}
	for _, opt := range config.Options() {
		values := opt.Values
		if opt.Kind == config.Bool {
			values = []string{"true", "false"}
		}
		if len(values) > 0 {
			_ = c.RegisterFlagCompletionFunc(opt.Name, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
		}
	}
	c.SetUsageFunc(func(c *cobra.Command) error {
		var b strings.Builder
		fmt.Fprintf(&b, "Usage:\n  %s\n\nExamples:\n%s\n", c.UseLine(), c.Example)
		own := pflag.NewFlagSet("own", pflag.ContinueOnError)
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if o.values[f.Name] == nil {
				own.AddFlag(f)
			}
		})
		fmt.Fprintf(&b, "\nFlags:\n%s", own.FlagUsages())
		for _, g := range o.groups {
			fmt.Fprintf(&b, "\nOptions, %s:\n%s", g.name, g.flags.FlagUsages())
		}
		fmt.Fprintf(&b, "\nGlobal Flags:\n%s", c.InheritedFlags().FlagUsages())
		_, err := fmt.Fprint(c.OutOrStderr(), b.String())
		return err
	})
}

// given returns what the user set, by flag name.
func (o *optionFlags) given() map[string]string {
	given := make(map[string]string)
	for name, v := range o.values {
		if v.set {
			given[name] = v.text
		}
	}
	return given
}

// optionValue holds a flag as text. A list may be given in several flags.
type optionValue struct {
	kind config.Kind
	text string
	set  bool
}

func (v *optionValue) String() string { return v.text }

func (v *optionValue) Type() string {
	switch v.kind {
	case config.Bool:
		return "bool" // pflag shows no type for it
	case config.List, config.Duration, config.Int:
		return string(v.kind)
	}
	return "string"
}

func (v *optionValue) Set(text string) error {
	if v.kind == config.List && v.set {
		text = v.text + "," + text
	}
	v.text, v.set = text, true
	return nil
}
