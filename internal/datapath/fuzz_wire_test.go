package datapath

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"net/netip"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// wire is what the fuzz tests know of a packet: read anew from RFC 791, 8200 and the
// transports' own, and from no code under test. Offsets count from the first byte of the frame.
type wire struct {
	frame    []byte
	is4      bool
	l3, l4   int
	end      int // of the packet, by its IP header and by what there is
	src, dst netip.Addr
	proto    uint8
	later    bool   // a fragment, but not the first
	first    bool   // a first fragment
	id       uint32 // of the datagram, if this is a fragment
	hidden   bool   // the transport header can't be found or is not whole
}

// viewFrame reads a frame; ok is false if it has no readable IP header.
func viewFrame(link packet.Link, frame []byte) (v wire, ok bool) {
	if len(frame) < 14 {
		return wire{}, false
	}
	ether, l3 := binary.BigEndian.Uint16(frame[12:]), 0
	if link != packet.Raw {
		l3 = 14
		for range 2 {
			if (ether != 0x8100 && ether != 0x88a8) || len(frame) < l3+4 {
				break
			}
			ether = binary.BigEndian.Uint16(frame[l3+2:])
			l3 += 4
		}
	}
	switch ether {
	case 0x0800:
		return viewIP(frame, l3, true, false)
	case 0x86dd:
		return viewIP(frame, l3, false, false)
	}
	return wire{}, false
}

// isIP tells whether a frame says that it is an IP packet, or may hide one behind tags.
func isIP(link packet.Link, frame []byte) bool {
	at := 12
	for range 3 {
		if len(frame) < at+2 {
			return true
		}
		switch binary.BigEndian.Uint16(frame[at:]) {
		case 0x0800, 0x86dd:
			return true
		case 0x8100, 0x88a8:
			if link == packet.Raw {
				return true
			}
			at += 4
		default:
			return false
		}
	}
	return true
}

// viewIP reads the IP packet at l3; of a quoted one 8 bytes of the transport header are enough.
func viewIP(frame []byte, l3 int, is4, quoted bool) (wire, bool) {
	v := wire{frame: frame, is4: is4, l3: l3}
	b := frame[min(l3, len(frame)):]
	if is4 {
		if len(b) < 20 || b[0]>>4 != 4 || b[0]&15 < 5 {
			return v, false
		}
		v.src, v.dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		v.proto, v.l4 = b[9], l3+int(b[0]&15)*4
		v.end = l3 + int(binary.BigEndian.Uint16(b[2:]))
		v.id = uint32(binary.BigEndian.Uint16(b[4:]))
		field := binary.BigEndian.Uint16(b[6:])
		v.later, v.first = field&0x1fff != 0, field&0x3fff == 0x2000
	} else {
		if len(b) < 40 || b[0]>>4 != 6 {
			return v, false
		}
		v.src, v.dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		if v.src.Is4In6() || v.dst.Is4In6() {
			return v, false
		}
		v.proto, v.l4 = b[6], l3+40
		v.end = v.l4 + int(binary.BigEndian.Uint16(b[4:]))
		v.walk()
	}
	v.end = min(v.end, len(frame))
	need := 8
	switch {
	case v.proto == packet.TCP && !quoted:
		need = 20
	case v.proto == packet.SCTP && !quoted:
		need = 16 // and its first chunk's header
	case !v.ports() && !v.icmp():
		need = 0
	}
	if !v.later && need > 0 && len(frame) < v.l4+need {
		v.hidden = true
	}
	return v, true
}

// walk goes behind the extension headers; six are walked (contract: a bounded walk).
func (v *wire) walk() {
	for n := 0; ; n++ {
		size := 0
		switch v.proto {
		case packet.HopByHop, packet.Routing, packet.Destination, packet.AH, packet.Fragment:
		default:
			return
		}
		if n == 6 || len(v.frame) < v.l4+8 {
			v.hidden = true
			return
		}
		h := v.frame[v.l4:]
		switch size = (int(h[1]) + 1) * 8; v.proto {
		case packet.AH:
			size = (int(h[1]) + 2) * 4
		case packet.Fragment:
			size = 8
			v.id = binary.BigEndian.Uint32(h[4:])
			field := binary.BigEndian.Uint16(h[2:])
			v.later, v.first = v.later || field&^7 != 0, v.first || field&^7 == 0 && field&1 != 0
		}
		v.proto = h[0]
		v.l4 += size
		if v.later {
			return
		}
	}
}

