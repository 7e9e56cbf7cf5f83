package cli

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/policy"
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func flow(proto uint8, inner, remote, outer, state string) []datapath.Mapping {
	m := datapath.Mapping{Kind: datapath.KindMapping, Proto: proto, Age: 123*time.Second + 900*time.Millisecond, State: state, Packets: 7, Bytes: 4200}
	out, in := m, m
	out.Out, out.Src, out.Dst, out.Xlate = true, ap(inner), ap(remote), ap(outer)
	in.Src, in.Dst, in.Xlate = ap(remote), ap(outer), ap(inner)
	return []datapath.Mapping{in, out}
}

// mappings are in an order as a hash table has it.
func mappings() []datapath.Mapping {
	var all []datapath.Mapping
	all = append(all, flow(17, "10.0.1.99:5353", "9.9.9.9:53", "10.0.2.15:40000", "two-way")...)
	all = append(all, flow(6, "[fd00::63]:34520", "[2001:db8::1]:443", "[2001:db8::15]:34520", "syn")...)
	all = append(all, flow(6, "10.0.1.99:34520", "1.1.1.1:80", "10.0.2.15:34520", "established")...)
	all = append(all, flow(6, "10.0.1.100:34520", "1.1.1.1:80", "10.0.2.15:61000", "closing")...)
	all = append(all, flow(1, "10.0.1.99:77", "1.1.1.1:77", "10.0.2.15:77", "query")...)
	all = append(all, flow(99, "10.0.1.99:0", "1.1.1.1:0", "10.0.2.15:0", "one-way")...)
	return append(all,
		datapath.Mapping{Kind: datapath.KindInbound, Proto: 6, Src: ap("7.7.7.7:999"), Dst: ap("10.0.1.99:8080"), Age: time.Second, State: "established"},
		datapath.Mapping{Kind: datapath.KindHost, Proto: 6, Out: true, Src: ap("10.0.2.15:34520"), Dst: ap("1.1.1.1:80"), Xlate: ap("10.0.2.15:45000"), Age: time.Second, State: "established"})
}

func TestMappingText(t *testing.T) {
	all := mappings()
	sortMappings(all)
	golden(t, "testdata/golden/nat-list.txt", mappingText(all))
}

// The contract prints these two lines.
func TestMappingTextOfTheContract(t *testing.T) {
	all := flow(6, "10.0.1.99:34520", "1.1.1.1:80", "10.0.2.15:34520", "established")
	sortMappings(all)
	const want = `TCP OUT 10.0.1.99:34520 -> 1.1.1.1:80 XLATE_SRC 10.0.2.15:34520 Created=123sec ago State=established
TCP IN 1.1.1.1:80 -> 10.0.2.15:34520 XLATE_DST 10.0.1.99:34520 Created=123sec ago State=established
`
	if got := mappingText(all); got != want {
		t.Errorf("got:\n%swant:\n%s", got, want)
	}
}

func TestMappingJSON(t *testing.T) {
	all := mappings()
	sortMappings(all)
	golden(t, "testdata/golden/nat-list.json", shown(t, jsonForm, natEntries(all)))
}

// shown is what showList prints on standard output.
func shown[T any](t *testing.T, f format, list []T) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	a := &app{Env: Env{Stdout: &stdout, Stderr: &stderr}}
	if err := showList(a, f, list, func([]T) string { return "" }); err != nil {
		t.Fatal(err)
	}
	if stderr.Len() > 0 {
		return "stderr: " + stderr.String()
	}
	return stdout.String()
}

func TestEmptyLists(t *testing.T) {
	for f, want := range map[format]string{text: "stderr: No entries found.\n", jsonForm: "[]\n", yamlForm: "[]\n"} {
		if got := shown[netip.Prefix](t, f, nil); got != want {
			t.Errorf("-o %s: %q, want %q", f, got, want)
		}
	}
}

