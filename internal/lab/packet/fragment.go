package packet

import (
	"encoding/binary"
	"fmt"
)

// Fragments returns p in pieces of size bytes of data, a multiple of 8. The
// extension headers of p but the destination options are in every piece.
func (p Packet) Fragments(size int) [][]byte {
	body := p.Transport()
	proto := p.Proto
	var each []Extension
	for i, x := range p.Extensions {
		if x.Proto == Destination && p.Src.Is6() {
			// From here on the headers are a part of what is cut to pieces.
			rest := p
			rest.Extensions = p.Extensions[i:]
			body = append(rest.ipv6(rest.Extensions, p.Proto, 0)[40:], body...)
			proto = Destination
			break
		}
		each = append(each, x)
	}
	var out [][]byte
	for at := 0; at < len(body); at += size {
		out = append(out, p.fragment(each, proto, body, at, min(at+size, len(body))))
	}
	return out
}

// fragment returns the piece of p with the bytes [from,to) of body.
func (p Packet) fragment(each []Extension, proto uint8, body []byte, from, to int) []byte {
	field := uint16(from)
	more := to < len(body)
	if p.Src.Is4() {
		field /= 8
		if more {
			field |= 0x2000
		}
		head := append(p.link(0x0800), p.ipv4(to-from, field)...)
		return append(head, body[from:to]...)
	}
	if more {
		field |= 1
	}
	ext := append(each[:len(each):len(each)], Extension{Proto: Fragment})
	head := append(p.link(0x86dd), p.ipv6(ext, proto, to-from)...)
	binary.BigEndian.PutUint16(head[len(head)-6:], field)
	return append(head, body[from:to]...)
}

// Reassemble puts fragments together and verifies every checksum of the whole. It
// returns the transport header and what follows.
func Reassemble(link Link, pieces [][]byte) ([]byte, error) {
	var whole header
	var body []byte
	complete := false
	for i, b := range pieces {
		h, err := read(b[link.Size():])
		switch {
		case err != nil:
			return nil, fmt.Errorf("fragment %d: %w", i, err)
		case h.offset != len(body):
			return nil, fmt.Errorf("fragment %d starts at %d, want %d", i, h.offset, len(body))
		case i > 0 && (h.src != whole.src || h.dst != whole.dst || h.id != whole.id):
			return nil, fmt.Errorf("fragment %d: %s > %s id %d, the first %s > %s id %d",
				i, h.src, h.dst, h.id, whole.src, whole.dst, whole.id)
		case i == 0:
			whole = h
		}
		body, complete = append(body, h.body...), !h.more
	}
	if !complete {
		return nil, fmt.Errorf("the last fragment is missing")
	}
	whole.body, whole.fragment = body, false
	if whole.src.Is6() {
		if err := whole.walk(); err != nil {
			return nil, err
		}
	}
	return whole.body, whole.checkTransport()
}
