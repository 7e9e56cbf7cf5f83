package cli

import (
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"bauta.dev/bauta/internal/demo"
)

func (a *app) newDemo() *cobra.Command {
	var keep bool
	c := &cobra.Command{
		Use:   "demo",
		Short: "Prove the main job in network namespaces on this machine",
		Long: `Build a pod, a node and a server in network namespaces, start the agent in the
node, send TCP, UDP and ICMP in both families, and show what the server saw:
the node's address, or the pod's towards an excluded destination. Then edit the
ip-masq-agent file while the agent runs.

Nothing on the host changes, and nothing is left behind. It takes some seconds.`,
		Example: `  sudo bauta demo
  sudo bauta demo --keep`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(c.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			return demo.Run(ctx, demo.Options{Out: a.Stdout, Keep: keep})
		},
		DisableFlagsInUseLine: true,
	}
	c.Flags().BoolVar(&keep, "keep", false, "leave the namespaces and the agent, and say how to use and remove them")
	return c
}
