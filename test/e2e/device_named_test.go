package e2e_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// attached are the names of the devices that masquerade.
func attached(st agent.Status) []string {
	names := []string{}
	for _, d := range st.Devices {
		if d.State == agent.DeviceAttached {
			names = append(names, d.Name)
		}
	}
	return names
}

func (n *node) awaitAttached(names ...string) agent.Status {
	n.t.Helper()
	return n.await("attached to "+strings.Join(names, ", "), func(st agent.Status) bool { return slices.Equal(attached(st), names) })
}

// plug adds an uplink to a world of its own.
func (n *node) plug(dev, node4, world4 string) (world *lab.NS) {
	n.t.Helper()
	world = labtest.NewNS(n.t)
	n.plugTo(world, dev, node4, world4)
	return world
}

func (n *node) plugTo(world *lab.NS, dev, node4, world4 string) {
	n.t.Helper()
	must(n.t, lab.Link(n.Node, dev, world, "eth0", lab.LinkOpts{
		AddrsA: []netip.Prefix{netip.MustParsePrefix(node4)}, AddrsB: []netip.Prefix{netip.MustParsePrefix(world4)},
	}))
}

// A device that is named but not there degrades, is taken when it appears, and
// again when it comes back after it was deleted.
func TestNamedDevice(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{}, "--devices=eth0,wan0", "--enable-ipv6-masquerade=false")
	n.awaitDegraded("wan0")
	wantBrief(t, n, "wan0")
	r := n.try("status")
	if line, rest, _ := strings.Cut(r.stdout, "\n"); r.code != 3 || !n.lineNames(line, "[eth0]") || !strings.Contains(rest, "wan0") {
		t.Errorf("status: exit %d\n%s", r.code, r.stdout)
	}
	n.tapWorld().want(n.WorldAddr.V4, n.NodeAddr.V4)

	dst := netip.MustParseAddr("203.0.113.2")
	for i := range 2 {
		world := n.plug("wan0", "203.0.113.1/24", "203.0.113.2/24")
		st := n.awaitAttached("eth0", "wan0")
		if line := n.awaitOK().Line(); !n.lineNames(line, "[eth0, wan0]") {
			t.Errorf("%d: %s", i, line)
		}
		w := n.tap(world)
		w.want(dst, netip.MustParseAddr("203.0.113.1"))
		index := st.Devices[1].Index
		must(t, n.Node.DeleteLink("wan0"))
		st = n.awaitDegraded("wan0 is missing")
		if i := slices.IndexFunc(st.Devices, func(d agent.DeviceStatus) bool { return d.Index == index }); i >= 0 {
			t.Errorf("the deleted device is still shown: %+v", st.Devices[i])
		}
	}
	within1s(t, "mappings gone with the device", n.awaitNoMappingOf(netip.MustParseAddr("203.0.113.1")))
}

// Patterns: a prefix takes what appears, an exclude is never taken.
func TestDevicePatterns(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{SecondUplink: true}, "--devices=eth+,!eth2")
	n.awaitAttached("eth0", "eth1")
	n.tap(n.World2).want(n.WorldAddr2.V4, n.NodeAddr2.V4)
	n.plug("eth2", "198.51.101.1/24", "198.51.101.2/24")
	n.plug("eth3", "198.51.102.1/24", "198.51.102.2/24")
	n.awaitAttached("eth0", "eth1", "eth3")
}

// Auto-detection takes devices with a default route, also those that get one
// later, and leaves those of the pods alone; an exclude holds for it too.
func TestAutoDetection(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{SecondUplink: true, Pods: 2}, "--devices=!eth9")
	n.awaitAttached("eth0")
	w := n.tap(n.World2)
	w.want(n.WorldAddr2.V4, n.PodAddrs[0].V4)
	must(t, n.Node.AddRoute(lab.Route{Dst: lab.DefaultRoute4, Via: n.WorldAddr2.V4, Metric: 700}))
	n.awaitAttached("eth0", "eth1")
	w.want(n.WorldAddr2.V4, n.NodeAddr2.V4)
	// It stays without its route.
	must(t, n.Node.DelRoute(lab.Route{Dst: lab.DefaultRoute4, Via: n.WorldAddr2.V4, Metric: 700}))
	before := n.state().Agent.LastApply
	must(t, n.Node.AddAddr("eth1", netip.MustParsePrefix("203.0.113.99/24")))
	n.await("applied", func(st agent.Status) bool { return st.Agent.LastApply.After(before) })
	n.awaitAttached("eth0", "eth1")
	w.want(n.WorldAddr2.V4, n.NodeAddr2.V4)

	hot := n.plug("wan1", "198.51.101.1/24", "198.51.101.2/24")
	must(t, n.Node.AddRoute(lab.Route{Dst: lab.DefaultRoute4, Via: netip.MustParseAddr("198.51.101.2"), Metric: 900}))
	n.plug("eth9", "198.51.102.1/24", "198.51.102.2/24")
	must(t, n.Node.AddRoute(lab.Route{Dst: lab.DefaultRoute4, Via: netip.MustParseAddr("198.51.102.2"), Metric: 901}))
	n.awaitAttached("eth0", "eth1", "wan1")
	n.tap(hot).want(netip.MustParseAddr("198.51.101.2"), netip.MustParseAddr("198.51.101.1"))
}
