package cli

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/policy"
)

// block is a labeled part of a text: the label stands before the first line only.
type block struct{ label, text string }

// blocks aligns texts behind their labels, as the line is that Cilium's users
// grep for: "Masquerading:" and three blanks.
func blocks(list ...block) string {
	const width = len("Masquerading:   ")
	var b strings.Builder
	for _, bl := range list {
		label := bl.label + ":"
		for line := range strings.Lines(bl.text) {
			fmt.Fprintf(&b, "%-*s%s\n", width, label, strings.TrimSuffix(line, "\n"))
			label = ""
		}
	}
	return b.String()
}

// statusText is the text form of status. Its first line is fixed by the contract.
func statusText(st agent.Status) string {
	list := []block{
		{"Masquerading", st.Line()},
		{"Health", healthText(st)},
		{"Agent", agentText(st.Agent)},
		{"Data plane", datapathText(st)},
		{"Devices", deviceText(st.Devices)},
		{"Sources", table(sourceRow("IPv4", st.Sources.IPv4), sourceRow("IPv6", st.Sources.IPv6))},
		{"ip-masq-agent", ipMasqText(st.IPMasqAgent)},
		{"Nodes", nodesText(st.Nodes)},
		{"Kubernetes", kubernetesText(st.Kubernetes)},
		{"Flows", flowText(st)},
		{"Ports", portText(st.Ports)},
	}
	// Netfilter counts some of them only: "none" would be too much to say.
	if st.Masquerading.Mode != agent.ModeIPTables || len(st.Drops) > 0 {
		list = append(list, block{"Drops", dropText(st.Drops)})
	}
	if st.Leaks.Sentinel || st.Leaks.Packets > 0 {
		list = append(list, block{"Leaks", leakText(st.Leaks)})
	}
	list = append(list, block{"Warnings", lines(st.Warnings, "none")})
	return blocks(list...)
}

func lines(list []string, none string) string {
	if len(list) == 0 {
		return none
	}
	return strings.Join(list, "\n")
}

func healthText(st agent.Status) string { return lines(st.Degraded(), "OK") }

func agentText(ag agent.AgentStatus) string {
	var parts []string
	if ag.PID != 0 {
		parts = append(parts, fmt.Sprintf("pid %d", ag.PID))
	}
	if ag.Version != "" {
		parts = append(parts, "version "+ag.Version)
	}
	if ag.State != agent.Running {
		if len(parts) == 0 {
			return "down"
		}
		return "down   (the last one: " + strings.Join(parts, ", ") + ")"
	}
	state := "running"
	if ag.Waiting != "" {
		state += ", waiting"
	} else if !ag.Ready {
		state += ", not ready"
	}
	parts = append([]string{state}, parts...)
	parts = append(parts, "up "+uptime(time.Duration(ag.UptimeSeconds)*time.Second))
	if !ag.LastApply.IsZero() {
		parts = append(parts, "applied "+stamp(ag.LastApply))
	}
	text := strings.Join(parts, "   ")
	if ag.Error != "" {
		text += "\nretrying: " + oneLine(ag.Error)
	}
	return text
}

func datapathText(st agent.Status) string {
	d, what := st.Datapath, "pinned"
	if st.Masquerading.Mode == agent.ModeIPTables {
		what = "rules"
	}
	switch {
	case !d.Present:
		return "none"
	case !d.Applied:
		what += ", without a policy"
	}
	if n := st.Draining; n != nil {
		return columns(what, d.Tier, fmt.Sprintf("draining %d (connections of %s mode)", n.Connections, n.Mode))
	}
	return columns(what, d.Tier)
}

// columns joins what is not empty.
func columns(parts ...string) string {
	return strings.Join(slices.DeleteFunc(parts, func(p string) bool { return p == "" }), "   ")
}

func deviceText(devices []agent.DeviceStatus) string {
	var rows [][]string
	for _, d := range devices {
		row := []string{d.Name, string(d.State), cmp.Or(string(d.Hook), "-"), addrText(d.IPv4), addrText(d.IPv6)}
		if len(d.Ahead) > 0 {
			row = append(row, "behind "+strings.Join(d.Ahead, ", "))
		}
		rows = append(rows, row)
	}
	if len(rows) == 0 {
		return "none"
	}
	return table(rows...)
}

func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return "-"
	}
	return a.String()
}

func sourceRow(family string, s agent.FamilySources) []string {
	row := []string{family, cmp.Or(string(s.State), notKnown)}
	var ranges []string
	for _, r := range s.Ranges {
		ranges = append(ranges, fmt.Sprintf("%s (%s)", r.Prefix, r.Origin))
	}
	if len(ranges) > 0 {
		row = append(row, strings.Join(ranges, ", "))
	}
	return row
}

// notKnown stands where the kernel does not say what policy.json would.
const notKnown = "not known"

// maxPrefixLines keeps the rest of a status readable: a list may have 65536.
const maxPrefixLines = 20

