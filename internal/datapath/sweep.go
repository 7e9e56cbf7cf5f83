package datapath

import (
	"context"
	"errors"
	"maps"
	"math"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/policy"
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

// sweeper walks the flow tables, in whatever goroutine: it shares nothing with the
// owner of the data plane but the facts and the descriptors of the maps.
type sweeper struct {
	facts atomic.Pointer[sweepFacts] // nil before the first Apply
	prog  *ebpf.Program

	walking sync.Mutex    // around what follows
	tables  [2]flowTables // IPv4, IPv6
	quota   quota
	last    [2]Usage       // of the previous walk: the kernel keeps no count of a preallocated table
	buried  [2]int         // dead entries that it left
	graves  map[uint64]int // the same by remote, see portTally
	remotes int            // that had flows
	seed    uint64         // of the next orphan filter
}

func newSweeper(objs *objects) *sweeper {
	return &sweeper{
		prog: objs.Reap, quota: quota{pods: objs.Pods, shares: objs.Shares},
		tables: [2]flowTables{
			{objs.Forward4, objs.Reverse4, objs.Inbound4, true},
			{objs.Forward6, objs.Reverse6, objs.Inbound6, false},
		},
	}
}

// sweepFacts is what a walk needs to know of the policy. They are never changed,
// but replaced.
type sweepFacts struct {
	generation uint64              // number of the Apply they come from
	local      map[netip.Addr]bool // addresses of the node
	timers     timers
	pool       int
}

func renderFacts(in policy.Input, generation uint64) *sweepFacts {
	f := &sweepFacts{generation: generation, local: make(map[netip.Addr]bool), timers: renderTimers(in.Timeouts), pool: len(in.Ports)}
	for _, a := range in.HostAddrs {
		f.local[a.WithZone("")] = true
	}
	for _, dev := range in.Devices {
		f.local[dev.IPv4], f.local[dev.IPv6] = true, true
	}
	for _, r := range in.RouteSources {
		f.local[r.Source] = true
	}
	return f
}

// expect makes the addresses of a policy known before a packet can have one of
// them. Those of the policies before it stay known until publish.
func (s *sweeper) expect(in policy.Input) {
	old := s.facts.Load()
	if old == nil {
		return // nothing walks
	}
	both := *old
	both.local = renderFacts(in, 0).local
	maps.Copy(both.local, old.local)
	s.facts.Store(&both)
}

// Sweep is Walk and Drain in one, for the goroutine that owns the data plane.
func (d *Datapath) Sweep(ctx context.Context) (Swept, error) {
	s, err := d.Walk(ctx)
	if err != nil {
		return s, err
	}
	return s, d.Drain(s)
}

// Walk expires what is past its timer, and ends the mappings whose external address
// has left the node. It needs a policy: before the first Apply it does nothing.
//
// A walk through a million flows takes more than a second. So Walk, and only Walk,
// may run in another goroutine than the one that calls all other methods, at the
// same time as any of them but Close, which waits for nobody. Two walks follow one
// another.
func (d *Datapath) Walk(ctx context.Context) (Swept, error) {
	s, err := d.sweeper.walk(ctx)
	if err == nil && s.generation != 0 {
		err = d.beat()
	}
	return s, err
}

// Drain detaches devices that are no masquerade devices any more, once a walk that
// began after they were given up has found no mapping that is as old as that.
func (d *Datapath) Drain(s Swept) error {
	if d.taken {
		d.armReclaim() // if that failed before
	}
	var errs []error
	for _, a := range d.attached {
		if a.draining && s.generation > a.given && int32(s.oldest-a.since) > 0 {
			errs = append(errs, d.detach(a))
		}
	}
	return errors.Join(errs...)
}

// byProto leaves the zeroes out.
func byProto(counts *[256]int) map[uint8]int {
	out := make(map[uint8]int)
	for proto, n := range counts {
		if n > 0 {
			out[uint8(proto)] = n
		}
	}
	return out
}

func (s *sweeper) walk(ctx context.Context) (out Swept, err error) {
	s.walking.Lock()
	defer s.walking.Unlock()
	facts := s.facts.Load()
	if facts == nil {
		return out, nil
	}
	start := time.Now()
	now, err := monotonicSeconds()
	if err != nil {
		return out, err
	}
	ports := newPortTally(facts.pool, s.remotes)
	ports.graves = s.graves
	if err := s.quota.begin(); err != nil {
		return out, err
	}
	out.generation, out.oldest = facts.generation, now+math.MaxInt32/2 // none
	for i, t := range s.tables {
		w := walker{
			facts: &s.facts, timers: facts.timers, ctx: ctx, now: now, tables: t, ports: ports, quota: &s.quota, oldest: &out.oldest,
			paired:  newPairFilter(s.last[i].Flows, s.seed),
			expired: reaper{prog: s.prog}, vanished: reaper{prog: s.prog}, orphans: reaper{prog: s.prog}, dead: reaper{prog: s.prog}, buriedBefore: s.buried[i],
			percent:        pressure(s.last[i].Flows, int(t.forward.MaxEntries())),
			inboundPercent: pressure(s.last[i].Inbound, int(t.inbound.MaxEntries())),
		}
		s.seed++
		err = errors.Join(w.walk(), w.expired.flush(ctx), w.vanished.flush(ctx), w.orphans.flush(ctx), w.dead.flush(ctx))
		out.Expired += w.expired.removed + w.expiredInbound
		out.Vanished += w.vanished.removed
		out.Orphans += w.orphans.removed
		out.Usage[i], s.last[i], s.buried[i] = w.usage, w.usage, w.kept
		out.Protos[i] = byProto(&w.protos)
		if err != nil {
			return out, err
		}
	}
	err = s.quota.settle(ctx, s.prog, out.Usage)
	s.graves, s.remotes = ports.buried, len(ports.used)
	out.Worst, out.Took = ports.worst(), time.Since(start)
	return out, err
}
