package cli

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"bauta.dev/bauta/internal/datapath"
)

// protoNames are the protocols by the names of the lists; others are numbers.
var protoNames = []struct {
	number uint8
	name   string
}{
	{1, "ICMP"}, {4, "IPIP"}, {6, "TCP"}, {17, "UDP"}, {41, "IPv6"}, {47, "GRE"}, {50, "ESP"}, {51, "AH"},
	{58, "ICMPv6"}, {132, "SCTP"}, {136, "UDPLite"},
}

const protoICMP, protoICMPv6 = 1, 58

func protoName(number uint8) string {
	for _, p := range protoNames {
		if p.number == number {
			return p.name
		}
	}
	return strconv.Itoa(int(number))
}

// natFilter are the flags that select mappings.
type natFilter struct {
	pod    netip.Addr
	remote remoteValue
	protos protoValue
}

func (f *natFilter) register(c *cobra.Command) {
	c.Flags().Var((*addrValue)(&f.pod), "pod", "only flows of this inner `address`")
	c.Flags().Var(&f.remote, "remote", "only flows with this remote `IP[:PORT]`")
	c.Flags().Var(&f.protos, "proto", "only flows of this `protocol`: tcp, udp, icmp (both families), sctp ..., or a number")
	_ = c.RegisterFlagCompletionFunc("proto", cobra.FixedCompletions([]string{"tcp", "udp", "icmp", "icmpv6", "sctp", "udplite"}, cobra.ShellCompDirectiveNoFileComp))
}

// filters returns what to ask the data plane for, one after the other.
func (f *natFilter) filters(all bool) []datapath.Filter {
	one := datapath.Filter{All: all, Pod: f.pod, Remote: f.remote.addr, Port: f.remote.port}
	if len(f.protos) == 0 {
		return []datapath.Filter{one}
	}
	var filters []datapath.Filter
	for _, p := range f.protos {
		one.Proto = p
		filters = append(filters, one)
	}
	return filters
}

type addrValue netip.Addr

func (v *addrValue) Type() string { return "address" }

func (v *addrValue) String() string {
	if a := netip.Addr(*v); a.IsValid() {
		return a.String()
	}
	return ""
}

func (v *addrValue) Set(s string) error {
	a, err := parseAddr(s)
	*v = addrValue(a)
	return err
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q: not an IP address", s)
	}
	return a.Unmap(), nil
}

type remoteValue struct {
	addr netip.Addr
	port uint16
}

func (v *remoteValue) Type() string { return "remote" }

func (v *remoteValue) String() string {
	switch {
	case !v.addr.IsValid():
		return ""
	case v.port == 0:
		return v.addr.String()
	}
	return netip.AddrPortFrom(v.addr, v.port).String()
}

func (v *remoteValue) Set(s string) (err error) {
	if ap, err := netip.ParseAddrPort(s); err == nil && ap.Addr().Zone() == "" && ap.Port() != 0 {
		v.addr, v.port = ap.Addr().Unmap(), ap.Port()
		return nil
	}
	if inner, ok := strings.CutPrefix(s, "["); ok && strings.HasSuffix(inner, "]") {
		s = strings.TrimSuffix(inner, "]")
	}
	if v.addr, err = parseAddr(s); err != nil {
		return fmt.Errorf("%q: not IP[:PORT] (IPv6 with a port is [ADDRESS]:PORT)", s)
	}
	v.port = 0
	return nil
}

// protoValue is a protocol; icmp is that of both families.
type protoValue []uint8

func (v *protoValue) Type() string { return "protocol" }

func (v *protoValue) String() string {
	var names []string
	for _, p := range *v {
		names = append(names, protoName(p))
	}
	return strings.Join(names, ",")
}

func (v *protoValue) Set(s string) error {
	if strings.EqualFold(s, "icmp") {
		*v = protoValue{protoICMP, protoICMPv6}
		return nil
	}
	for _, p := range protoNames {
		if strings.EqualFold(s, p.name) {
			*v = protoValue{p.number}
			return nil
		}
	}
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil || n == 0 {
		return fmt.Errorf("%q: not a protocol (write tcp, udp, icmp, icmpv6, sctp, udplite, or a number from 1 to 255)", s)
	}
	*v = protoValue{uint8(n)}
	return nil
}
