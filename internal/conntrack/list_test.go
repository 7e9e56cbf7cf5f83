package conntrack

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

func TestListTCP(t *testing.T) {
	eachBackend(t, func(t *testing.T, r *rig) {
		r.families(func(t *testing.T, pod, world, node netip.Addr) {
			c := r.connect(pod, world)
			pass(t, c.pod, c.world, 1000)
			src, dst := local(c.pod), local(c.world)
			seen := netip.MustParseAddrPort(c.world.RemoteAddr().String())
			f := r.find(unix.IPPROTO_TCP, src, dst)
			if f.Xlate != seen || f.Xlate.Addr() != node || f.Remote != dst || !f.SNAT || f.DNAT {
				t.Errorf("%+v, the world saw %s", f, seen)
			}
			if f.State != Established || !f.Assured || f.Timeout < time.Hour || time.Since(f.Created).Abs() > time.Minute {
				t.Errorf("state: %+v", f)
			}
			if f.Packets[0] < 3 || f.Packets[1] < 2 || f.Bytes[0] < 1000 || f.Bytes[1] < 80 {
				t.Errorf("counters: %+v", f)
			}
			// Half-closed it goes on, closed it does not.
			c.pod.CloseWrite()
			if _, err := c.world.Read(make([]byte, 1)); err == nil {
				t.Error("no end of the stream")
			}
			if f := r.find(unix.IPPROTO_TCP, src, dst); f.State != Established {
				t.Errorf("half-closed: %s", f.State)
			}
			c.world.Close()
			labtest.Eventually(t, 10*time.Second, func() error {
				if f := r.find(unix.IPPROTO_TCP, src, dst); f.State != Closing {
					return errors.New(f.State)
				}
				return nil
			})
		})
	})
}

func TestListQueries(t *testing.T) {
	eachBackend(t, func(t *testing.T, r *rig) {
		r.families(func(t *testing.T, pod, world, node netip.Addr) {
			server, err := lab.EchoUDP(r.World, netip.AddrPortFrom(world, 0))
			if err != nil {
				t.Fatal(err)
			}
			labtest.Close(t, server.Close)
			src := netip.AddrPortFrom(pod, 5000)
			c, err := lab.DialUDP(t.Context(), r.Pods[0], src, server.Addr)
			if err != nil {
				t.Fatal(err)
			}
			labtest.Close(t, c.Close)
			seen, err := lab.AskUDPOn(within(t), c, []byte("x"))
			if err != nil {
				t.Fatal(err)
			}
			if f := r.find(unix.IPPROTO_UDP, src, server.Addr); f.Xlate != seen || !f.SNAT || f.State != TwoWay {
				t.Errorf("%+v, the world saw %s", f, seen)
			}
			if _, err := lab.Ping(within(t), r.Pods[0], world, 77, 1, 10); err != nil {
				t.Fatal(err)
			}
			proto := uint8(unix.IPPROTO_ICMP)
			if world.Is6() {
				proto = unix.IPPROTO_ICMPV6
			}
			f := r.find(proto, netip.AddrPortFrom(pod, 77), netip.AddrPortFrom(world, 0))
			if f.Xlate.Addr() != node || f.State != Query || f.ICMPType != 0 {
				t.Errorf("%+v", f)
			}
		})
	})
}

func TestListFilters(t *testing.T) {
	eachBackend(t, func(t *testing.T, r *rig) {
		c4, c6 := r.connect(r.PodAddrs[0].V4, r.WorldAddr.V4), r.connect(r.PodAddrs[0].V6, r.WorldAddr.V6)
		// The node's own connection is not translated.
		l, err := lab.EchoTCP(r.World, netip.AddrPortFrom(r.WorldAddr.V4, 0))
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, l.Close)
		_, own, err := lab.AskTCP(within(t), r.Node, netip.AddrPort{}, l.Addr)
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, own.Close)
		r.find(unix.IPPROTO_TCP, local(own), l.Addr)

		got := r.list(Filter{Translated: true})
		if len(got) != 2 {
			t.Errorf("translated: %v", got)
		}
		got = r.list(Filter{Sources: []netip.Prefix{lab.PodRange6}})
		if len(got) != 1 || got[0].Src != local(c6.pod) {
			t.Errorf("sources: %v", got)
		}
		got = r.list(Filter{Sources: []netip.Prefix{netip.PrefixFrom(r.PodAddrs[0].V4, 32)}, Translated: true})
		if len(got) != 1 || got[0].Src != local(c4.pod) {
			t.Errorf("one pod: %v", got)
		}
		err = r.Node.Do(func() error {
			_, err := List(t.Context(), Filter{Translated: true, Limit: 1})
			return err
		})
		if !errors.Is(err, ErrTooMany) {
			t.Errorf("limit: %v", err)
		}
	})
}

// The same addresses may be in several zones, each with a translation of its own.
func TestZonesAreApart(t *testing.T) {
	eachBackend(t, func(t *testing.T, r *rig) {
		r.families(func(t *testing.T, pod, world, node netip.Addr) {
			f := Flow{
				Proto: unix.IPPROTO_UDP, Src: netip.AddrPortFrom(pod, 1111), Dst: netip.AddrPortFrom(world, 2222),
				Xlate: netip.AddrPortFrom(node, 3333), State: TwoWay,
			}
			other := f
			other.Zone, other.Xlate = 7, netip.AddrPortFrom(node, 4444)
			r.mustCreate(f, other)
			if got := r.find(f.Proto, f.Src, f.Dst); got.Xlate != f.Xlate || got.Zone != 0 {
				t.Errorf("zone 0: %+v", got)
			}
			zones := make(map[uint16]netip.AddrPort)
			for _, got := range r.list(Filter{AnyZone: true}) {
				if got.Src == f.Src {
					zones[got.Zone] = got.Xlate
				}
			}
			if len(zones) != 2 || zones[7] != other.Xlate {
				t.Errorf("zones: %v", zones)
			}
			if n := r.remove(other); n != 1 {
				t.Errorf("%d removed", n)
			}
			r.find(f.Proto, f.Src, f.Dst)
		})
	})
}
