package datapath

import (
	"errors"
	"net/netip"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// handover switches it on until the test ends.
func (r *rig) handover() {
	r.t.Helper()
	r.must(r.d.SetHandover(true))
	r.t.Cleanup(func() { r.must(r.d.SetHandover(false)) })
}

// side changes who translates the answers of all mappings.
func (r *rig) side(side Side) {
	r.t.Helper()
	flows, err := r.d.Flows(r.t.Context())
	r.must(err)
	if n, err := r.d.SetSide(r.t.Context(), flows, side); err != nil || n != len(flows) || n == 0 {
		r.t.Fatalf("%d of %d flows marked: %v", n, len(flows), err)
	}
	flows, err = r.d.Flows(r.t.Context())
	r.must(err)
	for _, f := range flows {
		if f.Side != side {
			r.t.Fatalf("%s is %s, want %s", f, f.Side, side)
		}
	}
}

// carried are the kinds that a handover is tested with.
func (f family) carried() []kind {
	lite := f.udp()
	lite.Proto = packet.UDPLite
	return []kind{{"TCP", f.tcp(packet.ACK)}, {"UDP", f.udp()}, {"UDP-Lite", lite}, {"SCTP", f.sctp(packet.SCTPData)}, {"ICMP echo", f.ping(keptPort)}}
}

// first is the packet that opens the flow of p.
func first(p packet.Packet) packet.Packet {
	if p.Proto == packet.TCP {
		p.Flags = packet.SYN
	}
	if p.Proto == packet.SCTP {
		p.Type = packet.SCTPInit
	}
	return p
}

// opened makes a mapping for the flow of p, and returns p as the remote sees it.
func (r *rig) opened(p packet.Packet, node netip.Addr) packet.Packet {
	r.t.Helper()
	return p.From(node, r.translate(first(p), policy.MasqNew, node).Port())
}

// During a handover netfilter's packet on a mapping's tuple is that very flow's.
func testHandover(t *testing.T, r *rig) {
	in := r.familyInput()
	r.apply(in)
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range f.carried() {
			r.clear()
			out := r.opened(k.p, f.node)
			netfilters := k.p.From(f.node, out.Port())
			r.must(r.d.SetHandover(true))
			for _, side := range []Side{SideAway, SideHeld} {
				r.side(side)
				r.expect(egress, netfilters, policy.PassHost)
				r.send(egress, k.p, policy.MasqKnown, k.p.From(f.node, out.Port()))
				r.reapply(in) // keeps it
			}
			r.side(SideOurs)
			r.send(ingress, out.Reply(), policy.MasqKnown, k.p.Reply())
			if n := len(r.flows(forwardTable)); n != 1 {
				t.Errorf("%s: %d mappings", k.name, n)
			}
			// What netfilter has on the tuple of a mapping that is ours is another flow.
			for range 2 {
				if moved := r.translate(first(netfilters), policy.MasqHost, f.node); moved.Port() == out.Port() {
					t.Errorf("%s: the node has the pod's port", k.name)
				}
				r.must(r.d.SetHandover(false))
			}
			if n, err := r.d.Shifted(t.Context()); len(n) != 1 || err != nil {
				t.Errorf("%s: shifted: %v, %v", k.name, n, err)
			}
		}
		// A protocol without ports: the pod's mapping is not taken away.
		r.clear()
		r.handover()
		gre := f.bare(packet.GRE)
		out := r.translate(gre, policy.MasqNew, f.node)
		r.side(SideAway)
		r.expect(egress, out, policy.PassHost)
		r.side(SideOurs)
		r.send(ingress, out.Reply(), policy.MasqKnown, gre.Reply())
	})
}

// Answers are translated by the side that has them, errors about the flow as well. When
// the handover is over all of them are ours.
func testHandoverSides(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range f.carried() {
			r.clear()
			r.must(r.d.SetHandover(true))
			out := r.opened(k.p, f.node)
			late, quoted := out.Reply(), f.unreachable(out, f.router)
			for side, want := range map[Side]policy.Outcome{SideAway: policy.PassHandover, SideHeld: policy.DropHandover} {
				r.side(side)
				r.expect(ingress, late, want)
				r.expect(ingress, quoted, want)
				r.send(egress, k.p, policy.MasqKnown, k.p.From(f.node, out.Port()))
			}
			r.side(SideOurs)
			r.send(ingress, late, policy.MasqKnown, k.p.Reply())
			r.side(SideHeld)
			r.must(r.d.SetHandover(false))
			r.send(ingress, late, policy.MasqKnown, k.p.Reply())
			r.send(ingress, quoted, policy.MasqError, f.unreachable(k.p, f.router))
			// The next handover begins without what this one left.
			r.must(r.d.SetHandover(true))
			r.send(ingress, late, policy.MasqKnown, k.p.Reply())
			r.must(r.d.SetHandover(false))
		}
	})
}

