package policy_test

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/policy"
	"bauta.dev/bauta/internal/policy/policytest"
)

// decided is every outcome that Decide can give, by number. The others need a packet's
// bytes, a known flow or a full table.
var decided = []policy.Outcome{
	policy.PassDisabled, policy.PassHost, policy.PassSource, policy.PassMulticast, policy.PassNative,
	policy.PassNonMasq, policy.PassPod, policy.PassNode, policy.PassInbound, policy.PassProtocol, policy.PassDevice,
	policy.MasqNew, policy.DropBadHeader, policy.DropNoAddress, policy.DropProtocol, policy.DropStray,
}

func TestTable(t *testing.T) {
	groups, err := policytest.Load()
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[policy.Outcome]bool)
	for _, g := range groups {
		t.Run(g.Name, func(t *testing.T) {
			p, err := policy.Build(g.Input)
			if err != nil {
				t.Fatalf("cases.txt:%d: %v", g.Line, err)
			}
			var addrs []netip.Addr
			for _, c := range g.Cases {
				addrs = append(addrs, c.Packet.Src, c.Packet.Dst)
				got := p.Decide(c.Packet)
				if err := c.Check(got); err != nil {
					t.Error(err)
				}
				if c.Want.Match.IsValid() && !got.Match.IsValid() {
					t.Errorf("cases.txt:%d: %s: no match reported", c.Line, c.Text)
				}
				seen[got.Outcome] = true
			}
			checkTables(t, g.Input, p, addrs)
		})
	}
	if got := slices.Sorted(maps.Keys(seen)); !slices.Equal(got, decided) {
		t.Errorf("outcomes of the table:\n got %v\nwant %v", got, decided)
	}
}
