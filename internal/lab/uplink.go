package lab

import "net/netip"

// excludedTable is the world's routing table for packets from excluded addresses.
const excludedTable = 100

// defaultVia adds the default routes of both families.
func defaultVia(ns *NS, gw Pair) error {
	if err := ns.AddRoute(Route{Dst: DefaultRoute4, Via: gw.V4}); err != nil {
		return err
	}
	return ns.AddRoute(Route{Dst: DefaultRoute6, Via: gw.V6})
}

// routesVia adds routes to prefixes of either family.
func routesVia(ns *NS, gw Pair, table int, dsts ...netip.Prefix) error {
	for _, dst := range dsts {
		if err := ns.AddRoute(Route{Dst: dst, Via: gw.Of(dst.Addr()), Table: table}); err != nil {
			return err
		}
	}
	return nil
}

func (t *Topology) excludedHosts() []netip.Prefix {
	return append(t.Excluded.hosts(), netip.PrefixFrom(t.Excluded10, 32))
}

// makeUplink builds what is behind eth0: the world, and before it, if asked
// for, a switch with the remote node, and a router.
func (t *Topology) makeUplink(o Options) (err error) {
	if t.World, err = t.newNS(o, "world"); err != nil {
		return err
	}
	for _, p := range t.excludedHosts() {
		if err := t.World.AddAddr("lo", p); err != nil {
			return err
		}
	}
	next, gateway := t.World, t.WorldAddr
	if o.Router {
		if err := t.makeRouter(o); err != nil {
			return err
		}
		next, gateway = t.Router, routerInner
	}
	if o.RemoteNode {
		err = t.makeSwitch(o, next, gateway)
	} else {
		err = Link(t.Node, "eth0", next, "eth0", uplinkOpts(o, t.NodeAddr, gateway))
	}
	if err != nil {
		return err
	}
	if err := defaultVia(t.Node, gateway); err != nil {
		return err
	}
	if o.RemoteNode {
		return t.makeRemote(o, gateway)
	}
	return nil
}

func uplinkOpts(o Options, a, b Pair) LinkOpts {
	return LinkOpts{AddrsA: a.prefixes(24, 64), AddrsB: b.prefixes(24, 64), NoOffload: o.NoOffload}
}

// makeRouter puts the world behind a router. Towards the node the router has
// eth0, towards the world eth1.
func (t *Topology) makeRouter(o Options) (err error) {
	if t.Router, err = t.newForwarder(o, "router"); err != nil {
		return err
	}
	t.RouterAddr, t.WorldAddr = routerInner, farWorldAddr
	// Both ends have the small MTU: a veth drops what is too big for its peer
	// without a word, and the router must be the one to complain.
	far := uplinkOpts(o, routerOuter, farWorldAddr)
	far.MTU = o.RouterMTU
	if err := Link(t.Router, "eth1", t.World, "eth0", far); err != nil {
		return err
	}
	if err := routesVia(t.World, routerOuter, 0, UplinkRange4, UplinkRange6); err != nil {
		return err
	}
	return routesVia(t.Router, farWorldAddr, 0, t.excludedHosts()...)
}

// makeSwitch joins node, next hop and remote node to one network.
func (t *Topology) makeSwitch(o Options, next *NS, nextAddr Pair) (err error) {
	if t.Switch, err = t.newNS(o, "switch"); err != nil {
		return err
	}
	if t.Remote, err = t.newForwarder(o, "remote"); err != nil {
		return err
	}
	t.RemoteAddr, t.RemotePod, t.RemoteExternal = remoteAddr, remotePod, remoteExternal
	if err := t.Switch.AddBridge("br0"); err != nil {
		return err
	}
	for _, m := range []struct {
		port string
		ns   *NS
		addr Pair
	}{{"node", t.Node, t.NodeAddr}, {"next", next, nextAddr}, {"remote", t.Remote, t.RemoteAddr}} {
		if err := Link(t.Switch, m.port, m.ns, "eth0", LinkOpts{AddrsB: m.addr.prefixes(24, 64), NoOffload: o.NoOffload}); err != nil {
			return err
		}
		if err := t.Switch.AddPort("br0", m.port); err != nil {
			return err
		}
	}
	return t.Switch.awaitReady("br0")
}

// makeRemote gives the remote node its addresses, and both nodes the routes to
// each other's pods.
func (t *Topology) makeRemote(o Options, gateway Pair) error {
	for _, p := range append(t.RemotePod.hosts(), netip.PrefixFrom(t.RemoteExternal, 32)) {
		if err := t.Remote.AddAddr("lo", p); err != nil {
			return err
		}
	}
	if err := defaultVia(t.Remote, gateway); err != nil {
		return err
	}
	if err := routesVia(t.Remote, t.NodeAddr, 0, PodRange4, PodRange6); err != nil {
		return err
	}
	return routesVia(t.Node, t.RemoteAddr, 0, RemotePodRange4, RemotePodRange6, netip.PrefixFrom(t.RemoteExternal, 32))
}

func (t *Topology) makeSecondUplink(o Options) (err error) {
	if t.World2, err = t.newNS(o, "world2"); err != nil {
		return err
	}
	t.NodeAddr2, t.WorldAddr2 = node2Addr, world2Addr
	return Link(t.Node, "eth1", t.World2, "eth0", uplinkOpts(o, node2Addr, world2Addr))
}

// routeToPods lets the world answer pods, but only from its excluded addresses:
// its answers to a leak towards WorldAddr still have nowhere to go.
func (t *Topology) routeToPods(o Options) error {
	next := t.NodeAddr
	if t.Router != nil {
		next = routerOuter
		// The router itself has no opinion on sources.
		if err := routesVia(t.Router, t.NodeAddr, 0, PodRange4, PodRange6); err != nil {
			return err
		}
	}
	if err := routesVia(t.World, next, excludedTable, PodRange4, PodRange6); err != nil {
		return err
	}
	for _, p := range t.excludedHosts() {
		if err := t.World.AddRule(p, excludedTable); err != nil {
			return err
		}
	}
	return nil
}
