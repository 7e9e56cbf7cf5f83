package lab_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// echo starts both echo servers on an address, on ports of the kernel's choice.
func echo(t *testing.T, ns *lab.NS, a netip.Addr) (tcp, udp netip.AddrPort) {
	t.Helper()
	s, err := lab.EchoTCP(ns, netip.AddrPortFrom(a, 0))
	if err != nil {
		t.Fatal(err)
	}
	labtest.Close(t, s.Close)
	u, err := lab.EchoUDP(ns, netip.AddrPortFrom(a, 0))
	if err != nil {
		t.Fatal(err)
	}
	labtest.Close(t, u.Close)
	return s.Addr, u.Addr
}

// reach asks both echo servers on dst and compares the source they saw.
func reach(t *testing.T, from, to *lab.NS, dst, wantSrc netip.Addr) {
	t.Helper()
	tcp, udp := echo(t, to, dst)
	ctx := within(t, 5*time.Second)
	seen, c, err := lab.AskTCP(ctx, from, netip.AddrPort{}, tcp)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if seen.Addr() != wantSrc {
		t.Errorf("tcp to %s: seen as %s, want %s", dst, seen, wantSrc)
	}
	if _, err := io.WriteString(c, "hello"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
		t.Errorf("tcp to %s: echo %q, %v", dst, got, err)
	}
	seen, err = lab.AskUDP(ctx, from, netip.AddrPort{}, udp, []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	if seen.Addr() != wantSrc {
		t.Errorf("udp to %s: seen as %s, want %s", dst, seen, wantSrc)
	}
	if _, err := lab.Ping(ctx, from, dst, 77, 1, 100); err != nil {
		t.Error(err)
	}
}

func TestTopologyConnects(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]lab.Options{
		"routed":     {Pods: 2, SecondUplink: true},
		"bridge":     {Pods: 2, PodBridge: true, NoOffload: true},
		"router":     {Pods: 2, Router: true},
		"remote":     {Pods: 2, RemoteNode: true, WorldKnowsPods: true},
		"everything": {Pods: 2, Router: true, RemoteNode: true, SecondUplink: true, WorldKnowsPods: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			topo := labtest.NewNode(t, o)
			for i := range 2 {
				family := func(p lab.Pair) netip.Addr { return p.All()[i] }
				pod0, pod1 := family(topo.PodAddrs[0]), family(topo.PodAddrs[1])
				reach(t, topo.Pods[0], topo.Node, family(topo.PodGateway), pod0)
				reach(t, topo.Pods[0], topo.Pods[1], pod1, pod0)
				reach(t, topo.Node, topo.World, family(topo.WorldAddr), family(topo.NodeAddr))
				reach(t, topo.World, topo.Node, family(topo.NodeAddr), family(topo.WorldAddr))
				reach(t, topo.Node, topo.World, family(topo.Excluded), family(topo.NodeAddr))
				if o.SecondUplink {
					reach(t, topo.Node, topo.World2, family(topo.WorldAddr2), family(topo.NodeAddr2))
				}
				if o.RemoteNode {
					reach(t, topo.Node, topo.Remote, family(topo.RemoteAddr), family(topo.NodeAddr))
					reach(t, topo.Pods[0], topo.Remote, family(topo.RemotePod), pod0)
				}
				if o.WorldKnowsPods {
					reach(t, topo.Pods[0], topo.World, family(topo.Excluded), pod0)
				}
			}
			if o.RemoteNode {
				reach(t, topo.Node, topo.Remote, topo.RemoteExternal, topo.NodeAddr.V4)
			}
			if o.WorldKnowsPods {
				reach(t, topo.Pods[0], topo.World, topo.Excluded10, topo.PodAddrs[0].V4)
			}
		})
	}
}

// Without masquerading the pod's own address is on the wire, and nobody answers.
func TestLeakIsSeenAndTimesOut(t *testing.T) {
	t.Parallel()
	for _, known := range []bool{false, true} {
		t.Run(fmt.Sprintf("WorldKnowsPods=%t", known), func(t *testing.T) {
			t.Parallel()
			topo := labtest.NewNode(t, lab.Options{WorldKnowsPods: known})
			wire := labtest.Capture(t, topo.World, "eth0", lab.CaptureOptions{Incoming: true})
			leaks := wire.Count(lab.SourceIn(lab.PodRange4, lab.PodRange6))
			if n := leaks.N(); n != 0 {
				t.Fatalf("%d leaks before any traffic", n)
			}
			for i, dst := range topo.WorldAddr.All() {
				tcp, _ := echo(t, topo.World, dst)
				_, err := lab.DialTCP(within(t, 300*time.Millisecond), topo.Pods[0], netip.AddrPort{}, tcp)
				if !isTimeout(err) {
					t.Errorf("dial %s: %v, want a time-out", tcp, err)
				}
				want := topo.PodAddrs[0].All()[i]
				if !wire.Saw(func(p lab.Packet) bool {
					f, ok := lab.ParseFrame(p.Data)
					flags, tcp := f.TCPFlags()
					return ok && tcp && flags == 2 && f.Src == want && f.Dst == dst
				}) {
					t.Errorf("no SYN from %s to %s on the wire", want, dst)
				}
			}
			if n := leaks.N(); n < 2 {
				t.Errorf("%d leaks counted, want one per family at least", n)
			}
			if n := wire.Lost(); n != 0 {
				t.Errorf("%d packets lost", n)
			}
		})
	}
}

