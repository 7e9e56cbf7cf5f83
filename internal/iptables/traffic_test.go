package iptables

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), labtest.Patience(d))
	t.Cleanup(cancel)
	return ctx
}

// labPolicy is that of the lab's node: the world's addresses on lo are excluded.
func labPolicy(t testing.TB) *policy.Policy {
	return build(t, func(in *policy.Input) { in.NonMasq = rules("198.51.100.0/24", "2001:db8:99::/48", "10.99.0.0/16") })
}

// leaks counts packets with a pod's source that the world should not see.
func leaks(t testing.TB, topo *lab.Topology) *lab.Counter {
	c := labtest.Capture(t, topo.World, "eth0", lab.CaptureOptions{Incoming: true})
	return c.Count(func(p lab.Packet) bool {
		f, ok := lab.ParseFrame(p.Data)
		excluded := f.Dst == topo.Excluded.V4 || f.Dst == topo.Excluded.V6 || f.Dst == topo.Excluded10
		return ok && !excluded && (lab.PodRange4.Contains(f.Src) || lab.PodRange6.Contains(f.Src))
	})
}

// Real connections of pods, the node and the world, of both families.
func TestTraffic(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		topo := labtest.NewNode(t, lab.Options{WorldKnowsPods: true})
		n := tables(t, topo.Node, o)
		n.apply(labPolicy(t))
		leaked := leaks(t, topo)
		pod, addr := topo.Pods[0], topo.PodAddrs[0]
		for i, world := range topo.WorldAddr.All() {
			excluded, node, podAddr := topo.Excluded.All()[i], topo.NodeAddr.All()[i], addr.All()[i]
			tcp := echo(t, topo.World, lab.EchoTCP, world)
			udp := echo(t, topo.World, lab.EchoUDP, world)
			tcpExcluded := echo(t, topo.World, lab.EchoTCP, excluded)
			udpExcluded := echo(t, topo.World, lab.EchoUDP, excluded)
			for _, c := range []struct {
				what   string
				from   *lab.NS
				server *lab.Server
				udp    bool
				want   netip.Addr
			}{
				{"TCP", pod, tcp, false, node},
				{"UDP", pod, udp, true, node},
				{"TCP to an excluded destination", pod, tcpExcluded, false, podAddr},
				{"UDP to an excluded destination", pod, udpExcluded, true, podAddr},
				{"TCP of the node", topo.Node, tcp, false, node},
				{"UDP of the node", topo.Node, udp, true, node},
			} {
				if seen := ask(t, c.from, c.server, c.udp); seen.Addr() != c.want {
					t.Errorf("%s: seen as %s, want %s", c.what, seen, c.want)
				} else if c.want == node && c.from == pod && seen.Port() < 32768 {
					t.Errorf("%s: port %s is not of the pool", c.what, seen)
				}
			}
			if _, err := lab.Ping(within(t, 10*time.Second), pod, world, 7, 1, 56); err != nil {
				t.Error(err)
			}
			if _, err := lab.Ping(within(t, 10*time.Second), pod, excluded, 7, 1, 56); err != nil {
				t.Error(err)
			}
			// From outside: the pod answers with its own address.
			inside := echo(t, pod, lab.EchoTCP, podAddr)
			from := netip.AddrPortFrom(excluded, 0)
			seen, c, err := lab.AskTCP(within(t, 10*time.Second), topo.World, from, inside.Addr)
			if err != nil || seen.Addr() != excluded {
				t.Errorf("from outside: seen as %s, %v", seen, err)
			} else {
				c.Close()
			}
		}
		if n := leaked.N(); n > 0 {
			t.Errorf("%d packets leaked", n)
		}
		n.right()
	})
}

func echo(t testing.TB, ns *lab.NS, serve func(*lab.NS, netip.AddrPort) (*lab.Server, error), a netip.Addr) *lab.Server {
	t.Helper()
	s, err := serve(ns, netip.AddrPortFrom(a, 0))
	if err != nil {
		t.Fatal(err)
	}
	labtest.Close(t, s.Close)
	return s
}