func (v wire) icmp() bool {
	return v.is4 && v.proto == packet.ICMP || !v.is4 && v.proto == packet.ICMPv6
}

func (v wire) ports() bool {
	return v.proto == packet.TCP || v.proto == packet.UDP || v.proto == packet.UDPLite || v.proto == packet.SCTP
}

func (v wire) icmpType() uint8 { return v.frame[v.l4] }

// echo tells whether v is an ICMP query, or its answer.
func (v wire) echo() (query, answer bool) {
	if !v.icmp() || v.hidden || v.later {
		return false, false
	}
	if v.is4 {
		return v.icmpType() == 8 || v.icmpType() == 13, v.icmpType() == 0 || v.icmpType() == 14
	}
	return v.icmpType() == 128, v.icmpType() == 129
}

// error tells whether v is an ICMP error.
func (v wire) error() bool {
	return !v.hidden && !v.later && isICMPError(packet.Packet{Proto: v.proto, Src: v.src, Type: v.frame[min(v.l4, len(v.frame)-1)]})
}

// redirect tells whether v is an ICMP redirect, which names a next hop.
func (v wire) redirect() bool { return v.error() && v.is4 && v.icmpType() == 5 }

// intact tells whether the IP header has a true checksum (RFC 5508 REQ-3).
func (v wire) intact() bool {
	return !v.is4 || v.l4 <= len(v.frame) && packet.Sum(0, v.frame[v.l3:v.l4]) == 0xffff
}

// quote reads the packet that an ICMP error is about.
func (v wire) quote() (wire, bool) { return viewIP(v.frame, v.l4+8, v.is4, true) }

// The two sides of a packet.
const (
	sideSource = iota
	sideDestination
)

func (v wire) addrAt(side int) (from, to int) {
	if v.is4 {
		return v.l3 + 12 + 4*side, v.l3 + 16 + 4*side
	}
	return v.l3 + 8 + 16*side, v.l3 + 24 + 16*side
}

// portAt is the offset of the port or identifier of one side, -1 if there is none.
func (v wire) portAt(side int) int {
	query, answer := v.echo()
	switch {
	case v.hidden || v.later:
		return -1
	case v.ports():
		return v.l4 + 2*side
	case query || answer:
		return v.l4 + 4
	}
	return -1
}

// port is the port of a side. An identifier is that of the asking side.
func (v wire) port(side int) uint16 {
	at := v.portAt(side)
	query, answer := v.echo()
	if at < 0 || query && side == sideDestination || answer && side == sideSource {
		return 0
	}
	return binary.BigEndian.Uint16(v.frame[at:])
}

// checksumAt is the offset of the one's complement checksum, -1 if it is not there.
func (v wire) checksumAt() int {
	at := v.l4
	switch {
	case v.hidden || v.later:
		return -1
	case v.proto == packet.TCP:
		at += 16
	case v.proto == packet.UDP || v.proto == packet.UDPLite:
		at += 6
	case v.icmp():
		at += 2
	default:
		return -1
	}
	return at
}

// flowOf is the five-tuple of a leaving packet: its source is the local side.
type flowOf struct {
	proto         uint8
	local, remote netip.AddrPort
}

func (v wire) leaving() flowOf {
	return flowOf{v.proto, netip.AddrPortFrom(v.src, v.port(sideSource)), netip.AddrPortFrom(v.dst, v.port(sideDestination))}
}

func (v wire) arriving() flowOf {
	f := v.leaving()
	return flowOf{f.proto, f.remote, f.local}
}

// first is the packet as policy.Decide takes it.
func (v wire) decidable(device int) policy.Packet {
	p := policy.Packet{Src: v.src, Dst: v.dst, Proto: v.proto, Device: device}
	if !v.hidden && !v.later {
		switch {
		case v.proto == packet.TCP:
			p.TCPFlags = v.frame[v.l4+13]
		case v.icmp():
			p.ICMPType = v.icmpType()
		}
	}
	return p
}

// rewritten is a packet, or a quoted one, of which one side was translated.
type rewritten struct {
	wire
	side     int
	addrOnly bool // not its port: of a later fragment, and of an ICMP error itself
	limit    int  // bytes behind this offset do not belong to the packet
}

