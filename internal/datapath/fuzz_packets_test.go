package datapath

import (
	"net/netip"
	"slices"

	"bauta.dev/bauta/internal/lab/packet"
)

// packet chooses a packet of a pod, or of somebody else.
func (w *world) packet() packet.Packet {
	c := w.c
	b := c.byte()
	fam := int(b & 1)
	f := families[fam]
	p := kindsOfAll[fam][int(b>>1)%len(kindsOfAll[fam])].p
	p.Link = w.link
	p.Src = []netip.Addr{f.pod, f.pod, f.pod2, f.foreign, f.gateway, f.node, f.other, f.pod}[c.below(8)]
	p.Dst = []netip.Addr{f.remote, f.remote, f.other, f.excluded, f.router, f.node2, f.pod2, multicastOf(f)}[c.below(8)]
	if c.below(2) == 1 {
		p = p.From(p.Src, c.port()).To(p.Dst, c.port())
		p.Ident = c.port()
	}
	if p.Proto == packet.TCP && c.below(2) == 1 {
		p.Flags = c.byte()
	}
	n := c.below(8)
	if n > 0 && n < 4 {
		p.Payload = slices.Repeat([]byte{[]byte{0, 0xff, c.byte()}[n-1]}, c.below(48))
	}
	if p.Link == packet.Raw {
		p.Payload = append(p.Payload, make([]byte, 14)...) // what a test run takes for the IP header is complete
	}
	p.ID = uint32(c.below(3))
	switch n {
	case 4: // the checksum comes out as zero,
		p.Payload = zeroChecksum(p, p)
	case 5: // or that of the translated packet does,
		p.Payload = zeroChecksum(p, p.From(f.node, p.Port()))
	case 6: // with another port
		p.Payload = zeroChecksum(p, p.From(f.node, firstPort))
	}
	return p
}

// zeroChecksum returns a payload for p with which the transport checksum of as is zero; as differs
// from p by its source alone.
func zeroChecksum(p, as packet.Packet) []byte {
	as.Link, as.Payload = packet.Raw, make([]byte, max(2, len(p.Payload)))
	b := as.Build()
	v, ok := viewIP(b, 0, as.Src.Is4(), false)
	if at := v.checksumAt(); ok && at >= 0 {
		copy(as.Payload, b[at:at+2])
	}
	return as.Payload
}

func multicastOf(f family) netip.Addr {
	if f.name == "IPv4" {
		return netip.MustParseAddr("224.0.0.251")
	}
	return netip.MustParseAddr("ff02::fb")
}

// spoil cuts a frame or changes some of its bytes, if the fuzzer likes.
func (w *world) spoil(frame []byte) []byte {
	c := w.c
	b := c.byte()
	if b&1 != 0 && len(frame) > 0 {
		frame = frame[:len(frame)-c.below(min(len(frame), 256))]
	}
	if b&2 != 0 {
		for range 1 + c.below(4) {
			if at := c.below(256); at < len(frame) {
				frame[at] = c.byte()
			}
		}
	}
	if b&4 != 0 { // padding of the link layer
		frame = append(frame, slices.Repeat([]byte{0xa5}, c.below(48))...)
	}
	return frame
}

// chooseView returns one of those seen, or nothing.
func (w *world) chooseView(from []wire) (wire, bool) {
	if len(from) == 0 {
		return wire{}, false
	}
	return from[len(from)-1-w.c.below(len(from))], true
}

// anError chooses an ICMP error about a packet: leaving about one that arrived, or the
// other way round. Its quote is cut anywhere.
func (w *world) anError(about wire, leaving bool) []byte {
	return w.spoil(w.errorAbout(about, leaving).Build())
}

func (w *world) errorAbout(about wire, leaving bool) packet.Packet {
	c := w.c
	f := families[0]
	if !about.is4 {
		f = families[1]
	}
	quote := about.frame[about.l3:]
	if b := c.byte(); b != 0 {
		quote = quote[:min(len(quote), 20+int(b)%128)]
	}
	e := packet.Packet{Link: w.link, Src: f.router, Dst: about.src, Proto: f.icmp, Payload: slices.Clone(quote), Rest: uint32(c.byte())}
	if leaving {
		at := c.below(5)
		e.Src = []netip.Addr{about.dst, f.gateway, f.node, f.pod2, about.dst}[at]
		if at == 4 {
			e.Dst = f.router // who has nothing to do with it
		}
	}
	types := f.icmpErrors()
	if about.is4 {
		types = append(types, [2]uint8{5, 1}) // a redirect
	}
	kind := types[c.below(len(types))]
	e.Type, e.Code = kind[0], kind[1]
	return e
}
