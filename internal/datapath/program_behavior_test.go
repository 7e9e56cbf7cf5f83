package datapath

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// remotes returns n outside hosts, from three networks, in random order.
func (f family) remotes(rng *rand.Rand, n int) []netip.Addr {
	hosts := make([]netip.Addr, n)
	for i, host := range rng.Perm(3 * 254)[:n] {
		b := f.remote.AsSlice()
		b[len(b)-2] += byte(host / 254)
		b[len(b)-1] = byte(1 + host%254)
		hosts[i], _ = netip.AddrFromSlice(b)
	}
	return hosts
}

// Whatever the remotes are, a socket has one external port towards all of them
// while it is free there, and the same again when all state is lost (RFC 4787
// REQ-1). Two sockets never share one towards the same remote.
func testEndpointIndependent(t *testing.T, r *rig) {
	rng := labtest.Rand(t)
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range f.opening() {
			for range 5 {
				r.clear()
				p := k.p.From(f.pod, uint16(1024+rng.IntN(64000)))
				remotes := f.remotes(rng, 20)
				var first uint16
				for i, remote := range append(remotes, remotes[0]) {
					if i == len(remotes) {
						r.clear()
					}
					// From: the identifier of a query belongs to the socket, not to the remote.
					to := p.To(remote, uint16(1+rng.IntN(65535))).From(f.pod, p.Port())
					out := r.translate(to, policy.MasqNew, f.node).Port()
					if i == 0 {
						first = out
					}
					if out != first {
						t.Fatalf("%s from port %d: external port %d, towards remote %d (%s) %d", k.name, p.Port(), first, i, remote, out)
					}
				}
			}
			// As many sockets as there are ports, of two pods, with the same remote.
			r.clear()
			owner := make(map[uint16]packet.Packet)
			for n := range lastPort - firstPort + 1 {
				p := k.p.From([]netip.Addr{f.pod, f.pod2}[n%2], uint16(20000+n/2))
				out := r.translate(p, policy.MasqNew, f.node)
				if other, taken := owner[out.Port()]; taken {
					t.Errorf("%s: %s and %s share port %d", k.name, show(other), show(p), out.Port())
				}
				owner[out.Port()] = p
			}
		}
	})
}

// Both sides connect at the same time (RFC 5382 REQ-2a): the remote's SYN meets the
// pod's, and the pod answers it with SYN+ACK.
func testSimultaneousOpen(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		syn := f.tcp(packet.SYN).From(f.pod, changedPort)
		out := r.translate(syn, policy.MasqNew, f.node)
		arrives := func(flags uint8) {
			t.Helper()
			r.send(ingress, withFlags(out.Reply(), flags), policy.MasqKnown, withFlags(syn.Reply(), flags))
		}
		leaves := func(flags uint8) {
			t.Helper()
			r.send(egress, withFlags(syn, flags), policy.MasqKnown, withFlags(out, flags))
		}
		arrives(packet.SYN)
		leaves(packet.SYN | packet.ACK)
		arrives(packet.SYN | packet.ACK)
		leaves(packet.ACK)
		if fwd, rev := r.flows(forwardTable)[0], r.flows(reverseTable)[0]; fwd.state(rev) != "established" {
			t.Errorf("state %s", fwd.state(rev))
		}
		if n := len(r.flows(inboundTable)); n != 0 {
			t.Errorf("%d inbound entries", n)
		}
	})
}

// Nothing is judged by sequence numbers: packets outside of every window are
// translated like others, in both directions, and none leaves with the pod's
// address or ends at the node (moby issue 18630, kubernetes issue 74839).
func testOutOfWindow(t *testing.T, r *rig) {
	rng := labtest.Rand(t)
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		syn := f.tcp(packet.SYN).From(f.pod, changedPort)
		out := r.translate(syn, policy.MasqNew, f.node)
		for range 50 {
			flags := []uint8{packet.ACK, packet.ACK | packet.PSH, packet.FIN | packet.ACK, packet.RST, packet.RST | packet.ACK}[rng.IntN(5)]
			wild := func(p packet.Packet) packet.Packet {
				p.Seq, p.Ack, p.Flags = rng.Uint32(), rng.Uint32(), flags
				return p
			}
			p := wild(syn)
			r.send(egress, p, policy.MasqKnown, p.From(f.node, out.Port()))
			p = wild(out.Reply())
			r.send(ingress, p, policy.MasqKnown, p.To(f.pod, changedPort))
		}
	})
}

