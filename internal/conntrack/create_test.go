package conntrack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// described is what another translator would say about a connection.
func described(f Flow) Flow {
	return Flow{Proto: f.Proto, Src: f.Src, Dst: f.Dst, Xlate: f.Xlate, State: f.State}
}

// noLeak watches the wire for packets with a pod's address.
func (r *rig) noLeak(t *testing.T) {
	t.Helper()
	leaks := labtest.Capture(t, r.World, "eth0", lab.CaptureOptions{})
	t.Cleanup(func() {
		if leaks.Saw(lab.SourceIn(lab.PodRange4, lab.PodRange6)) {
			t.Error("a packet left with the pod's address")
		}
	})
}

// A running connection is taken over from its description, without a rule: the entry
// alone translates. Whoever speaks first, no segment is sent twice; on a busy machine TCP
// may do so by itself, but not each time.
func TestCreateTCP(t *testing.T) {
	eachBackend(t, func(t *testing.T, r *rig) {
		r.families(func(t *testing.T, pod, world, node netip.Addr) {
			r.noLeak(t)
			for _, podFirst := range []bool{true, false} {
				again := r.createTCP(t, pod, world, podFirst)
				for try := 1; again > 0 && try < 3; try++ {
					t.Logf("%d retransmits", again)
					again = r.createTCP(t, pod, world, podFirst)
				}
				if again > 0 {
					t.Errorf("%d retransmits", again)
				}
			}
		})
	})
}

// createTCP takes over one connection, and counts the segments that were sent twice.
func (r *rig) createTCP(t *testing.T, pod, world netip.Addr, podFirst bool) (again uint32) {
	t.Helper()
	c := r.connect(pod, world)
	pass(t, c.pod, c.world, 100000)
	f := r.find(unix.IPPROTO_TCP, local(c.pod), local(c.world))
	// Delayed acknowledgments are through when both ends have nothing to say.
	r.quiet(f)
	r.masquerade(false)
	if n := r.remove(f); n != 1 {
		t.Fatalf("%d removed", n)
	}
	r.mustCreate(described(f))
	before := retransmits(t, c.pod) + retransmits(t, c.world)
	ends := []*net.TCPConn{c.pod, c.world}
	if !podFirst {
		ends[0], ends[1] = ends[1], ends[0]
	}
	pass(t, ends[0], ends[1], 300000)
	pass(t, ends[1], ends[0], 300000)
	pass(t, ends[0], ends[1], 1000)
	again = retransmits(t, c.pod) + retransmits(t, c.world) - before
	got := r.find(f.Proto, f.Src, f.Dst)
	if got.Xlate != f.Xlate || got.State != Established || !got.SNAT || !got.Assured {
		t.Errorf("%+v", got)
	}
	ends[0].Close()
	if _, err := ends[1].Read(make([]byte, 1)); err == nil {
		t.Error("no end of the stream")
	}
	ends[1].Close()
	labtest.Eventually(t, 10*time.Second, func() error {
		if f := r.find(f.Proto, f.Src, f.Dst); f.State != Closing {
			return errors.New(f.State)
		}
		return nil
	})
	r.masquerade(true)
	return again
}

// quiet waits until a connection has had no packet for a while.
func (r *rig) quiet(f Flow) {
	r.t.Helper()
	var last [2]uint64
	since := time.Now()
	labtest.Eventually(r.t, 10*time.Second, func() error {
		now := r.find(f.Proto, f.Src, f.Dst).Packets
		if now != last {
			last, since = now, time.Now()
		}
		if time.Since(since) < 100*time.Millisecond {
			return errors.New("packets go on")
		}
		return nil
	})
}

