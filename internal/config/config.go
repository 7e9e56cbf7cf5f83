// Package config turns the agent's options into typed values: flag, environment,
// file, directory, default, in this order of precedence.
//
// Options is the one table of options. Load parses and checks everything, so
// that nothing behind it meets an unparsed string or an impossible combination.
package config

import (
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"bauta.dev/bauta/internal/policy"
)

// Config is a checked configuration. Only Load makes one.
type Config struct {
	IPv4, IPv6          bool
	IPv6Explicit        bool // enable-ipv6-masquerade was given (2.1)
	BPF                 bool // false: iptables mode
	Devices             DeviceFilter
	EgressInterfaces    DeviceFilter
	PodCIDRs            []policy.Rule // sorted
	MasqueradeForwarded bool
	LeakSentinel        bool
	RouteSource         bool
	UnknownProtocols    policy.UnknownProtocols

	Native4, Native6   []policy.Rule // as given, sorted; see NativeRules for what is in force
	IPMasqAgent        bool
	IPMasqAgentPath    string
	IPMasqAgentProfile string // cilium, upstream or strict
	RemoteNodes        policy.RemoteNodes
	RemoteNodesSet     bool // it was given (2.2: the warning about tunnels)
	NodeAddresses      []policy.NodeAddr
	NodesFile          string

	SNATPorts, NodePorts, ReservedPorts []PortRange // sorted, not overlapping

	MaxPortsPerPod int    // 0: no limit
	NewFlowsPerPod int    // a second; 0: no limit
	MaxFlows       uint32 // a power of two; 0: sized from memory, see Flows
	Timeouts       policy.Timeouts

	IPTablesRandomFully bool
	IPTablesLockTimeout time.Duration
	DrainTimeout        time.Duration
	TakeOver            string // empty: nothing; Unnamed: a switch of old, which names nothing
	AllowPrivateBPFFS   bool

	K8s           bool
	Kubeconfig    string // empty: in-cluster
	NodeName      string
	StartupTaint  string // key; empty: none
	MetricsAddr   string // HOST:PORT; empty: off
	MetricsPerPod int    // addresses that have series of their own
	LogLevel      slog.Level
	LogFormat     string // text or json

	Warnings []string // for status
	Ignored  []string // keys of the directory that have no effect here, sorted

	effective []Effective
}

// Sources says where options come from.
type Sources struct {
	Flags   map[string]string // by option name or alias; only those the user gave
	Environ []string          // KEY=VALUE
	File    string            // YAML; empty: none
	Dir     string            // one file an option; empty: none
}

// Load reads all sources and returns the checked configuration. Its errors are
// of type *Error.
func Load(src Sources) (Config, error) {
	var c Config
	layers, err := c.read(src)
	if err != nil {
		return Config{}, err
	}
	for _, o := range options {
		given, err := c.choose(o, layers)
		if err != nil {
			return Config{}, err
		}
		if len(given) == 0 {
			continue
		}
		if err := o.set(&c, given); err != nil {
			return Config{}, err
		}
		c.effective = append(c.effective, effective(o, given))
	}
	if err := c.check(); err != nil {
		return Config{}, err
	}
	c.warn()
	return c, nil
}

// choose returns the settings of o in the highest source that gives any of its
// names, or its default. A lower source is hidden with all aliases.
func (c *Config) choose(o Option, layers []layer) ([]setting, error) {
	for _, l := range layers {
		var given []setting
		hidden := false
		for _, name := range o.Names() {
			s, ok := l[name]
			if !ok {
				continue
			}
			hidden = true
			if !s.unset {
				given = append(given, s)
			}
		}
		if len(given) > 0 {
			return given, nil
		}
		if hidden {
			break
		}
	}
	if o.Default == "" || o.Default == auto {
		c.effective = append(c.effective, Effective{Option: o.Name, Value: o.Default, Source: fromDefault})
		return nil, nil
	}
	return []setting{{name: o.Name, kind: o.Kind, values: o.Values, items: []string{o.Default}, source: fromDefault}}, nil
}

// ulaRange is what masquerade-forwarded takes of IPv6 unless IPv6 masquerading
// was asked for explicitly: masquerading global addresses surprises (2.1).
var ulaRange = netip.MustParsePrefix("fc00::/7")

// ForwardedOrigin is the origin of the source ranges that masquerade-forwarded means.
const ForwardedOrigin = "option masquerade-forwarded"

// SourceRules returns the masquerade source ranges: pods (the ranges of the local
// node known by other means, may be nil), pod-cidrs, and all sources with
// masquerade-forwarded.
func (c Config) SourceRules(pods []policy.Rule) []policy.Rule {
	rules := append(slices.Clone(c.PodCIDRs), pods...)
	if c.MasqueradeForwarded {
		all6 := ulaRange
		if c.IPv6Explicit {
			all6 = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		const origin = ForwardedOrigin
		rules = append(rules,
			policy.Rule{Prefix: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Origin: origin},
			policy.Rule{Prefix: all6, Origin: origin})
	}
	return sortRules(rules)
}

// NativeRules returns the native-routing CIDRs in force (2.2): those given, else,
// without ip-masq-agent, the pod ranges of the local node: pod-cidrs and pods.
func (c Config) NativeRules(pods []policy.Rule) []policy.Rule {
	rules := append(slices.Clone(c.Native4), c.Native6...)
	if !c.IPMasqAgent {
		for _, r := range append(slices.Clone(c.PodCIDRs), pods...) {
			given := c.Native6
			if r.Prefix.Addr().Is4() {
				given = c.Native4
			}
			if len(given) == 0 {
				rules = append(rules, r)
			}
		}
	}
	return sortRules(rules)
}

// MasqueradeDevices returns which devices the user named; empty: detect them. In
// eBPF mode devices and egress-masquerade-interfaces mean the same; in iptables mode
// the latter wins.
func (c Config) MasqueradeDevices() DeviceFilter {
	if len(c.EgressInterfaces) > 0 {
		return c.EgressInterfaces
	}
	return c.Devices
}
