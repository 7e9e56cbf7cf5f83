package iptables

import (
	"context"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// ForeignRule is a rule of another program that translates sources.
type ForeignRule struct {
	Family, Table, Chain, Rule string

	Backend Backend // empty: a native rule of nft
	family  string  // of a native rule: ip, ip6 or inet
	handle  int
}

// Foreign lists rules of others, of both backends and native nft, that translate the
// source of packets from sources: they compete with ours. A rule that asks for a mark is
// left out: it is for what its program has marked before, such as kube-proxy's.
func Foreign(ctx context.Context, o Options, sources []netip.Prefix) ([]ForeignRule, error) {
	ctx, cancel := o.reading(ctx)
	defer cancel()
	var found []ForeignRule
	var known []string // chains that the binaries list: nft lists those of its backend again
	for _, p := range o.installed(ctx) {
		out, err := o.run(ctx, p.save, "")
		if ctx.Err() != nil {
			return found, hangs(ctx, "iptables")
		}
		if err != nil {
			o.note("iptables: backend not readable", "path", p.save, "error", err)
			continue
		}
		rules, chains := foreignRules(p, out, sources)
		found = append(found, rules...)
		if p.backend == NFT {
			known = append(known, chains...)
		}
	}
	native, err := foreignNative(ctx, o, sources, known)
	if ctx.Err() != nil {
		return found, hangs(ctx, "nft")
	}
	return append(found, native...), err
}

// RemoveForeign deletes a rule that Foreign has found: for a take-over that names it. A
// native rule of both families goes in both.
func RemoveForeign(ctx context.Context, o Options, r ForeignRule) error {
	if strings.ContainsAny(r.Chain+r.Rule+r.Table, "\n\x00") || r.Rule == "" {
		return fmt.Errorf("rule %q: not one of Foreign", r.Rule)
	}
	if r.Backend == "" {
		path := o.find("nft")
		if path == "" {
			return fmt.Errorf("nft: %w", ErrNoBinary)
		}
		table := strings.TrimPrefix(r.Table, r.family+" ")
		_, err := o.run(ctx, path, fmt.Sprintf("delete rule %s %s %s handle %d\n", r.family, table, r.Chain, r.handle), "-f", "-")
		return err
	}
	for f, p := range o.programs(r.Backend, o.plainBackend(ctx)) {
		if f.String() == r.Family {
			return p.write(ctx, fmt.Sprintf("*%s\n-D %s %s\nCOMMIT\n", r.Table, r.Chain, r.Rule))
		}
	}
	return noBinary(string(r.Backend))
}

var quotedText = regexp.MustCompile(`"(\\.|[^"\\])*"`)

// foreignRules reads the nat table of what iptables-save prints. It also returns the
// chains as "FAMILY nat CHAIN".
func foreignRules(p program, out string, sources []netip.Prefix) (found []ForeignRule, chains []string) {
	f := p.family
	closed := make(map[string]bool) // chains whose rest is for marked packets only, or for none
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
			case target == "RETURN" && notMarked(words), unconditional(words, "RETURN", "ACCEPT"):
				closed[chain] = true
			case target != "MASQUERADE" && target != "SNAT" || closed[chain]:
			case slices.Contains(words, "--mark") && !notMarked(words):
			case sourceOverlaps(f, words, sources):
				found = append(found, ForeignRule{Family: f.String(), Table: "nat", Chain: chain,
					Rule: strings.TrimPrefix(line, "-A "+chain+" "), Backend: p.backend})
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

// unconditional tells whether every packet that comes to the rule goes to one of targets. An
// ip-masq-agent that is told to masquerade nothing ends its chain so.
func unconditional(words []string, targets ...string) bool {
	rest := words[2:] // without -A CHAIN
	if len(rest) > 4 && slices.Equal(rest[:3], []string{"-m", "comment", "--comment"}) {
		rest = rest[4:]
	}
	return len(rest) == 2 && rest[0] == "-j" && slices.Contains(targets, rest[1])
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
