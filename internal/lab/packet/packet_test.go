package packet

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// Frames that other implementations made: an ICMP echo of ping(8), and the IPv6
// UDP example whose checksum RFC 768 arithmetic gives by hand.
func TestKnownPackets(t *testing.T) {
	ping := Packet{
		Link: Raw, Src: netip.MustParseAddr("192.168.0.1"), Dst: netip.MustParseAddr("192.168.0.199"),
		Proto: UDP, ID: 0, Hops: 64,
	}
	head := ping.Build()[:20]
	// The textbook header of RFC 1071 implementations: 4500 0073 0000 4000 4011 b861 c0a8 0001 c0a8 00c7.
	want, _ := hex.DecodeString("45000073000040004011b861c0a80001c0a800c7")
	copy(head[2:4], want[2:4])
	copy(head[6:8], want[6:8])
	clear(head[10:12])
	if sum := ^Sum(0, head); sum != 0xb861 {
		t.Errorf("header checksum %#04x, want 0xb861", sum)
	}
	// RFC 1071 section 3: the example's sum.
	if sum := Sum(0, []byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}); sum != 0xddf2 {
		t.Errorf("RFC 1071 example: sum %#04x, want 0xddf2", sum)
	}
}

func samples() []Packet {
	var out []Packet
	for _, addrs := range [][2]string{{"10.0.0.2", "1.1.1.1"}, {"fd00::2", "2606:4700::1"}} {
		src, dst := netip.MustParseAddr(addrs[0]), netip.MustParseAddr(addrs[1])
		icmp, echo := uint8(ICMP), uint8(8)
		if src.Is6() {
			icmp, echo = ICMPv6, 128
		}
		for link := Ethernet; link <= Raw; link++ {
			for _, p := range []Packet{
				{Proto: TCP, SrcPort: 40000, DstPort: 80, Flags: SYN},
				{Proto: UDP, SrcPort: 40000, DstPort: 53, Options: []byte{7, 3, 4}, Extensions: []Extension{{HopByHop, nil}, {AH, make([]byte, 22)}, {Routing, make([]byte, 10)}}},
				{Proto: UDPLite, SrcPort: 40000, DstPort: 53, Coverage: 8},
				{Proto: SCTP, SrcPort: 40000, DstPort: 36412, Seq: 7},
				{Proto: icmp, Type: echo, Ident: 77},
				{Proto: GRE},
			} {
				p.Link, p.Src, p.Dst, p.Payload = link, src, dst, []byte("some odd payload!")
				out = append(out, p, p.Reply(), p.Error(dst, 3, 1, 8), p.Error(dst, 3, 1, -1))
			}
		}
	}
	return out
}

func TestBuiltPacketsCheck(t *testing.T) {
	for _, p := range samples() {
		b := p.Build()
		if err := Check(p.Link, b); err != nil {
			t.Errorf("%+v: %v", p, err)
		}
		if p.Proto == GRE || p.Proto == UDPLite {
			continue // not every byte is covered
		}
		// Any changed byte of the transport header shows.
		b[p.Link.Size()+p.HeaderSize()+1] ^= 0x10
		if Check(p.Link, b) == nil {
			t.Errorf("%+v: a wrong byte was not found", p)
		}
	}
}

func TestFragmentsReassemble(t *testing.T) {
	for _, p := range samples() {
		p.Payload, p.Coverage = slices.Repeat([]byte("0123456789abcde"), 200), 0
		p.Extensions = []Extension{{HopByHop, nil}}
		pieces := p.Fragments(1400)
		body, err := Reassemble(p.Link, pieces)
		if err != nil {
			t.Errorf("%v > %v protocol %d: %v", p.Src, p.Dst, p.Proto, err)
		}
		if !bytes.Equal(body, p.Transport()) {
			t.Errorf("%v > %v protocol %d: other bytes", p.Src, p.Dst, p.Proto)
		}
		if _, err := Reassemble(p.Link, pieces[:2]); err == nil || !strings.Contains(err.Error(), "missing") {
			t.Errorf("without the last one: %v", err)
		}
	}
}
