package iptables

import (
	"fmt"
	"net/netip"
	"slices"

	"bauta.dev/bauta/internal/policy"
)

// RenderOptions are what rules depend on besides the policy.
type RenderOptions struct {
	RandomFully bool
	PlainRules  bool // a rule for each prefix, where there are no sets
}

// Render returns the rules of a family. A family that is off has none. Devices that rules
// can't name are left out: see CheckDevice.
func Render(p *policy.Policy, f Family, o RenderOptions) Ruleset {
	in := p.Input()
	rs := Ruleset{Family: f}
	if f == IPv4 && !in.IPv4 || f == IPv6 && !in.IPv6 {
		return rs
	}
	in.Devices, _ = usable(in.Devices)
	r := renderer{p: p, in: in, f: f, opts: o}
	if !o.PlainRules {
		rs.Sets = r.sets()
	}
	rs.Tables = []Table{r.mangle(), r.nat()}
	return rs
}

// drained is a family that translates no new flow: the hooks of nat and conntrack
// stay for those that live. Without a rule that asks conntrack, the kernel would
// take its hooks away.
func drained(f Family) Ruleset {
	nat := Table{Name: "nat"}
	nat.add(entryChain, rule("-m conntrack --ctstate NEW", comment(drainingComment), "-j RETURN"))
	return Ruleset{Family: f, Tables: []Table{{Name: "mangle"}, nat}}
}

const drainingComment = "draining"

type renderer struct {
	p    *policy.Policy
	in   policy.Input
	f    Family
	opts RenderOptions
	snat []netip.Addr // the addresses that packets get, in the order of their chains
}

func comment(s string) string { return "-m comment --comment " + s }

// reason marks a rule with the outcome that it stands for.
func reason(o policy.Outcome) string { return comment(o.String()) }

func (r *renderer) nat() Table {
	t := Table{Name: "nat"}
	t.add(entryChain)
	for _, d := range r.in.Devices {
		t.add(entryChain, "-o "+d.Name+" -g "+sourceChain)
	}
	t.add(sourceChain, r.sources()...)
	t.add(destinationChain, r.destinations()...)
	t.add(destinationChain, "-g "+addressChain)
	for _, d := range r.in.Devices {
		if a := d.Addr(r.f == IPv4); a.IsValid() {
			r.snatTo(a) // the first numbers
		}
	}
	t.add(addressChain)
	for _, route := range r.routes() {
		to := deviceChain
		if route.Source.IsValid() {
			to = r.snatTo(route.Source)
		}
		t.add(addressChain, rule(match("-d", route.Prefix), "-g "+to))
	}
	t.add(addressChain, "-g "+deviceChain)
	t.add(deviceChain)
	for _, d := range r.in.Devices {
		if a := d.Addr(r.f == IPv4); a.IsValid() {
			t.add(deviceChain, "-o "+d.Name+" -g "+r.snatTo(a))
		}
	}
	for i, a := range r.snat {
		t.add(snatName(i), r.translate(a)...)
	}
	return t
}

func snatName(i int) string { return fmt.Sprintf("%s%d", snatChain, i+1) }

// snatTo is the chain that translates to a.
func (r *renderer) snatTo(a netip.Addr) string {
	i := slices.Index(r.snat, a)
	if i < 0 {
		i = len(r.snat)
		r.snat = append(r.snat, a)
	}
	return snatName(i)
}

// sources are the addresses of the node, as far as a range holds them, and the ranges.
func (r *renderer) sources() []string {
	var ranges []netip.Prefix
	for _, s := range r.p.Sources() {
		if r.f.of(s.Prefix.Addr()) && s.Outcome == policy.Continue {
			ranges = append(ranges, s.Prefix)
		}
	}
	var rules []string
	for _, a := range r.in.HostAddrs {
		a = a.WithZone("")
		host := netip.PrefixFrom(a, a.BitLen())
		if r.f.of(a) && slices.ContainsFunc(ranges, func(q netip.Prefix) bool { return q.Contains(a) }) {
			rules = append(rules, rule("-s "+prefixText(host), reason(policy.PassHost), "-j RETURN"))
		}
	}
	slices.Sort(rules)
	rules = slices.Compact(rules)
	for _, q := range ranges {
		rules = append(rules, rule(match("-s", q), "-g "+destinationChain))
	}
	return rules
}

// destinations are lines 4 to 8, in their order: the first that matches decides.
func (r *renderer) destinations() []string {
	var rules []string
	if r.f == IPv6 {
		// Neighbor discovery and MLD; to multicast addresses all goes by the list below.
		for _, typ := range []int{130, 131, 132, 133, 134, 135, 136, 137, 143} {
			rules = append(rules, rule("-d fe80::/10", r.f.icmpType(typ), reason(policy.PassMulticast), "-j RETURN"))
		}
	}
	for _, l := range r.p.Lists() {
		rules = append(rules, r.list(l)...)
	}
	return rules
}

// list is a rule with a set, or a rule for each prefix.
func (r *renderer) list(l policy.List) []string {
	set, prefixes := setName(l.Outcome, r.f), r.prefixes(l)
	var rules []string
	rest := prefixes
	if len(prefixes) > 0 && prefixes[0].Bits() == 0 { // a set can't hold it
		rules = append(rules, rule(reason(l.Outcome), "-j RETURN"))
		rest = prefixes[1:]
	}
	switch {
	case set == "" || r.opts.PlainRules:
		for _, q := range rest {
			rules = append(rules, rule("-d "+prefixText(q), reason(l.Outcome), "-j RETURN"))
		}
	case len(rest) > 0:
		rules = append(rules, rule("-m set --match-set "+set+" dst", reason(l.Outcome), "-j RETURN"))
	}
	return rules
}

// prefixes are those of the family, sorted, each once.
func (r *renderer) prefixes(l policy.List) []netip.Prefix {
	var list []netip.Prefix
	for _, rule := range l.Rules {
		if r.f.of(rule.Prefix.Addr()) {
			list = append(list, rule.Prefix)
		}
	}
	slices.SortFunc(list, policy.ComparePrefixes)
	return slices.Compact(list)
}

// setName is empty for a list that needs no set.
func setName(o policy.Outcome, f Family) string {
	name := map[policy.Outcome]string{
		policy.PassNative: "native", policy.PassNonMasq: "nonmasq", policy.PassPod: "pods", policy.PassNode: "nodes",
	}[o]
	if name == "" {
		return ""
	}
	return fmt.Sprintf("%s%s-%d", setPrefix, name, int(f))
}

func (r *renderer) sets() []Set {
	var sets []Set
	for _, l := range r.p.Lists() {
		name, prefixes := setName(l.Outcome, r.f), r.prefixes(l)
		if len(prefixes) > 0 && prefixes[0].Bits() == 0 {
			prefixes = prefixes[1:]
		}
		if name != "" && len(prefixes) > 0 {
			sets = append(sets, Set{name, prefixes})
		}
	}
	return sets
}

// routes are those of the family, the longest first: the first that matches is the longest.
func (r *renderer) routes() []policy.RouteSource {
	var list []policy.RouteSource
	for _, route := range r.p.RouteSources() {
		if r.f.of(route.Prefix.Addr()) {
			list = append(list, route)
		}
	}
	slices.SortStableFunc(list, func(a, b policy.RouteSource) int { return b.Prefix.Bits() - a.Prefix.Bits() })
	return list
}
