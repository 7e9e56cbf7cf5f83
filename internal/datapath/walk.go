package datapath

import (
	"context"
	"sync/atomic"

	"bauta.dev/bauta/internal/policy"
)

// walker goes once through the tables of one family. It names candidates, the
// reaper decides: an entry whose own direction is silent for longer than the
// timer that its bits speak for. What only the other half knows, the walk
// through the other table finds.
type walker struct {
	facts   *atomic.Pointer[sweepFacts] // the newest: Apply may go on meanwhile
	timers  timers
	ctx     context.Context
	now     uint32
	tables  flowTables
	percent uint32 // of the timers
	// inboundPercent is the same for connections opened from outside.
	inboundPercent uint32

	usage          Usage
	protos         [256]int // flows, by protocol number
	ports          *portTally
	quota          *quota
	oldest         *uint32
	paired         pairFilter
	expired        reaper
	vanished       reaper
	orphans        reaper
	dead           reaper
	kept           int // dead entries
	buriedBefore   int // that the previous walk kept
	expiredInbound int
}

func (w *walker) walk() error {
	w.usage.Limit, w.usage.InboundLimit = int(w.tables.forward.MaxEntries()), int(w.tables.inbound.MaxEntries())
	for e, err := range w.tables.all(w.tables.forward) {
		if err == nil {
			err = w.forward(e)
		}
		if err != nil {
			return err
		}
	}
	for e, err := range w.tables.all(w.tables.reverse) {
		if err == nil {
			err = w.reverse(e)
		}
		if err != nil {
			return err
		}
	}
	if err := w.expired.flush(w.ctx); err != nil {
		return err
	}
	if err := w.vanished.flush(w.ctx); err != nil {
		return err
	}
	w.usage.Flows = max(w.usage.Flows-w.expired.removed-w.vanished.removed, 0)
	return w.walkInbound()
}

func (w *walker) walkInbound() error {
	inbound := reaper{prog: w.expired.prog}
	for e, err := range w.tables.allInbound() {
		if err != nil {
			return err
		}
		w.usage.Inbound++
		if !w.due(e.seen, e.inboundTimer(), w.inboundPercent) {
			continue
		}
		if err := inbound.add(w.ctx, masqReapRecord{Key: e.key.tuple(), Table: reapInbound, Percent: w.inboundPercent}); err != nil {
			return err
		}
	}
	err := inbound.flush(w.ctx)
	w.expiredInbound = inbound.removed
	w.usage.Inbound -= inbound.removed
	return err
}

func (w *walker) forward(e flowEntry) error {
	if w.usage.Flows++; w.usage.Flows%walkBatch == 0 && w.ctx.Err() != nil {
		return w.ctx.Err()
	}
	if e.foreign() {
		w.usage.Foreign++
	}
	w.protos[e.key.proto]++
	w.ports.add(e)
	w.quota.add(e)
	w.paired.add(e.reverseKey())
	rec := masqReapRecord{Key: e.key.tuple(), Table: reapForward, Percent: w.percent}
	// After the entry was read: Apply makes an address known before it is used.
	if !w.facts.Load().local[e.xlate.Addr()] {
		rec.Force = 1
		return w.vanished.add(w.ctx, rec)
	}
	if w.due(e.seen, e.forwardTimer(), w.percent) {
		return w.expired.add(w.ctx, rec)
	}
	return nil
}

func (w *walker) reverse(e flowEntry) error {
	if e.dead() {
		return w.buried(e)
	}
	if int32(*w.oldest-e.created) > 0 {
		*w.oldest = e.created // a reopened connection keeps that of its first
	}
	if !w.paired.has(e.key) {
		return w.orphans.add(w.ctx, masqReapRecord{Key: e.key.tuple(), Table: reapReverse, Percent: 100})
	}
	if timer, ok := e.reverseTimer(); ok && w.due(e.seen, timer, w.percent) {
		return w.expired.add(w.ctx, masqReapRecord{Key: e.inner().tuple(), Table: reapForward, Percent: w.percent})
	}
	return nil
}

// quarantine is QUARANTINE_SECONDS of bpf/config.h.
const quarantine = 120

// buried looks at what an ended mapping left: it goes after a while, and earlier
// where ports or entries are scarce.
func (w *walker) buried(e flowEntry) error {
	rec := masqReapRecord{Key: e.key.tuple(), Table: reapReverse, Percent: 100}
	switch {
	case !w.facts.Load().local[e.key.local.Addr()]:
		rec.Force = 1
	case w.percent < 100 || w.buriedBefore+w.usage.Flows > int(lowWater*float64(w.usage.Limit)) || w.ports.scarce(e):
		rec.Percent = 0
	case int32(w.now-e.seen) <= quarantine:
		w.ports.bury(e)
		w.kept++
		return nil
	}
	return w.dead.add(w.ctx, rec)
}

func (w *walker) due(seen uint32, t timer, percent uint32) bool {
	limit := uint64(w.timers[t])
	if t != timerTCPEstablished {
		limit = limit * uint64(percent) / 100
	}
	idle := int32(w.now - seen)
	return idle > 0 && uint64(idle) > limit
}

// timer numbers the timers as enum timer of bpf/maps.h does.
type timer int

const (
	timerTCPSyn timer = iota
	timerTCPEstablished
	timerTCPClosing
	timerUDP
	timerUDPStream
	timerICMP
	timerOther
)

// timers are the seconds by timer.
type timers [7]uint32

// forwardTimer is what the leaving direction alone says: flow_timer of bpf/flow.h
// with an answered and otherwise silent other half.
func (e flowEntry) forwardTimer() timer {
	switch e.key.proto {
	case policy.ProtoTCP:
		if e.bits&(bitRst|bitFin) != 0 {
			return timerTCPClosing
		}
		if e.bits&bitData != 0 {
			return timerTCPEstablished
		}
		return timerTCPSyn
	case policy.ProtoUDP, policy.ProtoUDPLite:
		return timerUDPStream
	}
	return e.otherTimer()
}

// reverseTimer is the shorter timer that the arriving direction asks for: because
// it closed the connection, or never answered.
func (e flowEntry) reverseTimer() (timer, bool) {
	switch {
	case e.key.proto == policy.ProtoTCP && e.bits&(bitRst|bitFin) != 0:
		return timerTCPClosing, true
	case e.packets > 0:
		return 0, false
	case e.key.proto == policy.ProtoTCP:
		return timerTCPSyn, true
	case e.key.proto == policy.ProtoUDP || e.key.proto == policy.ProtoUDPLite:
		return timerUDP, true
	}
	return 0, false
}

// inboundTimer is inbound_timer of bpf/inbound.h.
func (e flowEntry) inboundTimer() timer {
	switch {
	case e.key.proto == policy.ProtoUDP || e.key.proto == policy.ProtoUDPLite:
		return timerUDP
	case e.key.proto != policy.ProtoTCP:
		return e.otherTimer()
	case e.bits&bitRst != 0 || e.bits&(bitFin|bitOutFin) == bitFin|bitOutFin:
		return timerTCPClosing
	case e.bits&(bitData|bitOut) == bitData|bitOut:
		return timerTCPEstablished
	}
	return timerTCPSyn
}

func (e flowEntry) otherTimer() timer {
	if e.key.proto == policy.ProtoICMP || e.key.proto == policy.ProtoICMPv6 {
		return timerICMP
	}
	return timerOther
}
