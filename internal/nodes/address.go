package nodes

import (
	"fmt"
	"net/netip"

	"bauta.dev/bauta/internal/policy"
)

// parseAddress reads an address of a Node. ok is false for what is no address and need not
// be one, such as most host names. problem says what is wrong with one.
func parseAddress(a address) (n policy.NodeAddr, ok bool, problem string) {
	n.Type = policy.NodeType(a.kind)
	switch n.Type {
	case policy.InternalIP, policy.ExternalIP:
	case policy.Hostname:
		if _, err := netip.ParseAddr(a.text); err != nil {
			return n, false, ""
		}
	default: // InternalDNS, ExternalDNS and what is to come
		return n, false, ""
	}
	var err error
	n.Addr, err = netip.ParseAddr(a.text)
	switch {
	case err != nil:
		problem = "not an IP address"
	case n.Addr.Zone() != "":
		problem = "has a zone"
	case n.Addr.Is4In6():
		problem = "an IPv4-mapped IPv6 address"
	case n.Addr.IsUnspecified(), n.Addr.IsMulticast():
		problem = "not the address of a host"
	}
	if problem != "" {
		return n, false, fmt.Sprintf("%s %q: %s", a.kind, a.text, problem)
	}
	return n, true, ""
}

// parseRange reads a pod range. One with host bits is masked, as network plugins do.
func parseRange(text string) (p netip.Prefix, problem string) {
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil:
		problem = "not a CIDR"
	case p.Addr().Is4In6():
		problem = "an IPv4-mapped IPv6 prefix"
	case p.Bits() == 0:
		problem = "holds every address"
	case p.Addr().IsMulticast():
		problem = "not a range of hosts"
	}
	if problem != "" {
		return netip.Prefix{}, fmt.Sprintf("podCIDR %q: %s", text, problem)
	}
	return p.Masked(), ""
}
