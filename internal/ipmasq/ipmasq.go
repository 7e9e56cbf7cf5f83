// Package ipmasq reads the ip-masq-agent file: the prefixes towards which nothing
// is masqueraded.
//
// Parse is pure: the contents of one file or of a directory of fragments, and a
// profile, give the whole list or an error, never a part. Section 5 of the
// contract has a row for each state of the file; State names them.
package ipmasq

import (
	"fmt"
	"net/netip"
	"slices"

	"bauta.dev/bauta/internal/policy"
)

// Profile says by whose rules the file is read.
type Profile string

const (
	Cilium   Profile = "cilium"   // Cilium's ip-masq-agent; unset means this
	Upstream Profile = "upstream" // kubernetes-sigs/ip-masq-agent
	Strict   Profile = "strict"   // Cilium's, but unknown keys and misaligned CIDRs are errors
)

// Profiles returns every profile, the default first.
func Profiles() []Profile { return []Profile{Cilium, Upstream, Strict} }

// State says what was found at the path, or what it amounts to.
type State string

const (
	Missing  State = "missing"  // no file, or a directory without fragments
	Empty    State = "empty"    // zero bytes
	Blank    State = "blank"    // only blanks and comments
	NoList   State = "no-list"  // profile upstream: content, but not the list; the default ranges stay
	NoCIDRs  State = "no-cidrs" // content without a single CIDR
	Listed   State = "list"     // a list of CIDRs
	Fallback State = "defaults" // not read at all: see Defaults
)

// List is what the file says, as a whole.
type List struct {
	Rules             []policy.Rule `json:"rules"` // sorted by policy.ComparePrefixes, no prefix twice
	State             State         `json:"state"`
	Profile           Profile       `json:"profile"`
	Files             []string      `json:"files,omitempty"` // that were read
	MasqLinkLocal     bool          `json:"masqLinkLocal"`
	MasqLinkLocalIPv6 bool          `json:"masqLinkLocalIPv6"`
	Warnings          []string      `json:"warnings,omitempty"`
	Ignored           []string      `json:"ignored,omitempty"` // "FILE: KEY", keys without effect
}

// Prefixes returns the prefixes of the list without their origin.
func (l List) Prefixes() []netip.Prefix {
	prefixes := make([]netip.Prefix, len(l.Rules))
	for i, r := range l.Rules {
		prefixes[i] = r.Prefix
	}
	return prefixes
}

// DefaultOrigin is the Origin of rules that no file holds.
const DefaultOrigin = "default"

// defaultRanges are those of Cilium, and of ip-masq-agent with
// --nomasq-all-reserved-ranges; the first upstreamRanges of them are
// ip-masq-agent's without it.
var defaultRanges = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.0.2.0/24"),
	netip.MustParsePrefix("192.88.99.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("198.51.100.0/24"),
	netip.MustParsePrefix("203.0.113.0/24"),
	netip.MustParsePrefix("240.0.0.0/4"),
}

const upstreamRanges = 3

var (
	linkLocal4 = netip.MustParsePrefix("169.254.0.0/16")
	linkLocal6 = netip.MustParsePrefix("fe80::/10")
)

func (p Profile) ranges() []netip.Prefix {
	if p == Upstream {
		return defaultRanges[:upstreamRanges]
	}
	return defaultRanges
}

func (p Profile) check() (Profile, error) {
	switch p {
	case "":
		return Cilium, nil
	case Cilium, Upstream, Strict:
		return p, nil
	}
	return p, fmt.Errorf("profile %q: not one of cilium, upstream, strict", string(p))
}

// Defaults is the list for a first start with a bad file and nothing pinned.
func Defaults(p Profile) List {
	if p == "" {
		p = Cilium
	}
	l := List{State: Fallback, Profile: p}
	l.addDefaults()
	l.finish()
	return l
}

func (l *List) addDefaults() {
	for _, p := range l.Profile.ranges() {
		l.Rules = append(l.Rules, policy.Rule{Prefix: p, Origin: DefaultOrigin})
	}
}

// finish adds the link-local prefixes, sorts, and drops repeated prefixes: of
// those the first mention stays, so what a file lists keeps the file as origin.
func (l *List) finish() {
	if !l.MasqLinkLocal {
		l.Rules = append(l.Rules, policy.Rule{Prefix: linkLocal4, Origin: DefaultOrigin})
	}
	if !l.MasqLinkLocalIPv6 {
		l.Rules = append(l.Rules, policy.Rule{Prefix: linkLocal6, Origin: DefaultOrigin})
	}
	slices.SortStableFunc(l.Rules, func(a, b policy.Rule) int { return policy.ComparePrefixes(a.Prefix, b.Prefix) })
	l.Rules = slices.CompactFunc(l.Rules, func(a, b policy.Rule) bool { return a.Prefix == b.Prefix })
}
