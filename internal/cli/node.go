package cli

import (
	"cmp"
	"context"
	"net/netip"
	"slices"

	"github.com/spf13/cobra"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/policy"
)

// nodeAddr is a line of bpf node list. The kernel knows the address only; name
// and type are the agent's, and may be unknown.
type nodeAddr struct {
	Address netip.Addr      `json:"address"`
	Node    string          `json:"node"`
	Type    policy.NodeType `json:"type"`
}

func (a *app) newNodeList() *cobra.Command {
	var f *format
	c := list("List the addresses of the other nodes",
		`List the addresses of the other nodes of the cluster, as the kernel holds them,
with the names that the agent knew them by.`,
		`  bauta bpf node list
  bauta bpf node ls -o yaml`,
		func(ctx context.Context) error {
			return a.inspect(ctx, func(in agent.Reader) error {
				addrs, err := in.NodeAddrs()
				if err != nil {
					return err
				}
				// Without the file the list is still true, but for the names.
				file, _ := agent.ReadPolicyFile(a.runDir)
				return showList(a, *f, nameNodes(addrs, file.Nodes), nodeText)
			})
		})
	f = outputFlag(c)
	return c
}

// nameNodes gives each address the names it has; one that has several is several
// lines.
func nameNodes(addrs []netip.Addr, known []policy.NodeAddr) []nodeAddr {
	names := make(map[netip.Addr][]nodeAddr)
	for _, n := range known {
		names[n.Addr] = append(names[n.Addr], nodeAddr{n.Addr, n.Node, n.Type})
	}
	var nodes []nodeAddr
	for _, addr := range addrs {
		if len(names[addr]) == 0 {
			nodes = append(nodes, nodeAddr{Address: addr})
		}
		nodes = append(nodes, names[addr]...)
	}
	slices.SortFunc(nodes, func(a, b nodeAddr) int {
		return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Node, b.Node), cmp.Compare(a.Type, b.Type))
	})
	return slices.Compact(nodes)
}

func nodeText(nodes []nodeAddr) string {
	rows := [][]string{{"IP ADDRESS", "NODE", "TYPE"}}
	for _, n := range nodes {
		rows = append(rows, []string{n.Address.String(), cmp.Or(n.Node, "-"), cmp.Or(string(n.Type), "-")})
	}
	return table(rows...)
}