// Netfilter's new flow keeps its port also where it would be refused: a port that waits
// for its last owner.
func testHandoverKeepsPorts(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.udp()
		p.Proto = packet.UDPLite
		out := r.translate(p, policy.MasqNew, f.node)
		for _, tables := range r.d.sweeper.tables {
			for _, e := range r.flows(reverseTable) {
				if e.key.local.Addr().Is4() == tables.ipv4 {
					r.must(tables.bury(e))
				}
			}
		}
		r.drop(forwardTable)
		other := p.From(f.node, out.Port())
		r.handover()
		r.expect(egress, other, policy.PassHost)
		if n := len(r.flows(forwardTable)); n != 0 {
			t.Errorf("%d mappings", n)
		}
		// A free one is claimed: no pod may get it.
		r.expect(egress, other.From(f.node, out.Port()+1), policy.PassHost)
		if got := r.translate(p.From(f.pod2, out.Port()+1), policy.MasqNew, f.node); got.Port() == out.Port()+1 {
			t.Error("a pod has netfilter's port")
		}
	})
}

// bury does to a reverse entry what flow_bury() does.
func (t flowTables) bury(e flowEntry) error {
	key := e.key.tuple()
	flow := masqFlow{Seen: e.seen, Port: swapPort(e.xlate.Port()), Bits: e.bits | bitDead, Tag: ^key.tag()}
	if t.ipv4 {
		return t.reverse.Put(key.short(), masqFlow4{Flow: flow, Addr: addr4To(e.xlate.Addr())})
	}
	return t.reverse.Put(key, masqFlow6{Flow: flow, Addr: addrTo(e.xlate.Addr())})
}

// importOf describes the flow of a packet as another translator would.
func importOf(p packet.Packet, external netip.AddrPort, side Side) Flow {
	state := map[uint8]string{packet.TCP: "established", packet.ICMP: "query", packet.ICMPv6: "query"}[p.Proto]
	if state == "" {
		state = "two-way"
	}
	dst := netip.AddrPortFrom(p.Dst, p.DstPort)
	return Flow{Proto: p.Proto, Src: netip.AddrPortFrom(p.Src, p.Port()), Dst: dst, Xlate: external, State: state, Side: side}
}

func (r *rig) mustImport(flows ...Flow) {
	r.t.Helper()
	taken, refused, err := r.d.Import(r.t.Context(), flows)
	if taken != len(flows) || refused != nil || err != nil {
		r.t.Fatalf("%d of %d imported, refused %v, %v", taken, len(flows), refused, err)
	}
}

func (r *rig) podFlows(a netip.Addr) int {
	r.t.Helper()
	var pod masqPod
	r.must(r.d.objs.Pods.Lookup(addrTo(a), &pod))
	return int(int32(pod.Flows))
}

// An imported flow is known from its first packet on, in both directions, by a port
// that no mapping of ours would have got.
func testImport(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, answerFirst := range []bool{false, true} {
			for _, k := range f.carried() {
				r.clear()
				external := netip.AddrPortFrom(f.node, 1234)
				flow := importOf(k.p, external, SideOurs)
				for range 2 { // the second time it is there already
					r.mustImport(flow)
				}
				if n := r.podFlows(f.pod); n != 1 {
					t.Errorf("%s: %d flows counted", k.name, n)
				}
				got, err := r.d.Flows(t.Context())
				r.must(err)
				if len(got) != 1 || got[0].State != flow.State || got[0].Xlate != external || got[0].key() != flow.key() || got[0].Timeout < 0 {
					t.Errorf("%s: %+v", k.name, got)
				}
				out := k.p.From(f.node, 1234)
				if answerFirst {
					r.send(ingress, out.Reply(), policy.MasqKnown, k.p.Reply())
				}
				r.send(egress, k.p, policy.MasqKnown, out)
				r.send(ingress, out.Reply(), policy.MasqKnown, k.p.Reply())
				r.send(ingress, f.unreachable(out, f.router), policy.MasqError, f.unreachable(k.p, f.router))
				// Its port is minded, although it is not in the pool.
				if moved := r.translate(first(out), policy.MasqHost, f.node); moved.Port() == 1234 {
					t.Errorf("%s: the node has the pod's port", k.name)
				}
				if n, err := r.d.Forget(t.Context(), []Flow{flow}); n != 1 || err != nil {
					t.Errorf("%s: %d forgotten, %v", k.name, n, err)
				}
				if n := r.podFlows(f.pod); n != 0 {
					t.Errorf("%s: %d flows counted at the end", k.name, n)
				}
			}
		}
	})
}

