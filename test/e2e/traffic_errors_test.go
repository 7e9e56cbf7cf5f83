package e2e_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// refused writes to a connected socket until it hears that nobody listens there.
func refused(t *testing.T, what string, c *net.UDPConn) {
	t.Helper()
	labtest.Eventually(t, 10*time.Second, func() error {
		if _, err := c.Write([]byte("anybody?")); !errors.Is(err, unix.ECONNREFUSED) {
			return fmt.Errorf("%s: %v, want ECONNREFUSED", what, err)
		}
		return nil
	})
}

// Who asks a closed port learns so, in all directions: the error and the packet
// that it quotes are translated as the flow is.
func TestPortUnreachable(t *testing.T) {
	t.Parallel()
	eachHook(t, lab.Options{WorldKnowsPods: true, PodBridge: true}, func(t *testing.T, n *node) {
		wire := n.watchWire(n.Excluded.All()...)
		for _, dst := range n.WorldAddr.All() {
			t.Run(family(dst), func(t *testing.T) { testPortUnreachable(t, n, dst) })
		}
		wire.check(t)
		n.wantCounts(func(c map[string]uint64) bool { return c["masq-error"] >= 4 })
	})
}

func testPortUnreachable(t *testing.T, n *node, dst netip.Addr) {
	dial := func(ns *lab.NS, local, remote netip.AddrPort) *net.UDPConn {
		t.Helper()
		c, err := lab.DialUDP(t.Context(), ns, local, remote)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	closed := netip.AddrPortFrom(dst, 9)
	refused(t, "udp, pod to world", dial(n.Pods[0], netip.AddrPort{}, closed))
	if _, err := lab.DialTCP(within(t, 10*time.Second), n.Pods[0], netip.AddrPort{}, closed); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("tcp, pod to world: %v, want ECONNREFUSED", err)
	}

	// The pod closes its socket, and the world goes on answering.
	srv, err := lab.ListenUDP(n.World, anyPort(dst))
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	at := srv.LocalAddr().(*net.UDPAddr).AddrPort()
	pod := dial(n.Pods[0], netip.AddrPort{}, at)
	if _, err := pod.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	srv.SetDeadline(time.Now().Add(5 * time.Second))
	_, peer, err := srv.ReadFromUDPAddrPort(make([]byte, 100))
	if err != nil {
		t.Fatal(err)
	}
	if peer.Addr().Unmap() != n.NodeAddr.Of(dst) {
		t.Errorf("seen as %s", peer)
	}
	pod.Close()
	srv.Close()
	refused(t, "udp, world to a pod that has gone", dial(n.World, at, netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())))

	// From outside to a closed port of the pod: nothing is translated.
	address := n.PodAddrs[0].Of(dst)
	inside := netip.AddrPortFrom(n.Excluded.Of(dst), 0)
	refused(t, "udp, world to pod", dial(n.World, inside, netip.AddrPortFrom(address, 9)))
	if _, err := lab.DialTCP(within(t, 10*time.Second), n.World, inside, netip.AddrPortFrom(address, 9)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("tcp, world to pod: %v, want ECONNREFUSED", err)
	}
}
