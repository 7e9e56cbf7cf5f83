package cli

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/config"
)

func (a *app) newAgent() *cobra.Command {
	opts := newOptionFlags()
	var files sourceFlags
	var dryRun bool
	c := &cobra.Command{
		Use:   "agent",
		Short: "Run the node agent in the foreground",
		Long: `Run the node agent in the foreground.

The agent reads its options, the ip-masq-agent file, and the devices, addresses
and routes of the node, and makes the data plane in the kernel follow them as
they change. It needs root.

Each option comes from the highest of these that gives it: the flag, the
environment variable BAUTA_<OPTION_IN_CAPITALS>, the file of --config, the
directory of --config-dir, the default.

SIGTERM and SIGINT end the agent, and the data plane goes on working without it.
SIGHUP reads the files again at once; they are watched anyway.`,
		Example: `  # masquerade the pods of this node, except towards the ip-masq-agent list
  bauta agent --pod-cidrs 10.0.0.0/16 --enable-ip-masq-agent

  # a router, VM or container host: masquerade all it forwards
  bauta agent --masquerade-forwarded

  # options from a file
  bauta agent --config /etc/bauta/config.yaml

  # take the place of ip-masq-agent; first see what that would do
  bauta agent --config /etc/bauta/config.yaml --take-over IP-MASQ-AGENT --dry-run
  bauta agent --config /etc/bauta/config.yaml --take-over IP-MASQ-AGENT`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := a.requireRoot(c, "run it with sudo or as a system service; in a container it needs the capabilities BPF, NET_ADMIN and PERFMON",
				"in iptables mode NET_ADMIN and NET_RAW are enough"); err != nil {
				return err
			}
			src := config.Sources{Flags: opts.given(), Environ: a.Environ, File: files.file, Dir: files.dir}
			if dryRun {
				return a.planTakeOver(c, src)
			}
			return a.runAgent(c.Context(), src)
		},
		DisableFlagsInUseLine: true,
	}
	c.Use += " [--OPTION=VALUE]..."
	files.register(c)
	c.Flags().BoolVar(&dryRun, "dry-run", false, "with --take-over: say what that would do, and change nothing")
	opts.register(c)
	return c
}

func (a *app) runAgent(ctx context.Context, src config.Sources) error {
	cfg, err := config.Load(src)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once

	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	return agent.Run(ctx, agent.Options{
		Config:        cfg,
		ConfigSources: src,
		BPFRoot:       a.bpfRoot,
		RunDir:        a.runDir,
		Version:       a.version().Version,
		Reload:        reloads(ctx, hup),
		Log:           newLog(a.Stderr, cfg),
	})
}

// planTakeOver prints what a take-over would do.
func (a *app) planTakeOver(c *cobra.Command, src config.Sources) error {
	cfg, err := config.Load(src)
	if err != nil {
		return err
	}
	if cfg.TakeOver == "" {
		return &usageError{msg: c.CommandPath() + ": --dry-run is for --take-over, and nothing is named to be taken over",
			hints: []string{"bauta status names rules of others that masquerade the source ranges"}}
	}
	plan, err := agent.PlanTakeOver(c.Context(), agent.Options{Config: cfg, BPFRoot: a.bpfRoot, RunDir: a.runDir})
	if err != nil {
		return err
	}
	return a.print(planText(plan))
}

func planText(p agent.TakeOverPlan) string {
	var b strings.Builder
	if len(p.Found) == 0 {
		fmt.Fprintf(&b, "Nothing is left to be taken over: no chain and no rule %s\n", p.Name)
		return b.String()
	}
	b.WriteString("Found:\n")
	for _, r := range p.Found {
		fmt.Fprintf(&b, "  %s\n", r)
	}
	b.WriteString("Connections:\n")
	if p.Mode == agent.ModeBPF {
		fmt.Fprintf(&b, "  %d would be imported\n  %d would drain: they go on with netfilter until they end\n", p.Import, p.Drain)
	} else {
		fmt.Fprintf(&b, "  0 would be imported\n  %d would go on with netfilter as they are, none drains\n", p.Drain)
	}
	b.WriteString("Would be removed, when the new side is at work:\n")
	for _, r := range p.Removals {
		fmt.Fprintf(&b, "  %s\n", r)
	}
	for _, w := range p.Warnings {
		fmt.Fprintf(&b, "Warning: %s\n", w)
	}
	b.WriteString("Nothing was changed\n")
	return b.String()
}

// reloads turns SIGHUP into receives for the agent; several at once are one.
func reloads(ctx context.Context, hup <-chan os.Signal) <-chan struct{} {
	reload := make(chan struct{}, 1)
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-hup:
			}
			select {
			case reload <- struct{}{}:
			default:
			}
		}
	}()
	return reload
}

func newLog(w io.Writer, cfg config.Config) *slog.Logger {
	opts := &slog.HandlerOptions{Level: cfg.LogLevel}
	if strings.EqualFold(cfg.LogFormat, "json") {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// sourceFlags are where options come from besides flags and environment.
type sourceFlags struct{ file, dir string }

func (s *sourceFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&s.file, "config", "", "YAML `file` with option names as keys")
	c.Flags().StringVar(&s.dir, "config-dir", "", "`directory` with a file per option, as a mounted ConfigMap is")
	_ = c.MarkFlagDirname("config-dir")
}
