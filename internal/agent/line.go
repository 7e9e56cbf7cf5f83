package agent

import (
	"fmt"
	"strings"
)

// Line is what stands behind "Masquerading:   " in the text form, as users of
// Cilium grep for it.
func (s Status) Line() string {
	m := s.Masquerading
	if !m.Enabled {
		return "Disabled"
	}
	line := "BPF"
	if m.Mode == ModeIPTables {
		line = "IPTables"
	}
	if m.IPMasqAgent {
		line += " (ip-masq-agent)"
	}
	if m.Mode != ModeIPTables {
		line += fmt.Sprintf("   [%s]   %s", strings.Join(s.masqueradeDevices(), ", "), m.exclusions())
	}
	return line + fmt.Sprintf(" [IPv4: %s, IPv6: %s]", enabled(m.EnabledProtocols.IPv4), enabled(m.EnabledProtocols.IPv6))
}

// masqueradeDevices are the devices that make new mappings.
func (s Status) masqueradeDevices() []string {
	var names []string
	for _, d := range s.Devices {
		if d.State == DeviceAttached {
			names = append(names, d.Name)
		}
	}
	return names
}

// exclusions are the native-routing CIDRs of both families, IPv4 first.
func (m Masquerading) exclusions() string {
	both := strings.TrimSpace(m.SNATExclusionCIDRv4 + " " + m.SNATExclusionCIDRv6)
	return orDefault(both, "-")
}

func enabled(on bool) string {
	if on {
		return "Enabled"
	}
	return "Disabled"
}

func orDefault(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

// fullPercent is from where on a table counts as nearly full.
const fullPercent = 90

// Degraded returns what is wrong, a reason each; none means OK.
func (s Status) Degraded() []string {
	var reasons []string
	add := func(format string, args ...any) { reasons = append(reasons, fmt.Sprintf(format, args...)) }

	if s.Agent.State == Down && s.Datapath.Present {
		add("agent down")
	}
	for _, problem := range []string{s.Agent.ConfigError, s.IPMasqAgent.LastError, s.Nodes.LastError} {
		if problem != "" {
			add("config rejected: %s", problem)
		}
	}
	switch {
	case s.Agent.Error != "":
		add("policy not applied: %s", s.Agent.Error)
	case s.Agent.AttachError != "":
		add("%s", s.Agent.AttachError)
	case s.Agent.Waiting != "":
		add("%s", s.Agent.Waiting)
	case s.Agent.State == Running && !s.Agent.Ready:
		add("no policy applied yet")
	}
	if k := s.Kubernetes; k != nil && k.Problem != "" {
		add("%s", k.Problem)
	}
	if k := s.Kubernetes; k != nil && k.Error != "" && !s.Agent.Ready {
		add("API server: %s", k.Error)
	}
	if s.Ports.Error != "" {
		add("%s", s.Ports.Error)
	}
	for _, l := range s.Leaks.Devices {
		if l.LastSeconds <= leakAlarm {
			add("leak on %s: %d packets left with an address that should have been masqueraded", l.Device, l.Packets)
		}
	}
	if !s.Masquerading.Enabled {
		return reasons
	}
	reasons = append(reasons, s.degradedDevices()...)
	for _, f := range []struct {
		name         string
		flows, limit int
	}{
		{"IPv4", s.Flows.IPv4.Flows, s.Flows.IPv4.Limit},
		{"IPv6", s.Flows.IPv6.Flows, s.Flows.IPv6.Limit},
	} {
		if f.flows*100 > f.limit*fullPercent {
			add("%s flow table: %d of %d flows, more than %d %% full", f.name, f.flows, f.limit, fullPercent)
		}
	}
	if c := s.Flows.Conntrack; c != nil && c.Entries*100 > c.Limit*fullPercent {
		add("conntrack table: %d of %d connections, more than %d %% full", c.Entries, c.Limit, fullPercent)
	}
	if s.Agent.Ready && s.Sources.IPv4.none() && s.Sources.IPv6.none() {
		add("no source range yet")
	}
	return reasons
}

// none tells whether the family has no range that could be masqueraded.
func (f FamilySources) none() bool { return f.State == SourcesOff || len(f.Ranges) == 0 }

// degradedDevices is what is wrong with devices and their addresses. A family
// counts only where it masquerades something.
func (s Status) degradedDevices() []string {
	used4, used6 := s.Sources.IPv4.State == SourcesUsed, s.Sources.IPv6.State == SourcesUsed
	var reasons []string
	devices := 0
	for _, d := range s.Devices {
		if d.State == DeviceDraining {
			continue
		}
		devices++
		switch d.State {
		case DeviceMissing:
			reasons = append(reasons, fmt.Sprintf("device %s is missing", d.Name))
			continue
		case DevicePending:
			reasons = append(reasons, fmt.Sprintf("device %s is not attached", d.Name))
		}
		if used4 && !d.IPv4.IsValid() {
			reasons = append(reasons, fmt.Sprintf("device %s has no IPv4 address to masquerade with", d.Name))
		}
		if used6 && !d.IPv6.IsValid() {
			reasons = append(reasons, fmt.Sprintf("device %s has no IPv6 address to masquerade with", d.Name))
		}
	}
	if devices == 0 && (used4 || used6) && s.Agent.Ready {
		reasons = append(reasons, "no device to masquerade on")
	}
	return reasons
}
