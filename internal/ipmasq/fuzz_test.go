package ipmasq

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/policy"
)

// render writes a list as the file that says all of it.
func render(l List) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "masqLinkLocal: %t\nmasqLinkLocalIPv6: %t\ncidrLimit: 100000\nnonMasqueradeCIDRs:\n", l.MasqLinkLocal, l.MasqLinkLocalIPv6)
	for _, p := range l.Prefixes() {
		fmt.Fprintf(&b, "- %s\n", p)
	}
	return []byte(b.String())
}

// FuzzParse: no input panics; what is accepted is canonical, sorted and keeps
// link-local traffic unless the file asks otherwise; and reading back what was
// read changes nothing.
func FuzzParse(f *testing.F) {
	for _, row := range rows {
		f.Add([]byte(row.file), "")
		f.Add([]byte(row.file), "nonMasqueradeCIDRs: [10.0.0.0/8]")
	}
	f.Fuzz(func(t *testing.T, a []byte, b string) {
		for _, p := range Profiles() {
			l, err := Parse([]Fragment{{"a", a}, {"b", []byte(b)}}, p)
			if err != nil {
				if strings.Contains(err.Error(), "\n") {
					t.Fatalf("%s: error of several lines: %q", p, err)
				}
				continue
			}
			if !slices.IsSortedFunc(l.Rules, func(a, b policy.Rule) int { return policy.ComparePrefixes(a.Prefix, b.Prefix) }) {
				t.Fatalf("%s: not sorted: %v", p, l.Rules)
			}
			if !l.MasqLinkLocal && !slices.Contains(l.Prefixes(), linkLocal4) || !l.MasqLinkLocalIPv6 && !slices.Contains(l.Prefixes(), linkLocal6) {
				t.Fatalf("%s: link-local prefixes are missing: %v", p, l.Rules)
			}
			if _, err := policy.Build(policy.Input{IPv4: true, IPv6: true, NonMasq: l.Rules}); err != nil {
				t.Fatalf("%s: policy refuses the list: %v", p, err)
			}
			again, err := Parse([]Fragment{{"a", render(l)}}, p)
			if err != nil {
				t.Fatalf("%s: reading back: %v\n%s", p, err, render(l))
			}
			if !slices.Equal(l.Prefixes(), again.Prefixes()) {
				t.Fatalf("%s: %v, read back %v", p, l.Rules, again.Rules)
			}
		}
	})
}
