package e2e_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// routeCase is the same world in each family. A is a prefix, b its upper half, and
// c the lower half of b.
type routeCase struct {
	name                   string
	world, node            func(*node) netip.Addr
	all, a, b, c           netip.Prefix
	inA, inB, inC, outside netip.Addr // outside is only in all
	srcs                   [4]netip.Addr
	length                 int
	keepsRoute             bool // a route stays when its source leaves the node
}

var routeCases = []routeCase{
	{
		name:  "IPv4",
		world: func(n *node) netip.Addr { return n.WorldAddr.V4 }, node: func(n *node) netip.Addr { return n.NodeAddr.V4 },
		all: lab.DefaultRoute4, a: netip.MustParsePrefix("203.0.113.0/24"), b: netip.MustParsePrefix("203.0.113.128/25"), c: netip.MustParsePrefix("203.0.113.128/26"),
		inA: netip.MustParseAddr("203.0.113.5"), inB: netip.MustParseAddr("203.0.113.200"), inC: netip.MustParseAddr("203.0.113.130"), outside: netip.MustParseAddr("198.18.7.7"),
		srcs:   [4]netip.Addr{netip.MustParseAddr("198.51.100.50"), netip.MustParseAddr("198.51.100.51"), netip.MustParseAddr("198.51.100.52"), netip.MustParseAddr("198.51.100.53")},
		length: 32,
	},
	{
		name:  "IPv6",
		world: func(n *node) netip.Addr { return n.WorldAddr.V6 }, node: func(n *node) netip.Addr { return n.NodeAddr.V6 },
		all: lab.DefaultRoute6, a: netip.MustParsePrefix("2001:db8:113::/64"), b: netip.MustParsePrefix("2001:db8:113:0:8000::/65"), c: netip.MustParsePrefix("2001:db8:113:0:8000::/66"),
		inA: netip.MustParseAddr("2001:db8:113::5"), inB: netip.MustParseAddr("2001:db8:113:0:c000::5"), inC: netip.MustParseAddr("2001:db8:113:0:8000::5"), outside: netip.MustParseAddr("2001:db8:777::7"),
		srcs:   [4]netip.Addr{netip.MustParseAddr("2001:db8:50::50"), netip.MustParseAddr("2001:db8:50::51"), netip.MustParseAddr("2001:db8:50::52"), netip.MustParseAddr("2001:db8:50::53")},
		length: 128, keepsRoute: true,
	},
}

// Connections get the source of the most specific route to their destination, and
// routes are followed while the agent runs (2.4).
func TestRouteSource(t *testing.T) {
	for _, c := range routeCases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			testRouteSource(newNode(t, lab.Options{}), c)
		})
	}
}

// testRouteSource starts the agent with further options, those of a mode.
func testRouteSource(n *node, c routeCase, options ...string) {
	t := n.t
	t.Helper()
	via := func(dst netip.Prefix, src netip.Addr) lab.Route {
		return lab.Route{Dst: dst, Via: c.world(n), Dev: "eth0", Src: src}
	}
	// On lo they are not what the device would masquerade with.
	for _, a := range c.srcs {
		must(t, n.Node.AddAddr("lo", netip.PrefixFrom(a, c.length)))
	}
	must(t, n.Node.AddRoute(via(c.a, c.srcs[0]))) // before the start
	n.start(append(options, podCIDRs, "--enable-masquerade-to-route-source")...)
	up := n.tapWorld()
	up.want(c.inA, c.srcs[0])
	up.want(c.outside, c.node(n))

	none := netip.Addr{}
	var took []time.Duration
	change := func(what string, do error, dst, src netip.Addr) {
		t.Helper()
		must(t, do)
		start := time.Now()
		up.await(dst, src)
		took = append(took, time.Since(start))
		if time.Since(start) > 5*time.Second {
			t.Errorf("%s: followed after %v", what, time.Since(start))
		}
	}
	// A longer route without a source has the device's address.
	change("a longer route", n.Node.AddRoute(via(c.b, none)), c.inB, c.node(n))
	change("one longer still", n.Node.AddRoute(via(c.c, c.srcs[1])), c.inC, c.srcs[1])
	up.want(c.inB, c.node(n))
	up.want(c.inA, c.srcs[0])
	change("default route", n.Node.AddRoute(via(c.all, c.srcs[2])), c.outside, c.srcs[2])
	up.want(c.inA, c.srcs[0])
	up.want(c.inB, c.node(n))
	must(t, n.Node.DelRoute(via(c.a, c.srcs[0])))
	change("other source", n.Node.AddRoute(via(c.a, c.srcs[3])), c.inA, c.srcs[3])
	change("route deleted", n.Node.DelRoute(via(c.c, c.srcs[1])), c.inC, c.node(n))

	// The source leaves the node: so do its mappings, and with IPv4 the route.
	rest := c.srcs[2]
	if c.keepsRoute {
		rest = c.node(n)
	}
	change("source deleted", n.Node.DelAddr("lo", netip.PrefixFrom(c.srcs[3], c.length)), c.inA, rest)
	within1s(t, "mappings of the source gone", n.awaitNoMappingOf(c.srcs[3]))
	within1s(t, "route changes followed", took...)

	n.restart()
	up.want(c.outside, c.srcs[2])
	n.restart("--enable-masquerade-to-route-source=false")
	up.want(c.outside, c.node(n))
}

// await sends until a new flow has the source.
func (w *uplink) await(dst, src netip.Addr) {
	w.n.t.Helper()
	labtest.Eventually(w.n.t, patience, func() error {
		if got := w.source(dst); got != src {
			return fmt.Errorf("to %s: source %s, want %s", dst, got, src)
		}
		return nil
	})
}
