package devices

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// shared is address space between a provider and its customers (RFC 6598): as
// little reachable from the Internet as private space.
var shared = netip.MustParsePrefix("100.64.0.0/10")

func public(a netip.Addr) bool { return a.IsGlobalUnicast() && !a.IsPrivate() && !shared.Contains(a) }

// primary tells whether the address may be the source of a masqueraded
// connection (2.4): global, and one that lasts.
func (a Addr) primary() bool {
	return a.Scope == unix.RT_SCOPE_UNIVERSE && a.Addr.IsGlobalUnicast() && // false for link-local and loopback
		!a.Secondary && !a.Temporary && !a.Deprecated && !a.DADFailed
}

// primaries returns the device's primary addresses in the kernel's order.
func (n *node) primaries(index int, f family) []Addr {
	var list []Addr
	for _, a := range n.addrs[index] {
		if f.has(a.Addr) && a.primary() {
			list = append(list, a)
		}
	}
	return list
}

// criterion is a reason to prefer an address, and its name.
type criterion struct {
	holds func(Addr) bool
	name  string
}

// masqueradeAddr returns the address that the device masquerades with and which
// rule chose it. An address under duplicate address detection comes last: until
// that is over, nobody gets an answer to it.
func (n *node) masqueradeAddr(index int, f family) (netip.Addr, string) {
	list := n.primaries(index, f)
	if len(list) == 0 {
		return n.fallbackAddr(index, f)
	}
	nextHop := n.nextHop(index, f, list)
	criteria := []criterion{
		{func(a Addr) bool { return !a.Tentative }, "its duplicate address detection is over"},
		{func(a Addr) bool { return nextHop.IsValid() && a.Subnet.Contains(nextHop) }, "in the subnet of the default next hop"},
		{func(a Addr) bool { return public(a.Addr) }, "public before private"},
	}
	best, rules := pick(list, criteria, "the kernel's first")
	if rules == "" {
		return best.Addr, "the only primary address"
	}
	return best.Addr, "primary, " + rules
}

// pick returns the first best of list by the criteria in their order, and the
// names of those that made a difference; order is the name of list's own order.
func pick(list []Addr, criteria []criterion, order string) (Addr, string) {
	var rules []string
	for _, c := range criteria {
		preferred := slices.DeleteFunc(slices.Clone(list), func(a Addr) bool { return !c.holds(a) })
		if len(preferred) > 0 && len(preferred) < len(list) {
			list, rules = preferred, append(rules, c.name)
		}
	}
	if len(list) > 1 {
		rules = append(rules, order)
	}
	return list[0], strings.Join(rules, ", then ")
}

// nextHop returns the next hop of the device's best default route (main table
// first, then lowest metric) that one of the addresses has in its subnet. For
// IPv6 there is mostly none: routers are known by link-local addresses.
func (n *node) nextHop(index int, f family, list []Addr) netip.Addr {
	var defaults []Route
	for _, r := range n.via[index] {
		if r.Default() && f.has(r.Dst.Addr()) {
			defaults = append(defaults, r)
		}
	}
	other := func(r Route) int { // 0 for the main table
		if r.Table == unix.RT_TABLE_MAIN {
			return 0
		}
		return r.Table
	}
	slices.SortStableFunc(defaults, func(a, b Route) int { return cmp.Or(other(a)-other(b), a.Metric-b.Metric) })
	for _, r := range defaults {
		for _, h := range r.Hops {
			if h.Index != index || !h.Gateway.IsValid() {
				continue
			}
			if slices.ContainsFunc(list, func(a Addr) bool { return a.Subnet.Contains(h.Gateway) }) {
				return h.Gateway
			}
		}
	}
	return netip.Addr{}
}

// fallbackAddr is for a device without a primary address: the best of the other
// devices. Not of a device that is down: kube-ipvs0, which is, has every service
// address.
func (n *node) fallbackAddr(index int, f family) (netip.Addr, string) {
	var list []Addr
	for _, l := range n.links {
		if l.Index != index && l.Up() && (n.selected[l.Index] || !n.ofPods(l)) {
			list = append(list, n.primaries(l.Index, f)...)
		}
	}
	if len(list) == 0 {
		return netip.Addr{}, fmt.Sprintf("no global %s address on this or another device", f)
	}
	slices.SortStableFunc(list, func(a, b Addr) int { return cmp.Or(a.Index-b.Index, a.Addr.Compare(b.Addr)) })
	best, rules := pick(list, []criterion{
		{func(a Addr) bool { return !a.Tentative }, "its duplicate address detection is over"},
		{func(a Addr) bool { return public(a.Addr) }, "public before private"},
		{func(a Addr) bool { return n.selected[a.Index] }, "masquerade devices first"},
	}, "lowest interface index and address")
	if rules == "" {
		rules = "the only one"
	}
	return best.Addr, fmt.Sprintf("of %s, as the device has none: %s", n.byID[best.Index].Name, rules)
}

// ofPods tells whether the device's addresses are never good for a fallback: it
// is part of a container network. Unlike detect it accepts lo, where routers and
// BGP nodes have their address.
func (n *node) ofPods(l Link) bool {
	if l.Flags&unix.IFF_LOOPBACK != 0 {
		return false
	}
	named := slices.ContainsFunc(podPrefixes, func(p string) bool { return strings.HasPrefix(l.Name, p) })
	return named || l.Kind == "veth" && !n.hasDefault(l) || n.podSide(l) != ""
}

// broadcasts returns the directed broadcast addresses of the device's IPv4
// subnets. The kernel takes both for broadcast, the configured address and the
// last one of the subnet (net/ipv4/fib_frontend.c, fib_add_ifaddr).
func broadcasts(addrs []Addr) []netip.Addr {
	var list []netip.Addr
	for _, a := range addrs {
		if !a.Addr.Is4() || a.Subnet.Bits() > 30 { // a /31 has none (RFC 3021)
			continue
		}
		list = append(list, last4(a.Subnet))
		if b := a.Broadcast; b.IsValid() && b.IsGlobalUnicast() && b != a.Addr {
			list = append(list, b)
		}
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return slices.Compact(list)
}

func last4(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for bit := p.Bits(); bit < 32; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	return netip.AddrFrom4(b)
}
