package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/iptables"
	"bauta.dev/bauta/internal/policy"
)

// changeover is the backend of one mode in the place of the other's. Its first Apply moves
// the connections there are; what has to stay with the old side drains there.
type changeover struct {
	backend            // of the mode to come
	flows   flowKeeper // of that; nil: netfilter keeps them
	old     oldSide    // nil: it is gone
	move    func(context.Context) (switched, error)
	renew   func(context.Context) error // after the move; nil: nothing
	moving  *modeSwitch
	taking  *takeOver      // of another program alone; nil: of our other mode
	policy  *policy.Policy // of the Apply under way
	timeout time.Duration  // of draining
	log     *slog.Logger

	begun time.Time // draining
	moved bool      // the first Apply is done
	left  int
	addrs []netip.Addr // that rules gave which were taken over, and programs would not give
}

// oldSide is the data plane of the other mode after a switch: it goes on with what it has, and
// takes nothing new.
type oldSide interface {
	SetTunnels([]datapath.Tunnel) error
	Walk(context.Context) (datapath.Swept, error) // ends what has expired; may run beside the others
	Left(context.Context, datapath.Swept) (int, error)
	Remove(context.Context) error
	Close() error
	mode() string
}

// Apply moves the connections, the first time. After an error the old side is still
// there, and the next attempt begins from the start.
func (c *changeover) Apply(ctx context.Context, p *policy.Policy) error {
	if c.moved {
		return c.backend.Apply(ctx, p)
	}
	c.policy = p
	c.moving.sources, c.moving.wanted = c.taking.of(prefixes(p.Input().Sources)), reachable(p.Input())
	start := time.Now()
	result, err := c.move(ctx)
	if err != nil {
		return fmt.Errorf("take over from %s mode: %w", c.old.mode(), err)
	}
	c.moved, c.left, c.addrs = true, result.Left, c.moving.kept
	if c.begun.IsZero() {
		c.begun = time.Now()
	}
	message := "mode changed"
	if c.taking != nil {
		message = "connections taken over"
	}
	c.log.Info(message, "from", c.old.mode(), "moved", result.Moved, "draining", result.Left, "took", time.Since(start))
	if result.Stuck > 0 {
		c.log.Warn("SCTP associations can't be moved, as netfilter has not seen their handshake: their packets are dropped until they begin anew", "associations", result.Stuck)
	}
	if c.renew != nil {
		return c.renew(ctx)
	}
	return nil
}

// reachable tells which of netfilter's connections programs can go on with: those whose
// address is one that mappings may have. The node's own are no mappings, whatever port a rule or
// a clash gave them.
func reachable(in policy.Input) func(conntrack.Flow) bool {
	addrs := make(map[netip.Addr]bool)
	for _, d := range in.Devices {
		addrs[d.IPv4], addrs[d.IPv6] = true, true
	}
	for _, r := range in.RouteSources {
		addrs[r.Source] = true
	}
	return func(f conntrack.Flow) bool {
		return addrs[f.Xlate.Addr()] && !slices.Contains(in.HostAddrs, f.Src.Addr())
	}
}

func (c *changeover) SetTunnels(list []datapath.Tunnel) error {
	var errs []error
	if c.flows != nil {
		errs = append(errs, c.flows.SetTunnels(list))
	}
	if c.old != nil {
		errs = append(errs, c.old.SetTunnels(list))
	}
	return errors.Join(errs...)
}

// Walk is that of both sides. Only one of them has tables of its own.
func (c *changeover) Walk(ctx context.Context) (datapath.Swept, error) {
	swept, err := c.backend.Walk(ctx)
	if c.old == nil || !c.moved {
		return swept, err
	}
	old, oldErr := c.old.Walk(ctx)
	if c.flows == nil {
		old.Vanished += swept.Vanished
		swept = old
	}
	return swept, errors.Join(err, oldErr)
}

