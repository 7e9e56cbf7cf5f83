package datapath

import (
	"fmt"
	"net/netip"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// Kernels before 6.1 take no ingress_ifindex in a test run (5.10 refuses it, those between were not tried).
var forwardedRun = labtest.Feature{Name: "ingress_ifindex in a test run", Major: 6, Minor: 1}

// forwarded sends a packet that arrived at eth1 out of eth0, and returns it as the
// remote sees it.
func (r *rig) forwarded(p packet.Packet, outcome policy.Outcome) packet.Packet {
	r.t.Helper()
	res := r.runContext(egress, p.Link, p.Build(), skbContext{Ifindex: uint32(r.device["eth0"]), IngressIfindex: uint32(r.device["eth1"])}, 1)
	if len(res.moved) != 1 || res.moved[outcome] == 0 {
		r.t.Fatalf("egress of %s: %v, want %s", show(p), res.moved, outcome)
	}
	out := p.From(p.Src, sourcePort(p, res.data))
	r.same(out, res.data)
	return out
}

// What netfilter has translated, or is on the way back from its DNAT, has the
// node's address and was forwarded: its tuple is taken, and never a pod's.
func testNetfilterFirst(t *testing.T, r *rig) {
	labtest.Kernel(t, forwardedRun)
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range []kind{{"TCP", f.tcp(packet.SYN)}, {"TCP from outside", f.tcp(packet.SYN | packet.ACK)}, {"UDP", f.udp()}} {
			r.clear()
			nf := k.p.From(f.node, keptPort)
			r.forwarded(nf, policy.PassHost)
			pod := k.p
			if pod.Proto == packet.TCP {
				pod.Flags = packet.SYN
			}
			out := r.translate(pod, policy.MasqNew, f.node)
			if out.SrcPort == keptPort {
				t.Fatalf("%s: the pod has netfilter's port", k.name)
			}
			r.forwarded(nf, policy.PassHost)
			r.expect(ingress, nf.Reply(), policy.PassHost)
			r.expect(ingress, f.unreachable(nf, f.router), policy.PassHost)
			r.send(ingress, out.Reply(), policy.MasqKnown, pod.Reply())
		}
	})
}

// The other way round the pod keeps its port, and netfilter's flow gets another.
func testNetfilterSecond(t *testing.T, r *rig) {
	labtest.Kernel(t, forwardedRun)
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range f.opening() {
			r.clear()
			out := r.translate(k.p, policy.MasqNew, f.node)
			nf := k.p.From(f.node, out.Port())
			for range 2 {
				moved := r.forwarded(nf, policy.MasqHost)
				if moved.Port() == out.Port() {
					t.Fatalf("%s: netfilter has the pod's port", k.name)
				}
				r.send(ingress, moved.Reply(), policy.MasqHost, nf.Reply())
			}
			r.send(ingress, out.Reply(), policy.MasqKnown, k.p.Reply())
		}
	})
}

// No entry is spent where no mapping can come in the way.
func testNetfilterElsewhere(t *testing.T, r *rig) {
	labtest.Kernel(t, forwardedRun)
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, p := range []packet.Packet{
			f.udp().From(f.node, changedPort),
			f.udp().From(f.node, keptPort).To(f.excluded, 53),
			f.tcp(packet.SYN).From(f.node, keptPort).To(f.excluded, 443),
		} {
			r.forwarded(p, policy.PassHost)
			r.expect(ingress, p.Reply(), policy.PassNoMapping)
		}
		if n := len(r.flows(forwardTable)) + len(r.flows(reverseTable)); n != 0 {
			t.Errorf("%d entries", n)
		}
	})
}

func (r *rig) tunnels(list ...Tunnel) {
	r.t.Helper()
	r.must(r.d.SetTunnels(list))
}

