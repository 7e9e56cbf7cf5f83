package agent

import (
	"net/netip"
	"slices"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/policy"
)

// wanted is what options and facts amount to.
type wanted struct {
	mode           string // ModeBPF or ModeIPTables
	input          policy.Input
	selection      devices.Selection
	state4, state6 SourceState
}

// assemble is pure: the same options and facts give the same result.
func assemble(cfg config.Config, f facts) wanted {
	own := ownRules(cfg, f.kube)
	sources := cfg.SourceRules(own)
	sel := devices.Select(f.network, devices.Options{
		Patterns:  patterns(cfg.MasqueradeDevices()),
		Forwarded: cfg.MasqueradeForwarded,
		// All of them, also those of a family that is off: they tell where pods are.
		Sources:     prefixes(sources),
		RouteSource: cfg.RouteSource,
		Attached:    attachedNames(f.attached, f.network),
	})
	in := policy.Input{
		IPv4:             cfg.IPv4,
		IPv6:             cfg.IPv6 && !f.noIPv6,
		HostAddrs:        sel.HostAddrs,
		Nodes:            slices.Concat(cfg.NodeAddresses, f.nodes, others(f.kube.nodes, sel.HostAddrs)),
		RemoteNodes:      cfg.RemoteNodes,
		UnknownProtocols: cfg.UnknownProtocols,
		Devices:          sel.PolicyDevices(),
		RouteSources:     sel.RouteSources,
		Ports:            f.ports,
		Timeouts:         cfg.Timeouts,
		MaxPortsPerPod:   cfg.MaxPortsPerPod,
		NewFlowsPerPod:   cfg.NewFlowsPerPod,
	}
	// What concerns a family that is off is not in force, so nobody lists it.
	in.Sources = ofFamilies(sources, in.IPv4, in.IPv6)
	in.Native = ofFamilies(cfg.NativeRules(own), in.IPv4, in.IPv6)
	in.Pods = ofFamilies(f.kube.pods, in.IPv4, in.IPv6)
	in.NonMasq = ofFamilies(f.nonMasq, in.IPv4, in.IPv6)
	w := wanted{
		mode: modeOf(cfg.BPF), input: in, selection: sel,
		state4: sourceState(cfg, in.IPv4, ofFamilies(in.Sources, true, false), sel.DefaultRoute4),
		state6: sourceState(cfg, in.IPv6, ofFamilies(in.Sources, false, true), sel.DefaultRoute6),
	}
	if !cfg.BPF { // a family without sources needs no tables, which the kernel may lack
		w.input.IPv4 = in.IPv4 && len(ofFamilies(in.Sources, true, false)) > 0
		w.input.IPv6 = in.IPv6 && len(ofFamilies(in.Sources, false, true)) > 0
	}
	return w
}

// sourceState says whether a family masquerades anything (2.6). masquerade-forwarded
// gives every family a source range, so there it is a default route that counts,
// unless pod-cidrs or the Node object names a range of the family.
func sourceState(cfg config.Config, on bool, ranges []policy.Rule, defaultRoute bool) SourceState {
	switch {
	case !on:
		return SourcesOff
	case len(ranges) == 0:
		return SourcesUnused
	case defaultRoute || !cfg.MasqueradeForwarded:
		return SourcesUsed
	}
	is4 := ranges[0].Prefix.Addr().Is4()
	named := func(r policy.Rule) bool {
		return r.Prefix.Addr().Is4() == is4 && r.Origin != config.ForwardedOrigin
	}
	if slices.ContainsFunc(ranges, named) {
		return SourcesUsed
	}
	return SourcesUnused
}

// tunnels are what no pod may exchange with the same remote.
func tunnels(list []devices.Tunnel) []datapath.Tunnel {
	out := make([]datapath.Tunnel, len(list))
	for i, t := range list {
		out[i] = datapath.Tunnel(t)
	}
	return out
}

func patterns(f config.DeviceFilter) []string {
	texts := make([]string, len(f))
	for i, p := range f {
		texts[i] = p.String()
	}
	return texts
}

// attachedNames are the devices that masquerade now, by their names of now: a
// device keeps its index when it is renamed, and one that was deleted and made
// again under its old name is another one. A draining device was excluded once;
// that it is still attached does not bring it back.
func attachedNames(attached []datapath.Attachment, now devices.Snapshot) []string {
	var names []string
	for _, a := range attached {
		i := slices.IndexFunc(now.Links, func(l devices.Link) bool { return l.Index == a.Index })
		if i >= 0 && !a.Draining {
			names = append(names, now.Links[i].Name)
		}
	}
	return names
}

func ofFamilies(rules []policy.Rule, ipv4, ipv6 bool) []policy.Rule {
	kept := make([]policy.Rule, 0, len(rules))
	for _, r := range rules {
		if r.Prefix.Addr().Is4() && ipv4 || !r.Prefix.Addr().Is4() && ipv6 {
			kept = append(kept, r)
		}
	}
	return kept
}

func prefixes(rules []policy.Rule) []netip.Prefix {
	list := make([]netip.Prefix, len(rules))
	for i, r := range rules {
		list[i] = r.Prefix
	}
	return list
}
