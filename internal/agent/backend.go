package agent

import (
	"context"
	"errors"
	"net/netip"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/iptables"
	"bauta.dev/bauta/internal/policy"
)

// backend makes the kernel follow a policy, in either mode.
type backend interface {
	Apply(context.Context, *policy.Policy) error
	Attached() []datapath.Attachment
	Healthy(context.Context) bool // cheaper than Apply; false: Apply repairs it
	// Walk ends the mappings whose address has left the node. It may run beside the others.
	Walk(context.Context) (datapath.Swept, error)
	Warnings() []string
	Close() error
}

// flowKeeper is a backend that keeps the flows itself, in eBPF mode: netfilter expires
// its own, and knows tunnels by itself.
type flowKeeper interface {
	SetTunnels([]datapath.Tunnel) error
	Drain(datapath.Swept) error
}

// bpf is the data plane of eBPF mode.
type bpf struct{ *datapath.Datapath }

func (b bpf) Healthy(context.Context) bool { return b.Datapath.Healthy() }
func (b bpf) Warnings() []string           { return nil }

// inspector reads what is in the kernel, whoever put it there.
type inspector interface {
	Exclusions() ([]netip.Prefix, error)
	Attachments() ([]datapath.Attachment, error)
	Applied() bool
	Tier() string
	Close() error
}

// flowMeter is what the programs of eBPF mode count.
type flowMeter interface {
	Counts() ([]datapath.Count, error)
	Usage() ([2]datapath.Usage, error)
	WorstPort() (datapath.PortUse, error)
	Leaks() (devices, samples []datapath.Leak, err error)
	PortSearches() (datapath.PortSearches, error)
}

// netfilterMeter is what netfilter counts instead.
type netfilterMeter interface {
	Conntrack() (ConntrackUsage, error)
	Drops() (map[string]uint64, error) // by reason, also those that have dropped none
}

// modeOf is the mode by the name that the status has.
func modeOf(bpf bool) string {
	if bpf {
		return ModeBPF
	}
	return ModeIPTables
}

// partly tells whether, in spite of an error, a policy is in force: on some devices, or for
// one family, or for new connections only.
func partly(err error) bool {
	return errors.Is(err, datapath.ErrAttach) || errors.Is(err, iptables.ErrPartly) || errors.Is(err, errRenew)
}

// isNone tells whether an inspection found nothing of ours.
func isNone(err error) bool {
	return errors.Is(err, datapath.ErrNone) || errors.Is(err, iptables.ErrNone)
}

// isFlowMeter tells whether an inspection is of eBPF mode.
func isFlowMeter(k inspector) bool {
	_, ok := k.(flowMeter)
	return ok
}
