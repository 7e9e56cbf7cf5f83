package e2e_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
)

// Bulk and odd sizes arrive whole, whether checksums and segments are left to the
// devices or are on the wire as they will arrive.
func TestTransfers(t *testing.T) {
	t.Parallel()
	eachHook(t, lab.Options{Pods: 2}, func(t *testing.T, n *node) {
		wire := n.watchWire()
		testTransfers(t, n, "offload")
		// The ends leave their checksums to be completed, and after the translation the node has to:
		// only so does anybody verify what became of a partial one.
		withoutOffloads(t, n.Node)
		testTransfers(t, n, "completed by the node")
		withoutOffloads(t, n.World, n.Pods[0], n.Pods[1])
		testTransfers(t, n, "no offload")
		wire.check(t)
	})
}

// withoutOffloads leaves all work to the kernel, on all devices of some hosts.
func withoutOffloads(t *testing.T, hosts ...*lab.NS) {
	t.Helper()
	for _, ns := range hosts {
		links, err := ns.Links()
		if err != nil {
			t.Fatal(err)
		}
		for _, dev := range links {
			if dev == "lo" {
				continue
			}
			if err := ns.SetOffload(dev, false, lab.AllOffloads...); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func testTransfers(t *testing.T, n *node, name string) {
	for _, dst := range n.WorldAddr.All() {
		t.Run(name+" "+family(dst), func(t *testing.T) {
			const size = 10 << 20
			echo, web := server(t, lab.EchoTCP, n.World, anyPort(dst)), server(t, lab.ServeContent, n.World, anyPort(dst))
			ctx := within(t, time.Minute)
			seen, err := transfer(ctx, n.Pods[0], echo, size)
			if err != nil || seen.Addr() != n.NodeAddr.Of(dst) {
				t.Errorf("both ways: seen as %s: %v", seen, err)
			}
			if seen, err = lab.Fetch(ctx, n.Pods[1], web, 3, size); err != nil || seen.Addr() != n.NodeAddr.Of(dst) {
				t.Errorf("download: seen as %s: %v", seen, err)
			}
			testDatagrams(t, n, dst)
			testNoChecksum(t, n, dst)
		})
	}
}

// Datagrams of all sizes on one socket: larger ones than a packet are fragments.
func testDatagrams(t *testing.T, n *node, dst netip.Addr) {
	t.Helper()
	at := server(t, lab.EchoUDP, n.World, anyPort(dst))
	c, err := lab.DialUDP(t.Context(), n.Pods[0], netip.AddrPort{}, at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var first netip.AddrPort
	for _, size := range []int{1, 0, 511, 1452, 1453, 1472, 1473, 2960, 8000, 33000, 60000, 65400} {
		seen, err := lab.AskUDPOn(within(t, 10*time.Second), c, bytes.Repeat([]byte{byte(size)}, size))
		if err != nil {
			t.Errorf("udp, %d bytes: %v", size, err)
			continue
		}
		if !first.IsValid() {
			first = seen
		}
		if seen.Addr() != n.NodeAddr.Of(dst) || seen != first {
			t.Errorf("udp, %d bytes: seen as %s, the first as %s", size, seen, first)
		}
	}
}

// setOption sets a socket option.
func setOption(t testing.TB, c *net.UDPConn, level, option, value int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if err = unix.SetsockoptInt(int(fd), level, option, value); err != nil {
			t.Errorf("setsockopt %d/%d: %v", level, option, err)
		}
	})
}

func noChecksum(t testing.TB, c *net.UDPConn, a netip.Addr) {
	t.Helper()
	if a.Is4() {
		setOption(t, c, unix.SOL_SOCKET, unix.SO_NO_CHECK, 1)
		return
	}
	const udpNoCheck6TX, udpNoCheck6RX = 101, 102
	setOption(t, c, unix.IPPROTO_UDP, udpNoCheck6TX, 1)
	setOption(t, c, unix.IPPROTO_UDP, udpNoCheck6RX, 1)
}

// A datagram without a checksum keeps having none.
func testNoChecksum(t *testing.T, n *node, dst netip.Addr) {
	t.Helper()
	srv, err := lab.ListenUDP(n.World, anyPort(dst))
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	at := srv.LocalAddr().(*net.UDPAddr).AddrPort()
	c, err := lab.DialUDP(t.Context(), n.Pods[0], netip.AddrPort{}, at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	noChecksum(t, srv, dst)
	noChecksum(t, c, dst)
	capture := labtest.Capture(t, n.Node, "eth0", lab.CaptureOptions{})
	plain := func(out bool) *lab.Counter {
		return capture.Count(func(p lab.Packet) bool {
			f, ok := lab.ParseFrame(p.Data)
			if !ok || f.Proto != unix.IPPROTO_UDP || p.Outgoing != out || len(f.L4) < 8 {
				return false
			}
			src, dst, _ := f.Ports()
			return (src == at.Port() || dst == at.Port()) && f.L4[6] == 0 && f.L4[7] == 0
		})
	}
	asked, answered := plain(true), plain(false)
	for _, size := range []int{1, 500} {
		payload := bytes.Repeat([]byte("x"), size)
		if _, err := c.Write(payload); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 2048)
		deadline := time.Now().Add(5 * time.Second)
		srv.SetDeadline(deadline)
		c.SetDeadline(deadline)
		got, peer, err := srv.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Errorf("udp without checksum, pod to world: %v", err)
			return
		}
		if _, err := srv.WriteToUDPAddrPort(buf[:got], peer); err != nil {
			t.Fatal(err)
		}
		back, err := c.Read(buf)
		if err != nil || !bytes.Equal(buf[:back], payload) {
			t.Errorf("udp without checksum, back to the pod: %d of %d bytes, %v", back, size, err)
			return
		}
	}
	if asked.N() != 2 || answered.N() != 2 {
		t.Errorf("udp without checksum: %d requests and %d answers still had none, want 2 and 2", asked.N(), answered.N())
	}
}

// Many connections at a time, from two pods with the same ports towards the same
// server: each has a port of its own.
func TestManyConnections(t *testing.T) {
	t.Parallel()
	const each = 250
	n := startNode(t, lab.Options{Pods: 2})
	wire := n.watchWire()
	for _, dst := range n.WorldAddr.All() {
		tcp, udp := server(t, lab.EchoTCP, n.World, anyPort(dst)), server(t, lab.EchoUDP, n.World, anyPort(dst))
		var (
			ctx      = within(t, time.Minute)
			group    sync.WaitGroup
			mu       sync.Mutex
			conns    []net.Conn
			seen     = map[string]int{}
			failures []error
		)
		note := func(proto string, as netip.AddrPort, c net.Conn, err error) {
			mu.Lock()
			defer mu.Unlock()
			if err == nil && as.Addr() != n.NodeAddr.Of(dst) {
				err = fmt.Errorf("seen as %s", as)
			}
			if err != nil {
				failures = append(failures, fmt.Errorf("%s: %w", proto, err))
			}
			if c != nil {
				conns = append(conns, c)
				seen[proto+as.String()]++
			}
		}
		for pod := range n.Pods {
			for i := range each {
				local := netip.AddrPortFrom(n.PodAddrs[pod].Of(dst), uint16(33000+i))
				group.Go(func() {
					as, c, err := lab.AskTCP(ctx, n.Pods[pod], local, tcp)
					if err != nil {
						note("tcp", as, nil, err)
						return
					}
					note("tcp", as, c, exchange(c))
				})
				group.Go(func() {
					c, err := lab.DialUDP(ctx, n.Pods[pod], local, udp)
					if err != nil {
						note("udp", netip.AddrPort{}, nil, err)
						return
					}
					as, err := lab.AskUDPOn(ctx, c, []byte("hello"))
					note("udp", as, c, err)
				})
			}
		}
		group.Wait()
		for i, err := range failures {
			if i < 5 {
				t.Error(err)
			}
		}
		if len(failures) > 0 || len(seen) != 4*each {
			t.Errorf("%s: %d failures, %d different sources, want %d", family(dst), len(failures), len(seen), 4*each)
		}
		if flows := n.flows(); flows < 4*each {
			t.Errorf("status shows %d flows, want at least %d", flows, 4*each)
		}
		for _, c := range conns {
			c.Close()
		}
	}
	wire.check(t)
}

// dontFragment makes a socket send whole packets only, as path MTU discovery does.
func dontFragment(t testing.TB, c *net.UDPConn, a netip.Addr) {
	t.Helper()
	if a.Is4() {
		setOption(t, c, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		return
	}
	setOption(t, c, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO)
	setOption(t, c, unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1)
}

// learnsMTU sends datagrams that are too big for the path until the kernel has
// learned so from an ICMP error, and checks what it has learned.
func learnsMTU(t *testing.T, c *net.UDPConn, dst netip.Addr, want int) {
	t.Helper()
	dontFragment(t, c, dst)
	labtest.Eventually(t, 10*time.Second, func() error {
		_, err := c.Write(make([]byte, 1400))
		if errors.Is(err, unix.EMSGSIZE) {
			return nil
		}
		return fmt.Errorf("1400 bytes with DF: %v, want EMSGSIZE", err)
	})
	level, option := unix.IPPROTO_IP, unix.IP_MTU
	if dst.Is6() {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU
	}
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if mtu, err := unix.GetsockoptInt(int(fd), level, option); err != nil || mtu != want {
			t.Errorf("path MTU %d, %v, want %d", mtu, err, want)
		}
	})
}

