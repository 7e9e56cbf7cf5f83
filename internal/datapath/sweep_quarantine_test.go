package datapath

import (
	"net/netip"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// graveyard opens flows of some pods that all want the same port.
type graveyard struct {
	*bench
	first packet.Packet
}

const wantedPort = 40003

func (g graveyard) flow(pod int) packet.Packet {
	p := g.first
	a := p.Src.AsSlice()
	a[len(a)-1] += byte(pod)
	p.Src, _ = netip.AddrFromSlice(a)
	p.SrcPort = wantedPort
	return p
}

// open sends the first packet of a pod's flow and returns the port it left with.
func (g graveyard) open(pod int) (port uint16) {
	g.t.Helper()
	p := g.flow(pod)
	g.must(g.ns.Do(func() error {
		out, ok, err := g.programs().send(p)
		if err == nil && !ok {
			g.t.Fatalf("pod %d: dropped", pod)
		}
		at := 14 + p.HeaderSize()
		port = uint16(out[at])<<8 | uint16(out[at+1])
		return err
	}))
	return port
}

// answered tells whether an answer to the wanted port is translated.
func (g graveyard) answered(pod int) bool {
	g.t.Helper()
	before := g.count(policy.MasqKnown)
	dev := g.applied.policy.Input().Devices[0]
	p := g.flow(pod).From(dev.Addr(g.first.Src.Is4()), wantedPort).Reply()
	p.Flags = packet.SYN | packet.ACK
	g.must(g.ns.Do(func() error {
		_, _, err := run(g.programs().ingress, p)
		return err
	}))
	return g.count(policy.MasqKnown) > before
}

func (g graveyard) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

// dead counts the ports that wait for their last owner.
func (b *bench) dead() (n int) {
	b.t.Helper()
	for _, table := range b.sweeper.tables {
		for e, err := range table.all(table.reverse) {
			if err != nil {
				b.t.Fatal(err)
			}
			if e.dead() {
				n++
			}
		}
	}
	return n
}

// expire lets all timers end; the walk finds one mapping past them.
func (g graveyard) expire() {
	g.t.Helper()
	g.age(8000)
	if s := g.sweep(); s.Expired != 1 || s.Orphans != 0 {
		g.t.Fatalf("%+v", s)
	}
	g.inspect(func(in *Inspector) error {
		list, err := in.Mappings(Filter{All: true})
		if len(list) != 0 {
			g.t.Errorf("still listed: %+v", list)
		}
		return err
	})
}

// A port whose mapping has ended goes to nobody but its last owner for 120 seconds
// (RFC 6888 REQ-8), unless the end was seen, the address has left, or somebody
// flushes.
func TestQuarantine(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{})
	in := loopPolicy(ports(40000, 10))
	udp, udp6 := tcpFlow(0), tcpFlow6(0)
	udp.Proto, udp6.Proto = packet.UDP, packet.UDP
	for name, first := range map[string]packet.Packet{"TCP": tcpFlow(0), "TCP6": tcpFlow6(0), "UDP": udp, "UDP6": udp6} {
		for story, tell := range map[string]func(*testing.T, graveyard){
			"owner": quarantineOwner, "over": quarantineOver, "closed": quarantineClosed, "flush": quarantineFlush,
			"address": quarantineAddress, "scarce": quarantineScarce,
		} {
			if story == "closed" && first.Proto != packet.TCP {
				continue // nothing else has an end
			}
			t.Run(name+"/"+story, func(t *testing.T) {
				b.t = t
				b.apply(in)
				b.forgetFlows()
				g := graveyard{b, first}
				if n := g.dead(); n != 0 {
					t.Fatalf("%d dead entries from before", n)
				}
				tell(t, g)
			})
		}
	}
}

func quarantineOwner(t *testing.T, g graveyard) {
	for range 2 { // what has come back once comes back again
		if port := g.open(0); port != wantedPort {
			t.Fatalf("the owner got %d", port)
		}
		if !g.answered(0) {
			t.Error("an answer to a mapping was not translated")
		}
		g.expire()
		if g.dead() != 1 || g.answered(0) {
			t.Errorf("%d dead entries, and an answer to one is translated: %v", g.dead(), g.answered(0))
		}
	}
	if port := g.open(1); port == wantedPort {
		t.Error("another pod got the port")
	}
	g.age(110)
	g.sweep()
	if port := g.open(2); port == wantedPort {
		t.Error("another pod got the port after 110 s")
	}
	if port := g.open(0); port != wantedPort || g.dead() != 0 || !g.answered(0) {
		t.Errorf("the owner got %d, %d dead entries", port, g.dead())
	}
	g.checkBijection(ports(40000, 10))
	if err := g.checkPods(); err != nil {
		t.Error(err)
	}
}

func quarantineOver(t *testing.T, g graveyard) {
	g.open(0)
	g.expire()
	g.age(quarantine + 1)
	g.sweep()
	if port := g.open(1); port != wantedPort || g.dead() != 0 {
		t.Errorf("another pod got %d, %d dead entries", port, g.dead())
	}
}

func quarantineClosed(t *testing.T, g graveyard) {
	g.talk(g.flow(0), false, []step{{flags: syn}, {true, syn | ack}, {flags: ack}, {flags: rst}})
	g.expire()
	if port := g.open(1); port != wantedPort || g.dead() != 0 {
		t.Errorf("another pod got %d, %d dead entries", port, g.dead())
	}
}

func quarantineFlush(t *testing.T, g graveyard) {
	g.open(0)
	g.expire()
	for pod, left := range []int{1, 0} { // the second filter selects the owner
		g.inspect(func(in *Inspector) error {
			n, err := in.Flush(Filter{Pod: g.flow(1 - pod).Src})
			if n != 0 || g.dead() != left {
				t.Errorf("%d mappings flushed, %d dead entries left", n, g.dead())
			}
			return err
		})
	}
}

func quarantineAddress(t *testing.T, g graveyard) {
	g.open(0)
	g.expire()
	in := loopPolicy(ports(40000, 10))
	in.Devices[0].IPv4, in.Devices[0].IPv6 = netip.MustParseAddr("192.0.2.77"), netip.MustParseAddr("2001:db8:2::77")
	in.HostAddrs = []netip.Addr{in.Devices[0].IPv4, in.Devices[0].IPv6}
	g.apply(in)
	if s := g.sweep(); g.dead() != 0 || s.Vanished != 0 {
		t.Errorf("%d dead entries: %+v", g.dead(), s)
	}
}

// Eight of ten ports towards one remote wait: too many.
func quarantineScarce(t *testing.T, g graveyard) {
	for pod := range 8 {
		g.open(pod)
	}
	g.age(8000)
	g.sweep()
	if g.dead() != 8 {
		t.Errorf("%d dead entries", g.dead())
	}
	g.sweep()
	g.sweep()
	if g.dead() != 0 {
		t.Errorf("%d dead entries, but ports are scarce", g.dead())
	}
}
