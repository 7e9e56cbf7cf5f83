package devices

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Tunneled tells whether one of the ranges, or a part of it, is routed by the main table to a
// tunnel device, and to which. Of many ranges it is enough to know one.
func (s Snapshot) Tunneled(ranges []netip.Prefix) (netip.Prefix, string, bool) {
	tunnels := make(map[int]string)
	for _, l := range s.Links {
		if l.Port != 0 || len(l.Tunnels) > 0 || l.Kind == "wireguard" {
			tunnels[l.Index] = l.Name
		}
	}
	if len(tunnels) == 0 {
		return netip.Prefix{}, "", false
	}
	best := make(map[netip.Prefix]Route) // of each prefix, by metric
	for _, r := range s.Routes {
		old, ok := best[r.Dst]
		if r.Table == unix.RT_TABLE_MAIN && r.Type == Unicast && len(r.Hops) > 0 && (!ok || r.Metric < old.Metric) {
			best[r.Dst] = r
		}
	}
	wanted := make(map[netip.Prefix]bool, len(ranges))
	for _, p := range ranges {
		wanted[p] = true
		if r, ok := containing(best, p); ok && tunnels[r.Hops[0].Index] != "" {
			return p, tunnels[r.Hops[0].Index], true
		}
	}
	var parts []netip.Prefix
	for dst, r := range best {
		if ours, _ := containing(wanted, dst); ours && tunnels[r.Hops[0].Index] != "" {
			parts = append(parts, dst)
		}
	}
	if len(parts) == 0 {
		return netip.Prefix{}, "", false
	}
	first := slices.MinFunc(parts, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return first, tunnels[best[first].Hops[0].Index], true
}

// containing is the entry of the longest prefix that holds all of p.
func containing[V any](entries map[netip.Prefix]V, p netip.Prefix) (v V, ok bool) {
	for bits := p.Bits(); bits >= 0; bits-- {
		if v, ok = entries[netip.PrefixFrom(p.Addr(), bits).Masked()]; ok {
			return v, true
		}
	}
	return v, false
}
