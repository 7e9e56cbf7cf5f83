package devices

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/policy"
)

// routeSources returns the routes of the main table that decide about a source
// address: by longest prefix, an entry says which, or with the zero Source that
// the device's own is right after all. Routes by which no packet leaves through a
// masquerade device do not count, nor do those for a type of service.
func (n *node) routeSources() []policy.RouteSource {
	best := make(map[netip.Prefix]Route)
	for _, r := range n.routes {
		if r.Type != Unicast || r.Table != unix.RT_TABLE_MAIN || r.TOS != 0 {
			continue
		}
		if b, ok := best[r.Dst]; !ok || r.Metric < b.Metric {
			best[r.Dst] = r
		}
	}
	var list []policy.RouteSource
	for dst, r := range best {
		if slices.ContainsFunc(r.Hops, func(h Hop) bool { return n.selected[h.Index] }) {
			list = append(list, policy.RouteSource{Prefix: dst, Source: r.Source})
		}
	}
	slices.SortFunc(list, func(a, b policy.RouteSource) int { return policy.ComparePrefixes(a.Prefix, b.Prefix) })
	return withoutRedundant(list)
}

// withoutRedundant drops entries that say what the next shorter one says, or
// nothing where there is no shorter one. list is sorted: every prefix follows
// those that contain it.
func withoutRedundant(list []policy.RouteSource) []policy.RouteSource {
	var kept, containing []policy.RouteSource
	for _, r := range list {
		for len(containing) > 0 && !containing[len(containing)-1].Prefix.Contains(r.Prefix.Addr()) {
			containing = containing[:len(containing)-1]
		}
		var inherited netip.Addr
		if len(containing) > 0 {
			inherited = containing[len(containing)-1].Source
		}
		if r.Source != inherited {
			kept = append(kept, r)
			containing = append(containing, r)
		}
	}
	return kept
}
