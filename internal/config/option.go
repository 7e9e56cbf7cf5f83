package config

import (
	"slices"
	"strings"
)

// Kind is the form of an option's value.
type Kind string

const (
	Bool     Kind = "bool"
	List     Kind = "list" // separated by commas or blanks, or a YAML list
	Duration Kind = "duration"
	Int      Kind = "int"
	String   Kind = "string"
	Enum     Kind = "enum"
)

// Mode is the datapath that an option has an effect in.
type Mode string

const (
	AnyMode      Mode = ""
	BPFMode      Mode = "BPF"
	IPTablesMode Mode = "iptables"
)

// Option documents one agent option. Flags, environment names, file keys and
// the table in the docs all derive from it.
type Option struct {
	Name    string
	Aliases []Alias
	Kind    Kind
	Values  []string // of an Enum
	Default string   // as a user would write it; empty: none
	Usage   string   // one line, no full stop
	Group   string
	Mode    Mode
	Foreign bool // means something else in a cilium-config: ignored in a directory

	// set stores the value. It gets one setting for each of the option's names
	// that the winning source gives.
	set func(*Config, []setting) error
}

// Alias is another name of an option; it may take less than the option does.
type Alias struct {
	Name  string
	Kind  Kind
	Usage string
}

// EnvName is the environment variable for an option or alias.
func EnvName(name string) string {
	return "BAUTA_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
}

// Env is the environment variable of the option.
func (o Option) Env() string { return EnvName(o.Name) }

// Names is the option's name, then its aliases.
func (o Option) Names() []string {
	names := []string{o.Name}
	for _, a := range o.Aliases {
		names = append(names, a.Name)
	}
	return names
}

// Options returns every agent option, in the order of the documentation.
func Options() []Option { return slices.Clone(options) }

// allNames maps every name and alias to the kind of its value.
func allNames() map[string]Kind {
	names := make(map[string]Kind)
	for _, o := range options {
		names[o.Name] = o.Kind
		for _, a := range o.Aliases {
			names[a.Name] = a.Kind
		}
	}
	return names
}
