package e2e_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
)

// tunnel is a TUN device of the node, tun0, whose other end is one of a namespace
// of its own: a device without a link-layer header that carries real traffic.
type tunnel struct {
	far       *lab.NS
	addr      lab.Pair // of the node
	world     lab.Pair // of the far end
	reordered atomic.Bool

	mu       sync.Mutex
	problems []string
}

// addTunnel makes a tunnel; packets that leave the node are looked at.
func (n *node) addTunnel(t *testing.T) *tunnel {
	t.Helper()
	tun := &tunnel{far: labtest.NewNS(t),
		addr:  lab.Pair{V4: netip.MustParseAddr("198.18.5.1"), V6: netip.MustParseAddr("2001:db8:5::1")},
		world: lab.Pair{V4: netip.MustParseAddr("198.18.5.2"), V6: netip.MustParseAddr("2001:db8:5::2")}}
	open := func(ns *lab.NS, addr lab.Pair) *os.File {
		f, err := ns.AddTUN("tun0")
		must(t, err)
		must(t, ns.AddAddr("tun0", netip.PrefixFrom(addr.V4, 30)))
		must(t, ns.AddAddr("tun0", netip.PrefixFrom(addr.V6, 126)))
		return f
	}
	near, far := open(n.Node, tun.addr), open(tun.far, tun.world)
	must(t, tun.far.AddRoute(lab.Route{Dst: lab.PodRange4, Via: tun.addr.V4}))
	must(t, tun.far.AddRoute(lab.Route{Dst: lab.PodRange6, Via: tun.addr.V6}))
	var pumps sync.WaitGroup
	pumps.Go(func() { tun.pump(near, far, true) })
	pumps.Go(func() { tun.pump(far, near, false) })
	t.Cleanup(func() {
		near.Close()
		far.Close()
		pumps.Wait()
		for _, p := range tun.problems {
			t.Error(p)
		}
	})
	return tun
}

// pump carries packets until a device is gone. Towards the node it can let the last
// fragment of a datagram overtake all others.
func (tun *tunnel) pump(from, to *os.File, leaving bool) {
	buf := make([]byte, 1<<16)
	var train [][]byte
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		b := buf[:n]
		if leaving {
			tun.look(b)
		}
		more, later := fragment(b)
		if !leaving && tun.reordered.Load() && (more || later) {
			if train = append(train, slices.Clone(b)); more {
				continue
			}
			slices.Reverse(train)
			for _, b := range train {
				to.Write(b)
			}
			train = nil
			continue
		}
		to.Write(b)
	}
}

// look notes what must not leave the node: a pod's address, but as the answer to a
// connection from outside, and a checksum that is not true.
func (tun *tunnel) look(b []byte) {
	f, ok := lab.ParseIP(b)
	problem := ""
	src, dst, _ := f.Ports()
	switch {
	case !ok:
		problem = "unreadable"
	case isPod(f.Src) && src != servedPort:
		problem = "leak"
	default:
		if err := packet.Check(packet.Raw, b); err != nil {
			problem = err.Error()
		}
	}
	if problem != "" {
		tun.mu.Lock()
		defer tun.mu.Unlock()
		tun.problems = append(tun.problems, fmt.Sprintf("%s: %s to port %d", problem, f, dst))
	}
}

// fragment tells whether b is a fragment with more to come, and whether it is a later one.
func fragment(b []byte) (more, later bool) {
	if b[0]>>4 == 4 {
		return b[6]&0x20 != 0, b[6]&0x1f|b[7] != 0
	}
	if b[6] != packet.Fragment {
		return false, false
	}
	return b[43]&1 != 0, b[42]|b[43]&0xf8 != 0
}

// servedPort is where a pod serves connections from outside.
const servedPort = 8080

// Traffic of pods and of the node through a device without a link-layer header: it
// is plugged in while the agent runs, and everything works in both directions and
// families.
func TestTUN(t *testing.T) {
	t.Parallel()
	ping := labtest.Tool(t, "ping")
	eachHook(t, lab.Options{}, func(t *testing.T, n *node) {
		tun := n.addTunnel(t)
		n.awaitAttached("eth0", "tun0")
		n.awaitOK()
		for _, dst := range tun.world.All() {
			t.Run(family(dst), func(t *testing.T) {
				echo, udp := server(t, lab.EchoTCP, tun.far, anyPort(dst)), server(t, lab.EchoUDP, tun.far, anyPort(dst))
				for _, from := range []*lab.NS{n.Pods[0], n.Node} {
					seen, err := transfer(within(t, time.Minute), from, echo, 2<<20)
					if err != nil || seen.Addr() != tun.addr.Of(dst) {
						t.Errorf("tcp: seen as %s: %v", seen, err)
					}
					for _, reordered := range []bool{false, true} {
						tun.reordered.Store(reordered)
						for _, size := range []int{1, 1400, 1500, 3000, 8000, 60000} {
							seen, err := lab.AskUDP(within(t, 10*time.Second), from, netip.AddrPort{}, udp, bytes.Repeat([]byte{byte(size)}, size))
							if err != nil || seen.Addr() != tun.addr.Of(dst) {
								t.Errorf("udp, %d bytes, reordered %v: seen as %s: %v", size, reordered, seen, err)
							}
						}
						for _, size := range []string{"56", "3000", "20000"} {
							if err := pings(t, from, ping, "-s", size, dst.String()); err != nil {
								t.Errorf("reordered %v: %v", reordered, err)
							}
						}
					}
					tun.reordered.Store(false)
				}
				refusedBy := netip.AddrPortFrom(dst, 9)
				c, err := lab.DialUDP(t.Context(), n.Pods[0], netip.AddrPort{}, refusedBy)
				must(t, err)
				defer c.Close()
				refused(t, "udp to a closed port", c)
				// And a connection from outside.
				inside := netip.AddrPortFrom(n.PodAddrs[0].Of(dst), servedPort)
				server(t, lab.EchoTCP, n.Pods[0], inside)
				if seen, err := transfer(within(t, time.Minute), tun.far, inside, 1<<20); err != nil || seen.Addr() != dst {
					t.Errorf("from outside: seen as %s: %v", seen, err)
				}
			})
		}
		n.wantCounts(func(c map[string]uint64) bool {
			return c["hold-fragment"] > 0 && c["drop-fragment"]+c["pass-fragment"] == 0
		})
	}, "--devices=eth0,tun+")
}
