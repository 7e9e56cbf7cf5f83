package agent

import (
	"context"
	"fmt"
	"net/netip"

	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/iptables"
	"bauta.dev/bauta/internal/policy"
)

// askRules follows the rules of iptables mode, unless netfilter knows the connection: then it
// asks no rule.
func (x *explainer) askRules(ctx context.Context, k *ruleInspector) error {
	v, err := k.Explain(iptables.Packet{Src: x.q.Src.Addr(), Dst: x.q.Dst.Addr(), Proto: x.q.Proto, Device: x.Device})
	if err != nil {
		return err
	}
	if v.Outcome == policy.PassSource && x.decision.Outcome == policy.PassHost {
		v.Outcome = policy.PassHost // rules name an address of the node only inside of a range
	}
	match := func(policy.Outcome) (netip.Prefix, error) { return v.Match, nil }
	switch {
	case v.Unreached:
		v.Outcome = policy.PassDevice
		x.note("no packet comes to the rules: see `bauta status`")
	case k.Draining():
		x.note("the rules translate no new connection any more: they drain")
	}
	flows, err := conntrack.List(ctx, conntrack.Filter{})
	if err != nil {
		return fmt.Errorf("list flows: %w", err)
	}
	for _, f := range flows {
		if f.Proto == x.q.Proto && x.isOf(f) {
			return x.known(f, v.Outcome, match)
		}
	}
	if !x.isAttached() {
		x.elsewhere()
		return nil
	}
	if err := x.conclude(v.Outcome, match); err != nil {
		return err
	}
	if v.Outcome == policy.MasqNew {
		x.Address = v.Address.String()
		x.notePort(v)
	}
	return nil
}

// isOf tells whether the packet is one of a connection, in either direction.
func (x *explainer) isOf(f conntrack.Flow) bool {
	if x.q.Src == f.Src && (x.q.Dst == f.Dst || x.q.Dst == remoteOf(f)) {
		return true
	}
	return x.q.Proto != policy.ProtoICMP && x.q.Proto != policy.ProtoICMPv6 && x.q.Src == remoteOf(f) && x.q.Dst == f.Src && !f.SNAT
}

// known concludes for a packet of a connection that netfilter knows.
func (x *explainer) known(f conntrack.Flow, byRules policy.Outcome, match func(policy.Outcome) (netip.Prefix, error)) error {
	switch {
	case x.q.Src != f.Src:
		x.note("netfilter knows the connection, which was opened from outside; a packet on its ports belongs to it, whatever it is")
		return x.conclude(policy.PassInbound, match)
	case f.SNAT:
		x.Address, x.Port = f.Xlate.Addr().String(), f.Xlate.Port()
		return x.conclude(policy.MasqKnown, match)
	case !x.isAttached():
		x.elsewhere()
		return nil
	case byRules.Verdict() == policy.Pass:
		return x.conclude(byRules, match)
	}
	x.Verdict = policy.Pass.String()
	x.note("netfilter knows the connection and does not translate it; it asks its rules for the first packet only, and a new connection would get %s", byRules)
	return nil
}

// notePort says how the port is found: nobody knows it before the packet comes.
func (x *explainer) notePort(v iptables.Verdict) {
	what := "port"
	if x.q.Proto == policy.ProtoICMP || x.q.Proto == policy.ProtoICMPv6 {
		what = "identifier"
	}
	where := ""
	if v.Ports != "" {
		where = " of " + v.Ports
	}
	if v.Random {
		x.note("netfilter takes a random %s%s when the packet comes", what, where)
		return
	}
	x.note("netfilter chooses the %s when the packet comes: %d if it is free and among those it may take, else another%s", what, x.q.Src.Port(), where)
}