func TestPrefixList(t *testing.T) {
	prefixes := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fe80::/10")}
	if got, want := prefixText(prefixes), "IP PREFIX/ADDRESS\n10.0.0.0/8\nfe80::/10\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := shown(t, jsonForm, prefixes), "[\n  \"10.0.0.0/8\",\n  \"fe80::/10\"\n]\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestNodeList(t *testing.T) {
	addr := netip.MustParseAddr
	nodes := nameNodes([]netip.Addr{addr("2001:db8::10"), addr("192.0.2.100"), addr("192.0.2.9")}, []policy.NodeAddr{
		{Addr: addr("192.0.2.100"), Node: "worker-1", Type: policy.InternalIP},
		{Addr: addr("192.0.2.100"), Node: "worker-1", Type: policy.ExternalIP},
		{Addr: addr("192.0.2.100"), Node: "worker-1", Type: policy.InternalIP},
		{Addr: addr("2001:db8::10"), Node: "worker-2", Type: policy.Hostname},
		{Addr: addr("203.0.113.1"), Node: "not in the kernel", Type: policy.InternalIP},
	})
	golden(t, "testdata/golden/node-list.txt", nodeText(nodes))
	golden(t, "testdata/golden/node-list.json", shown(t, jsonForm, nodes))
}

func rules(origin string, prefixes ...string) []policy.Rule {
	var rules []policy.Rule
	for _, p := range prefixes {
		rules = append(rules, policy.Rule{Prefix: netip.MustParsePrefix(p), Origin: origin})
	}
	return rules
}

func healthy() agent.Status {
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	return agent.Status{
		Masquerading: agent.Masquerading{Enabled: true, EnabledProtocols: agent.EnabledProtocols{IPv4: true}, Mode: agent.ModeBPF,
			IPMasqAgent: true, SNATExclusionCIDRv4: "10.0.0.0/16"},
		Agent:    agent.AgentStatus{State: agent.Running, PID: 4711, Version: "v1.2.3", Started: at, UptimeSeconds: 3*3600 + 125, Ready: true, LastApply: at},
		Datapath: agent.DatapathStatus{Present: true, Applied: true, Tier: "tcx, IPv6 checksum flag"},
		Devices: []agent.DeviceStatus{
			{Name: "eth0", Index: 2, State: agent.DeviceAttached, Hook: datapath.HookTCX, IPv4: netip.MustParseAddr("10.0.2.15")},
			{Name: "eth1", Index: 3, State: agent.DeviceAttached, Hook: datapath.HookTC, IPv4: netip.MustParseAddr("192.168.1.7"), Ahead: []string{"cil_to_netdev"}},
		},
		Sources: agent.Sources{
			IPv4: agent.FamilySources{State: agent.SourcesUsed, Ranges: rules("option pod-cidrs", "10.0.1.0/24")},
			IPv6: agent.FamilySources{State: agent.SourcesOff},
		},
		IPMasqAgent: agent.IPMasqStatus{Enabled: true, Path: "/etc/config/ip-masq-agent", Profile: "cilium", State: "list", InForce: agent.FromFile,
			Files: []string{"/etc/config/ip-masq-agent"}, Prefixes: 2, LastReload: at,
			Rules: append(rules("file /etc/config/ip-masq-agent", "172.16.0.0/12"), rules("default", "169.254.0.0/16")...)},
		Nodes: agent.NodesStatus{Known: 2, Addresses: 3, File: "/etc/bauta/nodes"},
		Flows: agent.Flows{IPv4: datapath.Usage{Flows: 12, Limit: 65536, Inbound: 1, InboundLimit: 16384}, IPv6: datapath.Usage{Limit: 65536, InboundLimit: 16384}},
		Ports: agent.PortsStatus{Ranges: "32768-65535", Pool: 32768, Worst: &agent.WorstPort{Proto: 6, Address: netip.MustParseAddr("10.0.2.15"), Remote: ap("1.1.1.1:443"), Used: 7, Pool: 32768},
			Searches: &datapath.PortSearches{Attempts: []uint64{40, 2, 0, 1}, Failures: 3, Remembered: 500, Uncounted: 9}},
		Drops:    map[string]uint64{"drop-stray": 12, "drop-no-port": 3},
		Warnings: []string{"device eth1: cil_to_netdev sees leaving packets before Bauta"},
	}
}

func ailing() agent.Status {
	st := healthy()
	st.Agent = agent.AgentStatus{State: agent.Down, PID: 4711, Version: "v1.2.3"}
	st.Devices = append(st.Devices, agent.DeviceStatus{Name: "eth2", State: agent.DeviceMissing})
	st.IPMasqAgent.State, st.IPMasqAgent.InForce = "list", agent.FromLastGood
	st.IPMasqAgent.LastError = `/etc/config/ip-masq-agent: nonMasqueradeCIDRs[0]: "10.0.0.0": not a CIDR`
	st.Drops, st.Warnings, st.Ports.Worst = nil, nil, nil
	return st
}

// withRules is a healthy node in iptables mode.
func withRules() agent.Status {
	st := healthy()
	st.Masquerading.Mode = agent.ModeIPTables
	st.Datapath.Tier = "iptables-nft"
	st.Devices = []agent.DeviceStatus{
		{Name: "eth0", Index: 2, State: agent.DeviceAttached, Hook: agent.HookIPTables, IPv4: netip.MustParseAddr("10.0.2.15")},
	}
	st.Flows = agent.Flows{Conntrack: &agent.ConntrackUsage{Entries: 512, Limit: 262144}}
	st.Ports.Worst, st.Ports.Searches, st.Drops = nil, nil, map[string]uint64{"drop-stray": 2}
	st.Draining = &agent.DrainingStatus{Mode: agent.ModeBPF, Connections: 3}
	st.Warnings = []string{"another masquerade rule matches our sources too: IPv4, table nat, chain POSTROUTING: -s 10.0.0.0/8 -j MASQUERADE"}
	return st
}

func TestStatusText(t *testing.T) {
	golden(t, "testdata/golden/status-iptables.txt", statusText(withRules()))
	off := agent.Status{Agent: agent.AgentStatus{State: agent.Running, PID: 1, Ready: true}, Datapath: agent.DatapathStatus{Present: true, Applied: true},
		Sources: agent.Sources{IPv4: agent.FamilySources{State: agent.SourcesOff}, IPv6: agent.FamilySources{State: agent.SourcesOff}},
		Ports:   agent.PortsStatus{Ranges: "32768-65535", Pool: 32768}}
	unexplained := agent.Status{Masquerading: agent.Masquerading{Enabled: true, EnabledProtocols: agent.EnabledProtocols{IPv4: true, IPv6: true}, Mode: agent.ModeBPF, IPMasqAgent: true},
		Agent: agent.AgentStatus{State: agent.Down}, Datapath: agent.DatapathStatus{Present: true, Applied: true},
		IPMasqAgent: agent.IPMasqStatus{Enabled: true, Prefixes: 3}, Warnings: []string{"what the data plane was told is not known: open policy.json: no such file or directory"}}
	golden(t, "testdata/golden/status-unexplained.txt", statusText(unexplained))
	golden(t, "testdata/golden/status-healthy.txt", statusText(healthy()))
	golden(t, "testdata/golden/status-ailing.txt", statusText(ailing()))
	golden(t, "testdata/golden/status-off.txt", statusText(off))
}

// A long list is cut, and a warning about the file is shown once, although it is
// in the status twice.
func TestIPMasqTextIsShort(t *testing.T) {
	st := healthy()
	st.IPMasqAgent.Rules = nil
	for i := range 25 {
		st.IPMasqAgent.Rules = append(st.IPMasqAgent.Rules, rules("default", fmt.Sprintf("10.%d.0.0/16", i))...)
	}
	const warning = "list: 10.0.0.1/16: taken for 10.0.0.0/16"
	st.IPMasqAgent.Warnings = []string{warning}
	st.Warnings = append(st.Warnings, warning)
	text := statusText(st)
	if !strings.Contains(text, "10.19.0.0/16") || strings.Contains(text, "10.20.0.0/16") || !strings.Contains(text, "... and 5 more (bauta bpf ipmasq list)\n") {
		t.Error(text)
	}
	if n := strings.Count(text, warning); n != 1 {
		t.Errorf("the warning is shown %d times:\n%s", n, text)
	}
}

func TestStatusExit(t *testing.T) {
	for _, c := range []struct {
		name   string
		st     agent.Status
		brief  string
		status int
	}{
		{"healthy", healthy(), "OK\n", exitOK},
		{"ailing", ailing(), "", exitDegraded},
	} {
		var stdout bytes.Buffer
		a := &app{Env: Env{Stdout: &stdout}}
		if got := status(a.showStatus(c.st, text, true)); got != c.status {
			t.Errorf("%s: exit status %d, want %d", c.name, got, c.status)
		}
		if c.brief != "" && stdout.String() != c.brief {
			t.Errorf("%s: %q, want %q", c.name, stdout.String(), c.brief)
		}
		if n := bytes.Count(stdout.Bytes(), []byte("\n")); n != 1 {
			t.Errorf("%s: %d lines, want 1", c.name, n)
		}
	}
}

func TestUptime(t *testing.T) {
	for d, want := range map[time.Duration]string{
		5 * time.Second: "5s", 65 * time.Second: "1m5s", time.Hour: "1h0m", 50 * time.Hour: "2d2h",
	} {
		if got := uptime(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
}

func TestKubernetesText(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, c := range []struct {
		k    *agent.KubernetesStatus
		want string
	}{
		{nil, ""},
		{&agent.KubernetesStatus{Node: "a"}, "node a   not synced since the start"},
		{&agent.KubernetesStatus{Node: "a", Synced: true, Nodes: 1, LastSync: at}, "node a   synced, 1 node   last 2026-01-02T03:04:05Z"},
		{&agent.KubernetesStatus{Node: "a", Synced: true, Nodes: 7, LastSync: at, Error: "connection\nrefused", ErrorSince: at},
			"node a   synced, 7 nodes   last 2026-01-02T03:04:05Z\n  API server: connection refused (since 2026-01-02T03:04:05Z)"},
	} {
		if got := kubernetesText(c.k); got != c.want {
			t.Errorf("%+v:\n%s\nwant:\n%s", c.k, got, c.want)
		}
	}
}
