package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/policy"
)

// facts of a node with two uplinks.
func nodeFacts() facts {
	s := device(devices.Snapshot{}, 2, "eth0", "192.0.2.1/24", "2001:db8::1/64")
	return facts{network: device(s, 3, "eth1", "198.51.100.1/24"), ports: externalPorts(32768, 65535)}
}

func externalPorts(first, last uint16) []uint16 {
	return config.Config{SNATPorts: []config.PortRange{{First: first, Last: last}}}.Ports(nil)
}

func TestAssemble(t *testing.T) {
	nonMasq := []policy.Rule{
		{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Origin: "file f"},
		{Prefix: netip.MustParsePrefix("fe80::/10"), Origin: "default"},
	}
	for _, c := range []struct {
		options string
		facts   func(*facts)
		want    string
	}{
		{"pod-cidrs=10.1.0.0/16", nil, `
			families IPv4 used, IPv6 unused
			sources 10.1.0.0/16 (option pod-cidrs)
			native 10.1.0.0/16 (option pod-cidrs)
			devices eth0 192.0.2.1 2001:db8::1, eth1 198.51.100.1 2001:db8::1`},
		{"pod-cidrs=10.1.0.0/16,fd00:1::/64 ipv4-native-routing-cidr=10.0.0.0/8", nil, `
			families IPv4 used, IPv6 used
			sources 10.1.0.0/16 (option pod-cidrs), fd00:1::/64 (option pod-cidrs)
			native 10.0.0.0/8 (option ipv4-native-routing-cidr), fd00:1::/64 (option pod-cidrs)
			devices eth0 192.0.2.1 2001:db8::1, eth1 198.51.100.1 2001:db8::1`},
		{"pod-cidrs=10.1.0.0/16,fd00:1::/64 enable-ipv6-masquerade=false enable-ip-masq-agent=true", func(f *facts) { f.nonMasq = nonMasq }, `
			families IPv4 used, IPv6 off
			sources 10.1.0.0/16 (option pod-cidrs)
			nonmasq 10.0.0.0/8 (file f)
			devices eth0 192.0.2.1 2001:db8::1, eth1 198.51.100.1 2001:db8::1`},
		{"pod-cidrs=10.1.0.0/16,fd00:1::/64 enable-ip-masq-agent=true ipv6-native-routing-cidr=fd00::/8", func(f *facts) { f.nonMasq = nonMasq; f.noIPv6 = true }, `
			families IPv4 used, IPv6 off
			sources 10.1.0.0/16 (option pod-cidrs)
			nonmasq 10.0.0.0/8 (file f)
			devices eth0 192.0.2.1 2001:db8::1, eth1 198.51.100.1 2001:db8::1`},
		{"masquerade-forwarded=true", nil, `
			families IPv4 used, IPv6 used
			sources 0.0.0.0/0 (option masquerade-forwarded), fc00::/7 (option masquerade-forwarded)
			devices eth0 192.0.2.1 2001:db8::1, eth1 198.51.100.1 2001:db8::1`},
		{"masquerade-forwarded=true enable-ipv6-masquerade=true", func(f *facts) { f.network = device(devices.Snapshot{}, 2, "eth0", "192.0.2.1/24") }, `
			families IPv4 used, IPv6 unused
			sources 0.0.0.0/0 (option masquerade-forwarded), ::/0 (option masquerade-forwarded)
			devices eth0 192.0.2.1 -`},
		{"masquerade-forwarded=true pod-cidrs=10.1.0.0/16", func(f *facts) { f.network = devices.Snapshot{} }, `
			families IPv4 used, IPv6 unused
			sources 0.0.0.0/0 (option masquerade-forwarded), 10.1.0.0/16 (option pod-cidrs), fc00::/7 (option masquerade-forwarded)
			native 10.1.0.0/16 (option pod-cidrs)`},
		{"pod-cidrs=10.1.0.0/16 devices=eth1,eth7", nil, `
			families IPv4 used, IPv6 unused
			sources 10.1.0.0/16 (option pod-cidrs)
			native 10.1.0.0/16 (option pod-cidrs)
			devices eth1 198.51.100.1 2001:db8::1
			missing eth7`},
		{"pod-cidrs=10.1.0.0/16 node-addresses=192.0.2.9 devices=eth1", func(f *facts) {
			f.nodes = []policy.NodeAddr{{Addr: netip.MustParseAddr("192.0.2.10"), Node: "b", Type: policy.ExternalIP, Origin: "file n"}}
		}, `
			families IPv4 used, IPv6 unused
			sources 10.1.0.0/16 (option pod-cidrs)
			native 10.1.0.0/16 (option pod-cidrs)
			nodes 192.0.2.9 (option node-addresses), 192.0.2.10 (file n)
			devices eth1 198.51.100.1 2001:db8::1`},
		{"enable-ipv4-masquerade=false enable-ipv6-masquerade=false devices=eth1", nil, `
			families IPv4 off, IPv6 off
			devices eth1 198.51.100.1 2001:db8::1`},
	} {
		f := nodeFacts()
		if c.facts != nil {
			c.facts(&f)
		}
		w := assemble(load(t, strings.Fields(c.options)...), f)
		if got, want := w.String(), strings.ReplaceAll(strings.TrimSpace(c.want), "\t", ""); got != want {
			t.Errorf("%s:\n%s\nwant:\n%s", c.options, got, want)
		}
		if _, err := policy.Build(w.input); err != nil {
			t.Errorf("%s: %v", c.options, err)
		}
	}
}

