package iptables

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/policy"
)

// tableNames in the order of writing: the guard stands before something can leave.
var tableNames = []string{"mangle", "nat"}

// Apply makes the kernel hold p. It writes only what is different. A family that
// fails does not keep the other from being written, nor does a device that rules can't name
// keep others from being masqueraded on: then the error is ErrPartly.
func (t *Tables) Apply(ctx context.Context, p *policy.Policy) error {
	if err := t.probeSets(ctx); err != nil {
		return err
	}
	var errs []error
	t.prefixes, t.changed = 0, ""
	wanted := 0
	for _, f := range families {
		if wants(p, f) {
			wanted++
		}
		rs := Render(p, f, RenderOptions{RandomFully: t.opts.RandomFully, PlainRules: t.plain})
		t.prefixes += plainRules(rs)
		if err := t.applyFamily(ctx, rs, wants(p, f)); err != nil {
			errs = append(errs, familyError(f, err))
		}
		if len(errs) > 0 && (errors.Is(errs[0], ErrLocked) || ctx.Err() != nil) {
			break // the other would wait as long again
		}
	}
	failed := len(errs)
	good, odd := usable(p.Input().Devices)
	err := errors.Join(append(errs, odd)...)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrLocked), ctx.Err() != nil, failed > 0 && failed >= wanted, odd != nil && len(good) == 0:
		return err
	}
	return partly{err}
}

// Drain leaves no rule that translates new flows. The hooks of conntrack and NAT
// stay for the flows that live, or for such that are about to be made.
func (t *Tables) Drain(ctx context.Context) error {
	var errs []error
	for _, f := range families {
		if _, ok := t.programs[f]; !ok {
			continue
		}
		if err := t.applyFamily(ctx, drained(f), true); err != nil && !errors.Is(err, errNoTable) {
			errs = append(errs, familyError(f, err))
		}
	}
	return errors.Join(errs...)
}

func (t *Tables) applyFamily(ctx context.Context, rs Ruleset, on bool) error {
	f := rs.Family
	t.seenOK = false
	prog, ok := t.programs[f]
	if !ok {
		if !on {
			return t.cleanOther(ctx, f)
		}
		return advice.New(fmt.Errorf("%s-%s: %w", f.binary(), t.backend, ErrNoBinary), "install it, or set enable-"+strings.ToLower(f.String())+"-masquerade=false")
	}
	now, err := prog.state(ctx, on)
	if err != nil {
		return err
	}
	if err := t.notice(f, now); err != nil {
		return err
	}
	if !on {
		if now["nat"].empty() && now["mangle"].empty() {
			delete(t.last, f)
			return t.cleanOther(ctx, f)
		}
		rs = drained(f) // the flows that live keep their translation
	}
	start := time.Now()
	script := script(rs, now, t.last[f].listed)
	sets := setChange{step: t.step}
	if len(rs.Sets) > 0 {
		if err := sets.change(f, rs.Sets, script != ""); err != nil {
			return errors.Join(err, sets.undo())
		}
	}
	if script != "" {
		if err := prog.change(ctx, script, rs.Tables, now); err != nil {
			return errors.Join(err, t.rollBack(prog, now), sets.undo())
		}
		if now, err = prog.state(ctx, true); err != nil {
			return err
		}
		sets.stepped()
		level := slog.LevelInfo
		if t.changed != "" { // the caller tells, and may have to do so all the time
			level = slog.LevelDebug
		}
		t.log.Log(ctx, level, "iptables: rules written", "family", f.String(), "backend", string(t.backend), "took", time.Since(start))
	}
	if err := sets.finish(f); err != nil {
		return err
	}
	if err := t.wake(prog, rs, now); err != nil {
		return err
	}
	t.last[f] = applied{rs, listing(rs, now)}
	if err := t.cleanOther(ctx, f); err != nil || !setsSupported() { // its rules may hold sets
		return err
	}
	_, err = discard(f, rs.Sets)
	return err
}

// wake wakes the tables that rules are needed in, the guard first.
func (t *Tables) wake(prog program, rs Ruleset, now map[string]tableState) error {
	for _, table := range rs.Tables {
		if len(table.Chains) == 0 || !now[table.Name].dormant {
			continue
		}
		if err := prog.wake(table.Name); err != nil {
			return err
		}
		t.log.Warn("iptables: table was dormant, woken", "family", rs.Family.String(), "table", table.Name)
	}
	return nil
}

// script is what turns the state into the wanted rules. listed has the kernel's
// words for chains that it lists in others than ours.
func script(rs Ruleset, now map[string]tableState, listed map[string]map[string][]string) string {
	var b strings.Builder
	order := steps(rs, now["mangle"])
	for i, t := range order {
		state := now[t.Name]
		if i == 2 { // the guard again
			state = stateOf(order[0])
		}
		b.WriteString(t.script(inOurWords(t, state, listed[t.Name])))
	}
	return b.String()
}

