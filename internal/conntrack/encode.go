package conntrack

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Attributes that package nl has no names for: enum ctattr_* of
// linux/netfilter/nfnetlink_conntrack.h.
const (
	ctaHelp        = 5
	ctaNATSrc      = 6
	ctaNATDst      = 13
	ctaTupleMaster = 14

	ctaTupleZone = 3

	ctaProtoICMPID     = 4
	ctaProtoICMPType   = 5
	ctaProtoICMPCode   = 6
	ctaProtoICMPv6ID   = 7
	ctaProtoICMPv6Type = 8
	ctaProtoICMPv6Code = 9

	ctaNATv4Min  = 1
	ctaNATv4Max  = 2
	ctaNATProto  = 3
	ctaNATv6Min  = 4
	ctaNATv6Max  = 5
	ctaNATPortLo = 1
	ctaNATPortHi = 2

	ctaHelpName = 1

	ctaSCTPState     = 1
	ctaSCTPTag       = 2
	ctaSCTPTagReply  = 3
	sctpEstablished  = 4
	tcpBeLiberal     = 0x08 // IP_CT_TCP_FLAG_BE_LIBERAL
	protoUDPLite     = 136
	protoGRE         = 47
	icmpEchoRequest  = 8
	icmp6EchoRequest = 128
)

var (
	errFamily = errors.New("addresses of two families")
	errSCTP   = errors.New("verification tags of the association are not known")
)

// complete fills in what may be left out, and checks the addresses.
func (f *Flow) complete() error {
	if !f.Remote.IsValid() {
		f.Remote = f.Dst
	}
	if !f.Xlate.IsValid() {
		f.Xlate = f.Src
	}
	for _, a := range []netip.AddrPort{f.Src, f.Dst, f.Xlate, f.Remote} {
		if !a.IsValid() || a.Addr().Is4() != f.Src.Addr().Is4() || a.Addr().Is4In6() {
			return errFamily
		}
	}
	return nil
}

// creatable refuses what netfilter would not translate.
func (f Flow) creatable() error {
	if f.Proto == unix.IPPROTO_SCTP && (f.SCTPTags[0] == 0 || f.SCTPTags[1] == 0) {
		return errSCTP
	}
	return nil
}

