package iptables

import (
	"context"
	"strconv"
	"strings"
)

// Drops are the packets that rules of ours dropped, by the reason that the rule names, since
// each rule was written. A rule that has dropped none yet counts too.
func (i *Inspector) Drops(ctx context.Context, o Options) (map[string]uint64, error) {
	ctx, cancel := o.reading(ctx)
	defer cancel()
	drops := make(map[string]uint64)
	for f, p := range o.programs(i.backend, o.plainBackend(ctx)) {
		if _, ours := i.nat[f]; !ours {
			continue
		}
		out, err := o.run(ctx, p.save, "", "-c")
		if ctx.Err() != nil {
			return nil, hangs(ctx, "iptables")
		}
		if err != nil {
			return nil, familyError(f, err)
		}
		countDrops(out, drops)
	}
	return drops, nil
}

// countDrops adds what `iptables-save -c` says of our rules: [PACKETS:BYTES] -A CHAIN ...
func countDrops(out string, drops map[string]uint64) {
	for line := range strings.Lines(out) {
		words := strings.Fields(line)
		if len(words) < 3 || !strings.HasPrefix(words[2], chainPrefix) || option(words, "-j") != "DROP" {
			continue
		}
		count, _, _ := strings.Cut(strings.TrimPrefix(words[0], "["), ":")
		n, err := strconv.ParseUint(count, 10, 64)
		if reason := option(words, "--comment"); err == nil && reason != "" {
			drops[reason] += n
		}
	}
}
