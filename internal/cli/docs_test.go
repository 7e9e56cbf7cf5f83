package cli

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"bauta.dev/bauta/internal/config"
)

// The pages below are generated, so that no option or command stands in two
// places: go test ./internal/cli -update writes them.

func TestCommandPage(t *testing.T) {
	var b strings.Builder
	b.WriteString(`# Commands

Generated from the commands' own help.

Results go to standard output. An error is one line ` + "`error: ...`" + ` on standard error, then ` + "`hint: ...`" + ` lines.
Exit status: 0 fine, 1 failed, 2 usage (unknown command, flag or argument), 3 degraded (` + "`status`" + `).
Commands that read take ` + "`-o text|json|yaml`" + `; their lists are sorted. Empty lists print ` + "`No entries found.`" + ` on
standard error, or ` + "`[]`" + ` as JSON.
`)
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.HasParent() && !c.Hidden && c.Name() != "help" {
			fmt.Fprintf(&b, "\n## %s\n\n```text\n%s```\n", c.CommandPath(), helpOf(t, c))
			if c.Name() == "agent" {
				b.WriteString("\nIts options are in [options.md](options.md).\n")
			}
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(newRoot(Env{}))
	golden(t, "../../docs/cli.md", b.String())
}

// helpOf is a command's help, without the options of the agent: they have a page
// of their own.
func helpOf(t *testing.T, c *cobra.Command) string {
	t.Helper()
	var out bytes.Buffer
	args := append(strings.Fields(c.CommandPath())[1:], "--help")
	if status := Main(Env{Stdout: &out, Stderr: &out}, args); status != exitOK {
		t.Fatalf("%s --help: status %d", c.CommandPath(), status)
	}
	text := out.String()
	if before, after, ok := strings.Cut(text, "\nOptions, "); ok {
		_, after, _ = strings.Cut(after, "\nGlobal Flags:")
		text = before + "\nGlobal Flags:" + after
	}
	return text
}

func TestOptionPage(t *testing.T) {
	var b strings.Builder
	b.WriteString(`# Agent options

Generated from the table of options in the code.

An option comes from the highest of these that gives it; a higher source hides all its aliases in lower ones:

1. the flag ` + "`--OPTION=VALUE`" + `
2. the environment variable ` + "`BAUTA_<OPTION_IN_CAPITALS>`, as `BAUTA_POD_CIDRS`" + `
3. the YAML file of ` + "`--config`" + `, with option names as keys; an unknown key is an error
4. the directory of ` + "`--config-dir`" + `, a file per option. A mounted ` + "`cilium-config`" + ` works: names that are no option of Bauta,
   and options marked *not from a directory*, are ignored and listed in the status
5. the default

` + "`auto`" + ` and an empty value mean the default. Lists are separated by commas or blanks, or are YAML lists; the flag may be given
several times. Booleans may be strings. Durations are written as ` + "`90s`, `5m` or `2h4m`" + `.
` + "`bauta config validate`" + ` shows what is in force and where it came from.
`)
	group := ""
	for _, o := range config.Options() {
		if o.Group != group {
			group = o.Group
			fmt.Fprintf(&b, "\n## %s%s\n\n| Option | Kind | Default | What |\n|---|---|---|---|\n", strings.ToUpper(group[:1]), group[1:])
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", o.Name, kindCell(o), defaultCell(o.Default), whatCell(o))
	}
	b.WriteString("\n## Options of one mode\n\nAn option given in the other mode has no effect, and the status warns about it.\n\n| Option | Has an effect in |\n|---|---|\n")
	for _, o := range config.Options() {
		if o.Mode != config.AnyMode {
			fmt.Fprintf(&b, "| `%s` | %s mode |\n", o.Name, modeName(o.Mode))
		}
	}
	golden(t, "../../docs/options.md", b.String())
}

func kindCell(o config.Option) string {
	if len(o.Values) == 0 {
		return string(o.Kind)
	}
	return "`" + strings.Join(o.Values, "`, `") + "`"
}

func defaultCell(value string) string {
	if value == "" {
		return "-"
	}
	return "`" + value + "`"
}

func whatCell(o config.Option) string {
	what := strings.ReplaceAll(o.Usage, "|", `\|`)
	if o.Mode != config.AnyMode {
		what += "; " + modeName(o.Mode) + " mode only"
	}
	if o.Foreign {
		what += "; *not from a directory*"
	}
	for _, a := range o.Aliases {
		what += fmt.Sprintf(". Alias `%s`: %s", a.Name, a.Usage)
	}
	return what
}

func modeName(m config.Mode) string {
	if m == config.BPFMode {
		return "eBPF"
	}
	return string(m)
}

// examples stand in the reference file where an option has no default to show.
var examples = map[string]string{
	"devices":                      `[eth0, "eth+", "!eth9"]`,
	"egress-masquerade-interfaces": "[eth0]",
	"pod-cidrs":                    `[10.0.0.0/16, "fd00:10::/64"]`,
	"ipv4-native-routing-cidr":     "[10.0.0.0/8]",
	"ipv6-native-routing-cidr":     `["fd00::/8"]`,
	"node-addresses":               `[192.0.2.10, "2001:db8::10"]`,
	"nodes-file":                   "/etc/bauta/nodes",
	"reserved-ports":               "[40000, 50000-50100]",
	"bpf-nat-global-max":           "131072",
	"take-over":                    "IP-MASQ-AGENT",
	"k8s-kubeconfig-path":          "/etc/bauta/kubeconfig",
	"k8s-node-name":                "node-1",
	"prometheus-serve-addr":        "127.0.0.1:9965",
}

const referenceFile = "../../packaging/config.yaml"

func TestReferenceFile(t *testing.T) {
	var b strings.Builder
	b.WriteString(`# Options of the Bauta agent: every one, with its default or, marked so, an example.
# Generated from the table of options; docs/options.md says more.
#
# At least one source of ranges to masquerade is needed: pod-cidrs,
# masquerade-forwarded or enable-k8s. Check a changed file with
#   bauta config validate /etc/bauta/config.yaml
# and restart the agent for it to take effect.
`)
	group := ""
	for _, o := range config.Options() {
		if o.Group != group {
			group = o.Group
			fmt.Fprintf(&b, "\n# ---- %s ----\n", group)
		}
		value, note := o.Default, ""
		if example, ok := examples[o.Name]; ok {
			value, note = example, "Example"
			if o.Default != "" {
				note += ", the default is " + o.Default
			}
		}
		fmt.Fprintf(&b, "\n# %s.\n", strings.ToUpper(o.Usage[:1])+o.Usage[1:])
		if len(o.Values) > 0 {
			fmt.Fprintf(&b, "# One of %s.\n", strings.Join(o.Values, ", "))
		}
		if o.Mode != config.AnyMode {
			fmt.Fprintf(&b, "# Only in %s mode.\n", modeName(o.Mode))
		}
		if note != "" {
			fmt.Fprintf(&b, "# %s.\n", note)
		}
		fmt.Fprintf(&b, "#%s: %s\n", o.Name, value)
	}
	golden(t, referenceFile, b.String())
}

// TestReferenceFileIsAccepted takes the comment signs away: every line has to be
// a good option, and those that show a default have to show the default.
func TestReferenceFileIsAccepted(t *testing.T) {
	data, err := os.ReadFile(referenceFile)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	given := 0
	for line := range strings.Lines(string(data)) {
		option, ok := strings.CutPrefix(line, "#")
		name, _, isKey := strings.Cut(option, ":")
		if !ok || !isKey || strings.ContainsAny(name, " #") || name == "egress-masquerade-interfaces" {
			continue // the last one is another name for devices
		}
		b.WriteString(option)
		given++
	}
	if want := len(config.Options()) - 1; given != want {
		t.Errorf("%d options in the file, want %d", given, want)
	}
	path := t.TempDir() + "/config.yaml"
	if err := os.WriteFile(path, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	full, err := config.Load(config.Sources{File: path})
	if err != nil {
		t.Fatalf("%v\n%s", err, b.String())
	}
	plain, err := config.Load(config.Sources{Flags: map[string]string{"masquerade-forwarded": "true"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range plain.Changed(full) {
		if _, ok := examples[name]; !ok && name != "masquerade-forwarded" {
			t.Errorf("%s: the file does not show the default", name)
		}
	}
}