func (f Flow) family() uint8 {
	if f.Src.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func isICMP(proto uint8) bool { return proto == unix.IPPROTO_ICMP || proto == unix.IPPROTO_ICMPV6 }

// hasPorts tells whose tuples have two ports. Of GRE these are the keys.
func hasPorts(proto uint8) bool {
	switch proto {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP, protoUDPLite, protoGRE:
		return true
	}
	return false
}

func nested(kind int, children ...*nl.RtAttr) *nl.RtAttr {
	a := nl.NewRtAttr(unix.NLA_F_NESTED|kind, nil)
	for _, c := range children {
		a.AddChild(c)
	}
	return a
}

func be16(kind int, v uint16) *nl.RtAttr {
	return nl.NewRtAttr(kind, binary.BigEndian.AppendUint16(nil, v))
}

func be32(kind int, v uint32) *nl.RtAttr {
	return nl.NewRtAttr(kind, binary.BigEndian.AppendUint32(nil, v))
}

func byteAttr(kind int, v uint8) *nl.RtAttr { return nl.NewRtAttr(kind, []byte{v}) }

// tuple writes a direction of the flow, before any translation.
func (f Flow) tuple(kind int, src, dst netip.AddrPort, icmpType uint8) *nl.RtAttr {
	from, to := nl.CTA_IP_V4_SRC, nl.CTA_IP_V4_DST
	if !f.Src.Addr().Is4() {
		from, to = nl.CTA_IP_V6_SRC, nl.CTA_IP_V6_DST
	}
	proto := nested(nl.CTA_TUPLE_PROTO, byteAttr(nl.CTA_PROTO_NUM, f.Proto))
	switch {
	case f.Proto == unix.IPPROTO_ICMP:
		proto.AddChild(be16(ctaProtoICMPID, f.Src.Port()))
		proto.AddChild(byteAttr(ctaProtoICMPType, icmpType))
		proto.AddChild(byteAttr(ctaProtoICMPCode, f.ICMPCode))
	case f.Proto == unix.IPPROTO_ICMPV6:
		proto.AddChild(be16(ctaProtoICMPv6ID, f.Src.Port()))
		proto.AddChild(byteAttr(ctaProtoICMPv6Type, icmpType))
		proto.AddChild(byteAttr(ctaProtoICMPv6Code, f.ICMPCode))
	case hasPorts(f.Proto):
		proto.AddChild(be16(nl.CTA_PROTO_SRC_PORT, src.Port()))
		proto.AddChild(be16(nl.CTA_PROTO_DST_PORT, dst.Port()))
	}
	ip := nested(nl.CTA_TUPLE_IP, nl.NewRtAttr(from, src.Addr().AsSlice()), nl.NewRtAttr(to, dst.Addr().AsSlice()))
	return nested(kind, ip, proto)
}

// query is the ICMP type of the flow's packets, and that of the replies.
func (f Flow) query() (request, reply uint8) {
	request = f.ICMPType
	if request == 0 && f.Proto == unix.IPPROTO_ICMP {
		request = icmpEchoRequest
	}
	if request == 0 {
		request = icmp6EchoRequest
	}
	switch {
	case f.Proto == unix.IPPROTO_ICMPV6:
		return request, request + 1
	case request == icmpEchoRequest:
		return request, 0
	}
	return request, request + 1 // time stamp, information, address mask
}

// encodeKey writes what finds the flow in the table.
func (f Flow) encodeKey(req *nl.NetlinkRequest) {
	request, _ := f.query()
	req.AddData(f.tuple(nl.CTA_TUPLE_ORIG, f.Src, f.Dst, request))
	if f.Zone != 0 {
		req.AddData(be16(nl.CTA_ZONE, f.Zone))
	}
	if f.ID != 0 {
		req.AddData(be32(nl.CTA_ID, f.ID))
	}
}

// translation writes the one address and port that netfilter is to use.
func (f Flow) translation(kind int, to netip.AddrPort) *nl.RtAttr {
	lo, hi := ctaNATv4Min, ctaNATv4Max
	if !f.Src.Addr().Is4() {
		lo, hi = ctaNATv6Min, ctaNATv6Max
	}
	a := nested(kind, nl.NewRtAttr(lo, to.Addr().AsSlice()), nl.NewRtAttr(hi, to.Addr().AsSlice()))
	if hasPorts(f.Proto) || isICMP(f.Proto) {
		a.AddChild(nested(ctaNATProto, be16(ctaNATPortLo, to.Port()), be16(ctaNATPortHi, to.Port())))
	}
	return a
}

// encode writes a new connection. Its replies are given as if nothing were translated:
// the kernel works the translation out from the ranges, and marks it as done.
func (f Flow) encode(req *nl.NetlinkRequest) {
	f.ID = 0
	f.encodeKey(req)
	_, reply := f.query()
	req.AddData(f.tuple(nl.CTA_TUPLE_REPLY, f.Dst, f.Src, reply))
	if f.Remote != f.Dst {
		req.AddData(f.translation(ctaNATDst, f.Remote))
	}
	if f.Xlate != f.Src {
		req.AddData(f.translation(ctaNATSrc, f.Xlate))
	}
	req.AddData(be32(nl.CTA_STATUS, f.status()))
	timeout := f.Timeout
	if timeout <= 0 {
		timeout = usualTimeout(f.Proto, f.State)
	}
	req.AddData(be32(nl.CTA_TIMEOUT, uint32((timeout+time.Second-1)/time.Second)))
	if f.Mark != 0 {
		req.AddData(be32(nl.CTA_MARK, f.Mark))
	}
	switch f.Proto {
	case unix.IPPROTO_TCP:
		// Where in its window a connection is nobody knows here: any sequence number goes.
		liberal := []byte{tcpBeLiberal, tcpBeLiberal} // struct nf_ct_tcp_flags: flags, mask
		req.AddData(nested(nl.CTA_PROTOINFO, nested(nl.CTA_PROTOINFO_TCP,
			byteAttr(nl.CTA_PROTOINFO_TCP_STATE, f.tcpState()),
			nl.NewRtAttr(nl.CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, liberal),
			nl.NewRtAttr(nl.CTA_PROTOINFO_TCP_FLAGS_REPLY, liberal))))
	case unix.IPPROTO_SCTP:
		req.AddData(nested(nl.CTA_PROTOINFO, nested(nl.CTA_PROTOINFO_SCTP,
			byteAttr(ctaSCTPState, sctpEstablished),
			be32(ctaSCTPTag, f.SCTPTags[0]), be32(ctaSCTPTagReply, f.SCTPTags[1]))))
	}
}
