package cli

import (
	"context"
	"net/netip"
	"slices"

	"github.com/spf13/cobra"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/policy"
)

func (a *app) newIPMasqList() *cobra.Command {
	var f *format
	c := list("List the destinations that are not masqueraded",
		`List the non-masquerade prefixes of the ip-masq-agent list, as the kernel holds
them: in iptables mode in sets, or in rules without ipset. Those of a family that
is off are not listed.`,
		`  bauta bpf ipmasq list
  bauta bpf ipmasq list -o json`,
		func(ctx context.Context) error {
			return a.inspect(ctx, func(in agent.Reader) error {
				prefixes, err := in.Exclusions()
				if err != nil {
					return err
				}
				slices.SortFunc(prefixes, policy.ComparePrefixes)
				return showList(a, *f, prefixes, prefixText)
			})
		})
	f = outputFlag(c)
	return c
}

func prefixText(prefixes []netip.Prefix) string {
	rows := [][]string{{"IP PREFIX/ADDRESS"}}
	for _, p := range prefixes {
		rows = append(rows, []string{p.String()})
	}
	return table(rows...)
}
