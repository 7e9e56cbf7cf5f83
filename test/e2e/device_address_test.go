package e2e_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// awaitNoMappingOf waits until no mapping has the external address, and returns how
// long that took.
func (n *node) awaitNoMappingOf(a netip.Addr) time.Duration {
	n.t.Helper()
	start := time.Now()
	labtest.Eventually(n.t, patience, func() error {
		var list []struct{ Xlate, Dir, Src string }
		n.cliJSON(&list, "bpf", "nat", "list")
		for _, m := range list {
			if m.Dir == "OUT" && m.Xlate == a.String() {
				return fmt.Errorf("a mapping of %s: %+v", a, m)
			}
		}
		return nil
	})
	return time.Since(start)
}

// mapped counts the mappings of pods.
func (n *node) mapped() (flows int) {
	n.t.Helper()
	var list []struct{ Dir string }
	n.cliJSON(&list, "bpf", "nat", "list")
	for _, m := range list {
		if m.Dir == "OUT" {
			flows++
		}
	}
	return flows
}

// Without an address the device stays attached, and packets are dropped rather
// than sent with the pod's source; another address is used within a second.
func TestDeviceLosesAddress(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{})
	up, w := n.tapWorld(), n.watchWire()
	up.want(n.WorldAddr.V4, n.NodeAddr.V4)
	up.want(n.WorldAddr.V6, n.NodeAddr.V6)

	must(t, n.Node.DelAddr("eth0", netip.PrefixFrom(n.NodeAddr.V4, 24)))
	must(t, n.Node.DelAddr("eth0", netip.PrefixFrom(n.NodeAddr.V6, 64)))
	within1s(t, "mappings of the vanished addresses gone", max(n.awaitNoMappingOf(n.NodeAddr.V4), n.awaitNoMappingOf(n.NodeAddr.V6)))
	n.awaitAttached("eth0")
	n.awaitDegraded("no IPv4 address")
	n.awaitDegraded("no IPv6 address")
	wantBrief(t, n, "eth0", "IPv4", "IPv6")
	// Only with a route do packets still come to the device.
	must(t, n.Node.AddRoute(lab.Route{Dst: lab.DefaultRoute4, Dev: "eth0"}))
	up.drops(n.WorldAddr.V4, "drop-no-address")
	up.drops(n.WorldAddr.V6, "drop-no-address")
	if out := n.try("status").stdout; !strings.Contains(out, "drop-no-address") {
		t.Errorf("status does not show the drops:\n%s", out)
	}

	other4, other6 := netip.MustParseAddr("192.0.2.99"), netip.MustParseAddr("2001:db8:2::99")
	start := time.Now()
	must(t, n.Node.AddAddr("eth0", netip.PrefixFrom(other4, 24)))
	must(t, n.Node.AddAddr("eth0", netip.PrefixFrom(other6, 64)))
	n.awaitOK()
	within1s(t, "another address used", time.Since(start))
	up.want(n.WorldAddr.V4, other4)
	up.want(n.WorldAddr.V6, other6)
	w.check(t)
}

// The address is replaced while pods send: nothing leaks, and new flows have the
// new address.
func TestAddressChangesUnderTraffic(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{Pods: 2}, "--enable-ipv6-masquerade=false")
	server, err := lab.EchoUDP(n.World, netip.AddrPortFrom(n.WorldAddr.V4, 0))
	must(t, err)
	labtest.Close(t, server.Close)
	w := n.watchWire()

	stop := make(chan struct{})
	var sender sync.WaitGroup
	sender.Go(func() { // new flows all the time
		for {
			select {
			case <-stop:
				return
			default:
			}
			conn, err := lab.DialUDP(t.Context(), n.Pods[1], netip.AddrPort{}, server.Addr)
			if err != nil {
				t.Error(err)
				return
			}
			conn.Write([]byte("x"))
			conn.Close()
		}
	})
	defer sender.Wait()
	defer close(stop)

	up := n.tapWorld()
	var took []time.Duration
	old := n.NodeAddr.V4
	for i := range 3 {
		next := netip.AddrFrom4([4]byte{192, 0, 2, byte(9 + i)})
		// Another subnet each time: else it were a secondary address, and gone with
		// the first. So there is always a route.
		must(t, n.Node.AddAddr("eth0", netip.PrefixFrom(next, 25+i)))
		must(t, n.Node.DelAddr("eth0", netip.PrefixFrom(old, 24+i)))
		start := time.Now()
		n.await("address "+next.String(), func(st agent.Status) bool {
			return slices.ContainsFunc(st.Devices, func(d agent.DeviceStatus) bool { return d.Name == "eth0" && d.IPv4 == next })
		})
		took = append(took, time.Since(start))
		up.want(n.WorldAddr.V4, next)
		n.awaitNoMappingOf(old)
		old = next
	}
	within1s(t, "address replaced", took...)
	w.check(t)
}

// A link that goes down and comes back is still attached.
func TestLinkDownAndUp(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{}, "--enable-ipv6-masquerade=false")
	up, w := n.tapWorld(), n.watchWire()
	up.want(n.WorldAddr.V4, n.NodeAddr.V4)
	must(t, n.Node.SetDown("eth0"))
	n.awaitAttached("eth0")
	must(t, n.Node.SetUp("eth0"))
	must(t, n.Node.AddRoute(lab.Route{Dst: lab.DefaultRoute4, Via: n.WorldAddr.V4}))
	n.awaitAttached("eth0")
	n.awaitOK()
	up.want(n.WorldAddr.V4, n.NodeAddr.V4)

	// Deleted and made again, it is another device with the same name.
	must(t, n.Node.DeleteLink("eth0"))
	n.awaitDegraded("no device")
	n.plugTo(n.World, "eth0", "192.0.2.1/24", "192.0.2.2/24")
	must(t, n.Node.AddRoute(lab.Route{Dst: lab.DefaultRoute4, Via: n.WorldAddr.V4}))
	n.awaitAttached("eth0")
	n.awaitOK()
	n.tapWorld().want(n.WorldAddr.V4, n.NodeAddr.V4)
	w.check(t)
}
