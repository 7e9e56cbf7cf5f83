package datapath

import (
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// inbound returns a packet from outside to a port of f.pod, and the pod's answer.
func (f family) inbound(flags uint8) (open, answer packet.Packet) {
	open = f.tcp(flags).Reply()
	open.Flags = flags
	return open, f.tcp(packet.SYN | packet.ACK)
}

// Line 9: what belongs to a connection opened from outside passes, until the pod
// opens one of its own on the same tuple.
func testInbound(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		syn, answer := f.inbound(packet.SYN)
		r.expect(egress, answer, policy.DropStray)
		r.expect(ingress, syn, policy.PassInbound)
		r.expect(egress, answer, policy.PassInbound)
		r.expect(ingress, withFlags(syn, packet.ACK), policy.PassInbound)
		for _, flags := range []uint8{packet.ACK, packet.ACK | packet.PSH, packet.FIN | packet.ACK, packet.RST, 0, packet.SYN | packet.FIN} {
			r.expect(egress, f.tcp(flags), policy.PassInbound)
		}
		// A port next to it is another connection.
		next := answer
		next.DstPort++
		r.expect(egress, next, policy.DropStray)

		out := r.translate(f.tcp(packet.SYN), policy.MasqNew, f.node)
		if n := len(r.flows(inboundTable)); n != 0 {
			t.Errorf("%d inbound entries survive the pod's SYN", n)
		}
		// The mapping lives: an arriving SYN for the pod's own address opens nothing now.
		r.expect(ingress, syn, policy.PassNoMapping)
		r.send(egress, f.tcp(packet.ACK), policy.MasqKnown, withFlags(out, packet.ACK))
	})
}

// withFlags returns p with other TCP flags.
func withFlags(p packet.Packet, flags uint8) packet.Packet {
	p.Flags = flags
	return p
}

// Cilium issue 47425: a late packet of the server, after the mapping has died,
// must not make the pod's next connection on that port an inbound one.
func testInboundLatePacket(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		syn := f.tcp(packet.SYN)
		out := r.translate(syn, policy.MasqNew, f.node)
		// Translated back, it opens nothing.
		r.send(ingress, out.Reply(), policy.MasqKnown, syn.Reply())
		if n := len(r.flows(inboundTable)); n != 0 {
			t.Fatalf("%d inbound entries after a translated packet", n)
		}
		// The forward half is gone first: the reverse half still translates.
		r.drop(forwardTable)
		r.send(ingress, withFlags(out.Reply(), packet.ACK), policy.MasqKnown, withFlags(syn.Reply(), packet.ACK))
		if n := len(r.flows(inboundTable)); n != 0 {
			t.Fatalf("%d inbound entries after a late packet", n)
		}
		r.drop(reverseTable)
		r.expect(ingress, withFlags(out.Reply(), packet.ACK), policy.PassNoMapping)
		// Also one that comes to the pod's own address by another way.
		r.expect(ingress, withFlags(syn.Reply(), packet.ACK), policy.PassNoMapping)
		again := r.translate(syn, policy.MasqNew, f.node)
		if again.SrcPort != out.SrcPort {
			t.Errorf("port %d, was %d", again.SrcPort, out.SrcPort)
		}
	})
}

// In the first minutes after the first attach any arriving TCP packet may belong to
// a connection that was there before us. A RST opens nothing, and a SYN wins.
func testInboundLearning(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		ack, answer := f.inbound(packet.ACK)
		r.learn(false)
		r.expect(ingress, ack, policy.PassNoMapping)
		r.translate(withFlags(answer, packet.ACK), policy.MasqNew, f.node)
		r.clear()
		r.learn(true)
		defer r.learn(false)
		r.expect(ingress, withFlags(ack, packet.RST), policy.PassNoMapping)
		r.expect(ingress, ack, policy.PassInbound)
		r.expect(egress, withFlags(answer, packet.ACK), policy.PassInbound)
		// For the node itself, or for nobody of ours, nothing is remembered.
		r.expect(ingress, ack.To(f.node, 22), policy.PassNoMapping)
		r.expect(ingress, ack.To(f.gateway, 22), policy.PassNoMapping)
		r.expect(ingress, ack.To(f.foreign, 22), policy.PassNoMapping)
		r.translate(withFlags(answer, packet.SYN), policy.MasqNew, f.node)
	})
}

// Answers to a pod's own untranslated flow make no inbound entry, neither while its
// exclusion stands nor for some minutes after, whatever is applied meanwhile: the flow
// would go on leaving with the pod's address.
func testInboundNotByAnswers(t *testing.T, r *rig) {
	in := r.familyInput()
	r.apply(in)
	eachFamily(t, r, func(r *rig, f family) {
		r.apply(in)
		p := f.udp().To(f.excluded, 53)
		r.expect(egress, p, policy.PassNative)
		r.expect(ingress, p.Reply(), policy.PassNoMapping)
		without := in
		without.Native = nil
		for range 3 {
			r.reapply(without)
			r.expect(ingress, p.Reply(), policy.PassNoMapping)
		}
		r.translate(p, policy.MasqNew, f.node)
		r.clear()
		r.expect(ingress, f.udp().Reply(), policy.PassInbound) // never was excluded

		// Excluded again, and removed again.
		r.reapply(in)
		r.expect(ingress, p.Reply(), policy.PassNoMapping)
		if n := len(r.d.applied.removed); n != 0 {
			t.Errorf("%d removals of what is excluded", n)
		}
		timeouts := r.reapply(without).Input().Timeouts
		r.expect(ingress, p.Reply(), policy.PassNoMapping)

		// After the timer it was opened from outside: no Apply is needed.
		var set masqSetting
		var st masqState
		r.must(r.d.objs.Control.Lookup(uint32(0), &st))
		r.must(r.d.objs.Settings.Lookup(tableSet(st.Active), &set))
		now, err := monotonicSeconds()
		r.must(err)
		if left, timer := set.RemovedUntil-now, uint32(timeouts.UDPStream/time.Second); left > timer || left < timer-60 {
			t.Errorf("asked for %d s, the timer is %d s", left, timer)
		}
		set.RemovedUntil = now
		r.must(r.d.objs.Settings.Put(tableSet(st.Active), set))
		r.expect(ingress, p.Reply(), policy.PassInbound)
		r.clear()

		// The next one forgets it.
		for i := range r.d.applied.removed {
			r.d.applied.removed[i].until = now
		}
		r.reapply(without)
		if n := len(r.d.applied.removed); n != 0 {
			t.Errorf("%d removals after their timer", n)
		}
		r.expect(ingress, p.Reply(), policy.PassInbound)
	})
}

