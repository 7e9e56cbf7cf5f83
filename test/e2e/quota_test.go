package e2e_test

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
)

// A pod that is refused a mapping hears so at once, from the node and ten times a
// second at most; nothing of it gets to the wire.
func TestRefusedAtOnce(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]lab.Options{"routed": {}, "bridge": {PodBridge: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := startNode(t, opts, "--max-ports-per-pod=1")
			wire := n.watchWire()
			for i, dst := range n.WorldAddr.All() {
				testRefusedAtOnce(t, n, dst, []error{unix.EHOSTUNREACH, unix.EACCES}[i])
			}
			wire.check(t)
			st := n.status()
			if st.Drops["drop-quota"] == 0 || st.Ports.Searches == nil || st.Ports.Searches.Answered == 0 || st.Ports.Searches.Unanswered == 0 {
				t.Errorf("drops %v, searches %+v", st.Drops, st.Ports.Searches)
			}
		})
	}
}

func testRefusedAtOnce(t *testing.T, n *node, dst netip.Addr, want error) {
	at := server(t, lab.EchoTCP, n.World, anyPort(dst))
	_, conn, err := lab.AskTCP(within(t, 10*time.Second), n.Pods[0], netip.AddrPort{}, at)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	heard := labtest.Capture(t, n.Pods[0], "eth0", lab.CaptureOptions{Incoming: true})
	var sums error
	answers := heard.Count(func(p lab.Packet) bool {
		f, ok := lab.ParseFrame(p.Data)
		typ, code, _, icmp := f.ICMP()
		if !ok || !icmp || f.Src != n.NodeAddr.Of(dst) {
			return false
		}
		if dst.Is4() && (typ != 3 || code != 13) || dst.Is6() && (typ != 1 || code != 1) {
			return false
		}
		// What is quoted has a checksum that its sender left to the device.
		sums = errors.Join(sums, packet.CheckOuter(packet.Ethernet, p.Data))
		return true
	})
	start := time.Now()
	connect := func(limit time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		c, err := lab.DialTCP(ctx, n.Pods[0], netip.AddrPort{}, at)
		if err == nil {
			c.Close()
			t.Fatal("a connection beyond the quota")
		}
		return err
	}
	if err := connect(5 * time.Second); !errors.Is(err, want) {
		t.Errorf("connect to %s: %v, want %v", dst, err, want)
	}
	// Linux looks at an ICMPv6 error that comes while connect() is at work only when
	// it comes again, with the second SYN.
	limit := 900 * time.Millisecond
	if dst.Is6() {
		limit += time.Second
	}
	if d := time.Since(start); d > limit {
		t.Errorf("connect to %s: told after %s", dst, d)
	}
	for range 60 {
		connect(10 * time.Millisecond)
	}
	most := 11 + int(time.Since(start)/(100*time.Millisecond))
	if got := answers.N(); got < 10 || got > most {
		t.Errorf("%s: %d ICMP errors, want 10 to %d", dst, got, most)
	}
	if sums != nil {
		t.Errorf("%s: %v", dst, sums)
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Errorf("the connection that has a mapping: %v", err)
	}
}