func ipMasqText(s agent.IPMasqStatus) string {
	switch {
	case !s.Enabled:
		return "off"
	case s.Path == "":
		return columns(plural(s.Prefixes, "prefix"), "file "+notKnown)
	}
	state := cmp.Or(s.State, "unknown")
	if s.LastError != "" {
		state = "rejected"
	}
	text := columns(s.Path, "profile "+s.Profile, plural(s.Prefixes, "prefix"), "file: "+state)
	if s.InForce != "" && s.InForce != agent.FromFile {
		text += "   in force: " + string(s.InForce)
		if s.LastError != "" && s.State != "" && s.InForce == agent.FromLastGood {
			text += " (" + s.State + ")" // what that one was
		}
	}
	if !s.LastReload.IsZero() {
		text += "   reloaded " + stamp(s.LastReload)
	}
	var rows [][]string
	for _, r := range s.Rules[:min(len(s.Rules), maxPrefixLines)] {
		rows = append(rows, []string{"  " + r.Prefix.String(), r.Origin})
	}
	more := ""
	if n := len(s.Rules) - maxPrefixLines; n > 0 {
		more = fmt.Sprintf("  ... and %d more (bauta bpf ipmasq list)", n)
	}
	return joinLines(text, table(rows...), more, problemText(s.LastError))
}

func nodesText(s agent.NodesStatus) string {
	text := columns(fmt.Sprintf("%d known", s.Known), plural(s.Addresses, "address"), s.File)
	if !s.LastReload.IsZero() {
		text += "   reloaded " + stamp(s.LastReload)
	}
	return joinLines(text, problemText(s.LastError))
}

// kubernetesText is empty without Kubernetes: then there is no such line.
func kubernetesText(k *agent.KubernetesStatus) string {
	if k == nil {
		return ""
	}
	state := "not synced since the start"
	if k.Synced {
		state = fmt.Sprintf("synced, %s   last %s", plural(k.Nodes, "node"), stamp(k.LastSync))
	}
	text := columns("node "+k.Node, state)
	if k.Error != "" {
		text += fmt.Sprintf("\n  API server: %s (since %s)", oneLine(k.Error), stamp(k.ErrorSince))
	}
	return text
}

// problemText is why a file is rejected. Warnings about it are among all others.
func problemText(lastError string) string {
	if lastError == "" {
		return ""
	}
	return "  rejected: " + oneLine(lastError)
}

func joinLines(parts ...string) string {
	for i := range parts {
		parts[i] = strings.TrimSuffix(parts[i], "\n")
	}
	return strings.Join(slices.DeleteFunc(parts, func(p string) bool { return p == "" }), "\n")
}

// flowText is how full the tables are: the one that the mode has.
func flowText(st agent.Status) string {
	if c := st.Flows.Conntrack; c != nil {
		return fmt.Sprintf("netfilter's   %d/%d connections of all kinds", c.Entries, c.Limit)
	}
	if st.Masquerading.Mode == agent.ModeIPTables {
		return "netfilter's"
	}
	return table(flowRow("IPv4", st.Flows.IPv4), flowRow("IPv6", st.Flows.IPv6))
}

func flowRow(family string, u datapath.Usage) []string {
	return []string{family, fmt.Sprintf("%d/%d", u.Flows, u.Limit), fmt.Sprintf("from outside %d/%d", u.Inbound, u.InboundLimit)}
}

// portText is about external ports. Searches that found one are of no interest until
// there are others.
func portText(p agent.PortsStatus) string {
	text := notKnown
	if p.Ranges != "" {
		text = columns(p.Ranges, plural(p.Pool, "port"))
	}
	if w := p.Worst; w != nil {
		text += fmt.Sprintf("\nworst remote: %s %s   %d/%d used by %s", protoName(w.Proto), w.Remote, w.Used, w.Pool, w.Address)
	}
	if s := p.Searches; s != nil && s.Failures+s.Remembered > 0 {
		found := uint64(0)
		for _, n := range s.Attempts {
			found += n
		}
		text += fmt.Sprintf("\nsearches: %d found a port, %d did not, %d not repeated within a second", found, s.Failures, s.Remembered)
	}
	if s := p.Searches; s != nil && s.Uncounted > 0 {
		text += fmt.Sprintf("\nwithout a quota: %d connections of more source addresses than are counted", s.Uncounted)
	}
	return text
}

// maxLeakLines keeps the rest of a status readable.
const maxLeakLines = 10

func leakText(l agent.LeaksStatus) string {
	if l.Packets == 0 {
		return "none seen"
	}
	var rows [][]string
	for _, s := range l.Samples[:min(len(l.Samples), maxLeakLines)] {
		rows = append(rows, []string{s.Device, protoName(s.Proto), s.Source.String(), "-> " + s.Destination.String(),
			plural(int(s.Packets), "packet"), fmt.Sprintf("%ds ago", s.LastSeconds)})
	}
	return joinLines(plural(int(l.Packets), "packet"), table(rows...))
}

func dropText(drops map[string]uint64) string {
	meanings := make(map[string]string)
	for _, o := range policy.Outcomes() {
		meanings[o.Name] = o.Meaning
	}
	var rows [][]string
	for _, reason := range slices.Sorted(maps.Keys(drops)) {
		if drops[reason] > 0 {
			rows = append(rows, []string{reason, fmt.Sprint(drops[reason]), meanings[reason]})
		}
	}
	if len(rows) == 0 {
		return "none"
	}
	return table(rows...)
}

// stamp is a time as logs have it, in UTC.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// uptime is a duration in its two largest units.
func uptime(d time.Duration) string {
	days, hours, minutes, seconds := int(d.Hours())/24, int(d.Hours())%24, int(d.Minutes())%60, int(d.Seconds())%60
	switch {
	case days > 0:
		return fmt.Sprintf("%dd%dh", days, hours)
	case hours > 0:
		return fmt.Sprintf("%dh%dm", hours, minutes)
	case minutes > 0:
		return fmt.Sprintf("%dm%ds", minutes, seconds)
	}
	return fmt.Sprintf("%ds", seconds)
}
