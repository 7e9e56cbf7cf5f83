package iptables

import (
	"context"
	"fmt"

	"bauta.dev/bauta/internal/policy"
)

// Check says what in the kernel is not as the last Apply or Drain wrote it, in a line;
// empty: all is right. Apply heals it.
func (t *Tables) Check(ctx context.Context) (changed string, err error) {
	now, known := t.generation()
	if !known || !t.seenOK || now != t.seen {
		t.seenOK = false
		if changed, err = t.checkRules(ctx); changed != "" || err != nil {
			return changed, err
		}
		t.seen, t.seenOK = now, known
	}
	for _, f := range families {
		if diff, err := checkSets(t.last[f].wanted.Sets); diff != "" || err != nil {
			return fmt.Sprintf("%s: %s", f, diff), err
		}
	}
	return "", nil
}

func (t *Tables) checkRules(ctx context.Context) (changed string, err error) {
	for _, f := range families {
		last, ok := t.last[f]
		if !ok {
			continue
		}
		now, err := t.programs[f].state(ctx, true)
		if err != nil {
			return "", familyError(f, err)
		}
		if diff := last.difference(now); diff != "" {
			return fmt.Sprintf("%s: %s", f, diff), nil
		}
	}
	return "", nil
}

// difference says in a line what in the tables is not as it was applied; empty: nothing.
func (a applied) difference(now map[string]tableState) string {
	for _, table := range a.wanted.Tables {
		if diff := table.difference(inOurWords(table, now[table.Name], a.listed[table.Name])); diff != "" {
			return diff
		}
	}
	return ""
}

// notice keeps what others have changed before it is written anew.
func (t *Tables) notice(f Family, now map[string]tableState) error {
	last, ok := t.last[f]
	if !ok || t.changed != "" {
		return nil
	}
	diff := last.difference(now)
	if diff == "" {
		var err error
		if diff, err = checkSets(last.wanted.Sets); err != nil {
			return err
		}
	}
	if diff != "" {
		t.changed = fmt.Sprintf("%s: %s", f, diff)
	}
	return nil
}

// Held tells whether the kernel holds the rules and sets of p, as an earlier process left them.
func (t *Tables) Held(ctx context.Context, p *policy.Policy) (bool, error) {
	if err := t.probeSets(ctx); err != nil {
		return false, err
	}
	for _, f := range families {
		prog, ok := t.programs[f]
		if !ok {
			continue
		}
		rs := Render(p, f, RenderOptions{RandomFully: t.opts.RandomFully, PlainRules: t.plain})
		now, err := prog.state(ctx, false)
		if err != nil {
			return false, familyError(f, err)
		}
		diff := applied{wanted: rs}.difference(now)
		if diff == "" {
			diff, err = checkSets(rs.Sets)
		}
		if diff != "" || err != nil {
			return false, err
		}
	}
	return true, nil
}
