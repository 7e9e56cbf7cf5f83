package datapath

import (
	"net"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// opening are the kinds of packets with a port that open a flow.
func (f family) opening() []kind {
	return []kind{{"TCP", f.tcp(packet.SYN)}, {"UDP", f.udp()}, {"ICMP echo", f.ping(keptPort)}}
}

// The node's own packets pass, whatever they are, and hold no mapping unless nobody
// could tell their answers from those of pods.
func testHost(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range f.kinds() {
			claimed := k.p.Proto != packet.TCP && k.p.Proto != packet.UDP // no socket that could be asked
			r.clear()
			for _, p := range []packet.Packet{k.p.From(f.node, k.p.Port()), k.p.From(f.gateway, k.p.Port())} {
				r.expect(egress, p, policy.PassHost)
				r.expect(egress, p, policy.PassHost)
				want := policy.PassNoMapping
				if claimed {
					want = policy.PassHost
				}
				r.expect(ingress, p.Reply(), want)
			}
			if n := len(r.flows(forwardTable)); !claimed && n != 0 {
				t.Errorf("%s: %d mappings", k.name, n)
			}
		}
		for _, flags := range []uint8{packet.RST | packet.ACK, packet.FIN, packet.SYN | packet.ACK} {
			r.expect(egress, f.tcp(flags).From(f.node, keptPort), policy.PassHost)
		}
	})
}

// Whoever came first keeps the tuple: the node's packet that meets a live mapping
// gets another port, and its answers find back.
func testHostCollision(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range f.opening() {
			r.clear()
			out := r.translate(k.p, policy.MasqNew, f.node)
			if out.Port() != keptPort {
				t.Fatalf("%s: port %d", k.name, out.Port())
			}
			host := k.p.From(f.node, keptPort)
			for range 2 {
				moved := r.translate(host, policy.MasqHost, f.node)
				if moved.Port() == keptPort {
					t.Errorf("%s: the node has the pod's port", k.name)
				}
				r.send(ingress, moved.Reply(), policy.MasqHost, host.Reply())
				r.send(ingress, f.unreachable(moved, f.router), policy.MasqError, f.unreachable(host, f.router))
			}
			r.send(ingress, out.Reply(), policy.MasqKnown, k.p.Reply())
			r.send(egress, k.p, policy.MasqKnown, out)
			// Towards another remote there is nothing to meet.
			r.expect(egress, host.To(f.other, host.DstPort), policy.PassHost)
		}
	})
}

// The node's ping claims its identifier; a pod then gets another one. So do its
// protocols without ports, of which there is one inner host only.
func testHostClaims(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		pod := f.ping(7)
		host := pod.From(f.node, 7)
		r.expect(egress, host, policy.PassHost)
		out := r.translate(pod, policy.MasqNew, f.node)
		if out.Ident == 7 {
			t.Errorf("the pod has the node's identifier")
		}
		r.send(ingress, out.Reply(), policy.MasqKnown, pod.Reply())
		r.expect(ingress, host.Reply(), policy.PassHost)
		r.expect(ingress, f.unreachable(host, f.router), policy.PassHost)

		gre := f.bare(packet.GRE)
		r.expect(egress, gre.From(f.node, 0), policy.PassHost)
		r.expect(egress, gre, policy.DropProtocol)
		r.translate(gre.To(f.other, 0), policy.MasqNew, f.node)
		r.expect(egress, gre.To(f.other, 0).From(f.pod2, 0), policy.DropProtocol)
		r.expect(egress, gre.To(f.other, 0).From(f.node, 0), policy.PassHost)
	})
}

// hold opens sockets of the node on a port of both protocols, until the test ends.
func (r *rig) hold(port int) {
	r.t.Helper()
	r.must(r.ns.Do(func() error {
		tcp, err := net.ListenTCP("tcp", &net.TCPAddr{Port: port})
		if err != nil {
			return err
		}
		labtest.Close(r.t, tcp.Close)
		udp, err := net.ListenUDP("udp", &net.UDPAddr{Port: port})
		if err != nil {
			return err
		}
		labtest.Close(r.t, udp.Close)
		return nil
	}))
}

// Ports of the node's sockets are not for pods, nor for another flow of the node.
func testHostSockets(t *testing.T, r *rig) {
	in := r.familyInput()
	in.Ports = []uint16{40000, 40001}
	r.apply(in)
	eachFamily(t, r, func(r *rig, f family) {
		for _, p := range []packet.Packet{f.tcp(packet.SYN), f.udp()} {
			p.SrcPort = 40000
			t.Run(map[uint8]string{packet.TCP: "TCP", packet.UDP: "UDP"}[p.Proto], func(t *testing.T) {
				r := r.on(t)
				r.clear()
				r.hold(40001)
				out := r.translate(p, policy.MasqNew, f.node)
				if out.SrcPort != 40000 {
					t.Errorf("port %d", out.SrcPort)
				}
				r.expect(egress, p.From(f.pod2, 40001), policy.DropNoPort)
				// The node's own flow on the pod's port could only get the listener's: it
				// passes as it is rather than to steal that.
				r.expect(egress, p.From(f.node, 40000), policy.PassHost)
			})
			r.clear()
			r.translate(p, policy.MasqNew, f.node)
			if moved := r.translate(p.From(f.node, 40000), policy.MasqHost, f.node); moved.SrcPort != 40001 {
				t.Errorf("port %d", moved.SrcPort)
			}
		}
	})
}

// With full tables new flows of pods are refused, flows there are go on, and
// nothing of the node is dropped.
func TestProgramFullTables(t *testing.T) {
	t.Parallel()
	const flows = 16
	r := newRigFlows(t, flows)
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.udp()
		out := r.translate(p, policy.MasqNew, f.node)
		for n := range uint16(flows - 1) {
			r.translate(p.To(f.other, 1000+n), policy.MasqNew, f.node)
		}
		r.expect(egress, p.To(f.other, 53), policy.DropTableFull)
		r.send(egress, p, policy.MasqKnown, out)
		r.send(ingress, out.Reply(), policy.MasqKnown, p.Reply())
		for _, k := range f.kinds() {
			r.expect(egress, k.p.From(f.node, k.p.Port()), policy.PassHost)
		}
		for n := range uint16(flows / inboundShare) {
			r.expect(ingress, p.Reply().From(f.other, n), policy.PassInbound)
		}
		r.expect(ingress, p.Reply().From(f.other, 53), policy.PassInboundFull)
	})
}
