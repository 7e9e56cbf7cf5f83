package config

import (
	"fmt"
	"net/netip"
	"slices"

	"bauta.dev/bauta/internal/policy"
)

// family is the IP family that an option is limited to; zero is no limit.
type family int

const (
	ipv4Only family = 4
	ipv6Only family = 6
)

// rules parses a list of CIDRs. origin is the option's own name, whatever alias
// was used.
func (s setting) rules(only family, origin string) ([]policy.Rule, error) {
	var rules []policy.Rule
	for _, item := range s.split() {
		p, err := s.prefix(item, only)
		if err != nil {
			return nil, err
		}
		rules = append(rules, policy.Rule{Prefix: p, Origin: "option " + origin})
	}
	return sortRules(rules), nil
}

func (s setting) prefix(item string, only family) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(item)
	if err != nil {
		if a, err := netip.ParseAddr(item); err == nil && a.Zone() == "" {
			return p, s.refuseItem(item, "an address without prefix length", fmt.Sprintf("write %s/%d", item, a.BitLen()))
		}
		return p, s.refuseItem(item, "not a CIDR", "write ADDRESS/LENGTH, for example "+example(only))
	}
	switch is4 := p.Addr().Is4(); {
	case p.Addr().Is4In6():
		return p, s.refuseItem(item, "an IPv4-mapped IPv6 prefix, which matches no packet", unmapped(p))
	case only == ipv4Only && !is4, only == ipv6Only && is4:
		return p, s.refuseItem(item, fmt.Sprintf("not an IPv%d CIDR", only), "write for example "+example(only))
	case p != p.Masked():
		return p, s.refuseItem(item, "has bits set behind the prefix length",
			fmt.Sprintf("write %s for the network, or %s/%d for the one address", p.Masked(), p.Addr(), p.Addr().BitLen()))
	}
	return p, nil
}

func unmapped(p netip.Prefix) string {
	if p.Bits() < 96 {
		return "write it as an IPv4 CIDR"
	}
	return fmt.Sprintf("write %s", netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96).Masked())
}

func example(f family) string {
	if f == ipv6Only {
		return "fd00:10::/64"
	}
	return "10.0.0.0/16"
}

// sortRules sorts by prefix; of two rules for one prefix the first stays.
func sortRules(rules []policy.Rule) []policy.Rule {
	slices.SortStableFunc(rules, func(a, b policy.Rule) int { return policy.ComparePrefixes(a.Prefix, b.Prefix) })
	return slices.CompactFunc(rules, func(a, b policy.Rule) bool { return a.Prefix == b.Prefix })
}

func setNative(field func(*Config) *[]policy.Rule, only family) func(*Config, []setting) error {
	return one(func(c *Config, s setting) (err error) {
		*field(c), err = s.rules(only, s.name)
		return err
	})
}

// setPodCIDRs joins pod-cidrs with its aliases, which hold one family each. Two
// names may give one family only if they agree.
func setPodCIDRs(c *Config, given []setting) error {
	familyOf := map[string]family{"ipv4-range": ipv4Only, "ipv6-range": ipv6Only}
	var from [2]*setting
	var byFamily [2][]policy.Rule
	for _, s := range given {
		rules, err := s.rules(familyOf[s.name], "pod-cidrs")
		if err != nil {
			return err
		}
		for f, is4 := range []bool{true, false} {
			part := slices.DeleteFunc(slices.Clone(rules), func(r policy.Rule) bool { return r.Prefix.Addr().Is4() != is4 })
			switch {
			case len(part) == 0:
			case from[f] == nil:
				from[f], byFamily[f] = &s, part
			case !slices.Equal(byFamily[f], part):
				return conflict(*from[f], s)
			}
		}
	}
	c.PodCIDRs = slices.Concat(byFamily[0], byFamily[1])
	return nil
}
