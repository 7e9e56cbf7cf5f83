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
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/filewatch"
	"bauta.dev/bauta/internal/ipmasq"
	"bauta.dev/bauta/internal/iptables"
	"bauta.dev/bauta/internal/nodes"
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

// Error is an error with remedies.
type Error = advice.Error

// Run runs the agent until ctx is done, then returns nil. The data plane stays.
func Run(ctx context.Context, opt Options) (err error) {
	cfg, root, runDir := opt.Config, orDefault(opt.BPFRoot, DefaultBPFRoot), orDefault(opt.RunDir, DefaultRunDir)
	log := opt.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	datapathLog, devicesLog, filesLog, nodesLog := log.With("component", "datapath"), log.With("component", "devices"), log.With("component", "filewatch"), log.With("component", "nodes")
	log = log.With("component", "agent")
	if err := checkPrivilege(cfg.BPF); err != nil {
		return err
	}
	kube, err := openKube(cfg, opt.Version, nodesLog)
	if err != nil {
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
	l := newLoop(cfg, opt, runDir, log)
	if err := l.open(ctx, root, kube, datapathLog); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.kernel.Close()) }()
	listener, err := listen(runDir)
	if err != nil {
		return err
	}
	l.readNetwork, l.readReserved, l.readForeign = devices.Read, reservedPorts, foreign
	l.facts.noIPv6 = !hasIPv6()
	if kube != nil {
		l.kube, l.event = kube, kube.Event
	}
	web, err := l.newHTTP()
	if err != nil {
		return err
	}
	service := newSystemd(os.Getenv)
	defer service.close()
	l.systemd = service
	l.announce()

	log.Info("agent started", "version", opt.Version, "mode", modeOf(cfg.BPF), "bpf_root", root, "run_dir", runDir)

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return l.run(ctx) })
	group.Go(func() error { return devices.Watch(ctx, devicesLog, l.signals.network.put) })
	if kube != nil {
		group.Go(func() error { return kube.Watch(ctx, l.signals.kube.put) })
		group.Go(func() error { return kube.RunEvents(ctx) })
		group.Go(func() error { return l.taintLifter(ctx, kube.LiftTaint) })
	}
	l.watchFiles(ctx, group, filesLog)
	group.Go(func() error { return serve(ctx, listener, runDir, l.status(web), log) })
	if web != nil {
		group.Go(func() error { web.run(ctx); return nil })
	}
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

// watchFiles says when a file changes that the configuration names, or that it came from.
func (l *loop) watchFiles(ctx context.Context, group *errgroup.Group, log *slog.Logger) {
	watch := func(changed slot, paths ...string) {
		if paths = slices.DeleteFunc(paths, func(p string) bool { return p == "" }); len(paths) == 0 {
			return
		}
		group.Go(func() error {
			return filewatch.Run(ctx, filewatch.Options{Paths: paths, Log: log, Ready: changed.put}, changed.put)
		})
	}
	if l.cfg.IPMasqAgent {
		watch(l.signals.ipMasq, l.cfg.IPMasqAgentPath)
	}
	watch(l.signals.nodes, l.cfg.NodesFile)
	watch(l.signals.options, l.options.sources.File, l.options.sources.Dir)
}

// open takes possession of what the mode has in the kernel, and reads what an earlier
// agent left, of either mode. A data plane of the other mode is taken over from: see
// changeover.
func (l *loop) open(ctx context.Context, root string, kube *nodes.Client, log *slog.Logger) error {
	own, err := ownSources(ctx, l.cfg, kube, l.runDir)
	if err != nil {
		return err
	}
	if l.taking, err = findTakeOver(ctx, l.cfg, own, root, l.runDir, l.log); err != nil {
		return err
	}
	open := l.openRules
	if l.cfg.BPF {
		open = l.openPrograms
	}
	if err := open(ctx, root, log); err != nil {
		return err
	}
	if l.earlier, err = readEarlier(func() (inspector, error) { return inspectNode(ctx, root, l.runDir) }, l.runDir); err != nil {
		l.log.Warn("state of the last run not read", "error", err)
	}
	if l.changeover != nil {
		l.kernel, l.flows = l.changeover, l.changeover
		if d := l.earlier.draining(); d != nil && d.Mode == l.changeover.old.mode() {
			l.changeover.begun, l.changeover.addrs = d.Since, d.Addresses
		}
	}
	if l.taking != nil && !l.cfg.BPF {
		l.kernel = &taking{backend: l.kernel, from: l.taking}
	}
	return nil
}