// What arrives at a mapping's port from anybody but its remote, or by another
// protocol, is the node's, and does not keep the mapping (RFC 7857 section 7).
func testOthersDoNotRefresh(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range []kind{{"TCP", f.tcp(packet.SYN)}, {"UDP", f.udp()}, {"SCTP", f.sctp(packet.SCTPInit)}} {
			r.clear()
			p := k.p.From(f.pod, changedPort)
			out := r.translate(p, policy.MasqNew, f.node)
			r.age(forwardTable, 50)
			r.age(reverseTable, 50)
			before := append(r.flows(forwardTable), r.flows(reverseTable)...)
			reply := out.Reply()
			otherProtocol := f.tcp(packet.SYN).From(f.remote, reply.SrcPort).To(f.node, out.SrcPort)
			if p.Proto == packet.TCP {
				otherProtocol = f.udp().From(f.remote, reply.SrcPort).To(f.node, out.SrcPort)
			}
			for _, in := range []packet.Packet{reply.From(f.other, reply.SrcPort), reply.From(f.remote, reply.SrcPort+1),
				reply.To(f.node2, out.SrcPort), reply.To(f.node, out.SrcPort+1), otherProtocol} {
				r.expect(ingress, in, policy.PassNoMapping)
			}
			if after := append(r.flows(forwardTable), r.flows(reverseTable)...); len(before) != 2 || !slices.Equal(before, after) {
				t.Errorf("%s: flows changed:\n was %v\n is  %v", k.name, before, after)
			}
			r.send(ingress, reply, policy.MasqKnown, p.Reply())
		}
	})
}

// However many resets a pod sends, none of an unknown connection leaves or makes a
// mapping. In a known one they are translated and start the closing timer; only the
// first of them keeps the mapping (RFC 7857 section 7).
func testResetStorm(t *testing.T, r *rig) {
	rng := labtest.Rand(t)
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for range 100 {
			p := f.tcp(packet.RST|uint8(rng.IntN(2))*packet.ACK).From(f.pod, uint16(rng.IntN(65536)))
			p.Seq = rng.Uint32()
			r.expect(egress, p, policy.DropStray)
		}
		if n := len(r.flows(forwardTable)) + len(r.flows(reverseTable)); n != 0 {
			t.Errorf("%d entries", n)
		}
		syn := f.tcp(packet.SYN)
		out := r.translate(syn, policy.MasqNew, f.node)
		leaves := func(flags uint8) uint32 {
			r.send(egress, withFlags(syn, flags), policy.MasqKnown, withFlags(out, flags))
			return r.flows(forwardTable)[0].seen
		}
		fresh := leaves(packet.ACK)
		r.age(forwardTable, 100)
		if got := leaves(packet.RST); got < fresh {
			t.Errorf("the first reset leaves the mapping %d seconds old", fresh-got)
		}
		r.age(forwardTable, 100)
		for range 10 {
			if got := leaves(packet.RST); got >= fresh {
				t.Errorf("resets keep the mapping")
			}
		}
		if got := leaves(packet.ACK); got < fresh {
			t.Errorf("a connection that survived is %d seconds old", fresh-got)
		}
	})
}

// What the node's stack says to a segment without a socket ends no connection of a
// pod whose mapping was lost: only where pods and the node share ports.
func testNodeResets(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		rst := f.tcp(packet.RST).From(f.node, 40005)
		r.expect(egress, rst, policy.DropStray)
		r.expect(egress, withFlags(rst, packet.RST|packet.ACK), policy.PassHost) // to a SYN
		r.expect(egress, rst.From(f.node, changedPort), policy.PassHost)         // of no pool
		r.expect(egress, rst.From(f.gateway, 40005), policy.PassHost)            // no pod has that address
		t.Run("held", func(t *testing.T) {
			r := r.on(t)
			r.hold(40005)
			r.expect(egress, rst, policy.PassHost)
		})
		// The pod's next packet has its port back.
		syn := f.tcp(packet.SYN).From(f.pod, changedPort)
		out := r.translate(syn, policy.MasqNew, f.node)
		r.clear()
		r.expect(ingress, withFlags(out.Reply(), packet.ACK), policy.PassNoMapping)
		r.expect(egress, rst.From(f.node, out.Port()), policy.DropStray)
		r.send(egress, withFlags(syn, packet.ACK), policy.MasqNew, withFlags(out, packet.ACK))
		r.send(ingress, withFlags(out.Reply(), packet.ACK), policy.MasqKnown, withFlags(syn.Reply(), packet.ACK))
	})
}

// A connection that was closed holds its port for the closing timer: another pod
// does not get it, the same socket has it at once.
func testClosedPort(t *testing.T, r *rig) {
	in := r.familyInput()
	in.Ports = []uint16{40000}
	r.apply(in)
	eachFamily(t, r, func(r *rig, f family) {
		syn := f.tcp(packet.SYN)
		out := r.translate(syn, policy.MasqNew, f.node)
		for _, flags := range []uint8{packet.FIN | packet.ACK, packet.ACK} {
			r.send(egress, withFlags(syn, flags), policy.MasqKnown, withFlags(out, flags))
			r.send(ingress, withFlags(out.Reply(), flags), policy.MasqKnown, withFlags(syn.Reply(), flags))
		}
		if fwd, rev := r.flows(forwardTable)[0], r.flows(reverseTable)[0]; fwd.state(rev) != "closing" {
			t.Errorf("state %s", fwd.state(rev))
		}
		r.expect(egress, syn.From(f.pod2, 40000), policy.DropNoPort)
		r.send(egress, syn, policy.MasqKnown, out)
	})
}
