package datapath

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/policy"
)

// Tables of a reap record, as in bpf/reap.h.
const (
	reapForward uint8 = iota
	reapReverse
	reapInbound
)

const (
	reapBatch = 64 // records of one run
	reapStart = 16 // offset of the first one
)

// minIdle is how long an entry must have been silent to be worth a look of the reaper: the
// shortest timer is 60 s by default, and pressure shortens it.
const minIdle = 1

// Pressure: above lowWater of a table the timers shrink linearly, down to
// minPercent when it is full. Established TCP keeps its timer.
const (
	lowWater   = 0.7
	minPercent = 10
)

// reaper deletes entries through the in-kernel program, which looks at the clock
// and at both halves of a flow once more before it does.
type reaper struct {
	prog    *ebpf.Program
	records []masqReapRecord
	removed int
}

func (r *reaper) add(ctx context.Context, rec masqReapRecord) error {
	r.records = append(r.records, rec)
	if len(r.records) < reapBatch {
		return nil
	}
	return r.flush(ctx)
}

func (r *reaper) flush(ctx context.Context) error {
	if len(r.records) == 0 {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	var buf bytes.Buffer
	buf.Write(make([]byte, reapStart))
	for _, rec := range r.records {
		if err := binary.Write(&buf, binary.NativeEndian, rec); err != nil {
			return fmt.Errorf("encode reap record: %w", err)
		}
	}
	r.records = r.records[:0]
	n, err := r.prog.Run(&ebpf.RunOptions{Data: buf.Bytes()})
	if err != nil {
		return fmt.Errorf("run the reaper: %w", err)
	}
	r.removed += int(n)
	return nil
}

// sweeper walks the flow tables.
type sweeper struct {
	tables [2]flowTables // IPv4, IPv6
	prog   *ebpf.Program
}

func newSweeper(objs *masqObjects) (*sweeper, error) {
	return &sweeper{
		prog: objs.Reap,
		tables: [2]flowTables{
			{objs.Forward4, objs.Reverse4, objs.Inbound4, true},
			{objs.Forward6, objs.Reverse6, objs.Inbound6, false},
		},
	}, nil
}

// Sweep expires what is past its timer, ends the mappings whose external address
// has left the node, and detaches devices that have drained. It needs a policy:
// before the first Apply it does nothing.
func (d *Datapath) Sweep(ctx context.Context) (Swept, error) {
	if d.applied == nil {
		return Swept{}, nil
	}
	in := d.applied.policy.Input()
	local := make(map[netip.Addr]bool)
	for _, a := range in.HostAddrs {
		local[a.WithZone("")] = true
	}
	for _, dev := range in.Devices {
		local[dev.IPv4], local[dev.IPv6] = true, true
	}
	s, held, err := d.sweeper.sweep(ctx, local, len(in.Ports))
	if err != nil {
		return s, err
	}
	return s, d.detachDrained(held)
}

// sweep returns the result and whether any mapping is left.
func (s *sweeper) sweep(ctx context.Context, local map[netip.Addr]bool, pool int) (Swept, bool, error) {
	var out Swept
	start := time.Now()
	now, err := monotonicSeconds()
	if err != nil {
		return out, false, err
	}
	ports := newPortTally(pool)
	expired, vanished, orphans := &reaper{prog: s.prog}, &reaper{prog: s.prog}, &reaper{prog: s.prog}
	for i, t := range s.tables {
		u := &out.Usage[i]
		u.Limit, u.InboundLimit = int(t.forward.MaxEntries()), int(t.inbound.MaxEntries())
		if err := s.count(t, u); err != nil {
			return out, false, err
		}
		percent := pressure(u.Flows, u.Limit)
		for e, err := range t.all(t.forward) {
			if err != nil {
				return out, false, err
			}
			rec := masqReapRecord{Key: e.key.tuple(), Table: reapForward, Percent: percent}
			ports.add(e)
			switch {
			case !local[e.xlate.Addr()]:
				rec.Force = 1
				err = vanished.add(ctx, rec)
			case now-e.seen > minIdle:
				err = expired.add(ctx, rec)
			}
			if err != nil {
				return out, false, err
			}
		}
		for e, err := range t.all(t.reverse) {
			if err != nil {
				return out, false, err
			}
			if now-e.seen > minIdle {
				err = orphans.add(ctx, masqReapRecord{Key: e.key.tuple(), Table: reapReverse, Percent: 100})
			}
			if err != nil {
				return out, false, err
			}
		}
		for e, err := range t.allInbound() {
			if err != nil {
				return out, false, err
			}
			if now-e.seen > minIdle {
				err = expired.add(ctx, masqReapRecord{Key: e.key.tuple(), Table: reapInbound, Percent: pressure(u.Inbound, u.InboundLimit)})
			}
			if err != nil {
				return out, false, err
			}
		}
	}
	err = errors.Join(expired.flush(ctx), vanished.flush(ctx), orphans.flush(ctx))
	out.Expired, out.Vanished, out.Orphans = expired.removed, vanished.removed, orphans.removed
	out.Worst, out.Took = ports.worst(), time.Since(start)
	return out, out.Usage[0].Flows+out.Usage[1].Flows > out.Expired+out.Vanished, err
}

// count fills the used numbers: the kernel keeps none for a preallocated table.
func (s *sweeper) count(t flowTables, u *Usage) error {
	for _, err := range t.all(t.forward) {
		if err != nil {
			return err
		}
		u.Flows++
	}
	for _, err := range t.allInbound() {
		if err != nil {
			return err
		}
		u.Inbound++
	}
	return nil
}

// pressure is the percentage of the timers in force at a fill level.
func pressure(used, limit int) uint32 {
	fill := float64(used) / float64(max(limit, 1))
	if fill <= lowWater {
		return 100
	}
	return uint32(max(minPercent, 100-(100-minPercent)*(fill-lowWater)/(1-lowWater)))
}

// detachDrained detaches devices that are no masquerade devices any more, once
// no mapping is left that could need them.
func (d *Datapath) detachDrained(held bool) error {
	if held {
		return nil
	}
	var errs []error
	for _, a := range d.attached {
		if a.draining {
			errs = append(errs, d.detach(a))
		}
	}
	return errors.Join(errs...)
}

// portTally finds the remote towards which most ports are taken.
type portTally struct {
	pool int
	used map[portGroup]int
}

// portGroup is what a port must be unique within.
type portGroup struct {
	proto  uint8
	addr   netip.Addr
	remote netip.AddrPort
}

func newPortTally(pool int) *portTally { return &portTally{pool, make(map[portGroup]int)} }

func (t *portTally) add(e flowEntry) {
	switch e.key.proto {
	case policy.ProtoTCP, policy.ProtoUDP, policy.ProtoUDPLite, policy.ProtoSCTP:
		t.used[portGroup{e.key.proto, e.xlate.Addr(), e.key.remote}]++
	}
}

func (t *portTally) worst() PortUse {
	var w PortUse
	w.Pool = t.pool
	for g, n := range t.used {
		if n > w.Used || (n == w.Used && g.remote.Compare(w.Remote) < 0) {
			w.Proto, w.Addr, w.Remote, w.Used = g.proto, g.addr, g.remote, n
		}
	}
	return w
}
