package datapath

import (
	"net/netip"
	"slices"

	"bauta.dev/bauta/internal/policy"
)

// removal is a prefix that was an exclusion. Answers to what left untranslated go on
// coming for some time: a pod's flow that is new now must not look opened from outside.
type removal struct {
	prefix netip.Prefix
	until  uint32 // second of the monotonic clock
}

// removals returns what p, or a policy within the timer of UDP streams before it, does
// not exclude any more, the latest ones last.
func (d *Datapath) removals(p *policy.Policy, active uint32) ([]removal, error) {
	now, err := monotonicSeconds()
	if err != nil {
		return nil, err
	}
	var before []netip.Prefix
	var removed []removal
	if d.applied != nil {
		before, removed = exclusions(d.applied.policy), d.applied.removed
	} else if before, removed, err = d.removalsInForce(active); err != nil {
		// A table that is damaged must not keep the policy from the kernel.
		d.opt.Log.Warn("can't tell which exclusions are removed", "error", err)
	}
	excluded := exclusions(p)
	var out []removal
	for _, r := range removed {
		if _, again := slices.BinarySearchFunc(excluded, r.prefix, policy.ComparePrefixes); int32(r.until-now) > 0 && !again {
			out = append(out, r)
		}
	}
	until := now + renderTimers(p.Input().Timeouts)[timerUDPStream]
	// Both are sorted: in a large cluster a table of them would be half of the work.
	for _, q := range before {
		for len(excluded) > 0 && policy.ComparePrefixes(excluded[0], q) < 0 {
			excluded = excluded[1:]
		}
		if len(excluded) == 0 || excluded[0] != q {
			out = append(out, removal{q, until})
		}
	}
	// The earliest go if that is more than a table holds; one row is not ours.
	return out[max(0, len(out)-int(d.trie.MaxEntries)+1):], nil
}

// exclusions are the prefixes towards which packets leave untranslated, sorted.
func exclusions(p *policy.Policy) []netip.Prefix {
	var out []netip.Prefix
	for _, d := range p.Destinations() {
		if d.Outcome != policy.Continue {
			out = append(out, d.Prefix)
		}
	}
	return out
}

// removalsInForce reads what an earlier agent left: the exclusions, and what it had
// removed from them.
func (d *Datapath) removalsInForce(active uint32) (before []netip.Prefix, removed []removal, err error) {
	dir := d.pins
	if active == noGeneration {
		if d.old == nil {
			return nil, nil, nil
		}
		dir = d.opt.Root // tables of another layout
	}
	i, err := Inspect(dir)
	if err != nil {
		return nil, nil, err
	}
	defer i.Close()
	some := func(r masqRule) bool { return r.Outcome != uint8(policy.Continue) }
	if before, err = i.prefixes(trieDestination, some); err != nil {
		return nil, nil, err
	}
	s, err := i.setting()
	if err != nil || s == nil || s.RemovedUntil == 0 {
		return before, nil, err
	}
	late, err := i.prefixes(trieRemoved, some)
	for _, q := range late {
		removed = append(removed, removal{q, s.RemovedUntil})
	}
	return before, removed, err
}

// lastUntil is the second from which none of them matters any more.
func lastUntil(removed []removal) uint32 {
	if len(removed) == 0 {
		return 0
	}
	return slices.MaxFunc(removed, func(a, b removal) int { return int(int32(a.until - b.until)) }).until
}
