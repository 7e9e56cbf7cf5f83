package agent

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"bauta.dev/bauta/internal/nodes"
	"bauta.dev/bauta/internal/policy"
)

// moment is what of a state is worth an Event of the Node object when it changes.
type moment struct {
	config   string                   // why a file is rejected
	attach   string                   // what is not attached
	addrs    map[string][2]netip.Addr // masquerade addresses, by device
	foreign  []string                 // rules of others
	noPort   uint64                   // packets that found no external port
	measured bool                     // noPort is known
}

// momentOf is what a view shows.
func momentOf(v *view, foreign []string) moment {
	m := moment{foreign: foreign, addrs: make(map[string][2]netip.Addr)}
	m.config = cmp.Or(v.agent.ConfigError, v.file.IPMasqAgent.LastError, v.file.NodesFile.LastError)
	var parts []string
	if v.agent.AttachError != "" {
		parts = append(parts, v.agent.AttachError)
	}
	for _, name := range v.missing {
		parts = append(parts, fmt.Sprintf("device %s is missing", name))
	}
	m.attach = strings.Join(parts, "; ")
	if v.agent.Ready {
		for _, d := range v.file.Devices {
			m.addrs[d.Name] = [2]netip.Addr{d.IPv4, d.IPv6}
		}
	}
	return m
}

// happened is what one state has and the one before had not.
func happened(before, now moment) []nodes.Event {
	var list []nodes.Event
	add := func(warning bool, reason, format string, args ...any) {
		list = append(list, nodes.Event{Warning: warning, Reason: reason, Message: fmt.Sprintf(format, args...)})
	}
	switch {
	case now.config == before.config:
	case now.config != "":
		add(true, "ConfigInvalid", "%s: the last good state stays in force", now.config)
	default:
		add(false, "ConfigApplied", "the configuration is valid again")
	}
	switch {
	case now.attach == before.attach:
	case now.attach != "":
		add(true, "DeviceNotAttached", "%s", now.attach)
	default:
		add(false, "DeviceAttached", "every device is attached")
	}
	for _, name := range slices.Sorted(maps.Keys(now.addrs)) {
		old, known := before.addrs[name]
		for i, a := range now.addrs[name] {
			if !known || !old[i].IsValid() || a == old[i] {
				continue
			}
			add(!a.IsValid(), "MasqueradeAddressChanged", "device %s: %s masquerade address %s, was %s", name, [2]string{"IPv4", "IPv6"}[i], orNone(a), old[i])
		}
	}
	for _, text := range now.foreign {
		if !slices.Contains(before.foreign, text) {
			add(true, "ForeignMasquerade", "%s", text)
		}
	}
	if before.measured && now.measured && now.noPort > before.noPort {
		// Without the number, which would make each one another.
		add(true, "PortsExhausted", "connections of pods found no free external port (%s): bauta status names the remote, snat-port-range can be widened", policy.DropNoPort)
	}
	return list
}

func orNone(a netip.Addr) string {
	if !a.IsValid() {
		return "none"
	}
	return a.String()
}

// tell makes Events of what has changed since the last time.
func (l *loop) tell(now moment) {
	if l.event == nil {
		return
	}
	if !now.measured {
		now.noPort, now.measured = l.told.noPort, l.told.measured
	}
	for _, e := range happened(l.told, now) {
		l.event(e)
	}
	l.told = now
}

// countNoPort reads how many packets found no port. In iptables mode nobody counts them.
func (l *loop) countNoPort() {
	if l.event == nil || !l.cfg.BPF { // a look at rules takes programs and the lock
		return
	}
	k, err := l.inspect()
	if err != nil {
		return // an Apply tells
	}
	defer k.Close()
	meter, ok := k.(flowMeter)
	if !ok {
		return
	}
	counts, err := meter.Counts()
	if err != nil {
		return
	}
	now := l.told
	now.noPort, now.measured = 0, true
	for _, c := range counts {
		if c.Outcome == policy.DropNoPort {
			now.noPort += c.Packets
		}
	}
	l.tell(now)
}

// liftTaint asks for the start-up taint to be removed while the node has it and is ready, by
// what /readyz says: a policy alone masquerades nothing while there is no device.
func (l *loop) liftTaint(v *view) {
	if l.cfg.StartupTaint == "" || l.kube == nil || !slices.Contains(l.kube.Snapshot().Taints, l.cfg.StartupTaint) {
		return
	}
	if len(v.health(time.Now()).Unready()) == 0 {
		l.signals.taint.put()
	}
}

// taintLifter removes the taint when it is told to, until that is done. It may lack the right,
// or the API server be away.
func (l *loop) taintLifter(ctx context.Context, lift func(context.Context, string) error) error {
	const first, longest, patience = time.Second, 30 * time.Second, 10 * time.Second
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-l.signals.taint:
		}
		for pause := first; ; pause = min(2*pause, longest) {
			select { // told again while it was waited: this try is for that too
			case <-l.signals.taint:
			default:
			}
			ask, cancel := context.WithTimeout(ctx, patience)
			err := lift(ask, l.cfg.StartupTaint)
			cancel()
			if ctx.Err() != nil {
				return nil
			}
			if err == nil {
				l.log.Info("start-up taint lifted", "taint", l.cfg.StartupTaint)
				break
			}
			wait := time.Duration(float64(pause) * (0.5 + rand.Float64()))
			l.log.Warn("start-up taint not lifted, retrying", "error", err, "after", wait)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(wait):
			}
		}
	}
}