// Drain removes the old side when nothing is left there, or long enough after.
func (c *changeover) Drain(swept datapath.Swept) error {
	var err error
	if c.flows != nil {
		err = c.flows.Drain(swept)
	}
	if c.old == nil || !c.moved {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), removeTimeout)
	defer cancel()
	left, oldErr := c.old.Left(ctx, swept)
	if oldErr != nil {
		return errors.Join(err, fmt.Errorf("connections of %s mode: %w", c.old.mode(), oldErr))
	}
	c.left = left
	if late := time.Since(c.begun) >= c.timeout; left > 0 && !late {
		return err
	} else if late && left > 0 {
		c.log.Warn("drain-timeout is over, connections end", "mode", c.old.mode(), "connections", left)
	}
	switch oldErr = c.old.Remove(ctx); {
	case errors.Is(oldErr, datapath.ErrBusy):
		return err // the next walk tries again
	case oldErr != nil:
		return errors.Join(err, fmt.Errorf("remove what is left of %s mode: %w", c.old.mode(), oldErr))
	}
	c.log.Info("nothing of the other mode is left", "mode", c.old.mode())
	c.old, c.left = nil, 0
	return err
}

const removeTimeout = 30 * time.Second

// Close lets both sides go on without the agent.
func (c *changeover) Close() error {
	err := c.backend.Close()
	if c.old != nil {
		err = errors.Join(err, c.old.Close())
	}
	return err
}

// draining is what the status shows; nil: nothing drains.
func (c *changeover) draining() *DrainingStatus {
	if c == nil || c.old == nil || !c.moved {
		return nil
	}
	return &DrainingStatus{Mode: c.old.mode(), Connections: c.left, Since: c.begun, Addresses: c.addrs}
}

// oldPrograms are the programs of eBPF mode, when rules take their place.
type oldPrograms struct {
	programs *datapath.Datapath // nil: let go of, to be removed
	root     string
	moving   *modeSwitch
	had      []datapath.Flow // at the last look
}

func (*oldPrograms) mode() string { return ModeBPF }

func (o *oldPrograms) SetTunnels(list []datapath.Tunnel) error {
	if o.programs == nil {
		return nil
	}
	return o.programs.SetTunnels(list)
}

func (o *oldPrograms) Walk(ctx context.Context) (datapath.Swept, error) {
	if o.programs == nil {
		return datapath.Swept{}, nil
	}
	return o.programs.Walk(ctx)
}

// Left detaches devices from which the last connection has gone, too. Netfilter forgets what has
// ended since the last look.
func (o *oldPrograms) Left(ctx context.Context, swept datapath.Swept) (int, error) {
	if o.programs == nil {
		return 0, nil
	}
	flows, err := o.programs.Flows(ctx)
	if err == nil {
		err = o.moving.release(ctx, without(o.had, flows))
	}
	if err == nil {
		o.had = flows
	}
	shifted, shiftErr := o.programs.Shifted(ctx)
	return len(flows) + len(shifted), errors.Join(err, shiftErr, o.programs.Drain(swept))
}

// without returns the flows of a that are not in b.
func without(a, b []datapath.Flow) []datapath.Flow {
	in := make(map[flowKey]bool, len(b))
	for _, f := range b {
		in[keyOf(f)] = true
	}
	return slices.DeleteFunc(slices.Clone(a), func(f datapath.Flow) bool { return in[keyOf(f)] })
}

// Remove may have to be tried again: a program of iptables that is just being started has our
// lock for a moment. What is left has to begin anew, with the rules.
func (o *oldPrograms) Remove(ctx context.Context) error {
	if o.programs != nil {
		if err := o.moving.releaseAll(ctx); err != nil {
			return err
		}
	}
	err := o.Close()
	if err == nil {
		_, err = datapath.Remove(o.root)
	}
	return err
}

func (o *oldPrograms) Close() error {
	if o.programs == nil {
		return nil
	}
	programs := o.programs
	o.programs = nil
	return programs.Close()
}

// oldRules are the rules of iptables mode, when programs take their place.
type oldRules struct {
	moving *modeSwitch // has what is ours in netfilter's table
	lock   io.Closer
}

func (oldRules) mode() string                                 { return ModeIPTables }
func (oldRules) SetTunnels([]datapath.Tunnel) error           { return nil }
func (oldRules) Walk(context.Context) (datapath.Swept, error) { return datapath.Swept{}, nil }
func (o oldRules) Close() error                               { return o.lock.Close() }
func (o oldRules) Left(ctx context.Context, _ datapath.Swept) (int, error) {
	flows, err := o.moving.left(ctx)
	return len(flows), err
}