// Path MTU discovery works from a pod and towards a pod.
func TestPathMTU(t *testing.T) {
	t.Parallel()
	eachHook(t, lab.Options{Router: true}, func(t *testing.T, n *node) {
		wire := n.watchWire()
		for _, dst := range n.WorldAddr.All() {
			t.Run("from pod "+family(dst), func(t *testing.T) {
				echo, udp := server(t, lab.EchoTCP, n.World, anyPort(dst)), server(t, lab.EchoUDP, n.World, anyPort(dst))
				if _, err := transfer(within(t, 30*time.Second), n.Pods[0], echo, 2<<20); err != nil {
					t.Errorf("tcp: %v", err)
				}
				c, err := lab.DialUDP(t.Context(), n.Pods[0], netip.AddrPort{}, udp)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				learnsMTU(t, c, dst, 1280)
				// On a socket of its own: errors about the others may be waiting on c.
				if _, err := lab.AskUDP(within(t, 10*time.Second), n.Pods[0], netip.AddrPort{}, udp, make([]byte, 1100)); err != nil {
					t.Errorf("a datagram that fits: %v", err)
				}
			})
		}
		wire.check(t)
	})
	// The node's device towards the pod is narrower than the way from the world, so
	// the node complains: the world must find its own packet in the quote.
	eachHook(t, lab.Options{}, func(t *testing.T, n *node) {
		if err := n.Node.SetMTU("pod0", 1300); err != nil {
			t.Fatal(err)
		}
		wire := n.watchWire()
		for _, dst := range n.WorldAddr.All() {
			t.Run("to pod "+family(dst), func(t *testing.T) {
				web := server(t, lab.ServeContent, n.World, anyPort(dst))
				if _, err := lab.Fetch(within(t, 30*time.Second), n.Pods[0], web, 1, 2<<20); err != nil {
					t.Errorf("tcp: %v", err)
				}
				testLearnsFromNode(t, n, dst)
			})
		}
		wire.check(t)
		n.wantCounts(func(c map[string]uint64) bool { return c["masq-error"] > 0 })
	})
}

