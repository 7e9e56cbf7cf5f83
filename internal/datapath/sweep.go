package datapath

import (
	"context"
	"errors"
	"math"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
)

// Pressure: above lowWater of a table the timers shrink linearly, down to
// minPercent when it is full. Established TCP keeps its timer.
const (
	lowWater   = 0.7
	minPercent = 10
)

// pressure is the percentage of the timers in force at a fill level.
func pressure(used, limit int) uint32 {
	fill := float64(used) / float64(max(limit, 1))
	if fill <= lowWater {
		return 100
	}
	return uint32(max(minPercent, 100-(100-minPercent)*(fill-lowWater)/(1-lowWater)))
}

// sweeper walks the flow tables.
type sweeper struct {
	tables [2]flowTables // IPv4, IPv6
	prog   *ebpf.Program
	last   [2]Usage // of the previous walk: the kernel keeps no count of a preallocated table
	seed   uint64   // of the next orphan filter
}

func newSweeper(objs *objects) *sweeper {
	return &sweeper{
		prog: objs.Reap,
		tables: [2]flowTables{
			{objs.Forward4, objs.Reverse4, objs.Inbound4, true},
			{objs.Forward6, objs.Reverse6, objs.Inbound6, false},
		},
	}
}

// sweepFacts is what a walk needs to know of the policy.
type sweepFacts struct {
	local  map[netip.Addr]bool // addresses of the node
	timers timers
	pool   int
}

// Sweep expires what is past its timer, ends the mappings whose external address
// has left the node, and detaches devices that have drained. It needs a policy:
// before the first Apply it does nothing.
func (d *Datapath) Sweep(ctx context.Context) (Swept, error) {
	if d.applied == nil {
		return Swept{}, nil
	}
	in := d.applied.policy.Input()
	facts := sweepFacts{local: make(map[netip.Addr]bool), timers: renderTimers(in.Timeouts), pool: len(in.Ports)}
	for _, a := range in.HostAddrs {
		facts.local[a.WithZone("")] = true
	}
	for _, dev := range in.Devices {
		facts.local[dev.IPv4], facts.local[dev.IPv6] = true, true
	}
	for _, r := range in.RouteSources {
		facts.local[r.Source] = true
	}
	s, oldest, err := d.sweeper.sweep(ctx, facts)
	if err != nil {
		return s, err
	}
	return s, d.detachDrained(oldest)
}

// sweep returns the result and the second in which the oldest mapping was made.
func (s *sweeper) sweep(ctx context.Context, facts sweepFacts) (out Swept, oldest uint32, err error) {
	start := time.Now()
	now, err := monotonicSeconds()
	if err != nil {
		return out, 0, err
	}
	ports := newPortTally(facts.pool)
	oldest = now + math.MaxInt32/2 // none
	for i, t := range s.tables {
		w := walker{
			facts: facts, ctx: ctx, now: now, tables: t, ports: ports, oldest: &oldest,
			paired:  newPairFilter(s.last[i].Flows, s.seed),
			expired: reaper{prog: s.prog}, vanished: reaper{prog: s.prog}, orphans: reaper{prog: s.prog},
			percent:        pressure(s.last[i].Flows, int(t.forward.MaxEntries())),
			inboundPercent: pressure(s.last[i].Inbound, int(t.inbound.MaxEntries())),
		}
		s.seed++
		err = errors.Join(w.walk(), w.expired.flush(ctx), w.vanished.flush(ctx), w.orphans.flush(ctx))
		out.Expired += w.expired.removed + w.expiredInbound
		out.Vanished += w.vanished.removed
		out.Orphans += w.orphans.removed
		out.Usage[i], s.last[i] = w.usage, w.usage
		if err != nil {
			return out, oldest, err
		}
	}
	out.Worst, out.Took = ports.worst(), time.Since(start)
	return out, oldest, nil
}
