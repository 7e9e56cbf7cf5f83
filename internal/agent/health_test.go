package agent

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/policy"
)

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
		want   string // what keeps the node from being ready has a ! before it
	}{
		{"fine", func(*Status) {}, ""},
		{"agent down", func(s *Status) { s.Agent = AgentStatus{State: Down} }, "!agent down"},
		{"no data plane", func(s *Status) { s.Agent = AgentStatus{State: Down}; s.Datapath = DatapathStatus{} }, ""},
		{"bad option file", func(s *Status) { s.Agent.ConfigError = "file x: bad" }, "!config rejected: file x: bad"},
		{"bad list", func(s *Status) { s.IPMasqAgent.LastError = "l: bad" }, "!config rejected: l: bad"},
		{"bad nodes", func(s *Status) { s.Nodes.LastError = "n: bad" }, "!config rejected: n: bad"},
		{"not applied", func(s *Status) { s.Agent.Error = "no memory" }, "policy not applied: no memory"},
		{"starting", func(s *Status) { s.Agent.Ready = false; s.Devices = nil }, "!no policy applied yet"},
		{"missing", func(s *Status) { s.Devices = append(s.Devices, DeviceStatus{Name: "eth1", State: DeviceMissing}) }, "device eth1 is missing"},
		{"not attached", func(s *Status) { s.Devices[0].State = DevicePending }, "!device eth0 is not attached"},
		{"draining", func(s *Status) { s.Devices = append(s.Devices, DeviceStatus{Name: "eth1", State: DeviceDraining}) }, ""},
		{"no device", func(s *Status) { s.Devices = nil }, "!no device to masquerade on"},
		{"no IPv4 address", func(s *Status) { s.Devices[0].IPv4 = netip.Addr{} }, "!device eth0 has no IPv4 address to masquerade with"},
		{"no IPv6 address", func(s *Status) { s.Sources.IPv6.State = SourcesUsed }, "!device eth0 has no IPv6 address to masquerade with"},
		{"full", func(s *Status) { s.Flows.IPv4.Flows = 91 }, "IPv4 flow table: 91 of 100 flows, more than 90 % full"},
		{"no range", func(s *Status) { s.Sources.IPv4 = FamilySources{State: SourcesUnused} }, "!no source range yet"},
		{"unused", func(s *Status) { s.Sources.IPv4.State = SourcesUnused; s.Devices = nil }, ""},
		{"off", func(s *Status) {
			s.Masquerading = Masquerading{}
			s.Sources = Sources{FamilySources{State: SourcesOff}, FamilySources{State: SourcesOff}}
			s.Devices = nil
		}, ""},
		{"another one is attached", func(s *Status) {
			s.Devices = append(attachedDevices("eth1"), DeviceStatus{Name: "eth0", State: DevicePending, IPv4: s.Devices[0].IPv4})
		},
			"device eth0 is not attached"},
		{"another one has an address", func(s *Status) {
			s.Devices = append(attachedDevices("eth1"), DeviceStatus{Name: "eth0", State: DeviceAttached})
		},
			"device eth0 has no IPv4 address to masquerade with"},
		{"an address on what is not attached", func(s *Status) {
			s.Devices = []DeviceStatus{{Name: "eth0", State: DeviceAttached}, {Name: "eth1", State: DevicePending, IPv4: s.Devices[0].IPv4}}
		}, "!device eth0 has no IPv4 address to masquerade with; device eth1 is not attached"},
		{"not applied at first", func(s *Status) { s.Agent.Error = "no memory"; s.Agent.Ready = false }, "!policy not applied: no memory"},
		{"attached nowhere", func(s *Status) { s.Agent.AttachError = "eth0: refused"; s.Agent.Ready = false }, "!eth0: refused"},
		{"no listener", func(s *Status) { s.Agent.HTTPError = "address in use" }, "address in use"},
		{"ports", func(s *Status) { s.Ports.Error = "no port left" }, "no port left"},
		{"two reasons", func(s *Status) { s.IPMasqAgent.LastError = "bad"; s.Devices[0].State = DeviceMissing }, "!config rejected: bad; !device eth0 is missing"},
	} {
		s := healthy()
		s.Devices = slices.Clone(s.Devices)
		c.change(&s)
		want := strings.ReplaceAll(c.want, "!", "")
		if got := strings.Join(s.Degraded(), "; "); got != want {
			t.Errorf("%s: degraded %q, want %q", c.name, got, want)
		}
		unready := slices.DeleteFunc(strings.Split(c.want, "; "), func(r string) bool { return !strings.HasPrefix(r, "!") })
		if got, want := strings.Join(s.Unready(), "; "), strings.ReplaceAll(strings.Join(unready, "; "), "!", ""); got != want {
			t.Errorf("%s: not ready %q, want %q", c.name, got, want)
		}
	}
}
