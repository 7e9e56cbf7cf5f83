package iptables

import (
	"context"
	"fmt"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// The kernel lists rules in the words in which Render writes them.
func TestRenderedTextIsTheKernels(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		for name, p := range goldenPolicies(t) {
			for _, random := range []bool{false, true} {
				o.RandomFully = random
				n := tables(t, labtest.NewNS(t), o)
				n.apply(p)
				for f, a := range n.tables.last {
					for table, chains := range a.listed {
						for chain, rules := range chains {
							t.Errorf("%s: %s: %s: %s is listed as\n%s", name, f, table, chain, rules)
						}
					}
				}
				n.right()
			}
		}
	})
}

func TestApplyCheckRemove(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		n.apply(build(t, func(in *policy.Input) { in.NonMasq = rules("10.0.0.0/8", "fd00::/8") }))
		n.right()
		for _, f := range families { // as an agent leaves them that dies while it looks whether there are sets
			n.do(func() error { return createSet(fmt.Sprintf("bauta-probe-%d", int(f)), f, 0) })
		}
		for range 2 {
			n.do(func() error {
				removed, err := Remove(context.Background(), o)
				t.Log(removed)
				return err
			})
		}
		for _, f := range families {
			if left := ours(n.run(n.ipt(f, "-save"))); len(left) > 0 {
				t.Errorf("left: %s", left)
			}
		}
		if left := n.run("ipset", "list", "-n"); left != "" {
			t.Errorf("left: %s", left)
		}
	})
}
