package agent

import (
	"net/netip"
	"testing"
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