func isTimeout(err error) bool {
	var e interface{ Timeout() bool }
	return errors.As(err, &e) && e.Timeout()
}

func TestRouterAnswersForTTLAndMTU(t *testing.T) {
	t.Parallel()
	topo := labtest.NewNode(t, lab.Options{Router: true})
	for i, dst := range topo.WorldAddr.All() {
		ctx := within(t, 5*time.Second)
		timeExceeded, tooBig := [2]byte{11, 0}, [2]byte{3, 4}
		if dst.Is6() {
			timeExceeded, tooBig = [2]byte{3, 0}, [2]byte{2, 0}
		}
		hop := topo.RouterAddr.All()[i]

		_, err := lab.Echo{Dst: dst, ID: 1, Seq: 1, TTL: 1}.Send(ctx, topo.Node)
		var ie *lab.ICMPError
		if !errors.As(err, &ie) || [2]byte{ie.Type, ie.Code} != timeExceeded || ie.From != hop {
			t.Errorf("ttl 1 to %s: %v, want time exceeded from %s", dst, err, hop)
		}
		if _, err := (lab.Echo{Dst: dst, ID: 1, Seq: 2, TTL: 2}).Send(ctx, topo.Node); err != nil {
			t.Errorf("ttl 2 to %s: %v", dst, err)
		}
		big := lab.Echo{Dst: dst, ID: 1, Seq: 3, Payload: 1400, DontFragment: true}
		_, err = big.Send(ctx, topo.Node)
		if !errors.As(err, &ie) || [2]byte{ie.Type, ie.Code} != tooBig || ie.MTU != 1280 || ie.From != hop {
			t.Errorf("1400 bytes to %s: %v, want too big for 1280 from %s", dst, err, hop)
		}
		s, err := lab.ServeContent(topo.World, netip.AddrPortFrom(dst, 80))
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, s.Close)
		seen, err := lab.Fetch(ctx, topo.Node, s.Addr, 42, 1<<20)
		if err != nil || seen.Addr() != topo.NodeAddr.All()[i] {
			t.Errorf("fetch: seen as %s, %v", seen, err)
		}
	}
}

func TestNamedTopologyLeavesNothing(t *testing.T) {
	t.Parallel()
	labtest.Root(t)
	prefix := fmt.Sprintf("labtest%d", os.Getpid())
	topo, err := lab.Node(lab.Options{Prefix: prefix, Router: true, RemoteNode: true, SecondUplink: true})
	if err != nil {
		t.Fatal(err)
	}
	defer topo.Close()
	if _, err := lab.Node(lab.Options{Prefix: prefix}); err == nil {
		t.Error("a second topology of the same name was built")
	}
	ip := labtest.Tool(t, "ip")
	out, err := topo.Node.Run(t.Context(), ip, "netns", "exec", prefix+"-world", ip, "-br", "addr")
	if err != nil || !strings.Contains(out, "198.18.0.2/24") {
		t.Errorf("ip netns exec: %v\n%s", err, out)
	}

	// The far end of a veth pair goes when its namespace really is gone.
	witness := labtest.NewNS(t)
	for i, ns := range topo.Namespaces() {
		if err := lab.Link(witness, fmt.Sprintf("w%d", i), ns, "witness", lab.LinkOpts{}); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := topo.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if left, _ := filepath.Glob("/run/netns/" + prefix + "*"); left != nil {
		t.Errorf("left behind: %v", left)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), prefix) {
		t.Errorf("a mount of %s is left (%v)", prefix, err)
	}
	labtest.Eventually(t, 10*time.Second, func() error {
		left, err := witness.Links()
		if err != nil || !slices.Equal(left, []string{"lo"}) {
			return fmt.Errorf("namespaces still there: %v %v", left, err)
		}
		return nil
	})
}

func TestParallelTopologiesDoNotClash(t *testing.T) {
	t.Parallel()
	for i := range 6 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			topo := labtest.NewNode(t, lab.Options{Pods: 3})
			reach(t, topo.Pods[2], topo.Node, topo.PodGateway.V6, topo.PodAddrs[2].V6)
			reach(t, topo.Node, topo.World, topo.WorldAddr.V4, topo.NodeAddr.V4)
		})
	}
}

func TestNodeRefusesTooManyPods(t *testing.T) {
	if _, err := lab.Node(lab.Options{Pods: 1000}); err == nil {
		t.Error("1000 pods were accepted")
	}
}
