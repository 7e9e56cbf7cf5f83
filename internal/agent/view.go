package agent

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/metrics"
	"bauta.dev/bauta/internal/policy"
)

// view is what the loop publishes of its state. It is never changed afterwards.
type view struct {
	file       PolicyFile // the policy in force, or, before the first apply, the wanted one
	agent      AgentStatus
	missing    []string // devices that the configuration names and no device has
	portsError string   // see PortsStatus.Error
	warnings   []string
	attached   []datapath.Attachment // by the owner of the data plane
	reloads    metrics.Reloads
}

// status is the view with what the kernel says now. A nil inspector leaves that out.
func (v *view) status(now time.Time, k inspector) (Status, error) {
	s := describe(v.file)
	s.Agent = v.agent
	if s.Agent.State == Running {
		s.Agent.UptimeSeconds = int64(now.Sub(s.Agent.Started) / time.Second)
	}
	for _, name := range v.missing {
		s.Devices = append(s.Devices, DeviceStatus{Name: name, State: DeviceMissing})
	}
	s.Ports.Error = v.portsError
	s.Warnings = append(s.Warnings, v.warnings...)
	var err error
	if k != nil {
		err = s.read(k)
	}
	slices.SortStableFunc(s.Devices, func(a, b DeviceStatus) int { return cmp.Or(cmp.Compare(a.Name, b.Name), a.Index-b.Index) })
	return s, err
}

// describe is what policy.json says, as a status. Devices are not known to be attached.
func describe(f PolicyFile) Status {
	s := Status{
		Masquerading: Masquerading{
			Enabled:             f.State4 != SourcesOff || f.State6 != SourcesOff,
			EnabledProtocols:    EnabledProtocols{IPv4: f.State4 != SourcesOff, IPv6: f.State6 != SourcesOff},
			Mode:                f.Mode,
			IPMasqAgent:         f.IPMasqAgent.Enabled,
			SNATExclusionCIDRv4: joined(ofFamilies(f.Native, true, false)),
			SNATExclusionCIDRv6: joined(ofFamilies(f.Native, false, true)),
		},
		Devices: []DeviceStatus{},
		Sources: Sources{
			IPv4: FamilySources{f.State4, ofFamilies(f.Sources, true, false)},
			IPv6: FamilySources{f.State6, ofFamilies(f.Sources, false, true)},
		},
		IPMasqAgent: f.IPMasqAgent,
		Nodes:       f.NodesFile,
		Ports:       PortsStatus{Ranges: f.Ports},
		Leaks:       LeaksStatus{Devices: []LeakStatus{}, Samples: []LeakStatus{}},
		Drops:       map[string]uint64{},
		Warnings:    []string{},
		Draining:    f.Draining,
	}
	for _, d := range f.Devices {
		s.Devices = append(s.Devices, DeviceStatus{
			Name: d.Name, Index: d.Index, State: DevicePending, IPv4: d.IPv4, IPv6: d.IPv6,
			Reason: d.Reason, Why4: d.Why4, Why6: d.Why6,
		})
	}
	if f.IPMasqAgent.Enabled {
		s.IPMasqAgent.Rules = f.NonMasq
		s.IPMasqAgent.Prefixes = len(f.NonMasq)
		s.Warnings = append(s.Warnings, f.IPMasqAgent.Warnings...)
	}
	s.Nodes.Known, s.Nodes.Addresses = countNodes(f.Nodes)
	if ports, err := f.ports(); err == nil { // a status is shown whatever the file says
		s.Ports.Pool = len(ports)
	}
	return s
}

func joined(rules []policy.Rule) string {
	texts := make([]string, len(rules))
	for i, r := range rules {
		texts[i] = r.Prefix.String()
	}
	return strings.Join(texts, " ")
}

// countNodes counts an address without a node's name as a node of its own.
func countNodes(list []policy.NodeAddr) (nodes, addresses int) {
	names := make(map[string]bool)
	addrs := make(map[netip.Addr]bool)
	for _, n := range list {
		names[cmp.Or(n.Node, n.Addr.String())] = true
		addrs[n.Addr] = true
	}
	return len(names), len(addrs)
}

// read adds what the kernel says: nothing of it is kept elsewhere.
func (s *Status) read(k inspector) error {
	attached, err := k.Attachments()
	if err != nil {
		return fmt.Errorf("read attachments: %w", err)
	}
	s.Datapath = DatapathStatus{Present: true, Applied: k.Applied(), Tier: k.Tier()}
	s.addAttached(attached)
	if m, ok := k.(netfilterMeter); ok {
		used, err := m.Conntrack()
		if err != nil {
			return err
		}
		s.Flows.Conntrack = &used
		if s.Drops, err = m.Drops(); err != nil {
			return fmt.Errorf("read counters: %w", err)
		}
		maps.DeleteFunc(s.Drops, func(_ string, n uint64) bool { return n == 0 })
	}
	if m, ok := k.(flowMeter); ok {
		return s.readMeter(m, attached)
	}
	return nil
}

