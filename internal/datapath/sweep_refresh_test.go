package datapath

import (
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab/packet"
)

// arrive sends an answer, without anything of the pod before it.
func (b *bench) arrive(t *testing.T, p packet.Packet) {
	t.Helper()
	forward, _ := b.entries()
	if len(forward) != 1 {
		t.Fatalf("%d flows", len(forward))
	}
	reply := p.From(forward[0].xlate.Addr(), forward[0].xlate.Port()).Reply()
	reply.Flags = p.Flags
	if err := b.ns.Do(func() error { _, _, err := run(b.programs().ingress, reply); return err }); err != nil {
		t.Fatal(err)
	}
}

// Packets of both directions keep a mapping, for its timer and no longer (RFC 4787
// REQ-6 and 6a): but for resets that follow a reset.
func sweepRefresh(t *testing.T, b *bench) {
	in := loopPolicy(ports(40000, 10))
	in.Timeouts.UDPStream, in.Timeouts.TCPClosing = 100*time.Second, 30*time.Second
	b.apply(in)
	alive := func(what string, want bool) {
		t.Helper()
		if s := b.sweep(); (s.Expired == 0) != want || s.Orphans != 0 {
			t.Errorf("%s: %+v, want alive: %v", what, s, want)
		}
	}
	udp := tcpFlow(0)
	udp.Proto = packet.UDP
	b.talk(udp, false, []step{{}, {back: true}})
	for range 3 {
		b.age(90)
		b.arrive(t, udp)
		alive("udp, the remote speaks", true)
	}
	for range 3 {
		b.age(90)
		b.talk(udp, false, []step{{}})
		alive("udp, the pod speaks", true)
	}
	b.age(103)
	alive("udp, silent", false)

	tcp := tcpFlow(1)
	reset := func(back bool) {
		t.Helper()
		if tcp.Flags = packet.RST; back {
			b.arrive(t, tcp)
		} else {
			b.talk(tcp, false, []step{{flags: packet.RST}})
		}
	}
	for _, back := range []bool{false, true} {
		b.talk(tcp, false, []step{{flags: syn}, {true, syn | ack}, {flags: ack}, {true, ack}})
		b.age(1000)
		reset(back)
		b.age(25)
		alive("tcp, reset", true)
		reset(back)
		b.age(10)
		alive("tcp, reset again", false)
	}
}
