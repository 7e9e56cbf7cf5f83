package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// Named is the masquerading of another program, as somebody has named it: a chain of
// nat, or a rule. It is what a take-over removes.
type Named struct {
	Chain    string        // of nat, with all its rules; empty: a rule
	Rules    []ForeignRule // those that translate
	Removals []string      // what Remove takes away, for people
	Backend  Backend       // empty: a native rule of nft

	scripts []func(context.Context) error
}

// Reasons for which FindNamed refuses a name.
var (
	ErrNotFound  = errors.New("no such rule or chain")
	ErrAmbiguous = errors.New("more than one rule or chain is meant")
	ErrUnfit     = errors.New("not a masquerade for pods")
)

// FindNamed finds what is meant by a name: a chain of nat that POSTROUTING leads to, or a
// rule in the words of iptables -S, of nft list ruleset, or of the status. In either family there may be one.
// It has to translate some of the sources, and to do nothing else. Where it is of a family in which it translates
// none of them, that is left alone.
func FindNamed(ctx context.Context, o Options, name string, sources []netip.Prefix) (*Named, error) {
	n := nameOf(name)
	all, err := listNAT(ctx, o)
	if err != nil {
		return nil, err
	}
	if n.word != "" && !strings.HasPrefix(n.word, chainPrefix) {
		found, err := namedChain(n.word, all, sources)
		if !errors.Is(err, ErrNotFound) {
			return found, err
		}
	}
	listed := make(map[string]bool) // chains that iptables shows: nft lists them again
	for _, r := range all {
		listed[r.Family+" "+r.Chain] = listed[r.Family+" "+r.Chain] || r.Backend == NFT
	}
	found := slices.DeleteFunc(all, func(r natRule) bool { return !n.means(r.ForeignRule) })
	native, err := namedNative(ctx, o, n, sources, listed)
	if err != nil {
		return nil, err
	}
	return o.namedRule(name, append(found, native...), sources)
}

// Within tells whether the rule is for packets from some of the sources only.
func (r ForeignRule) Within(sources []netip.Prefix) bool {
	words := wordsOf(r.Rule)
	at := max(slices.Index(words, "-s"), slices.Index(words, "saddr"))
	if at < 0 || at+1 >= len(words) || at > 0 && words[at-1] == "!" {
		return false
	}
	limit, err := netip.ParsePrefix(words[at+1])
	if a, aerr := netip.ParseAddr(words[at+1]); aerr == nil {
		limit, err = netip.PrefixFrom(a, a.BitLen()), nil
	}
	return err == nil && slices.ContainsFunc(sources, func(s netip.Prefix) bool { return s.Bits() <= limit.Bits() && s.Overlaps(limit) })
}

// Gives tells whether the rules name this address as the source that packets get.
func (n *Named) Gives(a netip.Addr) bool {
	return slices.ContainsFunc(n.Rules, func(r ForeignRule) bool {
		words := wordsOf(r.Rule)
		to := option(words, "--to-source")
		if to == "" && slices.Contains(words, "snat") {
			to = option(words, "to")
		}
		first, last, isRange := strings.Cut(to, "-")
		low := addrOf(first)
		if !isRange || !addrOf(last).IsValid() { // what follows are ports
			return low == a
		}
		return low.Compare(a) <= 0 && a.Compare(addrOf(last)) <= 0
	})
}

// addrOf reads an address with or without ports.
func addrOf(text string) netip.Addr {
	a, err := netip.ParseAddr(strings.Trim(text, "[]"))
	if at := strings.LastIndex(text, ":"); err != nil && at >= 0 {
		a, _ = netip.ParseAddr(strings.Trim(text[:at], "[]"))
	}
	return a
}

// RemoveNamed removes what FindNamed finds. What is gone already is no error.
func RemoveNamed(ctx context.Context, o Options, name string, sources []netip.Prefix) (removed []string, err error) {
	n, err := FindNamed(ctx, o, name, sources)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	for _, remove := range n.scripts {
		if err := remove(ctx); err != nil {
			return nil, err
		}
	}
	return n.Removals, nil
}

// naming is a name, taken apart.
type naming struct {
	family, table, chain string // empty: any
	words                []string
	word                 string // of one word: it may be a chain
}

var reported = regexp.MustCompile(`^(IPv[46]), table ([^,]+), chain ([^:]+): (.+)$`)

func nameOf(text string) naming {
	text = strings.TrimSpace(text)
	if m := reported.FindStringSubmatch(text); m != nil {
		return naming{family: m[1], table: m[2], chain: m[3], words: wordsOf(m[4])}
	}
	words := wordsOf(text)
	n := naming{words: words}
	if at := slices.Index(words, "-A"); at >= 0 && at <= 3 && at+1 < len(words) { // iptables -t nat -A CHAIN ...
		n.chain, n.words = words[at+1], words[at+2:]
	}
	if len(words) == 1 {
		n.word = words[0]
	}
	return n
}