func TestCreateUDP(t *testing.T) {
	eachBackend(t, func(t *testing.T, r *rig) {
		r.families(func(t *testing.T, pod, world, node netip.Addr) {
			r.masquerade(false)
			defer r.masquerade(true)
			r.noLeak(t)
			for i, podFirst := range []bool{true, false} {
				outside, err := lab.ListenUDP(r.World, netip.AddrPortFrom(world, 0))
				if err != nil {
					t.Fatal(err)
				}
				labtest.Close(t, outside.Close)
				inside, err := lab.DialUDP(t.Context(), r.Pods[0], netip.AddrPortFrom(pod, 0), local(outside))
				if err != nil {
					t.Fatal(err)
				}
				labtest.Close(t, inside.Close)
				external := netip.AddrPortFrom(node, uint16(45000+i))
				r.mustCreate(Flow{Proto: unix.IPPROTO_UDP, Src: local(inside), Dst: local(outside), Xlate: external, State: TwoWay})
				say := func() {
					if _, err := inside.Write([]byte("out")); err != nil {
						t.Fatal(err)
					}
					if from, text := receive(t, outside); text != "out" || from != external {
						t.Fatalf("%q from %s", text, from)
					}
				}
				if podFirst {
					say()
				}
				if _, err := outside.WriteToUDPAddrPort([]byte("in"), external); err != nil {
					t.Fatal(err)
				}
				if from, text := receive(t, inside); text != "in" || from != local(outside) {
					t.Fatalf("%q from %s", text, from)
				}
				say()
			}
		})
	})
}

func receive(t *testing.T, c *net.UDPConn) (netip.AddrPort, string) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(labtest.Patience(5 * time.Second)))
	buf := make([]byte, 100)
	n, from, err := c.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatal(err)
	}
	return netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), string(buf[:n])
}

func TestCreateEcho(t *testing.T) {
	eachBackend(t, func(t *testing.T, r *rig) {
		r.families(func(t *testing.T, pod, world, node netip.Addr) {
			r.masquerade(false)
			defer r.masquerade(true)
			r.noLeak(t)
			proto := uint8(unix.IPPROTO_ICMP)
			if world.Is6() {
				proto = unix.IPPROTO_ICMPV6
			}
			f := Flow{
				Proto: proto, Src: netip.AddrPortFrom(pod, 100), Dst: netip.AddrPortFrom(world, 0),
				Xlate: netip.AddrPortFrom(node, 200), State: Query,
			}
			r.mustCreate(f)
			wire := labtest.Capture(t, r.World, "eth0", lab.CaptureOptions{})
			if _, err := lab.Ping(within(t), r.Pods[0], world, 100, 1, 10); err != nil {
				t.Fatal(err)
			}
			asked := func(p lab.Packet) bool {
				f, ok := lab.ParseFrame(p.Data)
				return ok && f.Src == node && f.Proto == proto && len(f.L4) > 8 && f.L4[4] == 0 && f.L4[5] == 200
			}
			labtest.Eventually(t, 5*time.Second, func() error {
				if !wire.Saw(asked) {
					return errors.New("no echo request with the identifier 200")
				}
				return nil
			})
			if got := r.find(f.Proto, f.Src, f.Dst); got.Xlate != f.Xlate || got.State != Query {
				t.Errorf("%+v", got)
			}
		})
	})
}

// Both ends translated, as a pod's connection to a service with an endpoint outside.
func TestCreateService(t *testing.T) {
	eachBackend(t, func(t *testing.T, r *rig) {
		r.families(func(t *testing.T, pod, world, node netip.Addr) {
			r.masquerade(false)
			defer r.masquerade(true)
			service := netip.MustParseAddr("10.96.0.10")
			if world.Is6() {
				service = netip.MustParseAddr("fd00:96::10")
			}
			server, err := lab.EchoUDP(r.World, netip.AddrPortFrom(world, 0))
			if err != nil {
				t.Fatal(err)
			}
			labtest.Close(t, server.Close)
			f := Flow{
				Proto: unix.IPPROTO_UDP, Src: netip.AddrPortFrom(pod, 1234), Dst: netip.AddrPortFrom(service, 53),
				Xlate: netip.AddrPortFrom(node, 50001), Remote: server.Addr, State: TwoWay,
			}
			r.mustCreate(f)
			seen, err := lab.AskUDP(within(t), r.Pods[0], f.Src, f.Dst, []byte("x"))
			if err != nil || seen != f.Xlate {
				t.Errorf("seen as %s, %v", seen, err)
			}
			if got := r.find(f.Proto, f.Src, f.Dst); got.Remote != f.Remote || got.Xlate != f.Xlate || !got.SNAT || !got.DNAT {
				t.Errorf("%+v", got)
			}
		})
	})
}

