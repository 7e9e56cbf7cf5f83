package datapath

import (
	"fmt"
	"net/netip"
	"slices"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// send runs a built packet and expects an outcome; want is the packet that must
// come out, to the byte, for a translation. It returns what came out.
func (r *rig) send(dir direction, p packet.Packet, outcome policy.Outcome, want packet.Packet) []byte {
	r.t.Helper()
	res := r.run(dir, "eth0", p.Link, p.Build())
	if res.outcome != outcome {
		r.t.Fatalf("%s of %s: %s, want %s", dir, show(p), res.outcome, outcome)
	}
	if outcome.Verdict() == policy.Masquerade {
		r.same(want, res.data)
	}
	return res.data
}

// same compares a frame with a packet built from nothing.
func (r *rig) same(want packet.Packet, got []byte) {
	r.t.Helper()
	if b := want.Build(); !slices.Equal(b, got) {
		r.t.Fatalf("want %s\n want %x\n got  %x\n check: %v", show(want), b, got, packet.Check(want.Link, got))
	}
	if err := packet.Check(want.Link, got); err != nil {
		r.t.Fatalf("%s: %v", show(want), err)
	}
}

// expect sends a packet that must pass untouched (run checks the bytes), or be dropped.
func (r *rig) expect(dir direction, p packet.Packet, outcome policy.Outcome) {
	r.t.Helper()
	if outcome.Verdict() == policy.Masquerade {
		r.t.Fatalf("expect is not for translations")
	}
	r.send(dir, p, outcome, p)
}

// translate sends a packet out that must be masqueraded from source a, and
// returns it as the remote sees it. Only the port is taken from the frame.
func (r *rig) translate(p packet.Packet, outcome policy.Outcome, a netip.Addr) packet.Packet {
	r.t.Helper()
	res := r.run(egress, "eth0", p.Link, p.Build())
	if res.outcome != outcome {
		r.t.Fatalf("egress of %s: %s, want %s", show(p), res.outcome, outcome)
	}
	out := p.From(a, sourcePort(p, res.data))
	r.same(out, res.data)
	return out
}

// sourcePort reads the port or identifier where p has it.
func sourcePort(p packet.Packet, frame []byte) uint16 {
	at := p.Link.Size() + p.HeaderSize()
	switch {
	case p.IsQuery():
		at += 4
	case !p.HasPorts():
		return 0
	}
	return uint16(frame[at])<<8 | uint16(frame[at+1])
}

func show(p packet.Packet) string {
	s := fmt.Sprintf("protocol %d %s:%d > %s:%d", p.Proto, p.Src, p.SrcPort, p.Dst, p.DstPort)
	switch p.Proto {
	case packet.TCP:
		s += fmt.Sprintf(" flags %#02x", p.Flags)
	case packet.ICMP, packet.ICMPv6:
		s += fmt.Sprintf(" type %d code %d id %d", p.Type, p.Code, p.Ident)
	}
	return s
}
