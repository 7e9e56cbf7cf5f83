package iptables

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// probeSets finds out, once, whether rules can name sets: the kernel needs sets and the
// match, and iptables its library.
func (t *Tables) probeSets(ctx context.Context) error {
	if t.probed {
		return nil
	}
	t.plainFor = ""
	if !setsSupported() {
		t.plainFor = "the kernel has no ipset"
	} else if err := t.probeMatch(ctx); err != nil {
		return err
	}
	t.probed, t.plain = true, t.plainFor != ""
	return nil
}

// probeMatch has a rule tested that names a set; nothing is written. Only a lock that
// others hold is an error.
func (t *Tables) probeMatch(ctx context.Context) error {
	for _, f := range families {
		name := fmt.Sprintf("%sprobe-%d", setPrefix, int(f)) // a name that discard knows
		p, ok := t.programs[f]
		if !ok {
			continue
		}
		if destroySet(name) != nil || createSet(name, f, 0) != nil {
			t.plainFor = "the kernel has no set of type " + setType
			return nil
		}
		script := fmt.Sprintf("*mangle\n:%[1]s - [0:0]\n-A %[1]s -m set --match-set %[2]s dst -j RETURN\nCOMMIT\n", chainPrefix+"PROBE", name)
		_, err := t.opts.run(ctx, p.restore, script, "--noflush", "--test", "-w", strconv.Itoa(t.opts.lockSeconds()))
		if e := destroySet(name); e != nil {
			t.log.Warn("iptables: set of a probe", "error", e)
		}
		switch {
		case errors.Is(err, ErrLocked) || ctx.Err() != nil:
			return familyError(f, err)
		case err != nil && strings.Contains(err.Error(), "-m set"): // the rule is at fault
			t.plainFor = "iptables or the kernel has no match for sets"
			t.log.Warn("iptables: no sets", "error", err)
			return nil
		}
	}
	return nil
}
