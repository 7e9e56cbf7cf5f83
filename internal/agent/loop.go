package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync/atomic"
	"time"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/iptables"
	"bauta.dev/bauta/internal/metrics"
	"bauta.dev/bauta/internal/nodes"
	"bauta.dev/bauta/internal/policy"
)

// slot holds the news that something changed, once however often it did.
type slot chan struct{}

func newSlot() slot { return make(slot, 1) }

func (s slot) put() {
	select {
	case s <- struct{}{}:
	default:
	}
}

// signals are what the watchers tell the loop.
type signals struct {
	network, ipMasq, nodes, options, kube slot
	taint                                 slot // from the loop: the start-up taint is to be lifted
	reload                                <-chan struct{}
}

// timing of the loop; tests shorten it.
type timing struct {
	health   time.Duration // how often to look whether devices are still attached
	patience time.Duration // after that systemd goes on, with or without a policy
	confirm  time.Duration // after news of files, when they are read once more
	resync   time.Duration // how often everything is checked without any news
	sweep    time.Duration
	retry    time.Duration // first pause after an error; doubles
	maxRetry time.Duration
}

var defaultTiming = timing{
	health:   500 * time.Millisecond,
	patience: 45 * time.Second, // less than TimeoutStartSec of the unit
	confirm:  500 * time.Millisecond,
	resync:   30 * time.Second,
	sweep:    5 * time.Second,
	retry:    250 * time.Millisecond,
	maxRetry: 30 * time.Second,
}

// loop owns all state of the agent. Only published is for others.
type loop struct {
	cfg     config.Config
	runDir  string
	log     *slog.Logger
	systemd *systemd
	timing  timing
	signals signals

	kernel       backend
	flows        flowKeeper                // nil: netfilter keeps them
	changeover   *changeover               // nil: there was nothing of the other mode
	taking       *takeOver                 // nil: of nothing
	inspect      func() (inspector, error) // what kernel made
	readNetwork  func() (devices.Snapshot, error)
	readReserved func() ([]config.PortRange, error)
	kube         cluster                                                               // nil: without Kubernetes
	readForeign  func(context.Context, []netip.Prefix) ([]iptables.ForeignRule, error) // nil: never
	earlier      earlier

	ipMasq  *ipMasqFile // nil: off
	nodes   *nodesFile  // nil: none
	options *optionFiles

	facts    facts
	reserved []config.PortRange // ip_local_reserved_ports
	stale    stale              // what of the facts is to be read again
	force    bool               // apply even if nothing changed
	news     bool               // a file was another than at its last reading

	wanted     wanted
	inForce    *wanted    // nil: nothing applied by this agent
	written    PolicyFile // policy.json as it is
	writeErr   error
	agent      AgentStatus
	attempted  bool
	retry      time.Duration // pause after the last error; zero: there was none
	sweepErr   error
	walking    bool        // a walk through the flow tables is under way
	walkAgain  bool        // and another is wanted
	nextWalk   time.Time   // not before, by the clock alone
	walked     chan walked // its result
	foreign    foreignRules
	event      func(nodes.Event) // nil: without Kubernetes
	told       moment            // what Events were made of
	kubeSynced bool              // it was known once
	waitSaid   string            // to the log, of what it waits for
	kubeNews   bool              // the cluster has changed
	nextKube   time.Time         // not before, for a change of the cluster
	portsError string            // why the pool is not what it should be
	warned     []string          // that the log has

	reloads metrics.Reloads

	published atomic.Pointer[view]
	walks     atomic.Pointer[metrics.Walks] // nil: none has ended yet
	turned    pulse
}

// stale says which facts have to be read again.
type stale struct{ network, reserved, ipMasq, nodes, options, kube bool }

var allStale = stale{true, true, true, true, true, true}

// clocks are what wakes the loop without news.
type clocks struct {
	due                   *time.Timer // reconcile
	resync, sweep, health *time.Ticker
	patience              *time.Timer
	alive                 <-chan time.Time // nil: nobody watches
	// A file may be read while somebody writes it, and be as the watcher knew it when
	// that looks: then there is no news of what it holds now. So it is read again
	// when the watcher has looked (it does so within 200 ms), until it is as before.
	confirm *time.Timer
	kube    *time.Timer // what the cluster says is to be read
}

