package policy

import "net/netip"

// index is a longest-prefix table: one exact map, probed from the longest
// length present to the shortest.
type index[V any] struct {
	entries map[netip.Prefix]V
	lengths [2][]int // present prefix lengths by family (IPv4, IPv6), longest first
}

func newIndex[V any](prefixes []netip.Prefix, value func(i int) V) index[V] {
	x := index[V]{entries: make(map[netip.Prefix]V, len(prefixes))}
	var present [2][129]bool
	for i, p := range prefixes {
		if _, ok := x.entries[p]; ok {
			continue // the first mention wins: it is the one to report
		}
		x.entries[p] = value(i)
		present[family(p.Addr())][p.Bits()] = true
	}
	for f := range present {
		for bits := 128; bits >= 0; bits-- {
			if present[f][bits] {
				x.lengths[f] = append(x.lengths[f], bits)
			}
		}
	}
	return x
}

// lookup returns the longest entry that contains a.
func (x index[V]) lookup(a netip.Addr) (netip.Prefix, V, bool) {
	for _, bits := range x.lengths[family(a)] {
		p := netip.PrefixFrom(a, bits).Masked()
		if v, ok := x.entries[p]; ok {
			return p, v, true
		}
	}
	var zero V
	return netip.Prefix{}, zero, false
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}
