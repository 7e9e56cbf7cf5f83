package agent

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/nodes"
	"bauta.dev/bauta/internal/policy"
)

// cluster knows the Node objects.
type cluster interface {
	Snapshot() nodes.Snapshot
}

// nodeOrigin begins the origin of what a Node object says.
const nodeOrigin = "node "

// readKube takes what the cluster says. Until that is known, and where its Node object has
// no pod ranges, what the last run had in force stays.
func (l *loop) readKube() {
	snap, before := l.kube.Snapshot(), l.earlier.kube(l.cfg.NodeName, l.cfg.IPv4, l.cfg.IPv6 && !l.facts.noIPv6)
	was := l.facts.kube
	l.facts.kube = kubeFacts{known: snap.Synced || before.known, own: snap.Own, pods: snap.Pods, nodes: snap.Nodes}
	if !snap.Synced {
		l.facts.kube = before
	}
	if len(l.facts.kube.own) == 0 {
		l.facts.kube.own = before.own
	}
	if snap.Synced && !l.kubeSynced {
		l.kubeSynced = true
		l.log.Info("nodes known", "nodes", snap.Known, "addresses", len(snap.Nodes))
	}
	if !slices.Equal(was.own, l.facts.kube.own) && was.known {
		l.log.Info("pod ranges of this node changed", "ranges", l.facts.kube.own)
		l.foreign.due = true // rules of others may match those
	}
}

// ownTimeout is how long a take-over waits at the start for the Node object.
const ownTimeout = 30 * time.Second

// ownSources asks for the pod ranges of this node where a take-over has to know them at once.
// While the API server is away those of the last run do: what it took over is gone.
func ownSources(ctx context.Context, cfg config.Config, kube *nodes.Client, runDir string) ([]policy.Rule, error) {
	if kube == nil || cfg.TakeOver == "" {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, ownTimeout)
	defer cancel()
	own, err := kube.Own(ctx)
	if file, fileErr := ReadPolicyFile(runDir); err != nil && fileErr == nil {
		own = earlier{applied: true, file: &file}.kube(cfg.NodeName, cfg.IPv4, cfg.IPv6 && hasIPv6()).own
	}
	if err != nil && len(own) == 0 && len(cfg.PodCIDRs) == 0 {
		return nil, advice.New(fmt.Errorf("take-over: the pod ranges of this node: %w", err), "give them with pod-cidrs, or try again when the API server answers")
	}
	return ownRules(cfg, kubeFacts{own: own}), nil
}

// kubeFacts is what is known of the cluster, now or from the last run.
type kubeFacts struct {
	known bool
	own   []netip.Prefix
	pods  []policy.Rule
	nodes []policy.NodeAddr
}

// kube is what an agent before this one knew of the cluster, if it was the agent of this node
// and had an eye on each family that is on now. A file of another node has this node's range
// among those of others.
func (e earlier) kube(node string, ipv4, ipv6 bool) (k kubeFacts) {
	f := e.file
	if !e.applied || f == nil || f.Node == "" || f.Node != node ||
		ipv4 && f.State4 == SourcesOff || ipv6 && f.State6 == SourcesOff {
		return k
	}
	k.known = true
	for _, r := range f.Sources {
		if strings.HasPrefix(r.Origin, nodeOrigin) {
			k.own = append(k.own, r.Prefix)
		}
	}
	for _, n := range f.Nodes {
		if strings.HasPrefix(n.Origin, nodeOrigin) {
			k.nodes = append(k.nodes, n)
		}
	}
	k.pods = f.Pods
	return k
}

// ownRules are the pod ranges of this node as rules.
func ownRules(cfg config.Config, k kubeFacts) []policy.Rule {
	rules := make([]policy.Rule, len(k.own))
	for i, p := range k.own {
		rules[i] = policy.Rule{Prefix: p, Origin: nodeOrigin + cfg.NodeName}
	}
	return rules
}

