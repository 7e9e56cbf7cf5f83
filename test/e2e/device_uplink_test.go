package e2e_test

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// The default route moves to another device and back while connections are busy,
// and that device is taken away and put back: a connection keeps its address
// wherever it leaves, new ones get that of their device, nothing leaks.
func TestUplinkMovesUnderLoad(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{Pods: 2, SecondUplink: true}, "--devices=eth0,eth1")
	first, second := n.watchWire(), n.watchDevice("eth1")
	var here, there []netip.AddrPort
	for i, dst := range n.Excluded.All() { // not excluded here: addresses behind the default route
		must(t, n.World2.AddAddr("lo", netip.PrefixFrom(dst, dst.BitLen())))
		at := netip.AddrPortFrom(dst, uint16(7000+i))
		here = append(here, server(t, lab.EchoTCP, n.World, at))
		there = append(there, server(t, lab.EchoTCP, n.World2, at))
	}
	route := func(world lab.Pair) {
		t.Helper()
		must(t, n.Node.AddRoute(lab.Route{Dst: lab.DefaultRoute4, Via: world.V4}))
		must(t, n.Node.AddRoute(lab.Route{Dst: lab.DefaultRoute6, Via: world.V6}))
	}
	seenAs := func(servers []netip.AddrPort, node lab.Pair) {
		t.Helper()
		for _, at := range servers {
			seen, c, err := lab.AskTCP(within(t, 10*time.Second), n.Pods[1], netip.AddrPort{}, at)
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
			if seen.Addr() != node.Of(at.Addr()) {
				t.Errorf("%s saw %s, want %s", at, seen, node.Of(at.Addr()))
			}
		}
	}
	k := converse(t, n.Pods[0], 20, here...)
	k.goesOn(t, "before")
	before := n.mappings()
	// What the old connections send on the new way has their old address; the world
	// there does not know it, and has no way to answer.
	strays := second.capture.Count(func(p lab.Packet) bool {
		f, ok := lab.ParseFrame(p.Data)
		return ok && p.Outgoing && f.Src == n.NodeAddr.Of(f.Src)
	})
	for range 2 {
		route(n.WorldAddr2)
		seenAs(there, n.NodeAddr2)
		labtest.Eventually(t, 10*time.Second, func() error {
			if strays.N() == 0 {
				return errors.New("no packet of the old connections on eth1")
			}
			return nil
		})
		route(n.WorldAddr)
		k.goesOn(t, "route back")
		seenAs(here, n.NodeAddr)
	}
	second.check(t)

	for i := range 2 {
		must(t, n.Node.DeleteLink("eth1"))
		k.goesOn(t, "eth1 gone")
		must(t, lab.Link(n.Node, "eth1", n.World2, "eth0", lab.LinkOpts{
			AddrsA: []netip.Prefix{netip.PrefixFrom(n.NodeAddr2.V4, 24), netip.PrefixFrom(n.NodeAddr2.V6, 64)},
			AddrsB: []netip.Prefix{netip.PrefixFrom(n.WorldAddr2.V4, 24), netip.PrefixFrom(n.WorldAddr2.V6, 64)},
		}))
		again := n.watchDevice("eth1")
		n.awaitAttached("eth0", "eth1")
		n.awaitOK()
		route(n.WorldAddr2)
		seenAs(there, n.NodeAddr2)
		route(n.WorldAddr)
		k.goesOn(t, fmt.Sprintf("eth1 back, %d", i+1))
		again.check(t)
	}
	sameMappings(t, "afterwards", before, n.mappings())
	first.check(t)
}
