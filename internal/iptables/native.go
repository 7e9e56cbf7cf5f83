package iptables

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// nftRuleset is what of `nft -j list ruleset` concerns us.
type nftRuleset struct {
	Nftables []struct {
		Rule *nftRule `json:"rule"`
	} `json:"nftables"`
}

type nftRule struct {
	Family, Table, Chain string
	Handle               int
	Expr                 []map[string]json.RawMessage
}

// foreignNative looks at native nft rules. Without nft there is nobody to have made any.
func foreignNative(ctx context.Context, o Options, sources []netip.Prefix, known []string) ([]ForeignRule, error) {
	var found []ForeignRule
	marked := make(map[string]bool)
	texts := make(map[string]map[int]string)
	err := o.eachNative(ctx, func(r *nftRule) error {
		for _, f := range r.families() {
			if r.Table == "nat" && slices.Contains(known, f.String()+" nat "+r.Chain) {
				continue
			}
			id := f.String() + " " + r.Table + " " + r.Chain
			switch {
			case r.has("return") && r.asks("mark"):
				marked[id] = true
			case r.translates() && !marked[id] && !r.asks("mark") && r.sourceOverlaps(f, sources):
				text, err := r.text(ctx, o, texts)
				if err != nil {
					return err
				}
				found = append(found, r.foreign(f, text))
			}
		}
		return nil
	})
	return found, err
}

// namedNative finds the native rules that a name means. A rule of both families is two. known
// are chains that iptables lists.
func namedNative(ctx context.Context, o Options, n naming, sources []netip.Prefix, known map[string]bool) (found []natRule, err error) {
	texts := make(map[string]map[int]string)
	err = o.eachNative(ctx, func(r *nftRule) error {
		for _, f := range r.families() {
			if !r.translates() || r.Table == "nat" && known[f.String()+" "+r.Chain] {
				continue
			}
			text, err := r.text(ctx, o, texts)
			if err != nil {
				return err
			}
			if rule := r.foreign(f, text); n.means(rule) {
				found = append(found, natRule{ForeignRule: rule, masks: !r.asks("mark") && r.sourceOverlaps(f, sources)})
			}
		}
		return nil
	})
	return found, err
}

func (o Options) eachNative(ctx context.Context, visit func(*nftRule) error) error {
	path := o.find("nft")
	if path == "" {
		return nil
	}
	out, err := o.run(ctx, path, "", "-j", "-t", "-a", "list", "ruleset")
	if err != nil {
		return err
	}
	var ruleset nftRuleset
	if err := json.Unmarshal([]byte(out), &ruleset); err != nil {
		return fmt.Errorf("nft list ruleset: %w", err)
	}
	for _, entry := range ruleset.Nftables {
		if entry.Rule == nil || strings.HasPrefix(entry.Rule.Chain, chainPrefix) {
			continue
		}
		if err := visit(entry.Rule); err != nil {
			return err
		}
	}
	return nil
}

func (r *nftRule) translates() bool { return r.has("masquerade") || r.has("snat") }

func (r *nftRule) foreign(f Family, text string) ForeignRule {
	return ForeignRule{Family: f.String(), Table: r.Family + " " + r.Table, Chain: r.Chain, Rule: text, family: r.Family, handle: r.Handle}
}

func (r *nftRule) families() []Family {
	switch r.Family {
	case "ip":
		return []Family{IPv4}
	case "ip6":
		return []Family{IPv6}
	case "inet":
		return families
	}
	return nil
}

func (r *nftRule) has(statement string) bool {
	return slices.ContainsFunc(r.Expr, func(e map[string]json.RawMessage) bool { _, ok := e[statement]; return ok })
}

// nftMatch is a comparison.
type nftMatch struct {
	Op    string
	Left  json.RawMessage
	Right json.RawMessage
}

func (r *nftRule) matches() []nftMatch {
	var list []nftMatch
	for _, e := range r.Expr {
		var m nftMatch
		if raw, ok := e["match"]; ok && json.Unmarshal(raw, &m) == nil {
			list = append(list, m)
		}
	}
	return list
}

// asks tells whether the rule looks at this part of a packet's metadata.
func (r *nftRule) asks(meta string) bool {
	return slices.ContainsFunc(r.matches(), func(m nftMatch) bool {
		return strings.Contains(string(m.Left), `"key": "`+meta+`"`) || strings.Contains(string(m.Left), `"key":"`+meta+`"`)
	})
}

// sourceOverlaps is false if the rule names sources and none of ours is among them. What
// is no plain address or prefix, such as a named set, is taken to match.
func (r *nftRule) sourceOverlaps(f Family, sources []netip.Prefix) bool {
	limits, not := []netip.Prefix{{}}, false
	for _, m := range r.matches() {
		var left struct {
			Payload struct{ Protocol, Field string }
		}
		if json.Unmarshal(m.Left, &left) != nil || left.Payload.Field != "saddr" {
			continue
		}
		if (left.Payload.Protocol == "ip6") != (f == IPv6) {
			return false
		}
		limits, not = nftPrefixes(m.Right), m.Op == "!="
	}
	return slices.ContainsFunc(limits, func(l netip.Prefix) bool { return overlaps(f, l, not, sources) })
}

// nftPrefixes reads an address, a prefix or a set of them; the zero Prefix is any.
func nftPrefixes(raw json.RawMessage) []netip.Prefix {
	var addr string
	if json.Unmarshal(raw, &addr) == nil {
		if a, err := netip.ParseAddr(addr); err == nil {
			return []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}
		}
		return []netip.Prefix{{}}
	}
	var v struct {
		Prefix *struct {
			Addr netip.Addr
			Len  int
		}
		Set []json.RawMessage
	}
	if json.Unmarshal(raw, &v) != nil || v.Prefix == nil && len(v.Set) == 0 {
		return []netip.Prefix{{}}
	}
	if v.Prefix != nil {
		return []netip.Prefix{netip.PrefixFrom(v.Prefix.Addr, v.Prefix.Len)}
	}
	var list []netip.Prefix
	for _, e := range v.Set {
		list = append(list, nftPrefixes(e)...)
	}
	return list
}

// text is the rule as nft lists it. texts keeps what was read of each chain.
func (r *nftRule) text(ctx context.Context, o Options, texts map[string]map[int]string) (string, error) {
	id := r.Family + " " + r.Table + " " + r.Chain
	if texts[id] == nil {
		texts[id] = make(map[int]string)
		out, err := o.run(ctx, o.find("nft"), fmt.Sprintf("list chain %s\n", id), "-a", "-s", "-f", "-")
		if err != nil {
			return "", err
		}
		for line := range strings.Lines(out) {
			line = strings.TrimSpace(line)
			if m := handlePattern.FindStringSubmatch(line); m != nil && !strings.Contains(line, "{ # handle") {
				n, _ := strconv.Atoi(m[1])
				texts[id][n] = handlePattern.ReplaceAllString(line, "")
			}
		}
	}
	if text := texts[id][r.Handle]; text != "" {
		return text, nil
	}
	return fmt.Sprintf("(nft handle %d)", r.Handle), nil // it has just gone
}
