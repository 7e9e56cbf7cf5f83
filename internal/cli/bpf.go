package cli

import (
	"context"

	"github.com/spf13/cobra"

	"bauta.dev/bauta/internal/agent"
)

func (a *app) newBPF() *cobra.Command {
	return group("bpf", "Read the objects in the kernel",
		`Read the objects in the kernel: what the data plane does now, whether an agent
runs or not. In iptables mode they are netfilter's rules, sets and connections.`,
		group("ipmasq", "Destinations that are not masqueraded", "The non-masquerade prefixes of the ip-masq-agent list, as the kernel holds them.", a.newIPMasqList()),
		group("nat", "Masqueraded flows", "The mappings of masqueraded flows, as the kernel holds them.", a.newNATList(), a.newNATFlush()),
		group("node", "Addresses of the other nodes", "The addresses of the other nodes of the cluster, as the kernel holds them.", a.newNodeList()))
}

// list makes the command list, alias ls.
func list(short, long, example string, run func(context.Context) error) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   short,
		Long:    long,
		Example: example,
		Args:    noArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return run(c.Context()) },
	}
}

// inspect opens what is in the kernel, of whichever mode, for run.
func (a *app) inspect(ctx context.Context, run func(agent.Reader) error) error {
	in, err := agent.Inspect(ctx, a.bpfRoot, a.runDir)
	if err != nil {
		return err
	}
	defer in.Close()
	return run(in)
}
