package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"sync"
)

// Build checks in and returns the policy for it. in must not be changed afterwards.
// The error names the list and the first value at fault.
func Build(in Input) (*Policy, error) {
	if in.RemoteNodes == "" {
		in.RemoteNodes = RemoteNone
	}
	if in.UnknownProtocols == "" {
		in.UnknownProtocols = UnknownMasquerade
	}
	in.Timeouts = in.Timeouts.withDefaults()
	if err := in.check(); err != nil {
		return nil, err
	}
	p := &Policy{in: in}
	p.indexSources()
	p.indexDestinations()
	p.indexRoutes()
	return p, nil
}

func (p *Policy) indexSources() {
	for _, a := range p.in.HostAddrs {
		a = a.WithZone("")
		p.sources = append(p.sources, Source{netip.PrefixFrom(a, a.BitLen()), PassHost})
	}
	for _, r := range p.in.Sources {
		p.sources = append(p.sources, Source{r.Prefix, Continue})
	}
	// An address of the node comes before a range of the same length (line 2 before 3).
	slices.SortStableFunc(p.sources, func(a, b Source) int {
		return cmp.Or(ComparePrefixes(a.Prefix, b.Prefix), -cmp.Compare(a.Outcome, b.Outcome))
	})
	p.sources = slices.CompactFunc(p.sources, func(a, b Source) bool { return a.Prefix == b.Prefix })
	prefixes := make([]netip.Prefix, len(p.sources))
	for i, s := range p.sources {
		prefixes[i] = s.Prefix
	}
	p.srcIndex = newIndex(prefixes, func(i int) int { return i })
}

// indexDestinations merges the lists of lines 4 to 8 into one longest-prefix
// table. The contract takes the first line that matches, a trie the longest
// prefix: so each entry carries the first line among all entries that contain
// it. An address then finds the first line among everything that contains it.
func (p *Policy) indexDestinations() {
	var rules [lines][]Rule
	for _, q := range always {
		rules[lineMulticast] = append(rules[lineMulticast], Rule{q, "default"})
	}
	for _, d := range p.in.Devices {
		for _, a := range d.Broadcasts {
			rules[lineMulticast] = append(rules[lineMulticast], Rule{netip.PrefixFrom(a, a.BitLen()), "device " + d.Name})
		}
	}
	rules[lineNative] = p.in.Native
	rules[lineNonMasq] = p.in.NonMasq
	rules[linePod] = p.in.Pods

	var mentions []mention
	for _, n := range p.in.Nodes {
		q := netip.PrefixFrom(n.Addr, n.Addr.BitLen())
		mentions = append(mentions, mention{q, ListedNode, Continue})
		if p.exemptNode(n) {
			rules[lineNode] = append(rules[lineNode], Rule{q, n.Origin})
		}
	}
	for line, flag := range [lines]Listed{lineNative: ListedNative, lineNonMasq: ListedNonMasq, linePod: ListedPod} {
		mentions = slices.Grow(mentions, len(rules[line]))
		for _, r := range rules[line] {
			mentions = append(mentions, mention{r.Prefix, flag, lineOutcome[line]})
		}
		p.byLine[line] = sync.OnceValue(func() index[Rule] { return ruleIndex(rules[line]) })
		p.lists[line] = List{lineOutcome[line], rules[line]}
	}
	p.destinations = merge(mentions)
}

// mention is a prefix in one of the lists.
type mention struct {
	prefix  netip.Prefix
	listed  Listed
	outcome Outcome // Continue: none
}

// merge makes one entry of all mentions of a prefix. Sorted, every prefix follows
// those that contain it, so these are on a stack.
func merge(mentions []mention) []Destination {
	slices.SortFunc(mentions, func(a, b mention) int { return ComparePrefixes(a.prefix, b.prefix) })
	merged := make([]Destination, 0, len(mentions))
	var containing []Destination
	for i := 0; i < len(mentions); {
		d := Destination{Prefix: mentions[i].prefix}
		for ; i < len(mentions) && mentions[i].prefix == d.Prefix; i++ {
			d.Listed |= mentions[i].listed
			d.Outcome = earlier(d.Outcome, mentions[i].outcome)
		}
		for len(containing) > 0 && !containing[len(containing)-1].Prefix.Contains(d.Prefix.Addr()) {
			containing = containing[:len(containing)-1]
		}
		if n := len(containing); n > 0 {
			d.Outcome = earlier(d.Outcome, containing[n-1].Outcome)
		}
		containing = append(containing, d)
		merged = append(merged, d)
	}
	return merged
}

// earlier is the outcome of the line that comes first; Continue is none.
func earlier(a, b Outcome) Outcome {
	for _, o := range lineOutcome {
		if a == o || b == o {
			return o
		}
	}
	return Continue
}

func ruleIndex(rules []Rule) index[Rule] {
	prefixes := make([]netip.Prefix, len(rules))
	for i, r := range rules {
		prefixes[i] = r.Prefix
	}
	return newIndex(prefixes, func(i int) Rule { return rules[i] })
}

// indexRoutes keeps one route for each prefix, the first that is mentioned.
func (p *Policy) indexRoutes() {
	p.routeSources = slices.Clone(p.in.RouteSources)
	slices.SortStableFunc(p.routeSources, func(a, b RouteSource) int { return ComparePrefixes(a.Prefix, b.Prefix) })
	p.routeSources = slices.CompactFunc(p.routeSources, func(a, b RouteSource) bool { return a.Prefix == b.Prefix })
	prefixes := make([]netip.Prefix, len(p.routeSources))
	for i, r := range p.routeSources {
		prefixes[i] = r.Prefix
	}
	p.routes = newIndex(prefixes, func(i int) netip.Addr { return p.routeSources[i].Source })
}

// exemptNode tells whether line 8 passes packets to n. An address that is listed
// as internal too counts as internal.
func (p *Policy) exemptNode(n NodeAddr) bool {
	switch p.in.RemoteNodes {
	case RemoteAll:
		return false
	case RemoteExternal:
		return n.Type != ExternalIP
	}
	return true
}

// ComparePrefixes is the order of every list of prefixes that users see: IPv4
// before IPv6, ascending by address, then by length.
func ComparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// Input returns what the policy was built from; the caller must not change it.
func (p *Policy) Input() Input { return p.in }

// Lists are the exclusions by destination, as written and in the order of the
// contract: the first list that holds an address decides about it. For a renderer
// that can ask one list after another; Destinations is for those that can't.
func (p *Policy) Lists() []List { return p.lists[:] }

// Sources is the longest-prefix table by source, sorted.
func (p *Policy) Sources() []Source { return p.sources }

// Destinations is the longest-prefix table by destination, sorted.
func (p *Policy) Destinations() []Destination { return p.destinations }

// RouteSources is the longest-prefix table of routes by destination, sorted. A
// zero Source means the address of the egress device.
func (p *Policy) RouteSources() []RouteSource { return p.routeSources }
