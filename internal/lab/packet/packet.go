// Package packet builds packets from nothing and checks their checksums: what a
// test compares the data plane with, and what a question of `bauta explain` is put
// to the program as. It shares no code and no idea with the code
// under test: a checksum is always summed over everything that it covers (RFC
// 1071), never corrected. A translated packet is a Packet with another address,
// built again.
package packet

import (
	"encoding/binary"
	"net/netip"
)

// IP protocol numbers, and those of IPv6 extension headers.
const (
	HopByHop    = 0
	ICMP        = 1
	TCP         = 6
	UDP         = 17
	Routing     = 43
	Fragment    = 44
	GRE         = 47
	ESP         = 50
	AH          = 51
	ICMPv6      = 58
	Destination = 60
	SCTP        = 132
	UDPLite     = 136
)

// Flags of TCP.
const (
	FIN = 0x01
	SYN = 0x02
	RST = 0x04
	PSH = 0x08
	ACK = 0x10
)

// Types of SCTP chunks (RFC 9260 section 3.2).
const (
	SCTPData             = 0
	SCTPInit             = 1
	SCTPInitAck          = 2
	SCTPSack             = 3
	SCTPHeartbeat        = 4
	SCTPAbort            = 6
	SCTPShutdown         = 7
	SCTPShutdownAck      = 8
	SCTPCookieEcho       = 10
	SCTPShutdownComplete = 14
)

// Link is what stands before the IP header.
type Link int

const (
	Ethernet Link = iota
	VLAN          // with a tag
	QinQ          // with two
	Raw           // nothing
)

// Size is the number of bytes before the IP header.
func (l Link) Size() int { return [...]int{14, 18, 22, 0}[l] }

// Extension is an IPv6 extension header. Its size comes from Body, which is padded.
type Extension struct {
	Proto uint8
	Body  []byte // behind the first two bytes
}

// Packet is a packet before it is built. Fields that its protocol has no place
// for are ignored.
type Packet struct {
	Link       Link
	Src, Dst   netip.Addr
	Hops       uint8 // time to live; 0 means 64
	ID         uint32
	Options    []byte      // of IPv4, padded to words
	Extensions []Extension // of IPv6; one with Proto Fragment is an atomic fragment

	Proto            uint8
	SrcPort, DstPort uint16
	Seq, Ack         uint32
	Flags            uint8
	NoChecksum       bool // UDP: the field is zero
	Coverage         int  // UDP-Lite: bytes summed; 0: all

	Type, Code uint8  // of ICMP; the type of SCTP's only chunk
	Ident      uint16 // of an ICMP query or its answer
	Rest       uint32 // second word of another ICMP message; of a query the sequence number

	Payload []byte // of an ICMP error: the quoted packet
}

// IsQuery tells whether p is an ICMP echo or timestamp, request or reply: one with an identifier.
func (p Packet) IsQuery() bool {
	switch {
	case p.Src.Is4() && p.Proto == ICMP:
		return p.Type == 8 || p.Type == 0 || p.Type == 13 || p.Type == 14
	case p.Src.Is6() && p.Proto == ICMPv6:
		return p.Type == 128 || p.Type == 129
	}
	return false
}

// HasPorts tells whether the transport header starts with two ports.
func (p Packet) HasPorts() bool {
	return p.Proto == TCP || p.Proto == UDP || p.Proto == UDPLite || p.Proto == SCTP
}

// From returns p with another source; port is an identifier for ICMP queries and
// nothing for protocols that have neither.
func (p Packet) From(a netip.Addr, port uint16) Packet {
	p.Src = a
	if p.HasPorts() {
		p.SrcPort = port
	} else if p.IsQuery() {
		p.Ident = port
	}
	return p
}

// To returns p with another destination.
func (p Packet) To(a netip.Addr, port uint16) Packet {
	p.Dst = a
	if p.HasPorts() {
		p.DstPort = port
	} else if p.IsQuery() {
		p.Ident = port
	}
	return p
}

// Port is the source port or the identifier, 0 if there is none.
func (p Packet) Port() uint16 {
	if p.IsQuery() {
		return p.Ident
	}
	return p.SrcPort
}