func (l *loop) openPrograms(ctx context.Context, root string, log *slog.Logger) error {
	old, err := iptables.Inspect(ctx, iptables.Options{})
	if err != nil && !isNone(err) {
		return fmt.Errorf("look for iptables mode: %w", err)
	}
	if err != nil {
		if err := l.outOfSight(unseen(ctx)); err != nil {
			return err
		}
	}
	kernel, openErr := openDatapath(datapath.Options{
		Root: root, Flows: l.cfg.MaxFlows, DefaultFlows: l.cfg.Flows(memory()),
		AllowPrivateBPFFS: l.cfg.AllowPrivateBPFFS, Sentinel: l.cfg.LeakSentinel, Log: log,
	})
	if openErr != nil {
		return openErr
	}
	l.kernel, l.flows = bpf{kernel}, kernel
	l.inspect = func() (inspector, error) { return inspectRoot(root) }
	var from iptables.Backend
	switch {
	case err == nil:
		from = old.Backend()
	case l.taking != nil:
		from = l.taking.named.Backend
	default:
		return nil // no rules
	}
	var change error
	if l.changeover, change = l.replaceRules(ctx, kernel, from, log); change != nil {
		return errors.Join(change, kernel.Close())
	}
	if err != nil {
		l.changeover.taking = l.taking
	}
	return nil
}

// outOfSight refuses to attach programs behind rules of iptables mode that nothing here can show:
// those would go on masquerading first, by the last list, and nobody would know. hidden says
// which can't be shown.
func (l *loop) outOfSight(hidden []string) error {
	file, err := ReadPolicyFile(l.runDir)
	if err != nil || file.Mode != ModeIPTables || len(hidden) == 0 {
		return nil
	}
	return advice.New(fmt.Errorf("iptables mode was in force on this node: %s", strings.Join(hidden, "; ")),
		"install the package iptables, or take the image's iptables variant, until nothing drains any more (in the chart: image.variant=iptables)",
		"or stay in iptables mode: enable-bpf-masquerade=false")
}

func (l *loop) openRules(ctx context.Context, root string, log *slog.Logger) error {
	kernel, err := openNetfilter(ctx, l.cfg, "", log)
	if err != nil {
		return err
	}
	l.kernel = kernel
	l.inspect = func() (inspector, error) { return inspectRules(ctx, nil) }
	if file, err := ReadPolicyFile(l.runDir); err == nil {
		kernel.expect(file)
	}
	old, err := inspectRoot(root)
	if isNone(err) {
		return nil
	}
	if err == nil {
		old.Close()
		l.changeover, err = l.replacePrograms(kernel, root, log)
	}
	if err != nil {
		return errors.Join(err, kernel.Close())
	}
	return nil
}

// foreign looks for rules of others in this network namespace.
func foreign(ctx context.Context, sources []netip.Prefix) ([]iptables.ForeignRule, error) {
	return iptables.Foreign(ctx, iptables.Options{}, sources)
}

// newLoop is the loop of a configuration, not yet connected to a kernel.
func newLoop(cfg config.Config, opt Options, runDir string, log *slog.Logger) *loop {
	l := &loop{
		cfg: cfg, runDir: runDir, log: log, systemd: &systemd{}, timing: defaultTiming,
		signals: signals{newSlot(), newSlot(), newSlot(), newSlot(), newSlot(), newSlot(), opt.Reload},
		options: &optionFiles{running: cfg, sources: opt.ConfigSources},
		agent:   AgentStatus{State: Running, PID: os.Getpid(), Version: opt.Version, Started: time.Now()},
	}
	l.reloads.LastAccepted = l.agent.Started
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
func (l *loop) status(web *httpServer) func() (Status, error) {
	return func() (Status, error) {
		v := *l.published.Load()
		v.agent.HTTPError = web.problem()
		k, err := l.inspect()
		switch {
		case isNone(err): // rules are there from the first apply on
			k = nil
		case err != nil:
			return Status{}, err
		default:
			defer k.Close()
		}
		s, err := v.status(time.Now(), k)
		s.Kubernetes = kubeStatus(l.cfg, l.kube)
		return s, err
	}
}

// openKube is nil without Kubernetes.
func openKube(cfg config.Config, version string, log *slog.Logger) (*nodes.Client, error) {
	if !cfg.K8s {
		return nil, nil
	}
	return nodes.Open(nodes.Options{
		Kubeconfig: cfg.Kubeconfig, NodeName: cfg.NodeName, UserAgent: "bauta/" + orDefault(version, "unknown"), Log: log,
	})
}
