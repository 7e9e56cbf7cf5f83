package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"bauta.dev/bauta/internal/iptables"
)

// foreignRules are rules of others that masquerade what we do too.
type foreignRules struct {
	due      bool // to be looked for
	looking  bool
	found    chan foreignFound
	warnings []string
	err      error
}

// foreignFound is the result of a look.
type foreignFound struct {
	rules []iptables.ForeignRule
	err   error
}

// lookForForeign starts a look at the rules of others, beside the loop: with thousands
// of them it takes longer than a policy may wait.
func (l *loop) lookForForeign(ctx context.Context) {
	if l.readForeign == nil || !l.foreign.due || l.foreign.looking || l.agent.Waiting != "" {
		return
	}
	l.foreign.due, l.foreign.looking = false, true
	sources := prefixes(l.wanted.input.Sources)
	go func() {
		rules, err := l.readForeign(ctx, sources)
		l.foreign.found <- foreignFound{rules, err}
	}()
}

// takeForeign takes the result. What can't be read leaves what was known; without
// any binary there are no rules to be read.
func (l *loop) takeForeign(f foreignFound) {
	l.foreign.looking = false
	before := l.foreign.err
	l.foreign.err = f.err
	switch {
	case errors.Is(f.err, context.Canceled):
		return
	case f.err != nil && !errors.Is(f.err, iptables.ErrNoBinary):
		if before == nil || before.Error() != f.err.Error() {
			l.log.Warn("rules of others not read", "error", f.err)
		}
		return
	}
	warnings := foreignWarnings(f.rules)
	if !slices.Equal(warnings, l.foreign.warnings) {
		l.foreign.warnings = warnings
		l.publish()
	}
}

// awaitForeign returns when no look is under way.
func (l *loop) awaitForeign() {
	if l.foreign.looking {
		<-l.foreign.found
	}
}

// maxForeign keeps a status readable: kube-proxy and others may have a rule for each service.
const maxForeign = 10

func foreignWarnings(rules []iptables.ForeignRule) []string {
	var list []string
	for _, r := range rules[:min(len(rules), maxForeign)] {
		list = append(list, "another masquerade rule matches our sources too: "+foreignText(r))
	}
	if n := len(rules) - maxForeign; n > 0 {
		list = append(list, fmt.Sprintf("and %d more rules of others that masquerade our sources", n))
	}
	return list
}

// foreignText names a rule. The option take-over understands it.
func foreignText(r iptables.ForeignRule) string {
	return fmt.Sprintf("%s, table %s, chain %s: %s", r.Family, r.Table, r.Chain, r.Rule)
}
