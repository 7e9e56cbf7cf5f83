package iptables

import (
	"context"
	"fmt"
	"strings"
)

// probeSets finds out, once, whether rules can name sets: the kernel needs sets and the
// match, and iptables its library.
func (t *Tables) probeSets(ctx context.Context) {
	if t.probed {
		return
	}
	t.probed = true
	if !setsSupported() {
		t.plain, t.plainFor = true, "the kernel has no ipset"
		return
	}
	const name = setPrefix + "probe"
	for f, p := range t.programs {
		if destroySet(name) != nil || createSet(name, f, 0) != nil {
			t.plain, t.plainFor = true, "the kernel has no set of type "+setType
			return
		}
		script := fmt.Sprintf("*mangle\n:%[1]s - [0:0]\n-A %[1]s -m set --match-set %[2]s dst -j RETURN\nCOMMIT\n", chainPrefix+"PROBE", name)
		_, err := t.opts.run(ctx, p.restore, script, "--noflush", "--test", "-w", fmt.Sprint(t.opts.lockSeconds()))
		if e := destroySet(name); e != nil {
			t.log.Warn("iptables: set of a probe", "error", e)
		}
		if err != nil && strings.Contains(err.Error(), "set") {
			t.plain, t.plainFor = true, err.Error()
			return
		}
	}
}
