package datapath

import (
	"fmt"
	"net/netip"
	"testing"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// icmpErrors returns every kind of error, with a second word as MTU or pointer.
func (f family) icmpErrors() [][2]uint8 {
	if f.name == "IPv4" {
		all := [][2]uint8{{4, 0}, {5, 0}, {5, 1}, {5, 2}, {5, 3}, {11, 0}, {11, 1}, {12, 0}, {12, 1}, {12, 2}}
		for code := range uint8(16) {
			all = append(all, [2]uint8{3, code})
		}
		return all
	}
	all := [][2]uint8{{2, 0}, {3, 0}, {3, 1}, {4, 0}, {4, 1}, {4, 2}}
	for code := range uint8(8) {
		all = append(all, [2]uint8{1, code})
	}
	return all
}

// quoted are the packets that errors are about, with how much of them is quoted
// behind the IP header: -1 for all.
func (f family) quoted() []struct {
	kind
	quote int
} {
	type row = struct {
		kind
		quote int
	}
	var rows []row
	for _, k := range f.kinds() {
		rows = append(rows, row{k, -1}, row{k, 8})
		if k.p.Proto == packet.TCP {
			// Just without the checksum, and just with it.
			rows = append(rows, row{k, 16}, row{k, 18})
		}
	}
	return rows
}

// The matrix of ICMP errors in both directions: inner and outer headers and
// checksums are to the byte what they are when built for the other side.
func testErrors(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, q := range f.quoted() {
			for _, port := range []uint16{keptPort, changedPort} {
				r.clear()
				p := q.p
				if p.Port() != 0 {
					p = p.From(f.pod, port)
				}
				name := fmt.Sprintf("%s from port %d, %d quoted", q.name, port, q.quote)
				out := r.translate(p, policy.MasqNew, f.node)
				types := f.icmpErrors()
				if q.quote != -1 && q.name != "TCP" {
					types = types[:1]
				}
				for _, e := range types {
					r.translateErrors(name, f, p, out, e, q.quote)
				}
			}
		}
	})
}

// translateErrors sends one kind of error about the flow of p, which is out on the wire.
func (r *rig) translateErrors(name string, f family, p, out packet.Packet, e [2]uint8, quote int) {
	r.t.Helper()
	about := func(p packet.Packet, src netip.Addr) packet.Packet {
		e := p.Error(src, e[0], e[1], quote)
		e.Rest = 1280
		return e
	}
	defer func() {
		if r.t.Failed() {
			r.t.Logf("%s, type %d code %d", name, e[0], e[1])
		}
	}()
	// From a hop on the way: the pod sees its own packet in the quote.
	r.send(ingress, about(out, f.router), policy.MasqError, about(p, f.router))
	// From the pod about what it got: the remote sees what it sent.
	r.send(egress, about(p.Reply(), f.pod), policy.MasqError, about(out.Reply(), f.node))
	// From the node, by whatever address it complains: its own source stays.
	r.send(egress, about(p.Reply(), f.node), policy.MasqError, about(out.Reply(), f.node))
	r.send(egress, about(p.Reply(), f.gateway), policy.MasqError, about(out.Reply(), f.gateway))
}

// Errors do not keep a mapping alive (RFC 5508 REQ-6).
func testErrorsDoNotRefresh(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.udp()
		out := r.translate(p, policy.MasqNew, f.node)
		r.age(forwardTable, 50)
		r.age(reverseTable, 50)
		before := append(r.flows(forwardTable), r.flows(reverseTable)...)
		r.send(ingress, f.unreachable(out, f.router), policy.MasqError, f.unreachable(p, f.router))
		r.send(egress, f.unreachable(p.Reply(), f.pod), policy.MasqError, f.unreachable(out.Reply(), f.node))
		after := append(r.flows(forwardTable), r.flows(reverseTable)...)
		if fmt.Sprint(before) != fmt.Sprint(after) {
			t.Errorf("flows changed:\n was %v\n is  %v", before, after)
		}
	})
}

// unreachable is an error from src to the sender of p that quotes all of it.
func (f family) unreachable(p packet.Packet, src netip.Addr) packet.Packet {
	return p.Error(src, map[string]uint8{"IPv4": 3, "IPv6": 1}[f.name], 3, -1)
}

// Errors about flows that nobody knows, and about connections opened from outside.
func testErrorsOfOthers(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.udp()
		r.expect(egress, f.unreachable(p.Reply(), f.pod), policy.DropStray)
		r.expect(egress, f.unreachable(p.Reply(), f.gateway), policy.PassHost)
		r.expect(ingress, f.unreachable(p.From(f.node, keptPort), f.router), policy.PassNoMapping)
		// An error that quotes nothing readable.
		empty := f.unreachable(p.Reply(), f.pod)
		empty.Payload = nil
		r.expect(egress, empty, policy.DropStray)
		r.expect(ingress, empty.From(f.router, 0).To(f.node, 0), policy.PassNoMapping)
		// Towards an excluded destination an error passes as anything does.
		r.expect(egress, f.unreachable(p.Reply().From(f.excluded, 53), f.pod), policy.PassNative)

		open := p.Reply()
		r.expect(ingress, open, policy.PassInbound)
		r.expect(egress, f.unreachable(open, f.pod), policy.PassInbound)
		other := open
		other.SrcPort++
		r.expect(egress, f.unreachable(other, f.pod), policy.DropStray)
		// A later fragment in the quote names no flow.
		frags := open.From(f.remote, open.SrcPort)
		frags.Link, frags.Payload = packet.Raw, make([]byte, 64)
		e := f.unreachable(open, f.pod)
		e.Payload = frags.Fragments(32)[1]
		r.expect(egress, e, policy.DropStray)
	})
}
