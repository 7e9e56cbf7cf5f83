package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/ipmasq"
	"bauta.dev/bauta/internal/policy"
)

// effective is the policy that a configuration means, as far as it can be known
// without a node and a cluster.
type effective struct {
	Mode             string                  `json:"mode"`
	IPv4             bool                    `json:"ipv4"`
	IPv6             bool                    `json:"ipv6"`
	Devices          string                  `json:"devices"` // patterns, or auto
	Sources          []policy.Rule           `json:"sources"`
	Native           []policy.Rule           `json:"native"`
	IPMasqAgent      *ipmasq.List            `json:"ipMasqAgent,omitempty"`
	Nodes            []policy.NodeAddr       `json:"nodes"`
	RemoteNodes      policy.RemoteNodes      `json:"remoteNodes"`
	UnknownProtocols policy.UnknownProtocols `json:"unknownProtocols"`
	K8s              bool                    `json:"k8s"` // sources and nodes also come from Node objects
	RouteSource      bool                    `json:"routeSource"`
	Ports            []config.PortRange      `json:"ports"`
	PortCount        int                     `json:"portCount"`
	Flows            uint32                  `json:"flows"` // 0: sized from memory
	Options          []config.Effective      `json:"options"`
	Warnings         []string                `json:"warnings"`
	Ignored          []string                `json:"ignored"`

	ipMasqPath   string
	nativeOfNode string // what the Node object adds to Native
}

func effectivePolicy(cfg config.Config) (*effective, error) {
	e := &effective{
		Mode: agent.ModeBPF, IPv4: cfg.IPv4, IPv6: cfg.IPv6,
		Devices:     "auto",
		Sources:     inFamilies(cfg, cfg.SourceRules(nil)),
		Native:      inFamilies(cfg, cfg.NativeRules(nil)),
		Nodes:       slices.Clone(cfg.NodeAddresses),
		RemoteNodes: cfg.RemoteNodes, UnknownProtocols: cfg.UnknownProtocols,
		K8s: cfg.K8s, RouteSource: cfg.RouteSource,
		Flows:    cfg.MaxFlows,
		Options:  cfg.Effective(),
		Warnings: append([]string{}, cfg.Warnings...),
		Ignored:  append([]string{}, cfg.Ignored...),
	}
	if !cfg.BPF {
		e.Mode = agent.ModeIPTables
	}
	if d := cfg.MasqueradeDevices(); len(d) > 0 {
		e.Devices = d.String()
	}
	ports := cfg.Ports(nil)
	e.Ports, e.PortCount = portRanges(ports), len(ports)
	if cfg.IPMasqAgent {
		list, err := ipmasq.Load(cfg.IPMasqAgentPath, ipmasq.Profile(cfg.IPMasqAgentProfile))
		if err != nil {
			return nil, advice.New(fmt.Errorf("ip-masq-agent-config-path: %w", err), "bauta config validate "+cfg.IPMasqAgentPath+" shows it by every profile")
		}
		e.IPMasqAgent, e.ipMasqPath = &list, cfg.IPMasqAgentPath
		e.Warnings = append(e.Warnings, list.Warnings...)
		e.Ignored = append(e.Ignored, list.Ignored...)
	}
	if cfg.K8s {
		e.describeCluster(cfg)
	}
	return e, e.readNodes(cfg.NodesFile)
}

// describeCluster says what will come from Node objects, and what the agent would refuse.
func (e *effective) describeCluster(cfg config.Config) {
	if !cfg.IPMasqAgent && (len(cfg.Native4) == 0 && cfg.IPv4 || len(cfg.Native6) == 0 && cfg.IPv6) {
		e.nativeOfNode = "the pod ranges of the local Node object\n"
	}
	if cfg.NodeName == "" {
		e.Warnings = append(e.Warnings, "enable-k8s: no node name here: the agent needs k8s-node-name or $K8S_NODE_NAME")
	}
}

func (e *effective) readNodes(path string) error {
	if path == "" {
		return nil
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		e.Warnings = append(e.Warnings, "nodes-file "+path+": not there yet")
		return nil
	} else if err != nil {
		return fmt.Errorf("nodes-file %s: %w", path, advice.Bare(err))
	}
	defer f.Close()
	nodes, err := config.ParseNodes(f, path)
	if err != nil {
		return advice.New(fmt.Errorf("nodes-file %w", err), "write a line for each address: ADDRESS [NODE [TYPE]]")
	}
	e.Nodes = append(e.Nodes, nodes...)
	slices.SortStableFunc(e.Nodes, func(a, b policy.NodeAddr) int { return a.Addr.Compare(b.Addr) })
	return nil
}

// inFamilies drops the rules of a family that is off.
func inFamilies(cfg config.Config, rules []policy.Rule) []policy.Rule {
	kept := make([]policy.Rule, 0, len(rules))
	for _, r := range rules {
		if is4 := r.Prefix.Addr().Is4(); is4 && cfg.IPv4 || !is4 && cfg.IPv6 {
			kept = append(kept, r)
		}
	}
	return kept
}

// portRanges joins ascending ports to ranges.
func portRanges(ports []uint16) []config.PortRange {
	ranges := []config.PortRange{}
	for _, p := range ports {
		if n := len(ranges); n > 0 && ranges[n-1].Last+1 == p {
			ranges[n-1].Last = p
			continue
		}
		ranges = append(ranges, config.PortRange{First: p, Last: p})
	}
	return ranges
}