// others are the addresses of other nodes: none that this one has, whatever a Node object of
// a former name says.
func others(list []policy.NodeAddr, own []netip.Addr) []policy.NodeAddr {
	mine := make(map[netip.Addr]bool, len(own))
	for _, a := range own {
		mine[a.WithZone("")] = true
	}
	return slices.DeleteFunc(slices.Clone(list), func(n policy.NodeAddr) bool { return mine[n.Addr] })
}

// waits says what a policy can't be made without yet, or nothing. Without the other nodes
// their pods would be masqueraded towards; without a source range nothing would be.
func (l *loop) waits() string {
	switch {
	case l.kube == nil || !l.cfg.IPv4 && !l.cfg.IPv6:
		return ""
	case !l.facts.kube.known:
		return "the nodes of the cluster are not known yet"
	case len(l.facts.kube.own) == 0 && len(l.cfg.PodCIDRs) == 0 && !l.cfg.MasqueradeForwarded:
		return "no source range yet: the Node object of this node has no podCIDRs"
	}
	return ""
}

// wait tells whether a policy can't be made yet. The log has why, once for each reason: with the
// log alone an agent that waits would look like one that hangs.
func (l *loop) wait() bool {
	l.agent.Waiting = l.waits()
	if l.agent.Waiting == "" {
		l.waitSaid = ""
		return false
	}
	snap := l.kube.Snapshot()
	why := cmp.Or(snap.Error, snap.Problem)
	if said := l.agent.Waiting + why; said != l.waitSaid {
		l.waitSaid = said
		if why == "" {
			l.log.Info("no policy yet, waiting", "for", l.agent.Waiting)
		} else {
			l.log.Warn("no policy yet, waiting", "for", l.agent.Waiting, "error", why)
		}
	}
	return true
}

// kubeStatus is what the status says of the cluster.
func kubeStatus(cfg config.Config, k cluster) *KubernetesStatus {
	if k == nil {
		return nil
	}
	snap := k.Snapshot()
	s := &KubernetesStatus{
		Node: cfg.NodeName, Synced: snap.Synced, Nodes: snap.Known, LastSync: snap.LastSync,
		Error: snap.Error, Problem: snap.Problem, EventsLost: snap.LostEvents,
	}
	if snap.Error != "" {
		s.ErrorSince = snap.Since
	}
	// Where a network plugin has ranges of its own, Node objects have none.
	if snap.Unranged && len(snap.Own) == 0 && (len(cfg.PodCIDRs) > 0 || cfg.MasqueradeForwarded) {
		s.Problem = ""
	}
	return s
}

// kubeWarnings are what is odd about the cluster, but leaves the policy in force.
func (l *loop) kubeWarnings() []string {
	if l.kube == nil {
		return nil
	}
	snap := l.kube.Snapshot()
	list := slices.Clone(snap.Rejected)
	if snap.Error != "" && l.facts.kube.known {
		list = append(list, fmt.Sprintf("API server: %s: what was known of the nodes stays in force", snap.Error))
	}
	if text := tunnelWarning(l.cfg, l.facts.kube.pods, l.facts.network); text != "" {
		list = append(list, text)
	}
	return list
}

// tunnelWarning tells that pod ranges of other nodes are reached through a tunnel (2.2): then
// addresses of pods may be unknown to the network that the nodes are in.
func tunnelWarning(cfg config.Config, pods []policy.Rule, s devices.Snapshot) string {
	if cfg.RemoteNodesSet || len(pods) == 0 {
		return ""
	}
	prefix, device, ok := s.Tunneled(prefixes(pods))
	if !ok {
		return ""
	}
	return fmt.Sprintf("pods of other nodes are reached through the tunnel %s (%s): where the nodes' network does not know addresses of pods, "+
		"set remote-node-masquerade to all; none says that it does", device, prefix)
}

// kubePause is the pause after a policy for a change of the cluster: what happens meanwhile is one
// change. With many nodes a policy is work for a moment, and in a cluster that never rests the
// agent is at work for a fifth of the time at most. A single change waits for nothing.
func kubePause(used time.Duration) time.Duration {
	const shortest, share = 400 * time.Millisecond, 5
	return max(shortest, used*(share-1))
}
