package e2e_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// datagrams are a UDP flow of a pod towards a server that tells whom it sees.
func (n *node) datagrams(port uint16, server netip.AddrPort) *net.UDPConn {
	n.t.Helper()
	c, err := lab.DialUDP(n.t.Context(), n.Pods[0], netip.AddrPortFrom(n.PodAddrs[0].Of(server.Addr()), port), server)
	must(n.t, err)
	n.t.Cleanup(func() { c.Close() })
	return c
}

// seen is whom the server sees.
func (n *node) seen(c *net.UDPConn) netip.Addr {
	n.t.Helper()
	a, err := lab.AskUDPOn(within(n.t, patience), c, []byte("x"))
	must(n.t, err)
	return a.Addr()
}

// awaitSeen waits until the server sees a flow as coming from src.
func (n *node) awaitSeen(c *net.UDPConn, src netip.Addr) {
	n.t.Helper()
	labtest.Eventually(n.t, patience, func() error {
		if got := n.seen(c); got != src {
			return fmt.Errorf("seen as %s, want %s", got, src)
		}
		return nil
	})
}

// A flow that begins while others have damaged the rules is translated when they are healed. One
// that was excluded when it began stays as it is until then, whatever is restarted.
func TestIPTablesModeRenews(t *testing.T) {
	inEachBackend(t, lab.Options{}, func(t *testing.T, n *node, backend string) {
		pod, own := n.PodAddrs[0].V4, n.NodeAddr.V4
		file := n.writeList(n.WorldAddr.V4.String() + "/32")
		args := []string{iptablesMode, podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path=" + file}
		echo := server(t, lab.EchoUDP, n.World, anyPort(n.WorldAddr.V4))
		must(t, n.World.AddRoute(lab.Route{Dst: lab.PodRange4, Via: own})) // so that it can answer
		n.start(args...)
		excluded := n.datagrams(40000, echo)
		if got := n.seen(excluded); got != pod {
			t.Fatalf("an excluded flow is seen as %s", got)
		}
		n.writeList("198.51.100.0/24")
		n.awaitKernel("169.254.0.0/16 198.51.100.0/24 fe80::/10")
		n.restart()
		n.kill()
		n.start(args...)
		if got := n.seen(excluded); got != pod {
			t.Errorf("a flow that was excluded is seen as %s after a restart", got)
		}

		var leaking *net.UDPConn
		mark := 0
		for port := uint16(40001); ; port++ { // the agent may be quicker
			mark = n.log.Len()
			n.tables("iptables-"+backend, "-t", "nat", "-F")
			leaking = n.datagrams(port, echo)
			if n.seen(leaking) == pod {
				break
			}
		}
		// Quietly: an answer that comes when its flow has just been ended is a connection opened from outside.
		labtest.Eventually(t, patience, func() error {
			if !strings.Contains(n.log.String()[mark:], "begun without rules ended") {
				return errors.New("no connection was ended")
			}
			return nil
		})
		n.awaitSeen(leaking, own)
		n.awaitSeen(excluded, own)

		n.kill()
		n.tables("iptables-"+backend, "-t", "nat", "-F", "POSTROUTING")
		down := n.datagrams(39999, echo)
		if got := n.seen(down); got != pod {
			t.Fatalf("without rules it is seen as %s", got)
		}
		n.start(args...)
		n.awaitSeen(down, own)
		n.awaitOK()
	})
}

// What netfilter knows from before a change of the mode, and the programs no longer have, is
// translated afterwards; what drains with them goes on.
func TestModeChangeRenews(t *testing.T) {
	setsModes(t)
	t.Parallel()
	n := newNode(t, lab.Options{})
	n.env = append(n.env, n.lockFile())
	n.tables("iptables-nft", "-t", "mangle", "-A", "OUTPUT", "-m", "conntrack", "--ctstate", "NEW")
	n.start(podCIDRs)
	wire := n.watchWire()
	echo := server(t, lab.EchoUDP, n.World, anyPort(n.WorldAddr.V4))
	c := n.datagrams(40000, echo)
	n.awaitSeen(c, n.NodeAddr.V4)
	n.cli("bpf", "nat", "flush")
	n.restart(iptablesMode)
	n.awaitSeen(c, n.NodeAddr.V4)
	n.awaitOK()
	wire.check(t)
}
