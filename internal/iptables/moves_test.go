package iptables

import (
	"context"
	"net/netip"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// lists are the native, non-masquerade and pod prefixes of a policy.
type lists [3][]string

func (l lists) build(t *testing.T) *policy.Policy {
	return build(t, func(in *policy.Input) {
		in.IPv6 = false
		in.Native, in.NonMasq, in.Pods = rules(l[0]...), rules(l[1]...), rules(l[2]...)
	})
}

// excludes tells whether one of the lists has a.
func (l lists) excludes(a netip.Addr) bool {
	return slices.ContainsFunc(slices.Concat(l[:]...), func(s string) bool { return netip.MustParsePrefix(s).Contains(a) })
}

// excludedNow tells the same of the kernel.
func excludedNow(t *testing.T, o Options) func(a netip.Addr) bool {
	i, err := Inspect(context.Background(), o)
	if err != nil {
		t.Error(err)
		return func(netip.Addr) bool { return true }
	}
	var all []netip.Prefix
	for _, outcome := range []policy.Outcome{policy.PassNative, policy.PassNonMasq, policy.PassPod} {
		list, err := i.listed(outcome)
		if err != nil {
			t.Error(err)
		}
		all = append(all, list...)
	}
	return func(a netip.Addr) bool {
		return slices.ContainsFunc(all, func(p netip.Prefix) bool { return p.Contains(a) })
	}
}

// What two policies exclude is excluded at each moment of the change from one to the other,
// and what both masquerade is masqueraded.
func TestPrefixThatMovesIsAlwaysExcluded(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		steps := []lists{
			{{"20.0.0.0/16", "20.1.0.0/16"}, {"20.2.0.0/16", "20.3.0.0/16"}, nil},
			{{"20.1.0.0/16"}, {"20.0.0.0/16", "20.2.0.0/16", "20.3.0.0/16"}, nil},               // moves
			{{"20.2.0.0/16", "20.3.0.0/16"}, {"20.0.0.0/16", "20.1.0.0/16"}, nil},               // both ways
			{{"20.2.0.0/16"}, {"20.0.0.0/16"}, {"20.1.0.0/16", "20.3.0.0/16"}},                  // into a new set
			{{"20.2.0.0/16"}, {"20.0.0.0/16"}, {"20.1.0.0/16"}},                                 // one only shrinks
			{{"20.1.0.0/17", "20.1.128.0/17"}, {"20.0.0.0/16"}, {"20.2.0.0/16"}},                // in parts
			{{"20.1.128.0/17"}, {"0.0.0.0/0"}, {"20.4.0.0/16"}},                                 // into a rule
			{{"20.1.128.0/17", "20.0.0.0/16"}, {"20.2.0.0/16"}, {"20.4.0.0/16", "20.3.0.0/16"}}, // out of it
			{{"20.4.0.0/16"}, {"20.2.0.0/16"}, nil},                                             // a set goes
		}
		r := labtest.Rand(t)
		for range 10 {
			var l lists
			for _, p := range []string{"20.0.0.0/16", "20.1.0.0/16", "20.2.0.0/16", "20.3.0.0/16", "20.3.0.0/17", "20.4.0.0/15"} {
				if i := r.IntN(5); i < len(l) {
					l[i] = append(l[i], p)
				}
			}
			steps = append(steps, l)
		}
		n := tables(t, labtest.NewNS(t), o)
		n.apply(steps[0].build(t))
		for i, now := range steps[1:] {
			before, writes := steps[i], 0
			n.tables.step = func() {
				writes++
				excluded := excludedNow(t, o)
				for _, s := range []string{"20.0.0.1", "20.1.0.1", "20.1.128.1", "20.2.0.1", "20.3.0.1", "20.3.128.1", "20.4.0.1", "20.5.0.1", "20.6.0.1"} {
					a := netip.MustParseAddr(s)
					if want := now.excludes(a); want == before.excludes(a) && want != excluded(a) {
						t.Errorf("from %v to %v: after write %d: %s: excluded %v, want %v", before, now, writes, a, !want, want)
					}
				}
			}
			n.apply(now.build(t))
			n.right()
		}
	})
}
