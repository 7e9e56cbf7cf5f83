package packet

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"net/netip"
)

// header is what Check reads of an IP packet.
type header struct {
	src, dst netip.Addr
	proto    uint8
	fragment bool // any but an atomic one
	offset   int  // of a fragment's data in the datagram
	more     bool
	id       uint32
	body     []byte // behind all headers, as far as it is there
	short    bool   // the packet is cut
}

// Check verifies every checksum of a packet: IP header, transport, and those of
// the packet that an ICMP error quotes, as far as the quote goes.
func Check(link Link, b []byte) error {
	h, err := checkOuter(link, b)
	if err != nil || h.fragment || !h.isError() {
		return err
	}
	quote, err := read(h.body[8:])
	if err != nil {
		return fmt.Errorf("quoted packet: %w", err)
	}
	if quote.fragment || quote.short {
		return nil
	}
	if err := quote.checkTransport(); err != nil {
		return fmt.Errorf("quoted packet: %w", err)
	}
	return nil
}

// CheckOuter is Check without the packet that an ICMP error quotes.
func CheckOuter(link Link, b []byte) error {
	_, err := checkOuter(link, b)
	return err
}

func checkOuter(link Link, b []byte) (header, error) {
	h, err := read(b[link.Size():])
	switch {
	case err != nil || h.fragment:
		return h, err
	case h.short:
		return h, fmt.Errorf("shorter than its header says")
	}
	return h, h.checkTransport()
}

func (h header) isError() bool {
	if len(h.body) < 8 {
		return false
	}
	switch {
	case h.proto == ICMP && h.src.Is4():
		t := h.body[0]
		return t == 3 || t == 4 || t == 5 || t == 11 || t == 12
	case h.proto == ICMPv6 && h.src.Is6():
		return h.body[0] < 128
	}
	return false
}

func (h header) checkTransport() error {
	if h.proto == SCTP {
		b := append([]byte(nil), h.body...)
		want := binary.LittleEndian.Uint32(b[8:])
		clear(b[8:12])
		if got := crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)); got != want {
			return fmt.Errorf("SCTP checksum %#08x, want %#08x", want, got)
		}
		return nil
	}
	at := checksumAt(h.proto, h.src.Is4())
	if at < 0 {
		return nil
	}
	field := binary.BigEndian.Uint16(h.body[at:])
	switch {
	case h.proto == UDP && field == 0:
		return nil
	case h.proto == UDPLite && field == 0:
		return fmt.Errorf("UDP-Lite checksum 0 is invalid")
	}
	if sum := transportSum(h.src, h.dst, h.proto, h.body); sum != 0xffff {
		return fmt.Errorf("checksum %#04x of protocol %d: the sum is %#04x", field, h.proto, sum)
	}
	return nil
}

func read(b []byte) (header, error) {
	if len(b) > 0 && b[0]>>4 == 4 {
		return readIPv4(b)
	}
	return readIPv6(b)
}

func readIPv4(b []byte) (h header, err error) {
	if len(b) < 20 || len(b) < int(b[0]&15)*4 {
		return h, fmt.Errorf("IPv4 header: %d bytes", len(b))
	}
	ihl, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if sum := Sum(0, b[:ihl]); sum != 0xffff {
		return h, fmt.Errorf("IPv4 header: the sum is %#04x", sum)
	}
	h.src, h.dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	h.proto, h.id = b[9], uint32(binary.BigEndian.Uint16(b[4:]))
	frag := binary.BigEndian.Uint16(b[6:])
	h.more, h.offset = frag&0x2000 != 0, int(frag&0x1fff)*8
	h.fragment = h.more || h.offset > 0
	h.short = total > len(b)
	h.body = b[ihl:min(total, len(b))]
	return h, nil
}

func readIPv6(b []byte) (h header, err error) {
	if len(b) < 40 {
		return h, fmt.Errorf("IPv6 header: %d bytes", len(b))
	}
	total := 40 + int(binary.BigEndian.Uint16(b[4:]))
	h.src, h.dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
	h.short = total > len(b)
	h.proto, h.body = b[6], b[40:min(total, len(b))]
	return h, h.walk()
}

// walk goes through the IPv6 extension headers to the transport header, or to the
// data of a fragment.
func (h *header) walk() error {
	for !h.fragment && len(h.body) >= 8 {
		size := 8 + int(h.body[1])*8
		switch h.proto {
		case HopByHop, Routing, Destination:
		case AH:
			size = int(h.body[1])*4 + 8
		case Fragment:
			size = 8
			frag := binary.BigEndian.Uint16(h.body[2:])
			h.more, h.offset = frag&1 != 0, int(frag&^7)
			h.fragment = h.more || h.offset > 0
			h.id = binary.BigEndian.Uint32(h.body[4:])
		default:
			return nil
		}
		if size > len(h.body) {
			return fmt.Errorf("extension header %d: %d of %d bytes", h.proto, len(h.body), size)
		}
		h.proto, h.body = h.body[0], h.body[size:]
	}
	return nil
}