func (w wanted) String() string {
	var lines []string
	add := func(name, text string) {
		if text != "" {
			lines = append(lines, name+" "+text)
		}
	}
	add("families", fmt.Sprintf("IPv4 %s, IPv6 %s", w.state4, w.state6))
	add("sources", rules(w.input.Sources))
	add("native", rules(w.input.Native))
	add("nonmasq", rules(w.input.NonMasq))
	var nodes, devs []string
	for _, n := range w.input.Nodes {
		nodes = append(nodes, fmt.Sprintf("%s (%s)", n.Addr, n.Origin))
	}
	for _, d := range w.input.Devices {
		addr := func(a netip.Addr) string {
			if !a.IsValid() {
				return "-"
			}
			return a.String()
		}
		devs = append(devs, fmt.Sprintf("%s %s %s", d.Name, addr(d.IPv4), addr(d.IPv6)))
	}
	add("nodes", strings.Join(nodes, ", "))
	add("devices", strings.Join(devs, ", "))
	add("missing", strings.Join(w.selection.Missing, ", "))
	return strings.Join(lines, "\n")
}

func TestReservedPortsAreLeftOut(t *testing.T) {
	l := newLoop(load(t, "pod-cidrs=10.1.0.0/16", "reserved-ports=50000"), Options{}, t.TempDir(), quiet)
	l.reserved = []config.PortRange{{First: 40000, Last: 40001}}
	l.facts.network = devices.Snapshot{Links: []devices.Link{{Index: 2, Name: "vx0", Kind: "vxlan", Port: 51820}}}
	l.readPool()
	if got, want := portRanges(l.facts.ports), "32768-39999,40002-49999,50001-51819,51821-65535"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// A pool that would be empty is not taken.
func TestPoolIsNeverEmpty(t *testing.T) {
	l := newLoop(load(t, "pod-cidrs=10.1.0.0/16", "snat-port-range=40000-40003"), Options{}, t.TempDir(), quiet)
	for _, c := range []struct {
		first, last uint16
		want        string
		refused     bool
	}{
		{32768, 65535, "40000-40003", true}, // at first start: what the options give
		{40001, 40001, "40000,40002-40003", false},
		{1, 65535, "40000,40002-40003", true}, // the last good one
		{1, 2, "40000-40003", false},
	} {
		l.reserved = []config.PortRange{{First: c.first, Last: c.last}}
		l.readPool()
		if got := portRanges(l.facts.ports); got != c.want || (l.portsError != "") != c.refused {
			t.Errorf("reserved %d-%d: %s (%s), want %s", c.first, c.last, got, l.portsError, c.want)
		}
	}
}

func TestAttachedDevicesStay(t *testing.T) {
	bare := devices.Snapshot{}
	for i, name := range []string{"eth0", "uplink", "old", "new"} { // none has an address: none would be detected
		bare.Links = append(bare.Links, devices.Link{Index: i + 2, Name: name, Kind: "device", Hardware: "ether"})
	}
	attached := []datapath.Attachment{
		{Device: "eth0", Index: 2},
		{Device: "eth1", Index: 3},                // is called uplink now
		{Device: "old", Index: 4, Draining: true}, // was excluded
		{Device: "new", Index: 99},                // was deleted and made again
	}
	names := attachedNames(attached, bare)
	if want := []string{"eth0", "uplink"}; !slices.Equal(names, want) {
		t.Errorf("attached %v, want %v", names, want)
	}
	w := assemble(load(t, "pod-cidrs=10.1.0.0/16"), facts{network: bare, attached: attached})
	if got := deviceNames(w.input.Devices); !slices.Equal(got, names) {
		t.Errorf("devices %v, want %v", got, names)
	}
}

// In iptables mode a family without sources is left alone: the kernel may lack its tables.
// With eBPF it costs nothing, and shows as unused in both.
func TestAssembleForRules(t *testing.T) {
	for mode, want := range map[string]bool{"true": true, "false": false} {
		w := assemble(load(t, "pod-cidrs=10.1.0.0/16", "enable-bpf-masquerade="+mode), nodeFacts())
		if !w.input.IPv4 || w.input.IPv6 != want || w.state6 != SourcesUnused {
			t.Errorf("enable-bpf-masquerade=%s: IPv4 %v, IPv6 %v %s", mode, w.input.IPv4, w.input.IPv6, w.state6)
		}
	}
}
