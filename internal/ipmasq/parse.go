package ipmasq

import (
	"fmt"
	"strings"

	"bauta.dev/bauta/internal/policy"
)

// Fragment is the content of one file.
type Fragment struct {
	Path string
	Data []byte
}

// upstreamLimit is ip-masq-agent's default cidrLimit.
const upstreamLimit = 64

// Parse merges fragments, in the order given, and applies the profile to the
// merged whole: lists are joined, booleans OR-ed. No fragments mean that there is
// no file. The error names file, key and value.
func Parse(fragments []Fragment, p Profile) (List, error) {
	p, err := p.check()
	if err != nil {
		return List{}, err
	}
	l := List{Profile: p, State: Missing}
	var content, hasList bool // in any fragment
	limit, items := 0, 0
	for _, f := range fragments {
		d, err := parseDocument(f, p)
		if err != nil {
			return List{}, fmt.Errorf("%s: %w", f.Path, err)
		}
		l.Files = append(l.Files, f.Path)
		l.Rules = append(l.Rules, d.rules...)
		l.MasqLinkLocal = l.MasqLinkLocal || d.masqLinkLocal
		l.MasqLinkLocalIPv6 = l.MasqLinkLocalIPv6 || d.masqLinkLocalIPv6
		l.Warnings = append(l.Warnings, prefixed(f.Path, d.warnings)...)
		l.Ignored = append(l.Ignored, prefixed(f.Path, d.ignored)...)
		items += len(d.rules)
		limit = max(limit, d.limit)
		hasList = hasList || d.hasList
		content = content || d.state == NoList
		switch {
		case d.state == Blank:
			l.Warnings = append(l.Warnings, f.Path+": only blanks or comments: counts as an empty file")
			l.State = Blank
		case l.State == Missing:
			l.State = d.state
		}
	}
	l.settle(content, hasList)
	if limit == 0 {
		limit = upstreamLimit
	}
	if p == Upstream && content {
		if l.State == NoList {
			items = len(l.Rules)
		}
		if items > limit {
			return List{}, fmt.Errorf("%s: nonMasqueradeCIDRs: %d CIDRs, more than cidrLimit %d", strings.Join(l.Files, ", "), items, limit)
		}
	}
	l.finish()
	if err := l.checkSize(); err != nil {
		return List{}, err
	}
	return l, nil
}

// settle applies the table of section 5 to the merged whole.
func (l *List) settle(content, hasList bool) {
	files := strings.Join(l.Files, ", ")
	switch {
	case !content: // State is Missing, Empty or Blank
		l.addDefaults()
	case len(l.Rules) > 0:
		l.State = Listed
	case l.Profile == Upstream && !hasList:
		l.State = NoList
		l.addDefaults()
	default:
		l.State = NoCIDRs
		rest := "all but link-local destinations is"
		if l.MasqLinkLocal && l.MasqLinkLocalIPv6 {
			rest = "everything is"
		}
		l.Warnings = append(l.Warnings, fmt.Sprintf("%s: no CIDR in nonMasqueradeCIDRs: %s masqueraded (list the ranges to keep, the defaults do not apply)", files, rest))
	}
}

// checkSize holds the number of prefixes, of which none is there twice any more,
// to what the kernel's tables have room for.
func (l *List) checkSize() error {
	var count [2]int
	for _, r := range l.Rules {
		if r.Prefix == linkLocal4 || r.Prefix == linkLocal6 {
			continue // the tables have room for these two in any case
		}
		family := 0
		if r.Prefix.Addr().Is6() {
			family = 1
		}
		if count[family]++; count[family] > policy.MaxPrefixes {
			return fmt.Errorf("%s: nonMasqueradeCIDRs: more than %d prefixes of one family", strings.Join(l.Files, ", "), policy.MaxPrefixes)
		}
	}
	return nil
}

func prefixed(path string, texts []string) []string {
	for i := range texts {
		texts[i] = path + ": " + texts[i]
	}
	return texts
}