// Netfilter's packets came first, so the node has an entry for the tuple. The flow is
// netfilter's until its side changes.
func testImportOverHost(t *testing.T, r *rig) {
	labtest.Kernel(t, forwardedRun)
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		r.handover()
		for _, k := range f.carried() {
			r.clear()
			out := k.p.From(f.node, keptPort)
			r.forwarded(out, policy.PassHost)
			if n := len(r.flows(forwardTable)); n != 1 {
				t.Fatalf("%s: %d entries of the node", k.name, n)
			}
			r.mustImport(importOf(k.p, netip.AddrPortFrom(f.node, keptPort), SideAway))
			r.forwarded(out, policy.PassHost)
			r.expect(ingress, out.Reply(), policy.PassHandover)
			if n, m := len(r.flows(forwardTable)), len(r.flows(reverseTable)); n != 1 || m != 1 {
				t.Errorf("%s: %d and %d entries", k.name, n, m)
			}
			r.side(SideHeld)
			r.side(SideOurs)
			r.send(egress, k.p, policy.MasqKnown, out)
			r.send(ingress, out.Reply(), policy.MasqKnown, k.p.Reply())
		}
	})
}

func testImportRefuses(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range f.carried() {
			r.clear()
			out := r.opened(k.p, f.node)
			external := netip.AddrPortFrom(f.node, out.Port())
			moved := r.translate(first(k.p.From(f.node, out.Port())), policy.MasqHost, f.node)
			refused := map[error]Flow{
				ErrMapped: importOf(k.p, netip.AddrPortFrom(f.node, 1234), SideOurs),
				ErrTaken:  importOf(k.p.From(f.pod2, keptPort), external, SideOurs),
				errFlow:   importOf(k.p, netip.AddrPortFrom(f.pod, k.p.Port()), SideOurs),
			}
			flows := []Flow{
				refused[ErrMapped], refused[ErrTaken], refused[errFlow],
				importOf(k.p.From(f.pod2, keptPort), netip.AddrPortFrom(f.node, moved.Port()), SideOurs), // of a socket of the node
				importOf(k.p.From(f.pod2, keptPort), netip.AddrPortFrom(f.node, 1235), SideOurs),
			}
			taken, got, err := r.d.Import(t.Context(), flows)
			if taken != 1 || len(got) != 4 || err != nil {
				t.Fatalf("%s: %d taken, %v, %v", k.name, taken, got, err)
			}
			for i, want := range []error{ErrMapped, ErrTaken, errFlow, ErrTaken} {
				if got[i].Flow != flows[i] || !errors.Is(got[i].Err, want) {
					t.Errorf("%s: %s: %v, want %v", k.name, got[i].Flow, got[i].Err, want)
				}
			}
			r.send(egress, k.p, policy.MasqKnown, k.p.From(f.node, out.Port()))
			r.send(ingress, out.Reply(), policy.MasqKnown, k.p.Reply())
		}
	})
}

// A port that waits for its last owner is in use again.
func testImportDead(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.udp()
		flow := importOf(p, netip.AddrPortFrom(f.node, keptPort), SideOurs)
		_, dead := importOf(p.From(f.pod2, 1), flow.Xlate, SideOurs).entries(1)
		r.must(r.d.tablesOf(f.node).bury(dead))
		r.mustImport(flow)
		r.send(ingress, p.From(f.node, keptPort).Reply(), policy.MasqKnown, p.Reply())
	})
}

func TestImportFull(t *testing.T) {
	t.Parallel()
	const flows = 16
	r := newRigFlows(t, flows)
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		var list []Flow
		for n := range uint16(2 * flows) {
			list = append(list, importOf(f.udp().To(f.remote, 1000+n), netip.AddrPortFrom(f.node, keptPort), SideOurs))
		}
		taken, refused, err := r.d.Import(t.Context(), list)
		if taken != flows || len(refused) != flows || err != nil {
			t.Fatalf("%d taken, %d refused, %v", taken, len(refused), err)
		}
		for _, e := range refused {
			if !errors.Is(e.Err, ErrFull) {
				t.Fatal(e.Err)
			}
		}
		if n, m := len(r.flows(forwardTable)), len(r.flows(reverseTable)); n != flows || m != flows {
			t.Errorf("%d and %d entries", n, m)
		}
	})
}

// A handover outlives the agent, and with it the sides of the flows.
func TestHandoverOutlivesAgent(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.apply(r.familyInput())
	f := families[0]
	r.must(r.d.SetHandover(true))
	out := r.translate(f.udp(), policy.MasqNew, f.node)
	r.side(SideAway)
	opt := r.d.opt
	r.must(r.d.Close())
	d, err := Open(opt)
	r.must(err)
	labtest.Close(t, d.Close)
	r.d, r.recent = d, nil
	copy(r.counts, r.readCounts())
	if !d.Handover() {
		t.Error("forgotten")
	}
	r.must(d.SetHandover(true))
	r.reapply(r.familyInput())
	r.expect(ingress, out.Reply(), policy.PassHandover)
	r.side(SideOurs)
	r.send(ingress, out.Reply(), policy.MasqKnown, f.udp().Reply())
}
