package datapath

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
	"bauta.dev/bauta/internal/policy/policytest"
)

var nativeEndian = binary.NativeEndian

// casePacket builds the packet of a table's case. An ICMP error quotes a UDP
// datagram that its source got.
func casePacket(c policytest.Case) packet.Packet {
	p := packet.Packet{
		Src: c.Packet.Src, Dst: c.Packet.Dst, Proto: c.Packet.Proto,
		SrcPort: c.SrcPort, DstPort: c.DstPort, Ident: c.SrcPort,
		Flags: c.Packet.TCPFlags, Type: c.Packet.ICMPType, Payload: []byte("payload of a case"),
	}
	if isICMPError(p) {
		p.Payload = caseQuoted(p).Build()
	}
	return p
}

// caseQuoted is the datagram that the ICMP error p is about.
func caseQuoted(p packet.Packet) packet.Packet {
	return packet.Packet{Link: packet.Raw, Src: p.Dst, Dst: p.Src, Proto: packet.UDP, SrcPort: 40000, DstPort: 53,
		Payload: []byte("what the error is about")}
}

func isICMPError(p packet.Packet) bool {
	switch {
	case p.Proto == packet.ICMP && p.Src.Is4():
		return p.Type == 3 || p.Type == 4 || p.Type == 5 || p.Type == 11 || p.Type == 12
	case p.Proto == packet.ICMPv6 && p.Src.Is6():
		return p.Type < 128
	}
	return false
}

// opener is the packet from outside that opens the connection which p belongs to.
func opener(p packet.Packet) packet.Packet {
	switch {
	case isICMPError(p):
		open := caseQuoted(p)
		open.Link = packet.Ethernet
		return open
	case p.Proto == packet.TCP:
		open := p.Reply()
		open.Flags = packet.SYN
		return open
	case p.IsQuery():
		open := p.Reply()
		open.Type = map[uint8]uint8{0: 8, 8: 8, 14: 13, 13: 13, 129: 128, 128: 128}[p.Type]
		return open
	}
	return p.Reply()
}

// decide asks the programs what policy.Decide says. An outcome that the program
// can't see as such is left to the caller.
func (r *rig) decide(c policytest.Case) policy.Decision {
	r.t.Helper()
	p := casePacket(c)
	if c.Packet.Inbound {
		r.run(ingress, c.Device, p.Link, opener(p).Build())
	}
	res := r.run(egress, c.Device, p.Link, p.Build())
	got := policy.Decision{Outcome: res.outcome}
	if res.outcome == policy.MasqNew {
		got.Address = sourceOf(p, res.data)
		r.same(p.From(got.Address, sourcePort(p, res.data)), res.data)
	}
	return got
}

func sourceOf(p packet.Packet, frame []byte) netip.Addr {
	b := frame[p.Link.Size():]
	if p.Src.Is4() {
		return netip.AddrFrom4([4]byte(b[12:]))
	}
	return netip.AddrFrom16([16]byte(b[8:]))
}

// Every case of the table that all renderings of a policy share.
func testTable(t *testing.T, r *rig) {
	groups, err := policytest.Load()
	r.must(err)
	start := time.Now()
	cases := 0
	for _, g := range groups {
		g, err := g.WithDevices(r.device)
		r.must(err)
		t.Run(g.Name, func(t *testing.T) {
			r := r.on(t)
			r.apply(g.Input)
			for _, c := range g.Cases {
				r.clear()
				cases++
				if err := c.Check(r.decide(c)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	t.Logf("%d groups, %d cases, %s", len(groups), cases, time.Since(start))
}
