// Package agent is the one place where facts, policy and data plane meet.
//
// Run reads options, files and the node's network, builds a policy.Policy of them
// and applies it to the kernel, again and again as they change. ReadStatus tells
// what is in force, from the running agent or, with the agent down, from what it
// left pinned.
//
// Invariants: one goroutine owns all state, so there are no locks around it; the
// watchers only say that something changed. Others see the state as immutable
// Status values. A bad file never changes the policy: the last good state stays.
// What the agent leaves behind keeps working; it never takes the data plane away.
package agent

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/filewatch"
	"bauta.dev/bauta/internal/ipmasq"
)

// Default places of what the agent leaves for others.
const (
	DefaultBPFRoot = "/sys/fs/bpf/bauta"
	DefaultRunDir  = "/run/bauta"
)

// Options says what to run.
type Options struct {
	Config        config.Config
	ConfigSources config.Sources // where Config came from: a later difference needs a restart
	BPFRoot       string         // zero: DefaultBPFRoot
	RunDir        string         // zero: DefaultRunDir; holds agent.sock and policy.json
	Version       string
	Reload        <-chan struct{} // each receive re-reads everything now; nil: never
	Log           *slog.Logger    // zero: no log
}

// Error is an error with remedies. The command line prints "error: ERR", then
// "hint: HINT" lines.
type Error struct {
	Err   error
	Hints []string
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Run runs the agent until ctx is done, then returns nil. The data plane stays.
func Run(ctx context.Context, opt Options) (err error) {
	cfg, root, runDir := opt.Config, orDefault(opt.BPFRoot, DefaultBPFRoot), orDefault(opt.RunDir, DefaultRunDir)
	log := opt.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	datapathLog, devicesLog, filesLog := log.With("component", "datapath"), log.With("component", "devices"), log.With("component", "filewatch")
	log = log.With("component", "agent")
	if err := supported(cfg); err != nil {
		return err
	}
	if _, err := os.Stat(runDir); errors.Is(err, fs.ErrNotExist) {
		defer os.Remove(runDir) // if it is empty: what is refused leaves nothing behind
	}
	if err := prepareRunDir(runDir); err != nil {
		return err
	}
	if err := vacant(runDir); err != nil {
		return err
	}
	kernel, err := datapath.Open(datapath.Options{
		Root: root, Flows: cfg.MaxFlows, DefaultFlows: cfg.Flows(memory()),
		AllowPrivateBPFFS: cfg.AllowPrivateBPFFS, Sentinel: cfg.LeakSentinel, Log: datapathLog,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, kernel.Close()) }()
	listener, err := listen(runDir)
	if err != nil {
		return err
	}
	inspect := func() (inspector, error) { return inspectRoot(root) }
	l := newLoop(cfg, opt, runDir, log)
	if l.earlier, err = readEarlier(inspect, runDir); err != nil {
		log.Warn("state of the last run not read", "error", err)
	}
	l.kernel, l.readNetwork, l.readReserved = kernel, devices.Read, reservedPorts
	l.facts.noIPv6 = !hasIPv6()
	service := newSystemd(os.Getenv)
	defer service.close()
	l.systemd = service
	l.announce()

	log.Info("agent started", "version", opt.Version, "bpf_root", root, "run_dir", runDir)

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return l.run(ctx) })
	group.Go(func() error { return devices.Watch(ctx, devicesLog, l.signals.network.put) })
	watch := func(changed slot, paths ...string) {
		if paths = slices.DeleteFunc(paths, func(p string) bool { return p == "" }); len(paths) == 0 {
			return
		}
		group.Go(func() error {
			return filewatch.Run(ctx, filewatch.Options{Paths: paths, Log: filesLog, Ready: changed.put}, changed.put)
		})
	}
	if cfg.IPMasqAgent {
		watch(l.signals.ipMasq, cfg.IPMasqAgentPath)
	}
	watch(l.signals.nodes, cfg.NodesFile)
	watch(l.signals.options, opt.ConfigSources.File, opt.ConfigSources.Dir)
	group.Go(func() error { return serve(ctx, listener, runDir, l.status(inspect), log) })
	group.Go(func() error {
		<-ctx.Done()
		service.stopping()
		return nil
	})
	if err := group.Wait(); err != nil {
		return err
	}
	log.Info("agent ended, the data plane stays")
	return nil
}

// newLoop is the loop of a configuration, not yet connected to a kernel.
func newLoop(cfg config.Config, opt Options, runDir string, log *slog.Logger) *loop {
	l := &loop{
		cfg: cfg, runDir: runDir, log: log, systemd: &systemd{}, timing: defaultTiming,
		signals: signals{newSlot(), newSlot(), newSlot(), newSlot(), opt.Reload},
		options: &optionFiles{running: cfg, sources: opt.ConfigSources},
		agent:   AgentStatus{State: Running, PID: os.Getpid(), Version: opt.Version, Started: time.Now()},
	}
	l.facts.ports = cfg.Ports(nil) // never empty
	if cfg.IPMasqAgent {
		l.ipMasq = &ipMasqFile{loader: ipmasq.Loader{Path: cfg.IPMasqAgentPath, Profile: ipmasq.Profile(cfg.IPMasqAgentProfile)}}
	}
	if cfg.NodesFile != "" {
		l.nodes = &nodesFile{path: cfg.NodesFile}
	}
	return l
}

// status returns what answers for the status: the last view with what the kernel says now.
func (l *loop) status(inspect func() (inspector, error)) func() (Status, error) {
	return func() (Status, error) {
		k, err := inspect()
		if err != nil {
			return Status{}, err
		}
		defer k.Close()
		return l.published.Load().status(time.Now(), k)
	}
}

// supported refuses options that this release has no code for: none is silently ignored.
func supported(cfg config.Config) error {
	refuse := func(option, remedy string) error {
		return &Error{errors.New(option + ": not in this release"), []string{remedy}}
	}
	switch {
	case !cfg.BPF:
		return refuse("enable-bpf-masquerade=false (iptables mode)", "leave enable-bpf-masquerade at true")
	case cfg.K8s:
		return refuse("enable-k8s", "give the pod range of this node with pod-cidrs, and other nodes with nodes-file")
	}
	return nil
}
