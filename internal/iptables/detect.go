package iptables

import (
	"context"
	"strings"
)

// detect chooses the backend as the iptables-wrappers of the distributions and of
// Kubernetes do: what kubelet writes says it, else the one with more rules, else
// what `iptables` is. It returns the number of rules of others in each.
func (o Options) detect(ctx context.Context) (Backend, map[Backend]int, error) {
	plain := o.plainBackend(ctx)
	counts := make(map[Backend]int)
	hinted := make(map[Backend]bool)
	ours := make(map[Backend]bool)
	installed := make(map[Backend]bool)
	for _, b := range []Backend{NFT, Legacy} {
		for _, p := range o.programs(b, plain) {
			installed[b] = true
			out, err := o.run(ctx, p.save, "")
			if err != nil {
				o.note("iptables: backend not readable", "path", p.save, "error", err)
				continue // a kernel without it, or without the family
			}
			hinted[b] = hinted[b] || strings.Contains(out, "\n:KUBE-IPTABLES-HINT ") || strings.Contains(out, "\n:KUBE-KUBELET-CANARY ")
			for _, s := range parseSave(out) {
				counts[b] += s.rules
				ours[b] = ours[b] || !s.empty()
			}
		}
	}
	switch {
	case o.Backend != "":
		if !installed[o.Backend] {
			return "", nil, noBinary(string(o.Backend))
		}
		return o.Backend, counts, nil
	case !installed[NFT] && !installed[Legacy]:
		return "", nil, noBinary("restore")
	case installed[NFT] != installed[Legacy]:
		if installed[NFT] {
			return NFT, counts, nil
		}
		return Legacy, counts, nil
	}
	for _, sure := range []map[Backend]bool{hinted, more(counts), ours} {
		if sure[NFT] != sure[Legacy] {
			if sure[NFT] {
				return NFT, counts, nil
			}
			return Legacy, counts, nil
		}
	}
	if plain == "" {
		plain = NFT
	}
	return plain, counts, nil
}

func more(counts map[Backend]int) map[Backend]bool {
	return map[Backend]bool{NFT: counts[NFT] > counts[Legacy], Legacy: counts[Legacy] > counts[NFT]}
}

func (o Options) note(msg string, args ...any) {
	if o.Log != nil {
		o.Log.Debug(msg, args...)
	}
}
