package datapath

import (
	"net/netip"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// Either half of a mapping may get lost: the flow goes on with the same port.
func testHeals(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range f.opening() {
			for _, port := range []uint16{keptPort, changedPort} {
				r.clear()
				p := k.p.From(f.pod, port)
				out := r.translate(p, policy.MasqNew, f.node)
				if p.Proto == packet.TCP {
					p.Flags, out.Flags = packet.ACK, packet.ACK
				}
				goesOn := func(what string, outcome policy.Outcome) {
					t.Helper()
					again := r.translate(p, outcome, f.node)
					if again.Port() != out.Port() {
						t.Errorf("%s: %s: port %d, was %d", k.name, what, again.Port(), out.Port())
					}
					r.send(ingress, out.Reply(), policy.MasqKnown, p.Reply())
				}
				r.drop(reverseTable)
				r.age(forwardTable, 2) // the other half is looked for once a second
				goesOn("without reverse half", policy.MasqKnown)
				r.drop(forwardTable)
				goesOn("without forward half", policy.MasqNew)
				r.clear()
				goesOn("without both", policy.MasqNew)
			}
		}
	})
}

// A mapping whose port was lost to another flow gets a new one; the other keeps it.
func testLostPort(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range f.opening() {
			r.clear()
			r.translate(k.p, policy.MasqNew, f.node)
			r.drop(reverseTable)
			other := k.p.From(f.pod2, keptPort)
			theirs := r.translate(other, policy.MasqNew, f.node)
			if theirs.Port() != keptPort {
				t.Fatalf("%s: port %d", k.name, theirs.Port())
			}
			r.age(forwardTable, 2)
			again := r.translate(k.p, policy.MasqNew, f.node)
			if again.Port() == theirs.Port() {
				t.Errorf("%s: two flows have port %d", k.name, again.Port())
			}
			r.send(ingress, theirs.Reply(), policy.MasqKnown, other.Reply())
			r.send(ingress, again.Reply(), policy.MasqKnown, k.p.Reply())
		}
	})
}

// A socket has one external port towards everybody (RFC 4787 REQ-1).
func testSamePortEverywhere(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range f.opening() {
			p := k.p.From(f.pod, changedPort)
			if k.p.IsQuery() {
				// Its own identifier is free here; that of a neighbour is not.
				r.translate(p.From(f.pod2, changedPort), policy.MasqNew, f.node)
				r.translate(p.From(f.pod2, changedPort).To(f.other, changedPort), policy.MasqNew, f.node)
			}
			first := r.translate(p, policy.MasqNew, f.node)
			for port := range uint16(20) {
				if p.IsQuery() && port > 0 {
					break
				}
				again := r.translate(p.To(f.other, p.DstPort+port).From(f.pod, changedPort), policy.MasqNew, f.node)
				if again.Port() != first.Port() {
					t.Errorf("%s: port %d, towards another remote %d", k.name, first.Port(), again.Port())
				}
			}
		}
	})
}

// A known flow keeps its translation whatever the policy becomes, on whatever
// masquerade device it leaves.
func testKnownFlowOutlivesPolicy(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	base := r.familyInput()
	var dst []policy.Rule
	for _, f := range families {
		dst = append(dst, policy.Rule{Prefix: prefixOf(f.remote), Origin: "test"})
	}
	eachFamily(t, r, func(r *rig, f family) {
		for _, c := range []struct {
			name   string
			change func(*policy.Input)
			fresh  policy.Outcome // of a new flow
		}{
			{"excluded", func(in *policy.Input) { in.NonMasq = dst }, policy.PassNonMasq},
			{"families off", func(in *policy.Input) { in.IPv4, in.IPv6 = false, false }, policy.PassDisabled},
			{"no source range", func(in *policy.Input) { in.Sources = nil }, policy.PassSource},
			{"no device", func(in *policy.Input) { in.Devices = nil }, policy.PassDevice},
		} {
			r.apply(base)
			p := f.udp().From(f.pod, changedPort)
			out := r.translate(p, policy.MasqNew, f.node)
			in := base
			in.Devices = slices.Clone(base.Devices)
			c.change(&in)
			r.reapply(in)
			r.send(egress, p, policy.MasqKnown, out)
			r.send(ingress, out.Reply(), policy.MasqKnown, p.Reply())
			res := r.run(egress, "eth1", p.Link, p.Build())
			r.same(out, res.data)
			r.expect(egress, p.From(f.pod2, changedPort), c.fresh)
		}
		r.apply(base)
		p := f.udp()
		res := r.run(egress, "eth1", p.Link, p.Build())
		r.same(p.From(f.node2, p.SrcPort), res.data)
	})
}

// The programs remember what the policy's tables said of an address. An apply voids
// that, also when the tables are written where older ones were.
func testPolicyVoidsAnswers(t *testing.T, r *rig) {
	eachFamily(t, r, func(r *rig, f family) {
		base, excluded, off := r.familyInput(), r.familyInput(), r.familyInput()
		excluded.NonMasq = []policy.Rule{{Prefix: prefixOf(f.remote), Origin: "test"}}
		off.Sources = nil
		r.apply(base)
		p := f.udp()
		for range 3 {
			for _, step := range []struct {
				in   policy.Input
				want policy.Outcome
			}{
				{excluded, policy.PassNonMasq}, {off, policy.PassSource}, {base, policy.MasqNew}, {off, policy.PassSource}, {excluded, policy.PassNonMasq},
				{base, policy.MasqNew},
			} {
				r.clear()
				r.reapply(step.in)
				for range 2 {
					p.SrcPort++ // a new flow
					if res := r.run(egress, "eth0", p.Link, p.Build()); res.outcome != step.want {
						t.Fatalf("%s, want %s", res.outcome, step.want)
					}
				}
			}
		}
	})
}

