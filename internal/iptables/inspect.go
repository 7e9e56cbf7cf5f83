package iptables

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"bauta.dev/bauta/internal/policy"
)

// Inspector reads what the kernel holds of ours, with or without an agent. The rules
// are those of the moment of Inspect.
type Inspector struct {
	backend Backend
	nat     map[Family]tableState
	mangle  map[Family]tableState
	cut     map[Family]bool // no packet comes to our chains
}

// Inspect finds our rules in the network namespace of the calling thread. It returns
// ErrNone if there are none.
func Inspect(ctx context.Context, o Options) (*Inspector, error) {
	ctx, cancel := o.reading(ctx)
	defer cancel()
	plain := o.plainBackend(ctx)
	var failed error
	for _, b := range []Backend{NFT, Legacy} {
		if o.Backend != "" && o.Backend != b {
			continue
		}
		i := &Inspector{backend: b, nat: make(map[Family]tableState), mangle: make(map[Family]tableState), cut: make(map[Family]bool)}
		for f, p := range o.programs(b, plain) {
			tables, err := p.readAll(ctx)
			if ctx.Err() != nil {
				return nil, hangs(ctx, "iptables")
			}
			if err != nil {
				failed = familyError(f, err)
				continue
			}
			if err := p.markDormant(tables); err != nil {
				failed = familyError(f, err)
				continue
			}
			if nat := tables["nat"]; len(nat.chains) > 0 {
				i.nat[f], i.mangle[f], i.cut[f] = nat, tables["mangle"], !nat.reached() || !tables["mangle"].reached()
			}
		}
		if len(i.nat) > 0 {
			return i, nil
		}
	}
	switch {
	case errors.Is(failed, errHidden):
		return nil, failed
	case failed != nil:
		o.note("iptables: backend not readable", "error", failed)
	}
	return nil, ErrNone
}

// Backend is where the rules are.
func (i *Inspector) Backend() Backend { return i.backend }

// Close is there for symmetry: nothing is held.
func (i *Inspector) Close() error { return nil }

// Exclusions are the prefixes of the ip-masq-agent list in the kernel, sorted.
func (i *Inspector) Exclusions() ([]netip.Prefix, error) { return i.listed(policy.PassNonMasq) }

// NodeAddrs are the addresses of other nodes towards which nothing is masqueraded, sorted.
func (i *Inspector) NodeAddrs() ([]netip.Addr, error) {
	prefixes, err := i.listed(policy.PassNode)
	addrs := make([]netip.Addr, len(prefixes))
	for n, p := range prefixes {
		addrs[n] = p.Addr()
	}
	return addrs, err
}

// listed are the prefixes that rules pass with an outcome: of plain rules and of sets.
func (i *Inspector) listed(o policy.Outcome) ([]netip.Prefix, error) {
	var list []netip.Prefix
	for _, f := range families {
		for _, r := range i.nat[f].chains[destinationChain] {
			words := strings.Fields(r)
			if option(words, "--comment") != o.String() {
				continue
			}
			if name := option(words, "--match-set"); name != "" {
				set, ok, err := readSet(name)
				if err != nil {
					return nil, err
				}
				if !ok {
					return nil, fmt.Errorf("set %s: gone, though a rule names it", name)
				}
				list = append(list, set.Prefixes...)
				continue
			}
			prefix := netip.PrefixFrom(f.zero(), 0)
			if d := option(words, "-d"); d != "" {
				var err error
				if prefix, err = netip.ParsePrefix(d); err != nil {
					return nil, fmt.Errorf("rule %q: %w", r, err)
				}
			}
			list = append(list, prefix)
		}
	}
	slices.SortFunc(list, policy.ComparePrefixes)
	return slices.Compact(list), nil
}

func (f Family) zero() netip.Addr {
	if f == IPv4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// option is the word behind an option.
func option(words []string, name string) string {
	if at := slices.Index(words, name); at >= 0 && at+1 < len(words) {
		return words[at+1]
	}
	return ""
}

// Devices are those on which our rules masquerade, sorted: in each family that names one.
func (i *Inspector) Devices() ([]string, error) {
	right := make(map[string]bool)
	for f, nat := range i.nat {
		for _, r := range nat.chains[entryChain] {
			if name := option(strings.Fields(r), "-o"); name != "" {
				before, known := right[name]
				right[name] = !i.cut[f] && (before || !known)
			}
		}
	}
	maps.DeleteFunc(right, func(_ string, ok bool) bool { return !ok })
	return slices.Sorted(maps.Keys(right)), nil
}

// Draining tells whether the rules translate no new flows any more.
func (i *Inspector) Draining() bool {
	for _, nat := range i.nat {
		if !slices.ContainsFunc(nat.chains[entryChain], func(r string) bool { return strings.Contains(r, comment(drainingComment)) }) {
			return false
		}
	}
	return true
}
