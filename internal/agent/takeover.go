package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/iptables"
	"bauta.dev/bauta/internal/policy"
)

// takeOver is the masquerading of another program that the option names: its connections go on
// with us, then its rules go.
type takeOver struct {
	name    string
	sources []netip.Prefix
	named   *iptables.Named // as it was found
	log     *slog.Logger
}

// findTakeOver finds what the option names. own are the pod ranges of the Node object. nil: it names
// nothing, or what it names is gone, as after a restart with the same options.
func findTakeOver(ctx context.Context, cfg config.Config, own []policy.Rule, root, runDir string, log *slog.Logger) (*takeOver, error) {
	if cfg.TakeOver == "" {
		return nil, nil
	}
	t := &takeOver{name: cfg.TakeOver, log: log}
	for _, p := range prefixes(cfg.SourceRules(own)) {
		if is4 := p.Addr().Is4(); is4 && cfg.IPv4 || !is4 && cfg.IPv6 { // the other family's masquerade stays
			t.sources = append(t.sources, p)
		}
	}
	if t.name == config.Unnamed {
		return nil, t.refused(ctx, errors.New("true names no chain and no rule"))
	}
	var err error
	t.named, err = iptables.FindNamed(ctx, iptables.Options{}, t.name, t.sources)
	switch {
	case err == nil:
		return t, nil
	case errors.Is(err, iptables.ErrNoBinary) && !inForce(ctx, root, runDir):
		return nil, fmt.Errorf("take-over: %w", err)
	case errors.Is(err, iptables.ErrNoBinary), errors.Is(err, iptables.ErrNotFound) && (inForce(ctx, root, runDir) || len(t.others(ctx)) == 0):
		log.Info("take-over: nothing is left to be taken over", "name", t.name)
		return nil, nil
	}
	return nil, t.refused(ctx, err)
}

// inForce tells whether we masquerade already: then what was named is gone because it was
// taken over.
func inForce(ctx context.Context, root, runDir string) bool {
	k, err := inspectNode(ctx, root, runDir)
	if err != nil {
		return false
	}
	defer k.Close()
	return k.Applied()
}

// others are the rules that could be named.
func (t *takeOver) others(ctx context.Context) []iptables.ForeignRule {
	list, err := iptables.Foreign(ctx, iptables.Options{}, t.sources)
	if err != nil {
		t.log.Warn("rules of others not read", "error", err)
	}
	return list
}

// refused is an error that says what could be named instead.
func (t *takeOver) refused(ctx context.Context, err error) error {
	out := &advice.Error{Err: fmt.Errorf("take-over: %w", err)}
	list := t.others(ctx)
	for _, r := range list[:min(len(list), maxForeign)] {
		out.Hints = append(out.Hints, "this masquerades the source ranges, and can be named so: "+foreignText(r))
	}
	if len(list) == 0 {
		out.Hints = []string{"no rule of another program masquerades the source ranges: leave the option out, or correct pod-cidrs"}
	}
	return out
}

// gives tells whether a connection has an address that the rules name.
func (t *takeOver) gives(f conntrack.Flow) bool { return t != nil && t.named.Gives(f.Xlate.Addr()) }

// of are the sources of the families that the rules are of: the connections of another are
// somebody else's still.
func (t *takeOver) of(sources []netip.Prefix) []netip.Prefix {
	if t == nil {
		return sources
	}
	return slices.DeleteFunc(sources, func(p netip.Prefix) bool {
		family := iptables.IPv6
		if p.Addr().Is4() {
			family = iptables.IPv4
		}
		return !slices.ContainsFunc(t.named.Rules, func(r iptables.ForeignRule) bool { return r.Family == family.String() })
	})
}

// remove removes the rules, if they are still there.
func (t *takeOver) remove(ctx context.Context) error {
	if t == nil {
		return nil
	}
	removed, err := iptables.RemoveNamed(ctx, iptables.Options{}, t.name, t.sources)
	if err != nil {
		return fmt.Errorf("take-over: remove %s: %w", t.name, err)
	}
	for _, what := range removed {
		t.log.Info("take-over: removed", "what", what)
	}
	return nil
}

// taking is iptables mode with rules that are taken over: netfilter has the connections already.
type taking struct {
	backend
	from *takeOver // nil: done
}

// Apply removes the other rules when ours are there.
func (k *taking) Apply(ctx context.Context, p *policy.Policy) error {
	err := k.backend.Apply(ctx, p)
	if err != nil && !partly(err) || k.from == nil {
		return err
	}
	if err := k.from.remove(ctx); err != nil {
		return err
	}
	k.from = nil
	return err
}

// TakeOverPlan is what a take-over would do.
type TakeOverPlan struct {
	Name     string
	Mode     string
	Found    []string // rules that translate; empty: nothing is left to be taken over
	Removals []string
	Import   int // connections that would go on with programs
	Drain    int // that would go on with netfilter until they end
	Warnings []string
}

// PlanTakeOver says what an agent with these options would take over, and changes nothing.
func PlanTakeOver(ctx context.Context, opt Options) (plan TakeOverPlan, err error) {
	cfg, log := opt.Config, slog.New(slog.DiscardHandler)
	kube, err := openKube(cfg, opt.Version, log)
	if err != nil {
		return plan, err
	}
	root, runDir := orDefault(opt.BPFRoot, DefaultBPFRoot), orDefault(opt.RunDir, DefaultRunDir)
	own, err := ownSources(ctx, cfg, kube, runDir)
	if err != nil {
		return plan, err
	}
	plan = TakeOverPlan{Name: cfg.TakeOver, Mode: modeOf(cfg.BPF)}
	t, err := findTakeOver(ctx, cfg, own, root, runDir, log)
	if err != nil || t == nil {
		return plan, err
	}
	plan.Removals = t.named.Removals
	for _, r := range t.named.Rules {
		plan.Found = append(plan.Found, foreignText(r))
		if !r.Within(t.sources) {
			plan.Warnings = append(plan.Warnings, "it may also masquerade sources that are in no source range of ours, and would do so no more: "+foreignText(r))
		}
	}
	flows, err := conntrack.List(ctx, conntrack.Filter{Sources: t.of(t.sources), Translated: true, AnyZone: true})
	if err != nil {
		return plan, fmt.Errorf("take-over: %w", err)
	}
	network, err := devices.Read()
	if err != nil {
		return plan, fmt.Errorf("read the network configuration: %w", err)
	}
	l := newLoop(cfg, opt, runDir, log)
	l.facts.network, l.facts.kube.own = network, prefixes(own)
	wanted := reachable(assemble(cfg, l.facts).input)
	for _, f := range flows {
		switch {
		case f.SNAT && cfg.BPF && wanted(f) && movable(f):
			plan.Import++
		case f.SNAT && (wanted(f) || t.gives(f)):
			plan.Drain++
		}
	}
	return plan, nil
}