func ask(t testing.TB, ns *lab.NS, s *lab.Server, udp bool) netip.AddrPort {
	t.Helper()
	ctx := within(t, 10*time.Second)
	if udp {
		seen, err := lab.AskUDP(ctx, ns, netip.AddrPort{}, s.Addr, []byte("x"))
		if err != nil {
			t.Fatal(err)
		}
		return seen
	}
	seen, c, err := lab.AskTCP(ctx, ns, netip.AddrPort{}, s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	return seen
}

// The last packets of a connection that conntrack has forgotten are dropped: they would
// leave with the pod's address.
func TestLateFINIsDropped(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		topo := labtest.NewNode(t, lab.Options{})
		n := tables(t, topo.Node, o)
		n.apply(labPolicy(t))
		leaked := leaks(t, topo)
		for _, world := range topo.WorldAddr.All() {
			s := echo(t, topo.World, lab.EchoTCP, world)
			_, c, err := lab.AskTCP(within(t, 10*time.Second), topo.Pods[0], netip.AddrPort{}, s.Addr)
			if err != nil {
				t.Fatal(err)
			}
			n.do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) })
			c.Close() // a FIN, again and again
			labtest.Eventually(t, 10*time.Second, func() error { return n.dropped("drop-stray") })
		}
		if n := leaked.N(); n > 0 {
			t.Errorf("%d packets leaked", n)
		}
	})
}

// A policy in draining, or for a family that is off, translates nothing new and goes on
// with what lives.
func TestDrain(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		topo := labtest.NewNode(t, lab.Options{WorldKnowsPods: true})
		n := tables(t, topo.Node, o)
		n.apply(labPolicy(t))
		leaked := leaks(t, topo)
		var live []func()
		var servers []*lab.Server
		for _, world := range topo.WorldAddr.All() {
			s := echo(t, topo.World, lab.EchoTCP, world)
			servers = append(servers, s)
			_, c, err := lab.AskTCP(within(t, 10*time.Second), topo.Pods[0], netip.AddrPort{}, s.Addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			live = append(live, func() {
				t.Helper()
				c.SetDeadline(time.Now().Add(labtest.Patience(5 * time.Second)))
				if _, err := c.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				if _, err := c.Read(make([]byte, 1)); err != nil {
					t.Fatalf("a living connection broke: %v", err)
				}
			})
		}
		alive := func() {
			t.Helper()
			for _, f := range live {
				f()
			}
			n.right()
		}
		alive()
		off, err := policy.Build(ipv4Only(labPolicy(t).Input()))
		if err != nil {
			t.Fatal(err)
		}
		n.apply(off)
		alive()
		in := labPolicy(t).Input()
		in.Devices = nil
		noDevice, err := policy.Build(in)
		if err != nil {
			t.Fatal(err)
		}
		n.apply(noDevice)
		alive()
		n.do(func() error { return n.tables.Drain(context.Background()) })
		alive()
		if n := leaked.N(); n > 0 {
			t.Errorf("%d packets leaked", n)
		}
		n.do(func() error {
			i, err := Inspect(context.Background(), o)
			if err == nil && !i.Draining() {
				t.Error("not draining")
			}
			return err
		})
		// What is new leaves as it is, and its answers have no way back.
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if seen, err := lab.AskUDP(ctx, topo.Pods[0], netip.AddrPort{}, echo(t, topo.World, lab.EchoUDP, topo.WorldAddr.V4).Addr, nil); err == nil {
			t.Errorf("a new flow is seen as %s", seen)
		}
		if leaked.N() == 0 {
			t.Error("nothing left")
		}
		n.apply(labPolicy(t))
		alive()
		if seen := ask(t, topo.Pods[0], servers[0], false); seen.Addr() != topo.NodeAddr.V4 {
			t.Errorf("seen as %s", seen)
		}
	})
}
