package datapath

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// largeError is an error that quotes 3000 bytes, so that it comes in fragments.
func (f family) largeError(v view, id uint32) (e, want packet.Packet) {
	e = f.unreachable(v.about, v.src)
	want = f.unreachable(v.wantFor, v.wantSrc)
	e.ID, want.ID = id, id
	return e, want
}

// laterOf is what the later fragments of an error get whose first is translated: those of the node
// itself keep their source, as the first does.
func (v view) laterOf() policy.Outcome {
	if v.src == v.wantSrc && v.dir == egress {
		return policy.PassHost
	}
	return policy.MasqFragment
}

// An ICMP error may be so large that it is cut to pieces. The later fragments have neither a type nor
// a quote: they follow the first one, in both directions and in any order, and none leaks (the leak
// sentinel looks at each: see rig.runContext).
func testErrorFragments(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		kinds := f.large()
		for link, name := range []string{"VLAN", "QinQ"} {
			k := kinds[0]
			k.name, k.p.Link = k.name+", "+name, packet.Link(link+1)
			kinds = append(kinds, k)
		}
		a := r.watchAgain()
		id := uint32(0)
		for _, k := range kinds {
			ports := []uint16{keptPort, changedPort}
			if k.p.Port() == 0 {
				ports = ports[:1]
			}
			for _, port := range ports {
				t.Run(fmt.Sprintf("%s %s %d", f.name, k.name, port), func(t *testing.T) {
					a.rig = r.on(t)
					a.clear()
					p := k.p.From(f.pod, port)
					small := p
					small.Payload = p.Payload[:100]
					out := p.From(f.node, a.translate(small, policy.MasqNew, f.node).Port())
					for _, v := range f.views(p, out) {
						id++
						e, want := f.largeError(v, id)
						frames := e.Fragments(fragmentSize)
						a.reassembled(want, a.pieces(v.dir, e.Link, frames, policy.MasqError, v.laterOf()))
						e.ID, want.ID = id|1<<15, id|1<<15
						frames = e.Fragments(fragmentSize)
						switch {
						case e.Link != packet.Ethernet: // the kernel takes the tags of what arrives again
						case v.dir == ingress:
							a.reassembled(want, a.late(e.Link, frames, policy.MasqError, policy.MasqFragment))
						case v.laterOf() == policy.MasqFragment:
							a.pieces(egress, e.Link, frames[1:], policy.DropFragment, policy.DropFragment)
						}
					}
				})
			}
		}
	})
}

// The first fragment need not hold all that is to be translated: a checksum of the quote that comes
// later stays as it was, and the error's own is true of that. One without the quoted ports names no
// flow, and neither it nor what follows leaves with a pod's address.
func testErrorFragmentsShort(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		headers := map[string]int{"IPv4": 20, "IPv6": 40}[f.name]
		p := f.tcp(packet.SYN).From(f.pod, changedPort)
		p.Payload = slices.Repeat([]byte("0123456789"), 20)
		out := r.translate(p, policy.MasqNew, f.node)
		id := uint32(0)
		for _, v := range f.views(p, out) {
			id++
			e, want := f.largeError(v, id)
			ports := (8 + headers + 8 + 7) &^ 7 // up to the ports, and not to the checksum
			at := headers + 16
			copy(want.Payload[at:at+2], e.Payload[at:at+2])
			got := r.pieces(v.dir, e.Link, e.Fragments(ports), policy.MasqError, v.laterOf())
			for i, frame := range want.Fragments(ports) {
				if !slices.Equal(frame, got[i]) {
					t.Errorf("%s: fragment %d of %s:\n want %x\n got  %x", v.dir, i, show(want), frame, got[i])
				}
			}
			for size := 8; size < 8+headers+8; size += 8 {
				id++
				e.ID = id
				frames := e.Fragments(size)
				switch {
				case v.dir == ingress:
					r.pieces(ingress, e.Link, frames, policy.PassNoMapping, policy.PassNoMapping)
				case v.laterOf() == policy.PassHost:
					r.pieces(egress, e.Link, frames, policy.PassHost, policy.PassHost)
				default:
					r.pieces(egress, e.Link, frames, policy.DropStray, policy.DropFragment)
				}
			}
		}
		// About a connection opened from outside it passes, all of it.
		open := f.udp().Reply()
		open.Payload = make([]byte, 300)
		r.expect(ingress, open, policy.PassInbound)
		e := f.unreachable(open, f.pod)
		e.ID = id + 1
		r.pieces(egress, e.Link, e.Fragments(104), policy.PassInbound, policy.PassInbound)
	})
}

// An error of the node that quotes a later fragment for a pod might show the pod's address. While IPv6 is
// not masqueraded it passes as everything does, whoever sends it.
func testErrorQuotesFragment(t *testing.T, r *rig) {
	in := r.familyInput()
	r.apply(in)
	f := families[1]
	p := f.udp().From(f.pod, changedPort).Reply()
	p.Payload = make([]byte, 300)
	e := f.unreachable(p, f.node)
	p.Link = packet.Raw
	e.Payload = p.Fragments(104)[1]
	r.expect(egress, e, policy.DropFragment)
	in.IPv6 = false
	r.reapply(in)
	for _, src := range []netip.Addr{f.pod, f.node, f.router} {
		r.expect(egress, e.From(src, 0), policy.PassDisabled)
	}
}