// steps are the tables in the order of writing. Where a device gets an address that it
// lacked, its packets must not pass the guard before nat translates them: then the guard is
// first written with what it dropped before, and at last without.
func steps(rs Ruleset, mangle tableState) []Table {
	dropped := mangle.chains[deviceChain]
	if len(dropped) == 0 || len(rs.Tables) == 0 {
		return rs.Tables
	}
	guard := rs.Tables[0]
	first := Table{Name: guard.Name}
	hasGuard := false
	for _, c := range guard.Chains {
		rules := slices.Clone(c.Rules)
		switch c.Name {
		case addressChain:
			hasGuard = true
			// Only what passed before and will pass.
			rules = slices.DeleteFunc(rules, func(r string) bool {
				return strings.HasSuffix(r, "-j RETURN") && !slices.Contains(mangle.chains[addressChain], r)
			})
		case deviceChain:
			for _, r := range dropped {
				if !slices.Contains(rules, r) {
					rules = append(rules, r)
				}
			}
		}
		first.Chains = append(first.Chains, Chain{c.Name, rules})
	}
	if !hasGuard {
		// No device lacks an address any more: the old guard stays as it is until nat is new.
		return []Table{rs.Tables[1], guard}
	}
	if slices.EqualFunc(first.Chains, guard.Chains, func(a, b Chain) bool { return slices.Equal(a.Rules, b.Rules) }) {
		return rs.Tables
	}
	return []Table{first, rs.Tables[1], guard}
}

// stateOf is the state after t was written.
func stateOf(t Table) tableState {
	s := tableState{chains: make(map[string][]string), first: jump, refs: []string{hookChain + " " + jump}}
	for _, c := range t.Chains {
		s.chains[c.Name] = c.Rules
	}
	return s
}

// listing keeps how the kernel lists the chains that it lists otherwise than we write them.
// That happens with a version of iptables whose words are not those of the versions we know.
func listing(rs Ruleset, now map[string]tableState) map[string]map[string][]string {
	words := make(map[string]map[string][]string)
	for _, t := range rs.Tables {
		words[t.Name] = make(map[string][]string)
		for _, c := range t.Chains {
			if rules := now[t.Name].chains[c.Name]; len(rules) == len(c.Rules) && !slices.Equal(rules, c.Rules) {
				words[t.Name][key(c)] = rules
			}
		}
	}
	return words
}

func key(c Chain) string { return c.Name + "\n" + strings.Join(c.Rules, "\n") }

// inOurWords is the state with chains in our words where it is just the words that differ.
func inOurWords(t Table, now tableState, listed map[string][]string) tableState {
	if len(listed) == 0 {
		return now
	}
	now.chains = maps.Clone(now.chains)
	for _, c := range t.Chains {
		if rules, ok := listed[key(c)]; ok && slices.Equal(rules, now.chains[c.Name]) {
			now.chains[c.Name] = c.Rules
		}
	}
	return now
}

// rollBack writes what was there before a change that failed half-way.
func (t *Tables) rollBack(prog program, before map[string]tableState) error {
	// The caller's context may be why it failed.
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Duration(t.opts.lockSeconds())*time.Second)
	defer cancel()
	now, err := prog.state(ctx, false)
	if err != nil {
		return err
	}
	var b strings.Builder
	for _, name := range slices.Backward(tableNames) {
		b.WriteString(before[name].table(name).script(now[name]))
	}
	if b.Len() == 0 {
		return nil
	}
	if err := prog.write(ctx, b.String()); err != nil {
		return fmt.Errorf("taking back what was written: %w", err)
	}
	return nil
}

// state reads the tables that concern us. With existing only those that are there:
// asking for a table of the legacy backend makes it.
func (p program) state(ctx context.Context, wanted bool) (map[string]tableState, error) {
	if !wanted {
		states, err := p.readAll(ctx)
		if err != nil {
			return nil, err
		}
		return states, p.markDormant(states)
	}
	states := make(map[string]tableState)
	for _, name := range tableNames {
		s, err := p.read(ctx, name)
		if errors.Is(err, errHidden) {
			return nil, err
		} else if err != nil {
			return nil, fmt.Errorf("table %s: %w", name, err)
		}
		states[name] = s
	}
	return states, p.markDormant(states)
}

func familyError(f Family, err error) error { return fmt.Errorf("%s: %w", f, err) }

// cleanOther removes what an earlier run left in the other backend: it would translate too.
func (t *Tables) cleanOther(ctx context.Context, f Family) error {
	p, ok := t.others[f]
	if !ok || t.cleaned[f] {
		return nil
	}
	if _, err := p.remove(ctx); err != nil {
		return err
	}
	t.cleaned[f] = true
	return nil
}

// plainRules counts the rules that would be in a set.
func plainRules(rs Ruleset) (n int) {
	for _, t := range rs.Tables {
		for _, c := range t.Chains {
			if t.Name != "nat" || c.Name != destinationChain {
				continue
			}
			for _, r := range c.Rules {
				if strings.HasPrefix(r, "-d ") && !strings.Contains(r, reason(policy.PassMulticast)) {
					n++
				}
			}
		}
	}
	return n
}
