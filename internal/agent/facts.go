package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/policy"
)

// facts is what a policy depends on besides the options.
type facts struct {
	network  devices.Snapshot
	attached []datapath.Attachment
	ports    []uint16          // the external ones
	nonMasq  []policy.Rule     // the ip-masq-agent list in force
	nodes    []policy.NodeAddr // those of the nodes-file in force
	kube     kubeFacts
	noIPv6   bool // the kernel has no IPv6
}

// read reads what is stale. Files that are bad leave the last good state, so only
// the kernel can make an error here.
func (l *loop) read() error {
	now := time.Now()
	if l.stale.ipMasq && l.ipMasq != nil {
		l.noteReload(now, l.ipMasq.reload(now, l.earlier, l.log), l.ipMasq.err)
		l.facts.nonMasq = l.ipMasq.list.Rules
	}
	if l.stale.nodes && l.nodes != nil {
		l.noteReload(now, l.nodes.reload(now, l.earlier, l.log), l.nodes.err)
		l.facts.nodes = l.nodes.nodes
	}
	if l.stale.kube && l.kube != nil {
		l.readKube()
	}
	if l.stale.options {
		l.noteReload(now, l.options.reload(l.log), l.options.err)
	}
	l.stale.ipMasq, l.stale.nodes, l.stale.options, l.stale.kube = false, false, false, false
	if l.stale.network {
		network, err := l.readNetwork()
		if err != nil {
			return fmt.Errorf("read the network configuration: %w", err)
		}
		l.facts.network, l.stale.network = network, false
	}
	l.facts.attached = l.attached()
	if l.stale.reserved {
		reserved, err := l.readReserved()
		if err != nil {
			return fmt.Errorf("read reserved ports: %w", err)
		}
		l.reserved, l.stale.reserved = reserved, false
	}
	l.readPool()
	return nil
}

// readPool finds the external ports. A pool that would be empty is not taken:
// applying nothing any more were worse than using ports that somebody reserved.
func (l *loop) readPool() {
	taken := slices.Clone(l.reserved)
	for _, p := range l.facts.network.TunnelPorts() {
		taken = append(taken, config.PortRange{First: p, Last: p})
	}
	if pool := l.cfg.Ports(taken); config.Usable(pool) {
		l.facts.ports, l.portsError = pool, ""
		return
	}
	l.portsError = fmt.Sprintf("no external port is left without ip_local_reserved_ports and the ports of tunnels, %s stay in use (widen snat-port-range)",
		portRanges(l.facts.ports))
}

// attached are the devices that masquerade. Before the first apply only the policy
// that an earlier agent left knows which of them masquerade and which drain.
func (l *loop) attached() []datapath.Attachment {
	if l.inForce == nil {
		return l.earlier.attached
	}
	return l.kernel.Attached()
}

// loses tells whether an address that mappings may use has left the node.
func loses(before, now policy.Input) bool {
	have := make(map[netip.Addr]bool)
	for _, a := range ownAddrs(now) {
		have[a] = true
	}
	return slices.ContainsFunc(ownAddrs(before), func(a netip.Addr) bool { return !have[a] })
}

// ownAddrs are the addresses that mappings may use: a device may have that of
// another one.
func ownAddrs(in policy.Input) []netip.Addr {
	addrs := slices.Clone(in.HostAddrs)
	for _, d := range in.Devices {
		addrs = append(addrs, d.IPv4, d.IPv6)
	}
	for _, r := range in.RouteSources {
		addrs = append(addrs, r.Source)
	}
	return addrs
}
