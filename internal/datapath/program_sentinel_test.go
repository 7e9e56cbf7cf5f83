package datapath

import (
	"net/netip"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// watch shows the sentinel a packet that leaves eth0, as if no other program of ours
// had seen it, and expects a count.
func (r *rig) watch(p packet.Packet, want uint64) {
	r.t.Helper()
	if n := r.sentinel(p.Link, p.Build(), skbContext{Ifindex: uint32(r.device["eth0"])}); n != want {
		r.t.Errorf("%s: the sentinel counts %d packets, want %d", show(p), n, want)
	}
}

// A packet of a pod to the world is a leak, of whatever kind; every other test of
// the programs shows that what we let pass is none (see rig.runContext).
func testSentinelSees(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range f.kindsOnLinks() {
			// A test run wants an IP header behind what it takes for an Ethernet header.
			k.p.Payload = make([]byte, 60)
			r.watch(k.p, 1)
			if k.p.Link == packet.Raw {
				continue // and with another source it is none of an IP packet
			}
			r.watch(k.p.From(f.node, k.p.Port()), 0)
			r.watch(k.p.From(f.foreign, k.p.Port()), 0)
			r.watch(k.p.To(f.excluded, k.p.DstPort), 0)
		}
		for _, flags := range []uint8{packet.RST, packet.FIN | packet.ACK, packet.SYN | packet.ACK} {
			r.watch(f.tcp(flags), 1)
		}
		for _, piece := range large(f).Fragments(1000) {
			frame := append(make([]byte, 0, 1600), piece...)
			if n := r.sentinel(packet.Ethernet, frame, skbContext{Ifindex: uint32(r.device["eth0"])}); n != 1 {
				t.Errorf("fragment: %d", n)
			}
		}
		r.watch(f.unreachable(f.udp().Reply(), f.pod), 1)
		samples := r.leakSamples()
		if len(samples) == 0 || samples[0].Packets == 0 {
			t.Fatalf("samples: %+v", samples)
		}
		for _, s := range samples {
			if s.Source != f.pod || s.Destination != f.remote || s.Index != r.device["eth0"] {
				t.Errorf("sample %+v", s)
			}
		}
		r.must(r.d.clearLeaks())
		if samples := r.leakSamples(); len(samples) != 0 || r.leaked(uint32(r.device["eth0"])) != 0 {
			t.Errorf("after clear: %+v", samples)
		}
	})
}

func large(f family) packet.Packet {
	p := f.udp()
	p.Payload = make([]byte, 2500)
	return p
}

func (r *rig) leakSamples() []Leak {
	r.t.Helper()
	in, err := Inspect(r.d.opt.Root)
	r.must(err)
	defer in.Close()
	_, samples, err := in.Leaks()
	r.must(err)
	return samples
}

// What leaves untranslated for good reason is no leak: families that are off, devices
// that drain, protocols that pass, answers to connections opened from outside,
// errors about them, their fragments.
func testSentinelExcuses(t *testing.T, r *rig) {
	for name, change := range map[string]func(*policy.Input){
		"off":      func(in *policy.Input) { in.IPv4, in.IPv6 = false, false },
		"draining": func(in *policy.Input) { in.Devices = in.Devices[1:] },
		"protocol": func(in *policy.Input) { in.UnknownProtocols = policy.UnknownPass },
	} {
		t.Run(name, func(t *testing.T) {
			r := r.on(t)
			in := r.familyInput()
			change(&in)
			r.apply(in)
			for _, f := range families {
				r.watch(f.bare(packet.GRE), 0)
				want := uint64(0)
				if name == "protocol" {
					want = 1
				}
				r.watch(f.udp(), want)
			}
		})
	}
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		answer, syn := f.udp(), f.tcp(packet.SYN)
		r.watch(answer, 1)
		r.expect(ingress, answer.Reply(), policy.PassInbound)
		r.watch(answer, 0)
		r.watch(f.unreachable(answer.Reply(), f.pod), 0)
		arriving := syn.Reply()
		arriving.Flags = packet.SYN
		r.expect(ingress, arriving, policy.PassInbound)
		r.watch(f.tcp(packet.SYN|packet.ACK), 0)
		r.watch(f.tcp(packet.FIN|packet.ACK), 0)
		r.watch(syn, 1) // it opens a connection of the pod's own
		ping := f.ping(7)
		r.expect(ingress, ping.From(f.remote, 7).To(f.pod, 7), policy.PassInbound)
		r.watch(ping.From(f.remote, 7).To(f.pod, 7).Reply(), 0)
		r.age(inboundTable, 10000)
		r.watch(answer, 1)
		// And it changes nothing that it looks at.
		before := len(r.flows(inboundTable))
		r.watch(answer, 1)
		if n := len(r.flows(inboundTable)); n != before {
			t.Errorf("%d inbound entries, before %d", n, before)
		}
	})
}

// The source of a route may be the address of a device of the pods, which lies in a source range and
// so is none of the node's own. What left with it was translated: also later fragments and errors,
// which no mapping's socket names.
func testSentinelRouteSource(t *testing.T, r *rig) {
	in := r.familyInput()
	in.HostAddrs = slices.DeleteFunc(in.HostAddrs, func(a netip.Addr) bool { return a == families[0].gateway || a == families[1].gateway })
	for _, f := range families {
		in.RouteSources = append(in.RouteSources, policy.RouteSource{Prefix: prefixOf(f.remote), Source: f.gateway})
	}
	r.apply(in)
	eachFamily(t, r, func(r *rig, f family) {
		p := large(f)
		out := p.From(f.gateway, keptPort)
		// Each that leaves is shown to the sentinel: see rig.runContext.
		got := r.pieces(egress, p.Link, p.Fragments(fragmentSize), policy.MasqNew, policy.MasqFragment)
		r.reassembled(out, got)
		e := f.unreachable(p.Reply(), f.pod)
		e.ID = 7
		got = r.pieces(egress, e.Link, e.Fragments(fragmentSize), policy.MasqError, policy.MasqFragment)
		want := f.unreachable(out.Reply(), f.gateway)
		want.ID = 7
		r.reassembled(want, got)
		r.watch(f.udp(), 1)
		r.watch(f.udp().From(f.gateway, 1), 0)
		r.watch(f.udp().From(f.gateway, 1).To(f.other, 53), 1) // no route has this source
	})
}

// A packet may have passed our program with the policy before this one. Only the
// one packet that it saw last is excused.
func testSentinelPolicyChange(t *testing.T, r *rig) {
	in := r.familyInput()
	r.apply(in)
	eachFamily(t, r, func(r *rig, f family) {
		p := f.udp().To(f.excluded, 53)
		r.reapply(r.familyInput())
		r.expect(egress, p, policy.PassNative)
		changed := r.familyInput()
		changed.Native = nil
		r.setDecided()
		r.reapply(changed)
		r.watch(p, 0)
		r.watch(p, 1)
	})
}

// setDecided lets every CPU believe that its last packet asked the policy in force.
func (r *rig) setDecided() {
	r.t.Helper()
	var st masqState
	r.must(r.d.objs.Control.Lookup(uint32(0), &st))
	var perCPU []masqScratch
	r.must(r.d.objs.Scratch.Lookup(uint32(0), &perCPU))
	for i := range perCPU {
		perCPU[i].Decided = st.Active + 1
	}
	r.must(r.d.objs.Scratch.Put(uint32(0), perCPU))
}
