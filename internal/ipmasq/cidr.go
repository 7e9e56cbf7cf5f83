package ipmasq

import (
	"fmt"
	"net"
	"net/netip"

	"bauta.dev/bauta/internal/policy"
)

// maxWarnings bounds the warnings about single items: a list of thousands of
// misaligned CIDRs is one mistake.
const maxWarnings = 20

func (d *document) setList(v any) error {
	if v == nil {
		return nil
	}
	items, ok := v.([]any)
	if !ok {
		return fmt.Errorf(": %s, expected a list", describe(v))
	}
	masked, origin := 0, "file "+d.path
	d.rules = make([]policy.Rule, 0, len(items))
	for i, item := range items {
		text, ok := item.(string)
		if !ok {
			return fmt.Errorf("[%d]: %s, expected a CIDR such as 10.0.0.0/8", i, describe(item))
		}
		p, err := d.prefix(text)
		if err != nil {
			return fmt.Errorf("[%d]: %q: %w", i, text, err)
		}
		network := p.Masked()
		if p != network {
			if masked++; masked <= maxWarnings {
				d.warnings = append(d.warnings, fmt.Sprintf("%s[%d]: %q: bits are set behind the prefix length, taken for %s", keyCIDRs, i, text, network))
			}
		}
		d.rules = append(d.rules, policy.Rule{Prefix: network, Origin: origin})
	}
	if masked > maxWarnings {
		d.warnings = append(d.warnings, fmt.Sprintf("%s: %d more with bits set behind the prefix length", keyCIDRs, masked-maxWarnings))
	}
	return nil
}

func (d *document) prefix(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil && d.profile == Upstream {
		p, err = laxPrefix(text)
	}
	if err != nil {
		if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" && !a.Is4In6() {
			return p, fmt.Errorf("not a CIDR (write %s/%d)", a, a.BitLen())
		}
		return p, fmt.Errorf("not a CIDR")
	}
	if p.Addr().Is4In6() {
		if p.Bits() >= 96 {
			return p, fmt.Errorf("an IPv4-mapped IPv6 prefix matches no packet (write %s)", netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96).Masked())
		}
		return p, fmt.Errorf("an IPv4-mapped IPv6 prefix matches no packet (write it as IPv4)")
	}
	if d.profile != Cilium && p != p.Masked() {
		return p, fmt.Errorf("bits are set behind the prefix length (write %s)", p.Masked())
	}
	return p, nil
}

// laxPrefix takes what ip-masq-agent takes and netip does not: leading zeros in
// the length, 10.0.0.0/08.
func laxPrefix(text string) (netip.Prefix, error) {
	ip, n, err := net.ParseCIDR(text)
	if err != nil {
		return netip.Prefix{}, err
	}
	a, _ := netip.AddrFromSlice(ip)
	ones, size := n.Mask.Size()
	if size == 32 {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, ones), nil
}
