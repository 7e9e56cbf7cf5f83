package iptables

import (
	"context"
	"fmt"
	"log/slog"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/policy"
)

// Tables writes the rules of one network namespace: that of the thread that calls
// its methods. They are not for several goroutines at a time.
type Tables struct {
	opts     Options
	backend  Backend
	programs map[Family]program
	others   map[Family]program // the other backend, as far as it is installed
	log      *slog.Logger

	plain    bool               // no sets: a rule for each prefix
	probed   bool               // plain is known
	cleaned  map[Family]bool    // the other backend holds nothing of ours
	mixture  string             // warning about rules of both backends
	plainFor string             // why plain is
	prefixes int                // plain rules for prefixes in force
	last     map[Family]applied // what the kernel holds by our doing
	seen     uint32             // the generation of nft rules that Check found right
	seenOK   bool
	step     func() // for tests: see setChange
	changed  string // what the last Apply found changed by others
}

// Changed says what the last Apply found otherwise than the one before had left it, and
// healed; empty: nothing, or it was the first.
func (t *Tables) Changed() string { return t.changed }

// applied is what the last Apply wrote, and how the kernel lists it.
type applied struct {
	wanted Ruleset
	listed map[string]map[string][]string // table, chain: rules, where these differ from wanted
}

// Open finds the binaries and the backend. It changes nothing.
func Open(ctx context.Context, o Options) (*Tables, error) {
	b, counts, err := o.detect(ctx)
	if err != nil {
		return nil, err
	}
	plain := o.plainBackend(ctx)
	t := &Tables{
		opts: o, backend: b, programs: o.programs(b, plain), others: o.programs(b.other(), plain),
		log: o.Log, last: make(map[Family]applied), cleaned: make(map[Family]bool),
	}
	if t.log == nil {
		t.log = slog.New(slog.DiscardHandler)
	}
	if len(t.programs) == 0 {
		return nil, noBinary(string(b))
	}
	if counts[NFT] > 0 && counts[Legacy] > 0 {
		t.mixture = fmt.Sprintf("iptables: rules of both backends (%d of nft, %d of legacy): each masquerades and filters by itself; %s is used here",
			counts[NFT], counts[Legacy], b)
	}
	return t, nil
}

func noBinary(backend string) error {
	return advice.New(fmt.Errorf("iptables-%s: %w", backend, ErrNoBinary),
		"install the package iptables (1.8 or newer)", "or use eBPF mode: enable-bpf-masquerade=true")
}

// Backend returns the backend in use.
func (t *Tables) Backend() Backend { return t.backend }

// Warnings are what an operator should know; they don't stop anything.
func (t *Tables) Warnings() []string {
	var list []string
	if t.mixture != "" {
		list = append(list, t.mixture)
	}
	if t.plain {
		list = append(list, fmt.Sprintf("iptables: no sets (%s): %d plain rules for prefixes; each new connection passes them one by one, "+
			"which takes about 10 µs for 1000", t.plainFor, t.prefixes))
	}
	for _, f := range families {
		if _, ok := t.programs[f]; !ok {
			list = append(list, fmt.Sprintf("iptables: no %s-restore: %s is not masqueraded", f.binary(), f))
		}
	}
	return list
}

// wants tells whether a policy has rules for a family.
func wants(p *policy.Policy, f Family) bool {
	in := p.Input()
	return f == IPv4 && in.IPv4 || f == IPv6 && in.IPv6
}