func TestCreateRefuses(t *testing.T) {
	eachBackend(t, func(t *testing.T, r *rig) {
		r.families(func(t *testing.T, pod, world, node netip.Addr) {
			f := Flow{
				Proto: unix.IPPROTO_TCP, Src: netip.AddrPortFrom(pod, 1111), Dst: netip.AddrPortFrom(world, 2222),
				Xlate: netip.AddrPortFrom(node, 3333), State: Established,
			}
			r.mustCreate(f)
			taken := f // another pod's, by the same external port
			taken.Src = netip.AddrPortFrom(r.PodAddrs[1].Of(world), 1111)
			sctp := f
			sctp.Proto = unix.IPPROTO_SCTP
			mixed := f
			mixed.Xlate = netip.MustParseAddrPort("192.0.2.9:1")
			if world.Is4() {
				mixed.Xlate = netip.MustParseAddrPort("[2001:db8::9]:1")
			}
			fine := f
			fine.Src, fine.Xlate = netip.AddrPortFrom(pod, 1112), netip.AddrPortFrom(node, 3334)
			n, err := r.create(f, taken, sctp, mixed, fine)
			var refused *RefusedError
			if n != 1 || !errors.As(err, &refused) || len(refused.Refused) != 4 {
				t.Fatalf("%d created, %v", n, err)
			}
			for i, want := range []error{unix.EEXIST, unix.EEXIST, errSCTP, errFamily} {
				if got := refused.Refused[i]; !errors.Is(got.Err, want) {
					t.Errorf("%s: %v, want %v", got.Flow, got.Err, want)
				}
			}
			if got := r.find(f.Proto, f.Src, f.Dst); got.Xlate != f.Xlate {
				t.Errorf("the first one was changed: %+v", got)
			}
			sctp.SCTPTags = [2]uint32{1, 2}
			r.mustCreate(sctp)
			if got := r.find(sctp.Proto, sctp.Src, sctp.Dst); got.Xlate != f.Xlate || got.SCTPTags != sctp.SCTPTags {
				t.Errorf("%+v", got)
			}
		})
	})
}

func TestDelete(t *testing.T) {
	eachBackend(t, func(t *testing.T, r *rig) {
		c4, c6 := r.connect(r.PodAddrs[0].V4, r.WorldAddr.V4), r.connect(r.PodAddrs[0].V6, r.WorldAddr.V6)
		flows := r.list(Filter{Translated: true})
		if len(flows) != 2 {
			t.Fatalf("%v", flows)
		}
		old := flows[0]
		old.ID++ // another connection with the same addresses, which is gone
		if n := r.remove(old); n != 0 {
			t.Errorf("removed %d for another one", n)
		}
		if n := r.remove(flows...); n != 2 {
			t.Errorf("%d removed", n)
		}
		if n := r.remove(flows...); n != 0 {
			t.Errorf("%d removed again", n)
		}
		if left := r.list(Filter{Translated: true}); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
		// Netfilter picks the connections up again by its rules, as new ones.
		pass(t, c4.pod, c4.world, 100)
		pass(t, c6.pod, c6.world, 100)
	})
}

func TestCanceled(t *testing.T) {
	labtest.Root(t)
	ns := labtest.NewNS(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := ns.Do(func() error {
		_, err := Create(ctx, []Flow{{}})
		return err
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
