package iptables

import (
	"fmt"
	"net/netip"
)

// Family is an IP version.
type Family int

// The families, in the order in which they are written.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

var families = []Family{IPv4, IPv6}

func (f Family) String() string { return fmt.Sprintf("IPv%d", int(f)) }

func (f Family) of(a netip.Addr) bool { return a.Is4() == (f == IPv4) }

// binary is the name that the programs of the family begin with.
func (f Family) binary() string {
	if f == IPv4 {
		return "iptables"
	}
	return "ip6tables"
}

func (f Family) icmp() string {
	if f == IPv4 {
		return "icmp"
	}
	return "ipv6-icmp"
}

func (f Family) icmpType(n int) string {
	if f == IPv4 {
		return fmt.Sprintf("-p icmp -m icmp --icmp-type %d", n)
	}
	return fmt.Sprintf("-p ipv6-icmp -m icmp6 --icmpv6-type %d", n)
}

// text is a as inet_ntop writes it, which iptables lists addresses with.
func text(a netip.Addr) string {
	if b := a.As16(); a.Is6() && !a.Is4In6() && [12]byte(b[:12]) == [12]byte{} && (b[12] != 0 || b[13] != 0) {
		return "::" + netip.AddrFrom4([4]byte(b[12:])).String()
	}
	return a.String()
}

func prefixText(p netip.Prefix) string { return fmt.Sprintf("%s/%d", text(p.Addr()), p.Bits()) }

// match is an option with a prefix, or nothing where the prefix is all there is.
func match(option string, p netip.Prefix) string {
	if p.Bits() == 0 {
		return ""
	}
	return option + " " + prefixText(p)
}