// Remove ends what is left, so that programs begin it anew, and not with a translated packet.
func (o oldRules) Remove(ctx context.Context) error {
	flows, err := o.moving.left(ctx)
	if err != nil {
		return err
	}
	if _, err := o.moving.tracked.Delete(ctx, flows); err != nil {
		return err
	}
	if _, err := iptables.Remove(ctx, iptables.Options{}); err != nil {
		return err
	}
	if err := o.moving.finish(); err != nil {
		return err
	}
	return o.lock.Close()
}

// netfilterTable is netfilter's table of connections.
type netfilterTable struct{}

func (netfilterTable) List(ctx context.Context, f conntrack.Filter) ([]conntrack.Flow, error) {
	return conntrack.List(ctx, f)
}

func (netfilterTable) Create(ctx context.Context, list []conntrack.Flow) (int, error) {
	return conntrack.Create(ctx, list)
}

func (netfilterTable) Replace(ctx context.Context, list []conntrack.Flow) (int, error) {
	return conntrack.Replace(ctx, list)
}

func (netfilterTable) Delete(ctx context.Context, list []conntrack.Flow) (int, error) {
	return conntrack.Delete(ctx, list)
}

// steps are a translator's, as functions.
type steps struct{ ready, start func(context.Context) error }

func (s steps) Ready(ctx context.Context) error { return s.ready(ctx) }
func (s steps) Start(ctx context.Context) error { return s.start(ctx) }

// replacePrograms makes rules take the place of the programs below root.
func (l *loop) replacePrograms(rules *netfilter, root string, log *slog.Logger) (*changeover, error) {
	programs, err := openDatapath(datapath.Options{Root: root, DefaultFlows: l.cfg.Flows(memory()), AllowPrivateBPFFS: l.cfg.AllowPrivateBPFFS, Log: log})
	if err != nil {
		return nil, advice.New(fmt.Errorf("take over from eBPF mode: %w", err), "or `bauta cleanup` removes what eBPF mode left, and with it running connections")
	}
	c := &changeover{backend: rules, timeout: l.cfg.DrainTimeout, log: l.log}
	c.moving = &modeSwitch{
		maps: programs, tracked: netfilterTable{}, log: l.log,
		programs: steps{
			ready: func(ctx context.Context) error {
				in := c.policy.Input()
				in.Devices = nil // those that have programs drain
				p, err := policy.Build(in)
				if err == nil {
					err = programs.Apply(ctx, p)
				}
				return err
			},
			start: func(ctx context.Context) error {
				err := programs.Apply(ctx, c.policy)
				if errors.Is(err, datapath.ErrAttach) {
					return nil // what has no programs has no connections of theirs
				}
				return err
			},
		},
		rules: steps{rules.rules.Drain, func(ctx context.Context) error { return rules.write(ctx, c.policy) }},
	}
	old := &oldPrograms{programs: programs, root: root, moving: c.moving}
	c.old, c.renew = old, rules.renew
	c.move = func(ctx context.Context) (switched, error) {
		out, err := c.moving.toRules(ctx)
		if err == nil {
			out.Stuck, err = c.moving.stuckSCTP(ctx)
		}
		return out, err
	}
	rules.renewing, rules.spare = true, old.spared
	return c, nil
}

// replaceRules makes programs take the place of the rules in this network namespace, which
// are in a backend: ours, or those of another program that are taken over. These are removed when ours,
// which translate nothing, keep netfilter at work for the connections there are.
func (l *loop) replaceRules(ctx context.Context, programs *datapath.Datapath, from iptables.Backend, log *slog.Logger) (*changeover, error) {
	rules, err := openNetfilter(ctx, l.cfg, from, log)
	if err != nil {
		return nil, fmt.Errorf("take over from iptables mode: %w", err)
	}
	c := &changeover{backend: bpf{programs}, flows: programs, timeout: l.cfg.DrainTimeout, log: l.log}
	c.moving = &modeSwitch{
		maps: programs, tracked: netfilterTable{}, log: l.log,
		programs: steps{start: func(ctx context.Context) error { return programs.Apply(ctx, c.policy) }},
		stays:    func(f conntrack.Flow) bool { return l.taking.gives(f) || slices.Contains(c.addrs, f.Xlate.Addr()) },
		rules: steps{ready: func(ctx context.Context) error {
			if err := rules.rules.Drain(ctx); err != nil {
				return err
			}
			return l.taking.remove(ctx)
		}},
	}
	c.old, c.move = oldRules{c.moving, rules.lock}, c.moving.toPrograms
	return c, nil
}
