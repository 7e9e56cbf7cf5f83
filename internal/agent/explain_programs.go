package agent

import (
	"net/netip"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/policy"
)

// askPrograms runs the program of eBPF mode, dry.
func (x *explainer) askPrograms(k *datapath.Inspector) error {
	if !x.isAttached() {
		x.elsewhere()
		return nil
	}
	a, err := x.run(k)
	if err != nil {
		return err
	}
	match := func(o policy.Outcome) (netip.Prefix, error) { return k.Match(o, x.q.Src.Addr(), x.q.Dst.Addr()) }
	if err := x.conclude(a.Outcome, match); err != nil {
		return err
	}
	if a.Outcome.Verdict() == policy.Masquerade {
		x.Address, x.Port = a.Source.Addr().String(), a.Source.Port()
	}
	if want := x.decision.Address; a.Outcome == policy.MasqNew && want.IsValid() && want != a.Source.Addr() {
		x.note("policy.json says %s: it is not what is in the kernel, which decides", want)
	}
	if a.Inbound && a.Outcome != policy.PassInbound {
		x.note("a connection opened from outside has these addresses and ports: its packets leave untranslated (%s), but this one opens another", policy.PassInbound)
	}
	return nil
}

// run runs the program on the packet.
func (x *explainer) run(k *datapath.Inspector) (datapath.Answer, error) {
	e, err := k.Explain()
	if err != nil {
		return datapath.Answer{}, err
	}
	defer e.Close()
	return e.Ask(datapath.Question{Src: x.q.Src, Dst: x.q.Dst, Proto: x.q.Proto, Device: x.index})
}