func (n naming) means(r ForeignRule) bool {
	return (n.family == "" || n.family == r.Family) && (n.table == "" || n.table == r.Table) && (n.chain == "" || n.chain == r.Chain) &&
		len(n.words) > 0 && slices.Equal(n.words, wordsOf(r.Rule))
}

var (
	wordPattern   = regexp.MustCompile(`(?:"(?:\\.|[^"\\])*"|[^\s"])+`)
	unquote       = strings.NewReplacer(`\"`, `"`, `"`, ``, `\\`, `\`)
	counted       = regexp.MustCompile(`\bcounter packets \d+ bytes \d+`)
	handlePattern = regexp.MustCompile(`\s*# handle (\d+)$`)
)

// wordsOf splits a rule; neither quotes nor counters make a difference.
func wordsOf(rule string) []string {
	var words []string
	for _, w := range wordPattern.FindAllString(counted.ReplaceAllString(handlePattern.ReplaceAllString(rule, ""), "counter"), -1) {
		words = append(words, unquote.Replace(w))
	}
	return words
}

// home is where a chain of iptables is.
type home struct {
	backend Backend
	family  Family
}

// natRule is a rule of the nat table of iptables, of any chain but ours.
type natRule struct {
	ForeignRule
	program program
	masks   bool // it translates what sources send: set for native rules
}

// listNAT lists the nat tables of both backends and families.
func listNAT(ctx context.Context, o Options) (list []natRule, err error) {
	programs := o.installed(ctx)
	if len(programs) == 0 {
		return nil, noBinary("restore")
	}
	for _, p := range programs {
		out, err := o.run(ctx, p.save, "")
		if err != nil {
			o.note("iptables: backend not readable", "path", p.save, "error", err)
			continue
		}
		list = append(list, natRules(p, out)...)
	}
	return list, nil
}

func natRules(p program, out string) (list []natRule) {
	nat := false
	for line := range strings.Lines(out) {
		line = strings.TrimSuffix(line, "\n")
		text, isRule := strings.CutPrefix(line, "-A ")
		switch {
		case strings.HasPrefix(line, "*"):
			nat = line == "*nat"
		case nat && isRule:
			chain, rule, _ := strings.Cut(text, " ")
			if !strings.HasPrefix(chain, chainPrefix) {
				list = append(list, natRule{program: p, ForeignRule: ForeignRule{Family: p.family.String(), Table: "nat", Chain: chain, Rule: rule, Backend: p.backend}})
			}
		}
	}
	return list
}

// target is where a rule leads to.
func (r natRule) target() string {
	words := wordsOf(r.Rule)
	if t := option(words, "-j"); t != "" {
		return t
	}
	return option(words, "-g")
}

func (r natRule) translates() bool { t := r.target(); return t == "MASQUERADE" || t == "SNAT" }

// matches tells whether the rule is for some of the sources.
func (r natRule) matches(sources []netip.Prefix) bool {
	if r.Backend == "" {
		return r.masks
	}
	words := wordsOf(r.Rule)
	return !(slices.Contains(words, "--mark") && !notMarked(words)) && sourceOverlaps(r.program.family, words, sources)
}

// where names a rule's home for people.
func (r natRule) where() string {
	return fmt.Sprintf("%s, iptables-%s, table nat: ", r.Family, r.Backend)
}

// namedChain takes a chain with its rules, and what leads to it.
func namedChain(chain string, all []natRule, sources []netip.Prefix) (*Named, error) {
	n := &Named{Chain: chain}
	byProgram := make(map[home][]natRule)
	var order []home
	for _, r := range all {
		if r.Chain != chain && r.target() != chain {
			continue
		}
		at := home{r.Backend, r.program.family}
		if byProgram[at] == nil {
			order = append(order, at)
		}
		byProgram[at] = append(byProgram[at], r)
	}
	there, masks, above := false, false, ""
	for _, at := range order {
		part := byProgram[at]
		if !slices.ContainsFunc(part, func(r natRule) bool { return r.Chain == hookChain && r.target() == chain }) {
			if i := slices.IndexFunc(part, func(r natRule) bool { return r.target() == chain }); i >= 0 {
				above = part[i].Chain
			}
			continue // nothing comes there from the hook itself
		}
		there = true
		masks = masks || slices.ContainsFunc(part, func(r natRule) bool { return r.Chain == chain && r.translates() })
		if !reaches(part, chain, sources) {
			continue
		}
		if n.Backend != "" && n.Backend != at.backend {
			return nil, fmt.Errorf("chain %s is in both backends of iptables: %w", chain, ErrAmbiguous)
		}
		n.Backend = at.backend
		if err := n.takeChain(part); err != nil {
			return nil, err
		}
	}
	switch {
	case !there && above != "":
		return nil, fmt.Errorf("chain %s leads to %s, not %s: name the rule that masquerades: %w", above, chain, hookChain, ErrUnfit)
	case !there:
		return nil, fmt.Errorf("chain %s: %w", chain, ErrNotFound)
	case !masks:
		return nil, fmt.Errorf("chain %s has no rule MASQUERADE or SNAT: %w", chain, ErrUnfit)
	case len(n.Rules) == 0:
		return nil, fmt.Errorf("chain %s masquerades none of the source ranges: %w", chain, ErrUnfit)
	}
	return n, nil
}

// reaches tells whether packets of the sources come to a chain and are translated there.
func reaches(part []natRule, chain string, sources []netip.Prefix) bool {
	jumps, translates := false, false
	for _, r := range part {
		jumps = jumps || r.target() == chain && r.matches(sources)
		translates = translates || r.Chain == chain && r.translates() && r.matches(sources)
	}
	return jumps && translates
}

// takeChain adds the chain of one family.
func (n *Named) takeChain(part []natRule) error {
	var script strings.Builder
	script.WriteString("*nat\n")
	rules := 0
	for _, r := range part {
		switch t := r.target(); {
		case r.Chain == n.Chain && !slices.Contains([]string{"RETURN", "ACCEPT", "MASQUERADE", "SNAT"}, t):
			return fmt.Errorf("chain %s also has the rule %q: %w", n.Chain, r.Rule, ErrUnfit)
		case r.Chain == n.Chain:
			rules++
			if r.translates() {
				n.Rules = append(n.Rules, r.ForeignRule)
			}
		case r.Chain != hookChain:
			return fmt.Errorf("chain %s leads to %s, not %s alone: %w", r.Chain, n.Chain, hookChain, ErrUnfit)
		default:
			fmt.Fprintf(&script, "-D %s %s\n", hookChain, r.Rule)
			n.Removals = append(n.Removals, r.where()+"rule "+hookChain+" "+r.Rule)
		}
	}
	fmt.Fprintf(&script, "-F %[1]s\n-X %[1]s\nCOMMIT\n", n.Chain)
	n.Removals = append(n.Removals, fmt.Sprintf("%schain %s, %d rules", part[0].where(), n.Chain, rules))
	p := part[0].program
	n.scripts = append(n.scripts, func(ctx context.Context) error { return p.write(ctx, script.String()) })
	return nil
}

// namedRule takes the rules that a text means: one, or the same in both families.
func (o Options) namedRule(name string, found []natRule, sources []netip.Prefix) (*Named, error) {
	n := new(Named)
	if len(found) == 0 {
		return nil, fmt.Errorf("%q: %w", name, ErrNotFound)
	}
	fits := slices.ContainsFunc(found, func(r natRule) bool { return r.matches(sources) })
	if fits {
		found = slices.DeleteFunc(found, func(r natRule) bool { return r.Backend != "" && !r.matches(sources) })
	}
	for i, r := range found {
		for _, other := range found[:i] {
			same := r.Backend == "" && r.handle == other.handle && r.Table == other.Table && r.Chain == other.Chain
			if !same && (r.Family == other.Family || r.Backend != other.Backend || r.Chain != other.Chain) {
				return nil, fmt.Errorf("%q: %w: in %s and in %s", name, ErrAmbiguous, other.place(), r.place())
			}
		}
		if r.Backend != "" && !r.translates() {
			return nil, fmt.Errorf("%q: its target is %s, not MASQUERADE or SNAT: %w", name, r.target(), ErrUnfit)
		}
		n.Backend = r.Backend
		n.Rules = append(n.Rules, r.ForeignRule)
		if r.Backend == "" && i > 0 && found[i-1].handle == r.handle {
			continue // the other family of one rule
		}
		n.Removals = append(n.Removals, r.place()+" rule "+r.Rule)
		n.scripts = append(n.scripts, func(ctx context.Context) error { return RemoveForeign(ctx, o, r.ForeignRule) })
	}
	if !fits {
		return nil, fmt.Errorf("%q: it masquerades none of the source ranges, or marked packets only: %w", name, ErrUnfit)
	}
	return n, nil
}

func (r natRule) place() string {
	if r.Backend == "" {
		return fmt.Sprintf("nft, table %s, chain %s:", r.Table, r.Chain)
	}
	return r.where() + "chain " + r.Chain + ":"
}