// soon: the watchers have collected bursts.
func (c *clocks) soon() { c.due.Reset(0) }

// run reconciles until ctx is done.
func (l *loop) run(ctx context.Context) error {
	c := clocks{
		due: time.NewTimer(0), confirm: time.NewTimer(l.timing.confirm), patience: time.NewTimer(l.timing.patience),
		resync: time.NewTicker(l.timing.resync), sweep: time.NewTicker(l.timing.sweep), health: time.NewTicker(l.timing.health),
	}
	c.confirm.Stop()
	c.kube = time.NewTimer(0)
	c.kube.Stop()
	if l.systemd.watchdog > 0 {
		c.alive = time.Tick(l.systemd.watchdog)
	}
	l.walked = make(chan walked, 1)
	defer l.awaitWalk()
	l.foreign.found, l.foreign.due = make(chan foreignFound, 1), true
	defer l.awaitForeign()
	l.stale, l.force = allStale, true
	for ctx.Err() == nil {
		l.turned.beat()
		l.next(ctx, &c)
	}
	return nil
}

// next waits for news or a clock, and does what is due then.
func (l *loop) next(ctx context.Context, c *clocks) {
	fileNews := func(stale *bool) {
		*stale = true
		c.confirm.Reset(l.timing.confirm)
		c.soon()
	}
	select {
	case <-ctx.Done():
	case <-l.signals.network:
		l.stale.network = true
		c.soon()
	case <-l.signals.ipMasq:
		fileNews(&l.stale.ipMasq)
	case <-l.signals.nodes:
		fileNews(&l.stale.nodes)
	case <-l.signals.options:
		fileNews(&l.stale.options)
	case <-l.signals.kube:
		c.kube.Reset(max(0, time.Until(l.nextKube)))
	case <-c.kube.C:
		l.stale.kube, l.kubeNews = true, true
		c.soon()
	case <-c.confirm.C:
		l.stale.ipMasq, l.stale.nodes, l.stale.options = true, true, true
		c.soon()
	case <-c.resync.C:
		l.stale, l.force, l.foreign.due = allStale, true, true
		l.countNoPort()
		c.soon()
	case <-c.health.C:
		// A detached link makes no news, unlike a removed qdisc, and neither do
		// rules. Packets leak until they are back.
		if l.damaged(ctx) {
			l.stale.network, l.force = true, true
			c.soon()
		}
	case <-c.patience.C:
		if !l.agent.Ready {
			l.log.Warn("no policy in force yet, the service manager may go on", "after", l.timing.patience)
			l.systemd.ready()
		}
	case <-l.signals.reload:
		l.systemd.reloading()
		l.log.Info("reloading")
		l.stale, l.force = allStale, true
		c.confirm.Reset(l.timing.confirm)
		l.reconcile(ctx, c.due)
		l.systemd.reloaded()
	case <-c.due.C:
		used, first := cpuTime(), l.inForce == nil // which loads the programs
		l.reconcile(ctx, c.due)
		if l.kubeNews && !first {
			l.nextKube = time.Now().Add(kubePause(cpuTime() - used))
		}
		l.kubeNews = false
		if l.news {
			l.news = false
			c.confirm.Reset(l.timing.confirm)
		}
	case <-c.sweep.C:
		if (l.flows != nil || l.sweepErr != nil) && !time.Now().Before(l.nextWalk) {
			l.sweep(ctx)
		}
	case w := <-l.walked:
		l.swept(ctx, w)
	case f := <-l.foreign.found:
		l.takeForeign(f)
	case <-c.alive:
		l.systemd.alive()
	}
}

