package devices

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Encrypts tells whether a policy of IPsec in the network namespace of the calling thread is for
// what goes from src to dst. Of several the one of the lowest number counts, as in the kernel.
// Policies for single ports or marks are left out: they are for other packets, as a rule.
//
// The library's own list takes an IPv6 prefix of 32 bits or fewer, or one with zeros behind
// them, for IPv4.
func Encrypts(src, dst netip.Addr, proto uint8) (bool, error) {
	req := nl.NewNetlinkRequest(nl.XFRM_MSG_GETPOLICY, unix.NLM_F_DUMP)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	msgs, err := req.Execute(unix.NETLINK_XFRM, nl.XFRM_MSG_NEWPOLICY)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("list xfrm policies: %w", err)
	}
	encrypts, found, best := false, false, uint32(0)
	for _, m := range msgs {
		p := nl.DeserializeXfrmUserpolicyInfo(m)
		attrs, err := nl.ParseRouteAttr(m[nl.SizeofXfrmUserpolicyInfo:])
		if err != nil {
			return false, fmt.Errorf("list xfrm policies: %w", err)
		}
		kinds := make(map[uint16]bool)
		for _, a := range attrs {
			kinds[a.Attr.Type] = true
		}
		if p.Dir != uint8(netlink.XFRM_DIR_OUT) || kinds[nl.XFRMA_MARK] || !selects(p.Sel, src, dst, proto) || found && best <= p.Priority {
			continue
		}
		encrypts, found, best = kinds[nl.XFRMA_TMPL] && p.Action == uint8(netlink.XFRM_POLICY_ALLOW), true, p.Priority
	}
	return encrypts, nil
}

// selects tells whether a policy's selector is for packets from src to dst, whatever their ports.
func selects(s nl.XfrmSelector, src, dst netip.Addr, proto uint8) bool {
	has := func(bits uint8, raw nl.XfrmAddress, a netip.Addr) bool {
		of := netip.AddrFrom16(raw)
		if s.Family == unix.AF_INET {
			of = netip.AddrFrom4([4]byte(raw[:4]))
		}
		p, err := of.Prefix(int(bits))
		return err == nil && p.Contains(a)
	}
	return s.DportMask == 0 && s.SportMask == 0 && (s.Proto == 0 || s.Proto == proto) &&
		has(s.PrefixlenS, s.Saddr, src) && has(s.PrefixlenD, s.Daddr, dst)
}