// The node's uplink is narrower than the pod's device: the node tells the pod so, and
// cuts to pieces what may be cut (RFC 4787 REQ-13).
func TestNarrowUplink(t *testing.T) {
	t.Parallel()
	eachHook(t, lab.Options{}, func(t *testing.T, n *node) {
		must(t, n.Node.SetMTU("eth0", 1300))
		wire := n.watchWire()
		for _, dst := range n.WorldAddr.All() {
			srv, err := lab.ListenUDP(n.World, anyPort(dst))
			must(t, err)
			defer srv.Close()
			c, err := lab.DialUDP(t.Context(), n.Pods[0], netip.AddrPort{}, srv.LocalAddr().(*net.UDPAddr).AddrPort())
			must(t, err)
			defer c.Close()
			if dst.Is4() {
				testCutByNode(t, n, c, srv)
			}
			learnsMTU(t, c, dst, 1300)
		}
		wire.check(t)
	})
}

// testCutByNode sends a datagram without DF that is too big for the uplink.
func testCutByNode(t *testing.T, n *node, c, srv *net.UDPConn) {
	t.Helper()
	capture := labtest.Capture(t, n.Node, "eth0", lab.CaptureOptions{})
	setOption(t, c, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
	payload := bytes.Repeat([]byte("0123456789"), 140)
	_, err := c.Write(payload)
	must(t, err)
	buf := make([]byte, 1<<16)
	srv.SetReadDeadline(time.Now().Add(5 * time.Second))
	size, peer, err := srv.ReadFromUDPAddrPort(buf)
	if err != nil || !bytes.Equal(buf[:size], payload) || peer.Addr().Unmap() != n.NodeAddr.V4 {
		t.Errorf("%d bytes from %s, %v", size, peer, err)
	}
	var offsets []uint16 // in words of 8 bytes
	for _, p := range capture.Packets() {
		if f, ok := lab.ParseFrame(p.Data); ok && p.Outgoing && f.Proto == packet.UDP {
			offsets = append(offsets, binary.BigEndian.Uint16(p.Data[20:])&0x1fff)
		}
	}
	if !slices.Equal(offsets, []uint16{0, 1280 / 8}) {
		t.Errorf("fragments at %v", offsets)
	}
}

// testLearnsFromNode lets the world answer a pod with datagrams too big for the
// pod's link.
func testLearnsFromNode(t *testing.T, n *node, dst netip.Addr) {
	t.Helper()
	srv, err := lab.ListenUDP(n.World, anyPort(dst))
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	at := srv.LocalAddr().(*net.UDPAddr).AddrPort()
	pod, err := lab.DialUDP(t.Context(), n.Pods[0], netip.AddrPort{}, at)
	if err != nil {
		t.Fatal(err)
	}
	defer pod.Close()
	if _, err := io.WriteString(pod, "hello"); err != nil {
		t.Fatal(err)
	}
	srv.SetDeadline(time.Now().Add(5 * time.Second))
	_, peer, err := srv.ReadFromUDPAddrPort(make([]byte, 100))
	if err != nil {
		t.Fatal(err)
	}
	srv.Close()
	peer = netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())
	c, err := lab.DialUDP(t.Context(), n.World, at, peer)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	learnsMTU(t, c, dst, 1300)
}