// checkRewrite holds in against out, which is the same frame after a translation. Only the
// addresses, ports and checksums of what was rewritten may differ, and each
// checksum must be as right or as wrong as it was, by the same difference.
func checkRewrite(out []byte, parts ...rewritten) error {
	in := parts[0].frame
	if len(in) != len(out) {
		return fmt.Errorf("%d bytes became %d", len(in), len(out))
	}
	may := make([]bool, len(in))
	allow := func(from, to int) {
		for i := max(from, 0); i < min(to, len(may)); i++ {
			may[i] = true
		}
	}
	for _, p := range parts {
		allow(p.addrAt(p.side))
		if p.is4 {
			allow(p.l3+10, p.l3+12)
		}
		if at := p.portAt(p.side); at >= 0 && !p.addrOnly {
			allow(at, at+2)
		}
		if at := p.checksumAt(); at >= 0 && at+2 <= p.limit {
			allow(at, at+2)
		}
		if p.proto == packet.SCTP && !p.later && !p.hidden && p.l4+12 <= p.limit {
			allow(p.l4+8, p.l4+12)
		}
	}
	for i := range in {
		if in[i] != out[i] && !may[i] {
			return fmt.Errorf("byte %d, %#02x, became %#02x", i, in[i], out[i])
		}
	}
	for _, p := range parts {
		if err := p.checkSums(out); err != nil {
			return err
		}
	}
	return nil
}

// checkSums compares what is left of each checksum over what it covers: the changed bytes
// are the same as before, so what they add must be, too. 0 and 0xffff are one number.
func (p rewritten) checkSums(out []byte) error {
	rest := func(sum uint16) uint16 { return sum % 0xffff }
	if p.is4 {
		end := min(p.l4, len(out))
		if was, is := rest(packet.Sum(0, p.frame[p.l3:end])), rest(packet.Sum(0, out[p.l3:end])); was != is {
			return fmt.Errorf("IP checksum at %d: off by %#04x, was off by %#04x", p.l3+10, is, was)
		}
	}
	if p.proto == packet.SCTP && !p.first && !p.later && !p.hidden && p.l4+12 <= p.limit && p.l4+12 <= p.end && p.end == p.wholeEnd() {
		if binary.LittleEndian.Uint32(p.frame[p.l4+8:]) == 0 {
			if binary.LittleEndian.Uint32(out[p.l4+8:]) != 0 {
				return fmt.Errorf("the CRC at %d was left to the device", p.l4+8)
			}
		} else if was, is := crcRest(p.frame[p.l4:p.end]), crcRest(out[p.l4:p.end]); was != is {
			return fmt.Errorf("CRC at %d: off by %#08x, was off by %#08x", p.l4+8, is, was)
		}
	}
	at := p.checksumAt()
	if at < 0 || at+2 > p.limit {
		return nil
	}
	was, is := binary.BigEndian.Uint16(p.frame[at:]), binary.BigEndian.Uint16(out[at:])
	if p.proto == packet.UDP || p.proto == packet.UDPLite {
		if (was == 0) != (is == 0) {
			return fmt.Errorf("UDP checksum %#04x became %#04x", was, is)
		}
		if was == 0 {
			return nil
		}
	}
	sum := func(b []byte) uint16 {
		s := packet.Sum(0, b[p.l4:])
		if !p.icmp() || !p.is4 {
			from, _ := p.addrAt(sideSource)
			_, to := p.addrAt(sideDestination)
			s = packet.Sum(s, b[from:to])
		}
		return rest(s)
	}
	if was, is := sum(p.frame), sum(out); was != is {
		return fmt.Errorf("transport checksum at %d: off by %#04x, was off by %#04x", at, is, was)
	}
	return nil
}

// wholeEnd is where the packet ends by its IP header alone.
func (v wire) wholeEnd() int {
	if v.is4 {
		return v.l3 + int(binary.BigEndian.Uint16(v.frame[v.l3+2:]))
	}
	return v.l3 + 40 + int(binary.BigEndian.Uint16(v.frame[v.l3+4:]))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crcRest is by how much the CRC of an SCTP packet is off.
func crcRest(b []byte) uint32 {
	c := append([]byte(nil), b...)
	clear(c[8:12])
	return crc32.Checksum(c, castagnoli) ^ binary.LittleEndian.Uint32(b[8:])
}
