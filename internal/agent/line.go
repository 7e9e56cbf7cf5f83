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