// readMeter adds what only the programs of eBPF mode count.
func (s *Status) readMeter(k flowMeter, attached []datapath.Attachment) error {
	usage, err := k.Usage()
	if err != nil {
		return fmt.Errorf("read flow tables: %w", err)
	}
	worst, err := k.WorstPort()
	if err != nil {
		return fmt.Errorf("read port use: %w", err)
	}
	searches, err := k.PortSearches()
	if err != nil {
		return fmt.Errorf("read port searches: %w", err)
	}
	leaks, samples, err := k.Leaks()
	if err != nil {
		return err
	}
	counts, err := k.Counts()
	if err != nil {
		return fmt.Errorf("read counters: %w", err)
	}
	s.Flows = Flows{IPv4: usage[0], IPv6: usage[1]}
	s.Ports.Searches = &searches
	if worst.Used > 0 {
		s.Ports.Worst = &WorstPort{worst.Proto, worst.Addr, worst.Remote, worst.Used, worst.Pool}
	}
	if n := usage[0].Foreign + usage[1].Foreign; n > 0 {
		s.Warnings = append(s.Warnings, fmt.Sprintf("another masquerade is active: %d flows were already translated by netfilter "+
			"(a MASQUERADE or DNAT rule) when they left; their ports are respected", n))
	}
	s.addLeaks(attached, leaks, samples)
	s.addCounts(counts)
	return nil
}

func (s *Status) addAttached(attached []datapath.Attachment) {
	for _, a := range attached {
		i := slices.IndexFunc(s.Devices, func(d DeviceStatus) bool { return d.Index == a.Index && d.State != DeviceMissing })
		if i < 0 {
			s.Devices = append(s.Devices, DeviceStatus{Name: a.Device, Index: a.Index})
			i = len(s.Devices) - 1
			a.Draining = true // it is in no policy
		}
		d := &s.Devices[i]
		d.Hook, d.Ahead, d.State = a.Hook, a.Ahead, DeviceAttached
		if a.Draining {
			d.State = DeviceDraining
		}
		if len(a.Ahead) > 0 {
			s.Warnings = append(s.Warnings, fmt.Sprintf("device %s: other tc programs see leaving packets before Bauta and may take them away: %s",
				d.Name, strings.Join(a.Ahead, ", ")))
		}
	}
}

func (s *Status) addLeaks(attached []datapath.Attachment, sums, samples []datapath.Leak) {
	s.Leaks.Sentinel = len(attached) > 0 && !slices.ContainsFunc(attached, func(a datapath.Attachment) bool { return !a.Sentinel && !a.Draining })
	name := func(index int) string {
		i := slices.IndexFunc(s.Devices, func(d DeviceStatus) bool { return d.Index == index })
		if i < 0 {
			return fmt.Sprintf("%d (gone)", index)
		}
		return s.Devices[i].Name
	}
	convert := func(l datapath.Leak) LeakStatus {
		return LeakStatus{name(l.Index), l.Source, l.Destination, l.Proto, l.Packets, int64(l.First.Seconds()), int64(l.Last.Seconds())}
	}
	for _, l := range samples {
		s.Leaks.Samples = append(s.Leaks.Samples, convert(l))
	}
	for _, l := range sums {
		sum := convert(l)
		s.Leaks.Devices = append(s.Leaks.Devices, sum)
		s.Leaks.Packets += sum.Packets
		text := fmt.Sprintf("leak: %d packets left %s with an address that should have been masqueraded, the last %d s ago", sum.Packets, sum.Device, sum.LastSeconds)
		if i := slices.IndexFunc(s.Leaks.Samples, func(l LeakStatus) bool { return l.Device == sum.Device }); i >= 0 {
			text += fmt.Sprintf(", for example %s -> %s, protocol %d", s.Leaks.Samples[i].Source, s.Leaks.Samples[i].Destination, s.Leaks.Samples[i].Proto)
		}
		s.Warnings = append(s.Warnings, text)
	}
}

// noteworthy outcomes are no drops, but call for an operator.
var noteworthy = []policy.Outcome{policy.MasqHost, policy.PassInboundFull}

func (s *Status) addCounts(counts []datapath.Count) {
	noted := make(map[policy.Outcome]uint64)
	for _, c := range counts {
		switch {
		case c.Packets == 0:
		case c.Outcome.Verdict() == policy.Drop:
			s.Drops[c.Outcome.String()] += c.Packets
		case slices.Contains(noteworthy, c.Outcome):
			noted[c.Outcome] += c.Packets
		}
	}
	for _, o := range noteworthy {
		if n := noted[o]; n > 0 {
			info := o.Info()
			s.Warnings = append(s.Warnings, fmt.Sprintf("%s: %d packets: %s; %s", info.Name, n, info.Meaning, info.Remedy))
		}
	}
}
