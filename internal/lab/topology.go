package lab

import (
	"errors"
	"fmt"
	"net/netip"
)

// Options choose a variant of the standard topology; the zero value is one pod,
// one node, one world, anonymous.
type Options struct {
	// Prefix names the namespaces PREFIX-node, PREFIX-pod0, PREFIX-world ...;
	// empty = anonymous.
	Prefix string
	// Pods is the number of pods; 0 = 1.
	Pods int
	// PodBridge puts the pods behind a bridge cni0 that has the gateway address,
	// instead of a routed veth each.
	PodBridge bool
	// SecondUplink adds eth1 and a world of its own behind it.
	SecondUplink bool
	// Router adds a hop between node and world.
	Router bool
	// RouterMTU is the MTU between router and world; 0 = 1280.
	RouterMTU int
	// RemoteNode adds another node of the cluster to the network of eth0.
	RemoteNode bool
	// WorldKnowsPods gives the world a route to the pods for packets from Excluded
	// and Excluded10: what an excluded destination has in reality.
	WorldKnowsPods bool
	// NoOffload switches offloads off on every link: captured packets then have
	// final checksums and wire size.
	NoOffload bool
}

// Topology is a network of namespaces. Absent parts are nil or invalid.
type Topology struct {
	Pods   []*NS
	Node   *NS
	World  *NS
	World2 *NS // behind eth1
	Router *NS
	Remote *NS // the remote cluster node
	Switch *NS

	PodAddrs   []Pair
	PodGateway Pair // the node, as pods see it
	NodeAddr   Pair // on eth0: the source the world should see
	NodeAddr2  Pair // on eth1
	WorldAddr  Pair
	WorldAddr2 Pair
	// Excluded and Excluded10 are the world's addresses for destinations that are
	// not masqueraded. They are reached like WorldAddr.
	Excluded   Pair
	Excluded10 netip.Addr
	// RouterAddr is what answers a packet of the node whose TTL ends at the router.
	RouterAddr     Pair
	RemoteAddr     Pair
	RemotePod      Pair
	RemoteExternal netip.Addr

	all []*NS
}

// Node builds the standard topology. Close removes it.
func Node(o Options) (*Topology, error) {
	if o.Pods == 0 {
		o.Pods = 1
	}
	if o.Pods < 0 || o.Pods > maxPods {
		return nil, fmt.Errorf("topology: %d pods: at most %d", o.Pods, maxPods)
	}
	if o.RouterMTU == 0 {
		o.RouterMTU = 1280
	}
	t := &Topology{
		PodGateway: podGateway, NodeAddr: nodeAddr, WorldAddr: worldAddr,
		Excluded: excluded, Excluded10: excluded10,
	}
	steps := []func(Options) error{t.makeNode, t.makePods, t.makeUplink}
	if o.SecondUplink {
		steps = append(steps, t.makeSecondUplink)
	}
	if o.WorldKnowsPods {
		steps = append(steps, t.routeToPods)
	}
	for _, step := range steps {
		if err := step(o); err != nil {
			return nil, errors.Join(fmt.Errorf("topology: %w", err), t.Close())
		}
	}
	return t, nil
}

// Namespaces returns every namespace of the topology.
func (t *Topology) Namespaces() []*NS { return t.all }

// Keep makes Close leave named namespaces in place, with all that is in them.
func (t *Topology) Keep() {
	for _, ns := range t.all {
		ns.Keep()
	}
}

// Close removes every namespace. It may be called again.
func (t *Topology) Close() error {
	var errs []error
	for _, ns := range t.all {
		errs = append(errs, ns.Close())
	}
	return errors.Join(errs...)
}

func (t *Topology) newNS(o Options, role string) (*NS, error) {
	name := ""
	if o.Prefix != "" {
		name = o.Prefix + "-" + role
	}
	ns, err := NewNS(name)
	if err == nil {
		t.all = append(t.all, ns)
	}
	return ns, err
}

// newForwarder makes a namespace that forwards both families.
func (t *Topology) newForwarder(o Options, role string) (*NS, error) {
	ns, err := t.newNS(o, role)
	if err != nil {
		return nil, err
	}
	return ns, errors.Join(
		ns.Sysctl("net.ipv4.ip_forward", "1"),
		ns.Sysctl("net.ipv6.conf.all.forwarding", "1"),
		// A node that sends redirects would add packets no test asked for.
		ns.Sysctl("net.ipv4.conf.all.send_redirects", "0"),
		ns.Sysctl("net.ipv4.conf.default.send_redirects", "0"),
	)
}

func (t *Topology) makeNode(o Options) (err error) {
	t.Node, err = t.newForwarder(o, "node")
	return err
}

func (t *Topology) makePods(o Options) error {
	if o.PodBridge {
		if err := t.Node.AddBridge("cni0"); err != nil {
			return err
		}
		for _, p := range podGateway.prefixes(PodRange4.Bits(), PodRange6.Bits()) {
			if err := t.Node.AddAddr("cni0", p); err != nil {
				return err
			}
		}
	}
	for i := range o.Pods {
		pod, err := t.newNS(o, fmt.Sprintf("pod%d", i))
		if err != nil {
			return err
		}
		t.Pods = append(t.Pods, pod)
		t.PodAddrs = append(t.PodAddrs, podAddr(i))
		if o.PodBridge {
			err = t.plugPod(o, i)
		} else {
			err = t.routePod(o, i)
		}
		if err != nil {
			return err
		}
		if err := defaultVia(pod, podGateway); err != nil {
			return err
		}
	}
	return nil
}

// routePod connects a pod by a veth pair with a route, as most CNIs do. The
// gateway address is on every such device, with no prefix.
func (t *Topology) routePod(o Options, i int) error {
	pod, addr, dev := t.Pods[i], t.PodAddrs[i], fmt.Sprintf("pod%d", i)
	err := Link(t.Node, dev, pod, "eth0", LinkOpts{
		AddrsA: podGateway.hosts(), AddrsB: addr.hosts(), NoOffload: o.NoOffload,
	})
	if err != nil {
		return err
	}
	for _, p := range podGateway.hosts() {
		if err := pod.AddRoute(Route{Dst: p, Dev: "eth0"}); err != nil {
			return err
		}
	}
	for _, p := range addr.hosts() {
		if err := t.Node.AddRoute(Route{Dst: p, Dev: dev}); err != nil {
			return err
		}
	}
	return nil
}

// plugPod connects a pod to the bridge.
func (t *Topology) plugPod(o Options, i int) error {
	pod, addr, dev := t.Pods[i], t.PodAddrs[i], fmt.Sprintf("pod%d", i)
	err := Link(t.Node, dev, pod, "eth0", LinkOpts{
		AddrsB: addr.prefixes(PodRange4.Bits(), PodRange6.Bits()), NoOffload: o.NoOffload,
	})
	if err != nil {
		return err
	}
	if err := t.Node.AddPort("cni0", dev); err != nil {
		return err
	}
	return t.Node.awaitReady("cni0")
}
