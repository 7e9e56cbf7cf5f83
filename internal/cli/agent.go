package cli

import (
	"context"
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
  bauta agent --config /etc/bauta/config.yaml`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := a.requireRoot(c, "run it with sudo or as a system service; in a container it needs the capabilities BPF, NET_ADMIN and PERFMON",
				"in iptables mode NET_ADMIN and NET_RAW are enough"); err != nil {
				return err
			}
			src := config.Sources{Flags: opts.given(), Environ: a.Environ, File: files.file, Dir: files.dir}
			return a.runAgent(c.Context(), src)
		},
		DisableFlagsInUseLine: true,
	}
	c.Use += " [--OPTION=VALUE]..."
	files.register(c)
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
