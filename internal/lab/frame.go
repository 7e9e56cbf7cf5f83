package lab

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

// Frame is what a test asks about a captured packet.
type Frame struct {
	Src, Dst netip.Addr
	Proto    byte // the upper layer, behind IPv6 extension headers
	TTL      byte
	// Fragment is true for any fragment; those but the first have no L4.
	Fragment bool
	L4       []byte // from the L4 header to the end of the IP packet
}

const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)

// ParseFrame reads an Ethernet frame; ok is false if it holds no complete IP header.
func ParseFrame(b []byte) (f Frame, ok bool) {
	if len(b) < 14 {
		return f, false
	}
	switch binary.BigEndian.Uint16(b[12:]) {
	case 0x0800, 0x86dd:
		return ParseIP(b[14:])
	}
	return f, false
}

// ParseIP reads a packet that starts with its IP header.
func ParseIP(b []byte) (f Frame, ok bool) {
	if len(b) == 0 {
		return f, false
	}
	switch b[0] >> 4 {
	case 4:
		return parseIPv4(b)
	case 6:
		return parseIPv6(b)
	}
	return f, false
}

func parseIPv4(b []byte) (f Frame, ok bool) {
	if len(b) < 20 {
		return f, false
	}
	ihl, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if ihl < 20 || len(b) < ihl {
		return f, false
	}
	f.Src, f.Dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	f.TTL, f.Proto = b[8], b[9]
	frag := binary.BigEndian.Uint16(b[6:])
	f.Fragment = frag&0x3fff != 0
	if frag&0x1fff == 0 {
		// A quote in an ICMP error is shorter than its header says.
		f.L4 = b[ihl:max(ihl, min(total, len(b)))]
	}
	return f, true
}

func parseIPv6(b []byte) (f Frame, ok bool) {
	if len(b) < 40 {
		return f, false
	}
	f.Src, f.Dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
	f.Proto, f.TTL = b[6], b[7]
	rest := b[40:min(len(b), 40+int(binary.BigEndian.Uint16(b[4:])))]
	for len(rest) >= 8 {
		size := 8
		switch f.Proto {
		case 0, 43, 60: // hop-by-hop, routing, destination options
			size = 8 + int(rest[1])*8
		case 44:
			f.Fragment = true
			if binary.BigEndian.Uint16(rest[2:])&0xfff8 != 0 {
				f.Proto = rest[0]
				return f, true
			}
		default:
			f.L4 = rest
			return f, true
		}
		if size > len(rest) {
			return f, true
		}
		f.Proto, rest = rest[0], rest[size:]
	}
	f.L4 = rest
	return f, true
}

// Ports returns source and destination port of TCP and UDP.
func (f Frame) Ports() (src, dst uint16, ok bool) {
	if f.Proto != protoTCP && f.Proto != protoUDP || len(f.L4) < 4 {
		return 0, 0, false
	}
	return binary.BigEndian.Uint16(f.L4), binary.BigEndian.Uint16(f.L4[2:]), true
}

// TCPFlags returns the flags byte of a TCP header (1 = FIN, 2 = SYN, 4 = RST, 16 = ACK).
func (f Frame) TCPFlags() (flags byte, ok bool) {
	if f.Proto != protoTCP || len(f.L4) < 14 {
		return 0, false
	}
	return f.L4[13], true
}

// ICMP returns type, code, and the message after its first eight bytes: for an
// error that is the quoted packet.
func (f Frame) ICMP() (typ, code byte, body []byte, ok bool) {
	if f.Proto != protoICMP && f.Proto != protoICMPv6 || len(f.L4) < 8 {
		return 0, 0, nil, false
	}
	return f.L4[0], f.L4[1], f.L4[8:], true
}

func (f Frame) String() string {
	s := fmt.Sprintf("%s > %s proto %d ttl %d", f.Src, f.Dst, f.Proto, f.TTL)
	if src, dst, ok := f.Ports(); ok {
		s += fmt.Sprintf(" ports %d > %d", src, dst)
	}
	if flags, ok := f.TCPFlags(); ok {
		s += fmt.Sprintf(" flags %#02x", flags)
	}
	if typ, code, _, ok := f.ICMP(); ok {
		s += fmt.Sprintf(" icmp type %d code %d", typ, code)
	}
	if f.Fragment {
		s += " fragment"
	}
	return s
}

// SourceIn returns a predicate for Capture: an IP packet with a source in one of the prefixes.
func SourceIn(prefixes ...netip.Prefix) func(Packet) bool {
	return func(p Packet) bool {
		f, ok := ParseFrame(p.Data)
		if !ok {
			return false
		}
		for _, x := range prefixes {
			if x.Contains(f.Src) {
				return true
			}
		}
		return false
	}
}
