package cli

import (
	"fmt"
	"slices"
	"strings"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/ipmasq"
	"bauta.dev/bauta/internal/policy"
)

// text is what config validate prints about one subject.
func (v verdict) text() string {
	var b strings.Builder
	switch {
	case v.Policy != nil && v.Kind == kindEffective:
		b.WriteString("effective configuration: valid\n" + indent(2, v.Policy.text()))
	case v.Policy != nil:
		fmt.Fprintf(&b, "%s: %s, valid\n%s", v.Subject, v.Kind, indent(2, v.Policy.text()))
	default:
		fmt.Fprintf(&b, "%s: %s\n%s", v.Subject, v.Kind, indent(2, profilesText(v.Profiles)))
	}
	return b.String()
}

// profilesText shows a list once, however many profiles agree on it.
func profilesText(results []profileResult) string {
	var b strings.Builder
	for i, r := range results {
		same := slices.IndexFunc(results[:i], func(o profileResult) bool { return o.Valid && r.Valid && sameList(*o.List, *r.List) })
		switch {
		case !r.Valid:
			fmt.Fprintf(&b, "profile %s: rejected: %s\n", r.Profile, r.Error)
		case same >= 0:
			fmt.Fprintf(&b, "profile %s: as %s\n", r.Profile, results[same].Profile)
		default:
			fmt.Fprintf(&b, "profile %s: %s\n%s", r.Profile, listText(*r.List), indent(2, rulesText(r.List.Rules)))
			b.WriteString(indent(2, notes(r.List.Warnings, r.List.Ignored)))
		}
	}
	return b.String()
}

func sameList(a, b ipmasq.List) bool {
	return a.State == b.State && slices.Equal(a.Rules, b.Rules) && slices.Equal(a.Warnings, b.Warnings) && slices.Equal(a.Ignored, b.Ignored)
}

func listText(l ipmasq.List) string {
	return fmt.Sprintf("%s, %s", l.State, plural(len(l.Rules), "prefix"))
}

func rulesText(rules []policy.Rule) string {
	var rows [][]string
	for _, r := range rules {
		rows = append(rows, []string{r.Prefix.String(), r.Origin})
	}
	return table(rows...)
}

func (e *effective) text() string {
	sources := rulesText(e.Sources)
	if e.K8s {
		sources += "the pod ranges of the local Node object\n"
	}
	list := []block{
		{"Mode", fmt.Sprintf("%s [IPv4: %s, IPv6: %s]", e.Mode, onOff(e.IPv4), onOff(e.IPv6))},
		{"Devices", e.Devices},
		{"Sources", lines(nonEmpty(sources), "none")},
		{"Native", lines(nonEmpty(rulesText(e.Native)+e.nativeOfNode), "-")},
		{"ip-masq-agent", e.ipMasqText()},
		{"Nodes", e.nodesText()},
		{"Ports", fmt.Sprintf("%s   %s", joinRanges(e.Ports), plural(e.PortCount, "port"))},
		{"Flows", e.flowsText()},
	}
	var rows [][]string
	for _, o := range e.Options {
		if o.Source != "default" {
			rows = append(rows, []string{o.Option, o.Value, o.Source})
		}
	}
	if len(rows) > 0 {
		list = append(list, block{"Options", table(rows...)})
	}
	return blocks(list...) + notes(e.Warnings, e.Ignored)
}

func (e *effective) ipMasqText() string {
	if e.IPMasqAgent == nil {
		return "off"
	}
	return joinLines(fmt.Sprintf("%s   profile %s   %s", e.ipMasqPath, e.IPMasqAgent.Profile, listText(*e.IPMasqAgent)),
		indent(2, rulesText(e.IPMasqAgent.Rules)))
}

func (e *effective) nodesText() string {
	text := fmt.Sprintf("%s   masqueraded towards: %s", plural(len(e.Nodes), "address"), e.RemoteNodes)
	if e.K8s {
		text += "\nthe addresses and pod ranges of the other Node objects"
	}
	for _, n := range e.Nodes {
		text += "\n  " + columns(n.Addr.String(), n.Node, string(n.Type), n.Origin)
	}
	return text
}

func (e *effective) flowsText() string {
	switch {
	case e.Mode == agent.ModeIPTables:
		return "netfilter's"
	case e.Flows == 0:
		return "sized from memory"
	}
	return fmt.Sprintf("%d per family", e.Flows)
}

func joinRanges(ranges []config.PortRange) string {
	texts := make([]string, len(ranges))
	for i, r := range ranges {
		texts[i] = r.String()
	}
	return strings.Join(texts, ",")
}

func onOff(on bool) string {
	if on {
		return "Enabled"
	}
	return "Disabled"
}

func nonEmpty(text string) []string {
	if text = strings.TrimSuffix(text, "\n"); text != "" {
		return []string{text}
	}
	return nil
}

func notes(warnings, ignored []string) string {
	var b strings.Builder
	for _, w := range warnings {
		fmt.Fprintf(&b, "warning: %s\n", oneLine(w))
	}
	for _, key := range ignored {
		fmt.Fprintf(&b, "ignored: %s\n", key)
	}
	return b.String()
}
