package datapath

import (
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// large returns the packets that are sent in fragments.
func (f family) large() []kind {
	var out []kind
	for _, k := range f.kinds() {
		if isAtomic(k.p) {
			continue
		}
		k.p.Payload, k.p.ID = slices.Repeat([]byte("0123456789"), 300), 0x1234
		if k.p.Coverage != 0 {
			k.p.Coverage = 8
		}
		out = append(out, k)
	}
	return out
}

// isAtomic tells whether p has a fragment header although it is whole (RFC 6946).
func isAtomic(p packet.Packet) bool {
	return slices.ContainsFunc(p.Extensions, func(x packet.Extension) bool { return x.Proto == packet.Fragment })
}

const fragmentSize = 1400

// pieces runs the fragments of p through a program: the first gives outcome first,
// each later one outcome later. It returns what came out.
func (r *rig) pieces(dir direction, link packet.Link, frames [][]byte, first, later policy.Outcome) [][]byte {
	r.t.Helper()
	var out [][]byte
	for i, frame := range frames {
		want := later
		if i == 0 {
			want = first
		}
		res := r.run(dir, "eth0", link, frame)
		if res.outcome != want {
			r.t.Fatalf("%s: fragment %d: %s, want %s", dir, i, res.outcome, want)
		}
		out = append(out, res.data)
	}
	return out
}

// reassembled checks that fragments are those of want: the same bytes as if the
// translated datagram had been cut to pieces, and whole again with true checksums.
func (r *rig) reassembled(want packet.Packet, frames [][]byte) {
	r.t.Helper()
	_, err := packet.Reassemble(want.Link, frames)
	r.must(err)
	for i, frame := range want.Fragments(fragmentSize) {
		if !slices.Equal(frame, frames[i]) {
			r.t.Fatalf("fragment %d of %s:\n want %x\n got  %x", i, show(want), frame[:80], frames[i][:80])
		}
	}
}

// Fragments in order, both directions: 3000 bytes of every kind.
func testFragments(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range labtest.Thin(t, "kinds", f.large()) {
			t.Run(f.name+" "+k.name, func(t *testing.T) {
				r.on(t).fragments(f, k.p)
				if k.p.Port() != 0 && k.p.Proto != packet.SCTP { // see testSCTPFragments
					r.on(t).fragments(f, k.p.From(f.pod, changedPort))
				}
			})
		}
	})
}

func (r *rig) fragments(f family, p packet.Packet) {
	r.t.Helper()
	r.clear()
	got := r.pieces(egress, p.Link, p.Fragments(fragmentSize), policy.MasqNew, policy.MasqFragment)
	e := r.flows(forwardTable)
	if len(e) != 1 {
		r.t.Fatalf("%d flows", len(e))
	}
	out := p.From(f.node, e[0].xlate.Port())
	r.reassembled(out, got)
	got = r.pieces(ingress, p.Link, out.Reply().Fragments(fragmentSize), policy.MasqKnown, policy.MasqFragment)
	r.reassembled(p.Reply(), got)
	// Another datagram of the same flow.
	p.ID, out.ID = 0x4321, 0x4321
	got = r.pieces(egress, p.Link, p.Fragments(fragmentSize), policy.MasqKnown, policy.MasqFragment)
	r.reassembled(out, got)
}

// What fragments get that nobody has announced, or that hide their ports.
func testFragmentsAlone(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		udp, tcp := f.udp(), f.tcp(packet.SYN)
		udp.Payload = make([]byte, 3000)
		frags := udp.Fragments(fragmentSize)
		in := udp.Reply().To(f.node, keptPort).Fragments(fragmentSize)

		r.pieces(egress, udp.Link, frags[1:], policy.DropFragment, policy.DropFragment)
		r.pieces(ingress, udp.Link, in[1:], policy.HoldFragment, policy.HoldFragment)
		// Another datagram does not speak for it, and neither does the other direction.
		r.pieces(egress, udp.Link, frags, policy.MasqNew, policy.MasqFragment)
		other := udp
		other.ID++
		r.pieces(egress, udp.Link, other.Fragments(fragmentSize)[1:], policy.DropFragment, policy.DropFragment)
		r.pieces(ingress, udp.Link, in[1:], policy.HoldFragment, policy.HoldFragment)

		// A first fragment too short for the header of its protocol (RFC 1858).
		tiny := tcp.Fragments(8)
		r.pieces(egress, tcp.Link, tiny, policy.DropFragment, policy.DropFragment)
		r.pieces(ingress, tcp.Link, tcp.Reply().To(f.node, keptPort).Fragments(8), policy.PassNoMapping, policy.PassNoMapping)
		// 8 bytes are enough for UDP.
		r.clear()
		r.pieces(egress, udp.Link, udp.Fragments(8)[:3], policy.MasqNew, policy.MasqFragment)

		// Where nothing is translated, fragments are no concern of ours, in any order.
		for _, c := range []struct {
			p    packet.Packet
			want policy.Outcome
		}{
			{udp.To(f.excluded, 53), policy.PassNative},
			{udp.From(f.foreign, 53), policy.PassSource},
			{udp.From(f.gateway, 53), policy.PassHost},
		} {
			frags := c.p.Fragments(fragmentSize)
			slices.Reverse(frags)
			r.pieces(egress, c.p.Link, frags, c.want, c.want)
			tiny := tcp.From(c.p.Src, 1).To(c.p.Dst, 2).Fragments(8)
			r.pieces(egress, tcp.Link, tiny, c.want, c.want)
		}
	})
}

// A note about a first fragment is not for ever.
func testFragmentNoteExpires(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.udp()
		p.Payload = make([]byte, 3000)
		frags := p.Fragments(fragmentSize)
		r.pieces(egress, p.Link, frags[:2], policy.MasqNew, policy.MasqFragment)
		var key masqDatagram
		var note masqFragment
		it := r.d.objs.Fragments.Iterate()
		for it.Next(&key, &note) {
			note.Seen -= 6
			r.must(r.d.objs.Fragments.Put(key, note))
		}
		r.pieces(egress, p.Link, frags[2:], policy.DropFragment, policy.DropFragment)
	})
}

// Fragments of a connection opened from outside, and of a protocol that passes.
func testFragmentsThatPass(t *testing.T, r *rig) {
	in := r.familyInput()
	in.UnknownProtocols = policy.UnknownPass
	r.apply(in)
	eachFamily(t, r, func(r *rig, f family) {
		p := f.udp()
		p.Payload = make([]byte, 3000)
		r.pieces(ingress, p.Link, p.Reply().Fragments(fragmentSize), policy.PassInbound, policy.PassInbound)
		r.pieces(egress, p.Link, p.Fragments(fragmentSize), policy.PassInbound, policy.PassInbound)
		gre := f.bare(packet.GRE)
		gre.Payload = make([]byte, 3000)
		r.pieces(egress, gre.Link, gre.Fragments(fragmentSize), policy.PassProtocol, policy.PassProtocol)
	})
}