// reconcile makes the kernel follow the facts, tells the world, and says when to
// try again.
func (l *loop) reconcile(ctx context.Context, due *time.Timer) {
	l.attempted = true
	err := l.follow(ctx)
	if ctx.Err() != nil {
		return // what was cut short is no error
	}
	l.agent.Error, l.agent.AttachError = "", ""
	if err != nil {
		message := "policy not applied, retrying"
		if partly(err) {
			message, l.agent.AttachError = "policy applied, but not to every device or family, retrying", err.Error()
		} else {
			l.agent.Error = err.Error()
		}
		l.retry = min(max(2*l.retry, l.timing.retry), l.timing.maxRetry)
		// Whatever was wrong may be so no more: look again at what changes by itself.
		l.stale.network, l.stale.reserved, l.force = true, true, true
		l.log.Warn(message, "error", err, "after", l.retry)
		due.Reset(l.retry)
	} else {
		l.retry = 0
	}
	l.publish()
	l.lookForForeign(ctx)
}

// follow reads the facts anew and applies the policy they make if it is another one.
func (l *loop) follow(ctx context.Context) error {
	if err := l.read(); err != nil {
		return err
	}
	if l.flows != nil {
		if err := l.flows.SetTunnels(tunnels(l.facts.network.Tunnels())); err != nil {
			return err
		}
	}
	l.wanted = assemble(l.cfg, l.facts)
	if l.wait() {
		return nil
	}
	news := l.inForce == nil || !same(l.wanted.input, l.inForce.input)
	if !news && !l.force && complete(l.facts.attached, l.wanted.input.Devices) {
		l.settle()
		return nil
	}
	p, err := policy.Build(l.wanted.input)
	if err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	attach := l.kernel.Apply(ctx, p)
	if attach != nil && !partly(attach) {
		return attach
	}
	before := l.inForce
	l.settle()
	l.force = false
	l.agent.LastApply = time.Now()
	if !l.agent.Ready && (attach == nil || onSome(l.kernel.Attached(), l.wanted.input.Devices)) {
		l.agent.Ready = true
	}
	if news {
		l.logApplied(l.wanted.input)
	}
	if before == nil && l.earlier.applied || before != nil && loses(before.input, l.wanted.input) {
		l.sweep(ctx) // the mappings of an address end with it; it may be gone since an earlier agent
	}
	l.force = attach != nil // the policy is in force; the rest is tried again
	return attach
}

// same tells whether two inputs are equal. The long lists are compared without
// reflection, which takes longer than all the rest.
func same(a, b policy.Input) bool {
	if !slices.Equal(a.NonMasq, b.NonMasq) || !slices.Equal(a.Nodes, b.Nodes) || !slices.Equal(a.Pods, b.Pods) || !slices.Equal(a.Ports, b.Ports) {
		return false
	}
	a.NonMasq, a.Nodes, a.Pods, a.Ports = nil, nil, nil, nil
	b.NonMasq, b.Nodes, b.Pods, b.Ports = nil, nil, nil, nil
	return reflect.DeepEqual(a, b)
}

// complete tells whether all of the devices are attached.
func complete(attached []datapath.Attachment, devices []policy.Device) bool {
	return !slices.ContainsFunc(devices, func(d policy.Device) bool { return !on(attached, d) })
}

// onSome tells whether a device is attached, if there is one.
func onSome(attached []datapath.Attachment, devices []policy.Device) bool {
	return slices.ContainsFunc(devices, func(d policy.Device) bool { return on(attached, d) })
}

func on(attached []datapath.Attachment, d policy.Device) bool {
	return slices.ContainsFunc(attached, func(a datapath.Attachment) bool { return a.Index == d.Index && !a.Draining })
}

// damaged tells whether programs or rules of the policy in force are no longer in
// their place. After an error the retry looks at that anyway.
func (l *loop) damaged(ctx context.Context) bool {
	return l.inForce != nil && l.retry == 0 && !l.kernel.Healthy(ctx)
}

// settle notes that what is wanted is in force. Reasons may have changed even
// where the policy has not.
func (l *loop) settle() {
	w := l.wanted
	l.inForce = &w
}

func (l *loop) logApplied(in policy.Input) {
	l.log.Info("policy applied", "devices", deviceNames(in.Devices), "sources", len(in.Sources),
		"native", len(in.Native), "prefixes", len(in.NonMasq), "pods", len(in.Pods), "addresses", len(in.Nodes))
}

func deviceNames(list []policy.Device) []string {
	names := make([]string, len(list))
	for i, d := range list {
		names[i] = d.Name
	}
	return names
}