// Reply returns an answer of p's receiver with the same payload.
func (p Packet) Reply() Packet {
	p.Src, p.Dst = p.Dst, p.Src
	p.SrcPort, p.DstPort = p.DstPort, p.SrcPort
	p.Seq, p.Ack = p.Ack, p.Seq+1
	switch {
	case p.IsQuery() && p.Proto == ICMPv6:
		p.Type = 129
	case p.IsQuery() && p.Type == 8:
		p.Type = 0
	case p.IsQuery():
		p.Type = 14
	case p.Proto == TCP:
		p.Flags |= ACK
	}
	return p
}

// Error returns an ICMP error from src to the sender of p that quotes the first n
// bytes of p behind its IP header; n < 0 quotes all of it.
func (p Packet) Error(src netip.Addr, typ, code uint8, n int) Packet {
	inner := p
	inner.Link = Raw
	quote := inner.Build()
	if n >= 0 {
		quote = quote[:min(len(quote), p.HeaderSize()+n)]
	}
	e := Packet{Link: p.Link, Src: src, Dst: p.Src, Type: typ, Code: code, Proto: ICMP, Payload: quote}
	if src.Is6() {
		e.Proto = ICMPv6
	}
	return e
}

// HeaderSize is the size of the IP header with options or extension headers.
func (p Packet) HeaderSize() int {
	if p.Src.Is4() {
		return 20 + len(padded(p.Options, 4))
	}
	n := 40
	for _, x := range p.Extensions {
		n += len(x.build(0, p.ID))
	}
	return n
}

func padded(b []byte, to int) []byte {
	return append(b[:len(b):len(b)], make([]byte, (to-len(b)%to)%to)...)
}

// Build returns the bytes of p.
func (p Packet) Build() []byte {
	body := p.Transport()
	if p.Src.Is4() {
		return append(p.link(0x0800), append(p.ipv4(len(body), 0), body...)...)
	}
	head := p.ipv6(p.Extensions, p.Proto, len(body))
	return append(p.link(0x86dd), append(head, body...)...)
}

// link returns the header of the link. The addresses are of no importance.
func (p Packet) link(ether uint16) []byte {
	if p.Link == Raw {
		return nil
	}
	b := append([]byte{2, 0, 0, 0, 0, 1}, 2, 0, 0, 0, 0, 2)
	switch p.Link {
	case VLAN:
		b = append(b, 0x81, 0x00, 0x00, 0x07)
	case QinQ:
		b = append(b, 0x88, 0xa8, 0x00, 0x09, 0x81, 0x00, 0x00, 0x07)
	}
	return binary.BigEndian.AppendUint16(b, ether)
}

func (p Packet) hops() uint8 {
	if p.Hops == 0 {
		return 64
	}
	return p.Hops
}

// ipv4 returns a header for size bytes that follow; fragment is that field of it.
func (p Packet) ipv4(size int, fragment uint16) []byte {
	b := make([]byte, 20, 20+len(p.Options))
	b = append(b, padded(p.Options, 4)...)
	b[0] = 4<<4 | uint8(len(b)/4)
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)+size))
	binary.BigEndian.PutUint16(b[4:], uint16(p.ID))
	binary.BigEndian.PutUint16(b[6:], fragment)
	b[8], b[9] = p.hops(), p.Proto
	copy(b[12:], p.Src.AsSlice())
	copy(b[16:], p.Dst.AsSlice())
	binary.BigEndian.PutUint16(b[10:], ^Sum(0, b))
	return b
}

// ipv6 returns the fixed header and the extension headers before proto.
func (p Packet) ipv6(ext []Extension, proto uint8, size int) []byte {
	var chain []byte
	for i := len(ext) - 1; i >= 0; i-- {
		chain = append(ext[i].build(proto, p.ID), chain...)
		proto = ext[i].Proto
	}
	b := make([]byte, 40, 40+len(chain))
	b[0] = 6 << 4
	binary.BigEndian.PutUint16(b[4:], uint16(len(chain)+size))
	b[6], b[7] = proto, p.hops()
	copy(b[8:], p.Src.AsSlice())
	copy(b[24:], p.Dst.AsSlice())
	return append(b, chain...)
}

func (x Extension) build(next uint8, id uint32) []byte {
	switch x.Proto {
	case Fragment:
		return binary.BigEndian.AppendUint32([]byte{next, 0, 0, 0}, id)
	case AH: // counted in words, less two (RFC 4302)
		b := padded(append([]byte{next, 0}, x.Body...), 8)
		b[1] = uint8(len(b)/4 - 2)
		return b
	}
	b := padded(append([]byte{next, 0}, x.Body...), 8)
	b[1] = uint8(len(b)/8 - 1)
	return b
}
