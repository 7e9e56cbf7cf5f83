package policy

import "net/netip"

// IP protocol numbers with behavior of their own.
const (
	ProtoICMP    = 1
	ProtoTCP     = 6
	ProtoUDP     = 17
	ProtoICMPv6  = 58
	ProtoSCTP    = 132
	ProtoUDPLite = 136
)

// TCP flags that the decision looks at.
const (
	TCPFin = 0x01
	TCPSyn = 0x02
	TCPRst = 0x04
	TCPAck = 0x10
)

// Packet is the first packet that a masquerade device sees of a connection. Its
// addresses are of one family and as on the wire: who reads an IPv4-mapped address
// from a user unmaps it. Zones are ignored.
type Packet struct {
	Src, Dst netip.Addr
	Proto    uint8 // IP protocol number
	TCPFlags uint8
	ICMPType uint8
	Device   int  // ifindex of the egress device
	Inbound  bool // it belongs to a connection opened from outside towards Src
}

// Decision is the outcome and what decided it.
type Decision struct {
	Outcome Outcome
	Match   netip.Prefix // the entry that matched; the zero Prefix if none did
	Origin  string       // where Match came from; see Rule
	Address netip.Addr   // masquerade address, with MasqNew
}

// Decide answers for pkt by the table of the contract (section 2): the first
// line that matches. It does not know which connections run: a packet of a
// known mapping keeps its translation whatever Decide says. Nor does it read headers:
// of line 0 it has IPv4-mapped addresses only.
func (p *Policy) Decide(pkt Packet) Decision {
	pkt.Src, pkt.Dst = pkt.Src.WithZone(""), pkt.Dst.WithZone("")
	if pkt.Src.Is4In6() || pkt.Dst.Is4In6() {
		return Decision{Outcome: DropBadHeader} // never on the wire (RFC 6890 table 20)
	}
	is4 := pkt.Src.Is4()
	if is4 && !p.in.IPv4 {
		return Decision{Outcome: PassDisabled, Origin: "option enable-ipv4-masquerade"}
	}
	if !is4 && !p.in.IPv6 {
		return Decision{Outcome: PassDisabled, Origin: "option enable-ipv6-masquerade"}
	}
	match, i, ok := p.srcIndex.lookup(pkt.Src)
	if !ok {
		return Decision{Outcome: PassSource, Origin: "option pod-cidrs"}
	}
	if o := p.sources[i].Outcome; o != Continue {
		return Decision{Outcome: o, Match: match, Origin: "device"}
	}
	if pkt.neighborDiscovery() {
		return Decision{Outcome: PassMulticast, Match: linkLocal6, Origin: "default"}
	}
	for line := range p.byLine {
		if match, rule, ok := p.byLine[line]().lookup(pkt.Dst); ok {
			return Decision{Outcome: lineOutcome[line], Match: match, Origin: rule.Origin}
		}
	}
	if pkt.Inbound && !pkt.Opening() {
		return Decision{Outcome: PassInbound}
	}
	return p.masquerade(pkt)
}

// masquerade is line 10.
func (p *Policy) masquerade(pkt Packet) Decision {
	dev, ok := p.Device(pkt.Device)
	if !ok {
		return Decision{Outcome: PassDevice, Origin: "option devices"}
	}
	if pkt.stray() {
		return Decision{Outcome: DropStray}
	}
	if pkt.unknownProtocol() {
		switch p.in.UnknownProtocols {
		case UnknownPass:
			return Decision{Outcome: PassProtocol, Origin: "option unknown-protocols"}
		case UnknownDrop:
			return Decision{Outcome: DropProtocol, Origin: "option unknown-protocols"}
		}
	}
	if pkt.icmp() && !pkt.Opening() {
		return Decision{Outcome: DropProtocol}
	}
	addr := p.address(dev, pkt.Dst)
	if !addr.IsValid() {
		return Decision{Outcome: DropNoAddress, Origin: "device " + dev.Name}
	}
	return Decision{Outcome: MasqNew, Address: addr}
}

// Device returns the masquerade device with that ifindex.
func (p *Policy) Device(index int) (Device, bool) {
	for _, d := range p.in.Devices {
		if d.Index == index {
			return d, true
		}
	}
	return Device{}, false
}

// address is the source that a new mapping towards dst gets on dev (2.4): that of
// the longest route, or the device's own where this route names none.
func (p *Policy) address(dev Device, dst netip.Addr) netip.Addr {
	if _, source, ok := p.routes.lookup(dst); ok && source.IsValid() {
		return source
	}
	return dev.Addr(dst.Is4())
}

func (pkt Packet) icmp() bool {
	if pkt.Src.Is4() {
		return pkt.Proto == ProtoICMP
	}
	return pkt.Proto == ProtoICMPv6
}

// Opening tells whether the packet can only be the first of a connection: a SYN
// without ACK, or an ICMP query.
func (pkt Packet) Opening() bool {
	switch {
	case pkt.Proto == ProtoTCP:
		return pkt.TCPFlags&(TCPSyn|TCPAck|TCPRst|TCPFin) == TCPSyn
	case !pkt.icmp():
		return false
	case pkt.Src.Is4():
		return pkt.ICMPType == 8 || pkt.ICMPType == 13 // echo, timestamp
	}
	return pkt.ICMPType == 128
}

// stray tells whether the packet only makes sense in a connection that exists:
// RST, FIN, SYN+ACK, an ICMP reply or an ICMP error.
func (pkt Packet) stray() bool {
	switch {
	case pkt.Proto == ProtoTCP:
		return pkt.TCPFlags&(TCPRst|TCPFin) != 0 || pkt.TCPFlags&(TCPSyn|TCPAck) == TCPSyn|TCPAck
	case !pkt.icmp():
		return false
	case pkt.Src.Is4():
		switch pkt.ICMPType {
		case 0, 14, 3, 4, 5, 11, 12: // replies; unreachable, quench, redirect, time exceeded, parameter problem
			return true
		}
		return false
	}
	return pkt.ICMPType == 129 || pkt.ICMPType < 128 // ICMPv6 errors are the types below 128 (RFC 4443 2.1)
}

func (pkt Packet) unknownProtocol() bool {
	switch pkt.Proto {
	case ProtoTCP, ProtoUDP, ProtoUDPLite, ProtoSCTP:
		return false
	}
	return !pkt.icmp()
}

// neighborDiscovery tells whether the packet is IPv6 control traffic (MLD, ND)
// to a link-local address; that to multicast addresses needs no rule of its own.
func (pkt Packet) neighborDiscovery() bool {
	if pkt.Proto != ProtoICMPv6 || !pkt.icmp() || !linkLocal6.Contains(pkt.Dst) {
		return false
	}
	switch t := pkt.ICMPType; {
	case t >= 130 && t <= 137: // MLD query, report, done; router and neighbour discovery, redirect
		return true
	case t == 143: // MLDv2 report (RFC 3810)
		return true
	}
	return false
}
