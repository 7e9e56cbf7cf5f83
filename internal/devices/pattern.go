package devices

import (
	"slices"
	"strings"
)

// patterns is the option `devices`, by role. An exclusion wins over any
// inclusion, wherever it stands in the list: Cilium lets the first match win, so
// that "eth+ !eth1" there includes eth1.
type patterns struct {
	exact    []string // eth0
	prefixes []string // eth+, without the plus sign
	excluded []string // !eth0, !eth+, without the exclamation mark
}

func parsePatterns(list []string) patterns {
	var p patterns
	for _, s := range list {
		if name, ok := strings.CutPrefix(s, "!"); ok {
			p.excluded = append(p.excluded, name)
		} else if name, ok := strings.CutSuffix(s, "+"); ok {
			p.prefixes = append(p.prefixes, name)
		} else if s != "" {
			p.exact = append(p.exact, s)
		}
	}
	return p
}

// automatic tells whether auto-detection decides: nothing is included by name.
func (p patterns) automatic() bool { return len(p.exact) == 0 && len(p.prefixes) == 0 }

func (p patterns) names(device string) bool { return slices.Contains(p.exact, device) }

// includes returns the prefix pattern that matches the device.
func (p patterns) includes(device string) (string, bool) {
	for _, prefix := range p.prefixes {
		if strings.HasPrefix(device, prefix) {
			return prefix + "+", true
		}
	}
	return "", false
}

// excludes returns the exclusion that matches the device.
func (p patterns) excludes(device string) (string, bool) {
	for _, pattern := range p.excluded {
		prefix, isPrefix := strings.CutSuffix(pattern, "+")
		if device == pattern || isPrefix && strings.HasPrefix(device, prefix) {
			return "!" + pattern, true
		}
	}
	return "", false
}

// missing returns the exact names that no link has. What is also excluded is not
// missed.
func (p patterns) missing(links []Link) []string {
	var missing []string
	for _, name := range p.exact {
		_, excluded := p.excludes(name)
		if !excluded && !slices.ContainsFunc(links, func(l Link) bool { return l.Name == name }) {
			missing = append(missing, name)
		}
	}
	slices.Sort(missing)
	return slices.Compact(missing)
}

// unmatched returns the prefix patterns that no link matches.
func (p patterns) unmatched(links []Link) []string {
	var unmatched []string
	for _, prefix := range p.prefixes {
		if !slices.ContainsFunc(links, func(l Link) bool { return strings.HasPrefix(l.Name, prefix) }) {
			unmatched = append(unmatched, prefix+"+")
		}
	}
	slices.Sort(unmatched)
	return slices.Compact(unmatched)
}

// String is the including part, as the reason texts show it.
func (p patterns) String() string {
	list := slices.Clone(p.exact)
	for _, prefix := range p.prefixes {
		list = append(list, prefix+"+")
	}
	return "[" + strings.Join(list, " ") + "]"
}
