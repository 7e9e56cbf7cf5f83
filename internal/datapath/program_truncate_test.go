package datapath

import (
	"bytes"
	"encoding/binary"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// testRunRefuses tells whether the kernel refuses a test run with n bytes of frame:
// it wants the IP header complete that the Ethernet type promises.
func testRunRefuses(frame []byte, n int) bool {
	if n < 14 {
		return true
	}
	switch binary.BigEndian.Uint16(frame[12:]) {
	case 0x0800:
		return n < 14+20
	case 0x86dd:
		return n < 14+40
	}
	return false
}

// Every truncation of every kind of packet ends in one outcome (run checks the
// counter), and never half written: it passes untouched, or it is what the same
// truncation of the translated packet is, or it is dropped.
func testTruncated(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range labtest.Thin(t, "kinds", f.kindsOnLinks()) {
			if k.p.Link == packet.VLAN {
				continue // nothing that two tags do not show
			}
			r := r.on(t)
			p := k.p
			frame, out := p.Build(), p.From(f.node, p.Port())
			// The last length, that of the whole packet, leaves the mapping for the way back.
			for n := range len(frame) + 1 {
				if testRunRefuses(frame, n) {
					continue
				}
				r.clear()
				res := r.run(egress, "eth0", p.Link, frame[:n])
				r.truncated(k.name, res, out.Build()[:n], policy.MasqNew)
				if n == len(frame) && res.outcome != policy.MasqNew {
					t.Errorf("%s: %s", k.name, res.outcome)
				}
			}
			reply := out.Reply().Build()
			for n := range len(reply) + 1 {
				if !testRunRefuses(reply, n) {
					r.truncated(k.name, r.run(ingress, "eth0", p.Link, reply[:n]), p.Reply().Build()[:n], policy.MasqKnown)
				}
			}
		}
	})
}

// truncated checks a result against the same truncation of the translated packet.
func (r *rig) truncated(name string, res result, want []byte, masq policy.Outcome) {
	r.t.Helper()
	switch res.outcome.Verdict() {
	case policy.Masquerade:
		if res.outcome != masq || !bytes.Equal(res.data, want) {
			r.t.Fatalf("%s cut to %d bytes: %s\n want %x\n got  %x", name, len(want), res.outcome, want, res.data)
		}
	case policy.Pass:
		// The whole source address is there from this length on; nothing may leave with it.
		if res.outcome != policy.PassNoMapping && res.outcome != policy.PassInbound && res.outcome != policy.PassNotIP {
			r.t.Fatalf("%s cut to %d bytes: %s", name, len(want), res.outcome)
		}
	}
}

// A truncated ICMP error, in both directions: what is there of the quote is
// translated, and the outer checksum follows exactly what was changed.
func testTruncatedErrors(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range labtest.Thin(t, "kinds", f.kinds()) {
			if k.p.Port() != 0 {
				k.p = k.p.From(k.p.Src, changedPort)
			}
			out := r.translate(k.p, policy.MasqNew, f.node)
			typ := map[string]uint8{"IPv4": 11, "IPv6": 3}[f.name]
			for _, d := range []struct {
				dir  direction
				in   packet.Packet
				want packet.Packet
			}{
				{ingress, out.Error(f.router, typ, 0, -1), k.p.Error(f.router, typ, 0, -1)},
				{egress, k.p.Reply().Error(f.pod, typ, 0, -1), out.Reply().Error(f.node, typ, 0, -1)},
			} {
				r.truncateError(k, d.dir, d.in, d.want)
			}
			r.clear()
		}
	})
}

func (r *rig) truncateError(k kind, dir direction, in, want packet.Packet) {
	r.t.Helper()
	frame := in.Build()
	for n := range len(frame) + 1 {
		if testRunRefuses(frame, n) {
			continue
		}
		res := r.run(dir, "eth0", in.Link, frame[:n])
		switch res.outcome {
		case policy.MasqError:
			// With the bytes that were cut off, all outer checksums must be true again.
			whole := append(res.data, frame[n:]...)
			if err := packet.CheckOuter(in.Link, whole); err != nil {
				r.t.Fatalf("%s: %s cut to %d of %d bytes: %v", dir, k.name, n, len(frame), err)
			}
			if n == len(frame) {
				r.same(want, res.data)
			}
		case policy.PassNoMapping:
			if dir == egress {
				r.t.Fatalf("%s: %s cut to %d bytes: %s", dir, k.name, n, res.outcome)
			}
		case policy.DropBadHeader, policy.DropStray, policy.DropExtension:
			if dir == ingress {
				r.t.Fatalf("%s: %s cut to %d bytes: %s", dir, k.name, n, res.outcome)
			}
		default:
			r.t.Fatalf("%s: %s cut to %d bytes: %s", dir, k.name, n, res.outcome)
		}
	}
}
