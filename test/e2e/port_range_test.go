package e2e_test

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
)

// Of a pool of two small ranges every port is used and no other: the second range when the first
// is full, and the other way round. What is in between, node-port-range among it, is nobody's
// external port, not even of a pod that sends from there. When both are full a pod is refused.
func TestPortRangesFull(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		ranges string
		first  [2]uint16 // port of each range, of ten
	}{
		{"2000-2009,40000-40009", [2]uint16{2000, 40000}},
		{"29990-29999,32768-32777", [2]uint16{29990, 32768}}, // on both sides of node-port-range
	} {
		t.Run(c.ranges, func(t *testing.T) {
			t.Parallel()
			n := startNode(t, lab.Options{Pods: 2}, "--snat-port-range="+c.ranges)
			if got := n.state().Ports.Ranges; got != c.ranges {
				t.Errorf("status: ports %s", got)
			}
			wire := n.watchWire()
			for i, dst := range n.WorldAddr.All() {
				// Each server is a remote of its own, and so has the whole pool.
				for full, start := range c.first {
					empty := c.first[1-full]
					tcp := server(t, lab.EchoTCP, n.World, anyPort(dst))
					n.fillRanges(full, start, empty, func(pod int, port uint16) (uint16, error) {
						seen, conn, err := lab.AskTCP(within(t, patience), n.Pods[pod], netip.AddrPortFrom(n.PodAddrs[pod].Of(dst), port), tcp)
						if err == nil {
							t.Cleanup(func() { conn.Close() })
						}
						return seen.Port(), err
					})
					_, err := lab.DialTCP(within(t, patience), n.Pods[0], netip.AddrPort{}, tcp)
					if want := []error{unix.EHOSTUNREACH, unix.EACCES}[i]; !errors.Is(err, want) {
						t.Errorf("%s: with no port left: %v, want %v", tcp, err, want)
					}
					udp := server(t, lab.EchoUDP, n.World, anyPort(dst))
					n.fillRanges(full, start, empty, func(pod int, port uint16) (uint16, error) {
						seen, err := lab.AskUDP(within(t, patience), n.Pods[pod], netip.AddrPortFrom(n.PodAddrs[pod].Of(dst), port), udp, []byte("hello"))
						return seen.Port(), err
					})
				}
			}
			wire.check(t)
			if drops := n.counts()["drop-no-port"]; drops == 0 {
				t.Error("no drop-no-port was counted")
			}
		})
	}
}

// fillRanges fills the range of ten ports from full on by flows of those very ports, which they
// keep, and then the one from empty on by flows from node-port-range.
func (n *node) fillRanges(turn int, full, empty uint16, ask func(pod int, port uint16) (external uint16, err error)) {
	n.t.Helper()
	for i := range uint16(10) {
		external, err := ask(turn, full+i)
		must(n.t, err)
		if external != full+i {
			n.t.Errorf("port %d, free and of the pool, became %d", full+i, external)
		}
	}
	var got, want []uint16
	for i := range uint16(10) {
		external, err := ask(int(i%2), 30000+100*uint16(turn)+i)
		must(n.t, err)
		got, want = append(got, external), append(want, empty+i)
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		n.t.Errorf("with %d-%d full: external ports %v, want each of %d-%d", full, full+9, got, empty, empty+9)
	}
}

// All ports but those below 1024 and node-port-range: flows from outside of the pool are spread over
// both ranges, those from inside keep their ports.
func TestPortRangesLarge(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{}, "--snat-port-range=1024-29999,32768-65535")
	wire := n.watchWire()
	for _, dst := range n.WorldAddr.All() {
		udp := server(t, lab.EchoUDP, n.World, anyPort(dst))
		ask := func(port uint16) uint16 {
			t.Helper()
			seen, err := lab.AskUDP(within(t, 10*time.Second), n.Pods[0], netip.AddrPortFrom(n.PodAddrs[0].Of(dst), port), udp, []byte("hello"))
			must(t, err)
			return seen.Port()
		}
		for _, port := range []uint16{1024, 29999, 32768, 65535} {
			if seen := ask(port); seen != port {
				t.Errorf("%s: port %d, of the pool, became %d", dst, port, seen)
			}
		}
		taken := make(map[uint16]bool)
		var low, high int
		for i := range 200 {
			seen := ask(uint16(30000 + i*2767/199)) // from one end to the other
			switch {
			case taken[seen]:
				t.Errorf("%s: port %d was given twice", dst, seen)
			case seen >= 1024 && seen <= 29999:
				low++
			case seen >= 32768:
				high++
			default:
				t.Errorf("%s: a flow left from port %d, which is of no range", dst, seen)
			}
			taken[seen] = true
		}
		// In proportion 94 and 106; a quarter of that happens by chance once in 10^20 runs.
		if low < 25 || high < 25 {
			t.Errorf("%s: %d flows in 1024-29999, %d in 32768-65535", dst, low, high)
		}
	}
	wire.check(t)
}
