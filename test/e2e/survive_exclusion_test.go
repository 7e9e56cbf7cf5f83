package e2e_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// What was not masqueraded counts as new when its exclusion is gone: its next
// packet does not leave with the pod's address.
func TestExclusionRemoved(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{WorldKnowsPods: true})
	list := n.writeList("198.51.100.0/24", "2001:db8:99::/64")
	n.start(podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+list)
	type socket struct {
		udp *net.UDPConn
		tcp *net.TCPConn
	}
	open := make(map[netip.Addr]socket)
	for _, dst := range n.Excluded.All() {
		udp, tcp := server(t, lab.EchoUDP, n.World, anyPort(dst)), server(t, lab.EchoTCP, n.World, anyPort(dst))
		c, err := lab.DialUDP(t.Context(), n.Pods[0], netip.AddrPort{}, udp)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		seen, err := lab.AskUDPOn(within(t, 10*time.Second), c, []byte("hello"))
		if err != nil || seen.Addr() != n.PodAddrs[0].Of(dst) {
			t.Fatalf("excluded: seen as %s: %v", seen, err)
		}
		seen, tc, err := lab.AskTCP(within(t, 10*time.Second), n.Pods[0], netip.AddrPort{}, tcp)
		if err != nil || seen.Addr() != n.PodAddrs[0].Of(dst) {
			t.Fatalf("excluded: seen as %s: %v", seen, err)
		}
		defer tc.Close()
		open[dst] = socket{c, tc}
	}
	n.writeList("10.0.0.0/8")
	for dst, s := range open {
		labtest.Eventually(t, 10*time.Second, func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			seen, err := lab.AskUDPOn(ctx, s.udp, []byte("hello"))
			if err == nil && seen.Addr() != n.NodeAddr.Of(dst) {
				err = fmt.Errorf("a running UDP flow to %s is still seen as %s", dst, seen)
			}
			return err
		})
	}
	wire := n.watchWire()
	for _, s := range open {
		s.tcp.Write([]byte("hello"))
		s.udp.Write([]byte("hello"))
	}
	labtest.Eventually(t, 5*time.Second, func() error {
		if n.counts()["masq-new"] < 4 {
			return fmt.Errorf("counts %v", n.counts())
		}
		return nil
	})
	wire.check(t)
}
