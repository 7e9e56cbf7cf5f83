package packet

import (
	"encoding/binary"
	"hash/crc32"
	"net/netip"
)

// Sum is the one's complement sum of b over what was summed before (RFC 1071); an
// odd last byte counts as the high one.
func Sum(before uint16, b []byte) uint16 {
	sum := uint64(before)
	for ; len(b) > 1; b = b[2:] {
		sum += uint64(b[0])<<8 | uint64(b[1])
	}
	if len(b) == 1 {
		sum += uint64(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// pseudo sums the pseudo-header of RFC 793 or RFC 8200.
func pseudo(src, dst netip.Addr, proto uint8, size int) uint16 {
	b := append(src.AsSlice(), dst.AsSlice()...)
	b = binary.BigEndian.AppendUint32(b, uint32(size))
	return Sum(0, binary.BigEndian.AppendUint32(b, uint32(proto)))
}

// Transport returns the transport header and what follows.
func (p Packet) Transport() []byte {
	var b []byte
	switch {
	case p.Proto == TCP:
		b = p.ports(20)
		binary.BigEndian.PutUint32(b[4:], p.Seq)
		binary.BigEndian.PutUint32(b[8:], p.Ack)
		b[12], b[13] = 5<<4, p.Flags
		b[14], b[15] = 0x40, 0
	case p.Proto == UDP:
		b = p.ports(8)
		binary.BigEndian.PutUint16(b[4:], uint16(8+len(p.Payload)))
	case p.Proto == UDPLite:
		b = p.ports(8)
		binary.BigEndian.PutUint16(b[4:], uint16(p.Coverage))
	case p.Proto == SCTP:
		b = p.ports(16)
		binary.BigEndian.PutUint32(b[4:], p.Seq)
		b[12] = p.Type
		binary.BigEndian.PutUint16(b[14:], uint16(4+len(p.Payload)))
	case p.icmp():
		b = make([]byte, 8)
		b[0], b[1] = p.Type, p.Code
		binary.BigEndian.PutUint32(b[4:], p.Rest)
		if p.IsQuery() {
			binary.BigEndian.PutUint16(b[4:], p.Ident)
		}
	}
	b = append(b, p.Payload...)
	p.putChecksum(b)
	return b
}

func (p Packet) ports(size int) []byte {
	b := make([]byte, size, size+len(p.Payload))
	binary.BigEndian.PutUint16(b, p.SrcPort)
	binary.BigEndian.PutUint16(b[2:], p.DstPort)
	return b
}

func (p Packet) icmp() bool {
	return p.Proto == ICMP && p.Src.Is4() || p.Proto == ICMPv6 && p.Src.Is6()
}

// putChecksum fills the checksum of a transport header whose field is zero.
func (p Packet) putChecksum(b []byte) {
	if p.Proto == SCTP {
		binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
		return
	}
	at := checksumAt(p.Proto, p.Src.Is4())
	if at < 0 || p.Proto == UDP && p.NoChecksum {
		return
	}
	sum := ^transportSum(p.Src, p.Dst, p.Proto, b)
	if sum == 0 && (p.Proto == UDP || p.Proto == UDPLite) {
		sum = 0xffff // zero would mean none (RFC 768), or be invalid (RFC 3828)
	}
	binary.BigEndian.PutUint16(b[at:], sum)
}

// checksumAt is the offset of the checksum, -1 if there is none of this kind.
func checksumAt(proto uint8, is4 bool) int {
	switch {
	case proto == TCP:
		return 16
	case proto == UDP, proto == UDPLite:
		return 6
	case proto == ICMP && is4, proto == ICMPv6 && !is4:
		return 2
	}
	return -1
}

// transportSum sums everything that the transport checksum covers.
func transportSum(src, dst netip.Addr, proto uint8, b []byte) uint16 {
	before := uint16(0)
	if proto != ICMP {
		before = pseudo(src, dst, proto, len(b))
	}
	if proto == UDPLite {
		if coverage := int(binary.BigEndian.Uint16(b[4:])); coverage != 0 {
			b = b[:min(coverage, len(b))]
		}
	}
	return Sum(before, b)
}
