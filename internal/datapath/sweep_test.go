package datapath

import (
	"context"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// shift moves the clock stamps of a table into the past.
func shift[K comparable, V any](t testing.TB, m *ebpf.Map, back func(*V)) {
	t.Helper()
	var key K
	var value V
	var keys []K
	it := m.Iterate()
	for it.Next(&key, &value) {
		keys = append(keys, key)
	}
	for _, key := range keys {
		if err := m.Lookup(key, &value); err != nil {
			t.Fatal(err)
		}
		back(&value)
		if err := m.Update(key, value, ebpf.UpdateExist); err != nil {
			t.Fatal(err)
		}
	}
}

// age makes all entries older and longer silent.
func (b *bench) age(seconds uint32) {
	b.t.Helper()
	flow := func(f *masqFlow) { f.Seen -= seconds; f.Created -= seconds }
	in := func(v *masqInbound) { v.Seen -= seconds; v.Created -= seconds }
	o := &b.objs
	for _, m := range []*ebpf.Map{o.Forward4, o.Reverse4} {
		shift[masqTuple4](b.t, m, func(v *masqFlow4) { flow(&v.Flow) })
	}
	for _, m := range []*ebpf.Map{o.Forward6, o.Reverse6} {
		shift[masqTuple](b.t, m, func(v *masqFlow6) { flow(&v.Flow) })
	}
	shift[masqTuple4](b.t, o.Inbound4, in)
	shift[masqTuple](b.t, o.Inbound6, in)
}

// step is a packet of a conversation: with flags, from the pod or from the remote.
type step struct {
	back  bool
	flags uint8
}

// talk runs a conversation that the first packet opens; the remote answers to
// where it came from. A packet opened from outside arrives at the pod's address.
func (b *bench) talk(first packet.Packet, outside bool, steps []step) {
	b.t.Helper()
	progs := b.programs()
	err := b.ns.Do(func() error {
		external := first
		for _, s := range steps {
			p, prog := first, progs.egress
			if s.back {
				p, prog = external.Reply(), progs.ingress
			}
			p.Flags = s.flags
			if _, _, err := run(prog, p); err != nil {
				return err
			}
			if !s.back && !outside {
				forward, _ := b.entries()
				for _, e := range forward {
					if e.key.local.Addr() == first.Src && e.key.proto == first.Proto {
						external = first.From(e.xlate.Addr(), e.xlate.Port())
					}
				}
			}
		}
		return nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

const (
	syn, ack = packet.SYN, packet.ACK
	fin, rst = packet.FIN | packet.ACK, packet.RST
)

// Each protocol and state has the timer of its own: it lives to the last second
// of it and not much longer. Both families in one go.
func TestSweepTimers(t *testing.T) {
	t.Parallel()
	limits := policy.Timeouts{TCPSyn: 20 * time.Second, TCPEstablished: 1000 * time.Second, TCPClosing: 30 * time.Second,
		UDP: 40 * time.Second, UDPStream: 100 * time.Second, ICMP: 50 * time.Second, Other: 200 * time.Second}
	out, back := func(f uint8) step { return step{flags: f} }, func(f uint8) step { return step{true, f} }
	established := []step{out(syn), back(syn | ack), out(ack)}
	then := func(steps ...step) []step { return append(append([]step(nil), established...), steps...) }
	cases := []struct {
		name    string
		proto   uint8
		outside bool
		steps   []step
		timer   time.Duration
		state   string
	}{
		{"TCP SYN", packet.TCP, false, []step{out(syn)}, limits.TCPSyn, "syn"},
		{"TCP SYN answered", packet.TCP, false, []step{out(syn), back(syn | ack)}, limits.TCPSyn, "syn"},
		{"TCP unanswered data", packet.TCP, false, []step{out(ack)}, limits.TCPSyn, "syn"},
		{"TCP established", packet.TCP, false, established, limits.TCPEstablished, "established"},
		{"TCP closed by the pod only", packet.TCP, false, then(out(fin)), limits.TCPEstablished, "established"},
		{"TCP closed by the remote only", packet.TCP, false, then(back(fin)), limits.TCPEstablished, "established"},
		{"TCP closed by both", packet.TCP, false, then(out(fin), back(fin)), limits.TCPClosing, "closing"},
		{"TCP reset by the pod", packet.TCP, false, then(out(rst)), limits.TCPClosing, "closing"},
		{"TCP reset by the remote", packet.TCP, false, then(back(rst)), limits.TCPClosing, "closing"},
		{"TCP survives a reset", packet.TCP, false, then(back(rst), back(ack)), limits.TCPEstablished, "established"},
		{"TCP opened again", packet.TCP, false, then(out(fin), back(fin), out(syn)), limits.TCPSyn, "syn"},
		{"UDP one way", packet.UDP, false, []step{out(0)}, limits.UDP, "one-way"},
		{"UDP two ways", packet.UDP, false, []step{out(0), back(0)}, limits.UDPStream, "two-way"},
		{"UDP-Lite two ways", packet.UDPLite, false, []step{out(0), back(0)}, limits.UDPStream, "two-way"},
		{"echo", packet.ICMP, false, []step{out(0), back(0)}, limits.ICMP, "query"},
		{"SCTP", packet.SCTP, false, []step{out(0), back(0)}, limits.Other, "two-way"},
		{"GRE", packet.GRE, false, []step{out(0)}, limits.Other, "one-way"},
		{"inbound TCP SYN", packet.TCP, true, []step{back(syn)}, limits.TCPSyn, "syn"},
		{"inbound TCP established", packet.TCP, true, []step{back(syn), out(syn | ack), back(ack)}, limits.TCPEstablished, "established"},
		{"inbound TCP closed", packet.TCP, true, []step{back(syn), out(syn | ack), back(ack), back(fin), out(fin)}, limits.TCPClosing, "closing"},
		{"inbound UDP", packet.UDP, true, []step{back(0), out(0)}, limits.UDP, "one-way"},
	}
	b := newBench(t, labtest.NewNS(t), Options{})
	in := loopPolicy(ports(40000, 1000))
	in.Timeouts = limits
	b.apply(in)
	family := map[bool]familyFacts{
		true:  {netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("198.51.100.1"), packet.ICMP, 8},
		false: {netip.MustParseAddr("fd00::9"), netip.MustParseAddr("2001:db8:99::1"), packet.ICMPv6, 128},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b.t = t
			b.forgetFlows()
			for _, f := range family {
				p := packet.Packet{Src: f.pod, Dst: f.remote, SrcPort: 5000, DstPort: 443, Proto: c.proto, Payload: make([]byte, 8)}
				if c.proto == packet.ICMP {
					p.Proto, p.Type, p.Ident = f.icmp, f.echo, 77
				}
				b.talk(p, c.outside, c.steps)
			}
			b.checkStates(2, c.state)
			seconds := uint32(c.timer / time.Second)
			b.age(seconds - 2)
			if s := b.sweep(); s.Expired+s.Orphans+s.Vanished != 0 {
				t.Errorf("too early: %+v", s)
			}
			b.age(4)
			s := b.sweep()
			if s.Expired != 2 || s.Orphans+s.Vanished != 0 {
				t.Errorf("too late: %+v", s)
			}
			b.checkStates(0, "")
		})
	}
}

type familyFacts struct {
	pod, remote netip.Addr
	icmp, echo  uint8
}

// checkStates compares what a reader sees of the connections.
func (b *bench) checkStates(n int, state string) {
	b.t.Helper()
	b.inspect(func(in *Inspector) error {
		all, err := in.Mappings(Filter{All: true})
		seen := 0
		for _, m := range all {
			if m.State != state {
				b.t.Errorf("state %s, want %s: %+v", m.State, state, m)
			}
			if m.Out || m.Kind == KindInbound {
				seen++
			}
		}
		if seen != n {
			b.t.Errorf("%d connections, want %d: %+v", seen, n, all)
		}
		return err
	})
}

// The stories below share a data plane: to load it takes longer than to tell them.
func TestSweep(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{})
	for name, story := range map[string]func(*testing.T, *bench){
		"clock": sweepClock, "orphans": sweepOrphans, "vanished address": sweepVanishedAddress, "while flows go on": sweepWhileFlowsGoOn,
		"refresh": sweepRefresh,
	} {
		t.Run(name, func(t *testing.T) {
			b.t = t
			b.forgetFlows()
			story(t, b)
		})
	}
}

// Short timers expire by the clock alone, which is the monotonic one: no step of
// the wall clock reaches the stamps.
func sweepClock(t *testing.T, b *bench) {
	in := loopPolicy(ports(40000, 10))
	in.Timeouts.UDP = time.Second
	b.apply(in)
	p := tcpFlow(0)
	p.Proto = packet.UDP
	before, err := monotonicSeconds()
	if err != nil {
		t.Fatal(err)
	}
	b.talk(p, false, []step{{}})
	after, _ := monotonicSeconds()
	forward, _ := b.entries()
	if len(forward) != 1 || forward[0].seen+1 < before || forward[0].seen > after {
		t.Fatalf("%+v not seen between %d and %d", forward, before, after)
	}
	labtest.Eventually(t, 10*time.Second, func() error {
		if s := b.sweep(); s.Expired == 1 {
			return nil
		}
		return context.DeadlineExceeded
	})
}

// An entry without its other half ends within a sweep, once it is old enough to
// be no half-made mapping; its flow is never without a port because of it.
func sweepOrphans(t *testing.T, b *bench) {
	b.apply(loopPolicy(ports(40000, 1)))
	b.open1(t, tcpFlow, 1)
	forward, _ := b.entries()
	k := forward[0].key
	if err := b.objs.Forward4.Delete(masqTuple4{Local: addr4To(k.local.Addr()), Remote: addr4To(k.remote.Addr()),
		Lport: swapPort(k.local.Port()), Rport: swapPort(k.remote.Port()), Proto: k.proto}); err != nil {
		t.Fatal(err)
	}
	if s := b.sweep(); s.Orphans != 0 {
		t.Errorf("taken for an orphan at once: %+v", s)
	}
	b.age(10)
	if s := b.sweep(); s.Orphans != 1 || s.Expired != 0 {
		t.Errorf("orphan not found: %+v", s)
	}
	b.open1(t, func(int) packet.Packet { return tcpFlow(1) }, 1) // the port is free again
	b.checkBijection(ports(40000, 1))
	if forward, _ := b.entries(); len(forward) != 1 {
		t.Errorf("%d flows", len(forward))
	}
}

// Mappings whose external address has left the node end in one sweep, however
// many they are; others stay.
func sweepVanishedAddress(t *testing.T, b *bench) {
	in := loopPolicy(ports(40000, 1000))
	b.apply(in)
	b.open1(t, tcpFlow, 300)
	b.open1(t, tcpFlow6, 10)
	moved := netip.MustParseAddr("192.0.2.77")
	in.Devices = []policy.Device{in.Devices[0]}
	in.Devices[0].IPv4 = moved
	kept := in
	kept.HostAddrs = append(kept.HostAddrs, moved)
	b.apply(kept)
	if s := b.sweep(); s.Vanished != 0 {
		t.Errorf("the old address is still the node's: %+v", s)
	}
	in.HostAddrs = []netip.Addr{moved, in.Devices[0].IPv6}
	b.apply(in)
	if s := b.sweep(); s.Vanished != 300 || s.Usage[0].Flows != 0 || s.Usage[1].Flows != 10 {
		t.Errorf("the old address has left: %+v", s)
	}
	b.checkBijection(ports(40000, 1000))
}

// A full table shortens the timers of all but established TCP.
func TestSweepPressure(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{DefaultFlows: 64})
	b.apply(loopPolicy(ports(40000, 1000)))
	b.talk(tcpFlow(5000), false, []step{{flags: syn}, {true, syn | ack}, {flags: ack}})
	b.open1(t, tcpFlow, 63)
	b.age(30) // a tenth of the SYN timer is 24 s
	if s := b.sweep(); s.Expired != 0 || s.Usage[0].Flows != 64 {
		t.Errorf("the first sweep only counts: %+v", s)
	}
	if s := b.sweep(); s.Expired != 63 || s.Usage[0].Flows != 1 {
		t.Errorf("under pressure: %+v", s)
	}
	b.checkStates(1, "established")
}

// While the reaper takes mappings away by force, flows go on using them and open
// them again: afterwards no two flows share an external tuple.
func sweepWhileFlowsGoOn(t *testing.T, b *bench) {
	pool := ports(40000, 4)
	b.apply(loopPolicy(pool))
	progs := b.programs()
	const senders = 3
	var running atomic.Int32
	running.Store(senders)
	parallel(t, b, senders+1, func(thread int) error {
		if thread == senders {
			for running.Load() > 0 {
				b.forgetFlows()
			}
			return nil
		}
		defer running.Add(-1)
		for i := range 2000 {
			if _, _, err := progs.send(tcpFlow((i + thread) % 6)); err != nil {
				return err
			}
		}
		return nil
	})
	forward, _ := b.entries()
	owner := make(map[flowKey]flowKey)
	for _, e := range forward {
		if other, taken := owner[e.reverseKey()]; taken {
			t.Errorf("%v and %v share %v", other, e.key, e.reverseKey())
		}
		owner[e.reverseKey()] = e.key
	}
}
