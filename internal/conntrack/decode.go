package conntrack

import (
	"encoding/binary"
	"iter"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// attributes yields kind and content of each attribute. What does not fit ends it: a
// kernel may say more than we know, but not less.
func attributes(b []byte) iter.Seq2[int, []byte] {
	return func(yield func(int, []byte) bool) {
		for len(b) >= nl.SizeofNfattr {
			n := int(binary.NativeEndian.Uint16(b))
			if n < nl.SizeofNfattr || n > len(b) {
				return
			}
			kind := binary.NativeEndian.Uint16(b[2:]) & nl.NLA_TYPE_MASK
			if !yield(int(kind), b[nl.SizeofNfattr:n]) {
				return
			}
			b = b[min((n+3)&^3, len(b)):]
		}
	}
}

func u8(b []byte) uint8 {
	if len(b) < 1 {
		return 0
	}
	return b[0]
}

func u16(b []byte) uint16 {
	if len(b) < 2 {
		return 0
	}
	return binary.BigEndian.Uint16(b)
}

func u32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func u64(b []byte) uint64 {
	if len(b) < 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

// tuple is a direction of a connection.
type tuple struct {
	src, dst     netip.Addr
	sport, dport uint16
	id           uint16
	proto        uint8
	icmpType     uint8
	icmpCode     uint8
	zone         uint16
}

func decodeTuple(b []byte) (t tuple) {
	for kind, v := range attributes(b) {
		switch kind {
		case nl.CTA_TUPLE_IP:
			for kind, v := range attributes(v) {
				switch kind {
				case nl.CTA_IP_V4_SRC, nl.CTA_IP_V6_SRC:
					t.src, _ = netip.AddrFromSlice(v)
				case nl.CTA_IP_V4_DST, nl.CTA_IP_V6_DST:
					t.dst, _ = netip.AddrFromSlice(v)
				}
			}
		case nl.CTA_TUPLE_PROTO:
			t.decodeProto(v)
		case ctaTupleZone:
			t.zone = u16(v)
		}
	}
	return t
}

func (t *tuple) decodeProto(b []byte) {
	for kind, v := range attributes(b) {
		switch kind {
		case nl.CTA_PROTO_NUM:
			t.proto = u8(v)
		case nl.CTA_PROTO_SRC_PORT:
			t.sport = u16(v)
		case nl.CTA_PROTO_DST_PORT:
			t.dport = u16(v)
		case ctaProtoICMPID, ctaProtoICMPv6ID:
			t.id = u16(v)
		case ctaProtoICMPType, ctaProtoICMPv6Type:
			t.icmpType = u8(v)
		case ctaProtoICMPCode, ctaProtoICMPv6Code:
			t.icmpCode = u8(v)
		}
	}
}

// decode reads a connection; false: not one that has addresses.
func decode(msg []byte) (f Flow, ok bool) {
	if len(msg) < nl.SizeofNfgenmsg {
		return f, false
	}
	var original, reply tuple
	var status uint32
	var tcp uint8
	for kind, v := range attributes(msg[nl.SizeofNfgenmsg:]) {
		switch kind {
		case nl.CTA_TUPLE_ORIG:
			original = decodeTuple(v)
		case nl.CTA_TUPLE_REPLY:
			reply = decodeTuple(v)
		case nl.CTA_STATUS:
			status = u32(v)
		case nl.CTA_PROTOINFO:
			tcp = f.decodeProtoInfo(v)
		default:
			f.decodeRest(kind, v)
		}
	}
	if !original.src.IsValid() || !original.dst.IsValid() || !reply.src.IsValid() || !reply.dst.IsValid() {
		return f, false
	}
	f.fill(original, reply)
	f.State = stateName(f.Proto, tcp, status)
	f.Assured, f.Expected = status&statusAssured != 0, f.Expected || status&statusExpected != 0
	f.SNAT, f.DNAT, f.SeqAdjust = status&statusSNAT != 0, status&statusDNAT != 0, status&statusSeqAdjust != 0
	return f, true
}

// fill takes addresses and ports from the two directions.
func (f *Flow) fill(original, reply tuple) {
	f.Proto = original.proto
	f.Src, f.Dst = netip.AddrPortFrom(original.src, original.sport), netip.AddrPortFrom(original.dst, original.dport)
	f.Xlate, f.Remote = netip.AddrPortFrom(reply.dst, reply.dport), netip.AddrPortFrom(reply.src, reply.sport)
	if isICMP(f.Proto) {
		f.Src, f.Xlate = netip.AddrPortFrom(original.src, original.id), netip.AddrPortFrom(reply.dst, reply.id)
		f.ICMPType, f.ICMPCode = original.icmpType, original.icmpCode
		if request, _ := (Flow{Proto: f.Proto}).query(); f.ICMPType == request {
			f.ICMPType = 0
		}
	}
	if f.Zone == 0 {
		f.Zone = max(original.zone, reply.zone)
	}
}

func (f *Flow) decodeRest(kind int, v []byte) {
	switch kind {
	case nl.CTA_TIMEOUT:
		f.Timeout = time.Duration(u32(v)) * time.Second
	case nl.CTA_MARK:
		f.Mark = u32(v)
	case nl.CTA_ID:
		f.ID = u32(v)
	case nl.CTA_ZONE:
		f.Zone = u16(v)
	case ctaTupleMaster:
		f.Expected = true
	case nl.CTA_COUNTERS_ORIG:
		f.Packets[0], f.Bytes[0] = decodeCounters(v)
	case nl.CTA_COUNTERS_REPLY:
		f.Packets[1], f.Bytes[1] = decodeCounters(v)
	case ctaHelp:
		for kind, v := range attributes(v) {
			if kind == ctaHelpName {
				f.Helper = unix.ByteSliceToString(v)
			}
		}
	case nl.CTA_TIMESTAMP:
		for kind, v := range attributes(v) {
			if kind == nl.CTA_TIMESTAMP_START {
				f.Created = time.Unix(0, int64(u64(v)))
			}
		}
	}
}

func decodeCounters(b []byte) (packets, bytes uint64) {
	for kind, v := range attributes(b) {
		switch kind {
		case nl.CTA_COUNTERS_PACKETS:
			packets = u64(v)
		case nl.CTA_COUNTERS_BYTES:
			bytes = u64(v)
		}
	}
	return packets, bytes
}

// decodeProtoInfo returns the state of TCP.
func (f *Flow) decodeProtoInfo(b []byte) (tcp uint8) {
	for kind, v := range attributes(b) {
		for inner, v := range attributes(v) {
			switch {
			case kind == nl.CTA_PROTOINFO_TCP && inner == nl.CTA_PROTOINFO_TCP_STATE:
				tcp = u8(v)
			case kind == nl.CTA_PROTOINFO_SCTP && inner == ctaSCTPTag:
				f.SCTPTags[0] = u32(v)
			case kind == nl.CTA_PROTOINFO_SCTP && inner == ctaSCTPTagReply:
				f.SCTPTags[1] = u32(v)
			}
		}
	}
	return tcp
}
