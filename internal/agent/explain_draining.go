package agent

import (
	"context"
	"fmt"
	"net/netip"

	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/policy"
)

// askDraining looks, after a change of mode, for the connection of the packet among those that
// drain: they keep the mapping that they have there. It tells whether it is one of them.
func (x *explainer) askDraining(ctx context.Context, root string) (known bool, err error) {
	if x.file == nil || x.file.Draining == nil {
		return false, nil
	}
	var external netip.AddrPort
	if x.file.Draining.Mode == ModeIPTables {
		external, known, err = x.netfilterKnows(ctx)
	} else {
		external, known, err = x.programsKnow(root)
	}
	if err != nil || !known {
		return false, err
	}
	x.Address, x.Port = external.Addr().String(), external.Port()
	x.note("it is one of the connections of %s mode, which drain", x.file.Draining.Mode)
	return true, x.conclude(policy.MasqKnown, func(policy.Outcome) (netip.Prefix, error) { return netip.Prefix{}, nil })
}

// netfilterKnows looks in every zone: what could not be moved may be in another one.
func (x *explainer) netfilterKnows(ctx context.Context) (external netip.AddrPort, known bool, err error) {
	flows, err := conntrack.List(ctx, conntrack.Filter{Translated: true, AnyZone: true})
	if err != nil {
		return external, false, fmt.Errorf("list flows: %w", err)
	}
	for _, f := range flows {
		if f.SNAT && f.Proto == x.q.Proto && x.q.Src == f.Src && x.isOf(f) {
			return f.Xlate, true, nil
		}
	}
	return external, false, nil
}

func (x *explainer) programsKnow(root string) (external netip.AddrPort, known bool, err error) {
	k, err := datapath.Inspect(root)
	if isNone(err) {
		return external, false, nil // it is gone by now
	}
	if err != nil {
		return external, false, err
	}
	defer k.Close()
	a, err := x.run(k)
	return a.Source, a.Outcome == policy.MasqKnown, err
}
