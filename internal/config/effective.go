package config

import (
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
)

// Effective is one option as it is in force. config validate prints them.
type Effective struct {
	Option string `json:"option"`
	Value  string `json:"value"` // as written, lists with commas; empty: none
	Source string `json:"source"`
}

// effective describes what was chosen for o. Several settings are a name and
// aliases that hold different parts of the value, or the same.
func effective(o Option, given []setting) Effective {
	e := Effective{Option: o.Name}
	var values, sources []string
	for _, s := range given {
		value := s.text()
		if s.kind == List {
			value = strings.Join(s.split(), ",")
		}
		if !slices.Contains(values, value) {
			values = append(values, value)
		}
		sources = append(sources, s.source)
	}
	e.Value = strings.Join(values, ",")
	e.Source = strings.Join(sources, ", ")
	return e
}

// Effective returns every option with its value and source, in the order of Options.
func (c Config) Effective() []Effective { return c.effective }

// EffectiveText is Effective as an aligned table.
func (c Config) EffectiveText() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	for _, e := range c.effective {
		value := e.Value
		if value == "" {
			value = "-"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", e.Option, value, e.Source)
	}
	w.Flush()
	return b.String()
}

// Changed returns the options whose value in d differs from c: those that need
// a restart to take effect.
func (c Config) Changed(d Config) []string {
	var names []string
	for i, e := range c.effective {
		if i < len(d.effective) && d.effective[i].Value != e.Value {
			names = append(names, e.Option)
		}
	}
	return names
}
