package devices

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// hostAddrs returns every address the node receives packets for: those of all
// devices, and those that are only routes of a local table (anycast addresses of
// IPv6 routers, addresses added by `ip route add local`).
func (n *node) hostAddrs() []netip.Addr {
	var list []netip.Addr
	onDevice := make(map[netip.Addr]bool)
	for index, addrs := range n.addrs {
		for _, a := range addrs {
			onDevice[a.Addr] = true
			if !n.gateway(index, a.Addr, a.Subnet) {
				list = append(list, a.Addr)
			}
		}
	}
	for _, r := range n.routes {
		if r.Type == Unicast || !r.Dst.IsSingleIP() || onDevice[r.Dst.Addr()] {
			continue
		}
		if !slices.ContainsFunc(r.Hops, func(h Hop) bool { return n.gateway(h.Index, r.Dst.Addr(), r.Dst) }) {
			list = append(list, r.Dst.Addr())
		}
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return slices.Compact(list)
}

// gateway tells whether an address is one that the node has among its pods, such
// as that of their bridge: inside a source range, on a bridge or veth, or on any
// device whose whole subnet is inside. Outside the node nobody can answer it, so
// packets from it are masqueraded like a pod's. The addresses of masquerade
// devices and of lo are always the node's.
func (n *node) gateway(index int, a netip.Addr, subnet netip.Prefix) bool {
	l := n.byID[index]
	if n.selected[index] || l.Flags&unix.IFF_LOOPBACK != 0 {
		return false
	}
	if _, inside := n.inRange(single(a)); !inside {
		return false
	}
	if l.Kind == "bridge" || l.Kind == "veth" {
		return true
	}
	_, inside := n.inRange(subnet)
	return inside
}
