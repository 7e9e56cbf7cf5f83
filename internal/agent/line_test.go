package agent

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/policy"
)

func attachedDevices(names ...string) []DeviceStatus {
	var list []DeviceStatus
	for i, n := range names {
		list = append(list, DeviceStatus{Name: n, Index: i + 2, State: DeviceAttached, IPv4: netip.MustParseAddr("192.0.2.1")})
	}
	return list
}

func TestLine(t *testing.T) {
	both, only4, only6 := EnabledProtocols{true, true}, EnabledProtocols{IPv4: true}, EnabledProtocols{IPv6: true}
	draining := append(attachedDevices("eth0"), DeviceStatus{Name: "eth1", State: DeviceDraining},
		DeviceStatus{Name: "eth2", State: DeviceMissing}, DeviceStatus{Name: "eth3", State: DevicePending})
	for _, c := range []struct {
		m       Masquerading
		devices []DeviceStatus
		want    string
	}{
		{Masquerading{Enabled: true, EnabledProtocols: only4, Mode: ModeBPF, IPMasqAgent: true, SNATExclusionCIDRv4: "10.0.0.0/16"}, attachedDevices("eth0", "eth1"),
			"BPF (ip-masq-agent)   [eth0, eth1]   10.0.0.0/16 [IPv4: Enabled, IPv6: Disabled]"},
		{Masquerading{Enabled: true, EnabledProtocols: both, Mode: ModeBPF, SNATExclusionCIDRv4: "10.0.0.0/16 10.2.0.0/16", SNATExclusionCIDRv6: "fd00::/8"}, attachedDevices("eth0"),
			"BPF   [eth0]   10.0.0.0/16 10.2.0.0/16 fd00::/8 [IPv4: Enabled, IPv6: Enabled]"},
		{Masquerading{Enabled: true, EnabledProtocols: only6, Mode: ModeBPF, SNATExclusionCIDRv6: "fd00::/8"}, attachedDevices("eth0"),
			"BPF   [eth0]   fd00::/8 [IPv4: Disabled, IPv6: Enabled]"},
		{Masquerading{Enabled: true, EnabledProtocols: both, Mode: ModeBPF, IPMasqAgent: true}, draining,
			"BPF (ip-masq-agent)   [eth0]   - [IPv4: Enabled, IPv6: Enabled]"},
		{Masquerading{Enabled: true, EnabledProtocols: both, Mode: ModeBPF}, nil,
			"BPF   []   - [IPv4: Enabled, IPv6: Enabled]"},
		{Masquerading{Enabled: true, EnabledProtocols: both, Mode: ModeIPTables}, attachedDevices("eth0"),
			"IPTables [IPv4: Enabled, IPv6: Enabled]"},
		{Masquerading{Enabled: true, EnabledProtocols: only4, Mode: ModeIPTables, IPMasqAgent: true, SNATExclusionCIDRv4: "10.0.0.0/16"}, attachedDevices("eth0"),
			"IPTables (ip-masq-agent) [IPv4: Enabled, IPv6: Disabled]"},
		{Masquerading{Mode: ModeBPF, IPMasqAgent: true}, attachedDevices("eth0"), "Disabled"},
	} {
		if got := (Status{Masquerading: c.m, Devices: c.devices}).Line(); got != c.want {
			t.Errorf("%q\nwant %q", got, c.want)
		}
	}
}

// healthy is a status with nothing to complain about.
func healthy() Status {
	return Status{
		Masquerading: Masquerading{Enabled: true, EnabledProtocols: EnabledProtocols{true, true}, Mode: ModeBPF},
		Agent:        AgentStatus{State: Running, Ready: true},
		Datapath:     DatapathStatus{Present: true, Applied: true},
		Devices:      attachedDevices("eth0"),
		Sources: Sources{
			IPv4: FamilySources{SourcesUsed, []policy.Rule{{Prefix: netip.MustParsePrefix("10.1.0.0/16")}}},
			IPv6: FamilySources{State: SourcesUnused},
		},
		Flows: Flows{IPv4: datapath.Usage{Flows: 90, Limit: 100}, IPv6: datapath.Usage{Limit: 100}},
	}
}

func TestDegraded(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*Status)
		want   string
	}{
		{"fine", func(*Status) {}, ""},
		{"agent down", func(s *Status) { s.Agent = AgentStatus{State: Down} }, "agent down"},
		{"no data plane", func(s *Status) { s.Agent = AgentStatus{State: Down}; s.Datapath = DatapathStatus{} }, ""},
		{"bad option file", func(s *Status) { s.Agent.ConfigError = "file x: bad" }, "config rejected: file x: bad"},
		{"bad list", func(s *Status) { s.IPMasqAgent.LastError = "l: bad" }, "config rejected: l: bad"},
		{"bad nodes", func(s *Status) { s.Nodes.LastError = "n: bad" }, "config rejected: n: bad"},
		{"not applied", func(s *Status) { s.Agent.Error = "no memory" }, "policy not applied: no memory"},
		{"starting", func(s *Status) { s.Agent.Ready = false; s.Devices = nil }, "no policy applied yet"},
		{"missing", func(s *Status) { s.Devices = append(s.Devices, DeviceStatus{Name: "eth1", State: DeviceMissing}) }, "device eth1 is missing"},
		{"not attached", func(s *Status) { s.Devices[0].State = DevicePending }, "device eth0 is not attached"},
		{"draining", func(s *Status) { s.Devices = append(s.Devices, DeviceStatus{Name: "eth1", State: DeviceDraining}) }, ""},
		{"no device", func(s *Status) { s.Devices = nil }, "no device to masquerade on"},
		{"no IPv4 address", func(s *Status) { s.Devices[0].IPv4 = netip.Addr{} }, "device eth0 has no IPv4 address to masquerade with"},
		{"no IPv6 address", func(s *Status) { s.Sources.IPv6.State = SourcesUsed }, "device eth0 has no IPv6 address to masquerade with"},
		{"full", func(s *Status) { s.Flows.IPv4.Flows = 91 }, "IPv4 flow table: 91 of 100 flows, more than 90 % full"},
		{"no range", func(s *Status) { s.Sources.IPv4 = FamilySources{State: SourcesUnused} }, "no source range yet"},
		{"unused", func(s *Status) { s.Sources.IPv4.State = SourcesUnused; s.Devices = nil }, ""},
		{"off", func(s *Status) {
			s.Masquerading = Masquerading{}
			s.Sources = Sources{FamilySources{State: SourcesOff}, FamilySources{State: SourcesOff}}
			s.Devices = nil
		}, ""},
		{"two reasons", func(s *Status) { s.IPMasqAgent.LastError = "bad"; s.Devices[0].State = DeviceMissing }, "config rejected: bad; device eth0 is missing"},
	} {
		s := healthy()
		s.Devices = slices.Clone(s.Devices)
		c.change(&s)
		if got := strings.Join(s.Degraded(), "; "); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}