// UDP and ICMP of an inbound connection are kept alive by arriving packets only;
// TCP by both sides. An entry past its timer counts as none.
func testInboundExpiry(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, c := range []struct {
			name         string
			open, answer packet.Packet
			refreshed    bool // by the pod
			after        policy.Outcome
		}{
			{"UDP", f.udp().Reply(), f.udp(), false, policy.MasqNew},
			{"ICMP", f.query(f.ping(7).Reply()), f.pong(7), false, policy.DropStray},
			{"TCP", withFlags(f.tcp(0).Reply(), packet.SYN), f.tcp(packet.SYN | packet.ACK), true, policy.DropStray},
		} {
			r.clear()
			seen := func() uint32 { return r.flows(inboundTable)[0].seen }
			r.expect(ingress, c.open, policy.PassInbound)
			fresh := seen()
			r.age(inboundTable, 40)
			r.expect(egress, c.answer, policy.PassInbound)
			if got := seen() >= fresh; got != c.refreshed {
				t.Errorf("%s: refreshed by the pod %v, want %v", c.name, got, c.refreshed)
			}
			r.expect(ingress, c.open, policy.PassInbound)
			if seen() < fresh {
				t.Errorf("%s: not refreshed from outside", c.name)
			}
			r.age(inboundTable, 8000)
			res := r.run(egress, "eth0", c.answer.Link, c.answer.Build())
			if res.outcome != c.after {
				t.Errorf("%s: expired: %s, want %s", c.name, res.outcome, c.after)
			}
		}
	})
}

// An entry past its timer is none at ingress too: it does not let a packet open a
// connection that could not have opened one.
func testInboundExpiredArrives(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		syn, _ := f.inbound(packet.SYN)
		r.expect(ingress, syn, policy.PassInbound)
		r.expect(ingress, withFlags(syn, packet.ACK), policy.PassInbound)
		r.age(inboundTable, 8000)
		r.expect(ingress, withFlags(syn, packet.ACK), policy.PassNoMapping)
		r.expect(ingress, syn, policy.PassInbound)
		if e := r.flows(inboundTable); len(e) != 1 || e[0].bits != bitSyn {
			t.Errorf("opened again: %+v", e)
		}
		// A live mapping wins over an old entry.
		r.clear()
		r.expect(ingress, f.udp().Reply(), policy.PassInbound)
		r.age(inboundTable, 8000)
		r.translate(f.udp(), policy.MasqNew, f.node)
		r.expect(ingress, f.udp().Reply(), policy.PassNoMapping)
	})
}

// What only makes sense in a connection never opens one, and never leaves with the
// pod's address.
func testStray(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, flags := range []uint8{packet.FIN, packet.FIN | packet.ACK, packet.RST, packet.RST | packet.ACK, packet.SYN | packet.ACK, packet.SYN | packet.FIN} {
			r.expect(egress, f.tcp(flags), policy.DropStray)
		}
		r.expect(egress, f.pong(7), policy.DropStray)
		if n := len(r.flows(forwardTable)) + len(r.flows(reverseTable)); n != 0 {
			t.Errorf("%d entries", n)
		}
		// In a known connection they are translated.
		out := r.translate(f.tcp(packet.SYN), policy.MasqNew, f.node)
		for _, flags := range []uint8{packet.FIN | packet.ACK, packet.RST} {
			r.send(egress, f.tcp(flags), policy.MasqKnown, withFlags(out, flags))
			r.send(ingress, withFlags(out.Reply(), flags), policy.MasqKnown, withFlags(f.tcp(0).Reply(), flags))
		}
	})
}

// An echo identifier of zero is one like others, on both sides at once.
func testPingIdentifierZero(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		ours := f.ping(0)
		theirs := f.query(f.ping(0).Reply())
		out := r.translate(ours, policy.MasqNew, f.node)
		// A ping from there to the node is no answer to ours.
		r.expect(ingress, f.query(out.Reply()), policy.PassNoMapping)
		// One to the pod is remembered, and its answer is the pod's own.
		r.expect(ingress, theirs, policy.PassInbound)
		r.expect(egress, theirs.Reply(), policy.PassInbound)
		r.send(ingress, out.Reply(), policy.MasqKnown, ours.Reply())
		r.send(egress, ours, policy.MasqKnown, out)
		r.expect(egress, theirs.Reply(), policy.PassInbound)
	})
}

// query turns an echo reply into a request.
func (f family) query(p packet.Packet) packet.Packet {
	p.Type = f.echo
	return p
}

// pong is the pod's answer to a ping from f.remote.
func (f family) pong(id uint16) packet.Packet {
	p := f.ping(id)
	p.Type = f.answer
	return p
}
