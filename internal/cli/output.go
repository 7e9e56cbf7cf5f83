package cli

import (
	"bufio"
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"
)

// format is the value of -o.
type format string

const (
	text     format = "text"
	jsonForm format = "json"
	yamlForm format = "yaml"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "format" }

func (f *format) Set(value string) error {
	switch v := format(value); v {
	case text, jsonForm, yamlForm:
		*f = v
		return nil
	}
	return fmt.Errorf("%q: not one of text, json, yaml", value)
}

// outputFlag gives a reading command its -o.
func outputFlag(c *cobra.Command) *format {
	f := text
	c.Flags().VarP(&f, "output", "o", "text, json or yaml")
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
	return &f
}

// show prints a value as JSON or YAML, or else its text.
func (a *app) show(f format, value any, asText func() string) error {
	switch f {
	case jsonForm:
		data, err := json.MarshalIndent(value, "", "  ")
		if err != nil {
			return fmt.Errorf("JSON: %w", err)
		}
		return a.print(string(data) + "\n")
	case yamlForm:
		data, err := yaml.Marshal(value)
		if err != nil {
			return fmt.Errorf("YAML: %w", err)
		}
		return a.print(string(data))
	}
	return a.print(asText())
}

// showList is show for a list: an empty one is [] or a note on standard error.
func showList[T any](a *app, f format, list []T, asText func([]T) string) error {
	if list == nil {
		list = []T{} // JSON has null for nil
	}
	if f == text && len(list) == 0 {
		fmt.Fprintln(a.Stderr, "No entries found.")
		return nil
	}
	if f == jsonForm && len(list) > 0 {
		return showEach(a, list)
	}
	return a.show(f, list, func() string { return asText(list) })
}

// showEach prints a list as show does, in JSON, but by the element: millions of them are
// never in memory as one text.
func showEach[T any](a *app, list []T) error {
	w := bufio.NewWriter(a.Stdout)
	before := "[\n  "
	for _, v := range list {
		data, err := json.MarshalIndent(v, "  ", "  ")
		if err != nil {
			return fmt.Errorf("JSON: %w", err)
		}
		w.WriteString(before)
		w.Write(data)
		before = ",\n  "
	}
	w.WriteString("\n]\n")
	if err := w.Flush(); err != nil { // the first error of all
		return fmt.Errorf("standard output: %w", err)
	}
	return nil
}

// table aligns rows in columns with three blanks between, as Cilium's lists are.
// No line ends in blanks.
func table(rows ...[]string) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	w.Flush()
	lines := strings.Split(b.String(), "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n")
}

// indent puts blanks before every line of text.
func indent(by int, text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString(strings.Repeat(" ", by) + line)
	}
	return b.String()
}

// plural is a number with its noun.
func plural(n int, noun string) string {
	switch {
	case n == 1:
		return "1 " + noun
	case strings.HasSuffix(noun, "x"), strings.HasSuffix(noun, "s"):
		return fmt.Sprintf("%d %ses", n, noun)
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