// What the node's tunnels exchange with a remote, no pod does; the rest is free.
func testTunnels(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	defer r.tunnels()
	eachFamily(t, r, func(r *rig, f family) {
		any4, any6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
		gre, esp := f.bare(packet.GRE), f.bare(packet.ESP)
		for i, list := range [][]Tunnel{
			{{Proto: packet.GRE, Remote: f.remote}},
			{{Proto: packet.GRE, Remote: f.remote}, {Proto: packet.ESP, Remote: f.other}},
			{{Proto: packet.GRE, Remote: any4}, {Proto: packet.GRE, Remote: any6}},
			{},
		} {
			r.clear()
			r.tunnels(list...)
			for _, p := range []packet.Packet{gre, esp, gre.To(f.other, 0), esp.To(f.other, 0)} {
				want := policy.MasqNew
				for _, tun := range list {
					if tun.Proto == p.Proto && (tun.Remote == p.Dst || tun.Remote.IsUnspecified()) {
						want = policy.DropProtocol
					}
				}
				if want == policy.MasqNew {
					r.translate(p, want, f.node)
				} else {
					r.expect(egress, p, want)
				}
			}
			if f.name == "IPv4" && i == 2 {
				// One family's any is not the other's.
				r.tunnels(Tunnel{Proto: packet.GRE, Remote: any6})
				r.translate(gre, policy.MasqNew, f.node)
			}
		}
	})
}

// A tunnel that comes later takes its packets back: from the next second on by the
// map, at once when it sends.
func testTunnelTakesOver(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	defer r.tunnels()
	eachFamily(t, r, func(r *rig, f family) {
		gre := f.bare(packet.GRE)
		out := r.translate(gre, policy.MasqNew, f.node)
		r.tunnels(Tunnel{Proto: packet.GRE, Remote: f.remote})
		r.age(forwardTable, 1)
		r.expect(egress, gre, policy.DropProtocol)
		if n := len(r.flows(forwardTable)) + len(r.flows(reverseTable)); n != 0 {
			t.Errorf("%d entries", n)
		}
		r.expect(ingress, out.Reply(), policy.PassNoMapping)
		r.tunnels()

		out = r.translate(gre, policy.MasqNew, f.node)
		r.expect(egress, gre.From(f.node, 0), policy.PassHost)
		r.expect(ingress, out.Reply(), policy.PassHost)
		r.expect(egress, gre, policy.DropProtocol)
	})
}

// The packets of a UDP tunnel keep their source port, whoever has it: it is a hash
// that nobody answers to. They spend no entry either.
func testTunnelPorts(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	defer r.tunnels()
	eachFamily(t, r, func(r *rig, f family) {
		const vxlan = 4789
		pod := f.udp().To(f.remote, vxlan)
		host := pod.From(f.node, keptPort)
		r.expect(egress, host, policy.PassHost)
		if n := len(r.flows(forwardTable)); n != 0 {
			t.Errorf("%d mappings", n)
		}
		out := r.translate(pod, policy.MasqNew, f.node)
		if out.SrcPort != keptPort {
			t.Fatalf("port %d", out.SrcPort)
		}
		r.tunnels(Tunnel{Proto: packet.UDP, Remote: netip.IPv4Unspecified(), Port: vxlan}, Tunnel{Proto: packet.UDP, Remote: netip.IPv6Unspecified(), Port: vxlan})
		r.expect(egress, host, policy.PassHost)
		if n := len(r.flows(forwardTable)); n != 1 {
			t.Errorf("%d mappings", n)
		}
		r.tunnels()
		r.translate(host, policy.MasqHost, f.node)
	})
}

// A long list of remotes is merged, and what is no longer there goes.
func testTunnelList(t *testing.T, r *rig) {
	defer r.tunnels()
	var list []Tunnel
	for i := range tunnelRemotes {
		list = append(list, Tunnel{Proto: packet.ESP, Remote: netip.AddrFrom4([4]byte{8, 0, byte(i >> 8), byte(i)})})
	}
	list = append(list, list[0], Tunnel{Proto: packet.AH, Remote: list[0].Remote})
	size := func() (n int) {
		var key masqTunnel
		var value uint32
		it := r.d.objs.Tunnels.Iterate()
		for it.Next(&key, &value) {
			n++
		}
		r.must(it.Err())
		return n
	}
	// One remote twice is counted twice: the list comes without duplicates.
	for want, list := range map[int][]Tunnel{tunnelRemotes + 1: append(list[1:tunnelRemotes:tunnelRemotes], list[tunnelRemotes:]...), 2: list, 0: nil} {
		r.tunnels(list...)
		if n := size(); n != want {
			t.Errorf("%d tunnels in the kernel, want %d (%s)", n, want, fmt.Sprint(len(list)))
		}
	}
}