// Before the first policy nothing that could need it leaves, and everything arrives.
func testWithoutPolicy(t *testing.T, r *rig) {
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range f.kinds() {
			r.expect(egress, k.p, policy.DropNoPolicy)
			r.expect(ingress, k.p.Reply(), policy.PassNoMapping)
		}
	})
	arp := append(make([]byte, 12), 0x08, 0x06)
	arp = append(arp, make([]byte, 46)...)
	for _, dir := range []direction{egress, ingress} {
		if res := r.run(dir, "eth0", packet.Ethernet, arp); res.outcome != policy.PassNotIP {
			t.Errorf("%s of ARP: %s", dir, res.outcome)
		}
	}
}

// A SYN on a mapping that was closed begins a new connection on the same port.
func testReopens(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		syn := f.tcp(packet.SYN)
		out := r.translate(syn, policy.MasqNew, f.node)
		r.send(ingress, withFlags(out.Reply(), packet.SYN|packet.ACK), policy.MasqKnown, withFlags(syn.Reply(), packet.SYN|packet.ACK))
		for _, flags := range []uint8{packet.ACK, packet.FIN | packet.ACK} {
			r.send(egress, withFlags(syn, flags), policy.MasqKnown, withFlags(out, flags))
			r.send(ingress, withFlags(out.Reply(), flags), policy.MasqKnown, withFlags(syn.Reply(), flags))
		}
		fwd, rev := r.flows(forwardTable)[0], r.flows(reverseTable)[0]
		if fwd.state(rev) != "closing" {
			t.Errorf("closed: %s", fwd.state(rev))
		}
		r.send(egress, syn, policy.MasqKnown, out)
		fwd, rev = r.flows(forwardTable)[0], r.flows(reverseTable)[0]
		if fwd.state(rev) != "syn" || fwd.bits != bitSyn || rev.bits != 0 {
			t.Errorf("opened again: %s, bits %#x %#x", fwd.state(rev), fwd.bits, rev.bits)
		}
	})
}

// A packet that meets the program again on a lower device of a stack passes there.
// (A test run can repeat the program on one packet.)
func testStackedDevices(t *testing.T, r *rig) {
	labtest.Kernel(t, forwardedRun)
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.udp().From(f.pod, changedPort)
		res := r.runContext(egress, p.Link, p.Build(), skbContext{Ifindex: uint32(r.device["eth0"]), IngressIfindex: uint32(r.device["eth1"])}, 2)
		if len(res.moved) != 2 || res.moved[policy.MasqNew] != 1 || res.moved[policy.PassTranslated] != 1 {
			t.Errorf("outcomes %v", res.moved)
		}
		r.same(p.From(f.node, sourcePort(p, res.data)), res.data)
		// What passed the first time passes the second time.
		p = p.To(f.excluded, 53)
		res = r.runContext(egress, p.Link, p.Build(), skbContext{Ifindex: uint32(r.device["eth0"]), IngressIfindex: uint32(r.device["eth1"])}, 2)
		if res.moved[policy.PassNative] != 2 {
			t.Errorf("outcomes %v", res.moved)
		}
	})
}

// Answers to a mapped flow, and errors about it, that leave by a masquerade device on
// their way to the inner host: a router masquerades what it forwards.
func testAnswersToInside(t *testing.T, r *rig) {
	in := r.familyInput()
	for _, all := range []string{"0.0.0.0/0", "::/0"} {
		in.Sources = append(in.Sources, policy.Rule{Prefix: netip.MustParsePrefix(all), Origin: "test"})
	}
	r.apply(in)
	eachFamily(t, r, func(r *rig, f family) {
		p := f.udp()
		r.translate(p, policy.MasqNew, f.node)
		r.expect(egress, p.Reply(), policy.PassTranslated)
		r.expect(egress, f.unreachable(p, f.router), policy.PassTranslated)
		r.expect(egress, f.unreachable(p, f.router).To(p.Dst, 0), policy.DropStray)
	})
}

// A packet that will be cut to segments counts as many.
func testCountsSegments(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.tcp(packet.ACK)
		p.Payload = make([]byte, 3000)
		ctx := skbContext{Ifindex: uint32(r.device["eth0"]), GSOSegs: 3, GSOSize: 1000}
		res := r.runContext(egress, p.Link, p.Build(), ctx, 1)
		if res.moved[policy.MasqNew] != 3 {
			t.Errorf("outcomes %v", res.moved)
		}
		r.same(p.From(f.node, p.SrcPort), res.data)
		e := r.flows(forwardTable)[0]
		if want := uint64(len(p.Build()) - p.Link.Size()); e.packets != 3 || e.bytes != want {
			t.Errorf("%d packets, %d bytes, want 3, %d", e.packets, e.bytes, want)
		}
	})
}
