package iptables

import (
	"context"
	"fmt"
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
		for _, table := range last.wanted.Tables {
			if diff := table.difference(inOurWords(table, now[table.Name], last.listed[table.Name])); diff != "" {
				return fmt.Sprintf("%s: %s", f, diff), nil
			}
		}
	}
	return "", nil
}
