package iptables

import (
	"context"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// ForeignRule is a rule of another program that translates sources.
type ForeignRule struct{ Family, Table, Chain, Rule string }

// Foreign lists rules of others, of both backends and native nft, that translate the
// source of packets from sources: they compete with ours. A rule that asks for a mark is
// left out: it is for what its program has marked before, such as kube-proxy's.
func Foreign(ctx context.Context, o Options, sources []netip.Prefix) ([]ForeignRule, error) {
	plain := o.plainBackend(ctx)
	var found []ForeignRule
	var known []string // chains that the binaries list: nft lists those of its backend again
	for _, b := range []Backend{NFT, Legacy} {
		progs := o.programs(b, plain)
		for _, f := range families {
			p, ok := progs[f]
			if !ok {
				continue
			}
			out, err := o.run(ctx, p.save, "")
			if err != nil {
				o.note("iptables: backend not readable", "path", p.save, "error", err)
				continue
			}
			rules, chains := foreignRules(f, out, sources)
			found = append(found, rules...)
			if b == NFT {
				known = append(known, chains...)
			}
		}
	}
	native, err := foreignNative(ctx, o, sources, known)
	return append(found, native...), err
}

var quotedText = regexp.MustCompile(`"(\\.|[^"\\])*"`)

// foreignRules reads the nat table of what iptables-save prints. It also returns the
// chains as "FAMILY nat CHAIN".
func foreignRules(f Family, out string, sources []netip.Prefix) (found []ForeignRule, chains []string) {
	marked := make(map[string]bool) // chains whose rest is for marked packets only
	nat := false
	for line := range strings.Lines(out) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case strings.HasPrefix(line, "*"):
			nat = line == "*nat"
		case nat && strings.HasPrefix(line, ":"):
			name, _, _ := strings.Cut(line[1:], " ")
			chains = append(chains, f.String()+" nat "+name)
		case nat && strings.HasPrefix(line, "-A "):
			words := strings.Fields(quotedText.ReplaceAllString(line, `""`)) // comments can hold anything
			chain := words[1]
			if strings.HasPrefix(chain, chainPrefix) {
				continue
			}
			target := option(words, "-j")
			switch {
			case target == "RETURN" && notMarked(words):
				marked[chain] = true
			case target != "MASQUERADE" && target != "SNAT" || marked[chain]:
			case slices.Contains(words, "--mark") && !notMarked(words):
			case sourceOverlaps(f, words, sources):
				found = append(found, ForeignRule{f.String(), "nat", chain, strings.TrimPrefix(line, "-A "+chain+" ")})
			}
		}
	}
	return found, chains
}

// notMarked tells whether the rule is for packets without a mark: ! --mark VALUE.
func notMarked(words []string) bool {
	at := slices.Index(words, "--mark")
	return at > 0 && words[at-1] == "!"
}

// sourceOverlaps tells whether -s leaves any of the sources to the rule. Other matches
// are taken to be true.
func sourceOverlaps(f Family, words []string, sources []netip.Prefix) bool {
	at := slices.Index(words, "-s")
	var limit netip.Prefix
	if at >= 0 && at+1 < len(words) {
		var err error
		if limit, err = netip.ParsePrefix(words[at+1]); err != nil {
			return true
		}
	}
	not := at > 0 && words[at-1] == "!"
	return overlaps(f, limit, not, sources)
}

func overlaps(f Family, limit netip.Prefix, not bool, sources []netip.Prefix) bool {
	return slices.ContainsFunc(sources, func(s netip.Prefix) bool {
		switch {
		case !f.of(s.Addr()):
			return false
		case !limit.IsValid():
			return true
		case not:
			return limit.Bits() > s.Bits() || !limit.Contains(s.Addr())
		}
		return limit.Overlaps(s)
	})
}
