package config

import (
	"time"

	"bauta.dev/bauta/internal/policy"
)

const (
	groupMasq    = "masquerading"
	groupExclude = "exclusions"
	groupPorts   = "ports and mappings"
	groupNode    = "node"
	groupK8s     = "Kubernetes"
	groupObserve = "observability"
)

// options is the one table of agent options (section 4 of the contract). Names
// that Cilium has mean what they mean there, unless Usage says otherwise.
var options = []Option{
	{Name: "enable-ipv4-masquerade", Kind: Bool, Default: "true", Group: groupMasq,
		Usage: "masquerade IPv4",
		set:   setBool(func(c *Config) *bool { return &c.IPv4 })},
	{Name: "enable-ipv6-masquerade", Kind: Bool, Default: "true", Group: groupMasq,
		Usage: "masquerade IPv6; set explicitly, masquerade-forwarded takes global IPv6 sources too",
		set:   setIPv6},
	{Name: "enable-bpf-masquerade", Kind: Bool, Default: "true", Group: groupMasq,
		Usage: "masquerade with eBPF; false selects iptables mode",
		set:   setBool(func(c *Config) *bool { return &c.BPF })},
	{Name: "devices", Kind: List, Default: "auto", Group: groupMasq,
		Usage: "devices to masquerade on: names, prefixes (eth+), excludes (!eth1); auto detects them",
		set:   setDevices(func(c *Config) *DeviceFilter { return &c.Devices })},
	{Name: "egress-masquerade-interfaces", Kind: List, Group: groupMasq,
		Usage: "Cilium's name for devices in iptables mode, where it wins over devices; in eBPF mode the same as devices",
		set:   setDevices(func(c *Config) *DeviceFilter { return &c.EgressInterfaces })},
	{Name: "pod-cidrs", Kind: List, Group: groupMasq,
		Usage: "source ranges to masquerade, IPv4 and IPv6",
		Aliases: []Alias{
			{Name: "ipv4-range", Kind: List, Usage: "the IPv4 part of pod-cidrs"},
			{Name: "ipv6-range", Kind: List, Usage: "the IPv6 part of pod-cidrs"},
		},
		set: setPodCIDRs},
	{Name: "masquerade-forwarded", Kind: Bool, Default: "false", Group: groupMasq,
		Usage: "masquerade every forwarded packet: for routers, VM and container hosts",
		set:   setBool(func(c *Config) *bool { return &c.MasqueradeForwarded })},
	{Name: "enable-masquerade-to-route-source", Kind: Bool, Default: "false", Group: groupMasq,
		Usage: "masquerade to the source address of the route to the destination",
		set:   setBool(func(c *Config) *bool { return &c.RouteSource })},
	{Name: "unknown-protocols", Kind: Enum, Values: []string{"masquerade", "drop", "pass"}, Default: "masquerade", Group: groupMasq,
		Usage: "what to do with protocols without ports (GRE, ESP, IPIP)",
		set: one(func(c *Config, s setting) error {
			c.UnknownProtocols = policy.UnknownProtocols(s.text())
			return nil
		})},

	{Name: "leak-sentinel", Kind: Bool, Default: "false", Group: groupMasq, Mode: BPFMode,
		Usage: "watch each device, behind all other tc programs, for packets that should have been masqueraded",
		set:   setBool(func(c *Config) *bool { return &c.LeakSentinel })},

	{Name: "ipv4-native-routing-cidr", Kind: List, Group: groupExclude,
		Usage: "IPv4 destinations that are never masqueraded; unset: the local pod range, unless ip-masq-agent is on",
		set:   setNative(func(c *Config) *[]policy.Rule { return &c.Native4 }, ipv4Only)},
	{Name: "ipv6-native-routing-cidr", Kind: List, Group: groupExclude,
		Usage: "IPv6 destinations that are never masqueraded; unset: the local pod range, unless ip-masq-agent is on",
		set:   setNative(func(c *Config) *[]policy.Rule { return &c.Native6 }, ipv6Only)},
	{Name: "enable-ip-masq-agent", Kind: Bool, Default: "false", Group: groupExclude,
		Usage: "read non-masquerade CIDRs from the ip-masq-agent file",
		set:   setBool(func(c *Config) *bool { return &c.IPMasqAgent })},
	{Name: "ip-masq-agent-config-path", Kind: String, Default: "/etc/config/ip-masq-agent", Group: groupExclude,
		Usage: "the ip-masq-agent file, or a directory of fragments",
		set:   setString(func(c *Config) *string { return &c.IPMasqAgentPath })},
	{Name: "ip-masq-agent-profile", Kind: Enum, Values: []string{"cilium", "upstream", "strict"}, Default: "cilium", Group: groupExclude,
		Usage: "by whose rules the ip-masq-agent file is read",
		set:   setString(func(c *Config) *string { return &c.IPMasqAgentProfile })},
	{Name: "remote-node-masquerade", Kind: Enum, Values: []string{"none", "external", "all"}, Default: "none", Group: groupExclude,
		Usage:   "masquerade towards addresses of other nodes: none, their ExternalIPs only, or all",
		Aliases: []Alias{{Name: "enable-remote-node-masquerade", Kind: Bool, Usage: "Cilium's switch: true is remote-node-masquerade=all"}},
		set:     setRemoteNodes},
	{Name: "node-addresses", Kind: List, Group: groupExclude,
		Usage: "addresses of the other nodes of the cluster",
		set:   one(setNodeAddresses)},
	{Name: "nodes-file", Kind: String, Group: groupExclude,
		Usage: "file of other nodes, a line each: ADDRESS [NODE [TYPE]]; reloaded on change",
		set:   setString(func(c *Config) *string { return &c.NodesFile })},

	{Name: "snat-port-range", Kind: List, Default: "32768-65535", Group: groupPorts,
		Usage: "external ports for new mappings; several ranges are allowed",
		set:   setPorts(func(c *Config) *[]PortRange { return &c.SNATPorts })},
	{Name: "node-port-range", Kind: List, Default: "30000-32767", Group: groupPorts,
		Usage: "ports of NodePort services, never used for mappings",
		set:   one(setNodePorts)},
	{Name: "reserved-ports", Kind: List, Group: groupPorts,
		Usage: "further ports and ranges never used for mappings",
		set:   setPorts(func(c *Config) *[]PortRange { return &c.ReservedPorts })},
	{Name: "max-ports-per-pod", Kind: Int, Default: "0", Group: groupPorts, Mode: BPFMode,
		Usage: "mappings one source address may hold; 0 is no limit",
		set:   one(setLimit("mappings", 1<<31-1, func(c *Config) *int { return &c.MaxPortsPerPod }))},
	{Name: "max-new-flows-per-pod", Kind: Int, Default: "50000", Group: groupPorts, Mode: BPFMode,
		Usage: "new mappings a second of one source address, on average over a second; 0 is no limit",
		set:   one(setLimit("mappings a second", 1_000_000_000, func(c *Config) *int { return &c.NewFlowsPerPod }))},
	{Name: "bpf-nat-global-max", Kind: Int, Default: auto, Group: groupPorts, Mode: BPFMode,
		Usage: "flows the table holds, rounded up to a power of two (from a cilium-config: entries, two per flow); auto or 0 sizes it from memory",
		set:   one(setMaxFlows)},
	timeout("tcp-syn", policy.DefaultTimeouts.TCPSyn, "TCP connection being opened",
		func(t *policy.Timeouts) *time.Duration { return &t.TCPSyn }),
	timeout("tcp-established", policy.DefaultTimeouts.TCPEstablished, "established TCP connection",
		func(t *policy.Timeouts) *time.Duration { return &t.TCPEstablished }),
	timeout("tcp-closing", policy.DefaultTimeouts.TCPClosing, "TCP connection being closed",
		func(t *policy.Timeouts) *time.Duration { return &t.TCPClosing }),
	timeout("udp", policy.DefaultTimeouts.UDP, "UDP flow without an answer",
		func(t *policy.Timeouts) *time.Duration { return &t.UDP }),
	timeout("udp-stream", policy.DefaultTimeouts.UDPStream, "UDP flow with answers",
		func(t *policy.Timeouts) *time.Duration { return &t.UDPStream }),
	timeout("icmp", policy.DefaultTimeouts.ICMP, "ICMP query",
		func(t *policy.Timeouts) *time.Duration { return &t.ICMP }),
	timeout("other", policy.DefaultTimeouts.Other, "flow of any other protocol",
		func(t *policy.Timeouts) *time.Duration { return &t.Other }),

	{Name: "iptables-random-fully", Kind: Bool, Default: "false", Group: groupNode, Mode: IPTablesMode,
		Usage: "choose external ports fully at random",
		set:   setBool(func(c *Config) *bool { return &c.IPTablesRandomFully })},
	{Name: "iptables-lock-timeout", Kind: Duration, Default: "5s", Group: groupNode, Mode: IPTablesMode,
		Usage: "how long to wait for the xtables lock",
		set:   setDuration(func(c *Config) *time.Duration { return &c.IPTablesLockTimeout })},
	{Name: "drain-timeout", Kind: Duration, Default: "2h4m", Group: groupNode,
		Usage: "after a change of mode, remove the old mode's flows when they are this old",
		set:   setDuration(func(c *Config) *time.Duration { return &c.DrainTimeout })},
	{Name: "take-over", Kind: String, Group: groupNode,
		Usage: "another program's chain of nat, or rule as iptables -S, nft list ruleset or the status shows it: take its connections over and remove it",
		set:   one(setTakeOver)},
	{Name: "allow-private-bpffs", Kind: Bool, Default: "false", Group: groupNode, Mode: BPFMode,
		Usage: "for labs: accept a bpffs that only this mount namespace sees",
		set:   setBool(func(c *Config) *bool { return &c.AllowPrivateBPFFS })},

	{Name: "enable-k8s", Kind: Bool, Default: "false", Group: groupK8s,
		Usage: "watch Node objects for pod ranges and node addresses",
		set:   setBool(func(c *Config) *bool { return &c.K8s })},
	{Name: "k8s-kubeconfig-path", Kind: String, Group: groupK8s,
		Usage: "kubeconfig file; unset: in-cluster",
		set:   setString(func(c *Config) *string { return &c.Kubeconfig })},
	{Name: "k8s-node-name", Kind: String, Group: groupK8s,
		Usage: "name of the local Node object; unset: $K8S_NODE_NAME",
		set:   setString(func(c *Config) *string { return &c.NodeName })},
	{Name: "k8s-startup-taint", Kind: String, Group: groupK8s,
		Usage: "key of a taint that the agent removes from its Node object when the node masquerades; unset: none",
		set:   one(setTaint)},

	{Name: "prometheus-serve-addr", Kind: String, Default: "off", Group: groupObserve, Foreign: true,
		Usage: "address for /metrics, /healthz and /readyz, for example :9965; off for none",
		set:   one(setMetricsAddr)},
	{Name: "metrics-per-pod", Kind: Int, Default: "0", Group: groupObserve, Mode: BPFMode,
		Usage: "show on /metrics the mappings of so many source addresses, those that have the most, each with its address; 1000 at most, 0 for none",
		set:   one(setMetricsPerPod)},
	{Name: "log-level", Kind: Enum, Values: []string{"debug", "info", "warn", "error"}, Default: "info", Group: groupObserve, Foreign: true,
		Usage: "least severe level to log",
		set:   one(setLogLevel)},
	{Name: "log-format", Kind: Enum, Values: []string{"text", "json"}, Default: "text", Group: groupObserve, Foreign: true,
		Usage: "form of log lines",
		set:   setString(func(c *Config) *string { return &c.LogFormat })},
}

func timeout(state string, def time.Duration, usage string, field func(*policy.Timeouts) *time.Duration) Option {
	return Option{Name: "nat-timeout-" + state, Kind: Duration, Default: shortDuration(def), Group: groupPorts, Mode: BPFMode,
		Usage: "life of a mapping after its last packet: " + usage,
		set:   setTimeout(def, func(c *Config) *time.Duration { return field(&c.Timeouts) })}
}
