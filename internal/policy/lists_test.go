package policy_test

import (
	"testing"

	"bauta.dev/bauta/internal/policy"
	"bauta.dev/bauta/internal/policy/policytest"
)

// Who asks one list after another finds what Decide says.
func TestListsInOrder(t *testing.T) {
	groups, err := policytest.Load()
	if err != nil {
		t.Fatal(err)
	}
	excluded := 0
	for _, g := range groups {
		p, err := policy.Build(g.Input)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range g.Cases {
			want := p.Decide(c.Packet)
			if o := want.Outcome; o < policy.PassMulticast || o > policy.PassNode || want.Match.String() == "fe80::/10" && o == policy.PassMulticast {
				continue // decided otherwise
			}
			excluded++
			if got := firstList(p, c.Packet); got != want.Outcome {
				t.Errorf("cases.txt:%d: %s: the first list is of %s", c.Line, c.Text, got)
			}
		}
	}
	if excluded < 50 {
		t.Errorf("only %d cases", excluded)
	}
}

func firstList(p *policy.Policy, pkt policy.Packet) policy.Outcome {
	for _, l := range p.Lists() {
		for _, r := range l.Rules {
			if r.Prefix.Contains(pkt.Dst) {
				return l.Outcome
			}
		}
	}
	return policy.Continue
}
