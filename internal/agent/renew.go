package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/policy"
)

// errRenew says that a policy is in force, but maybe not for connections of before.
var errRenew = errors.New("connections that began without rules")

// held tells whether the rules of an earlier agent were in force as it wrote them, until now:
// those of policy.json or, if it ended before it wrote that, those that are wanted.
func (n *netfilter) held(ctx context.Context, wanted *policy.Policy) bool {
	for _, p := range []*policy.Policy{n.before, wanted} {
		if p == nil {
			continue
		}
		if held, err := n.rules.Held(ctx, p); held && err == nil {
			return true
		}
	}
	return false
}

// renew ends the connections that netfilter knows as untranslated although the rules would
// translate them: they began while these were not in force, and netfilter would leave them
// so for as long as they live. Their next packet is a new connection's. The rules have to be
// in force. Connections that others began, and those that drain with the programs, stay.
func (n *netfilter) renew(ctx context.Context) error {
	if !n.renewing {
		return nil
	}
	start := time.Now()
	flows, err := n.untranslated(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", errRenew, err)
	}
	ended, err := n.end(ctx, flows)
	if err != nil {
		return fmt.Errorf("%w: %w", errRenew, err)
	}
	n.renewing = false
	n.took = max(n.took, time.Since(start)) // a table may be long
	if ended > 0 {
		level := slog.LevelInfo
		if n.unrest.going {
			level = slog.LevelDebug
		}
		n.log.Log(ctx, level, "connections that had begun without rules ended, their next packet is a new one", "connections", ended)
	}
	return nil
}

func (n *netfilter) untranslated(ctx context.Context) ([]conntrack.Flow, error) {
	p := n.policy
	flows, err := n.flows(ctx, conntrack.Filter{Sources: prefixes(p.Input().Sources)})
	if err != nil {
		return nil, err
	}
	flows = slices.DeleteFunc(flows, func(f conntrack.Flow) bool {
		// A port may be another one without any rule, to avoid a clash.
		return f.Zone != 0 || f.Xlate.Addr() != f.Src.Addr() || !leaks(p, f, p.Input().Devices)
	})
	if len(flows) == 0 {
		return nil, nil
	}
	if n.spare != nil {
		spared, err := n.spare(ctx)
		if err != nil {
			return nil, err
		}
		flows = slices.DeleteFunc(flows, func(f conntrack.Flow) bool { return spared[flowKey{f.Proto, f.Src, remoteOf(f)}] })
	}
	by, err := n.leave(destinations(flows))
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(flows, func(f conntrack.Flow) bool {
		index, known := by[remoteOf(f).Addr()]
		d, ours := p.Device(index)
		return known && !(ours && leaks(p, f, []policy.Device{d}))
	}), nil
}

// destinations are whom packets reach, each once.
func destinations(flows []conntrack.Flow) []netip.Addr {
	var list []netip.Addr
	seen := make(map[netip.Addr]bool)
	for _, f := range flows {
		if a := remoteOf(f).Addr(); !seen[a] {
			seen[a], list = true, append(list, a)
		}
	}
	return list
}

// leaks tells whether a connection would be translated or dropped if it began now, on one of
// the devices.
func leaks(p *policy.Policy, f conntrack.Flow, devices []policy.Device) bool {
	pkt := policy.Packet{Src: f.Src.Addr(), Dst: remoteOf(f).Addr(), Proto: f.Proto, TCPFlags: policy.TCPSyn, ICMPType: f.ICMPType}
	switch {
	case pkt.ICMPType != 0: // not an echo request
	case f.Proto == policy.ProtoICMP:
		pkt.ICMPType = 8
	case f.Proto == policy.ProtoICMPv6:
		pkt.ICMPType = 128
	}
	return slices.ContainsFunc(devices, func(d policy.Device) bool {
		pkt.Device = d.Index
		o := p.Decide(pkt).Outcome
		return o == policy.MasqNew || o.Verdict() == policy.Drop
	})
}

// spared are the connections of programs: these translate what netfilter does not, and know
// who was called from outside before netfilter looked.
func (o *oldPrograms) spared(ctx context.Context) (map[flowKey]bool, error) {
	if o.programs == nil {
		return nil, nil
	}
	flows, err := o.programs.Flows(ctx)
	if err != nil {
		return nil, err
	}
	spared := make(map[flowKey]bool, len(flows))
	for _, f := range flows {
		spared[keyOf(f)] = true
	}
	k, err := datapath.Inspect(o.root)
	if err != nil {
		return nil, err
	}
	defer k.Close()
	all, err := k.Mappings(datapath.Filter{All: true})
	if err != nil {
		return nil, err
	}
	for _, m := range all {
		if m.Kind == datapath.KindInbound {
			spared[flowKey{m.Proto, m.Dst, m.Src}] = true
		}
	}
	return spared, nil
}
