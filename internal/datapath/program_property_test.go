package datapath

import (
	"math/rand/v2"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
	"bauta.dev/bauta/internal/policy/policytest"
)

// vary returns p with other ports, numbers and payload.
func vary(rng *rand.Rand, p packet.Packet) packet.Packet {
	port := func() uint16 {
		if rng.IntN(3) == 0 {
			return firstPort + uint16(rng.IntN(lastPort-firstPort+1))
		}
		return uint16(rng.IntN(65536))
	}
	p.SrcPort, p.DstPort, p.Ident, p.ID = port(), port(), port(), rng.Uint32()
	p.Seq, p.Ack, p.Rest, p.Hops = rng.Uint32(), rng.Uint32(), rng.Uint32(), uint8(rng.IntN(256))
	p.Payload = make([]byte, rng.IntN(64))
	if p.Link == packet.Raw {
		p.Payload = make([]byte, 14+rng.IntN(64)) // what a test run takes for the IP header is complete
	}
	if p.Coverage != 0 { // of UDP-Lite, also half a word
		p.Coverage = 8 + rng.IntN(len(p.Payload)+1)
	}
	for i := range p.Payload {
		// Checksums of zero and of all ones are where arithmetic goes wrong.
		p.Payload[i] = []byte{0, 0xff, byte(rng.IntN(256))}[rng.IntN(3)]
	}
	return p
}

// A masqueraded packet changes its source only, and its checksums as if the packet
// had been built so; the way back restores the original; what is excluded passes
// untouched (run checks that of every pass).
func testTranslationIsReversible(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	rng := labtest.Rand(t)
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range labtest.Thin(t, "kinds", f.kindsOnLinks()) {
			for range 8 {
				r.clear()
				p := vary(rng, k.p)
				out := r.translate(p, policy.MasqNew, f.node)
				if p.HasPorts() && (out.SrcPort < firstPort || out.SrcPort > lastPort) {
					t.Errorf("%s: port %d is not of the pool", k.name, out.SrcPort)
				}
				r.send(ingress, out.Reply(), policy.MasqKnown, p.Reply())
				r.send(egress, p, policy.MasqKnown, out)
				r.expect(egress, p.To(f.excluded, p.DstPort), policy.PassNative)
				r.expect(egress, p.From(f.foreign, p.SrcPort), policy.PassSource)
				r.expect(ingress, p.Reply().From(f.other, p.DstPort), arrives(p))
			}
		}
	})
}

// arrives is what becomes of an answer to p for which there is no mapping.
func arrives(p packet.Packet) policy.Outcome {
	if p.Proto == packet.TCP || p.IsQuery() {
		return policy.PassNoMapping
	}
	return policy.PassInbound
}

// A checksum that becomes zero is where the protocols differ.
func testChecksumZero(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, proto := range []uint8{packet.TCP, packet.UDP, packet.UDPLite} {
			p := f.tcp(packet.ACK)
			p.Proto, p.Payload = proto, []byte{0, 0}
			at := p.HeaderSize() + map[uint8]int{packet.TCP: 16}[proto]
			if proto != packet.TCP {
				at += 6
			}
			// The payload that makes the checksum of the translated packet all zero.
			out := p.From(f.node, p.SrcPort)
			out.Link = packet.Raw
			b := out.Build()
			p.Payload = []byte{b[at], b[at+1]}
			got := r.translate(p, policy.MasqNew, f.node)
			if p.SrcPort != got.SrcPort {
				t.Fatalf("port %d became %d", p.SrcPort, got.SrcPort)
			}
			raw := got
			raw.Link = packet.Raw
			sum := raw.Build()[at : at+2]
			if want := map[bool][]byte{true: {0, 0}, false: {0xff, 0xff}}[proto == packet.TCP]; !slices.Equal(sum, want) {
				t.Errorf("protocol %d: the test's checksum is %x, want %x", proto, sum, want)
			}
			r.send(ingress, got.Reply(), policy.MasqKnown, p.Reply())
			r.clear()
			// And the one of the packet before.
			p.Payload = []byte{0, 0}
			raw = p
			raw.Link = packet.Raw
			b = raw.Build()
			p.Payload = []byte{b[at], b[at+1]}
			r.translate(p, policy.MasqNew, f.node)
			r.clear()
		}
	})
}

// Random packets and policies: the programs say what policy.Decide says.
func testAgreesWithDecide(t *testing.T, r *rig) {
	const packets = 120
	policies := labtest.Thin(t, "policies", make([]policytest.Group, 60))
	rng := labtest.Rand(t)
	seen := make(map[policy.Outcome]int)
	for _, g := range policies {
		g.Input = policytest.RandomInput(rng)
		for range packets {
			c := policytest.RandomCase(rng)
			p := casePacket(c)
			// No connection from outside has packets of these kinds.
			if p.Proto == packet.ICMP && p.Src.Is4() || p.Proto == packet.ICMPv6 && !p.Src.Is4() {
				c.Packet.Inbound = c.Packet.Inbound && (p.IsQuery() || isICMPError(p))
			}
			g.Cases = append(g.Cases, c)
		}
		g, err := g.WithDevices(r.device)
		r.must(err)
		p := r.apply(g.Input)
		for _, c := range g.Cases {
			r.clear()
			want, got := p.Decide(c.Packet), r.decide(c)
			if got.Outcome != want.Outcome || got.Address != want.Address {
				t.Fatalf("%s, inbound %v, device %s: %s %v, want %s %v\npolicy %+v", show(casePacket(c)), c.Packet.Inbound, c.Device,
					got.Outcome, got.Address, want.Outcome, want.Address, g.Input)
			}
			seen[want.Outcome]++
		}
	}
	t.Logf("%d packets: %v", len(policies)*packets, seen)
}
