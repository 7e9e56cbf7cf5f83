package datapath

import (
	"encoding/binary"
	"net/netip"
)

// The data plane keeps addresses as 16 bytes, IPv4 v4-mapped, and ports in
// network byte order.

func addrTo(a netip.Addr) masqAddr {
	b := a.As16()
	var out masqAddr
	for i := range out.W {
		out.W[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return out
}

func addrFrom(a masqAddr) netip.Addr {
	var b [16]byte
	for i, w := range a.W {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	return netip.AddrFrom16(b).Unmap()
}

func addr4From(w uint32) netip.Addr {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], w)
	return netip.AddrFrom4(b)
}

func addr4To(a netip.Addr) uint32 {
	b := a.As4()
	return binary.NativeEndian.Uint32(b[:])
}

// swapPort converts between host and network byte order.
func swapPort(p uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], p)
	return binary.NativeEndian.Uint16(b[:])
}

func prefixTo(p netip.Prefix) masqPrefix {
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	return masqPrefix{Length: uint32(bits), Addr: addrTo(p.Addr())}
}

func prefixFrom(p masqPrefix) netip.Prefix {
	a := addrFrom(p.Addr)
	if a.Is4() && p.Length >= 96 {
		return netip.PrefixFrom(a, int(p.Length)-96)
	}
	b := a.As16()
	return netip.PrefixFrom(netip.AddrFrom16(b), int(p.Length))
}
